"""Useful tokens a second of training: dstune beside TRL's `SFTTrainer`, by turns, same model, data, DeepSpeed config and precision.

512 real chats, a Llama with random weights that are the same on all sides, ZeRO-3 over gloo workers. Every side is a group of
processes of its own: dstune as `dstune worker` trains (packed rows, `model.kernels: auto`); TRL with its defaults (8 padded chats a
worker, activations recomputed); TRL with `packing=True` at its best here (one packed row a worker, as dstune, nothing recomputed,
sdpa: what else transformers has for packed rows needs a GPU). Useful tokens are all that are no padding, supervised or context. A
step counts from the end of the one before to its own end, for dstune as its metrics.jsonl says; the first two of each side are left out.

The same learning: TRL is given dstune's tokens and targets. Its packed side takes dstune's rows in dstune's order (its own packing of
the same chats is stated), so its losses must be dstune's, step by step. The default side takes the same chats in the same order, 8 at
a time, so its steps are others: before the first one it computes the loss of the chats of dstune's first step, which must be dstune's.

FLOPs are counted causally: 6 for each parameter and token, input embeddings left out, and 6 L d times the sum of the squared lengths;
utilisation is against this machine's own rate of large products on all the threads that train. The limit of the tokens a second is
that rate. The ratios are a CPU's: on GPUs the others have flash attention.
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tools.benchmarks import data_inputs, peers, planned

if TYPE_CHECKING:
    from dstune.data.shards import Prepared
    from dstune.planning.plan import Plan

OURS, DEFAULT, PACKED = "dstune", "trl-default", "trl-packed"
SIDES = (OURS, DEFAULT, PACKED)
TARGETS = {DEFAULT: 5.0, PACKED: 2.5}
SEED, LR = 42, 1e-4
DEFAULT_BATCH = 8
"""Chats a worker and step, which is what `SFTConfig` says of itself."""
_UNCOUNTED = 2
"""Steps at the start."""
_CHATS, _VOCABULARY, _POSITIONS = 512, 32_000, 4096
_MODELS = {"58m": (512, 8), "150m": (768, 14)}
"""Hidden size and layers; embeddings and head are not tied."""
_PHASES = ("data", "forward", "backward", "optimizer", "waiting", "communication")
"""The last lies inside the three before `waiting`."""


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="tools/bench train", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", choices=_MODELS, default="58m")
    parser.add_argument("--max-length", type=int, default=2048)
    parser.add_argument("--workers", type=int, default=2, help="one thread each; a single one takes two")
    parser.add_argument("--steps", type=int, default=20, help=f"of each side and round; {_UNCOUNTED} are not counted")
    parser.add_argument("--rounds", type=int, default=2, help="how often the sides take turns")
    parser.add_argument("--rows", type=int, default=1, help="packed rows a worker and step, one after the other")
    parser.add_argument("--dtype", choices=("bf16", "fp32"), default="bf16")
    parser.add_argument("--data", type=Path, help=f"other chats than the {_CHATS}: any file that dstune reads")
    parser.add_argument("--against", nargs="*", choices=SIDES[1:], default=list(SIDES[1:]), help="which of TRL's sides")
    parser.add_argument(
        "--directory", type=Path, default=Path(tempfile.gettempdir()) / "dstune-bench", help="inputs stay here"
    )
    args = parser.parse_args()
    if args.steps <= _UNCOUNTED:
        parser.error(f"--steps: at least {_UNCOUNTED + 1}")
    if args.against and not peers.has_trl():
        parser.error(peers.TRL)
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # or DeepSpeed says on stdout that it found no other
    print(json.dumps(_Bench(args).run(), indent=2))
    return 0


@dataclass(frozen=True)
class Work:
    """What the steps of a run take, as every side computes it from the plan: example numbers by row and step."""

    prepared: "Prepared"
    plan: "Plan"
    steps: int

    def rows(self) -> list[list[list[int]]]:
        """Of each step, its packed rows in dstune's order."""
        from dstune.data import order

        plan = self.plan
        return [
            [
                [int(number) for number in self.prepared.row(int(row))]
                for row in order.rows_of_step(plan.num_rows, SEED, plan.global_batch_size, plan.total_positions, step)
            ]
            for step in range(self.steps)
        ]

    def batches(self, size: int) -> list[list[int]]:
        """Of each step of the default side `size` examples: those of dstune's steps in order, then the others, from the top again."""
        firsts = [number for rows in self.rows() for row in rows for number in row]
        line = list(dict.fromkeys([*firsts, *range(self.prepared.num_examples)]))
        return [[line[(step * size + place) % len(line)] for place in range(size)] for step in range(self.steps)]

    def lengths(self, side: str) -> list[list[int]]:
        """Of each step of a side, its examples' tokens."""
        if side == DEFAULT:
            steps = self.batches(DEFAULT_BATCH * self.plan.world_size)
        else:
            steps = [[number for row in rows for number in row] for rows in self.rows()]
        return [[len(self.prepared.example(number).input_ids) for number in step] for step in steps]


class _Bench:
    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.sides = [OURS, *args.against]
        self.threads = 2 if args.workers == 1 else 1
        chats, tokenizer, origin = data_inputs.make(args.directory, _CHATS, _VOCABULARY)
        self.data, self.origin = (args.data.absolute(), str(args.data)) if args.data else (chats, f"{_CHATS} {origin}")
        self.model = _write_model(args.directory, args.model, tokenizer, args.dtype)

    def run(self) -> dict[str, Any]:
        rounds: list[dict[str, dict[str, Any]]] = []
        with tempfile.TemporaryDirectory() as name:
            for number in range(self.args.rounds):
                folder = Path(name) / str(number)
                folder.mkdir()
                run = self._plan(folder)
                order = self.sides if number % 2 == 0 else self.sides[::-1]
                rounds.append({side: {"rates": self._rates()} | self._side(side, run, folder) for side in order})
            return self._summary(rounds, work_of(run, self.args.steps))

    def _plan(self, folder: Path) -> Path:
        """The directory of a planned run of dstune, whose rows and DeepSpeed config all sides take."""
        args = self.args
        train = {
            "global_batch_size": args.workers * args.rows,
            "micro_batch_size": 1,
            "max_steps": args.steps,
            "lr": LR,
            "schedule": "constant",
            "seed": SEED,
        }
        return planned.make_run(
            folder,
            {},
            train,
            args.workers,
            args.max_length,
            model_settings={"path": str(self.model), "dtype": args.dtype},
            data={
                "sources": [{"path": str(self.data)}],
                "template": "chatml",
                "max_length": args.max_length,
                "overlong": "drop",
                "num_processes": 2,
            },
            cluster={"workers": args.workers, "cpus_per_worker": self.threads},
            checkpoint={"every": 10**6},
        )

    def _side(self, side: str, run: Path, folder: Path) -> dict[str, Any]:
        """Of each step its seconds, loss and tokens; and what else the side says of itself."""
        if side == OURS:
            planned.spawn("dstune.cli.main", self.args.workers, ["worker", str(run)], self.threads)
            lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
            found: dict[str, Any] = {
                key: [line[name] for line in lines]
                for key, name in (
                    ("step_seconds", "step_seconds"),
                    ("losses", "loss"),
                    ("tokens", "tokens"),
                    ("mfu", "mfu"),
                )
            }
            phases = {name: [line[f"{name}_seconds"] for line in lines] for name in _PHASES}
            return found | {"phases": phases, "settings": _settings(run)}
        result = folder / f"{side}.json"
        words = [side, str(run), str(self.model), str(result), str(self.args.steps)]
        planned.spawn("tools.benchmarks.train_trl", self.args.workers, words, self.threads)
        return json.loads(result.read_text(encoding="utf-8"))

    def _rates(self) -> dict[str, float]:
        """FLOP/s of large products on all the threads that train."""
        import torch

        from tools.benchmarks.measures import product_rate

        torch.set_num_threads(self.threads * self.args.workers)
        return {name: product_rate("cpu", getattr(torch, name)) for name in ("bfloat16", "float32")}

    def _summary(self, rounds: list[dict[str, dict[str, Any]]], work: Work) -> dict[str, Any]:
        from tools.benchmarks.measures import ratios

        args = self.args
        measured = [
            one["rates"] for each in rounds for one in each.values()
        ]  # whatever else ran then made it slower, never faster
        rates = {name: max(each[name] for each in measured) for name in ("bfloat16", "float32")}
        rate = rates["bfloat16" if args.dtype == "bf16" else "float32"]
        counted = {side: _Counted(side, [each[side] for each in rounds], work, self.model) for side in self.sides}
        found: dict[str, Any] = {
            "what": {
                "model": args.model,
                "data": self.origin,
                "rows": work.prepared.num_rows,
                "max_length": args.max_length,
                "workers": args.workers,
                "threads_each": self.threads,
                "dtype": args.dtype,
                "steps": args.steps,
                "counted": args.steps - _UNCOUNTED,
                "rounds": args.rounds,
            },
            "useful_tokens_per_second": {
                side: round(statistics.median(one.speeds()), 1) for side, one in counted.items()
            },
        }
        for side in args.against:
            found[f"times_{side}"] = ratios(counted[OURS].speeds(), counted[side].speeds())
            found[f"target_times_{side}"] = TARGETS[side]
        found["sides"] = {side: one.summary(rate) for side, one in counted.items()}
        found["losses"] = _losses(rounds[0])
        found["limit"] = {
            "product_tflops": {name: round(one / 1e12, 3) for name, one in rates.items()},
            "useful_tokens_per_second": round(rate / counted[OURS].flops_per_token(), 1),
        }
        return found | {"measured": time.strftime("%Y-%m-%d")}


class _Counted:
    """The counted steps of one side, round by round."""

    def __init__(self, side: str, rounds: list[dict[str, Any]], work: Work, model: Path) -> None:
        from dstune.config.schema import ModelSection
        from dstune.model.footprint import footprint
        from dstune.planning.cost import flops

        self.rounds = rounds
        lengths = work.lengths(side)
        self.tokens = [sum(step) for step in lengths]
        for one in rounds:
            assert one["tokens"] == self.tokens, f"{side} trained on {one['tokens']} tokens, not {self.tokens}"
        shape = footprint(ModelSection(path=str(model)), Path())
        self.flops = [flops(shape, sum(step), sum(length**2 for length in step), recompute=False) for step in lengths]

    def seconds(self) -> list[float]:
        return [sum(one["step_seconds"][_UNCOUNTED:]) for one in self.rounds]

    def speeds(self) -> list[float]:
        return [sum(self.tokens[_UNCOUNTED:]) / seconds for seconds in self.seconds()]

    def flops_per_token(self) -> float:
        return sum(self.flops[_UNCOUNTED:]) / sum(self.tokens[_UNCOUNTED:])

    def summary(self, rate: float) -> dict[str, Any]:
        used = sum(self.flops[_UNCOUNTED:])
        steps = [seconds for one in self.rounds for seconds in one["step_seconds"][_UNCOUNTED:]]
        found: dict[str, Any] = {
            "settings": self.rounds[0]["settings"],
            "tokens_per_step": round(statistics.mean(self.tokens[_UNCOUNTED:]), 1),
            "step_seconds_median": round(statistics.median(steps), 4),
            "flop_utilisation": round(statistics.median(used / seconds / rate for seconds in self.seconds()), 4),
        }
        if "phases" in self.rounds[0]:
            found["mfu_by_its_own_account"] = round(statistics.median(self.rounds[0]["mfu"][_UNCOUNTED:]), 4)
            found["share_of_the_step"] = self._shares()
        return found

    def _shares(self) -> dict[str, float]:
        total = sum(self.seconds())
        phases = {name: sum(sum(one["phases"][name][_UNCOUNTED:]) for one in self.rounds) / total for name in _PHASES}
        return {name: round(share, 4) for name, share in phases.items()}


def work_of(run: Path, steps: int) -> Work:
    """What the steps of the run in this directory take."""
    from dstune.data.shards import Prepared
    from dstune.paths import RunPaths
    from dstune.planning.plan import Plan

    plan = Plan.read(RunPaths(run).plan(1))
    return Work(Prepared.open(plan.prepared), plan, steps)


def _settings(run: Path) -> dict[str, Any]:
    from dstune.config.load import load_run
    from dstune.paths import RunPaths

    config = load_run(RunPaths(run).config).config
    return {
        "packing": config.data.packing,
        "kernels": config.model.kernels,
        "attention": config.model.attention,
        "activation_checkpointing": config.model.activation_checkpointing,
    }


def _losses(sides: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """That the sides learn the same: TRL's losses beside dstune's."""
    ours = sides[OURS]["losses"]
    found: dict[str, Any] = {side: [round(loss, 5) for loss in one["losses"]] for side, one in sides.items()}
    if DEFAULT in sides:
        first = sides[DEFAULT]["loss_of_our_first_step"]
        found["our_first_step_by_trl_default"] = round(first, 5)
        found["relative_difference_of_it"] = abs(first - ours[0]) / ours[0]
    if PACKED in sides:
        pairs = zip(sides[PACKED]["losses"], ours, strict=True)
        found["largest_relative_difference_of_trl_packed"] = max(abs(theirs - our) / our for theirs, our in pairs)
    return found


def _write_model(directory: Path, name: str, tokenizer: Path, dtype: str) -> Path:
    """The directory of such a Llama with random weights and the tokenizer's files; written there if it is not there yet.

    In the precision that is trained: of fp32 weights dstune's masters would keep what TRL's have rounded.
    """
    place = directory / f"llama-{name}-{dtype}-{tokenizer.name}"
    if (place / "config.json").exists():
        return place
    import shutil

    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    place.mkdir(parents=True, exist_ok=True)
    for file in tokenizer.iterdir():
        shutil.copy(file, place)
    torch.manual_seed(SEED)
    # Room for the special tokens, and for products of even size.
    sizes = {"vocab_size": _VOCABULARY + 64, "max_position_embeddings": _POSITIONS, "tie_word_embeddings": False}
    model = LlamaForCausalLM(LlamaConfig(**planned.llama(*_MODELS[name]), **sizes))
    model.to({"bf16": torch.bfloat16, "fp32": torch.float32}[dtype]).save_pretrained(place)
    return place


if __name__ == "__main__":
    sys.exit(main())
