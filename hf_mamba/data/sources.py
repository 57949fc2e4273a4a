"""What a user may name as data, and the files behind each name."""

import difflib
import glob
import os
import re
import sys
import sysconfig
from collections import Counter
from collections.abc import Container, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

EMBEDDED = "embedded"
TEXT, IDS = "text", "input_ids"  # the columns that are read where none is named
# What a file's name says about its content; `.gz` and `.zst` may follow the line formats.
KINDS = {
    ".txt": "text",
    ".text": "text",
    ".md": "text",
    ".py": "text",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "jsonl",
    ".csv": "csv",
    ".parquet": "parquet",
    ".arrow": "arrow",
}
COMPRESSED = {".gz": "gzip", ".zst": "zstd"}
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+){0,2}")
_TRAIN = re.compile(r"(^|[^a-z])train(ing)?([^a-z]|$)", re.IGNORECASE)
_NOT_TRAIN = re.compile(r"(^|[^a-z])(test|testing|valid|validation|val|dev|eval|evaluation)([^a-z]|$)", re.IGNORECASE)
# Of the standard library: no tests, no tables, nothing that some versions lack, nothing that differs between machines.
_STDLIB_SKIP = {
    "__pycache__",
    "dist-packages",
    "distutils",
    "encodings",
    "ensurepip",
    "idlelib",
    "lib2to3",
    "pydoc_data",
    "site-packages",
    "test",
    "tests",
    "turtledemo",
}


@dataclass(frozen=True)
class DataFile:
    """One file of documents: where it is, what it is called in messages, and how it is read."""

    path: str
    name: str
    kind: str  # text, jsonl (lines or one array), csv, parquet or arrow
    compression: str | None = None


@dataclass(frozen=True)
class Source:
    """One entry of the user's list.

    Attributes:
        spec: the name without its weight, as the user wrote it.
        kind: "embedded", "files" or "hub".
        weight: the share of the samples, before normalisation; None when the user gave none.
        text_column: the column (key) that holds the text or the ids, where files have columns; see `column_in`.
    """

    spec: str
    kind: str
    weight: float | None = None
    text_column: str = TEXT

    def files(self) -> list[DataFile]:
        """The files behind the name, in a fixed order.

        Raises:
            ValueError: nothing is there, nothing of it is readable, or the hub has no such data set.
        """
        if self.kind == "embedded":
            return stdlib_files()
        if self.kind == "hub":
            return _hub_files(self.spec)
        return _local_files(self.spec)


def parse_sources(specs: Sequence[str], *, text_column: str = TEXT) -> list[Source]:
    """Read the user's list of data: each `NAME`, with `@COLUMN` and `:WEIGHT` where wanted, in this order.

    NAME is a file, a folder (of one with named splits, the train files), a glob, a folder written by
    `Dataset.save_to_disk`, a hub data set (`owner/name` or `owner/name/config`; its train split), or "embedded": the
    source files of Python's standard library. Of files named by hand or by a glob, all are taken.

    Raises:
        ValueError: an empty list, a bad weight, weights on some names only, or a name that is nothing of the above.
    """
    if isinstance(specs, str):
        specs = [specs]
    if not specs:
        raise ValueError(f'no data was named; give files, folders, hub names, or "{EMBEDDED}"')
    sources = [_parse_one(spec, text_column) for spec in specs]
    unweighted = [s.spec for s in sources if s.weight is None]
    if unweighted and len(unweighted) < len(sources):
        raise ValueError(
            f"no weight was given for {', '.join(map(repr, unweighted))}, but for other sources; "
            "write NAME:WEIGHT for every source, or for none (then each token is seen once per epoch)"
        )
    named = Counter((s.spec, s.text_column) for s in sources)
    if repeated := sorted(spec for (spec, _), count in named.items() if count > 1):
        raise ValueError(f"{repeated[0]!r} is named twice; name it once, with a larger weight to see it more often")
    return sources


def _parse_one(spec: str, text_column: str) -> Source:
    name, weight = spec.strip(), None
    if not name:
        raise ValueError("one of the data sources is an empty name; give a file, a folder or a hub name")
    head, colon, tail = name.rpartition(":")
    if colon and not os.path.exists(os.path.expanduser(name)):
        try:
            weight = float(tail)
        except ValueError:
            raise ValueError(
                f"{spec!r}: {tail!r} is not a weight; write NAME:WEIGHT with a number, as in {head}:0.5"
            ) from None
        if not 0 < weight < float("inf"):
            raise ValueError(f"{spec!r}: the weight is {tail}; it must be a finite number above 0")
        name = head
    head, _, tail = name.rpartition("@")
    if head and tail and not os.path.exists(os.path.expanduser(name)):
        name, text_column = head, tail
    if name == EMBEDDED:
        return Source(name, "embedded", weight, text_column)
    if _is_local(name):
        return Source(name, "files", weight, text_column)
    if _HUB_NAME.fullmatch(name):
        return Source(name, "hub", weight, text_column)
    raise ValueError(f"{spec!r} is no file, no folder, no glob and no hub name (owner/name)")


def _is_local(name: str) -> bool:
    """Whether the user means a path: it is there, or it looks like nothing else."""
    path = os.path.expanduser(name)
    looks_local = name.startswith(("/", "./", "../", "~")) or glob.has_magic(name)
    return os.path.exists(path) or looks_local or _kind_of(name) is not None


def _kind_of(name: str) -> tuple[str, str | None] | None:
    """(kind, compression) by suffix, None when unknown."""
    stem, suffix = os.path.splitext(name.lower())
    compression = COMPRESSED.get(suffix)
    if compression:
        suffix = os.path.splitext(stem)[1]
    kind = KINDS.get(suffix)
    if kind is None or (compression and kind in ("parquet", "arrow")):
        return None
    return kind, compression


def _data_file(path: str, name: str) -> DataFile | None:
    known = _kind_of(path)
    return DataFile(path, name, *known) if known else None


def _local_files(spec: str) -> list[DataFile]:
    path = os.path.abspath(os.path.expanduser(spec))
    if absent := _missing(path, spec):
        raise ValueError(absent)
    if os.path.isfile(path):
        file = _data_file(path, os.path.basename(path))
        if file is None:
            raise ValueError(f"{spec}: unknown file type; the types read here are {', '.join(_suffixes())}")
        _check_readable(file)
        return [file]
    if os.path.isdir(path):
        if _is_saved(path):
            return _saved_dataset(path, spec)
        found, root = _walk(path), path
    else:
        found = [p for p in glob.glob(path, recursive=True) if os.path.isfile(p)]
        root = os.path.dirname(path[: re.search(r"[*?\[]", path).start()])  # type: ignore[union-attr]
    # By parts, so that the order is that of the tree whatever characters the names have.
    named = sorted(((Path(os.path.relpath(p, root)).as_posix(), p) for p in found), key=lambda n: n[0].split("/"))
    visible = [n for n in named if not _hidden(n[0])]
    files = [file for name, p in visible if (file := _data_file(p, name))]
    if os.path.isdir(path):
        left = set(_evaluation_files(files))
        files = [file for file in files if file not in left]
    if not files:
        seen = sorted({os.path.splitext(name)[1] or "(no suffix)" for name, _ in named})[:8]
        what = f"has only files of types {', '.join(seen)}" if seen else "is an empty folder"
        raise ValueError(f"{spec}: {what}; the types read here are {', '.join(_suffixes())}")
    for file in files:
        _check_readable(file)
    return files


def missing(source: Source) -> str:
    """Why a source's files cannot be there, without looking into any; "" where they may be."""
    return "" if source.kind != "files" else _missing(os.path.abspath(os.path.expanduser(source.spec)), source.spec)


def _missing(path: str, spec: str) -> str:
    if os.path.exists(path):
        return ""
    if not glob.has_magic(path):
        return f"{spec}: no such file or folder{_nearest(path)}"
    found = any(os.path.isfile(p) for p in glob.iglob(path, recursive=True))
    return "" if found else f"{spec}: the pattern matches no file"


def _suffixes() -> list[str]:
    return [*KINDS, "and .gz or .zst of the line formats"]


def _walk(root: str) -> list[str]:
    """The files below a folder; those behind links, too, but no folder twice, so that a loop ends."""
    folders, links, found = [root], list[str](), list[str]()
    seen, home = set[str](), os.path.realpath(root)
    while folders or links:
        folder = folders.pop() if folders else links.pop(0)  # where a folder has two names, a link's is not used
        real = os.path.realpath(folder)
        if real in seen or (folder != root and os.path.commonpath([real, home]) == real):
            continue
        seen.add(real)
        with os.scandir(folder) as entries:
            for entry in sorted(entries, key=lambda entry: entry.name):
                if entry.is_dir():
                    (links if entry.is_symlink() else folders).append(entry.path)
                elif entry.is_file():
                    found.append(entry.path)
    return found


def _evaluation_files(files: list[DataFile]) -> list[DataFile]:
    """In a folder with named splits, what is no train split: it must not be trained on. Code has no splits."""
    named = [f for f in files if not f.name.endswith((".py", ".md"))]
    if any(_TRAIN.search(f.name) for f in named):
        return [f for f in named if not _TRAIN.search(f.name) and _NOT_TRAIN.search(f.name)]
    return []


def left_out(source: Source) -> list[str]:
    """The files of a folder that are not read, since their names say that they are for evaluation."""
    path = os.path.abspath(os.path.expanduser(source.spec))
    if source.kind != "files" or not os.path.isdir(path) or _is_saved(path):
        return []
    names = sorted(os.path.relpath(p, path) for p in _walk(path))
    files = [file for name in names if not _hidden(name) and (file := _data_file(os.path.join(path, name), name))]
    return [file.name for file in _evaluation_files(files)]


def _hidden(name: str) -> bool:
    return any(part.startswith(".") for part in name.split("/"))


def _is_saved(path: str) -> bool:
    """Whether `Dataset.save_to_disk` wrote the folder."""
    return any(os.path.exists(os.path.join(path, name)) for name in ("dataset_dict.json", "state.json"))


def _check_readable(file: DataFile) -> None:
    try:
        with open(file.path, "rb") as handle:
            handle.read(1)
    except OSError as error:
        raise ValueError(f"{file.path} cannot be read: {error.strerror}") from error


def _nearest(path: str) -> str:
    parent = os.path.dirname(path)
    names = os.listdir(parent) if os.path.isdir(parent) else []
    near = difflib.get_close_matches(os.path.basename(path), names, n=1)
    return f"; did you mean {os.path.join(parent, near[0])}?" if near else ""


def stdlib_files() -> list[DataFile]:
    """The embedded default: the Python sources of the running standard library, about 8 MB, in a fixed order."""
    root = Path(sysconfig.get_paths()["stdlib"])
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    found = []
    for path in root.rglob("*.py"):
        parts = path.relative_to(root).parts
        machine_made = any(part.startswith(("_sysconfigdata", "config-")) for part in parts)
        if not machine_made and not _STDLIB_SKIP.intersection(parts) and path.stat().st_size:
            found.append((parts, path))
    if not found:
        raise ValueError(
            f"the embedded data are the standard library's .py files, but {root} has none; name your own data"
        )
    return [DataFile(str(path), "/".join((version, *parts)), "text") for parts, path in sorted(found)]


def _saved_dataset(path: str, spec: str) -> list[DataFile]:
    """The Arrow files of a folder written by `save_to_disk` (of a DatasetDict: its train split)."""
    from datasets import DatasetDict, load_from_disk

    try:
        dataset = load_from_disk(path)
    except Exception as error:
        raise ValueError(f"{spec}: datasets cannot load this saved data set: {error}") from error
    if isinstance(dataset, DatasetDict):
        if "train" not in dataset:
            raise ValueError(f"{spec} has the splits {', '.join(dataset)}, and no train split; name one folder of them")
        dataset = dataset["train"]
    return _arrow_files(dataset, spec)


def _hub_files(spec: str) -> list[DataFile]:
    """The Arrow files that the datasets library prepares for a hub data set's train split (in its own cache)."""
    return _arrow_files(hub_dataset(spec, streaming=False), spec)


def hub_dataset(spec: str, *, streaming: bool) -> Any:
    """`owner/name` or `owner/name/config`: the train split of a hub data set.

    Raises:
        ValueError: with what the datasets library says.
    """
    from datasets import load_dataset

    owner, *rest = spec.split("/")
    name = "/".join([owner, *rest[:1]])
    try:
        return load_dataset(name, *rest[1:], split="train", streaming=streaming)
    except Exception as error:
        reason = str(error).strip().split("\n")[0][:300]
        raise ValueError(
            f"{spec}: no file or folder of this name is here, and as a hub data set it cannot be loaded: {reason}"
        ) from error


def column_in(names: Container[str], column: str) -> str:
    """The column that is read where these are: of a tokenised data set without a text, its ids."""
    return IDS if column == TEXT and TEXT not in names and IDS in names else column


def missing_column(place: str, column: str, columns: list[str]) -> str:
    """The message for data without the column that was asked for."""
    near = difflib.get_close_matches(column, columns, n=1) or [
        c for c in columns if c in ("content", "contents", "document", "body")
    ]
    hint = f"; did you mean {near[0]!r}?" if near else ""
    return f"{place} has no column {column!r}; the columns there are: {', '.join(columns) or '(none)'}{hint}"


def _arrow_files(dataset: Any, spec: str) -> list[DataFile]:
    paths = [entry["filename"] for entry in dataset.cache_files]
    if not paths:
        raise ValueError(f"{spec}: this data set has no Arrow files; save it again with Dataset.save_to_disk")
    return [DataFile(path, f"{spec}/{os.path.basename(path)}", "arrow") for path in paths]
