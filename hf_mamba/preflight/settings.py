"""The arguments of a run as the pre-flight reads them: values of known kinds, each with where it was written."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hf_mamba.family import Preset, get_preset
from hf_mamba.findings import Findings
from hf_mamba.preflight.kinds import KindError, check, show

DEFAULT_PRESET = "tiny_mamba"

# What each argument must be. "auto" is allowed for per_device_train_batch_size only.
ARGUMENT_KINDS: dict[str, str] = {
    "preset": "str",
    "model_name_or_path": "str",
    "vocab_size": "int>0",
    "seq_len": "int>0",
    "per_device_train_batch_size": "int>0",
    "gradient_accumulation_steps": "int>0",
    "global_batch_size": "int>0",
    "global_batch_tokens": "int>0",
    "num_gpus": "int>0",
    "num_nodes": "int>0",
    "max_tokens": "int>0",
    "max_steps": "int>=-1",
    "warmup_steps": "float>=0",
    "warmup_ratio": "float 0..1",
    "warmup_tokens": "int>0",
    "learning_rate": "float>=0",
    "min_lr": "float>=0",
    "decay_ratio": "float 0..1",
    "z_loss": "float>=0",
    "max_bad_steps": "int>0",
    "spike_sigma": "float>0",
    "weight_decay": "float>=0",
    "adam_beta1": "float 0..1",
    "adam_beta2": "float 0..1",
    "adam_epsilon": "float>=0",
    "max_grad_norm": "float>=0",
    "bf16": "bool",
    "fp16": "bool",
    "use_cpu": "bool",
    "gradient_checkpointing": "bool",
    "save_only_model": "bool",
    "auto_find_batch_size": "bool",
    "seed": "int>=0",
    "lr_scheduler_type": "str",
    "optim": "str",
}

# Numbers that a preset brings: argument -> the preset's field.
FROM_PRESET: dict[str, str] = {
    "seq_len": "seq_len",
    "per_device_train_batch_size": "micro_batch_size",
    "gradient_accumulation_steps": "gradient_accumulation_steps",
    "max_tokens": "max_tokens",
    "learning_rate": "learning_rate",
    "min_lr": "min_lr",
    "warmup_ratio": "warmup_ratio",
    "weight_decay": "weight_decay",
    "adam_beta1": "adam_beta1",
    "adam_beta2": "adam_beta2",
    "max_grad_norm": "max_grad_norm",
    "lr_scheduler_type": "lr_scheduler_type",
}

# Our own defaults, where neither the user nor a preset says anything, and TrainingArguments' would be wrong.
DEFAULTS: dict[str, Any] = {
    "decay_ratio": 0.1,
    "z_loss": 0.0,
    "adam_epsilon": 1e-8,
    "seed": 42,
    "optim": "adamw_torch_fused",
    "gradient_checkpointing": False,
    "save_only_model": False,
    "logging_nan_inf_filter": False,  # a NaN must be seen
    "report_to": "none",
    "logging_steps": 10,
    "remove_unused_columns": False,
}


class Settings:
    """Values with sources, in the order of precedence user > preset > default."""

    def __init__(self, values: Mapping[str, Any], sources: Mapping[str, str] | None, out: Findings) -> None:
        self.out = out
        self.values: dict[str, Any] = {}
        self.sources: dict[str, str] = {}
        for name, value in values.items():
            if value is not None:
                source = (sources or {}).get(name, "argument")
                self._accept(name, value, f"argument {name}" if source == "argument" else source)
        self.preset = self._preset()
        if self.preset is not None:
            for name, field in FROM_PRESET.items():
                self._fill(name, getattr(self.preset, field), f"preset {self.preset.name}")
        for name, value in DEFAULTS.items():
            self._fill(name, value, "default")

    def _accept(self, name: str, value: Any, source: str) -> None:
        kind = ARGUMENT_KINDS.get(name)
        if kind is not None and not (name == "per_device_train_batch_size" and value == "auto"):
            try:
                value = check(kind, value)
            except KindError as expected:
                self.out.problem(
                    self.written(name, source),
                    f"{show(value)} ({source})",
                    "It cannot be used.",
                    f"Write {expected}.",
                    id="argument-of-the-wrong-kind",
                )
                return
        self.values[name] = value
        self.sources[name] = source

    def _fill(self, name: str, value: Any, source: str) -> None:
        if name not in self.values:
            self.values[name] = value
            self.sources[name] = source

    def _preset(self) -> Preset | None:
        name = self.values.get("preset")
        if name is None:
            if "model_name_or_path" in self.values or "model_config" in self.values:
                return None
            name = DEFAULT_PRESET
            self._fill("preset", name, "default")
        try:
            return get_preset(name)
        except ValueError as error:
            self.out.problem(
                "preset",
                show(name),
                f"{error}".capitalize(),
                "Run `hf-mamba presets` for the list.",
                id="unknown-preset",
            )
            return None

    @staticmethod
    def written(name: str, source: str) -> str:
        """The argument's name as the user wrote it: an alias where an alias was written."""
        return source.removeprefix("flag --") if source.startswith("flag --") else name

    def adopt(self, name: str, value: Any, source: str) -> None:
        """Take a value from another file of the user's; it counts as written there."""
        self.values[name] = value
        self.sources[name] = source

    def get(self, name: str, default: Any = None) -> Any:
        return self.values.get(name, default)

    def source(self, name: str) -> str:
        return self.sources.get(name, "default")

    def key(self, name: str) -> str:
        return self.written(name, self.source(name))

    def is_flag(self, name: str) -> bool:
        """Whether it was written as an argument, rather than in a DeepSpeed file."""
        return self.source(name).startswith(("flag ", "config ", "argument"))

    def given(self, name: str) -> bool:
        """Whether the user wrote it, rather than a preset or a default."""
        source = self.sources.get(name)
        return source is not None and source != "default" and not source.startswith("preset ")
