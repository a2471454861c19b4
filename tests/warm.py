"""What has happened in the process that the workers of tests are forks of (see spawn.py): imports, and nothing started.

Its objects are frozen: DeepSpeed collects garbage several times for each engine that it builds, and would look at the
half a million of them each time.
"""

import gc

import peft  # noqa: F401
import pytest  # noqa: F401
import torch
import torch._dynamo.repro.after_dynamo
import torch._inductor.compile_fx  # with the optimizers of DeepSpeed this comes too, whether or not anything is compiled
from transformers.conversion_mapping import get_checkpoint_conversion_mapping
from transformers.models.llama import modeling_llama  # noqa: F401

import dstune.worker  # noqa: F401
from dstune.engine.quiet import prepare_environment

get_checkpoint_conversion_mapping("llama")  # a thousand patterns are compiled once

if torch.version.cuda is None:  # DeepSpeed looks for GPUs when it is imported, and no fork may use them after that
    prepare_environment("cpu")
    from deepspeed.ops import __compatible_ops__  # noqa: F401 - looks for compilers and libraries

gc.collect()
gc.freeze()
