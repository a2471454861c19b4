"""The step of dstune's loop beside a bare DeepSpeed loop: same model, same rows, same DeepSpeed config, alternating.

Two workers over gloo, one thread each. Both sides live in the same processes and take turns, step by step, so that whatever else
the machine does hits both. The bare loop calls nothing but `engine(...)`, `engine.backward`, `engine.step` on batches that are
tensors already; its loss is the sum over the targets scaled as dstune's is, so the losses of both sides must be equal.
The physical limit of the ratio is 1: dstune's loop does the bare loop's work, and data, agreement and records beside it. With
`--kernels auto` dstune's side uses its kernels, and the bare one what transformers has: sdpa with its block mask, and whole logits of
the supervised tokens.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from tools.benchmarks import planned


def main() -> int:
    parser = argparse.ArgumentParser(prog="tools/bench step", description=__doc__)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--steps", type=int, default=20, help="counted steps of each side")
    parser.add_argument("--warmup", type=int, default=3)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--max-length", type=int, default=2048)
    parser.add_argument("--micro-batch-size", type=int, default=1)
    parser.add_argument("--micro-batches", type=int, default=1)
    parser.add_argument("--kernels", choices=("off", "auto"), default="off")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        train = {
            "global_batch_size": args.workers * args.micro_batch_size * args.micro_batches,
            "micro_batch_size": args.micro_batch_size,
            "max_steps": args.steps + args.warmup,
        }
        shape = planned.llama(args.hidden, args.layers)
        kernels = {"kernels": args.kernels}
        run_directory = planned.make_run(Path(folder), shape, train, args.workers, args.max_length, kernels)
        words = [str(run_directory), str(args.steps), str(args.warmup)]
        planned.spawn("tools.benchmarks.step_worker", args.workers, words)
        print(json.dumps(json.loads((Path(folder) / "result.json").read_text()), indent=2))
    return 0


def summary(
    ours: list[float], bare: list[float], losses: tuple[list[float], list[float]], facts: dict[str, Any]
) -> dict[str, Any]:
    """Medians, the ratio step by step, and how far the two sides' losses are apart."""
    ratios = sorted(a / b for a, b in zip(ours, bare, strict=True))
    return facts | {
        "dstune_step_seconds": round(statistics.median(ours), 4),
        "bare_step_seconds": round(statistics.median(bare), 4),
        "ratio_median": round(statistics.median(ratios), 4),
        "ratio_quartiles": [round(ratios[len(ratios) // 4], 4), round(ratios[-1 - len(ratios) // 4], 4)],
        "ratio_of_sums": round(sum(ours) / sum(bare), 4),
        "target": 0.8 if facts["kernels"] == "auto" else 1.02,
        "largest_relative_loss_difference": max(abs(a - b) / abs(b) for a, b in zip(*losses, strict=True)),
        "measured": time.strftime("%Y-%m-%d"),
    }


if __name__ == "__main__":
    sys.exit(main())
