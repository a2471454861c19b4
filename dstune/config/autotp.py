"""DeepSpeed's own word for `cluster.tensor_parallel`, which a run file may bring in `deepspeed.overrides`."""

from collections.abc import Mapping
from typing import Any


def with_autotp(values: Any) -> dict[str, Any] | None:
    """The `cluster` section of a run file's raw `values`, with the size that its DeepSpeed overrides give; None: nothing is to be added."""
    found = values
    for key in ("deepspeed", "overrides", "tensor_parallel", "autotp_size"):
        found = found.get(key) if isinstance(found, Mapping) else None
    cluster = values.get("cluster", {}) if isinstance(values, Mapping) else None
    if not isinstance(found, int) or found <= 1 or not isinstance(cluster, Mapping) or "tensor_parallel" in cluster:
        return None
    return {**cluster, "tensor_parallel": found}
