"""Runs of the recipe for the tests of training: started, killed, waited for and compared."""

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from launching import ROOT as ROOT
from launching import free_port, write_corpus
from safetensors.numpy import load_file

SETTINGS = {
    "preset": "tiny_mamba",
    "vocab_size": 320,
    "seq_len": 48,
    "global_batch_size": 8,
    "max_steps": 12,
    "logging_steps": 1,
    "save_steps": 4,
    "eval_fraction": 0.05,
    "use_cpu": True,
    "bf16": False,  # the same numbers on every processor; test_exact_resume.py and test_recipe.py have bf16
    "warmup_steps": 2,
    "learning_rate": 0.004,
    "sample_prompt": "",  # test_report.py, test_fsdp.py and test_recipe.py have samples
}

SMALL_MAMBA2 = {
    "preset": "tiny_mamba2",
    "config_overrides": "hidden_size=32,num_hidden_layers=2,head_dim=8,state_size=8",
}
SMALL_HYBRID = {
    "preset": "tiny_hybrid",
    "config_overrides": "hidden_size=32,num_attention_heads=4,mamba_d_head=8,mamba_d_state=8"
    ",shared_intermediate_size=40",
}

AT = """
def at(step, rank):
    import os, signal, time
    from hf_mamba.training.trainer import MambaTrainer
    part = MambaTrainer.{part}
    def patched(self, *args, **kwargs):
        if self.state.global_step == step and rank in (None, self.args.process_index):
            {action}
        return part(self, *args, **kwargs)
    MambaTrainer.{part} = patched
at({step}, {rank})
"""


def at(part: str, step: int, action: str, rank: int | None = None) -> str:
    """A patch: `action` comes before MambaTrainer's `part`, when `step` steps are done, on one rank or on all."""
    return AT.format(part=part, step=step, action=action, rank=rank)


def stop_in(step: int) -> str:
    """A patch: the first rank sends itself what a cluster would send, within this step."""
    return at("training_step", step - 1, "os.kill(os.getpid(), signal.SIGTERM)", rank=0)


def held(part: str, step: int) -> str:
    """A patch: the run goes no further than `part`, and waits there to be killed."""
    return at(part, step, "time.sleep(600)")


@dataclass
class Process:
    """One rank."""

    pid: int
    output: Path
    connection: socket.socket

    def wait(self, timeout: float = 120) -> int:
        """Its exit code; minus the signal that ended it."""
        self.connection.settimeout(timeout)
        line = self.connection.makefile().readline()
        self.connection.close()
        assert line, self.text()
        return int(json.loads(line)["exit"])

    def signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def text(self) -> str:
        return self.output.read_text(errors="replace")


@dataclass
class Launch:
    """All ranks of one run."""

    ranks: list[Process]

    def wait(self, timeout: float = 120) -> list[int]:
        return [rank.wait(timeout) for rank in self.ranks]

    def ended(self, expect: int) -> "Launch":
        """Itself, once every rank has come to its end with this exit code."""
        codes = self.wait()
        assert codes == [expect] * len(codes), f"{codes}\n{self.text()[-6000:]}"
        return self

    def signal(self, number: int) -> None:
        for rank in self.ranks:
            rank.signal(number)

    def text(self) -> str:
        return "\n".join(rank.text() for rank in self.ranks)


@dataclass
class Launcher:
    """Starts runs over the fork server's socket."""

    address: str
    folder: Path
    corpus: Path
    count: int = 0

    def start(
        self,
        output: Path | str,
        world: int = 1,
        *,
        patch: str = "",
        limit: int = 0,
        home: Path | None = None,
        **settings: Any,
    ) -> Launch:
        """Start a run in `folder/output`; `settings` are flags over SETTINGS, None takes one away.

        Args:
            patch: Python that runs before the recipe: what a test makes go wrong.
            limit: bytes that a file of this run may have.
            home: a cache of its own, so that it tokenises again.
        """
        chosen = {**SETTINGS, "dataset": str(self.corpus), "output_dir": str(self.folder / output), **settings}
        argv = [word for name, value in chosen.items() if value is not None for word in _flag(name, value)]
        return self.launch(argv, world, patch=patch, limit=limit, home=home)

    def launch(
        self, argv: list[str], world: int = 1, *, patch: str = "", limit: int = 0, home: Path | None = None
    ) -> Launch:
        """Start the recipe with exactly these words."""
        self.count += 1
        env = {"TQDM_DISABLE": "1"} | ({"HF_HOME": str(home)} if home else {})
        if world > 1:
            env |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(world)}
            env |= {"LOCAL_WORLD_SIZE": str(world)}
        ranks = []
        for rank in range(world):
            own = {"RANK": str(rank), "LOCAL_RANK": str(rank)} if world > 1 else {}
            log = self.folder / f"out-{self.count}-{rank}.txt"
            request = {"argv": argv, "env": env | own, "output": str(log), "patch": patch, "file_limit": limit}
            connection = socket.socket(socket.AF_UNIX)
            connection.connect(self.address)
            connection.sendall(json.dumps(request).encode() + b"\n")
            answer = json.loads(_line(connection))
            ranks.append(Process(answer["pid"], log, connection))
        return Launch(ranks)

    def run(self, output: Path | str, world: int = 1, expect: int = 0, **settings: Any) -> Launch:
        """A run to its end, which must come with this exit code on every rank."""
        return self.start(output, world, **settings).ended(expect)

    def recipe(self, argv: list[str], world: int = 1, expect: int = 0, home: Path | None = None) -> str:
        """The recipe with exactly these words, to its end; what the first rank printed."""
        return self.launch(argv, world, home=home).ended(expect).ranks[0].text()


@contextlib.contextmanager
def serving(folder: Path) -> Iterator[Launcher]:
    """One preloaded parent for all runs of the recipe, and a small corpus, in `folder`."""
    corpus = write_corpus(folder / "corpus.jsonl")
    environment = os.environ | {
        "HF_HOME": str(folder / "hf"),
        "HF_HUB_OFFLINE": "1",
        "DS_ACCELERATOR": "cpu",
        "OMP_NUM_THREADS": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
    }
    environment.setdefault("TORCH_EXTENSIONS_DIR", str(folder / "extensions"))
    address = str(folder / "fork.socket")
    with open(folder / "server.txt", "w") as output:
        server = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("fork_server.py")), address],
            env=environment,
            stdout=output,
            stderr=output,
            stdin=subprocess.DEVNULL,
        )
    try:
        end = time.monotonic() + 600
        while not os.path.exists(address):
            assert server.poll() is None, (folder / "server.txt").read_text()
            assert time.monotonic() < end
            time.sleep(0.05)
        yield Launcher(address, folder, corpus)
    finally:
        server.terminate()
        server.wait(30)


def _line(connection: socket.socket) -> bytes:
    """One line, byte by byte: nothing after it may be swallowed."""
    line = b""
    while not line.endswith(b"\n"):
        byte = connection.recv(1)
        assert byte, "the fork server is gone"
        line += byte
    return line


def _flag(name: str, value: Any) -> list[str]:
    if value is True:
        return [f"--{name}"]
    if isinstance(value, dict):
        return [f"--{name}", json.dumps(value)]
    return [f"--{name}", *map(str, value if isinstance(value, list) else [value])]


def wait_for(what: Any, timeout: float = 60) -> Any:
    """Poll until `what()` is true, and return it."""
    end = time.monotonic() + timeout
    while time.monotonic() < end:
        if value := what():
            return value
        time.sleep(0.005)
    raise TimeoutError


def log_lines(folder: Path, key: str = "loss") -> dict[int, float]:
    """step -> value of `key`, from what is in the log now."""
    from hf_mamba.run.log import read_log

    return {row["step"]: row[key] for row in read_log(folder) if key in row}


def curve(folder: Path) -> list[tuple[Any, ...]]:
    """(step, loss, norm, rate) of every logged step."""
    from hf_mamba.run.log import read_log

    return [(r["step"], r["loss"], r["grad_norm"], r["learning_rate"]) for r in read_log(folder) if "loss" in r]


def weights(folder: Path) -> dict[str, np.ndarray]:
    return load_file(folder / "model.safetensors")


def same_bytes(one: Path, other: Path) -> list[str]:
    """The tensors, in files of any kind, that differ between two checkpoints; every file must be in both."""
    import torch

    def tensors(value: Any, path: str, out: dict[str, Any]) -> dict[str, Any]:
        if isinstance(value, dict):
            for key, item in value.items():
                tensors(item, f"{path}/{key}", out)
        elif isinstance(value, (list, tuple)):
            for key, item in enumerate(value):
                tensors(item, f"{path}/{key}", out)
        elif isinstance(value, torch.Tensor):
            out[path] = value
        return out

    differing = []
    for file in sorted(one.rglob("*")):
        name = str(file.relative_to(one))
        step = re.search(r"\d+$", other.name)
        name = re.sub(r"global_step\d+", f"global_step{step[0]}" if step else "", name)
        if file.suffix == ".safetensors":
            from safetensors.torch import load_file as load

            a, b = load(file), load(other / name)
        elif file.suffix == ".distcp":  # FSDP's shards
            if file.read_bytes() != (other / name).read_bytes():
                differing.append(name)
            continue
        elif file.suffix in (".pt", ".pth", ".bin"):
            a, b = (
                tensors(torch.load(f, weights_only=False, map_location="cpu"), "", {}) for f in (file, other / name)
            )
        else:
            continue
        assert a.keys() == b.keys()
        for key in a:
            x, y = a[key].contiguous().view(-1), b[key].contiguous().view(-1)
            if x.shape != y.shape or x.dtype != y.dtype or not torch.equal(x.view(torch.uint8), y.view(torch.uint8)):
                differing.append(f"{name}{key}")
    return differing


def kill(launch: Launch) -> None:
    launch.signal(signal.SIGKILL)
    launch.wait()
