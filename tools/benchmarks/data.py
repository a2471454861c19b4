"""Preparing, packing, opening and loading data beside TRL's way, in one run, the sides taking turns, each in its own process.

Without TRL (`peers.py` says how to have it) its sides are left out, and said to be. What is compared, and the limits beside it,
stands in `data_sides.py`.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from tools.benchmarks import data_inputs
from tools.benchmarks.peers import has_trl

PARTS = ("prepare", "packing", "opening", "loader")


def main() -> int:
    parser = argparse.ArgumentParser(prog="tools/bench data", description=__doc__)
    parser.add_argument("parts", nargs="*", default=[], help=f"among {', '.join(PARTS)} (default: all)")
    parser.add_argument("--chats", type=int, default=200_000)
    parser.add_argument("--lengths", type=int, default=1_000_000, help="lengths to pack")
    parser.add_argument("--examples", type=int, default=1_000_000, help="examples in the directory that is opened")
    parser.add_argument("--rows", type=int, default=2_000, help="rows out of the loader")
    parser.add_argument("--rounds", type=int, default=2, help="how often the sides take turns")
    parser.add_argument(
        "--folder", type=Path, default=Path(tempfile.gettempdir()) / "dstune-bench", help="inputs stay here"
    )
    args = parser.parse_args()
    if unknown := set(args.parts) - set(PARTS):
        parser.error(f"unknown: {', '.join(sorted(unknown))}")
    bench = _Bench(args)
    for part in args.parts or PARTS:
        print(json.dumps({part: getattr(bench, part)()}, indent=2), flush=True)
    return 0


class _Bench:
    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.chats, self.tokenizer, self.origin = data_inputs.make(args.folder, args.chats)
        self.has_trl = has_trl()
        self._directories: dict[int, str] = {}

    def prepare(self) -> dict[str, Any]:
        found: dict[str, Any] = {
            "chats": f"{self.args.chats} {self.origin}",
            "limits": self._side("limits", self.chats, self.tokenizer),
        }
        for processes in (1, 2):
            sides = self._turns(
                {
                    "dstune": lambda p=processes: self._prepared(self.args.chats, p),
                    "trl": lambda p=processes: self._side("trl_prepare", self.chats, self.tokenizer, p),
                }
            )
            found[f"{processes} process{'es' * (processes > 1)}"] = _report(sides, "chats_per_second")
        directory = self._directory(self.args.chats)
        found["against apply_chat_template"] = self._side("check_tokens", directory, self.chats, self.tokenizer, 20)
        return found

    def packing(self) -> dict[str, Any]:
        directory, count = self._directory(self.args.chats), self.args.lengths
        sides = self._turns(
            {
                "dstune": lambda: self._side("dstune_packing", directory, count),
                "trl": lambda: self._side("trl_packing", directory, count),
                "knapsack": lambda: self._side("knapsack_packing", directory, count),
            }
        )
        return {side: results[0] | {"seconds": round(_median(results), 4)} for side, results in sides.items()} | {
            "trl_over_dstune": _ratio(sides, "trl"),
            "knapsack_over_dstune": _ratio(sides, "knapsack"),
        }

    def opening(self) -> dict[str, Any]:
        directory = self._directory(self.args.examples)
        return {f"batch at step {step}": self._side("opening", directory, step) for step in (0, 1_000_000)}

    def loader(self) -> dict[str, Any]:
        directory, count = self._directory(self.args.chats), self.args.rows
        sides = self._turns(
            {
                "dstune": lambda: self._side("dstune_loader", directory, count),
                "trl": lambda: self._side("trl_loader", directory, count),
            }
        )
        return _report(sides, "rows_per_second")

    def _turns(self, sides: dict[str, Any]) -> dict[str, list[dict[str, Any]]]:
        taken = {name: run for name, run in sides.items() if self.has_trl or name != "trl"}
        results: dict[str, list[dict[str, Any]]] = {name: [] for name in taken}
        for _ in range(self.args.rounds):
            for name, run in taken.items():
                results[name].append(run())
        return results

    def _directory(self, num_chats: int) -> str:
        """A prepared directory of so many chats."""
        if num_chats not in self._directories:
            self._prepared(num_chats, 2)
        return self._directories[num_chats]

    def _prepared(self, num_chats: int, processes: int) -> dict[str, Any]:
        chats, _, _ = data_inputs.make(self.args.folder, num_chats)
        cache = self.args.folder / f"cache-{num_chats}"
        shutil.rmtree(cache, ignore_errors=True)
        result = self._side("dstune_prepare", chats, self.tokenizer, processes, DSTUNE_CACHE=str(cache))
        self._directories[num_chats] = result["directory"]
        return result

    def _side(self, name: str, *arguments: Any, **environment: str) -> dict[str, Any]:
        command = [sys.executable, "-m", "tools.benchmarks.data_sides", name, *map(str, arguments)]
        variables = {
            "OMP_NUM_THREADS": "1",
            "TOKENIZERS_PARALLELISM": "false",
            "HF_HUB_OFFLINE": "1",
            "BENCH_SCRATCH": str(self.args.folder),
        }
        done = subprocess.run(command, env=os.environ | variables | environment, capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(f"{name} failed:\n{done.stderr[-4000:]}")
        return json.loads(done.stdout.splitlines()[-1])


def _median(results: list[dict[str, Any]]) -> float:
    return statistics.median(result["seconds"] for result in results)


def _ratio(sides: dict[str, list[dict[str, Any]]], other: str) -> float | str:
    """Seconds of the other side over ours: the median of the rounds' ratios."""
    if other not in sides:
        return f"{other} is not installed"
    pairs = zip(sides[other], sides["dstune"], strict=True)
    return round(statistics.median(theirs["seconds"] / ours["seconds"] for theirs, ours in pairs), 2)


def _report(sides: dict[str, list[dict[str, Any]]], unit: str) -> dict[str, Any]:
    found = {
        side: {unit: round(results[0]["rows"] / _median(results)), "seconds": [round(r["seconds"], 3) for r in results]}
        for side, results in sides.items()
    }
    return found | {"trl_over_dstune": _ratio(sides, "trl")}


if __name__ == "__main__":
    sys.exit(main())
