"""What became of every record and conversation of a file: the sums always hold, and every loss has a reason and a line."""

import json
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

from dstune.data.shard_writer import HashedFile, WrittenFile


@dataclass
class FileTally:
    """The counts of one file of one source. records read = used + dropped; conversations made = kept + dropped."""

    path: str
    """As the run file writes it."""
    source: int
    """Number of the source in the run file, from 0; a source may hold many files."""
    sha256: str
    bytes: int
    records_used: int = 0
    records_dropped: Counter[str] = field(default_factory=lambda: Counter[str]())
    kept: int = 0
    dropped: Counter[str] = field(default_factory=lambda: Counter[str]())
    truncated: int = 0
    """Kept, but cut to `max_length` (`overlong: truncate`)."""
    split: int = 0
    """Documents in several examples (`overlong: split`)."""
    longest: int = 0
    """Tokens of the longest conversation that was made, kept or not."""
    control_tokens_encoded: int = 0
    examples_with_control_tokens: int = 0
    lossy_examples: int = 0
    lossy_characters: int = 0
    cleaned: Counter[str] = field(default_factory=lambda: Counter[str]())
    """Conversations that each cleaning step changed."""
    flagged: Counter[str] = field(default_factory=lambda: Counter[str]())
    """Conversations in which a cleaning step saw something and left it."""

    def add(self, more: "FileTally") -> None:
        """Count what another part of the same file came to."""
        for name in _SUMMED:
            setattr(self, name, getattr(self, name) + getattr(more, name))
        for name in _COUNTED:
            getattr(self, name).update(getattr(more, name))
        self.longest = max(self.longest, more.longest)

    @property
    def records_read(self) -> int:
        return self.records_used + self.records_dropped.total()

    @property
    def made(self) -> int:
        return self.kept + self.dropped.total()

    def to_dict(self, examples: int, tokens: int, supervised_tokens: int) -> dict[str, Any]:
        """The manifest's entry; `examples`: how many of the kept ones stand in this very directory, the tokens are theirs."""
        return {
            "path": self.path,
            "source": self.source,
            "sha256": self.sha256,
            "bytes": self.bytes,
            "records": {
                "read": self.records_read,
                "used": self.records_used,
                "dropped": dict(sorted(self.records_dropped.items())),
            },
            "conversations": {
                "made": self.made,
                "kept": self.kept,
                "dropped": dict(sorted(self.dropped.items())),
                "truncated": self.truncated,
                "split": self.split,
            },
            "examples": examples,
            "longest": self.longest,
            "tokens": tokens,
            "supervised_tokens": supervised_tokens,
            "control_tokens_encoded": self.control_tokens_encoded,
            "examples_with_control_tokens": self.examples_with_control_tokens,
            "lossy_examples": self.lossy_examples,
            "lossy_characters": self.lossy_characters,
            "cleaned": dict(sorted(self.cleaned.items())),
            "flagged": dict(sorted(self.flagged.items())),
        }


_SUMMED = (
    "records_used",
    "kept",
    "truncated",
    "split",
    "control_tokens_encoded",
    "examples_with_control_tokens",
    "lossy_examples",
    "lossy_characters",
)
_COUNTED = ("records_dropped", "dropped", "cleaned", "flagged")


class Rejects:
    """`rejects.jsonl` while it is written: a line for everything that was dropped, in the order of the files."""

    def __init__(self, path: Path) -> None:
        self._file = HashedFile(path)
        self.first = ""
        """The first reject for a person, empty where there is none."""

    def add(self, file: str, line: int, part: int | None, reason: str, detail: str) -> None:
        """One record (`part` None) or one of its conversations (from 0)."""
        self.first = self.first or f"{file}:{line}: {reason}: {detail}"
        entry = {"file": file, "line": line, "part": part, "reason": reason, "detail": detail}
        # A lone surrogate cannot be UTF-8; as \udc80 it is still JSON.
        self._file.write((json.dumps(entry, ensure_ascii=False) + "\n").encode("utf-8", "backslashreplace"))

    def finish(self) -> WrittenFile:
        self._file.close()
        return self._file.written()

    def __enter__(self) -> "Rejects":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.discard()
