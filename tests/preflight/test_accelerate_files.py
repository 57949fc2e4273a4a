"""accelerate's own files: what it makes of them, what becomes of that in a plan, and the command that starts it."""

import csv
import json
import os
from pathlib import Path
from typing import Any

import pytest

from benchmarks.accelerate_files import environment_of
from hf_mamba import cli
from hf_mamba.family import FAMILIES, family_of
from hf_mamba.findings import Findings
from hf_mamba.plan import FsdpPlan, Plan, Refused
from hf_mamba.preflight import resolve
from hf_mamba.preflight.launch.accelerate_config import KEYS, LAUNCHERS, read_file
from hf_mamba.preflight.launch.command import LaunchOptions, launch_command, launch_commands, rendezvous_problems
from hf_mamba.run.processes import check_world

REAL = Path(__file__).parents[3] / "shared" / "real_accelerate_configs"
REAL = Path(os.environ.get("HF_MAMBA_REAL_ACCELERATE_FILES") or REAL)
ROWS: list[dict[str, str]] = []
if (REAL / "INDEX.tsv").is_file():
    with open(REAL / "INDEX.tsv", encoding="utf-8", newline="") as index:
        ROWS = list(csv.DictReader(index, delimiter="\t", quoting=csv.QUOTE_NONE))

# Our own words: name -> (file, what the plan must say)
FILES: dict[str, tuple[str, dict[str, Any]]] = {
    "one process, whatever it asks": (
        "distributed_type: 'NO'\nnum_processes: 8\nmixed_precision: 'bf16'\nuse_cpu: false",
        {"num_processes": 1, "device": "gpu", "dtype": "bf16"},
    ),
    "on a CPU": ("distributed_type: NO\nnum_processes: 1\nuse_cpu: true", {"num_processes": 1, "device": "cpu"}),
    "CPUs without mpirun": ("distributed_type: MULTI_CPU\nnum_processes: 4\nuse_cpu: true", {"num_processes": 1}),
    "four GPUs": (
        "distributed_type: MULTI_GPU\nnum_processes: 4\nmixed_precision: fp16\ngpu_ids: all",
        {"num_processes": 4, "num_nodes": 1, "device": "gpu", "dtype": "fp16", "fsdp": None},
    ),
    "two machines, one process too many": (
        "distributed_type: MULTI_GPU\nnum_processes: 9\nnum_machines: 2\nmachine_rank: 0\nmain_process_ip: 10.0.0.1\n"
        "main_process_port: 29501\nmixed_precision: bf16",
        {"num_processes": 8, "num_nodes": 2, "world_size": 8},
    ),
    "DeepSpeed, on a CPU that it ignores": (
        "distributed_type: DEEPSPEED\nnum_processes: 2\nuse_cpu: true\nmixed_precision: bf16\n"
        "deepspeed_config:\n  zero_stage: 2\n  gradient_accumulation_steps: 4\n  offload_optimizer_device: cpu\n"
        "  offload_param_device: cpu\n  gradient_clipping: 0.5",
        {"num_processes": 2, "device": "gpu", "gradient_accumulation_steps": 4},
    ),
    "FSDP 1 of a Llama": (
        "distributed_type: FSDP\nnum_processes: 8\nmixed_precision: bf16\nfsdp_config:\n"
        "  fsdp_auto_wrap_policy: TRANSFORMER_BASED_WRAP\n  fsdp_sharding_strategy: 2\n"
        "  fsdp_transformer_layer_cls_to_wrap: LlamaDecoderLayer\n  fsdp_state_dict_type: SHARDED_STATE_DICT",
        {
            "fsdp": FsdpPlan(
                version=1,
                sharding="SHARD_GRAD_OP",
                offload=False,
                wrapping="TRANSFORMER_BASED_WRAP",
                wrapped=["MambaBlock"],
                min_num_params=100_000_000,
                state_dict_type="SHARDED_STATE_DICT",
                activation_checkpointing=False,
            )
        },
    ),
    "FSDP 2, in an old file's names": (
        "distributed_type: FSDP\nnum_processes: 2\nfsdp_config:\n  version: 2\n  reshard_after_forward: false\n"
        "  offload_params: true\n  activation_checkpointing: true\n  auto_wrap_policy: NO_WRAP",
        {
            "fsdp": FsdpPlan(
                version=2,
                sharding="SHARD_GRAD_OP",
                offload=True,
                wrapping="NO_WRAP",
                wrapped=[],
                min_num_params=100_000_000,
                state_dict_type="SHARDED_STATE_DICT",
                activation_checkpointing=True,
            )
        },
    ),
}
# name -> (file, the rule, the user's own word): accelerate refuses these, too
BAD: dict[str, tuple[str, str, str]] = {
    "unknown key": ("distributed_type: 'NO'\nnum_process: 2", "accelerate-refuses-the-file", "num_process"),
    "no type": ("num_processes: 2", "accelerate-refuses-the-file", "distributed_type"),
    "type": ("distributed_type: TPU\nnum_processes: 8", "accelerate-refuses-the-file", "distributed_type"),
    "no world": ("distributed_type: MULTI_GPU", "accelerate-config-without-a-world", "num_processes"),
    "bare no": (
        "distributed_type: MULTI_GPU\nnum_processes: 2\nmixed_precision: no",
        "accelerate-refuses-the-file",
        "mixed_precision",
    ),
    "one id": ("distributed_type: MULTI_GPU\nnum_processes: 2\ngpu_ids: '0'", "accelerate-refuses-the-file", "gpu_ids"),
    "SageMaker": (
        "compute_environment: AMAZON_SAGEMAKER\ndistributed_type: 'NO'",
        "compute-environment-unknown",
        "compute_environment",
    ),
}
# accelerate takes these
NOT_OURS: dict[str, tuple[str, str, str]] = {
    "Megatron": ("distributed_type: MEGATRON_LM\nnum_processes: 8", "megatron", "distributed_type"),
    "XLA": ("distributed_type: XLA\nnum_processes: 8", "xla", "distributed_type"),
    "context parallel": (
        "distributed_type: FSDP\nnum_processes: 4\nfsdp_config: {fsdp_version: 2}\n"
        "parallelism_config: {parallelism_config_cp_size: 2}",
        "model-parallel",
        "parallelism_config_cp_size",
    ),
}


def planned(file: Path, **more: Any) -> Plan | Refused:
    values = {"preset": "7b_mamba", "resume": "never", "output_dir": "runs/none", "accelerate_config": str(file)}
    return resolve(values | more, environ={})


def written(folder: Path, text: str) -> Path:
    file = folder / "accelerate.yaml"
    file.write_text(text)
    return file


@pytest.mark.parametrize("name", FILES)
def test_a_file_means_what_accelerate_makes_of_it(name: str, tmp_path: Path) -> None:
    """The variables are accelerate's own; the plan is the same from the file and inside the started process."""
    text, expected = FILES[name]
    file = written(tmp_path, text)
    out = Findings()
    ours, theirs = read_file(file, out).variables, environment_of(file)
    assert not out.problems
    assert {key: theirs.get(key, "").lower() for key in ours} == {key: value.lower() for key, value in ours.items()}
    missed = {key for key in theirs.keys() - ours.keys() - os.environ.keys() if key.startswith(("ACCEL", "PARALLEL"))}
    assert all(key.startswith("ACCELERATE_DYNAMO_") for key in missed)

    plan = planned(file).require()
    assert {key: getattr(plan, key) for key in expected} == expected
    started = {key: value for key, value in theirs.items() if key not in os.environ or os.environ[key] != value}
    values = {"preset": "7b_mamba", "resume": "never", "output_dir": "runs/none"}
    launched = resolve(values, environ=started, device=plan.device).require()
    differing = {key for key, value in plan.known.items() if value != launched.known[key]}
    assert differing <= {"environment"}  # what the process must change is found in the process


@pytest.mark.parametrize("name", [*BAD, *NOT_OURS])
def test_what_cannot_run_is_refused_by_the_users_own_word(name: str, tmp_path: Path) -> None:
    text, rule, word = (BAD | NOT_OURS)[name]
    file = written(tmp_path, text)
    if name in BAD:
        with pytest.raises((Exception, SystemExit)):
            environment_of(file)
    assert [(problem.id, problem.key) for problem in planned(file).problems] == [(rule, word)]


def test_flags_decide_the_world_where_the_file_does_not(tmp_path: Path) -> None:
    file = written(tmp_path, "distributed_type: MULTI_GPU\nmixed_precision: bf16")
    assert planned(file, num_gpus=8, num_nodes=2).require().num_processes == 16


def test_the_keys_and_types_are_accelerates() -> None:
    from accelerate.commands.config.config_args import ClusterConfig
    from accelerate.utils import DistributedType

    assert set(ClusterConfig.__dataclass_fields__) <= KEYS
    assert set(LAUNCHERS) == {kind.value for kind in DistributedType} - {"INDUCTOR"}


@pytest.mark.parametrize("name", FAMILIES)
def test_the_wrapped_blocks_are_the_models(name: str) -> None:
    family = family_of({"model_type": name})
    assert list(family.blocks) == list(family.model_class._no_split_modules)


def test_one_process_has_no_fsdp_and_a_cpu_neither() -> None:
    environ = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "WORLD_SIZE": "2"}
    plan = resolve({"resume": "never"}, environ=environ, device="cpu").require()
    assert plan.fsdp is None
    assert any("plain data parallelism" in note for note in plan.notes)


# --- the command


def command(file: Path, **options: Any) -> list[str]:
    plan = planned(file).require()
    return launch_command(
        plan,
        LaunchOptions(script="train.py", **options),
        ["--accelerate_config", str(file)],
        read_file(file, Findings()),
    )


def test_the_file_is_repeated_and_nothing_is_lost(tmp_path: Path) -> None:
    file = written(tmp_path, FILES["FSDP 1 of a Llama"][0])
    assert command(file) == ["accelerate", "launch", "--config_file", str(file), "train.py"]


def test_another_world_is_written_beside_the_file(tmp_path: Path) -> None:
    file = written(tmp_path, FILES["on a CPU"][0])
    plan = planned(file, num_gpus=2).require()
    line = launch_command(
        plan, LaunchOptions(script="train.py"), ["--seed", "1", "--dry_run"], read_file(file, Findings())
    )
    numbers = ["--num_processes", "2", "--num_machines", "1", "--multi_gpu"]
    assert line == ["accelerate", "launch", "--config_file", str(file), *numbers, "train.py", "--seed", "1"]


def test_each_machine_has_its_line(tmp_path: Path) -> None:
    file = written(tmp_path, FILES["two machines, one process too many"][0].replace("machine_rank: 0\n", ""))
    found, plan = read_file(file, Findings()), planned(file).require()
    lines = launch_commands(plan, LaunchOptions(script="train.py"), [], found)
    assert [line[line.index("--machine_rank") + 1] for line in lines] == ["0", "1"]
    assert not rendezvous_problems(LaunchOptions(), 2, found, dry_run=True)
    assert [p.key for p in rendezvous_problems(LaunchOptions(), 2, found, dry_run=False)] == ["machine_rank"]


# --- files of public projects


@pytest.mark.skipif(not ROWS, reason="no folder of public projects' files: see HF_MAMBA_REAL_ACCELERATE_FILES")
@pytest.mark.parametrize("row", ROWS, ids=lambda row: row["file"])
def test_real_files(row: dict[str, str]) -> None:
    """accelerate's verdict stands in the index; python -m benchmarks.run accelerate compares the meaning."""
    found = planned(REAL / row["file"])
    rules = {problem.id for problem in found.problems}
    if row["accelerate"].startswith("refused"):
        assert rules
    elif isinstance(found, Refused):  # another engine, or a DeepSpeed file that is not in the folder
        assert rules <= {"megatron", "xla", "model-parallel", "file-unreadable"}
        assert "file-unreadable" not in rules or row["kind"].startswith("DEEPSPEED by file")
    else:
        assert found.num_processes == int(row["world"])
        assert (found.ds_config is not None) == row["kind"].startswith("DEEPSPEED")
        assert (f"FSDP{found.fsdp.version}" if found.fsdp else "") == (row["kind"][:5] if "FSDP" in row["kind"] else "")


@pytest.mark.parametrize(
    ("variable", "starter"), [("SLURM_STEP_NUM_TASKS", "srun"), ("OMPI_COMM_WORLD_SIZE", "mpirun")]
)
def test_tasks_without_a_launcher_are_told_what_to_do(
    variable: str, starter: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = resolve({"resume": "never"}, world_size=1, environ={}, device="cpu").require()
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    monkeypatch.setenv(variable, "4")
    with pytest.raises(ValueError, match=f"{starter} started 4 tasks .*hf-mamba launch"):
        check_world(plan)


def test_memory_takes_the_file_as_the_other_commands_do(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Processes, stage, accumulation and precision; a flag wins over the file. `--device` is `--gpu`'s old name."""
    text = "distributed_type: DEEPSPEED\nmixed_precision: fp16\nnum_processes: 16\nnum_machines: 2\nmachine_rank: 0\n"
    file = written(tmp_path, f"{text}deepspeed_config: {{zero_stage: 3, gradient_accumulation_steps: 4}}\n")
    line = ["memory", "--preset", "7b_mamba", "--accelerate_config", str(file), "--json"]
    assert cli.main([*line, "--gpu", "H100 SXM"]) == 0
    said = json.loads(capsys.readouterr().out)
    wanted = {"world_size": 16, "gradient_accumulation_steps": 4, "dtype": "fp16", "capacity_bytes": 80 * 10**9}
    assert {name: said[name] for name in wanted} == wanted
    assert {row["setting"] for row in said["rows"] if row["of_the_deepspeed_file"]} == {"ZeRO 3"}
    assert cli.main([*line, "--num_gpus", "4", "--dtype", "bf16", "--device", "A100-SXM4-40GB"]) == 0
    said = json.loads(capsys.readouterr().out)
    wanted = {"world_size": 4, "dtype": "bf16", "capacity_bytes": 40 * 10**9}
    assert {name: said[name] for name in wanted} == wanted
    written(tmp_path, FILES["on a CPU"][0])
    assert cli.main(line) == 2
    assert "starts CPUs" in capsys.readouterr().err
