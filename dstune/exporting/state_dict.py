"""A checkpoint as DeepSpeed's zero_to_fp32.py would give it: the module's state_dict in fp32, for code that loads weights itself."""

from pathlib import Path

import torch
from safetensors import safe_open

from dstune.atomic import dump_json, write_text
from dstune.checkpoint.reader import Reader
from dstune.config.schema import RunConfig
from dstune.exporting import files
from dstune.exporting.directory import new_directory
from dstune.exporting.huggingface import MAX_FILE_BYTES, untrained
from dstune.exporting.merged import whole_model
from dstune.exporting.tensors import Weights
from dstune.model.build import skeleton
from dstune.model.config import load_config
from dstune.protocols import WEIGHTS

_PICKLE = "pytorch_model"


def export(
    checkpoint: Path,
    out: Path,
    config: RunConfig,
    base: Path,
    *,
    pickled: bool = False,
    max_file_bytes: int = MAX_FILE_BYTES,
    threads: int = 1,
    weights: str = WEIGHTS,
) -> None:
    """Write `checkpoint` (a committed directory) to `out`, which must not exist; it appears whole or not at all.

    Names are the module's own; a tied tensor is written once (safetensors), or under each of its names (`pickled`:
    pytorch_model.bin, which torch.load reads). Of a run with an adapter: the whole model, the adapter in it. `weights`: the
    state that they are read from (`ema`: the average).
    Raises UsageError, CheckpointError, ConfigError, RunFailed.
    """
    with new_directory(out) as directory:
        section = config.model.model_copy(update={"dtype": "fp32"})
        outline = skeleton(load_config(section, base), section)
        with whole_model(Reader(checkpoint, weights), config, base) as masters:
            tensors = Weights(outline, masters, untrained(outline, masters, config, base))
            facts = {"total_parameters": tensors.num_parameters}
            written = files.write(tensors.as_state_dict(), directory, max_file_bytes, facts=facts, threads=threads)
        if pickled:
            _pickle(directory, written, tensors)


def _pickle(directory: Path, written: list[Path], weights: Weights) -> None:
    """Each safetensors file as torch.save's, its tensors mapped: none is in memory whole."""
    file_of: dict[str, str] = {}
    size = 0
    for path in written:
        target = directory / path.with_suffix(".bin").name.replace("model", _PICKLE, 1)
        with safe_open(str(path), framework="pt") as file:
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
        size += sum(tensor.nbytes for tensor in state.values())
        state |= {name: state[first] for name, first in weights.tied.items() if first in state}
        torch.save(state, target)
        file_of |= dict.fromkeys(state, target.name)
        del state
        path.unlink()
    if len(written) > 1:
        (directory / "model.safetensors.index.json").unlink()
        index = {"metadata": {"total_size": size}, "weight_map": dict(sorted(file_of.items()))}
        write_text(directory / f"{_PICKLE}.bin.index.json", dump_json(index))
