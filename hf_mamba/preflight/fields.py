"""Every field of TrainingArguments: whether a run serves it, hands it on, has no use for it, or refuses it.

One row a field, and the rows are what refuses. A test compares them with the installed TrainingArguments: a new field
fails it until it has a row. Values that do not go together, and packages that are missing, are rules (combinations.py)
and checks of values (consumers.py, trackers.py); `rules` of a row names them.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from hf_mamba.findings import Findings
from hf_mamba.preflight.arguments import TRAINER_DEFAULTS
from hf_mamba.preflight.kinds import show
from hf_mamba.preflight.settings import Settings

SERVED, PASSED, IDLE, REFUSED = "served by the run itself", "handed to Trainer", "without effect", "refused"


class Field(NamedTuple):
    """What becomes of a field."""

    how: str = PASSED
    why: str = ""  # of IDLE and REFUSED, for the message
    fix: str = "Remove it."
    usual: Any = False  # REFUSED: the value that changes nothing
    needs: str = ""  # the argument without which it has no effect: "name", or "name=value"
    rules: tuple[str, ...] = ()  # ids of what is said where its other half, its package or its value is wrong


def _served(*rules: str) -> Field:
    return Field(SERVED, rules=rules)


def _passed(*rules: str, needs: str = "") -> Field:
    return Field(PASSED, rules=rules, needs=needs)


def _idle(why: str) -> Field:
    return Field(IDLE, why)


def _refused(why: str, fix: str = "Remove it.", usual: Any = False) -> Field:
    return Field(REFUSED, why, fix, usual)


_VALUE, _BUILT = "refused-by-its-reader", "refused-by-transformers"
_TRACKER = ("unknown-tracker", "tracker-not-installed", "tracker-not-logged-in")
_NO_METRICS = "An evaluation keeps no predictions: its loss is summed over all tokens, whatever the batches."

FIELDS: dict[str, Field] = {
    # the run
    "output_dir": _served(_VALUE, "output-dir-not-usable"),
    "do_train": _idle("The recipe trains."),
    "do_eval": _idle("The recipe evaluates at its end, and before that by --eval_strategy."),
    "do_predict": _refused("There is nothing to predict.", "Remove it; recipes/evaluate.py takes tasks."),
    "resume_from_checkpoint": _served(_VALUE, "resume-without-optimizer-state"),
    "ignore_data_skip": _refused("A resumed run always begins behind the samples that it has read."),
    "restore_callback_states_from_checkpoint": _passed(),
    "seed": _served(_VALUE),
    "data_seed": _refused("The order of the data is a function of --seed.", "Remove it, or write --seed.", None),
    "full_determinism": _passed(),
    "use_cpu": _served(),
    "local_rank": _idle("The launcher's environment says it."),
    "debug": _passed(_BUILT),
    # batch, length, rate
    "per_device_train_batch_size": _served("argument-of-the-wrong-kind"),
    "gradient_accumulation_steps": _served("argument-of-the-wrong-kind"),
    "average_tokens_across_devices": _passed(),
    "auto_find_batch_size": _served("batch-search"),
    "num_train_epochs": _served("argument-of-the-wrong-kind"),
    "max_steps": _served("argument-of-the-wrong-kind"),
    "learning_rate": _served("argument-of-the-wrong-kind"),
    "lr_scheduler_type": _served(_VALUE, "schedule-needs-evaluation"),
    "lr_scheduler_kwargs": _served(_VALUE, _BUILT),
    "warmup_steps": _served(_BUILT),
    # optimizer and loss
    "optim": _passed(_VALUE, "muon-needs-fsdp2"),
    "optim_args": _passed(_VALUE, "muon-has-no-options"),
    "optim_target_modules": _passed(),
    "weight_decay": _passed(),
    "adam_beta1": _passed(_VALUE),
    "adam_beta2": _passed(_VALUE),
    "adam_epsilon": _passed(),
    "max_grad_norm": _passed(),
    "label_smoothing_factor": _passed("label-smoothing-is-a-share", "label-smoothing-stands-alone"),
    "neftune_noise_alpha": _passed(),
    # precision, memory, speed
    "bf16": _served(_BUILT),
    "fp16": _served(_BUILT, "spikes-under-fp16"),
    "bf16_full_eval": _passed("two-evaluation-precisions"),
    "fp16_full_eval": _passed("two-evaluation-precisions"),
    "tf32": _passed("tf32-on-a-cpu"),
    "activation_checkpointing": _served("checkpointing-written-twice"),
    "activation_checkpointing_kwargs": _passed(needs="gradient_checkpointing"),
    "gradient_checkpointing": _served("checkpointing-written-twice"),
    "gradient_checkpointing_kwargs": _passed(needs="gradient_checkpointing"),
    "torch_compile": _passed(),
    "torch_compile_backend": _passed("unknown-compile-backend"),
    "torch_compile_mode": _passed("unknown-compile-mode"),
    "torch_empty_cache_steps": _passed("empty-cache-steps"),
    "use_cache": _served(),
    "use_liger_kernel": _served("liger-has-no-kernels-for-these-models"),
    "liger_kernel_config": _idle("Liger has nothing for these models."),
    # the log and the trackers
    "logging_strategy": _passed(),
    "logging_steps": _passed(_VALUE, "logging-every-0-steps", "logging-steps-are-whole"),
    "logging_first_step": _passed(),
    "log_on_each_node": _passed(),
    "logging_nan_inf_filter": _passed(),
    "include_num_input_tokens_seen": _passed(),
    "log_level": _passed(),
    "log_level_replica": _passed(),
    "disable_tqdm": _passed(),
    "report_to": _served(*_TRACKER),
    "run_name": _passed(),
    "project": _passed(needs="report_to=trackio"),
    "trackio_space_id": _passed(needs="report_to=trackio"),
    "trackio_bucket_id": _passed(needs="report_to=trackio"),
    "trackio_static_space_id": _passed(needs="report_to=trackio"),
    # evaluation
    "eval_strategy": _passed("evaluation-needs-held-out-data"),
    "eval_steps": _passed(_VALUE, "eval-steps-are-whole", needs="eval_strategy"),
    "eval_delay": _passed(_VALUE, needs="eval_strategy"),
    "eval_on_start": _passed(),
    "per_device_eval_batch_size": _passed(),
    "prediction_loss_only": _idle(_NO_METRICS),
    "eval_do_concat_batches": _idle(_NO_METRICS),
    "eval_use_gather_object": _idle(_NO_METRICS),
    "eval_accumulation_steps": _idle(_NO_METRICS),
    "include_for_metrics": _idle(_NO_METRICS),
    "batch_eval_metrics": _idle(_NO_METRICS),
    # checkpoints
    "save_strategy": _passed("best-checkpoint-needs-a-metric"),
    "save_steps": _passed(_VALUE, "save-steps-are-whole"),
    "save_total_limit": _passed(_VALUE),
    "save_only_model": _passed("resume-without-optimizer-state", "model-alone-in-shards"),
    "save_on_each_node": _refused("A checkpoint is one folder, which all machines share."),
    "enable_jit_checkpoint": _refused("A signal saves and ends a run without it, on all ranks at the same step."),
    "load_best_model_at_end": _passed("best-model-needs-matching-saves", _BUILT),
    "metric_for_best_model": _passed(_BUILT),
    "greater_is_better": _passed(),
    # the Hub
    "push_to_hub": _served("push-needs-a-place"),
    "hub_model_id": _served("push-needs-a-place", "name-of-no-repository"),
    "hub_strategy": _served("push-has-one-way"),
    "hub_always_push": _served("push-has-one-way"),
    "hub_token": _served("token-on-the-command-line"),
    "hub_private_repo": _served(),
    "hub_revision": Field(SERVED, needs="push_to_hub"),
    # data
    "accelerator_config": _passed(_VALUE, "split-batches"),
    "dataloader_drop_last": _idle("Every step is whole: rows are packed, and counted beforehand."),
    "dataloader_num_workers": _passed(_BUILT),
    "dataloader_pin_memory": _passed(),
    "dataloader_persistent_workers": _idle("Workers live as long as training in any case."),
    "dataloader_prefetch_factor": _passed("prefetch-needs-workers"),
    "dataloader_multiprocessing_context": _refused("Workers are started in one way.", usual=None),
    "dataloader_in_order": _refused("The order of the samples is a part of what is resumed.", usual=True),
    "remove_unused_columns": _idle("Rows hold what the model takes, and nothing else."),
    "label_names": _refused("The labels of a row are `labels`.", usual=None),
    "train_sampling_strategy": _served("rows-are-packed"),
    "length_column_name": _idle("Rows are packed to one length."),
    # ranks
    "parallelism_config": _refused("Only data-parallel ranks carry a whole state.", usual=None),
    "ddp_backend": _passed(_BUILT),
    "ddp_timeout": _served(),
    "ddp_find_unused_parameters": _passed(),
    "ddp_bucket_cap_mb": _passed(),
    "ddp_broadcast_buffers": _passed(),
    "ddp_static_graph": _passed(),
    "fsdp": _served("fsdp-needs-a-launcher"),
    "fsdp_config": _passed(needs="fsdp"),
    "deepspeed": _served("deepspeed-not-installed"),
    "skip_memory_metrics": _passed(),
}  # fmt: skip


def check_fields(settings: Settings, out: Findings) -> None:
    """Name every written field that a run cannot serve, and note those without effect; none of them goes further."""
    for name, row in FIELDS.items():
        if not settings.given(name):
            continue
        value = settings.get(name)
        if row.how == REFUSED and value != row.usual and value not in ("", [], {}):
            found = f"{show(value)} ({settings.source(name)})"
            out.problem(settings.key(name), found, row.why, row.fix, id="field-not-served")
            settings.remove(name)
        elif row.how == IDLE:
            out.note(f"--{name} has no effect here: {row.why}")
            settings.remove(name)
            if name in TRAINER_DEFAULTS:
                settings.fill(name, TRAINER_DEFAULTS[name])
        elif row.needs and not _there(settings, row.needs):
            out.note(f"--{name} has no effect without --{row.needs.replace('=', ' ')}.")


def _there(settings: Settings, what: str) -> bool:
    """Whether the other half of an argument is written."""
    name, _, wanted = what.partition("=")
    value = settings.get(name)
    return wanted in value if wanted and isinstance(value, list) else bool(value) and value not in ("no", "none")
