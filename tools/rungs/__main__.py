"""`tools/ladder [N ...]`: each rung of the ladder breaks something in many ways, and counts how often all was as dstune guarantees.

A rung prints one line of JSON: rung, what, tries, passed, failures (each with its seed), seconds, and what else there is to say. The
exit status is 1 where a try failed. "Exact": per-step loss to the last digit, per-step batch digest and final weights are those of
the run that nothing disturbed. Rungs on whole runs train a tiny model on two gloo workers; the others drive commits alone.
"""

import argparse
import json
import os
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tools.rungs import commits, damage, rays, runs, worlds
from tools.rungs.board import Board
from tools.rungs.tally import Tally

Part = Callable[[Tally, Board], None]


@dataclass(frozen=True)
class Rung:
    """One experiment in one or several parts."""

    number: int
    what: str
    parts: tuple[Part, ...]
    short: str = "tests/test_ladder.py"
    """The tests that show it in short form."""


RUNGS = (
    Rung(1, "clean stop and resume at every step: exact", (runs.stopped_at_every_step,), "tests/runs/test_exact.py"),
    Rung(
        2,
        "kill -9 of a random worker at a random moment: exact, at most an interval lost",
        (runs.killed_at_random_moments,),
    ),
    Rung(
        3,
        "raylet, driver, Ray head killed: resumes within 60 s, exact",
        (rays.killed_raylet, rays.killed_driver, rays.killed_head),
        "tests/runs/test_ray.py",
    ),
    Rung(
        4,
        "one worker's save delayed, then everything killed: the previous checkpoint is chosen, exact",
        (commits.a_late_worker, runs.a_late_worker_in_a_run),
    ),
    Rung(
        5,
        "SIGKILL at every write, fsync and rename of a commit: every point resumes",
        (commits.killed_at_every_call, runs.killed_in_a_save),
    ),
    Rung(
        6,
        "no space at every write, and a full disk: a clear error, the last good one kept, all out within 30 s",
        (commits.no_space_at_every_call, commits.full_disk, runs.full_disk_in_a_run),
    ),
    Rung(
        7,
        "one bit flipped in each file: all found before use, falls back",
        (damage.flipped_bits, damage.flipped_bit_in_a_run),
    ),
    Rung(
        8,
        "mixed generations, a foreign run's shard, a missing manifest: refused, the file named",
        (damage.mixed_up, damage.mixed_up_run),
    ),
    Rung(9, "retention while the newest is corrupt: the last good one survives", (damage.retention_beside_damage,)),
    Rung(
        10,
        "world 2, 1, 3, 2 with other stages and offloads: each example once per epoch, equal weights, losses within 1e-3",
        (worlds.over_other_worlds,),
        "tests/runs/test_exact.py",
    ),
)


def main(words: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="tools/ladder", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("rungs", nargs="*", type=int, metavar="N", help="rungs to climb (default: all)")
    parser.add_argument("--seeds", type=int, default=3, metavar="K", help="so many seeds (default: 3)")
    parser.add_argument("--seed", type=int, default=0, metavar="S", help="the first of them (default: 0)")
    parser.add_argument(
        "--points", type=int, metavar="P", help="at most P system calls, bits, … of each kind (default: all)"
    )
    parser.add_argument("--folder", type=Path, help="where runs are made, and stay (default: a temporary one)")
    parser.add_argument("--list", action="store_true", help="say what the rungs are")
    args = parser.parse_args(words)
    known = {rung.number: rung for rung in RUNGS}
    if unknown := set(args.rungs) - set(known):
        parser.error(f"no such rung: {', '.join(map(str, sorted(unknown)))}")
    if args.list:
        for rung in RUNGS:
            print(f"{rung.number:3} {rung.what}    (in short: {rung.short})")
        return 0
    with _folder(args.folder) as folder:
        os.environ["DSTUNE_CACHE"] = str(folder / "cache")
        board = Board(folder, range(args.seed, args.seed + args.seeds), args.points)
        climbed = [climb(known[number], board) for number in args.rungs or known]
    return 1 if any(tally.failures for tally in climbed) else 0


def climb(rung: Rung, board: Board) -> Tally:
    """Do every part of a rung, and print its line."""
    tally = Tally(rung.number, rung.what)
    for part in rung.parts:
        with tally.watched(part.__name__):
            part(tally, board)
    print(json.dumps(tally.line()), flush=True)
    return tally


@contextmanager
def _folder(chosen: Path | None) -> Iterator[Path]:
    if chosen is not None:
        chosen.mkdir(parents=True, exist_ok=True)
        yield chosen.absolute()
        return
    with tempfile.TemporaryDirectory(prefix="dstune-ladder-", ignore_cleanup_errors=True) as made:
        yield Path(made)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # what was mounted and started goes with it
    sys.exit(main())
