"""What DeepSpeed compiles: said before and meanwhile, refused where it cannot be, found again."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from hf_mamba.findings import Findings
from hf_mamba.preflight import resolve
from hf_mamba.preflight.launch.extensions import check_extensions, compiling, needed_extensions
from hf_mamba.preflight.launch.machine import extensions_folder

pytest.importorskip("deepspeed")
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="DeepSpeed compiles its exchange on Linux alone")


def plan(deepspeed: str, device: str = "cpu"):
    values = {"preset": "tiny_mamba", "max_steps": 2, "resume": "never", "deepspeed": deepspeed}
    return resolve(values, device=device, world_size=1).require()


def found(deepspeed: str) -> Findings:
    out = Findings()
    check_extensions(plan(deepspeed), out)
    return out


def built(*names: str) -> None:
    """As torch leaves it: DeepSpeed's name of the extension, in a folder of torch's version or without one."""
    for depth, name in enumerate(names):
        library = extensions_folder() / ("py311_cpu" if depth else "") / name / f"{name}.so"
        library.parent.mkdir(parents=True)
        library.write_bytes(b"")


@pytest.fixture(autouse=True)
def machine(tmp_path, monkeypatch):
    """A machine with a compiler and ninja, on which nothing was built."""
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "built"))
    programs = tmp_path / "bin"
    programs.mkdir()
    for name in ("ninja", "c++"):
        (programs / name).write_text("#!/bin/sh\n")
        (programs / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(programs))
    monkeypatch.delenv("CXX", raising=False)
    return programs


@pytest.mark.parametrize(
    ("deepspeed", "device", "needed"),
    [
        ("none", "cpu", []),
        ("zero2", "cpu", ["deepspeed_shm_comm"]),
        ("zero2_offload", "cpu", ["cpu_adam", "deepspeed_shm_comm"]),
        ("zero2", "gpu", []),
        ("zero3_offload", "gpu", ["cpu_adam"]),
    ],
)
def test_what_a_run_makes_deepspeed_compile(deepspeed, device, needed):
    assert needed_extensions(plan(deepspeed, device)) == needed


def test_a_compilation_is_said_before_and_meanwhile_and_not_once_it_is_there():
    out = found("zero2_offload")
    assert not out.problems
    assert "its CPU Adam and its exchange between processes on CPUs" in out.notes[0]
    assert f"kept in {extensions_folder()}" in out.notes[0]
    assert "is compiling its CPU Adam and its exchange" in compiling(plan("zero2_offload"))
    built("deepspeed_shm_comm")
    assert "exchange" not in found("zero2_offload").notes[0]
    assert "CPU Adam" in compiling(plan("zero2_offload"))
    shutil.rmtree(extensions_folder())
    built("deepspeed_shm_comm", "cpu_adam")
    assert found("zero2_offload").notes == []
    assert compiling(plan("zero2_offload")) is compiling(plan("none")) is None


@pytest.mark.parametrize(
    ("absent", "deepspeed", "words", "fix"),
    [
        (["ninja"], "zero2", "no ninja on PATH", "pip install ninja"),
        (["c++"], "zero2", "no c++ on PATH", "--deepspeed none"),
        (["ninja", "c++"], "zero2_offload", "no ninja and no c++ on PATH", "a C++ compiler"),
    ],
)
def test_without_what_compiles_the_run_is_refused_unless_it_was_compiled(machine, absent, deepspeed, words, fix):
    for name in absent:
        (machine / name).unlink()
    (problem,) = found(deepspeed).problems
    assert (problem.id, problem.found) == ("compiler-missing", words)
    assert fix in problem.fix
    built("deepspeed_shm_comm", "cpu_adam")
    assert found(deepspeed).problems == []


def test_the_compiler_is_the_one_that_torch_takes(monkeypatch, machine):
    (machine / "c++").rename(machine / "clang++")
    monkeypatch.setenv("CXX", "clang++")
    assert found("zero2").problems == []
    monkeypatch.setenv("CXX", "icpx")
    assert found("zero2").problems[0].found == "no icpx on PATH"


def test_a_folder_that_cannot_be_written_is_named(tmp_path, monkeypatch):
    """A file stands where a folder has to be: not even root writes below it."""
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "file" / "built"))
    (problem,) = found("zero2").problems
    assert (problem.key, problem.id) == ("TORCH_EXTENSIONS_DIR", "extensions-folder-unusable")
    assert "cannot be written" in problem.found


@pytest.mark.parametrize(("options", "words"), [("noexec", "is on a disk mounted noexec"), ("ro", "cannot be written")])
def test_a_home_that_is_read_only_or_mounted_noexec_is_named(options, words, tmp_path, monkeypatch):
    """In a mount namespace of its own, where this user may make one."""
    monkeypatch.undo()  # the PATH
    own = ["unshare", "--mount", "sh", "-c", f'mount -t tmpfs -o {options} none {tmp_path} && "$@"', "sh"]
    if shutil.which("unshare") is None or subprocess.run([*own, "true"], capture_output=True, check=False).returncode:
        pytest.skip("this user may mount nothing")
    code = "from pathlib import Path\nfrom hf_mamba.preflight.launch import extensions\n"
    code += f"print(extensions._unusable(Path({str(tmp_path)!r}) / '.cache' / 'torch_extensions'))"
    done = subprocess.run(
        [*own, sys.executable, "-c", code],
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout.strip() == words, done.stderr
