"""What a run would do and need, without starting it: memory by part, the ways to run, time, checkpoints, the full DeepSpeed config."""

import argparse
from collections.abc import Callable, Iterator
from typing import Any

from dstune.cli.output import add_run_file, emit


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_run_file(parser)
    parser.add_argument("--workers", type=_count, help="plan for so many workers (default: the run file's)")
    parser.add_argument("--nodes", type=_count, help="machines")
    parser.add_argument("--gpus-per-node", type=_count, metavar="N")
    parser.add_argument(
        "--gpu", metavar="NAME", help="h100-80gb, a100-40gb, rtx-4090, … (default: this machine's CPU or an h100-80gb)"
    )
    parser.add_argument("--gpu-memory", type=_size, metavar="SIZE", help="80GB: another memory than that GPU's")
    parser.add_argument("--host-memory", type=_size, metavar="SIZE", help="of one machine (default: this one's)")
    parser.add_argument(
        "--nvme", type=_size, metavar="SIZE", help="of one machine's fast disk, if states may lie there"
    )
    parser.add_argument("--price", type=float, metavar="X", help="of one GPU and hour, for the price of the run")


def run(args: argparse.Namespace) -> int:
    from dstune import api

    plan = api.plan(
        args.run,
        args.overrides,
        workers=args.workers,
        nodes=args.nodes,
        gpus_per_node=args.gpus_per_node,
        gpu=args.gpu,
        gpu_memory=args.gpu_memory,
        host_memory=args.host_memory,
        nvme=args.nvme,
        price=args.price,
    )
    emit(args, plan, _lines(plan))
    return 0


def _checked(check: Callable[[str], int]) -> Callable[[str], int]:
    def parse(text: str) -> int:
        try:
            return check(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from None

    return parse


def _parse_size(text: str) -> int:
    from dstune.config.units import size_bytes

    return size_bytes(text)


def _parse_count(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise ValueError(f"{text!r} is no count: at least 1")
    return int(text)


_size, _count = _checked(_parse_size), _checked(_parse_count)
_size.__name__, _count.__name__ = "size", "count"


def _lines(plan: dict[str, Any]) -> Iterator[str]:
    for name, value in plan.items():
        if not isinstance(value, dict | list) and value is not None:
            yield f"{name.replace('_', ' '):<22} {value}"
    model, machines = plan["model"], plan["machines"]
    yield (
        f"{'model':<22} {model['kind']}, {model['parameters'] / 1e6:,.1f} M parameters, {model['trained'] / 1e6:,.1f} M trained"
        f" (activations {model['activations']})"
    )
    yield (
        f"{'machines':<22} {machines['nodes']} x {machines['workers_per_node']} {machines['device']}"
        f" of {_gib(machines['device_memory_bytes'])}, {_gib(machines['host_memory_bytes'])} of host memory each"
    )
    for kernel in plan["kernels"]:
        yield f"{'kernel':<22} {kernel['name']}: {'on' if kernel['on'] else 'off'} ({kernel['why']})"
    yield ""
    yield from _this_run(plan["this_run"])
    yield ""
    yield from _ways(plan["ways"], plan["best"])
    yield ""
    yield "DeepSpeed config (dstune feeds and weighs the forward passes, so its batch sizes stay 1):"
    yield from _indented(plan["deepspeed"])


def _this_run(this: dict[str, Any]) -> Iterator[str]:
    yield f"this run: {this['preset']}, micro-batch {this['micro_batch_size']}, " + (
        "recomputing activations" if this["activation_checkpointing"] else "keeping activations"
    )
    yield (
        f"  {'needs a worker' if this['fits'] else 'DOES NOT FIT a worker':<24} {_gib(this['device_bytes'])}"
        + (f" and {_gib(this['host_bytes'])} of its host" if this["host_bytes"] else "")
        + (f": {this['why']}" if this["why"] else "")
    )
    for name, count in {
        **this["device_parts"],
        **{f"{name} (host)": n for name, n in this["host_parts"].items()},
    }.items():
        yield f"    {name:<50} {_gib(count):>12}"
    yield (
        f"  {'takes about':<24} {this['step_seconds']:.3g} s a step, {this['tokens_per_second']:,.0f} tokens/s, {this['hours']:.3g} h"
        + (f", {this['device_hours']:.4g} GPU hours" if this["device_hours"] != this["hours"] else "")
        + (f", {this['price']:,.2f} to pay" if this["price"] is not None else "")
    )
    save = this["checkpoint"]
    yield (
        f"  {'a checkpoint':<24} {_gib(save['bytes'])} on the disk, {_gib(save['host_copy_bytes_per_node'])} of host memory"
        f" a machine while it is written behind the training"
    )
    yield (
        f"  {'best saved every':<24} {save['best_interval_steps']:,} steps ({save['best_interval_seconds'] / 60:,.0f} min);"
        f" {save['goodput']:.2%} of the time then makes progress"
    )


def _ways(ways: list[dict[str, Any]], best: dict[str, Any] | None) -> Iterator[str]:
    yield "ways to run, the fastest that fits first:" if best else "ways to run: none fits"
    yield f"  {'preset':<26}{'micro':>6}{'recompute':>11}{'worker':>12}{'host':>12}{'s/step':>10}{'tokens/s':>12}"
    for way in ways:
        yield (
            f"  {way['preset']:<26}{way['micro_batch_size']:>6}{'yes' if way['activation_checkpointing'] else 'no':>11}"
            f"{_gib(way['device_bytes']):>12}{_gib(way['host_bytes']):>12}{way['step_seconds']:>10.3g}{way['tokens_per_second']:>12,.0f}"
            + (f"   no: {way['why']}" if way["why"] else "")
        )


def _gib(count: float) -> str:
    return f"{count / (1 << 30):.2f} GiB"


def _indented(config: dict[str, object]) -> list[str]:
    from dstune.atomic import dump_json

    return ["  " + line for line in dump_json(config).splitlines()]
