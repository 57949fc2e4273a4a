"""Files -> units of work -> segments of text.

A unit is what one worker does at a time and what a killed build keeps: a range of bytes, row groups or batches of one
file, or several small files. Units depend on the files alone, never on the number of workers.

A segment is at most 64 Ki characters of one document. Most documents are one segment; a book is many. A segment is what
the tokenizer is given, and what is held out for evaluation.
"""

import contextlib
import difflib
import io
import json
import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import IO, Any, NamedTuple

from hf_mamba.data.sources import DataFile

SEGMENT_CHARS = 1 << 16
SEPARATOR = "<|endoftext|>"  # a line of a text file that is just this ends a document (as in TinyStories)
MIN_UNIT_BYTES, MAX_UNIT_BYTES, UNITS = 4 << 20, 256 << 20, 256
MAX_EXAMPLES = 5


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
        if size > goal and file.compression is None:
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


def _ranges(file: DataFile, size: int, goal: int) -> list[tuple[int, int]]:
    total = size if file.kind in ("text", "jsonl") else _parts(file)
    pieces = min(-(-size // goal), max(total, 1))
    return [(total * i // pieces, total * (i + 1) // pieces) for i in range(pieces)]


def _parts(file: DataFile) -> int:
    """Row groups of a Parquet file, record batches of an Arrow file; 1 if it cannot be opened (the reader says why)."""
    try:
        return _open_parts(file).count
    except Exception:
        return 1


def read_unit(unit: Unit, text_column: str, bad: BadRecords) -> Iterator[Segment]:
    """The segments of a unit, in order; what cannot be used goes to `bad`.

    Raises:
        ValueError: a file that is damaged as a whole, or columns without `text_column`.
    """
    for file in unit.files:
        if file.kind == "text":
            yield from _read_text(file, unit.begin, unit.end, bad)
        else:
            for _, text in _texts(file, unit.begin, unit.end, text_column, bad):
                yield from cut(text)


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


def check_columns(files: list[DataFile], column: str) -> None:
    """Fail before any work when the first file with columns has none named `column`.

    Raises:
        ValueError: with the columns that are there and the nearest name.
    """
    file = next((f for f in files if f.kind != "text"), None)
    if file is None:
        return
    if file.kind != "jsonl":
        next(_read_columns(file, 0, 1, column, BadRecords()), None)
        return
    keys: Counter[str] = Counter()
    for number, (_, line) in enumerate(_lines(file, 0, -1, BadRecords())):
        if number == 0 and line.lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"["):
            raise ValueError(
                f"{file.path} is one JSON array; one record per line is read here (JSON lines). "
                "Convert it, for example with: jq -c '.[]' IN > OUT.jsonl"
            )
        with contextlib.suppress(ValueError):
            record = json.loads(line)
            keys.update(record if isinstance(record, dict) else ())
        if column in keys:
            return
        if number >= 100:
            break
    if keys:
        raise ValueError(missing_column(file.path, column, list(keys)))


def missing_column(place: str, column: str, columns: list[str]) -> str:
    """The message for data without the column that was asked for."""
    near = difflib.get_close_matches(column, columns, n=1) or [
        c for c in columns if c in ("content", "document", "body")
    ]
    hint = f"; did you mean {near[0]!r}?" if near else ""
    return f"{place} has no column {column!r}; the columns there are: {', '.join(columns) or '(none)'}{hint}"


def _texts(file: DataFile, begin: int, end: int, column: str, bad: BadRecords) -> Iterator[tuple[str, str]]:
    """(where, text) of each record of a file with columns."""
    values = _read_jsonl if file.kind == "jsonl" else _read_rows
    for where, value in values(file, begin, end, column, bad):
        if reason := unusable(value):
            bad.add(reason, where)
        else:
            yield where, value


def unusable(value: Any) -> str | None:
    """Why a record's text cannot be used; None when it can."""
    if not isinstance(value, str):
        return "no text" if value is None else "text is not a string"
    if not value or value.isspace():
        return "empty"
    if not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError:
            return "lone surrogate (not Unicode text)"
    return None


def _lines(file: DataFile, begin: int, end: int, bad: BadRecords) -> Iterator[tuple[int, bytes]]:
    """(byte offset, line) of the lines that begin in [begin, end), and of the one after; end -1 is the file's end."""
    offset = begin
    try:
        with _open_lines(file) as handle:
            if begin > 0:  # the line that holds byte begin-1 belongs to the range before
                handle.seek(begin - 1)
                offset = begin - 1 + len(handle.readline())
            while line := handle.readline():
                yield offset, line
                if 0 <= end <= offset:
                    return
                offset += len(line)
    except OSError as error:
        if error.errno is not None:  # the disk, not the archive
            raise ValueError(f"{file.path} cannot be read: {error.strerror}") from error
        bad.add(f"damaged archive ({error})", f"{file.name} byte {offset}")


def _open_lines(file: DataFile) -> IO[bytes]:
    """The uncompressed bytes of a line format."""
    if file.compression is None:
        return open(file.path, "rb", buffering=1 << 20)
    import pyarrow as pa

    return io.BufferedReader(pa.input_stream(file.path, compression=file.compression), 1 << 16)


def _read_text(file: DataFile, begin: int, end: int, bad: BadRecords) -> Iterator[Segment]:
    """A text file is one document, unless lines of SEPARATOR divide it."""
    first, found, before = begin == 0, False, bad.counts.total()
    lines: list[str] = []
    size = 0

    def flush(last: bool) -> Iterator[Segment]:
        text = "".join(lines)
        if text and not (first and last and text.isspace()):
            for piece in cut(text):
                yield Segment(piece.text, first and piece.first, last and piece.last)

    last = True
    for number, (offset, line) in enumerate(_lines(file, begin, end, bad)):
        ends = line.strip() == SEPARATOR.encode()
        if 0 <= end <= offset:  # only to see whether the document goes on in the next range
            last = ends
            break
        if number == 0 and begin > 0:
            first = _follows_separator(file, offset)
        if ends:
            for segment in flush(last=True):
                found = True
                yield segment
            lines, size, first = [], 0, True
            continue
        text = _decode(line, f"{file.name} byte {offset}", bad)
        if lines and size + len(text) > SEGMENT_CHARS:
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


def _read_jsonl(file: DataFile, begin: int, end: int, column: str, bad: BadRecords) -> Iterator[tuple[str, Any]]:
    for offset, line in _lines(file, begin, end, bad):
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
            if not isinstance(record, dict):
                bad.add("not a JSON object", where)
            elif column not in record:
                bad.add(f"no key {column!r}", where)
            else:
                yield where, record[column]


def _read_rows(file: DataFile, begin: int, end: int, column: str, bad: BadRecords) -> Iterator[tuple[str, Any]]:
    for first, values in _read_columns(file, begin, end, column, bad):
        yield from ((f"{file.name} row {first + i}", value) for i, value in enumerate(values))


def _read_columns(
    file: DataFile, begin: int, end: int, column: str, bad: BadRecords
) -> Iterator[tuple[int, list[Any]]]:
    """(number of the first row, values) for parts [begin, end) of a Parquet or Arrow file, some rows at a time."""
    import pyarrow as pa

    try:
        parts = _open_parts(file)
    except (OSError, pa.ArrowException) as error:
        if getattr(error, "errno", None) is not None:
            raise ValueError(f"{file.path} cannot be read: {error}") from error
        bad.add(f"damaged {file.kind} file ({str(error).splitlines()[0][:100]})", file.name)
        return
    schema = parts.schema_arrow
    if column not in schema.names:
        raise ValueError(missing_column(file.path, column, schema.names))
    kind = schema.field(column).type
    value_kind = kind.value_type if pa.types.is_dictionary(kind) else kind
    if not (
        pa.types.is_string(value_kind) or pa.types.is_large_string(value_kind) or pa.types.is_string_view(value_kind)
    ):
        raise ValueError(
            f"{file.path}: column {column!r} holds {kind}, not strings; name the column that holds the text"
        )
    for part in range(begin, parts.count if end < 0 else min(end, parts.count)):
        row = parts.first_row(part)
        try:
            for values in parts.read(part, column):
                yield row, values
                row += len(values)
        except (OSError, pa.ArrowException) as error:
            if getattr(error, "errno", None) is not None:
                raise ValueError(f"{file.path} cannot be read: {error}") from error
            bad.add(f"damaged part {part} ({str(error).splitlines()[0][:100]})", f"{file.name} row {row}")


class _ParquetParts:
    """The row groups of a Parquet file."""

    def __init__(self, path: str) -> None:
        import pyarrow.parquet as pq

        self.file = pq.ParquetFile(path, page_checksum_verification=True)
        self.schema_arrow = self.file.schema_arrow
        self.count = self.file.num_row_groups

    def first_row(self, part: int) -> int:
        return sum(self.file.metadata.row_group(i).num_rows for i in range(part))

    def read(self, part: int, column: str) -> Iterator[list[Any]]:
        for batch in self.file.iter_batches(1024, row_groups=[part], columns=[column]):
            yield batch.column(column).to_pylist()


class _ArrowParts:
    """The record batches of an Arrow file, of the file or the stream format."""

    def __init__(self, path: str) -> None:
        import pyarrow as pa

        source = pa.memory_map(path)
        try:
            reader = pa.ipc.open_file(source)
            self.batches = [reader.get_batch(i) for i in range(reader.num_record_batches)]
        except pa.ArrowInvalid:
            source.seek(0)
            reader = pa.ipc.open_stream(source)
            self.batches = list(reader)
        self.schema_arrow = reader.schema
        self.count = len(self.batches)

    def first_row(self, part: int) -> int:
        return sum(batch.num_rows for batch in self.batches[:part])

    def read(self, part: int, column: str) -> Iterator[list[Any]]:
        values = self.batches[part].column(column)
        for start in range(0, len(values), 1024):
            yield values.slice(start, 1024).to_pylist()


def _open_parts(file: DataFile) -> _ParquetParts | _ArrowParts:
    return _ParquetParts(file.path) if file.kind == "parquet" else _ArrowParts(file.path)
