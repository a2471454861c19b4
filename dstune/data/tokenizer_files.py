"""Opening a model's tokenizer: without torch where there is a tokenizer.json, by the fitting class elsewhere."""

from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import decoders, normalizers, pre_tokenizers
from tokenizers.models import Unigram

from dstune.config.schema import ModelSection
from dstune.data import new_tokens
from dstune.errors import ConfigError, Problem, first_line

_FILES = ("tokenizer*", "*.model", "vocab.*", "*.tiktoken")
BUILTIN_DIRECTORY = Path(__file__).parent / "builtin_tokenizer"


def has_tokenizer(model: ModelSection, base: Path) -> bool:
    """False where `model` names a directory of this machine that holds no tokenizer of any kind."""
    path = base / Path(model.tokenizer or model.path).expanduser()
    return not path.is_dir() or any(file for pattern in _FILES for file in path.glob(pattern))


def load_tokenizer(model: ModelSection, base: Path) -> Any:
    """The tokenizer that `model` names (transformers' PreTrainedTokenizerBase), its new tokens added.

    Raises ConfigError where none can be opened, or where it cannot take the tokens.
    """
    tokenizer = _opened(model, base)
    new_tokens.add(tokenizer, model.new_tokens)
    return tokenizer


def new_rows(model: ModelSection, base: Path) -> range:
    """The rows of the embeddings that `model.new_tokens` takes; none where the tokenizer knows them all. Raises ConfigError as above."""
    return new_tokens.add(_opened(model, base), model.new_tokens) if model.new_tokens else range(0)


def described(model: ModelSection) -> dict[str, Any]:
    """What a prepared directory says of where its tokenizer comes from; `load_tokenizer` opens it again."""
    added = {"new_tokens": model.new_tokens.model_dump()} if model.new_tokens else {}
    return {"path": model.tokenizer or model.path, **added}


def _opened(model: ModelSection, base: Path) -> Any:
    named = model.tokenizer or model.path
    if named.startswith("builtin:"):
        return _fast(str(BUILTIN_DIRECTORY), named)
    path = base / Path(named).expanduser()
    if path.is_file() and path.name == "tokenizer.json":
        path = path.parent
    if path.is_dir():
        return _from_directory(path, named, model.trust_remote_code)
    if path.exists() or named.startswith((".", "/", "~")) or named.count("/") > 1:
        raise ConfigError(Problem("model.tokenizer", f"{named}: there is no such directory", do=f"looked for {path}"))
    return _from_hub(named, model)


def _from_directory(path: Path, named: str, trust: bool) -> Any:
    if (path / "tokenizer.json").exists():
        return _fast(str(path), named)
    pieces = sorted(path.glob("*.model"))
    if not (path / "tokenizer_config.json").exists() and len(pieces) == 1:
        return _sentencepiece(pieces[0], named)
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(str(path), trust_remote_code=trust)
    except (OSError, ValueError, KeyError, TypeError, ImportError) as error:
        raise _unopened(named, error) from None
    return _checked(tokenizer, named)


def _fast(path: str, named: str) -> Any:
    from transformers import PreTrainedTokenizerFast

    try:
        return _checked(PreTrainedTokenizerFast.from_pretrained(path), named)
    except ConfigError:
        raise
    except Exception as error:  # noqa: BLE001 (the Rust side raises bare Exception for a broken tokenizer.json)
        raise _unopened(named, error) from None


def _from_hub(named: str, model: ModelSection) -> Any:
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    try:
        return _checked(PreTrainedTokenizerFast.from_pretrained(named, revision=model.revision or "main"), named)
    except (OSError, ValueError, KeyError, TypeError):
        pass  # no tokenizer.json there: the general way tells what is wrong
    try:
        trust = model.trust_remote_code
        return _checked(AutoTokenizer.from_pretrained(named, revision=model.revision, trust_remote_code=trust), named)
    except (OSError, ValueError, KeyError, TypeError, ImportError) as error:
        raise _unopened(named, error) from None


def _sentencepiece(path: Path, named: str) -> Any:
    """A bare SentencePiece file, by what it holds: T5's and Llama's have classes of their own."""
    from sentencepiece import sentencepiece_model_pb2 as spm  # pyright: ignore[reportUnknownVariableType]
    from transformers import LlamaTokenizer, PreTrainedTokenizerFast, T5Tokenizer

    proto = spm.ModelProto()  # pyright: ignore[reportAttributeAccessIssue]
    try:
        proto.ParseFromString(path.read_bytes())
    except Exception as error:  # noqa: BLE001 (protobuf's DecodeError is not one class across its versions)
        raise _unopened(named, error) from None
    spec = proto.trainer_spec
    if spec.model_type == spec.BPE and path.name == "tokenizer.model":
        return _checked(LlamaTokenizer.from_pretrained(str(path.parent), add_bos_token=True), named)
    if spec.model_type == spec.UNIGRAM and path.name == "spiece.model":
        return _checked(T5Tokenizer.from_pretrained(str(path.parent)), named)
    if spec.model_type != spec.UNIGRAM:
        came = f"{path.name} is a SentencePiece file of a kind that needs its model's own class"
        raise ConfigError(
            Problem("model.tokenizer", f"{named}: {came}", "a tokenizer.json", "convert it with transformers")
        )
    backend = _unigram(proto)
    named_tokens = {
        "unk_token": spec.unk_id,
        "bos_token": spec.bos_id,
        "eos_token": spec.eos_id,
        "pad_token": spec.pad_id,
    }
    known = {key: proto.pieces[number].piece for key, number in named_tokens.items() if number >= 0}
    return _checked(PreTrainedTokenizerFast(tokenizer_object=backend, **known), named)


def _unigram(proto: Any) -> tokenizers.Tokenizer:
    """A SentencePiece unigram as transformers' own converter makes it."""
    vocabulary = [(piece.piece, piece.score) for piece in proto.pieces]
    backend = tokenizers.Tokenizer(Unigram(vocabulary, proto.trainer_spec.unk_id, proto.trainer_spec.byte_fallback))
    steps: list[Any] = [normalizers.Replace(tokenizers.Regex(" {2,}"), " ")]
    if proto.normalizer_spec.precompiled_charsmap:
        steps.insert(0, normalizers.Precompiled(proto.normalizer_spec.precompiled_charsmap))
    backend.normalizer = normalizers.Sequence(steps)
    scheme = "always" if proto.normalizer_spec.add_dummy_prefix else "never"
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme)
    backend.decoder = decoders.Metaspace(prepend_scheme=scheme)
    return backend


def _checked(tokenizer: Any, named: str) -> Any:
    if len(tokenizer("A word.", add_special_tokens=False)["input_ids"]) == 0:
        raise ConfigError(Problem("model.tokenizer", f"{named}: this tokenizer makes no tokens", "a whole tokenizer"))
    return tokenizer


def _unopened(named: str, error: Exception) -> ConfigError:
    do = "a directory with tokenizer.json (and tokenizer_config.json), or a hub id"
    return ConfigError(
        Problem("model.tokenizer", f"{named} cannot be opened: {type(error).__name__}: {first_line(error)}", do)
    )
