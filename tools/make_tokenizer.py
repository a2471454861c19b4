"""Make the tokenizer of the builtin models from the builtin data: `python tools/make_tokenizer.py [DIRECTORY]`.

A byte-level BPE: any text goes in and comes out unchanged. A space, a digit run's digits and a Chinese character are pieces of
their own, so that a word is the same token wherever it stands. The same data gives the same bytes; a test compares them.
"""

import json
import sys
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer

import dstune.data
from dstune.data.builtin import SPLIT_SIZES, records

VOCABULARY = 2048
"""An upper bound: training ends where every word of the data is one token."""
PAD, START, END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
PIECES = r"\p{Han}|\p{L}+|\p{N}+|\s|[^\s\p{L}\p{N}]+"
CHATML = Path(dstune.data.__file__).parent / "chat_templates" / "chatml.jinja"
TEMPLATE = CHATML.read_text(encoding="utf-8").replace("{{- BOS }}\n", "").replace("{{- END }}", "{{- '<|im_end|>' }}")
CONFIG = {
    "tokenizer_class": "PreTrainedTokenizerFast",
    "pad_token": PAD,
    "eos_token": END,
    "additional_special_tokens": [START],
    "clean_up_tokenization_spaces": False,
    "model_max_length": 4096,
    "chat_template": TEMPLATE,
}


def texts() -> list[str]:
    """All that the generator writes, with the words that a chat template adds."""
    lines = [r[key] for split in SPLIT_SIZES for r in records(split) for key in ("instruction", "input", "output")]
    return [*lines, *["system\nuser\nassistant\n"] * 100]


def train() -> Tokenizer:
    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PIECES), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[PAD, START, END],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts(), trainer)
    return tokenizer


def write(directory: Path) -> None:
    """`tokenizer.json` and `tokenizer_config.json`."""
    directory.mkdir(parents=True, exist_ok=True)
    train().save(str(directory / "tokenizer.json"))
    text = json.dumps(CONFIG, indent=2, ensure_ascii=False) + "\n"
    (directory / "tokenizer_config.json").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    default = Path(__file__).parents[1] / "dstune" / "data" / "builtin_tokenizer"
    write(Path(sys.argv[1]) if len(sys.argv) > 1 else default)
