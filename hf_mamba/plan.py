"""What the pre-flight hands on: a Plan, in which every number of a run is known, or a Refused, which says why not.

    resolve(arguments) -> Refused(problems, known)  |  Plan
    verify(plan)       -> Checked

A Plan is decided once, before a weight is allocated, and never changes; nothing after it needs the arguments. What is
found out later, where the run is, is a Checked, saved beside the plan.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, ClassVar, NoReturn

from hf_mamba.files import write_json
from hf_mamba.findings import Migration, PlanError, Problem
from hf_mamba.names import CHECKED_FILE, PLAN_FILE


@dataclass(frozen=True, kw_only=True)
class DataPlan:
    """The text to train on, and who turns it into tokens: a tokenizer by name, or one that is trained first."""

    sources: list[str]
    tokenizer: str | None
    vocab_size: int | None  # of the tokenizer that is trained; None where `tokenizer` names one
    streaming: bool
    text_column: str  # where a source names none
    eval_fraction: float
    eval_sources: list[str] = field(default_factory=list)  # empty: eval_fraction of the sources is held out
    eos_token: str | None = None  # None: the tokenizer's own
    split_special_tokens: bool | None = None  # None: as the tokenizer does
    template: bool = True  # what the tokenizer puts around a text is put around a document; False: as before 0.2


@dataclass(frozen=True, kw_only=True)
class RunPlan:
    """The run's folder, what it continues from, and when it gives up."""

    output_dir: str
    resume: str  # "auto", "never" or a checkpoint's folder; "auto" where a run's folder was written
    identity: list[str]  # the plan's fields in which a resumed run must be the same
    max_bad_steps: int
    spike_sigma: float | None  # None: spikes are not looked for
    rewind: bool
    sample_prompt: str
    written: dict[str, Any] = field(default_factory=dict)  # what another start needs of the arguments: `--resume RUN`


@dataclass(frozen=True, kw_only=True)
class HubPlan:
    """The repository to which the run's models are pushed."""

    repo_id: str
    private: bool
    revision: str | None


@dataclass(frozen=True, kw_only=True)
class CardPlan:
    """What the model's card says beside the run's own numbers; what is not known is not said."""

    license: str | None = None  # by the Hub's id, such as apache-2.0
    language: list[str] = field(default_factory=list)  # ISO codes, "code" or "multilingual"
    datasets: list[str] = field(default_factory=list)  # names on the Hub


@dataclass(frozen=True, kw_only=True)
class FsdpPlan:
    """How FSDP shards the run, in accelerate's words."""

    version: int
    sharding: str  # FULL_SHARD, SHARD_GRAD_OP, ...; of version 2 these two: whether weights are freed after the forward
    offload: bool  # weights, gradients and the optimizer on the host
    wrapping: str  # TRANSFORMER_BASED_WRAP, SIZE_BASED_WRAP or NO_WRAP
    wrapped: list[str]  # the classes of the layers that are gathered one by one
    min_num_params: int  # of a module that SIZE_BASED_WRAP wraps
    state_dict_type: str
    activation_checkpointing: bool

    def __str__(self) -> str:
        """ "2, FULL_SHARD of each MambaBlock, offloaded, FULL_STATE_DICT, activation checkpointing" """
        text = f"{self.version}, {self.sharding} of {' and '.join(self.wrapped) or self.wrapping}"
        text += ", offloaded" * self.offload + f", {self.state_dict_type}"
        return text + ", activation checkpointing" * self.activation_checkpointing

    def replace(self, **changes: Any) -> FsdpPlan:
        """A copy with other values."""
        return replace(self, **changes)


_FINDINGS = ("migrations", "notes", "provenance")


def _plain(value: Any) -> Any:
    return asdict(value) if isinstance(value, DataPlan | RunPlan | HubPlan | CardPlan | FsdpPlan) else value


class _Outcome:
    """What Plan and Refused have in common: `ok`, `known`, the findings, and their form as JSON."""

    ok: ClassVar[bool]
    known: Any  # a mapping: fields of a Plan by name
    problems: Any = ()
    migrations: tuple[Migration, ...]
    notes: tuple[str, ...]
    provenance: dict[str, str]

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready: `ok`, what is known, and the findings."""
        known: dict[str, Any] = {name: _plain(value) for name, value in self.known.items()}
        return {
            "ok": self.ok,
            **known,
            "problems": [p._asdict() for p in self.problems],
            "migrations": [m._asdict() for m in self.migrations],
            "notes": list(self.notes),
            "provenance": self.provenance,
        }

    def save(self, folder: str | os.PathLike[str]) -> Path:
        """Write plan.json into the folder, complete or not at all."""
        return write_json(Path(folder) / PLAN_FILE, self.to_dict())


@dataclass(frozen=True, kw_only=True)
class Plan(_Outcome):
    """One resolved run. A field is None only where that is its meaning.

    `world_size` is the number of data-parallel ranks, so that always
    global_batch_size = micro_batch_size x gradient_accumulation_steps x world_size (in sequences of `seq_len` tokens).
    `ds_config` holds no "auto" and no `train_batch_size`: DeepSpeed derives it from the other two, while a written
    one is checked against a world size of 1 under `zero.Init` (deepspeed/runtime/config.py).
    """

    ok: ClassVar[bool] = True

    preset: str | None  # None: a model of the user's own
    model_config: dict[str, Any]
    start_from: str | None  # the model whose weights are taken; None: fresh ones
    parameters: dict[str, Any]  # estimated, by_component
    data: DataPlan
    seed: int
    seq_len: int
    micro_batch_size: int
    gradient_accumulation_steps: int
    world_size: int
    num_processes: int  # all ranks, model-parallel ones included
    num_nodes: int
    global_batch_size: int
    tokens_per_step: int
    total_steps: int
    total_tokens: int
    warmup_steps: int
    rates: dict[str, Any] | None  # a DeepSpeed file's schedule (preflight/deepspeed/rates.py), in place of Trainer's
    z_loss: float
    dtype: str  # "fp32" | "bf16" | "fp16"
    device: str  # "gpu" | "cpu"
    optim: str
    gradient_checkpointing: bool
    fsdp: FsdpPlan | None  # None: nothing is sharded by FSDP
    run: RunPlan
    hub: HubPlan | None  # None: nothing is pushed
    card: CardPlan
    ds_config: dict[str, Any] | None  # None: the run does not use DeepSpeed
    training_arguments: dict[str, Any]  # for transformers.TrainingArguments, and for nobody else
    environment: dict[str, str]  # variables of accelerate, made to agree with the plan
    disk: tuple[dict[str, Any], ...] = ()  # what is written where, and what was free, once that was looked at
    migrations: tuple[Migration, ...] = ()
    notes: tuple[str, ...] = ()
    provenance: dict[str, str] = field(default_factory=dict)

    @property
    def processes_per_node(self) -> int:
        return self.num_processes // self.num_nodes

    @property
    def known(self) -> dict[str, Any]:
        """Every decided field by name."""
        return {f.name: getattr(self, f.name) for f in fields(self) if f.name not in _FINDINGS}

    def require(self) -> Plan:
        """This plan; of a Refused, an error."""
        return self

    def with_problems(self, problems: Sequence[Problem]) -> Plan | Refused:
        """This plan; or, where a check has found problems, its refusal."""
        if not problems:
            return self
        findings: dict[str, Any] = {name: getattr(self, name) for name in _FINDINGS}
        return Refused(problems=tuple(problems), known=self.known, **findings)

    def after(self, checked: Checked) -> Plan | Refused:
        """This plan with the room on the disks; or, where the check has found problems, its refusal."""
        return replace(self, disk=checked.disk).with_problems(checked.problems)


@dataclass(frozen=True, kw_only=True)
class Refused(_Outcome):
    """A run that cannot start: every problem, and what is known all the same, by the names of a Plan's fields."""

    ok: ClassVar[bool] = False

    problems: tuple[Problem, ...]
    known: dict[str, Any]
    migrations: tuple[Migration, ...] = ()
    notes: tuple[str, ...] = ()
    provenance: dict[str, str] = field(default_factory=dict)

    def require(self) -> NoReturn:
        """Raises PlanError (a ValueError) that lists every problem."""
        raise PlanError(self.problems)

    def with_problems(self, problems: Sequence[Problem]) -> Refused:
        """This refusal with more problems."""
        return replace(self, problems=(*self.problems, *problems))

    def after(self, checked: Checked) -> Refused:
        """This refusal; nothing was checked."""
        return self.with_problems(checked.problems)


@dataclass(frozen=True, kw_only=True)
class Checked:
    """What a plan turned out to be where it runs. None: not looked at."""

    parameters: dict[str, int] | None = None  # of the model as built, by component
    backend: str | None = None  # who computes the model's operation (hf_mamba/ops)
    threads: int | None = None  # of a step on a CPU
    memory: dict[str, int] | None = None  # of a process on a CPU: predicted_bytes, and the usable_bytes here
    deepspeed: dict[str, Any] | None = None  # batch, stage and precision as DeepSpeed reads them
    disk: tuple[dict[str, Any], ...] = ()  # see preflight/cost/disk.py: check_room
    fsdp: FsdpPlan | None = None  # as accelerate's plugin has it
    problems: tuple[Problem, ...] = ()
    notes: tuple[str, ...] = ()

    def require(self) -> Checked:
        """This, or PlanError (a ValueError) that lists every problem."""
        if self.problems:
            raise PlanError(self.problems)
        return self

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return {**asdict(self), "problems": [p._asdict() for p in self.problems], "notes": list(self.notes)}

    def save(self, folder: str | os.PathLike[str]) -> Path:
        """Write checked.json into the folder, complete or not at all."""
        return write_json(Path(folder) / CHECKED_FILE, self.to_dict())
