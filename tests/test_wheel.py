"""The wheel carries what a run needs: presets, cluster templates, recipes, the builtin tokenizer and models."""

import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PROGRAM = """
import json
from pathlib import Path
import dstune
from dstune.config import recipes
from dstune.data.builtin import records
from dstune.paths import shared_files
from dstune.config.presets import preset_names
from dstune.planning.deepspeed import load_preset
from transformers import PreTrainedTokenizerFast

here = Path(dstune.__file__).parent
tokenizer = PreTrainedTokenizerFast.from_pretrained(here / "data" / "builtin_tokenizer")
print(json.dumps({
    "dstune": str(here),
    "presets": preset_names(),
    "stage": load_preset("zero3", here)["zero_optimization"]["stage"],
    "cluster": sorted(path.name for path in shared_files("cluster").iterdir()),
    "recipe": recipes.text("quickstart"),
    "round_trip": tokenizer.decode(tokenizer.encode(next(records())["instruction"])),
}))
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("wheel")
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(out), str(ROOT)]
    built = subprocess.run(build, capture_output=True, text=True)
    assert built.returncode == 0, built.stdout + built.stderr
    (made,) = out.glob("*.whl")
    return made


def test_the_wheel_works_in_an_empty_directory(wheel: Path, tmp_path: Path) -> None:
    target = tmp_path / "site"
    install = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "--quiet",
        "--no-deps",
        "--no-index",
        "--target",
        str(target),
        str(wheel),
    ]
    subprocess.run(install, check=True, capture_output=True)
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"} | {"PYTHONPATH": str(target)}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["dstune"] == str(target / "dstune"), "the checkout was imported, not the wheel"
    assert found["stage"] == 3
    assert found["presets"] == sorted(path.stem for path in (ROOT / "ds_configs").glob("*.json"))
    assert found["cluster"] == sorted(path.name for path in (ROOT / "cluster").iterdir())
    assert found["recipe"] == (ROOT / "dstune" / "config" / "recipes" / "quickstart.yaml").read_text(encoding="utf-8")
    assert found["round_trip"]


def test_the_wheel_holds_nothing_else(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    roots = {name.split("/")[0] for name in names}
    assert {root for root in roots if not root.endswith(".dist-info")} == {"dstune"}
    assert not [name for name in names if "__pycache__" in name or name.startswith("dstune/tests")]
    carried = {name.removeprefix("dstune/") for name in names if name.startswith("dstune/")}
    checked_in = subprocess.run(["git", "ls-files", "dstune"], cwd=ROOT, capture_output=True, text=True)
    if checked_in.returncode == 0:
        wanted = {name.removeprefix("dstune/") for name in checked_in.stdout.split()}
        assert {name for name in wanted if (ROOT / "dstune" / name).exists()} <= carried
