"""Memory that this process may use on this machine: the system's, its control groups' and its own limits. Linux only.

Ranks of a node share what the system and the control groups have left; RLIMIT_AS and RLIMIT_DATA are of one process.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import resource
import sys
from collections.abc import Iterator
from pathlib import Path

PROC, CGROUPS = Path("/proc"), Path("/sys/fs/cgroup")
# What a process adds to its imports until it has trained a step, measured: pages of torch's code, threads, the data's
# reader; and DeepSpeed, which accelerate imports as it prepares a model wherever it is installed.
LATER, DEEPSPEED_IMPORT = 40 * 2**20, 12 * 2**20
UNLIMITED = 1 << 60  # version 1 writes 2^63 less a page


def usable_memory(ranks: int = 1, proc: Path = PROC, cgroups: Path = CGROUPS) -> int | None:
    """Bytes that each of the node's ranks may hold, what this process holds already included; None if unknown.

    `proc` and `cgroups` are where these file systems are mounted.
    """
    try:
        own = _fields(proc / "self" / "status")
        shared = [_fields(proc / "meminfo")["MemAvailable"]]
    except (OSError, KeyError, ValueError):
        return None
    shared += [limit - used for limit, used in _groups(proc, cgroups)]
    left = [max(0, min(shared)) // ranks]
    for kind, size in ((resource.RLIMIT_AS, own["VmSize"]), (resource.RLIMIT_DATA, own["VmData"])):
        limit = resource.getrlimit(kind)[0]
        if limit != resource.RLIM_INFINITY:
            left.append(max(0, limit - size))
    return own["VmRSS"] + min(left)


def most_memory(ranks: int = 1, proc: Path = PROC, cgroups: Path = CGROUPS) -> int | None:
    """Bytes that each rank could hold if the machine were otherwise idle: the same for all ranks, at all times."""
    try:
        whole = [_fields(proc / "meminfo")["MemTotal"]]
    except (OSError, KeyError, ValueError):
        return None
    return min(whole + [limit for limit, _ in _groups(proc, cgroups)]) // ranks


def resident_peak() -> int:
    """The most bytes of this process that were in memory at once, since `forget_peak`; what top shows as RES."""
    try:
        return _fields(PROC / "self" / "status")["VmHWM"]
    except (OSError, KeyError):
        unit = 1 if sys.platform == "darwin" else 1024  # ru_maxrss is bytes there, KiB elsewhere
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def forget_peak() -> None:
    """Have `resident_peak` begin anew."""
    try:
        (PROC / "self" / "clear_refs").write_text("5")
    except OSError:
        return  # the peak is the process's whole life's then


def libraries() -> int | None:
    """Bytes of this process as it will train, without its model; None where what trains is not imported, or unknown.

    What else is installed decides it: transformers imports scikit-learn, for one, where it finds it.
    """
    return _libraries() if "transformers.trainer" in sys.modules else None


@functools.cache
def _libraries() -> int | None:
    """The first answer stays: later there is a model in the process."""
    try:
        held = _fields(PROC / "self" / "status")["VmRSS"]
    except (OSError, KeyError, ValueError):
        return None
    imported = "deepspeed" in sys.modules or importlib.util.find_spec("deepspeed") is None
    return held + LATER + (0 if imported else DEEPSPEED_IMPORT)


def ranks_here(processes: int, nodes: int) -> int:
    """Ranks of this node: what its launcher says, else an equal share."""
    said = os.environ.get("LOCAL_WORLD_SIZE", "")
    return int(said) if said.isdigit() and int(said) > 0 else -(-processes // nodes)


def _groups(proc: Path, cgroups: Path) -> Iterator[tuple[int, int]]:
    """(limit, used) of each control group that this process is in, up to the root; what can be dropped is not used.

    Within a container a group's path may be that of the host, and only its own group is mounted: as the root.
    """
    try:
        lines = (proc / "self" / "cgroup").read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            roots, names = [cgroups, cgroups / "unified"], ("memory.max", "memory.current", "inactive_file")
        elif "memory" in controllers.split(","):
            roots = [cgroups / "memory"]
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
        else:
            continue
        for root in roots:
            folder = root / path.lstrip("/")
            for each in (folder, *folder.parents):
                if each.is_relative_to(root):
                    yield from _group(each, *names)


def _group(folder: Path, limit: str, used: str, droppable: str) -> Iterator[tuple[int, int]]:
    try:
        most = int((folder / limit).read_text())  # "max" is no number: no limit
        if most < UNLIMITED:
            stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
            yield most, int((folder / used).read_text()) - int(stat.get(droppable, 0))
    except (OSError, ValueError):
        return


def _fields(file: Path) -> dict[str, int]:
    """Of a file of lines "name: number kB": bytes by name."""
    rows = (line.partition(":") for line in file.read_text().splitlines())
    return {name: int(value.split()[0]) * 1024 for name, _, value in rows if value.endswith("kB")}
