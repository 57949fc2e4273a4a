"""Resolved runs through a real start: two processes, gloo, Trainer, DeepSpeed's engine and one optimizer step."""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from test_agreement import runs

from hf_mamba.preflight import Plan, resolve
from hf_mamba.preflight.deepspeed.config import walk

RUNNER = Path(__file__).with_name("engine_runner.py")
MODEL = {"hidden_size": 32, "num_hidden_layers": 1, "vocab_size": 64}
STARTS = int(os.environ.get("HF_MAMBA_STARTS", "24"))
STALE_S = 600


def resolvable() -> list[tuple[dict[str, Any], Plan]]:
    """Generated runs for two ranks on a CPU that the resolver passes."""
    found: list[tuple[dict[str, Any], Plan]] = []

    @settings(max_examples=800, database=None, suppress_health_check=list(HealthCheck))
    @given(runs())
    def collect(run: tuple[dict[str, Any], dict[str, Any], int]) -> None:
        config, arguments, world = run
        numbers = {**arguments, "model_config": MODEL, "seq_len": 16, "max_steps": 1, "warmup_steps": 0}
        if world == 2 or not any(
            "batch_size" in key and key.startswith(("train_b", "global")) for key in (*config, *arguments)
        ):
            plan = resolve({**numbers, "deepspeed": config}, world_size=2, environ={}, device="cpu")
            if plan.ok and all(plan.training_arguments != other.training_arguments for _, other in found):
                found.append((config, plan))

    collect()
    return found


def features(plan: Plan) -> set[str]:
    """What a start can go wrong with: the combination of stage, precision and offload, and every key with its value."""
    assert plan.ds_config is not None
    zero = plan.ds_config["zero_optimization"]
    offload = [zero.get(f"offload_{what}", {}).get("device", "none") for what in ("optimizer", "param")]
    rows = {f"{path}={value}" for path, value in walk(plan.ds_config) if not isinstance(value, dict)}
    arguments = {f"{name}={value}" for name, value in plan.training_arguments.items() if name in ("optim", "bf16")}
    return {f"{zero['stage']} {plan.dtype} {offload}"} | rows | arguments


def spread(found: list[tuple[dict[str, Any], Plan]], wanted: int) -> list[tuple[dict[str, Any], Plan]]:
    """Of all runs a few that have as many different features as possible, each next one the most that are new."""
    left = [(features(plan), config, plan) for config, plan in found]
    picked: list[tuple[dict[str, Any], Plan]] = []
    seen: set[str] = set()
    while left and len(picked) < wanted:
        best = max(left, key=lambda row: len(row[0] - seen))
        left.remove(best)
        seen |= best[0]
        picked.append(best[1:])
    return picked


def extension_folder(config: pytest.Config) -> Path:
    """A private folder for DeepSpeed's builds, kept between test runs."""
    cache = getattr(config, "cache", None)  # absent under -p no:cacheprovider
    folder = Path(cache.mkdir("torch_extensions") if cache else tempfile.mkdtemp(prefix="torch_extensions_"))
    return folder


def environment_of_starts(extensions: Path) -> dict[str, str]:
    return {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "DS_ACCELERATOR": "cpu",
        "HF_HUB_OFFLINE": "1",
        "TORCH_EXTENSIONS_DIR": str(extensions),
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
    }


def start_all(cases: list[dict[str, Any]], folder: Path, extensions: Path) -> list[dict[str, Any]]:
    """Run every case in two ranks, one case after the other."""
    (folder / "cases.json").write_text(json.dumps(cases))
    command = [sys.executable, str(RUNNER), str(folder / "cases.json"), str(folder / "results.json")]
    with open(folder / "log", "w") as log:
        try:
            code = subprocess.run(
                command, env=environment_of_starts(extensions), stdout=log, stderr=log, timeout=900
            ).returncode
        except subprocess.TimeoutExpired:
            code = None
    assert code == 0, (folder / "log").read_text()[-3000:]
    return json.loads((folder / "results.json").read_text())


def test_resolved_runs_start(tmp_path: Path, pytestconfig: pytest.Config) -> None:
    chosen = spread(resolvable(), STARTS)
    assert len(chosen) == STARTS
    cases = [
        {"training_arguments": plan.training_arguments, "model_config": plan.model_config, "seq_len": plan.seq_len}
        for _, plan in chosen
    ]
    results = start_all(cases, tmp_path, extension_folder(pytestconfig))
    wrong = []
    for (config, plan), result in zip(chosen, results, strict=True):
        assert plan.ds_config is not None
        expected = {
            "micro_batch_size": plan.micro_batch_size,
            "gradient_accumulation_steps": plan.gradient_accumulation_steps,
            "global_batch_size": plan.global_batch_size,
            "stage": plan.ds_config["zero_optimization"]["stage"],
            "gradient_clipping": plan.training_arguments["max_grad_norm"],
            "dtype": {"fp32": "torch.float32", "bf16": "torch.bfloat16"}[plan.dtype],
            "steps": 1,
            "parameters": plan.parameters["estimated"],
        }
        if {key: result.get(key) for key in expected} != expected:
            wrong.append((config, expected, result))
    assert not wrong, json.dumps(wrong, indent=1)[:6000]
    assert {plan.ds_config["zero_optimization"]["stage"] for _, plan in chosen if plan.ds_config} == {0, 1, 2, 3}
