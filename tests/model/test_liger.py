"""Liger's own kernels on a processor, by Triton's interpreter: no GPU is wanted, and nothing is said of their speed."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

_PACKAGES = Path(sys.prefix, "liger")
"""Where `tools/install --dev` puts liger-kernel and triton."""


@pytest.mark.skipif(not _PACKAGES.is_dir(), reason="wants what tools/install --dev installs")
def test_ligers_kernels_in_the_interpreter_change_no_gradient():
    """In models with each kind of norm, rotation and gate, experts' among them, alone and together, whole rows and packed ones."""
    shared = {"liger_cross_entropy_kernel", "_triton_rope", "_rms_norm_forward_kernel", "_rms_norm_backward_kernel"}
    gates = {
        "llama": {"_swiglu_forward_kernel", "_swiglu_backward_kernel"},
        "gemma2": {"_geglu_tanh_forward_kernel", "_geglu_tanh_backward_kernel"},
        "mixtral": {"_fused_up_proj_swiglu_kernel", "_moe_bwd_dX_expanded_kernel"},
    }
    done = subprocess.run(
        [sys.executable, "-m", "tests.model.interpreted", *gates],
        env=os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": str(_PACKAGES)},
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert [one["name"] for one in found] == list(gates)
    for one in found:
        assert set(one["found"].values()) == {None}, one["found"]
        assert one["packed"] < 1e-5
        assert shared | gates[one["name"]] <= set(one["ran"])
