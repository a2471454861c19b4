"""Where DeepSpeed puts weights, states and gradients, as a config of its says."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

_SWAP_BUFFERS = 4
"""DeepSpeed's own number where its config is silent: the master, two moments, the gradient."""
ROUNDED_PINNED = 4 << 30
"""Bytes of a piece of pinned memory up to which torch rounds it up to a power of two and keeps it for the next one: inputs of layers that
wait on the host come and go in such pieces. Larger ones take what was asked for (`engine.pinned`)."""
WEIGHT_BUFFERS = 8
"""What the engine takes for weights on NVMe, a piece in each, where it is told no number: a layer's frozen matrices and one."""


@dataclass(frozen=True, kw_only=True)
class Placement:
    """Where DeepSpeed puts what: the part of its config that memory and traffic depend on."""

    stage: int
    offload_optimizer: str = "none"
    """`none`, `cpu` or `nvme`: masters, moments and the gradients' sums."""
    offload_param: str = "none"
    """The weights, trained or not."""
    reduce_bucket: int = 500_000_000
    """Elements of gradients that are reduced at once."""
    sub_group: int = 1_000_000_000
    """Elements that one update handles at once (ZeRO-3)."""
    max_live: int = 1_000_000_000
    """Elements that ZeRO-3 keeps gathered."""
    prefetch: int = 50_000_000
    """Elements that ZeRO-3 gathers at once, ahead of the modules that want them."""
    persistence: int = 100_000
    """Parameters of at most so many elements stay whole on every worker under ZeRO-3."""
    overlaps: bool = True
    """Whether gradients are reduced, and sent to the host, beside the backward pass (`overlap_comm`)."""
    copies: int = 1
    """Workers that keep one copy of all weights between them, beside the partition over all (ZeRO++'s hpZ); 1: no such copy."""
    quantized_weights: bool = False
    """Weights travel in 8 bits (ZeRO++)."""
    swap_buffers: int = _SWAP_BUFFERS
    weight_buffers: int = WEIGHT_BUFFERS
    """Of weights on NVMe."""
    weight_buffer: int = 0
    """Elements of each; 0: as many as the largest piece has."""
    weights_in_host: int = 1_000_000_000
    """Elements of trained weights that each worker keeps in the host's memory beside those on NVMe."""

    @classmethod
    def of(cls, ds_config: Mapping[str, Any]) -> "Placement":
        """The placement that a DeepSpeed config describes; its silence means DeepSpeed's own defaults."""
        zero = ds_config.get("zero_optimization", {})
        optimizer, weights = zero.get("offload_optimizer") or {}, zero.get("offload_param") or {}
        found = {
            "reduce_bucket": zero.get("reduce_bucket_size"),
            "sub_group": zero.get("sub_group_size"),
            "max_live": zero.get("stage3_max_live_parameters"),
            "prefetch": zero.get("stage3_prefetch_bucket_size"),
            "persistence": zero.get("stage3_param_persistence_threshold"),
            "copies": zero.get("zero_hpz_partition_size"),
            "swap_buffers": optimizer.get("buffer_count"),
            "weight_buffers": weights.get("buffer_count"),
            "weight_buffer": weights.get("buffer_size"),
            "weights_in_host": weights.get("max_in_cpu"),
        }
        return cls(
            stage=int(zero.get("stage", 0)),
            overlaps=zero.get("overlap_comm") is not False,
            offload_optimizer=optimizer.get("device", "none"),
            offload_param=weights.get("device", "none"),
            quantized_weights=bool(zero.get("zero_quantized_weights")),
            **{key: int(value) for key, value in found.items() if isinstance(value, int | float)},
        )
