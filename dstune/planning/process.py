"""What a worker's process takes of its machine beside the tensors that can be counted: measured, on each kind of device."""

from dataclasses import dataclass, replace

from dstune.planning.hardware import CORES, Device


@dataclass(frozen=True, kw_only=True)
class Process:
    """What a worker takes beside the tensors that can be counted."""

    fixed: int
    """Bytes, whatever it trains."""
    workspace: float
    """Of the backward pass, in the 16-bit activations of one layer: gradients on their way; where `retains`, the pieces that they leave.
    As many bytes in fp32: norms and attention make fp32 of 16 bits for a moment anyway."""
    fragments: float
    """Share of everything that lies idle in the allocator."""
    whole_buckets: bool
    """Whether a bucket takes its room before it is filled."""
    retains: bool = False
    """Whether what was freed stays resident, in pieces that little else fits into (`engine.heap`)."""
    host: int = 0
    """Bytes of the host's memory, whatever it trains, where that is another memory."""
    attends_apart: bool = False
    """Whether each packed example is attended to by itself, short ones in fp32, and the results put together (`model.per_example`)."""
    workspace_beside_gradients: float = 0.0
    """The same of stage 3 where `retains`: its gradients wait as the backward pass made them (`engine.reduction`), and are counted."""
    workspace_frozen: float = 0.0
    """In as many layers, what comes to it where all is frozen (of an adapter's run nearly all is)."""
    workspace_recomputed: float = 0.0
    """The same where layers are computed again."""
    compiled_workspace: float = 1.0
    """`workspace` where torch compiles the layers, in the activations that such a layer keeps."""
    expert_products: int = 0
    """That the library of matrix products keeps of an expert's: it compiles one for each number of rows that it meets."""
    products: int = 0
    """That it keeps in all, at most."""
    product: int = 0
    """Bytes of one."""
    compiler: int = 0
    """Bytes that the compiler takes, once loaded."""
    pins: bool = False
    """Whether offloaded tensors are pinned: torch rounds the room of each up to a power of two, of large ones not (`engine.pinned`)."""


CPU_PROCESS = Process(
    fixed=515 << 20,
    workspace=5.5,
    workspace_beside_gradients=2.2,
    workspace_frozen=2.0,
    workspace_recomputed=1.1,
    compiled_workspace=2.0,
    expert_products=27,
    products=1000,
    product=CORES["amx_bf16"].product,
    compiler=60 << 20,
    fragments=0.0,
    whole_buckets=False,
    retains=True,
    attends_apart=True,
)
"""Python, torch, transformers, DeepSpeed and gloo, mapped libraries included; measured by `tools/bench memory`."""
GPU_PROCESS = Process(
    fixed=1200 << 20,
    workspace=2.0,
    fragments=0.05,
    whole_buckets=True,
    host=3 << 30,
    pins=True,
)
"""The CUDA context, NCCL's and cuBLAS's buffers, the caching allocator's fragments, and on the host CUDA's libraries: not measured."""
_RAY = 90 << 20
"""Bytes of Ray's libraries, and of what they load, in a worker that Ray starts: the quickstart's run measured with and without it."""
_CUDA_BUILD = 320 << 20
"""Bytes of CUDA's libraries and Triton in a worker that computes on a CPU, where torch came with them; measured in the same way."""
NOT_ALLOCATED = ("process", "fragments")
"""Parts of a GPU's memory that torch's allocator does not count as allocated."""


def of_worker(device: Device, *, by_ray: bool) -> Process:
    """What a worker on such a device takes; `by_ray`: Ray starts it."""
    more = _RAY if by_ray else 0
    if not device.is_cpu:
        return replace(GPU_PROCESS, host=GPU_PROCESS.host + more)
    fixed = CPU_PROCESS.fixed + more + (_CUDA_BUILD if device.cuda_build else 0)
    return replace(CPU_PROCESS, fixed=fixed, product=device.product)
