"""A pretrained model into two ZeRO-3 workers: dstune's partitioned loading and `from_pretrained` under `zero.Init`, by turns.

The model is a Llama of random bf16 weights, written once below `--directory` as safetensors in several files. Each side is a group of
fresh workers over gloo, a thread each; the seconds are from when all have joined and imported what they need to when the last has its
weights. What of the files the page cache holds is the same for both (`--cold` drops them before each side). Per worker, at most:
anonymous memory above what the process had before, seen from outside a hundred times a second, whose limit is the partition and one
layer; pages of mapped files beside it, which the kernel takes back whenever it wants; bytes read by system calls, and from the disk.
That both sides have the same weights is shown by a hash of each worker's partitions. The limit of the time is copying a partition's
bytes out of mapped files that are cached, or one reading of the files at the disk's rate with `--cold`.
"""

import argparse
import json
import math
import os
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tools.benchmarks import planned
from tools.benchmarks.measures import memory_bytes, ratios

TARGET_TIME = 0.4
SIDES = ("dstune", "from_pretrained")
_HIDDEN, _VOCABULARY = 2048, 32_000
_FILE_BYTES = 500 << 20


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="tools/bench loading", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--parameters", type=float, default=1e9)
    parser.add_argument("--hidden", type=int, default=_HIDDEN)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3, help="how often the sides take turns")
    parser.add_argument("--cold", action="store_true", help="drop the files from the page cache before each side")
    parser.add_argument(
        "--directory", type=Path, default=Path(tempfile.gettempdir()) / "dstune-bench", help="the model stays here"
    )
    args = parser.parse_args()
    model = write_model(args.directory, args.hidden, _layers(args.parameters, args.hidden))
    with tempfile.TemporaryDirectory() as name:
        rounds = [
            {side: _run(side, model, Path(name), args) for side in _order(number)} for number in range(args.rounds)
        ]
    print(json.dumps(_summary(model, rounds, args), indent=2))
    return 0


def _order(number: int) -> tuple[str, ...]:
    return SIDES if number % 2 == 0 else SIDES[::-1]


def _layers(parameters: float, hidden: int) -> int:
    shape = planned.llama(hidden, 1)
    layer = 4 * hidden**2 + 3 * hidden * shape["intermediate_size"]
    return max(1, round((parameters - 2 * _VOCABULARY * hidden) / layer))


def write_model(directory: Path, hidden: int, layers: int) -> Path:
    """The directory of such a Llama below `directory`, written there if it is not there yet."""
    place = directory / f"llama-{hidden}-{layers}"
    if (place / "config.json").exists():
        return place
    import torch
    from safetensors.torch import save_file
    from transformers import LlamaConfig, LlamaForCausalLM

    place.mkdir(parents=True, exist_ok=True)
    config = LlamaConfig(
        **planned.llama(hidden, layers),
        vocab_size=_VOCABULARY,
        tie_word_embeddings=False,
        dtype=torch.bfloat16,
        architectures=["LlamaForCausalLM"],
    )
    with torch.device("meta"):
        shapes = {name: tuple(tensor.shape) for name, tensor in LlamaForCausalLM(config).state_dict().items()}
    generator = torch.Generator().manual_seed(0)
    weight_map: dict[str, str] = {}
    for number, names in enumerate(_files(shapes)):
        file = f"model-{number:05d}.safetensors"
        values = {name: torch.empty(shapes[name]).normal_(std=0.02, generator=generator) for name in names}
        save_file({name: value.bfloat16() for name, value in values.items()}, place / file, {"format": "pt"})
        weight_map |= dict.fromkeys(names, file)
    index = {"metadata": {"total_size": _model_bytes(shapes)}, "weight_map": weight_map}
    (place / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    config.save_pretrained(place)  # last: what is here with it is whole
    return place


def _files(shapes: dict[str, tuple[int, ...]]) -> Iterator[list[str]]:
    """Names of tensors that go into one file."""
    names, size = list[str](), 0
    for name, shape in shapes.items():
        if size >= _FILE_BYTES:
            yield names
            names, size = [], 0
        names.append(name)
        size += 2 * math.prod(shape)
    yield names


def _model_bytes(shapes: dict[str, tuple[int, ...]]) -> int:
    return sum(2 * math.prod(shape) for shape in shapes.values())


def _run(side: str, model: Path, folder: Path, args: argparse.Namespace) -> list[dict[str, Any]]:
    """What each worker of one side reports, with the peaks that were seen from outside."""
    if args.cold:
        _forget(model)
    peaks: dict[int, dict[str, int]] = defaultdict(lambda: {"RssAnon": 0, "RssFile": 0})

    def look(processes: list[int]) -> None:
        for process in processes:
            for key, largest in peaks[process].items():
                peaks[process][key] = max(largest, memory_bytes(key, process))

    planned.spawn("tools.benchmarks.loading_worker", args.workers, [side, str(model), str(folder)], watch=look)
    found: list[dict[str, Any]] = []
    for rank in range(args.workers):
        one = json.loads((folder / f"{rank}.json").read_text(encoding="utf-8"))
        seen, before = peaks[one["process"]], one["before"]
        one["peak_anonymous_bytes"] = seen["RssAnon"] - before["RssAnon"]
        one["peak_mapped_bytes"] = seen["RssFile"] - before["RssFile"]
        found.append(one)
    return found


def _forget(model: Path) -> None:
    """Have the kernel drop the files' pages."""
    for file in model.glob("*.safetensors"):
        descriptor = os.open(file, os.O_RDONLY)
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def _summary(model: Path, rounds: list[dict[str, list[dict[str, Any]]]], args: argparse.Namespace) -> dict[str, Any]:
    seconds = {side: [max(one["seconds"] for one in each[side]) for each in rounds] for side in SIDES}
    first = rounds[0]["dstune"]
    digests = {tuple(one["digest"] for one in each[side]) for each in rounds for side in SIDES}
    size = sum(file.stat().st_size for file in model.glob("*.safetensors"))
    limit = first[0]["partition_bytes"] + first[0]["largest_layer_bytes"]
    return {
        "what": {
            "parameters": first[0]["parameters"],
            "files_bytes": size,
            "workers": args.workers,
            "page_cache": "dropped before each side" if args.cold else "as it was",
            "rounds": args.rounds,
        },
        "seconds": {side: [round(one, 3) for one in each] for side, each in seconds.items()},
        "time_over_from_pretrained": ratios(seconds["dstune"], seconds["from_pretrained"]),
        "target_time": TARGET_TIME,
        "largest_of_a_worker": {
            side: {
                key: max(one[key] for each in rounds for one in each[side])
                for key in ("peak_anonymous_bytes", "peak_mapped_bytes", "read_by_calls_bytes", "read_from_disk_bytes")
            }
            for side in SIDES
        },
        "limit_anonymous_bytes": limit,
        "anonymous_over_limit": round(
            max(one["peak_anonymous_bytes"] for each in rounds for one in each["dstune"]) / limit, 3
        ),
        "same_weights": len(digests) == 1,
        "limit_seconds": round(statistics.median(_limit(model, args) for _ in range(3)), 3),
        "measured": time.strftime("%Y-%m-%d"),
    }


def _limit(model: Path, args: argparse.Namespace) -> float:
    """Seconds to copy a worker's share out of the mapped files; with --cold to read all of them from the disk."""
    import mmap

    import numpy as np

    began = time.perf_counter()
    if args.cold:
        _forget(model)
        began = time.perf_counter()
    for path in model.glob("*.safetensors"):
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
            values = np.frombuffer(mapped, np.uint8)
            share = values if args.cold else values[: len(values) // args.workers]
            share.copy()
            del values, share
    return time.perf_counter() - began


if __name__ == "__main__":
    sys.exit(main())
