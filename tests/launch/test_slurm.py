"""Batch scripts: what they say, and what a real Slurm of two nodes makes of them."""

import subprocess

import pytest

from dstune.atomic import write_json
from dstune.config.schema import RunConfig, SiteConfig
from dstune.errors import FitError, UsageError
from dstune.launch import slurm as room
from dstune.launch import submission
from dstune.launch.status import StatusFile
from dstune.paths import RunPaths
from tests.launch.process_executor import events, hurry, steps, stub_run
from tests.launch.slurm_cluster import ticks
from tests.launch.stub_drive import wrapper

HOSTILE = 'it\'s "a" $(touch pwned) `touch pwned` ; & %j #run'


def config(**cluster):
    return RunConfig.model_validate(
        {"name": "x", "model": {"path": "m"}, "data": {"prepared": "p"}, "cluster": cluster}
    )


def rendered(paths, **site):
    return room.render(paths, SiteConfig.model_validate(site), room.Allocation(2, 1, 8, "/usr/bin/py thon"))


def test_the_script_is_bash_and_quotes_what_it_is_given(tmp_path):
    paths = RunPaths(tmp_path / HOSTILE)
    script = rendered(paths, env={"NAME": "a'b $(touch pwned)"}, setup=["module load cuda"], slurm={"time": "1:00:00"})
    assert subprocess.run(["bash", "-n"], input=script, text=True).returncode == 0
    head = script.split("# --- a token")[0] + 'printf "%s\\n" "$run_directory" "$python" "$NAME"'
    said = subprocess.run(["bash"], input=head.replace("module load cuda", ":"), text=True, capture_output=True)
    assert said.stdout.splitlines() == [str(paths.root), "/usr/bin/py thon", "a'b $(touch pwned)"]
    for line in (
        "#SBATCH --nodes=2",
        "#SBATCH --gpus-per-node=8",
        "#SBATCH --time=1:00:00",
        "#SBATCH --signal=B:USR1@180",
    ):
        assert line in script.splitlines()
    assert "module load cuda" in script.splitlines() and "@@" not in script


@pytest.mark.parametrize(
    "site",
    [
        {"slurm": {"partition": "a\n#SBATCH --uid=0"}},
        {"slurm": {"options": {"x\n": 1}}},
        {"slurm": {"options": {"time=1; ls": 1}}},
        {"env": {"A B": "1"}},
        {"env": {"A": "1\n2"}},
        {"setup": ["a\nb"]},
    ],
)
def test_a_value_that_would_leave_its_place_is_refused(tmp_path, site):
    with pytest.raises(UsageError):
        rendered(RunPaths(tmp_path / "run"), **site)
    with pytest.raises(UsageError):
        rendered(RunPaths(tmp_path / "a\nb"))
    with pytest.raises(UsageError, match="backslash"):
        rendered(RunPaths(tmp_path / "a\\b"))


def test_what_a_site_says_of_memory_stands_in_the_script(tmp_path):
    paths = RunPaths(tmp_path / "run")
    assert "#SBATCH --mem=0" in rendered(paths, slurm={"options": {"mem": 0}}).splitlines()
    assert "--mem" not in rendered(paths)  # what a node has is the place's to give out: jobs may share it


def test_a_dry_run_is_the_script_and_writes_nothing(tmp_path):
    paths = RunPaths(tmp_path / "run")
    shown = submission.describe(paths, config(nodes=2, gpus_per_node=4), "slurm", SiteConfig(), None)
    assert (
        "#SBATCH --nodes=2" in shown and "#SBATCH --gpus-per-node=4" in shown and "#SBATCH --cpus-per-task=4" in shown
    )
    assert list(tmp_path.iterdir()) == []


def hand_over(folder, name="run", nodes=2, slurm=None, **stub):
    """What `submission.submit` does, with a wrapper as the nodes' interpreter."""
    paths = stub_run(folder / name, **stub)
    StatusFile(paths).write(state="queued")
    site = SiteConfig.model_validate({"slurm": slurm or {}})
    sent = room.submit(paths, site, room.Allocation(nodes, 2 // nodes, 0, str(wrapper(folder))))
    write_json(paths.submission, sent)
    return paths, sent["job_id"]


def until_step(paths, step):
    for _ in ticks(150):
        if paths.metrics.exists() and len(steps(paths)) >= step:
            return
    raise AssertionError(f"no step {step}: {submission.status(paths)}")


@pytest.mark.slurm
def test_two_nodes_a_hostile_name_and_a_queued_neighbour(tmp_path, slurm):
    paths, job = hand_over(tmp_path, HOSTILE, steps=150, seconds=0.1)
    queued, waiting = hand_over(tmp_path, "queued")
    now = submission.status(queued)
    assert now["state"] == "queued" and now["job"]["reason"] in ("Resources", "Priority", "None")
    assert submission.stop(queued)["state"] == "stopped"
    assert slurm.job(waiting)["JobState"] == "CANCELLED"
    facts = slurm.wait_for(job, "COMPLETED", "FAILED", "CANCELLED", seconds=200)
    assert facts["JobState"] == "COMPLETED", list(submission.logs(paths))
    assert submission.status(paths)["state"] == "succeeded" and steps(paths) == list(range(1, 151))
    assert any(line.startswith("end succeeded") for line in submission.logs(paths))
    assert not list(tmp_path.rglob("pwned")) and not (paths.control / f"slurm-{job}").exists()


@pytest.mark.slurm
def test_a_preemption_with_grace_saves_and_requeues(tmp_path, slurm):
    paths, job = hand_over(tmp_path, nodes=1, steps=600, commit_every=1000, seconds=0.1)
    until_step(paths, 10)
    urgent = slurm.run("sbatch", "--parsable", "--partition=urgent", "-N2", "--output=/dev/null", "--wrap=true")
    slurm.wait_for(urgent, "COMPLETED", seconds=120)
    assert [event["state"] for event in events(paths, "drive_ended")] == ["preempted"]
    hurry(paths)
    slurm.release(job)
    slurm.wait_for(job, "COMPLETED", seconds=200)
    assert steps(paths) == list(range(1, 601))


@pytest.mark.slurm
def test_stop_saves_first_and_the_job_is_over(tmp_path, slurm):
    paths, job = hand_over(tmp_path, nodes=1, steps=100_000, commit_every=100_000, seconds=0.05)
    until_step(paths, 5)
    now = submission.stop(paths, wait=True, seconds=60)
    assert now["state"] == "stopped" and now["step"] >= 5
    facts = slurm.wait_for(job, "FAILED", "COMPLETED", "PENDING")
    assert facts["ExitCode"] == "75:0" and facts["JobState"] == "FAILED"  # no requeue: a person wanted it to stop
    assert slurm.left_behind(job) == []


@pytest.mark.slurm
def test_slurms_refusal_is_a_message(tmp_path, slurm):
    with pytest.raises(FitError, match="partition"):
        hand_over(tmp_path, slurm={"partition": "nowhere"})
