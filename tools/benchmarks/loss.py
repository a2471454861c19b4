"""The last linear layer and the loss behind it, forward and backward: plain, TRL's chunked one, and dstune's; alternating, in one run.

Plain is what transformers does: logits of all tokens, made fp32, torch's cross-entropy. TRL's is called as its SFT trainer calls it
(`PYTHONPATH=…` has to find `trl`; without it that side is left out). Each side takes the mean over the supervised tokens.
Times are those of one process in which the sides take turns; peaks are each side's own, in a process of its own: the largest
resident set during the call (on a GPU what torch allocated) less what was there before it, which is the inputs.
Gradient errors are against plain in fp32, on the first tokens: the norm of the difference over the norm.
The limit of the time is three products (logits, gradient of the hidden states, of the weight) at the rate of a large product here;
of plain all tokens take part in them, of dstune's the supervised ones.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import cross_entropy, linear

from dstune.model.kernels.fused_loss import fastest
from dstune.model.kernels.linear_cross_entropy import Logits
from dstune.model.loss import IGNORED
from tools.benchmarks.measures import memory_bytes, product_rate, ratios, wait_for
from tools.benchmarks.peers import TRL, has_trl

Side = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
"""`side(hidden [n, width], weight [vocabulary, width], targets [n])`: the mean loss of the supervised tokens."""

ROOT = Path(__file__).parents[2]
TARGET_TIME, TARGET_PEAK = 0.6, 0.22


def plain(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return cross_entropy(linear(hidden, weight).float(), targets, ignore_index=IGNORED)


def trl(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    from trl.kernels.chunked_logprob import ChunkedLogProbFunction, _use_triton
    from trl.trainer import utils

    mask = targets != IGNORED
    only = _use_triton(hidden.device)  # elsewhere TRL scores every position
    scored, wanted = (hidden[mask], targets[mask]) if only else (hidden, targets.clamp(min=0))
    size = utils._CHUNKED_LOGPROB_CHUNK_SIZE
    found = ChunkedLogProbFunction.apply(scored, weight, None, wanted, 1.0, size, None, 1.0, ("log_probs",))[0]
    return -(found if only else found.masked_fill(~mask, 0)).sum() / mask.sum()


def dstune(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    mask = targets != IGNORED
    function = fastest(hidden.device.type)
    return function(hidden[mask], weight, None, targets[mask], Logits()) / mask.sum()


SIDES: dict[str, Side] = {"plain": plain, "trl": trl, "dstune": dstune}


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="tools/bench loss", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--vocabulary", type=int, default=128_000)
    parser.add_argument("--supervised", type=float, default=1.0, help="the share of tokens that are targets")
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--error-tokens", type=int, default=256, help="of the comparison of gradients; 0 leaves it out")
    parser.add_argument("--peak", choices=SIDES, help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    if args.peak:
        print(json.dumps(peak_bytes(SIDES[args.peak], *inputs(args), args.device)))
        return 0
    names = [name for name in SIDES if name != "trl" or found_trl()]
    print(json.dumps(compare(names, args), indent=2))
    return 0


def found_trl() -> bool:
    if not has_trl():
        print(f"TRL's side is left out. {TRL}", file=sys.stderr)
    return has_trl()


def inputs(args: argparse.Namespace) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Hidden states as behind a norm, a weight as initialised, targets drawn; the unsupervised ones in runs as prompts are."""
    dtype = getattr(torch, args.dtype)
    hidden = torch.empty(args.tokens, args.hidden, dtype=dtype, device=args.device).normal_()
    weight = torch.empty(args.vocabulary, args.hidden, dtype=dtype, device=args.device).normal_(std=0.02)
    targets = torch.randint(0, args.vocabulary, (args.tokens,), device=args.device)
    position = torch.arange(args.tokens, device=args.device) % 200
    targets[position >= round(200 * args.supervised)] = IGNORED
    return hidden.requires_grad_(), weight.requires_grad_(), targets


def once(side: Side, hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> tuple[float, float]:
    """Seconds of a forward and a backward pass, and the loss."""
    hidden.grad = weight.grad = None
    wait_for(hidden)
    started = time.perf_counter()
    loss = side(hidden, weight, targets)
    loss.backward()
    wait_for(hidden)
    return time.perf_counter() - started, float(loss.detach())


def peak_bytes(side: Side, hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, device: str) -> int:
    once(side, hidden[:8].detach().requires_grad_(), weight[:64].detach().requires_grad_(), targets[:8] % 64)
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        once(side, hidden, weight, targets)
        return torch.cuda.max_memory_allocated() - before
    # The kernel's own high-water mark, set back to what is resident now.
    Path("/proc/self/clear_refs").write_text("5")
    before = memory_bytes("VmRSS")
    once(side, hidden, weight, targets)
    return memory_bytes("VmHWM") - before


def peaks(names: list[str], words: list[str]) -> dict[str, int]:
    found: dict[str, int] = {}
    for name in names:
        command = [sys.executable, "-m", "tools.benchmarks.loss", *words, "--peak", name]
        found[name] = int(json.loads(subprocess.run(command, cwd=ROOT, check=True, capture_output=True).stdout))
    return found


def gradient_errors(names: list[str], given: tuple[torch.Tensor, ...], tokens: int) -> dict[str, dict[str, float]]:
    """Relative to plain's in fp32; of the hidden states and the weight."""
    hidden, weight, targets = given[0][:tokens].detach(), given[1].detach(), given[2][:tokens]
    exact = [hidden.float().requires_grad_(), weight.float().requires_grad_()]
    plain(exact[0], exact[1], targets).backward()
    errors: dict[str, dict[str, float]] = {}
    for name in names:
        own = [hidden.clone().requires_grad_(), weight.clone().requires_grad_()]
        SIDES[name](own[0], own[1], targets).backward()
        errors[name] = {
            what: float((mine.grad.float() - wanted.grad).norm() / wanted.grad.norm())  # type: ignore[union-attr]
            for what, mine, wanted in zip(("hidden", "weight"), own, exact, strict=True)
        }
    return errors


def compare(names: list[str], args: argparse.Namespace) -> dict[str, Any]:
    given = inputs(args)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    losses: dict[str, float] = {}
    rates: list[float] = []
    for number in range(args.rounds + 1):  # the first is not counted
        rates.append(product_rate(args.device, given[0].dtype))
        for name in names:
            taken, losses[name] = once(SIDES[name], *given)
            if number:
                seconds[name].append(taken)
    peak = peaks(names, [f"--{key}={getattr(args, key)}" for key in _SIZES])
    supervised = int((given[2] != IGNORED).sum())
    product = 6 * args.hidden * args.vocabulary / max(rates)
    return {
        "what": {key: getattr(args, key) for key in (*_SIZES, "threads", "rounds")} | {"targets": supervised},
        "seconds_median": {name: round(statistics.median(each), 4) for name, each in seconds.items()},
        "time_over_plain": {name: ratios(seconds[name], seconds["plain"]) for name in names},
        "target_time_over_plain": TARGET_TIME,
        "peak_bytes": peak,
        "peak_over_plain": {name: round(peak[name] / peak["plain"], 4) for name in names},
        "target_peak_over_plain": TARGET_PEAK,
        "loss": losses,
        "gradient_error_against_fp32": gradient_errors(names, given, args.error_tokens) if args.error_tokens else None,
        "limit": {
            "product_tflops": round(max(rates) / 1e12, 3),
            "seconds_of_three_products": {
                "plain": round(product * args.tokens, 4),
                "dstune": round(product * supervised, 4),
            },
        },
        "measured": time.strftime("%Y-%m-%d"),
    }


_SIZES = ("tokens", "hidden", "vocabulary", "supervised", "dtype", "device")


if __name__ == "__main__":
    sys.exit(main())
