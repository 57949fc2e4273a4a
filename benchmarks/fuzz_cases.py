"""Runs for the fuzzer: DeepSpeed files, flags and worlds, drawn from what public files hold and users write.

The table is our own: keys of DeepSpeed's documentation with the values that people give them, the usual first, and the
ways in which such files go wrong (text in quotation marks, old names, misspellings, keys of other programs).
"""

from __future__ import annotations

import copy
import json
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hf_mamba.dotted import get, put
from hf_mamba.files import Unreadable, read_small

MODEL = {"hidden_size": 192, "num_hidden_layers": 2, "vocab_size": 512}
AUTO = "auto"
SIZES = ("auto", 2e8, 5e8, 1e9, 50_000_000, 500000, 1e5)

# chance that the block is there -> its keys, each with the chance that it is there and its values
BLOCKS: tuple[tuple[float, dict[str, tuple[float, tuple[Any, ...]]]], ...] = (
    (
        0.95,
        {
            "zero_optimization.stage": (0.97, (3, 2, 1, 0, 3, 2, AUTO)),
            "zero_optimization.overlap_comm": (0.6, (True, False)),
            "zero_optimization.contiguous_gradients": (0.6, (True, False)),
            "zero_optimization.reduce_bucket_size": (0.6, SIZES),
            "zero_optimization.allgather_bucket_size": (0.3, SIZES[1:]),
            "zero_optimization.allgather_partitions": (0.3, (True, False)),
            "zero_optimization.reduce_scatter": (0.3, (True, True, False)),
            "zero_optimization.sub_group_size": (0.3, (1e9, 1e12, 0)),
            "zero_optimization.stage3_max_live_parameters": (0.3, (1e9, 2e10, 0)),
            "zero_optimization.stage3_max_reuse_distance": (0.3, (1e9, 0)),
            "zero_optimization.stage3_prefetch_bucket_size": (0.3, SIZES),
            "zero_optimization.stage3_param_persistence_threshold": (0.3, (AUTO, 1e4, 1e6)),
            "zero_optimization.stage3_gather_16bit_weights_on_model_save": (0.3, (True, AUTO, False)),
            "zero_optimization.round_robin_gradients": (0.05, (True, False)),
            "zero_optimization.ignore_unused_parameters": (0.03, (True, False)),
            "zero_optimization.zero_hpz_partition_size": (0.03, (1, 2, 4, 8)),
            "zero_optimization.zero_quantized_weights": (0.03, (False, True)),
            "zero_optimization.zero_quantized_gradients": (0.03, (False, True)),
            "zero_optimization.elastic_checkpoint": (0.04, (True, False)),
            "zero_optimization.legacy_stage1": (0.02, (True, False)),
            "zero_optimization.load_from_fp32_weights": (0.02, (True, False)),
            "zero_optimization.compute_grad_norm": (0.02, (True, False)),
            "zero_optimization.mics_shard_size": (0.01, (-1, 8)),
            "zero_optimization.cpu_offload": (0.05, (True, False)),
            "zero_optimization.cpu_offload_params": (0.03, (True, False)),
            "zero_optimization.cpu_offload_use_pin_memory": (0.02, (True, False)),
            "zero_optimization.stage3_gather_fp16_weights_on_model_save": (0.04, (True, False)),
            "zero_optimization.gather_16bit_weights_on_model_save": (0.02, (True, False)),
            "zero_optimization.prefetch_bucket_size": (0.02, (1e6, 5e8)),
        },
    ),
    (
        0.35,
        {
            "zero_optimization.offload_optimizer.device": (0.97, ("cpu", "none", "cpu", "cpu", "none", AUTO, "nvme")),
            "zero_optimization.offload_optimizer.pin_memory": (0.7, (True, False)),
            "zero_optimization.offload_optimizer.nvme_path": (0.25, ("/tmp", "/local_nvme", AUTO)),
            "zero_optimization.offload_optimizer.buffer_count": (0.1, (4, 5)),
            "zero_optimization.offload_optimizer.fast_init": (0.1, (False, True)),
            "zero_optimization.offload_optimizer.pipeline_read": (0.05, (False, True)),
            "zero_optimization.offload_optimizer.ratio": (0.05, (1.0, 0.3)),
        },
    ),
    (
        0.2,
        {
            "zero_optimization.offload_param.device": (0.97, ("cpu", "none", "nvme", AUTO)),
            "zero_optimization.offload_param.pin_memory": (0.8, (True, False)),
            "zero_optimization.offload_param.nvme_path": (0.1, ("/tmp", AUTO)),
            "zero_optimization.offload_param.buffer_size": (0.1, (1e8, 1e9)),
            "zero_optimization.offload_param.max_in_cpu": (0.1, (1e9,)),
        },
    ),
    (
        0.7,
        {
            "bf16.enabled": (0.97, (AUTO, AUTO, True, False)),
            "bf16.loss_scale": (0.1, (0,)),
            "bf16.initial_scale_power": (0.08, (16, 10)),
            "bf16.hysteresis": (0.08, (2,)),
            "bf16.min_loss_scale": (0.08, (1,)),
            "bf16.immediate_grad_update": (0.02, (True, False)),
            "bf16.check_grad_overflow": (0.02, (True, False)),
        },
    ),
    (
        0.8,
        {
            "fp16.enabled": (0.97, (AUTO, AUTO, AUTO, False, True)),
            "fp16.loss_scale": (0.7, (0, 0, 128)),
            "fp16.loss_scale_window": (0.7, (1000, 500)),
            "fp16.initial_scale_power": (0.6, (16, 12, 32)),
            "fp16.hysteresis": (0.6, (2,)),
            "fp16.min_loss_scale": (0.6, (1, 1, 0, 0.5)),
            "fp16.auto_cast": (0.1, (False, True)),
            "fp16.opt_level": (0.03, ("O1", "O2")),
        },
    ),
    (
        0.5,
        {
            "optimizer.type": (0.995, (*("AdamW",) * 9, "Adam", "Adam", "adamw", "Lamb", "OneBitAdam", "SGD", "Muon")),
            "optimizer.params.lr": (0.95, (AUTO, AUTO, 2e-5, 1e-4, 3e-4, 0.001)),
            "optimizer.params.betas": (0.7, (AUTO, [0.9, 0.999], [0.9, 0.95], [0.8, 0.99])),
            "optimizer.params.eps": (0.7, (AUTO, 1e-8, 1e-6)),
            "optimizer.params.weight_decay": (0.8, (AUTO, 0, 0.01, 0.1, 3e-7)),
            "optimizer.params.torch_adam": (0.15, (True, False)),
            "optimizer.params.adam_w_mode": (0.1, (True, False)),
            "optimizer.params.bias_correction": (0.03, (True, False)),
            "optimizer.params.momentum": (0.02, (0.9,)),
            "optimizer.params.max_grad_norm": (0.03, (1.0, 0.5)),
        },
    ),
    (
        0.4,
        {
            "scheduler.type": (0.995, (*("WarmupLR", "WarmupDecayLR", "WarmupCosineLR") * 5, "OneCycle")),
            "scheduler.params.warmup_min_lr": (0.8, (AUTO, 0, 1e-6)),
            "scheduler.params.warmup_max_lr": (0.8, (AUTO, 2e-5, 1e-3)),
            "scheduler.params.warmup_num_steps": (0.9, (AUTO, 2, 5, 1000)),
            "scheduler.params.total_num_steps": (0.6, (AUTO, 10, 1000)),
            "scheduler.params.warmup_type": (0.2, ("linear", "log")),
            "scheduler.params.warmup_min_ratio": (0.05, (0.0, 0.1)),
            "scheduler.params.cos_min_ratio": (0.05, (0.1, 0.0001)),
            "scheduler.params.last_batch_iteration": (0.03, (-1,)),
        },
    ),
    (
        1.0,
        {
            "gradient_clipping": (0.75, (AUTO, AUTO, 1.0, 0.5, 0)),
            "steps_per_print": (0.7, (2000, 100, 10, AUTO, 1e5, float("inf"))),
            "wall_clock_breakdown": (0.7, (False, True)),
            "zero_allow_untested_optimizer": (0.15, (True, False)),
            "zero_force_ds_cpu_optimizer": (0.05, (False, True)),
            "communication_data_type": (0.05, ("fp32", "bf16", "fp16")),
            "prescale_gradients": (0.05, (False, True)),
            "gradient_predivide_factor": (0.02, (1.0, 2.0)),
            "dump_state": (0.03, (False, True)),
            "memory_breakdown": (0.03, (False, True)),
            "data_types": (0.03, ({"grad_accum_dtype": "fp32"}, {"grad_accum_dtype": "bf16"}, {"param_dtype": "bf16"})),
            "activation_checkpointing": (
                0.1,
                (
                    {"partition_activations": False, "cpu_checkpointing": False},
                    {"partition_activations": True, "number_checkpoints": 4},
                    {},
                ),
            ),
            "aio": (0.05, ({"block_size": 1048576, "queue_depth": 8, "thread_count": 1, "single_submit": False},)),
            "flops_profiler": (0.05, ({"enabled": False, "profile_step": 1}, {"enabled": True, "top_modules": 3})),
            "comms_logger": (0.03, ({"enabled": False, "verbose": False, "prof_all": False, "debug": False},)),
            "tensorboard": (0.03, ({"enabled": False}, {"enabled": True, "output_path": "logs"})),
            "wandb": (0.03, ({"enabled": False}, {"enabled": True, "project": "x"})),
            "checkpoint": (0.03, ({"load_universal": False}, {"use_node_local_storage": True}, {})),
            "compression_training": (0.02, ({"weight_quantization": {"shared_parameters": {"enabled": False}}}, {})),
            "autotuning": (0.02, ({"enabled": False}, {"fast": True}, {"enabled": True})),
            "curriculum_learning": (0.02, ({"enabled": False}, {"enabled": True})),
            "data_efficiency": (0.02, ({"enabled": False}, {"seed": 1234}, {"enabled": True})),
            "elasticity": (0.02, ({"enabled": False}, {"enabled": True, "max_train_batch_size": 64})),
            "sparse_attention": (0.01, ({"mode": "fixed", "block": 16},)),
            "amp": (0.02, ({"enabled": False}, {"enabled": True, "opt_level": "O1"})),
            "bfloat16": (0.04, ({"enabled": True}, {"enabled": AUTO})),
            "log": (0.02, ({"steps_per_print": 50},)),
            "offload_optimizer": (0.02, ({"device": "cpu"},)),
            "tensor_parallel": (0.01, ({"autotp_size": 1}, {"autotp_size": 2})),
            "sparse_gradients": (0.02, (False, True)),
            "fp32_allreduce": (0.02, (False, True)),
            "seed": (0.02, (42,)),
            "model": (0.01, ("some/model",)),
            "_comment": (0.05, ("our settings",)),
            "num_train_epochs": (0.01, (1,)),
        },
    ),
)
FLAGS: dict[str, tuple[float, tuple[Any, ...]]] = {
    "learning_rate": (0.3, (1e-3, 2e-5, 3e-4)),
    "weight_decay": (0.2, (0.0, 0.1, 0.01)),
    "adam_beta1": (0.1, (0.9,)),
    "adam_beta2": (0.15, (0.95, 0.999)),
    "adam_epsilon": (0.1, (1e-8, 1e-6)),
    "max_grad_norm": (0.25, (1.0, 0.5, 0.0)),
    "bf16": (0.3, (True, True, False)),
    "fp16": (0.15, (False, True)),
    "warmup_steps": (0.2, (0, 2, 0.1, 100)),
    "lr_scheduler_type": (0.15, ("cosine", "linear", "constant_with_warmup", "warmup_stable_decay")),
    "min_lr": (0.05, (1e-5, 0.0)),
    "optim": (0.1, ("adamw_torch", "adamw_torch_fused", "adafactor", "sgd")),
    "gradient_checkpointing": (0.1, (True, False)),
    "seed": (0.1, (1, 1234)),
    "save_strategy": (0.1, ("steps", "no", "best")),
    "eval_strategy": (0.1, ("no", "steps")),
    "logging_steps": (0.1, (1, 10, 0.1)),
    "dataloader_num_workers": (0.05, (0, 2)),
    "tf32": (0.03, (True, False)),
    "max_tokens": (0.05, (1_000_000, 512)),
}
WORLDS = (1, 1, 2, 2, 4, 4, 8, 8, 3, 6, 16, 64)
ODD = (None, AUTO, "", "x", "true", "False", "8", " 2", "1e-4", -1, 0, 1, 2.5, 8.0, 1e300, 10**400, float("nan"))
ODD += (float("inf"), [], {}, [1], {"a": 1}, True, False, "\ud800", "ä")  # type: ignore[assignment]


@dataclass(frozen=True)
class Case:
    """A run as a user asks for it."""

    config: dict[str, Any]
    arguments: dict[str, Any]
    world: int
    device: str

    def text(self) -> str:
        return json.dumps([self.config, self.arguments, self.world, self.device])


def real_files(folder: Path | None) -> list[dict[str, Any]]:
    """The strict JSON blocks of a folder; none where there is no folder."""
    found = []
    for path in sorted(folder.rglob("*.json")) if folder else []:
        try:
            data = json.loads(read_small(path))
        except (Unreadable, ValueError):
            continue
        if isinstance(data, dict) and data:
            found.append(data)
    return found


def draw(random: random.Random, bases: list[dict[str, Any]]) -> Case:
    """A case: a file of the table, or a real one, in a third of the cases with something odd in it."""
    arguments: dict[str, Any] = {"resume": "never"}
    few = random.choice((0.0, 0.3, 1.0))  # many give no flags
    for name, (often, values) in FLAGS.items():
        if random.random() < often * few:
            arguments[name] = random.choice(values)
    if "max_tokens" not in arguments:
        arguments["max_steps"] = 10
    world = random.choice(WORLDS)
    if bases and random.random() < 0.3:
        config = copy.deepcopy(random.choice(bases))
    else:
        config = {}
        for chance, block in BLOCKS:
            if random.random() < chance:
                rich = random.choice((1.0, 1.0, 0.3))
                for path, (often, values) in block.items():
                    if random.random() < often * rich:
                        put(config, path, copy.deepcopy(random.choice(values)))
        _batch(random, config, arguments, world)
    _agree(random, config, arguments)
    if random.random() < 0.35:
        for _ in range(random.choice((1, 1, 2))):
            spoil(random, config)
    if random.random() < 0.03:
        arguments[random.choice(list(FLAGS))] = random.choice(ODD)
    fp16 = True in (get(config, "fp16.enabled"), arguments.get("fp16"))
    return Case(config, arguments, world, random.choice(("gpu", "gpu", "gpu" if fp16 else "cpu")))


def _batch(random: random.Random, config: dict[str, Any], arguments: dict[str, Any], world: int) -> None:
    """Batch sizes in the file and as flags, which mostly fit the world."""
    micro, accumulation = random.choice((1, 2, 4, 8)), random.choice((1, 1, 2, 4, 8))
    rows = (
        ("train_batch_size", "global_batch_size", micro * accumulation * world, 0.05),
        ("train_micro_batch_size_per_gpu", "per_device_train_batch_size", micro, 0.35),
        ("gradient_accumulation_steps", "gradient_accumulation_steps", accumulation, 0.3),
    )
    for key, flag, right, often in rows:
        if random.random() < 0.8:
            config[key] = random.choice(
                (AUTO, AUTO, right, right if random.random() < 0.8 else random.choice((1, 2, 16)))
            )
        if random.random() < often and config.get(key) in (AUTO, right, None):
            arguments[flag] = right


def _agree(random: random.Random, config: dict[str, Any], arguments: dict[str, Any]) -> None:
    """Give most flags the numbers of the file: who writes both, mostly means the same."""
    params = get(config, "optimizer.params", {})
    betas = params.get("betas") if isinstance(params, dict) else None
    one, two = betas if isinstance(betas, list) and len(betas) == 2 else (None, None)
    places = {
        "learning_rate": get(config, "optimizer.params.lr"),
        "weight_decay": get(config, "optimizer.params.weight_decay"),
        "adam_epsilon": get(config, "optimizer.params.eps"),
        "adam_beta1": one,
        "adam_beta2": two,
        "max_grad_norm": get(config, "gradient_clipping"),
        "bf16": get(config, "bf16.enabled"),
        "fp16": get(config, "fp16.enabled"),
        "warmup_steps": get(config, "scheduler.params.warmup_num_steps"),
    }
    for name, value in places.items():
        if name in arguments and isinstance(value, int | float) and random.random() < 0.8:
            arguments[name] = value
    if "scheduler" in config and random.random() < 0.8:
        for name in ("lr_scheduler_type", "min_lr"):
            arguments.pop(name, None)
    scheduler, optimizer = get(config, "scheduler.params", {}), get(config, "optimizer.params", {})
    kind = get(config, "scheduler.type")
    if isinstance(scheduler, dict) and random.random() < 0.9:
        ours = {"WarmupLR": "ratio total", "WarmupDecayLR": "ratio", "WarmupCosineLR": "min_lr max_lr"}.get(
            str(kind), ""
        )
        for name in [name for name in scheduler if any(word in name for word in ours.split())]:
            del scheduler[name]
        if scheduler.get("total_num_steps") not in (None, AUTO):
            scheduler["total_num_steps"] = arguments.get("max_steps", AUTO)
    if isinstance(optimizer, dict) and str(get(config, "optimizer.type")).lower() != "sgd":
        optimizer.pop("momentum", None)
    if get(config, "zero_optimization.stage") in (0, None) and random.random() < 0.9:
        for name in ("offload_optimizer", "offload_param"):
            config.get("zero_optimization", {}).pop(name, None)
    if True in (get(config, "bf16.enabled"), arguments.get("bf16")) and random.random() < 0.8:
        arguments.pop("fp16", None)
        if isinstance(config.get("fp16"), dict):
            config["fp16"]["enabled"] = random.choice((AUTO, False))


def spoil(random: random.Random, config: dict[str, Any]) -> None:
    """Change one thing as people do: another value, a misspelling, another case, another place, a dot, a key more."""
    blocks = list(_blocks(config))
    block = random.choice(blocks)
    keys = list(block)
    way = random.randrange(8)
    if not keys or way == 0:
        block[random.choice(("x", "pin_memory", "stage", "lr", "enabled", "a.b", "", "comment", "offload.device"))] = 1
        return
    key = random.choice(keys)
    if way <= 2:
        block[key] = random.choice(ODD)
    elif way == 3:
        at = random.randrange(len(key) + 1)
        block[key[:at] + random.choice("s_ae") + key[at:]] = block.pop(key)
    elif way == 4:
        block[key.upper() if random.random() < 0.5 else f"{key} "] = block.pop(key)
    elif way == 5:
        random.choice(blocks)[key] = copy.deepcopy(block[key])
    elif way == 6:
        block[key] = json.dumps(block[key])
    else:
        block.pop(key)


def _blocks(config: dict[str, Any]) -> Any:
    yield config
    for value in config.values():
        if isinstance(value, dict):
            yield from _blocks(value)
