"""Every family through the command: what is made, what is dropped and why, and that the sums hold."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

TURN = {"deleted": False, "review_result": True}
TREE = {
    "message_tree_id": "t",
    "prompt": {
        **TURN,
        "message_id": "1",
        "role": "prompter",
        "text": "question",
        "replies": [
            {**TURN, "message_id": "2", "role": "assistant", "text": "worse", "rank": 1, "replies": []},
            {**TURN, "message_id": "3", "role": "assistant", "text": "better", "rank": 0, "replies": []},
            {**TURN, "message_id": "4", "role": "assistant", "text": "gone", "deleted": True, "replies": []},
        ],
    },
}
TASK = {"Definition": ["Say it."], "Instances": [{"input": "a", "output": ["b", "c"]}, {"input": "d", "output": ""}]}
ROWS: dict[str, list[dict[str, Any]]] = {
    "tree.jsonl": [TREE],
    "task.json": [TASK],
    "seeds.jsonl": [{"instruction": "q", "instances": [{"input": "", "output": "a"}, {"input": "i", "output": "b"}]}],
    "ranked.jsonl": [{"prompt": "q", "chosen": "a", "rejected": "b"}],
    "wanted.jsonl": [{"prompt": "q", "completion": c, "label": label} for c, label in (("a", True), ("b", False))],
    "rows.jsonl": [{"inputs": [1], "inputs_pretokenized": "q", "targets": [2], "targets_pretokenized": "a"}],
    "text.jsonl": [{"text": "a document"}, {"text": ""}, {"body": "?"}],
    "dataset_info.json": [],
    "mixed.jsonl": [
        {"messages": [{"role": "narrator", "content": "x"}]},
        {"prompt": "q", "completion": "a", "image": "i"},
    ],
}
SOURCES: list[tuple[dict[str, Any], dict[str, int], int, dict[str, int]]] = [
    ({"path": "tree.jsonl"}, {}, 3, {"deleted_message": 1}),
    ({"path": "tree.jsonl", "paths": "best", "format": "oasst"}, {}, 2, {"deleted_message": 1}),
    ({"path": "task.json"}, {}, 3, {"empty_answer": 1}),
    ({"path": "seeds.jsonl"}, {}, 2, {}),
    ({"path": "ranked.jsonl"}, {"preference_data": 1}, 0, {}),
    ({"path": "ranked.jsonl", "use": "chosen"}, {}, 1, {}),
    ({"path": "wanted.jsonl", "use": "chosen"}, {"rejected_answer": 1}, 1, {}),
    ({"path": "rows.jsonl", "format": "p3"}, {}, 1, {}),
    ({"path": "text.jsonl", "format": "documents"}, {"empty_document": 1, "unknown_format": 1}, 1, {}),
    ({"path": "dataset_info.json", "entry": "texts"}, {"empty_document": 1}, 1, {}),
    ({"path": "mixed.jsonl"}, {"unknown_role": 1, "unsupported_column": 1}, 0, {}),
    ({"path": "owner/name", "split": "test"}, {}, 1, {}),
]


def test_what_the_command_makes_of_every_family(tmp_path: Path):
    for name, rows in ROWS.items():
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    entry = {"file_name": "text.jsonl", "columns": {"prompt": "text"}, "num_samples": 2}
    (tmp_path / "dataset_info.json").write_text(json.dumps({"texts": entry}))
    snapshot = tmp_path / "hub" / "datasets--owner--name" / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (snapshot / "test.json").write_text(json.dumps([{"question": "q", "answer": "a"}]))
    (snapshot.parent.parent / "refs").mkdir()
    (snapshot.parent.parent / "refs" / "main").write_text("0" * 40)
    data = {"sources": [source for source, *_ in SOURCES], "bad_rows": "skip", "num_processes": 1}
    run = {"name": "families", "model": {"path": "builtin:tiny-llama"}, "data": data}
    (tmp_path / "run.yaml").write_text(json.dumps(run))
    command = [sys.executable, "-m", "dstune.cli.main", "prepare", str(tmp_path / "run.yaml"), "--json"]
    environment = {**os.environ, "HF_HUB_CACHE": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, env=environment)
    assert done.returncode == 0, done.stderr
    prepared = Path(json.loads(done.stdout)["prepared"])
    manifest = json.loads((prepared / "manifest.json").read_text())
    rejects = [json.loads(line) for line in (prepared / "rejects.jsonl").read_text().splitlines()]
    for (source, dropped, made, lost), told in zip(SOURCES, manifest["sources"], strict=True):
        records, conversations = told["records"], told["conversations"]
        assert (records["dropped"], conversations["made"], conversations["dropped"]) == (dropped, made, lost), source
        assert records["read"] == records["used"] + sum(dropped.values())
        assert conversations["made"] == conversations["kept"] + sum(lost.values())
    assert len(rejects) == sum(sum(dropped.values()) + sum(lost.values()) for _, dropped, _, lost in SOURCES)
    assert manifest["counts"]["examples"] == sum(made - sum(lost.values()) for _, _, made, lost in SOURCES)
