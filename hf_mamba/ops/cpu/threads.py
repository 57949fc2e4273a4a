"""Runs a compiled kernel on as many threads as torch would use.

The threads are torch's own OpenMP pool, through the entry point that compilers call (`GOMP_parallel`): a second pool
would fight torch's for the cores, since its threads go on spinning for a while after every matrix product. Where torch
brings no such library, Python threads do the same work (ctypes releases the interpreter's lock). A forked child runs
everything on one thread: the pool's threads do not exist there, and OpenMP would wait for them.
"""

import ctypes
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

_forked = False
_openmp: Any = None
_searched = False
_pool: ThreadPoolExecutor | None = None
_pool_size = 0


def run(kernel: Any, work: ctypes.Structure, serial: bool = False) -> None:
    """Call `kernel(&work)` on torch.get_num_threads() threads at once; the kernel shares out the work itself."""
    threads = 1 if serial or _forked else torch.get_num_threads()
    if threads == 1:
        kernel(ctypes.byref(work))
    elif parallel := openmp():
        parallel(kernel, ctypes.byref(work), threads, 0)
    else:
        _run_python_threads(kernel, work, threads)


def openmp() -> Any:
    """GOMP_parallel of the OpenMP library that torch has loaded, or None."""
    global _openmp, _searched
    if not _searched:
        _searched = True
        try:
            _openmp = ctypes.CDLL(str(_loaded_libraries()[0])).GOMP_parallel
            _openmp.restype = None
        except (IndexError, OSError, AttributeError):
            _openmp = None
    return _openmp


def _loaded_libraries() -> list[Path]:
    lines = Path("/proc/self/maps").read_text().splitlines()
    paths = dict.fromkeys(Path(line.split(maxsplit=5)[5]) for line in lines if line.count("/"))
    found = [path for path in paths if path.name.startswith(("libgomp", "libiomp", "libomp"))]
    return sorted(found, key=lambda path: "torch" not in path.parts)  # torch's own before other packages'


def _run_python_threads(kernel: Any, work: ctypes.Structure, threads: int) -> None:
    global _pool, _pool_size
    if _pool is None or _pool_size < threads - 1:
        _pool, _pool_size = ThreadPoolExecutor(threads - 1, thread_name_prefix="hf_mamba"), threads - 1
    others = [_pool.submit(kernel, ctypes.byref(work)) for _ in range(threads - 1)]
    kernel(ctypes.byref(work))
    for other in others:
        other.result()


def _after_fork() -> None:
    global _forked
    _forked = True


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
