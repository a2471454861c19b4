"""Records of files, with file and line, and what is wrong with those that are not records."""

import gzip
import http.server
import json
import threading
import tracemalloc
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from dstune.config.schema import Source
from dstune.data.sources import Record, expand, read
from dstune.errors import ConfigError, DataError


def records(path: Path, cap: int = 1 << 20) -> list[Record]:
    (file,) = expand(Source(path=path.name), path.parent, cap)
    return list(read(file))


def write(tmp_path: Path, name: str, content: str | bytes) -> Path:
    path = tmp_path / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def reasons(found: list[Record]) -> list[str]:
    return [record.error.reason if record.error else "" for record in found]


def test_json_lines_with_blank_lines_and_a_mark_at_the_start(tmp_path: Path):
    path = write(tmp_path, "a.jsonl", b'\xef\xbb\xbf{"a": 1}\r\n\r\n  {"a": 2}')
    assert records(path) == [Record(1, {"a": 1}), Record(3, {"a": 2})]


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b'{"a": NaN}', "not_a_number"),
        (b'{"a": -Infinity}', "not_a_number"),
        (b'{"a": 1e999}', "not_a_number"),
        (b'{"a": 1, "a": 2}', "duplicate_key"),
        (b'{"b": {"a": 1, "a": 2}}', "duplicate_key"),
        (rb'{"a": "\ud800"}', "lone_surrogate"),
        (rb'{"a": ["\udc00x"]}', "lone_surrogate"),
        (b'{"a": "\xff"}', "invalid_utf8"),
        (b'{"a": "\xed\xa0\x80"}', "invalid_utf8"),
        (b'{"a": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "too_deep"),
        (b'{"a": "' + b"x" * (1 << 20) + b'"}', "record_too_long"),
        (b'{"a": "\x01"}', "invalid_json"),
        (b'{"a": 1,}', "invalid_json"),
        (b"{'a': 1}", "invalid_json"),
        (b'{"a": 1} {"a": 2}', "invalid_json"),
        (b'{"a": ' + b"9" * 5000 + b"}", "invalid_json"),
        (b'{"a": 01}', "invalid_json"),
        (b'{"a": "cut', "invalid_json"),
        (b"[1, 2]", "not_an_object"),
        (b'"text"', "not_an_object"),
        (b"null", "not_an_object"),
        (b'\xef\xbb\xbf{"a": 1}', "invalid_json"),
    ],
)
def test_a_bad_line_is_refused_alone(tmp_path: Path, line: bytes, reason: str):
    found = records(write(tmp_path, "a.jsonl", b'{"x": 0}\n' + line + b'\n{"x": 2}\n'))
    assert reasons(found) == ["", reason, ""]
    assert [record.line for record in found] == [1, 2, 3]
    assert found[2].value == {"x": 2}


def test_whole_surrogate_pairs_and_escaped_text_pass(tmp_path: Path):
    path = write(tmp_path, "a.jsonl", r'{"a": "\ud83d\ude00 \\ud800 \u0000 \u2028"}')
    assert records(path)[0].value == {"a": "😀 \\ud800 \x00 \u2028"}


def test_an_array_is_read_with_the_line_of_each_record(tmp_path: Path):
    text = '[\n  {"a": "[{,\\"}]\\\\"},\n\n  {\n "a": [1, {"b": []}]\n}\n,3, "x,]", {"a": NaN}\n]\n\n'
    found = records(write(tmp_path, "a.json", text))
    assert [record.line for record in found] == [2, 4, 7, 7, 7]
    assert found[0].value == {"a": '[{,"}]\\'}
    assert reasons(found) == ["", "", "not_an_object", "not_an_object", "not_a_number"]


def test_an_array_of_any_chunking_gives_the_same_records(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    values = [{"n": n, "text": '\\"' * n + "\n," * (n % 7) + "]}" * (n % 5)} for n in range(60)]
    path = write(tmp_path, "a.json", json.dumps(values, indent=1))
    whole = records(path)
    assert [record.value for record in whole] == values
    for size in (1, 2, 3, 7):
        monkeypatch.setattr("dstune.data.json_stream._READ_BYTES", size)
        from dstune.data.json_stream import _Elements, _parsed

        with path.open("rb") as file:
            assert list(_parsed(_Elements(file, "a.json", 1 << 20).array())) == whole


@pytest.mark.parametrize(
    ("name", "text", "where", "came"),
    [
        ("a.json", '[{"a": 1},\n{"a": 2}', "a.json:2", "never closed"),
        ("a.json", '[{"a": 1},\n{"a": ', "a.json:2", "never closed"),
        ("a.json", '[{"a": 1}\n {"a": 2}]', "a.json:2", "after a record"),
        ("a.json", '[{"a": 1},\n]', "a.json:2", "comma before"),
        ("a.json", '[{"a": 1}]\n\nmore', "a.json:3", "after the end"),
        ("a.json", "", "a.json", "empty"),
        ("a.jsonl", " \n\n", "a.jsonl", "empty"),
        ("a.csv", "", "a.csv", "empty"),
        ("a.json", "<html>", "a.json:1", "starts with"),
        ("a.json", '{\n"a": 1\n}\n x', "a.json:4", "between two records"),
        ("a.csv", 'a,b\n1,"2\n3,4\n', "a.csv:3", "unexpected end"),
        ("a.csv", "a,a\n1,2\n", "a.csv:1", "twice"),
        ("a.txt", "text", "a.txt", "unknown kind"),
    ],
)
def test_a_broken_file_is_named_with_its_line(tmp_path: Path, name: str, text: str, where: str, came: str):
    with pytest.raises(DataError) as caught:
        records(write(tmp_path, name, text))
    assert str(caught.value).startswith(f"{where}: ")
    assert came in str(caught.value)


def test_utf16_is_named(tmp_path: Path):
    with pytest.raises(DataError, match="UTF-16"):
        records(write(tmp_path, "a.json", "[]".encode("utf-16")))


def test_content_decides_between_lines_array_and_objects(tmp_path: Path):
    expected = [{"a": 1}, {"a": 2}]
    lines, array = '{"a": 1}\n{"a": 2}\n', '[{"a": 1},\n {"a": 2}]'
    pretty = "\n".join(json.dumps(value, indent=2) for value in expected)
    for name, text in [
        ("a.json", lines),
        ("b.jsonl", array),
        ("c.json", pretty),
        ("d.data", array),
        ("e.JSONL", lines),
    ]:
        assert [record.value for record in records(write(tmp_path, name, text))] == expected, name
    assert records(write(tmp_path, "one.json", '{"a": 1}'))[0].value == {"a": 1}
    assert records(write(tmp_path, "none.json", "[]")) == []
    broken_first = records(write(tmp_path, "f.json", '{"a": \n{"a": 2}\n'))
    assert reasons(broken_first) == ["invalid_json", ""]


def test_gzip_and_a_cut_gzip(tmp_path: Path):
    packed = gzip.compress(b'{"a": 1}\n' * 5000)
    assert len(records(write(tmp_path, "a.jsonl.gz", packed))) == 5000
    with pytest.raises(DataError, match="gzip"):
        records(write(tmp_path, "b.jsonl.gz", packed[:-20]))


def test_zstd_in_frames_and_a_cut_one(tmp_path: Path):
    frame = zstandard.compress(b'{"a": 1}\n' * 5000)
    assert len(records(write(tmp_path, "a.jsonl.zst", frame + frame))) == 10_000
    assert len(records(write(tmp_path, "b.json", zstandard.compress(b'[{"a": 1}]')))) == 1
    assert records(write(tmp_path, "c.csv.zst", zstandard.compress(b"a,b\n1,2\n")))[0].value == {"a": "1", "b": "2"}
    for cut in (frame[:-5], frame[:10], frame + frame[:-1], b"no zstd"):
        with pytest.raises(DataError, match="zstd"):
            records(write(tmp_path, "cut.jsonl.zst", cut))


def test_an_archive_is_named(tmp_path: Path):
    for magic, kind in ((b"PK\x03\x04....", "zip"), (b"BZh9....", "bzip2"), (b"\xfd7zXZ\x00..", "xz")):
        with pytest.raises(DataError, match=kind):
            records(write(tmp_path, "a.json", magic))


def test_documents_are_one_record_a_file(tmp_path: Path):
    write(tmp_path, "a.md", "\ufeff# Title\n\n{text}\n")
    write(tmp_path, "b.txt", b"caf\xe9")
    write(tmp_path, "c.txt.gz", gzip.compress(b"packed"))
    write(tmp_path, "d.jsonl", '{"text": "a line"}\n')
    write(tmp_path, "e.txt", "x" * 2000)
    files = expand(Source(path=".", format="documents"), tmp_path, 1024)
    assert [file.name for file in files] == ["a.md", "b.txt", "c.txt.gz", "d.jsonl", "e.txt"]
    found = [record for file in files for record in read(file)]
    assert [record.value["text"] if record.value else "" for record in found] == [
        *("# Title\n\n{text}\n", "", "packed", "a line", "")
    ]
    assert reasons(found) == ["", "invalid_utf8", "", "", "record_too_long"]
    with pytest.raises(DataError, match="format: documents"):
        records(tmp_path / "b.txt")


def test_tables_are_held_to_the_cap_and_to_their_columns(tmp_path: Path):
    table = pa.table({"prompt": ["q", "x" * 5000, "q"], "completion": ["a"] * 3})
    pq.write_table(table, tmp_path / "a.parquet")
    found = records(tmp_path / "a.parquet", 1024)
    assert reasons(found) == ["", "record_too_long", ""] and [record.line for record in found] == [1, 2, 3]
    twice = pa.Table.from_arrays([pa.array(["q"]), pa.array(["a"])], names=["prompt", "prompt"])
    with pa.OSFile(str(tmp_path / "b.arrow"), "wb") as sink, pa.ipc.new_file(sink, twice.schema) as writer:
        writer.write_table(twice)
    with pytest.raises(DataError, match="twice"):
        records(tmp_path / "b.arrow")


def test_settings_of_hub_ids_mean_nothing_for_local_files(tmp_path: Path):
    write(tmp_path, "a.jsonl", "{}")
    for settings in ({"revision": "abc"}, {"subset": "en"}):
        with pytest.raises(ConfigError, match="hub id"):
            expand(Source.model_validate({"path": "a.jsonl", **settings}), tmp_path)


@pytest.mark.parametrize("opening", [b'{"a": "', b'[{"a": "', b'[{"a": 1}, {"a": "\\\\'])
def test_a_giant_record_is_passed_over_in_little_memory(tmp_path: Path, opening: bytes):
    path = tmp_path / "a.json"
    with path.open("wb") as file:
        file.write(opening)
        for _ in range(32):
            file.write((b"x" * 1000 + b'\\"\\n') * (1 << 10))
        file.write(b'"}' + (b', {"a": 2}]' if opening.startswith(b"[") else b'\n{"a": 2}\n'))
    tracemalloc.start()
    found = records(path, 1 << 20)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert reasons(found)[-2:] == ["record_too_long", ""]
    assert found[-1].value == {"a": 2}
    assert peak < 12 << 20


def test_csv_keeps_every_cell_a_string(tmp_path: Path):
    text = '\ufeffinstruction,output\n"a, ""b""\nc",007\n1,2,3\nx,2020-01-02\n\nNaN,\n'
    found = records(write(tmp_path, "a.csv", text))
    assert found[0] == Record(2, {"instruction": 'a, "b"\nc', "output": "007"})
    assert found[1].line == 4 and found[1].error is not None and found[1].error.reason == "wrong_number_of_cells"
    assert found[2] == Record(5, {"instruction": "x", "output": "2020-01-02"})
    assert found[3] == Record(7, {"instruction": "NaN", "output": ""})


def test_csv_delimiters_and_bad_bytes(tmp_path: Path):
    assert records(write(tmp_path, "a.tsv", "a\tb\n1,5\t2\n"))[0].value == {"a": "1,5", "b": "2"}
    assert records(write(tmp_path, "b.csv", "a;b\n1,5;2\n"))[0].value == {"a": "1,5", "b": "2"}
    assert reasons(records(write(tmp_path, "c.csv", b"a,b\n1,\xff\n1,2\n"))) == ["invalid_utf8", ""]


def test_parquet_and_arrow_rows(tmp_path: Path):
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "name": "x"}]
    table = pa.table({"messages": [turns, turns[:1]], "n": pa.array([1, None])})
    pq.write_table(table, tmp_path / "a.parquet")
    found = records(tmp_path / "a.parquet")
    assert found[0] == Record(1, {"messages": turns, "n": 1})
    assert found[1] == Record(2, {"messages": turns[:1]})
    with pa.OSFile(str(tmp_path / "a.arrow"), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    assert records(tmp_path / "a.arrow") == found
    cut = (tmp_path / "a.parquet").read_bytes()[:-30]
    with pytest.raises(DataError, match="not a whole Parquet file"):
        records(write(tmp_path, "cut.parquet", cut))


def test_a_directory_of_datasets_is_read_by_split(tmp_path: Path):
    import datasets

    made = datasets.DatasetDict({name: datasets.Dataset.from_list([{"a": name}] * 3) for name in ("train", "test")})
    made.save_to_disk(tmp_path / "set")
    (file,) = expand(Source(path="set", split="test"), tmp_path)
    assert [record.value for record in read(file)] == [{"a": "test"}] * 3
    for file in ("train", "test"):
        assert [record.value for one in expand(Source(path=f"set/{file}"), tmp_path) for record in read(one)] == [
            {"a": file}
        ] * 3
    (tmp_path / "set" / "dataset_dict.json").unlink()
    assert [file.name for file in expand(Source(path="set"), tmp_path)] == [
        f"set/{split}/data-00000-of-00001.arrow" for split in ("test", "train")
    ]
    (tmp_path / "set" / "dataset_dict.json").write_text("{}")
    with pytest.raises(ConfigError, match="test, train"):
        expand(Source(path="set", split="dev"), tmp_path)


def test_names_are_as_written_and_sorted(tmp_path: Path):
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / ".cache").mkdir()
    for name in ("b.jsonl", "a.json", "notes.md", ".cache/c.json"):
        (tmp_path / "d" / name).write_text("{}")
    for written in ("d/*.json*", "d", "../" + tmp_path.name + "/d/?.json*"):
        files = expand(Source(path=written), tmp_path)
        assert [file.name for file in files] == ["d/a.json", "d/b.jsonl"]
    assert [file.name for file in expand(Source(path=f"{tmp_path}/d/a.json"), Path("/"))] == [f"{tmp_path}/d/a.json"]


def test_a_missing_file_names_its_neighbour(tmp_path: Path):
    write(tmp_path, "alpaca.json", "[]")
    with pytest.raises(ConfigError, match=r"did you mean 'alpaca\.json'"):
        expand(Source(path="alpaka.json"), tmp_path)
    with pytest.raises(ConfigError, match="no file matches"):
        expand(Source(path="*.csv"), tmp_path)
    with pytest.raises(ConfigError, match="address"):
        expand(Source(path="nowhere://bucket/a.json"), tmp_path)


def test_an_address_is_fetched_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    write(tmp_path, "a.jsonl", '{"a": 1}\n')
    monkeypatch.setenv("DSTUNE_CACHE", str(tmp_path / "cache"))

    class Handler(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *args):
            super().__init__(*args, directory=str(tmp_path))

        def log_message(self, *args):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_address[1]}/a.jsonl"
        (file,) = expand(Source(path=address), tmp_path)
        write(tmp_path, "c.csv", "a,b\n1,2\n")
        (table,) = expand(Source(path=address.replace("a.jsonl", "c.csv?download=true")), tmp_path)
        with pytest.raises(DataError, match="cannot be fetched"):
            expand(Source(path=address.replace("a.jsonl", "b.jsonl")), tmp_path)
        server.shutdown()
    assert file.name == address
    assert [record.value for record in read(table)] == [{"a": "1", "b": "2"}]
    assert [record.value for record in read(file)] == [{"a": 1}]
    assert expand(Source(path=address), tmp_path) == [file]


@pytest.mark.shared
def test_every_shared_file_is_read_whole(shared_data: Path):
    counts = {
        "gsm8k/gsm_8k_train.json": 7473,
        "llama_factory/alpaca_zh_demo.json": 1000,
        "belle/zh_seed_tasks.json": 175,
    }
    counts |= {"bfcl/BFCL_v4_multiple.json": 200, "crosswoz/val_sharegpt.jsonl": 500, "ms_swift_formats/alpaca.csv": 3}
    for name, count in counts.items():
        (file,) = expand(Source(path=name), shared_data)
        found = list(read(file))
        assert len(found) == count and not any(record.error for record in found), name
        assert file.name == name
    (strings,) = expand(Source(path="naughty_strings/blns.json"), shared_data)
    assert reasons(list(read(strings))) == ["not_an_object"] * 515
