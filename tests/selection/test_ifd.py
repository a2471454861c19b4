"""Instruction-following difficulty: its arithmetic against plain transformers, its ranks, its chunks after a kill."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from dstune.data import prepare as preparation
from dstune.data.tokenizer_files import load_tokenizer
from dstune.errors import ConfigError
from dstune.model.open import open_module
from dstune.selection import choose, ifd, losses
from tests.data.made_tokenizers import byte_level
from tests.data.test_prepare import make_config, record, write_lines
from tests.evaluation.models import save_llama

REPOSITORY = Path(__file__).parents[2]
TURNS = {
    "messages": [
        {"role": "system", "content": "Be short."},
        {"role": "user", "content": "What is a river?"},
        {"role": "assistant", "content": "Water that runs."},
        {"role": "user", "content": "And the sea?"},
        {"role": "assistant", "content": "Where it ends."},
    ]
}


@pytest.fixture(autouse=True)
def base(tmp_path, monkeypatch):
    monkeypatch.setenv("DSTUNE_CACHE", str(tmp_path / "cache"))
    write_lines(tmp_path / "run/data/a.jsonl", [TURNS, *(record(number, number % 7 + 1) for number in range(23))])
    return tmp_path / "run"


def config_of(budget=5, model=None, **data):
    return make_config(**data, select={"budget": budget, "by": "ifd", "model": model})


def loss_of(module, ids, start):
    """Cross-entropies of tokens `start` and on, each given all before it."""
    with torch.inference_mode():
        logits = module(torch.tensor([ids])).logits[0].float()
    return -logits.log_softmax(-1)[range(start - 1, len(ids) - 1), ids[start:]]


def plainly(module, tokenizer, messages):
    """s(A|Q) and s(A) of a conversation, turn by turn, as the docstring defines them."""
    header = tokenizer("<|im_start|>assistant\n")["input_ids"]
    given, alone = [], []
    for place, message in enumerate(messages):
        if message["role"] == "assistant":
            answer = tokenizer(message["content"])["input_ids"]
            before = tokenizer.apply_chat_template(messages[:place], add_generation_prompt=True)["input_ids"]
            given.append(loss_of(module, [*before, *answer], len(before)))
            alone.append(loss_of(module, [*header, *answer], len(header)))
    return float(torch.cat(given).mean()), float(torch.cat(alone).mean())


def messages_of(one):
    if "messages" in one:
        return one["messages"]
    return [{"role": "user", "content": one["instruction"]}, {"role": "assistant", "content": one["output"]}]


def test_the_arithmetic_is_that_of_a_plain_loop(base):
    config = config_of()
    table = choose.choose(config, base).table
    module, _ = open_module(config.model, base, "cpu")
    assert module.dtype == torch.float32
    tokenizer = load_tokenizer(config.model, base)
    records = [json.loads(line) for line in (base / "data/a.jsonl").read_text().splitlines()]
    expected = np.array([plainly(module, tokenizer, messages_of(one)) for one in records])
    assert table["given"] == pytest.approx(expected[:, 0], abs=1e-5)
    assert table["alone"] == pytest.approx(expected[:, 1], abs=1e-5)
    assert table["ifd"] == pytest.approx(expected[:, 0] / expected[:, 1], abs=1e-5)


def test_batches_and_chunks_do_not_change_a_score(base, tmp_path, monkeypatch):
    first = choose.choose(config_of(), base).table
    monkeypatch.setenv("DSTUNE_CACHE", str(tmp_path / "again"))
    monkeypatch.setattr(losses, "_BATCH_SIZE", 1)
    monkeypatch.setattr(losses, "CHUNK_TOKENS", 100)
    again = choose.choose(config_of(), base)
    assert len(list(again.scores.parent.glob("*.losses-*/chunk-*.arrow"))) > 5
    for name in ("given", "alone", "ifd"):
        assert again.table[name] == pytest.approx(first[name], abs=1e-5)


def test_another_budget_asks_no_model(base, monkeypatch):
    few = choose.choose(config_of(5), base)
    monkeypatch.setattr(losses, "_Scorer", None)
    more = choose.choose(config_of(10), base)
    assert more.table["ifd"].tolist() == few.table["ifd"].tolist()
    assert few.chosen.sum() == 5 and more.chosen.sum() == 10 and more.chosen[few.chosen].all()


def test_ranks():
    given = np.array([1.0, 3.0, 2.0, np.nan, 2.4, 1.8, 1.0])
    alone = np.array([2.0, 2.0, 2.0, np.nan, 2.0, 2.0, 0.0])
    # IFD 0.5, 1.5, 1, none, 1.2, 0.9, none: up to 1 the highest first, then what is above, the nearest to 1 first.
    assert ifd.rank(given, alone, 1.0).rank.tolist() == [3, 5, 1, 6, 4, 2, 7]
    assert ifd.rank(given, alone, 1.3).rank.tolist() == [4, 5, 2, 6, 1, 3, 7]


def test_documents_and_long_texts_have_no_score():
    frame = ifd.Frame(before=(8, 9), begin=1, control=frozenset({1, 7, 8}))
    make = ifd.pair_maker(frame, None, context=10)

    def made(ids, targets):
        mask = np.zeros(len(ids), dtype=bool)
        mask[targets] = True
        return make(np.array(ids, dtype=np.int32), mask)

    pair = made([1, 20, 21, 8, 9, 30, 31, 7], slice(5, 8))
    assert pair.given.input_ids.tolist() == [1, 20, 21, 8, 9, 30, 31]
    assert np.flatnonzero(pair.given.loss_mask).tolist() == [5, 6]
    assert [one.input_ids.tolist() for one in pair.alone] == [[1, 8, 9, 30, 31]]
    assert np.flatnonzero(pair.alone[0].loss_mask).tolist() == [3, 4]
    assert made([1, 30, 31, 32], slice(1, 4)) is None  # a document
    assert made([1, 8, 9, 30, 31, 7], slice(3, 6)) is None  # nothing asked
    assert made([1, 20, 21, 8, 9, 7], slice(5, 6)) is None  # an answer that is an end of turn alone
    assert made([1, *range(20, 30), 8, 9, 30, 31], slice(13, 15)) is None  # longer than the context


def test_without_a_header_answers_are_compared_from_their_second_token():
    pair = ifd.pair(np.arange(10, 20, dtype=np.int32), [(4, 5), (6, 9)], before=[])
    assert pair is not None
    assert np.flatnonzero(pair.given.loss_mask).tolist() == [7, 8]
    assert [one.input_ids.tolist() for one in pair.alone] == [[16, 17, 18]]
    assert pair.alone[0].loss_mask.tolist() == [False, True, True]


def test_what_every_answer_follows_is_found(base):
    config = config_of()
    tokenizer = load_tokenizer(config.model, base)
    found = ifd.frame(config.model, config.data, base, tokenizer)
    assert tokenizer.decode(found.before) == "<|im_start|>assistant\n"


def test_another_models_tokenizer(base, tmp_path):
    """A model with other tokens is asked about the same text: as if the data had been made for it."""
    folder = save_llama(tmp_path / "other")
    other = byte_level(special=("<|im_start|>", "<|im_end|>", "<s>"), eos_token="<|im_end|>")
    other.save_pretrained(folder)
    table = choose.choose(config_of(model=str(folder)), base).table
    module, _ = open_module(make_config(str(folder)).model, base, "cpu")
    records = [json.loads(line) for line in (base / "data/a.jsonl").read_text().splitlines()]
    other.chat_template = load_tokenizer(make_config().model, base).chat_template
    expected = np.array([plainly(module, other, messages_of(one)) for one in records])
    assert table["given"] == pytest.approx(expected[:, 0], abs=1e-4)
    assert table["alone"] == pytest.approx(expected[:, 1], abs=1e-4)


def test_a_named_model_is_told_apart_by_its_weights(base, tmp_path):
    folder = save_llama(tmp_path / "one")
    first = choose.choose(config_of(model=str(folder)), base)
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-4] + b"\0\0\0\0")
    assert choose.choose(config_of(model=str(folder)), base).scores != first.scores


def test_a_directory_of_another_template_is_refused(base):
    prepared = preparation.prepare(make_config(template="alpaca"), base)
    with pytest.raises(ConfigError, match="the template that the data was prepared with"):
        choose.choose(config_of(sources=[], prepared=str(prepared.root)), base)
    right = choose.choose(config_of(sources=[], prepared=str(prepared.root), template="alpaca"), base)
    assert np.isfinite(right.table["ifd"]).all()


def test_models_that_cannot_be_asked(base):
    config = config_of()
    random = config.model_copy(update={"model": config.model.model_copy(update={"path": "x", "init": "random"})})
    with pytest.raises(ConfigError, match="random weights"):
        choose.choose(random, base)
    with pytest.raises(ConfigError, match="sequence-to-sequence"):
        choose.choose(config_of(model="builtin:tiny-t5"), base)
    with pytest.raises(ConfigError, match=r"data\.select\.model: .*does not exist"):
        choose.choose(config_of(model="./no/such/model"), base)


KILLED = """
import os, signal, sys
from pathlib import Path
from dstune.selection import choose, losses
from tests.selection.test_ifd import config_of

losses.CHUNK_TOKENS = 300

def told(progress):
    if progress.stage.startswith("ifd") and progress.examples > 8:
        os.kill(os.getpid(), signal.SIGKILL)

choose.choose(config_of(), Path(sys.argv[1]), told)
"""


def test_after_a_kill_only_the_rest_is_scored(base, tmp_path, monkeypatch):
    monkeypatch.setattr(losses, "CHUNK_TOKENS", 300)
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY)}
    killed = subprocess.run([sys.executable, "-c", KILLED, str(base)], env=environment, capture_output=True, text=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    before = {path.name for path in (tmp_path / "cache/prepared").glob("*.losses-*/*")}
    asked = []
    score = losses._Scorer.losses
    monkeypatch.setattr(
        losses._Scorer, "losses", lambda self, numbers: (asked.append(len(numbers)), score(self, numbers))[1]
    )
    resumed = choose.choose(config_of(), base)
    assert len(before) > 0 and 0 < sum(asked) <= 24 - 8
    monkeypatch.setenv("DSTUNE_CACHE", str(tmp_path / "fresh"))
    fresh = choose.choose(config_of(), base)
    assert fresh.table["ifd"].tolist() == resumed.table["ifd"].tolist()
    assert fresh.scores.read_bytes() == resumed.scores.read_bytes()
