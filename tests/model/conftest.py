"""Tests that want a GPU run with the torch of the machine that has one, which may be older than ours."""

import torch

if torch.cuda.is_available():
    from tools.benchmarks.gpu_sides import let_kernels_group_heads

    let_kernels_group_heads()
