"""The builtin data and its tokenizer: the same bytes everywhere, checkable answers, nothing of the test split in training."""

import hashlib
import importlib.util
import itertools
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
from transformers import PreTrainedTokenizerFast

from dstune.data.builtin import SPLIT_SIZES, records
from dstune.errors import ConfigError

ROOT = Path(__file__).parent.parent
BACKWARDS = ("Reverse these words.", "Write backwards.", "倒过来写。", "从后往前写。")
TOKENIZER = ROOT / "dstune" / "data" / "builtin_tokenizer"


def digest(split: str) -> str:
    lines = (json.dumps(r, ensure_ascii=False, sort_keys=True) for r in itertools.islice(records(split), 200))
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def test_the_first_records_never_change() -> None:
    assert digest("train") == "ae5e70d39f433bb9606e36552b539aecf7188a9420f3739928ca029551498959"
    assert digest("test") == "132b2310bddd2309418b92bbec235c802eb74d51fa358b7b7b6ce06ce75ba34e"


def test_the_records_do_not_depend_on_the_process() -> None:
    program = "import json; from dstune.data.builtin import records; print(json.dumps([r['output'] for r in records('test')]))"
    environment = os.environ | {"PYTHONHASHSEED": "7", "PYTHONPATH": str(ROOT)}
    there = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True)
    assert json.loads(there.stdout) == [r["output"] for r in records("test")]


def test_splits_have_their_size_and_share_nothing() -> None:
    train, test = list(records()), list(records("test"))
    assert (len(train), len(test)) == (SPLIT_SIZES["train"], SPLIT_SIZES["test"])
    asked = {(r["instruction"], r["input"]) for r in train}
    assert len(asked) == len(train)
    assert not asked & {(r["instruction"], r["input"]) for r in test}


def test_a_test_task_is_not_in_training_under_another_wording() -> None:
    train = {r["input"] for r in records() if r["input"] and r["instruction"] in BACKWARDS}
    test = {r["input"] for r in records("test") if r["input"] and r["instruction"] in BACKWARDS}
    assert train and test and not train & test


def test_answers_are_right() -> None:
    checked = 0
    for record in itertools.chain(records(), records("test")):
        question, given, answer = record["instruction"], record["input"], record["output"]
        if question in BACKWARDS:
            assert answer.split() == given.split()[::-1]
        elif question == "Sort from small to large.":
            assert [int(n) for n in answer.split()] == sorted(int(n) for n in given.split())
        elif question.startswith("What does "):
            assert f"{question.split()[2]}: {answer}" in given.splitlines()
        elif question.startswith("Add "):
            _, left, _, right = question.rstrip(".").split()
            assert int(left) + int(right) == int(answer)
        else:
            continue
        checked += 1
    assert checked > 1000


def test_some_questions_stand_on_one_line() -> None:
    asked = [r for r in records() if r["instruction"].startswith("Reverse these words.")]
    alone = [r for r in asked if not r["input"]]
    assert 0.15 < len(alone) / len(asked) < 0.35
    for record in alone:
        assert record["output"].split() == record["instruction"].split()[:2:-1]


def test_an_unknown_split_is_refused() -> None:
    with pytest.raises(ConfigError, match="train, test"):
        next(records("dev"))


@pytest.fixture(scope="module")
def maker() -> ModuleType:
    spec = importlib.util.spec_from_file_location("make_tokenizer", ROOT / "tools" / "make_tokenizer.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_tokenizer_is_made_again_byte_for_byte(maker: ModuleType, tmp_path: Path) -> None:
    maker.write(tmp_path)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / name).read_bytes() == (TOKENIZER / name).read_bytes(), (
            f"run tools/make_tokenizer.py ({name})"
        )


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast.from_pretrained(TOKENIZER)


@pytest.mark.parametrize(
    "text",
    [
        "",
        " two  spaces ",
        "tab\tnew\r\nline",
        "naïve Ω 𝕏 ‍👩‍👩‍👧",
        "中文 混排 123,456.7",
        "\u0000\u001f\ufffd",
        "'s 're",
    ],
)
def test_any_text_comes_back(tokenizer: PreTrainedTokenizerFast, text: str) -> None:
    assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False)) == text


def test_a_word_is_one_token_wherever_it_stands(tokenizer: PreTrainedTokenizerFast) -> None:
    first, space, second = tokenizer.encode("house cat")
    assert tokenizer.encode("cat house") == [second, space, first]


def test_the_template_marks_the_answer_and_its_end(tokenizer: PreTrainedTokenizerFast) -> None:
    record = next(records("test"))
    chat = [{"role": "user", "content": record["input"]}, {"role": "assistant", "content": record["output"]}]
    made = tokenizer.apply_chat_template(chat, tokenize=True, return_dict=True, return_assistant_tokens_mask=True)
    targets = [t for t, marked in zip(made["input_ids"], made["assistant_masks"], strict=True) if marked]
    assert tokenizer.decode(targets) == record["output"] + "<|im_end|>"
    prompt = tokenizer.apply_chat_template(chat[:1], tokenize=True, add_generation_prompt=True)["input_ids"]
    assert made["input_ids"][: len(prompt)] == prompt
    assert targets[-1] == tokenizer.eos_token_id
