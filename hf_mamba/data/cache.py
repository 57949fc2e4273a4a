"""Where prepared data lives: folders that are complete or absent, whoever is killed and whenever.

A result is written in a folder of its own, its files are fsynced, and the folder is renamed to its final name, which
is a hash of everything that went into it. Builders of one result hold one `flock`, which the kernel gives back when
its owner dies.
"""

import contextlib
import fcntl
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import xxhash

from hf_mamba.files import cache_folder, disk_errors, disk_message, write_whole


class NotPrepared(ValueError):
    """Something is not in the cache, and nothing was to be made."""


def cache_root(cache_dir: str | os.PathLike[str] | None = None) -> Path:
    """The folder for tokenizers and tokens: the argument, else `hf_mamba` in HF_HOME (~/.cache/huggingface).

    Raises:
        ValueError: the folder cannot be made.
    """
    if cache_dir is None:
        cache_dir = cache_folder("data")
    root = Path(os.path.abspath(os.path.expanduser(cache_dir)))
    with disk_errors(root):
        for sub in ("locks", "parts", "files", "tokenizers", "tokens"):
            if not (root / sub).is_dir():  # a finished cache may be read-only
                try:
                    (root / sub).mkdir(parents=True, exist_ok=True)
                except FileNotFoundError:  # below /proc or a mount point of autofs
                    raise ValueError(disk_message(root, "no folder can be made there")) from None
    return root


@contextlib.contextmanager
def locked(root: Path, name: str) -> Iterator[None]:
    """Hold the lock `name` of this cache; wait, and say so, while another process holds it.

    The lock belongs to the open file, so the kernel frees it when the process ends in whatever way.
    """
    path = root / "locks" / f"{name}.lock"
    with disk_errors(root), open(path, "a+", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            _logger().info("waiting for %s, which prepares the same data", file.read().strip() or "another process")
            fcntl.flock(file, fcntl.LOCK_EX)
        file.seek(0)
        file.truncate()
        file.write(f"process {os.getpid()} on {os.uname().nodename}\n")
        with contextlib.suppress(OSError):  # a note for those who wait; a full disk does not stop the work
            file.flush()
        yield


def _logger() -> Any:
    import logging

    return logging.getLogger("hf_mamba.data")


def digest(value: Any) -> str:
    """A 128-bit name for a JSON value: the key under which results derived from it are kept."""
    return xxhash.xxh3_128_hexdigest(json.dumps(value, sort_keys=True, separators=(",", ":")).encode())


def file_checksum(path: Path) -> str:
    """xxh3-128 of a file's bytes (no protection against malice; several GB/s)."""
    state = xxhash.xxh3_128()
    with open(path, "rb") as file:
        while block := file.read(1 << 22):
            state.update(block)
    return state.hexdigest()


def remembered_checksums(paths: list[Path], root: Path) -> list[str]:
    """`file_checksum` of each, read again only where a file's size, time of change or inode differ from last time.

    So a resumed run does not read a terabyte to learn that nothing changed, nor do eight ranks read it at once.
    """
    known = [_recall(path, root) for path in paths]
    if None in known:
        name = f"read-{digest([str(p) for p in paths])}"
        parts = root / "parts" / name
        with locked(root, name):
            shutil.rmtree(parts, ignore_errors=True)  # of a process that was killed
            parts.mkdir()
            try:
                known = [_recall(path, root) or _remember(path, root, parts) for path in paths]
            finally:
                shutil.rmtree(parts, ignore_errors=True)
    return [checksum for checksum in known if checksum is not None]


def known_checksums(paths: list[Path], root: Path) -> list[str] | None:
    """`remembered_checksums`, where no file must be read for them; None otherwise. Nothing is written."""
    known = [_recall(path, root) for path in paths]
    return None if None in known else [checksum for checksum in known if checksum is not None]


def _note(path: Path, root: Path) -> tuple[Path, list[int]]:
    """Where the checksum of a file is noted, and the state of the file that it is valid for."""
    stat = path.stat()
    return root / "files" / digest(str(path.resolve())), [stat.st_size, stat.st_mtime_ns, stat.st_ino]


def _recall(path: Path, root: Path) -> str | None:
    note, state = _note(path, root)
    try:
        known = json.loads(note.read_text())
        return known["checksum"] if known["state"] == state else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _remember(path: Path, root: Path, parts: Path) -> str:
    note, state = _note(path, root)  # before reading: a change meanwhile makes the note invalid
    checksum = file_checksum(path)
    write_whole(note, json.dumps({"state": state, "checksum": checksum}), parts)
    return checksum
