"""A run whose two workers share each row: the losses, the data and the checkpoints of a run whose worker has it alone."""

from pathlib import Path

import pytest

from dstune.config.load import load_run
from dstune.errors import ConfigError, FitError
from dstune.launch import start
from tests.runs.test_adapters import go_back_to
from tests.runs.tiny import drive, finished, metrics, write_run
from tests.spawn import read_lines


@pytest.mark.dist
def test_losses_data_and_checkpoints_do_not_depend_on_how_many_share_a_row(tmp_path: Path) -> None:
    sections = {
        "model": {"dtype": "fp32"},
        "data": {"validation": 0.1},
        "train": {"max_steps": 6},
        "validate": {"every": 3},
    }
    alone = finished(write_run(tmp_path / "alone", **sections, cluster={"workers": 1}), 1)
    two = {"workers": 2, "sequence_parallel": 2}
    paths = finished(write_run(tmp_path / "two", **sections, cluster=two), 2)
    assert set(metrics(paths, "world")) == {2}
    wanted = metrics(alone, "loss")
    for name in ("batch_digest", "tokens", "supervised_tokens", "rows", "epoch"):
        assert metrics(paths, name) == metrics(alone, name)
    assert metrics(paths, "loss") == pytest.approx(wanted, rel=1e-5)
    assert metrics(paths, "grad_norm") == pytest.approx(metrics(alone, "grad_norm"), rel=1e-4)
    phases = zip(*(metrics(paths, f"{name}_seconds") for name in ("forward", "backward", "optimizer")), strict=True)
    for exchanged, parts in zip(metrics(paths, "communication_seconds"), phases, strict=True):
        assert 0 < exchanged < sum(parts) + 1e-4
    held_out = [[record["loss"] for record in read_lines(one.evaluations)] for one in (alone, paths)]
    assert len(held_out[0]) == 3 and held_out[1] == pytest.approx(held_out[0], rel=1e-5)

    go_back_to(paths, 3, "cluster.workers=1", "cluster.sequence_parallel=1")
    assert drive(paths.root, 1, new=False).state == "succeeded"
    assert metrics(paths, "world") == [2, 2, 2, 1, 1, 1]
    assert metrics(paths, "batch_digest") == metrics(alone, "batch_digest")
    assert metrics(paths, "loss") == pytest.approx(wanted, rel=1e-5)


def test_what_cannot_be_shared_is_refused_before_anything_is_done(tmp_path: Path) -> None:
    run = write_run(tmp_path, cluster={"workers": 2, "sequence_parallel": 2})
    start.check(load_run(run))
    with pytest.raises(ConfigError, match="wants a multiple of so many workers"):
        load_run(run, ["cluster.workers=3"])
    with pytest.raises(ConfigError, match=r"train\.neftune_alpha"):
        load_run(run, ["train.neftune_alpha=5.0"])
    with pytest.raises(ConfigError, match="4 attention heads; expected one of 1, 2, 4"):
        start.check(load_run(run, ["cluster.workers=3", "cluster.sequence_parallel=3"]))
    with pytest.raises(ConfigError, match="sequence-to-sequence"):
        start.check(load_run(run, ["model={path: builtin:tiny-t5}"]))
    with pytest.raises(FitError, match="4 rows for 20 workers in groups of 2"):
        start.check(load_run(run, ["cluster.workers=20"]))
