"""What there is to show of a prepared directory: figures of every example, the rejects by reason, and which examples to look at.

Memory is a few integers an example; the tokens are read a record batch at a time, and beyond `MOST_TOKENS` not all of them.
"""

import json
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt

from dstune import atomic
from dstune.data.order import permute
from dstune.data.preview.text import Marked
from dstune.data.shards import Prepared
from dstune.paths import PreparedPaths

MOST_TOKENS = 1 << 27
"""Token ids that are read for `Survey.looked`: half a gigabyte, some seconds."""
OVERLONG = "overlong"
"""The reason of what is longer than `max_length`."""
_REPETITIONS = ("duplicate", "near_duplicate", "contaminated")
_ASKED = (*_REPETITIONS, "not_selected")
_CLEANING = "clean_"
"""How the reasons of cleaning steps begin."""
_MOST_REJECT_BYTES = 32 << 20
"""Of rejects.jsonl; the counts come from the manifest, whatever is read."""
_MOST_SOURCES_SAMPLED = 12

IntArray = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Survey:
    """Figures of the examples. The first three arrays: [examples]; the others: [looked]."""

    lengths: npt.NDArray[np.int32]
    supervised: npt.NDArray[np.int32]
    """Targets of each example."""
    sources: npt.NDArray[np.int32]
    looked: IntArray
    """Numbers of the examples whose tokens were read: all, or those of every k-th record batch."""
    control: npt.NDArray[np.int32]
    unknown: npt.NDArray[np.int32]
    """Tokens of that kind in each."""
    ends_in_control: npt.NDArray[np.bool_]
    """Whether the last target is a control token, or the one before it (a line's end may follow)."""
    copies: Sequence[tuple[int, int]]
    """Of the looked-at: examples with the very tokens of an earlier one, each with that one."""

    @property
    def num_copies(self) -> int:
        return len(self.copies)

    @property
    def shares(self) -> npt.NDArray[np.float64]:
        """[examples] targets as a share of the tokens."""
        return self.supervised / np.maximum(1, self.lengths)


def survey(prepared: Prepared, marked: Marked) -> Survey:
    """Read the figures of every example, and the tokens of as many as `MOST_TOKENS` allows."""
    stride = 1 + (int(prepared.manifest["counts"]["tokens"]) - 1) // MOST_TOKENS
    table = _table(marked.control)
    columns: list[tuple[Any, ...]] = []
    looks: list[tuple[Any, ...]] = []
    hashes: list[int] = []
    first = 0
    for number, batch in enumerate(prepared.batches()):
        offsets = np.asarray(batch.column("loss_mask").offsets)
        starts = offsets - offsets[0]
        mask = batch.column("loss_mask").flatten().to_numpy(zero_copy_only=False)
        columns.append((np.asarray(batch.column("length")), _counted(mask, starts), np.asarray(batch.column("source"))))
        if number % stride == 0:
            ids = np.asarray(batch.column("input_ids").flatten())
            numbers = np.arange(first, first + batch.num_rows)
            looks.append((numbers, *_looked(ids, mask, starts, table, marked.unknown)))
            hashes += [hash(ids[start:end].tobytes()) for start, end in pairwise(starts.tolist())]
        first += batch.num_rows
    lengths, trained, sources = (np.concatenate(parts) for parts in zip(*columns, strict=True))
    looked, control, unknown, ends = (np.concatenate(parts) for parts in zip(*looks, strict=True))
    return Survey(lengths, trained, sources, looked, control, unknown, ends, _copies(looked, hashes))


def _copies(looked: IntArray, hashes: Sequence[int]) -> list[tuple[int, int]]:
    """Examples whose 64-bit hash an earlier one has, each with the first of that hash, ascending."""
    _, firsts, groups = np.unique(np.array(hashes, dtype=np.int64), return_index=True, return_inverse=True)
    originals = firsts[groups]
    again = np.flatnonzero(originals != np.arange(len(hashes)))
    return list(zip(looked[again].tolist(), looked[originals[again]].tolist(), strict=True))


def _table(control: Collection[int]) -> npt.NDArray[np.bool_]:
    """[largest + 2] whether an id is a control token; every id beyond the largest falls on the last entry, which is False."""
    table = np.zeros(max(control, default=-1) + 2, dtype=np.bool_)
    table[list(control)] = True
    return table


def _looked(
    ids: npt.NDArray[np.int32],
    mask: npt.NDArray[np.bool_],
    starts: npt.NDArray[np.int32],
    table: npt.NDArray[np.bool_],
    unknown: int | None,
) -> tuple[npt.NDArray[Any], npt.NDArray[Any], npt.NDArray[Any]]:
    """`control`, `unknown` and `ends_in_control` of one record batch.

    ids, mask: [tokens of the batch]; starts: [examples + 1]. Every example has a target: one without is never stored.
    """
    is_control = table[np.minimum(ids, len(table) - 1)]
    is_unknown = ids == (-1 if unknown is None else unknown)
    targets = np.flatnonzero(mask)
    ends = np.searchsorted(targets, starts[1:])
    last, before = targets[ends - 1], targets[np.maximum(ends - 2, 0)]
    ends_in_control = is_control[last] | (is_control[before] & (before >= starts[:-1]))
    return _counted(is_control, starts), _counted(is_unknown, starts), ends_in_control


def _counted(found: npt.NDArray[np.bool_], starts: npt.NDArray[np.int32]) -> npt.NDArray[np.int32]:
    """[examples] how often True stands between one start and the next."""
    return np.diff(np.searchsorted(np.flatnonzero(found), starts)).astype(np.int32)


def sample(prepared: Prepared, count: int, seed: int) -> list[int]:
    """`count` different example numbers drawn by `seed`; all of them where there are not so many."""
    count = max(0, min(count, prepared.num_examples))
    return permute(seed, 0, prepared.num_examples, np.arange(count)).tolist()


def chosen(prepared: Prepared, found: Survey, count: int, seed: int) -> dict[int, list[str]]:
    """The examples to show, each with why: the extremes, then a fair sample, then one of each file that has none yet."""
    why: dict[int, list[str]] = {}
    for number, reason in _extremes(prepared, found):
        why.setdefault(number, []).append(reason)
    drawn = sample(prepared, count, seed)
    for number in drawn:
        why.setdefault(number, []).append("drawn")
    seen = {int(found.sources[number]) for number in drawn}
    for source in np.unique(found.sources)[:_MOST_SOURCES_SAMPLED].tolist() if count else []:
        if source not in seen:
            of_source = np.flatnonzero(found.sources == source)
            number = int(of_source[permute(seed, 0, len(of_source), np.arange(1))[0]])
            why.setdefault(number, []).append("drawn from its file")
    return why


def _extremes(prepared: Prepared, found: Survey) -> Iterator[tuple[int, str]]:
    yield int(found.lengths.argmax()), "longest"
    yield int(found.lengths.argmin()), "shortest"
    yield int(found.shares.argmin()), "smallest trained share"
    if found.control.max() > np.median(found.control):
        yield int(found.looked[found.control.argmax()]), "most control tokens"
    if found.unknown.any():
        yield int(found.looked[found.unknown.argmax()]), "most unknown tokens"
    without = np.flatnonzero(~found.ends_in_control)
    if 0 < len(without) < len(found.looked):
        yield int(found.looked[without[0]]), "ends without a control token"
    if prepared.manifest["settings"]["overlong"] == "truncate" and (found.lengths == prepared.max_length).any():
        yield int((found.lengths == prepared.max_length).argmax()), "as long as a row: cut here, or just full"


@dataclass(frozen=True)
class Reason:
    """Why something was left out, and how often over all files."""

    name: str
    records: int
    conversations: int
    first: Sequence[Mapping[str, Any]]
    """The first lines of rejects.jsonl that give it: `file`, `line`, `part`, `detail`."""

    @property
    def count(self) -> int:
        return self.records + self.conversations

    @property
    def is_repetition(self) -> bool:
        """Left out because another conversation, or an evaluation file, says the same."""
        return self.name in _REPETITIONS

    @property
    def is_asked(self) -> bool:
        """The run file asks for it: nothing is wrong with the data."""
        return self.name in _ASKED or self.name.startswith(_CLEANING)


def reasons(prepared: Prepared, shown: int) -> list[Reason]:
    """Every reason of the manifest, the most frequent first, with its first `shown` rejects as far as they stand in the file's
    first 32 MiB."""
    records, conversations = Counter[str](), Counter[str]()
    for source in prepared.manifest["sources"]:
        records.update(source["records"]["dropped"])
        conversations.update(source["conversations"]["dropped"])
    wanted = {name: min(shown, count) for name, count in (records + conversations).items()}
    first = _first_rejects(prepared, wanted)
    return [
        Reason(name, records[name], conversations[name], first[name])
        for name, _ in (records + conversations).most_common()
    ]


def _first_rejects(prepared: Prepared, wanted: Mapping[str, int]) -> dict[str, list[dict[str, Any]]]:
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in wanted}
    missing, read = sum(wanted.values()), 0
    path = PreparedPaths(prepared.root).rejects
    if not missing or not path.exists():
        return found
    with path.open("rb") as file:
        for line in file:
            read += len(line)
            reject = json.loads(line)
            name = reject["reason"]
            if len(found.get(name, ())) < wanted.get(name, 0):
                found[name].append(reject)
                missing -= 1
            if not missing or read > _MOST_REJECT_BYTES:
                break
    return found


def rejects(prepared: Prepared) -> Iterator[dict[str, Any]]:
    """Every line of rejects.jsonl, in its order."""
    yield from atomic.read_json_lines(PreparedPaths(prepared.root).rejects)
