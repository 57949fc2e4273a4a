"""What DeepSpeed's own configuration class reads back from a plan, in the planned world. Imports deepspeed."""

from __future__ import annotations

import copy
import importlib.util
import logging
from importlib.metadata import version
from typing import Any

from pydantic import ValidationError

from hf_mamba.findings import Findings, first_line
from hf_mamba.plan import Plan
from hf_mamba.preflight.deepspeed.keys import DEEPSPEED_VERSION
from hf_mamba.private.deepspeed import world_of


def read_back(ds_config: dict[str, Any], world_size: int) -> dict[str, Any]:
    """The numbers of DeepSpeedConfig(ds_config) in a world of that size; its own error otherwise."""
    config_dict = copy.deepcopy(ds_config)
    config_dict.get("aio", {}).pop("use_gds", None)  # asserts a GPU in this machine; the run may be for another
    previous = logging.root.manager.disable
    logging.disable(logging.WARNING)  # DeepSpeed speaks at import and at every read
    try:
        from deepspeed.runtime.config import DeepSpeedConfig

        with world_of(world_size):
            config = DeepSpeedConfig(config_dict)
    finally:
        logging.disable(previous)
    return {
        "train_batch_size": config.train_batch_size,
        "train_micro_batch_size_per_gpu": config.train_micro_batch_size_per_gpu,
        "gradient_accumulation_steps": config.gradient_accumulation_steps,
        "zero_stage": int(config.zero_optimization_stage),
        "gradient_clipping": config.gradient_clipping,
        "bf16": config.bfloat16_config.enabled,
        "fp16": config.float16_config.enabled,
    }


def check_readback(plan: Plan, out: Findings) -> dict[str, Any] | None:
    """What DeepSpeed reads; a problem where it is not exactly the plan's numbers (a defect of ours: please report).

    Without a DeepSpeed file the batch alone is read, so that the same run could be given one.
    """
    ds_config = plan.ds_config
    if importlib.util.find_spec("deepspeed") is None:
        if ds_config is not None:
            _not_installed(plan, out)
        return None
    if ds_config is None:
        ds_config = {
            "train_micro_batch_size_per_gpu": plan.micro_batch_size,
            "gradient_accumulation_steps": plan.gradient_accumulation_steps,
            "bf16": {"enabled": plan.dtype == "bf16"},
            "fp16": {"enabled": plan.dtype == "fp16"},
        }
    wanted = {
        "train_batch_size": plan.global_batch_size,
        "train_micro_batch_size_per_gpu": plan.micro_batch_size,
        "gradient_accumulation_steps": plan.gradient_accumulation_steps,
        "bf16": plan.dtype == "bf16",
        "fp16": plan.dtype == "fp16",
    }
    try:
        read = read_back(ds_config, plan.world_size)
    except Exception as error:
        installed, fix = version("deepspeed"), "Report this file."
        if installed != DEEPSPEED_VERSION:
            fix = f"Remove what it does not know, or install deepspeed {DEEPSPEED_VERSION}, whose keys are taken here."
        why = f"The installed DeepSpeed, {installed}, refuses the resolved file."
        out.problem("deepspeed", _reason(error), why, fix, id="deepspeed-refuses-the-file")
        return None
    found = ", ".join(f"{key}={read[key]}" for key in wanted if read[key] != wanted[key])
    if found:
        why = "DeepSpeed reads other numbers than planned."
        out.problem("deepspeed", found, why, "Report this file.", id="deepspeed-reads-other-numbers")
        return read
    return read


def _reason(error: Exception) -> str:
    """Every key that DeepSpeed's classes refuse; of another error, the first line."""
    if not isinstance(error, ValidationError):
        return first_line(error)
    return "; ".join(f"{'.'.join(map(str, each['loc']))}: {each['msg']}" for each in error.errors())


def _not_installed(plan: Plan, out: Findings) -> None:
    """DeepSpeed is missing for a run with it: a note where another machine will run it."""
    import torch

    if plan.device == "gpu" and not torch.cuda.is_available():
        out.note("DeepSpeed is not installed on this machine, so that it has not read its numbers back.")
        return
    out.problem(
        "deepspeed",
        "a DeepSpeed file",
        "DeepSpeed is not installed on this machine.",
        "pip install deepspeed, or leave --deepspeed out.",
        id="deepspeed-not-installed",
    )
