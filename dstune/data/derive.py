"""A prepared directory from another one: some of its examples, packed anew; the same choice gives the same bytes.

What was left out is counted and listed like every other loss: `not_selected` in the manifest, a line each in `rejects.jsonl`. The
validation set stays as it is. What the manifest says of the text that was read (the longest conversation, control tokens, lost
characters, how many were cut) stays the base's.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from dstune import atomic
from dstune.data import manifest, schedule
from dstune.data.block import Block
from dstune.data.examples import numbers_of_source
from dstune.data.mixing import epoch_shares
from dstune.data.pack import one_per_row, pack
from dstune.data.place import build_once
from dstune.data.shard_writer import HashedFile, ShardWriter, WrittenFile, write_dataset_files, write_hashed, write_rows
from dstune.data.shards import FORMAT_VERSION, Prepared, block_of_batch
from dstune.errors import DataError, Problem
from dstune.paths import PreparedPaths, cache_directory

NOT_SELECTED = "not_selected"
DERIVATION_VERSION = 1
"""Raised when the same choice gives another directory than before."""

_HASH_DIGITS = 16
_BLOCK_BYTES = 1 << 20
Keep = npt.NDArray[np.bool_]


def derive(
    base: Prepared, keep: Keep, *, name: str, selection: Mapping[str, Any], detail: Callable[[int], str]
) -> Prepared:
    """The directory `<cache>/prepared/<name>-<hash>` with the examples that `keep` [examples] says; `base` itself if that is all.

    `selection` (plain JSON values) says how the choice was made: it goes into the manifest and, with the choice and the base's
    content, into the directory's name. `detail(example number)` is why that one was left out, for `rejects.jsonl`; the same for the
    same `selection`. Raises DataError where nothing is left, OSError as it comes; then nothing is left behind.
    """
    if len(keep) != base.num_examples:
        raise ValueError(f"a choice among {len(keep)} examples of {base.num_examples}")
    if keep.all():
        return base
    build = _Derivation(base, keep, selection, detail)
    final = cache_directory() / "prepared" / f"{name}-{build.identity[:_HASH_DIGITS]}"
    if not final.exists():
        build_once(final, build)
    return Prepared.open(final)


class _Derivation:
    """One choice: calling it writes the directory."""

    def __init__(self, base: Prepared, keep: Keep, selection: Mapping[str, Any], detail: Callable[[int], str]) -> None:
        self._base, self._keep, self._selection, self._detail = base, keep, selection, detail
        content = {
            "format": FORMAT_VERSION,
            "derivation": DERIVATION_VERSION,
            "base": base.fingerprint,
            "selection": selection,
            "keep": hashlib.sha256(np.packbits(keep).tobytes()).hexdigest(),
        }
        self.identity = hashlib.sha256(json.dumps(content, sort_keys=True, allow_nan=False).encode()).hexdigest()

    def __call__(self, root: Path) -> None:
        """Write everything into the empty directory `root`, the manifest last."""
        counts = _FileCounts(len(self._base.manifest["sources"]))
        with closing(ShardWriter(root)) as writer:
            rejects = self._share_out(root, writer, counts)
            shards = writer.finish()
            lengths, supervised, kept_files = writer.lengths(), writer.supervised(), writer.files()
        sources = self._epochs(kept_files)
        epoch = np.concatenate(sources)
        if not len(epoch):
            raise DataError(Problem("data.select", "no example is left in an epoch", do="Raise `data.select.budget`."))
        settings = self._base.manifest["settings"]
        taken = lengths[epoch]
        rows = pack(taken, int(settings["max_length"])) if settings["packing"] else one_per_row(len(taken))
        items = epoch[rows.items]
        files = [
            *shards,
            rejects,
            *write_dataset_files(root, shards, self.identity[:_HASH_DIGITS]),
            write_rows(root, items, rows.offsets, rows.totals(taken), rows.totals(supervised[epoch])),
        ]
        content: dict[str, Any] = {
            **self._base.manifest,
            "identity": self.identity,
            "selection": {**self._selection, "base": self._base.fingerprint},
            "counts": manifest.counts(lengths, supervised, epoch, rows.num_rows, int(settings["max_length"])),
            "sources": counts.described(self._base.manifest["sources"]),
            "source_settings": self._source_settings(sources, kept_files),
            "files": [file.to_dict() for file in files] + self._link_validation(root),
        }
        write_hashed(PreparedPaths(root).manifest, atomic.dump_json(content).encode("utf-8", "surrogatepass"))

    def _share_out(self, root: Path, writer: ShardWriter, counts: "_FileCounts") -> WrittenFile:
        """Every example to `writer` or, as a line, to the rejects; the base's own rejects stand before them."""
        with closing(HashedFile(PreparedPaths(root).rejects)) as rejects:
            with PreparedPaths(self._base.root).rejects.open("rb") as before:
                while block := before.read(_BLOCK_BYTES):
                    rejects.write(block)
            first = 0
            for batch in self._base.batches():
                block, keep = block_of_batch(batch), self._keep[first : first + batch.num_rows]
                counts.add(block, keep)
                writer.add(block.take(keep))
                for place in np.flatnonzero(~keep).tolist():
                    rejects.write(self._reject(block, place, first + place))
                first += batch.num_rows
        return rejects.written()

    def _reject(self, block: Block, place: int, number: int) -> bytes:
        entry = {
            "file": self._base.manifest["sources"][int(block.files[place])]["path"],
            "line": int(block.lines[place]),
            "part": int(block.parts[place]),
            "reason": NOT_SELECTED,
            "detail": self._detail(number),
        }
        return (json.dumps(entry, ensure_ascii=False) + "\n").encode("utf-8", "backslashreplace")

    def _epochs(self, files: npt.NDArray[np.int32]) -> list[npt.NDArray[np.int32]]:
        """What each source of the run file brings to an epoch; `files` [kept examples] as they are numbered here."""
        settings, listed = self._base.manifest["settings"], self._base.manifest["source_settings"]
        of_source = self._of_source(files)
        sizes, repeats = [len(numbers) for numbers in of_source], [float(source["repeat"]) for source in listed]
        shares = epoch_shares(sizes, repeats, float(settings.get("temperature", 1.0)))
        # A preparation in which nothing is drawn has no seed, and then neither has this one.
        seed = int(settings["seed"] or 0)
        return [
            schedule.epoch_of_source(numbers, share, seed, place)
            for place, (numbers, share) in enumerate(zip(of_source, shares, strict=True))
        ]

    def _of_source(self, files: npt.NDArray[np.int32]) -> list[npt.NDArray[np.int32]]:
        source_of_file = [file["source"] for file in self._base.manifest["sources"]]
        return [
            numbers_of_source(source_of_file, files, number)
            for number in range(len(self._base.manifest["source_settings"]))
        ]

    def _source_settings(
        self, epochs: Sequence[npt.NDArray[np.int32]], files: npt.NDArray[np.int32]
    ) -> list[dict[str, Any]]:
        return [
            {**source, "examples": len(numbers), "examples_per_epoch": len(epoch)}
            for source, epoch, numbers in zip(
                self._base.manifest["source_settings"], epochs, self._of_source(files), strict=True
            )
        ]

    def _link_validation(self, root: Path) -> list[dict[str, Any]]:
        """The validation set under a second name (copied where the file system has no links); its entry for the manifest."""
        if self._base.manifest["validation"] is None:
            return []
        below, its = PreparedPaths(root).validation, PreparedPaths(self._base.root).validation
        below.mkdir()
        for file in sorted(its.iterdir()):
            try:
                os.link(file, below / file.name)
            except OSError:
                with file.open("rb") as read, atomic.durable_file(below / file.name) as written:
                    shutil.copyfileobj(read, written)
        atomic.fsync_directory(below)
        return [file for file in self._base.manifest["files"] if file["name"].startswith(f"{below.name}/")]


class _FileCounts:
    """What of each file was kept and what was not, in the order of the examples."""

    def __init__(self, num_files: int) -> None:
        self._dropped = np.zeros(num_files, dtype=np.int64)
        self._stays = np.zeros(num_files, dtype=np.int64)
        self._tokens = np.zeros(num_files, dtype=np.int64)
        self._supervised = np.zeros(num_files, dtype=np.int64)

    def add(self, block: Block, keep: Keep) -> None:
        """Count the examples of `block`; `keep` [examples]."""
        self._stays += np.bincount(block.files[keep], minlength=len(self._stays))
        lost = block.files[~keep]
        self._dropped += np.bincount(lost, minlength=len(self._stays))
        np.add.at(self._tokens, lost, block.lengths[~keep])
        np.add.at(self._supervised, lost, block.supervised()[~keep])

    def described(self, files: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        """The manifest's entries: conversations made = kept + dropped as before."""
        return [self._entry(number, file) for number, file in enumerate(files)]

    def _entry(self, number: int, file: Mapping[str, Any]) -> dict[str, Any]:
        lost = int(self._dropped[number])
        made = file["conversations"]
        reasons = {**made["dropped"], NOT_SELECTED: made["dropped"].get(NOT_SELECTED, 0) + lost}
        dropped = dict(sorted((reason, count) for reason, count in reasons.items() if count))
        return {
            **file,
            "conversations": {**made, "kept": made["kept"] - lost, "dropped": dropped},
            "examples": int(self._stays[number]),
            "tokens": file["tokens"] - int(self._tokens[number]),
            "supervised_tokens": file["supervised_tokens"] - int(self._supervised[number]),
        }
