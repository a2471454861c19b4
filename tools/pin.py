"""Write tools/constraints.txt from what is installed here, once every test has passed with it: `python tools/pin.py`.

A local build's suffix is left out (`2.13.0+cpu`): the same version's other builds serve too. What needs a newer Python than
the oldest we support is pinned from that Python on; below it the registry's newest fitting version comes.
"""

import re
import sys
from importlib.metadata import distributions
from pathlib import Path

_APART = Path(sys.prefix, "liger")
"""What `tools/install --dev` puts beside the rest."""
OLDEST = (3, 11)
OWN = {"dstune", "pip", "setuptools", "wheel"}


def lines() -> list[str]:
    found = {d.metadata["Name"].lower().replace("_", "-"): d for d in distributions(path=[*sys.path, str(_APART)])}
    return [
        f"{name}=={dist.version.partition('+')[0]}{_marker(dist.metadata.get('Requires-Python') or '')}"
        for name, dist in sorted(found.items())
        if name not in OWN
    ]


def _marker(requires: str) -> str:
    oldest = re.search(r">=\s*(\d+)\.(\d+)", requires)
    if oldest and (int(oldest[1]), int(oldest[2])) > OLDEST:
        return f'; python_version >= "{oldest[1]}.{oldest[2]}"'
    return ""


if __name__ == "__main__":
    header = "# The versions that dstune was tested with, made by tools/pin.py; `pip install -c` takes exactly these.\n"
    Path(__file__).with_name("constraints.txt").write_text(header + "\n".join(lines()) + "\n", encoding="utf-8")
