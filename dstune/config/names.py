"""The names of a file's keys: which there are at a place, and which one was meant by another."""

import difflib
import types
import typing
from typing import Any

from pydantic import BaseModel

Path_ = tuple[str | int, ...]
_ELSEWHERE = {
    "learning_rate": "lr",
    "lr_scheduler_type": "schedule",
    "num_train_epochs": "epochs",
    "batch_size": "global_batch_size",
    "train_batch_size": "global_batch_size",
    "gradient_accumulation_steps": "global_batch_size",
    "per_device_train_batch_size": "micro_batch_size",
    "max_seq_length": "max_length",
    "cutoff_len": "max_length",
    "model_name_or_path": "path",
    "gradient_checkpointing": "activation_checkpointing",
    "save_steps": "every",
    "eval_steps": "every",
    "save_total_limit": "keep",
    "r": "rank",
    "lora_r": "rank",
    "lora_rank": "rank",
    "lora_alpha": "alpha",
    "lora_dropout": "dropout",
    "lora_target": "targets",
    "target_modules": "targets",
}
"""What other trainers call a key of ours."""
_ALIKE, _SOMEWHAT_ALIKE = 0.75, 0.5


def meant(model: type[BaseModel], place: Path_) -> list[str]:
    """The keys that somebody meant who wrote one at `place` that is not there: one like it beside it, or in sections."""
    fields, key = fields_at(model, place[:-1]), str(place[-1]).lower()
    others = [other for other, ours in _ELSEWHERE.items() if ours in fields]

    def near(cutoff: float) -> list[str]:
        close = difflib.get_close_matches(key, [*fields, *others], n=1, cutoff=cutoff)
        return [each if each in fields else _ELSEWHERE[each] for each in close]

    return near(_ALIKE) or in_sections(model, key) or near(_SOMEWHAT_ALIKE)


def in_sections(model: type[BaseModel], key: str) -> list[str]:
    """`section.key` of the sections that have it, or one like it, by our name or another trainer's."""
    places: dict[str, list[str]] = {}
    for section in model.model_fields:
        for each in _in_section(model, section):
            places.setdefault(each, []).append(f"{section}.{each}")
    close = difflib.get_close_matches(_ELSEWHERE.get(key, key), places, n=1, cutoff=_ALIKE)
    return places[close[0]] if close else []


def _in_section(model: type[BaseModel], name: str) -> list[str]:
    """The keys of the section of that name; none where it is a list of them, or no section."""
    annotation = model.model_fields[name].annotation
    return fields_at(model, (name,)) if typing.get_origin(annotation) is not list else []


def fields_at(model: type[BaseModel], place: Path_) -> list[str]:
    """The keys that the model knows at a path of the document."""
    current: type[BaseModel] | None = model
    for part in place:
        if isinstance(part, int) or current is None:
            continue
        field = next((f for n, f in current.model_fields.items() if part in (n, f.alias)), None)
        current = _section(field.annotation) if field else None
    return [field.alias or name for name, field in current.model_fields.items()] if current else []


def _section(annotation: Any) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    if typing.get_origin(annotation) in (list, typing.Union, types.UnionType, typing.Annotated, tuple):
        return next((found for part in typing.get_args(annotation) if (found := _section(part))), None)
    return None
