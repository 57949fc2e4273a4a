"""From a plan to the exact `accelerate launch` command, with rendezvous over several machines."""

from __future__ import annotations

import argparse
import importlib.util
import os
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from hf_mamba.findings import Problem
from hf_mamba.plan import Plan

# Flags of `hf-mamba launch` itself; everything else belongs to the script.
RENDEZVOUS: tuple[tuple[str, str], ...] = (
    ("machine_rank", "this machine's number, from 0"),
    ("main_process_ip", "address of machine 0"),
    ("main_process_port", "port of machine 0"),
)
# What decides the world is passed to the launcher, not to the script, which reads it from the launcher.
WORLD_FLAGS = ("num_gpus", "num_nodes")


@dataclass(frozen=True)
class LaunchOptions:
    """Where and what to launch."""

    script: str | None = None
    machine_rank: str | None = None
    main_process_ip: str | None = None
    main_process_port: str | None = None


def split_launch_flags(argv: Sequence[str]) -> tuple[LaunchOptions, list[str]]:
    """The launcher's own flags, and the rest of the line."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--script")
    for name, help in RENDEZVOUS:
        parser.add_argument(f"--{name}", help=help)
    own, rest = parser.parse_known_args(list(argv))
    return LaunchOptions(**vars(own)), rest


def default_script() -> Path:
    """recipes/pretrain.py of this folder, or beside the package where it is installed from a checkout."""
    here = Path("recipes/pretrain.py")
    spec = importlib.util.find_spec("hf_mamba")
    beside = Path(spec.origin).resolve().parents[1] / here if spec and spec.origin else here
    return here if here.is_file() or not beside.is_file() else beside


def _without(argv: Sequence[str], names: Sequence[str]) -> list[str]:
    """The line without these flags and their values: `--num_gpus 4`, `--num_gpus=4`, `--num-gpus 4`."""
    flags = {f"--{form}" for name in names for form in (name, name.replace("_", "-"))}
    kept, skip = [], False
    for word in argv:
        if skip:
            skip = False
        elif word in flags:
            skip = True
        elif word.partition("=")[0] not in flags:
            kept.append(word)
    return kept


def rendezvous_problems(options: LaunchOptions, nodes: int) -> list[Problem]:
    """What several machines need to find each other."""
    found = []
    for name, help in RENDEZVOUS[:2]:
        if nodes > 1 and getattr(options, name) is None:
            why = f"{nodes} machines must find each other."
            found.append(Problem(name, "nothing", why, f"Write --{name}: {help}.", id="rendezvous-missing"))
    for name in ("machine_rank", "main_process_port"):
        value = getattr(options, name)
        if value is not None and not value.isdigit():
            found.append(Problem(name, value, "It is a number.", "Write a whole number.", id="rendezvous-not-a-number"))
    rank = options.machine_rank
    if rank is not None and rank.isdigit() and int(rank) >= nodes:
        found.append(
            Problem(
                "machine_rank",
                rank,
                f"There are {nodes} machines.",
                f"Write 0 to {nodes - 1}.",
                id="machine-rank-too-large",
            )
        )
    return found


def launch_command(plan: Plan, options: LaunchOptions, script_arguments: Sequence[str]) -> list[str]:
    """The `accelerate launch` command of a plan; every flag that accelerate would otherwise guess is written.

    DeepSpeed runs go through --use_deepspeed, because `--cpu` would switch DeepSpeed off without a word; other runs of
    several processes go through --multi_gpu, which is accelerate's name for torchrun, on CPUs too.
    """
    processes, nodes = plan.num_processes, plan.num_nodes
    command = ["accelerate", "launch", "--num_processes", str(processes), "--num_machines", str(nodes)]
    command += ["--mixed_precision", {"fp32": "no"}.get(plan.dtype, plan.dtype), "--dynamo_backend", "no"]
    if nodes > 1:
        command += ["--machine_rank", str(options.machine_rank), "--main_process_ip", str(options.main_process_ip)]
    if nodes > 1 or options.main_process_port is not None:
        command += ["--main_process_port", options.main_process_port or "29500"]
    if plan.ds_config is not None:
        command += ["--use_deepspeed"]
        if nodes > 1:
            command += ["--deepspeed_multinode_launcher", "standard"]
    elif processes > 1:
        command += ["--multi_gpu"]
    elif plan.device == "cpu":
        command += ["--cpu"]
    script = options.script or str(default_script())
    return [*command, script, *_without(script_arguments, WORLD_FLAGS)]


def child_environment(plan: Plan, environ: Mapping[str, str] = os.environ) -> dict[str, str]:
    """The environment that the command needs: ninja within reach, DeepSpeed on the CPU where the run is there."""
    environment = dict(environ)
    folder = str(Path(sys.executable).parent)
    if folder not in environment.get("PATH", "").split(os.pathsep):
        environment["PATH"] = folder + os.pathsep + environment.get("PATH", "")
    if plan.device == "cpu":
        environment.setdefault("DS_ACCELERATOR", "cpu")
    # torchrun's store outlives a restart otherwise, and the ranks read dead ranks' addresses (torch 2.13)
    environment.setdefault("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "1")
    return environment


def become(command: Sequence[str], environment: Mapping[str, str]) -> None:
    """Replace this process by the command: signals and the exit code are the command's own."""
    sys.stdout.flush()
    module = [sys.executable, "-m", "accelerate.commands.accelerate_cli", *command[1:]]
    os.execve(sys.executable, module, dict(environment))


def shell(command: Sequence[str]) -> str:
    """The command as it can be pasted."""
    return shlex.join(command)
