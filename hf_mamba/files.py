"""Reading the small files that a user names, bounded; writing files that are complete or absent."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
import stat
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

_DISK_ERRORS = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the disk quota is used up",
    errno.EFBIG: "the file would exceed the size limit of this process (ulimit -f) or of the file system",
    errno.EROFS: "the file system is read-only",
    errno.EACCES: "this user may not write there",
    errno.EPERM: "this user may not write there",
}


MAX_BYTES = 1_000_000  # of a configuration file
MAX_NODES = 100_000  # values in it, those behind YAML's aliases counted as often as they are used
MAX_DEPTH = 20


class Unreadable(ValueError):
    """A file that a user named cannot be read; the message is one sentence that says why."""


def read_small(path: str | os.PathLike[str], limit: int = MAX_BYTES) -> str:
    """The text of a small regular file; never waits, and never reads more than `limit` bytes.

    Raises:
        Unreadable: there is no such file, it is something else (a folder, a pipe, a device), too large, or not text.
    """
    name = os.path.expanduser(os.fspath(path))
    if name.startswith("~"):
        raise Unreadable(f"There is no user {name[1:].split('/')[0]}.")
    try:
        handle = os.open(name, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        with os.fdopen(handle, "rb") as file:
            mode = os.fstat(file.fileno()).st_mode
            if not stat.S_ISREG(mode):
                raise Unreadable("It is a folder." if stat.S_ISDIR(mode) else "It is not a file.")
            content = file.read(limit + 1)
    except FileNotFoundError:
        raise Unreadable("There is no such file.") from None
    except IsADirectoryError:
        raise Unreadable("It is not a file but a folder.") from None
    except OSError as error:
        raise Unreadable(f"It cannot be read: {error.strerror or error}.") from None
    except ValueError as error:
        if isinstance(error, Unreadable):
            raise
        raise Unreadable("It is not a path.") from None  # a null byte, a lone surrogate
    if len(content) > limit:
        raise Unreadable(f"It has more than {limit:,} bytes: too large for a configuration.")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise Unreadable("It is not text (UTF-8).") from None


def load_yaml(text: str) -> Any:
    """The value of a YAML text.

    Raises:
        ValueError: it is not YAML; the message is YAML's own, with its line.
    """
    import yaml

    try:
        return yaml.load(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    except (yaml.YAMLError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(str(error).replace("\n", " ")) from None


def too_large(value: Any) -> str | None:
    """Why a value read from a file is no configuration: too deep, or too many values. Counts without recursion."""
    nodes, stack = 0, [(value, 1)]
    while stack:
        node, level = stack.pop()
        nodes += 1
        if level > MAX_DEPTH:
            return f"It is nested more than {MAX_DEPTH} levels deep."
        if nodes > MAX_NODES:
            return f"It holds more than {MAX_NODES:,} values."
        children = node.values() if isinstance(node, Mapping) else node if isinstance(node, list | tuple) else ()
        stack += [(child, level + 1) for child in children]
    return None


@contextlib.contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Turn what a user can mend about a disk (full, read-only, not permitted) into one ValueError."""
    try:
        yield
    except OSError as error:
        reason = disk_reason(error)
        if reason is None:
            raise
        raise ValueError(disk_message(path, reason)) from error


def disk_reason(error: OSError) -> str | None:
    """What the user is told about this error; None when it is not one of the disk's."""
    if isinstance(error, (FileExistsError, NotADirectoryError)):
        return "a file is where a folder should be"
    return _DISK_ERRORS.get(error.errno or 0)


def disk_message(path: Path, reason: str) -> str:
    """The one sentence for a write that failed."""
    parent = next((p for p in (path, *path.parents) if p.exists()), path)
    free = shutil.disk_usage(parent).free / 1e9
    return (
        f"Cannot write {path}: {reason} ({free:.1f} GB free). What is finished there is whole and will be used again; "
        "free some space, or choose another folder with HF_HOME or the cache_dir argument."
    )


def fsync_path(path: Path) -> None:
    """Make a file's content, or the names in a folder, durable."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_atomic(path: Path, content: bytes, parts: Path) -> None:
    """Publish a file whole: written in `parts` (same file system), fsynced, renamed. Nothing is left on failure."""
    part = parts / f"{path.name}.{os.getpid()}.{os.urandom(4).hex()}"
    try:
        with open(part, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
        fsync_path(path.parent)
    finally:
        part.unlink(missing_ok=True)


def publish_folder(building: Path, final: Path) -> None:
    """Give a finished folder its final name, durably."""
    for file in building.iterdir():
        fsync_path(file)
    fsync_path(building)
    os.replace(building, final)
    fsync_path(final.parent)


def write_json(target: Path, data: Any) -> Path:
    """Write JSON through a temporary file in the same folder: a reader sees the old file or the new one."""
    target.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            json.dump(data, file, indent=2, ensure_ascii=False)
            file.write("\n")
        os.chmod(temporary, 0o644)
        os.replace(temporary, target)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    return target
