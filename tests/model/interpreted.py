"""Liger's kernels put into small models on a processor, by Triton's interpreter: what they change of the gradients, and which ran.

    PYTHONPATH=.venv/liger TRITON_INTERPRET=1 python -m tests.model.interpreted llama gemma2

A process of its own: Triton decides when it is imported. One line of JSON for each architecture.
"""

import json
import sys
from collections.abc import Sequence
from typing import Any

import numpy
import triton.language as tl
from transformers import InternVLConfig, InternVLForConditionalGeneration, PretrainedConfig, PreTrainedModel
from triton.language.extra import libdevice
from triton.runtime import autotuner, interpreter

from dstune.batch import collate
from dstune.model.kernels import choice, fused_loss, liger, proof
from dstune.model.kernels.by_device import ByDevice
from dstune.model.kernels.kernel import Kernel
from dstune.model.loss import summed_token_loss
from tests.model.architectures import tiny, tiny_config
from tests.test_batch import Prepared


def main(names: Sequence[str]) -> int:
    _complete_the_interpreter()
    _require_alone(_seeing())
    ran = _heard_of()
    for name in names:
        found = {kernel.name: _disproof(tiny_config(name), kernel) for kernel in choice.KERNELS}
        print(
            json.dumps({"name": name, "found": found, "packed": _packed(name, found), "ran": sorted(ran)}), flush=True
        )
        ran.clear()
    return 0


def _disproof(config: PretrainedConfig, kernel: Kernel) -> str | None:
    """Why the kernel cannot be used for such a model; None where it gives the same gradients."""
    if isinstance(kernel, fused_loss.FusedLossKernel):
        logits = proof.prove(config, liger.linear_cross_entropy, "cpu")
        return logits if isinstance(logits, str) else None
    layers = kernel.cuda if isinstance(kernel, ByDevice) else kernel
    assert isinstance(layers, liger.LigerLayers)
    return "none" if layers._patch(config.model_type) is None else liger._disproof(config, layers, "cpu")


def _packed(name: str, found: dict[str, str | None]) -> float:
    """What all of its kernels together change of the gradients of two packed rows, whose examples lie at different places."""
    module = tiny(name).eval()
    batch = collate(Prepared(), [0, 1], "packed", pad_id=0)
    wanted = proof.gradients(module, summed_token_loss(module, batch)[0])
    choices = [choice.Choice(kernel, reason is None, reason or "Liger") for kernel, reason in found.items()]
    files = _files(module)
    loss = choice.put_in(choices, module, "cuda")
    assert _files(module) == files, "other models of the files would start kernels"
    return proof.difference(proof.gradients(module, loss(module, batch)[0]), wanted)


def _files(module: PreTrainedModel) -> dict[str, dict[str, int]]:
    """What each name in the files of its layers stands for."""
    names = {type(part).__module__ for part in module.modules()}
    return {name: {key: id(value) for key, value in vars(sys.modules[name]).items()} for name in names}


def _seeing() -> PreTrainedModel:
    """A model whose language model has a file of its own."""
    eyes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    text = tiny_config("qwen2").to_dict()
    config = InternVLConfig(
        text_config=text, vision_config=eyes | {"image_size": [28, 28], "patch_size": [14, 14]}, image_token_id=5
    )
    return InternVLForConditionalGeneration(config)


def _require_alone(module: PreTrainedModel) -> None:
    """Of such a model one kernel puts in itself alone, and nothing into the files."""
    files = _files(module)
    liger.LigerLayers("rms-norm", ("rms_norm",)).put_in(module, "cuda", summed_token_loss)
    assert _files(module) == files
    patched = {type(part).__name__ for part in module.modules() if "forward" in part.__dict__}
    assert patched == {"Qwen2RMSNorm"}, patched


def _complete_the_interpreter() -> None:
    """What Liger's kernels need that the interpreter lacks: numbers that are no tensors, and two functions of CUDA's library."""
    usual = interpreter._implicit_cvt

    def converted(given: Any) -> Any:
        if isinstance(given, float):
            return tl.tensor(interpreter.TensorHandle(numpy.array([given], numpy.float32), tl.float32), tl.float32)
        return usual(given)

    interpreter._implicit_cvt = converted
    libdevice.rsqrt = lambda given: tl.rsqrt(given)  # looked up when called: the interpreter puts its own there
    autotuner.Autotuner.run = lambda self, *args, **named: self.fn.run(*args, **named, **self.configs[0].all_kwargs())
    libdevice.tanh = lambda given: 2 * tl.sigmoid(2 * given) - 1


def _heard_of() -> set[str]:
    """The names of the kernels that run from now on."""
    ran: set[str] = set()
    usual = interpreter.GridExecutor.__call__

    def heard(self: Any, *args: Any, **named: Any) -> Any:
        ran.add(self.fn.__name__)
        return usual(self, *args, **named)

    interpreter.GridExecutor.__call__ = heard
    return ran


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
