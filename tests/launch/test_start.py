"""What is found to be wrong with a run before anything slow is done for it."""

from pathlib import Path

import pytest

from dstune.config.load import load_run
from dstune.errors import ConfigError
from dstune.launch import start

_RUN = "name: t\nmodel: {path: builtin:tiny-llama}\ndata: {sources: [{path: builtin:instructions}]}\ncheckpoint: {best: loss}\n"


def test_a_best_checkpoint_wants_something_to_be_judged_by(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text(_RUN)
    with pytest.raises(ConfigError, match="no rows are held out"):
        start.check(load_run(tmp_path / "run.yaml"))
    start.check(load_run(tmp_path / "run.yaml", ["data.validation=0.1"]))


def test_a_kernel_that_there_is_not_is_found_before_the_data_is_prepared(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text(_RUN)
    start.check(load_run(tmp_path / "run.yaml", ["data.validation=0.1", "model.kernels=[rotary]"]))
    with pytest.raises(ConfigError, match=r"(?s)'rotery' is no kernel.*did you mean 'rotary'"):
        start.check(load_run(tmp_path / "run.yaml", ["model.kernels={rotery: false}"]))
