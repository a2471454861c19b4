"""DeepSpeed's surroundings, settled before its import: the accelerator, its chatter, and what it must never compile."""

import logging
import os
from datetime import timedelta


def prepare_environment(device_type: str) -> None:
    """Name the accelerator, so that DeepSpeed does not guess (and warn). To be called before DeepSpeed is imported."""
    os.environ.setdefault("DS_ACCELERATOR", device_type)
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)


def start_deepspeed(backend: str, timeout: timedelta) -> None:
    """Let DeepSpeed take over the group that torch.distributed has already."""
    import deepspeed
    from deepspeed.ops import __compatible_ops__ as compatible_ops

    # NOTE: the shared-memory collective is compiled wherever a compiler is found, and busy-waits for ever on a dead peer.
    compatible_ops["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(dist_backend=backend, timeout=timeout, verbose=False)
