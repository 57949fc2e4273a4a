"""A document in segments, and the account of what could not be used.

A segment is at most 64 Ki characters of one document, or 16 Ki ids of one that came as ids. Most documents are one
segment; a book is many. A segment is what the tokenizer is given, and what is held out for evaluation.
"""

import logging
from array import array
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from hf_mamba.findings import first_line

SEGMENT_CHARS = 1 << 16
MAX_EXAMPLES = 5
MAX_RECORD = 1 << 30  # characters of a record that has not ended
logger = logging.getLogger("hf_mamba.data")


class DataError(ValueError):
    """The data cannot be gone on with, which is found out in the middle of training."""


class Segment(NamedTuple):
    """A piece of a document, and whether it is its first or last; of a document that came as ids, these."""

    text: str
    first: bool = True
    last: bool = True
    ids: list[int] | None = None

    def raw(self) -> bytes:
        """Its content, by whose hash it is held out."""
        return self.text.encode() if self.ids is None else array("I", self.ids).tobytes()


@dataclass
class BadRecords:
    """What could not be used: how often for which reason, and where the first ones are.

    `said` logs the first ones as they are met: of a stream, which has no end to report at.
    """

    counts: Counter[str] = field(default_factory=Counter)
    examples: list[str] = field(default_factory=list)
    said: bool = False

    def add(self, reason: str, where: str) -> None:
        self.counts[reason] += 1
        if len(self.examples) < MAX_EXAMPLES:
            self.examples.append(f"{where}: {reason}")
            if self.said:
                last = "; more of the kind are counted in unusable_records" * (len(self.examples) == MAX_EXAMPLES)
                logger.warning("%s (skipped%s)", self.examples[-1], last)


def cut(text: str) -> Iterator[Segment]:
    """A document in segments of at most SEGMENT_CHARS characters, cut after the last line end that fits."""
    start = 0
    while True:
        stop = len(text)
        if stop - start > SEGMENT_CHARS:
            stop = text.rfind("\n", start, start + SEGMENT_CHARS) + 1 or start + SEGMENT_CHARS
        yield Segment(text[start:stop], start == 0, stop == len(text))
        if stop == len(text):
            return
        start = stop


def cut_ids(ids: list[int]) -> Iterator[Segment]:
    """A document that came as ids in segments of as many ids as four characters each would be."""
    size = max(1, SEGMENT_CHARS // 4)
    for start in range(0, len(ids), size):
        yield Segment("", start == 0, start + size >= len(ids), ids[start : start + size])


def are_ids(value: Any) -> bool:
    """Whether a record's value is a list of whole numbers, or an array of them."""
    if isinstance(value, list):
        return all(type(item) is int for item in value)
    return getattr(getattr(value, "dtype", None), "kind", None) in ("i", "u")


def unusable(value: Any) -> str | None:
    """Why a record's text or ids cannot be used; None when they can. Bytes stand for a string that is not UTF-8."""
    if are_ids(value):
        return None if len(value) else "empty"
    if not isinstance(value, str):
        return "no text" if value is None else "not UTF-8 text" if isinstance(value, bytes) else "text is not a string"
    if not value or value.isspace():
        return "empty"
    if not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError:
            return "lone surrogate (not Unicode text)"
    return None


def reason_of(error: BaseException) -> str:
    """The first line of an error's text, short; its class where it has none."""
    return first_line(error)[:100]
