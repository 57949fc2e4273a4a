"""Reading the small files that a user names, bounded; writing files that are complete or absent."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import glob
import json
import math
import os
import re
import secrets
import shutil
import stat
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

_DISK_ERRORS = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the disk quota is used up",
    errno.EFBIG: "the file would exceed the size limit of this process (ulimit -f) or of the file system",
    errno.EROFS: "the file system is read-only",
    errno.EACCES: "this user may not write there",
    errno.EPERM: "this user may not write there",
}


_PART = re.compile(r"\..+\.[0-9a-f]{16}$")  # of an unfinished file

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


_NUMBERS = {"Infinity": math.inf, "-Infinity": -math.inf, "NaN": math.nan}


def load_config_json(text: str) -> Any:
    """Parsed JSON, in which transformers writes a number that JSON lacks as {"__float__": "Infinity"}."""

    def number(block: dict[str, Any]) -> Any:
        name = block.get("__float__")
        return _NUMBERS.get(name, block) if len(block) == 1 and isinstance(name, str) else block

    return json.loads(text, object_hook=number)


def load_yaml(text: str) -> tuple[Any, list[tuple[str, int]]]:
    """The value of a YAML text, and the top keys that stand in it more than once, with the line of each repetition.

    Raises:
        Unreadable: it is not YAML, or its aliases unfold to more than a configuration can hold.
    """
    import yaml

    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    try:
        node = yaml.compose(text, loader)
        if reason := _unfolds_too_far(node, lambda n: n.value if isinstance(n.value, list) else ()):
            raise Unreadable(reason)
        value = yaml.load(text, Loader=loader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark else ""
        reason = getattr(error, "problem", None) or str(error).splitlines()[0]
        raise Unreadable(f"It is not YAML{line}: {reason}.") from None
    except RecursionError:
        raise Unreadable("It is nested too deeply.") from None
    except (
        ValueError,
        KeyError,
        TypeError,
        AttributeError,
        OverflowError,
    ) as error:  # a tag's own: !!int abc, 2020-13-45
        if isinstance(error, Unreadable):
            raise
        raise Unreadable(f"It is not YAML: {error}.") from None
    seen: set[str] = set()
    twice = []
    for key, _ in node.value if isinstance(value, Mapping) else ():
        name = str(key.value)
        if name in seen:
            twice.append((name, key.start_mark.line + 1))
        seen.add(name)
    return value, twice


def too_large(value: Any) -> str | None:
    """Why a value read from a file is no configuration: too deep, or too many values."""
    return _unfolds_too_far(
        value, lambda v: v.values() if isinstance(v, Mapping) else v if isinstance(v, list | tuple) else ()
    )


def _unfolds_too_far(value: Any, children: Callable[[Any], Iterable[Any]]) -> str | None:
    """Count values and levels without recursion, and stop at the limits; an alias counts as often as it is used."""
    nodes, stack = 0, [(value, 1)]
    while stack:
        node, level = stack.pop()
        if isinstance(node, tuple):  # a pair of a YAML mapping is no level
            stack += [(part, level) for part in node]
            continue
        nodes += 1
        if level > MAX_DEPTH:
            return f"It is nested more than {MAX_DEPTH} levels deep."
        if nodes + len(stack) > MAX_NODES:
            return f"It holds more than {MAX_NODES:,} values."
        if node is not None:
            stack += [(child, level + 1) for child in children(node)]
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


@contextlib.contextmanager
def open_whole(target: Path, parts: Path | None = None) -> Iterator[BinaryIO]:
    """Open a binary file for writing that appears under its name when the block ends, whole and durable.

    What is written goes to a new file with a name that nobody can have prepared. A reader sees the old file or the new
    one; a link at `target` is replaced and never followed. A new file's mode follows the umask, a replaced file's is
    kept. Nothing is left after an exception.

    Args:
        parts: the folder of the unfinished file, on the same file system; by default the target's own.
    """
    part = (parts or target.parent) / f".{target.name}.{secrets.token_hex(8)}"
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | getattr(os, "O_NOFOLLOW", 0)
    handle = os.open(part, flags, 0o666)
    try:
        with os.fdopen(handle, "wb") as file:
            replaced = os.lstat(target) if os.path.lexists(target) else None
            if replaced is not None and stat.S_ISREG(replaced.st_mode):
                os.fchmod(handle, stat.S_IMODE(replaced.st_mode) & 0o777)
            yield file
            file.flush()
            os.fsync(handle)
        os.replace(part, target)
    except BaseException:
        part.unlink(missing_ok=True)
        raise
    fsync_path(target.parent)


def write_whole(target: Path, content: str | bytes, parts: Path | None = None) -> Path:
    """Write a file that is whole or absent; see `open_whole`. Text becomes UTF-8."""
    with open_whole(target, parts) as file:
        file.write(content.encode() if isinstance(content, str) else content)
    return target


def write_json(target: Path, data: Any, sort_keys: bool = False) -> Path:
    """Write readable JSON that is whole or absent; the folder is made."""
    target.parent.mkdir(parents=True, exist_ok=True)
    return write_whole(target, json.dumps(data, indent=2, ensure_ascii=False, sort_keys=sort_keys) + "\n")


def json_or_none(path: Path) -> Any:
    """What a JSON file holds; None where it is absent, cannot be read or is no JSON."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None


def settle(path: Path, mode: int) -> None:
    """Make a finished file or folder durable, and give a file the mode that this user's files have.

    Other libraries' writers choose their own: safetensors' files could be read by their owner alone.
    """
    if path.is_file() and not path.is_symlink():
        path.chmod(mode)
    fsync_path(path)


def usual_mode(folder: Path) -> int:
    """The mode of a new file there, by the umask or the folder's default access list."""
    # without a name where the system can: a process killed here would leave it in a finished folder
    with contextlib.suppress(AttributeError, OSError):
        handle = os.open(folder, os.O_WRONLY | os.O_TMPFILE | os.O_CLOEXEC, 0o666)
        try:
            return stat.S_IMODE(os.fstat(handle).st_mode) & 0o666
        finally:
            os.close(handle)
    probe = folder / f".mode.{secrets.token_hex(8)}"
    handle = os.open(probe, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
    try:
        return stat.S_IMODE(os.fstat(handle).st_mode) & 0o666
    finally:
        os.close(handle)
        probe.unlink()


def publish_folder(building: Path, final: Path, replace: bool = True) -> None:
    """Give a finished folder its final name, durably. One of that name is replaced: for an instant, none is there.

    Raises:
        OSError: without `replace`, there is one of that name that is not empty.
    """
    mode = usual_mode(building)
    for path in [*building.rglob("*"), building]:
        settle(path, mode)
    old = final.with_name(f".{final.name}.old")
    if replace:
        shutil.rmtree(old, ignore_errors=True)  # of a process that was killed here
        if final.is_dir() and any(final.iterdir()):
            os.replace(final, old)
    os.replace(building, final)
    fsync_path(final.parent)
    if replace:
        shutil.rmtree(old, ignore_errors=True)


@contextlib.contextmanager
def beside(final: Path) -> Iterator[Path]:
    """A new folder to build `final` in, gone at the end of the block; those that killed processes left are removed.

    A builder holds its folder's lock, which the kernel gives back when it dies.
    """
    for left in final.parent.glob(f".{glob.escape(final.name)}.*.partial"):
        with contextlib.suppress(OSError), _opened(left) as handle:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(left)
    while True:
        building = final.with_name(f".{final.name}.{secrets.token_hex(8)}.partial")
        building.mkdir()
        with _opened(building) as handle:
            with contextlib.suppress(OSError):  # a file system without locks
                fcntl.flock(handle, fcntl.LOCK_EX)
            if not building.exists():  # somebody took it for a dead one's before it was held
                continue
            try:
                yield building
            finally:
                shutil.rmtree(building, ignore_errors=True)
            return


@contextlib.contextmanager
def _opened(folder: Path) -> Iterator[int]:
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        yield handle
    finally:
        os.close(handle)


def remove_parts(folder: Path) -> None:
    """Remove the unfinished files of processes that were killed, from a folder that nobody else writes now."""
    for path in folder.iterdir():
        if _PART.match(path.name) and path.is_file():
            path.unlink(missing_ok=True)


def usable_cores() -> int:
    """How many cores this process may use; all of the machine where the system does not say."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def cache_folder(kind: str) -> Path:
    """Return the folder of one of this user's caches, which may not exist yet.

    "data": $HF_HOME/hf_mamba, beside the Hub's large files (~/.cache/huggingface/hf_mamba);
    "kernels": $XDG_CACHE_HOME/hf_mamba/kernels (~/.cache/hf_mamba/kernels);
    "throughput": $HF_MAMBA_CACHE, else $XDG_CACHE_HOME/hf_mamba (~/.cache/hf_mamba).

    Raises:
        ValueError: no variable names the folder, and the user has no home.
    """
    # huggingface_hub.constants has the same order; importing it takes too long for a worker process
    own = os.environ.get({"data": "HF_HOME", "throughput": "HF_MAMBA_CACHE"}.get(kind, ""))
    if own and kind == "throughput":
        return Path(own)
    if own:
        return Path(own).expanduser() / "hf_mamba"
    try:
        cache = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
    except RuntimeError:
        raise ValueError("This user has no home folder for caches. Set HF_HOME and XDG_CACHE_HOME.") from None
    return cache / {"data": "huggingface/hf_mamba", "kernels": "hf_mamba/kernels", "throughput": "hf_mamba"}[kind]
