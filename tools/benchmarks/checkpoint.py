"""Saving, resuming, verifying and exporting beside DeepSpeed's ways, in one run, the sides taking turns in the same processes.

Two workers over gloo, a thread each, a Llama of 217 M parameters with AdamW: 2.6 GB of fp32 states under ZeRO-3. The parts:

- `save`: how much longer some steps take with a save among them, ours (waited for at the end of these steps) and DeepSpeed's
  `save_checkpoint`; how long training stands still, beside copying the same bytes into memory that was used before; bytes a second
  of a whole save without training, beside writing the same bytes with O_DIRECT and fsync. DeepSpeed flushes nothing to the disk.
- `resume`: loading into fresh engines on the same world, on half and on twice of it, every byte checked, beside DeepSpeed's
  `load_checkpoint` and, for another world, `ds_to_universal` and loading that. The page cache holds the files of both.
- `verify`: `dstune checkpoint verify`'s reading, beside an uncached read without hashing.
- `export`: Hugging Face safetensors in fp32, beside DeepSpeed's `zero_to_fp32` with the same result.
"""

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from tools.benchmarks import planned

PARTS = ("save", "resume", "verify", "export")
_WORKER = "tools.benchmarks.checkpoint_worker"
_VOCABULARY = 32_000


def main() -> int:
    parser = argparse.ArgumentParser(prog="tools/bench checkpoint", description=__doc__)
    parser.add_argument("parts", nargs="*", default=[], help=f"among {', '.join(PARTS)} (default: all)")
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--max-length", type=int, default=512)
    parser.add_argument("--steps", type=int, default=4, help="steps that a save stands among")
    parser.add_argument("--rounds", type=int, default=3, help="how often the sides take turns")
    parser.add_argument("--folder", type=Path, default=None, help="on the disk to measure; default: the system's")
    args = parser.parse_args()
    if unknown := set(args.parts) - set(PARTS):
        parser.error(f"unknown: {', '.join(sorted(unknown))}")
    with tempfile.TemporaryDirectory(dir=args.folder) as name:
        bench = _Bench(Path(name), args)
        for part in PARTS:
            if part == "save" and part not in (args.parts or PARTS):
                print(json.dumps({"made": bench.make()}), flush=True)
            elif part in (args.parts or PARTS):
                print(json.dumps({part: getattr(bench, part)()}, indent=2), flush=True)
    return 0


class _Bench:
    def __init__(self, folder: Path, args: argparse.Namespace) -> None:
        self.folder, self.args = folder, args
        # Not tied: zero_to_fp32 cannot write tied weights as safetensors.
        shape = planned.llama(args.hidden, args.layers) | {"vocab_size": _VOCABULARY, "tie_word_embeddings": False}
        steps = (args.steps * 3 + 4) * args.rounds + 8
        train = {"global_batch_size": 4, "micro_batch_size": 1, "max_steps": steps}
        self.run = planned.make_run(folder, shape, train, 2, args.max_length, checkpoint={"keep": 100})

    def _worker(self, mode: str, workers: int, *more: Any) -> dict[str, Any]:
        result = self.folder / f"{mode}.json"
        planned.spawn(_WORKER, workers, [mode, str(self.run), str(result), *map(str, more)])
        return json.loads(result.read_text(encoding="utf-8"))

    def make(self) -> dict[str, Any]:
        return self._worker("make", 2)

    def save(self) -> dict[str, Any]:
        return self._worker("save", 2, self.args.steps, self.args.rounds)

    def resume(self) -> dict[str, Any]:
        found: dict[str, Any] = {}
        theirs = self.run / "deepspeed"
        for name, workers in (("same world", 2), ("half", 1), ("twice", 4)):
            converted, seconds = None, 0.0
            if workers != 2:
                converted = self.folder / "universal"
                began = time.perf_counter()
                subprocess.run(
                    [
                        *(sys.executable, "-m", "deepspeed.checkpoint.ds_to_universal"),
                        *("--input_folder", str(theirs / "last"), "--output_folder", str(converted / "last")),
                    ],
                    check=True,
                    stdout=subprocess.DEVNULL,
                    stderr=subprocess.DEVNULL,
                )
                (converted / "latest_universal").write_text("last", encoding="utf-8")
                seconds = time.perf_counter() - began
            measured = self._worker(
                "resume", workers, self.args.rounds, str(converted or theirs), converted is not None
            )
            measured["deepspeed_seconds"] = round(measured["deepspeed_seconds"] + seconds, 3)
            ratio = measured["dstune_seconds"] / measured["deepspeed_seconds"]
            found[name] = measured | {"conversion_seconds": round(seconds, 3), "ratio": round(ratio, 3)}
            print(json.dumps({f"resume, {name}": found[name]}), flush=True)
            if converted is not None:
                shutil.rmtree(converted)
        return found

    def verify(self) -> dict[str, Any]:
        return self._side("verify", self.args.rounds)

    def export(self) -> dict[str, Any]:
        return self._side("export", self.args.rounds)

    def _side(self, mode: str, rounds: int) -> dict[str, Any]:
        result = self.folder / f"{mode}.json"
        subprocess.run(
            [sys.executable, "-m", "tools.benchmarks.checkpoint_sides", mode, str(self.run), str(result), str(rounds)],
            check=True,
            cwd=planned.ROOT,
        )
        return json.loads(result.read_text(encoding="utf-8"))


if __name__ == "__main__":
    sys.exit(main())
