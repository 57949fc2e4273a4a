"""Starts runs of the recipe as forks of a process that has everything imported: seconds become tenths.

    python fork_server.py SOCKET

Each connection sends one JSON line {"argv", "env", "output", "patch", "file_limit", "tied_to"} and gets {"pid"}, then
{"exit"} at its end: the exit code, or minus the signal. A fork is a process like any other: it is killed, limited and
waited for. Where it is tied to a process (forked.py), it is in that one's network, and killed when it ends.
"""

import contextlib
import ctypes
import gc
import importlib
import json
import os
import runpy
import selectors
import signal
import socket
import sys
import tempfile
import threading
import time
from pathlib import Path

RECIPE = Path(__file__).parents[1] / "recipes" / "pretrain.py"


# What a run imports late: above all DeepSpeed's muon, which imports inductor, and what draws the loss curve
LATE = (
    "deepspeed.module_inject.auto_ep_layer",
    "deepspeed.ops.op_builder.all_ops",
    "deepspeed.runtime.superoffload.superoffload_stage3",
    "deepspeed.runtime.zero.muon.muon_optimizer",
    "matplotlib.backends.backend_agg",
    "matplotlib.figure",
    "PIL.PngImagePlugin",
    "safetensors.torch",
    "transformers.hf_argparser",
    "transformers.trainer",
    "hf_mamba.cli",
    "hf_mamba.data.worker",
    "hf_mamba.interop.outgoing",
    "hf_mamba.models.mamba.modeling_mamba",
    "hf_mamba.ops.cpu.kernels",
    "hf_mamba.ops.operators",
    "hf_mamba.ops.torch.backend",
    "hf_mamba.preflight.screen",
    "hf_mamba.run.processes",
    "hf_mamba.training.build",
    "hf_mamba.training.errors",
    "hf_mamba.training.export",
    "hf_mamba.training.inputs",
    "hf_mamba.training.publishing",
    "hf_mamba.training.trainer",
)


def preload() -> None:
    """Import what a run needs; nothing starts threads or a process group."""
    import torch
    import transformers
    from deepspeed.ops.op_builder import ShareMemCommBuilder  # type: ignore[attr-defined]

    for name in LATE:
        with contextlib.suppress(ImportError):  # another version of DeepSpeed may lack it
            importlib.import_module(name)
    draw_once()
    # DeepSpeed compiles this at an engine's first start; here once, before ranks could wait for each other's lock
    ShareMemCommBuilder().load()
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_warning()
    assert threading.active_count() == 1, threading.enumerate()
    gc.collect()
    gc.freeze()  # a run's own collections do not walk all of this again, which would copy its pages


def draw_once() -> None:
    """Make matplotlib find its fonts and make its classes."""
    from hf_mamba.report.plots import plot_loss

    with tempfile.TemporaryDirectory() as folder:
        plot_loss([{"step": 1, "loss": 1.0, "learning_rate": 1.0}], Path(folder, "curve.png"), 1, "")


def become_run(request: dict) -> None:
    """In the child: the recipe, as `python recipes/pretrain.py ARGV` would run it."""
    os.setsid()
    output = os.open(request["output"], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.environ.update(request["env"])
    if tied := request.get("tied_to"):
        join_network(tied)
    if limit := request.get("file_limit"):
        import resource

        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    sys.argv = [str(RECIPE), *request["argv"]]
    code: object = 1
    try:
        if request.get("patch"):
            exec(compile(request["patch"], "patch", "exec"), {})  # what a test makes go wrong
        runpy.run_path(str(RECIPE), run_name="__main__")
    except SystemExit as end:
        code = end.code
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        with contextlib.suppress(Exception):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code if isinstance(code, int) else 0 if code is None else 1)


def join_network(pid: int) -> None:
    """Be on the node, as far as a network namespace is one, of this process."""
    theirs = f"/proc/{pid}/ns/net"
    if os.readlink(theirs) != os.readlink("/proc/self/ns/net"):
        clone_newnet = 0x40000000
        assert ctypes.CDLL(None, use_errno=True).setns(os.open(theirs, os.O_RDONLY), clone_newnet) == 0


def serve(path: str) -> None:
    preload()
    server = socket.socket(socket.AF_UNIX)
    server.bind(path)
    server.listen(64)
    selector = selectors.DefaultSelector()
    selector.register(server, selectors.EVENT_READ)
    running: dict[int, socket.socket] = {}
    tied: dict[socket.socket, int] = {}
    parent = os.getppid()
    while os.getppid() == parent:
        for key, _ in selector.select(timeout=0.02):
            if key.fileobj is server:
                connection, _ = server.accept()
                request = json.loads(connection.makefile().readline())
                pid = os.fork()
                if pid == 0:
                    server.close()
                    become_run(request)
                running[pid] = connection
                connection.sendall(json.dumps({"pid": pid}).encode() + b"\n")
                if request.get("tied_to"):
                    tied[connection] = pid
                    selector.register(connection, selectors.EVENT_READ)
            else:  # a process that a fork is tied to is gone
                selector.unregister(key.fileobj)
                os.kill(tied.pop(key.fileobj), signal.SIGKILL)
        with contextlib.suppress(ChildProcessError):
            while True:
                pid, status = os.waitpid(-1, os.WNOHANG)
                if pid == 0:
                    break
                code = -os.WTERMSIG(status) if os.WIFSIGNALED(status) else os.WEXITSTATUS(status)
                connection = running.pop(pid)
                if tied.pop(connection, None):
                    selector.unregister(connection)
                with connection, contextlib.suppress(OSError):
                    connection.sendall(json.dumps({"exit": code}).encode() + b"\n")
    for pid in running:
        os.kill(pid, signal.SIGKILL)
    time.sleep(0)


if __name__ == "__main__":
    serve(sys.argv[1])
