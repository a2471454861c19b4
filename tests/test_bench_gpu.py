"""`tools/bench gpu` on a CPU: every part runs in its tiny form, what ends alone is reported, the search finds what fits."""

import json
import multiprocessing
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.spawn import run_workers
from tools.benchmarks import gpu
from tools.benchmarks.gpu_shapes import TINY_SETTINGS, MadeUp, chats_of
from tools.benchmarks.gpu_split import SplitAdamW


def every_part() -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    """The report, and what each call of a function gave."""
    made: dict[str, dict[str, Any]] = {}

    def here(where: str, *arguments: Any) -> gpu.Outcome:
        made[" ".join([where, *map(str, arguments[1:])])] = result = gpu.call(where, *arguments)
        return gpu.Outcome(result)

    return gpu.measured(list(gpu.PARTS), gpu.Run(TINY_SETTINGS, here, lambda: 1e6)), made


@pytest.mark.dist
def test_every_part_runs_in_its_tiny_form() -> None:
    ((found, made),) = run_workers(every_part, 1)
    assert list(found["parts"]) == list(gpu.PARTS)
    assert "cannot" not in json.dumps(found)
    assert "tiny" in found
    train = found["parts"]["train"]["1.2b"]
    assert train["whole rows"]["times the speed"]["median"] == "ran"  # that it ran, and no figure
    assert {"split", "ratio"} < set(found["parts"]["largest"])
    # The sides of a comparison compute the same.
    for losses in (
        made["gpu_parts:train 1.2b"]["whole rows"]["loss_of_the_first_step"],
        made["gpu_parts:packed"]["loss_of_the_first_step"],
        *(row["loss"] for row in made["gpu_parts:loss"]["rows"]),
        {way: made[f"gpu_offload:speed {way}"]["loss_of_the_first_step"] for way in ("none", "split", "ratio")},
    ):
        assert len(losses) >= 2
        assert max(losses.values()) == pytest.approx(min(losses.values()), rel=1e-3)


def test_what_ends_alone_is_reported_and_what_comes_in_time_counts(tmp_path: Path) -> None:
    apart = gpu.Apart(multiprocessing.get_context("spawn"), 60.0)
    dies = apart(f"{__name__.rpartition('.')[2]}:gone", TINY_SETTINGS)  # no such module there
    assert dies.found is None
    assert "ended with 1" in dies.why and "test_bench_gpu" in dies.why
    assert apart("gpu_shapes:chat_lengths", 3, 64) == gpu.Outcome([17, 16, 28], "")
    late = gpu.Apart(multiprocessing.get_context("spawn"), 0.0)
    assert "the time was over" in late("gpu_shapes:chat_lengths", 3, 64).why


@pytest.mark.parametrize(
    ("fits", "expected", "tried"),
    [
        (lambda layers: layers <= 47, 46, [44, 46, 48]),
        (lambda layers: True, 50, [44, 46, 48, 50]),
        (lambda layers: layers <= 38, 36, [44, 40, 36]),
        (lambda layers: False, None, [44, 40, 36, 32, 28, 24, 20, 16, 12, 8, 4]),
    ],
)
def test_the_search_goes_up_from_what_fits_and_down_from_what_does_not(
    fits: Callable[[int], bool], expected: int | None, tried: list[int]
) -> None:
    asked: list[int] = []
    assert gpu.search(lambda layers: bool(asked.append(layers)) or fits(layers), 44, 50, lambda: 1e6) == expected
    assert asked == tried


def test_the_search_begins_nothing_that_it_may_not_finish() -> None:
    clock = iter([100.0, 60.0, 60.0])
    asked: list[int] = []
    found = gpu.search(lambda layers: bool(asked.append(layers)) or True, 44, 64, lambda: next(clock))
    assert (found, asked) == (44, [44])  # one took 40 s, and 60 s are less than twice that


def test_moments_in_main_memory_are_those_of_torch() -> None:
    torch.manual_seed(0)
    start = [torch.randn(50), torch.randn(30), torch.randn(20)]
    settings: dict[str, Any] = {"lr": 1e-2, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}
    mine, theirs = ([torch.nn.Parameter(one.clone()) for one in start] for _ in range(2))
    split = SplitAdamW(mine, **settings, host_share=0.5)
    plain = torch.optim.AdamW(theirs, fused=True, **settings)
    for _ in range(4):
        for one, other in zip(mine, theirs, strict=True):
            one.grad = torch.randn(one.shape)
            other.grad = one.grad.clone()
        split.step()
        plain.step()
    assert split.host_elements == 50
    for one, other in zip(mine, theirs, strict=True):
        assert torch.equal(one, other)
        assert torch.equal(split.state[one]["exp_avg_sq"], plain.state[other]["exp_avg_sq"])


def test_made_up_chats_are_the_same_again_and_fit_their_rows() -> None:
    lengths = chats_of(20_000, 1024)
    assert lengths == chats_of(20_000, 1024)
    assert 15_000 < sum(lengths) <= 20_000 and max(lengths) <= 1024
    data = MadeUp(lengths, 100, 1024, answered=0.5)
    assert sorted(number for row in range(data.num_rows) for number in data.row(row)) == list(range(len(lengths)))
    assert all(data.lengths[data.row(row)].sum() <= 1024 for row in range(data.num_rows))
    example = data.example(3)
    assert abs(2 * int(example.loss_mask.sum()) - len(example.input_ids)) <= 1
    assert (example.input_ids == data.example(3).input_ids).all()


def test_without_a_gpu_it_says_so_and_nothing_heavy_is_imported_by_the_one_who_waits() -> None:
    program = (
        "import sys; from tools.benchmarks import gpu; heavy = {'torch', 'ray', 'deepspeed'} & set(sys.modules); "
        "sys.argv = ['gpu', 'train']; status = gpu.main(); assert not heavy, heavy; sys.exit(status)"
    )
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=gpu.ROOT, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 1, done.stderr
    assert "no GPU" in json.loads(done.stdout)["parts"]["train"]["cannot"]
