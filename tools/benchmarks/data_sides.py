"""One side of one comparison of `tools/bench data`, in a process of its own; prints one line of JSON.

Seconds are of the work itself: what both sides need before it (imports, the tiny model that TRL's trainer wants) does not count.
"""

import bisect
import json
import os
import resource
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

MAX_LENGTH = 4096
_PAGE_KIB = os.sysconf("SC_PAGE_SIZE") // 1024


def dstune_prepare(chats: str, tokenizer: str, processes: str) -> dict[str, Any]:
    """`dstune prepare`, hashes, files and fsync included."""
    from dstune.config.schema import RunConfig
    from dstune.data.prepare import prepare

    start = time.perf_counter()
    prepared = prepare(RunConfig.model_validate(_run(chats, tokenizer, int(processes))), Path.cwd())
    seconds = time.perf_counter() - start
    counts = prepared.manifest["counts"]
    return {"seconds": seconds, "rows": counts["examples"], "tokens": counts["tokens"], "directory": str(prepared.root)}


def _run(chats: str, tokenizer: str, processes: int) -> dict[str, Any]:
    return {
        "name": "bench",
        "model": {"path": "builtin:tiny-llama", "tokenizer": tokenizer},
        "data": {
            "sources": [{"path": chats}],
            "template": "chatml",
            "max_length": MAX_LENGTH,
            "num_processes": processes,
            "overlong": "drop",
        },
    }


def trl_prepare(chats: str, tokenizer: str, processes: str) -> dict[str, Any]:
    """`datasets`' reader, and what `SFTTrainer` does with the data before it trains: template, ids, masks, packing."""
    import datasets

    datasets.disable_progress_bars()
    trainer, arguments, loaded = _trl(tokenizer)
    folder = os.environ["HF_HOME"]
    start = time.perf_counter()
    rows = datasets.load_dataset("json", data_files=chats, split="train", cache_dir=folder)
    count = len(rows)
    arguments.dataset_num_proc = int(processes) if int(processes) > 1 else None
    made = trainer(rows, loaded, arguments)
    return {"seconds": time.perf_counter() - start, "rows": count, "packed": len(made)}


def _trl(tokenizer: str) -> tuple[Callable[..., Any], Any, Any]:
    """TRL's trainer as a function from a dataset to the prepared dataset, its settings, and the tokenizer with the same template."""
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM
    from trl import SFTConfig, SFTTrainer

    from dstune.data.templates import resolve_template

    loaded = AutoTokenizer.from_pretrained(tokenizer)
    loaded.chat_template = resolve_template("chatml", loaded, Path.cwd()).source
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 1, "num_key_value_heads": 1}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(loaded), num_hidden_layers=1, **sizes))
    arguments = SFTConfig(
        output_dir=os.environ["HF_HOME"],
        max_length=MAX_LENGTH,
        packing=True,
        assistant_only_loss=True,
        report_to=[],
        use_cpu=True,
        bf16=False,
        disable_tqdm=True,
    )

    def prepare(rows: Any, tokenizer: Any, arguments: Any) -> Any:
        return SFTTrainer(model, args=arguments, train_dataset=rows, processing_class=tokenizer).train_dataset

    return prepare, arguments, loaded


def check_tokens(directory: str, chats: str, tokenizer: str, every: str) -> dict[str, Any]:
    """How many of the chats' ids and masks (each `every`-th) are those of `apply_chat_template`."""
    from transformers import AutoTokenizer

    from dstune.data.shards import Prepared
    from dstune.data.templates import resolve_template

    prepared = Prepared.open(directory)
    loaded = AutoTokenizer.from_pretrained(tokenizer)
    source = resolve_template("chatml", loaded, Path.cwd()).source
    lines = Path(chats).read_text(encoding="utf-8").split("\n")  # not at U+2028, as splitlines would
    compared = ids = masks = 0
    for number in range(0, prepared.num_examples, int(every)):
        example = prepared.example(number)
        theirs = loaded.apply_chat_template(
            json.loads(lines[example.line - 1])["messages"],
            chat_template=source,
            return_dict=True,
            return_assistant_tokens_mask=True,
        )
        compared += 1
        ids += example.input_ids.tolist() == theirs["input_ids"]
        masks += example.loss_mask.astype(int).tolist() == theirs["assistant_masks"]
    return {"compared": compared, "ids_equal": ids, "masks_equal": masks}


def lengths_of(directory: str, count: int) -> np.ndarray:
    """`count` lengths drawn from a prepared directory's: a real histogram."""
    from dstune.data.shards import Prepared

    found = np.concatenate([np.asarray(batch.column("length")) for batch in Prepared.open(directory).batches()])
    return np.random.default_rng(0).choice(found[found <= MAX_LENGTH], count).astype(np.int32)


def dstune_packing(directory: str, count: str) -> dict[str, Any]:
    from dstune.data.pack import pack

    lengths = lengths_of(directory, int(count))
    start = time.perf_counter()
    packing = pack(lengths, MAX_LENGTH)
    seconds = time.perf_counter() - start
    again = pack(lengths, MAX_LENGTH)
    same = np.array_equal(packing.items, again.items) and np.array_equal(packing.offsets, again.offsets)
    whole = np.array_equal(np.sort(packing.items), np.arange(len(lengths)))
    largest = int(packing.totals(lengths).max())
    return _fill(lengths, packing.num_rows, seconds) | {
        "deterministic": same,
        "each_once": whole,
        "largest_row": largest,
    }


def trl_packing(directory: str, count: str) -> dict[str, Any]:
    """TRL's `bfd` on a dataset of such examples, as its trainer calls it (batches of 1,000)."""
    import datasets
    import pyarrow as pa
    from trl import pack_dataset

    datasets.disable_progress_bars()
    lengths = lengths_of(directory, int(count))
    offsets = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])
    values = pa.array(np.zeros(int(offsets[-1]), dtype=np.int8))  # one byte a token: the least that it could move
    rows = datasets.Dataset(pa.table({"input_ids": pa.LargeListArray.from_arrays(pa.array(offsets), values)}))
    start = time.perf_counter()
    packed = pack_dataset(rows, MAX_LENGTH, "bfd")
    return _fill(lengths, len(packed), time.perf_counter() - start)


def knapsack_packing(directory: str, count: str) -> dict[str, Any]:
    """The greedy knapsack that LLaMA-Factory describes: the largest length that still fits, found by bisection, again and again.

    In batches of 1,000, as its preprocessing calls it: it is quadratic in the batch.
    """
    lengths = lengths_of(directory, int(count))
    start = time.perf_counter()
    rows = sum(
        sum(1 for _ in _knapsacks(sorted(lengths[first : first + 1000].tolist())))
        for first in range(0, len(lengths), 1000)
    )
    return _fill(lengths, rows, time.perf_counter() - start)


def _knapsacks(ascending: list[int]) -> Iterator[list[int]]:
    while ascending:
        room, row = MAX_LENGTH, list[int]()
        while (fits := bisect.bisect_right(ascending, room)) > 0:
            row.append(ascending.pop(fits - 1))
            room -= row[-1]
        yield row


def _fill(lengths: np.ndarray, rows: int, seconds: float) -> dict[str, Any]:
    fill = float(lengths.sum(dtype=np.int64) / (rows * MAX_LENGTH))
    return {"seconds": seconds, "rows": rows, "fill": round(fill, 6)}


def opening(directory: str, step: str) -> dict[str, Any]:
    """Open a prepared directory and make the batch of `step`; memory above the imports (pages of mapped files apart)."""
    from dstune.batch import collate
    from dstune.data import order
    from dstune.data.shards import Prepared

    before, start = _own_kib(), time.perf_counter()
    prepared = Prepared.open(directory)
    positions = order.total_positions(prepared.num_rows, None, int(step) + 1, 8)
    rows = order.rows_of_step(prepared.num_rows, 42, 8, positions, int(step))
    batch = collate(prepared, rows.tolist(), "packed", 0)
    seconds = time.perf_counter() - start
    whole = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {
        "seconds": seconds,
        "examples": prepared.num_examples,
        "tokens_in_batch": batch.num_tokens,
        "mib_above_import": round((_own_kib() - before) / 1024, 1),
        "resident_mib_with_mapped_files": round(whole / 1024, 1),
    }


def _own_kib() -> int:
    """Resident memory without the pages of mapped files."""
    _, resident, shared, *_ = map(int, Path("/proc/self/statm").read_text().split())
    return (resident - shared) * _PAGE_KIB


def dstune_loader(directory: str, count: str) -> dict[str, Any]:
    """Rows out of the loader that the training loop uses: order, reading, tensors."""
    from dstune.batch import collate
    from dstune.data import order
    from dstune.data.shards import Prepared

    prepared = Prepared.open(directory)
    steps = int(count) // 8
    positions = order.total_positions(prepared.num_rows, None, steps, 8)
    start = time.perf_counter()
    tokens = 0
    for step in range(steps):
        rows = order.rows_of_step(prepared.num_rows, 42, 8, positions, step)
        for row in rows.tolist():
            tokens += collate(prepared, [row], "packed", 0).num_tokens
    seconds = time.perf_counter() - start
    return {"seconds": seconds, "rows": steps * 8, "tokens": tokens}


def trl_loader(directory: str, count: str) -> dict[str, Any]:
    """The same rows as TRL keeps them (a `datasets` table of packed ids and labels) through its collator and a `DataLoader`."""
    import datasets
    import torch
    from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

    from dstune.data.shards import Prepared

    prepared = Prepared.open(directory)
    total = min(int(count) // 8 * 8, prepared.num_rows)

    def packed() -> Iterator[dict[str, Any]]:
        for number in range(total):
            examples = [prepared.example(int(one)) for one in prepared.row(number)]
            ids = np.concatenate([example.input_ids for example in examples])
            mask = np.concatenate([example.loss_mask for example in examples])
            sizes = [len(example.input_ids) for example in examples]
            yield {"input_ids": ids, "labels": np.where(mask, ids, -100), "seq_lengths": sizes}

    rows = datasets.Dataset.from_generator(packed, cache_dir=os.environ["HF_HOME"])
    collator = DataCollatorForLanguageModeling(pad_token_id=0, padding_free=True)
    loader = torch.utils.data.DataLoader(rows, batch_size=1, shuffle=True, collate_fn=collator)
    tokens, seen, start = 0, 0, time.perf_counter()
    while seen < int(count) // 8 * 8:
        for batch in loader:
            tokens += batch["input_ids"].numel()
            seen += 1
            if seen == int(count) // 8 * 8:
                break
    return {"seconds": time.perf_counter() - start, "rows": seen, "tokens": tokens}


def limits(chats: str, tokenizer: str) -> dict[str, Any]:
    """What the figures stand beside: the tokenizer alone, reading and hashing the file, and copying memory."""
    import hashlib

    from tokenizers import Tokenizer

    from dstune.data.fast_tokens import fast_tokens

    slow = Tokenizer.from_file(str(Path(tokenizer) / "tokenizer.json"))
    text = slow.to_str()
    fast = fast_tokens(slow, text, json.loads(text))
    assert fast is not None
    with Path(chats).open(encoding="utf-8") as file:
        texts = [line for line, _ in zip(file, range(20_000), strict=False)]
    start = time.perf_counter()
    for first in range(0, len(texts), 500):
        slow.encode_batch_fast(texts[first : first + 500])
    library = len(texts) / (time.perf_counter() - start)
    fast.encode(texts)
    start = time.perf_counter()
    for first in range(0, len(texts), 500):
        fast.encode(texts[first : first + 500])
    quick = len(texts) / (time.perf_counter() - start)
    content = Path(chats).read_bytes()
    start = time.perf_counter()
    hashlib.sha256(content).hexdigest()
    hashed = len(content) / (time.perf_counter() - start)
    start = time.perf_counter()
    bytearray(content)
    return {
        "chats_per_second_tokenizers_alone": round(library),
        "chats_per_second_fast_tokenizer_alone": round(quick),
        "sha256_bytes_per_second": round(hashed),
        "copy_bytes_per_second": round(len(content) / (time.perf_counter() - start)),
    }


def main() -> None:
    side, *arguments = sys.argv[1:]
    with tempfile.TemporaryDirectory(dir=os.environ.get("BENCH_SCRATCH")) as folder:
        os.environ.setdefault("HF_HOME", folder)
        print(json.dumps(globals()[side](*arguments)))


if __name__ == "__main__":
    main()
