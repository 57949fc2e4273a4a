"""Runs triton_cases.py: on a CUDA device directly, elsewhere under Triton's interpreter.

The interpreter must be asked for before Triton is imported and would change every other user of Triton in the
process, so the cases run in their own processes.
"""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

CASES = Path(__file__).with_name("triton_cases.py")
GROUPS = {
    "scan against float64": "test_scan_shapes or test_scan_any_shape",
    "scan, its features": "test_scan and not test_scan_shapes and not test_scan_any_shape",
    "the rest": "not test_scan",
}

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")


def run_cases(group: str, environment: dict[str, str]) -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(CASES), "-k", GROUPS[group]]
    result = subprocess.run(command, env=os.environ | environment, capture_output=True, text=True, timeout=900)
    assert result.returncode == 0, result.stdout[-8000:] + result.stderr[-2000:]


@pytest.mark.parametrize("group", GROUPS)
def test_interpreted(group):
    run_cases(group, {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""})


@pytest.mark.gpu
@pytest.mark.parametrize("group", GROUPS)
def test_on_the_gpu(group):
    run_cases(group, {"TRITON_INTERPRET": "0"})
