"""Mean losses of every example's answers by a causal model, with their questions and without, in chunks that survive a `kill -9`.

Chunks are of like length, the longest first: what does not fit into memory fails at once. Each is a file, renamed into place when it
is done; a later call goes on behind those that are there. Losses on a GPU (bf16) and on a CPU (fp32) differ in the third digit:
what was computed first is kept.

It is done in this process, on one device. A process that asked a GPU keeps a CUDA context of some hundred MB until it ends: `dstune
select` before `dstune train` leaves all of the memory to training, and lets a machine with a GPU do the work for one without.
"""

import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from dstune.config.schema import DataSection, ModelSection
from dstune.data.shards import Prepared
from dstune.data.task import is_seq2seq, vocabulary_size
from dstune.data.tokenizer_files import load_tokenizer
from dstune.errors import ConfigError, Problem, RunFailed
from dstune.loggers import get_logger
from dstune.selection import ifd
from dstune.selection.scores import Origins, write_stream

CHUNK_TOKENS = 1 << 17
_BATCH_SIZE = 32
_LOOKED_AT = 200
_SAMPLE_BYTES = 1 << 20
_BUILTIN = "builtin:"

Floats = npt.NDArray[np.float64]
Told = Callable[[str, int], None]
log = get_logger(__name__)


@dataclass(frozen=True)
class Asked:
    """Which model is asked about which data."""

    own: ModelSection
    """The run's model, whose tokenizer made the examples."""
    data: DataSection
    base: Path
    """The run file's directory."""

    @property
    def model(self) -> ModelSection:
        named = self.data.select.model if self.data.select else None
        return self.own if named is None else ModelSection(path=named)


def require(asked: Asked) -> None:
    """Raises ConfigError for what cannot be scored so: before anything slow is done."""
    where = "data.select.by"
    if asked.data.train_on == "all":
        came = "ifd with `train_on: all`: where every token is a target, nothing tells answers from questions"
        raise ConfigError(Problem(where, came, do="Take `by: diversity` or `random`, or another `data.train_on`."))
    if asked.model.init == "random" and not asked.model.path.startswith(_BUILTIN):
        came = "ifd by a model with random weights (`model.init: random`)"
        raise ConfigError(Problem(where, came, do="Name a model that has learned something: `data.select.model`."))
    if is_seq2seq(asked.own, asked.base) or _is_seq2seq(asked):
        raise ConfigError(Problem(where, "ifd for a sequence-to-sequence model", "diversity or random"))


def _is_seq2seq(asked: Asked) -> bool:
    """Raises ConfigError where there is no such model, under the name that the run file gives it."""
    try:
        return is_seq2seq(asked.model, asked.base)
    except ConfigError as error:
        if asked.model is asked.own:
            raise
        raise ConfigError([replace(problem, where="data.select.model") for problem in error.problems]) from None


def fingerprint(asked: Asked) -> str:
    """SHA-256 over the model's config and, of each file of weights, its name, size, first and last MiB.

    A hub id is fetched for it. Reading all of the weights would take as long as scoring some thousand examples.
    """
    from dstune.model.config import model_directory

    directory = model_directory(asked.model, asked.base)
    digest = hashlib.sha256(json.dumps(asked.model.overrides, sort_keys=True).encode())
    digest.update((directory / "config.json").read_bytes())
    for file in sorted(directory.glob("*.safetensors")):
        with file.open("rb") as weights:
            size = weights.seek(0, 2)
            digest.update(f"{file.name} {size} ".encode())
            for place in {0, max(0, size - _SAMPLE_BYTES)}:
                weights.seek(place)
                digest.update(weights.read(_SAMPLE_BYTES))
    return digest.hexdigest()


def losses(asked: Asked, prepared: Prepared, origins: Origins, folder: Path, told: Told) -> tuple[Floats, Floats]:
    """Mean losses of the answers, given the questions and alone: two arrays [examples], NaN where there is no score.

    `folder` keeps the chunks. Raises ConfigError, RunFailed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    given, alone = np.full(prepared.num_examples, np.nan), np.full(prepared.num_examples, np.nan)
    scorer: _Scorer | None = None
    done = 0
    for number, examples in enumerate(chunks(origins.tokens)):
        told("asking the model", done)
        path = folder / f"chunk-{number:06d}.arrow"
        if not path.exists():
            scorer = scorer or _Scorer(asked, prepared)
            _write_chunk(path, examples, *scorer.losses(examples))
        given[examples], alone[examples] = _read_chunk(path, examples)
        done += len(examples)
    if scorer is not None:
        scorer.close()
    return given, alone


def chunks(lengths: npt.NDArray[np.int32]) -> Iterator[npt.NDArray[np.int64]]:
    """Example numbers by falling length, cut every `CHUNK_TOKENS` tokens or so."""
    order = np.lexsort((np.arange(len(lengths)), -lengths))
    of_chunk = np.cumsum(lengths[order], dtype=np.int64) // CHUNK_TOKENS
    yield from np.split(order, np.flatnonzero(np.diff(of_chunk)) + 1)


def _write_chunk(path: Path, examples: npt.NDArray[np.int64], given: Floats, alone: Floats) -> None:
    columns = {"example": pa.array(examples), "given": pa.array(given), "alone": pa.array(alone)}
    write_stream(path, pa.table(columns))


def _read_chunk(path: Path, examples: npt.NDArray[np.int64]) -> tuple[Floats, Floats]:
    do = "Delete this directory: the scores are computed again."
    try:
        with path.open("rb") as file, pa.ipc.open_stream(file) as stream:
            table = stream.read_all()
        found, given, alone = (column.to_numpy() for column in table.columns)
    except (pa.ArrowInvalid, ValueError) as error:
        raise RunFailed(Problem(str(path), f"no readable scores ({error})", do=do)) from None
    if not np.array_equal(found, examples):
        raise RunFailed(Problem(str(path), "scores of other examples", do=do))
    return given, alone


class _Scorer:
    """The model, opened once it is needed."""

    def __init__(self, asked: Asked, prepared: Prepared) -> None:
        from dstune.model.open import open_module

        model, base = asked.model, asked.base
        if model.path.startswith(_BUILTIN):
            log.warning("%s has random weights: its IFD says nothing about the data", model.path)
        own = load_tokenizer(asked.own, base)
        other = own if model is asked.own else load_tokenizer(model, base)
        frame = ifd.frame(asked.own, asked.data, base, own)
        _require_frame(frame, prepared)
        same = own.backend_tokenizer.to_str() == other.backend_tokenizer.to_str()
        if same:
            _require_vocabulary(model, base, prepared)
        self.module, self.device = open_module(model, base)
        self.pad_id, self.seq2seq = other.pad_token_id or 0, False
        config = self.module.config.get_text_config(decoder=True)
        context = getattr(config, "max_position_embeddings", None)
        translation = None if same else ifd.Translation(own, other, frame.control)
        self._pair = ifd.pair_maker(frame, translation, context)
        self._prepared = prepared

    def losses(self, examples: npt.NDArray[np.int64]) -> tuple[Floats, Floats]:
        """Mean losses of these examples' answers, given and alone."""
        import torch

        from dstune.score import score

        stored = [self._prepared.example(number) for number in examples.tolist()]
        pairs = [self._pair(one.input_ids, one.loss_mask) for one in stored]
        asked = [side for pair in pairs if pair for side in (pair.given, *pair.alone)]
        try:
            scored = iter(score(self, asked, _BATCH_SIZE))
        except torch.OutOfMemoryError:
            longest = max(len(one.input_ids) for one in asked)
            came = f"no memory for texts of {longest} tokens"
            raise RunFailed(Problem(str(self.device), came, do="A smaller `data.select.model`.")) from None
        given, alone = np.full(len(pairs), np.nan), np.full(len(pairs), np.nan)
        for place, pair in enumerate(pairs):
            if pair is not None:
                given[place] = -np.mean(next(scored), dtype=np.float64)
                alone[place] = -np.mean(np.concatenate([next(scored) for _ in pair.alone]), dtype=np.float64)
        return given, alone

    def close(self) -> None:
        """Give the device's memory back: training may follow in this process."""
        import torch

        del self.module
        if self.device.type == "cuda":
            torch.cuda.empty_cache()


def _require_frame(frame: ifd.Frame, prepared: Prepared) -> None:
    """A directory of the user's own may have been prepared with another template than the run file names."""
    numbers = np.unique(np.linspace(0, prepared.num_examples - 1, _LOOKED_AT).astype(np.int64)).tolist()
    stored = [prepared.example(number) for number in numbers]
    prompts = [one.input_ids[: int(one.loss_mask.argmax())].tolist() for one in stored]
    asking = [prompt for prompt in prompts if len(prompt) > 1]
    size = len(frame.before)
    fitting = sum(tuple(prompt[len(prompt) - size :]) == frame.before for prompt in asking)
    if 2 * fitting < len(asking):
        came = f"of {len(asking)} prepared examples {fitting} have what this template writes before an answer"
        raise ConfigError(Problem("data.template", came, "the template that the data was prepared with"))


def _require_vocabulary(model: ModelSection, base: Path, prepared: Prepared) -> None:
    known, largest = vocabulary_size(model, base), prepared.largest_token()
    if known is not None and largest >= known:
        came = f"the data holds token {largest}, {model.path} has embeddings for {known}"
        raise ConfigError(Problem("data.select.model", came, "a model that knows the tokenizer's tokens"))
