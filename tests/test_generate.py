"""Generation and scoring: answers and likelihoods do not depend on the batch, and equal transformers' own."""

from collections import Counter, defaultdict
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers import AutoConfig

from dstune.config.schema import ModelSection
from dstune.config.train import TrainSection
from dstune.data.conversation import Conversation, Example, Message
from dstune.data.tokenize import Encoder, load_tokenizer, resolve_template
from dstune.engine.world import World
from dstune.errors import RunFailed, UsageError
from dstune.generate import Settings, generate, stream
from dstune.model import isolation
from dstune.model.build import build
from dstune.model.open import OpenedModel, open_model
from dstune.score import score
from tests.evaluation.models import ARCHITECTURES, save_architecture, save_llama, save_t5
from tests.spawn import run_workers

QUESTIONS = ["Hi", "Sort these words: pig apple door", "北京在哪里？", "x " * 60, "What is 12 + 30?", "a", "雪" * 20]


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> OpenedModel:
    return open_model(str(save_llama(tmp_path_factory.mktemp("llama"))), device="cpu")


@pytest.fixture(scope="module")
def t5(tmp_path_factory: pytest.TempPathFactory) -> OpenedModel:
    return open_model(str(save_t5(tmp_path_factory.mktemp("t5"))), device="cpu")


@pytest.fixture(params=["llama", "t5"])
def model(request: pytest.FixtureRequest) -> OpenedModel:
    return request.getfixturevalue(request.param)


def prompts(model: OpenedModel) -> list[list[int]]:
    return [prompt.ids for prompt in model.prompts([Conversation((Message("user", text),)) for text in QUESTIONS])]


def test_what_is_opened(llama, t5):
    assert (llama.dtype, llama.context, llama.seq2seq) == ("fp32", 512, False)
    assert (t5.context, t5.seq2seq) == (None, True)
    assert llama.tokenizer.convert_tokens_to_ids("<|im_end|>") in llama.stop_ids


@pytest.mark.parametrize("name", ["builtin:tiny-llama", "builtin:tiny-t5"])
def test_a_prompt_is_what_stands_before_the_answer_in_training(name):
    model = open_model(name, device="cpu")
    asked = Conversation((Message("system", "Be brief."), Message("user", "2 + 2?")))
    (prompt,) = model.prompts([asked])
    answered = model.encoder.encode(replace(asked, messages=(*asked.messages, Message("assistant", "北京 4"))))
    assert prompt.ids == answered.input_ids[: answered.loss_mask.argmax()].tolist()
    template = model.encoder.template.source
    theirs = model.tokenizer.apply_chat_template(
        asked.to_dicts(), chat_template=template, add_generation_prompt=True, return_dict=False
    )
    assert prompt.ids == theirs


@pytest.mark.shared
@pytest.mark.parametrize(
    ("name", "written"),
    [
        ("tiny_qwen_style", "auto"),
        ("byte_bpe_2k", "chatml"),
        ("gpt2", "alpaca"),
        ("sp_2k", "alpaca"),
        ("mistral_v1", "alpaca"),
        ("t5", "plain"),
    ],
)
def test_prompts_of_other_tokenizers_are_transformers_own(shared_data, name, written):
    section = ModelSection(path="builtin:tiny-llama", tokenizer=str(shared_data / "tokenizers" / name))
    tokenizer = load_tokenizer(section, Path.cwd())
    template = resolve_template(written, tokenizer, Path.cwd())
    encoder = Encoder(tokenizer, template, train_on="last", lossy_text="allow")
    model = replace(open_model("builtin:tiny-llama", device="cpu"), tokenizer=tokenizer, encoder=encoder)
    asked = Conversation((Message("user", "Hi"), Message("assistant", "Yes?"), Message("user", "2 + 2?")))
    (prompt,) = model.prompts([asked])
    theirs = tokenizer.apply_chat_template(
        asked.to_dicts(), chat_template=template.source, add_generation_prompt=True, return_dict=False
    )
    # A header that ends in a space: in training the answer's first token holds it.
    assert theirs[: len(prompt.ids)] == prompt.ids and tokenizer.decode(theirs[len(prompt.ids) :]).strip() == ""


def test_greedy_answers_do_not_depend_on_the_batch(model):
    settings = Settings(max_new_tokens=24)
    alone = generate(model, prompts(model), settings, batch_size=1)
    for batch_size in (2, 3, 7):
        assert generate(model, prompts(model), settings, batch_size) == alone
    assert len({answer.text for answer in alone}) > 3


@pytest.mark.parametrize("name", list(ARCHITECTURES))
def test_no_architecture_sees_the_padding(tmp_path: Path, name: str):
    model = open_model(str(save_architecture(tmp_path, name)), device="cpu")
    settings = Settings(max_new_tokens=16)
    assert generate(model, prompts(model), settings, batch_size=7) == generate(model, prompts(model), settings, 1)


def test_greedy_is_the_arg_max_of_plain_forward_passes(llama):
    """Token by token without a cache or padding: what generation must amount to."""
    prompt = prompts(llama)[1]
    (answer,) = generate(llama, [prompt], Settings(max_new_tokens=12))
    ids = list(prompt)
    with torch.inference_mode():
        for _ in range(12):
            token = int(llama.module(input_ids=torch.tensor([ids])).logits[0, -1].argmax())
            if token in llama.stop_ids:
                break
            ids.append(token)
    assert answer.text == llama.tokenizer.decode(ids[len(prompt) :], skip_special_tokens=True)


def test_sampled_answers_do_not_depend_on_the_batch_but_on_the_seed(model):
    settings = Settings(max_new_tokens=12, temperature=0.9, top_p=0.95, top_k=50, seed=3)
    alone = generate(model, prompts(model), settings, batch_size=1)
    assert generate(model, prompts(model), settings, batch_size=4) == alone
    assert generate(model, prompts(model), replace(settings, seed=4), batch_size=4) != alone


def test_sampling_follows_the_distribution(llama):
    prompt = prompts(llama)[0]
    with torch.inference_mode():
        expected = (llama.module(input_ids=torch.tensor([prompt])).logits[0, -1] / 1.5).softmax(-1)
    settings = Settings(max_new_tokens=1, temperature=1.5, seed=11)
    drawn = Counter(answer.text for answer in generate(llama, [prompt] * 1500, settings, batch_size=500))
    # Several tokens may decode to one text (halves of characters; the special ones to none): a text has their sum.
    share: dict[str, float] = defaultdict(float)
    for token, p in enumerate(expected.tolist()):
        share[llama.tokenizer.decode([token], skip_special_tokens=True)] += p
    likeliest = sorted(share, key=share.__getitem__)[-20:]
    assert sum(share[text] for text in likeliest) > 20 * 1.5 / len(share)  # it is no uniform one
    for text in likeliest:
        assert abs(drawn[text] / 1500 - share[text]) < 4.5 * np.sqrt(share[text] * (1 - share[text]) / 1500) + 1e-3


def test_top_k_of_one_is_greedy(llama):
    greedy = generate(llama, prompts(llama), Settings(max_new_tokens=8))
    assert generate(llama, prompts(llama), Settings(max_new_tokens=8, temperature=2.0, top_k=1)) == greedy
    assert generate(llama, prompts(llama), Settings(max_new_tokens=8, temperature=2.0, top_p=1e-6)) == greedy


def test_an_end_of_turn_ends_the_answer_and_is_no_part_of_it(llama):
    long = generate(llama, prompts(llama)[1:2], Settings(max_new_tokens=20))[0]
    assert not long.finished and long.num_tokens == 20
    tokens = _tokens(llama, prompts(llama)[1], 20)
    third = tokens[3]
    short = generate(
        replace(llama, stop_ids=llama.stop_ids | {third}), prompts(llama)[1:2], Settings(max_new_tokens=20)
    )[0]
    place = tokens.index(third)
    assert short.finished and short.num_tokens == place + 1
    assert short.text == llama.tokenizer.decode(tokens[:place], skip_special_tokens=True)


def _tokens(model: OpenedModel, prompt: list[int], count: int) -> list[int]:
    ids = torch.tensor([prompt])
    with torch.inference_mode():
        made = model.module.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=count, do_sample=False
        )
    return made[0, len(prompt) :].tolist()


def test_stop_texts_cut_the_answer_whatever_the_batch(model):
    free = generate(model, prompts(model), Settings(max_new_tokens=24))
    stop = tuple(answer.text[4:6] for answer in free[:2] if answer.text[4:6].strip())
    settings = Settings(max_new_tokens=24, stop=stop)
    alone = generate(model, prompts(model), settings, batch_size=1)
    assert generate(model, prompts(model), settings, batch_size=7) == alone
    assert any(answer.finished for answer in alone)
    for answer, whole in zip(alone, free, strict=True):
        assert whole.text.startswith(answer.text)
        assert not any(text in answer.text for text in stop)


@pytest.mark.parametrize("question", range(len(QUESTIONS)))
def test_a_stream_is_the_answer_in_pieces(model, question):
    settings = Settings(max_new_tokens=24)
    prompt = prompts(model)[question]
    (answer,) = generate(model, [prompt], settings)
    pieces = list(stream(model, prompt, settings))
    assert "".join(pieces) == answer.text
    assert len(pieces) > 1 or len(answer.text) < 2
    stop = answer.text[3:6]
    if stop.strip():
        settings = replace(settings, stop=(stop,))
        assert "".join(stream(model, prompt, settings)) == generate(model, [prompt], settings)[0].text


def test_closing_a_stream_stops_the_model(llama):
    answer = stream(llama, prompts(llama)[1], Settings(max_new_tokens=400))
    assert next(answer)
    answer.close()  # joins the thread: would take the time of 400 tokens otherwise, and leave it running
    assert list(answer) == []


def test_an_error_in_the_thread_reaches_the_reader(llama):
    with pytest.raises(IndexError):
        list(stream(llama, [10**6], Settings()))


def test_scores_are_log_probabilities_whatever_the_batch(model):
    answers = ["yes", "北京 is the capital", "no no no " * 9]
    examples = [
        model.encoder.encode(Conversation((Message("user", text), Message("assistant", answers[number % 3]))))
        for number, text in enumerate(QUESTIONS)
    ]
    alone = score(model, examples, batch_size=1)
    for values, again in zip(alone, score(model, examples, batch_size=5), strict=True):
        np.testing.assert_allclose(values, again, rtol=1e-5, atol=2e-5)
    for example, values in zip(examples, alone, strict=True):
        np.testing.assert_allclose(values, _reference(model, example), rtol=1e-5, atol=2e-5)


def test_what_sees_its_padding_is_scored_alone():
    small = isolation.smallest_that_builds(AutoConfig.for_model("prophetnet"))
    assert small is not None
    module = isolation.instance(small, "eager")
    model = SimpleNamespace(module=module, seq2seq=True, device=torch.device("cpu"), pad_id=0)
    examples = [
        Example(np.arange(3, 3 + length, dtype=np.int32), np.arange(length) >= length // 2) for length in (24, 9, 15)
    ]
    for values, alone in zip(score(model, examples), score(model, examples, batch_size=1), strict=True):
        np.testing.assert_array_equal(values, alone)


def _reference(model: OpenedModel, example) -> np.ndarray:
    """By transformers' own loss, token by token."""
    ids = torch.from_numpy(example.input_ids.astype(np.int64))
    mask = torch.from_numpy(example.loss_mask)
    with torch.inference_mode():
        if model.seq2seq:
            logits = model.module(input_ids=ids[~mask][None], labels=ids[mask][None]).logits[0]
            targets = ids[mask]
        else:
            logits = model.module(input_ids=ids[None]).logits[0, :-1][mask[1:]]
            targets = ids[1:][mask[1:]]
    return -torch.nn.functional.cross_entropy(logits, targets, reduction="none").numpy()


def test_an_example_without_targets_cannot_be_scored(llama):
    example = llama.encoder.encode(Conversation((Message("user", "a"), Message("assistant", "b"))))
    with pytest.raises(ValueError, match="no target"):
        score(llama, [replace(example, loss_mask=np.zeros_like(example.loss_mask))])


def test_a_model_that_is_not_there(tmp_path: Path):
    with pytest.raises(UsageError, match=r"no config\.json"):
        open_model(str(tmp_path))
    with pytest.raises(UsageError, match="does not exist"):
        open_model(str(tmp_path / "nowhere"))
    with pytest.raises(UsageError, match="not builtin"):
        open_model("builtin:huge")


def test_a_run_opens_by_its_export(tmp_path: Path):
    (tmp_path / "config.yaml").write_text("name: a\n")
    with pytest.raises(UsageError, match="dstune export"):
        open_model(str(tmp_path))
    save_llama(tmp_path / "export")
    assert open_model(str(tmp_path)).context == 512


def test_holes_in_the_weights_are_an_error(tmp_path: Path):
    from safetensors.torch import load_file, save_file

    folder = save_llama(tmp_path)
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(RunFailed, match="missing keys"):
        open_model(str(folder))


def test_a_device_that_is_not_here(tmp_path: Path):
    folder = save_llama(tmp_path)
    with pytest.raises(UsageError, match="cuda:99"):
        open_model(str(folder), device="cuda:99")
    with pytest.raises(UsageError, match="gpu"):
        open_model(str(folder), device="gpu")


def test_a_model_that_is_larger_than_the_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def full(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 70.00 GiB")

    monkeypatch.setattr(torch.nn.Module, "to", full)
    with pytest.raises(RunFailed, match=r"do not fit on cpu: CUDA out of memory.*70\.00 GiB"):
        open_model(str(save_llama(tmp_path)), device="cpu")


def _weights_of_training(name: str) -> dict[str, torch.Tensor]:
    world = World.from_environment()
    world.init()
    stage = {"zero_optimization": {"stage": 1}}
    module = build(ModelSection(path=name), Path.cwd(), "sdpa", TrainSection().seed, stage)
    return {key: value.detach().clone() for key, value in module.named_parameters()}


@pytest.mark.dist
@pytest.mark.parametrize("name", ["builtin:tiny-llama", "builtin:tiny-t5"])
def test_builtin_models_open_with_the_weights_that_training_starts_from(name):
    (expected,) = run_workers(_weights_of_training, 1, name)
    opened = dict(open_model(name, device="cpu").module.named_parameters())
    assert expected.keys() == opened.keys()
    for key, value in opened.items():
        assert value.dtype == torch.bfloat16 and torch.equal(value, expected[key]), key
