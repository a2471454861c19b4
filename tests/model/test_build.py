"""Models built on several workers: the same weights whatever the world and the ZeRO stage, each worker reading only its own."""

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, PreTrainedModel

from dstune.config.schema import ModelSection
from dstune.data.tokenizer_files import BUILTIN_DIRECTORY
from dstune.engine.parameters import full_shape, local_piece
from dstune.engine.world import World
from dstune.engine.zero import ZeroEngine
from dstune.errors import ConfigError
from dstune.model.build import build, checkpoint_activations, checkpoint_names, masters_from_files, skeleton
from dstune.model.config import load_config
from dstune.model.freezing import frozen_digest
from dstune.model.names import Conversion
from dstune.model.open import open_module
from dstune.model.weights import WeightFiles
from tests.model.architectures import tiny, tiny_config, tiny_of
from tests.spawn import run_workers

SEED = 11


def whole_weights(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Every parameter in full, from all workers' pieces."""
    result: dict[str, torch.Tensor] = {}
    for name, parameter in module.named_parameters():
        parts: list = [None] * dist.get_world_size()
        with local_piece(parameter) as piece:
            dist.all_gather_object(parts, (piece.start, piece.tensor.clone()))
        flat = torch.zeros(torch.Size(full_shape(parameter)).numel(), dtype=parameter.dtype)
        for start, tensor in parts:
            flat[start : start + len(tensor)] = tensor
        result[name] = flat.view(full_shape(parameter))
    return result


def digest(tensors: dict[str, torch.Tensor]) -> str:
    sha = hashlib.sha256()
    for name, tensor in tensors.items():
        sha.update(name.encode() + tensor.contiguous().view(torch.uint8).numpy().tobytes())
    return sha.hexdigest()


def random_digests(folder: Path) -> dict[str, str]:
    World.from_environment().init()
    found: dict[str, str] = {}
    for stage in (1, 2, 3):
        for path in ("builtin:tiny-llama", "builtin:tiny-t5", str(folder / "gpt2")):
            section = ModelSection(path=path, init="random")
            module = build(section, Path(), "eager", SEED, {"zero_optimization": {"stage": stage}})
            found[f"{path} on stage {stage}"] = digest(whole_weights(module))
            assert all(buffer.dtype is not torch.bfloat16 for buffer in module.buffers())
    return found


@pytest.mark.dist
def test_random_weights_are_the_same_on_every_world_and_stage(tmp_path):
    tiny("gpt2").config.save_pretrained(tmp_path / "gpt2")
    results = [found for world_size in (1, 2, 3) for found in run_workers(random_digests, world_size, tmp_path)]
    assert len(results) == 6
    assert all(found == results[0] for found in results)
    by_path = {name.split(" on ")[0] for name in results[0]}
    # Three models, each with one digest over its three stages.
    assert len(set(results[0].values())) == len(by_path) == 3


ARCHITECTURES = ("llama", "llama-tied", "gpt2", "mixtral", "qwen3_moe", "t5", "bart")


NEW = ["kilopascal", "hectopascal", "millibar"]
BEFORE, AFTER = 666, 669
"""Tokens of the builtin tokenizer, and with the new ones."""
GROWN = {"llama": BEFORE, "t5": BEFORE, "t5-gated": 668, "bart": BEFORE, "phi": BEFORE, "qwen3": 1000, "gemma3": BEFORE}
"""Rows in each model's files: too few (tied, with a head of its own, with a bias, part of a larger model), or with room to spare."""


def grown(name: str) -> PreTrainedModel:
    """A model with that many rows; saved below its own name."""
    config = tiny_config(name)
    config.get_text_config().vocab_size = GROWN[name]
    return tiny_of(config)


def assert_mean_rows(name: str, found: dict[str, torch.Tensor]) -> None:
    """As transformers' own `resize_token_embeddings`, but for the draw around the mean."""
    expected = grown(name)
    if GROWN[name] < AFTER:
        expected.resize_token_embeddings(AFTER, mean_resizing=False)
    tables = [expected.get_input_embeddings().weight, *expected.get_output_embeddings().parameters()]
    with torch.no_grad():
        for table in {id(table): table for table in tables}.values():
            table[BEFORE:AFTER] = table[:BEFORE].double().mean(0).float()
    for key, wanted in expected.named_parameters():
        assert torch.allclose(found[key], wanted, rtol=0, atol=1e-8), (name, key)
        assert torch.equal(found[key][:BEFORE], wanted[:BEFORE])


def load_all(folder: Path) -> dict[str, list]:
    """Per architecture: digest of the weights, and how many bytes this worker read."""
    World.from_environment().init()
    found = {}
    counted = [0]

    def counting(read):
        def counted_read(*given):
            tensor = read(*given)
            counted[0] += tensor.numel()
            return tensor

        return counted_read

    WeightFiles.read_range, WeightFiles.read = counting(WeightFiles.read_range), counting(WeightFiles.read)
    for name in ARCHITECTURES:
        counted[0] = 0
        section = ModelSection(path=str(folder / name), dtype="fp32")
        module = build(section, Path(), "eager", SEED, {"zero_optimization": {"stage": 3}})
        found[name] = [digest(whole_weights(module)), counted[0]]
    for name in GROWN:
        path, own = folder / f"{name}-grown", str(BUILTIN_DIRECTORY)
        section = ModelSection(path=str(path), dtype="fp32", tokenizer=own, new_tokens=NEW)
        found[path.name] = [whole_weights(build(section, Path(), "eager", SEED, {"zero_optimization": {"stage": 3}}))]
    return found


@pytest.mark.dist
def test_pretrained_weights_are_read_slice_by_slice_and_equal_transformers_own(tmp_path):
    expected, sizes = {}, {}
    for name in ARCHITECTURES:
        model = tiny(name)
        model.save_pretrained(tmp_path / name, max_shard_size="20KB")
        expected[name] = digest({key: value.detach() for key, value in model.named_parameters()})
        sizes[name] = sum(parameter.numel() for parameter in model.parameters())
    for name in GROWN:
        grown(name).save_pretrained(tmp_path / f"{name}-grown", max_shard_size="20KB")
    first: dict = {}
    for world_size in (2, 3):
        for found in run_workers(load_all, world_size, tmp_path):
            assert {name: value[0] for name, value in found.items() if name in expected} == expected
            for name in GROWN:
                weights = found[f"{name}-grown"][0]
                assert_mean_rows(name, weights)
                assert digest(weights) == first.setdefault(name, digest(weights)), "the same on every world"
            # Of a model whose tensors are only renamed, each worker reads its share.
            assert found["llama"][1] <= sizes["llama"] / world_size + 100
            # Of a mixture too, with the rest of the experts that this begins or ends in: of 4 on 3 workers two thirds of one, in 2 layers.
            for name, expert in (("mixtral", 3 * 32 * 48), ("qwen3_moe", 3 * 32 * 16)):
                rest = 2 * expert * 2 / 3 if world_size == 3 else 0
                assert found[name][1] <= sizes[name] / world_size + rest + 100, name


@pytest.fixture
def single_worker():
    World().init()
    yield
    dist.destroy_process_group()


def section(path: Path, **settings: object) -> ModelSection:
    return ModelSection(path=str(path), dtype="fp32", **settings)


def stage(number: int) -> dict:
    return {"zero_optimization": {"stage": number}}


@pytest.mark.parametrize("name", ["dots1", "deepseek_v4"])
def test_what_an_architecture_keeps_in_fp32_beside_its_weights_is_not_rounded(name, tmp_path, single_worker):
    model = tiny(name)
    buffers = {key: value for key, value in model.named_buffers() if "correction" in key}
    for value in buffers.values():
        value.uniform_(0, 1)
    model.save_pretrained(tmp_path)
    found = build(ModelSection(path=str(tmp_path)), Path(), "eager", SEED, stage(3))
    assert found.dtype is torch.bfloat16 and buffers
    for key, value in buffers.items():
        assert torch.equal(found.get_buffer(key), value)


def test_wrong_weights_are_named(tmp_path, single_worker):
    tiny("llama").save_pretrained(tmp_path / "model")

    def refusal(change, **settings) -> str:
        shutil.rmtree(tmp_path / "copy", ignore_errors=True)
        shutil.copytree(tmp_path / "model", tmp_path / "copy")
        change(tmp_path / "copy")
        with pytest.raises(ConfigError) as caught:
            build(section(tmp_path / "copy", **settings), Path(), "eager", SEED, stage(1))
        return str(caught.value)

    def without(*names: str):
        def change(folder: Path) -> None:
            tensors = {key: value for key, value in load_file(folder / "model.safetensors").items() if key not in names}
            save_file(tensors, folder / "model.safetensors")

        return change

    def pickled(folder: Path) -> None:
        (folder / "model.safetensors").rename(folder / "pytorch_model.bin")

    def escaping(folder: Path) -> None:
        shutil.copy(folder / "model.safetensors", tmp_path / "outside.safetensors")
        index = {"weight_map": dict.fromkeys(load_file(folder / "model.safetensors"), "../outside.safetensors")}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))

    def truncated(folder: Path) -> None:
        whole = (folder / "model.safetensors").read_bytes()
        (folder / "model.safetensors").write_bytes(whole[: len(whole) // 2])

    def quantised(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text()) | {"quantization_config": {"quant_method": "fp8"}}
        (folder / "config.json").write_text(json.dumps(config))

    assert "lm_head.weight" in refusal(without("lm_head.weight"), adapter={"rank": 2})
    assert "model.norm.weight" in refusal(without("model.norm.weight"))
    assert "shape [1000, 32]" in refusal(lambda folder: None, overrides={"vocab_size": 900})
    assert "pickle" in refusal(pickled) and "save_pretrained" in refusal(pickled)
    assert "../outside.safetensors" in refusal(escaping)
    assert "cannot be read" in refusal(truncated)
    assert "no weights" in refusal(lambda folder: (folder / "model.safetensors").unlink())
    assert "quantised" in refusal(quantised)
    assert "index" in refusal(lambda folder: (folder / "model.safetensors.index.json").write_text("[]"))


def test_what_the_files_lack_is_drawn_or_read_by_transformers_with_a_warning(
    tmp_path, single_worker, caplog, monkeypatch
):
    model = tiny("mixtral")
    model.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    save_file({key: value for key, value in weights.items() if key != "lm_head.weight"}, tmp_path / "model.safetensors")
    heads = []
    for number in (1, 3):
        loaded = build(section(tmp_path), Path(), "eager", SEED, stage(number))
        heads.append(whole_weights(loaded).pop("lm_head.weight"))
        assert 0.01 < float(heads[-1].std()) < 0.03 and not torch.equal(heads[-1], model.lm_head.weight)
    assert torch.equal(*heads) and "has no lm_head.weight: it begins with random weights" in caplog.text
    loaded.lm_head.weight.requires_grad_(False)
    with pytest.raises(ConfigError, match="leaves the head as it was drawn"):
        frozen_digest(loaded, WeightFiles(tmp_path))

    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    monkeypatch.setattr(Conversion, "run", lambda *_: torch.zeros(1).view(2))  # an operation that does not fit
    loaded = build(section(tmp_path), Path(), "eager", SEED, stage(3))
    found = whole_weights(loaded)
    assert all(torch.equal(found[name], wanted) for name, wanted in model.named_parameters())
    assert "every worker reads the whole model now" in caplog.text


@pytest.mark.parametrize("name", ["marian", "pegasus"])
def test_positions_that_the_architecture_makes_itself_need_no_file(name, tmp_path, single_worker):
    """`save_pretrained` leaves Marian's out, and Pegasus' files on the hub are older than the version that writes them."""
    model = tiny(name)
    model.save_pretrained(tmp_path)
    weights = {key: value for key, value in load_file(tmp_path / "model.safetensors").items() if "positions" not in key}
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    for number in (1, 3):
        found = whole_weights(build(section(tmp_path), Path(), "eager", SEED, stage(number)))
        for key, wanted in model.named_parameters():
            assert torch.equal(found[key], wanted), key
    opened, _ = open_module(section(tmp_path), Path(), "cpu")
    assert all(torch.equal(*pair) for pair in zip(opened.parameters(), model.parameters(), strict=True))


def test_a_file_with_tied_names_and_one_of_a_bare_base_model(tmp_path, single_worker):
    """GPT-2 on the hub has no `transformer.` before its names; old tied files hold both names of the embedding."""
    model = tiny("gpt2")
    tensors = {
        key.removeprefix("transformer."): value for key, value in model.state_dict().items() if "lm_head" not in key
    }
    folder = tmp_path / "bare"
    model.config.save_pretrained(folder)
    save_file(tensors, folder / "model.safetensors")
    loaded = build(section(folder), Path(), "eager", SEED, stage(1))
    assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), model.parameters(), strict=True))
    both = {key: value.clone() for key, value in model.state_dict().items()}
    save_file(both, folder / "model.safetensors")
    loaded = build(section(folder), Path(), "eager", SEED, stage(1))
    assert loaded.lm_head.weight is loaded.transformer.wte.weight
    assert torch.equal(loaded.lm_head.weight, model.lm_head.weight)


def test_a_built_model_computes_what_transformers_computes(tmp_path, single_worker):
    tiny("llama").save_pretrained(tmp_path / "model")
    ids = torch.arange(20)[None]
    expected = AutoModelForCausalLM.from_pretrained(tmp_path / "model")(input_ids=ids).logits
    built = build(section(tmp_path / "model"), Path(), "sdpa", SEED, stage(1)).eval()
    assert torch.equal(built(input_ids=ids).logits, expected)


def test_activation_checkpointing_changes_no_gradient(tmp_path, single_worker):
    gradients = []
    for on in (False, True, "offload"):
        module = build(
            ModelSection(path="builtin:tiny-llama", dtype="fp32", activation_checkpointing=on),
            Path(),
            "sdpa",
            SEED,
            stage(1),
        )
        module(input_ids=torch.arange(30)[None], use_cache=False).logits.square().sum().backward()
        gradients.append([parameter.grad for parameter in module.parameters()])
        assert module.is_activation_checkpointing is bool(on)
    for kept, again, offloaded in zip(*gradients, strict=True):
        assert torch.equal(kept, again) and torch.equal(kept, offloaded)


def test_what_is_frozen_below_all_that_is_trained_is_not_computed_again():
    module = tiny("llama").train()
    layers: Any = module.base_model
    layers.embed_tokens.requires_grad_(False)
    layers.layers[0].requires_grad_(False)
    checkpoint_activations(module)
    wants: list[bool] = []
    layers.layers[0].register_forward_hook(lambda *given: wants.append(given[-1].requires_grad))
    module(input_ids=torch.arange(9)[None], use_cache=False).logits.sum().backward()
    assert wants == [False]


@pytest.mark.parametrize("gpu", [False, True])
def test_layers_inputs_leave_the_gpu_where_there_is_one(gpu, monkeypatch):
    module, asked = tiny("llama"), []
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: gpu)
    monkeypatch.setattr(module, "activation_checkpointing_enable", lambda **settings: asked.append(settings["offload"]))
    for offload in (False, True):
        checkpoint_activations(module, offload)
    assert asked == [False, gpu]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="wants a GPU")
def test_offloaded_inputs_free_the_gpu():
    ids = torch.zeros(4, 512, dtype=torch.long, device="cuda")
    peaks, gradients = [], []
    for offload in (False, True):
        module = tiny("llama").cuda().train()
        checkpoint_activations(module, offload)
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        logits = module(input_ids=ids, use_cache=False, logits_to_keep=1).logits
        peaks.append(torch.cuda.memory_allocated())
        logits.square().sum().backward()
        gradients.append([parameter.grad.cpu() for parameter in module.parameters()])
    assert peaks[1] < peaks[0]
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_a_skeleton_has_names_and_no_storage():
    model = ModelSection(path="builtin:tiny-llama")
    outline = skeleton(load_config(model, Path()), model)
    assert all(parameter.is_meta for parameter in outline.parameters())
    assert outline.lm_head.weight is outline.model.embed_tokens.weight


def _rates(folder: str) -> tuple[list[float], float]:
    World.from_environment().init()
    section = ModelSection(path=folder, init="random")
    module = build(section, Path(), "eager", SEED, {"zero_optimization": {"stage": 3}})
    kept = [part.layerdrop for part in module.modules() if hasattr(part, "layerdrop")]
    return kept, module.config.decoder_layerdrop


@pytest.mark.dist
def test_no_worker_leaves_a_layer_out_at_random(tmp_path: Path) -> None:
    config = tiny_config("bart")
    config.encoder_layerdrop = config.decoder_layerdrop = 0.5
    config.save_pretrained(tmp_path)
    ((rates, in_config),) = run_workers(_rates, 1, str(tmp_path))
    assert rates == [0.0, 0.0]
    assert in_config == 0.5


def load_exactly(folder: Path, stages: list[int]) -> list[list[Any]]:
    """Per stage: masters of this worker that are not the file's own value, before and after; whether the forward weights stay."""
    world = World.from_environment()
    world.init()
    files, found = WeightFiles(folder), []
    section = ModelSection(path=str(folder))
    for stage in stages:
        config = {"zero_optimization": {"stage": stage}}
        module = build(section, Path(), "eager", SEED, config)
        before = digest(whole_weights(module))
        names = checkpoint_names(module, section)
        engine = ZeroEngine(module, lr=1e-3, ds_config=config, world=world, optimizer="sgd", momentum=0.9, names=names)
        exact = masters_from_files(engine.module.module, section, Path())
        assert exact is not None
        rounded = [piece.name for piece in engine.slices() if piece.state == "fp32" and apart(piece, files)]
        engine.load(exact, 0)
        left = [piece.name for piece in engine.slices() if piece.state == "fp32" and apart(piece, files)]
        found.append([rounded, left, digest(whole_weights(engine.module.module)) == before])
    world.close()
    return found


def apart(piece: Any, files: WeightFiles) -> bool:
    own = files.read_range(piece.name, piece.offset, piece.offset + len(piece.tensor)).float()
    return not torch.equal(piece.tensor.cpu(), own)


@pytest.mark.dist
@pytest.mark.parametrize("world_size", [1, 2])
def test_masters_begin_with_the_fp32_values_of_the_files(world_size, tmp_path):
    model = tiny("llama").bfloat16()
    model.model.layers[0].mlp.up_proj.weight.data = torch.randn(48, 32)
    model.save_pretrained(tmp_path)
    workers = run_workers(load_exactly, world_size, tmp_path, [1, 2, 3])
    for found in zip(*workers, strict=True):
        assert {name for rounded, *_ in found for name in rounded} == {"model.layers.0.mlp.up_proj.weight"}
        assert all(not left and same for _, left, same in found)


def test_nothing_is_read_twice_where_the_files_are_in_the_models_own_type(tmp_path):
    tiny("llama").bfloat16().save_pretrained(tmp_path)
    section = ModelSection(path=str(tmp_path))
    assert masters_from_files(skeleton(load_config(section, Path()), section), section, Path()) is None
