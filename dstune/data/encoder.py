"""The one encoder of a run: its tokenizer, its template, what it trains on."""

from datetime import date, datetime, time
from pathlib import Path

from dstune.config.schema import DataSection, ModelSection
from dstune.data.stand_in import stand_in
from dstune.data.templates import resolve_template
from dstune.data.tokenize import Encoder, load_tokenizer


def make_encoder(model: ModelSection, data: DataSection, base: Path, seq2seq: bool, seed: int = 0) -> Encoder:
    """The tokenizer and template of a run. A template that tells the time is told the beginning of this day; `seed` draws.

    Raises ConfigError where they cannot do what the run asks.
    """
    tokenizer = load_tokenizer(model, base)
    today = datetime.combine(date.today(), time())
    template = stand_in(resolve_template(data.template, tokenizer, base, seq2seq), tokenizer, today)
    return Encoder(tokenizer, template, data.train_on, data.control_tokens, data.lossy_text, seq2seq, today, seed=seed)
