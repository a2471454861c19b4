"""The summed loss of a model through its fused head: the model's own forward pass, in which the head gives the loss and no logits.

The head is called as ever, so whatever is hung on its call (ZeRO-3 gathers the weight there, and reduces its gradient) stays as it is.
What the model does to the logits behind the head is then done inside the fused function, if `proof` has shown that it is known.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from transformers import PretrainedConfig, PreTrainedModel

from dstune.model.kernels.linear_cross_entropy import LinearCrossEntropy, Logits
from dstune.model.loss import IGNORED, TokenBatch, forward_arguments, unwrapped

_SCALES = ("logit_scale", "output_multiplier", "lm_head_multiplier", "logits_scaling")
"""What configs call the number that logits are multiplied with, or divided by."""
_CAPS = ("final_logit_softcapping", "logits_soft_cap")
"""What they call the number that caps them."""
_BIAS = "final_logits_bias"
"""A buffer of BART and its kin that is added to the logits."""


class FusedLoss:
    """`loss.summed_token_loss` of one model, by a `LinearCrossEntropy` in place of its head; `logits`: what stands behind the head."""

    def __init__(self, model: PreTrainedModel, function: LinearCrossEntropy, logits: Logits) -> None:
        self._model, self._function, self._logits = model, function, logits
        self._head: Any = model.get_output_embeddings()

    def __call__(self, module: Any, batch: TokenBatch) -> tuple[torch.Tensor, int]:
        """As `summed_token_loss`; `module` is the model or the engine's callable around it. Not for two threads at once."""
        assert unwrapped(module) is self._model
        supervised = batch.targets != IGNORED
        targets = batch.targets[supervised]
        with self._giving_the_loss(supervised, targets):
            output = module(**forward_arguments(self._model, batch), use_cache=False)
        return output.logits, len(targets)

    @contextlib.contextmanager
    def _giving_the_loss(self, supervised: torch.Tensor, targets: torch.Tensor) -> Iterator[None]:
        """While open, the model's `logits` are the summed loss, made in the head; the code between the two sees logits of no token.

        NOTE: ZeRO-3 hangs the next gathering of the weight on what the head returns, and all ZeRO stages hang the beginning of the
        backward pass on what the model returns. So the loss is taken out behind the head's last hook, and put in before the
        model's first.
        """
        made: list[torch.Tensor] = []

        def fused(hidden: torch.Tensor) -> torch.Tensor:
            rows = hidden.reshape(-1, hidden.shape[-1])[supervised.reshape(-1)]
            bias = self._head.bias
            added = getattr(self._model, _BIAS, None)
            if added is not None:
                bias = added.flatten() if bias is None else bias + added.flatten()
            return self._function(rows, self._head.weight, bias, targets, self._logits)

        def take_out(head: torch.nn.Module, args: Any, loss: torch.Tensor) -> torch.Tensor:
            made.append(loss)
            return loss.new_zeros(1, 0, 1)

        def put_in(model: torch.nn.Module, args: Any, output: Any) -> Any:
            if len(made) != 1:
                raise RuntimeError(f"the head was called {len(made)} times in a forward pass")
            output.logits = made[0]
            return output

        with contextlib.ExitStack() as stack:
            self._head.forward = fused
            stack.callback(self._head.__dict__.pop, "forward")
            stack.callback(self._head.register_forward_hook(take_out).remove)
            stack.callback(self._model.register_forward_hook(put_in, prepend=True).remove)
            yield


def obstacle(model: PreTrainedModel) -> str | None:
    """Why `model`'s head, as it stands, cannot be fused; None: nothing is in the way."""
    head: Any = model.get_output_embeddings()
    if head is None:
        return "the model has no head that transformers knows"
    if type(head) is not torch.nn.Linear or "forward" in head.__dict__:
        return f"the head is no plain linear layer ({type(head).__name__})"
    return None


def candidates(config: PretrainedConfig) -> list[Logits]:
    """What the config lets one think that the model makes of the head's output; the likeliest first."""
    text = config.get_text_config(decoder=True)
    cap = next((cap for name in _CAPS if (cap := getattr(text, name, None))), None)
    numbers = [getattr(text, name, None) for name in _SCALES]
    known = [float(number) for number in numbers if isinstance(number, (int, float)) and number not in (0, 1)]
    scales = [scale for number in known for scale in (number, 1 / number)]
    caps = [None] if not cap else [float(cap), None]
    return [Logits(scale, one) for one in caps for scale in (*scales, 1.0)]
