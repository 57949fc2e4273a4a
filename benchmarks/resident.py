"""Predicted against measured memory of whole processes: real starts of the recipe on a CPU, as the system counts them.

python -m benchmarks.resident --predict           predictions alone -> results/memory_cpu_resident_again_predicted.csv
python -m benchmarks.resident [--only 790m_mamba]    the runs, one after the other -> results/memory_cpu_resident.csv

A run predicts itself from what its own process holds before it has a model (`said_bytes`, what its screen shows);
`predicted_bytes`, from nothing but its arguments, takes the libraries of the tests' environment. The first predictions
and runs are in ..._predicted.csv and ..._first.csv.
"""

from __future__ import annotations

import argparse
import csv
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from hf_mamba.preflight import resolve
from hf_mamba.preflight.cost.capacity import predict
from hf_mamba.run.log import read_log

ROOT = Path(__file__).parents[1]
RESULTS = Path(__file__).parent / "results"
SHORT = {"seq_len": 512, "per_device_train_batch_size": 1, "gradient_accumulation_steps": 1}
# name -> (ranks, arguments)
CASES: dict[str, tuple[int, dict[str, Any]]] = {
    "tiny_mamba": (1, {}),
    "tiny_mamba, 4 rows": (1, {"per_device_train_batch_size": 4}),
    "tiny_mamba, 32 rows": (1, {"per_device_train_batch_size": 32}),
    "tiny_mamba, 32 rows, checkpointing": (1, {"per_device_train_batch_size": 32, "gradient_checkpointing": True}),
    "tiny_mamba, checkpointing": (1, {"gradient_checkpointing": True}),
    "tiny_mamba, bf16": (1, {"bf16": True}),
    "tiny_mamba, 2 ranks": (2, {}),
    "tiny_mamba, 2 ranks, ZeRO-2": (2, {"deepspeed": "zero2"}),
    "130m_mamba": (1, {"preset": "130m_mamba", **SHORT}),
    "130m_mamba, checkpointing": (1, {"preset": "130m_mamba", "gradient_checkpointing": True, **SHORT}),
    "130m_mamba, 2 ranks": (2, {"preset": "130m_mamba", **SHORT}),
    "130m_mamba, 2 ranks, ZeRO-2": (2, {"preset": "130m_mamba", "deepspeed": "zero2", **SHORT}),
    "130m_mamba2": (1, {"preset": "130m_mamba2", **SHORT}),
    "370m_mamba": (1, {"preset": "370m_mamba", **SHORT, "seq_len": 256}),
    "790m_mamba": (1, {"preset": "790m_mamba", **SHORT, "seq_len": 256}),
}


def predicted(ranks: int, arguments: dict[str, Any]) -> int:
    """Bytes of a process."""
    values = {"preset": "tiny_mamba", "max_steps": 4, "resume": "never", **arguments}
    report = predict(resolve(values, world_size=ranks, device="cpu").require(), "cpu")
    assert report is not None
    return report.predicted_bytes


def measured(ranks: int, arguments: dict[str, Any]) -> tuple[int, int]:
    """Bytes that the run says of itself, and of the rank that has most, in four steps."""
    launch = [sys.executable]
    if ranks > 1:
        engine = "--use_deepspeed" if "deepspeed" in arguments else "--multi_gpu"
        launch += ["-m", "accelerate.commands.launch", engine, f"--num_processes={ranks}", "--num_machines=1"]
        launch += ["--mixed_precision=no", "--dynamo_backend=no", "--main_process_port=29747"]
    flags = {
        **arguments,
        "max_steps": 4,
        "logging_steps": 1,
        "use_cpu": True,
        "save_strategy": "no",
        "resume": "never",
        "eval_fraction": 0,
    }
    with tempfile.TemporaryDirectory() as folder:
        words = [f"--{name}={value}" for name, value in {**flags, "output_dir": folder, "sample_prompt": ""}.items()]
        subprocess.run([*launch, "recipes/pretrain.py", *words], cwd=ROOT, check=True, stdout=sys.stderr)
        rows = [row for row in read_log(Path(folder)) if "memory_gb" in row]
    return round(rows[-1]["memory_predicted_gb"] * 1e9), round(max(row["memory_gb"] for row in rows) * 1e9)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.resident", description=__doc__.splitlines()[0])
    parser.add_argument("--predict", action="store_true", help="run nothing")
    parser.add_argument("--only", help="the cases whose name begins so")
    options = parser.parse_args()
    target = RESULTS / ("memory_cpu_resident_again_predicted.csv" if options.predict else "memory_cpu_resident.csv")
    rows = {}
    if target.exists():
        with target.open() as file:
            rows = {row["run"]: row for row in csv.DictReader(file)}
    for name, (ranks, arguments) in CASES.items():
        if not name.startswith(options.only or ""):
            continue
        row: dict[str, Any] = {"run": name, "predicted_bytes": predicted(ranks, arguments)}
        if not options.predict:
            row["said_bytes"], row["measured_bytes"] = measured(ranks, arguments)
            for error, of in (("error_percent", "predicted_bytes"), ("said_error_percent", "said_bytes")):
                row[error] = round(100 * (row[of] / row["measured_bytes"] - 1), 2)
        rows[name] = row
        print(json.dumps(row), flush=True)
        with target.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(row))
            writer.writeheader()
            writer.writerows(rows.values())
    return 0


if __name__ == "__main__":
    sys.exit(main())
