"""`protocols.Engine` on DeepSpeed ZeRO 1, 2 and 3."""

from collections.abc import Mapping
from typing import Any

import torch

from dstune.engine.world import World


class ZeroEngine:
    """The partitioned model and AdamW of one worker.

    `names` maps a run-time parameter name to the one that `save_pretrained` writes; names not in it stay.
    `ds_config` may leave out what `construction.complete` adds; gradient clipping is its `gradient_clipping`.
    """

    def __init__(
        self,
        module: torch.nn.Module,
        *,
        lr: float,
        betas: tuple[float, float],
        eps: float,
        weight_decay: float,
        ds_config: Mapping[str, Any],
        dtype: torch.dtype,
        world: World,
        names: Mapping[str, str] | None = None,
    ) -> None: ...
