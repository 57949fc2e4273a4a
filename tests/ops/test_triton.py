"""Runs triton_cases.py (and triton_large.py): on a CUDA device directly, elsewhere under Triton's interpreter.

The interpreter must be asked for before Triton is imported and would change every other user of Triton in the
process, so the cases run in their own processes.
"""

import importlib.metadata
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
from packaging.version import Version

CASES = Path(__file__).with_name("triton_cases.py")
GROUPS = {
    "scan against float64": "test_scan_shapes or test_scan_any_shape",
    "scan, its features": "test_scan and not test_scan_shapes and not test_scan_any_shape",
    "ssd and its norm": "test_dual or test_gated",
    "the rest": "not test_scan and not test_dual and not test_gated",
}

INTERPRETER = {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
TRITON = importlib.util.find_spec("triton") is not None
pytestmark = pytest.mark.skipif(not TRITON, reason="Triton is not installed")


def run_cases(environment: dict[str, str], cases: Path, *options: str) -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(cases), *options]
    result = subprocess.run(command, env=os.environ | environment, capture_output=True, text=True, timeout=900)
    assert result.returncode == 0, result.stdout[-8000:] + result.stderr[-2000:]


def interpreter_breaks() -> bool:
    """Triton below 3.7 turns arrays of one element into numbers, which numpy refuses from 2.4 on."""
    numpy, triton = (Version(importlib.metadata.version(name)) for name in ("numpy", "triton"))
    return triton < Version("3.7") and numpy >= Version("2.4")


@pytest.mark.skipif(TRITON and interpreter_breaks(), reason="Triton's interpreter below 3.7 needs numpy below 2.4")
@pytest.mark.parametrize("group", GROUPS)
def test_interpreted(group):
    run_cases(INTERPRETER, CASES, "-k", GROUPS[group])


@pytest.mark.skipif(TRITON and interpreter_breaks(), reason="Triton's interpreter below 3.7 needs numpy below 2.4")
@pytest.mark.parametrize("group", ["not scan", pytest.param("scan", marks=pytest.mark.slow)])
def test_interpreted_beyond_2_to_31_elements(group):
    run_cases(INTERPRETER, CASES.with_name("triton_large.py"), "-k", group)


def test_kernels_compile_without_a_gpu(tmp_path):
    """For sm_80 a few kernels, within their spill limits; the whole table is benchmarks/results/triton_compile.csv."""
    table = tmp_path / "table.csv"
    command = [sys.executable, "-m", "benchmarks.triton_compile", "--only", "decode", "--arch", "80", "--jobs", "1"]
    result = subprocess.run(
        [*command, "--out", table], cwd=CASES.parents[2], capture_output=True, text=True, timeout=300
    )
    assert result.returncode == 0, result.stderr[-3000:]
    kernels = [line.split(",")[1] for line in table.read_text().splitlines()]
    assert kernels == ["kernel", "state_update", "conv_update"]


@pytest.mark.gpu
@pytest.mark.parametrize("group", GROUPS)
def test_on_the_gpu(group):
    """In several processes: nearly all of the time is the compiler's."""
    run_cases({"TRITON_INTERPRET": "0"}, CASES, "-k", GROUPS[group], "-n", str(min(8, os.cpu_count() or 1)))
