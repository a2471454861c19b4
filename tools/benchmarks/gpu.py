"""What dstune reaches on one GPU against what it should: for each part figure, target and limit as JSON. Written for an H200.

matmul    large bf16 products, copies within the device and to main memory: the limits of the rest
train     3 B and 1.2 B, ZeRO-3, AdamW with fp32 states, rows of 4,096: causal FLOP utilisation with the device to itself (targets
          0.55 and 0.50), and against transformers with Liger's kernels, compiled, in plain torch, by turns (1.1 times the speed)
states8b  8 B with bf16 states: tokens a second (10,500)
loss      head and loss over 128,256 words, 4k to 32k tokens: time over plain (1.05), memory over Liger's (1.0)
packed    chats packed and padded, the same ones, by turns: useful tokens a second (2 times)
largest   how many layers AdamW with fp32 states takes, states split over both memories (at least 14 B)
offload   7 B with half its optimizer in main memory: speed over that without (0.85)

Name the parts; each runs in processes of its own, so that what one lacks or runs out of does not end the others. No Ray is imported;
DeepSpeed wherever an engine trains. FLOPs are counted causally with the lengths of the examples, the input embedding left out, against
the maker's peak; `limit` is what the device's own large product would reach. Every token is a target, except in `packed`. Utilisation
is of steps on batches that lie on the device: what reading and records cost a step, `tools/bench step` shows.
"""

import argparse
import contextlib
import importlib
import importlib.util
import json
import multiprocessing
import os
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from multiprocessing.context import BaseContext
from pathlib import Path
from typing import Any, NamedTuple

from tools.benchmarks.gpu_shapes import TINY_SETTINGS, Settings

CARRY = """
A machine with torch but without a network and without what dstune wants takes it from a folder of wheels, about 20 MB. Here (DeepSpeed
is published as source, and becomes a pure wheel; pydantic-core alone is for one Python, there 3.12):

  take="pip download --no-deps -c tools/constraints.txt -d wheels"
  $take transformers peft pydantic annotated-types typing-extensions typing-inspection ruamel.yaml hjson liger-kernel
  $take --only-binary=:all: --python-version 3.12 --platform manylinux2014_x86_64 pydantic-core
  DS_BUILD_OPS=0 pip wheel --no-deps -c tools/constraints.txt -w wheels deepspeed

and there, in each command:

  python3 -m pip install -q --no-index --no-deps --upgrade --target /tmp/site wheels/*.whl && export PYTHONPATH=/tmp/site
  PYTHON=python3 tools/bench gpu matmul train > gpu.json

An order for half an hour, each command below 10 minutes (--seconds): `matmul train`, `loss packed states8b`, `offload`, `largest`.
PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True spares the largest models some fragments.
What could not run says why under `cannot`, and the exit status is then 1. Each result is written to stderr as well, when it is there.
"""

TARGET_LARGEST, TARGET_OFFLOAD = 14e9, 0.85
ROOT = Path(__file__).parents[2]
_ENGINE = ("torch", "transformers", "deepspeed", "pydantic", "ruamel.yaml", "hjson")
_DEEPER, _SHALLOWER = 2, 4
"""Layers by which the search for the largest goes on."""
_DEADLINE_SECONDS = 570.0


class Outcome(NamedTuple):
    """What a function in a process of its own came to."""

    found: dict[str, Any] | None
    why: str = ""
    """Why there is nothing."""


@dataclass
class Apart:
    """Calls functions in processes of their own, one at a time, until `seconds` are over for all of them together."""

    context: BaseContext
    seconds: float
    tells: bool = True
    """Whether each result is written to stderr as well."""
    started: float = 0.0

    def __post_init__(self) -> None:
        self.started = time.monotonic()

    def left(self) -> float:
        """Seconds."""
        return self.seconds - (time.monotonic() - self.started)

    def __call__(self, where: str, *arguments: Any) -> Outcome:
        """`where`: `module:function` of this folder, whose result is JSON-like. It is imported there, not here."""
        with tempfile.TemporaryDirectory() as folder:
            result, log = Path(folder) / "result.json", Path(folder) / "log"
            process: Any = self.context.Process(target=_work, args=(where, arguments, str(result), str(log)))  # type: ignore[attr-defined]
            began = time.monotonic()
            process.start()
            process.join(max(0.0, self.left()))
            late = process.is_alive()
            if late:
                process.kill()
                process.join()
            said = log.read_text(errors="replace").splitlines() if log.exists() else []
            print(f"{where} {arguments[1:]}: {time.monotonic() - began:.0f} s", *said[-30:], sep="\n", file=sys.stderr)
            if result.exists() and process.exitcode == 0:
                text = result.read_text(encoding="utf-8")
                if self.tells:  # not lost where this process is ended before its report
                    print(text, file=sys.stderr, flush=True)
                return Outcome(json.loads(text))
            ended = "stopped when the time was over" if late else f"ended with {process.exitcode}"
            return Outcome(None, f"{ended}: {next((line for line in reversed(said) if line.strip()), '')}"[:500])


def _work(where: str, arguments: tuple[Any, ...], result: str, log: str) -> None:
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(output, 1)
    os.dup2(output, 2)
    with contextlib.suppress(
        OSError
    ):  # where main memory runs out, this process shall go and not the one that waits for it
        Path("/proc/self/oom_score_adj").write_text("1000", encoding="ascii")
    Path(result).write_text(json.dumps(call(where, *arguments)), encoding="utf-8")
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # what libraries' threads still wait for holds nobody up


def call(where: str, *arguments: Any) -> dict[str, Any]:
    """The result of `module:function` of this folder."""
    module, _, function = where.partition(":")
    return getattr(importlib.import_module(f"tools.benchmarks.{module}"), function)(*arguments)


class Run(NamedTuple):
    """What a part is given."""

    settings: Settings
    call: Callable[..., Outcome]
    left: Callable[[], float]
    """Seconds that remain for all parts."""

    def one(self, where: str, *arguments: Any) -> dict[str, Any]:
        found, why = self.call(where, self.settings, *arguments)
        return {"cannot": why} if found is None else found


def _alone(where: str) -> Callable[[Run], dict[str, Any]]:
    return lambda run: run.one(where)


def _train(run: Run) -> dict[str, Any]:
    alone = {name: {"alone": run.one("gpu_parts:alone", name)} for name in ("3b", "1.2b")}
    return {name: found | run.one("gpu_parts:train", name) for name, found in alone.items()}


def _offload(run: Run) -> dict[str, Any]:
    """The ways by turns, each time in a process of its own: two of them do not fit the device together.

    `ratio` once, and last: it moves all gradients to main memory and back in each micro-batch, and takes as long as all the others.
    """
    ways = ("none", "split", "ratio")
    seen: dict[str, list[dict[str, Any]]] = {way: [] for way in ways}
    for number in range(run.settings.rounds):
        for way in ways[:2][:: 1 if number % 2 == 0 else -1]:
            seen[way].append(run.one("gpu_offload:speed", way))
    seen["ratio"].append(run.one("gpu_offload:speed", "ratio"))
    found: dict[str, Any] = {"rounds": seen, "target_speed_over_none": TARGET_OFFLOAD, "limit_speed_over_none": 1.0}
    for way in ways[1:]:
        pairs = [
            sorted(one["seconds"])[len(one["seconds"]) // 2] / sorted(other["seconds"])[len(other["seconds"]) // 2]
            for one, other in zip(seen["none"], seen[way], strict=False)
            if "seconds" in one and "seconds" in other
        ]
        if pairs:
            found[f"speed_over_none, {way}"] = [round(pair, 4) for pair in pairs]
    return found


def _largest(run: Run) -> dict[str, Any]:
    first, most = (2, 2) if run.settings.tiny else (44, 64)
    found: dict[str, Any] = {"target_parameters": TARGET_LARGEST}
    for way in ("split", "ratio"):
        tries: list[dict[str, Any]] = []

        def fits(layers: int, way: str = way, tries: list[dict[str, Any]] = tries) -> bool:
            tries.append({"layers": layers} | run.one("gpu_offload:deepest", way, layers))
            return "cannot" not in tries[-1]

        layers = search(fits, first, most, run.left)
        ran = next((one for one in tries if one["layers"] == layers and "cannot" not in one), None)
        found[way] = {"largest_parameters": ran and ran["parameters"], "tries": tries}
        if ran is None:
            found[way]["cannot"] = "no depth that was tried ran"
    return found


def search(fits: Callable[[int], bool], first: int, most: int, left: Callable[[], float]) -> int | None:
    """The most layers, at most `most`, found to fit: up from `first` while it does, else down until it does; None: none was found.

    A try begins only where the time that is `left` is twice what the longest one took.
    """
    longest = 0.0

    def tried(layers: int) -> bool:
        nonlocal longest
        before = left()
        if before < 2 * longest:
            return False
        works = fits(layers)
        longest = max(longest, before - left())
        return works

    layers = first
    if tried(layers):
        while layers + _DEEPER <= most and tried(layers + _DEEPER):
            layers += _DEEPER
        return layers
    while layers > _SHALLOWER:
        layers -= _SHALLOWER
        if tried(layers):
            return layers
    return None


class Part(NamedTuple):
    run: Callable[[Run], dict[str, Any]]
    needs: Sequence[str]
    """Modules without which it cannot run."""


PARTS = {
    "matmul": Part(_alone("gpu_parts:matmul"), _ENGINE[:2]),
    "train": Part(_train, _ENGINE),
    "states8b": Part(_alone("gpu_parts:states8b"), _ENGINE),
    "loss": Part(_alone("gpu_parts:loss"), ("torch", "transformers", "pydantic", "ruamel.yaml")),
    "packed": Part(_alone("gpu_parts:packed"), _ENGINE),
    "largest": Part(_largest, _ENGINE),
    "offload": Part(_offload, _ENGINE),
}


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="tools/bench gpu",
        description=__doc__,
        epilog=CARRY,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("parts", nargs="+", choices=PARTS, metavar="PART", help=", ".join(PARTS))
    parser.add_argument("--tiny", action="store_true", help="a CPU will do: shows that the script runs, and no figures")
    parser.add_argument("--steps", type=int, default=Settings.steps, help="counted ones of each side")
    parser.add_argument("--rounds", type=int, default=Settings.rounds, help="of the ways of `offload`")
    parser.add_argument("--peer", choices=("autocast", "bf16"), default=Settings.peer, help="the plain side's weights")
    parser.add_argument("--host-memory", type=float, metavar="GB", help="of main memory, where the machine shows less")
    parser.add_argument("--seconds", type=float, default=_DEADLINE_SECONDS, help="for all parts together")
    args = parser.parse_args()
    settings = replace(
        TINY_SETTINGS if args.tiny else Settings(steps=args.steps, rounds=args.rounds),
        peer=args.peer,
        host_bytes=None if args.host_memory is None else int(args.host_memory * 1e9),
    )
    apart = Apart(multiprocessing.get_context("spawn"), args.seconds, tells=not args.tiny)
    found = measured(args.parts, Run(settings, apart, apart.left))
    print(json.dumps(found, indent=2))
    return 1 if any(_lacks(part) for part in found["parts"].values()) else 0


def measured(names: Sequence[str], run: Run) -> dict[str, Any]:
    """The report of these parts."""
    found: dict[str, Any] = {"measured": time.strftime("%Y-%m-%d")}
    if run.settings.tiny:
        found["tiny"] = "this shows that the parts run; their figures mean nothing and are left out"
    machine, why = run.call("gpu_machine:facts", run.settings.tiny)
    found["machine"] = machine or {"cannot": why}
    blocked = why or (machine or {}).get("cannot")
    parts: dict[str, dict[str, Any]] = {}
    for name in names:
        lacking = [module for module in PARTS[name].needs if importlib.util.find_spec(module.split(".")[0]) is None]
        if blocked or lacking:
            parts[name] = {"cannot": blocked or f"not installed here: {', '.join(lacking)} (--help says how)"}
        else:
            parts[name] = PARTS[name].run(run)
            if run.settings.tiny:
                parts[name] = _names(parts[name])
    return found | {"parts": parts}


def _names(value: Any) -> Any:
    """What a part reports, without its figures: the names, and why something could not run."""
    if not isinstance(value, dict):
        return [_names(one) for one in value if isinstance(one, dict)] if isinstance(value, list) else "ran"
    return {key: one if key == "cannot" else _names(one) for key, one in value.items()}


def _lacks(value: Any) -> bool:
    """Whether anything in a report could not run, a try of the search for the largest left out."""
    if isinstance(value, list):
        return any(_lacks(one) for one in value)
    if not isinstance(value, dict):
        return False
    return "cannot" in value or any(_lacks(one) for key, one in value.items() if key != "tries")


if __name__ == "__main__":
    sys.exit(main())
