"""The session for a GPU: its steps, resuming, what a failure costs, the verdicts, and a rehearsal of one step."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import run
from benchmarks.gpu_session import session
from benchmarks.gpu_session.figures import Figure, read_figures, read_steps
from benchmarks.gpu_session.steps import IMPORTS, STEPS, Step
from benchmarks.gpu_session.verdicts import STATEMENTS, Statement, at_least, below_beside, judge, matches, within

ROOT = Path(__file__).parents[1]
FAKES = """
import subprocess, sys, time

def good(context, *words):
    context.report("setting", "words", len(words), "", 2)

def fails(context):
    context.report("setting", "before", 1, "")
    raise ValueError("no such kernel")

def hangs(context):
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    context.report("setting", "child", child.pid, "")
    time.sleep(60)
"""
OWN = (
    Step("a-first", "gpu_fakes:good", 30, ("one", "two"), together=True),
    Step("a-fails", "gpu_fakes:fails", 30, together=True),
    Step("b-hangs", "gpu_fakes:hangs", 4),
    Step("c-last", "gpu_fakes:good", 30),
)


@pytest.fixture
def start(tmp_path, monkeypatch):
    """Runs a session of these steps; its folder is tmp_path/out."""
    (tmp_path / "gpu_fakes.py").write_text(FAKES)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))

    def start(*arguments: str, imports=("import json",), minutes="5") -> int:
        return session.main(["--out", str(tmp_path / "out"), "--minutes", minutes, *arguments], OWN, imports)

    return start


def test_the_steps_are_whole():
    """The parts of the issue in their order, each step with a function that takes its arguments."""
    names = [step.name for step in STEPS]
    assert len(set(names)) == len(names)
    first = list(dict.fromkeys(name[0] for name in names if name != "card"))
    assert first == ["a", "b", "c", "d", "e"]
    for step in STEPS:
        module, _, function = step.function.partition(":")
        found = getattr(importlib.import_module(module, "benchmarks.gpu_session"), function)
        assert found.__code__.co_flags & 4 or found.__code__.co_argcount > len(step.arguments)  # *names
    assert all(importlib.util.find_spec(f"benchmarks.{module}") for module in run.OWN.values())
    from benchmarks.gpu_session import numbers, times
    from hf_mamba import ops

    compared = {name for step in STEPS if step.function == ".numbers:compare" for name in step.arguments}
    kinds = {"available_backends", "backend", "which", "reference", "linear"}  # a linear layer is torch's own on a GPU
    assert compared == set(numbers.OPERATIONS) == set(ops.__all__) - kinds
    assert {step.arguments[0] for step in STEPS if step.function == ".times:measure"} == set(times.SUITES)


def test_a_failure_costs_its_step_and_the_rest_is_not_done_again(start, tmp_path, capsys):
    assert start() == 0
    out = tmp_path / "out"
    done = read_steps(out)
    assert [done[step.name].why.partition(":")[0] for step in OWN] == ["", "ended with 1", "not within 4 s", ""]
    assert "no such kernel" in done["a-fails"].why
    figures = {figure.key: figure.value for figure in read_figures(out)}
    assert figures["a-fails/setting/before"] == 1
    assert figures["a-first/setting/words"] == 2
    child = figures["b-hangs/setting/child"]
    state = Path(f"/proc/{child:.0f}/status")
    assert not state.exists() or "zombie" in state.read_text()
    assert "| open |" in (out / "report.md").read_text()
    capsys.readouterr()
    assert start("--only", "a,c-last") == 0
    assert capsys.readouterr().out.startswith("a-fails: ")
    assert len((out / "steps.jsonl").read_text().splitlines()) == len(OWN) + 1


def test_what_the_sessions_end_cuts_off_is_begun_again(start, tmp_path, capsys):
    assert start("--only", "b", minutes="0.01") == 0
    assert "left for another start: b-hangs" in capsys.readouterr().out
    assert not read_steps(tmp_path / "out")


def test_nothing_begins_without_the_imports(start, tmp_path, capsys):
    assert start(imports=("import json", "import no_such_kernels", "assert False, 'no CUDA device'")) == 1
    said = capsys.readouterr().err
    assert "No module named 'no_such_kernels'" in said
    assert "no CUDA device" in said
    assert not read_steps(tmp_path / "out")
    with pytest.raises(SystemExit):
        start("--only", "z")
    assert "there is no step z" in capsys.readouterr().err


def test_without_a_gpu_it_is_said_first(start, monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert start(imports=IMPORTS[:1]) == 1
    assert "PyTorch sees no CUDA device" in capsys.readouterr().err
    assert not list((tmp_path / "out").iterdir())


def test_verdicts_read_the_figures():
    figures = [
        Figure("a-scan", "small", "error", 1e-3, "", 1e-2),
        Figure("a-scan", "large", "error", 2e-2, "", 1e-2),
        Figure("c-130m", "B=8", "memory", 9.8, "GB", 10),
        Figure("d-mamba", "B=1", "static / hf_mamba", 0.5, "x"),
        Figure("card", "", "products", 1, "", None),
    ]
    rows = (
        ("a-*/error", below_beside()),
        ("c-*/memory", matches(0.05)),
        ("c-*/memory", at_least(10)),
        ("d-*/static / *", within(1)),
        ("b-*", within(1)),
        ("card//products", below_beside()),
    )
    _, _, *lines = judge(figures, [Statement("README.md", "words", pattern, "", holds) for pattern, holds in rows])
    verdicts = [line.split(" | ")[0].strip("| ") for line in lines]
    assert verdicts == ["refuted", "confirmed", "refuted", "confirmed", "open", "open"]
    assert "1 of 2: a-scan/large/error 0.02" in lines[0]


@pytest.mark.parametrize("row", STATEMENTS, ids=lambda row: f"{row.file}: {row.says}")
def test_a_statement_stands_where_it_is_said_to(row):
    assert row.says in " ".join((ROOT / row.file).read_text(encoding="utf-8").split())


def test_a_step_rehearsed(tmp_path):
    """Numbers against float64, in Triton's interpreter."""
    pytest.importorskip("triton")
    command = [
        sys.executable,
        "-m",
        "benchmarks.gpu_session.step",
        "a",
        ".numbers:compare",
        str(tmp_path),
        "--rehearse",
    ]
    environment = session.environment_of(rehearse=True)
    done = subprocess.run(
        [*command, "gated_rms_norm"],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    if "numpy" in done.stderr and done.returncode:
        pytest.skip("Triton's interpreter below 3.7 needs numpy below 2.4")
    assert done.returncode == 0, done.stderr[-3000:]
    figures = read_figures(tmp_path)
    assert len(figures) == 3
    assert all(0 < figure.value < figure.beside for figure in figures)
