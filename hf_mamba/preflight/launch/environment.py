"""What a launcher has already decided: torchrun's and accelerate's environment variables, as plain values.

`accelerate launch` turns its flags and its own configuration file into ACCELERATE_* variables
(accelerate/utils/launch.py); DeepSpeedPlugin and TrainingArguments read some of them, and ignore others without a word
where a DeepSpeed file is given.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from hf_mamba.findings import Findings
from hf_mamba.preflight.batch import Given
from hf_mamba.preflight.kinds import show

_DEEPSPEED = "ACCELERATE_DEEPSPEED_"

# accelerate's variable -> (dotted DeepSpeed key, kind): what a DeepSpeed file must agree with.
DEEPSPEED_VARIABLES: dict[str, tuple[str, str]] = {
    f"{_DEEPSPEED}ZERO_STAGE": ("zero_optimization.stage", "int"),
    f"{_DEEPSPEED}OFFLOAD_OPTIMIZER_DEVICE": ("zero_optimization.offload_optimizer.device", "str"),
    f"{_DEEPSPEED}OFFLOAD_PARAM_DEVICE": ("zero_optimization.offload_param.device", "str"),
    f"{_DEEPSPEED}OFFLOAD_OPTIMIZER_NVME_PATH": ("zero_optimization.offload_optimizer.nvme_path", "str"),
    f"{_DEEPSPEED}OFFLOAD_PARAM_NVME_PATH": ("zero_optimization.offload_param.nvme_path", "str"),
    f"{_DEEPSPEED}ZERO3_SAVE_16BIT_MODEL": ("zero_optimization.stage3_gather_16bit_weights_on_model_save", "bool"),
    "ACCELERATE_GRADIENT_CLIPPING": ("gradient_clipping", "float"),
}

# accelerate's parallelism_config -> what it is; only data-parallel dimensions leave a Mamba whole.
_PARALLEL_VARIABLES = ("PARALLELISM_CONFIG_TP_SIZE", "PARALLELISM_CONFIG_CP_SIZE", "PARALLELISM_CONFIG_SP_SIZE")


@dataclass(frozen=True)
class Launcher:
    """The launcher's decisions; everything None or empty where no launcher is at work."""

    world_size: int | None = None
    mixed_precision: str = "no"
    use_cpu: bool = False
    use_deepspeed: bool = False
    fsdp: dict[str, str] | None = None  # keys of accelerate's fsdp_config -> text; None: no FSDP
    use_megatron: bool = False
    use_xla: bool = False
    nodes: int = 1
    device: str | None = None  # where accelerate's own file says that the run will be
    started: bool = False  # whether this process is the launcher's, and not a plan for one
    compiles: str = ""  # torch.compile's backend, where accelerate compiles the model
    config_file: str | None = None
    deepspeed_keys: dict[str, Any] = field(default_factory=dict)  # dotted key -> value
    accumulation: list[Given] = field(default_factory=list)
    model_parallel: dict[str, int] = field(default_factory=dict)
    config_fields: str = ""  # DeepSpeed fields of accelerate's own file: it refuses them beside a DeepSpeed file


def _flag(environ: Mapping[str, str], name: str) -> bool:
    return environ.get(name, "false").lower() in ("1", "true", "yes", "y", "t", "on")


def _whole(environ: Mapping[str, str], name: str, out: Findings) -> int | None:
    text = environ.get(name, "").strip()
    if not text or text.lower() in ("none", "auto"):
        return None
    if not text.isdigit() or int(text) == 0:
        out.problem(
            name,
            show(text),
            "It is not a whole number > 0.",
            f"Correct {name} in the environment.",
            id="environment-not-a-count",
        )
        return None
    return int(text)


def _deepspeed_keys(environ: Mapping[str, str], out: Findings) -> dict[str, Any]:
    keys: dict[str, Any] = {}
    convert: dict[str, Callable[[str], Any]] = {
        "int": int,
        "float": float,
        "str": str,
        "bool": lambda text: text.lower() == "true",
    }
    for name, (key, kind) in DEEPSPEED_VARIABLES.items():
        text = environ.get(name, "").strip()
        if not text or text.lower() in ("none", "auto"):
            continue
        try:
            keys[key] = convert[kind](text)
        except ValueError:
            out.problem(
                name,
                show(text),
                "It is not a number.",
                f"Correct {name} in the environment.",
                id="environment-not-a-number",
            )
    return keys


def _fsdp_keys(environ: Mapping[str, str]) -> dict[str, str]:
    """FSDP's variables by the names of accelerate's file."""
    keys = {name.lower(): text for name, text in environ.items() if name.startswith("FSDP_") and text != "None"}
    if "fsdp_transformer_cls_to_wrap" in keys:
        keys["fsdp_transformer_layer_cls_to_wrap"] = keys.pop("fsdp_transformer_cls_to_wrap")
    return keys


def is_started(environ: Mapping[str, str]) -> bool:
    """Whether a launcher (accelerate, torchrun, deepspeed) has started this process."""
    return "ACCELERATE_MIXED_PRECISION" in environ or "WORLD_SIZE" in environ


def read_launcher(environ: Mapping[str, str], out: Findings) -> Launcher:
    """The launcher's decisions out of an environment."""
    accumulation = _whole(environ, "ACCELERATE_GRADIENT_ACCUMULATION_STEPS", out)
    name = "gradient_accumulation_steps"
    world, local = _whole(environ, "WORLD_SIZE", out), _whole(environ, "LOCAL_WORLD_SIZE", out)
    compiles = environ.get("ACCELERATE_DYNAMO_BACKEND", "no").lower()
    deepspeed = _flag(environ, "ACCELERATE_USE_DEEPSPEED")
    config_file = environ.get(f"{_DEEPSPEED}CONFIG_FILE", "none")
    return Launcher(
        world_size=world,
        mixed_precision=environ.get("ACCELERATE_MIXED_PRECISION", "no").lower(),
        use_cpu=_flag(environ, "ACCELERATE_USE_CPU"),
        use_deepspeed=deepspeed,
        fsdp=_fsdp_keys(environ) if _flag(environ, "ACCELERATE_USE_FSDP") else None,
        use_megatron=_flag(environ, "ACCELERATE_USE_MEGATRON_LM"),
        use_xla=environ.get("PJRT_DEVICE") == "TPU",
        nodes=world // local if world and local else 1,
        started=is_started(environ),
        compiles="" if compiles in ("no", "none", "") else compiles,
        config_file=config_file if deepspeed and config_file.lower() != "none" else None,
        deepspeed_keys=_deepspeed_keys(environ, out) if deepspeed else {},
        accumulation=[Given(accumulation, f"{name} of accelerate launch", name)] if accumulation else [],
        config_fields=environ.get("ACCELERATE_CONFIG_DS_FIELDS", "") if deepspeed else "",
        model_parallel={
            key.lower(): size for key in _PARALLEL_VARIABLES if (size := _whole(environ, key, out) or 1) > 1
        },
    )


def agreeing_environment(launcher: Launcher, dtype: str, deepspeed: bool) -> dict[str, str]:
    """The launcher's variables that must change so that accelerate does what the plan says, and nothing else.

    Their content is part of the plan by now, and a difference has been named.
    """
    changes: dict[str, str] = {}
    wanted = dtype if dtype != "fp32" else "no"
    if launcher.mixed_precision not in (wanted, "none", ""):
        changes["ACCELERATE_MIXED_PRECISION"] = wanted
    if deepspeed and launcher.config_fields:
        changes["ACCELERATE_CONFIG_DS_FIELDS"] = ""
    return changes
