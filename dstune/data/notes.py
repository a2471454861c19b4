"""What a user should know of a preparation that nothing refuses: said after it, and kept in the manifest."""

from collections.abc import Sequence

from dstune.data.contamination import Contamination
from dstune.data.inputs import Input
from dstune.data.tokenize import Encoder

_LINES_LOST = (
    "this tokenizer keeps no line breaks and tabs: in every text they become blanks, which `lossy_text` does not count"
)
_BLANK = (
    "an instruction template ends with a blank: in training it is part of the answer's first token, when asked later it is a token"
    " of its own, which the model never saw there; let the text end with a line break or a sign"
)


def of_encoding(encoder: Encoder) -> list[str]:
    """What this tokenizer and template do together."""
    template = encoder.template
    notes = [] if encoder.keeps_lines else [_LINES_LOST]
    added = {token.content for token in encoder.tokenizer.added_tokens_decoder.values()}
    missing = [marker for marker in template.markers if marker not in added]
    if missing:
        notes.append(f"the tokenizer has no tokens for {', '.join(missing)}: to this model they are ordinary text")
    if not encoder.end_of_turn_ids and encoder.train_on != "all":
        notes.append("no control token ends an answer in this template: the model may not learn to stop")
    if template.own is not None:
        notes.append("a built-in template that writes the same marks the answers; the export keeps the tokenizer's own")
    if template.ends_in_blank:
        notes.append(_BLANK)
    return notes


def of_evaluation(against: Contamination) -> list[str]:
    """What of the evaluation files cannot be looked for."""
    files = against.described()
    short, records = (sum(file[name] for file in files) for name in ("unchecked", "records"))
    return [f"{short} of {records} evaluation records are too short to be looked for in the data"] if short else []


def of_inputs(trained: Sequence[Input], held_out: Sequence[Input]) -> list[str]:
    """Files of the same content: one read twice counts double, one held out and trained on proves nothing."""
    notes: list[str] = []
    names: dict[str, str] = {}
    for one in trained:
        if one.sha256 in names:
            notes.append(f"{one.file.name} has the content of {names[one.sha256]}: its conversations count twice")
        names.setdefault(one.sha256, one.file.name)
    both = [one for one in held_out if one.sha256 in names]
    return notes + [f"{one.file.name} is held out and trained on ({names[one.sha256]})" for one in both]
