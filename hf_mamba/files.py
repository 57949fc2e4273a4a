"""Writing files that are complete or absent, and saying why a disk refused."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
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
