"""From a plan to the exact `accelerate launch` command, with rendezvous over several machines."""

from __future__ import annotations

import argparse
import os
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from hf_mamba.files import usable_cores
from hf_mamba.findings import Problem
from hf_mamba.plan import Plan
from hf_mamba.preflight.launch import recipes
from hf_mamba.preflight.launch.accelerate_config import NO_FILE, AccelerateFile

# Flags of `hf-mamba launch` itself; everything else belongs to the script.
RENDEZVOUS: tuple[tuple[str, str], ...] = (
    ("machine_rank", "this machine's number, from 0"),
    ("main_process_ip", "address of machine 0"),
    ("main_process_port", "port of machine 0"),
)
# What decides the world is passed to the launcher, not to the script, which reads it from the launcher.
WORLD_FLAGS = ("num_gpus", "num_nodes", "accelerate_config", "dry_run", "convert")


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
    """recipes/pretrain.py of this folder, or the one that came with the package.

    Raises:
        ValueError: there is none.
    """
    here = Path("recipes/pretrain.py")
    return here if here.is_file() else recipes.home() / here


def _without(argv: Sequence[str], names: Sequence[str]) -> list[str]:
    """The line without these flags and their values: `--num_gpus 4`, `--num_gpus=4`, `--num-gpus 4`, `--dry_run`."""
    flags = {f"--{form}" for name in names for form in (name, name.replace("_", "-"))}
    kept, skip = [], False
    for word in argv:
        if skip and not word.startswith("--"):
            skip = False
        elif word in flags:
            skip = True
        else:
            skip = False
            kept += [word] if word.partition("=")[0] not in flags else []
    return kept


def rendezvous_problems(options: LaunchOptions, nodes: int, file: AccelerateFile, dry_run: bool) -> list[Problem]:
    """What several machines need to find each other; a dry run prints the lines of all of them."""
    found = []
    for name, help in RENDEZVOUS[:2]:
        known = getattr(options, name) is not None or name in file.rendezvous
        if nodes > 1 and not known and not file.one_line and not (dry_run and name == "machine_rank"):
            why = f"{nodes} machines must find each other."
            found.append(Problem(name, "nothing", why, f"Write --{name}: {help}.", id="rendezvous-missing"))
    for name in ("machine_rank", "main_process_port"):
        value = getattr(options, name)
        if value is not None and not value.isdigit():
            why = "It must be a number."
            found.append(Problem(name, value, why, "Write a whole number.", id="rendezvous-not-a-number"))
    rank = options.machine_rank
    if rank is not None and rank.isdigit() and int(rank) >= nodes:
        why, fix = f"There are {nodes} machines.", f"Write 0 to {nodes - 1}."
        found.append(Problem("machine_rank", rank, why, fix, id="machine-rank-too-large"))
    return found


def launch_command(
    plan: Plan, options: LaunchOptions, script_arguments: Sequence[str], file: AccelerateFile = NO_FILE
) -> list[str]:
    """The `accelerate launch` command of a plan on one machine.

    With accelerate's own file, the file and what differs from it; else every flag that accelerate would guess.

    DeepSpeed runs go through --use_deepspeed, because `--cpu` would switch DeepSpeed off without a word; other runs of
    several processes go through --multi_gpu, which is accelerate's name for torchrun, on CPUs too.
    """
    config = file.path
    command = ["accelerate", "launch"] + ([] if config is None else ["--config_file", str(config)])
    processes, nodes = str(plan.num_processes), str(plan.num_nodes)
    local = str(plan.processes_per_node)
    if (file.variables.get("WORLD_SIZE"), file.variables.get("LOCAL_WORLD_SIZE")) != (processes, local):
        command += ["--num_processes", processes, "--num_machines", nodes]
    if config is None:
        command += ["--mixed_precision", {"fp32": "no"}.get(plan.dtype, plan.dtype), "--dynamo_backend", "no"]
    if plan.num_nodes > 1 and not file.one_line:
        command += ["--machine_rank", str(options.machine_rank or file.rendezvous.get("machine_rank", 0))]
        if options.main_process_ip is not None:
            command += ["--main_process_ip", options.main_process_ip]
    if options.main_process_port is not None:
        command += ["--main_process_port", options.main_process_port]
    elif plan.num_nodes > 1 and "main_process_port" not in file.rendezvous:
        command += ["--main_process_port", "29500"]
    if file.launcher in ("", "simple"):
        if plan.ds_config is not None:
            command += ["--use_deepspeed"]
            command += ["--deepspeed_multinode_launcher", "standard"] if plan.num_nodes > 1 else []
        elif plan.num_processes > 1:
            command += ["--multi_gpu"]
        elif plan.device == "cpu" and config is None:
            command += ["--cpu"]
    script = options.script or str(default_script())
    return [*command, script, *_without(script_arguments, WORLD_FLAGS)]


def launch_commands(
    plan: Plan, options: LaunchOptions, script_arguments: Sequence[str], file: AccelerateFile = NO_FILE
) -> list[list[str]]:
    """The command of every machine, in the order of their ranks."""
    machines = [replace(options, machine_rank=str(rank)) for rank in range(plan.num_nodes)]
    return [launch_command(plan, machine, script_arguments, file) for machine in machines]


def with_engine(plan: Plan, argv: Sequence[str]) -> list[str]:
    """The line with the engine that was chosen by its name, so that every process has the same."""
    kept = _without(argv, ("deepspeed",))
    return kept if plan.ds_config is None else [*kept, "--deepspeed", plan.provenance["ds_config"]]


def child_environment(plan: Plan, environ: Mapping[str, str] = os.environ) -> dict[str, str]:
    """The environment that the command needs: ninja within reach, and on CPUs each rank's threads and DeepSpeed's."""
    environment = dict(environ)
    folder = str(Path(sys.executable).parent)
    if folder not in environment.get("PATH", "").split(os.pathsep):
        environment["PATH"] = folder + os.pathsep + environment.get("PATH", "")
    if plan.device == "cpu":
        environment.setdefault("DS_ACCELERATOR", "cpu")
        threads = max(1, usable_cores() // plan.processes_per_node)
        environment.setdefault("OMP_NUM_THREADS", str(threads))  # accelerate warns of its guess
    # torchrun's store outlives a restart otherwise, and the ranks read dead ranks' addresses (torch 2.13)
    environment.setdefault("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "1")
    return environment


def become(command: Sequence[str], environment: Mapping[str, str]) -> None:
    """Replace this process by the command: signals are the command's own, and the exit code its ranks'."""
    sys.stdout.flush()
    module = [sys.executable, "-m", "hf_mamba.preflight.launch.started", *command[1:]]
    os.execve(sys.executable, module, dict(environment))


def shell(command: Sequence[str]) -> str:
    """The command as it can be pasted."""
    return shlex.join(command)
