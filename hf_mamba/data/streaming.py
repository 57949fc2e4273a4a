"""Rows from a data set too large to tokenise first: read, tokenised and packed while training runs.

What a resume guarantees here, and what it does not (the pre-flight says it to the user):
- with the same number of processes it is exact: the position says which document each process was in and how far, and
  on resume that document must be found again, by the hash of its text, or the resume is refused;
- with another number of processes it is refused: each process packs its own share of the documents, so the rows would
  be others. Tokenised shards (`prepare_data`) have no such limit;
- documents come in the order in which they are stored, shuffled neither by document nor by row (a buffer's content
  would be lost in a resume); most large data sets are published shuffled. At its end a source begins again.
"""

import queue
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.utils.data import Dataset

from hf_mamba.data.dataset import ArrayStream, EvalDataset, make_row
from hf_mamba.data.encoding import Encoding
from hf_mamba.data.order import ORDER_VERSION, Mixture
from hf_mamba.data.segments import DataError
from hf_mamba.data.sources import parse_sources
from hf_mamba.data.stream_rows import Packer, digest_of, open_stream

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

EVAL_TOKENS = 1 << 18  # held out of a stream: the first so many, for which 100 times as many are read at 1%
AHEAD = 64  # rows


class StreamedDataset(Dataset[dict[str, torch.Tensor]]):
    """Endless rows from streams, by sample number like a `PackedDataset`'s, but for one process and in order only.

    `open` begins or resumes; a `DataLoader` without workers (`build_dataloader`) then asks for the samples of a
    `StepSampler`. Those that it leaves out are read and thrown away. `state_dict` says where the last row ends.

    Args:
        sources: as for `prepare_data`; each is read as it goes. Several sources need weights.
        tokenizer: a fast tokenizer, or how its ids are made.
        seq_len: L, tokens per row.
        seed: of the interleaving of several sources.
        eval_fraction: share of the documents that is held out by the hash of their text; `held_out` reads them.
        text_column: the column that holds the text.
        with_source: add "source_id" (int64 scalar) to each row.

    Raises:
        ValueError: names, weights or a tokenizer that cannot be used.
    """

    def __init__(
        self,
        sources: Sequence[str],
        tokenizer: "PreTrainedTokenizerBase | Encoding",
        *,
        seq_len: int,
        seed: int = 0,
        eval_fraction: float = 0.0,
        text_column: str = "text",
        with_source: bool = False,
    ) -> None:
        self.sources = parse_sources(sources, text_column=text_column)
        if len(self.sources) > 1 and self.sources[0].weight is None:
            raise ValueError("streams have no known size to mix them by; give each a weight: NAME:WEIGHT")
        self.seq_len, self.with_source = seq_len, with_source
        self.names = [source.spec for source in self.sources]
        encoding = tokenizer if isinstance(tokenizer, Encoding) else Encoding.of(tokenizer)
        self._encoding = encoding
        self._mixture = Mixture([s.weight or 1.0 for s in self.sources], seed)
        self._threshold = int(eval_fraction * 2**64)
        self.fingerprint: dict[str, Any] = {
            "streamed": True,
            "order": ORDER_VERSION,
            "seed": seed,
            "seq_len": seq_len,
            "tokenizer": encoding.fingerprint,
            "held_out": self._threshold,
            "sources": [{"name": s.spec, "weight": s.weight} for s in self.sources],
        }
        self._rows: Iterator[Any] | None = None

    def open(self, rank: int = 0, world_size: int = 1, state: Mapping[str, Any] | None = None) -> None:
        """Begin this process's share of the documents, or go on where `state` was taken.

        Raises:
            ValueError: the state is of another number of processes or other data; a share without text.
        """
        self.close()
        self._share = (rank, world_size)
        state = state or {"rank": rank, "world_size": world_size, "rows": 0, "streams": [None] * len(self.sources)}
        if (state["rank"], state["world_size"]) != self._share:
            raise ValueError(
                f"the checkpoint was written by {state['world_size']} processes and this run has {world_size}: each "
                "reads its own share of a stream, so the rows would be others. Resume with as many, start a new run "
                "from the checkpoint's weights, or tokenise the data first (without --streaming)."
            )
        if any(position and "place" not in position for position in state["streams"]):
            raise ValueError(
                "the checkpoint's stream was read by an older version, in another way, and cannot be gone on with. "
                "Start a new run from the checkpoint's weights, or resume with the version that began the run."
            )
        self._packers = [
            Packer(source, self._encoding, self._share, self._threshold, position)
            for source, position in zip(self.sources, state["streams"], strict=True)
        ]
        self._state = {**state, "streams": [packer.state() for packer in self._packers]}
        self._rows = _ahead(self._make_rows(state["rows"], self._state["streams"]))

    def close(self) -> None:
        """Stop reading ahead."""
        if self._rows is not None:
            self._rows.close()  # type: ignore[attr-defined]
            self._rows = None

    def state_dict(self) -> dict[str, Any]:
        """Where the last row given out ends, as JSON can hold it. Each process has its own."""
        return self._state

    def unusable(self) -> int:
        """Records of this process so far that held no text that can be used."""
        return sum(packer.stream.bad.counts.total() for packer in self._packers)

    def account(self) -> list[dict[str, Any]]:
        """What this process has read of each source since its start: documents kept and held out, tokens, unusable."""
        return [{**packer.read, "unusable": dict(packer.stream.bad.counts)} for packer in self._packers]

    def __getitems__(self, samples: Sequence[int]) -> list[dict[str, torch.Tensor]]:
        """The rows of one micro-batch of this process; micro-batches must be asked for in order.

        Raises:
            ValueError: they lie before the last ones, or belong to another process.
        """
        assert self._rows is not None, "open() comes first"
        rank, world_size = self._share
        block, owner = divmod(samples[0] // len(samples), world_size)
        first = block * len(samples)
        if owner != rank or first < self._state["rows"]:
            raise ValueError(
                f"sample {samples[0]} is not this process's, or lies behind it; a stream goes forward only"
            )
        while self._state["rows"] < first:
            _, self._state = next(self._rows)
        found = []
        try:
            for _ in samples:
                row, self._state = next(self._rows)
                found.append(row)
        except DataError as error:
            error.origin = rank  # type: ignore[attr-defined]  # who says it: see training/errors.py
            raise
        return found

    def __getitem__(self, sample: int) -> dict[str, torch.Tensor]:
        return self.__getitems__([sample])[0]

    def source_counts(self, samples: Iterable[int]) -> dict[str, int]:
        """How many of these samples, whole steps, come from each source."""
        counts = dict.fromkeys(self.names, 0)
        for sample in samples:
            counts[self.names[self._mixture.draw(sample)[0]]] += 1
        return counts

    def held_out(self, tokens: int, pad_id: int) -> EvalDataset:
        """The first held-out documents, at least `tokens` tokens or all there are: the same on every process.

        Raises:
            ValueError: nothing is held out.
        """
        pieces: list[np.ndarray] = []
        origins: list[int] = []
        for number, source in enumerate(self.sources):
            goal = tokens // len(self.sources)
            for item in open_stream(source, (0, 1), self._encoding).read(None):
                if digest_of(item.segment) < self._threshold:
                    pieces.append(np.array(self._encoding.encode([item.segment])[0], np.int64))
                    origins.append(number)
                    goal -= len(pieces[-1])
                if goal <= 0:
                    break
        if not pieces:
            raise ValueError("no document of the stream is held out; give a larger eval_fraction, or 0 for none")
        return EvalDataset([ArrayStream(pieces, origins)], self.seq_len, pad_id, self.names)

    def _make_rows(self, count: int, states: list[Any]) -> Iterator[tuple[dict[str, torch.Tensor], dict[str, Any]]]:
        """(row, state after it), from this process's row number `count` on."""
        rank, world_size = self._share
        while True:
            # within a step, the processes' rows are numbered in turn, whatever the micro-batch
            stream = self._mixture.draw(count * world_size + rank)[0]
            row = make_row(*self._packers[stream].row(self.seq_len))
            if self.with_source:
                row["source_id"] = torch.tensor(stream)
            count += 1
            states = [*states[:stream], self._packers[stream].state(), *states[stream + 1 :]]
            yield row, {"rank": rank, "world_size": world_size, "rows": count, "streams": states}


def _ahead(items: Iterator[Any], depth: int = AHEAD) -> Iterator[Any]:
    """The items, made by a thread that stays at most `depth` ahead; its error is raised here."""
    ready: queue.Queue[tuple[Any, BaseException | None]] = queue.Queue(depth)
    closed = threading.Event()

    def offer(item: Any, error: BaseException | None) -> None:
        while not closed.is_set():
            try:
                return ready.put((item, error), timeout=0.2)
            except queue.Full:
                continue

    def work() -> None:
        try:
            for item in items:
                offer(item, None)
                if closed.is_set():
                    return
        except ValueError as error:
            offer(None, DataError(str(error)))
        except BaseException as error:
            offer(None, error)

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    try:
        while True:
            item, error = ready.get()
            if error is not None:
                raise error
            yield item
    finally:
        closed.set()
        thread.join()
