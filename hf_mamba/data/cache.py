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
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import xxhash

from hf_mamba.files import cache_folder, disk_errors, disk_message, json_or_none

READERS = 16  # threads that read files for their checksums: most of the time they wait for the disk
READ_AT_ONCE = 64 << 20  # bytes of the files that one of them takes at a time
NOTED_AFTER = 4 << 30  # bytes read, which a process that is killed then reads again


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
    known = Notes(root).known(paths)
    if known is None:
        name = f"read-{digest([str(p) for p in paths])}"
        parts = root / "parts" / name
        with locked(root, name):
            shutil.rmtree(parts, ignore_errors=True)  # of a process that was killed
            parts.mkdir()
            try:
                known = Notes(root).read(paths, parts)
            finally:
                shutil.rmtree(parts, ignore_errors=True)
    return known


def _state(path: Path) -> list[int]:
    """What changes when a file does."""
    stat = os.stat(path)
    return [stat.st_size, stat.st_mtime_ns, stat.st_ino]


def _read(paths: list[Path]) -> list[tuple[list[int], str]]:
    """The state and the checksum of each file."""
    # the state first: a change while the file is read makes the note invalid
    return [(_state(path), file_checksum(path)) for path in paths]


class Notes:
    """The checksums of files that were read before: one JSON file for each folder of data, and none for each file.

    They are written without fsync: a note that a crash of the machine cuts short is no JSON, and the files are read
    again. Of two processes that write one folder's notes at once, the later wins, and the other's files are read again.
    """

    def __init__(self, root: Path) -> None:
        self._files = root / "files"
        self._folders: dict[str, dict[str, list[Any]]] = {}  # folder -> name -> [*state, checksum]
        self._places: dict[str, Path] = {}
        # the notes of earlier versions, one file each
        self._single = {path.name for path in self._files.glob("*") if not path.suffix}

    def known(self, paths: list[Path]) -> list[str] | None:
        """The checksum of each, where no file must be read for them; None otherwise."""
        known = [checksum for path in paths if (checksum := self._recall(path, _state(path))) is not None]
        return known if len(known) == len(paths) else None

    def _recall(self, path: Path, state: list[int]) -> str | None:
        folder, name = os.path.split(path)
        note = self._of(folder).get(name)
        if note is None and self._single:
            note = self._recall_single(path)
        return note[3] if note is not None and note[:3] == state else None

    def read(self, paths: list[Path], parts: Path) -> list[str]:
        """The checksum of each; files without a valid note are read, by several threads, and noted now and then."""
        states = [_state(path) for path in paths]
        checksums = [self._recall(path, state) for path, state in zip(paths, states, strict=True)]
        work: list[list[int]] = []  # some files each, or one large one
        filled = READ_AT_ONCE
        for number, (size, _, _) in enumerate(states):
            if checksums[number] is None:
                if filled + size >= READ_AT_ONCE or len(work[-1]) == 64:
                    work.append([])
                    filled = 0
                work[-1].append(number)
                filled += size
        unwritten = 0
        with ThreadPoolExecutor(READERS) as pool:
            for numbers, results in zip(work, pool.map(lambda n: _read([paths[i] for i in n]), work), strict=True):
                for number, (state, checksum) in zip(numbers, results, strict=True):
                    folder, name = os.path.split(paths[number])
                    self._of(folder)[name] = [*state, checksum]
                    checksums[number] = checksum
                    unwritten += state[0]
                if unwritten >= NOTED_AFTER:
                    self._write(parts)
                    unwritten = 0
        if work:
            self._write(parts)
        return [checksum for checksum in checksums if checksum is not None]

    def _of(self, folder: str) -> dict[str, list[Any]]:
        if folder not in self._folders:
            place = self._places[folder] = self._files / f"{digest(os.path.realpath(folder))}.json"
            found = json_or_none(place)
            notes = found.items() if isinstance(found, dict) else ()
            self._folders[folder] = {name: note for name, note in notes if isinstance(note, list) and len(note) == 4}
        return self._folders[folder]

    def _write(self, parts: Path) -> None:
        for folder, notes in self._folders.items():
            place = self._places[folder]
            part = parts / place.name
            part.write_text(json.dumps(notes, separators=(",", ":")), encoding="utf-8")
            os.replace(part, place)

    def _recall_single(self, path: Path) -> list[Any] | None:
        name = digest(str(path.resolve()))
        known: Any = json_or_none(self._files / name) if name in self._single else None
        try:
            return [*known["state"], known["checksum"]]
        except (KeyError, TypeError):
            return None
