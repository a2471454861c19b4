"""Padded examples see neither their padding nor each other: shown for the architecture at hand, on a tiny random model of its class.

Masks are the model's own affair: ProphetNet adds 1 to what it should hide, and CPM-Ant takes no mask and wants its padding on the left.
"""

from collections.abc import Sequence

import torch
from transformers import PretrainedConfig, PreTrainedModel

from dstune.errors import ConfigError, Problem, first_line
from dstune.loggers import get_logger
from dstune.model import isolation
from dstune.model.failures import FAILURES
from dstune.model.loss import taken
from dstune.model.remembered import Remembered

log = get_logger(__name__)

_PAD_ID = 0
"""No example of an experiment has it."""
_DECODER = "decoder_"


def prove(config: PretrainedConfig, attention: str) -> None:
    """Show that padded rows give with `attention` what each example gives alone, or raise ConfigError with the reason.

    In evaluation, in fp32, as `isolation` does it for packed rows. What cannot be tried here is let pass, and said.
    """
    different, reason = _found(config, attention)
    told = f"{config.model_type} with {attention} attention: {reason}"
    if not different and reason:
        log.warning("whether padding changes anything is not known: %s", told)
    if different:
        do = "Set `train.micro_batch_size: 1`: each example is then a forward pass of its own, and nothing is padded."
        raise ConfigError(Problem("train.micro_batch_size", told, "examples that are what they are alone", do))


def safely_together(module: PreTrainedModel, batch_size: int) -> int:
    """`batch_size`, or 1 where padding on its right would change what a model of `module`'s class gives for an example."""
    if batch_size == 1:
        return 1
    different, _ = _found(module.config, module.config._attn_implementation or "eager")
    return 1 if different else batch_size


@Remembered
def _found(config: PretrainedConfig, attention: str) -> tuple[bool, str]:
    """Whether something differs, and what; or why nothing is known; (False, "") where it is shown to be right."""
    small = isolation.smallest_that_builds(config)
    if small is None:
        return False, "no small model of this class can be built"
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        examples = isolation.examples_for(small)
        try:
            model = isolation.instance(small, attention)
            if not all(bool(_logits(model, [example]).isfinite().all()) for example in examples):
                return False, "its small model gives values that are not finite"
            reason = _difference(model, examples)
            if reason is None:
                return False, ""
            shortest = [{name: ids[:, : _shortest(examples, name)] for name, ids in one.items()} for one in examples]
            cause = "rows change each other" if _difference(model, shortest) else "it sees its padding"
        except FAILURES as error:
            return False, f"its small model fails ({first_line(error)})"
    return True, f"{reason}: {cause}"


def _shortest(examples: Sequence[dict[str, torch.Tensor]], name: str) -> int:
    return min(example[name].shape[1] for example in examples)


def _difference(model: PreTrainedModel, examples: Sequence[dict[str, torch.Tensor]]) -> str | None:
    """What is not as alone in a micro-batch of `examples` and a row of weight zero."""
    alone = [_logits(model, [example]) for example in examples]
    together = _logits(model, [*examples, {name: ids[:, :0] for name, ids in examples[0].items()}])
    scale = max(float(each.abs().max()) for each in alone)
    for number, (one, row) in enumerate(zip(alone, together, strict=False)):
        difference = float((one[0] - row[: one.shape[1]]).abs().max()) / max(scale, 1e-12)
        if not difference <= isolation.TOLERANCE:
            return (
                f"example {number + 1} of {len(examples)} in padded rows differs from itself alone by {difference:.1e} "
                f"(tolerance {isolation.TOLERANCE:.0e})"
            )
    return None


def _logits(model: PreTrainedModel, examples: Sequence[dict[str, torch.Tensor]]) -> torch.Tensor:
    torch.manual_seed(0)  # of hashes that are drawn anew for each call
    return model(**taken(model, padded_inputs(examples)), use_cache=False).logits


def padded_inputs(examples: Sequence[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """A forward pass's arguments for examples one a row, as `dstune.batch` makes them; each `input_ids` [1, length], and of
    sequence-to-sequence models `decoder_input_ids`.
    """
    inputs: dict[str, torch.Tensor] = {}
    for name in examples[0]:
        rows = [example[name][0] for example in examples]
        ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=_PAD_ID)
        lengths = torch.tensor([max(1, len(row)) for row in rows])
        side = _DECODER if name.startswith(_DECODER) else ""
        inputs |= {name: ids, f"{side}attention_mask": (torch.arange(ids.shape[1]) < lengths[:, None]).long()}
    return inputs
