"""Runs handed to a real Ray head with a token: submitted, followed, stopped with a commit."""

import secrets

import pytest

from dstune.atomic import write_json
from dstune.config.schema import RunConfig, SiteConfig
from dstune.errors import UsageError
from dstune.launch import ray_job, submission
from dstune.launch.driver import driver_lock
from dstune.launch.status import StatusFile, read_status
from dstune.paths import step_directory
from tests.launch.process_executor import steps, stub_run
from tests.launch.stub_drive import wrapper

pytestmark = pytest.mark.ray
CONFIG = RunConfig.model_validate({"name": "x", "model": {"path": "m"}, "data": {"prepared": "p"}})


def hand_over(folder, head, name="run", **stub):
    """What `submission.submit` does, with a wrapper as the cluster's interpreter."""
    paths = stub_run(folder / name, **stub)
    StatusFile(paths).write(state="queued")
    sent = ray_job.submit(paths, ray_job.request(paths, head.address, {}, python=str(wrapper(folder))))
    write_json(paths.submission, sent)
    return paths, sent


def test_submit_follow_stop_and_status(tmp_path, ray_head):
    paths, _ = hand_over(tmp_path, ray_head, "it's a $(touch pwned) run", steps=2000, seconds=0.1)
    assert submission.status(paths)["state"] in ("queued", "running")
    with pytest.raises(UsageError, match="already"):
        submission.submit(paths, CONFIG, "ray", SiteConfig(), ray_head.address)
    said = []
    for line in submission.logs(paths, follow=True):
        said.append(line)
        if line == "event commit" and "event stop_requested" not in said:
            submission.stop(paths)
            said.append("event stop_requested")
    now = submission.status(paths)
    assert now["state"] == "stopped" and now["step"] < 2000 and not now["interrupted"]
    assert step_directory(paths.checkpoints, now["step"]).exists()
    assert any(line.startswith("end stopped at step") for line in said)
    assert any(line.startswith("end stopped at step") for line in submission.logs(paths))
    assert not list(tmp_path.rglob("pwned"))
    with pytest.raises(UsageError, match="over already"):
        submission.stop(paths)


def test_a_worker_killed_inside_a_job_goes_on(tmp_path, ray_head):
    mishap = {"rank": 1, "step": 12, "attempts": [1]}
    paths, _ = hand_over(tmp_path, ray_head, steps=20, seconds=0.05, die=mishap)
    list(submission.logs(paths, follow=True))
    assert submission.status(paths)["state"] == "succeeded"
    assert steps(paths) == list(range(1, 21))


def test_without_the_token_nothing_is_told(tmp_path, ray_head, monkeypatch):
    paths = stub_run(tmp_path / "run")
    job = ray_job.request(paths, ray_head.address, {})
    for token in (secrets.token_hex(32), ""):
        monkeypatch.setenv("RAY_AUTH_TOKEN", token)
        monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", "/nowhere")
        with pytest.raises(UsageError, match="RAY_AUTH_TOKEN"):
            ray_job.submit(paths, job)


def test_no_cluster_is_a_message(tmp_path):
    paths = stub_run(tmp_path / "run")
    with pytest.raises(UsageError, match="refuses"):
        ray_job.submit(paths, ray_job.request(paths, "http://127.0.0.1:9", {}))
    with pytest.raises(UsageError, match="which Ray cluster"):
        ray_job.request(paths, None, {})


@pytest.mark.parametrize("state", ["queued", "running"])
def test_a_run_whose_cluster_does_not_answer_may_be_handed_to_another_and_to_no_other(tmp_path, state):
    paths = stub_run(tmp_path / "run")
    StatusFile(paths).write(state=state)
    write_json(paths.submission, {"to": "ray", "address": "http://127.0.0.1:9", "job_id": "x"})
    now = submission.status(paths)
    assert now["state"] == state and not now["interrupted"] and "is the cluster up" in now["job"]["reason"]
    with pytest.raises(UsageError, match="refuses"):  # it may come back: nothing is taken for gone
        submission.stop(paths)
    with pytest.raises(UsageError, match="name another"):
        submission.submit(paths, CONFIG, "ray", SiteConfig(), "http://127.0.0.1:9/")
    with pytest.raises(UsageError, match="the Ray cluster refuses"):  # the other cluster is asked
        submission.submit(paths, CONFIG, "ray", SiteConfig(), "http://127.0.0.1:8")
    assert read_status(paths)["state"] == state
    with driver_lock(paths), pytest.raises(UsageError, match="already"):
        submission.submit(paths, CONFIG, "ray", SiteConfig(), "http://127.0.0.1:8")


@pytest.mark.parametrize(
    ("raised", "kind"),
    [
        (RuntimeError("Request failed with status code 404: no job."), "_NotKnown"),
        (RuntimeError("Request failed with status code 500: at node404."), "UsageError"),
        (ConnectionError("no route"), "NobodyAnswers"),
    ],
)
def test_only_a_cluster_that_says_so_does_not_know_a_job(raised, kind):
    assert ray_job._kind(raised).__name__ == kind


def test_secrets_do_not_reach_the_request(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "canary-1")
    monkeypatch.setenv("WANDB_API_KEY", "canary-2")
    monkeypatch.setenv("DSTUNE_AUTH_TOKEN", "canary-3")
    monkeypatch.setenv("HF_HOME", "/cache/hf")
    shown = str(ray_job.request(stub_run(tmp_path / "run"), "http://h:1", {"NCCL_DEBUG": "WARN"}))
    assert "canary" not in shown and "HF_HOME=/cache/hf" in shown and "NCCL_DEBUG=WARN" in shown
