"""Plans: pure arithmetic from a config, the data's facts and a number of workers."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from dstune import api
from dstune.config.schema import RunConfig
from dstune.errors import ConfigError, FitError
from dstune.paths import RunPaths
from dstune.planning import deepspeed, plan


def config(**sections: object) -> RunConfig:
    value = {"name": "x", "model": {"path": "builtin:tiny-llama"}, "data": {"sources": [{"path": "a"}]}}
    return RunConfig.model_validate(value | sections)


FACTS = plan.DataFacts(
    directory=Path("/prepared"),
    fingerprint="f",
    num_rows=100,
    total_positions=250,
    has_validation=False,
    layout="packed",
)


def made(run: RunConfig, world_size: int) -> plan.Plan:
    return plan.make(
        run, Path("/"), FACTS, attempt=1, world_size=world_size, checkpoints=Path("/c"), resume_from=None, start_step=0
    )


@pytest.mark.parametrize(
    ("batch", "world", "asked", "micro", "micro_batches"),
    [
        (8, 1, 8, 8, 1),
        (8, 2, 4, 4, 1),
        (8, 1, 4, 4, 2),
        (8, 3, 2, 2, 2),
        (7, 2, 8, 4, 1),
        (8, 8, 4, 1, 1),
        (10, 3, 1, 1, 4),
    ],
)
def test_the_global_batch_is_shared_in_equal_numbers_of_micro_batches(
    batch: int, world: int, asked: int, micro: int, micro_batches: int
) -> None:
    result = made(config(train={"global_batch_size": batch, "micro_batch_size": asked}), world)
    assert (result.micro_batch_size, result.micro_batches) == (micro, micro_batches)
    assert result.micro_batch_size * result.micro_batches * world >= batch
    assert result.total_steps == -(-250 // batch)


def test_more_workers_than_rows_do_not_fit() -> None:
    with pytest.raises(FitError, match="4 rows for 5 workers"):
        made(config(train={"global_batch_size": 4}), 5)


def test_workers_that_share_rows_count_as_one() -> None:
    run = config(train={"global_batch_size": 8, "micro_batch_size": 2}, cluster={"workers": 4, "sequence_parallel": 2})
    alone = config(train={"global_batch_size": 8, "micro_batch_size": 2})
    one, two = made(run, 4), made(alone, 2)
    assert (one.sequence_parallel, one.micro_batch_size, one.micro_batches) == (2, 2, two.micro_batches)
    assert made(run, 16).micro_batches == 1
    with pytest.raises(FitError, match="8 rows for 18 workers in groups of 2"):
        made(run, 18)
    with pytest.raises(FitError, match="3 workers, of which 2 share each row"):
        made(run, 3)
    long = {"data": {"sources": [{"path": "a"}], "max_length": 4096}, "train": {"global_batch_size": 64}}
    assert plan.micro_batch_size(config(**long), 4) == 2
    assert plan.micro_batch_size(config(**long, cluster={"workers": 4, "sequence_parallel": 4}), 4) == 8


def test_workers_that_hold_the_model_between_them_count_as_one() -> None:
    run = config(train={"global_batch_size": 8, "micro_batch_size": 2}, cluster={"workers": 4, "tensor_parallel": 2})
    alone = config(train={"global_batch_size": 8, "micro_batch_size": 2})
    one, two = made(run, 4), made(alone, 2)
    assert (one.tensor_parallel, one.group, one.micro_batch_size, one.micro_batches) == (2, 2, 2, two.micro_batches)
    assert (one.preset, two.preset) == ("zero2", "zero3")
    with pytest.raises(FitError, match=r"tensor_parallel: 3 workers, of which 2 share each row"):
        made(run, 3)
    long = {"data": {"sources": [{"path": "a"}], "max_length": 4096}, "train": {"global_batch_size": 64}}
    assert plan.micro_batch_size(config(**long, cluster={"workers": 4, "tensor_parallel": 4}), 4) == 2  # all of each


@pytest.mark.parametrize("layout", ["padded", "seq2seq", "packed-seq2seq"])
def test_rows_that_are_not_packed_are_not_shared(layout: plan.Layout) -> None:
    run = config(train={"global_batch_size": 8}, cluster={"workers": 2, "sequence_parallel": 2})
    facts = replace(FACTS, layout=layout)
    with pytest.raises(ConfigError, match=f"rows of the layout {layout}"):
        plan.make(
            run, Path("/"), facts, attempt=1, world_size=2, checkpoints=Path("/c"), resume_from=None, start_step=0
        )


def test_a_plan_is_read_back_as_it_was_written(tmp_path: Path) -> None:
    paths = RunPaths(tmp_path)
    one = made(config(train={"global_batch_size": 4}), 2)
    plan.write(one, {"zero_optimization": {"stage": 3}}, paths)
    assert plan.Plan.read(paths.plan(1)) == one
    assert json.loads(paths.ds_config(1).read_text())["zero_optimization"]["stage"] == 3


def test_presets_and_overrides_become_a_whole_deepspeed_config() -> None:
    value = deepspeed.make(
        config(deepspeed={"preset": "zero2", "overrides": {"zero_optimization": {"overlap_comm": False}}}), Path("/")
    )
    assert value["zero_optimization"]["stage"] == 2
    assert value["zero_optimization"]["overlap_comm"] is False
    assert value["bf16"]["enabled"]
    assert value["gradient_clipping"] == 1.0
    assert deepspeed.make(config(), Path("/"))["zero_optimization"]["stage"] == 3


@pytest.mark.parametrize(
    ("section", "words"),
    [
        ({"preset": "none.json"}, "no such file\n    looked for /none.json"),
        ({"overrides": {"zero_optimisation": {}}}, "did you mean 'zero_optimization'"),
        ({"overrides": {"train_batch_size": 8}}, "set train.global_batch_size"),
        ({"overrides": {"optimizer": {"type": "Adam"}}}, "set train.optimizer"),
        (
            {"overrides": {"zero_optimization": {"reduce_bucket_size": "auto"}}},
            "zero_optimization.reduce_bucket_size is 'auto'",
        ),
    ],
)
def test_what_deepspeed_would_ignore_silently_is_refused(section: dict[str, object], words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        deepspeed.make(config(deepspeed=section), Path("/"))
    assert words in str(caught.value)


@pytest.mark.parametrize("optimizer", ["adafactor", "adamw8bit"])
def test_states_of_other_shapes_are_not_swapped(optimizer: str, tmp_path: Path) -> None:
    overrides = {"zero_optimization": {"offload_optimizer": {"nvme_path": str(tmp_path)}}}
    section = {"preset": "zero3-nvme", "overrides": overrides}
    assert deepspeed.make(config(deepspeed=section), tmp_path)
    with pytest.raises(
        ConfigError, match=rf"offload_optimizer.device: 'nvme' with train.optimizer {optimizer}.*none or cpu"
    ):
        deepspeed.make(config(deepspeed=section, train={"optimizer": optimizer}), tmp_path)
    offloaded = config(deepspeed={"preset": "zero3-offload-optimizer"}, train={"optimizer": optimizer})
    assert deepspeed.make(offloaded, tmp_path)


def test_a_tokenizer_of_another_model_is_found_before_training(tmp_path: Path) -> None:
    run = tmp_path / "run.yaml"
    run.write_text(
        "name: x\nmodel: {path: builtin:tiny-llama, overrides: {vocab_size: 300}}\n"
        "data: {sources: [{path: builtin:instructions, limit: 50}], max_length: 128, num_processes: 1}\n"
    )
    with pytest.raises(ConfigError, match="the model has embeddings for 300"):
        api.train(run)
    assert not (tmp_path / "runs").exists()
