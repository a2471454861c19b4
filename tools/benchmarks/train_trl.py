"""One worker of TRL's sides in `tools/bench train`: `SFTTrainer` on dstune's tokens, timed step by step."""

import json
import sys
import time
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl import SFTConfig, SFTTrainer, pack_dataset

from dstune.atomic import write_json
from dstune.batch import IGNORED
from dstune.config.load import load_run
from dstune.engine.construction import DTYPES, complete
from dstune.engine.world import World
from dstune.paths import RunPaths
from tools.benchmarks.measures import memory_bytes
from tools.benchmarks.train import DEFAULT, DEFAULT_BATCH, LR, PACKED, SEED, Work, work_of


class _Watched(SFTTrainer):
    """Keeps what each step's micro-batches had: TRL's own log has it rounded, and averaged over steps."""

    losses: list[torch.Tensor]
    tokens: list[int]

    def training_step(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> torch.Tensor:
        mask = inputs.get("attention_mask")
        self.tokens.append(int(inputs["input_ids"].numel() if mask is None else mask.sum()))
        loss = super().training_step(model, inputs, *args, **kwargs)
        self.losses.append(loss.detach().float())
        return loss


class _Clock(TrainerCallback):
    """When steps end. Before the first one the default side computes the loss of dstune's first step."""

    def __init__(self, trainer: _Watched, first: list[list[dict[str, Any]]]) -> None:
        self.trainer, self.first, self.loss = trainer, first, 0.0
        self.ends: list[float] = []

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        if self.first:
            self.loss = self._loss_of_first()
        self.ends.append(time.perf_counter())

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self.ends.append(time.perf_counter())

    def _loss_of_first(self) -> float:
        trainer, total = self.trainer, torch.zeros(())
        targets = sum(label != IGNORED for row in self.first for one in row for label in one["labels"][1:])
        for row in self.first[dist.get_rank() :: dist.get_world_size()]:
            batch = trainer._prepare_inputs(trainer.data_collator(row))
            with torch.no_grad():
                total += trainer.compute_loss(trainer.model_wrapped, batch, num_items_in_batch=torch.tensor(targets))
        trainer._total_train_tokens = 0
        trainer._metrics["train"].clear()
        dist.all_reduce(total)
        return total.item() / dist.get_world_size()


def main(side: str, run_directory: str, model: str, result: str, steps: int) -> None:
    world = World.from_environment()
    world.init()
    run = RunPaths(Path(run_directory))
    config = load_run(run.config).config
    work = work_of(run.root, steps)
    arguments = SFTConfig(**_settings(side, run, config, Path(result).with_suffix("")))
    # Behind SFTConfig: transformers then knows of ZeRO-3, and the weights are cut as they are read.
    module = AutoModelForCausalLM.from_pretrained(model, dtype=DTYPES[config.model.dtype], attn_implementation="sdpa")
    tokenizer = AutoTokenizer.from_pretrained(model)
    rows = _packed(work) if side == PACKED else _padded(work)
    trainer = _Watched(module, args=arguments, train_dataset=rows, processing_class=tokenizer)
    trainer.losses, trainer.tokens = [], []
    first = [[_labelled(work, number) for number in row] for row in work.rows()[0]] if side == DEFAULT else []
    clock = _Clock(trainer, first)
    trainer.add_callback(clock)
    trainer.train()
    micro = arguments.gradient_accumulation_steps
    losses, tokens = torch.stack(trainer.losses), torch.tensor(trainer.tokens)
    dist.all_reduce(losses)
    dist.all_reduce(tokens)
    if world.rank == 0:
        found = {
            "step_seconds": np.diff(clock.ends).tolist(),
            "losses": (losses.reshape(steps, micro).sum(1) / world.world_size).tolist(),
            "tokens": tokens.reshape(steps, micro).sum(1).tolist(),
            "loss_of_our_first_step": clock.loss,
            "peak_resident_bytes": memory_bytes("VmHWM"),
            "settings": {
                "packing": arguments.packing,
                "per_device_train_batch_size": arguments.per_device_train_batch_size,
                "gradient_checkpointing": arguments.gradient_checkpointing,
                "attention": module.config._attn_implementation,
            },
        }
        if side == PACKED:
            found["settings"] |= _own_packing(work, arguments.max_length)
        write_json(Path(result), found)
    dist.barrier()
    world.close()


def _settings(side: str, run: RunPaths, config: Any, folder: Path) -> dict[str, Any]:
    """`SFTConfig`'s arguments: what makes the comparison one, and else TRL's defaults; packing with what suits it."""
    dtype = DTYPES[config.model.dtype]
    ds_config = complete(json.loads(run.ds_config(1).read_text(encoding="utf-8")), dtype)
    ds_config |= {"train_micro_batch_size_per_gpu": "auto", "gradient_accumulation_steps": "auto"}
    shared = {
        "output_dir": str(folder),
        "max_length": config.data.max_length,
        "max_steps": config.train.max_steps,
        "learning_rate": LR,
        "lr_scheduler_type": "constant",
        "weight_decay": config.train.weight_decay,
        "max_grad_norm": config.train.max_grad_norm,
        "bf16": dtype is torch.bfloat16,
        "use_cpu": True,
        "deepspeed": ds_config,
        "seed": SEED,
        "train_sampling_strategy": "sequential",
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
    }
    if side == DEFAULT:
        return shared
    rows = config.train.global_batch_size // config.cluster.workers
    return shared | {
        "packing": True,
        "per_device_train_batch_size": 1,
        "gradient_accumulation_steps": rows,
        "gradient_checkpointing": False,
        "dataset_kwargs": {"skip_prepare_dataset": True},
    }


def _labelled(work: Work, number: int) -> dict[str, Any]:
    example = work.prepared.example(number)
    ids = np.asarray(example.input_ids, np.int64)
    return {"input_ids": ids.tolist(), "labels": np.where(example.loss_mask, ids, IGNORED).tolist()}


def _padded(work: Work) -> datasets.Dataset:
    size = DEFAULT_BATCH * work.plan.world_size
    return datasets.Dataset.from_list([_labelled(work, number) for step in work.batches(size) for number in step])


def _packed(work: Work) -> datasets.Dataset:
    """dstune's rows, as `pack_dataset` writes its own."""
    return datasets.Dataset.from_list([_joined(work, row) for rows in work.rows() for row in rows])


def _joined(work: Work, row: list[int]) -> dict[str, Any]:
    examples = [_labelled(work, number) for number in row]
    return {
        "input_ids": [token for one in examples for token in one["input_ids"]],
        "labels": [label for one in examples for label in one["labels"]],
        "seq_lengths": [len(one["input_ids"]) for one in examples],
    }


def _own_packing(work: Work, max_length: int | None) -> dict[str, Any]:
    """How many rows TRL makes of all the chats itself, beside ours."""
    datasets.disable_progress_bars()
    chats = datasets.Dataset.from_list([_labelled(work, number) for number in range(work.prepared.num_examples)])
    return {"rows_of_its_own_packing": len(pack_dataset(chats, max_length, "bfd")), "rows_of_ours": work.plan.num_rows}


if __name__ == "__main__":
    main(*sys.argv[1:5], int(sys.argv[5]))
