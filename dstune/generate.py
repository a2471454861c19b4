"""Answers from an opened model: batches for evaluation, pieces of text as they come for a terminal.

Greedy answers in fp32 do not depend on the batch: prompts are padded on the left (encoders: on the right) under an attention
mask, with positions counted from the first real token. Sampled ones do not either: every example draws from its own seed.
"""

import queue
import threading
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList, StoppingCriteria, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

from dstune.errors import Problem, RunFailed
from dstune.model import padding
from dstune.model.open import OpenedModel

_UNFINISHED = "\ufffd"


@dataclass(frozen=True)
class Settings:
    """How an answer is written."""

    max_new_tokens: int = 256
    temperature: float = 0.0
    """0: the likeliest token each time."""
    top_p: float = 1.0
    top_k: int = 0
    """0: all tokens."""
    seed: int = 0
    stop: tuple[str, ...] = ()
    """Texts that end an answer, beside the model's end-of-turn tokens."""


@dataclass(frozen=True)
class Answer:
    """What the model wrote."""

    text: str
    """Without the end of turn, without what follows a stop text."""
    num_tokens: int
    """Tokens made, the end of turn among them."""
    finished: bool
    """False where it was cut at `max_new_tokens`."""


def generate(
    model: OpenedModel,
    prompts: Sequence[Sequence[int]],
    settings: Settings,
    batch_size: int = 16,
    progress: Callable[[int], None] | None = None,
) -> list[Answer]:
    """An answer to each prompt (token ids), in the prompts' order. `progress` hears how many more are done.

    Prompts of like length go together, the longest first: what does not fit into memory fails at once.
    """
    if model.seq2seq:  # padded on the right, as while training
        batch_size = padding.safely_together(model.module, batch_size)
    order = sorted(range(len(prompts)), key=lambda index: (-len(prompts[index]), index))
    answers: dict[int, Answer] = {}
    for start in range(0, len(order), batch_size):
        batch = order[start : start + batch_size]
        try:
            made = _generate_batch(model, [prompts[index] for index in batch], batch, settings)
        except torch.OutOfMemoryError:
            came = f"no memory for {len(batch)} prompts of up to {len(prompts[batch[0]])} tokens"
            raise RunFailed(
                Problem(str(model.device), came, do="A smaller batch size (`generation.batch_size`).")
            ) from None
        answers.update(zip(batch, made, strict=True))
        if progress:
            progress(len(batch))
    return [answers[index] for index in range(len(prompts))]


def stream(model: OpenedModel, prompt: Sequence[int], settings: Settings) -> Generator[str]:
    """The answer to one prompt in pieces of text, as soon as each is certain. Closing the iterator stops the model."""
    cancel = threading.Event()
    pieces = _TokenQueue()
    worker = threading.Thread(target=_run, args=(model, prompt, settings, pieces, cancel), daemon=True)
    worker.start()
    try:
        yield from _texts(model, pieces.tokens(), settings.stop)
    finally:
        cancel.set()
        worker.join()


def _generate_batch(
    model: OpenedModel, prompts: Sequence[Sequence[int]], numbers: Sequence[int], settings: Settings
) -> list[Answer]:
    input_ids, attention_mask = _padded(prompts, model.pad_id, left=not model.seq2seq)
    criteria = StoppingCriteriaList()
    if settings.stop:
        criteria.append(_StopTexts(model.tokenizer, settings.stop, 1 if model.seq2seq else input_ids.shape[1]))
    rows = _call(model, input_ids, attention_mask, settings, numbers, criteria)
    return [_answer(model, row, settings) for row in rows]


def _call(
    model: OpenedModel,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor,
    settings: Settings,
    numbers: Sequence[int],
    criteria: StoppingCriteriaList,
    streamer: BaseStreamer | None = None,
) -> list[list[int]]:
    """New tokens of each row of [m, L] prompts, padding behind the end included."""
    processors = LogitsProcessorList()
    if settings.temperature > 0:
        processors.append(_Sampling(settings, numbers))
    with torch.inference_mode():
        made = model.module.generate(
            input_ids=input_ids.to(model.device),
            attention_mask=attention_mask.to(model.device),
            generation_config=_generation_config(model, settings),
            logits_processor=processors,
            stopping_criteria=criteria,
            streamer=streamer,
        )
    # A decoder of its own starts with one start token; a causal one repeats the prompt.
    return made[:, 1 if model.seq2seq else input_ids.shape[1] :].tolist()


def _generation_config(model: OpenedModel, settings: Settings) -> GenerationConfig:
    return GenerationConfig(
        max_new_tokens=settings.max_new_tokens,
        do_sample=False,
        num_beams=1,
        use_cache=True,
        eos_token_id=sorted(model.stop_ids) or None,
        pad_token_id=model.pad_id,
    )


def _padded(prompts: Sequence[Sequence[int]], pad_id: int, left: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Prompts as [m, L] ids and mask."""
    length = max(len(prompt) for prompt in prompts)
    input_ids = torch.full((len(prompts), length), pad_id, dtype=torch.long)
    mask = torch.zeros_like(input_ids)
    for row, prompt in enumerate(prompts):
        place = slice(length - len(prompt), length) if left else slice(0, len(prompt))
        input_ids[row, place] = torch.tensor(list(prompt), dtype=torch.long)
        mask[row, place] = 1
    return input_ids, mask


def _answer(model: OpenedModel, row: list[int], settings: Settings) -> Answer:
    end = next((place for place, token in enumerate(row) if token in model.stop_ids), None)
    content = row if end is None else row[:end]
    text = _decode(model.tokenizer, content)
    cut = min((place for stop in settings.stop if (place := text.find(stop)) >= 0), default=None)
    if cut is not None:
        return Answer(text[:cut], _tokens_to(model.tokenizer, content, settings.stop), finished=True)
    return Answer(text, len(content) + (end is not None), finished=end is not None)


def _tokens_to(tokenizer: Any, row: list[int], stop: Sequence[str]) -> int:
    """Tokens up to the one that completed a stop text (a batch goes on for its other rows, with padding here)."""
    low, high = 1, len(row)
    while low < high:
        middle = (low + high) // 2
        text = _decode(tokenizer, row[:middle])
        low, high = (low, middle) if any(ending in text for ending in stop) else (middle + 1, high)
    return low


def _decode(tokenizer: Any, tokens: Sequence[int]) -> str:
    return tokenizer.decode(list(tokens), skip_special_tokens=True, clean_up_tokenization_spaces=False)


class _Sampling(LogitsProcessor):
    """Turns the arg max into a draw: argmax(log p + Gumbel noise) is distributed as p, and each row has its own noise."""

    def __init__(self, settings: Settings, numbers: Sequence[int]) -> None:
        self._settings = settings
        # Neighbouring seeds of torch's generator are unrelated streams; 1_000_003 keeps (seed, number) pairs apart.
        self._generators = [
            torch.Generator().manual_seed((settings.seed * 1_000_003 + number) % 2**63) for number in numbers
        ]

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """[m, V] scores to [m, V] scores whose arg max is the draw."""
        scores = _limited(scores.float() / self._settings.temperature, self._settings)
        uniform = torch.stack(
            [torch.rand(scores.shape[-1], generator=generator, dtype=torch.float64) for generator in self._generators]
        )
        noise = -torch.log(-torch.log(uniform.to(scores.device).clamp_min(1e-300)))
        return scores + noise.float()


def _limited(scores: torch.Tensor, settings: Settings) -> torch.Tensor:
    if 0 < settings.top_k < scores.shape[-1]:
        least = scores.topk(settings.top_k, dim=-1).values[..., -1:]
        scores = scores.masked_fill(scores < least, -torch.inf)
    if settings.top_p < 1:
        ordered, places = scores.sort(dim=-1, descending=True)
        probabilities = ordered.softmax(dim=-1)
        # A token stays while those before it make up less than top_p: the likeliest one always does.
        outside = probabilities.cumsum(dim=-1) - probabilities >= settings.top_p
        scores = scores.masked_fill(outside.scatter(-1, places, outside), -torch.inf)
    return scores


class _StopTexts(StoppingCriteria):
    """Ends a row once one of the texts stands in its answer."""

    def __init__(self, tokenizer: Any, stop: Sequence[str], start: int) -> None:
        self._tokenizer = tokenizer
        self._stop = stop
        self._start = start
        # A token holds at least a byte of text; a few more in case of empty ones.
        self._tail = max(len(text.encode()) for text in stop) + 8

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> Any:
        tails = input_ids[:, max(self._start, input_ids.shape[1] - self._tail) :].tolist()
        ended = [any(text in _decode(self._tokenizer, tail) for text in self._stop) for tail in tails]
        return torch.tensor(ended, device=input_ids.device)


class _Cancelled(StoppingCriteria):
    def __init__(self, event: threading.Event) -> None:
        self._event = event

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> Any:
        return torch.full((input_ids.shape[0],), self._event.is_set(), device=input_ids.device)


class _TokenQueue(BaseStreamer):
    """Tokens from the thread that makes them to the one that shows them."""

    def __init__(self) -> None:
        self._queue: queue.SimpleQueue[int | BaseException | None] = queue.SimpleQueue()
        self._prompt_seen = False

    def put(self, value: torch.Tensor) -> None:
        """Called by transformers: first with the prompt, then with each new token."""
        if self._prompt_seen:
            for token in value.flatten().tolist():
                self._queue.put(token)
        self._prompt_seen = True

    def end(self) -> None:
        """Called by transformers at the end; `close` says so instead, whatever the end was."""

    def close(self, error: BaseException | None) -> None:
        self._queue.put(error)

    def tokens(self) -> Iterator[int]:
        while not isinstance(token := self._queue.get(), BaseException | None):
            yield token
        if token is not None:
            raise token


def _run(
    model: OpenedModel, prompt: Sequence[int], settings: Settings, pieces: _TokenQueue, cancel: threading.Event
) -> None:
    error: BaseException | None = None
    try:
        input_ids, mask = _padded([prompt], model.pad_id, left=True)
        _call(model, input_ids, mask, settings, [0], StoppingCriteriaList([_Cancelled(cancel)]), pieces)
    except BaseException as raised:  # noqa: BLE001 - it is raised again by the reader, in its own thread
        error = raised
    pieces.close(error)


def _texts(model: OpenedModel, tokens: Iterator[int], stop: Sequence[str]) -> Iterator[str]:
    """Pieces of text; what may still become a stop text, or half a character, is held back."""
    text, shown = "", 0
    for piece in _detokenised(model, tokens):
        text += piece
        cut = min((place for ending in stop if (place := text.find(ending)) >= 0), default=None)
        if cut is not None:
            yield text[shown:cut]
            return
        safe = len(text) - _held_back(text, stop)
        if safe > shown:
            yield text[shown:safe]
            shown = safe
    if shown < len(text):
        yield text[shown:]


def _held_back(text: str, stop: Sequence[str]) -> int:
    """Characters at the end of `text` that may be the beginning of a stop text."""
    longest = max((len(ending) for ending in stop), default=1) - 1
    for size in range(min(longest, len(text)), 0, -1):
        if any(ending.startswith(text[-size:]) for ending in stop):
            return size
    return 0


def _detokenised(model: OpenedModel, tokens: Iterator[int]) -> Iterator[str]:
    """Text for tokens as they come. Decodes a window of few tokens each time: spaces depend on the token before.

    [.., "Hel", "lo"] -> what decode(["Hel", "lo"]) has beyond decode(["Hel"]). A window that ends in half a character waits.
    """
    made: list[int] = []
    start = end = 0
    for token in tokens:
        if token in model.stop_ids:
            break
        made.append(token)
        before = _decode(model.tokenizer, made[start:end])
        now = _decode(model.tokenizer, made[start:])
        if len(now) > len(before) and not now.endswith(_UNFINISHED):
            yield now[len(before) :]
            start, end = end, len(made)
    rest = _decode(model.tokenizer, made[start:])[len(_decode(model.tokenizer, made[start:end])) :]
    if rest:
        yield rest
