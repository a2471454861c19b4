"""The tasks file: what a model is asked, and how its answers are scored."""

import difflib
import re
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, field_validator, model_validator

from dstune.config.schema import Section, Source
from dstune.evaluation.text import NORMALISERS

NormaliserName = Literal["none", "strip", "lower", "squad", "number"]


class PlainOptions(Section):
    """A metric without settings."""


class LabelOptions(Section):
    """Settings of precision, recall and F1."""

    average: Literal["macro", "micro", "weighted", "binary"] = "macro"
    """Over labels: plain mean, all answers together, mean by support, or the `positive` label alone."""
    positive: str | None = None
    """The label that `average: binary` is about."""

    @model_validator(mode="after")
    def _positive_with_binary(self) -> "LabelOptions":
        if (self.average == "binary") != (self.positive is not None):
            raise ValueError("`average: binary` and `positive: LABEL` go together")
        return self


class BleuOptions(Section):
    """Settings of BLEU."""

    tokenize: Literal["auto", "13a", "intl", "zh", "char", "none"] = "auto"
    """sacreBLEU's tokenizer; `auto`: `zh` for Chinese references, `char` for Japanese and Thai, else `13a`."""
    lowercase: bool = False
    """Ignore case."""


class ChrfOptions(Section):
    """Settings of chrF."""

    word_order: int = Field(default=0, ge=0, le=2)
    """2 is chrF++."""


class RougeOptions(Section):
    """Settings of ROUGE."""

    stem: bool = False
    """Porter's English stems, and rouge_score's own tokens (which have no characters outside a-z and 0-9)."""


class MetricSpec(Section):
    """One metric with its settings: `f1` or `f1: {average: micro}`."""

    exact_match: PlainOptions | None = None
    accuracy: PlainOptions | None = None
    precision: LabelOptions | None = None
    recall: LabelOptions | None = None
    f1: LabelOptions | None = None
    token_f1: PlainOptions | None = None
    bleu: BleuOptions | None = None
    chrf: ChrfOptions | None = None
    rouge: RougeOptions | None = None
    perplexity: PlainOptions | None = None

    @property
    def name(self) -> str:
        """The one metric that this is."""
        return next(iter(self.model_fields_set))

    @property
    def options(self) -> Section:
        """Its settings."""
        return dict(self)[self.name]


def _metric(written: Any) -> Any:
    """`bleu`, `bleu:` and `bleu: {…}` as `{bleu: {…}}`."""
    known = list(MetricSpec.model_fields)
    spelled = {written: {}} if isinstance(written, str) else written
    if not isinstance(spelled, dict) or len(spelled) != 1:
        raise ValueError("one metric's name, or one name with its settings as in `bleu: {tokenize: zh}`")
    (name, options), *_ = spelled.items()
    if name not in known:
        near = difflib.get_close_matches(str(name), known, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(known)}"
        raise ValueError(f"there is no metric {name!r}; {hint}")
    return {name: {} if options is None else options}


class Generation(Section):
    """How answers are written."""

    max_new_tokens: int = Field(default=256, ge=1)
    """Longest answer, in tokens; longer ones are cut and counted."""
    temperature: float = Field(default=0.0, ge=0)
    """0: always the likeliest token. Above: sampled, each example by its own seed, so the batch size does not matter."""
    top_p: float = Field(default=1.0, gt=0, le=1)
    """Sample from the likeliest tokens that make up this share."""
    top_k: int = Field(default=0, ge=0)
    """Sample from so many likeliest tokens; 0: all."""
    seed: int = Field(default=0, ge=0, lt=2**63)
    """Seeds sampling."""
    batch_size: int = Field(default=16, ge=1)
    """Prompts at a time; in fp32 it does not change the answers (see `dtype`)."""
    stop: list[Annotated[str, Field(min_length=1)]] = Field(default=[])
    """Texts that end an answer, beside the model's own end of turn; left out of the answer."""


class Task(Section):
    """One set of questions with reference answers: each conversation's last assistant message, all before it the prompt."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$")]
    """Letters, digits, `.`, `_`, `-`; names the task in the results."""
    data: str
    """File, glob or directory, relative to the tasks file, or `builtin:instructions`."""
    split: str | None = None
    """A split of a `datasets` directory or of the builtin data."""
    format: Literal["auto", "alpaca", "sharegpt", "messages", "prompt_completion"] = "auto"
    """As in a run file: every format that trains also evaluates."""
    columns: dict[str, str] = Field(default={})
    """As in a run file: `{prompt: question, completion: answer}`."""
    limit: int | None = Field(default=None, ge=1)
    """At most so many records, from the top."""
    bad_rows: Literal["error", "skip"] = "error"
    """A record that cannot be read, or holds no answer: stop, or leave out and count."""
    overlong: Literal["error", "skip"] = "error"
    """A prompt that leaves no room for `max_new_tokens` in the model's context: stop, or leave out and count."""
    system: str | None = None
    """A system message put before conversations that have none."""
    metrics: list[Annotated[MetricSpec, BeforeValidator(_metric)]] = Field(min_length=1)
    """exact_match, accuracy, precision, recall, f1, token_f1, bleu, chrf, rouge, perplexity."""
    labels: list[str] = Field(default=[])
    """The answers of a classification task; every reference is one of them. Precision, recall and F1 want them."""
    normalise: list[NormaliserName] = Field(default=["strip"])
    """Done to answer, reference and labels before they are compared whole or by labels or tokens: none, strip, lower, squad,
    number; one, or several in order. BLEU, chrF and ROUGE take the text as it is."""
    extract: str | None = None
    """A regular expression that picks the answer out of a longer text: its group 1, or all of it. Put to the reference too,
    which stays whole where it does not match. An answer in which it is not found counts as wrong."""
    extract_match: Literal["last", "first"] = "last"
    """Which match `extract` takes."""
    generation: Generation = Generation()

    @field_validator("normalise", mode="before")
    @classmethod
    def _one_or_several(cls, written: Any) -> Any:
        return [written] if isinstance(written, str) else written

    @field_validator("extract")
    @classmethod
    def _pattern(cls, written: str | None) -> str | None:
        try:
            re.compile(written or "")
        except re.error as error:
            raise ValueError(f"not a regular expression: {error}") from None
        return written

    @model_validator(mode="after")
    def _metrics_fit(self) -> "Task":
        names = [spec.name for spec in self.metrics]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"metric {twice[0]!r} is there twice")
        wanting = [name for name in names if name in ("precision", "recall", "f1")]
        if wanting and not self.labels:
            raise ValueError(f"{wanting[0]} wants `labels: [...]`, the answers that can be right")
        self._check_labels()
        return self

    def _check_labels(self) -> None:
        labels = self.normalised_labels()
        if len(set(labels)) < len(labels):
            raise ValueError(f"two labels are the same after `normalise`: {labels}")
        positives = [spec.options.positive for spec in self.metrics if isinstance(spec.options, LabelOptions)]
        for positive in positives:
            if positive is not None and self.normalised(positive) not in labels:
                raise ValueError(f"`positive: {positive}` is none of the labels")

    def normalised(self, text: str) -> str:
        """`text` after this task's `normalise`."""
        for name in self.normalise:
            text = NORMALISERS[name](text)
        return text

    def normalised_labels(self) -> list[str]:
        """`labels` after this task's `normalise`, in their order."""
        return [self.normalised(label) for label in self.labels]

    def source(self) -> Source:
        """Where the records come from, as the data rooms take it."""
        return Source(path=self.data, format=self.format, columns=self.columns, limit=self.limit, split=self.split)

    @property
    def generates(self) -> bool:
        """False where only perplexity is asked for: nothing has to be written then."""
        return any(spec.name != "perplexity" for spec in self.metrics)

    @property
    def scores(self) -> bool:
        """True where the references' likelihood is asked for."""
        return any(spec.name == "perplexity" for spec in self.metrics)


class TasksFile(Section):
    """All tasks that one `dstune evaluate` puts to a model."""

    tasks: list[Task] = Field(min_length=1)
    """Done in this order; the model is loaded once."""
    template: str = "auto"
    """As in a run file; `auto` is the model's own chat template."""
    dtype: Literal["auto", "bf16", "fp16", "fp32"] = "auto"
    """Precision of the weights. `auto`: as saved. Only in fp32 do the answers not depend on the batch size: in half precision
    two likely tokens can be so close that the order of additions decides between them."""
    device: str = "auto"
    """`auto` (a GPU if there is one), `cpu`, `cuda`, `cuda:1`."""

    @field_validator("tasks")
    @classmethod
    def _names_differ(cls, tasks: list[Task]) -> list[Task]:
        names = [task.name for task in tasks]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"two tasks are named {twice[0]!r}")
        return tasks
