"""What the tests of states and of weights on NVMe share."""

import os
import subprocess
from pathlib import Path

import pytest
from torch.utils.cpp_extension import _get_build_directory

from dstune.engine.swapping import require_async_io
from dstune.errors import ConfigError


@pytest.fixture
def async_io() -> None:
    """Skips where nothing can be on NVMe. Building DeepSpeed's async_io takes minutes: `tools/check` does it behind other tests."""
    lock = os.environ.get("DSTUNE_ASYNC_IO_LOCK")
    if lock and subprocess.run(["flock", "--shared", "--timeout", "400", lock, "true"]).returncode:
        pytest.skip("async_io is still being built")
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    try:
        require_async_io()
    except ConfigError as error:
        pytest.skip(str(error))
    if not (Path(_get_build_directory("async_io", verbose=False)) / "async_io.so").is_file():
        pytest.skip("async_io is not built: tools/compile_async_io builds it")
