"""`dstune plan`: what a person or a program reads of a run before it is started, for machines that are not here."""

import json
import os

import pytest
from transformers import LlamaConfig, LlamaForCausalLM

from dstune import api
from dstune.cli.main import main
from dstune.errors import ConfigError, UsageError
from dstune.launch import machine

RUN = """
name: planned
model: {path: "builtin:tiny-llama", overrides: {hidden_size: 4096, intermediate_size: 14336, num_hidden_layers: 32,
  num_attention_heads: 32, num_key_value_heads: 8, head_dim: 128, vocab_size: 128256, tie_word_embeddings: false}}
data: {sources: [{path: "builtin:instructions", limit: 300}], max_length: 1024}
train: {global_batch_size: 16}
"""
EIGHT = ["--nodes", "1", "--gpus-per-node", "8", "--gpu", "h100-80gb", "--host-memory", "1TB", "--price", "2"]


@pytest.fixture(scope="module")
def run_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("planned") / "run.yaml"
    path.write_text(RUN)
    return str(path)


def planned(capsys, *words: str, status: int = 0) -> dict:
    assert main(["plan", *words, "--json"]) == status
    return json.loads(capsys.readouterr().out)


def test_eight_billion_on_eight_gpus(run_file, capsys):
    found = planned(capsys, run_file, *EIGHT)
    assert found["workers"] == 8 and found["model"]["parameters"] == 8_030_261_248
    this = found["this_run"]
    assert sum(this["device_parts"].values()) == this["device_bytes"]
    assert this["device_parts"]["masters and moments"] == 12 * 8_030_261_248 / 8
    assert this["checkpoint"]["bytes"] == 12 * 8_030_261_248
    assert this["price"] == pytest.approx(this["device_hours"] * 2, abs=0.01)
    assert {one["name"]: one["on"] for one in found["kernels"]}["linear-cross-entropy"]
    assert found["best"]["fits"] and {way["preset"] for way in found["ways"]} >= {"zero1", "zero2", "zero3"}


@pytest.mark.parametrize("optimizer", ["adafactor", "adamw8bit"])
def test_an_optimizer_that_keeps_little_needs_little_and_no_nvme(run_file, capsys, optimizer):
    found = planned(capsys, run_file, *EIGHT, "--nvme", "4TB", f"train.optimizer={optimizer}")
    tables, matrices = 128_256 * 4096, 8_030_261_248 - 128_256 * 4096
    states = {"adafactor": 0, "adamw8bit": 8 * tables + (2 + 8 / 256) * matrices}[optimizer]
    this = found["this_run"]
    assert this["device_parts"]["masters and moments"] == (4 * 8_030_261_248 + states) / 8
    assert this["checkpoint"]["bytes"] == {"adafactor": 4, "adamw8bit": 12}[optimizer] * 8_030_261_248
    (swapped,) = [way for way in found["ways"] if way["preset"] == "zero3-nvme"]
    assert not swapped["fits"] and swapped["why"] == f"{optimizer} cannot keep its states on NVMe"


def test_weights_on_nvme_are_on_the_disk_with_their_buffers_in_memory(run_file, capsys):
    disk = "deepspeed.overrides.zero_optimization={offload_param: {device: nvme, nvme_path: /disk, max_in_cpu: 0}}"
    found = planned(capsys, run_file, *EIGHT, "--nvme", "4TB", disk)
    this, piece = found["this_run"], 128_256 * 4096 // 8
    assert this["preset"].startswith("zero3") and "weights" not in this["device_parts"]
    assert this["nvme_bytes"] == pytest.approx(2 * 8_030_261_248 / 8, rel=1e-3)
    assert this["host_parts"]["weights' buffers"] == 2 * (8 * piece + 1_000_000_000)
    (below,) = {way["why"] for way in found["ways"] if way["preset"] in ("zero1", "zero2")}
    assert "offload_param.device: 'nvme' below stage 3" in below


def test_buffers_on_nvme_that_are_too_small_are_found_before_a_worker_is(run_file, capsys):
    disk = "deepspeed.overrides.zero_optimization={offload_param: {device: nvme, nvme_path: /disk, buffer_size: 1000}}"
    assert main(["plan", run_file, *EIGHT, "--no-data", "--nvme", "4TB", disk]) == 2
    assert "piece of the largest weight has" in capsys.readouterr().err
    with pytest.raises(ConfigError, match=r"elements \(4 workers\); expected 131,334,144 or more"):
        api.train(run_file, [disk, "cluster.workers=4"])
    few = "deepspeed.overrides.zero_optimization.offload_optimizer={nvme_path: /disk, buffer_count: 2}"
    found = planned(capsys, run_file, *EIGHT, "--no-data", "--nvme", "4TB", few)
    (swapped,) = [way for way in found["ways"] if way["preset"] == "zero3-nvme"]
    assert "buffer_count: 2; expected 4 or more" in swapped["why"]


def test_copies_that_are_left_out_are_said_to_be(run_file, capsys):
    four = ["--nodes", "1", "--gpus-per-node", "4", *EIGHT[4:], "--no-data", "deepspeed.preset=zero++"]
    found = planned(capsys, run_file, *four)
    assert found["deepspeed"]["zero_optimization"]["zero_hpz_partition_size"] == 1
    assert "weights' copy within machines" not in {
        name for name, size in found["this_run"]["device_parts"].items() if size
    }


SMALL = ["--gpus-per-node", "1", "--gpu", "rtx-4090"]


def test_one_small_gpu_takes_offload_and_recomputes(run_file, capsys):
    found = planned(capsys, run_file, *SMALL, "--host-memory", "256GB")
    this = found["this_run"]
    assert this["preset"] == "zero3-offload-all" and this["activation_checkpointing"] and this["fits"]
    assert found["deepspeed"]["zero_optimization"]["offload_param"]["device"] == "cpu"
    assert this["chosen_because"] == found["why"]
    assert {way["preset"] for way in found["ways"] if way["fits"]} <= {"zero3-offload-all", "zero3-offload-optimizer"}


def test_what_fits_nowhere_ends_with_status_4_and_says_what_it_lacks(run_file, capsys):
    found = planned(capsys, run_file, *SMALL, "--host-memory", "32GB", status=4)
    assert found["best"] is None and not found["fits"]
    assert "more of the machine's memory than may be filled" in found["nearest"]["lacks"]
    assert found["enough_machines"]["nodes"] == 8  # a billion parameters each: 20 GB of the host, and of 4 machines 40


def test_sharing_rows_is_advised_where_they_can_be_shared(run_file, capsys):
    long = [*EIGHT, "--no-data", "data.max_length=131072"]
    assert planned(capsys, run_file, *long, status=4)["enough_sharing"]["sequence_parallel"] == 2
    assert planned(capsys, run_file, *long, "data.packing=false", status=4)["enough_sharing"] is None


def test_a_named_preset_that_does_not_fit_is_told_so(run_file, capsys):
    found = planned(capsys, run_file, *SMALL, "--host-memory", "256GB", "deepspeed.preset=zero3", status=4)
    assert "of the device's memory" in found["this_run"]["why"] and found["best"]["preset"] == "zero3-offload-all"


def test_a_config_alone_is_planned_with_full_rows(tmp_path, capsys):
    shape = LlamaConfig(hidden_size=256, intermediate_size=512, num_hidden_layers=2, vocab_size=1000)
    shape.save_pretrained(tmp_path / "model")
    path = tmp_path / "run.yaml"
    path.write_text(
        "name: x\nmodel: {path: model}\ndata: {sources: [{path: nowhere.jsonl}], max_length: 512}\ntrain: {max_steps: 7}\n"
    )
    found = planned(capsys, str(path), "--gpu", "h200", "--gpus-per-node", "2")
    assert (found["steps"], found["tokens_per_step"], found["prepared"]) == (7, 64 * 512, None)
    assert found["model"]["parameters"] == LlamaForCausalLM(shape).num_parameters()


def test_a_person_reads_parts_ways_and_time(run_file, capsys):
    assert main(["plan", run_file, *EIGHT]) == 0
    out = capsys.readouterr().out
    for words in (
        "masters and moments",
        "ways to run",
        "best saved every",
        "host memory a machine",
        "to pay",
        '"stage": 3',
    ):
        assert words in out


def test_of_a_preset_that_is_named_no_other_is_spoken_of(run_file, capsys):
    small = ["--workers", "2", "--no-data", "train.max_steps=50000", "model.overrides={}"]
    named = planned(capsys, run_file, *small, "deepspeed.preset=zero2")["this_run"]
    assert named["chosen_because"].startswith("of zero2 the largest micro-batch that keeps its activations; ")
    assert planned(capsys, run_file, *small)["this_run"]["chosen_because"].startswith("on CPUs the presets")
    assert main(["plan", run_file, *small]) == 0
    out = capsys.readouterr().out
    assert " worker hours" in out and "GPU hours" not in out and "  first, because: on CPUs" in out


@pytest.mark.parametrize("preset", ["auto", "zero2", "zero3"])
def test_of_ways_that_tie_the_simpler_preset_comes_first(run_file, capsys, preset):
    tiny = ["--workers", "1", "--gpu", "h100-80gb", "--no-data", "model.overrides={}"]
    ways = planned(capsys, run_file, *tiny, f"deepspeed.preset={preset}")["ways"]
    presets = [way["preset"] for way in ways if way["micro_batch_size"] == ways[0]["micro_batch_size"] and way["fits"]]
    assert presets[:3] == ["zero1", "zero2", "zero3"]


def test_a_slow_network_is_waited_for_and_an_assumed_one_says_so(run_file, capsys):
    two = ["--nodes", "2", *EIGHT[2:], "deepspeed.preset=zero3"]
    usual, slow = (planned(capsys, run_file, *two, *words) for words in ([], ["--network", "25"]))
    assert usual["machines"]["network_bytes_per_second"] == 8 * 50e9 and usual["machines"]["network_assumed"]
    assert slow["machines"]["network_bytes_per_second"] == 25e9 / 8 and not slow["machines"]["network_assumed"]
    assert slow["this_run"]["seconds"]["communication"] > 2 * usual["this_run"]["seconds"]["communication"]
    assert main(["plan", run_file, *two]) == 0
    assert "3,200 Gbit/s from each machine to the others (assumed: --network)" in capsys.readouterr().out


def test_nobody_is_told_hours_of_a_run_whose_steps_nobody_knows(run_file, capsys):
    unknown = planned(capsys, run_file, *EIGHT, "--no-data")
    assert unknown["steps"] is unknown["this_run"]["hours"] is unknown["this_run"]["price"] is None
    known = planned(capsys, run_file, *EIGHT, "--no-data", "train.max_steps=500")
    assert known["steps"] == 500 and known["this_run"]["price"] > 0
    assert main(["plan", run_file, *EIGHT, "--no-data"]) == 0
    assert "how many steps, the data says" in capsys.readouterr().out


def test_workers_share_the_cores_that_there_are():
    alone, crowd = machine.processor(1, 1), machine.processor(1, 4 * os.cpu_count())
    assert crowd.flops == alone.flops / 4 and crowd.bandwidth == alone.bandwidth / 4


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--gpu", "h10"], "did you mean"),
        (["--gpu-memory", "lots"], "is no size"),
        (["--workers", "0"], "--workers is '0'; expected greater than or equal to 1"),
        (["--network", "0"], "--network (as bytes/s) is 0.0; expected greater"),
        (["--gpu", "a100-80gb", "model.fp8=true"], "too old"),
    ],
)
def test_what_nobody_can_plan_for_is_refused(run_file, capsys, words, said):
    try:
        status = main(["plan", run_file, *words])
    except SystemExit as end:
        status = end.code
    assert status == 2 and said in capsys.readouterr().err


NO_NUMBERS = ["0", "-1", "nan", "inf", "9" * 400, "0.0000001", "1e-300", "1e300", ""]


@pytest.mark.parametrize("value", NO_NUMBERS)
def test_no_number_of_a_machine_is_refused_wherever_it_comes_in(run_file, capsys, value):
    refused = {
        "workers": "--workers", "nodes": "--nodes", "gpus_per_node": "--gpus-per-node", "gpu_memory": "--gpu-memory",
        "host_memory": "--host-memory", "nvme": "--nvme", "network": "--network", "node_hours": "--mtbf",
    }  # fmt: skip
    cheap = value in ("0.0000001", "1e-300")
    for name, flag in refused.items() if cheap else (refused | {"price": "--price"}).items():
        with pytest.raises(UsageError, match=flag):
            api.plan(run_file, **{name: value})
        try:
            status = main(["plan", run_file, f"{flag}={value}"])
        except SystemExit as end:
            status = end.code
        said = capsys.readouterr().err
        assert status == 2 and flag in said and "Traceback" not in said


def test_the_largest_machines_that_may_be_named_are_planned_for(run_file, capsys):
    words = [
        *EIGHT,
        "--gpu-memory",
        "1000TB",
        "--nvme",
        "1000TB",
        "--network",
        "1000000",
        "--mtbf",
        "0.001",
        "--no-data",
    ]
    assert planned(capsys, run_file, *words)["fits"]
    many = ["--nodes", "1000000", "--gpus-per-node", "8", "--no-data"]
    assert main(["plan", run_file, *many]) == 4


def test_a_call_names_what_it_does_not_know(run_file):
    with pytest.raises(UsageError, match=r"unknown key '--wokers'\n.*did you mean 'workers'"):
        api.plan(run_file, wokers=2)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--workers", "7", "--nodes", "2"], "--workers 7: on 2 machines, each with as many; expected 6 or 8 workers"),
        (["--workers", "1", "--nodes", "2"], "expected 2 workers"),
        (["cluster.workers=[1, 7]", "--nodes", "2"], "cluster.workers 7: on 2 machines"),
        (["--workers", "7", "--gpus-per-node", "2"], "--workers 7: on machines of 2 workers; expected 6 or 8 workers"),
        (
            ["--workers", "8", "--nodes", "3", "--gpus-per-node", "4"],
            "expected 12 workers, or one of the three left away",
        ),
    ],
)
def test_workers_that_are_on_no_equal_machines_are_refused(run_file, capsys, words, said):
    assert main(["plan", run_file, "--gpu", "h200", *words]) == 2
    assert said in capsys.readouterr().err


def test_machines_follow_from_workers_and_what_each_holds(run_file, capsys):
    found = planned(capsys, run_file, "--gpu", "h200", "--workers", "8", "--gpus-per-node", "4")
    assert (found["workers"], found["machines"]["nodes"]) == (8, 2)
    found = planned(capsys, run_file, "--gpu", "h200", "--workers", "8", "cluster={nodes: 2, gpus_per_node: 8}")
    assert (found["workers"], found["machines"]["workers_per_node"]) == (8, 4)
