"""Every recipe is a whole run file that loads, says what it is for, and is never written over another."""

from pathlib import Path

import pytest

from dstune.config import recipes
from dstune.config.load import load_model, load_run
from dstune.config.schema import RunConfig
from dstune.errors import UsageError
from dstune.evaluation.tasks import TasksFile


@pytest.mark.parametrize("name", recipes.names())
def test_a_recipe_loads(name: str, tmp_path: Path) -> None:
    run = load_run(recipes.write(tmp_path, name))
    assert isinstance(run.config, RunConfig)
    if recipes.tasks_text(name) is not None:
        assert load_model(tmp_path / "tasks.yaml", TasksFile).tasks


@pytest.mark.parametrize("name", recipes.names())
def test_a_recipe_says_what_it_is_for(name: str) -> None:
    assert recipes.text(name).startswith("# ")
    assert 20 < len(recipes.summary(name)) < 110
    assert all(len(line) <= 120 for line in recipes.text(name).splitlines())


def test_the_recipes_that_the_readme_names() -> None:
    assert {"quickstart", "laptop", "full-8b-single-node", "70b-slurm", "t5", "lora"} <= set(recipes.names())


def test_nothing_is_overwritten(tmp_path: Path) -> None:
    (tmp_path / "tasks.yaml").write_text("mine")
    with pytest.raises(UsageError, match=r"tasks\.yaml: exists already"):
        recipes.write(tmp_path, "quickstart")
    assert not (tmp_path / "run.yaml").exists()
    assert (tmp_path / "tasks.yaml").read_text() == "mine"


def test_an_unknown_recipe_names_its_neighbour(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="did you mean 'quickstart'"):
        recipes.write(tmp_path, "quikstart")
