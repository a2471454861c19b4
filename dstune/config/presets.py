"""The names that `deepspeed.preset` takes: what is in ds_configs/."""

import difflib

from dstune.paths import shared_files


def preset_names() -> list[str]:
    """The presets in ds_configs/."""
    return sorted(path.stem for path in shared_files("ds_configs").glob("*.json"))


def known_preset(name: str) -> str:
    """A preset's name, `auto` or a JSON file, which is looked for where it is read. Raises ValueError for a name that there is not."""
    if name == "auto" or name.endswith(".json") or name in (names := preset_names()):
        return name
    near = difflib.get_close_matches(name.lower(), names, n=1, cutoff=0.4)
    hint = f"did you mean {near[0]!r}?" if near else f"presets: {', '.join(names)}, or a JSON file of yours"
    raise ValueError(f"no such preset as {name!r}; {hint}")
