"""Parquet and Arrow files: columns in parts (row groups, record batches), some rows at a time."""

import itertools
import os
from collections.abc import Iterator
from typing import Any

from hf_mamba.data.segments import BadRecords, reason_of
from hf_mamba.data.sources import DataFile, column_in, missing_column

ROWS = 1024


def read_rows(file: DataFile, begin: int, end: int, column: str, bad: BadRecords) -> Iterator[tuple[str, Any]]:
    """(where, value) of the rows of parts [begin, end); end -1 is the file's end.

    Raises:
        ValueError: no such column, or one of another type.
    """
    parts = _whole(file, bad)
    if parts is None:
        return
    column = column_in(parts.names, column)
    if (count := parts.names.count(column)) > 1:
        bad.add(f"{count} columns {column!r}", file.name)
        return
    _check_type(file, parts, column)
    for part in range(begin, parts.count if end < 0 else min(end, parts.count)):
        row = parts.starts[part]
        try:
            for values in parts.read(part, column):
                for value in _values(values):
                    yield f"{file.name} row {row}", value
                    row += 1
        except Exception as error:
            _disk(file, error)
            bad.add(f"damaged part {part} ({reason_of(error)})", f"{file.name} row {row}")


def columns_of(file: DataFile) -> list[str]:
    """The names of the columns; none where the file is damaged."""
    parts = _whole(file, BadRecords())
    return list(parts.names) if parts else []


def check_table(file: DataFile, column: str) -> None:
    """Look at the column's name and type alone; a damaged file is passed by.

    Raises:
        ValueError: no such column, or one of another type.
    """
    parts = _whole(file, BadRecords())
    if parts is not None and parts.names.count(column := column_in(parts.names, column)) < 2:
        _check_type(file, parts, column)


def count_parts(file: DataFile) -> int:
    """Row groups of a Parquet file, record batches of an Arrow file; 1 if it cannot be opened (the reader says why)."""
    try:
        return _open(file).count
    except Exception:
        return 1


def _whole(file: DataFile, bad: BadRecords) -> "_Parquet | _Arrow | None":
    try:
        return _open(file)
    except Exception as error:
        _disk(file, error)
        bad.add(f"damaged {file.kind} file ({reason_of(error)})", file.name)
        return None


def _disk(file: DataFile, error: Exception) -> None:
    """Raise what the disk says; damage passes."""
    if isinstance(error, OSError) and error.errno is not None:
        raise ValueError(f"{file.path} cannot be read: {error.strerror or error}") from error


def _check_type(file: DataFile, parts: "_Parquet | _Arrow", column: str) -> None:
    import pyarrow as pa

    if column not in parts.names:
        raise ValueError(missing_column(file.path, column, parts.names))
    kind = parts.schema.field(column).type
    value = kind.value_type if pa.types.is_dictionary(kind) else kind
    text = pa.types.is_string(value) or pa.types.is_large_string(value) or pa.types.is_string_view(value)
    if not text and not (_is_list(kind) and pa.types.is_integer(kind.value_type)):
        raise ValueError(
            f"{file.path}: column {column!r} holds {kind}, not strings or lists of ids; "
            "name the column that holds the text"
        )


def _is_list(kind: Any) -> bool:
    import pyarrow as pa

    return pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)


def _values(values: Any) -> list[Any]:
    """Python's values of a column, and arrays for its lists; bytes for a string that is not UTF-8."""
    if _is_list(values.type):
        lists = (scalar.values for scalar in values)
        return [None if ids is None else ids.to_numpy(zero_copy_only=False) for ids in lists]
    try:
        return values.to_pylist()
    except UnicodeDecodeError:
        return [_value(scalar) for scalar in values]


def _value(scalar: Any) -> Any:
    try:
        return scalar.as_py()
    except UnicodeDecodeError:
        return b""


class _Parquet:
    """The row groups of a Parquet file."""

    def __init__(self, path: str) -> None:
        import pyarrow.parquet as pq

        self.file = pq.ParquetFile(path, page_checksum_verification=True)
        self.schema = self.file.schema_arrow
        self.names: list[str] = self.schema.names
        self.count = self.file.num_row_groups
        rows = (self.file.metadata.row_group(i).num_rows for i in range(self.count))
        self.starts = list(itertools.accumulate(rows, initial=0))

    def read(self, part: int, column: str) -> Iterator[Any]:
        for batch in self.file.iter_batches(ROWS, row_groups=[part], columns=[column]):
            yield batch.column(column)


class _Arrow:
    """The record batches of an Arrow file, of the file or the stream format."""

    def __init__(self, path: str) -> None:
        import pyarrow as pa

        if not os.path.getsize(path):
            raise pa.ArrowInvalid("it is empty")
        source = pa.memory_map(path)
        try:
            reader = pa.ipc.open_file(source)
            self.batches = [reader.get_batch(i) for i in range(reader.num_record_batches)]
        except pa.ArrowInvalid:
            source.seek(0)
            reader = pa.ipc.open_stream(source)
            self.batches = list(reader)
        self.schema = reader.schema
        self.names: list[str] = self.schema.names
        self.count = len(self.batches)
        self.starts = list(itertools.accumulate((batch.num_rows for batch in self.batches), initial=0))

    def read(self, part: int, column: str) -> Iterator[Any]:
        import pyarrow as pa

        values = self.batches[part].column(column)
        try:  # wrong offsets would read outside the file
            values.validate(full=True)
        except pa.ArrowInvalid as error:
            if "UTF8" not in str(error):
                raise pa.ArrowException(reason_of(error)) from None
        for start in range(0, len(values), ROWS):
            yield values.slice(start, ROWS)


def _open(file: DataFile) -> _Parquet | _Arrow:
    return _Parquet(file.path) if file.kind == "parquet" else _Arrow(file.path)
