"""The first compilation: two at once, killed, damaged, without a compiler, without a cache; and forked processes."""

import ctypes
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest
import torch

from hf_mamba import ops
from hf_mamba.ops.cpu import build, structures
from hf_mamba.ops.cpu import library as libraries

# Every process is a fork of one that has this module and what a first call imports, and has used nothing of it.
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload([__name__, "torch._dynamo", "hf_mamba.ops.torch.backend"])


def scanned() -> float:
    torch.manual_seed(0)
    x, A, B = torch.randn(1, 40, 4), -torch.rand(4, 16), torch.randn(1, 40, 16)
    return ops.selective_scan(x, x, A, B, B).double().sum().item()


def use(folder: Path, environment: dict[str, str]) -> None:
    """The process: which backend serves the first call, and the result."""
    os.environ.update(environment)
    for number, name in ((1, "out"), (2, "error")):
        os.dup2(os.open(folder / name, os.O_WRONLY | os.O_CREAT), number)
    print(ops.which(), scanned(), flush=True)


def start(cache: Path, **environment: str) -> BaseProcess:
    """A process with this cache, and with a compiler that does not optimise unless `environment` says another."""
    folder = Path(tempfile.mkdtemp(dir=cache))
    quick = script(cache / "quick-cc", f'exec {build.compiler()} "$@" -O0')
    given = {"XDG_CACHE_HOME": str(cache), "CC": quick} | environment
    process = FORKS.Process(target=use, args=(folder, given), name=str(folder))
    process.start()
    return process


def finish(process: BaseProcess) -> tuple[str, str]:
    process.join(600)
    out, error = ((Path(process.name) / name).read_text() for name in ("out", "error"))
    assert process.exitcode == 0, error
    return out, error


def script(path: Path, text: str) -> str:
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return str(path)


@pytest.fixture(scope="module")
def expected() -> float:
    with ops.backend("reference"):
        return scanned()


def files(cache: Path) -> list[str]:
    return sorted(path.name for path in (cache / "hf_mamba" / "kernels").iterdir())


def endless_compiler(folder: Path) -> str:
    """A compiler to be killed in; it leaves its process number behind."""
    return script(folder / "slow-cc", f"echo $$ > {folder}/pid\nexec sleep 600")


def test_two_processes_build_at_once(tmp_path, expected):
    results = [finish(process)[0].split() for process in [start(tmp_path) for _ in range(2)]]
    assert [name for name, _ in results] == ["cpu"] * 2
    assert all(float(value) == pytest.approx(expected, rel=1e-5) for _, value in results)
    assert len(files(tmp_path)) == 1
    assert (tmp_path / "hf_mamba" / "kernels").stat().st_mode & 0o077 == 0

    published = tmp_path / "hf_mamba" / "kernels" / files(tmp_path)[0]
    whole = published.read_bytes()
    assert build._whole(published)
    for damage in (whole[:100], whole[:-1], whole[:5000] + bytes([whole[5000] ^ 1]) + whole[5001:], b""):
        published.write_bytes(damage)  # loading some of these would end the process with a bus error
        assert not build._whole(published)
    published.write_bytes(whole)
    published.chmod(0o666)  # others could have written it
    assert not build._whole(published)
    (link := published.with_name("link.so")).symlink_to(published)
    assert not build._whole(link)
    link.unlink()
    assert finish(start(tmp_path))[0].startswith("cpu ")  # built again
    assert build._whole(published)


@pytest.mark.parametrize("part", ["hf_mamba/kernels", "hf_mamba", "."])
def test_nothing_is_loaded_from_where_others_can_write(tmp_path, monkeypatch, part):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert build.kernel_folder() == tmp_path / "hf_mamba" / "kernels"
    (tmp_path / part).chmod(0o777)
    with pytest.warns(UserWarning, match=rf"others can write .*{'' if part == '.' else part}\. Write chmod go-w"):
        assert build.kernel_folder() is None


def test_a_killed_build_is_in_nobody_s_way(tmp_path, expected):
    process = start(tmp_path, CC=endless_compiler(tmp_path))
    deadline = time.monotonic() + 600
    while not (tmp_path / "pid").exists():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.kill()
    process.join()
    os.kill(int((tmp_path / "pid").read_text()), signal.SIGKILL)
    assert all(name.startswith("build-") for name in files(tmp_path))
    name, value = finish(start(tmp_path))[0].split()
    assert (name, float(value)) == ("cpu", pytest.approx(expected, rel=1e-5))


def test_without_a_working_compiler_the_torch_backend_serves(tmp_path, expected):
    out, error = finish(start(tmp_path, PATH="/nonexistent", CC=""))
    assert out.split()[0] == "torch"
    assert error.count("no C compiler was found") == 1
    failing = script(tmp_path / "bad-cc", "echo 'fatal error: stdint.h: No such file' >&2\nexit 1")
    out, error = finish(start(tmp_path, CC=failing))
    assert (out.split()[0], float(out.split()[1])) == ("torch", pytest.approx(expected, rel=1e-5))
    assert error.count("No CPU kernels: the C compiler failed: fatal error: stdint.h: No such file.") == 1
    assert files(tmp_path) == []


def test_without_a_folder_to_keep_it_in(tmp_path):
    (tmp_path / "hf_mamba").write_text("a file where the folder should be")
    temporary = tmp_path / "tmp"
    temporary.mkdir()
    out, error = finish(start(tmp_path, TMPDIR=str(temporary)))
    assert out.startswith("cpu ")
    assert error.count("at every start: no folder of this user keeps them") == 1
    assert list(temporary.iterdir()) == []


def test_a_compilation_is_said_and_its_result_found_again_where_there_is_no_compiler(tmp_path):
    out, error = finish(start(tmp_path))
    assert out.startswith("cpu ")
    assert error.count("Compiling the CPU kernels") == error.count(f"kept in {tmp_path}/hf_mamba/kernels") == 1
    again, error = finish(start(tmp_path, PATH="/nonexistent", CC=""))
    assert again == out
    assert "Compiling" not in error


def test_a_folder_that_is_mounted_noexec_keeps_the_library(tmp_path):
    """In a mount namespace of its own, where this user may make one."""
    own = ["unshare", "--mount", "sh", "-c", f'mount -t tmpfs -o noexec none {tmp_path} && "$@"', "sh"]
    if shutil.which("unshare") is None or subprocess.run([*own, "true"], capture_output=True, check=False).returncode:
        pytest.skip("this user may mount nothing")
    code = "import os\nfrom hf_mamba.ops.cpu import build\nbuild.load(16).scan_forward\nos.environ['PATH'] = ''\n"
    code += "build.load(16)\nprint(len(list(build.kernel_folder().iterdir())))"
    quick = {"XDG_CACHE_HOME": str(tmp_path), "CC": script(Path(tempfile.mkdtemp()) / "cc", 'exec cc "$@" -O0')}
    done = subprocess.run([*own, sys.executable, "-c", code], env=os.environ | quick, capture_output=True, text=True)
    assert (done.stdout, done.returncode) == ("1\n", 0), done.stderr
    assert done.stderr.count("Compiling") == 1, "the second was found"


def test_a_structure_that_differs_from_the_kernels_own_is_refused(monkeypatch):
    """A renamed field, and one that is missing: ctypes would read the wrong bytes without a word."""
    library = build.load(16)
    assert structures.difference(library) is None
    fields = structures.Norm._fields_
    renamed = type("Norm", (ctypes.Structure,), {"_fields_": (*fields[:-1], ("total", ctypes.c_void_p))})
    shorter = type("Norm", (ctypes.Structure,), {"_fields_": fields[:-1]})
    for wrong, named in (
        (renamed, "Norm of kernels/ has sum at byte"),
        (shorter, "has sum at byte .* has the end at byte"),
    ):
        monkeypatch.setattr(structures, "STRUCTURES", (structures.Tensor, wrong))
        with pytest.raises(build.BuildError, match=named):
            libraries.library.__wrapped__(16)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
def test_forked_children_of_a_parent_that_used_its_threads():
    parent = FORKS.Process(target=forking)
    parent.start()
    parent.join(600)
    assert parent.exitcode == 0


def forking() -> None:
    torch.set_num_threads(3)
    x, A, B = torch.randn(2, 200, 300).requires_grad_(), -torch.rand(300, 16), torch.randn(2, 200, 16)

    def gradient() -> torch.Tensor:
        y = ops.selective_scan(ops.causal_conv1d(x, torch.ones(300, 4)), x, A, B, B)
        return torch.autograd.grad(y.sum(), x)[0]

    want, children = gradient(), []
    for _ in range(2):
        pid = os.fork()
        if pid == 0:
            torch.set_num_threads(1)  # torch's own operations would hang with more, as in any forked child
            os._exit(0 if torch.equal(gradient(), want) else 1)
        children.append(pid)
    assert [os.waitpid(pid, 0)[1] for pid in children] == [0, 0]
    assert torch.equal(gradient(), want)


def test_python_threads_where_there_is_no_openmp(monkeypatch):
    from hf_mamba.ops.cpu import threads

    x, A, B = torch.randn(2, 200, 300), -torch.rand(300, 16), torch.randn(2, 200, 16)
    want = ops.selective_scan(x, x, A, B, B)
    monkeypatch.setattr(threads, "openmp", lambda: None)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        for _ in range(5):
            assert torch.equal(ops.selective_scan(x, x, A, B, B), want)
    finally:
        torch.set_num_threads(before)
