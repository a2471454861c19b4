"""What is settled before DeepSpeed is imported."""

import os

import pytest

from dstune.engine.quiet import prepare_environment


@pytest.mark.parametrize(("device", "aligned"), [("cpu", None), ("cuda", "1")])
def test_tensors_are_laid_at_huge_pages_beside_a_gpu_alone(
    device: str, aligned: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a processor the rooms that a step leaves would not fit the next one's tensors (`engine.heap`)."""
    monkeypatch.setattr(os, "environ", {})
    prepare_environment(device)
    assert os.environ.get("THP_MEM_ALLOC_ENABLE") == aligned and os.environ["DS_ACCELERATOR"] == device
