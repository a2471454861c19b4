"""Data sets of the Hugging Face hub: their data files, listed, chosen by subset and split, and fetched into the hub's own cache.

Without a connection, or with HF_HUB_OFFLINE=1, what that cache holds is read. No code of a repository is ever run.
"""

import functools
import re
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from dstune.config.schema import Source
from dstune.errors import ConfigError, DataError, Problem, first_line
from dstune.places import plain_suffix

_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_SPLITS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing", "eval", "evaluation"),
}
"""What file names call the usual splits."""
_PART = re.compile(r"-(\d{5})-of-(\d{5})")
_ABOUT = ("dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json")
_SECONDS = 20


def is_id(written: str, suffixes: Sequence[str]) -> bool:
    """Whether a path that is not there may be an `owner/name` of the hub."""
    return bool(_ID.fullmatch(written)) and plain_suffix(written) not in (*suffixes, ".txt", ".md", ".yaml")


def is_about(relative: Path) -> bool:
    """Files of a directory that describe data rather than hold it, and what is hidden."""
    hidden = any(part.startswith(".") and part not in (".", "..") for part in relative.parts)
    return hidden or relative.name in _ABOUT


def is_of_split(relative: Path, split: str) -> bool:
    """`train` is in `train.jsonl`, `train-00000-of-00002.parquet` and `train/part.json`."""
    return split in relative.parts or relative.name == split or relative.name.startswith((f"{split}.", f"{split}-"))


def files(source: Source, suffixes: Sequence[str]) -> list[tuple[str, Path]]:
    """(name within the repository, place on this disk) of each data file of the subset and split, sorted by name.

    The split is `train` unless named. Raises ConfigError where there is none such, DataError where it cannot be had.
    """
    commit, names, folder = _listing(source.path, source.revision)
    data = [name for name in names if plain_suffix(name) in suffixes and not is_about(Path(name))]
    card = _card(source.path, commit, names, folder)
    chosen = _of_card(source, card, data) if card else _by_names(source, data)
    if folder is not None:
        _require_parts(source.path, chosen)
        return [(name, folder / name) for name in chosen]
    found = [(name, _fetch(source.path, name, commit)) for name in chosen]
    if (
        source.revision != commit
    ):  # the client notes which commit a branch stands at: what it goes by without a connection
        _fetch(source.path, chosen[0], source.revision or "main")
    return found


@functools.lru_cache(maxsize=64)
def _listing(repository: str, revision: str | None) -> tuple[str, tuple[str, ...], Path | None]:
    """The commit, its files, and the cache's folder where the hub itself could not be asked."""
    from huggingface_hub import HfApi, constants, errors

    if not constants.is_offline_mode():
        try:
            info = HfApi().dataset_info(repository, revision=revision, timeout=_SECONDS)
            return str(info.sha), tuple(file.rfilename for file in info.siblings or []), None
        except (errors.RepositoryNotFoundError, errors.RevisionNotFoundError, errors.HFValidationError) as error:
            raise ConfigError(_missing(repository, revision, error)) from None
        except Exception as error:  # noqa: BLE001 (whatever the connection's library raises: what is in the cache is then read)
            return _cached(repository, revision, error)
    return _cached(repository, revision, None)


def _missing(repository: str, revision: str | None, error: Exception) -> Problem:
    at = f" at revision {revision!r}" if revision else ""
    came = f"no such file here, and no such data set on the hub{at} ({first_line(error)})"
    return Problem(repository, came, "a path, or the id of a data set", "A private or gated one wants HF_TOKEN.")


def _cached(repository: str, revision: str | None, error: Exception | None) -> tuple[str, tuple[str, ...], Path]:
    from huggingface_hub import errors, snapshot_download

    try:
        folder = Path(snapshot_download(repository, repo_type="dataset", revision=revision, local_files_only=True))
    except (errors.LocalEntryNotFoundError, OSError, ValueError):
        why = f"the hub cannot be reached ({first_line(error)})" if error else "HF_HUB_OFFLINE is set"
        came = f"no such file here; as a data set of the hub it is not in its cache, and {why}"
        do = f"Where there is a connection: hf download --repo-type dataset {repository}; then HF_HOME names that cache here."
        raise DataError(Problem(repository, came, do=do)) from None
    names = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
    return folder.name, tuple(names), folder


def _fetch(repository: str, name: str, commit: str) -> Path:
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(repository, name, repo_type="dataset", revision=commit))
    except Exception as error:  # noqa: BLE001 (the connection's library has errors of its own)
        raise DataError(Problem(f"{repository}/{name}", f"cannot be fetched: {first_line(error)}")) from None


def _card(repository: str, commit: str, names: Sequence[str], folder: Path | None) -> Sequence[Mapping[str, Any]]:
    """The `configs` of the data set's card: which files belong to which subset and split."""
    if "README.md" not in names:
        return []
    path = folder / "README.md" if folder else _fetch(repository, "README.md", commit)
    text = path.read_text("utf-8", "replace")
    head = re.match(r"---\s*\n(.*?)\n---", text, re.DOTALL)
    if head is None:
        return []
    from ruamel.yaml import YAML, YAMLError

    try:
        about = YAML(typ="safe", pure=True).load(head.group(1))
    except YAMLError as error:
        raise DataError(Problem(f"{repository}/README.md", f"its card is no YAML: {first_line(error)}")) from None
    configs = about.get("configs") if isinstance(about, dict) else None
    found = (
        [one for one in configs if isinstance(one, dict) and one.get("data_files")] if isinstance(configs, list) else []
    )
    return found


def _of_card(source: Source, configs: Sequence[Mapping[str, Any]], data: Sequence[str]) -> list[str]:
    names = [str(one.get("config_name", "default")) for one in configs]
    if source.subset is not None:
        subset = source.subset
    elif len(names) == 1:
        subset = names[0]
    else:
        subset = next((name for one, name in zip(configs, names, strict=True) if one.get("default")), "default")
    if subset not in names:
        came = f"subset {source.subset!r}" if source.subset else "several subsets"
        raise ConfigError(Problem(source.path, came, f"`subset:` one of {', '.join(names[:20])}"))
    splits = _splits(configs[names.index(subset)]["data_files"])
    split = source.split or ("train" if "train" in splits or len(splits) > 1 else next(iter(splits)))
    if split not in splits:
        raise ConfigError(Problem(source.path, f"split {split!r}", f"`split:` one of {', '.join(splits)}"))
    chosen = sorted({name for name in data for pattern in splits[split] if PurePosixPath(name).match(pattern)})
    if not chosen:
        raise ConfigError(
            Problem(source.path, f"no data file for {subset}/{split}", f"files as {', '.join(splits[split])}")
        )
    return chosen


def _splits(data_files: Any) -> dict[str, list[str]]:
    """The patterns of each split, as cards write them: a pattern, a list, or a list of `{split, path}`."""
    splits: dict[str, list[str]] = {}
    for one in data_files if isinstance(data_files, list) else [data_files]:
        split, path = (str(one.get("split", "train")), one.get("path")) if isinstance(one, dict) else ("train", one)
        splits.setdefault(split, []).extend(map(str, path if isinstance(path, list) else [path]))
    return splits


def _by_names(source: Source, data: Sequence[str]) -> list[str]:
    """Where no card tells: a subset is a folder, a split is a word in the name."""
    if source.subset is not None:
        data = [name for name in data if source.subset in PurePosixPath(name).parts[:-1]]
    if not data:
        what = "no data file" if source.subset is None else f"no data file in a folder {source.subset!r}"
        raise ConfigError(Problem(source.path, what, "JSON, JSONL, CSV, Parquet or Arrow; code is not run"))
    found = {name: _split_of(name) for name in data}
    if source.split is not None:
        chosen = [name for name in data if source.split in (found[name], *PurePosixPath(name).parts)]
        chosen = chosen or [name for name in data if is_of_split(Path(name), source.split)]
    else:
        chosen = [name for name in data if found[name] == "train"] or [name for name in data if not found[name]]
    if not chosen:
        splits = ", ".join(sorted(set(filter(None, found.values())))) or "nothing that names a split"
        raise ConfigError(Problem(source.path, f"split {source.split or 'train'!r}", f"`split:` one of {splits}"))
    return sorted(chosen)


def _split_of(name: str) -> str:
    words = re.split(r"[-._ /\d]+", name.lower())
    return next((split for split, spellings in _SPLITS.items() if set(spellings) & set(words)), "")


def _require_parts(repository: str, names: Sequence[str]) -> None:
    """Raises DataError where a cache holds some of a split's numbered files but not all."""
    for name in names:
        if not (found := _PART.search(name)):
            continue
        whole = {
            name[: found.start()] + f"-{number:05d}-of-{found[2]}" + name[found.end() :]
            for number in range(int(found[2]))
        }
        if missing := sorted(whole - set(names)):
            came = f"the hub's cache has not all of it: {missing[0]} is missing"
            raise DataError(Problem(repository, came, do=f"hf download --repo-type dataset {repository}"))
