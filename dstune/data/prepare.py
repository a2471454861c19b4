"""Raw instruction files to a prepared directory: content-addressed, atomic, the same bytes whatever the number of processes.

Two passes over the data at most: every record is read once, cleaned, rendered and tokenised, and written as it comes. Repetitions are
then left out and a fraction is held out (both are only known at the end). Packing wants the lengths alone. What was done is kept in a
journal beside the directory, and a preparation that was killed goes on from it.
"""

import errno
import itertools
import os
import shutil
from collections.abc import Callable, Generator, Iterable, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from dstune import atomic
from dstune.config.load import resolve
from dstune.config.schema import DataSection, DeduplicateSection, RunConfig, Source
from dstune.data import inputs, journal, manifest, notes, pool, schedule
from dstune.data.cleaning import Cleaner
from dstune.data.collect import Collector
from dstune.data.contamination import Contamination
from dstune.data.duplicates import find_duplicates
from dstune.data.encoder import make_encoder
from dstune.data.examples import Examples, drop_duplicates, share_out
from dstune.data.inputs import Input
from dstune.data.journal import Journal
from dstune.data.mixing import epoch_shares
from dstune.data.pack import Packing, one_per_row, pack
from dstune.data.place import build_once
from dstune.data.shard_writer import (
    ShardWriter,
    StoredArray,
    WrittenFile,
    write_dataset_files,
    write_hashed,
    write_rows,
)
from dstune.data.shards import FORMAT_VERSION, Prepared
from dstune.data.sources import expand
from dstune.data.tally import FileTally, Rejects
from dstune.data.task import is_seq2seq, packs
from dstune.data.tokenize import Encoder, ShortcutDiffers
from dstune.data.tokenizer_files import described
from dstune.data.work import Chunk, Job, Result, setup
from dstune.errors import DataError, Problem, RunFailed
from dstune.loggers import get_logger
from dstune.paths import PreparedPaths, cache_directory

log = get_logger(__name__)

_HASH_DIGITS = 16
_LARGE_BYTES = 64 << 20
"""Sources from which on the preparing processes are started before everything else: they import while this one looks at the model."""
_WORKERS_IMPORTS = ("dstune.data.work", "transformers.tokenization_utils_tokenizers", "gigatoken")
_PARTS = ("examples", "validation")


@dataclass(frozen=True)
class Progress:
    """How far a preparation is."""

    stage: str
    """`hashing`, `tokenising`, `deduplicating`, `validation`, `packing`."""
    file: str = ""
    """The file that is read now, as the run file writes it."""
    records: int = 0
    examples: int = 0


Report = Callable[[Progress], None]


class Mapper(Protocol):
    """Does the same work on chunk after chunk somewhere, results in the order of the chunks (`pool.map_in_order`)."""

    def __call__(
        self,
        setup: Callable[[Job], Callable[[Chunk], Result]],
        argument: Job,
        chunks: Iterable[Chunk],
        num_processes: int,
    ) -> Generator[Result, None, None]: ...


def prepare(
    config: RunConfig, base: Path, progress: Report | None = None, mapper: Mapper = pool.map_in_order
) -> Prepared:
    """The prepared directory of a run's data, made if it is not there; `base`: the run file's directory.

    With `data.prepared` that directory is opened and compared with the model's tokenizer instead. `mapper` decides where the work is
    done. Raises ConfigError, DataError, and RunFailed where the disk is full (then nothing is left behind) or a process dies (then
    the next call goes on from there).
    """
    num_bytes = require_files(config.data, base)  # before a hub is asked for the model: this takes no time
    early = _processes(config) if num_bytes >= _LARGE_BYTES and mapper is pool.map_in_order else 1
    with pool.started(early if early > 1 else 0, _WORKERS_IMPORTS):
        return _prepared(config, base, progress, mapper)


def _prepared(config: RunConfig, base: Path, progress: Report | None, mapper: Mapper) -> Prepared:
    seq2seq = is_seq2seq(config.model, base)
    packing = packs(config.model, base) if config.data.packing == "auto" else config.data.packing
    encoder = make_encoder(config.model, config.data, base, seq2seq, config.train.seed)
    if config.data.prepared is not None:
        return _existing(resolve(config.data.prepared, base), encoder)
    build = _Build(config, base, packing, encoder, progress or _ignore, mapper)
    try:
        if not build.final.exists():
            build_once(build.final, build)
    except OSError as error:
        raise RunFailed(_disk_problem(error)) from error
    return Prepared.open(build.final)


def require_files(data: DataSection, base: Path) -> int:
    """Raises DataError or ConfigError where a source names nothing; bytes of the files that are here."""
    num_bytes = 0
    held_out = data.validation if isinstance(data.validation, list) else []
    for source in (*data.sources, *held_out):
        if "://" not in source.path:
            with suppress(OSError):  # what may not be read is named where it is read
                num_bytes += sum(file.stamp().size for file in expand(source, base) if file.place is not None)
    return num_bytes


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

    def __init__(
        self, config: RunConfig, base: Path, packing: bool, encoder: Encoder, report: Report, mapper: Mapper
    ) -> None:
        data = config.data
        self._config, self._packing, self._report, self._mapper = config, packing, report, mapper
        cleaner = Cleaner(data.clean)
        self._against = None
        if data.decontaminate is not None:
            self._against = Contamination.build(data.decontaminate, base, data.max_record_bytes)
        self._duplicates = _duplicates(data)
        self._job = Job(
            encoder,
            data.max_length,
            overlong=data.overlong,
            max_record_bytes=data.max_record_bytes,
            expand=data.turns == "expand",
            cleaner=cleaner if cleaner else None,
            contamination=self._against,
            duplicates=self._duplicates,
        )
        held_out = data.validation if isinstance(data.validation, list) else []
        report(Progress("hashing"))
        self._inputs = inputs.find(data.sources, base, data.max_record_bytes)
        self._held_out = inputs.find(held_out, base, data.max_record_bytes)
        self._notes = [*notes.of_encoding(encoder), *notes.of_inputs(self._inputs, self._held_out)]
        if self._against is not None:
            self._notes += notes.of_evaluation(self._against)
        found = encoder.fingerprint()
        self.identity = manifest.Identity(
            tokenizer={**described(config.model), **found["tokenizer"]},
            template=found["template"],
            settings={
                **manifest.settings(config, encoder.seq2seq, packing),
                "clean": cleaner.described(),
                "deduplicate": self._duplicates.model_dump(mode="json") if self._duplicates else None,
                "decontaminate": self._decontamination(),
            },
            sources=manifest.described(data.sources, self._inputs),
            validation_sources=manifest.described(held_out, self._held_out),
        )
        self.final = cache_directory() / "prepared" / f"{config.name}-{self.identity.digest()[:_HASH_DIGITS]}"

    def _decontamination(self) -> dict[str, Any] | None:
        section = self._config.data.decontaminate
        if section is None or self._against is None:
            return None
        return {"ngram": section.ngram, "against": self._against.described()}

    def __call__(self, root: Path) -> None:
        """Write everything into the empty directory `root`, the manifest last."""
        journal.remove_old(self.final.parent)
        try:
            self._build(root)
        except ShortcutDiffers as error:
            log.warning("%s: preparing anew without shortcuts", error)
            self._forget()
            self._job = replace(self._job, encoder=self._job.encoder.without_shortcuts())
            for left in root.iterdir():
                shutil.rmtree(left) if left.is_dir() else left.unlink()
            self._build(root)
        except (DataError, OSError):
            self._forget()  # the same data would only meet the same error, and a full disk wants the room
            raise
        self._forget()

    def _forget(self) -> None:
        for part in _PARTS:
            journal.path_beside(self.final, part).unlink(missing_ok=True)

    def _build(self, root: Path) -> None:
        data = self._config.data
        validation = data.validation
        if isinstance(validation, list):
            held_out = PreparedPaths(root).validation
            held_out.mkdir()
            below = self._write(held_out, self._read(held_out, self._held_out, "validation"), validation, None)
            self._write(root, self._read(root, self._inputs, "examples"), data.sources, below)
        else:
            self._write_parted(root, validation)

    def _read(self, root: Path, files: Sequence[Input], part: str) -> Examples:
        """Tokenise `files` to `root`, without the repetitions."""
        if self._duplicates is None:
            return self._tokenise(root, root, files, part)
        stage = root / "stage"
        stage.mkdir()
        whole = self._tokenise(root, stage, files, part)
        with closing(ShardWriter(root)) as writer:
            share_out(stage, whole.shards, [(writer, whole.kept)])
            return whole.part(whole.kept, writer, whole.rejects)

    def _tokenise(self, root: Path, shards: Path, files: Sequence[Input], part: str) -> Examples:
        """Tokenise `files`; rejects go to `root`, the examples to `shards`, repetitions among them."""
        tallies = [file.tally() for file in files]
        writer = ShardWriter(shards)
        signatures = StoredArray(root / "signatures.tmp")
        done = Journal(journal.path_beside(self.final, part))
        with closing(writer), closing(done), Rejects(PreparedPaths(root).rejects) as rejects:
            collector = Collector(self._config.data, tallies, writer, rejects)
            try:
                with closing(self._results(files, done)) as results:
                    for result in results:
                        collector.take(result, signatures)
                        now = tallies[result.file].path
                        self._report(Progress("tokenising", now, collector.num_records, collector.num_examples))
                collector.end_source()
            except DataError:
                for file in files:  # half of the old file and half of the new one is the true reason for any nonsense
                    inputs.require_unchanged(file)
                raise
            if not collector.num_examples:
                raise DataError(_nothing(tallies, rejects.first))
            written = writer.finish()
            examples = Examples(
                tallies, written, writer.lengths(), writer.supervised(), writer.files(), collector.records()
            )
            if self._duplicates is not None:
                self._report(Progress("deduplicating", examples=collector.num_examples))
                found = find_duplicates(collector.digests(), signatures.mapped(), self._duplicates)
                drop_duplicates(found, examples, shards, rejects)
                examples = replace(examples, kept=found.kept)
            signatures.remove()
            return replace(examples, rejects=rejects.finish())

    def _results(self, files: Sequence[Input], done: Journal) -> Generator[Result, None, None]:
        """Every chunk's result in order: those of an earlier preparation that was killed, then new ones, noted down."""
        replayed = 0
        for result in done.replay():
            replayed += 1
            yield result
        if replayed:
            log.info("going on after %d chunks that an earlier preparation finished", replayed)
        chunks = itertools.islice(inputs.read_chunks(files), replayed, None)
        with closing(self._mapper(setup, self._job, chunks, _processes(self._config))) as results:
            for result in results:
                done.add(result)
                yield result

    def _write_parted(self, root: Path, fraction: float) -> None:
        """The directory without a validation set of its own sources: `fraction` of the examples goes to `validation/`."""
        sources = self._config.data.sources
        if not fraction:
            self._write(root, self._read(root, self._inputs, "examples"), sources, None)
            return
        stage, below = root / "stage", PreparedPaths(root).validation
        stage.mkdir()
        below.mkdir()
        whole = self._tokenise(root, stage, self._inputs, "examples")
        chosen = np.zeros(len(whole.kept), dtype=np.bool_)
        chosen[whole.kept] = schedule.held_out(whole.records[whole.kept], fraction, self._config.train.seed)
        self._report(Progress("validation", examples=int(chosen.sum())))
        trained, held_out = ShardWriter(root), ShardWriter(below)
        rest = whole.kept & ~chosen
        with closing(trained), closing(held_out):
            share_out(stage, whole.shards, [(held_out, chosen), (trained, rest)])
            no_rejects = write_hashed(PreparedPaths(below).rejects, b"")
            each_once = [source.model_copy(update={"repeat": 1.0}) for source in sources]
            validation = self._write(below, whole.part(chosen, held_out, no_rejects), each_once, None)
            self._write(root, whole.part(rest, trained, whole.rejects), sources, validation)

    def _write(
        self, root: Path, examples: Examples, sources: Sequence[Source], below: WrittenFile | None
    ) -> WrittenFile:
        """Pack, and write all that stands beside the shards, the manifest last; `below`: the validation set's manifest."""
        self._report(Progress("packing", examples=len(examples.lengths)))
        seed = self._config.train.seed
        numbers = [examples.of_source(number) for number in range(len(sources))]
        repeats = [source.repeat for source in sources]
        shares = epoch_shares([len(one) for one in numbers], repeats, self._config.data.temperature)
        epochs = [
            schedule.epoch_of_source(one, share, seed, number)
            for number, (one, share) in enumerate(zip(numbers, shares, strict=True))
        ]
        per_epoch = [len(one) for one in epochs]
        epoch = np.concatenate(epochs)
        del epochs, numbers
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
                epoch[rows.items],
                rows.offsets,
                rows.totals(examples.lengths[epoch]),
                rows.totals(examples.supervised[epoch]),
            ),
        ]
        if below is not None:
            atomic.fsync_directory(PreparedPaths(root).validation)
            files.append(below)
        content = self._manifest(examples, sources, epoch, per_epoch, rows.num_rows, below is not None)
        content["files"] = [file.to_dict() for file in files]
        written = write_hashed(PreparedPaths(root).manifest, atomic.dump_json(content).encode("utf-8", "surrogatepass"))
        return WrittenFile(f"{root.name}/{written.name}", written.bytes, written.sha256)

    def _rows(self, lengths: npt.NDArray[np.int32]) -> Packing:
        return pack(lengths, self._config.data.max_length) if self._packing else one_per_row(len(lengths))

    def _manifest(
        self,
        examples: Examples,
        sources: Sequence[Source],
        epoch: npt.NDArray[np.int32],
        per_epoch: Sequence[int],
        num_rows: int,
        has_validation: bool,
    ) -> dict[str, Any]:
        lengths, supervised = examples.lengths, examples.supervised
        max_length = self._config.data.max_length
        return {
            "format_version": FORMAT_VERSION,
            "identity": self.identity.digest(),
            "tokenizer": self.identity.tokenizer,
            "template": self.identity.template,
            "encoding": {**self._job.encoder.summary(), "notes": self._notes},
            "settings": self.identity.settings,
            "counts": manifest.counts(lengths, supervised, epoch, num_rows, max_length),
            "sources": examples.described(),
            "source_settings": [
                {
                    **source.model_dump(mode="json"),
                    "examples": len(examples.of_source(number)),
                    "examples_per_epoch": per_epoch[number],
                }
                for number, source in enumerate(sources)
            ],
            "validation": {"manifest": "validation/manifest.json"} if has_validation else None,
        }


def _duplicates(data: DataSection) -> DeduplicateSection | None:
    if data.deduplicate == "off":
        return None
    return DeduplicateSection(method=data.deduplicate) if isinstance(data.deduplicate, str) else data.deduplicate


def _nothing(tallies: Sequence[FileTally], first: str) -> list[Problem]:
    """Why there is not one example; `first`: the first reject, as an instance."""
    problems: list[Problem] = []
    for tally in [tally for tally in tallies if tally.records_read] or tallies:
        dropped = tally.records_dropped + tally.dropped
        reasons = ", ".join(f"{count} {reason}" for reason, count in sorted(dropped.items())) or "nothing dropped"
        came = f"no usable example: {tally.records_read} records read, {tally.made} conversations made ({reasons})"
        problems.append(Problem(tally.path, came))
    return [*problems, Problem("", f"for instance {first}")] if first else problems
