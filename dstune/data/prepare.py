"""Raw instruction files to a prepared directory: content-addressed, atomic, the same bytes whatever the number of processes.

Two passes over the data at most: every record is read once, rendered and tokenised, and written as it comes; a fraction that is
held out is then parted from the rest (how many examples there are is only known at the end). Packing wants the lengths alone.
"""

import errno
import os
from collections.abc import Callable, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from dstune import atomic
from dstune.config.load import resolve
from dstune.config.schema import DataSection, RunConfig, Source
from dstune.data import inputs, manifest, pool, schedule
from dstune.data.collect import Collector
from dstune.data.encoder import make_encoder
from dstune.data.inputs import Input
from dstune.data.pack import Packing, one_per_row, pack
from dstune.data.place import build_once
from dstune.data.shard_writer import ShardWriter, WrittenFile, write_dataset_files, write_hashed, write_rows
from dstune.data.shards import FORMAT_VERSION, Prepared, read_examples
from dstune.data.sources import expand
from dstune.data.tally import FileTally, Rejects
from dstune.data.task import is_seq2seq, packs
from dstune.data.tokenize import Encoder
from dstune.data.work import Job, setup
from dstune.errors import DataError, Problem, RunFailed
from dstune.paths import PreparedPaths, cache_directory

_HASH_DIGITS = 16


@dataclass(frozen=True)
class Progress:
    """How far a preparation is."""

    stage: str
    """`hashing`, `tokenising`, `validation`, `packing`."""
    file: str = ""
    """The file that is read now, as the run file writes it."""
    records: int = 0
    examples: int = 0


Report = Callable[[Progress], None]


def prepare(config: RunConfig, base: Path, progress: Report | None = None) -> Prepared:
    """The prepared directory of a run's data, made if it is not there; `base`: the run file's directory.

    With `data.prepared` that directory is opened and compared with the model's tokenizer instead. Raises ConfigError, DataError,
    and RunFailed where the disk is full or a process dies; then nothing is left behind.
    """
    require_files(config.data, base)  # before a hub is asked for the model: this takes no time
    seq2seq = is_seq2seq(config.model, base)
    packing = packs(config.model, base) if config.data.packing == "auto" else config.data.packing
    encoder = make_encoder(config.model, config.data, base, seq2seq)
    if config.data.prepared is not None:
        return _existing(resolve(config.data.prepared, base), encoder)
    build = _Build(config, base, packing, encoder, progress or _ignore)
    try:
        final = cache_directory() / "prepared" / f"{config.name}-{build.identity.digest()[:_HASH_DIGITS]}"
        if not final.exists():
            build_once(final, build)
    except OSError as error:
        raise RunFailed(_disk_problem(error)) from error
    return Prepared.open(final)


def require_files(data: DataSection, base: Path) -> None:
    """Raises DataError or ConfigError where a source names nothing."""
    held_out = data.validation if isinstance(data.validation, list) else []
    for source in (*data.sources, *held_out):
        if "://" not in source.path:
            with suppress(OSError):  # what may not be read is named where it is read
                expand(source, base)


def _ignore(progress: Progress) -> None:
    """Nobody watches."""


def _disk_problem(error: OSError) -> Problem:
    where = str(error.filename or cache_directory())
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        do = "Free some space there, or let DSTUNE_CACHE name a directory on another disk. Nothing was left behind."
        return Problem(str(cache_directory()), "the disk is full while preparing the data", do=do)
    return Problem(
        where, f"the prepared data cannot be written: {error.strerror or error}", do="DSTUNE_CACHE chooses where."
    )


def _existing(directory: Path, encoder: Encoder) -> Prepared:
    prepared = Prepared.open(directory)
    found = prepared.manifest
    problems: list[Problem] = []
    if found["tokenizer"]["sha256"] != encoder.fingerprint()["tokenizer"]["sha256"]:
        came = "it was prepared with another tokenizer than this model's"
        problems.append(Problem(str(directory), came, do="Prepare the sources again for this model."))
    if found["settings"]["seq2seq"] != encoder.seq2seq:
        kind = "a sequence-to-sequence model" if found["settings"]["seq2seq"] else "a causal model"
        problems.append(Problem(str(directory), f"it was prepared for {kind}", do="Prepare the sources again."))
    if problems:
        raise DataError(problems)
    return prepared


def _processes(config: RunConfig) -> int:
    return config.data.num_processes or len(os.sched_getaffinity(0))


class _Build:
    """One preparation: its inputs and identity are settled at the start, calling it writes the directory."""

    def __init__(self, config: RunConfig, base: Path, packing: bool, encoder: Encoder, report: Report) -> None:
        data = config.data
        self._config, self._packing, self._report = config, packing, report
        self._job = Job(encoder, data.max_length, truncate=data.overlong == "truncate")
        self._summary = encoder.summary()
        held_out = data.validation if isinstance(data.validation, list) else []
        report(Progress("hashing"))
        self._inputs = inputs.find(data.sources, base, data.max_record_bytes)
        self._held_out = inputs.find(held_out, base, data.max_record_bytes)
        found = encoder.fingerprint()
        self.identity = manifest.Identity(
            tokenizer={"path": config.model.tokenizer or config.model.path, **found["tokenizer"]},
            template=found["template"],
            settings=manifest.settings(config, encoder.seq2seq, packing),
            sources=manifest.described(data.sources, self._inputs),
            validation_sources=manifest.described(held_out, self._held_out),
        )

    def __call__(self, root: Path) -> None:
        """Write everything into the empty directory `root`, the manifest last."""
        data = self._config.data
        validation = data.validation
        if isinstance(validation, list):
            held_out = PreparedPaths(root).validation
            held_out.mkdir()
            below = self._write(held_out, self._read(held_out, self._held_out), validation, None)
            self._write(root, self._read(root, self._inputs), data.sources, below)
        elif validation:
            self._write_parted(root, validation)
        else:
            self._write(root, self._read(root, self._inputs), data.sources, None)

    def _read(self, root: Path, files: Sequence[Input], shards: Path | None = None) -> "_Examples":
        """Tokenise `files`; rejects go to `root`, the examples to `shards` (`root` if None)."""
        tallies = [file.tally() for file in files]
        writer = ShardWriter(shards or root)
        with closing(writer), Rejects(PreparedPaths(root).rejects) as rejects:
            collector = Collector(self._config.data, tallies, writer, rejects)
            results = pool.map_in_order(setup, self._job, inputs.read_chunks(files), _processes(self._config))
            try:
                with closing(results):
                    for result in results:
                        collector.take(result)
                        now = tallies[result.file].path
                        self._report(Progress("tokenising", now, collector.num_records, collector.num_examples))
                collector.end_source()
            except DataError:
                for file in files:  # half of the old file and half of the new one is the true reason for any nonsense
                    inputs.require_unchanged(file)
                raise
            if not collector.num_examples:
                raise DataError(_nothing(tallies, rejects.first))
            return _Examples(
                tallies,
                writer.finish(),
                writer.lengths(),
                writer.supervised(),
                collector.files,
                collector.records,
                rejects.finish(),
            )

    def _write_parted(self, root: Path, fraction: float) -> None:
        """Tokenise beside, then share the examples out: `fraction` of them to `validation/`."""
        stage, below = root / "stage", PreparedPaths(root).validation
        stage.mkdir()
        below.mkdir()
        whole = self._read(root, self._inputs, stage)
        chosen = schedule.held_out(whole.records, fraction, self._config.train.seed)
        self._report(Progress("validation", examples=int(chosen.sum())))
        trained, held_out = ShardWriter(root), ShardWriter(below)
        with closing(trained), closing(held_out):
            numbers = iter(chosen)
            for shard in whole.shards:
                for example in read_examples(stage / shard.name):
                    (held_out if next(numbers) else trained).add(example)
                (stage / shard.name).unlink()
            stage.rmdir()
            no_rejects = write_hashed(PreparedPaths(below).rejects, b"")
            sources = self._config.data.sources
            each_once = [source.model_copy(update={"repeat": 1.0}) for source in sources]
            validation = self._write(below, whole.part(chosen, held_out, no_rejects), each_once, None)
            self._write(root, whole.part(~chosen, trained, whole.rejects), sources, validation)

    def _write(
        self, root: Path, examples: "_Examples", sources: Sequence[Source], below: WrittenFile | None
    ) -> WrittenFile:
        """Pack, and write all that stands beside the shards, the manifest last; `below`: the validation set's manifest."""
        self._report(Progress("packing", examples=len(examples.lengths)))
        seed = self._config.train.seed
        epochs = [
            schedule.epoch_of_source(examples.of_source(number), source.repeat, seed, number)
            for number, source in enumerate(sources)
        ]
        epoch = np.concatenate(epochs)
        if not len(epoch):
            raise DataError(
                Problem("data.sources", "no example is left in an epoch", do="Raise the sources' `repeat`.")
            )
        rows = self._rows(examples.lengths[epoch])
        files = [
            *examples.shards,
            examples.rejects,
            *write_dataset_files(root, examples.shards, self.identity.digest()[:_HASH_DIGITS]),
            write_rows(
                root,
                epoch[rows.items].astype(np.int32),
                rows.offsets,
                rows.totals(examples.lengths[epoch]),
                rows.totals(examples.supervised[epoch]),
            ),
        ]
        if below is not None:
            atomic.fsync_directory(PreparedPaths(root).validation)
            files.append(below)
        content = self._manifest(examples, sources, epochs, rows.num_rows, below is not None)
        content["files"] = [file.to_dict() for file in files]
        written = write_hashed(PreparedPaths(root).manifest, atomic.dump_json(content).encode("utf-8", "surrogatepass"))
        return WrittenFile(f"{root.name}/{written.name}", written.bytes, written.sha256)

    def _rows(self, lengths: npt.NDArray[np.int32]) -> Packing:
        return pack(lengths, self._config.data.max_length) if self._packing else one_per_row(len(lengths))

    def _manifest(
        self,
        examples: "_Examples",
        sources: Sequence[Source],
        epochs: Sequence[npt.NDArray[np.int64]],
        num_rows: int,
        has_validation: bool,
    ) -> dict[str, Any]:
        stored = np.bincount(examples.files, minlength=len(examples.tallies)).tolist()
        lengths, supervised = examples.lengths, examples.supervised
        max_length = self._config.data.max_length
        return {
            "format_version": FORMAT_VERSION,
            "identity": self.identity.digest(),
            "tokenizer": self.identity.tokenizer,
            "template": self.identity.template,
            "encoding": self._summary,
            "settings": self.identity.settings,
            "counts": manifest.counts(lengths, supervised, np.concatenate(epochs), num_rows, max_length),
            "sources": [tally.to_dict(count) for tally, count in zip(examples.tallies, stored, strict=True)],
            "source_settings": [
                {
                    **source.model_dump(mode="json"),
                    "examples": len(examples.of_source(number)),
                    "examples_per_epoch": len(epochs[number]),
                }
                for number, source in enumerate(sources)
            ],
            "validation": {"manifest": "validation/manifest.json"} if has_validation else None,
        }


@dataclass(frozen=True)
class _Examples:
    """The examples of one directory, written but not yet packed. Arrays: [examples]."""

    tallies: Sequence[FileTally]
    shards: Sequence[WrittenFile]
    lengths: npt.NDArray[np.int32]
    supervised: npt.NDArray[np.int32]
    files: npt.NDArray[np.int32]
    """Index of each example's tally."""
    records: npt.NDArray[np.int64]
    """Number of each example's record."""
    rejects: WrittenFile

    def of_source(self, source: int) -> npt.NDArray[np.int64]:
        """The numbers of a source's examples, ascending."""
        of_tally = np.array([tally.source for tally in self.tallies])
        return np.flatnonzero(of_tally[self.files] == source)

    def part(self, chosen: npt.NDArray[np.bool_], writer: ShardWriter, rejects: WrittenFile) -> "_Examples":
        """Those of them that were written again by `writer`."""
        shards = writer.finish()
        files, records = self.files[chosen], self.records[chosen]
        return _Examples(self.tallies, shards, writer.lengths(), writer.supervised(), files, records, rejects)


def _nothing(tallies: Sequence[FileTally], first: str) -> list[Problem]:
    """Why there is not one example; `first`: the first reject, as an instance."""
    problems: list[Problem] = []
    for tally in [tally for tally in tallies if tally.records_read] or tallies:
        dropped = tally.records_dropped + tally.dropped
        reasons = ", ".join(f"{count} {reason}" for reason, count in sorted(dropped.items())) or "nothing dropped"
        came = f"no usable example: {tally.records_read} records read, {tally.made} conversations made ({reasons})"
        problems.append(Problem(tally.path, came))
    return [*problems, Problem("", f"for instance {first}")] if first else problems
