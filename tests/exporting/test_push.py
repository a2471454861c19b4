"""Pushing an export: against a server that answers as the hub does; the token goes to it and nowhere else."""

import base64
import http.server
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import pytest

TOKEN = "hf_canaryCANARYcanaryCANARYcanary00"
PROGRAM = """
import logging, sys
from pathlib import Path
logging.basicConfig(level=logging.DEBUG)
from dstune.exporting.push import push, require_token
try:
    print(push(Path(sys.argv[1]), sys.argv[2], require_token(sys.argv[2])))
except ValueError as error:
    print("refused:", error)
"""


class _Hub(http.server.BaseHTTPRequestHandler):
    """As much of the hub as an upload asks for; `owner/forbidden` is refused with a text that holds the token."""

    seen: ClassVar[list[tuple[str, Any]]] = []

    def do_GET(self) -> None:
        self._answer({"id": "owner/name", "sha": "0" * 40, "siblings": []})

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        lines = [json.loads(line) for line in body.splitlines()] if b"\n" in body else [json.loads(body or b"{}")]
        self.seen.append((self.path, lines if len(lines) > 1 else lines[0]))
        assert self.headers["Authorization"] == f"Bearer {TOKEN}"
        if "forbidden" in body.decode() or "forbidden" in self.path:
            self._answer({"error": f"no rights with {self.headers['Authorization']}"}, 403)
        elif self.path.endswith("/preupload/main"):
            files = [{"path": one["path"], "uploadMode": "regular", "shouldIgnore": False} for one in lines[0]["files"]]
            self._answer({"files": files})
        elif "/commit/main" in self.path:
            self._answer(
                {"success": True, "commitOid": "0" * 40, "commitUrl": "https://huggingface.co/owner/name/commit/000"}
            )
        else:
            self._answer({"url": "https://huggingface.co/owner/name", "errors": [], "warnings": []})

    def _answer(self, value: Any, status: int = 200) -> None:
        content = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        self.send_header("Content-Type", "application/json")
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *args: Any) -> None:
        pass


@pytest.fixture
def hub() -> Iterator[str]:
    _Hub.seen = []
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Hub) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()


def _push(
    directory: Path, hub_id: str, endpoint: str, token: str | None, home: Path
) -> subprocess.CompletedProcess[str]:
    """In a process of its own: the hub's client reads its settings when it is imported."""
    own = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE")
    environment = {key: value for key, value in os.environ.items() if key not in own}
    environment |= {"HF_ENDPOINT": endpoint, "HF_HOME": str(home), "HF_HUB_DISABLE_TELEMETRY": "1"}
    environment |= {"HF_TOKEN": token} if token else {}
    command = [sys.executable, "-c", PROGRAM, str(directory), hub_id]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, env=environment)


def test_an_export_is_pushed_privately_and_the_token_is_in_no_line(hub: str, tmp_path: Path) -> None:
    out = tmp_path / "export"
    out.mkdir()
    (out / "config.json").write_text("{}")
    (out / "model.safetensors").write_bytes(b"weights")
    done = _push(out, "owner/name", hub, TOKEN, tmp_path)
    assert done.stdout.strip() == "https://huggingface.co/owner/name/commit/000", done.stderr[-2000:]
    assert TOKEN not in done.stdout + done.stderr
    by_path = dict(_Hub.seen)
    created = by_path["/api/repos/create"]
    assert created.get("visibility") == "private" or created.get("private") is True
    commit = next(lines for path, lines in _Hub.seen if "/commit/main" in path)
    sent = {line["value"]["path"]: line["value"]["content"] for line in commit if line["key"] == "file"}
    assert base64.b64decode(sent["model.safetensors"]) == b"weights" and set(sent) == {
        "config.json",
        "model.safetensors",
    }


def test_refusals_say_what_to_do_and_hold_no_token(hub: str, tmp_path: Path) -> None:
    out = tmp_path / "export"
    out.mkdir()
    (out / "config.json").write_text("{}")
    refused = _push(out, "owner/forbidden", hub, TOKEN, tmp_path)
    assert "refused: owner/forbidden: could not be pushed" in refused.stdout and "hf upload" in refused.stdout
    assert TOKEN not in refused.stdout + refused.stderr
    none = _push(out, "owner/name", hub, None, tmp_path)
    assert "there is no token for the hub in the environment; expected HF_TOKEN" in none.stdout
    assert "an id of the hub" in _push(out, "../name", hub, TOKEN, tmp_path).stdout
