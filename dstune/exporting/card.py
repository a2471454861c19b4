"""The model card of an export: what was tuned, on what, how, and where its loss stood."""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dstune.config.schema import RunConfig, TrainSection

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
_USE = """\
from transformers import AutoTokenizer, {kind}

tokenizer, model = AutoTokenizer.from_pretrained("."), {kind}.from_pretrained(".")
question = [{{"role": "user", "content": "..."}}]
inputs = tokenizer.apply_chat_template(question, add_generation_prompt=True, return_tensors="pt", return_dict=True)
print(tokenizer.decode(model.generate(**inputs)[0]))
"""
_USE_ADAPTER = """\
from peft import {kind}
from transformers import AutoTokenizer

tokenizer, model = AutoTokenizer.from_pretrained("."), {kind}.from_pretrained(".")  # fetches the base model too
question = [{{"role": "user", "content": "..."}}]
inputs = tokenizer.apply_chat_template(question, add_generation_prompt=True, return_tensors="pt", return_dict=True)
print(tokenizer.decode(model.generate(**inputs)[0]))
"""
_USE_ADAPTER_OF_A_PART = """\
from peft import PeftModel
from transformers import AutoTokenizer, {kind}

tokenizer, base = AutoTokenizer.from_pretrained("."), {kind}.from_pretrained({base})
{room}model = PeftModel.from_pretrained(base, ".")
question = [{{"role": "user", "content": "..."}}]
inputs = tokenizer.apply_chat_template(question, add_generation_prompt=True, return_tensors="pt", return_dict=True)
print(tokenizer.decode(model.generate(**inputs)[0]))
"""
"""peft has no class that finds a model that sees by itself."""
_ROOM = """\
if len(tokenizer) > base.get_input_embeddings().num_embeddings:
    base.resize_token_embeddings(len(tokenizer))
"""
"""What peft's own classes do for an adapter that brings rows of new tokens."""
_MARKDOWN = re.compile(r"([\\`*_{}\[\]()<>#+!|~&$-])")


@dataclass(frozen=True)
class CardFacts:
    """What the card says beside the run file."""

    step: int
    loss: float | None
    """Mean loss of the step that was exported, per supervised token; None where it is not known."""
    dtype: str
    parameters: int
    auto_class: str = "AutoModelForCausalLM"
    """transformers' class that opens it."""
    counts: Mapping[str, Any] = field(default_factory=dict[str, Any])
    """The prepared data's counts, from its manifest."""
    sources: Sequence[Mapping[str, Any]] = ()
    """The prepared data's sources, as its manifest has them."""
    is_adapter: bool = False
    """Whether the files hold an adapter alone, for the base model."""


def model_card(config: RunConfig, facts: CardFacts) -> str:
    """README.md in the hub's form: a YAML header, then Markdown. Everything a person wrote is escaped."""
    parts = [
        _header(config, facts),
        f"# {plain(config.name)}\n",
        f"{plain(_shown(config.model.path))}, instruction-tuned with dstune.\n",
        _table(
            "Model",
            {
                "base model": _shown(config.model.path),
                "revision": config.model.revision,
                "parameters": f"{facts.parameters:,}",
                "precision of these files": facts.dtype,
            },
        ),
        _data(config, facts),
        _table("Training", _training(config, facts)),
        f"## Use\n\n```python\n{_use(config, facts)}```\n",
    ]
    return "\n".join(parts)


def plain(text: object) -> str:
    """`text` as one line of Markdown that shows exactly its characters: no markup, no HTML, no line breaks."""
    one_line = " ".join(str(text).split())
    return _MARKDOWN.sub(r"\\\1", one_line).replace("\\<", "&lt;").replace("\\>", "&gt;").replace("\\&", "&amp;")


def _use(config: RunConfig, facts: CardFacts) -> str:
    if facts.is_adapter and facts.auto_class == "AutoModelForMultimodalLM":
        base, new = json.dumps(_shown(config.model.path)), bool(config.model.new_tokens)
        return _USE_ADAPTER_OF_A_PART.format(kind=facts.auto_class, base=base, room=_ROOM if new else "")
    if facts.is_adapter:
        return _USE_ADAPTER.format(kind=facts.auto_class.replace("AutoModel", "AutoPeftModel"))
    return _USE.format(kind=facts.auto_class)


def _header(config: RunConfig, facts: CardFacts) -> str:
    library = "peft" if facts.is_adapter else "transformers"
    lines = ["---", f"library_name: {library}", "tags: [dstune, instruction-tuned]"]
    if _is_hub_id(config.model.path):
        lines.append(f"base_model: {json.dumps(config.model.path)}")
    return "\n".join([*lines, "---", ""])


def _data(config: RunConfig, facts: CardFacts) -> str:
    """Sources as the manifest counts them, else as the run file names them."""
    rows = [_counted(source) for source in facts.sources]
    rows = rows or [[_shown(source.path), "", "", ""] for source in config.data.sources]
    lines = ["## Data", "", "| source | records read | conversations kept | tokens |", "|---|---|---|---|"]
    lines += [f"| {' | '.join(plain(cell) for cell in row)} |" for row in rows]
    shown = {key: value for key, value in facts.counts.items() if key in _SHOWN_COUNTS}
    lines += ["", *(f"- {plain(key.replace('_', ' '))}: {value:,}" for key, value in shown.items())]
    return "\n".join([*lines, ""])


_SHOWN_COUNTS = ("examples", "rows", "tokens", "supervised_tokens")


def _counted(source: Mapping[str, Any]) -> list[str]:
    numbers = (source["records"]["read"], source["conversations"]["kept"], source["tokens"])
    return [_shown(source["path"]), *(f"{number:,}" for number in numbers)]


def _training(config: RunConfig, facts: CardFacts) -> dict[str, Any]:
    train, adapter = config.train, config.model.adapter
    length = f"{train.max_steps} steps" if train.max_steps is not None else f"{train.epochs or 1} epochs"
    return {
        "steps taken": f"{facts.step:,}",
        "loss of the last step": None if facts.loss is None else f"{facts.loss:.4f}",
        "planned length": length,
        "rows per step": train.global_batch_size,
        "longest row": f"{config.data.max_length:,} tokens",
        "learning rate": f"{train.lr:g}, {train.schedule}",
        "optimizer": _optimizer(train),
        "precision": f"{config.model.dtype}, fp32 masters",
        "adapter": None if adapter is None else f"{adapter.kind}, rank {adapter.rank}, alpha {adapter.alpha}",
        "seed": train.seed,
        "trained on": config.data.train_on,
        "template": config.data.template,
    }


def _optimizer(train: TrainSection) -> str:
    parts = [train.optimizer]
    if train.betas is not None:
        parts.append(f"betas {train.betas[0]:g} and {train.betas[1]:g}")
    if train.momentum is not None:
        parts.append(f"momentum {train.momentum:g}")
    return ", ".join([*parts, f"weight decay {train.weight_decay:g}"])


def _table(title: str, values: Mapping[str, Any]) -> str:
    rows = [f"| {plain(key)} | {plain(value)} |" for key, value in values.items() if value is not None]
    return "\n".join([f"## {title}", "", "| | |", "|---|---|", *rows, ""])


def _is_hub_id(path: str) -> bool:
    return "/" in path and bool(_HUB_ID.fullmatch(path))


def _shown(path: str) -> str:
    """A path as it was written; of an absolute one its last part: a card is published, a machine's folders are not."""
    return Path(path).name if path.startswith(("/", "~")) else path
