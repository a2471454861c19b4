"""Exports against real checkpoints of real engines: bit for bit the masters, opened by transformers itself."""

import ast
import errno
import importlib
import json
import os
import shutil
import weakref
from pathlib import Path

import pytest
import torch
from pydantic import ValidationError
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer, PreTrainedModel

from dstune.checkpoint.commit import save
from dstune.checkpoint.reader import Reader
from dstune.config.schema import ModelSection, RunConfig
from dstune.data.tokenizer_files import BUILTIN_DIRECTORY, load_tokenizer
from dstune.engine.world import World
from dstune.engine.zero import ZeroEngine
from dstune.errors import CheckpointError, ConfigError, RunFailed, UsageError
from dstune.exporting.card import CardFacts, model_card, plain
from dstune.exporting.huggingface import export
from dstune.model import freezing, names
from dstune.model.build import build
from dstune.model.weights import WeightFiles
from dstune.paths import step_directory
from tests.model.architectures import tiny
from tests.spawn import run_workers

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def config_of(path: str, **data: object) -> RunConfig:
    return RunConfig.model_validate(
        {
            "name": "probe",
            "model": {"path": path, "dtype": "fp32", "tokenizer": str(BUILTIN_DIRECTORY)},
            "data": {"sources": [{"path": "builtin:instructions"}], "template": "chatml", **data},
        }
    )


CASES = {
    "builtin:tiny-llama": 3,
    "builtin:tiny-t5": 3,
    "llama-tied": 2,
    "gpt2": 1,
    "mixtral": 3,
    "qwen3_moe": 2,
    "bart": 3,
}
"""Each architecture, and the ZeRO stage that its checkpoint is written by."""


FROZEN = {
    "llama-tied": ["lm_head.weight", "model.layers.0.*"],
    "mixtral": ["*.experts.*", "model.norm.weight"],
}
"""Patterns of `train.freeze`: a tied weight by its other name, and experts that are one tensor at run time."""


def train_and_commit(folder: Path) -> None:
    """Two updates on random tokens and a commit of step 2, for every case, and once more with some weights frozen."""
    world = World.from_environment()
    world.init()
    control = world.control()
    cases = [(architecture, architecture, []) for architecture in CASES]
    cases += [(f"{architecture}-frozen", architecture, patterns) for architecture, patterns in FROZEN.items()]
    for target, architecture, patterns in cases:
        path = architecture if architecture.startswith("builtin:") else str(folder / architecture / "model")
        module, engine = _engine(path, CASES[architecture], world, patterns)
        frozen = freezing.frozen_digest(module, WeightFiles(Path(path)), control) if patterns else ""
        ids = torch.arange(1, 9)[None]
        inputs = {"decoder_input_ids": ids} if architecture in ("bart", "builtin:tiny-t5") else {}
        for _ in range(2):
            logits = engine.module(input_ids=ids, **inputs, use_cache=False).logits
            engine.backward(logits.float().log_softmax(-1)[..., 3].sum(), last=True)
            engine.step(1e-2)
        save(folder / target, 2, engine.slices(), {"losses": [1.5], "step": 2, "frozen": frozen}, control, {})


def _engine(path: str, stage: int, world: World, freeze: list[str]) -> tuple[PreTrainedModel, ZeroEngine]:
    ds_config = {"zero_optimization": {"stage": stage}}
    module = build(config_of(path).model, Path(), "sdpa", 1, ds_config)
    freezing.freeze(module, freeze)
    return module, ZeroEngine(
        module,
        lr=1e-2,
        betas=(0.9, 0.99),
        eps=1e-8,
        weight_decay=0.0,
        ds_config=ds_config,
        world=world,
        names=names.saved_names(module),
    )


@pytest.fixture(scope="module")
def committed(tmp_path_factory):
    """Gives the model path and the checkpoint of an architecture; two workers make all of them at once."""
    folder = tmp_path_factory.mktemp("committed")
    for architecture in CASES:
        (folder / architecture).mkdir()
        if not architecture.startswith("builtin:"):
            tiny(architecture).save_pretrained(folder / architecture / "model")
    run_workers(train_and_commit, 2, folder)

    def find(architecture: str, suffix: str = "") -> tuple[str, Path]:
        path = architecture if architecture.startswith("builtin:") else str(folder / architecture / "model")
        return path, step_directory(folder / (architecture + suffix), 2)

    return find


@pytest.mark.dist
@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_weights_are_the_masters_bit_for_bit_after_the_cast(committed, tmp_path, dtype):
    path, checkpoint = committed("builtin:tiny-llama")
    export(checkpoint, tmp_path / "out", config_of(path), Path(), dtype=dtype)
    masters = Reader(checkpoint)
    with safe_open(tmp_path / "out" / "model.safetensors", "pt") as file:
        assert set(file.keys()) == set(masters.tensors("fp32"))
        for name, shape in masters.tensors("fp32").items():
            wanted = masters.read("fp32", name).view(shape).to(DTYPES[dtype])
            assert torch.equal(file.get_tensor(name), wanted), name
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == str(DTYPES[dtype]).split(".")[1]


@pytest.mark.dist
@pytest.mark.parametrize("architecture", list(CASES))
def test_transformers_opens_the_export_with_exactly_the_masters(committed, tmp_path, architecture):
    path, checkpoint = committed(architecture)
    out = tmp_path / "out"
    export(checkpoint, out, config_of(path), Path(), dtype="fp32", max_file_bytes=60_000)
    assert (out / "model.safetensors.index.json").is_file()
    kind = AutoModelForSeq2SeqLM if AutoConfig.from_pretrained(out).is_encoder_decoder else AutoModelForCausalLM
    model, report = kind.from_pretrained(out, dtype="auto", output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"] and not report["mismatched_keys"]
    masters, renamed = Reader(checkpoint), names.saved_names(model)
    stored = masters.tensors("fp32")
    parameters = dict(model.named_parameters())
    assert {renamed.get(name, name) for name in parameters} == set(stored)
    for name, parameter in parameters.items():
        wanted = masters.read("fp32", renamed.get(name, name)).view(parameter.shape)
        assert torch.equal(parameter.detach(), wanted), name
    if model.config.is_encoder_decoder:
        assert model.generation_config.decoder_start_token_id == model.config.decoder_start_token_id is not None
    # And it is not what training began with.
    before = kind.from_pretrained(path) if architecture[:7] != "builtin" else None
    if before is not None:
        assert any(not torch.equal(a, b) for a, b in zip(model.parameters(), before.parameters(), strict=True))


@pytest.mark.dist
@pytest.mark.parametrize("architecture", list(FROZEN))
def test_frozen_weights_come_from_the_base_model_and_from_no_other(committed, tmp_path, architecture):
    path, checkpoint = committed(architecture, "-frozen")
    config = config_of(path)
    config = config.model_copy(update={"train": config.train.model_copy(update={"freeze": FROZEN[architecture]})})
    export(checkpoint, tmp_path / "out", config, Path(), dtype="fp32")
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    base, stored = dict(model.named_parameters()), names.saved_names(model)
    tuned = dict(AutoModelForCausalLM.from_pretrained(tmp_path / "out").named_parameters())
    unchanged = {name for name in base if torch.equal(base[name], tuned[name])}
    trained = Reader(checkpoint).tensors("fp32")
    assert unchanged == {name for name in base if stored.get(name, name) not in trained}
    layer = {name for name in base if name.startswith("model.layers.0.")}
    tied = {"llama-tied": {"model.embed_tokens.weight"} | layer}
    experts = {"model.norm.weight"} | {name for name in base if ".experts." in name}
    assert unchanged == tied.get(architecture, experts)
    other = tmp_path / "other"
    shutil.copytree(path, other)
    with safe_open(other / "model.safetensors", "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    tensors["model.norm.weight" if architecture == "mixtral" else "model.embed_tokens.weight"][0] += 1
    save_file(tensors, other / "model.safetensors", {"format": "pt"})
    moved = config.model_copy(update={"model": config.model.model_copy(update={"path": str(other)})})
    with pytest.raises(CheckpointError, match="not the ones that the run left frozen"):
        export(checkpoint, tmp_path / "again", moved, Path(), dtype="fp32")


def test_patterns_that_freeze_nothing_or_everything_are_refused():
    with pytest.raises(ConfigError, match=r"'model.layer.0.\*' matches no parameter\n.*model.layers.0.") as found:
        freezing.freeze(tiny("llama"), ["model.layer.0.*", "lm_head.*", "nonsense"])
    assert len(found.value.problems) == 2
    with pytest.raises(ConfigError, match="leaves nothing to train"):
        freezing.freeze(tiny("llama"), ["*"])
    with pytest.raises(ValidationError, match="wants a pretrained model"):
        RunConfig.model_validate(config_of("builtin:tiny-llama").model_dump() | {"train": {"freeze": ["*"]}})


@pytest.mark.dist
def test_files_are_those_that_save_pretrained_writes(committed, tmp_path):
    path, checkpoint = committed("mixtral")
    export(checkpoint, tmp_path / "ours", config_of(path), Path(), dtype="fp32")
    AutoModelForCausalLM.from_pretrained(tmp_path / "ours").save_pretrained(tmp_path / "theirs")
    with (
        safe_open(tmp_path / "ours" / "model.safetensors", "pt") as ours,
        safe_open(tmp_path / "theirs" / "model.safetensors", "pt") as theirs,
    ):
        assert set(ours.keys()) == set(theirs.keys())
        assert all(torch.equal(ours.get_tensor(name), theirs.get_tensor(name)) for name in ours.keys())  # noqa: SIM118


@pytest.mark.dist
@pytest.mark.parametrize(
    ("data", "asked"),
    [
        ({"template": ["Q: {instruction}\nA:", "Answer {instruction}:"]}, "Q: Hi\nA:"),
        ({"template": "{instruction} of {input}:"}, None),
        ({"template": "auto", "sources": [{"path": "a.txt", "format": "documents"}]}, None),
    ],
)
def test_instruction_templates_are_exported_as_one_chat_template(committed, tmp_path, data, asked):
    path, checkpoint = committed("builtin:tiny-llama")
    plain = load_tokenizer(ModelSection(path="builtin:tiny-llama"), Path())
    plain.chat_template = None
    plain.save_pretrained(tmp_path / "tokenizer")
    config = config_of(path, **data)
    config = config.model_copy(
        update={"model": config.model.model_copy(update={"tokenizer": str(tmp_path / "tokenizer")})}
    )
    export(checkpoint, tmp_path / "out", config, Path())
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    messages = [{"role": "user", "content": "Hi"}]
    if asked is None:
        assert (tokenizer.chat_template is None) == (data["template"] == "auto")
    else:
        assert tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True).endswith(asked)


@pytest.mark.dist
def test_the_directory_is_complete(committed, tmp_path):
    path, checkpoint = committed("builtin:tiny-llama")
    out = tmp_path / "deep" / "out"
    export(checkpoint, out, config_of(path), Path())
    tokenizer = AutoTokenizer.from_pretrained(out)
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hi"}], tokenize=False, add_generation_prompt=True
    )
    assert text == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    model = AutoModelForCausalLM.from_pretrained(out)
    assert model.generation_config.eos_token_id == tokenizer.convert_tokens_to_ids("<|im_end|>")
    ids = tokenizer(text, return_tensors="pt").input_ids
    assert model.generate(ids, max_new_tokens=3, do_sample=False).shape[1] <= ids.shape[1] + 3
    card = (out / "README.md").read_text()
    assert "AutoModelForCausalLM.from_pretrained" in card
    assert "builtin:instructions" in card and "| steps taken | 2 |" in card and "1.5000" in card
    everything = "".join(file.read_text(errors="ignore") for file in out.iterdir() if file.suffix in (".json", ".md"))
    assert str(Path(__file__).parents[2]) not in everything and str(tmp_path) not in everything
    assert [file.name for file in (tmp_path / "deep").iterdir()] == ["out"]


@pytest.mark.dist
def test_an_existing_directory_is_refused_and_untouched(committed, tmp_path):
    path, checkpoint = committed("builtin:tiny-llama")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("precious")
    with pytest.raises(UsageError, match="exists already"):
        export(checkpoint, tmp_path / "out", config_of(path), Path())
    assert [file.name for file in (tmp_path / "out").iterdir()] == ["mine"]


@pytest.mark.dist
def test_a_checkpoint_of_another_model_is_named_and_leaves_nothing(committed, tmp_path):
    _, checkpoint = committed("builtin:tiny-llama")
    with pytest.raises(CheckpointError, match="as the model has"):
        export(checkpoint, tmp_path / "out", config_of("builtin:tiny-t5"), Path())
    assert list(tmp_path.iterdir()) == []


def test_a_card_escapes_what_people_wrote():
    config = RunConfig.model_validate(
        {
            "name": "probe",
            "model": {"path": "/secret/place/<b>my</b>|model"},
            "data": {"sources": [{"path": "a|b\n# <script>alert(1)</script>.json"}], "template": "x](javascript:y)"},
        }
    )
    card = model_card(config, CardFacts(step=1, loss=None, dtype="bf16", parameters=1))
    assert "<script>" not in card and "<b>" not in card and "/secret" not in card
    assert "\n# <" not in card and "](javascript" not in card
    counted = {"path": "/home/me/x|y.json", "records": {"read": 1234}, "conversations": {"kept": 7}, "tokens": 99}
    facts = CardFacts(step=1, loss=None, dtype="bf16", parameters=1, counts={"rows": 3}, sources=[counted])
    card = model_card(config, facts)
    assert "| x\\|y.json | 1,234 | 7 | 99 |" in card and "- rows: 3" in card and "/home" not in card
    assert plain("a\n\n| b") == "a \\| b"


@pytest.mark.parametrize("adapter", [False, True])
@pytest.mark.parametrize("kind", ["AutoModelForCausalLM", "AutoModelForMultimodalLM"])
def test_the_code_in_a_card_names_what_there_is(kind, adapter):
    config = config_of("someone/model")
    config = config.model_copy(update={"model": config.model.model_copy(update={"new_tokens": ["kilopascal"]})})
    card = model_card(config, CardFacts(1, None, "bf16", 1, auto_class=kind, is_adapter=adapter))
    code = ast.parse(card.partition("```python\n")[2].partition("```")[0])
    imported = [(one.module, name.name) for one in code.body if isinstance(one, ast.ImportFrom) for name in one.names]
    assert len(imported) >= 2 and all(hasattr(importlib.import_module(where), name) for where, name in imported)
    assert ("resize_token_embeddings" in card) == (adapter and kind == "AutoModelForMultimodalLM")


@pytest.mark.dist
def test_a_full_disk_leaves_nothing_behind(committed, tmp_path, monkeypatch):
    path, checkpoint = committed("builtin:tiny-llama")

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("dstune.exporting.files._write_file", full)
    with pytest.raises(RunFailed, match="No space left"):
        export(checkpoint, tmp_path / "out", config_of(path), Path())
    assert list(tmp_path.iterdir()) == []


@pytest.mark.dist
def test_a_tensor_is_read_piece_by_piece(committed, tmp_path, monkeypatch):
    path, checkpoint = committed("builtin:tiny-llama")
    export(checkpoint, tmp_path / "whole", config_of(path), Path())
    asked: list[int] = []
    read_into = Reader.read_into

    def counting(self, state, name, start, out):
        asked.append(out.numel())
        read_into(self, state, name, start, out)

    monkeypatch.setattr(Reader, "read_into", counting)
    monkeypatch.setattr("dstune.exporting.tensors._PIECE_ELEMENTS", 1000)
    export(checkpoint, tmp_path / "pieces", config_of(path), Path())
    assert max(asked) == 1000 < sum(asked)
    pieces, whole = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("pieces", "whole"))
    assert pieces == whole


@pytest.mark.dist
def test_only_one_tensor_is_in_memory_at_a_time(committed, tmp_path, monkeypatch):
    path, checkpoint = committed("mixtral")
    alive, most = [], [0]
    read = Reader.read

    def counting(self, state, name, *rest):
        tensor = read(self, state, name, *rest)
        alive.append(weakref.ref(tensor))
        most[0] = max(most[0], sum(reference() is not None for reference in alive))
        return tensor

    monkeypatch.setattr(Reader, "read", counting)
    export(checkpoint, tmp_path / "out", config_of(path), Path())
    assert most[0] <= 2 < len(alive)
