"""One source as a stream: its segments -> rows of one process, with a state after every row.

A file is read as `prepare_data` reads it, unit by unit, so both give the same tokens; a Hub data set is read by the
datasets library.
"""

from collections import Counter
from collections.abc import Iterator, Mapping
from functools import cached_property
from typing import Any, NamedTuple, Protocol

import numpy as np
import xxhash

from hf_mamba.data.encoding import Encoding
from hf_mamba.data.records import LOOKED_AT, are_packed, check_columns, plan_units, read_unit
from hf_mamba.data.segments import BadRecords, Segment, cut, unusable
from hf_mamba.data.sources import Source, column_in, hub_dataset, missing_column


class Item(NamedTuple):
    """A segment, where a stream must begin to give it again, and whether the segment before was given, too."""

    place: Any
    segment: Segment
    follows: bool = True


class Stream(Protocol):
    """A source as one process reads it; `bad` is what it could not use."""

    bad: BadRecords

    def read(self, place: Any) -> Iterator[Item]:
        """One pass from a place on; None is the beginning."""


def open_stream(source: Source, share: tuple[int, int], encoding: Encoding) -> Stream:
    """This process's share (rank, world size) of a source; `encoding` takes records of ids.

    Raises:
        ValueError: there is no such source, or it has no column of this name.
    """
    return (HubStream if source.kind == "hub" else FileStream)(source, share, encoding)


class FileStream:
    """Files: every world-th unit where all processes have as many of them, or else every world-th document."""

    def __init__(self, source: Source, share: tuple[int, int], encoding: Encoding) -> None:
        files = source.files()
        check_columns(files, source.text_column)
        self.source, self.bad, self.take = source, BadRecords(), encoding.take
        self.rank, self.world = share
        self.units = plan_units(files)
        self.by_unit = len(self.units) % self.world == 0

    def read(self, place: Any) -> Iterator[Item]:
        first, skip = place or (0, 0)
        for number in range(first, len(self.units)):
            if self.by_unit and number % self.world != self.rank:
                continue
            counted = not self.by_unit and self.rank > 0  # by the first process, for all that read the same
            bad = BadRecords() if counted or skip else self.bad
            document, before = number - 1, -1
            segments = read_unit(self.units[number], self.source.text_column, bad, self.take)
            for index, segment in enumerate(segments):
                document += segment.first or index == 0
                mine = self.by_unit or document % self.world == self.rank
                if mine and index >= skip:
                    yield Item((number, index), segment, before == index - 1)
                if mine:
                    before = index
            skip = 0


class HubStream:
    """A Hub data set, divided by the datasets library."""

    def __init__(self, source: Source, share: tuple[int, int], encoding: Encoding) -> None:
        from datasets.distributed import split_dataset_by_node

        self.source, self.bad, self.take = source, BadRecords(), encoding.take
        self.whole = hub_dataset(source.spec, streaming=True)
        self.stream = split_dataset_by_node(self.whole, *share)
        self.share = f"of process {share[0]}'s share" if share[1] > 1 else ""

    def read(self, place: Any) -> Iterator[Item]:
        before, skip, *numbers = place or (None, 0)
        number = numbers[0] if numbers else 0  # versions before 0.2 did not count the records
        self.stream.load_state_dict(before)
        for record in self.stream:
            column, where = column_in(record, self.source.text_column), f"{self.source.spec} record {number}"
            if column not in record:
                raise ValueError(missing_column(self.source.spec, column, list(record)))
            if reason := unusable(value := record[column]):
                self.bad.add(reason, f"{where} {self.share}".strip())
            else:
                found = cut(value) if isinstance(value, str) else self.take(value, where, self.packed)
                for index, segment in enumerate(found):
                    if index >= skip:
                        yield Item((before, index, number), segment)
            before, skip, number = self.stream.state_dict(), 0, number + 1

    @cached_property
    def packed(self) -> bool:
        """Whether the data set's rows of ids were packed."""
        column = self.source.text_column
        return are_packed([("", r.get(column_in(r, column))) for r in self.whole.take(LOOKED_AT)])


def digest_of(segment: Segment) -> int:
    """What decides whether a segment is held out: the hash of its content, as in the index of the shards."""
    return xxhash.xxh3_64_intdigest(segment.raw()) & ~1


class Packer:
    """One source's rows for one process, with a state after every row.

    Args:
        encoding: how its tokens are made.
        share: (rank, world size).
        threshold: segments whose hash is below are held out.
        state: where to go on; None is the beginning.

    Raises:
        ValueError: this process's share has no text, or the stream does not lead to the state's document again.
    """

    def __init__(
        self,
        source: Source,
        encoding: Encoding,
        share: tuple[int, int],
        threshold: int,
        state: Mapping[str, Any] | None,
    ) -> None:
        self.source, self.encode, self.threshold = source, encoding.encode, threshold
        self.stream = open_stream(source, share, encoding)
        self.stream.bad.said = True
        self.passes = state["passes"] if state else 0
        self.read: Counter[str] = Counter()  # since this start: documents kept and held out, and tokens
        self._hash = ""  # of the segment that is being read
        self._items = self._kept(state["place"] if state else None)
        self._next()
        if state is not None:
            if self._hash != state["hash"]:
                raise ValueError(
                    f"{source.spec}: the stream does not go on with the document at which the checkpoint was taken; "
                    "the data or the datasets library has changed, and resuming would repeat or skip text. "
                    "Start a new run from the checkpoint's weights, or tokenise the data first."
                )
            self.used, self._begins = state["used"], state["begins"]

    def row(self, length: int) -> tuple[np.ndarray, np.ndarray]:
        """The next `length` tokens and the positions at which documents start."""
        pieces: list[np.ndarray] = []
        starts, filled = [], 0
        while filled < length:
            if self.used == len(self._tokens):
                self._next()
            if self.used == 0 and self._begins:
                starts.append(filled)
            piece = self._tokens[self.used : self.used + length - filled]
            pieces.append(piece)
            self.used += len(piece)
            filled += len(piece)
        return np.concatenate(pieces), np.array(starts, np.int64)

    def state(self) -> dict[str, Any]:
        return {
            "place": self._place,
            "hash": self._hash,
            "used": self.used,
            "begins": self._begins,
            "passes": self.passes,
        }

    def _next(self) -> None:
        """Go to the next segment; at the stream's end, to its beginning."""
        item, ends = next(self._items, None), 0
        while item is None:
            ends += 1
            if ends == 2:  # a whole pass without one document
                raise ValueError(
                    f"{self.source.spec}: this process found no text in its share of the stream; "
                    "give more documents, or use fewer processes"
                )
            self.passes += 1
            self._items = self._kept(None)
            item = next(self._items, None)
        self._place, segment, follows = item
        self._begins = segment.first or not follows
        self._hash = f"{digest_of(segment):016x}"
        self._tokens, self.used = np.array(self.encode([segment])[0], np.int64), 0
        self.read["tokens"] += len(self._tokens)

    def _kept(self, place: Any) -> Iterator[Item]:
        """What is not held out; a segment after one that is begins a document."""
        follows = True
        for item in self.stream.read(place):
            kept = digest_of(item.segment) >= self.threshold
            self.read["kept" if kept else "held out"] += item.segment.first
            if kept:
                yield item._replace(follows=item.follows and follows)
                follows = True
            else:
                follows = False
