"""Compiles kernels/ with the system's compiler at first use, once per machine, state size and version of the source.

The shared object is published under a name that is a hash of everything it depends on, by renaming a finished file: a
process that finds the name finds a whole library, a killed build leaves nothing under it, and processes that build at
the same time each build their own and publish the same. There are no locks, so there is nothing to wait for. The file
ends in a checksum of what is before it, and is loaded only where nobody else can have written it.
"""

import contextlib
import ctypes
import hashlib
import logging
import os
import platform
import shutil
import stat
import subprocess
import tempfile
import time
import warnings
from pathlib import Path

from hf_mamba import processor
from hf_mamba.files import cache_folder, write_whole
from hf_mamba.sizes import CPU_GROUP, CPU_ROWS, CPU_TAPS, SCAN_CHUNK, SSD_CHUNK

SOURCES = Path(__file__).parents[1] / "kernels"
SIZES = {
    **{"STEPS": SCAN_CHUNK["cpu"], "CHUNK": SSD_CHUNK},
    **{"GROUP": CPU_GROUP, "ROWS": CPU_ROWS, "MAX_TAPS": CPU_TAPS},
}
FLAGS = (
    *("-std=gnu11", "-O3", "-march=native", "-ffp-contract=fast", "-fPIC", "-shared", "-Wno-psabi"),
    *(f"-D{name}={value}" for name, value in SIZES.items()),
)
TIMEOUT = 300  # seconds for one compilation, which takes about seven

logger = logging.getLogger("hf_mamba.ops")


class BuildError(RuntimeError):
    """Why there are no compiled kernels on this machine, in a sentence."""


def compiler() -> str:
    """$CC, else the first of cc, gcc and clang. BuildError when there is none."""
    for name in (os.environ.get("CC"), "cc", "gcc", "clang"):
        if name and (path := shutil.which(name)):
            return path
    raise BuildError("no C compiler was found (looked for $CC, cc, gcc and clang).")


def load(states: int) -> ctypes.CDLL:
    """The library for state size `states`, compiled if need be. BuildError says why not."""
    name = f"kernels-{_fingerprint(states)}.so"
    try:
        folder = kernel_folder()
        if folder is not None and _whole(folder / name):
            with contextlib.suppress(OSError):  # of another machine's linker: build it again
                return _open(folder / name)
        with tempfile.TemporaryDirectory(prefix="build-", dir=folder) as work:
            fresh = Path(work, name)
            kept = (
                f"once: they are kept in {folder}." if folder else "at every start: no folder of this user keeps them."
            )
            logger.warning("Compiling the CPU kernels with %s, which takes some seconds, %s", compiler(), kept)
            _compile(fresh, states)
            if folder is None:
                return ctypes.CDLL(str(fresh))  # stays mapped when the file is gone
            content = fresh.read_bytes()
            (folder / name).unlink(missing_ok=True)  # a damaged one: its mode is not kept
            write_whole(folder / name, content + hashlib.sha256(content).digest())
        return _open(folder / name)
    except OSError as error:
        raise BuildError(f"the compiled kernels could not be stored or loaded: {error}.") from error


def _open(library: Path) -> ctypes.CDLL:
    """Load a library; by a copy among the temporary files where its own folder is mounted noexec."""
    try:
        return ctypes.CDLL(str(library))
    except OSError:
        with tempfile.TemporaryDirectory() as other:
            return ctypes.CDLL(shutil.copy(library, other))


def _whole(library: Path) -> bool:
    """Whether a file is what was published: ours, written by nobody else, and with its checksum at the end.

    A damaged library would end the process with a bus error as it is loaded.
    """
    try:
        state = library.lstat()
    except FileNotFoundError:
        return False
    if not stat.S_ISREG(state.st_mode) or state.st_mode & 0o022 or state.st_uid != _user(state):
        return False
    content = library.read_bytes()
    return hashlib.sha256(content[:-32]).digest() == content[-32:]


def _user(state: os.stat_result) -> int:
    return os.getuid() if hasattr(os, "getuid") else state.st_uid


def _written_by_others(folder: Path) -> Path | None:
    """The folder itself, or one above it, that others can change."""
    for path in (folder, *folder.parents):
        state = path.stat()
        others = state.st_mode & (0o022 if path == folder else 0o002) and not state.st_mode & stat.S_ISVTX
        if others or state.st_uid not in (_user(state), *((0,) if path != folder else ())):
            return path
    return None


def kernel_folder() -> Path | None:
    """Return the cache of kernels; None if it is not this user's alone to write."""
    try:
        folder = cache_folder("kernels")
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        if not os.access(folder, os.W_OK):
            return None
        if open_to_others := _written_by_others(folder.resolve()):
            warnings.warn(
                f"The CPU kernels are compiled at every start, since others can write {open_to_others}. Write "
                f"chmod go-w {open_to_others}, or set XDG_CACHE_HOME to a folder of your own.",
                stacklevel=2,
            )
            return None
        for left in folder.glob("build-*"):  # of a build that was killed
            if time.time() - left.stat().st_mtime > 10 * TIMEOUT:
                shutil.rmtree(left, ignore_errors=True)
        return folder
    except (OSError, ValueError):  # ValueError: no home folder
        return None


def _fingerprint(states: int) -> str:
    """Of the source, the flags and the processor: a home folder may be shared between unlike machines.

    The compiler is not in it: a node that has none finds what another has compiled.
    """
    sources = [path.read_text() for path in sorted(SOURCES.glob("*.[ch]"))]
    parts = [*sources, " ".join(FLAGS), str(states), platform.machine(), processor.description()]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:24]


def _compile(output: Path, states: int) -> None:
    command = [compiler(), *FLAGS, f"-DSTATES={states}", str(SOURCES / "kernels.c"), "-o", str(output)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise BuildError(f"the C compiler did not finish: {error}.") from error
    if done.returncode:
        lines = [*(line for line in done.stderr.splitlines() if "error" in line), done.stderr.strip(), "no message"]
        raise BuildError(f"the C compiler failed: {next(filter(None, lines)).strip()}.")
