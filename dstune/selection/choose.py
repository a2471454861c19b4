"""`data.select`: the training examples that are worth their tokens, by budget, as a prepared directory of their own.

The base is prepared as ever; its examples are scored and ranked, the scores kept beside it; the first `budget` of them make a second
prepared directory, which is what a run trains on. All of it is content-addressed: what was done once is found again.
"""

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from dstune.atomic import sha256_file
from dstune.config.schema import RunConfig, SelectSection
from dstune.data.derive import derive
from dstune.data.order import permute
from dstune.data.prepare import Progress, Report, prepare
from dstune.data.schedule import draw_seed, to_nearest
from dstune.data.shards import Prepared
from dstune.data.tokenizer_files import load_tokenizer
from dstune.errors import ConfigError, DataError, Problem
from dstune.loggers import get_logger
from dstune.paths import selection_losses, selection_scores
from dstune.selection import diversity, ifd, losses, scores
from dstune.selection.scores import Origins, Scored

SELECTION_VERSION = 1
"""Raised when the same data and settings are ranked otherwise than before."""

_HASH_DIGITS = 16
_BUDGET = "data.select.budget"
Preparation = Callable[[RunConfig, Path, Report | None], Prepared]
log = get_logger(__name__)


@dataclass(frozen=True)
class Choice:
    """Which examples of a prepared directory are taken."""

    base: Prepared
    """All that could be taken."""
    select: SelectSection
    wanted: int
    """The budget in examples."""
    about: dict[str, Any]
    """How the choice was made, as plain values."""
    scores: Path
    """The scores file; `scores.read` opens it."""
    table: dict[str, npt.NDArray[Any]]
    """Its columns, each [examples]."""

    @property
    def chosen(self) -> npt.NDArray[np.bool_]:
        """[examples]"""
        return self.table["chosen"]

    def why(self, number: int) -> str:
        """What an example was ranked by, in words."""
        if self.select.by == "ifd":
            return ifd.why(float(self.table["ifd"][number]), self.select.max_ifd)
        if self.select.by == "random":
            return f"place {self.table['rank'][number]:,} of the draw"
        nearest, rank = int(self.table["nearest"][number]), int(self.table["rank"][number])
        if rank == 1:
            return f"the longest answer: {self.table['targets'][number]:,} tokens"
        return diversity.why(float(self.table["distance"][number]), self.base.origin(nearest) if nearest >= 0 else None)

    def prepared(self, name: str) -> Prepared:
        """The directory that holds what was chosen, made if it is not there; `name` begins its own. Raises OSError as it comes."""
        total = self.base.num_examples
        return derive(
            self.base,
            self.chosen,
            name=name,
            selection={**self.about, "scores": sha256_file(self.scores)},
            detail=lambda number: (
                f"{self.why(number)}; rank {self.table['rank'][number]} of {total}, the first {self.wanted} are taken"
            ),
        )


def prepared(
    config: RunConfig, base: Path, progress: Report | None = None, preparation: Preparation = prepare
) -> Prepared:
    """The data that a run trains on: `data.prepare.prepare`, and of that what `data.select` takes.

    Whoever needs a run's data calls this. `preparation` makes the base (for instance on other machines). Raises what it and
    `choose` raise.
    """
    if config.data.select is None:
        return preparation(config, base, progress)
    return choose(config, base, progress, preparation).prepared(config.name)


def choose(config: RunConfig, base: Path, progress: Report | None = None, preparation: Preparation = prepare) -> Choice:
    """Score and rank the run's training examples, or find the scores; `data.prepared` serves as well as sources.

    Raises ConfigError (no `data.select`, or a method that does not fit the model), DataError (a budget of nothing), RunFailed.
    """
    select = config.data.select
    if select is None:
        do = "Write it into the run file, or: dstune select RUN.yaml data.select.budget=5000 data.select.by=random"
        raise ConfigError(Problem("data.select", "not there: there is nothing to choose by", "a budget", do))
    require_budget(select.budget)
    if select.by == "ifd":
        losses.require(losses.Asked(config.model, config.data, base))
    whole = preparation(config, base, progress)
    wanted = examples_wanted(select.budget, whole.num_examples)
    ranking = _Ranking(config, base, whole, select, wanted, progress or _ignore)
    path = selection_scores(whole.root.name, select.by, _digest(ranking.about))
    if not path.exists():
        origins = Origins.of(whole)
        scores.write(path, origins, ranking.score(origins), wanted, ranking.about)
    return Choice(whole, select, wanted, ranking.about, path, scores.read(path))


def require_budget(budget: float) -> None:
    """Raises ConfigError for what is neither a number of conversations nor a share below 1."""
    if budget >= 1 and budget != int(budget):
        raise ConfigError(Problem(_BUDGET, f"{budget}", "a whole number of conversations, or a share below 1"))


def examples_wanted(budget: float, num_examples: int) -> int:
    """The budget in examples. Raises DataError where a share comes to none; warns where there are not so many."""
    wanted = to_nearest(budget, num_examples) if budget < 1 else int(budget)
    if wanted == 0:
        raise DataError(Problem(_BUDGET, f"{budget} of {num_examples} examples is less than one", "a larger share"))
    if wanted >= num_examples:
        log.warning("%s: %d, and the data has %d examples: all are taken", _BUDGET, wanted, num_examples)
    return min(wanted, num_examples)


def _ignore(progress: Progress) -> None:
    """Nobody watches."""


def _digest(about: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()[:_HASH_DIGITS]


class _Ranking:
    """One way of ranking the examples of one directory; `about` is all that the ranks depend on."""

    def __init__(
        self, config: RunConfig, base: Path, whole: Prepared, select: SelectSection, wanted: int, report: Report
    ) -> None:
        self._config, self._base, self._whole, self._select, self._wanted = config, base, whole, select, wanted
        self._report = report
        self._asked = losses.Asked(config.model, config.data, base)
        self.about: dict[str, Any] = {"version": SELECTION_VERSION, "by": select.by, "base": whole.fingerprint}
        if select.by == "ifd":
            self.about |= {"model": losses.fingerprint(self._asked)}
            self._losses = selection_losses(whole.root.name, _digest(self.about))
            self.about |= {"max_ifd": select.max_ifd}
        elif select.by == "random" or diversity.num_compared(whole.num_examples, wanted) < whole.num_examples:
            self.about |= {"seed": config.train.seed}
        self.about |= {"wanted": wanted}

    def score(self, origins: Origins) -> Scored:
        """Do the work."""
        if self._select.by == "ifd":
            given, alone = losses.losses(self._asked, self._whole, origins, self._losses, self._told)
            return ifd.rank(given, alone, self._select.max_ifd)
        if self._select.by == "random":
            return drawn(self._whole.num_examples, self._config.train.seed)
        tokenizer = load_tokenizer(self._config.model, self._base)
        return diversity.score(self._whole, tokenizer, origins, self._wanted, self._config.train.seed, self._told)

    def _told(self, stage: str, done: int) -> None:
        self._report(Progress(f"{self._select.by}: {stage}", records=self._whole.num_examples, examples=done))


def drawn(num_examples: int, seed: int) -> Scored:
    """Ranks by a draw: the control that every other method must beat."""
    places = permute(draw_seed(seed, "selection"), 0, num_examples, np.arange(num_examples))
    rank = np.empty(num_examples, dtype=np.int64)
    rank[places] = np.arange(1, num_examples + 1)
    return Scored(rank, {})
