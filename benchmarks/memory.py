"""Predicted against measured peak memory, over real optimizer steps with DeepSpeed and without.

    python benchmarks/memory.py                      CPU, 1 and 2 processes -> results/memory_cpu.csv
    python benchmarks/memory.py --set held_out       other shapes           -> results/memory_cpu_held_out.csv
    python benchmarks/memory.py --set settings       DeepSpeed's settings   -> results/memory_cpu_settings.csv
    python benchmarks/memory.py --set later          a second look          -> results/memory_cpu_later.csv
    python benchmarks/memory.py --set presets        published sizes        -> results/memory_cpu_presets.csv
    python benchmarks/memory.py --set mamba2         another family         -> results/memory_cpu_mamba2.csv
    python benchmarks/memory.py --set mamba2_kernels    its C kernels       -> results/memory_cpu_mamba2_kernels.csv
    python benchmarks/memory.py --set mamba2_later      a second look       -> results/memory_cpu_mamba2_later.csv
    python benchmarks/memory.py --set hybrid         a third                -> results/memory_cpu_hybrid.csv
    python benchmarks/memory.py --set fsdp           FSDP2                  -> results/memory_cpu_fsdp.csv
    python benchmarks/memory.py --set muon           another optimizer      -> results/memory_cpu_muon.csv
    python benchmarks/memory.py --set sample --out FILE   six of them, for the tests
    python benchmarks/memory.py --predict            with any of these: the predictions alone, nothing is run
    python benchmarks/memory.py --table > benchmarks/results/memory_cpu.md   the committed CSVs, for people

On a machine with a GPU, first this (one process per GPU, up to 30 combinations -> results/memory_cuda.csv), then the
micro-batch that really is the largest (-> results/memory_cuda_largest.csv). Rows are written as they come; `--predict`
with either runs nothing, anywhere:

    python benchmarks/memory.py --device cuda && python benchmarks/memory.py --device cuda --largest 130m_mamba

What is run is in memory_cases.py, how it is measured in memory_steps.py.
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import memory_cases
from memory_cases import Case
from memory_steps import build_extensions, measure, prepare

from hf_mamba.models.mamba.presets import PRESETS
from hf_mamba.preflight.cost.memory import largest_fitting, show

RESULTS = Path(__file__).parent / "results"
SETS = {
    "all": memory_cases.cpu_cases,
    "held_out": memory_cases.held_out_cases,
    "settings": memory_cases.settings_cases,
    "later": memory_cases.later_cases,
    "presets": memory_cases.preset_cases,
    "mamba2": memory_cases.mamba2_cases,
    "mamba2_kernels": memory_cases.mamba2_kernels_cases,
    "mamba2_later": memory_cases.mamba2_later_cases,
    "hybrid": memory_cases.hybrid_cases,
    "fsdp": memory_cases.fsdp_cases,
    "muon": memory_cases.muon_cases,
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


def largest_micro_batch(preset: str, capacity: int, measured: bool, target: Path) -> None:
    """The predicted micro-batch of one GPU for each stage, beside the one that really does not run out of memory."""
    rows = []
    for stage in (None, 0, 2, 3):
        case = Case(preset, stage, "bf16", length=PRESETS[preset].seq_len, backend="triton", device="cuda")
        predicted = largest_fitting(case.job(), capacity)
        row = {"preset": preset, "stage": "" if stage is None else stage, "length": case.length}
        row |= {"capacity_bytes": capacity, "predicted_rows": predicted}
        if measured:
            row["held_rows"] = climb(case, predicted)
        print(json.dumps(row), flush=True)
        rows.append(row)
        write(rows, target)


def climb(case: Case, start: int) -> int:
    """From `start` up until memory runs out, or down until it does not, by 2% at a time; 0 if one row is too much."""
    step, batch = max(1, start // 50), max(1, start)
    if holds(case, batch):
        while holds(case, batch + step):
            batch += step
        return batch
    while batch > 0 and not holds(case, batch):
        batch -= step
    return max(batch, 0)


def holds(case: Case, batch: int) -> bool:
    """Whether real steps with `batch` rows stay within the memory; any other failure is one, and is raised."""
    try:
        return bool(measure(dataclasses.replace(case, batch=batch)))
    except MemoryError:
        return False


def device_memory(device: str) -> int:
    """Bytes of one device, or 80 GB where there is none to ask; by another process, whose context ends with it."""
    ask = "import torch; print(torch.cuda.get_device_properties(0).total_memory if torch.cuda.is_available() else 0)"
    found = 0
    if device == "cuda":
        found = int(subprocess.run([sys.executable, "-c", ask], capture_output=True, text=True, check=True).stdout)
    return found or 80 * 10**9


SETTINGS = {
    "model": "model",
    "stage": "ZeRO",
    "dtype": "dtype",
    "offload": "offload",
    "checkpointing": "ckpt",
    "world": "processes",
    "batch": "rows",
    "length": "tokens",
    "accumulation": "accum.",
    "backend": "kernels",
    "optimizer": "AdamW",
    "settings": "settings",
}
TITLES = {
    "": "What the formulas were written on",
    "_held_out": "Other shapes",
    "_mamba2": "Mamba-2, shapes not looked at before",
    "_mamba2_kernels_first": "Mamba-2 on its C kernels, at their first measurement",
    "_hybrid_first": "Hybrids, at their first measurement",
    "_hybrid": "Hybrids, after the formulas of checkpointing were mended",
    "_mamba2_kernels": "Mamba-2 on its C kernels, after the formulas were mended",
    "_mamba2_later": "Mamba-2: a second look at what had not been seen",
    "_fsdp": "FSDP2; the last nine were predicted before they were measured",
    "_settings_first": "DeepSpeed's settings, at their first measurement",
    "_settings": "DeepSpeed's settings, after the formulas were mended",
    "_later": "A second look at what had not been seen",
    "_presets": "Published sizes",
}


def table() -> str:
    """The committed CPU measurements in Markdown: a row for each stage, dtype and offload, then all of them."""
    files = {}
    for suffix in TITLES:
        with (RESULTS / f"memory_cpu{suffix}.csv").open(newline="") as file:
            files[suffix] = list(csv.DictReader(file))
    few: dict[tuple[str, ...], dict[str, str]] = {}
    for row in files[""]:
        key = (row["stage"], row["dtype"], row["offload"])
        if key not in few or few[key]["world"] < row["world"]:
            few[key] = row
    lines = ["# Peak memory, predicted and measured", "", "Printed by `python benchmarks/memory.py --table`.", ""]
    lines += markdown(list(few.values()), ["stage", "dtype", "offload", "world"])
    for suffix, rows in files.items():
        lines += ["", f"## {TITLES[suffix]}: memory_cpu{suffix}.csv", "", *markdown(rows, list(SETTINGS))]
    return "\n".join(lines) + "\n"


def markdown(rows: list[dict[str, str]], columns: list[str]) -> list[str]:
    heads = [SETTINGS[name] for name in columns] + ["predicted MB", "measured MB", "error"]
    lines = [f"| {' | '.join(heads)} |", "|---" * len(columns) + "|---:" * 3 + "|"]
    for row in rows:
        cells = ["none" if name == "stage" and not row[name] else row[name] for name in columns]
        cells = [{"True": "on", "False": "", '""': ""}.get(cell, cell) for cell in cells]
        cells += [f"{int(row[f'{name}_bytes']) / 1e6:.2f}" for name in ("predicted", "measured")]
        lines.append(f"| {' | '.join(cells)} | {float(row['error_percent']):+.2f}% |")
    return lines


def run(cases: list[Case], target: Path, capacity: int) -> list[dict[str, Any]]:
    """Measure, one case after another, and write what there is; what fails or cannot fit is named and left out."""
    build_extensions(cases)
    rows = others(cases, target)
    for case in cases:
        needs = max(size for size, _ in case.predict().values())
        if case.device == "cuda" and needs > capacity:
            print(f"skipped, needs {show(needs)} of {show(capacity)}: {case}", file=sys.stderr)
            continue
        try:
            rows.append(row_of(case, measure(case)))
        except (MemoryError, RuntimeError) as error:
            print(f"failed: {error}", file=sys.stderr)
            continue
        print(json.dumps(rows[-1]), flush=True)
        write(rows, target)
    return rows


def others(cases: list[Case], target: Path) -> list[dict[str, Any]]:
    """The target's rows of runs that `--only` leaves out."""
    if not target.exists():
        return []
    now = [row_of(case, None) for case in cases]
    again = {tuple(str(row[name]) for name in SETTINGS) for row in now}
    with target.open(newline="") as file:
        return [row for row in csv.DictReader(file) if tuple(row[name] for name in SETTINGS) not in again]


def write(rows: list[dict[str, Any]], target: Path) -> None:
    target.parent.mkdir(exist_ok=True)
    with target.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--set", choices=list(SETS), default="all")
    parser.add_argument("--only", type=json.loads, default={}, help='{"stage": 2, "world": 1}: the cases that match')
    parser.add_argument("--predict", action="store_true", help="write the predictions, and run nothing")
    parser.add_argument(
        "--largest", metavar="PRESET", choices=list(PRESETS), help="find the largest micro-batch of this preset (cuda)"
    )
    parser.add_argument("--table", action="store_true", help="print the committed CSVs as Markdown, and run nothing")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    if args.table:
        return print(table(), end="")
    if args.largest and args.device != "cuda":
        parser.error("--largest is for GPUs: add --device cuda")
    if not args.predict:
        prepare(args.device)
    capacity = device_memory(args.device)
    suffix = "_largest" if args.largest else "" if args.set == "all" else f"_{args.set}"
    target = args.out or RESULTS / f"memory_{args.device}{suffix}{'_predicted' if args.predict else ''}.csv"
    if args.largest:
        return largest_micro_batch(args.largest, capacity, not args.predict, target)
    cases = memory_cases.cuda_cases() if args.device == "cuda" else SETS[args.set]()
    cases = [case for case in cases if all(getattr(case, k) == v for k, v in args.only.items())]
    if args.predict:
        return write([row_of(case, None) for case in cases], target)
    rows = run(cases, target, capacity)
    if not rows:
        return print("nothing was measured")
    worst = max(rows, key=lambda row: abs(float(row["error_percent"])))
    within = sum(abs(float(row["error_percent"])) <= 5 for row in rows)
    print(f"{within} of {len(rows)} within 5%; the worst is {worst['error_percent']}%; {target}")


if __name__ == "__main__":
    main()
