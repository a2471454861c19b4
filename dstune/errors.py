"""What can go wrong for a user, each kind with its exit status (DESIGN: 1 failed, 2 command or run file, 3 data, 4 fit, 75 stopped),
and 130 as shells have it for Ctrl-C.

A `DstuneError` reaches the user as its message alone; any other exception is a bug of ours and keeps its traceback.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

EXIT_DONE = 0
EXIT_FAILED = 1
EXIT_USAGE = 2
EXIT_DATA = 3
EXIT_FIT = 4
EXIT_STOPPED = 75
EXIT_INTERRUPTED = 130


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong: where it stands, what was expected, what came, and what to do about it."""

    where: str
    """A place a person can open: `run.yaml:12` or `data/a.jsonl:7`; for an override, the words of the command line."""
    came: str
    expected: str = ""
    do: str = ""

    def __str__(self) -> str:
        text = f"{self.where}: {self.came}" if self.where else self.came
        if self.expected:
            text += f"; expected {self.expected}"
        if self.do:
            text += f"\n    {self.do}"
        return text


def first_line(error: BaseException) -> str:
    """What an error says, short enough for a message; one that says nothing, by its kind."""
    return (str(error).strip() or type(error).__name__).splitlines()[0][:300]


class DstuneError(ValueError):
    """An error for the user. `str()` of it is the whole message; `exit_status` is the command's."""

    exit_status: ClassVar[int] = EXIT_FAILED
    final: ClassVar[bool] = False
    """Trying again would only meet the same error."""

    def __init__(self, message: str | Problem | Sequence[Problem]) -> None:
        if isinstance(message, Problem):
            message = [message]
        self.problems: tuple[Problem, ...] = () if isinstance(message, str) else tuple(message)
        super().__init__(message if isinstance(message, str) else "\n".join(str(p) for p in self.problems))


class RunFailed(DstuneError):
    """A run, an export or an evaluation failed after it started."""


class Diverged(DstuneError):
    """Too many steps in a row had a loss or a gradient that is not finite."""

    final = True


class UsageError(DstuneError):
    """The command line is wrong, or names something that is not there."""

    exit_status = EXIT_USAGE
    final = True


class ConfigError(DstuneError):
    """The run file is wrong; carries every problem of the file at once."""

    exit_status = EXIT_USAGE
    final = True


class DataError(DstuneError):
    """The data is refused."""

    exit_status = EXIT_DATA
    final = True


class FitError(DstuneError):
    """The run does not fit the cluster."""

    exit_status = EXIT_FIT
    final = True


class CheckpointError(DstuneError):
    """A checkpoint is missing, damaged or foreign."""


class DamagedCheckpoint(CheckpointError):
    """Bytes of a checkpoint are not what was written, or do not come: an older one may be whole."""
