"""The Plan: every number of a run, decided once, before a weight is allocated, each with where it came from."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hf_mamba.files import write_json
from hf_mamba.findings import Migration, PlanError, Problem
from hf_mamba.names import PLAN_FILE


@dataclass(frozen=True)
class Plan:
    """One resolved run. Numbers are None only where a problem kept them from being known.

    `world_size` is the number of data-parallel ranks, so that always
    global_batch_size = micro_batch_size x gradient_accumulation_steps x world_size (in sequences of `seq_len` tokens).
    `ds_config` holds no "auto" and no `train_batch_size`: DeepSpeed derives it from the other two, while a written
    one is checked against a world size of 1 under `zero.Init` (deepspeed/runtime/config.py).
    """

    preset: str | None = None
    model_config: dict[str, Any] = field(default_factory=dict)
    seq_len: int | None = None
    micro_batch_size: int | None = None
    gradient_accumulation_steps: int | None = None
    world_size: int | None = None
    num_processes: int | None = None  # all ranks, model-parallel ones included
    global_batch_size: int | None = None
    tokens_per_step: int | None = None
    total_steps: int | None = None
    total_tokens: int | None = None
    warmup_steps: int | None = None
    rates: dict[str, Any] | None = None  # a DeepSpeed file's schedule (preflight/deepspeed/rates.py)
    z_loss: float = 0.0
    dtype: str = "fp32"  # "fp32" | "bf16" | "fp16"
    scan_backend: str | None = None  # who computes the scan (hf_mamba/ops), once the devices are known
    ds_config: dict[str, Any] | None = None
    training_arguments: dict[str, Any] = field(default_factory=dict)
    environment: dict[str, str] = field(default_factory=dict)  # variables of accelerate, made to agree with the plan
    parameters: dict[str, Any] = field(default_factory=dict)  # estimated, actual, deviation, by_component
    problems: tuple[Problem, ...] = ()
    migrations: tuple[Migration, ...] = ()
    notes: tuple[str, ...] = ()
    provenance: dict[str, str] = field(default_factory=dict)

    @property
    def ok(self) -> bool:
        return not self.problems

    def require(self) -> Plan:
        """This plan, or PlanError (a ValueError) that lists every problem."""
        if self.problems:
            raise PlanError(self.problems)
        return self

    def replace(self, **changes: Any) -> Plan:
        return dataclasses.replace(self, **changes)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready: the fields by name, plus `ok`."""
        out: dict[str, Any] = {"ok": self.ok}
        for f in dataclasses.fields(self):
            out[f.name] = getattr(self, f.name)
        out["problems"] = [p._asdict() for p in self.problems]
        out["migrations"] = [m._asdict() for m in self.migrations]
        out["notes"] = list(self.notes)
        return out

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Plan:
        known = {f.name for f in dataclasses.fields(cls)}
        kept = {k: v for k, v in data.items() if k in known}
        kept["problems"] = tuple(Problem(**p) for p in data.get("problems", ()))
        kept["migrations"] = tuple(Migration(**m) for m in data.get("migrations", ()))
        kept["notes"] = tuple(data.get("notes", ()))
        return cls(**kept)

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write the plan to `path` (a file, or a folder that gets plan.json), complete or not at all."""
        target = Path(path)
        if target.suffix != ".json":
            target = target / PLAN_FILE
        return write_json(target, self.to_dict())

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Plan:
        target = Path(path)
        if target.is_dir():
            target = target / PLAN_FILE
        return cls.from_dict(json.loads(target.read_text(encoding="utf-8")))
