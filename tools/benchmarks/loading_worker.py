"""One worker of `tools/bench loading`: joins, loads the model in one of the two ways, and says what that took."""

import hashlib
import importlib
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM
from transformers.integrations.deepspeed import HfDeepSpeedConfig

from dstune.atomic import write_json
from dstune.config.schema import ModelSection
from dstune.engine.construction import complete
from dstune.engine.parameters import local_piece
from dstune.engine.world import World
from dstune.model.build import build
from tools.benchmarks.measures import memory_bytes
from tools.benchmarks.planned import ROOT

_DS_CONFIG = json.loads((ROOT / "ds_configs" / "zero3.json").read_text(encoding="utf-8"))


def dstune(directory: str) -> Any:
    return build(ModelSection(path=directory), Path(directory), "sdpa", 0, _DS_CONFIG)


def from_pretrained(directory: str) -> Any:
    kept = HfDeepSpeedConfig(complete(_DS_CONFIG, torch.bfloat16))  # transformers looks for a living one
    module = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.bfloat16, attn_implementation="sdpa")
    del kept
    return module


def main(side: str, directory: str, results: str) -> None:
    torch.set_num_threads(1)
    world = World.from_environment()
    world.init()
    importlib.import_module("torch._dynamo")  # neither side's to pay: zero.Init must not be the first to import it
    load = {"dstune": dstune, "from_pretrained": from_pretrained}[side]
    dist.barrier()
    before, read = {key: memory_bytes(key) for key in ("RssAnon", "RssFile")}, _read()
    began = time.perf_counter()
    module = load(directory)
    seconds = time.perf_counter() - began
    after = _read()
    parameters = list(module.parameters())
    layers = module.model.layers
    write_json(
        Path(results) / f"{world.rank}.json",
        {
            "process": os.getpid(),
            "before": before,
            "seconds": seconds,
            "read_by_calls_bytes": after["rchar"] - read["rchar"],
            "read_from_disk_bytes": after["read_bytes"] - read["read_bytes"],
            "parameters": sum(p.ds_numel for p in parameters),
            "partition_bytes": sum(p.ds_tensor.nbytes for p in parameters),
            "largest_layer_bytes": max(sum(2 * p.ds_numel for p in layer.parameters()) for layer in layers),
            "digest": _digest(module),
        },
    )
    dist.barrier()
    world.close()


def _read() -> dict[str, int]:
    """Bytes that this process has read: `rchar` by system calls, `read_bytes` from the disk, mapped files included."""
    lines = Path("/proc/self/io").read_text(encoding="ascii").splitlines()
    return {key: int(value) for key, value in (line.split(": ") for line in lines)}


def _digest(module: Any) -> str:
    """Of this worker's piece of every parameter, in the order of their names."""
    digest = hashlib.sha256()
    for name, parameter in sorted(module.named_parameters()):
        digest.update(name.encode())
        with local_piece(parameter) as piece:
            digest.update(piece.tensor.contiguous().view(torch.uint8).numpy())
    return digest.hexdigest()


if __name__ == "__main__":
    main(*sys.argv[1:])
