"""Fully sharded data parallelism: what accelerate's variables or --fsdp and --fsdp_config ask for, as part of the plan.

Read from accelerate 1.15 (utils/dataclasses.py, FullyShardedDataParallelPlugin; state.py, AcceleratorState) and
transformers 5.23 (training_args.py, _process_fsdp_args).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from hf_mamba.family import family_of
from hf_mamba.files import read_small
from hf_mamba.findings import Findings
from hf_mamba.plan import FsdpPlan
from hf_mamba.preflight.kinds import show
from hf_mamba.preflight.launch.environment import Launcher
from hf_mamba.preflight.settings import Settings
from hf_mamba.preflight.world import World

SHARDINGS = ("FULL_SHARD", "SHARD_GRAD_OP", "NO_SHARD", "HYBRID_SHARD", "HYBRID_SHARD_ZERO2")
WRAPPINGS = ("TRANSFORMER_BASED_WRAP", "SIZE_BASED_WRAP", "NO_WRAP")
STATE_DICTS = ("FULL_STATE_DICT", "LOCAL_STATE_DICT", "SHARDED_STATE_DICT")
CLASSES = "fsdp_transformer_layer_cls_to_wrap"


def decide_fsdp(
    settings: Settings,
    launcher: Launcher,
    world: World,
    model_config: Mapping[str, Any] | None,
    out: Findings,
) -> FsdpPlan | None:
    """The run's FSDP; None where it has none, with a note where accelerate leaves it out on a CPU."""
    before = len(out.problems)
    if settings.get("fsdp"):
        keys = _of_arguments(settings, out)
    elif launcher.fsdp is not None:
        keys = launcher.fsdp
    else:
        return None
    if left_out(world):
        out.note("On CPUs accelerate runs FSDP as plain data parallelism, and says nothing: nothing is sharded.")
        return None
    plan = _read(keys, out)
    return None if len(out.problems) > before else _wrap(plan, model_config, out)


def left_out(world: World) -> bool:
    """Whether accelerate leaves FSDP out without a word (state.py, AcceleratorState)."""
    return world.device == "cpu"


def _of_arguments(settings: Settings, out: Findings) -> dict[str, Any]:
    """--fsdp and --fsdp_config by the names of accelerate's file, with transformers' defaults."""
    try:
        own = _config(settings)
    except (ValueError, RecursionError) as error:
        found = show(settings.get("fsdp_config"))
        out.problem("fsdp_config", found, f"{error}", "Give a JSON file, or a block.", id="fsdp-refused")
        own = {}
    keys = {f"fsdp_{str(key).removeprefix('fsdp_')}": value for key, value in own.items()}
    keys = {"fsdp_version": 2, "fsdp_state_dict_type": "FULL_STATE_DICT"} | keys
    keys.setdefault("fsdp_auto_wrap_policy", WRAPPINGS[0])
    keys.setdefault("fsdp_offload_params", keys.get("fsdp_cpu_offload", False))
    words = settings.get("fsdp")
    for word in words.split() if isinstance(words, str) else words if isinstance(words, list) else ():
        if word.upper() in SHARDINGS:
            keys.setdefault("fsdp_sharding_strategy", word.upper())
            keys.setdefault("fsdp_reshard_after_forward", word.upper() == "FULL_SHARD")
        elif word == "offload":
            keys["fsdp_offload_params"] = True
        elif word.lower() not in ("auto_wrap", "true"):
            out.problem("fsdp", show(word), "transformers does not know it.", "Write full_shard.", id="fsdp-refused")
    if str(keys["fsdp_version"]) == "1":  # whose strategy has the other key's name in transformers
        keys["fsdp_sharding_strategy"] = keys.get("fsdp_reshard_after_forward", "full_shard")
    return keys


def _config(settings: Settings) -> dict[str, Any]:
    """--fsdp_config, which is a block, its JSON, or a file of it; ValueError where it is none of them."""
    own = settings.get("fsdp_config") or {}
    if isinstance(own, str):
        own = json.loads(own if own.lstrip().startswith("{") else read_small(own))
    return dict(own)


def _truth(value: Any) -> bool | None:
    """What accelerate reads as true or false; None where it refuses."""
    return {
        "true": True,
        "1": True,
        "yes": True,
        "on": True,
        "false": False,
        "0": False,
        "no": False,
        "off": False,
    }.get(str(value).lower())


def _read(keys: Mapping[str, Any], out: Findings) -> FsdpPlan:
    """The keys of an FSDP block as a plan; a problem for each that accelerate's plugin refuses."""

    def refuse(key: str, why: str, fix: str) -> None:
        out.problem(key, show(keys.get(key)), why, fix, id="fsdp-refused")

    def word(key: str, words: tuple[str, ...], default: str) -> str:
        text = str(keys.get(key) or default).upper()
        if text.isdigit() and 1 <= int(text) <= len(words):
            text = words[int(text) - 1]
        if text not in words:
            refuse(key, "accelerate does not know it.", f"Write one of {', '.join(words)}.")
        return text

    def switch(key: str, default: bool) -> bool:
        value = _truth(keys.get(key, default))
        if value is None:
            refuse(key, "It is true or false.", "Write true or false.")
        return bool(value)

    version = str(keys.get("fsdp_version") or 1)
    if version not in ("1", "2"):
        refuse("fsdp_version", "There are FSDP 1 and 2.", "Write 2.")
    if version == "2":
        again = switch("fsdp_reshard_after_forward", True)
        sharding = SHARDINGS[0] if again else SHARDINGS[1]
    else:
        sharding = word("fsdp_sharding_strategy", SHARDINGS, SHARDINGS[0])
    least = str(keys.get("fsdp_min_num_params") or 0)
    if not least.isdigit():
        refuse("fsdp_min_num_params", "It is a number of parameters.", "Write a whole number.")
    classes = keys.get(CLASSES) or ()
    return FsdpPlan(
        version=2 if version == "2" else 1,
        sharding=sharding,
        offload=switch("fsdp_offload_params", False),
        wrapping=word("fsdp_auto_wrap_policy", WRAPPINGS, "NO_WRAP"),
        wrapped=classes.split(",") if isinstance(classes, str) else list(classes),
        min_num_params=int(least) if least.isdigit() else 0,
        state_dict_type=word("fsdp_state_dict_type", STATE_DICTS, STATE_DICTS[0 if version == "1" else 2]),
        activation_checkpointing=switch("fsdp_activation_checkpointing", False),
    )


def _wrap(plan: FsdpPlan, model_config: Mapping[str, Any] | None, out: Findings) -> FsdpPlan:
    """The plan with this model's own blocks as the classes that are wrapped."""
    if plan.wrapping != WRAPPINGS[0]:
        if plan.wrapping == "NO_WRAP":
            out.note("FSDP wraps the whole model as one (NO_WRAP): every rank gathers all weights at once.")
        return plan.replace(wrapped=[])
    blocks = list(family_of(model_config).blocks) if model_config is not None else []
    if not blocks or plan.wrapped == blocks:
        return plan
    if plan.wrapped and not set(plan.wrapped) <= set(blocks):
        named = ", ".join(plan.wrapped)
        out.note(f"{CLASSES} {named} is another model's layer: {', '.join(blocks)} is wrapped, which is this one's.")
    return plan.replace(wrapped=blocks)


def agreeing_variables(plan: FsdpPlan | None, launcher: Launcher) -> dict[str, str]:
    """The variables that make accelerate's plugin the planned one."""
    if plan is None or launcher.fsdp is None or not plan.wrapped:
        return {}
    return {"FSDP_TRANSFORMER_CLS_TO_WRAP": ",".join(plan.wrapped)}


def agreeing_arguments(plan: FsdpPlan | None, settings: Settings) -> dict[str, Any]:
    """--fsdp_config with the classes that are wrapped, where the flags ask for FSDP."""
    if plan is None or not settings.get("fsdp") or not plan.wrapped:
        return {}
    kept = {
        key: value for key, value in _config(settings).items() if not str(key).endswith("transformer_layer_cls_to_wrap")
    }
    return {"fsdp_config": {**kept, "transformer_layer_cls_to_wrap": plan.wrapped}}
