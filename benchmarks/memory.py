"""Predicted against measured peak memory, over real optimizer steps with DeepSpeed and without.

    python benchmarks/memory.py                      CPU, 1 and 2 processes -> results/memory_cpu.csv
    python benchmarks/memory.py --set held_out       other shapes           -> results/memory_cpu_held_out.csv
    python benchmarks/memory.py --set settings       DeepSpeed's settings   -> results/memory_cpu_settings.csv
    python benchmarks/memory.py --set later          a second look          -> results/memory_cpu_later.csv
    python benchmarks/memory.py --set sample --out FILE   five of them, for the tests
    python benchmarks/memory.py --predict            with any of these: the predictions alone, nothing is run
    python benchmarks/memory.py --table              the committed CSVs as one table -> results/memory_cpu.md
    python benchmarks/memory.py --device cuda        one process per GPU    -> results/memory_cuda.csv
    python benchmarks/memory.py --device cuda --largest 130m_mamba   the micro-batch that really is the largest

What is run is in memory_cases.py, how it is measured in memory_steps.py.
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import memory_cases
from memory_cases import Case
from memory_steps import build_extensions, measure, prepare

from hf_mamba.presets import PRESETS

RESULTS = Path(__file__).parent / "results"
SETS = {
    "all": memory_cases.cpu_cases,
    "held_out": memory_cases.held_out_cases,
    "settings": memory_cases.settings_cases,
    "later": memory_cases.later_cases,
    "sample": memory_cases.sample_cases,
}


PHASES = ("forward", "backward", "step")


def row_of(case: Case, measured: dict[str, int] | None) -> dict[str, Any]:
    """A line of the CSV; without a measurement, what can be said before one."""
    predicted = case.predict()
    row = {f.name: getattr(case, f.name) for f in dataclasses.fields(case) if f.name != "device"}
    row["stage"] = "" if case.stage is None else case.stage
    row["settings"] = json.dumps(case.settings) if case.settings else ""
    where = max(predicted, key=lambda name: predicted[name][0])
    row |= {"predicted_bytes": predicted[where][0], "predicted_at": f"{where}: {predicted[where][1]}"}
    row |= {f"{name}_predicted": predicted[name][0] for name in PHASES}
    if measured is None:
        return row
    top = max(measured[name] for name in PHASES)
    row |= {"measured_bytes": top, "error_percent": round(100 * (predicted[where][0] / top - 1), 2)}
    row |= {f"{name}_measured": measured[name] for name in PHASES}
    return row | ({"reserved_measured": measured["reserved"]} if "reserved" in measured else {})


def largest_micro_batch(preset: str) -> None:
    """Raise the micro-batch until it runs out of memory; print what was predicted and what held."""
    import torch

    from hf_mamba.preflight.memory import largest_micro_batch as predicted_largest

    capacity = torch.cuda.get_device_properties(0).total_memory
    for stage in (0, 2, 3):
        case = Case(preset, stage, "bf16", length=PRESETS[preset].seq_len, backend="triton", device="cuda")
        predicted = predicted_largest(
            case.model_config, seq_len=case.length, world_size=1, dtype="bf16", zero=case.zero, capacity=capacity
        )
        held, batch = 0, max(1, predicted - 2)
        while held in (0, batch - 1):
            try:
                measure(dataclasses.replace(case, batch=batch))
            except RuntimeError:
                break
            held, batch = batch, batch + 1
        print(f"{preset} stage {stage}: predicted {predicted}, held {held}")


def run(cases: list[Case]) -> list[dict[str, Any]]:
    """Measure, one case after another; one that fails is named and left out."""
    build_extensions(cases)
    rows = []
    for case in cases:
        try:
            rows.append(row_of(case, measure(case)))
        except RuntimeError as error:
            print(f"failed: {error}", file=sys.stderr)
            continue
        print(json.dumps(rows[-1]), flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--set", choices=list(SETS), default="all")
    parser.add_argument("--only", type=json.loads, default={}, help='{"stage": 2, "world": 1}: the cases that match')
    parser.add_argument("--predict", action="store_true", help="write the predictions, and run nothing")
    parser.add_argument("--largest", metavar="PRESET", help="find the largest micro-batch of this preset (cuda)")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    prepare(args.device)
    if args.largest:
        return largest_micro_batch(args.largest)
    cases = memory_cases.cuda_cases() if args.device == "cuda" else SETS[args.set]()
    cases = [case for case in cases if all(getattr(case, k) == v for k, v in args.only.items())]
    rows = [row_of(case, None) for case in cases] if args.predict else run(cases)
    suffix = "" if args.set == "all" else f"_{args.set}"
    target = args.out or RESULTS / f"memory_{args.device}{suffix}{'_predicted' if args.predict else ''}.csv"
    target.parent.mkdir(exist_ok=True)
    with target.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    if not args.predict:
        worst = max(rows, key=lambda row: abs(row["error_percent"]))
        within = sum(abs(row["error_percent"]) <= 5 for row in rows)
        print(f"{within} of {len(rows)} within 5%; the worst is {worst['error_percent']}%; {target}")


if __name__ == "__main__":
    main()
