"""Rows for the model: exactly seq_len tokens, with the documents in them told apart."""

from bisect import bisect_right
from collections.abc import Iterable, Sequence
from itertools import accumulate

import numpy as np
import torch
from torch.utils.data import Dataset

from hf_mamba.data.order import Place, RowOrder
from hf_mamba.data.shards import TokenStream

IGNORE = -100


def make_row(tokens: np.ndarray, starts: np.ndarray, length: int | None = None) -> dict[str, torch.Tensor]:
    """What the model is given for one row.

    The model shifts: position t predicts label t+1. So a label is ignored where a document begins (nothing in the row
    predicts it) and at t = 0, which is never a target; the number of labels kept is the number of predictions made.

    Args:
        tokens: (L,) any integer type.
        starts: positions at which documents begin.
        length: tokens that are real; what follows is padding.

    Returns:
        input_ids (L,) int64, labels (L,) int64, seq_idx (L,) int32 counting the documents in the row from 0.
    """
    input_ids = torch.from_numpy(tokens.astype(np.int64))
    new = np.zeros(len(tokens), np.int32)
    new[starts] = 1
    if length is not None and length < len(tokens):
        new[length] = 1  # padding is a document of its own
    new[0] = 0
    labels = input_ids.clone()
    labels[torch.from_numpy(new == 1)] = IGNORE
    labels[0] = IGNORE
    if length is not None:
        labels[length:] = IGNORE
    return {"input_ids": input_ids, "labels": labels, "seq_idx": torch.from_numpy(np.cumsum(new, dtype=np.int32))}


def collate(rows: Sequence[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Rows -> a batch: each (L,) becomes (B, L)."""
    return {key: torch.stack([row[key] for row in rows]) for key in rows[0]}


class PackedDataset(Dataset[dict[str, torch.Tensor]]):
    """sample number -> row, without end: `dataset[i]` is the i-th sample of the run, whatever the number of processes.

    Args:
        streams: one stream, or one per weighted source.
        seq_len: L, tokens per row.
        seed: decides the order, with `weights`.
        weights: share of the samples of each stream, when there are several.
        names: the sources' names, for messages and per-source figures.
        with_source: add "source_id" (int64 scalar) to each row: the source of its first token.

    Raises:
        ValueError: a stream shorter than a row.
    """

    def __init__(
        self,
        streams: Sequence[TokenStream],
        seq_len: int,
        seed: int,
        weights: Sequence[float] | None = None,
        names: Sequence[str] = (),
        with_source: bool = False,
    ) -> None:
        self.streams, self.seq_len, self.names, self.with_source = list(streams), seq_len, list(names), with_source
        self.order = RowOrder([stream.size for stream in streams], seq_len, seed, weights)
        self.tokens = sum(stream.size for stream in streams)

    def __getitem__(self, sample: int) -> dict[str, torch.Tensor]:
        place = self.order[sample]
        row = make_row(*self.streams[place.stream].read(place.row * self.seq_len, self.seq_len))
        if self.with_source:
            row["source_id"] = torch.tensor(self._source(place))
        return row

    def source_of(self, sample: int) -> int:
        """The number of the source (as in `names`) that sample number `sample` begins in; reads no tokens."""
        return self._source(self.order[sample])

    def source_counts(self, samples: Iterable[int]) -> dict[str, int]:
        """How many of these samples come from each source."""
        counts = dict.fromkeys(self.names, 0)
        for sample in samples:
            counts[self.names[self.source_of(sample)]] += 1
        return counts

    def passes(self, sample: int) -> list[float]:
        """Passes over each stream that lie behind sample number `sample`."""
        counts = self.order.counts(sample)
        return [n * self.seq_len / stream.size for n, stream in zip(counts, self.streams, strict=True)]

    def epoch(self, sample: int) -> float:
        """Passes over the data that lie behind sample number `sample`, the least advanced stream counting."""
        return min(self.passes(sample))

    def _source(self, place: Place) -> int:
        return self.streams[place.stream].source_at(place.row * self.seq_len)


class ArrayStream:
    """Documents in memory, read like a `TokenStream`; `sources` are the numbers of the sources that they are of."""

    def __init__(self, documents: Sequence[np.ndarray], sources: Sequence[int] | None = None) -> None:
        self._tokens = np.concatenate(documents)
        self._sources = sources or [0] * len(documents)
        self._starts = np.cumsum([0, *(len(d) for d in documents[:-1])])
        self.size = len(self._tokens)

    def read(self, start: int, length: int) -> tuple[np.ndarray, np.ndarray]:
        """Tokens [start, start + length), and the positions in them at which documents begin."""
        inside = self._starts[(self._starts >= start) & (self._starts < start + length)]
        return self._tokens[start : start + length], inside - start

    def source_at(self, position: int) -> int:
        """The number of the source that the token at `position` is of."""
        return self._sources[int(np.searchsorted(self._starts, position, side="right")) - 1]


class EvalDataset(Dataset[dict[str, torch.Tensor]]):
    """Every held-out token once, in a fixed order; a stream's last row is filled with `pad_id`, never a target.

    Args:
        streams: one of all sources, or, where their losses are told apart exactly, one of each.
        names: of the sources, by number.
        weights: of the sources in the mean of their losses; without any, each token counts the same.
    """

    def __init__(
        self,
        streams: Sequence[TokenStream | ArrayStream],
        seq_len: int,
        pad_id: int,
        names: Sequence[str] = (),
        weights: Sequence[float] = (),
    ) -> None:
        self.streams, self.seq_len, self.pad_id = list(streams), seq_len, pad_id
        self.names, self.weights = list(names), list(weights)
        self.tokens = sum(stream.size for stream in streams)
        self._first = [0, *accumulate(-(-stream.size // seq_len) for stream in streams)]  # rows before each stream

    def __len__(self) -> int:
        return self._first[-1]

    def source_of(self, row: int) -> int:
        """The number of the source (as in `names`) that a row begins in."""
        stream, start = self._place(row)
        return stream.source_at(start)

    def _place(self, row: int) -> tuple[TokenStream | ArrayStream, int]:
        """A row's stream, and where it starts there."""
        if not 0 <= row < len(self):
            raise IndexError(f"row {row} of {len(self)}")
        number = bisect_right(self._first, row) - 1
        return self.streams[number], (row - self._first[number]) * self.seq_len

    def __getitem__(self, row: int) -> dict[str, torch.Tensor]:
        stream, start = self._place(row)
        length = min(self.seq_len, stream.size - start)
        tokens, starts = stream.read(start, length)
        padding = np.full(self.seq_len - length, self.pad_id, tokens.dtype)
        return make_row(np.concatenate([tokens, padding]), starts, length)
