"""Records that hold an instruction over several inputs: Natural Instructions' tasks, self-instruct's seeds."""

from collections.abc import Collection
from functools import partial
from typing import Any

from dstune.data import turns
from dstune.data.conversation import Refused
from dstune.data.formats.pairs import Pair
from dstune.data.formats.record import Parts, Reader, listed, present
from dstune.data.strict_json import kind

_TASK = Pair("instruction", "output", contexts=("input",))
_DEFINITION = ("Definition", "definition")
_INPUT, _OUTPUT = ("input", "inputs"), ("output", "outputs", "targets")


def natural_instructions(keys: Collection[str]) -> Reader | None:
    """How to read a task file (`Definition` over `Instances`), or one instance of a task with its definition; else None."""
    found = present(keys, _DEFINITION)
    if not found:
        return None
    if "Instances" in keys:
        return partial(_whole_task, found[0])
    if "Instance" in keys:
        return partial(_one_instance, found[0])
    given, expected = present(keys, _INPUT), present(keys, _OUTPUT)
    if len(given) == len(expected) == 1:
        return partial(_flat, found[0], given[0], expected[0])
    return None


def self_instruct(keys: Collection[str]) -> Reader | None:
    """How to read an instruction with `instances`; else None."""
    return _seed if {"instruction", "instances"} <= set(keys) else None


def _whole_task(key: str, record: dict[str, Any]) -> Parts:
    return _over(_definition(record, key), record["Instances"], "Instances")


def _one_instance(key: str, record: dict[str, Any]) -> Parts:
    return _over(_definition(record, key), [record["Instance"]], "Instance")


def _flat(key: str, given: str, expected: str, record: dict[str, Any]) -> Parts:
    instance = {"input": record[given], "output": record[expected]}
    return _over(_definition(record, key), [instance], "the record")


def _seed(record: dict[str, Any]) -> Parts:
    return _over(turns.text(record["instruction"], "instruction"), record["instances"], "instances")


def _definition(record: dict[str, Any], key: str) -> str:
    lines = record[key] if isinstance(record[key], list) else [record[key]]
    return "\n".join(turns.text(line, key) for line in lines)


def _over(instruction: str, instances: Any, where: str) -> Parts:
    """The instruction over each instance; each listed answer makes a conversation of its own."""
    if not isinstance(instances, list):
        raise Refused("unknown_format", f"`{where}` is {kind(instances)}; expected a list of objects with `output`")
    parts: Parts = []
    for number, instance in enumerate(instances):
        place = f"{where}[{number}]"
        if not isinstance(instance, dict) or "output" not in instance:
            came = f"has the keys {listed(instance)}" if isinstance(instance, dict) else f"is {kind(instance)}"
            raise Refused("unknown_format", f"{place} {came}; expected an object with `input` and `output`")
        outputs = instance["output"] if isinstance(instance["output"], list) else [instance["output"]]
        if not outputs:
            parts.append(Refused("empty_answer", f"{place}.output is an empty list"))
        for output in outputs:
            pair = {"instruction": instruction, "input": instance.get("input"), "output": output}
            try:
                parts.append(_TASK.conversation(pair))
            except Refused as refused:
                parts.append(Refused(refused.reason, f"{place}: {refused.detail}"))
    return parts
