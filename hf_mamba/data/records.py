"""Files -> units of work -> segments of text.

A unit is what one worker does at a time and what a killed build keeps: a range of bytes, row groups or batches of one
file, or several small files. Units depend on the files alone, never on the number of workers. Streams read the same
units in the same way.
"""

import contextlib
import csv
import itertools
import json
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

from hf_mamba.data import segments
from hf_mamba.data.lines import BLOCK, head, read_lines
from hf_mamba.data.segments import BadRecords, Segment, are_ids, cut, unusable
from hf_mamba.data.sources import DataFile, column_in, missing_column
from hf_mamba.data.tables import check_table, count_parts, read_rows

SEPARATOR = "<|endoftext|>"  # a line of a text file that is just this ends a document (as in TinyStories)
MIN_UNIT_BYTES, MAX_UNIT_BYTES, UNITS = 4 << 20, 256 << 20, 256
LOOKED_AT = 100  # records for the names of the columns, and the lengths of rows of ids
_ARRAY = re.compile(rb"(\xef\xbb\xbf)?\s*\[\s*(\{|\]|$)")  # how one JSON array of objects begins
IDS_NEED_A_TOKENIZER = "these are ids; name the tokenizer that made them with --tokenizer_name"
_BETWEEN = re.compile(r"[\ufeff\s,]*")  # of elements


@dataclass(frozen=True)
class Unit:
    """Part of a source: whole small files (begin 0, end -1), or the range [begin, end) of one file.

    The range counts bytes (text, jsonl), row groups (parquet) or record batches (arrow).
    """

    files: tuple[DataFile, ...]
    begin: int = 0
    end: int = -1

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, value: dict[str, Any]) -> "Unit":
        return cls(tuple(DataFile(**f) for f in value["files"]), value["begin"], value["end"])


def plan_units(files: list[DataFile]) -> list[Unit]:
    """Cut files into units of like size: about 256 of them, each between 4 and 256 MiB as it lies on disk."""
    sizes = [os.path.getsize(f.path) for f in files]
    goal = min(max(sum(sizes) // UNITS, MIN_UNIT_BYTES), MAX_UNIT_BYTES)
    units: list[Unit] = []
    small: list[DataFile] = []
    filled = 0
    for file, size in zip(files, sizes, strict=True):
        if size > goal and _can_be_cut(file):
            units += [Unit(tuple(small))] if small else []
            units += [Unit((file,), begin, end) for begin, end in _ranges(file, size, goal)]
            small, filled = [], 0
            continue
        small.append(file)
        filled += size
        if filled >= goal:
            units.append(Unit(tuple(small)))
            small, filled = [], 0
    return units + ([Unit(tuple(small))] if small else [])


def _can_be_cut(file: DataFile) -> bool:
    return file.compression is None and file.kind != "csv" and not _is_array(file)


def _ranges(file: DataFile, size: int, goal: int) -> list[tuple[int, int]]:
    total = size if file.kind in ("text", "jsonl") else count_parts(file)
    pieces = min(-(-size // goal), max(total, 1))
    return [(total * i // pieces, total * (i + 1) // pieces) for i in range(pieces)]


# (ids, where they are, whether they are rows packed by somebody else) -> segments; see `Encoding.take`
TakeIds = Callable[[Any, str, bool], Iterator[Segment]]


def read_unit(unit: Unit, text_column: str, bad: BadRecords, take: TakeIds | None = None) -> Iterator[Segment]:
    """The segments of a unit, in order; what cannot be used goes to `bad`, and a record of ids to `take`.

    Raises:
        ValueError: a file that the disk cannot read, columns without `text_column`, or ids that cannot be taken.
    """
    for file in unit.files:
        if file.kind == "text":
            yield from _read_text(file, unit.begin, unit.end, bad)
            continue
        packed: bool | None = None
        for where, value in _reader(file)(file, unit.begin, unit.end, text_column, bad):
            if reason := unusable(value):
                bad.add(reason, where)
            elif isinstance(value, str):
                yield from cut(value)
            elif take is None:
                raise ValueError(f"{where}: {IDS_NEED_A_TOKENIZER}")
            else:
                packed = are_packed(first_values([file], text_column)) if packed is None else packed
                yield from take(value, where, packed)


def first_values(files: list[DataFile], column: str) -> list[tuple[str, Any]]:
    """(where, value) of the first records of the first file with columns."""
    file = next((f for f in files if f.kind != "text"), None)
    values = iter(()) if file is None else _reader(file)(file, 0, -1, column, BadRecords())
    return list(itertools.islice(values, LOOKED_AT))


def are_packed(values: list[tuple[str, Any]]) -> bool:
    """Whether these are rows of ids of one length: cut from a stream of tokens, so that their ends mean nothing."""
    lengths = [len(value) for _, value in values if are_ids(value)]
    return len(lengths) > 1 and len(set(lengths)) == 1


def _reader(file: DataFile) -> Any:
    """The function that gives (where, value) of the records of a file with columns."""
    if file.kind == "jsonl":
        return _read_array if _is_array(file) else _read_jsonl
    return _read_csv if file.kind == "csv" else read_rows


def _is_array(file: DataFile) -> bool:
    """Whether the file is one JSON array of records, instead of one record a line."""
    return file.kind == "jsonl" and _ARRAY.match(head(file, 256)) is not None


def check_columns(files: list[DataFile], column: str) -> None:
    """Fail before any work when the first file with columns has none named `column`.

    Raises:
        ValueError: with the columns that are there and the nearest name.
    """
    file = next((f for f in files if f.kind != "text"), None)
    if file is None:
        return
    if file.kind in ("parquet", "arrow"):
        return check_table(file, column)
    keys: dict[str, None] = {}
    if file.kind == "csv":
        keys.update(dict.fromkeys(next(_csv_rows(file, BadRecords()), (0, []))[1]))
    elif _is_array(file):
        for _, record in itertools.islice(_elements(file, BadRecords()), LOOKED_AT):
            keys.update(dict.fromkeys(record) if isinstance(record, dict) else {})
    else:
        for _, line in itertools.islice(read_lines(file, 0, -1, BadRecords()), LOOKED_AT):
            with contextlib.suppress(ValueError, RecursionError):
                record = json.loads(line)
                keys.update(dict.fromkeys(record) if isinstance(record, dict) else {})
            if column in keys:
                break
    if keys and column_in(keys, column) not in keys:
        raise ValueError(missing_column(file.path, column, list(keys)))


def _read_text(file: DataFile, begin: int, end: int, bad: BadRecords) -> Iterator[Segment]:
    """A text file is one document, unless lines of SEPARATOR divide it."""
    first, found, before = begin == 0, False, bad.counts.total()
    lines: list[str] = []
    size, read = 0, False  # whether a line of the document, or its end, is in this range

    def flush(last: bool) -> Iterator[Segment]:
        text = "".join(lines)
        if text and not (first and last and text.isspace()):
            for piece in cut(text):
                yield Segment(piece.text, first and piece.first, last and piece.last)
        elif not text and read and first != last:  # one end of a document of which no line here could be used
            yield Segment("", first, last)

    last = True
    for number, (offset, line) in enumerate(read_lines(file, begin, end, bad)):
        ends = line.strip() == SEPARATOR.encode()
        if 0 <= end <= offset:  # only to see whether the document goes on in the next range
            last = ends
            break
        if number == 0 and begin > 0:
            first = ends or _follows_separator(file, offset)
        if ends:
            read = True
            for segment in flush(last=True):
                found = True
                yield segment
            lines, size, first, read = [], 0, True, False
            continue
        read = True
        text = _decode(line, f"{file.name} byte {offset}", bad)
        if not text:
            continue
        if lines and size + len(text) > segments.SEGMENT_CHARS:
            for segment in flush(last=False):
                found = True
                yield segment
            lines, size, first = [], 0, False
        lines.append(text)
        size += len(text)
    for segment in flush(last):
        found = True
        yield segment
    if not found and end < 0 and bad.counts.total() == before:
        bad.add("empty", file.name)


def _follows_separator(file: DataFile, offset: int) -> bool:
    """Whether the line before the one at `offset` is a separator."""
    with open(file.path, "rb") as handle:
        handle.seek(max(0, offset - 64))
        before = handle.read(min(64, offset))
    return before.splitlines()[-1].strip() == SEPARATOR.encode() if before else True


def _decode(line: bytes, where: str, bad: BadRecords) -> str:
    """The line as text; nothing where it is none."""
    try:
        if b"\0" in line:
            raise ValueError
        return line.decode("utf-8-sig")
    except ValueError:
        bad.add("not UTF-8 text", where)
        return ""


def _value(record: Any, column: str, where: str, bad: BadRecords) -> Iterator[tuple[str, Any]]:
    """The value of one JSON record."""
    column = column_in(record, column) if isinstance(record, dict) else column
    if not isinstance(record, dict):
        bad.add("not a JSON object", where)
    elif column not in record:
        bad.add(f"no key {column!r}", where)
    else:
        yield where, record[column]


def _read_jsonl(file: DataFile, begin: int, end: int, column: str, bad: BadRecords) -> Iterator[tuple[str, Any]]:
    for offset, line in read_lines(file, begin, end, bad):
        if 0 <= end <= offset:
            return
        if line.isspace():
            continue
        where = f"{file.name} byte {offset}"
        try:
            record = json.loads(line.decode("utf-8-sig"))
        except UnicodeDecodeError:
            bad.add("not UTF-8 text", where)
        except (ValueError, RecursionError):
            bad.add("invalid JSON", where)
        else:
            yield from _value(record, column, where, bad)


def _read_array(file: DataFile, begin: int, end: int, column: str, bad: BadRecords) -> Iterator[tuple[str, Any]]:
    for where, record in _elements(file, bad):
        yield from _value(record, column, where, bad)


def _elements(file: DataFile, bad: BadRecords) -> Iterator[tuple[str, Any]]:
    """(where, element) of a file that is one JSON array, of which no more than some elements are held at once."""
    blocks = (line.decode("utf-8", "surrogateescape") for _, line in read_lines(file, 0, -1, bad))
    text, at, number, size, whole = "", 0, -1, BLOCK, False  # element -1 is the bracket
    while True:
        at = _BETWEEN.match(text, at).end()  # type: ignore[union-attr]
        found = None
        if at < len(text) and text[at] == "]":
            return
        if number < 0 and at < len(text):
            number, at = 0, at + 1
            continue
        try:
            found, stop = json.JSONDecoder().raw_decode(text, at)
        except (ValueError, RecursionError):
            stop = -1
        if stop >= 0 and (whole or stop < len(text)):  # a number that ends where the text does may go on
            yield f"{file.name} element {number}", found
            number, at, size = number + 1, stop, BLOCK
        elif whole or len(text) - at > segments.MAX_RECORD:
            bad.add("invalid JSON, and what follows in the array", f"{file.name} element {max(number, 0)}")
            return
        else:
            pieces, held = [text[at:]], 0
            while held < size and not whole:
                pieces.append(next(blocks, ""))
                whole, held = not pieces[-1], held + len(pieces[-1])
            text, at, size = "".join(pieces), 0, 2 * size  # more each time: an element is read again from its begin


def _csv_rows(file: DataFile, bad: BadRecords) -> Iterator[tuple[int, list[str]]]:
    """(row number, fields); row 0 is the header."""
    csv.field_size_limit(segments.MAX_RECORD)
    lines = read_lines(file, 0, -1, bad)
    text = (line.decode("utf-8" if at else "utf-8-sig", "surrogateescape") for at, line in lines)
    rows, number = csv.reader(text, strict=True), 0
    while True:
        try:
            row = next(rows, None)
        except csv.Error as error:
            bad.add(f"invalid CSV ({error})", f"{file.name} row {number}")
        else:
            if row is None:
                return
            if row:
                yield number, row
        number += 1


def _read_csv(file: DataFile, begin: int, end: int, column: str, bad: BadRecords) -> Iterator[tuple[str, Any]]:
    rows = _csv_rows(file, bad)
    header = next(rows, (0, []))[1]
    if not header:
        return
    if column not in header:
        raise ValueError(missing_column(file.path, column, header))
    if header.count(column) > 1:
        return bad.add(f"{header.count(column)} columns {column!r}", file.name)
    place = header.index(column)
    for number, row in rows:
        where = f"{file.name} row {number}"
        if len(row) != len(header):
            bad.add(f"not {len(header)} fields", where)
        else:
            yield where, row[place]
