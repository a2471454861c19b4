"""What is found to be wrong with a run before anything slow is done for it, and what status says of one that never began."""

from pathlib import Path

import pytest

from dstune import api
from dstune.config.load import load_run
from dstune.errors import ConfigError, DstuneError, FitError, UsageError
from dstune.launch import rundir, start, submission
from dstune.launch.driver import driver_lock
from dstune.launch.status import StatusFile

_RUN = "name: t\nmodel: {path: builtin:tiny-llama}\ndata: {sources: [{path: builtin:instructions}]}\ncheckpoint: {best: loss}\n"


def test_a_best_checkpoint_wants_something_to_be_judged_by(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text(_RUN)
    with pytest.raises(ConfigError, match="no rows are held out"):
        start.check(load_run(tmp_path / "run.yaml"))
    start.check(load_run(tmp_path / "run.yaml", ["data.validation=0.1"]))


def test_a_kernel_that_there_is_not_is_found_before_the_data_is_prepared(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text(_RUN)
    start.check(load_run(tmp_path / "run.yaml", ["data.validation=0.1", "model.kernels=[rotary]"]))
    with pytest.raises(ConfigError, match=r"(?s)'rotery' is no kernel.*did you mean 'rotary'"):
        start.check(load_run(tmp_path / "run.yaml", ["model.kernels={rotery: false}"]))


def test_what_the_model_cannot_do_is_found_before_the_data_is_prepared(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text(_RUN)
    with pytest.raises(ConfigError, match=r"train\.lr_scales: 'layers\.\*' matches no parameter"):
        start.check(load_run(tmp_path / "run.yaml", ["data.validation=0.1", "train.lr_scales={layers.*: 2}"]))


def test_a_resume_that_the_model_refuses_changes_nothing(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text(_RUN)
    paths = rundir.create(load_run(tmp_path / "run.yaml", ["data.validation=0.1"]))
    before = paths.config.read_text()
    with pytest.raises(ConfigError, match="'rotery' is no kernel"):
        api.resume(paths.root, ["model.kernels={rotery: false}"])
    assert paths.config.read_text() == before


def test_rows_that_will_not_be_packed_are_not_shared(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text(_RUN)
    shared = ["data.validation=0.1", "cluster.workers=2", "cluster.sequence_parallel=2", "data.packing=false"]
    with pytest.raises(ConfigError, match="2 workers would share rows of the layout padded"):
        start.check(load_run(tmp_path / "run.yaml", shared))


def test_a_run_that_nobody_started_says_so(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text(_RUN)
    paths = rundir.create(load_run(tmp_path / "run.yaml"))
    now = api.status(paths.root)
    assert (now["state"], now["reason"]) == ("planned", "nothing drives it; `dstune resume` starts it")


def test_a_submission_that_is_refused_is_told_by_status(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "sbatch").write_text("#!/bin/sh\necho 'sbatch: error: Invalid partition' >&2\nexit 1\n")
    (tmp_path / "sbatch").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    (tmp_path / "run.yaml").write_text(_RUN)
    run = load_run(tmp_path / "run.yaml")
    paths = rundir.create(run)
    with pytest.raises(FitError):
        submission.submit(paths, run.config, "slurm", start.site_of(run), None)
    now = api.status(paths.root)
    assert now["state"] == "planned" and now["reason"].startswith(
        "not submitted to slurm: sbatch: sbatch: error: Invalid"
    )
    assert now["reason"].endswith(f"`dstune resume {paths.root} --to slurm` hands it over again")


def test_a_start_that_fails_is_told_by_status(tmp_path: Path) -> None:
    small = "name: t\nmodel: {path: builtin:tiny-llama}\ndata: {sources: [{path: builtin:instructions, limit: 20}], max_length: 64}\n"
    (tmp_path / "run.yaml").write_text(small + "train: {max_steps: 1, global_batch_size: 2}\n")
    with pytest.raises(DstuneError, match="cannot reach Ray"):
        api.train(tmp_path / "run.yaml", address="127.0.0.1:1")
    now = api.status(tmp_path / "run.yaml")
    assert now["state"] == "failed" and now["reason"].startswith("not started: 127.0.0.1:1: cannot reach Ray")
    assert now["reason"].endswith("tries again")


def test_a_run_whose_driver_is_gone_is_not_running(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "run.yaml").write_text(_RUN)
    paths = rundir.create(load_run(tmp_path / "run.yaml"))
    StatusFile(paths).write(state="queued")
    assert api.status(paths.root)["state"] == "queued"  # this process may be waiting for sbatch
    StatusFile(paths).write(state="running", step=3)
    with driver_lock(paths):
        assert api.status(paths.root)["state"] == "running"
    now = api.status(paths.root)
    assert (now["state"], now["step"], now["interrupted"]) == ("failed", 3, True)
    with pytest.raises(UsageError, match="nothing drives this run"):
        api.stop(paths.root)
    monkeypatch.setattr("socket.gethostname", lambda: "elsewhere")
    now = api.status(paths.root)
    assert (now["state"], now["interrupted"]) == ("running", False) and "holds no lock that is seen here" in now[
        "reason"
    ]
