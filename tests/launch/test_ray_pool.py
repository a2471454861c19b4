"""Preparing on a Ray cluster's CPUs: the same bytes as here, also when workers are killed on the way."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from dstune.config.schema import RunConfig
from dstune.data import prepare
from dstune.errors import UsageError
from dstune.launch.ray_pool import prepared_where_asked
from tests.launch.ray_cluster import RayHead
from tests.spawn import free_port

pytestmark = pytest.mark.ray


def config(folder: Path, where: str, address: str) -> RunConfig:
    source = {"path": str(folder / "a.jsonl")}
    settings = {"sources": [source], "max_length": 256, "workers": where, "num_processes": 2}
    section = {"name": "spread", "model": {"path": "builtin:tiny-llama"}, "data": settings}
    return RunConfig.model_validate(section | {"cluster": {"address": address}})


def write(folder: Path, count: int) -> None:
    records = ({"prompt": f"Question {number}", "completion": f"Answer {number} " * 20} for number in range(count))
    (folder / "a.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def dying_once(marker: str) -> Callable[[int], int]:
    """Doubles its chunk; the first process to meet chunk 3 is killed as by a lost node."""

    def work(chunk: int) -> int:
        if chunk == 3:
            try:
                Path(marker).touch(exist_ok=False)
            except FileExistsError:
                return 2 * chunk
            os.kill(os.getpid(), signal.SIGKILL)
        return 2 * chunk

    return work


_ON_RAY = """
import sys
from pathlib import Path
from dstune.config.schema import RunConfig
from dstune.errors import DstuneError
from dstune.launch.ray_pool import map_in_order, prepared_where_asked
from tests.launch.test_ray_pool import dying_once

config, folder, address = RunConfig.model_validate_json(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]
print("::", prepared_where_asked(config, folder).root)
print("::", list(map_in_order(dying_once, str(folder / "died"), range(12), 2, address)))
with (folder / "a.jsonl").open("a") as file:
    file.write("{broken\\n")
try:
    prepared_where_asked(config, folder)
except DstuneError as error:
    print("::", type(error).__name__, error)
"""


def test_prepared_on_ray(ray_head: RayHead, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, 12_000)  # several chunks
    monkeypatch.setenv("DSTUNE_CACHE", str(tmp_path / "here"))
    here = prepare.prepare(config(tmp_path, "local", "auto"), tmp_path)
    # In a process of its own: Ray reads the token once in a process's life, and other tests had other heads.
    section = config(tmp_path, "ray", ray_head.cluster_address).model_dump_json()
    command = [sys.executable, "-c", _ON_RAY, section, str(tmp_path), ray_head.cluster_address]
    environment = os.environ | {"DSTUNE_CACHE": str(tmp_path / "there"), "PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    # Ray says in between that it lost a worker.
    said = [line.removeprefix(":: ") for line in done.stdout.splitlines() if line.startswith(":: ")]
    there, doubled, refused = said
    assert here.num_examples == 12_000 and Path(there).name == here.root.name
    assert contents(Path(there)) == contents(here.root)
    assert doubled == str(list(range(0, 24, 2))) and (tmp_path / "died").exists()
    assert refused.startswith("DataError") and "a.jsonl:12001" in refused


def test_no_cluster_is_a_usage_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, 4)
    monkeypatch.setenv("DSTUNE_CACHE", str(tmp_path / "cache"))
    with pytest.raises(UsageError, match=r"data\.workers: local"):
        prepared_where_asked(config(tmp_path, "ray", f"127.0.0.1:{free_port()}"), tmp_path)
