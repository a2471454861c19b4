import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pytest

from dstune.config.load import load_run
from dstune.config.schema import RunConfig
from dstune.data import json_stream, prepare, work
from dstune.data.shards import Prepared
from dstune.errors import ConfigError, DataError, RunFailed
from dstune.paths import PreparedPaths

REPOSITORY = Path(__file__).parents[2]


def record(number, words=5):
    return {"instruction": f"Say number {number}.", "input": "", "output": " ".join(["word"] * words) + f" {number}"}


def write_lines(path, records):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join((one if isinstance(one, str) else json.dumps(one)) + "\n" for one in records))
    return path


def make_config(path="builtin:tiny-llama", seed=42, **data):
    data.setdefault("sources", [{"path": "data/a.jsonl"}])
    data.setdefault("num_processes", 1)
    data.setdefault("max_length", 128)
    return RunConfig.model_validate({"name": "demo", "model": {"path": path}, "data": data, "train": {"seed": seed}})


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("DSTUNE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "prepared"


@pytest.fixture
def base(tmp_path):
    write_lines(tmp_path / "run/data/a.jsonl", [record(number, number % 9 + 1) for number in range(60)])
    return tmp_path / "run"


def files_of(root):
    return {str(path.relative_to(root)): path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()}


def rejects_of(prepared):
    return [json.loads(line) for line in (prepared.root / "rejects.jsonl").read_text().splitlines()]


def require_sums(prepared):
    """DESIGN: records read = used + dropped, conversations made = kept + dropped, and every drop has its line."""
    kept = 0
    for file in prepared.manifest["sources"]:
        records, made = file["records"], file["conversations"]
        assert records["read"] == records["used"] + sum(records["dropped"].values())
        assert made["made"] == made["kept"] + sum(made["dropped"].values())
        listed = [one for one in rejects_of(prepared) if one["file"] == file["path"]]
        assert sum(one["part"] is None for one in listed) == sum(records["dropped"].values())
        assert sum(one["part"] is not None for one in listed) == sum(made["dropped"].values())
        kept += made["kept"]
    held_out = prepared.validation()
    fraction = prepared.manifest["settings"]["validation"] != "sources"
    assert kept == prepared.num_examples + (held_out.num_examples if held_out and fraction else 0)


def test_a_prepared_directory(base, cache):
    prepared = prepare.prepare(make_config(), base)
    prepared.verify()
    require_sums(prepared)
    assert prepared.root.parent == cache and prepared.root.name.startswith("demo-")
    assert [path.name for path in cache.iterdir()] == [prepared.root.name]
    counts = prepared.manifest["counts"]
    assert counts["examples"] == prepared.num_examples == 60
    assert counts["rows"] == prepared.num_rows < 60
    assert counts["tokens"] == prepared.rows_tokens.sum() == sum(len(prepared.example(n).input_ids) for n in range(60))
    assert counts["supervised_tokens"] == prepared.rows_supervised.sum()
    assert counts["fill"] == round(counts["tokens"] / (128 * prepared.num_rows), 6)
    assert [prepared.origin(number) for number in (0, 59)] == ["data/a.jsonl:1", "data/a.jsonl:60"]
    assert prepared.rows_tokens.max() <= 128
    names = {path.name for path in prepared.root.iterdir()}
    listed = {file["name"] for file in prepared.manifest["files"]}
    assert names == listed | {"manifest.json"}


def test_datasets_opens_a_prepared_directory(base, cache):
    import datasets

    prepared = prepare.prepare(make_config(validation=0.2), base)
    for root, opened in [(prepared.root, prepared), (prepared.root / "validation", prepared.validation())]:
        dataset = datasets.load_from_disk(str(root))
        assert dataset.num_rows == opened.num_examples
        assert str(dataset.data.schema.remove_metadata()).replace("\n", "; ") == (
            "input_ids: list<item: int32>;   child 0, item: int32; loss_mask: list<item: bool>;   child 0, item: bool; "
            "length: int32; source: int32; line: int64; part: int32"
        )
        assert dataset[3]["input_ids"] == opened.example(3).input_ids.tolist()
        counts = opened.manifest["counts"]
        for name in ("examples", "tokens", "supervised_tokens"):
            assert sum(file[name] for file in opened.manifest["sources"]) == counts[name]


def test_processes_do_not_change_a_byte(base, cache, monkeypatch):
    monkeypatch.setattr(work, "CHUNK_RECORDS", 7)
    write_lines(base / "data/a.jsonl", [record(number, number % 30) for number in range(100)] + ["{broken", "[]"])
    trees = []
    for processes in (1, 2, 3):
        monkeypatch.setenv("DSTUNE_CACHE", str(cache / str(processes)))
        config = make_config(bad_rows="skip", overlong="drop", validation=0.1, num_processes=processes)
        prepared = prepare.prepare(config, base)
        trees.append((prepared.root.name, files_of(prepared.root)))
    assert trees[0] == trees[1] == trees[2]
    assert len(rejects_of(prepared)) >= 2


def test_the_place_does_not_change_a_byte(base, cache, monkeypatch, tmp_path):
    first = prepare.prepare(make_config(), base)
    moved = tmp_path / "elsewhere" / "deep"
    write_lines(moved / "data/a.jsonl", (base / "data/a.jsonl").read_text().splitlines())
    monkeypatch.setenv("DSTUNE_CACHE", str(tmp_path / "cache2"))
    second = prepare.prepare(make_config(), moved)
    assert second.root != first.root and second.root.name == first.root.name
    assert files_of(first.root) == files_of(second.root)
    assert str(tmp_path).encode() not in b"".join(files_of(first.root).values())


def test_a_finished_one_is_reused(base, cache, monkeypatch):
    first = prepare.prepare(make_config(), base)
    before = (first.root / "manifest.json").stat()
    monkeypatch.setattr(prepare, "build_once", lambda *_: pytest.fail("prepared again"))
    again = prepare.prepare(make_config(num_processes=2), base)
    assert again.fingerprint == first.fingerprint
    assert (first.root / "manifest.json").stat().st_mtime_ns == before.st_mtime_ns


@pytest.mark.parametrize(
    "change",
    [
        {"max_length": 64},
        {"train_on": "last"},
        {"packing": False},
        {"template": "chatml"},
        {"validation": 0.1},
        {"bad_rows": "skip"},
    ],
)
def test_what_matters_gives_another_directory(base, cache, change):
    first = prepare.prepare(make_config(), base)
    second = prepare.prepare(make_config(**change), base)
    assert first.root != second.root


def test_the_seed_matters_where_something_is_drawn(base, cache):
    def root(seed, **data):
        return prepare.prepare(make_config(seed=seed, **data), base).root

    half = [{"path": "data/a.jsonl", "repeat": 0.5}]
    assert root(1) == root(2)
    assert root(1, validation=0.1) != root(2, validation=0.1)
    assert root(1, sources=half) != root(2, sources=half)


def test_changed_content_gives_another_directory(base, cache):
    first = prepare.prepare(make_config(), base)
    write_lines(base / "data/a.jsonl", [record(number) for number in range(60)])
    assert prepare.prepare(make_config(), base).root != first.root


BAD = ['{"instruction": "x", "output": ', '{"foo": 1}', '{"instruction": "x", "output": 5}', "null"]


def test_a_bad_record_stops_with_file_and_line(base, cache):
    write_lines(base / "data/a.jsonl", [record(0), *BAD, record(1)])
    with pytest.raises(DataError) as caught:
        prepare.prepare(make_config(), base)
    message = str(caught.value)
    assert caught.value.exit_status == 3
    for line in (2, 3, 4, 5):
        assert f"data/a.jsonl:{line}: " in message
    assert "bad_rows: skip" in message
    assert list(cache.iterdir()) == []


def test_bad_records_are_listed_where_the_user_says_so(base, cache):
    write_lines(base / "data/a.jsonl", [record(0), *BAD, record(1)])
    prepared = prepare.prepare(make_config(bad_rows="skip"), base)
    require_sums(prepared)
    assert prepared.num_examples == 2
    rejects = rejects_of(prepared)
    assert [one["line"] for one in rejects] == [2, 3, 4, 5]
    assert all(one["file"] == "data/a.jsonl" and one["reason"] and one["part"] is None for one in rejects)
    assert [prepared.origin(number) for number in range(2)] == ["data/a.jsonl:1", "data/a.jsonl:6"]


def test_many_bad_records_are_counted_not_printed(base, cache):
    write_lines(base / "data/a.jsonl", ["{}"] * 100)
    with pytest.raises(DataError) as caught:
        prepare.prepare(make_config(), base)
    assert len(caught.value.problems) == 21 and "80 more" in str(caught.value)


def test_a_broken_array_is_one_error_whatever_the_processes(base, cache, monkeypatch):
    monkeypatch.setattr(work, "CHUNK_RECORDS", 2)
    text = json.dumps([record(number) for number in range(60)], indent=0)
    (base / "data/b.json").write_text(text[: len(text) // 2])
    messages = []
    for processes in (1, 2):
        with pytest.raises(DataError, match=r"data/b\.json:\d+") as caught:
            prepare.prepare(make_config(sources=[{"path": "data/b.json"}], num_processes=processes), base)
        messages.append(str(caught.value))
    assert messages[0] == messages[1]
    assert list(cache.iterdir()) == []


def test_an_answer_without_words_is_dropped_with_its_reason(base, cache):
    write_lines(base / "data/a.jsonl", [record(0), {"instruction": "x", "output": ""}])
    prepared = prepare.prepare(make_config(), base)
    require_sums(prepared)
    assert [(one["line"], one["reason"]) for one in rejects_of(prepared)] == [(2, "empty_answer")]


def test_too_long_above_one_percent_is_an_error(base, cache):
    write_lines(base / "data/a.jsonl", [record(number, 500 if number < 2 else 3) for number in range(199)])
    with pytest.raises(DataError, match=r"2 of 199 conversations.*at most 1%") as caught:
        prepare.prepare(make_config(), base)
    assert "overlong: drop" in str(caught.value)
    write_lines(base / "data/a.jsonl", [record(number, 500 if number < 2 else 3) for number in range(200)])
    prepared = prepare.prepare(make_config(), base)
    require_sums(prepared)
    assert prepared.num_examples == 198
    assert prepared.manifest["sources"][0]["conversations"]["dropped"] == {"overlong": 2}
    assert [(one["line"], one["part"], one["reason"]) for one in rejects_of(prepared)] == [
        (1, 0, "overlong"),
        (2, 0, "overlong"),
    ]


def test_too_long_by_source_not_by_the_whole(base, cache):
    write_lines(base / "data/b.jsonl", [record(0, 500), record(1)])
    sources = [{"path": "data/a.jsonl"}, {"path": "data/b.jsonl"}]
    with pytest.raises(DataError, match=r"data/b\.jsonl: 1 of 2"):
        prepare.prepare(make_config(sources=sources), base)
    dropped = prepare.prepare(make_config(sources=sources, overlong="drop"), base)
    assert dropped.num_examples == 61


def test_too_long_is_cut_only_where_asked(base, cache):
    write_lines(base / "data/a.jsonl", [record(0, 500), record(1), {"instruction": "far " * 500, "output": "away"}])
    prepared = prepare.prepare(make_config(overlong="truncate"), base)
    require_sums(prepared)
    assert len(prepared.example(0).input_ids) == 128
    assert prepared.manifest["sources"][0]["conversations"]["truncated"] == 1
    assert [(one["line"], one["reason"]) for one in rejects_of(prepared)] == [(3, "no_supervised_tokens")]


def test_control_tokens_in_content_are_counted_or_refused(base, cache):
    write_lines(
        base / "data/a.jsonl", [record(0), {"instruction": "<|im_end|> or </s>", "output": "<|im_end|><|im_end|>"}]
    )
    prepared = prepare.prepare(make_config(), base)
    file = prepared.manifest["sources"][0]
    assert file["examples_with_control_tokens"] == 1 and file["control_tokens_encoded"] >= 2
    with pytest.raises(DataError, match=r"data/a\.jsonl:2.*control_token.*\n.*control_tokens: encode"):
        prepare.prepare(make_config(control_tokens="error"), base)
    skipped = prepare.prepare(make_config(control_tokens="error", bad_rows="skip"), base)
    require_sums(skipped)
    assert skipped.num_examples == 1


def test_repeat_limit_and_the_same_file_twice(base, cache):
    sources = [{"path": "data/a.jsonl", "repeat": 2.5, "limit": 10}, {"path": "data/a.jsonl", "repeat": 0.5}]
    prepared = prepare.prepare(make_config(sources=sources), base)
    require_sums(prepared)
    assert [file["records"]["read"] for file in prepared.manifest["sources"]] == [10, 60]
    assert prepared.num_examples == 70
    used = np.concatenate([prepared.row(number) for number in range(prepared.num_rows)])
    times = np.bincount(used, minlength=70)
    assert sorted(times[:10].tolist()) == [2] * 5 + [3] * 5
    assert sorted(times[10:].tolist()) == [0] * 30 + [1] * 30
    assert [one["examples_per_epoch"] for one in prepared.manifest["source_settings"]] == [25, 30]
    counts = prepared.manifest["counts"]
    assert counts["epoch_examples"] == 55 and counts["epoch_tokens"] == prepared.rows_tokens.sum()


def test_limit_runs_over_the_files_of_a_glob(base, cache):
    for name in "bcd":
        write_lines(base / f"more/{name}.jsonl", [record(number) for number in range(4)])
    prepared = prepare.prepare(make_config(sources=[{"path": "more/*.jsonl", "limit": 6}]), base)
    assert [(file["path"], file["records"]["read"]) for file in prepared.manifest["sources"]] == [
        ("more/b.jsonl", 4),
        ("more/c.jsonl", 2),
        ("more/d.jsonl", 0),
    ]
    assert prepared.origin(5) == "more/c.jsonl:2"


def test_a_fraction_is_held_out(base, cache):
    prepared = prepare.prepare(make_config(validation=0.1), base)
    held_out = prepared.validation()
    require_sums(prepared)
    assert (prepared.num_examples, held_out.num_examples) == (54, 6)
    lines = [{one.example(n).line for n in range(one.num_examples)} for one in (prepared, held_out)]
    assert not lines[0] & lines[1] and lines[0] | lines[1] == set(range(1, 61))
    assert held_out.origin(0).startswith("data/a.jsonl:")
    assert not (prepared.root / "stage").exists()
    # The validation set's manifest is a file of the first manifest: its fingerprint covers everything.
    path = prepared.root / "validation" / "manifest.json"
    path.write_text(path.read_text().replace("}", "} ", 1))
    with pytest.raises(DataError, match=r"validation/manifest\.json"):
        Prepared.open(prepared.root)


def test_validation_sources_of_their_own(base, cache):
    write_lines(base / "held/v.jsonl", [record(number) for number in range(7)])
    prepared = prepare.prepare(make_config(validation=[{"path": "held/v.jsonl", "repeat": 2}]), base)
    held_out = prepared.validation()
    require_sums(prepared)
    require_sums(held_out)
    assert (prepared.num_examples, held_out.num_examples) == (60, 7)
    assert held_out.manifest["counts"]["epoch_examples"] == 14
    assert held_out.validation() is None
    assert held_out.origin(6) == "held/v.jsonl:7"
    prepared.verify()


def test_nothing_usable_is_an_error_that_says_why(base, cache):
    write_lines(base / "data/a.jsonl", ["{}", {"instruction": "x", "output": ""}])
    with pytest.raises(
        DataError,
        match=r"data/a\.jsonl: no usable example: 2 records read.*empty_answer.*\nfor instance data/a\.jsonl:1: ",
    ):
        prepare.prepare(make_config(bad_rows="skip"), base)
    (base / "data/a.jsonl").write_text("")
    with pytest.raises(DataError, match=r"data/a\.jsonl"):
        prepare.prepare(make_config(), base)
    write_lines(base / "data/a.jsonl", [record(1)])
    with pytest.raises(DataError, match="at least 2"):
        prepare.prepare(make_config(validation=0.5), base)
    with pytest.raises(DataError, match=r"no example is left.*\n.*repeat"):
        prepare.prepare(make_config(sources=[{"path": "data/a.jsonl", "repeat": 0.1}]), base)
    assert list(cache.iterdir()) == []


def test_a_missing_file_is_an_error_of_the_run_file(base, cache):
    with pytest.raises(ConfigError, match=r"data/b\.jsonl"):
        prepare.prepare(make_config(sources=[{"path": "data/b.jsonl"}]), base)
    with pytest.raises(ConfigError, match="does not exist"):
        prepare.prepare(make_config(path="./no/such/model"), base)


@pytest.fixture
def nobody():
    """The rest of the test is run without root's right to read everything."""
    if os.geteuid() == 0:
        os.seteuid(65534)
        yield
        os.seteuid(0)
    else:
        yield


@pytest.mark.parametrize("source", ["locked/a.jsonl", "locked", "open/a.jsonl", "open", "open/*.jsonl"])
def test_what_may_not_be_read_is_named(monkeypatch, nobody, source):
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        base = Path(folder)
        monkeypatch.setenv("DSTUNE_CACHE", str(base / "cache"))
        for name in ("locked", "open"):
            write_lines(base / name / "a.jsonl", [record(1)]).chmod(0)
        (base / "locked").chmod(0)
        try:
            with pytest.raises((DataError, ConfigError), match=source.split("/")[0]):
                prepare.prepare(make_config(sources=[{"path": source}]), base)
        finally:
            (base / "locked").chmod(0o755)


def test_sequence_to_sequence_is_packed_as_causal_examples_are(base, cache):
    """Source and target together are an example's tokens, and the rows' tokens are at most `max_length`."""
    prepared = prepare.prepare(make_config(path="builtin:tiny-t5"), base)
    assert prepared.num_rows < prepared.num_examples == 60
    assert prepared.manifest["settings"]["seq2seq"] and prepared.manifest["settings"]["packing"]
    assert max(prepared.rows_tokens) <= prepared.max_length
    assert sorted(int(n) for row in range(prepared.num_rows) for n in prepared.row(row)) == list(range(60))
    example = prepared.example(0)
    first = int(np.flatnonzero(example.loss_mask)[0])
    assert first > 0 and example.loss_mask[first:].all()
    assert prepare.prepare(make_config(path="builtin:tiny-t5", packing=False), base).num_rows == 60


def test_without_packing_each_example_has_its_row(base, cache):
    prepared = prepare.prepare(make_config(packing=False), base)
    assert [prepared.row(number).tolist() for number in range(60)] == [[number] for number in range(60)]


def test_an_existing_directory_is_taken_for_the_same_tokenizer_only(base, cache, tmp_path):
    prepared = prepare.prepare(make_config(), base)
    config = make_config(sources=[], prepared=str(prepared.root))
    assert prepare.prepare(config, base).fingerprint == prepared.fingerprint
    with pytest.raises(DataError, match="a causal model"):
        prepare.prepare(make_config(path="builtin:tiny-t5", sources=[], prepared=str(prepared.root)), base)
    manifest = prepared.root / "manifest.json"
    manifest.write_text(manifest.read_text().replace(prepared.manifest["tokenizer"]["sha256"], "0" * 64))
    with pytest.raises(DataError, match="another tokenizer"):
        prepare.prepare(config, base)
    with pytest.raises(DataError, match="no prepared directory"):
        prepare.prepare(make_config(sources=[], prepared="nowhere"), base)


def test_a_file_that_changes_while_it_is_read(base, cache, monkeypatch):
    monkeypatch.setattr(json_stream, "_BLOCK_BYTES", 400)

    def meddle(progress):
        if progress.stage == "tokenising":
            write_lines(base / "data/a.jsonl", [record(number) for number in range(61)])

    with pytest.raises(DataError, match="changed while it was read"):
        prepare.prepare(make_config(), base, meddle)
    assert list(cache.iterdir()) == []


def test_progress_is_told(base, cache):
    told = []
    prepare.prepare(make_config(validation=0.1), base, told.append)
    assert [one.stage for one in told] == ["hashing", "tokenising", "validation", "packing", "packing"]
    assert told[1].records == told[1].examples == 60 and told[1].file == "data/a.jsonl"


def test_a_damaged_finished_one_is_named(base, cache):
    prepared = prepare.prepare(make_config(), base)
    (prepared.root / "rows.arrow").write_bytes(b"")
    with pytest.raises(DataError, match=r"rows\.arrow: 0 bytes.*\n.*Delete this directory"):
        prepare.prepare(make_config(), base)


_PREPARE = """
import sys
from pathlib import Path
from dstune.data import json_stream, prepare, work
from tests.data.test_prepare import make_config
work.CHUNK_RECORDS = 10
print("ready", flush=True)
prepared = prepare.prepare(make_config(num_processes=2, validation=0.1), Path(sys.argv[1]))
assert not {"torch", "datasets", "deepspeed", "ray"} & set(sys.modules), "heavy imports"
print(prepared.fingerprint)
"""


def start(base, **environment):
    # pytest imports nothing heavy either: the child's modules are what `prepare` needs.
    return subprocess.Popen(
        [sys.executable, "-c", _PREPARE, str(base)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": str(REPOSITORY), **environment},
    )


def test_two_at_once_and_no_torch(base, cache):
    write_lines(base / "data/a.jsonl", [record(number) for number in range(300)])
    results = [process.communicate(timeout=120) for process in [start(base), start(base)]]
    fingerprints = {out.split()[-1] for out, _ in results}
    assert len(fingerprints) == 1, results
    assert [path.name[:5] for path in cache.iterdir()] == ["demo-"]


def test_killed_at_any_moment_nothing_half_stands(base, cache):
    write_lines(base / "data/a.jsonl", [record(number) for number in range(400)])
    begin = time.monotonic()
    out, err = start(base, DSTUNE_CACHE=str(cache / "whole")).communicate(timeout=120)
    needed = time.monotonic() - begin
    assert len(out.split()) == 2, err
    chance = random.Random(7)
    finished = 0
    for _ in range(4):
        process = start(base)
        process.stdout.readline()
        time.sleep(chance.uniform(0, needed))  # the moment of the kill is the experiment
        process.send_signal(signal.SIGKILL)
        process.wait()
        for path in cache.glob("demo-*"):
            finished += 1
            assert Prepared.open(path).fingerprint == out.split()[-1]
    again, err = start(base).communicate(timeout=120)
    assert again.split()[-1] == out.split()[-1], err
    assert sorted(path.name[:5] for path in cache.iterdir()) == ["demo-", "whole"]


@pytest.fixture
def small_disk(tmp_path):
    if os.geteuid() != 0:
        pytest.skip("wants root, to mount a small tmpfs")
    folder = tmp_path / "small"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(folder)], capture_output=True)
    if mounted.returncode:
        pytest.skip("may not mount a tmpfs here")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.parametrize("validation", [0, 0.1])
def test_a_full_disk_is_an_error_and_leaves_nothing(base, small_disk, monkeypatch, validation):
    monkeypatch.setenv("DSTUNE_CACHE", str(small_disk))
    write_lines(base / "data/a.jsonl", [record(number, 40) for number in range(2000)])
    with pytest.raises(RunFailed, match=r"the disk is full.*\n.*DSTUNE_CACHE"):
        prepare.prepare(make_config(validation=validation), base)
    assert list((small_disk / "prepared").iterdir()) == []
    write_lines(base / "data/a.jsonl", [record(number) for number in range(20)])
    assert prepare.prepare(make_config(validation=validation), base).num_rows > 0


def test_a_cache_that_cannot_be_written_is_named(base, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("DSTUNE_CACHE", str(tmp_path / "file"))
    with pytest.raises(RunFailed, match="DSTUNE_CACHE"):
        prepare.prepare(make_config(), base)


@pytest.fixture
def lossy_tokenizer(tmp_path):
    """A tokenizer of single ASCII letters: anything else becomes <unk>."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = ["<unk>", "</s>", *(chr(code) for code in range(32, 127)), "\n"]
    backend = Tokenizer(models.WordLevel({letter: number for number, letter in enumerate(letters)}, "<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    backend.decoder = decoders.Fuse()
    wrapped = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", eos_token="</s>")
    wrapped.save_pretrained(tmp_path / "letters")
    return str(tmp_path / "letters")


def test_text_that_the_tokenizer_loses(base, cache, lossy_tokenizer):
    write_lines(base / "data/a.jsonl", [record(0), {"instruction": "na\u00efve \u9f98", "output": "yes"}, record(1)])

    def run(choice):
        config = make_config(lossy_text=choice, template="alpaca", max_length=512)
        model = {"path": "builtin:tiny-llama", "tokenizer": lossy_tokenizer}
        return prepare.prepare(config.model_validate(config.model_dump() | {"model": model}), base)

    with pytest.raises(DataError, match=r"data/a\.jsonl:2: lossy_text.*\n.*lossy_text: skip"):
        run("error")
    skipped = run("skip")
    require_sums(skipped)
    assert [(one["line"], one["part"], one["reason"]) for one in rejects_of(skipped)] == [(2, 0, "lossy_text")]
    allowed = run("allow")
    require_sums(allowed)
    assert allowed.num_examples == 3
    file = allowed.manifest["sources"][0]
    assert (file["lossy_examples"], file["lossy_characters"]) == (1, 2)


# --- Real data -------------------------------------------------------------------------------------------------------


REAL = [
    "gsm8k/gsm_8k_train.json",
    "llama_factory/alpaca_en_demo.json",
    "llama_factory/alpaca_zh_demo.json",
    "llama_factory/identity.json",
    "llama_factory/glaive_toolcall_en_demo.json",
    "fastchat/dummy_conversation.json",
    "t0_p3",
]


@pytest.mark.shared
@pytest.mark.parametrize("tokenizer", ["byte_bpe_2k", "gpt2"])
@pytest.mark.parametrize("path", REAL)
def test_real_data_is_accounted_for_and_reads_back(shared_data, cache, path, tokenizer):
    from dstune.data.tokenize import load_tokenizer

    config = RunConfig.model_validate(
        {
            "name": "real",
            "model": {"path": "builtin:tiny-llama", "tokenizer": str(shared_data / "tokenizers" / tokenizer)},
            "data": {
                "sources": [{"path": str(shared_data / path), "limit": 400}],
                "template": "chatml",
                "overlong": "drop",
                "bad_rows": "skip",
                "num_processes": 1,
            },
        }
    )
    prepared = prepare.prepare(config, shared_data)
    require_sums(prepared)
    prepared.verify()
    read = sum(file["records"]["read"] for file in prepared.manifest["sources"])
    assert read == min(400, read) and prepared.num_examples >= 0.9 * read
    opened = load_tokenizer(config.model, shared_data)
    for number in range(0, prepared.num_examples, 37):
        example = prepared.example(number)
        text = opened.decode(example.input_ids.tolist(), skip_special_tokens=False)
        assert "\ufffd" not in text
        trained = opened.decode(example.input_ids[example.loss_mask].tolist())
        assert trained.strip() and "<|im_start|>user" not in trained


def test_an_array_written_on_one_line_holds_as_many_records_as_elements(tmp_path: Path) -> None:
    records = [{"instruction": f"q{n}", "output": f"a{n}"} for n in range(100)]
    records[7] = {"odd": "record"}
    (tmp_path / "one.json").write_text(json.dumps(records))
    run = tmp_path / "run.yaml"
    run.write_text(
        "name: one\nmodel: {path: builtin:tiny-llama}\n"
        "data: {sources: [{path: one.json}], validation: 0.1, bad_rows: skip, max_length: 64, num_processes: 1}\n"
    )
    loaded = load_run(run)
    prepared = prepare.prepare(loaded.config, loaded.base)
    held_out = prepared.validation()
    assert held_out is not None
    assert prepared.num_examples + held_out.num_examples == 99
    places = [(e.line, e.part) for p in (prepared, held_out) for e in map(p.example, range(p.num_examples))]
    assert sorted(places) == [(1, n) for n in range(100) if n != 7]
    (reject,) = [json.loads(line) for line in PreparedPaths(prepared.root).rejects.read_text().splitlines()]
    assert (reject["line"], reject["part"]) == (1, 7)
