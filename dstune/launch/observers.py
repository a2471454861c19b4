"""Looks on while a run is driven: shows progress to a person, hands records to a caller's hooks."""

from collections.abc import Callable
from typing import Any

from dstune.launch.driver import Observer
from dstune.records.console import StepProgress

Hook = Callable[[dict[str, Any]], None]


class Watcher(Observer):
    """The driver's observer of one call. `console` None: nothing is shown."""

    def __init__(
        self,
        total_steps: int,
        console: str | None,
        on_step: Hook | None = None,
        on_evaluate: Hook | None = None,
        on_commit: Hook | None = None,
    ) -> None:
        self._progress = StepProgress(total_steps, console) if console else None
        self._on_step, self._on_evaluate, self._on_commit = on_step, on_evaluate, on_commit

    def __enter__(self) -> "Watcher":
        return self

    def __exit__(self, *_: object) -> None:
        if self._progress:
            self._progress.close()

    def say(self, text: str) -> None:
        """A line for the person who looks on, if one does."""
        if self._progress:
            self._progress.say(text)

    def on_step(self, record: dict[str, Any]) -> None:
        if self._progress:
            self._progress.step(record)
        if self._on_step:
            self._on_step(record)

    def on_evaluate(self, record: dict[str, Any]) -> None:
        if self._progress and record["loss"] is not None:
            self._progress.say(f"held-out loss at step {record['step']}: {record['loss']:.4f}")
        if self._on_evaluate:
            self._on_evaluate(record)

    def on_commit(self, record: dict[str, Any]) -> None:
        if self._on_commit:
            self._on_commit(record)

    def on_event(self, record: dict[str, Any]) -> None:
        """What a person must know at once: failures and their cause, new attempts, skipped steps."""
        if not self._progress:
            return
        kind = record["event"]
        if kind == "attempt_started":
            start = f", from step {record['from_step']}" if record["from_step"] else ""
            self._progress.say(f"attempt {record['attempt']}: {record['world']} workers{start}")
        elif kind == "planned":
            why = f" ({record['why']})" if record["why"] else ""
            self._progress.say(f"attempt {record['attempt']}: {record['plan']}{why}")
        elif kind == "failure":
            self._progress.say(f"attempt {record['attempt']} failed: {record['message']}")
        elif kind == "passed_over":
            self._progress.say(f"checkpoint passed over: {record['checkpoint']}")
        elif kind == "commit_failed":
            self._progress.say(f"step {record['step']} was not committed: {record['message']}")
        elif kind == "publish_failed":
            self._progress.say(f"step {record['step']} was not uploaded: {record['message']}")
        elif kind == "fetched":
            self._progress.say(f"step {record['step']} was fetched from {record['store']}")
        elif kind == "optimizer_restarted":
            self._progress.say(f"step {record['step']} was saved as weights alone: the optimizer begins anew")
        elif kind == "skip":
            places = ", ".join(f"{one['source']}:{one['line']}" for one in record["examples"][:3])
            why = f"not finite; examples: {places} …" if places else "fp16's loss scale was too high, and falls"
            self._progress.say(f"step {record['step']} skipped, {why}")
        elif kind == "stop_requested":
            self._progress.say(f"stopping at the end of the step, with a checkpoint ({record['reason']})")
