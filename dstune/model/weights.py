"""Pretrained weights into a model whose parameters are partitioned: each worker reads just its own slices."""

from pathlib import Path

from transformers import PreTrainedModel


def load_weights(module: PreTrainedModel, directory: Path) -> None:
    """Fill `module`'s parameters and persistent buffers from the safetensors files of `directory`.

    Raises ConfigError where weights are missing, of another shape, or only there as pickle.
    """
