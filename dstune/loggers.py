"""Logging: one logger per module below `dstune`, lines on stderr, so that `--json` leaves stdout to the document."""

import logging
import sys
from pathlib import Path

_FORMAT = "%(asctime)s %(levelname)s %(name)s: %(message)s"


def get_logger(name: str) -> logging.Logger:
    """The logger of one module; call with `__name__`."""
    return logging.getLogger(name)


def configure(verbose: bool = False, file: Path | None = None) -> None:
    """Send dstune's lines to stderr (a command) or to `file` (a worker or a driver), others' from WARNING on."""
    handler: logging.Handler
    handler = logging.FileHandler(file, encoding="utf-8") if file else logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter(_FORMAT if file else "%(message)s"))
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(logging.WARNING)
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # its retries; the error at their end is ours to tell
    logging.getLogger("dstune").setLevel(logging.DEBUG if verbose else logging.INFO)
