import itertools
import json
import shutil
import subprocess
import sys
import time

import numpy as np
import pyarrow as pa
import pytest

from dstune import atomic
from dstune.data import shard_writer
from dstune.data.block import Block
from dstune.data.pack import pack
from dstune.data.shard_writer import ShardWriter, write_dataset_files, write_rows
from dstune.data.shards import FORMAT_VERSION, Prepared, StoredExample
from dstune.errors import DataError


def make_examples(count, seed=0):
    random = np.random.RandomState(seed)
    for number in range(count):
        length = int(random.randint(2, 60))
        mask = random.rand(length) < 0.5
        mask[0] = False
        yield StoredExample(random.randint(0, 2000, length).astype(np.int32), mask, number % 3, number + 1, number % 2)


def write_prepared(root, examples, max_length=64, at_once=1):
    root.mkdir()
    writer = ShardWriter(root)
    examples = iter(examples)
    while some := list(itertools.islice(examples, at_once)):
        writer.add(
            Block(
                np.concatenate([example.input_ids for example in some]),
                np.concatenate([example.loss_mask for example in some]),
                np.array([len(example.input_ids) for example in some], dtype=np.int32),
                np.array([example.source for example in some], dtype=np.int32),
                np.array([example.line for example in some], dtype=np.int64),
                np.array([example.part for example in some], dtype=np.int32),
            )
        )
    files = writer.finish()
    lengths, supervised = writer.lengths(), writer.supervised()
    packing = pack(lengths, max_length)
    files += write_dataset_files(root, files, "0123456789abcdef")
    files.append(write_rows(root, packing.items, packing.offsets, packing.totals(lengths), packing.totals(supervised)))
    manifest = {
        "format_version": FORMAT_VERSION,
        "settings": {"max_length": max_length},
        "counts": {"examples": len(lengths), "rows": packing.num_rows},
        "sources": [{"path": f"data/{name}.json"} for name in "abc"],
        "validation": None,
        "files": [file.to_dict() for file in files],
    }
    atomic.write_json(root / "manifest.json", manifest)
    return Prepared.open(root)


@pytest.fixture
def small_shards(monkeypatch):
    monkeypatch.setattr(shard_writer, "BATCH_EXAMPLES", 10)
    monkeypatch.setattr(shard_writer, "SHARD_EXAMPLES", 40)


def test_what_goes_in_comes_out(tmp_path, small_shards):
    examples = list(make_examples(105))
    prepared = write_prepared(tmp_path / "p", examples)
    assert len(list((tmp_path / "p").glob("data-*-of-00003.arrow"))) == 3
    assert prepared.num_examples == 105
    for number, expected in enumerate(examples):
        found = prepared.example(number)
        assert found.input_ids.dtype == np.int32 and found.loss_mask.dtype == np.bool_
        assert np.array_equal(found.input_ids, expected.input_ids)
        assert np.array_equal(found.loss_mask, expected.loss_mask)
        assert (found.source, found.line, found.part) == (expected.source, expected.line, expected.part)
    rows = [prepared.row(number) for number in range(prepared.num_rows)]
    assert sorted(np.concatenate(rows).tolist()) == list(range(105))
    for row, tokens, targets in zip(rows, prepared.rows_tokens, prepared.rows_supervised, strict=True):
        assert tokens == sum(len(examples[number].input_ids) for number in row) <= 64
        assert targets == sum(examples[number].loss_mask.sum() for number in row)
    assert prepared.origin(4) == "data/b.json:5"
    assert prepared.origin(1) == "data/b.json:2 part 1"
    for bad in (-1, 105):
        with pytest.raises(IndexError):
            prepared.example(bad)
    with pytest.raises(IndexError):
        prepared.row(prepared.num_rows)
    prepared.verify()


def test_the_same_examples_give_the_same_bytes(tmp_path, small_shards):
    write_prepared(tmp_path / "a", make_examples(105))
    write_prepared(tmp_path / "b", make_examples(105))
    names = sorted(file.name for file in (tmp_path / "a").iterdir())
    assert names == sorted(file.name for file in (tmp_path / "b").iterdir())
    assert all((tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes() for name in names)


def test_long_examples_end_a_batch_and_a_shard_early(tmp_path, monkeypatch):
    monkeypatch.setattr(shard_writer, "BATCH_TOKENS", 100)
    monkeypatch.setattr(shard_writer, "SHARD_TOKENS", 300)
    prepared = write_prepared(tmp_path / "p", make_examples(50))
    sizes = [batch.column("length").to_numpy().sum() for batch in prepared.batches()]
    assert max(sizes) < 160 and len(sizes) > 10
    assert len(list((tmp_path / "p").glob("data-*.arrow"))) > 3


def test_datasets_opens_it(tmp_path, small_shards):
    import datasets

    examples = list(make_examples(105))
    write_prepared(tmp_path / "p", examples)
    dataset = datasets.load_from_disk(str(tmp_path / "p"), keep_in_memory=False)
    assert dataset.num_rows == 105
    assert dataset.features == datasets.Features(
        {
            "input_ids": datasets.List(datasets.Value("int32")),
            "loss_mask": datasets.List(datasets.Value("bool")),
            "length": datasets.Value("int32"),
            "source": datasets.Value("int32"),
            "line": datasets.Value("int64"),
            "part": datasets.Value("int32"),
        }
    )
    assert dataset.data.schema.remove_metadata().field("input_ids").type == pa.list_(pa.int32())
    assert dataset.data.schema.remove_metadata().field("loss_mask").type == pa.list_(pa.bool_())
    for number in (0, 39, 40, 104):
        assert dataset[number]["input_ids"] == examples[number].input_ids.tolist()
        assert dataset[number]["loss_mask"] == examples[number].loss_mask.tolist()
        assert dataset[number]["length"] == len(examples[number].input_ids)


def _cut_at_every_batch(path):
    """The places in an Arrow stream file at which it can be cut and still reads well."""
    places = []
    with pa.memory_map(str(path)) as file, pa.ipc.open_stream(file) as reader:
        places.append(file.tell())
        for _ in reader:
            places.append(file.tell())
    return places[1:-1]


@pytest.mark.parametrize("name", ["data-00000-of-00003.arrow", "data-00002-of-00003.arrow", "rows.arrow"])
def test_a_stream_cut_between_batches_is_found(tmp_path, small_shards, monkeypatch, name):
    monkeypatch.setattr(shard_writer, "_ROWS_PER_BATCH", 7)
    write_prepared(tmp_path / "p", make_examples(105))
    places = _cut_at_every_batch(tmp_path / "p" / name)
    assert places
    for number, place in enumerate(places):
        copy = shutil.copytree(tmp_path / "p", tmp_path / f"cut-{number}")
        (copy / name).write_bytes((copy / name).read_bytes()[:place])
        with pytest.raises(DataError, match=f"{name}.*bytes"):
            Prepared.open(copy)
        # Even where the manifest's size was made to fit, the count tells.
        manifest = json.loads((copy / "manifest.json").read_text())
        next(file for file in manifest["files"] if file["name"] == name)["bytes"] = place
        (copy / "manifest.json").write_text(json.dumps(manifest))
        with pytest.raises(DataError, match=f"{name}.*rows"):
            Prepared.open(copy)


def test_flipped_bits_are_found_by_verify(tmp_path, small_shards):
    write_prepared(tmp_path / "p", make_examples(105))
    for file in sorted((tmp_path / "p").iterdir()):
        if file.name == "manifest.json":
            continue
        content = bytearray(file.read_bytes())
        for place in (0, len(content) // 2, len(content) - 1):
            content[place] ^= 4
            file.write_bytes(bytes(content))
            with pytest.raises(DataError, match=file.name.replace(".", r"\.")):
                Prepared.open(tmp_path / "p").verify()
            content[place] ^= 4
        file.write_bytes(bytes(content))
    Prepared.open(tmp_path / "p").verify()


def test_damage_is_named(tmp_path, small_shards):
    write_prepared(tmp_path / "p", make_examples(30))
    manifest = (tmp_path / "p/manifest.json").read_text()

    def refuses(pattern):
        with pytest.raises(DataError, match=pattern):
            Prepared.open(tmp_path / "p")

    (tmp_path / "p/manifest.json").write_text(manifest.replace('"format_version": 1', '"format_version": 9'))
    refuses("format version 9; expected 1")
    for text in ("{", "[]", "{}", "null"):
        (tmp_path / "p/manifest.json").write_text(text)
        refuses("damaged manifest")
    (tmp_path / "p/manifest.json").write_text(manifest)
    (tmp_path / "p/rows.arrow").rename(tmp_path / "rows.arrow")
    refuses("rows.arrow: No such file")
    (tmp_path / "p/rows.arrow").write_bytes(b"x" * (tmp_path / "rows.arrow").stat().st_size)
    refuses("no readable Arrow stream")
    shutil.copy(tmp_path / "rows.arrow", tmp_path / "p/rows.arrow")
    shutil.copy(tmp_path / "rows.arrow", tmp_path / "p/data-00000-of-00001.arrow")
    refuses("bytes")
    (tmp_path / "p/manifest.json").unlink()
    refuses("no prepared directory")


_OPEN_A_MILLION = """
import sys, time
from pathlib import Path
from dstune.data.shards import Prepared
def own_kib():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon"))
before = own_kib()
start = time.perf_counter()
prepared = Prepared.open(sys.argv[1])
seconds = time.perf_counter() - start
assert prepared.num_examples == 1_000_000
assert "torch" not in sys.modules
print(seconds, own_kib() - before)
"""


def test_a_million_examples_open_fast_and_small(tmp_path):
    ids = np.arange(100, dtype=np.int32)
    mask = ids >= 50
    examples = (StoredExample(ids, mask, 0, number, 0) for number in range(1_000_000))
    start = time.perf_counter()
    prepared = write_prepared(tmp_path / "p", examples, max_length=4096, at_once=1000)
    assert time.perf_counter() - start < 120
    assert prepared.num_rows == 25_000
    command = [sys.executable, "-c", _OPEN_A_MILLION, str(tmp_path / "p")]
    runs = [subprocess.run(command, capture_output=True, text=True, check=True).stdout.split() for _ in range(3)]
    assert min(float(seconds) for seconds, _ in runs) < 0.5
    assert (
        min(int(kib) for _, kib in runs) < 10_000
    )  # of 417 MB of files; pages of the files are shared and can be dropped
