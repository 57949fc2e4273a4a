"""DeepSpeed files of public projects: which of them start here, by what is in them, and what is refused and why.

    python -m benchmarks.run files --folder FOLDER [--before CHECKOUT]

FOLDER holds the files and an INDEX.tsv (file, repository, path, "ok" or "refused" of today's stack, number of GPUs or
message). CHECKOUT is an earlier version of this package, whose verdicts are shown beside. Writes results/real_files.md.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

RESULT = Path(__file__).parent / "results" / "real_files.md"
Row = tuple[str, bool, int]  # file, whether the stack starts it, GPUs


def index(folder: Path) -> list[Row]:
    with open(folder / "INDEX.tsv", encoding="utf-8", newline="") as file:
        rows = [row for row in list(csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE))[1:] if row]
    return [(row[0], row[3] == "ok", int(row[4]) if row[3] == "ok" else 4) for row in rows]


def verdicts(folder: Path) -> dict[str, list[list[str]]]:
    """The problems of every file: (rule, text). Earlier versions have no rules, and get ""."""
    from hf_mamba.preflight import resolve

    found = {}
    for name, _, gpus in index(folder):
        values = {"preset": "7b_mamba", "num_gpus": gpus, "resume": "never", "output_dir": "runs/none"}
        plan = resolve({**values, "deepspeed": str(folder / name)}, environ={})
        found[name] = [[getattr(problem, "id", ""), str(problem)] for problem in plan.problems]
    return found


def _has(*path: str) -> Callable[[Any], bool]:
    def test(block: Any) -> bool:
        for key in path:
            if not isinstance(block, Mapping) or key not in block:
                return False
            block = block[key]
        return True

    return test


def _quoted(block: Any) -> bool:
    """Whether a number or a truth stands in quotation marks."""
    if isinstance(block, Mapping):
        return any(_quoted(value) for value in block.values())
    return isinstance(block, str) and (block in ("true", "false") or block.isdigit())


# What is in a file -> whether it is.
KINDS: dict[str, Callable[[Any], bool]] = {
    "an optimizer block": _has("optimizer"),
    "a scheduler block": _has("scheduler"),
    "loss scaling in bf16": lambda block: any(_has("bf16", key)(block) for key in ("loss_scale", "hysteresis")),
    "fp16.auto_cast": _has("fp16", "auto_cast"),
    "fp16.min_loss_scale below 1": lambda b: _has("fp16", "min_loss_scale")(b) and b["fp16"]["min_loss_scale"] < 1,
    "activation_checkpointing": _has("activation_checkpointing"),
    "zero_allow_untested_optimizer": _has("zero_allow_untested_optimizer"),
    "numbers in quotation marks": _quoted,
    "legacy cpu_offload": _has("zero_optimization", "cpu_offload"),
    "removed features": lambda b: any(_has(key)(b) for key in ("sparse_attention", "curriculum_learning", "amp")),
    "all": lambda block: True,
}


def table(folder: Path, now: Mapping[str, Any], before: Mapping[str, Any] | None) -> str:
    """The counts by kind, and the files that are refused, as Markdown."""
    rows = index(folder)
    lines = ["# DeepSpeed files of public projects", ""]
    lines += [f"{len(rows)} files, `--preset 7b_mamba`. A file starts where the pre-flight finds no problem.", ""]
    lines += ["| files with | files | today's stack starts | of these started before | of these start now |"]
    lines += ["|---|---:|---:|---:|---:|"]
    for kind, test in KINDS.items():
        own = [row for row in rows if test(json.loads((folder / row[0]).read_text(encoding="utf-8")))]
        starting = [name for name, starts, _ in own if starts]
        counts = [sum(not verdict[name] for name in starting) if verdict else "" for verdict in (before, now)]
        lines.append(f"| {kind} | {len(own)} | {len(starting)} | {counts[0]} | {counts[1]} |")
    repaired = [name for name, starts, _ in rows if not starts and not now[name]]
    lines += ["", f"Of the {sum(not row[1] for row in rows)} files that today's stack refuses, {len(repaired)} start."]
    lines += [
        "",
        "## Still refused",
        "",
        "| rule | files | of these the stack starts | what is said |",
        "|---|---:|---:|---|",
    ]
    reasons = {tuple(problem[0] for problem in now[name]): now[name] for name, *_ in rows if now[name]}
    counts_by = Counter(tuple(problem[0] for problem in now[name]) for name, *_ in rows if now[name])
    for ids, count in counts_by.most_common():
        started = sum(starts for name, starts, _ in rows if tuple(problem[0] for problem in now[name]) == ids)
        said = reasons[ids][0][1].replace(str(folder), "").replace("|", "\\|")
        lines.append(f"| {', '.join(ids)} | {count} | {started} | {said[:240]} |")
    return "\n".join(lines) + "\n"


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.run files", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--folder", type=Path, default=os.environ.get("HF_MAMBA_REAL_FILES"), required=False)
    parser.add_argument("--before", type=Path, help="a checkout of an earlier version")
    parser.add_argument("--verdicts", action="store_true", help="print the problems of every file as JSON, and stop")
    parser.add_argument("--out", type=Path, default=RESULT)
    options = parser.parse_args(argv)
    if options.folder is None:
        parser.error("--folder: where are the files?")
    folder = Path(options.folder)
    if options.verdicts:
        print(json.dumps(verdicts(folder)))
        return 0
    before = None
    if options.before:
        command = [sys.executable, __file__, "--verdicts", "--folder", str(folder)]
        done = subprocess.run(
            command, env={**os.environ, "PYTHONPATH": str(options.before)}, capture_output=True, text=True, check=True
        )
        before = json.loads(done.stdout)
    text = table(folder, verdicts(folder), before)
    options.out.write_text(text, encoding="utf-8")
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
