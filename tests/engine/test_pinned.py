"""torch's settings of pinned memory, each in a process of its own: they hold for all that comes later in it."""

import os
import subprocess
import sys

import pytest
import torch

SETTINGS = """
import torch
from dstune.engine.pinned import take_no_more_than_asked
take_no_more_than_asked()
take_no_more_than_asked()
print(torch._C._accelerator_getAllocatorSettings())
"""
PINS = """
import torch
from dstune.engine.pinned import take_no_more_than_asked
from dstune.planning.placement import ROUNDED_PINNED
take_no_more_than_asked()
large = torch.empty(ROUNDED_PINNED + 4096, dtype=torch.uint8, pin_memory=True)
print(torch.cuda.host_memory_stats()["allocated_bytes.current"] - large.numel())
"""


def _run(script: str, **environment: str) -> str:
    names = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")
    kept = {name: value for name, value in os.environ.items() if name not in names}
    return subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True, env=kept | environment
    ).stdout.strip()


@pytest.mark.parametrize(
    ("own", "all_of_them"),
    [
        ({}, "pinned_max_cached_size_mb:4096"),
        ({"PYTORCH_ALLOC_CONF": "expandable_segments:True"}, "expandable_segments:True,pinned_max_cached_size_mb:4096"),
        ({"PYTORCH_CUDA_ALLOC_CONF": "pinned_max_cached_size_mb:64"}, "pinned_max_cached_size_mb:64"),
    ],
)
def test_large_pinned_pieces_are_not_rounded_and_a_persons_own_settings_stay(own: dict[str, str], all_of_them: str):
    assert _run(SETTINGS, **own) == all_of_them


def test_an_older_torch_is_left_as_it_is():
    older = "import torch; torch.__version__ = torch.torch_version.TorchVersion('2.11.0+cu130')\n"
    assert _run(older + SETTINGS) == ""


@pytest.mark.skipif(not torch.cuda.is_available(), reason="wants a GPU")
def test_a_large_piece_takes_what_was_asked_for():
    assert int(_run(PINS)) < 1 << 20
