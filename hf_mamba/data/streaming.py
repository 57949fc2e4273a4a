"""Rows from a data set too large to tokenise first: read, tokenised and packed while training runs.

What a resume guarantees here, and what it does not:
- with the same number of processes and the same sources it is exact: the state says which document each process was in
  and how far, and on resume that document must be found again, by the hash of its text, or the resume is refused;
- with another number of processes it is refused: each process packs its own share of the documents, so the rows would
  be others. Tokenised shards (`prepare_data`) have no such limit;
- documents come in the order in which they are stored, shuffled neither by document nor by row (a buffer's content
  would be lost in a resume); most large data sets are published shuffled. At its end a source begins again.
"""

import queue
import threading
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import xxhash

from .dataset import ArrayStream, EvalDataset, collate, make_row
from .order import Mixture
from .records import BadRecords, cut, missing_column, unusable
from .sources import Source, hub_dataset, parse_sources
from .tokenizer import backend, tokenizer_fingerprint

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_BUILDERS = {"text": "text", "jsonl": "json", "parquet": "parquet", "arrow": "arrow"}


def held_out(text: str, threshold: int) -> bool:
    """Whether a document is for evaluation: its hash is below the threshold."""
    return xxhash.xxh3_64_intdigest(text.encode()) < threshold


def _open(source: Source) -> Any:
    """The source as a `datasets.IterableDataset`."""
    from datasets import load_dataset

    if source.kind == "hub":
        return hub_dataset(source.spec, streaming=True)
    files = source.files()
    kinds = {file.kind for file in files}
    if len(kinds) > 1:
        raise ValueError(f"{source.spec} has files of the types {', '.join(sorted(kinds))}; stream one type per source")
    kind = kinds.pop()
    options = {"sample_by": "document"} if kind == "text" else {}
    return load_dataset(
        _BUILDERS[kind], data_files=[file.path for file in files], split="train", streaming=True, **options
    )


def encode(tokenizer: Any, text: str, eos: int) -> np.ndarray:
    """A document's tokens, with EOS, (T,) int64: the same as in the shards."""
    encoded = tokenizer.encode_batch_fast([s.text for s in cut(text)], add_special_tokens=False)
    return np.array([i for e in encoded for i in e.ids] + [eos], np.int64)


class _Packer:
    """One source's rows for one process, with a state after every row."""

    def __init__(self, source: Source, tokenizer: Any, eos: int, rank: int, world_size: int, threshold: int) -> None:
        from datasets.distributed import split_dataset_by_node

        self.source, self.tokenizer, self.eos = source, tokenizer, eos
        self.threshold, self.bad = threshold, BadRecords()
        self.stream = split_dataset_by_node(_open(source), rank=rank, world_size=world_size)
        self.passes = 0
        self.before: dict[str, Any] | None = None  # the stream just before the current document; None: its beginning
        self.document = np.zeros(0, np.int64)
        self.hash, self.used = "", 0
        self.iterator: Iterator[dict[str, Any]] | None = None

    def row(self, length: int) -> tuple[np.ndarray, np.ndarray]:
        """The next `length` tokens and the positions at which documents start."""
        pieces: list[np.ndarray] = []
        starts, filled = [], 0
        while filled < length:
            if self.used == len(self.document):
                self._next_document()
            if self.used == 0:
                starts.append(filled)
            piece = self.document[self.used : self.used + length - filled]
            pieces.append(piece)
            self.used += len(piece)
            filled += len(piece)
        return np.concatenate(pieces), np.array(starts, np.int64)

    def _next_document(self) -> None:
        ends = 0
        while True:
            if self.iterator is None:
                before = self.before  # the stream's own state is stale until its first record
                self.stream.load_state_dict(before)
                self.iterator = iter(self.stream)
            else:
                before = self.stream.state_dict()
            record = next(self.iterator, None)
            if record is None:
                ends += 1
                if ends == 2:  # a whole pass without one document
                    raise ValueError(f"{self.source.spec}: this process found no text in its share of the stream")
                self.passes, self.before, self.iterator = self.passes + 1, None, None
                continue
            if self.source.text_column not in record:
                raise ValueError(missing_column(self.source.spec, self.source.text_column, list(record)))
            text = record[self.source.text_column]
            if reason := unusable(text):
                self.bad.add(reason, self.source.spec)
            elif not held_out(text, self.threshold):
                break
        self.before, self.used = before, 0
        self.hash = xxhash.xxh3_128_hexdigest(text.encode())
        self.document = encode(self.tokenizer, text, self.eos)

    def state(self) -> dict[str, Any]:
        return {"before": self.before, "hash": self.hash, "used": self.used, "passes": self.passes}

    def resume(self, state: Mapping[str, Any]) -> None:
        """Go on after the row at which `state` was taken.

        Raises:
            ValueError: the stream does not lead to the same document again.
        """
        self.passes, self.before, self.iterator = state["passes"], state["before"], None
        if not state["hash"]:  # no row of this source was made yet
            return
        self._next_document()
        if self.hash != state["hash"]:
            raise ValueError(
                f"{self.source.spec}: the stream does not go on with the document at which the checkpoint was taken; "
                "the data or the datasets library has changed, and resuming would repeat or skip text. "
                "Start a new run from the checkpoint's weights, or tokenise the data first."
            )
        self.used = state["used"]


class StreamingLoader:
    """Endless batches of rows from streams, for one process; `state_dict` after a batch resumes with the next.

    Args:
        sources: as for `prepare_data`; each is opened by `datasets` as a stream. Several sources need weights.
        tokenizer: a fast tokenizer.
        seq_len: L, tokens per row.
        micro_batch_size: B, rows per batch.
        rank, world_size: this process's share of the documents.
        seed: of the interleaving of several sources.
        eval_fraction: documents held out by the hash of their text; `held_out` reads them.
        text_column: the column that holds the text.

    Raises:
        ValueError: a source that cannot be streamed, or a missing column (when the first batch is made).
    """

    def __init__(
        self,
        sources: Sequence[str],
        tokenizer: "PreTrainedTokenizerBase",
        *,
        seq_len: int,
        micro_batch_size: int,
        rank: int = 0,
        world_size: int = 1,
        seed: int = 0,
        eval_fraction: float = 0.0,
        text_column: str = "text",
    ) -> None:
        self.sources = parse_sources(sources, text_column=text_column)
        if len(self.sources) > 1 and self.sources[0].weight is None:
            raise ValueError("streams have no known size to mix them by; give each a weight: NAME:WEIGHT")
        self.seq_len, self.micro_batch_size = seq_len, micro_batch_size
        self._encoder = backend(tokenizer)
        self._encoder.encode_special_tokens = True
        self._eos = int(tokenizer.eos_token_id)
        self._mixture = Mixture([s.weight or 1.0 for s in self.sources], seed)
        self._threshold = int(eval_fraction * 2**64)
        self._share = (rank, world_size)
        self.fingerprint = {
            "kind": "stream",
            "sources": [[s.spec, s.weight] for s in self.sources],
            "tokenizer": tokenizer_fingerprint(tokenizer),
            "seq_len": seq_len,
            "seed": seed,
            "held_out": self._threshold,
            "rank": rank,
            "world_size": world_size,
        }
        self._state: dict[str, Any] | None = None

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        """Batches of input_ids, labels and seq_idx (B, L), made by a thread a few batches ahead."""
        for batch, state in _ahead(self._batches()):
            self._state = state
            yield batch

    def state_dict(self) -> dict[str, Any]:
        """Where the last batch given out ends, as JSON can hold it. Each process has its own."""
        return {"fingerprint": self.fingerprint, "position": self._state}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Have the next iteration go on where `state` was taken.

        Raises:
            ValueError: the state is of other sources, settings or numbers of processes.
        """
        saved = state["fingerprint"]
        differences = [f"{k}: {saved.get(k)} then, {v} now" for k, v in self.fingerprint.items() if saved.get(k) != v]
        if differences:
            raise ValueError(
                f"a stream cannot be resumed with other settings ({'; '.join(differences)}), since its rows would be "
                "others. Resume with the same ones, start a new run from the weights, or tokenise the data first."
            )
        self._state = state["position"]

    def held_out(self, tokens: int, pad_id: int) -> EvalDataset:
        """The first held-out documents, at least `tokens` tokens or all there are: the same on every process.

        Raises:
            ValueError: nothing is held out.
        """
        pieces: list[np.ndarray] = []
        for source in self.sources:
            goal = tokens // len(self.sources)
            for record in _open(source):
                text = record.get(source.text_column)
                if goal <= 0:
                    break
                if not unusable(text) and held_out(text, self._threshold):
                    pieces.append(encode(self._encoder, text, self._eos))
                    goal -= len(pieces[-1])
        if not pieces:
            raise ValueError("no document of the stream is held out; give a larger eval_fraction")
        return EvalDataset(ArrayStream(pieces), self.seq_len, pad_id)

    def _batches(self) -> Iterator[tuple[dict[str, torch.Tensor], dict[str, Any]]]:
        packers = [_Packer(source, self._encoder, self._eos, *self._share, self._threshold) for source in self.sources]
        sample = 0
        if self._state is not None:
            sample = self._state["sample"]
            for packer, state in zip(packers, self._state["streams"], strict=True):
                packer.resume(state)
        while True:
            rows = []
            for _ in range(self.micro_batch_size):
                rows.append(make_row(*packers[self._mixture.draw(sample)[0]].row(self.seq_len)))
                sample += 1
            yield collate(rows), {"sample": sample, "streams": [packer.state() for packer in packers]}


def _ahead(items: Iterator[Any], depth: int = 4) -> Iterator[Any]:
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
