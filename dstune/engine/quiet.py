"""DeepSpeed's surroundings, settled before its import: the accelerator, its chatter, and what it must never compile."""

import logging
import os
import warnings
from datetime import timedelta


def prepare_environment(device_type: str) -> None:
    """Name the accelerator, so that DeepSpeed does not guess (and warn). To be called before DeepSpeed is imported.

    Beside a GPU, large tensors in the host's memory get huge pages where the system gives them on demand: the kernel's work on small
    pages is twice that of filling them. torch looks at its first tensor for that. On a processor it would take the room that a step
    leaves for the next one (`engine.heap`).
    """
    os.environ.setdefault("DS_ACCELERATOR", device_type)
    if device_type != "cpu":
        os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)


def start_deepspeed(backend: str, timeout: timedelta) -> None:
    """Let DeepSpeed take over the group that torch.distributed has already."""
    # DeepSpeed still calls collectives by the names that torch renamed.
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed")
    import deepspeed

    if backend == "gloo":
        # Asked for here alone: to find out what can be built DeepSpeed tries compilers, and on a GPU for a score of its kernels.
        from deepspeed.ops import __compatible_ops__ as compatible_ops

        # NOTE: the shared-memory collective is compiled wherever a compiler is found, and busy-waits for ever on a dead peer.
        compatible_ops["deepspeed_shm_comm"] = False
    # DeepSpeed writes to stdout, which belongs to `--json`: its lines go where everybody's go.
    chatter = logging.getLogger("DeepSpeed")
    chatter.handlers.clear()
    chatter.propagate = True
    deepspeed.init_distributed(dist_backend=backend, timeout=timeout, verbose=False)
