"""accelerate's own configuration file, as the environment variables that `accelerate launch` makes of it.

So that its file, its flags and a launched process are read by the same code (launcher.py).
Sources: accelerate/commands/launch.py, accelerate/utils/launch.py, accelerate/commands/config/config_args.py.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hf_mamba.files import Unreadable, load_yaml, read_small
from hf_mamba.findings import Findings
from hf_mamba.preflight.kinds import show

# Key of the file -> the variable it becomes. "deepspeed_config." keys are exported under DEEPSPEED only.
VARIABLES: dict[str, str] = {
    "mixed_precision": "ACCELERATE_MIXED_PRECISION",
    "use_cpu": "ACCELERATE_USE_CPU",
    "num_processes": "WORLD_SIZE",
    "deepspeed_config.zero_stage": "ACCELERATE_DEEPSPEED_ZERO_STAGE",
    "deepspeed_config.gradient_accumulation_steps": "ACCELERATE_GRADIENT_ACCUMULATION_STEPS",
    "deepspeed_config.gradient_clipping": "ACCELERATE_GRADIENT_CLIPPING",
    "deepspeed_config.offload_optimizer_device": "ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE",
    "deepspeed_config.offload_param_device": "ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE",
    "deepspeed_config.zero3_save_16bit_model": "ACCELERATE_DEEPSPEED_ZERO3_SAVE_16BIT_MODEL",
    "deepspeed_config.deepspeed_config_file": "ACCELERATE_DEEPSPEED_CONFIG_FILE",
    "parallelism_config.parallelism_config_tp_size": "PARALLELISM_CONFIG_TP_SIZE",
    "parallelism_config.parallelism_config_cp_size": "PARALLELISM_CONFIG_CP_SIZE",
    "parallelism_config.parallelism_config_sp_size": "PARALLELISM_CONFIG_SP_SIZE",
}
_SWITCHES = {
    "DEEPSPEED": "ACCELERATE_USE_DEEPSPEED",
    "FSDP": "ACCELERATE_USE_FSDP",
    "MEGATRON_LM": "ACCELERATE_USE_MEGATRON_LM",
}


def default_file(environ: Mapping[str, str] = os.environ) -> Path | None:
    """The file that `accelerate config` writes and `accelerate launch` reads unasked; None where there is none."""
    cache = environ.get("XDG_CACHE_HOME", str(Path.home() / ".cache"))
    home = environ.get("HF_HOME", f"{cache}/huggingface")
    file = Path(home) / "accelerate" / "default_config.yaml"
    try:
        return file if file.is_file() else None
    except OSError:  # a folder that this user may not look into
        return None


def _read(path: Path, out: Findings) -> Mapping[str, Any]:
    """The keys of accelerate's own file; a problem where it cannot be read."""
    try:
        data, _ = load_yaml(read_small(path))
    except Unreadable as error:
        fix = "Run `accelerate config` again."
        out.problem("accelerate_config", str(path)[:200], f"{error}", fix, id="accelerate-config-unreadable")
        return {}
    if not isinstance(data, Mapping):
        out.problem(
            "accelerate_config",
            show(data),
            f"{path} holds no keys.",
            "Run `accelerate config` again.",
            id="accelerate-config-without-keys",
        )
        return {}
    return data


def environment(path: Path, out: Findings) -> dict[str, str]:
    """The variables that `accelerate launch --config_file path` would set."""
    data = _read(path, out)
    if str(data.get("compute_environment", "LOCAL_MACHINE")) != "LOCAL_MACHINE":
        found = data.get("compute_environment")
        out.problem(
            "compute_environment",
            show(found),
            "Only local machines and clusters are known here.",
            "Use LOCAL_MACHINE.",
            id="compute-environment-unknown",
        )
        return {}
    kind = str(data.get("distributed_type", "NO"))
    variables = {_SWITCHES[kind]: "true"} if kind in _SWITCHES else {}
    for key, variable in VARIABLES.items():
        block, _, name = key.rpartition(".")
        values = data.get(block, {}) if block else data
        if block == "deepspeed_config" and kind != "DEEPSPEED":
            continue
        if isinstance(values, Mapping) and values.get(name) is not None:
            variables[variable] = str(values[name])
    return variables
