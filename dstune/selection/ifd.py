"""Instruction-following difficulty: how much a question helps a model to its answer (Li et al. 2023, "From Quantity to Quality",
arXiv 2308.12032, section 2.2; their code, Cherry_LLM, computes the same).

IFD = s(A|Q) / s(A): the mean cross-entropy of the answer's tokens after the question over that of the same tokens without it. It
is the ratio of losses, as in that paper, and not the ratio of perplexities of its successor (Superfiltering, arXiv 2402.00530);
both losses are kept, so exp(given - alone) is at hand. Near 1 the question hardly helped: there is something to learn. Above 1 it
misled: answer and question do not belong together, and such examples are taken last.

"Alone" is the answer behind what the template writes before every answer (`<|im_start|>assistant`), found by encoding questions
that differ, and behind the begin-of-text token where the examples have one. In a conversation of several turns every target counts,
given all that stands before it, against each answer alone. Control tokens at the end of an answer are no part of it. Without a score,
and taken last of all, are examples that ask nothing (plain documents), and those longer than the model's context.

An IFD of an answer of a few tokens says little: its losses are means over a handful. Where `dstune select` shows that the chosen
answers are very short, let a cleaning step drop those first.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from dstune.config.schema import DataSection, ModelSection
from dstune.data.conversation import Conversation, Example, Message, Refused
from dstune.data.encoder import make_encoder
from dstune.selection.scores import Scored

Ids = npt.NDArray[np.int32]
Mask = npt.NDArray[np.bool_]

_PROBES = ("a", "7", "Why?", "One. Two.", "x)", "Ω", "end\n", "z")


@dataclass(frozen=True)
class Pair:
    """What is scored of one example."""

    given: Example
    """The whole of it up to the last answer; the mask marks what counts."""
    alone: list[Example]
    """Each answer behind `Frame.before`; together they mark the same tokens."""


@dataclass(frozen=True)
class Frame:
    """What stands around questions and answers, whatever they are."""

    before: tuple[int, ...]
    """The template's tokens before an answer."""
    begin: int | None
    """The token that begins a text, if the tokenizer has one."""
    control: frozenset[int]


def frame(model: ModelSection, data: DataSection, base: Path, tokenizer: Any) -> Frame:
    """Of the run's tokenizer and template. Raises ConfigError as the preparation does."""
    encoder = make_encoder(model, data, base, seq2seq=False)
    asked = [Conversation((Message("user", text), Message("assistant", "x"))) for text in _PROBES]
    found = [one for one in encoder.encode_batch(asked) if not isinstance(one, Refused)]
    before = _common_end([one.input_ids[: int(one.loss_mask.argmax())].tolist() for one in found])
    added = tokenizer.added_tokens_decoder.items()
    control = {*tokenizer.all_special_ids, *(number for number, token in added if token.special)}
    return Frame(_after_turn(before, encoder.end_of_turn_ids, tokenizer), tokenizer.bos_token_id, frozenset(control))


def _common_end(prompts: Sequence[Sequence[int]]) -> Sequence[int]:
    shortest = min((len(prompt) for prompt in prompts), default=0)
    size = 0
    while size < shortest and len({prompt[-1 - size] for prompt in prompts}) == 1:
        size += 1
    return prompts[0][len(prompts[0]) - size :] if size else []


def _after_turn(tokens: Sequence[int], ends: Sequence[int], tokenizer: Any) -> tuple[int, ...]:
    """Without the end of the question's turn and the blanks behind it: `<|im_end|>\\n` belongs to the question."""
    last = max((place for place, token in enumerate(tokens) if token in ends), default=-1)
    rest = list(tokens[last + 1 :])
    while last >= 0 and rest and not tokenizer.backend_tokenizer.decode(rest[:1], skip_special_tokens=False).strip():
        rest.pop(0)
    return tuple(rest)


def answers(loss_mask: Mask, input_ids: Ids, control: frozenset[int]) -> list[tuple[int, int]]:
    """Where the answers stand: runs of targets, without the control tokens at their ends."""
    edges = np.flatnonzero(np.diff(np.concatenate([[False], loss_mask, [False]]).astype(np.int8)))
    found: list[tuple[int, int]] = []
    for start, stop in edges.reshape(-1, 2).tolist():
        while stop > start and int(input_ids[stop - 1]) in control:
            stop -= 1
        if stop > start:
            found.append((start, stop))
    return found


def asks(input_ids: Ids, first: int, frame: Frame) -> bool:
    """Whether anything but the frame stands before the first answer, which begins at `first`.

    A document is all answer from its second token on.
    """
    if first <= 1:
        return False
    before = input_ids[:first].tolist()
    if frame.before and tuple(before[-len(frame.before) :]) == frame.before:
        before = before[: -len(frame.before)]
    return any(token not in frame.control for token in before)


def pair(input_ids: Ids, spans: Sequence[tuple[int, int]], before: Sequence[int]) -> Pair | None:
    """Both sides of an example whose answers are `spans`; None where not one token can be compared.

    A model says nothing of a text's first token: with nothing `before` them, answers are compared from their second token on.
    """
    skipped = 0 if before else 1
    spans = [(start, stop) for start, stop in spans if stop - start > skipped and start + skipped > 0]
    if not spans:
        return None
    end = spans[-1][1]
    counted = np.zeros(end, dtype=np.bool_)
    alone: list[Example] = []
    for start, stop in spans:
        counted[start + skipped : stop] = True
        ids = np.concatenate([np.array(before, dtype=np.int32), input_ids[start:stop]])
        alone.append(Example(ids, np.arange(len(ids)) >= len(before) + skipped))
    return Pair(Example(input_ids[:end], counted), alone)


class Translation:
    """An example in the tokens of another tokenizer, piece by piece: questions and answers stay apart.

    Control tokens that the other tokenizer does not have are left out.
    """

    def __init__(self, own: Any, other: Any, control: frozenset[int]) -> None:
        self._own, self._other = own, other
        known = {token.content for token in other.added_tokens_decoder.values()}
        self._unknown = {token for token in control if own.convert_ids_to_tokens(token) not in known}
        first = other("x")["input_ids"][:1]
        self.begin = first if other.bos_token_id is not None and first == [other.bos_token_id] else []
        """What the other tokenizer puts before every text."""

    def ids(self, input_ids: Sequence[int]) -> list[int]:
        """One piece; nothing is put before it."""
        kept = [token for token in input_ids if token not in self._unknown]
        text = self._own.backend_tokenizer.decode(kept, skip_special_tokens=False)
        return self._other(text, add_special_tokens=False)["input_ids"]

    def __call__(self, input_ids: Ids, spans: Sequence[tuple[int, int]]) -> tuple[Ids, list[tuple[int, int]]]:
        """The example, and where its answers stand now."""
        made = list(self.begin)
        now: list[tuple[int, int]] = []
        end = 0
        for start, stop in spans:
            made += [token for token in self.ids(input_ids[end:start].tolist()) if [token] != self.begin]
            begin = len(made)
            made += self.ids(input_ids[start:stop].tolist())
            now.append((begin, len(made)))
            end = stop
        return np.array(made, dtype=np.int32), now


Maker = Callable[[Ids, Mask], Pair | None]


def pair_maker(frame: Frame, translation: Translation | None, context: int | None) -> Maker:
    """What makes pairs of stored examples; None for an example that has no score. `context`: the model's longest text."""

    def make(input_ids: Ids, loss_mask: Mask) -> Pair | None:
        spans = answers(loss_mask, input_ids, frame.control)
        if not spans or not asks(input_ids, spans[0][0], frame):
            return None
        begin = [frame.begin] if frame.begin is not None and int(input_ids[0]) == frame.begin else []
        before = [*begin, *frame.before]
        if translation is not None:
            input_ids, spans = translation(input_ids, spans)
            before = [*translation.begin, *translation.ids(frame.before)]
        made = pair(input_ids, spans, before)
        fits = made is None or context is None or len(made.given.input_ids) <= context
        return made if fits else None

    return make


def rank(given: npt.NDArray[np.float64], alone: npt.NDArray[np.float64], max_ifd: float) -> Scored:
    """Ranks by mean losses [n], NaN where there is none: highest IFD first up to `max_ifd`, then those above it, the nearest to
    it first, then those without a score. Equals stay in the data's order. Columns: `ifd, given, alone`."""
    with np.errstate(divide="ignore", invalid="ignore"):
        ifd = given / alone
    ifd = np.where(np.isfinite(ifd), ifd, np.nan)
    group = np.where(np.isnan(ifd), 2, np.where(ifd > max_ifd, 1, 0))
    within = np.where(group == 0, -ifd, np.nan_to_num(ifd))
    ranks = np.empty(len(ifd), dtype=np.int64)
    ranks[np.lexsort((np.arange(len(ifd)), within, group))] = np.arange(1, len(ifd) + 1)
    return Scored(ranks, {"ifd": ifd, "given": given, "alone": alone})


def why(ifd: float, max_ifd: float) -> str:
    """One example's number in words."""
    if np.isnan(ifd):
        return "no IFD: nothing is asked, no answer to compare, or longer than the model's context"
    return f"IFD {ifd:.4f}" + (f", above {max_ifd:g}" if ifd > max_ifd else "")
