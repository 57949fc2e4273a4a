"""The resolver point by point: batch, "auto", missing keys, migrations, combinations, precision, launcher, files."""

import base64
import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from hf_mamba.family import count_parameters, get_preset
from hf_mamba.findings import Problem
from hf_mamba.models.mamba.presets import PRESETS
from hf_mamba.preflight import Plan, PlanError, Refused, resolve

pytestmark = pytest.mark.core

ROOT = Path(__file__).parents[2]
TEMPLATES = sorted((ROOT / "ds_configs").glob("*.json"))
Z1: dict[str, Any] = {"zero_optimization": {"stage": 1}}


def plan(ds: Any = None, world: int = 2, device: str = "cpu", environ: Any = None, **arguments: Any) -> Plan | Refused:
    values = {"resume": "never", **arguments, "deepspeed": ds}
    return resolve(values, world_size=world, environ=environ or {}, device=device)


def keys(found: Plan | Refused) -> list[str]:
    return [problem.key for problem in found.problems]


def triad(found: Plan) -> tuple[Any, Any, Any, Any]:
    return (found.global_batch_size, found.micro_batch_size, found.gradient_accumulation_steps, found.world_size)


def has_auto(block: Any) -> bool:
    return any(has_auto(value) for value in block.values()) if isinstance(block, dict) else block == "auto"


# --- presets and templates


@pytest.mark.parametrize("template", TEMPLATES, ids=lambda path: path.stem)
@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_and_template(preset: str, template: Path) -> None:
    found = plan(str(template), 4, "gpu", preset=preset).require()
    assert found.ds_config is not None
    assert not has_auto(found.ds_config)
    assert not {"optimizer", "scheduler", "train_batch_size"} & found.ds_config.keys()
    assert found.parameters["estimated"] == sum(found.parameters["by_component"].values())


def test_the_7b_plan() -> None:
    found = resolve({"preset": "7b_mamba", "num_gpus": 4, "resume": "never"}, environ={}).require()
    assert triad(found) == (128, 4, 8, 4)
    assert found.parameters["estimated"] == 6_893_552_640
    assert found.tokens_per_step == 128 * 2048
    assert found.dtype == "bf16"
    assert found.training_arguments["use_cpu"] is False


def test_templates_are_all_there() -> None:
    assert {path.stem for path in TEMPLATES} == {"zero1", "zero2", "zero3", "zero2_offload", "zero3_offload"}


def test_no_heavy_import() -> None:
    code = "import sys; from hf_mamba.preflight import resolve; resolve({'preset': '7b_mamba'}, environ={}); "
    code += "heavy = {'torch', 'transformers', 'deepspeed', 'accelerate', 'peft', 'datasets', 'tokenizers', 'pyarrow', "
    code += "'huggingface_hub', 'numpy', 'pandas', 'matplotlib', 'rich', 'yaml'}; print(heavy & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout.strip() == "set()", done.stderr


def test_a_preflight_imports_no_more_than_its_read_back(tmp_path: Path) -> None:
    """Trainer's arguments, the tokenizer's class and DeepSpeed's configuration; what prints the screen is small."""
    code = (
        "import contextlib, io, json, sys\n"
        "from transformers import AutoTokenizer, PreTrainedTokenizerFast, Trainer, TrainingArguments\n"
        "from deepspeed.runtime.config import DeepSpeedConfig\n"
        "before = {name.partition('.')[0] for name in sys.modules}\n"
        "from hf_mamba.cli import main\n"
        "flags = '--preset tiny_mamba --max_steps 4 --use_cpu --deepspeed zero2'.split()\n"
        "with contextlib.redirect_stdout(io.StringIO()): assert main(['preflight', *flags]) == 0\n"
        "more = {name.partition('.')[0] for name in sys.modules} - before - set(sys.stdlib_module_names)\n"
        "print(json.dumps(sorted(name for name in more if not name.startswith('_'))))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert set(json.loads(done.stdout.splitlines()[-1])) <= {"hf_mamba", "xxhash"}, done.stdout + done.stderr


# --- batch


@pytest.mark.parametrize(
    ("arguments", "world", "expected"),
    [
        ({"global_batch_size": 64}, 2, (64, 8, 4, 2)),  # capped by the preset's micro-batch
        ({"global_batch_size": 64, "per_device_train_batch_size": 4}, 2, (64, 4, 8, 2)),
        ({"global_batch_size": 64, "gradient_accumulation_steps": 4}, 2, (64, 8, 4, 2)),
        ({"global_batch_tokens": 64 * 256}, 2, (64, 8, 4, 2)),
        ({"per_device_train_batch_size": 3}, 2, (6, 3, 1, 2)),
        ({"per_device_train_batch_size": "auto"}, 2, (16, 8, 1, 2)),
        ({"global_batch_size": 8.0, "per_device_train_batch_size": 4.0}, 2, (8, 4, 1, 2)),
        ({"global_batch_size": 127 * 2}, 2, (254, 1, 127, 2)),
    ],
)
def test_batch(arguments: dict[str, Any], world: int, expected: tuple[int, ...]) -> None:
    assert triad(plan(None, world, **arguments).require()) == expected


@pytest.mark.parametrize(
    ("arguments", "world", "offers"),
    [
        ({"global_batch_size": 30, "per_device_train_batch_size": 4}, 2, "24 or 32"),
        ({"global_batch_size": 2}, 4, "4"),
        ({"global_batch_size": 30, "gradient_accumulation_steps": 4}, 2, "24 or 32"),
        ({"global_batch_size": 7}, 2, "6 or 8"),
        ({"global_batch_tokens": 300}, 1, "256 or 512"),
        ({"global_batch_size": 9, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}, 2, "8"),
    ],
)
def test_batch_that_does_not_divide_offers_the_nearest(arguments: dict[str, Any], world: int, offers: str) -> None:
    found = plan(None, world, **arguments)
    assert len(found.problems) == 1
    assert offers in found.problems[0].fix


@pytest.mark.parametrize("value", [1.5, True, "4", 0, -1, float("nan"), float("inf"), [], 10**400])
def test_what_is_no_number_of_sequences(value: Any) -> None:
    assert keys(plan(None, per_device_train_batch_size=value)) == ["per_device_train_batch_size"]
    if value == "4":  # in a file, a number in quotation marks is the number
        assert plan({**Z1, "train_micro_batch_size_per_gpu": value}).require().micro_batch_size == 4
    else:
        assert "train_micro_batch_size_per_gpu" in keys(plan({**Z1, "train_micro_batch_size_per_gpu": value}))


def test_whole_floats_become_integers() -> None:
    found = plan(
        {**Z1, "train_micro_batch_size_per_gpu": 2.0, "gradient_accumulation_steps": 2.0, "train_batch_size": 8.0}
    )
    assert triad(found.require()) == (8, 2, 2, 2)
    assert type(found.ds_config["train_micro_batch_size_per_gpu"]) is int  # type: ignore[index]


def test_two_places_two_values() -> None:
    found = plan({**Z1, "train_micro_batch_size_per_gpu": 2}, per_device_train_batch_size=4)
    assert keys(found) == ["train_micro_batch_size_per_gpu"]
    assert "4 (argument per_device_train_batch_size)" in found.problems[0].found
    assert "2 (train_micro_batch_size_per_gpu in" in found.problems[0].found


@pytest.mark.parametrize(("key", "size"), [("sequence_parallel_size", 2), ("tensor_parallel", {"autotp_size": 2})])
def test_model_parallel_ranks_hold_no_data(key: str, size: Any) -> None:
    found = plan({**Z1, key: size}, 4, per_device_train_batch_size=3)
    assert found.known["world_size"] == 2
    assert found.known["global_batch_size"] == 6
    assert len(found.problems) == 1
    assert "num_gpus" in keys(plan({**Z1, key: size}, 3))


# --- "auto" and missing keys


def test_auto_is_what_trainer_would_use() -> None:
    zero = {"stage": 3, "reduce_bucket_size": "auto", "stage3_prefetch_bucket_size": "auto"}
    zero |= {"stage3_param_persistence_threshold": "auto", "stage3_gather_16bit_weights_on_model_save": "auto"}
    found = plan({"zero_optimization": zero, "gradient_clipping": "auto"}, max_grad_norm=0.5).require()
    assert found.ds_config is not None
    d = 192
    assert found.ds_config["zero_optimization"] == {
        "stage": 3,
        "reduce_bucket_size": d * d,
        "stage3_prefetch_bucket_size": int(0.9 * d * d),
        "stage3_param_persistence_threshold": 10 * d,
        "stage3_gather_16bit_weights_on_model_save": True,
    }
    assert found.ds_config["gradient_clipping"] == 0.5


@pytest.mark.parametrize("key", ["overlap_comm", "allgather_bucket_size"])
def test_auto_that_nobody_fills_is_deepspeeds_default(key: str) -> None:
    found = plan({"zero_optimization": {"stage": 2, key: "auto"}}).require()
    assert [m.old for m in found.migrations] == [f'zero_optimization.{key}: "auto"']
    assert found.ds_config["zero_optimization"] == {"stage": 2}  # type: ignore[index]


def test_missing_keys_are_written() -> None:
    found = plan({"zero_optimization": {"stage": 3}}, max_grad_norm=0.0).require()
    assert found.ds_config is not None
    assert found.ds_config["gradient_clipping"] == 0.0
    assert found.ds_config["bf16"] == {"enabled": False}
    assert found.ds_config["zero_optimization"]["stage3_gather_16bit_weights_on_model_save"] is True
    assert any("gradient_clipping" in note for note in found.notes)


def test_clipping_in_the_file_wins_over_the_preset_and_not_over_a_flag() -> None:
    assert plan({**Z1, "gradient_clipping": 5}).require().training_arguments["max_grad_norm"] == 5.0
    assert keys(plan({**Z1, "gradient_clipping": 5}, max_grad_norm=1.0)) == ["gradient_clipping"]


def test_every_number_says_where_it_comes_from() -> None:
    found = plan(str(ROOT / "ds_configs/zero3.json"), preset="130m_mamba").require()

    def leaves(block: dict[str, Any], prefix: str) -> list[str]:
        return [
            leaf
            for key, value in block.items()
            for leaf in (leaves(value, f"{prefix}{key}.") if isinstance(value, dict) else [f"{prefix}{key}"])
        ]

    missing = [leaf for leaf in leaves(found.ds_config or {}, "ds_config.") if leaf not in found.provenance]
    assert not missing
    assert found.provenance["micro_batch_size"] == "preset 130m_mamba"


# --- migrations, combinations


def test_cpu_offload_in_every_place() -> None:
    for config in (
        {"zero_optimization": {"stage": 2, "cpu_offload": True}},
        {**Z1, "cpu_offload": True},
        {**Z1, "offload_optimizer": {"device": "cpu"}},
    ):
        found = plan(config).require()
        assert found.ds_config is not None
        assert found.ds_config["zero_optimization"]["offload_optimizer"]["device"] == "cpu"
        assert found.migrations
    off = plan({"zero_optimization": {"stage": 2, "cpu_offload": False, "offload_optimizer": {"device": "cpu"}}})
    assert off.require().ds_config["zero_optimization"]["offload_optimizer"] == {"device": "cpu"}  # type: ignore[index]
    nvme = {"stage": 3, "cpu_offload": True, "offload_optimizer": {"device": "nvme", "nvme_path": "/tmp"}}
    assert keys(plan({"zero_optimization": nvme})) == ["zero_optimization.cpu_offload"]


def test_pinning_moves_into_the_blocks() -> None:
    zero = {"stage": 2, "cpu_offload": True, "cpu_offload_use_pin_memory": False}
    found = plan({"zero_optimization": zero}).require()
    assert found.ds_config["zero_optimization"]["offload_optimizer"] == {"device": "cpu", "pin_memory": False}  # type: ignore[index]


COMBINATIONS: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    ("zero_optimization.offload_optimizer", {"stage": 0, "offload_optimizer": {"device": "cpu"}}, {}),
    ("zero_optimization.offload_optimizer.nvme_path", {"stage": 3, "offload_optimizer": {"device": "nvme"}}, {}),
    ("zero_optimization.offload_param.nvme_path", {"stage": 3, "offload_param": {"device": "nvme"}}, {}),
    (
        "zero_optimization.offload_optimizer.device",
        {"stage": 2, "offload_optimizer": {"device": "nvme", "nvme_path": "/tmp"}},
        {},
    ),
    ("optim", {"stage": 2, "offload_optimizer": {"device": "cpu"}}, {"optim": "adafactor"}),
    (
        "zero_optimization.offload_optimizer.ratio",
        {"stage": 2, "offload_optimizer": {"device": "cpu", "ratio": 0.5}},
        {},
    ),
    ("zero_optimization.compute_grad_norm", {"stage": 3, "compute_grad_norm": False}, {}),
    ("zero_optimization.compute_grad_norm", {"stage": 2, "compute_grad_norm": False}, {}),
    ("zero_optimization.zero_hpz_partition_size", {"stage": 3, "zero_hpz_partition_size": 3}, {}),
    ("zero_optimization.zero_quantized_gradients", {"stage": 2, "zero_quantized_gradients": True}, {}),
    ("zero_optimization.allgather_bucket_size", {"stage": 2, "allgather_bucket_size": 3}, {}),
    ("zero_optimization.zenflow", {"stage": 2, "zenflow": {}}, {}),
    ("zero_optimization.stage", {"stage": "three"}, {}),
    ("fp16", {"stage": 2}, {"fp16": True}),
    ("bf16", {"stage": 2}, {"fp16": True, "bf16": True}),
    ("save_only_model", {"stage": 2}, {"save_only_model": True, "resume": "x/checkpoint-1"}),
    ("auto_find_batch_size", {"stage": 2}, {"auto_find_batch_size": True}),
    ("load_best_model_at_end", {"stage": 2}, {"load_best_model_at_end": True}),
    ("logging_steps", {"stage": 2}, {"logging_steps": 1.5}),
    ("bf16_full_eval", {"stage": 2}, {"bf16_full_eval": True}),
    ("num_train_epochs", {"stage": 2}, {"num_train_epochs": 3}),
    ("max_tokens", {"stage": 2}, {"max_tokens": 100}),
    ("warmup_steps", {"stage": 2}, {"warmup_steps": 10, "max_steps": 10}),
    ("spike_sigma", {"stage": 0}, {"spike_sigma": 6}),
    ("spike_sigma", {"stage": 1}, {"spike_sigma": -1}),
    ("spike_sigma", {"stage": 2, "compute_grad_norm": False}, {"spike_sigma": 6, "max_grad_norm": 0}),
    ("spike_sigma", {"stage": 2}, {"spike_sigma": 6, "fp16": True}),
    ("max_bad_steps", {"stage": 2}, {"max_bad_steps": 0}),
]


@pytest.mark.parametrize(
    ("key", "zero", "arguments"), COMBINATIONS, ids=[f"{i}-{row[0]}" for i, row in enumerate(COMBINATIONS)]
)
def test_combination(key: str, zero: dict[str, Any], arguments: dict[str, Any]) -> None:
    assert key in keys(plan({"zero_optimization": zero}, **arguments))


TOP_LEVEL: list[tuple[str, dict[str, Any]]] = [
    ("scheduler.type", {"scheduler": {"type": "OneCycle"}}),
    ("optimizer.type", {"optimizer": {"type": "Lamb", "params": {"lr": "auto"}}}),
    ("data_efficiency", {"data_efficiency": {"enabled": True}}),
    ("gradient_allreduce_op", {"gradient_allreduce_op": "sum"}),
    ("managed_gradient_accumulation", {"managed_gradient_accumulation": False}),
    ("torch_autocast.enabled", {"torch_autocast": {"enabled": True}, "bf16": {"enabled": True}}),
    ("data_types.param_dtype", {"data_types": {"param_dtype": "bf16"}}),
    ("checkpoint.load_universal", {"checkpoint": {"load_universal": True}}),
    ("checkpoint.load_univeral", {"checkpoint": {"load_univeral": True}}),
    ("checkpoint.writer", {"checkpoint": {"writer": {"type": "fast"}}}),
    ("compile.deepcompile", {"compile": {"deepcompile": True}}),
    ("elasticity", {"elasticity": {"enabled": True}}),
]


@pytest.mark.parametrize(("key", "config"), TOP_LEVEL, ids=[row[0] for row in TOP_LEVEL])
def test_top_level(key: str, config: dict[str, Any]) -> None:
    assert key in keys(plan({**Z1, **config}))


def test_a_folder_that_cannot_be_the_runs_is_named_before_anything_is_read(tmp_path: Path) -> None:
    taken, foreign, damaged, file = (tmp_path / name for name in ("taken", "foreign", "damaged", "file"))
    for folder in (taken, foreign, damaged):
        folder.mkdir()
    (foreign / "thesis.tex").touch()
    file.touch()
    mine = {"preset": "tiny_mamba", "output_dir": str(taken), "seed": 1}
    first = plan(**mine)
    record = {"model_config": first.model_config, "seq_len": 256, "global_batch_size": first.global_batch_size}
    (taken / "run.json").write_text(json.dumps(record | {"seed": 1}))
    (taken / "log.jsonl").touch()

    def why(**changes: Any) -> str:
        return " ".join(problem.why for problem in plan(**(mine | changes)).problems if problem.key == "output_dir")

    assert not why()
    assert not why(output_dir=str(tmp_path / "new" / "run"))
    assert "belongs to another run: its seed differ" in why(seed=2)
    assert "holds no run.json" in why(output_dir=str(foreign))
    for text in ("[1]", "{"):
        (damaged / "run.json").write_text(text)
        assert "cannot be read" in why(output_dir=str(damaged))
    for below in (file, file / "run"):
        assert f"{file} is not a folder" in why(output_dir=str(below))
    elsewhere = resolve(mine | {"output_dir": str(foreign), "num_gpus": 4}, environ={})
    assert not elsewhere.problems  # it is another machine's folder


def test_the_home_folder_may_be_written_in_a_file_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    found = plan(preset="tiny_mamba", output_dir="~/mine")
    assert found.training_arguments["output_dir"] == str(tmp_path / "mine")


def test_all_problems_at_once() -> None:
    config = {
        "zero_optimisation": {},
        "train_batch_size": 30,
        "scheduler": {"type": "x"},
        "zero_optimization": {"stage": 9},
    }
    found = plan(config, per_device_train_batch_size=4, seq_len=-1)
    assert {"seq_len", "scheduler.type", "zero_optimisation", "zero_optimization.stage", "train_batch_size"} == set(
        keys(found)
    )
    with pytest.raises(PlanError, match=r"5 problems(.|\n)*zero_optimisation(.|\n)*train_batch_size"):
        found.require()


# --- precision


def test_bf16_in_two_places() -> None:
    found = plan({**Z1, "bf16": {"enabled": True}}, bf16=False)
    assert keys(found) == ["bf16.enabled"]
    assert "argument bf16" in found.problems[0].found
    assert plan({**Z1, "bf16": {"enabled": True}}).require().training_arguments["bf16"] is True
    assert plan({**Z1, "bfloat16": {"enabled": True}}).require().dtype == "bf16"


# --- accelerate: environment, its own file


def test_accelerate_environment_is_part_of_the_plan() -> None:
    environ = {"ACCELERATE_MIXED_PRECISION": "bf16", "WORLD_SIZE": "4", "ACCELERATE_USE_DEEPSPEED": "true"}
    environ |= {"ACCELERATE_DEEPSPEED_ZERO_STAGE": "3", "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "4"}
    found = resolve({"resume": "never"}, environ=environ, device="cpu").require()
    assert (found.dtype, found.world_size, found.gradient_accumulation_steps) == ("bf16", 4, 4)
    assert found.ds_config["zero_optimization"]["stage"] == 3  # type: ignore[index]
    assert keys(resolve({"num_gpus": 2, "resume": "never"}, environ=environ, device="cpu")) == ["num_gpus"]
    contradicting = resolve({"deepspeed": Z1, "resume": "never"}, environ=environ, device="cpu")
    assert keys(contradicting) == ["zero_optimization.stage"]


def test_accelerate_switches_that_change_the_run() -> None:
    assert "deepspeed" in keys(plan(Z1, environ={"ACCELERATE_USE_CPU": "true"}))
    assert "deepspeed" in keys(plan(Z1, environ={"ACCELERATE_USE_FSDP": "true"}))
    assert keys(plan(environ={"ACCELERATE_MIXED_PRECISION": "fp8"})) == ["mixed_precision"]
    assert keys(plan(environ={"WORLD_SIZE": "two"})) == ["WORLD_SIZE"]


def test_accelerates_own_fields_are_neutralised() -> None:
    environ = {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_CONFIG_DS_FIELDS": "zero_stage,gradient_clipping"}
    assert plan(Z1, environ=environ).require().environment == {"ACCELERATE_CONFIG_DS_FIELDS": ""}


def test_accelerates_own_file(tmp_path: Path) -> None:
    file = tmp_path / "accelerate.yaml"
    file.write_text(
        "compute_environment: LOCAL_MACHINE\ndistributed_type: DEEPSPEED\nnum_processes: 4\nmixed_precision: bf16\n"
        "deepspeed_config:\n  zero_stage: 2\n  gradient_clipping: 0.5\n"
    )
    values = {"resume": "never", "accelerate_config": str(file)}
    found = resolve(values, environ={}).require()
    assert (found.world_size, found.dtype, found.training_arguments["max_grad_norm"]) == (4, "bf16", 0.5)
    assert found.device == "gpu"  # the file's word, where no GPU is in sight
    assert keys(resolve({**values, "max_grad_norm": 1.0}, environ={})) == ["gradient_clipping"]
    file.write_text("][")
    assert keys(resolve(values, environ={})) == ["accelerate_config"]


# --- files


BAD_FILES: dict[str, tuple[bytes, str]] = {
    "duplicate": (b'{"zero_optimization": {"stage": 1, "stage": 2}}', "duplicates"),
    "truncated": (b'{"zero_optimization": {"stage"', "not JSON"),
    "empty": (b"", "empty"),
    "list": (b"[1, 2]", "a block"),
    "null": (b"null", "configuration"),
    "nothing": (b"{}", "empty"),
    "nan": (b'{"gradient_clipping": NaN, "zero_optimization": {"stage": 1}}', "finite"),
    "huge number": (b'{"gradient_clipping": 1e999, "zero_optimization": {"stage": 1}}', "finite"),
    "many digits": (b'{"train_batch_size": ' + b"9" * 5000 + b"}", ""),
    "deep": (b'{"a":' * 200 + b"1" + b"}" * 200, "deep"),
    "very deep": (b"[" * 200_000, "deep"),
    "binary": (b"\xff\xfe\x00\x01", "not text"),
    "large": (b" " * 2_000_000 + b"{}", "too large"),
    "wrong types": (b'{"zero_optimization": 7, "bf16": "yes", "fp16": []}', "kind"),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_bad_file(name: str, tmp_path: Path) -> None:
    content, word = BAD_FILES[name]
    file = tmp_path / "ds.json"
    file.write_bytes(content)
    found = plan(str(file))
    assert found.problems
    assert word in " ".join(str(problem) for problem in found.problems)
    json.dumps(found.to_dict(), allow_nan=False)


def test_unreadable_files(tmp_path: Path) -> None:
    assert "no such file" in str(plan(str(tmp_path / "none.json")).problems[0])
    assert "a folder" in str(plan(str(tmp_path)).problems[0])
    assert plan("a\0b").problems
    if os.getuid():
        locked = tmp_path / "locked.json"
        locked.write_text("{}")
        locked.chmod(0)
        assert "cannot be read" in str(plan(str(locked)).problems[0])


GOOD_FILES: dict[str, bytes] = {
    "byte order mark": b'\xef\xbb\xbf{"zero_optimization": {"stage": 1}}',
    "carriage returns": b'{\r\n"zero_optimization": {\r\n"stage": 1}}\r\n',
    "remark": b'{"zero_optimization": {"stage": 1}, // two\n "wall_clock_breakdown": false}',
    "hash": b'{\n# stage "1"\n"zero_optimization": {"stage": 1}}',
    "block remark": b'{/* of\nus */"zero_optimization": {"stage": 1}}',
    "last comma": b'{"zero_optimization": {"stage": 1,},}',
    "remark in a text": b'{"zero_optimization": {"stage": 1}, "csv_monitor": {"output_path": "s3://a/b#c", },}',
    "hjson": b"{\n  zero_optimization: {\n    stage: 1\n  }\n}",
    "yaml": b"zero_optimization:\n  stage: 1\n",
}


@pytest.mark.parametrize("name", GOOD_FILES)
def test_every_form_that_somebody_reads_is_read(name: str, tmp_path: Path) -> None:
    file = tmp_path / "ds.json"
    file.write_bytes(GOOD_FILES[name])
    found = plan(str(file)).require()
    assert found.ds_config["zero_optimization"] == {"stage": 1}  # type: ignore[index]
    if name == "remark in a text":
        assert found.ds_config["csv_monitor"]["output_path"] == "s3://a/b#c"  # type: ignore[index]


def test_base64_is_what_accelerate_takes() -> None:
    text = base64.urlsafe_b64encode(b'{"zero_optimization": {"stage": 1}, "_": "???>>>"}').decode()
    assert plan(text).require().ds_config["zero_optimization"] == {"stage": 1}  # type: ignore[index]


@pytest.mark.parametrize(
    "value", [7, ["x"], True, {"zero_optimization": {1: 2}}, {"x": object()}, {"bf16": {"enabled": object()}}]
)
def test_what_is_no_configuration(value: Any) -> None:
    assert plan(value).problems


# --- the rest


def test_unknown_preset_names_the_nearest() -> None:
    found = plan(preset="130m_mamb")
    assert keys(found)[0] == "preset"
    assert "130m_mamba" in found.problems[0].why


def test_model_folder(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").touch()
    (tmp_path / "config.json").write_text(
        json.dumps({"model_type": "mamba", "hidden_size": 64, "num_hidden_layers": 2})
    )
    found = plan(
        model_name_or_path=str(tmp_path), seq_len=32, max_steps=5, learning_rate=1e-3, per_device_train_batch_size=2
    )
    assert found.require().model_config["hidden_size"] == 64
    (tmp_path / "config.json").write_text(json.dumps({"d_model": 64, "n_layer": 2}))
    assert keys(plan(model_name_or_path=str(tmp_path), seq_len=32, max_steps=5)) == ["model_name_or_path"]
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "mamba", "hidden_size": "64"}))
    assert "hidden_size" in keys(plan(model_name_or_path=str(tmp_path), seq_len=32, max_steps=5))


def test_a_model_of_its_own_size_has_its_family_s_recipe(tmp_path: Path) -> None:
    """The published rates at the published sizes, the line between them elsewhere, 20 tokens a parameter."""
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "mamba", **PRESETS["370m_mamba"].config}))
    same = plan(config_name=str(tmp_path)).require()
    assert same.training_arguments["learning_rate"] == PRESETS["370m_mamba"].learning_rate
    assert (same.seq_len, same.micro_batch_size, same.preset, same.start_from) == (2048, 8, None, None)
    assert same.total_tokens == pytest.approx(20 * same.parameters["estimated"], rel=1e-3)
    between = plan(
        config_name=str(tmp_path / "config.json"), config_overrides="hidden_size=512,use_bias=true"
    ).require()
    assert (between.model_config["hidden_size"], between.model_config["use_bias"]) == (512, True)
    count = {name: sum(count_parameters(preset.config).values()) for name, preset in PRESETS.items()}
    share = math.log(between.parameters["estimated"] / count["tiny_mamba"])
    share /= math.log(count["130m_mamba"] / count["tiny_mamba"])
    assert between.training_arguments["learning_rate"] == pytest.approx(4e-3 * (3 / 4) ** share, rel=0.02)
    assert "M parameters, after Mamba's presets (130m_mamba is" in between.provenance["micro_batch_size"]


def test_overrides_of_a_preset_are_a_size_of_its_own() -> None:
    found = plan(config_overrides={"hidden_size": 128, "num_hidden_layers": 2}, max_steps=3).require()
    assert (found.preset, found.model_config["vocab_size"], found.run.output_dir) == (None, 4096, "runs/mamba")
    assert found.provenance["seq_len"].startswith("for 757.6k parameters, after Mamba's presets (tiny_mamba")


def test_a_preset_beside_a_model_gives_the_training_numbers(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "mamba", "hidden_size": 64}))
    found = plan(config_name=str(tmp_path), preset="130m_mamba", max_steps=3).require()
    assert (found.preset, found.seq_len, found.model_config["hidden_size"]) == (None, 2048, 64)
    assert any("the preset 130m_mamba gives its training numbers" in note for note in found.notes)


@pytest.mark.parametrize(
    ("more", "id", "fix"),
    [
        ({"model_name_or_path": "."}, "model-without-weights", "--config_name . for fresh weights"),
        ({"model_name_or_path": ".", "config_name": "."}, "two-models", "Keep one"),
        ({"config_name": ".", "config_overrides": "hiden_size=64"}, "unknown-field", "Did you mean hidden_size?"),
    ],
)
def test_a_model_that_cannot_be_meant(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, more: dict[str, str], id: str, fix: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("config.json").write_text(json.dumps({"model_type": "mamba", "hidden_size": 64}))
    found = plan(**more, max_steps=3).problems
    assert [problem.id for problem in found if fix in problem.fix] == [id]


@pytest.mark.parametrize("ds", [str(ROOT / "ds_configs/zero2.json"), {"x": 1}], ids=["plan", "refused"])
def test_saved(ds: Any, tmp_path: Path) -> None:
    found = plan(ds)
    assert json.loads(found.save(tmp_path).read_text()) == json.loads(json.dumps(found.to_dict()))


def test_in_a_plan_everything_is_known() -> None:
    """None stands only where it is a meaning of its own; where a number is missing there is no plan."""
    meanings = {"preset", "start_from", "rates", "hub", "ds_config", "fsdp"}
    known = plan(preset="130m_mamba").require().known
    assert {name for name, value in known.items() if value is None} == meanings - {"preset"}
    refused = plan(preset="130m_mamba", global_batch_size=7)
    assert not refused.ok
    assert refused.known["model_config"] == known["model_config"]
    assert "tokens_per_step" not in refused.known
    with pytest.raises(PlanError, match="global_batch_size"):
        refused.require()


@pytest.mark.parametrize(("config", "counted"), [({}, 159_308_544), ({"num_hidden_layers": 24}, 129_135_360)])
def test_a_configuration_without_fields_is_the_familys_default(config: dict[str, Any], counted: int) -> None:
    found = plan(model_config=config, seq_len=8, max_steps=1, learning_rate=1e-3).require()
    assert found.parameters["estimated"] == counted
    assert found.data.vocab_size == 50280


def test_a_check_that_fails_turns_a_plan_into_its_refusal() -> None:
    found = plan().require()
    problem = Problem("x", "1", "Why.", "Fix.", id="x")
    assert found.with_problems(()) is found
    refused = found.with_problems((problem,))
    assert (refused.ok, refused.problems, refused.known) == (False, (problem,), found.known)
    assert refused.with_problems((problem,)).problems == (problem, problem)


def test_json_has_the_promised_names() -> None:
    names = plan({"cpu_offload": False, **Z1}).to_dict()
    promised = "ok problems migrations micro_batch_size gradient_accumulation_steps world_size global_batch_size "
    promised += "tokens_per_step total_steps ds_config parameters provenance"
    assert set(promised.split()) <= names.keys()
    assert set(names["parameters"]) == {"estimated", "by_component"}
    assert set(names["migrations"][0]) == {"old", "new", "why", "id"}
    assert set(plan({"x": 1}).to_dict()["problems"][0]) == {"key", "found", "why", "fix", "id"}


def test_capacity_refuses_and_picks() -> None:
    pytest.importorskip("hf_mamba.preflight.cost.memory")
    big = plan(None, 1, "gpu", preset="7b_mamba", gpu_memory="16GB")
    assert any("does not fit" in problem.why for problem in big.problems)
    auto = plan(None, 1, "gpu", preset="130m_mamba", gpu_memory="80GB", per_device_train_batch_size="auto").require()
    assert auto.provenance["micro_batch_size"] == "the memory planner"
    assert keys(plan(None, 1, "gpu", gpu_memory="80")) == ["gpu_memory"]


# --- data


@pytest.mark.parametrize(
    ("names", "why"),
    [
        (["{}/books.jsonl"], "no such file or folder; did you mean"),
        (["{}/*.parquet"], "the pattern matches no file"),
        (["{}/book.jsonl:0"], "above 0"),
        (["{}/book.jsonl:1", "embedded"], "no weight was given for 'embedded'"),
        (["a!b"], "no hub name"),
    ],
)
def test_data_that_is_not_there(names: list[str], why: str, tmp_path: Path) -> None:
    (tmp_path / "book.jsonl").write_text('{"text": "a"}\n')
    found = plan(dataset=[name.format(tmp_path) for name in names])
    assert keys(found) == ["dataset"]
    assert why in found.problems[0].why
    assert not plan(dataset=[f"{tmp_path}/book.jsonl:2", f"{tmp_path}/*.jsonl:1", "owner/name:1"]).problems


def test_data_of_another_machine_is_a_note() -> None:
    found = resolve({"resume": "never", "num_gpus": 4, "dataset": ["/no/such.jsonl"]}, environ={})
    assert not found.problems
    assert "Not on this machine: /no/such.jsonl: no such file or folder." in found.notes


@pytest.mark.parametrize(
    ("tokens", "flag", "rows", "problem"),
    [
        (384, None, 400, None),  # the model's own
        (700, None, 704, None),  # grows to the next multiple of 16
        (700, 720, 720, None),
        (384, 512, 512, None),
        (700, 512, None, "704 or more"),
        (384, 256, None, "400 or more"),
        (-380, None, 384, None),  # another tokenizer's rows
    ],
)
def test_the_rows_of_the_plan_are_those_that_train(
    tokens: int, flag: int | None, rows: int, problem: str | None, tmp_path: Path
) -> None:
    def write(folder: str, names: list[str]) -> str:
        (tmp_path / folder).mkdir()
        ids = {"<|endoftext|>": 0} | {name: i for i, name in enumerate(names, 1)}
        (tmp_path / folder / "tokenizer.json").write_text(json.dumps({"model": {"vocab": ids}}))
        return str(tmp_path / folder)

    model = write("model", [f"t{i}" for i in range(1, 384)])
    (tmp_path / "model" / "model.safetensors").touch()
    (tmp_path / "model" / "config.json").write_text(
        json.dumps({"model_type": "mamba", "hidden_size": 64, "vocab_size": 400})
    )
    names = [f"{'t' if tokens > 0 else 'x'}{i}" for i in range(1, abs(tokens))]
    found = plan(model_name_or_path=model, tokenizer_name=write("tok", names), vocab_size=flag, max_steps=3)
    assert [problem in p.fix for p in found.problems if problem] == ([True] if problem else [])
    if rows:
        resolved = found.require()
        assert resolved.model_config["vocab_size"] == rows
        assert any(f"from 400 to {rows} rows" in note for note in resolved.notes) is (rows != 400)


def test_a_folder_in_which_no_step_was_trained_belongs_to_nobody(tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text(json.dumps({"seq_len": 1, "seed": 1}))
    assert plan(output_dir=str(tmp_path), max_steps=3, resume="auto").ok
    (tmp_path / "log.jsonl").touch()
    found = plan(output_dir=str(tmp_path), max_steps=3, resume="auto")
    assert [problem.id for problem in found.problems] == ["output-dir-not-usable"]


def test_the_default_run_is_looked_at_five_times() -> None:
    """The recipe looks once more, at the end; what the user says of it, and a short run, decide otherwise."""
    found = plan(world=1).require()
    arguments = found.training_arguments
    assert (found.preset, found.optim, arguments["lr_scheduler_type"]) == ("minute_mamba", "muon", "linear")
    assert found.total_steps is not None
    assert arguments["logging_steps"] == get_preset("minute_mamba").logging_steps
    assert (arguments["eval_strategy"], (found.total_steps - 1) // arguments["eval_steps"]) == ("steps", 4)
    for other in ({"eval_fraction": 0.0}, {"eval_strategy": "no"}, {"max_steps": 99}, {"preset": "tiny_mamba"}):
        assert plan(world=1, **other).require().training_arguments.get("eval_strategy", "no") == "no"


def test_a_preset_s_muon_gives_way_where_it_cannot_serve() -> None:
    for found in (plan("zero2").require(), plan(optim_args="foreach=False").require()):
        assert (found.optim, found.training_arguments["learning_rate"]) == ("adamw_torch_fused", 2e-2)
        assert any("AdamW takes the place of Muon" in note for note in found.notes)
    fsdp1 = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "1"}
    assert (
        resolve({"resume": "never"}, world_size=2, environ=fsdp1, device="gpu").require().optim == "adamw_torch_fused"
    )
    assert plan("zero2", optim="muon").problems[0].id == "muon-needs-whole-matrices"
