"""A document in segments, and the account of what could not be used.

A segment is at most 64 Ki characters of one document. Most documents are one segment; a book is many. A segment is what
the tokenizer is given, and what is held out for evaluation.
"""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

SEGMENT_CHARS = 1 << 16
MAX_EXAMPLES = 5
MAX_RECORD = 1 << 30  # characters of a record that has not ended


class Segment(NamedTuple):
    """A piece of a document, and whether it is its first or last."""

    text: str
    first: bool = True
    last: bool = True


@dataclass
class BadRecords:
    """What could not be used: how often for which reason, and where the first ones are."""

    counts: Counter[str] = field(default_factory=Counter)
    examples: list[str] = field(default_factory=list)

    def add(self, reason: str, where: str) -> None:
        self.counts[reason] += 1
        if len(self.examples) < MAX_EXAMPLES:
            self.examples.append(f"{where}: {reason}")


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


def unusable(value: Any) -> str | None:
    """Why a record's text cannot be used; None when it can. Bytes stand for a string that is not UTF-8."""
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
    lines = str(error).strip().splitlines()
    return lines[0][:100] if lines else type(error).__name__
