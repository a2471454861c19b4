"""DeepSpeed's own checkpoints: imported, they go on as DeepSpeed itself would, to the last digit; what is torn or mixed is named."""

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import dstune
from dstune.checkpoint.deepspeed_files import DeepSpeedCheckpoint
from dstune.checkpoint.importer import commit_shards
from dstune.checkpoint.reader import Reader
from dstune.checkpoint.resolve import newest_whole
from dstune.checkpoint.restricted import load
from dstune.config.load import load_run
from dstune.engine.construction import complete, construction
from dstune.engine.world import World
from dstune.engine.zero import ZeroEngine
from dstune.errors import CheckpointError, UsageError
from dstune.launch.importing import targets
from dstune.model.build import build, skeleton
from dstune.model.config import load_config
from dstune.paths import RunPaths, step_directory
from dstune.protocols import Slice
from tests.engine import tiny
from tests.runs.tiny import drive, write_run
from tests.spawn import read_lines, run_workers

pytestmark = pytest.mark.dist

CASES: dict[str, dict[str, Any]] = {
    "zero3": {"stage": 3},
    "zero2": {"stage": 2, "tied": True},
    "zero1": {"stage": 1},
    "zero3-frozen": {"stage": 3, "frozen": True},
}
STEP = 3
LATER = range(STEP, STEP + 2)
_REST = {"consecutive_hysteresis": False, "raise_error_at_min_scale": True}
LR, BETAS, DECAY = 1e-3, (0.9, 0.95), 0.1


def _module(stage: int, tied: bool = False, frozen: bool = False) -> Any:
    with construction(tiny.ds_config(stage), torch.bfloat16):
        module = tiny.build(tied)
    module.get_input_embeddings().weight.requires_grad_(not frozen)
    return module


class _Plain:
    """DeepSpeed as anybody uses it, with what `tiny.train` asks of an engine."""

    def __init__(self, module: torch.nn.Module, stage: int) -> None:
        import deepspeed

        trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
        shapes = [tuple(getattr(parameter, "ds_shape", parameter.shape)) for parameter in trained]
        matrices = [one for one, shape in zip(trained, shapes, strict=True) if len(shape) > 1]
        vectors = [one for one, shape in zip(trained, shapes, strict=True) if len(shape) < 2]
        groups = [{"params": matrices, "weight_decay": DECAY}, {"params": vectors, "weight_decay": 0.0}]
        adamw = torch.optim.AdamW(groups, lr=LR, betas=BETAS, fused=True)
        config = complete(tiny.ds_config(stage), trained[0].dtype)
        self.module, *_ = deepspeed.initialize(
            model=module, optimizer=adamw, config=config, dist_init_required=False
        )  # fmt: skip

    def backward(self, loss: torch.Tensor, last: bool) -> None:
        self.module.set_gradient_accumulation_boundary(last)
        self.module.backward(loss, scale_wrt_gas=False)

    def step(self, lr: float) -> None:
        self.module.step()


def saved(root: Path, cases: dict[str, dict[str, Any]], run_file: Path | None = None) -> None:
    """Train each case and save it twice (the newer save is what `latest` names); one more of a run's own model."""
    world = World.from_environment()
    world.init(60)
    for name, settings in cases.items():
        engine: Any = _Plain(_module(**settings), settings["stage"])
        tiny.train(engine, world, range(STEP))
        engine.module.save_checkpoint(str(root / name), tag="mine")
        tiny.train(engine, world, range(STEP, STEP + 1))
        engine.module.save_checkpoint(str(root / name))
        _consolidate(root / name, world)
    if run_file is not None:
        from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler

        scaler = DynamicLossScaler(init_scale=512.0, scale_window=100, min_scale=1.0, delayed_shift=2, **_REST)
        torch.save({"loss_scaler": scaler}, root / "scaler.pt")
        loaded = load_run(run_file)
        module = build(loaded.config.model, loaded.base, "sdpa", 1, tiny.ds_config(3))
        engine = _Plain(module, 3)
        tiny.train(engine, world, range(STEP))
        engine.module.save_checkpoint(str(root / "run"))
        _consolidate(root / "run", world)
    world.close()


def _consolidate(directory: Path, world: World) -> None:
    """What DeepSpeed's own script makes of its checkpoint (ZeRO-1 in bf16 it does not know)."""
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    if world.rank == 0 and directory.name != "zero1":
        state = get_fp32_state_dict_from_zero_checkpoint(str(directory))
        torch.save({name: value.clone() for name, value in state.items()}, directory / "fp32.pt")


def continued(root: Path, cases: dict[str, dict[str, Any]]) -> dict[str, tuple[list[str], list[str]]]:
    """The next losses of DeepSpeed's own load_checkpoint, and of our engine on what was imported."""
    world = World.from_environment()
    world.init(60)
    losses: dict[str, tuple[list[str], list[str]]] = {}
    for name, settings in cases.items():
        plain: Any = _Plain(_module(**settings), settings["stage"])
        plain.module.load_checkpoint(str(root / name), tag="mine")
        theirs = tiny.train(plain, world, LATER)
        engine = ZeroEngine(
            _module(**settings),
            lr=LR,
            betas=BETAS,
            eps=1e-8,
            weight_decay=DECAY,
            ds_config=tiny.ds_config(settings["stage"]),
            world=world,
        )
        reader = Reader(step_directory(root / name / "imported", STEP))
        engine.load(reader.fill, reader.state["optimizer_steps"])
        ours = tiny.train(engine, world, LATER, lr=LR)
        losses[name] = [repr(loss) for loss in theirs], [repr(loss) for loss in ours]
    world.close()
    return losses


def imported(source: DeepSpeedCheckpoint, checkpoints: Path) -> Reader:
    """The files alone, under DeepSpeed's own names."""

    def slices(rank: int) -> Iterator[Slice]:
        for piece in source.pieces(rank):
            for state, tensor in piece.states.items():
                yield Slice(state, piece.name, source.shapes[piece.name], piece.offset, tensor)

    shards = [lambda rank=rank: slices(rank) for rank in range(source.world_size)]
    state = {"optimizer_steps": source.optimizer_steps}
    commit_shards(checkpoints, source.global_steps, shards, state, {})
    found, passed_over = newest_whole(checkpoints)
    assert found is not None and not passed_over
    return Reader(found.directory)


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("two")
    run_workers(saved, 2, root, CASES)
    for name in CASES:
        imported(DeepSpeedCheckpoint(root / name, "mine"), root / name / "imported")
    return root


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("one")
    run_workers(saved, 1, root, {"zero2": CASES["zero2"]}, write_run(root / "model"))
    imported(DeepSpeedCheckpoint(root / "zero2", "mine"), root / "zero2/imported")
    return root


def test_the_next_losses_are_deepspeeds_own_to_the_last_digit(one: Path, two: Path) -> None:
    for theirs, ours in [
        *run_workers(continued, 2, two, CASES)[0].values(),
        *run_workers(continued, 1, one, {"zero2": CASES["zero2"]})[0].values(),
    ]:
        assert ours == theirs and len(set(ours)) == len(LATER)


@pytest.mark.parametrize("case", [name for name in CASES if name != "zero1"])
def test_weights_are_those_of_zero_to_fp32(two: Path, tmp_path: Path, case: str) -> None:
    source = DeepSpeedCheckpoint(two / case)
    reader = imported(source, tmp_path)
    assert (source.global_steps, source.optimizer_steps, source.batch_size) == (STEP + 1, STEP + 1, 2)
    assert source.states == tuple(reader.manifest.tensors) == ("fp32", "exp_avg", "exp_avg_sq")
    theirs = torch.load(two / case / "fp32.pt", weights_only=True)
    for name, shape in reader.tensors("fp32").items():
        assert torch.equal(reader.read("fp32", name).view(shape), theirs.pop(name)), name
        assert reader.read("exp_avg_sq", name).max() > 0
    for name in source.frozen:
        assert torch.equal(source.frozen_weight(name).float(), theirs.pop(name).float()), name
    assert set(theirs) == set(source.shared)
    assert source.shared == ({"lm_head.weight": "model.embed_tokens.weight"} if case == "zero2" else {})


def _rank(rank: int, directory: Path, kind: str = "optim") -> Path:
    (file,) = directory.glob(f"*zero_pp_rank_{rank}_mp_rank_00_{kind}_states.pt")
    return file


@pytest.mark.parametrize("case", ["zero3", "zero2", "zero1"])
def test_what_is_torn_or_mixed_is_refused_by_name(two: Path, tmp_path: Path, case: str) -> None:
    def copy(name: str) -> Path:
        return Path(shutil.copytree(two / case / "mine", tmp_path / name))

    torn = copy("torn")
    _rank(1, torn).unlink()
    with pytest.raises(CheckpointError, match=r"rank_1_.*optim_states\.pt: is missing"):
        DeepSpeedCheckpoint(torn)
    larger = copy("larger")
    shutil.copy(_rank(1, larger), larger / _rank(1, larger).name.replace("rank_1_", "rank_2_"))
    with pytest.raises(CheckpointError, match=r"rank_2_.*is a file of rank 2"):
        DeepSpeedCheckpoint(larger)
    mixed = copy("mixed")
    shutil.copy(_rank(1, two / case / f"global_step{STEP + 1}"), _rank(1, mixed))
    with pytest.raises(CheckpointError, match=f"rank_1_.*made {STEP + 1} updates, rank 0's {STEP}"):
        DeepSpeedCheckpoint(mixed)
    modelless = copy("modelless")
    next(modelless.glob("*mp_rank_00_model_states.pt")).unlink()
    with pytest.raises(CheckpointError, match=r"mp_rank_00_model_states\.pt: is missing"):
        DeepSpeedCheckpoint(modelless)
    flipped = copy("flipped")
    content = bytearray(_rank(1, flipped).read_bytes())
    content[len(content) // 2] ^= 1
    _rank(1, flipped).write_bytes(content)
    with pytest.raises(CheckpointError, match=r"rank_1_.*is damaged"):
        imported(DeepSpeedCheckpoint(flipped), tmp_path / "none")
    assert list((tmp_path / "none").iterdir()) == []


def test_another_worlds_and_another_models_files_are_refused(one: Path, two: Path, tmp_path: Path) -> None:
    mixed = Path(shutil.copytree(two / "zero2" / "mine", tmp_path / "mixed"))
    shutil.copy(next((one / "zero2" / "mine").glob("mp_rank_00_model*")), mixed)
    with pytest.raises(CheckpointError, match="is of 1 workers, the optimizer's files are of 2"):
        DeepSpeedCheckpoint(mixed)
    with pytest.raises(CheckpointError, match=r"no directory for the tag 'other'.*mine"):
        DeepSpeedCheckpoint(two / "zero2", "other")
    with pytest.raises(CheckpointError, match="no `latest`"):
        DeepSpeedCheckpoint(tmp_path)
    run = write_run(tmp_path / "run")
    with pytest.raises(CheckpointError, match="shape"):
        dstune.import_deepspeed(run, two / "zero3")
    assert not (tmp_path / "run" / "runs").exists()


def test_a_run_goes_on_from_it_and_gives_it_back(one: Path, tmp_path: Path) -> None:
    run = write_run(tmp_path, train={"max_steps": STEP + 1}, cluster={"workers": 1})
    with pytest.raises(UsageError, match="this run ends at step 4"):
        dstune.import_deepspeed(run, one / "run", step=STEP + 1)
    made = dstune.import_deepspeed(run, one / "run")
    paths = RunPaths(Path(made["run"]))
    assert (made["step"], made["optimizer_steps"], made["position"], made["stage"]) == (STEP, STEP, STEP * 4, 3)
    assert "cannot be known" in made["notes"][0] and "DeepSpeed's steps took 1 rows" in made["notes"][1]
    theirs = torch.load(one / "run" / "fp32.pt", weights_only=True)
    assert set(Reader(Path(made["checkpoint"])).tensors("fp32")) == set(theirs) - {"lm_head.weight"}
    with pytest.raises(UsageError, match="history of its own"):
        dstune.import_deepspeed(run, one / "run")

    plain = dstune.export(run, tmp_path / "fp32", to="deepspeed-fp32", max_shard_size="150KB", threads=3)
    files = list(plain.glob("model-*-of-*.safetensors"))
    assert len(files) == 3 and all(
        file.stat().st_size < 200_000 for file in files
    )  # the embedding is larger, and alone
    ours = {name: value for file in files for name, value in load_file(file).items()}
    dstune.export(run, tmp_path / "bin", to="deepspeed-fp32-bin")
    pickled = torch.load(tmp_path / "bin" / "pytorch_model.bin", weights_only=True)
    assert set(theirs) == set(pickled) == {*ours, "lm_head.weight"}  # a tied weight is once in safetensors
    for name, value in theirs.items():
        assert torch.equal(pickled[name], value), name
        assert torch.equal(ours.get(name, ours["model.embed_tokens.weight"]), value), name

    assert drive(paths.root, 1, new=False).state == "succeeded"
    assert [record["step"] for record in read_lines(paths.metrics)] == [STEP + 1]


def test_fp16s_loss_scale_is_read_without_deepspeeds_code(one: Path) -> None:
    scaler = vars(load(one / "scaler.pt")["loss_scaler"])
    kept = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")
    assert [scaler[key] for key in kept] == [512.0, 0, -1, 2]


def test_a_run_may_begin_its_data_with_it(one: Path, tmp_path: Path) -> None:
    made = dstune.import_deepspeed(write_run(tmp_path, train={"ema": 0.9}), one / "run", step=0)
    assert (made["step"], made["optimizer_steps"], made["position"]) == (0, STEP, 0)
    assert newest_whole(Path(made["run"]) / "checkpoints")[0] is not None
    reader = Reader(Path(made["checkpoint"]))
    (name, *_) = reader.tensors("fp32")
    assert torch.equal(reader.read("ema", name), reader.read("fp32", name))  # an average begins at the weights


def test_wrappers_prefixes_are_taken_off_and_foreign_names_refused(tmp_path: Path) -> None:
    loaded = load_run(write_run(tmp_path))
    outline = skeleton(load_config(loaded.config.model, loaded.base), loaded.config.model)
    own = [name for name, _ in outline.named_parameters()]
    for prefix in ("", "module.", "base_model.model."):
        found = targets([prefix + name for name in own], outline, tmp_path)
        assert found == {prefix + name: name for name in own}
    with pytest.raises(CheckpointError, match=r"has module\.other\.weight"):
        targets([*(f"module.{name}" for name in own), "module.other.weight"], outline, tmp_path)
