"""What today's stack makes of a DeepSpeed configuration: its own classes, called in its own order, in this process.

TrainingArguments.__post_init__   HfTrainerDeepSpeedConfig, trainer_config_process
                                  DeepSpeedPlugin
Accelerator.__init__              DeepSpeedPlugin.set_mixed_precision
Trainer.train                     trainer_config_finalize
Accelerator._prepare_deepspeed    deepspeed_config_process
deepspeed.initialize              DeepSpeedConfig, in a world of the given size
"""

import contextlib
import copy
import io
import logging
import math
import os
import warnings
from types import SimpleNamespace
from typing import Any

os.environ.setdefault("DS_ACCELERATOR", "cpu")

from accelerate.utils import DeepSpeedPlugin
from deepspeed.runtime.config import DeepSpeedConfig
from transformers.integrations.deepspeed import HfTrainerDeepSpeedConfig, unset_hf_deepspeed_config

from hf_mamba.private.deepspeed import world_of

logging.getLogger("DeepSpeed").setLevel(logging.CRITICAL)
logging.getLogger("accelerate").setLevel(logging.CRITICAL)

# TrainingArguments' own defaults for what the configuration is compared with.
DEFAULTS: dict[str, Any] = {
    "per_device_train_batch_size": 8,
    "gradient_accumulation_steps": 1,
    "max_grad_norm": 1.0,
    "learning_rate": 5e-5,
    "adam_beta1": 0.9,
    "adam_beta2": 0.999,
    "adam_epsilon": 1e-8,
    "weight_decay": 0.0,
    "warmup_steps": 0,
    "bf16": False,
    "fp16": False,
    "bf16_full_eval": False,
    "fp16_full_eval": False,
    "save_on_each_node": False,
}


class Refused(Exception):
    """The stack raises; the message is its own."""


def _arguments(given: dict[str, Any], world: int) -> SimpleNamespace:
    values = {**DEFAULTS, **{name: given[name] for name in DEFAULTS if given.get(name) is not None}}
    arguments = SimpleNamespace(world_size=world, **values)
    arguments.get_warmup_steps = lambda steps: (
        int(arguments.warmup_steps) if arguments.warmup_steps >= 1 else math.ceil(steps * arguments.warmup_steps)
    )
    return arguments


def run_stack(ds_config: Any, given: dict[str, Any], world: int, hidden_size: int, steps: int) -> DeepSpeedConfig:
    """The DeepSpeedConfig that the engine would get; Refused with the stack's own message."""
    arguments = _arguments(given, world)
    precision = "fp16" if arguments.fp16 else "bf16" if arguments.bf16 else "no"
    model = SimpleNamespace(config=SimpleNamespace(hidden_size=hidden_size))
    try:
        with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings(), world_of(world):
            warnings.simplefilter("ignore")
            hf = HfTrainerDeepSpeedConfig(copy.deepcopy(ds_config))
            hf.trainer_config_process(arguments)
            plugin = DeepSpeedPlugin(hf_ds_config=hf)
            plugin.set_mixed_precision(precision)
            hf.trainer_config_finalize(arguments, model, steps)
            plugin.fill_match(
                "gradient_accumulation_steps",
                must_match=False,
                gradient_accumulation_steps=arguments.gradient_accumulation_steps,
            )
            micro = plugin.get_value("train_micro_batch_size_per_gpu")
            filled = {"gradient_clipping": 1.0, "zero_optimization.stage3_gather_16bit_weights_on_model_save": False}
            if micro is not None:
                filled["train_micro_batch_size_per_gpu"] = micro
                filled["train_batch_size"] = micro * plugin.get_value("gradient_accumulation_steps") * world
            plugin.deepspeed_config_process(must_match=False, **filled)
            return DeepSpeedConfig(plugin.deepspeed_config)
    except Exception as error:
        raise Refused(f"{type(error).__name__}: {error}") from error
    finally:
        unset_hf_deepspeed_config()


def numbers(config: DeepSpeedConfig) -> dict[str, Any]:
    """What the engine would do, under the names of a Plan."""

    def device(block: Any) -> str:
        return "none" if block is None else str(block.device)

    return {
        "micro_batch_size": config.train_micro_batch_size_per_gpu,
        "gradient_accumulation_steps": config.gradient_accumulation_steps,
        "global_batch_size": config.train_batch_size,
        "stage": int(config.zero_optimization_stage),
        "gradient_clipping": config.gradient_clipping,
        "bf16": config.bfloat16_config.enabled,
        "fp16": config.float16_config.enabled,
        "offload_optimizer": device(config.zero_config.offload_optimizer),
        "offload_param": device(config.zero_config.offload_param),
    }
