"""What a run would do and need, without starting it: memory by part, the ways to run, time, checkpoints, the full DeepSpeed config."""

import argparse
from collections.abc import Iterator
from typing import Any

from dstune.cli.output import add_run_file, emit
from dstune.errors import EXIT_DONE, EXIT_FIT

_GIGABIT = 1e9 / 8
_RECOMPUTING = {
    True: "recomputing activations",
    False: "keeping activations",
    "offload": "recomputing activations from what waits in host memory",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_run_file(parser)
    parser.add_argument("--workers", metavar="N", help="plan for so many workers (default: the run file's)")
    parser.add_argument("--nodes", metavar="N", help="machines")
    parser.add_argument("--gpus-per-node", metavar="N")
    parser.add_argument(
        "--gpu", metavar="NAME", help="h100-80gb, a100-40gb, rtx-4090, … (default: this machine's CPU or an h100-80gb)"
    )
    parser.add_argument("--gpu-memory", metavar="SIZE", help="80GB: another memory than that GPU's")
    parser.add_argument("--host-memory", metavar="SIZE", help="of one machine (default: this one's)")
    parser.add_argument("--nvme", metavar="SIZE", help="of one machine's fast disk, if states may lie there")
    parser.add_argument(
        "--network",
        type=float,
        metavar="GBIT",
        help="Gbit/s of one machine to the others (default: 400 for each GPU)",
    )
    parser.add_argument("--price", metavar="X", help="of one GPU and hour, for the price of the run")
    parser.add_argument(
        "--mtbf", metavar="HOURS", help="of one machine between failures (default: 50,700 over its GPUs)"
    )
    parser.add_argument("--no-data", action="store_true", help="prepare nothing: take every row as full")


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
        network=None if args.network is None else args.network * _GIGABIT,
        price=args.price,
        node_hours=args.mtbf,
        without_data=args.no_data,
    )
    emit(args, plan, _lines(plan))
    return EXIT_DONE if plan["fits"] else EXIT_FIT


def _lines(plan: dict[str, Any]) -> Iterator[str]:
    for name, value in plan.items():
        if not isinstance(value, dict | list) and value is not None and name not in ("fits", "why"):
            yield f"{name.replace('_', ' '):<22} {value}"
    model, machines = plan["model"], plan["machines"]
    yield (
        f"{'model':<22} {model['kind']}, {model['parameters'] / 1e6:,.1f} M parameters, {model['trained'] / 1e6:,.1f} M trained,"
        f" {model['active_per_token'] / 1e6:,.1f} M active for a token (activations {model['activations']})"
    )
    yield (
        f"{'machines':<22} {machines['nodes']} x {machines['workers_per_node']} {machines['device']}"
        f" of {_gib(machines['device_memory_bytes'])}, {_gib(machines['host_memory_bytes'])} of host memory each"
        + (" (assumed: --host-memory)" if machines["host_memory_assumed"] else "")
    )
    if (network := machines["network_bytes_per_second"]) is not None:
        assumed = " (assumed: --network)" if machines["network_assumed"] else ""
        yield f"{'network':<22} {network / _GIGABIT:,.0f} Gbit/s from each machine to the others{assumed}"
    on_host = machines["device"] != "cpu" and "masters and moments" in plan["this_run"]["host_parts"]
    if on_host and machines["cores_per_worker"] == 1:
        yield f"{'cores':<22} 1 a worker, for updates on the host: as many as there are is faster (cluster.cpus_per_worker)"
    for kernel in plan["kernels"]:
        yield f"{'kernel':<22} {kernel['name']}: {'on' if kernel['on'] else 'off'} ({kernel['why']})"
    yield ""
    yield from _this_run(plan["this_run"], "worker" if machines["device"] == "cpu" else "GPU")
    yield ""
    yield from _ways(plan)
    yield ""
    yield "DeepSpeed config (dstune feeds and weighs the forward passes, so its batch sizes stay 1):"
    yield from _indented(plan["deepspeed"])


def _this_run(this: dict[str, Any], device: str) -> Iterator[str]:
    yield (
        f"this run: {this['preset']}, {this['micro_batches']} x {this['micro_batch_size']} rows a worker and step, "
        + _RECOMPUTING[this["activation_checkpointing"]]
    )
    if this["chosen_because"]:
        yield f"  {'chosen':<24} {this['chosen_because']}"
    yield (
        f"  {'needs a worker' if this['fits'] else 'DOES NOT FIT a worker':<24} {_gib(this['device_bytes'])}"
        + (f" and {_gib(this['host_bytes'])} of its host" if this["host_bytes"] else "")
        + (f": {this['why']}" if this["why"] else "")
    )
    parts = this["device_parts"] | {f"{name} (host)": count for name, count in this["host_parts"].items()}
    for name, count in parts.items():
        yield f"    {name:<50} {_gib(count):>12}"
    if this["host_bytes"] or this["nvme_bytes"]:
        nvme = f", {_gib(this['nvme_bytes_per_node'])} of NVMe" if this["nvme_bytes"] else ""
        yield f"  {'needs a machine':<24} {_gib(this['host_bytes_per_node'])} of host memory{nvme}"
    hours, device_hours = this["hours"], this["device_hours"]
    yield (
        f"  {'takes about':<24} {this['step_seconds']:.3g} s a step, {this['tokens_per_second']:,.0f} tokens/s"
        + (f", {hours:.3g} h" if hours is not None else "; how many steps, the data says, or train.max_steps")
        + (f", {device_hours:.4g} {device} hours" if device_hours != hours else "")
        + (f", {this['price']:,.2f} to pay" if this["price"] is not None else "")
    )
    spent = {name: value for name, value in this["seconds"].items() if value}
    yield f"  {'':<24} of these " + ", ".join(f"{value:.3g} s {name}" for name, value in spent.items())
    yield from _checkpoints(this["checkpoint"])


def _checkpoints(save: dict[str, Any]) -> Iterator[str]:
    yield (
        f"  {'a checkpoint':<24} {_gib(save['bytes'])} on the disk ({_gib(save['shard_bytes'])} from each worker, "
        f"{_gib(save['node_bytes'])} from each machine); up to {_gib(save['disk_bytes'])} for all that stay"
    )
    if save["background"]:
        yield f"  {'':<24} {_gib(save['host_bytes_per_node'])} of host memory a machine while it is written behind the training"
    else:
        yield f"  {'':<24} the training waits {save['seconds']:,.0f} s for each: no host memory for copies"
    yield (
        f"  {'best saved every':<24} {save['interval_steps']:,} steps ({save['interval_seconds'] / 60:,.1f} min);"
        f" {save['goodput']:.2%} of the time then makes progress"
    )


def _ways(plan: dict[str, Any]) -> Iterator[str]:
    yield "ways to run, the best that fits first:" if plan["best"] else "ways to run: none fits"
    yield f"  {'preset':<26}{'micro':>6}{'passes':>7}{'recompute':>11}{'worker':>12}{'host':>12}{'s/step':>10}{'tokens/s':>12}"
    for way in plan["ways"]:
        again = {True: "yes", False: "no"}.get(way["activation_checkpointing"], way["activation_checkpointing"])
        yield (
            f"  {way['preset']:<26}{way['micro_batch_size']:>6}{way['micro_batches']:>7}{again:>11}"
            f"{_gib(way['device_bytes']):>12}{_gib(way['host_bytes']):>12}{way['step_seconds']:>10.3g}{way['tokens_per_second']:>12,.0f}"
            + (f"   no: {way['why']}" if way["why"] else "")
        )
    yield f"  {'first, because' if plan['best'] else 'why'}: {plan['why']}"
    if more := plan["enough_machines"]:
        way = f"{more['preset']} and micro-batches of {more['micro_batch_size']}"
        yield f"  on {more['nodes']} of these machines the run would fit, with {way}"
    if more := plan["enough_sharing"]:
        yield f"  with cluster.sequence_parallel: {more['sequence_parallel']} it would fit as well, with {more['preset']}"


def _gib(count: float) -> str:
    return f"{count / (1 << 30):.2f} GiB"


def _indented(config: dict[str, object]) -> list[str]:
    from dstune.atomic import dump_json

    return ["  " + line for line in dump_json(config).splitlines()]
