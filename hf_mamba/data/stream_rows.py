"""One source as a stream: its records -> documents -> rows of one process, with a state after every row."""

import json
import re
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import xxhash

from hf_mamba.data.records import SEPARATOR, BadRecords, check_columns, cut, missing_column, unusable
from hf_mamba.data.sources import Source, hub_dataset

BUILDERS = {"text": "text", "jsonl": "text", "parquet": "parquet", "arrow": "arrow"}  # lines of JSON are read here


def held_out(text: str, threshold: int) -> bool:
    """Whether a document is for evaluation: its hash is below the threshold."""
    return xxhash.xxh3_64_intdigest(text.encode()) < threshold


def open_source(source: Source) -> Any:
    """The source as a `datasets.IterableDataset`."""
    from datasets import load_dataset

    if source.kind == "hub":
        return hub_dataset(source.spec, streaming=True)
    files = source.files()
    kinds = {file.kind for file in files}
    if len(kinds) > 1:
        raise ValueError(f"{source.spec} has files of the types {', '.join(sorted(kinds))}; stream one type per source")
    kind = kinds.pop()
    options = {"text": {"sample_by": "document"}, "jsonl": {"encoding": "latin-1"}}.get(kind, {})
    paths = [file.path for file in files]
    return load_dataset(BUILDERS[kind], data_files=paths, split="train", streaming=True, **options)


class Reader:
    """What a source's records hold: their texts, and what of them cannot be used.

    Raises:
        ValueError: there is no such source, or it has no column of this name.
    """

    def __init__(self, source: Source) -> None:
        self.source = source
        files = source.files() if source.kind != "hub" else []
        kinds = {file.kind for file in files}
        self.lines, self.whole_files = kinds == {"jsonl"}, kinds == {"text"}
        check_columns(files, source.text_column)
        self.bad = BadRecords()

    def texts(self, record: Mapping[str, Any]) -> list[str]:
        """The documents of a record: one; of a text file those between its separators; none where it is broken.

        Raises:
            ValueError: there is no column of this name.
        """
        if self.whole_files:
            found: list[Any] = re.split(f"^{re.escape(SEPARATOR)}$\n?", record["text"], flags=re.MULTILINE)
            found = [text for text in found if text] or [""]
        elif self.lines:
            found = self._of_line(record["text"])
        else:
            if self.source.text_column not in record:
                raise ValueError(missing_column(self.source.spec, self.source.text_column, list(record)))
            found = [record[self.source.text_column]]
        texts = []
        for text in found:
            if reason := unusable(text):
                self.bad.add(reason, self.source.spec)
            else:
                texts.append(text)
        return texts

    def _of_line(self, line: str) -> list[Any]:
        """The text of a JSON line, which was read as latin-1 so that a broken one is one broken record."""
        if not line.strip():
            return []
        try:
            record = json.loads(line.encode("latin-1").decode("utf-8-sig"))
        except UnicodeDecodeError:
            self.bad.add("not UTF-8 text", self.source.spec)
        except (ValueError, RecursionError):
            self.bad.add("invalid JSON", self.source.spec)
        else:
            if isinstance(record, dict) and self.source.text_column in record:
                return [record[self.source.text_column]]
            self.bad.add(f"no key {self.source.text_column!r}", self.source.spec)
        return []


def encode(tokenizer: Any, text: str, eos: int) -> np.ndarray:
    """A document's tokens, with EOS, (T,) int64: the same as in the shards."""
    encoded = tokenizer.encode_batch_fast([s.text for s in cut(text)], add_special_tokens=False)
    return np.array([i for e in encoded for i in e.ids] + [eos], np.int64)


class Packer:
    """One source's rows for one process, with a state after every row.

    Args:
        share: (rank, world size).
        threshold: documents whose hash is below are held out.
        state: where to go on; None is the beginning.

    Raises:
        ValueError: this process's share has no text, or the stream does not lead to the state's document again.
    """

    def __init__(
        self,
        source: Source,
        tokenizer: Any,
        eos: int,
        share: tuple[int, int],
        threshold: int,
        state: Mapping[str, Any] | None,
    ) -> None:
        from datasets.distributed import split_dataset_by_node

        self.source, self.tokenizer, self.eos, self.threshold = source, tokenizer, eos, threshold
        self.reader = Reader(source)
        self.stream = split_dataset_by_node(open_source(source), rank=share[0], world_size=share[1])
        self.iterator: Iterator[dict[str, Any]] | None = None
        self.texts: list[str] = []  # of the current record
        self.part = -1  # which of them is the current document
        self.hash = ""  # of that document
        if state is None:
            self.before: dict[str, Any] | None = None  # the stream just before the current record; None: its beginning
            self.passes = 0
            self._next_document()
            return
        self.before, self.passes = state["before"], state["passes"]
        self._next_record()
        self._take(state["part"])
        if self.hash != state["hash"]:
            raise ValueError(
                f"{source.spec}: the stream does not go on with the document at which the checkpoint was taken; "
                "the data or the datasets library has changed, and resuming would repeat or skip text. "
                "Start a new run from the checkpoint's weights, or tokenise the data first."
            )
        self.used = state["used"]

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

    def state(self) -> dict[str, Any]:
        return {"before": self.before, "part": self.part, "hash": self.hash, "used": self.used, "passes": self.passes}

    def _next_document(self) -> None:
        if self.part + 1 >= len(self.texts):
            self._next_record()
            self.part = -1
        self._take(self.part + 1)

    def _take(self, part: int) -> None:
        text = self.texts[part] if part < len(self.texts) else ""
        self.part, self.used = part, 0
        self.hash = xxhash.xxh3_128_hexdigest(text.encode())
        self.document = encode(self.tokenizer, text, self.eos)

    def _next_record(self) -> None:
        """Go to the next record with text; at the stream's end, to its beginning."""
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
                    raise ValueError(
                        f"{self.source.spec}: this process found no text in its share of the stream; "
                        "give more documents, or use fewer processes"
                    )
                self.passes, self.before, self.iterator = self.passes + 1, None, None
                continue
            self.texts = [text for text in self.reader.texts(record) if not held_out(text, self.threshold)]
            if self.texts:
                self.before = before
                return
