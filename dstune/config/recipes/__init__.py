"""Starter run files: whole, commented, one for each way of running. `dstune init --recipe NAME` writes one."""

import difflib
from pathlib import Path

from dstune.errors import Problem, UsageError

_HERE = Path(__file__).parent
_TASKS = ".tasks.yaml"


def names() -> list[str]:
    """Every recipe."""
    return sorted(path.stem for path in _HERE.glob("*.yaml") if not path.name.endswith(_TASKS))


def text(name: str) -> str:
    """A recipe's run file. Raises UsageError for a name that is none."""
    if name not in names():
        near = difflib.get_close_matches(name, names(), n=1, cutoff=0.4)
        hint = f"did you mean {near[0]!r}?" if near else f"recipes: {', '.join(names())}"
        raise UsageError(Problem(f"recipe {name!r}", "no such recipe", do=hint))
    return (_HERE / f"{name}.yaml").read_text(encoding="utf-8")


def summary(name: str) -> str:
    """What the recipe is for: its first line."""
    return text(name).splitlines()[0].lstrip("# ")


def tasks_text(name: str) -> str | None:
    """The tasks file for `dstune evaluate` that goes with a recipe, if it has one."""
    text(name)
    companion = _HERE / f"{name}{_TASKS}"
    return companion.read_text(encoding="utf-8") if companion.is_file() else None


def write(directory: Path, name: str) -> Path:
    """Put a recipe into `directory` as run.yaml (and tasks.yaml, where it has one); the run file's path.

    Raises UsageError where one of them exists already: nothing is overwritten, and then nothing is written.
    """
    files = {"run.yaml": text(name)}
    if (tasks := tasks_text(name)) is not None:
        files["tasks.yaml"] = tasks
    for file in files:
        if (directory / file).exists():
            raise UsageError(
                Problem(
                    str(directory / file),
                    "exists already",
                    do=f"give another directory: dstune init DIR --recipe {name}",
                )
            )
    directory.mkdir(parents=True, exist_ok=True)
    for file, content in files.items():
        with (directory / file).open("x", encoding="utf-8") as stream:
            stream.write(content)
    return directory / "run.yaml"
