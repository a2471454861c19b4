"""Rung 10: a run that moves between worlds, ZeRO stages and offloads beside one that nothing disturbs."""

import random
from collections import Counter
from pathlib import Path

from dstune.checkpoint.resolve import committed
from dstune.data import order
from dstune.data.shards import Prepared
from dstune.launch import rundir
from dstune.paths import RunPaths, step_directory
from tests.runs.tiny import drive, finished, metrics, state_hash
from tools.rungs import loaded
from tools.rungs.board import Board, StopFrom, expect_column
from tools.rungs.runs import begun
from tools.rungs.tally import Tally, expect

_LIMIT = 1e-3
"""Relative difference of losses that another world may bring in bf16."""
_PLACES = (
    (2, "zero3"),
    (1, "zero1"),
    (3, "zero3-offload-optimizer"),
    (2, "zero2"),
)


def over_other_worlds(tally: Tally, board: Board) -> None:
    """World 2, 1, 3, 2 over ZeRO 3, 1, 3 with an offload, 2: the data, what was loaded at each switch, and the losses behind it."""
    for seed in board.seeds:
        with tally.trial(seed):
            sections = {
                "train": {"epochs": 2, "max_steps": None, "seed": seed},
                "checkpoint": {"every": 1000, "keep": 99},
            }
            whole = finished(board.write_run(board.fresh("undisturbed"), **sections))
            steps = len(metrics(whole, "loss"))
            run = board.write_run(board.fresh("worlds"), **sections)
            paths = begun(run)
            _move_about(run, paths, steps, random.Random(seed))
            expect_column("batch_digest", metrics(paths, "batch_digest"), metrics(whole, "batch_digest"))
            _expect_each_once_per_epoch(paths, seed)
            ours, theirs = metrics(paths, "loss"), metrics(whole, "loss")
            apart = max(abs(one - other) / abs(other) for one, other in zip(ours, theirs, strict=True))
            tally.largest("steps", steps)
            tally.facts["largest_relative_loss_difference"] = max(
                apart, tally.facts.get("largest_relative_loss_difference", 0.0)
            )
            expect(apart < _LIMIT, f"losses are {apart:.2e} apart")
            expect(set(metrics(paths, "world")) == {1, 2, 3}, "not every world was met")


def _move_about(run: Path, paths: RunPaths, steps: int, draw: random.Random) -> None:
    for number, (world, preset) in enumerate(_PLACES):
        if number:
            rundir.change(paths, [f"deepspeed.preset={preset}", f"cluster.workers={world}"])
        last = number == len(_PLACES) - 1
        stop = steps + 1 if last else round(steps * (number + 0.5 + draw.random() / 2) / len(_PLACES))
        end = drive(
            paths.root if number else run, world, new=not number, observe=StopFrom(paths, stop), entry=loaded.main
        )
        expect(end.state == ("succeeded" if last else "stopped"), f"on {world} workers with {preset}: {end}")
    switches = committed(paths.root / loaded.FOLDER)
    expect(len(switches) == len(_PLACES) - 1, f"{len(switches)} switches instead of {len(_PLACES) - 1}")
    for switch in switches:
        saved = step_directory(paths.checkpoints, switch.step)
        for state in ("fp32", "exp_avg", "exp_avg_sq"):
            same = state_hash(saved, state) == state_hash(switch.directory, state)
            expect(same, f"at step {switch.step} another {state} was loaded than was saved")


def _expect_each_once_per_epoch(paths: RunPaths, seed: int) -> None:
    """The digests are those of the order's rows, and two epochs of the order are each row twice."""
    prepared = Prepared.open(rundir.environment(paths)["prepared"]["directory"])
    positions, batch = 2 * prepared.num_rows, 4
    taken: Counter[int] = Counter()
    for step, digest in enumerate(metrics(paths, "batch_digest")):
        examples = [
            prepared.row(int(row)) for row in order.rows_of_step(prepared.num_rows, seed, batch, positions, step)
        ]
        numbers = [int(number) for row in examples for number in row]
        expect(order.digest(numbers) == digest, f"step {step + 1} took other examples than the order says")
        taken.update(numbers)
    wrong = {number: times for number, times in taken.items() if times != 2}
    expect(not wrong and len(taken) == prepared.num_examples, f"examples not taken once per epoch: {wrong}")
