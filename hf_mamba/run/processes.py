"""What the launcher's environment says of this process."""

import contextlib
import ctypes
import os
import signal
import socket
import sys
import time
from pathlib import Path

from hf_mamba.files import usable_cores, write_json
from hf_mamba.plan import Plan

_TASKS = {"SLURM_STEP_NUM_TASKS": "srun", "OMPI_COMM_WORLD_SIZE": "mpirun", "PMI_SIZE": "mpirun"}  # how many, by whom

_LAUNCHERS = ("accelerate", "torchrun")  # whose own words name the script, as they were typed


def is_main_process() -> bool:
    """Whether this is rank 0; true without a launcher."""
    return os.environ.get("RANK", "0") == "0"


def end_with_launcher(number: int = signal.SIGKILL) -> None:
    """Ask for a signal when the launcher dies, however it does: its ranks would train on, or wait for ever."""
    if any(name in os.environ for name in ("TORCHELASTIC_RUN_ID", "ACCELERATE_MIXED_PRECISION", "CROSS_RANK")):
        end_with_parent(number)
        if os.getppid() == 1 and not _is_python(1):  # it died before: init has taken this process over
            os._exit(1)


def end_with_parent(number: int = signal.SIGKILL) -> None:
    """Ask Linux for a signal when the process that started this one dies."""
    if sys.platform == "linux":
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL(None).prctl(1, number, 0, 0, 0)  # PR_SET_PDEATHSIG


def _is_python(pid: int) -> bool:
    """Whether a process of this user runs Python."""
    try:
        return "python" in os.path.basename(os.readlink(f"/proc/{pid}/exe"))
    except OSError:
        return False


def typed_command() -> list[str]:
    """The words that started this process, a launcher's before them where one did; its own words alone elsewhere."""
    own = list(sys.argv)
    try:
        words = Path(f"/proc/{os.getppid()}/cmdline").read_text(encoding="utf-8").split("\0")[:-1]
    except (OSError, ValueError):
        return own
    for i, word in enumerate(words):
        if os.path.basename(word) in _LAUNCHERS and words[-len(own) :] == own:
            return [os.path.basename(word), *words[i + 1 :]]
    return own


def tell_launcher(message: str) -> None:
    """Have torchrun and `accelerate launch` say why this process ends, where they would point to a page of torch's."""
    if file := os.environ.get("TORCHELASTIC_ERROR_FILE"):
        with contextlib.suppress(OSError):
            write_json(Path(file), {"message": message, "timestamp": int(time.time())})


def let_main_speak() -> None:
    """Wait until rank 0 has said why the run does not start: the launcher ends all ranks with the first that ends."""
    if not is_main_process() and "TORCHELASTIC_RUN_ID" in os.environ:
        time.sleep(10)


def check_world(plan: Plan) -> None:
    """Refuse to train with another number of processes than was planned: the global batch would be another.

    Raises:
        ValueError: where --num_gpus plans for a launcher that did not start this process, or srun started several.
    """
    counts = [(int(os.environ[key]), name) for key, name in _TASKS.items() if key in os.environ]
    tasks, starter = max(counts, default=(1, ""))
    if tasks > 1 and "WORLD_SIZE" not in os.environ:
        raise ValueError(
            f"{starter} started {tasks} tasks without a launcher: each would train the whole run alone. Start one task "
            "a machine (--ntasks-per-node 1) with `hf-mamba launch`, as recipes/slurm/pretrain.sbatch does."
        )
    here = int(os.environ.get("WORLD_SIZE", "1"))
    if plan.num_processes != here:
        raise ValueError(
            f"--num_gpus and --num_nodes plan for {plan.num_processes} processes, and {here} was started: the batch "
            "would be another. Start with `hf-mamba launch` and the same flags, or leave these two out."
        )


def use_cpu_well(deepspeed: bool) -> None:
    """Use all cores that this process may have, and tell DeepSpeed beforehand that there is no GPU.

    `accelerate launch` sets OMP_NUM_THREADS=1 unless it is told otherwise, which leaves the other cores idle.
    DeepSpeed's flat buffers leave holes: with it, what is freed is given back.
    """
    import torch

    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    torch.set_num_threads(cpu_threads())
    if not deepspeed:
        keep_freed_memory()


def keep_freed_memory() -> None:
    """Have glibc keep what is freed; a step gave large blocks back and faulted them in anew, an eighth of its time.

    What the user said of glibc's allocator stays.
    """
    own = (name.startswith(("MALLOC_MMAP", "MALLOC_TRIM")) for name in os.environ)
    if any(own) or "glibc.malloc" in os.environ.get("GLIBC_TUNABLES", ""):
        return
    with contextlib.suppress(OSError, AttributeError):  # another C library
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(-4, 0)  # M_MMAP_MAX: no block is a mapping of its own, which is given back when freed
        mallopt(-1, -1)  # M_TRIM_THRESHOLD: never


def cpu_threads() -> int:
    """Threads that a step takes on this process's CPU cores."""
    import torch

    if "ACCELERATE_MIXED_PRECISION" in os.environ and os.environ.get("OMP_NUM_THREADS") == "1":
        return max(1, usable_cores() // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
    return torch.get_num_threads()


def stand_alone() -> None:
    """Make a process without a launcher a world of one: DeepSpeed would ask for mpi4py otherwise."""
    if "RANK" in os.environ:
        return
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    os.environ |= {
        "RANK": "0",
        "LOCAL_RANK": "0",
        "WORLD_SIZE": "1",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
