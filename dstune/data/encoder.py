"""The one encoder of a run: its tokenizer, its template, what it trains on."""

from datetime import date, datetime, time
from pathlib import Path
from typing import Any

from dstune.config.schema import DataSection, ModelSection
from dstune.data.stand_in import stand_in
from dstune.data.templates import Template, builtin_template, resolve_template
from dstune.data.tokenize import Encoder, load_tokenizer
from dstune.errors import ConfigError, Problem


def make_encoder(model: ModelSection, data: DataSection, base: Path, seq2seq: bool, seed: int = 0) -> Encoder:
    """The tokenizer and template of a run. A template that tells the time is told the beginning of this day; `seed` draws.

    Raises ConfigError where they cannot do what the run asks.
    """
    if data.turns == "expand" and data.train_on == "all":
        came = "`expand` makes one example of each answer, and `train_on: all` trains more than answers"
        raise ConfigError(Problem("data.turns", came, "`turns: keep`, or `train_on` assistant, last or weights"))
    tokenizer = load_tokenizer(model, base)
    today = datetime.combine(date.today(), time())
    template = run_template(data, tokenizer, base, seq2seq) or builtin_template("plain", tokenizer)
    template = stand_in(template, tokenizer, today)
    return Encoder(tokenizer, template, data.train_on, data.control_tokens, data.lossy_text, seq2seq, today, seed=seed)


def run_template(data: DataSection, tokenizer: Any, base: Path, seq2seq: bool) -> Template | None:
    """The template that a run names, and its export keeps; None where plain documents alone are learned by a model without one.

    Raises ConfigError as `resolve_template` does.
    """
    documents = bool(data.sources) and all(source.format == "documents" for source in data.sources)
    if documents and data.template == "auto" and not tokenizer.chat_template:
        return None
    return resolve_template(data.template, tokenizer, base, seq2seq)
