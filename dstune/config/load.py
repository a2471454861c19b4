"""Read a YAML 1.2 file into a typed model: every problem of the file at once, each with its line and nearest key."""

import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError
from ruamel.yaml import YAML
from ruamel.yaml.comments import CommentedMap, CommentedSeq
from ruamel.yaml.error import MarkedYAMLError, YAMLError

from dstune.config.names import Path_, fields_at, meant
from dstune.config.schema import RunConfig, SiteConfig
from dstune.config.start import begun
from dstune.config.units import shortened
from dstune.errors import ConfigError, Problem, UsageError, first_line
from dstune.paths import config_directory

Model = TypeVar("Model", bound=BaseModel)
_MAX_FILE_BYTES = 4 << 20
_MAX_VALUES = 100_000
_LARGEST = 2**63 - 1


@dataclass(frozen=True)
class LoadedRun:
    """A run file as it was read: what it says, where it stands, and what its relative paths are relative to."""

    config: RunConfig
    base: Path
    file: Path


def load_run(path: str | Path, overrides: Sequence[str] = ()) -> LoadedRun:
    """The run file at `path` with `key=value` overrides put over it. Raises ConfigError with all problems, UsageError."""
    file = Path(path).absolute()
    config = load_model(file, RunConfig, overrides)
    return LoadedRun(begun(config, file.parent, partial(load_model, model=RunConfig)), file.parent, file)


def resolve(written: str, base: Path) -> Path:
    """A path as a file writes it, made absolute: relative ones are relative to `base`, `~` is the user's home."""
    return (base / Path(written).expanduser()).absolute()


def load_site(name: str, base: Path) -> SiteConfig:
    """The site file `name`: a path, or `NAME.yaml` beside the run file or in the user's configuration directory."""
    places = [resolve(name, base)] if name.endswith((".yaml", ".yml")) else []
    places += [base / f"{name}.yaml", config_directory() / f"{name}.yaml"]
    for place in places:
        if place.is_file():
            return load_model(place, SiteConfig)
    looked = ", ".join(str(place) for place in places)
    raise UsageError(Problem(f"site {name!r}", "no such site file", do=f"looked at {looked}"))


def load_model(file: Path, model: type[Model], overrides: Sequence[str] = ()) -> Model:
    """Any YAML file of ours as its typed model. Raises ConfigError with every problem of the file, UsageError where it is missing."""
    return validate(read_yaml(file), model, file, overrides)


def read_yaml(file: Path) -> CommentedMap:
    """The mapping a YAML 1.2 file holds, with the line of each key. No tags that build objects, no merges of aliases."""
    try:
        if file.stat().st_size > _MAX_FILE_BYTES:
            raise ConfigError(Problem(str(file), f"larger than {_MAX_FILE_BYTES >> 20} MiB", "a run file"))
        text = file.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UsageError(Problem(str(file), "no such file", do="`dstune init` writes a starter run file")) from None
    except IsADirectoryError:
        raise UsageError(Problem(str(file), "is a directory", "a YAML file")) from None
    except OSError as error:
        raise UsageError(Problem(str(file), error.strerror or str(error))) from None
    except UnicodeDecodeError as error:
        raise ConfigError(Problem(str(file), f"byte {error.start} is not UTF-8", "a UTF-8 text file")) from None
    document = _parse(text, str(file))
    if not isinstance(document, CommentedMap):
        raise ConfigError(Problem(f"{file}:1", f"holds {_kind(document)}", "a mapping of sections"))
    return document


def _parse(text: str, where: str) -> Any:
    yaml = YAML(typ="rt", pure=True)
    try:
        return yaml.load(text)
    except MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = f":{mark.line + 1}" if mark else ""
        raise ConfigError(Problem(f"{where}{line}", f"not YAML: {error.problem or error.context}")) from None
    except (YAMLError, ValueError, RecursionError) as error:
        raise ConfigError(Problem(where, f"not YAML: {type(error).__name__}: {first_line(error)}")) from None


def validate(document: CommentedMap, model: type[Model], file: Path, overrides: Sequence[str] = ()) -> Model:
    """`document` with overrides as a `model`. Raises ConfigError."""
    overridden = {_override(document, text): text for text in overrides}
    try:
        return model.model_validate(_Plain(file).copy(document))
    except ValidationError as error:
        raise ConfigError(_problems(error, document, model, file, overridden)) from None
    except RecursionError:
        raise ConfigError(Problem(str(file), "nested too deeply")) from None


def said(model: type[Model], values: Mapping[str, Any], named: Callable[[str], str]) -> Model:
    """What a command line or a call says, as a `model`. `named` gives a field the name that who wrote it knows. Raises UsageError."""
    try:
        return model.model_validate(dict(values))
    except ValidationError as error:
        details = error.errors(include_url=False)
        problems = [_problem((named(str(detail["loc"][0])),), [detail], model, "") for detail in details]
        raise UsageError(problems) from None


def dump(model: BaseModel) -> str:
    """The model as YAML, every default written out; `load_model` gives an equal one back."""
    stream = io.StringIO()
    yaml = YAML(typ="safe", pure=True)
    yaml.default_flow_style = False
    yaml.sort_base_mapping_type_on_output = False  # type: ignore[attr-defined]
    yaml.width = 120
    yaml.dump(model.model_dump(mode="json", by_alias=True), stream)
    return stream.getvalue()


class _Plain:
    """Copies a document into plain values: so many at most, for a few lines of aliases can stand for billions; whole numbers of 64 bits,
    for what is reckoned of larger ones leaves the numbers of a computer, wherever that is.
    """

    def __init__(self, file: Path) -> None:
        self._file, self._left = file, _MAX_VALUES

    def copy(self, value: Any, name: str = "") -> Any:
        """`value`, which the document has under `name`."""
        self._left -= 1
        if self._left < 0:
            raise ConfigError(
                Problem(str(self._file), f"more than {_MAX_VALUES:,} values", "a run file (aliases multiply)")
            )
        if isinstance(value, Mapping):
            if strange := [key for key in value if not isinstance(key, str)]:
                raise ConfigError(Problem(str(self._file), f"the key {strange[0]!r} is no text", "names of keys"))
            return {str(key): self.copy(item, f"{name}.{key}") for key, item in value.items()}
        if isinstance(value, list):
            return [self.copy(item, f"{name}.{number}") for number, item in enumerate(value)]
        if isinstance(value, bool) or value is None:
            return value
        if isinstance(value, int) and abs(value) > _LARGEST:
            came = f"{name.removeprefix('.')} is {shortened(value)}"
            raise ConfigError(Problem(str(self._file), came, "a number of 64 bits"))
        for kind in (int, float, str):
            if isinstance(value, kind):
                return kind(value)
        return value


def _override(document: CommentedMap, text: str) -> Path_:
    """Put `a.b.0.c=value` into the document; its path."""
    key, equals, written = text.partition("=")
    if not equals or not key.strip():
        raise UsageError(Problem(f"override {text!r}", "no key=value", "dotted keys, as in train.lr=1e-5"))
    path: list[str | int] = [int(part) if part.isdigit() else part for part in key.strip().split(".")]
    place: Any = document
    for part in path[:-1]:
        place = _descend(place, part, text)
    last = path[-1]
    value = _parse(written, f"override {text!r}")
    if isinstance(place, CommentedSeq) and isinstance(last, int) and last <= len(place):
        place[last : last + 1] = [value]
    elif isinstance(place, CommentedMap):
        place[str(last)] = value
    else:
        raise UsageError(Problem(f"override {text!r}", f"there is no place {key!r} in the run file"))
    return tuple(path)


def _descend(place: Any, part: str | int, text: str) -> Any:
    if isinstance(place, CommentedSeq) and isinstance(part, int) and part < len(place):
        return place[part]
    if isinstance(place, CommentedMap):
        key = str(part)
        if place.get(key) is None:
            place[key] = CommentedMap()
        return place[key]
    raise UsageError(Problem(f"override {text!r}", f"there is no {part!r} to go into"))


def _problems(
    error: ValidationError, document: CommentedMap, model: type[BaseModel], file: Path, overridden: Mapping[Path_, str]
) -> list[Problem]:
    """One problem for each place in the document; the members of a union that all failed there are joined by `or`."""
    by_place: dict[Path_, list[Any]] = {}
    for detail in error.errors(include_url=False):
        by_place.setdefault(_known_path(document, detail["loc"], detail["type"]), []).append(detail)
    for place in list(by_place):  # of a union, the member that was meant is the one that was looked into
        if any(other != place and other[: len(place)] == place for other in by_place):
            del by_place[place]
    return [
        _problem(place, details, model, _where(document, place, file, overridden))
        for place, details in by_place.items()
    ]


def _problem(place: Path_, details: Sequence[Any], model: type[BaseModel], where: str) -> Problem:
    name = ".".join(str(part) for part in place)
    first = details[0]
    if first["type"] == "extra_forbidden":
        known = ", ".join(fields_at(model, place[:-1]))
        near = " or ".join(repr(each) for each in meant(model, place))
        return Problem(where, f"unknown key {name!r}", do=f"did you mean {near}?" if near else f"known keys: {known}")
    if first["type"] == "missing":
        return Problem(where, f"{name!r} is missing")
    expected = list(dict.fromkeys(_expectation(detail) for detail in details))
    if first["type"] in ("value_error", "assertion_error") and len(details) == 1:
        return Problem(where, f"{name or 'the file'}: {expected[0]}")
    return Problem(where, f"{name} is {shortened(first['input'])}", " or ".join(expected))


def _expectation(detail: Any) -> str:
    message = str(detail["msg"])
    for prefix in ("Input should be a valid ", "Input should be ", "Value error, "):
        message = message.removeprefix(prefix)
    return message


def _known_path(document: Any, location: Sequence[str | int], kind: str) -> Path_:
    """The part of pydantic's location that is a path in the document (behind it stand the members of unions)."""
    path: list[str | int] = []
    place: Any = document
    for part in location:
        if _holds(place, part):
            place = place[part]
            path.append(part)
        elif kind == "missing" and isinstance(part, str) and part == location[-1]:
            path.append(part)
    return tuple(path)


def _holds(place: Any, part: str | int) -> bool:
    if isinstance(place, Mapping):
        return part in place
    return isinstance(place, list) and isinstance(part, int) and part < len(place)


def _where(document: CommentedMap, place: Path_, file: Path, overridden: Mapping[Path_, str]) -> str:
    for path, text in overridden.items():
        if place[: len(path)] == path or path[: len(place)] == place:
            return f"override {text!r}"
    line = 1
    here: Any = document
    for part in place:
        if not _holds(here, part):
            break
        data = here.lc.data
        if data and part in data:
            line = data[part][0] + 1
        here = here[part]
    return f"{file}:{line}"


def _kind(value: Any) -> str:
    return "nothing" if value is None else f"a {type(value).__name__}"
