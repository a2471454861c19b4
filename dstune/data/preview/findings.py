"""What a look at the figures tells by itself: what is as it should be, what to know, and what to look into before paying."""

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any, Literal, NamedTuple

from dstune.data.preview.survey import Reason, Survey
from dstune.data.preview.text import many
from dstune.data.shards import Prepared

_MUCH_LEFT_OUT = 0.01
_MANY_COPIES = 0.01
_SMALL_SHARE = 0.05
_FEW_TARGETS = 3
_POOR_FILL = 0.95


class Finding(NamedTuple):
    """One sentence for the top of the page."""

    level: Literal["good", "note", "warn"]
    text: str


def share(part: int, whole: int) -> str:
    """`12.3%`; a part that is there is never 0.0%, one that is missing something never 100.0%."""
    text = f"{part / max(1, whole):.1%}"
    if part and text == "0.0%":
        return "<0.1%"
    return ">99.9%" if part < whole and text == "100.0%" else text


def findings(prepared: Prepared, found: Survey, reasons: Sequence[Reason]) -> list[Finding]:
    """The warnings first, then the notes, then what is well."""
    told = [
        *_left_out(prepared.manifest["sources"], reasons),
        *_changed(prepared.manifest, found),
        *_targets(prepared, found),
        *_rows(prepared),
    ]
    return sorted(told, key=lambda finding: ("warn", "note", "good").index(finding.level))


def _total(sources: Sequence[dict[str, Any]], key: str) -> int:
    return sum(source[key] for source in sources)


def _left_out(sources: Sequence[dict[str, Any]], reasons: Sequence[Reason]) -> Iterator[Finding]:
    read = sum(source["records"]["read"] for source in sources)
    made = sum(source["conversations"]["made"] for source in sources)
    if not reasons:
        yield Finding("good", f"Nothing is left out: {many(read, 'record')} read, {many(made, 'conversation')} kept.")
    for asked, how in ((False, "left out"), (True, "left out as the run file asks")):
        some = [reason for reason in reasons if reason.is_asked == asked]
        records = {reason.name: reason.records for reason in some if reason.records}
        conversations = {reason.name: reason.conversations for reason in some if reason.conversations}
        for counts, whole, what in ((records, read, "record"), (conversations, made, "conversation")):
            if dropped := sum(counts.values()):
                names = ", ".join(f"{count:,} {name}" for name, count in counts.items())
                level = "warn" if not asked and dropped > _MUCH_LEFT_OUT * whole else "note"
                yield Finding(level, f"{dropped:,} of {many(whole, what)} ({share(dropped, whole)}) {how}: {names}.")


def _changed(manifest: Any, found: Survey) -> Iterator[Finding]:
    sources = manifest["sources"]
    for key, how in (("cleaned", "changed by cleaning"), ("flagged", "flagged by cleaning, and as they were")):
        steps = Counter[str]()
        for source in sources:
            steps.update(source.get(key, {}))
        if steps:
            names = ", ".join(f"{count:,} {name}" for name, count in steps.most_common())
            yield Finding("note", f"Conversations {how}: {names}.")
    if cut := sum(source["conversations"]["truncated"] for source in sources):
        yield Finding("warn", f"{many(cut, 'conversation')} cut to max_length: what stood behind is not trained.")
    if lost := _total(sources, "lossy_characters"):
        where = many(_total(sources, "lossy_examples"), "example")
        yield Finding(
            "warn", f"The tokenizer has no tokens for {many(lost, 'character')} in {where}: the model never sees them."
        )
    elif manifest["encoding"]["lossless"]:
        yield Finding("good", "The tokenizer has a token for every byte: no character is lost.")
    if spelled := _total(sources, "control_tokens_encoded"):
        where = many(_total(sources, "examples_with_control_tokens"), "example")
        yield Finding("note", f"{many(spelled, 'control token')} spelled in {where} became ordinary text.")
    if manifest["settings"]["control_tokens"] == "allow":
        yield Finding("warn", "control_tokens: allow. Whoever spells a control token in the data writes one.")
    if found.num_copies:
        level = "warn" if found.num_copies > _MANY_COPIES * len(found.looked) else "note"
        looked = "" if len(found.looked) == len(found.lengths) else f" of the {len(found.looked):,} looked at"
        part = share(found.num_copies, len(found.looked))
        yield Finding(level, f"Repeated token by token: {many(found.num_copies, 'example')}{looked} ({part}).")


def _targets(prepared: Prepared, found: Survey) -> Iterator[Finding]:
    counts = prepared.manifest["counts"]
    part = share(counts["supervised_tokens"], counts["tokens"])
    level = "warn" if counts["supervised_tokens"] < _SMALL_SHARE * counts["tokens"] else "good"
    yield Finding(level, f"{part} of the tokens are trained.")
    if few := int((found.supervised <= _FEW_TARGETS).sum()):
        yield Finding("note", f"{many(few, 'example')} with at most {_FEW_TARGETS} trained tokens.")
    ends, looked = int(found.ends_in_control.sum()), len(found.looked)
    if ends == looked:
        yield Finding("good", "The targets of every example end in a control token: when to stop is trained.")
    else:
        level = "note" if prepared.manifest["settings"]["train_on"] == "all" else "warn"
        where = f"{looked - ends:,} of {many(looked, 'example')}"
        yield Finding(
            level, f"The targets of {where} end without a control token: there nothing teaches the model to stop."
        )


def _rows(prepared: Prepared) -> Iterator[Finding]:
    if prepared.manifest["settings"]["packing"]:
        fill = prepared.manifest["counts"]["fill"]
        level = "warn" if fill < _POOR_FILL else "good"
        yield Finding(level, f"The rows are {fill:.2%} full; the rest of a row is padding.")
