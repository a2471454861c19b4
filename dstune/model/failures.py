"""What models raise, of whatever architecture, when something is tried on them."""

import importlib
import subprocess
from importlib.util import find_spec
from typing import Any

from huggingface_hub.errors import StrictDataclassError

FAILURES = (
    ValueError, RuntimeError, TypeError, NotImplementedError, KeyError, IndexError, AttributeError, ImportError, AssertionError,
    StrictDataclassError,
)  # fmt: skip
"""Of a model that cannot do what an experiment asks of it: a reason to go on without, and no fault of ours."""


def of_kernels() -> tuple[type[Exception], ...]:
    """`FAILURES`, and what Triton raises as it compiles a kernel at its first call: no headers, no cache, a device too small."""
    if find_spec("triton") is None:
        return FAILURES
    errors: Any = importlib.import_module("triton.errors")
    return (*FAILURES, OSError, subprocess.SubprocessError, errors.TritonError)
