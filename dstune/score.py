"""How likely a model finds given answers: the log-probability of every target token."""

import inspect
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np
import torch

from dstune.data.conversation import Example
from dstune.model import padding

_LOGITS_BYTES = 1 << 30


class Scoring(Protocol):
    """What scoring needs of a model: an `OpenedModel` has it."""

    @property
    def module(self) -> Any: ...
    @property
    def seq2seq(self) -> bool: ...
    @property
    def device(self) -> torch.device: ...
    @property
    def pad_id(self) -> int: ...


def score(
    model: Scoring,
    examples: Sequence[Example],
    batch_size: int = 16,
    progress: Callable[[int], None] | None = None,
) -> list[np.ndarray]:
    """For each example the natural-log probabilities of its target tokens, float32 [targets], in the examples' order.

    Examples of like length go together, padded on the right under a mask where that changes nothing; logits are made for target
    positions only where the model can do that, and taken through log-softmax in fp32. Raises ValueError for an example without targets.
    """
    if any(not example.loss_mask.any() for example in examples):
        raise ValueError("an example has no target token")
    batch_size = padding.safely_together(model.module, batch_size)
    order = sorted(range(len(examples)), key=lambda index: (-len(examples[index].input_ids), index))
    scored: dict[int, np.ndarray] = {}
    while order:
        batch = order[: _fitting(model, len(examples[order[0]].input_ids), batch_size)]
        order = order[len(batch) :]
        scored.update(zip(batch, _score_batch(model, [examples[index] for index in batch]), strict=True))
        if progress:
            progress(len(batch))
    return [scored[index] for index in range(len(examples))]


def _fitting(model: Scoring, length: int, batch_size: int) -> int:
    """Examples of `length` tokens whose logits, in fp32 and all positions, stay below a GiB; at least one."""
    vocabulary = model.module.config.get_text_config(decoder=True).vocab_size
    return max(1, min(batch_size, _LOGITS_BYTES // (4 * length * vocabulary)))


def _score_batch(model: Scoring, examples: Sequence[Example]) -> list[np.ndarray]:
    with torch.inference_mode():
        return _seq2seq(model, examples) if model.seq2seq else _causal(model, examples)


def _causal(model: Scoring, examples: Sequence[Example]) -> list[np.ndarray]:
    input_ids, mask = _right_padded([example.input_ids for example in examples], model.pad_id)
    targets, _ = _right_padded([example.loss_mask for example in examples], 0)
    # The logits at position i are about token i + 1.
    wanted = torch.zeros_like(targets, dtype=torch.bool)
    wanted[:, :-1] = targets[:, 1:].bool()
    columns = wanted.any(dim=0).nonzero().squeeze(1)
    arguments: dict[str, Any] = {"input_ids": input_ids, "attention_mask": mask}
    if narrow := "logits_to_keep" in inspect.signature(model.module.forward).parameters:
        arguments["logits_to_keep"] = columns
    logits = _forward(model, arguments)
    if not narrow:
        logits = logits[:, columns.to(logits.device)]
    return [
        _chosen(logits[row][wanted[row, columns].to(logits.device)], example.input_ids[example.loss_mask])
        for row, example in enumerate(examples)
    ]


def _seq2seq(model: Scoring, examples: Sequence[Example]) -> list[np.ndarray]:
    sources = [example.input_ids[~example.loss_mask] for example in examples]
    targets = [example.input_ids[example.loss_mask] for example in examples]
    input_ids, mask = _right_padded(sources, model.pad_id)
    labels, label_mask = _right_padded(targets, model.pad_id)
    start = model.module.generation_config.decoder_start_token_id  # type: ignore[union-attr]
    decoder = torch.cat([torch.full((len(labels), 1), int(start or 0)), labels[:, :-1]], dim=1)
    logits = _forward(
        model,
        {
            "input_ids": input_ids,
            "attention_mask": mask,
            "decoder_input_ids": decoder,
            "decoder_attention_mask": label_mask,
        },
    )
    return [_chosen(logits[row, : len(target)], target) for row, target in enumerate(targets)]


def _forward(model: Scoring, arguments: dict[str, Any]) -> torch.Tensor:
    placed = {name: value.to(model.device) for name, value in arguments.items()}
    return model.module(**placed, use_cache=False).logits


def _chosen(logits: torch.Tensor, targets: np.ndarray) -> np.ndarray:
    """Log-probabilities [n] of `targets` [n] under `logits` [n, vocabulary]."""
    index = torch.from_numpy(targets.astype(np.int64)).to(logits.device)
    return logits.float().log_softmax(dim=-1).gather(1, index[:, None]).squeeze(1).cpu().numpy()


def _right_padded(rows: Sequence[np.ndarray], pad: int) -> tuple[torch.Tensor, torch.Tensor]:
    """[m, L] int64 values and mask."""
    length = max(len(row) for row in rows)
    values = torch.full((len(rows), length), pad, dtype=torch.long)
    mask = torch.zeros_like(values)
    for place, row in enumerate(rows):
        values[place, : len(row)] = torch.from_numpy(row.astype(np.int64))
        mask[place, : len(row)] = 1
    return values, mask
