"""The other trainers that benchmarks compare with: wanted by these tools alone, so dstune does not depend on them."""

import importlib.util

TRL = (
    "TRL is not installed here, which this compares with: `pip install --no-deps trl==1.16.0 accelerate`, or into a directory "
    "of its own (`--target DIR`) and PYTHONPATH=DIR"
)


def has_trl() -> bool:
    return importlib.util.find_spec("trl") is not None
