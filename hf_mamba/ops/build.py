"""Compiles kernels.c with the system's compiler at first use, once per machine, state size and version of the source.

The shared object is published under a name that is a hash of everything it depends on, by renaming a finished file: a
process that finds the name finds a whole library, a killed build leaves nothing under it, and processes that build at
the same time each build their own and publish the same. There are no locks, so there is nothing to wait for.
"""

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path

SOURCE = Path(__file__).with_name("kernels.c")
FLAGS = ("-std=gnu11", "-O3", "-march=native", "-ffp-contract=fast", "-fPIC", "-shared", "-Wno-psabi")
TIMEOUT = 300  # seconds for one compilation, which takes about two


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
        path = cache_folder() / name
        if path.exists():
            try:
                return ctypes.CDLL(str(path))
            except OSError:  # damaged after it was written: build it again
                path.unlink(missing_ok=True)
        with tempfile.TemporaryDirectory(prefix="build-", dir=path.parent) as folder:
            fresh = Path(folder, name)
            _compile(fresh, states)
            os.replace(fresh, path)
        return ctypes.CDLL(str(path))
    except OSError as error:
        raise BuildError(f"the compiled kernels could not be stored or loaded: {error}") from error


def cache_folder() -> Path:
    """A folder that only this user can write: below $XDG_CACHE_HOME or ~/.cache, else a fresh temporary one."""
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    folder = base / "hf_mamba" / "kernels"
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        mine = not hasattr(os, "getuid") or folder.stat().st_uid == os.getuid()
        if mine and os.access(folder, os.W_OK):
            return folder
    except OSError:
        pass
    return Path(tempfile.mkdtemp(prefix="hf_mamba-kernels-"))


def _fingerprint(states: int) -> str:
    """Of the source, the compiler, its flags and the processor: a home folder may be shared between unlike machines."""
    parts = [SOURCE.read_text(), " ".join(FLAGS), compiler(), str(states), platform.machine(), _processor()]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:24]


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line for line in lines if line.startswith(("flags", "Features"))), platform.processor())


def _compile(output: Path, states: int) -> None:
    command = [compiler(), *FLAGS, f"-DSTATES={states}", str(SOURCE), "-o", str(output)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise BuildError(f"the C compiler did not finish: {error}") from error
    if done.returncode:
        lines = (
            [line for line in done.stderr.splitlines() if "error" in line] or done.stderr.splitlines() or ["no message"]
        )
        raise BuildError(f"the C compiler failed: {lines[0].strip()}")
    with output.open("rb+") as file:
        os.fsync(file.fileno())
