"""accelerate's own configuration file: what `accelerate launch --config_file FILE` makes of it.

The file becomes the environment of a started process, so that the file, the launcher's flags and a launched process
are read by the same code (environment.py). What accelerate refuses is a problem here, too. Read from accelerate 1.15:
commands/launch.py (_validate_launch_command, launch_command), utils/launch.py (prepare_*), config_args.py.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from hf_mamba.files import Unreadable, load_yaml, read_small
from hf_mamba.findings import Findings
from hf_mamba.preflight.kinds import near, show
from hf_mamba.preflight.launch.environment import Launcher, read_launcher
from hf_mamba.preflight.settings import Settings

# Every key of a file for one machine or a cluster; accelerate refuses others.
KEYS = frozenset(
    [
        "compute_environment",
        "distributed_type",
        "mixed_precision",
        "use_cpu",
        "debug",
        "num_processes",
        "machine_rank",
        "num_machines",
        "gpu_ids",
        "main_process_ip",
        "main_process_port",
        "rdzv_backend",
        "same_network",
        "main_training_function",
        "enable_cpu_affinity",
        "fp8_config",
        "deepspeed_config",
        "fsdp_config",
        "parallelism_config",
        "megatron_lm_config",
        "mpirun_config",
        "downcast_bf16",
        "tpu_name",
        "tpu_zone",
        "tpu_use_cluster",
        "tpu_use_sudo",
        "command_file",
        "commands",
        "tpu_vm",
        "tpu_env",
        "dynamo_config",
        "fp16",
        "dynamo_backend",
    ]
)
# distributed_type -> who starts the processes; a type of another kind of accelerator is started as GPUs are.
LAUNCHERS: dict[str, str] = {
    "NO": "simple",
    "MULTI_CPU": "simple",
    **dict.fromkeys(
        (f"MULTI_{kind}" for kind in ["GPU", "NPU", "MLU", "SDAA", "MUSA", "XPU", "HPU", "NEURON"]), "torchrun"
    ),
    "DEEPSPEED": "deepspeed",
    "FSDP": "fsdp",
    "MEGATRON_LM": "megatron",
    "XLA": "xla",
}
_OF_TORCHRUN = {kind for kind, launcher in LAUNCHERS.items() if launcher == "torchrun"}
_RENDEZVOUS = ("machine_rank", "main_process_ip", "main_process_port")
PRECISIONS = ("no", "fp8", "fp16", "bf16")
# Key of deepspeed_config -> the variable it becomes; other keys are for the launcher, or nobody reads them.
_DEEPSPEED = {
    "zero_stage": "ACCELERATE_DEEPSPEED_ZERO_STAGE",
    "gradient_accumulation_steps": "ACCELERATE_GRADIENT_ACCUMULATION_STEPS",
    "gradient_clipping": "ACCELERATE_GRADIENT_CLIPPING",
    "offload_optimizer_device": "ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE",
    "offload_param_device": "ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE",
    "zero3_init_flag": "ACCELERATE_DEEPSPEED_ZERO3_INIT",
    "zero3_save_16bit_model": "ACCELERATE_DEEPSPEED_ZERO3_SAVE_16BIT_MODEL",
    "deepspeed_config_file": "ACCELERATE_DEEPSPEED_CONFIG_FILE",
}
# Key of fsdp_config -> (its variable, accelerate's default; None: not set).
_FSDP: dict[str, tuple[str, Any]] = {
    "fsdp_version": ("FSDP_VERSION", 1),
    "fsdp_sharding_strategy": ("FSDP_SHARDING_STRATEGY", "FULL_SHARD"),
    "fsdp_reshard_after_forward": ("FSDP_RESHARD_AFTER_FORWARD", True),
    "fsdp_offload_params": ("FSDP_OFFLOAD_PARAMS", False),
    "fsdp_min_num_params": ("FSDP_MIN_NUM_PARAMS", 10**8),
    "fsdp_auto_wrap_policy": ("FSDP_AUTO_WRAP_POLICY", None),
    "fsdp_transformer_layer_cls_to_wrap": ("FSDP_TRANSFORMER_CLS_TO_WRAP", None),
    "fsdp_state_dict_type": ("FSDP_STATE_DICT_TYPE", None),
    "fsdp_activation_checkpointing": ("FSDP_ACTIVATION_CHECKPOINTING", False),
}


class AccelerateFile(NamedTuple):
    """What accelerate makes of a file.

    Attributes:
        variables: the environment of each process, WORLD_SIZE and LOCAL_WORLD_SIZE included.
        device: "gpu" or "cpu", where the file says it; None where it is whatever the machine has.
        launcher: of LAUNCHERS, who starts the processes; "" where the file cannot be used.
        one_line: whether one command on the first machine starts all of them (DeepSpeed's own launchers).
        rendezvous: what the file says of machine_rank, main_process_ip and main_process_port.
        path: the file.
    """

    variables: dict[str, str]
    device: str | None = None
    launcher: str = ""
    one_line: bool = False
    rendezvous: Mapping[str, Any] = {}
    path: Path | None = None


NO_FILE = AccelerateFile({})


def default_file(environ: Mapping[str, str] = os.environ) -> Path | None:
    """The file that `accelerate config` writes and `accelerate launch` reads unasked; None where there is none."""
    cache = environ.get("XDG_CACHE_HOME", str(Path.home() / ".cache"))
    home = environ.get("HF_HOME", f"{cache}/huggingface")
    file = Path(home) / "accelerate" / "default_config.yaml"
    try:
        return file if file.is_file() else None
    except OSError:  # a folder that this user may not look into
        return None


def planned_launcher(settings: Settings, environ: Mapping[str, str], out: Findings) -> Launcher:
    """What a launcher has decided here; where none has started this process, what --accelerate_config will."""
    launcher, file = read_launcher(environ, out), settings.get("accelerate_config")
    if launcher.started or file is None:
        return launcher
    gpus, nodes = settings.get("num_gpus"), settings.get("num_nodes")
    found = read_file(Path(os.path.expanduser(file)), out, (gpus * nodes, nodes) if gpus else None)
    return replace(read_launcher({**found.variables, **environ}, out), started=False, device=found.device)


def read_file(path: Path, out: Findings, world: tuple[int, int] | None = None) -> AccelerateFile:
    """What `accelerate launch --config_file path` would start.

    Args:
        world: (processes, machines) where the command line decides them, as accelerate's own flags would.
    """
    data = _read(path, out)
    if data is None or not _accepted(data, path, out):
        return NO_FILE
    kind = data["distributed_type"] or "NO"  # YAML reads a bare NO as false
    launcher = LAUNCHERS[kind]
    processes, machines = world or _world(data, launcher, out)
    variables = {"WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes // machines)}
    variables["ACCELERATE_MIXED_PRECISION"] = str(_precision(data)).lower()
    dynamo = _block(data, "dynamo_config").get("dynamo_backend", data.get("dynamo_backend"))
    if dynamo and launcher != "deepspeed":  # whose launcher does not pass it on
        variables["ACCELERATE_DYNAMO_BACKEND"] = str(dynamo)
    if launcher == "simple":
        variables["ACCELERATE_USE_CPU"] = str(bool(data.get("use_cpu")))
    elif launcher == "deepspeed":
        own = _block(data, "deepspeed_config")
        variables["ACCELERATE_USE_DEEPSPEED"] = "true"
        fields = [*own, *(["mixed_precision"] if data.get("mixed_precision") else [])]
        variables["ACCELERATE_CONFIG_DS_FIELDS"] = ",".join(map(str, fields)).lower()
        variables |= {
            _DEEPSPEED[key]: str(value) for key, value in own.items() if key in _DEEPSPEED and value is not None
        }
    elif launcher == "fsdp":
        variables |= {"ACCELERATE_USE_FSDP": "true"} | _fsdp(_block(data, "fsdp_config"), out)
    elif launcher == "megatron":
        variables["ACCELERATE_USE_MEGATRON_LM"] = "true"
    elif launcher == "xla":
        variables["PJRT_DEVICE"] = "TPU"
    if launcher in ("torchrun", "fsdp", "deepspeed", "megatron"):
        parallel = _block(data, "parallelism_config")
        variables |= {str(key).upper(): str(value) for key, value in parallel.items()}
    plural = machines > 1 and launcher == "deepspeed"
    one_line = plural and _block(data, "deepspeed_config").get("deepspeed_multinode_launcher") != "standard"
    rendezvous = {key: data[key] for key in _RENDEZVOUS if data.get(key) is not None}
    return AccelerateFile(variables, _device(data, kind), launcher, one_line, rendezvous, path)


def _read(path: Path, out: Findings) -> Mapping[str, Any] | None:
    """The keys of accelerate's own file; None and a problem where it cannot be read."""
    fix = "Give accelerate's own file, as `accelerate config` writes it."
    try:
        data, _ = load_yaml(read_small(path))
    except Unreadable as error:
        out.problem("accelerate_config", str(path)[:200], f"{error}", fix, id="accelerate-config-unreadable")
        return None
    if not isinstance(data, Mapping):
        why = f"{path} holds no keys."
        out.problem("accelerate_config", show(data), why, fix, id="accelerate-config-without-keys")
        return None
    return data


def _block(data: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    block = data.get(name)
    return block if isinstance(block, Mapping) else {}


def _precision(data: Mapping[str, Any]) -> Any:
    return data.get("mixed_precision") or ("fp16" if data.get("fp16") else "no")


def _accepted(data: Mapping[str, Any], path: Path, out: Findings) -> bool:
    """Whether accelerate takes the file; a problem for each reason why not."""
    before = len(out.problems)

    def refuse(key: str, found: str, why: str, fix: str) -> None:
        out.problem(key, f"{found} in {path.name}", why, fix, id="accelerate-refuses-the-file")

    service = data.get("compute_environment", "LOCAL_MACHINE")
    if service != "LOCAL_MACHINE":
        why = "Only local machines and clusters are known here."
        out.problem("compute_environment", show(service), why, "Use LOCAL_MACHINE.", id="compute-environment-unknown")
        return False
    for key in data:
        if key not in KEYS:
            guess = near(str(key), KEYS)
            fix = f"Did you mean {guess}?" if guess else "Remove it."
            refuse(str(key), show(data[key]), "accelerate has no such key, and refuses the file.", fix)
    kind = data.get("distributed_type")
    if kind is not False and kind not in LAUNCHERS:  # false: a bare NO
        found = "nothing" if kind is None else show(kind)
        refuse("distributed_type", found, "accelerate does not know it.", f"Write one of {', '.join(LAUNCHERS)}.")
    written = data.get("mixed_precision")
    if written is False:
        refuse("mixed_precision", "no", "YAML reads a bare no as false, and accelerate refuses it.", 'Write "no".')
    elif written is not None and str(written).lower() not in PRECISIONS:
        refuse("mixed_precision", show(written), "accelerate does not know it.", 'Write "bf16" or "no".')
    ids = data.get("gpu_ids")
    if ids is not None and not isinstance(ids, str):
        refuse("gpu_ids", show(ids), "accelerate takes text.", f'Write "{ids}", or all.')
    elif str(kind) in _OF_TORCHRUN and "," not in (ids or ",") and ids != "all" and data.get("num_machines", 1) == 1:
        refuse("gpu_ids", show(ids), f"{kind} wants two GPUs or more.", "Write all, or distributed_type: NO.")
    return len(out.problems) == before


def _world(data: Mapping[str, Any], launcher: str, out: Findings) -> tuple[int, int]:
    """(processes, machines) that accelerate starts."""
    if launcher == "simple" and not _block(data, "mpirun_config").get("mpirun_hostfile"):
        if (asked := data.get("num_processes")) not in (None, 1):
            out.note(
                f"accelerate starts 1 process for distributed_type {data['distributed_type'] or 'NO'}, not {asked}."
            )
        return 1, 1
    numbers = {"num_processes": data.get("num_processes", -1), "num_machines": data.get("num_machines", 1)}
    for name, value in numbers.items():
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            found = "nothing" if value in (None, -1) else show(value)
            why = "accelerate wants it, in the file or on the command line."
            fix = f"Write {name}: 8, say, into the file, or --num_gpus."
            out.problem(name, found, why, fix, id="accelerate-config-without-a-world")
            return 1, 1
    machines = numbers["num_machines"]
    processes = numbers["num_processes"] // machines * machines  # each machine gets as many
    if processes == 0:
        found, why = f"{numbers['num_processes']} on {machines} machines", "A machine would have no process."
        out.problem("num_processes", found, why, f"Write {machines} or more.", id="accelerate-config-without-a-world")
        return 1, 1
    return processes, machines


def _device(data: Mapping[str, Any], kind: str) -> str | None:
    """Where the file says that it will run. Only the simple launcher obeys use_cpu (utils/launch.py)."""
    if LAUNCHERS[kind] != "simple":
        return "gpu"
    if data.get("use_cpu"):
        return "cpu"
    if kind == "MULTI_CPU":
        return None
    return "gpu" if "use_cpu" in data or _precision(data) == "fp16" else None


def _fsdp(block: Mapping[str, Any], out: Findings) -> dict[str, str]:
    """The variables of an FSDP block, with accelerate's defaults; old files have its keys without the prefix."""
    own = {key if key.startswith("fsdp") else f"fsdp_{key}": value for key, value in block.items()}
    loads = own.get("fsdp_cpu_ram_efficient_loading", True)
    if str(loads).lower() == "true" and own.get("fsdp_sync_module_states", True) in (False, None, ""):
        why = "accelerate loads on one rank only where the ranks are made equal afterwards."
        fix = "Write fsdp_sync_module_states: true."
        out.problem("fsdp_sync_module_states", "false", why, fix, id="accelerate-refuses-the-file")
    variables = {}
    for key, (variable, default) in _FSDP.items():
        value = own.get(key, default)
        if value is not None:
            variables[variable] = str(value)
    return variables
