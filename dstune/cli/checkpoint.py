"""What is committed (list), whether every byte is right (verify), deleting what need not stay (prune), DeepSpeed's own in (import).

On the disk and, where `checkpoint.dir` is an address, in the store. Of a run whose directory is lost, give the run file.
"""

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from dstune.cli.output import add_run, emit
from dstune.errors import UsageError
from dstune.paths import is_address

_OPTIONS = {
    "list": ("verify",),
    "verify": ("step",),
    "prune": ("keep", "keep_every", "best", "best_mode", "dry_run"),
    "import": ("source", "tag", "step", "skip_objects"),
}
_LEFT_OVER = {
    "unfinished": "a save that was cut short",
    "deleting": "a deletion that was cut short",
    "damaged": "damaged, moved aside when its step was saved anew",
    "other": "not dstune's",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("action", choices=tuple(_OPTIONS))
    add_run(parser)
    parser.add_argument("source", nargs="?", metavar="DEEPSPEED_DIR", help="import: what save_checkpoint was given")
    parser.add_argument("--tag", help="import: a save in it (default: the one that `latest` names)")
    parser.add_argument(
        "--skip-objects", action="store_true", help="import: read past objects that are not DeepSpeed's"
    )
    parser.add_argument("--verify", action="store_true", help="list: read every byte too")
    parser.add_argument(
        "--step",
        type=int,
        help="verify: this one alone; import: where the run then stands (default: DeepSpeed's count)",
    )
    parser.add_argument("--keep", type=int, metavar="K", help="prune: the newest K stay (default: the run's rules)")
    parser.add_argument("--keep-every", type=int, metavar="N", help="prune: steps that N divides stay; 0: none")
    parser.add_argument("--best", metavar="METRIC", help="prune: the best by this metric stays (`loss`)")
    parser.add_argument(
        "--best-mode", choices=("min", "max"), help="prune: the smallest value is the best, or the largest"
    )
    parser.add_argument("--dry-run", action="store_true", help="prune: say what would go, delete nothing")


def run(args: argparse.Namespace) -> int:
    given = {name for names in _OPTIONS.values() for name in names if getattr(args, name) not in (None, False)}
    if foreign := sorted(given - set(_OPTIONS[args.action])):
        words = ", ".join("DEEPSPEED_DIR" if name == "source" else f"--{name.replace('_', '-')}" for name in foreign)
        raise UsageError(f"`checkpoint {args.action}` takes no {words}; see dstune checkpoint --help")
    actions: dict[str, Callable[[argparse.Namespace], int]] = {
        "list": _list,
        "verify": _verify,
        "prune": _prune,
        "import": _import,
    }
    return actions[args.action](args)


def _list(args: argparse.Namespace) -> int:
    from dstune import api

    found = api.checkpoints(args.run, verify=args.verify, progress=not args.json)
    emit(args, found, _table(found))
    return 1 if any(one["problems"] for one in found["checkpoints"]) else 0


def _verify(args: argparse.Namespace) -> int:
    from dstune import api

    found = api.verify_checkpoints(args.run, step=args.step, progress=not args.json)
    emit(args, found, _verdicts(found))
    return 1 if any(one["problems"] for one in found["checkpoints"]) else 0


def _prune(args: argparse.Namespace) -> int:
    from dstune import api

    rules = {name: getattr(args, name) for name in ("keep", "keep_every", "best", "best_mode")}
    done = api.prune_checkpoints(args.run, **rules, dry_run=args.dry_run, progress=not args.json)
    emit(args, done, _account(done))
    for place in done["none_whole"]:
        print(f"dstune: {place}: no checkpoint is whole: none is deleted there", file=sys.stderr)
    return 1 if done["none_whole"] else 0


def _import(args: argparse.Namespace) -> int:
    from dstune import api

    if args.source is None:
        raise UsageError("dstune checkpoint import RUN DEEPSPEED_DIR: which checkpoint?")
    made = api.import_deepspeed(args.run, args.source, tag=args.tag, step=args.step, skip_objects=args.skip_objects)
    lines = [
        f"step {made['step']}: {made['parameters']:,} parameters of ZeRO-{made['stage']} on {made['world_size']} workers"
    ]
    lines += [f"note: {note}" for note in made["notes"]]
    emit(args, made, [*lines, f"next: dstune resume {made['run']}"])
    return 0


def _table(found: dict[str, Any]) -> Iterator[str]:
    head = ("step", "time", "size", "world", "loss", "verified", "kept because")
    rows = [head, *map(_cells, found["checkpoints"])]
    yield from _aligned(rows, right=(0, 2, 3, 4)) if found["checkpoints"] else ["nothing is committed"]
    for one in found["checkpoints"]:
        yield from (f"step {one['step']}: {problem['text']}" for problem in one["problems"])
    if found["left_overs"]:
        yield "not committed:"
        live = "a save that goes on, or was cut short"
        words = _LEFT_OVER | ({"unfinished": live} if found["driven"] else {})
        rows = [(f"  {one['name']}", size(one["bytes"]), words[one["kind"]]) for one in found["left_overs"]]
        yield from _aligned(rows, right=(1,))


def _cells(one: dict[str, Any]) -> tuple[str, ...]:
    loss, train_loss = one["loss"], one["train_loss"]
    shown = f"{loss:.4f}" if loss is not None else f"{train_loss:.4f} (train)" if train_loss is not None else "-"
    verified = {
        True: f"yes, {_time(one['verified_at'])}",
        False: "no: " + ", ".join(_short(problem) for problem in one["problems"]),
    }
    return (
        str(one["step"]),
        _time(one["time"]),
        size(one["bytes"]),
        str(one["world_size"] or "-"),
        shown,
        verified.get(one["verified"], "not looked at") + _where(one),
        ", ".join(one["kept_because"]) or "nothing: goes with the next save or prune",
    )


def _time(written: str | None) -> str:
    return (written or "-").replace("T", " ").replace("+00:00", "Z")


def _where(one: dict[str, Any]) -> str:
    return " (in the store)" if is_address(one["directory"]) else ""


def _short(problem: dict[str, Any]) -> str:
    whose = problem["file"] if problem["worker"] is None else f"worker {problem['worker']}'s shard"
    return f"{whose} {'is cut or longer' if problem['kind'] == 'size' else problem['kind']}"


def _verdicts(found: dict[str, Any]) -> Iterator[str]:
    for one in found["checkpoints"]:
        yield f"step {one['step']:>8}  {size(one['bytes']):>9}  {'whole' if one['verified'] else 'DAMAGED'}{_where(one)}"
        yield from (f"    {problem['text']}" for problem in one["problems"])
    if not found["checkpoints"]:
        yield "nothing is committed"
        return
    damaged = sum(not one["verified"] for one in found["checkpoints"])
    rate = found["bytes_read"] / max(found["seconds"], 1e-3) / 1e9
    yield f"{size(found['bytes_read'])} read in {found['seconds']:.1f} s, {rate:.2f} GB/s; {damaged or 'none'} damaged"


def _account(done: dict[str, Any]) -> Iterator[str]:
    would = "would be " if done["dry_run"] else ""
    for one in done["looked_at"]:
        damaged = f"is damaged: {'; '.join(one['problems'])}"
        yield f"step {one['step']}{_where(one)} {damaged if one['problems'] else 'was read back and is whole'}"
    for one in done["kept"]:
        yield f"kept     step {one['step']}{_where(one)}: {', '.join(one['because'])}"
    for one in done["deleted"]:
        yield f"{would}deleted  step {one['step']}{_where(one)}, {size(one['bytes'])}"
    for one in done["left_overs"]:
        yield f"{would}deleted  {one['name']}, {size(one['bytes'])}: {_LEFT_OVER[one['kind']]}"
    if done["running"]:
        yield "the run is going on: what unfinished saves left behind is its own to remove"
    yield f"{size(done['freed_bytes'])} {would}freed"


def size(count: float) -> str:
    """Bytes as a person reads them: `2.40 GB`."""
    if count < 1000:
        return f"{count:.0f} B"
    for unit in ("kB", "MB", "GB"):
        count /= 1000
        if count < 1000:
            return f"{count:.2f} {unit}"
    return f"{count / 1000:.2f} TB"


def _aligned(rows: Sequence[Sequence[str]], right: Sequence[int]) -> list[str]:
    """Rows as lines with columns two blanks apart; those in `right` end together, the others begin together."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    cells = [
        [
            cell.rjust(width) if number in right else cell.ljust(width)
            for number, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        for row in rows
    ]
    return ["  ".join(row).rstrip() for row in cells]
