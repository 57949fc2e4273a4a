"""The `hf-mamba` command as a user runs it: real processes, exit codes, no stack trace."""

import io
import json
import os
import subprocess
import sys
from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch
from transformers import TrainingArguments

from hf_mamba import cli
from hf_mamba.findings import PlanError
from hf_mamba.preflight import check_backend, resolve, verify
from hf_mamba.preflight.arguments import OURS, RunArguments, types
from hf_mamba.preflight.command_line import parse_arguments, read_arguments
from hf_mamba.preflight.screen import print_report
from hf_mamba.preflight.settings import Origin
from hf_mamba.training.build import build_training_arguments

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.usefixtures("empty_folder")
SCRIPT = """import json, os, sys
from dataclasses import fields
from pathlib import Path
names = ("RANK", "WORLD_SIZE", "DS_ACCELERATOR", "ACCELERATE_USE_DEEPSPEED", "ACCELERATE_MIXED_PRECISION")
found = [{n: os.environ.get(n) for n in names}, sys.argv[1:]]
Path(__file__).with_name(f"rank{os.environ['RANK']}.json").write_text(json.dumps(found))
"""


def run(*arguments: str, cwd: Path = ROOT, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "hf_mamba.cli", *arguments]
    clean = {name: value for name, value in os.environ.items() if not name.startswith("ACCELERATE_")}
    env = {**clean, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), **environment}
    return subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, timeout=240)


def test_presets(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["presets"]) == 0
    assert "6,893,552,640" in capsys.readouterr().out
    assert cli.main(["presets", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["7b_mamba"]["parameters"] == 6_893_552_640


def test_every_verb_is_importable_and_has_help() -> None:
    import importlib

    for target, text in cli.VERBS.values():
        module, _, name = target.partition(":")
        assert callable(getattr(importlib.import_module(module), name))
        assert text


def test_preflight_of_7b(tmp_path: Path) -> None:
    done = run(
        "preflight",
        "--preset",
        "7b_mamba",
        "--num_gpus",
        "4",
        "--deepspeed",
        "ds_configs/zero3.json",
        "--write",
        str(tmp_path),
    )
    assert done.returncode == 0, done.stderr
    assert "128 = 4 x 8 x 4" in done.stdout
    assert "6,893,552,640" in done.stdout
    assert "deviation 0.0%" in done.stdout
    assert "\x1b[" not in done.stdout  # plain in a pipe
    assert json.loads((tmp_path / "ds_config.json").read_text())["train_micro_batch_size_per_gpu"] == 4
    plan, checked = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("plan", "checked"))
    assert plan["ok"] is True
    assert sum(checked["parameters"].values()) == plan["parameters"]["estimated"]
    assert checked["deepspeed"]["train_batch_size"] == plan["global_batch_size"]


def test_preflight_names_everything_at_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ds, config = tmp_path / "ds.json", tmp_path / "run.yaml"
    ds.write_text(
        '{"zero_optimization": {"stage": 2, "cpu_offload": true, "overlap_com": true}, "train_batch_size": 30}'
    )
    config.write_text("learning_rate: 1e-3\nlerning_rate: 1\nmicro_batch_size: 4\n")
    flags = [
        "--config",
        str(config),
        "--deepspeed",
        str(ds),
        "--num_gpus",
        "2",
        "--seed",
        "x",
        "--no_such_flag",
        "--json",
    ]
    assert cli.main(["preflight", *flags]) == 2
    found = json.loads(capsys.readouterr().out)
    assert {p["key"] for p in found["problems"]} == {
        "seed", "--no_such_flag", "lerning_rate", "zero_optimization.overlap_com", "train_batch_size"
    }  # fmt: skip
    assert found["migrations"][0]["old"] == "zero_optimization.cpu_offload: true"


def test_write_replaces_no_file_of_the_users(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    own = '{"zero_optimization": {"stage": 2}}'
    (tmp_path / "own").mkdir()
    (tmp_path / "good.json").write_text(own)
    (tmp_path / "own" / "ds_config.json").write_text(own)
    for target in ("good.json", "own"):
        assert cli.main(["preflight", "--use_cpu", "true", "--write", str(tmp_path / target)]) == 2
        assert f"--write {tmp_path / target}" in capsys.readouterr().err
    assert (tmp_path / "good.json").read_text() == (tmp_path / "own" / "ds_config.json").read_text() == own
    for _ in range(2):  # a plan of ours is replaced
        assert cli.main(["preflight", "--use_cpu", "true", "--write", str(tmp_path / "plan")]) == 0
    assert sorted(path.name for path in (tmp_path / "plan").iterdir()) == ["checked.json", "plan.json"]


def test_a_screen_shows_what_it_cannot_print() -> None:
    stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    plan = resolve(
        {"output_dir": "r", "deepspeed": {"zero_optimization": {"stage": "\ud800ä"}}}, world_size=1, environ={}
    )
    print_report(plan, stream)
    stream.seek(0)
    assert 'zero_optimization.stage: found "\\ud800\\xe4"' in stream.read()


@pytest.mark.parametrize(
    "arguments",
    [
        ["preflight", "--config", "/no/such/file.yaml"],
        ["preflight", "--deepspeed", "/no/such/file.json"],
        ["preflight", "--preset", "none_such"],
        ["preflight", "--max_steps"],
        ["preflight", "--accelerate_config", "/no/such/file.yaml"],
        ["preflight", "--convert", "--resume", "/no/such/folder"],
        ["preflight", "--write", "/proc/none/such"],
        ["launch", "--script", "/no/such/script.py"],
        ["launch", "--num_gpus", "8", "--num_nodes", "2", "--dry_run"],
    ],
    ids=lambda arguments: " ".join(arguments[:2]),
)
def test_mistakes_are_messages(
    arguments: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    assert cli.main(arguments) == 2
    out = capsys.readouterr()
    assert "Traceback" not in out.err
    assert "problem 1" in out.out or "hf-mamba" in out.err


def test_unknown_verb() -> None:
    done = run("preflite")
    assert done.returncode == 2
    assert "Traceback" not in done.stderr


def test_env(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["env", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert {"versions", "devices", "backends", "scan", "tools", "build_locks", "advice"} <= found.keys()


def test_the_scans_backend_is_known_before_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_MAMBA_BACKEND", raising=False)
    plan = resolve({"use_cpu": True}, environ={}).require()
    assert check_backend(plan) == "cpu"
    large = replace(plan, model_config={**plan.model_config, "state_size": 300})
    assert check_backend(large) == "torch"
    monkeypatch.setenv("HF_MAMBA_BACKEND", "torch")
    assert check_backend(plan) == "torch"
    monkeypatch.setenv("HF_MAMBA_BACKEND", "triton")
    with pytest.raises(PlanError) as refusal:
        check_backend(plan)
    (problem,) = refusal.value.problems
    assert verify(plan).problems == (problem,)
    assert problem.found == "triton"
    assert "is forced but cannot serve" in problem.why
    if not torch.cuda.is_available():  # planned for another machine
        assert check_backend(resolve({"num_gpus": 4}, environ={}).require()) is None


def test_env_finds_a_stale_lock(tmp_path: Path) -> None:
    lock = tmp_path / "py311_cpu" / "cpu_adam" / "lock"
    lock.parent.mkdir(parents=True)
    lock.touch()
    os.utime(lock, (0, 0))
    assert str(lock) in run("env", TORCH_EXTENSIONS_DIR=str(tmp_path)).stdout


@pytest.mark.parametrize("deepspeed", [False, True])
def test_launch_becomes_the_command(deepspeed: bool, tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    flags = ["--deepspeed", "ds_configs/zero1.json"] if deepspeed else []
    flags += ["--preset", "tiny_mamba", "--use_cpu", "true", "--num_gpus", "2", "--main_process_port", "0"]
    flags += ["--output_dir", str(tmp_path / "run")]
    done = run("launch", "--script", str(script), *flags)
    assert done.returncode == 0, done.stderr[-2000:]
    lines = done.stdout.splitlines()
    command = next(line for line in lines if line.startswith("accelerate launch"))
    assert "--num_processes 2" in command
    seen = [json.loads(file.read_text()) for file in tmp_path.glob("rank*.json")]
    assert sorted(environment["RANK"] for environment, _ in seen) == ["0", "1"]
    for environment, argv in seen:
        assert environment["WORLD_SIZE"] == "2"
        assert environment["DS_ACCELERATOR"] == "cpu"
        assert environment["ACCELERATE_USE_DEEPSPEED"] == ("true" if deepspeed else None)
        assert "--num_gpus" not in argv
        assert "--preset" in argv


def test_slurm_file_launches_every_machine(tmp_path: Path) -> None:
    """The batch script with stand-ins for the scheduler's two commands: srun runs the task here as machine 1 of 2."""
    for name, text in {
        "scontrol": "#!/bin/bash\necho node-a\necho node-b\n",
        "srun": '#!/bin/bash\nshift\nexport SLURM_NODEID=1\nexec "$@"\n',
        "hf-mamba": f'#!/bin/bash\nexec {sys.executable} -m hf_mamba.cli "$@"\n',
    }.items():
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    environment = {
        **os.environ,
        "PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}",
        "SLURM_SUBMIT_DIR": str(tmp_path),
        "SLURM_JOB_NUM_NODES": "2",
        "SLURM_GPUS_ON_NODE": "8",
        "SLURM_JOB_NODELIST": "node-[a-b]",
        "SLURM_JOB_ID": "77",
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
    }
    arguments = ["--preset", "7b_mamba", "--deepspeed", str(ROOT / "ds_configs/zero3.json"), "--dry_run"]
    command = ["bash", str(ROOT / "recipes/slurm/pretrain.sbatch"), *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stdout + done.stderr
    line = next(line for line in done.stdout.splitlines() if line.startswith("accelerate launch"))
    for part in (
        "--num_processes 16",
        "--num_machines 2",
        "--machine_rank 1",
        "--main_process_ip node-a",
        "--use_deepspeed",
    ):
        assert part in line
    assert "--main_process_port 20077" in line


@pytest.mark.parametrize("file", sorted((ROOT / "recipes" / "accelerate").glob("*.yaml")), ids=lambda path: path.stem)
def test_accelerate_files_agree_with_the_preflight(
    file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    flags = ["--deepspeed", "ds_configs/zero2.json"] if file.stem == "deepspeed" else []
    flags += ["--accelerate_config", str(file), "--preset", "130m_mamba", "--bf16", "true", "--json"]
    flags += ["--output_dir", str(tmp_path)]
    assert cli.main(["preflight", *flags]) == 0
    assert json.loads(capsys.readouterr().out)["world_size"] == (1 if file.stem == "one_gpu" else 4)


# --- arguments


def test_flags_win_over_the_file(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("learning_rate: 1e-3\nseed: 7\nbf16: true\ndataset: [a, b]\nmicro_batch_size: 2\n")
    found = parse_arguments(["--config", str(file), "--seed", "8", "--max_tokens", "3e9"])
    assert found.get("learning_rate") == 1e-3
    assert found.get("seed") == 8
    assert found.get("dataset") == ["a", "b"]
    assert found.get("max_tokens") == 3_000_000_000
    assert found.get("per_device_train_batch_size") == 2
    assert found.written["seed"] == (8, Origin.USER, "seed", "flag --seed")
    assert found.written["per_device_train_batch_size"].where == f"config {file}: micro_batch_size"
    assert "preset" not in found.written


@pytest.mark.parametrize("flag", ["activation_checkpointing", "gradient_checkpointing"])
@pytest.mark.filterwarnings("error::FutureWarning")
def test_both_names_of_checkpointing_are_planned_and_reach_the_trainer(flag: str) -> None:
    found = read_arguments([f"--{flag}", "--use_cpu"])
    plan = resolve(found, environ={}).require()
    assert plan.ok
    assert plan.training_arguments["gradient_checkpointing"]
    assert build_training_arguments(plan).gradient_checkpointing


def test_the_alias_and_the_name_may_not_differ() -> None:
    with pytest.raises(PlanError, match="Both mean the same"):
        parse_arguments(["--micro_batch_size", "4", "--per_device_train_batch_size", "8"])


@pytest.mark.parametrize(
    ("line", "key"),
    [
        (["--gradient_accumulation_steps", "1.5"], "gradient_accumulation_steps"),
        (["--lr_scheduler_type", "cosin"], "lr_scheduler_type"),
        (["--learning_rate", "fast"], "learning_rate"),
        (["--bf16", "maybe"], "bf16"),
        (["--lerning_rate", "1"], "--lerning_rate"),
        (["stray"], "stray"),
    ],
)
def test_wrong_flags(line: list[str], key: str) -> None:
    assert key in [problem.key for problem in read_arguments(line).problems]


@pytest.mark.parametrize(
    "text", ["][", "- a\n- b", "x: 1", "seed: [1]", "bf16: perhaps", "seed: 1.5", "a: &a [*a]", "seed: 1\nseed: 2"]
)
def test_wrong_files(text: str, tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(text)
    assert read_arguments(["--config", str(file)]).problems


def test_no_argument_of_ours_reaches_training_arguments() -> None:
    assert not OURS & set(TrainingArguments.__dataclass_fields__)
    assert not OURS & resolve({"use_cpu": True}, environ={}).require().training_arguments.keys()


def test_every_flag_of_ours_can_be_given() -> None:
    for name in (f.name for f in fields(RunArguments) if f.metadata["help"]):
        kind = types()[name]
        value = {int: "1", float: "0.5", str: "x", bool: "true"}.get(kind, "x")
        if name != "config":
            assert not read_arguments([f"--{name}", value]).problems, name


def test_help_and_the_report_import_nothing_heavy(tmp_path: Path) -> None:
    """Every verb's --help, and a report of a run: what a person waits for is the answer, not torch."""
    code = (
        "import contextlib, json, sys; from pathlib import Path; from hf_mamba.cli import VERBS, main\n"
        "for verb in VERBS:\n"
        "    with contextlib.suppress(SystemExit): main([verb, '--help'])\n"
        "Path('run.json').write_text('{}')\n"
        "assert main(['report', '.']) == 0\n"
        "heavy = {'torch', 'transformers', 'accelerate', 'deepspeed', 'huggingface_hub', 'numpy', 'matplotlib'}\n"
        "print('imported:', sorted(heavy & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.stdout.endswith("imported: []\n"), done.stdout[-300:] + done.stderr
