"""Settings that are each valid and do not go together: what fails later, or is ignored without a word."""

from __future__ import annotations

import re
from collections.abc import Mapping
from importlib.util import find_spec
from typing import Any

from hf_mamba.findings import Findings
from hf_mamba.plan import FsdpPlan
from hf_mamba.preflight.deepspeed.rules import DEEPSPEED_RULES, MONITORS
from hf_mamba.preflight.kinds import show
from hf_mamba.preflight.launch.environment import Launcher
from hf_mamba.preflight.optimizers import MUON
from hf_mamba.preflight.rules import ZERO, Rule, Run
from hf_mamba.preflight.schedule import Steps
from hf_mamba.preflight.settings import Settings
from hf_mamba.preflight.world import World


def _fraction_above_one(run: Run, name: str) -> bool:
    value = run.settings.get(name)
    return isinstance(value, int | float) and value > 1 and value != int(value)


def _evaluates(run: Run) -> bool:
    return run.settings.get("eval_strategy", "no") not in ("no", False)


def _is_repository(name: Any) -> bool:
    if name is None:  # nothing was named, and the client is slow to import
        return True
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(name)
    except ValueError:
        return False
    return True


def _whole_steps(name: str) -> Rule:
    return Rule(
        f"{name.replace('_', '-')}-are-whole",
        name,
        lambda r: _fraction_above_one(r, name),
        "Above 1 it is a number of steps.",
        "Write a whole number.",
        example={name: 1.5},
        mended={name: 2},
    )


# Backends that torch.compile finds by name without other packages, and those of well-known ones.
_COMPILERS = (
    "inductor",
    "eager",
    "aot_eager",
    "cudagraphs",
    "onnxrt",
    "openxla",
    "tvm",
    "ipex",
    "torch_tensorrt",
    "hpu_backend",
)

_MODES = ("default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs")

# The arguments of an example: FSDP2 with its own checkpointing, as accelerate launch tells it.
FSDP: dict[str, Any] = {
    "device": "gpu",
    "environ": {
        "ACCELERATE_USE_FSDP": "true",
        "FSDP_VERSION": "2",
        "FSDP_ACTIVATION_CHECKPOINTING": "true",
    },
}

# What Trainer, TrainingArguments or accelerate object to without DeepSpeed too (transformers/training_args.py).
RUN_RULES: tuple[Rule, ...] = (
    Rule(
        "batch-search",
        "auto_find_batch_size",
        lambda r: r.settings.get("auto_find_batch_size"),
        "The batch would change in mid-run, and every number here with it.",
        "Remove it; `hf-mamba memory` finds the micro-batch beforehand.",
        example={"auto_find_batch_size": True},
        mended={},
    ),
    Rule(
        "split-batches",
        "accelerator_config",
        lambda r: (
            isinstance(r.settings.get("accelerator_config"), Mapping)
            and r.settings.get("accelerator_config").get("split_batches")
        ),
        "split_batches would split the micro-batch over the ranks.",
        "Remove split_batches.",
        example={"accelerator_config": {"split_batches": True}},
        mended={"accelerator_config": {"split_batches": False}},
    ),
    Rule(
        "resume-without-optimizer-state",
        "save_only_model",
        lambda r: r.settings.get("save_only_model") and r.resumes,
        "A checkpoint without the optimizer's state cannot be resumed from.",
        "Remove --save_only_model, or --resume.",
        example={"save_only_model": True, "resume": "run/checkpoint-1"},
        mended={"save_only_model": True},
    ),
    Rule(
        "precision-of-accelerate",
        "mixed_precision",
        lambda r: r.launcher.mixed_precision not in ("no", "none", "", "bf16", "fp16"),
        "accelerate's other precisions (fp8) do not cover the scan.",
        "Use --mixed_precision bf16.",
        example={"environ": {"ACCELERATE_MIXED_PRECISION": "fp8"}},
        mended={"environ": {"ACCELERATE_MIXED_PRECISION": "bf16"}},
    ),
    Rule(
        "megatron",
        "distributed_type",
        lambda r: r.launcher.use_megatron,
        "Megatron-LM has its own models; this one would not be used.",
        "Write distributed_type: FSDP, DEEPSPEED or MULTI_GPU; or launch without --use_megatron_lm.",
        example={"environ": {"ACCELERATE_USE_MEGATRON_LM": "true"}},
        mended={},
        found=lambda r: "MEGATRON_LM",
    ),
    Rule(
        "xla",
        "distributed_type",
        lambda r: r.launcher.use_xla,
        "The operations have no backend for TPUs.",
        "Write distributed_type: MULTI_GPU, or NO with use_cpu: true.",
        example={"environ": {"PJRT_DEVICE": "TPU"}},
        mended={},
        found=lambda r: "XLA",
    ),
    Rule(
        "logging-every-0-steps",
        "logging_steps",
        lambda r: r.settings.get("logging_steps") == 0 and r.settings.get("logging_strategy", "steps") == "steps",
        "Logging every 0 steps is not possible.",
        "Write a number > 0.",
        example={"logging_steps": 0},
        mended={"logging_steps": 1},
    ),
    *(_whole_steps(name) for name in ("logging_steps", "save_steps", "eval_steps")),
    Rule(
        "best-model-needs-matching-saves",
        "load_best_model_at_end",
        lambda r: (
            r.settings.get("load_best_model_at_end")
            and r.settings.get("save_strategy", "steps") not in ("best", r.settings.get("eval_strategy", "no"))
        ),
        "The best model is known only where evaluation and saving come together.",
        "Give --eval_strategy and --save_strategy the same value, or --save_strategy best.",
        example={"load_best_model_at_end": True},
        mended={"load_best_model_at_end": True, "eval_strategy": "steps", "save_strategy": "steps"},
    ),
    Rule(
        "best-checkpoint-needs-a-metric",
        "save_strategy",
        lambda r: r.settings.get("save_strategy") == "best" and r.settings.get("metric_for_best_model") is None,
        "Nothing says which checkpoint is the best.",
        "Add --metric_for_best_model loss.",
        example={"save_strategy": "best", "eval_strategy": "steps"},
        mended={"save_strategy": "best", "eval_strategy": "steps", "metric_for_best_model": "loss"},
    ),
    Rule(
        "evaluation-needs-held-out-data",
        "eval_strategy",
        lambda r: _evaluates(r) and r.settings.get("eval_fraction") == 0 and not r.settings.get("eval_dataset"),
        "Nothing is held out for the evaluation.",
        "Write --eval_fraction 0.01, or --eval_strategy no.",
        example={"eval_strategy": "steps", "eval_fraction": 0.0},
        mended={"eval_strategy": "steps", "eval_fraction": 0.01},
    ),
    Rule(
        "tf32-on-a-cpu",
        "tf32",
        lambda r: r.settings.get("tf32") and r.world.device == "cpu",
        "tf32 is a mode of NVIDIA's tensor cores, and TrainingArguments refuses it on a CPU.",
        "Remove --tf32.",
        example={"tf32": True},
        mended={"tf32": True, "device": "gpu"},
    ),
    Rule(
        "unknown-compile-backend",
        "torch_compile_backend",
        lambda r: r.settings.get("torch_compile_backend") not in (None, *_COMPILERS),
        "torch.compile has no such backend.",
        "Write inductor, or remove it.",
        example={"torch_compile_backend": "inductr"},
        mended={"torch_compile_backend": "inductor"},
    ),
    Rule(
        "unknown-compile-mode",
        "torch_compile_mode",
        lambda r: r.settings.get("torch_compile_mode") not in (None, *_MODES),
        "torch.compile has no such mode.",
        "Write default, or remove it.",
        example={"torch_compile_mode": "fastest"},
        mended={"torch_compile_mode": "max-autotune"},
    ),
    Rule(  # transformers/trainer.py
        "fsdp-needs-a-launcher",
        "fsdp",
        lambda r: r.settings.get("fsdp") and r.world.processes == 1,
        "One process has nobody to share with, and Trainer refuses it.",
        "Remove --fsdp, or launch more processes.",
        example={"fsdp": "full_shard", "world_size": 1},
        mended={"fsdp": "full_shard", "world_size": 2},
    ),
    Rule(  # transformers/trainer.py
        "checkpointing-written-twice",
        "gradient_checkpointing",
        lambda r: r.fsdp is not None and r.fsdp.activation_checkpointing and r.settings.get("gradient_checkpointing"),
        "FSDP's fsdp_activation_checkpointing does the same, and Trainer refuses both.",
        "Remove --gradient_checkpointing.",
        example=FSDP | {"gradient_checkpointing": True},
        mended=FSDP,
    ),
    Rule(  # torch/distributed/fsdp/_flat_param.py
        "muon-needs-fsdp2",
        "optim",
        lambda r: r.settings.get("optim") == MUON and r.fsdp is not None and r.fsdp.version == 1,
        "FSDP 1 hands an optimizer flat pieces of the weights, and Muon orthogonalises whole matrices.",
        "Write fsdp_version: 2, whose pieces are gathered; or use --optim adamw_torch_fused.",
        example={"device": "gpu", "environ": {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "1"}, "optim": MUON},
        mended=FSDP | {"optim": MUON},
    ),
    Rule(
        "muon-has-no-options",
        "optim_args",
        lambda r: r.settings.get("optim") == MUON and r.settings.get("optim_args"),
        "Its momentum is 0.95; rate, decay, betas and eps are the run's own arguments.",
        "Remove --optim_args.",
        example={"optim": MUON, "optim_args": "momentum=0.9"},
        mended={"optim": MUON},
    ),
    Rule(  # transformers/trainer.py
        "model-alone-in-shards",
        "save_only_model",
        lambda r: (
            r.fsdp is not None and r.fsdp.state_dict_type == "SHARDED_STATE_DICT" and r.settings.get("save_only_model")
        ),
        "Trainer writes a model alone from one whole state only.",
        "Write fsdp_state_dict_type: FULL_STATE_DICT, or remove --save_only_model.",
        example=FSDP | {"save_only_model": True},
        mended=FSDP,
    ),
    Rule(
        "schedule-needs-evaluation",
        "lr_scheduler_type",
        lambda r: r.steps.scheduler[0] in ("reduce_lr_on_plateau", "greedy") and not _evaluates(r),
        "This schedule follows the evaluation, and there is none.",
        "Add --eval_strategy steps, or choose another schedule.",
        example={"lr_scheduler_type": "reduce_lr_on_plateau"},
        mended={"lr_scheduler_type": "linear"},
    ),
    Rule(
        "prefetch-needs-workers",
        "dataloader_prefetch_factor",
        lambda r: (
            r.settings.get("dataloader_prefetch_factor") is not None and not r.settings.get("dataloader_num_workers")
        ),
        "Without workers nothing is prefetched, and TrainingArguments refuses it.",
        "Add --dataloader_num_workers 2, or remove it.",
        example={"dataloader_prefetch_factor": 2},
        mended={"dataloader_prefetch_factor": 2, "dataloader_num_workers": 2},
    ),
    Rule(
        "two-evaluation-precisions",
        "bf16_full_eval",
        lambda r: r.settings.get("bf16_full_eval") and r.settings.get("fp16_full_eval"),
        "An evaluation has one precision.",
        "Keep bf16_full_eval.",
        example={"bf16_full_eval": True, "fp16_full_eval": True},
        mended={"bf16_full_eval": True},
    ),
    Rule(
        "spikes-under-fp16",
        "spike_sigma",
        lambda r: r.settings.get("spike_sigma") and r.dtype == "fp16",
        "Under fp16 the loss scaler decides which updates are applied.",
        "Use --bf16, or remove --spike_sigma.",
        example={"spike_sigma": 6.0, "fp16": True, "device": "gpu"},
        mended={"spike_sigma": 6.0, "bf16": True, "device": "gpu"},
    ),
    Rule(
        "push-needs-a-place",
        "hub_model_id",
        lambda r: bool(r.settings.get("push_to_hub")) != bool(r.settings.get("hub_model_id")),
        "Pushing needs both the wish and the place.",
        "Write --push_to_hub true --hub_model_id USER/NAME, or neither.",
        example={"push_to_hub": True},
        mended={"push_to_hub": True, "hub_model_id": "user/name"},
    ),
    Rule(
        "licence-by-its-id",
        "license",
        lambda r: not re.fullmatch(r"[a-z0-9][a-z0-9.+-]*", r.settings.get("license") or "mit"),
        "The card names a licence by its id, and the Hub refuses another form.",
        "Write an id such as apache-2.0, mit or cc-by-4.0; `other` where the Hub lists none.",
        example={"license": "Apache 2.0"},
        mended={"license": "apache-2.0"},
    ),
    Rule(
        "language-by-its-code",
        "language",
        lambda r: (
            not all(
                re.fullmatch(r"[a-z]{2,3}(-[A-Za-z0-9]+)*|code|multilingual", str(name))
                for name in r.settings.get("language") or ()
            )
        ),
        "The card names languages by their codes, and the Hub refuses others.",
        "Write codes such as en, zh or deu, or code or multilingual.",
        example={"language": ["english"]},
        mended={"language": ["en"]},
    ),
    Rule(
        "name-of-no-dataset",
        "hub_datasets",
        lambda r: not all(_is_repository(name) for name in r.settings.get("hub_datasets") or ()),
        "The Hub's own client refuses this name.",
        "Write OWNER/NAME as it stands on the Hub.",
        example={"hub_datasets": ["a/b/c"]},
        mended={"hub_datasets": ["a/b"]},
    ),
    Rule(
        "name-of-no-repository",
        "hub_model_id",
        lambda r: not _is_repository(r.settings.get("hub_model_id")),
        "The Hub's own client refuses this name.",
        "Write USER/NAME of letters, digits, '-', '_' and '.', at most 96 each, without '--' and '..'.",
        example={"push_to_hub": True, "hub_model_id": "user/name/more"},
        mended={"push_to_hub": True, "hub_model_id": "user/name"},
    ),
    Rule(
        "token-on-the-command-line",
        "hub_token",
        lambda r: r.settings.get("hub_token") is not None,
        "--hub_token would leave a token in the shell's history and the process list.",
        "Log in with `hf auth login`, or set HF_TOKEN.",
        example={"hub_token": "x", "push_to_hub": True, "hub_model_id": "user/name"},
        mended={"push_to_hub": True, "hub_model_id": "user/name"},
        found=lambda r: "***",
    ),
    Rule(
        "push-has-one-way",
        "hub_strategy",
        lambda r: r.settings.get("hub_strategy") is not None or r.settings.get("hub_always_push"),
        "Every whole checkpoint is pushed, in order; there is no other way.",
        "Remove --hub_strategy and --hub_always_push.",
        example={"hub_strategy": "end"},
        mended={},
    ),
    Rule(
        "rows-are-packed",
        "train_sampling_strategy",
        lambda r: r.settings.get("train_sampling_strategy") not in (None, "random"),
        "Rows are packed to one length, in an order that is the same on every number of processes.",
        "Remove it.",
        example={"train_sampling_strategy": "group_by_length"},
        mended={},
    ),
    Rule(
        "liger-has-no-kernels-for-these-models",
        "use_liger_kernel",
        lambda r: r.settings.get("use_liger_kernel"),
        "Liger has nothing for these models; their head and loss make no whole logits without it.",
        "Remove it.",
        example={"use_liger_kernel": True},
        mended={},
    ),
    Rule(
        "label-smoothing-is-a-share",
        "label_smoothing_factor",
        lambda r: not 0 <= (r.settings.get("label_smoothing_factor") or 0) < 1,
        "It is the share of a target that goes to all other tokens.",
        "Write a number from 0 up to 1, such as 0.1.",
        example={"label_smoothing_factor": 2.0},
        mended={"label_smoothing_factor": 0.1},
    ),
    Rule(
        "label-smoothing-stands-alone",
        "label_smoothing_factor",
        lambda r: (
            r.settings.get("label_smoothing_factor")
            and (r.settings.get("z_loss") or len(r.settings.get("dataset") or ()) > 1)
        ),
        "Trainer computes a smoothed loss by itself: it has no z-loss, and no loss of each source.",
        "Leave out --label_smoothing_factor, or --z_loss and all sources but one.",
        example={"label_smoothing_factor": 0.1, "z_loss": 1e-4},
        mended={"label_smoothing_factor": 0.1},
    ),
    Rule(
        "empty-cache-steps",
        "torch_empty_cache_steps",
        lambda r: (
            r.settings.get("torch_empty_cache_steps") is not None
            and not (
                isinstance(r.settings.get("torch_empty_cache_steps"), int)
                and r.settings.get("torch_empty_cache_steps") > 0
            )
        ),
        "It is a number of steps.",
        "Write a whole number > 0.",
        example={"torch_empty_cache_steps": 0},
        mended={"torch_empty_cache_steps": 10},
    ),
)


RULES = RUN_RULES + DEEPSPEED_RULES


def ignored_keys(run: Run) -> list[str]:
    """Keys that this stage does not read; harmless, but not what they look like."""
    if run.stage == 3:
        return [f"{ZERO}.round_robin_gradients"] if run.zero("round_robin_gradients") else []
    return [f"{ZERO}.{key}" for key in run.key(ZERO, {}) if key.startswith("stage3_")]


def _found(rule: Rule, run: Run) -> str:
    """What a rule has met, as the problem shows it."""
    if rule.found is not None:
        return rule.found(run)
    value = run.key(rule.key)
    if value is None:
        value = run.settings.get(rule.key)
    return "nothing" if value is None else show(value)


def check(
    settings: Settings,
    launcher: Launcher,
    ds_config: dict[str, Any] | None,
    world: World,
    dtype: str,
    steps: Steps,
    fsdp: FsdpPlan | None,
    elsewhere: bool,
    out: Findings,
) -> None:
    """Name every rule that the run meets; what another machine needs to have installed is a note."""
    run = Run(settings, launcher, ds_config or {}, world, dtype, steps, fsdp, elsewhere)
    for name, package in MONITORS:
        if elsewhere and run.key(f"{name}.enabled") and find_spec(package) is None:
            out.note(f"Not on this machine: {package}, to which DeepSpeed would report.")
    if launcher.compiles:
        out.note(f"accelerate compiles the model by torch.compile ({launcher.compiles}), as dynamo_backend says.")
    for rule in RUN_RULES + (DEEPSPEED_RULES if ds_config is not None else ()):
        if rule.when(run):
            out.problem(rule.key, _found(rule, run), rule.why, rule.fix, id=rule.id)
    if ds_config is not None and (ignored := ignored_keys(run)):
        out.note(f"Stage {run.stage} does not read {', '.join(ignored)}.")
