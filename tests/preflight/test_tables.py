"""The tables of keys against the installed DeepSpeed: a new, renamed, deprecated or removed key fails here by name."""

import copy
import os
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

os.environ.setdefault("DS_ACCELERATOR", "cpu")

import deepspeed
import pytest
from deepspeed.comm.config import CommsLoggerConfig
from deepspeed.compile.config import CompileConfig
from deepspeed.monitor.config import CometConfig, CSVConfig, TensorBoardConfig, WandbConfig
from deepspeed.runtime import config as ds_config_module
from deepspeed.runtime.config import DeepSpeedConfig
from deepspeed.runtime.precision_config import DeepSpeedBF16Config, DeepSpeedFP16Config
from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
from deepspeed.runtime.zero.leaf_module_config import DeepSpeedZeroLeafModuleConfig
from deepspeed.runtime.zero.offload_config import DeepSpeedZeroOffloadOptimizerConfig, DeepSpeedZeroOffloadParamConfig
from deepspeed.utils.config import DeepSpeedThroughputTimerConfig
from pydantic import BaseModel, ValidationError

from hf_mamba.dotted import get, put
from hf_mamba.findings import Findings
from hf_mamba.preflight import resolve
from hf_mamba.preflight.deepspeed.config import suggest
from hf_mamba.preflight.deepspeed.inert import INERT
from hf_mamba.preflight.deepspeed.keys import AUTO, AUTO_IS_A_VALUE, DEEPSPEED_VERSION, KEYS, KINDS, OPEN_BLOCKS
from hf_mamba.preflight.deepspeed.migrations import MIGRATIONS, REFUSED
from hf_mamba.preflight.deepspeed.readback import check_readback
from hf_mamba.preflight.kinds import KindError, check
from hf_mamba.private.deepspeed import world_of

MODELS: dict[str, type[BaseModel]] = {
    "zero_optimization": DeepSpeedZeroConfig,
    "zero_optimization.offload_param": DeepSpeedZeroOffloadParamConfig,
    "zero_optimization.offload_optimizer": DeepSpeedZeroOffloadOptimizerConfig,
    "zero_optimization.leaf_module": DeepSpeedZeroLeafModuleConfig,
    "fp16": DeepSpeedFP16Config,
    "bf16": DeepSpeedBF16Config,
    "compile": CompileConfig,
    "tensorboard": TensorBoardConfig,
    "wandb": WandbConfig,
    "csv_monitor": CSVConfig,
    "comet": CometConfig,
    "comms_logger": CommsLoggerConfig,
    "timers.throughput": DeepSpeedThroughputTimerConfig,
}
LEGACY = {row.old for row in MIGRATIONS} | set(INERT) | {"optimizer", "scheduler"}
PARSED = list(MODELS.items())


class Recorder(dict):  # type: ignore[type-arg]
    """A configuration that remembers which keys it was asked for."""

    def __init__(self, content: dict[str, Any], prefix: str, asked: set[str]) -> None:
        blocks = {k: Recorder(v, f"{prefix}{k}.", asked) if isinstance(v, dict) else v for k, v in content.items()}
        super().__init__(blocks)
        self.prefix, self.asked = prefix, asked

    def get(self, key: Any, default: Any = None) -> Any:
        self.asked.add(f"{self.prefix}{key}")
        return super().get(key, default)

    def __contains__(self, key: object) -> bool:
        self.asked.add(f"{self.prefix}{key}")
        return super().__contains__(key)

    def __getitem__(self, key: Any) -> Any:
        self.asked.add(f"{self.prefix}{key}")
        return super().__getitem__(key)

    def keys(self) -> Any:
        return _Keys(self)

    def __copy__(self) -> "Recorder":
        return Recorder(dict(self), self.prefix, self.asked)


class _Keys:
    """`key in config.keys()` counts as asking too."""

    def __init__(self, owner: Recorder) -> None:
        self.owner = owner

    def __contains__(self, key: object) -> bool:
        return key in self.owner

    def __iter__(self) -> Iterator[Any]:
        return iter(list(dict.keys(self.owner)))


def known(key: str) -> bool:
    first = key.partition(".")[0]
    return key in KINDS or key in LEGACY or first in REFUSED or any(key.startswith(f"{b}.") for b in OPEN_BLOCKS)


def fields(model: type[BaseModel]) -> Iterator[tuple[str, str, bool]]:
    """(documented name, python name, deprecated) of a model's fields."""
    for name, field in model.model_fields.items():
        extra = field.json_schema_extra
        yield field.alias or name, name, bool(isinstance(extra, dict) and extra.get("deprecated"))


@pytest.mark.parametrize(("prefix", "model"), PARSED, ids=[prefix for prefix, _ in PARSED])
def test_every_field_of_a_model_has_a_row(prefix: str, model: type[BaseModel]) -> None:
    for name, python_name, deprecated in fields(model):
        if deprecated:
            assert f"{prefix}.{name}" in LEGACY, f"{prefix}.{name} is deprecated now: add it to MIGRATIONS"
        else:
            assert known(f"{prefix}.{name}"), f"{prefix}.{name} is new: add it to KEYS"
            # pydantic takes the python name too (populate_by_name); Trainer's "auto" does not
            assert name == python_name or known(f"{prefix}.{python_name}"), f"add {prefix}.{python_name} to MIGRATIONS"


@pytest.mark.parametrize(("prefix", "model"), PARSED, ids=[prefix for prefix, _ in PARSED])
def test_every_row_of_a_block_is_a_field(prefix: str, model: type[BaseModel]) -> None:
    names = {name for name, _, deprecated in fields(model) if not deprecated}
    rows = {key.removeprefix(f"{prefix}.") for key, _, _ in KEYS if key.startswith(f"{prefix}.")}
    assert {row for row in rows if "." not in row} <= names


def test_removed_keys_have_rows() -> None:
    removed = set(ds_config_module._REMOVED_TOP_LEVEL_CONFIG_KEYS)
    removed |= {f"zero_optimization.{key}" for key in ds_config_module._REMOVED_ZERO_CONFIG_KEYS}
    rows = {row.old for row in MIGRATIONS if row.action == "removed"}
    assert removed <= rows


def test_every_key_that_deepspeed_reads_has_a_row() -> None:
    """Run DeepSpeed's own reader over a configuration that remembers what it is asked for."""
    asked: set[str] = set()
    full: dict[str, Any] = {"train_micro_batch_size_per_gpu": 1}
    blocks = [key for key, kind, _ in KEYS if kind is dict and key not in MODELS and key not in OPEN_BLOCKS]
    for block in blocks:
        put(full, block, get(full, block, {}))
    full["torch_autocast"] = {"enabled": False, "dtype": "bfloat16", "lower_precision_safe_modules": []}
    DeepSpeedConfig(Recorder(copy.deepcopy(full), "", asked))
    own = {"pipeline", "data_efficiency"}
    unknown = sorted(key for key in asked if not known(key) and key.partition(".")[0] not in own)
    assert not unknown, f"new in DeepSpeed {deepspeed.__version__}: add to KEYS {unknown}"


def test_every_top_level_row_is_read_by_deepspeed() -> None:
    """A row that the installed release no longer reads would let a dead key pass."""
    asked: set[str] = set()
    with world_of(2):
        DeepSpeedConfig(Recorder({"train_micro_batch_size_per_gpu": 1, "optimizer": {"type": "x"}}, "", asked))
    read_elsewhere = {"vocabulary_size"}  # through the raw dictionary, in _do_warning_check
    rows = {key for key, _, _ in KEYS if "." not in key} - read_elsewhere
    assert not sorted(rows - asked)


def test_sources_exist() -> None:
    root = os.path.dirname(deepspeed.__file__)
    sources = {source for _, _, source in KEYS} | {row.source for row in MIGRATIONS}
    assert not [s for s in sources if s != "docs" and not os.path.isfile(os.path.join(root, s))]


def test_rows_are_for_a_release_not_newer_than_installed() -> None:
    assert tuple(map(int, DEEPSPEED_VERSION.split("."))) <= tuple(
        map(int, deepspeed.__version__.split("+")[0].split("."))
    )


@pytest.mark.parametrize(("prefix", "model"), PARSED, ids=[prefix for prefix, _ in PARSED])
def test_kinds_are_not_looser_than_the_models(prefix: str, model: type[BaseModel]) -> None:
    """Whatever a row's kind lets through, DeepSpeed's model takes; bounds are probed on both sides."""
    candidates: list[Any] = [
        True,
        False,
        0,
        1,
        3,
        4,
        10**6,
        0.0,
        0.5,
        1.0,
        2.5,
        "x",
        "cpu",
        "nvme",
        "none",
        [],
        ["a"],
        {},
    ]
    for name, _, deprecated in fields(model):
        kind = KINDS.get(f"{prefix}.{name}")
        if deprecated or kind in (None, dict, Any):
            continue
        for value in candidates:
            try:
                canonical = check(kind, value)
            except KindError:
                continue
            if (prefix, name, value) == ("zero_optimization", "compute_grad_norm", False):
                continue  # refused in combination with stage 0, which has a rule of its own
            content = {name: canonical, **({"stage": 3} if name == "offload_optimizer" else {})}
            try:
                model(**content)
            except ValidationError as error:
                pytest.fail(f"{prefix}.{name}: {kind} lets {value!r} through: {error}")


@pytest.mark.parametrize("row", MIGRATIONS, ids=[row.old for row in MIGRATIONS])
@pytest.mark.parametrize("value", [True, False, None, {"enabled": False}, {"enabled": True}, "x"], ids=repr)
def test_every_legacy_key_is_moved_or_named(row: Any, value: Any) -> None:
    """Never silent: a legacy key leaves a migration, a problem or a note, and is gone from what DeepSpeed gets."""
    config: dict[str, Any] = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": 1}}
    put(config, row.old, value)
    plan = resolve({"deepspeed": config}, world_size=1, environ={}, device="cpu")
    assert plan.problems or plan.migrations or f"left out of ds_config: {row.old}" in plan.provenance
    if plan.ok and row.old != "zero_optimization":
        assert get(plan.ds_config or {}, row.old) is None


def test_auto_rows_are_known_keys() -> None:
    assert set(AUTO) | AUTO_IS_A_VALUE <= set(KINDS)


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        ("zero_optimisation", "zero_optimization"),
        ("gradient_cliping", "gradient_clipping"),
        ("zero_optimization.overlap_com", "zero_optimization.overlap_comm"),
        ("overlap_comm", "zero_optimization.overlap_comm"),
        ("stage", "zero_optimization.stage"),
        ("checkpoint.load_univeral", "checkpoint.load_universal"),
        ("train_micro_batch_size", "train_micro_batch_size_per_gpu"),
        ("completely_else", ""),
        ("zero_optimization.x", ""),
    ],
)
def test_did_you_mean(written: str, meant: str) -> None:
    assert suggest(written) == meant


def test_a_key_that_the_installed_deepspeed_lacks_is_named():
    plan = resolve({"deepspeed": "zero2", "num_gpus": 2, "resume": "never"}, environ={}, device="gpu").require()
    config = {**plan.ds_config, "zero_optimization": {**plan.ds_config["zero_optimization"], "not_yet": True}}
    check_readback(replace(plan, ds_config=config), findings := Findings())
    (problem,) = findings.problems
    assert "not_yet" in problem.found
