"""Attention over packed rows, forward and backward: transformers' sdpa with its block mask, and dstune's per example; alternating.

Both are called as a Llama's layer calls them, through transformers' attention interface, on the same queries, keys and values of a row
whose examples have lengths drawn at random. transformers builds its mask once a forward pass for all layers, so what that takes stands
apart. Parity: outputs and gradients of both against plain softmax attention in fp32, the norm of the difference over the norm; and
against each other. The limit is the arithmetic of causal attention within the examples (7 products of a half square: 2 forward, 5
backward) at the rate of a large product here. The target is a CPU's; a GPU has kernels for this.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from transformers import LlamaConfig
from transformers.masking_utils import create_causal_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import LlamaAttention

from dstune.model import per_example
from tools.benchmarks.measures import product_rate, ratios, wait_for

TARGET = 0.4
_PLAIN, _OURS = "transformers sdpa", "dstune per-example"
_LEAST_TOKENS = 8
"""Of an example."""


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="tools/bench attention", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokens", type=int, default=2048, help="of a row")
    parser.add_argument("--examples", type=int, nargs="+", default=[10, 16, 32], help="in a row; one comparison each")
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--kv-heads", type=int, default=8)
    parser.add_argument("--head-size", type=int, default=64)
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=10)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    per_example.register()
    print(json.dumps({"what": vars(args), "rows": [_Row(args, count).compare() for count in args.examples]}, indent=2))
    return 0


class _Row:
    """One packed row, and both sides' attention over it."""

    def __init__(self, args: argparse.Namespace, examples: int) -> None:
        self.args, self.dtype = args, getattr(torch, args.dtype)
        self.lengths = _lengths(args.tokens, examples)
        self.config = LlamaConfig(
            hidden_size=args.heads * args.head_size,
            num_attention_heads=args.heads,
            num_key_value_heads=args.kv_heads,
            head_dim=args.head_size,
        )
        self.layer = LlamaAttention(self.config, layer_idx=0)
        shape = (1, args.tokens, args.head_size)
        self.given = [
            torch.randn(1, heads, *shape[1:], device=args.device).to(self.dtype)
            for heads in (args.heads, args.kv_heads, args.kv_heads)
        ]
        self.upstream = torch.randn(1, args.tokens, args.heads, args.head_size, device=args.device).to(self.dtype)
        starts = torch.tensor([0, *self.lengths]).cumsum(0).to(torch.int32).to(args.device)
        longest = max(self.lengths)
        self.packed = {
            "cu_seq_lens_q": starts,
            "cu_seq_lens_k": starts,
            "max_length_q": longest,
            "max_length_k": longest,
        }
        self.positions = torch.cat([torch.arange(length) for length in self.lengths])[None].to(args.device)
        self.masks = {_PLAIN: self._mask("sdpa"), _OURS: self._mask(per_example.PER_EXAMPLE)}

    def _mask(self, kernel: str) -> Any:
        self.config._attn_implementation = kernel
        hidden = self.given[0].new_empty(1, self.args.tokens, self.config.hidden_size)
        return create_causal_mask(
            config=self.config,
            inputs_embeds=hidden,
            attention_mask=None,
            past_key_values=None,
            position_ids=self.positions,
        )

    def once(self, name: str) -> tuple[float, list[torch.Tensor]]:
        """Seconds of a forward and a backward pass; the output and the gradients."""
        function = ALL_ATTENTION_FUNCTIONS["sdpa" if name == _PLAIN else per_example.PER_EXAMPLE]
        inputs = [tensor.clone().requires_grad_() for tensor in self.given]
        scaling = self.args.head_size**-0.5
        wait_for(self.upstream)
        started = time.perf_counter()
        output = function(self.layer, *inputs, self.masks[name], dropout=0.0, scaling=scaling, **self.packed)[0]
        output.backward(self.upstream)
        wait_for(self.upstream)
        return time.perf_counter() - started, [output.detach(), *(tensor.grad for tensor in inputs)]  # type: ignore[misc]

    def compare(self) -> dict[str, Any]:
        seconds: dict[str, list[float]] = {_PLAIN: [], _OURS: []}
        made: dict[str, list[torch.Tensor]] = {}
        masks, rates = list[float](), list[float]()
        for number in range(self.args.rounds + 1):  # the first is not counted
            rates.append(product_rate(self.args.device, self.dtype))
            masks.append(_seconds(lambda: self._mask("sdpa"), self.upstream))
            for name in (_PLAIN, _OURS) if number % 2 else (_OURS, _PLAIN):
                taken, made[name] = self.once(name)
                if number:
                    seconds[name].append(taken)
        squares = sum(length * length for length in self.lengths)
        exact = self._exact()
        return {
            "examples": len(self.lengths),
            "longest": max(self.lengths),
            "milliseconds_median": {name: round(1e3 * statistics.median(each), 3) for name, each in seconds.items()},
            "time_over_sdpa": ratios(seconds[_OURS], seconds[_PLAIN]),
            "target": TARGET,
            "milliseconds_of_the_block_mask": round(1e3 * statistics.median(masks[1:]), 3),
            "limit_milliseconds": round(7e3 * squares * self.args.heads * self.args.head_size / max(rates), 3),
            "product_tflops": round(max(rates) / 1e12, 3),
            "error_against_fp32": {name: _apart(made[name], exact) for name in made},
            "sides_apart": _apart(made[_OURS], made[_PLAIN]),
        }

    def _exact(self) -> list[torch.Tensor]:
        """Plain softmax attention of each example in fp32: the output and the gradients."""
        inputs = [tensor.float().requires_grad_() for tensor in self.given]
        groups = self.args.heads // self.args.kv_heads
        pieces: list[torch.Tensor] = []
        split = zip(*(tensor.split(self.lengths, 2) for tensor in inputs), strict=True)
        for query, key, value in split:
            scores = query @ key.repeat_interleave(groups, 1).mT * self.args.head_size**-0.5
            unseen = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu(1)
            weights = scores.masked_fill(unseen, -torch.inf).softmax(-1)
            pieces.append(weights @ value.repeat_interleave(groups, 1))
        output = torch.cat(pieces, 2).transpose(1, 2)
        output.backward(self.upstream.float())
        return [output.detach(), *(tensor.grad for tensor in inputs)]  # type: ignore[misc]


def _lengths(tokens: int, examples: int) -> list[int]:
    """Of a packed row: drawn, the same for the same numbers, `tokens` in all."""
    if tokens < examples * _LEAST_TOKENS:
        raise SystemExit(f"{examples} examples do not fit into {tokens} tokens")
    drawn = torch.rand(examples, generator=torch.Generator().manual_seed(examples)) + 0.2
    lengths = (drawn / drawn.sum() * (tokens - examples * _LEAST_TOKENS)).int() + _LEAST_TOKENS
    lengths[0] += tokens - int(lengths.sum())
    return lengths.tolist()


def _seconds(work: Callable[[], object], tensor: torch.Tensor) -> float:
    wait_for(tensor)
    started = time.perf_counter()
    work()
    wait_for(tensor)
    return time.perf_counter() - started


def _apart(mine: list[torch.Tensor], wanted: list[torch.Tensor]) -> dict[str, float]:
    return {
        what: float(((one.float() - other.float()).norm() / other.float().norm()).item())
        for what, one, other in zip(("output", "query", "key", "value"), mine, wanted, strict=True)
    }


if __name__ == "__main__":
    sys.exit(main())
