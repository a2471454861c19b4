"""Data sets of the hub, from a cache laid out as the hub's own client does it: nothing here asks the network."""

import hashlib
import http.server
import json
import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any, ClassVar

import pytest

from dstune.config.schema import Source
from dstune.data import hub
from dstune.data.sources import expand, read
from dstune.errors import ConfigError, DataError

COMMIT = "0123456789abcdef0123456789abcdef01234567"
CARD = """---
license: mit
configs:
- config_name: main
  default: true
  data_files:
  - split: train
    path: data/train-*
  - split: test
    path: [data/test.jsonl]
- config_name: extra
  data_files: extra/*.jsonl
---
# About
"""


@pytest.fixture()
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The snapshot's folder of `owner/name`; the hub is not to be asked."""
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub._snapshot_download.HF_HUB_CACHE", str(tmp_path), raising=False)
    monkeypatch.setattr("huggingface_hub._snapshot_download.constants.HF_HUB_CACHE", str(tmp_path), raising=False)
    hub._listing.cache_clear()  # pyright: ignore[reportPrivateUsage]
    repository = tmp_path / "datasets--owner--name"
    folder = repository / "snapshots" / COMMIT
    folder.mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(COMMIT)
    return folder


def fill(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(json.dumps({"prompt": name, "completion": "a"}) + "\n")


def names(**settings: Any) -> list[str]:
    return [file.name.removeprefix("owner/name/") for file in expand(Source(path="owner/name", **settings), Path("/"))]


def test_a_card_names_subsets_and_splits(cache: Path):
    fill(cache, "data/train-a.jsonl", "data/train-b.jsonl", "data/test.jsonl", "extra/c.jsonl", "other.jsonl")
    (cache / "README.md").write_text(CARD)
    assert names() == names(split="train", subset="main") == ["data/train-a.jsonl", "data/train-b.jsonl"]
    assert names(split="test") == ["data/test.jsonl"]
    assert names(subset="extra") == ["extra/c.jsonl"]
    (first, _) = expand(Source(path="owner/name", revision=COMMIT), Path("/"))
    assert [record.value for record in read(first)] == [{"prompt": "data/train-a.jsonl", "completion": "a"}]
    with pytest.raises(ConfigError, match="main, extra"):
        names(subset="none")
    with pytest.raises(ConfigError, match="train, test"):
        names(split="dev")


def test_without_a_card_the_names_tell(cache: Path):
    fill(cache, "train.jsonl", "test.jsonl", "en/valid.jsonl", "dataset_infos.json")
    assert names() == ["train.jsonl"]
    assert names(split="validation") == ["en/valid.jsonl"]
    assert names(subset="en", split="validation") == ["en/valid.jsonl"]
    with pytest.raises(ConfigError, match="test, train, validation"):
        names(split="full")


def test_one_file_of_any_name_is_the_training_set(cache: Path):
    fill(cache, "alpaca.json", "builder.py")
    assert names() == ["alpaca.json"]


def test_a_cache_that_holds_a_part_is_told(cache: Path):
    fill(cache, "data/train-00000-of-00002.jsonl")
    with pytest.raises(DataError, match="train-00001-of-00002"):
        names()


def test_what_is_not_there_is_told(cache: Path):
    with pytest.raises(DataError, match="hf download"):
        expand(Source(path="owner/other"), Path("/"))
    with pytest.raises(ConfigError, match="there is no such file"):
        expand(Source(path="data/missing.json"), Path("/"))
    (cache / "own").mkdir()
    (cache / "own" / "trainings").mkdir()
    with pytest.raises(ConfigError, match="did you mean 'trainings'"):  # its directory is here: no id of the hub
        expand(Source(path="own/training"), cache)
    fill(cache, "only.py")
    with pytest.raises(ConfigError, match="code is not run"):
        names()


class _Hub(http.server.BaseHTTPRequestHandler):
    """As much of the hub as its client asks for: what a data set holds, and its files."""

    files: ClassVar[dict[str, bytes]] = {}

    def do_HEAD(self):
        self._answer(body=False)

    def do_GET(self):
        self._answer(body=True)

    def _answer(self, body: bool) -> None:
        path = self.path.partition("?")[0]
        if path.startswith("/api/datasets/owner/name"):
            listed = [{"rfilename": name} for name in self.files]
            content = json.dumps({"id": "owner/name", "sha": COMMIT, "siblings": listed}).encode()
        else:
            revision_and_name = path.removeprefix("/datasets/owner/name/resolve/")
            content = self.files.get(revision_and_name.partition("/")[2], b"")
        self.send_response(200 if content else 404)
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("ETag", f'"{hashlib.sha256(content).hexdigest()}"')
        self.send_header("Content-Length", str(len(content)))
        if not content:
            self.send_header("X-Error-Code", "RepoNotFound")
        self.end_headers()
        if body:
            self.wfile.write(content)

    def log_message(self, *args: Any) -> None:
        pass


def test_the_hub_is_asked_once_and_its_cache_then_serves(tmp_path: Path):
    """In a process of its own: the hub's client reads its settings when it is imported."""
    _Hub.files = {
        "README.md": CARD.encode(),
        "data/train-0.jsonl": b'{"prompt": "q", "completion": "a"}\n',
        "loader.py": b"1/0",
    }
    program = """
import sys
from pathlib import Path
from dstune.config.schema import Source
from dstune.data.sources import expand, read
try:
    print([[record.value for record in read(file)] for file in expand(Source(path=sys.argv[1]), Path("/"))])
except ValueError as error:
    print(error)
"""

    def ask(name: str, **more: str) -> str:
        own = ("HF_HUB_CACHE", "HF_TOKEN", "HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE")  # what the tests are run with
        environment = {key: value for key, value in os.environ.items() if key not in own}
        environment |= {"HF_ENDPOINT": address, "HF_HOME": str(tmp_path), **more}
        command = [sys.executable, "-c", program, name]
        return subprocess.run(command, capture_output=True, text=True, timeout=60, env=environment).stdout

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Hub) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_address[1]}"
        rows = "[[{'prompt': 'q', 'completion': 'a'}]]\n"
        assert ask("owner/name") == rows
        assert "no such data set on the hub" in ask("owner/other")
        server.shutdown()
    assert ask("owner/name") == rows
    assert ask("owner/name", HF_HUB_OFFLINE="1") == rows
