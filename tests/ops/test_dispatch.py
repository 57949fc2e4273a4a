"""The choice of a backend: what serves what, what a forced one refuses, and what a broken package does (nothing)."""

import os
import subprocess
import sys
import textwrap

import pytest
import torch
from scan_cases import reference

from hf_mamba import ops
from hf_mamba.ops import dispatch
from hf_mamba.ops import mamba_ssm as mamba_ssm_backend


def run_python(code: str, tmp_path, **environment) -> subprocess.CompletedProcess:
    """A fresh interpreter, which finds packages in tmp_path first."""
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), os.getcwd()])} | environment,
        capture_output=True,
        text=True,
        timeout=600,
    )


def test_the_table():
    assert ops.which() == "cpu"
    assert ops.which(dtype=torch.bfloat16, packed=True, carried=True) == "cpu"
    assert ops.which(dtype=torch.float64) == "torch"
    assert ops.which(dtype=torch.float16) == "torch"
    assert ops.which(states=300) == "torch"
    assert ops.which("causal_conv1d", states=9) == "torch"
    assert ops.which(device="meta") == "torch"


def test_available_backends_gives_reasons():
    found = ops.available_backends()
    assert list(found) == ["reference", "torch", "cpu", "triton", "mamba_ssm"]
    assert found["reference"] == found["torch"] == found["cpu"] == "available"
    if not torch.cuda.is_available():
        assert found["mamba_ssm"] == "PyTorch sees no CUDA device."


@pytest.mark.parametrize(
    ("name", "dtype", "reason"),
    [
        ("cpu", torch.float64, "takes float32 and bfloat16, not float64"),
        ("triton", torch.float32, ""),
        ("mamba_ssm", torch.float32, "need CUDA tensors"),
    ],
)
def test_a_forced_backend_that_cannot_serve_says_why(name, dtype, reason):
    x = torch.randn(1, 3, 4, dtype=dtype)
    A, B = -torch.rand(4, 2, dtype=dtype), torch.randn(1, 3, 2, dtype=dtype)
    with ops.backend(name), pytest.raises(ValueError, match=f"{name}.* is forced but cannot serve") as error:
        ops.selective_scan(x, x, A, B, B)
    assert reason in str(error.value)
    assert ops.selective_scan(x, x, A, B, B).shape == x.shape  # no longer forced


def test_unknown_backend():
    with pytest.raises(ValueError, match="no backend 'cuda': choose one of reference, torch, cpu"), ops.backend("cuda"):
        pass


def test_forcing_nests_and_survives_errors():
    with ops.backend("torch"):
        with ops.backend("reference"):
            assert ops.which() == "reference"
        with pytest.raises(KeyError), ops.backend("reference"):
            raise KeyError
        assert ops.which() == "torch"
    assert dispatch.forced() is None


def test_environment_variable(monkeypatch):
    monkeypatch.setenv("HF_MAMBA_BACKEND", "torch")
    assert ops.which() == "torch"
    with ops.backend("reference"):
        assert ops.which() == "reference"
    monkeypatch.setenv("HF_MAMBA_BACKEND", "fastest")
    with pytest.raises(ValueError, match="no backend 'fastest'"):
        ops.which()


def test_the_choice_is_logged_once(tmp_path):
    done = run_python(
        """
        import logging, torch
        logging.basicConfig(level=logging.INFO, format="%(message)s")
        from hf_mamba import ops
        x, A, B = torch.randn(1, 3, 4), -torch.rand(4, 2), torch.randn(1, 3, 2)
        for _ in range(3):
            ops.selective_scan(x, x, A, B, B)
        """,
        tmp_path,
    )
    assert done.stderr.splitlines() == ["selective_scan on cpu (torch.float32): cpu backend"]


FAKE_CUDA = """
    import sys, torch, logging
    logging.basicConfig(format="%(levelname)s %(message)s")
    torch.cuda.is_available = lambda: True
    torch.cuda.get_device_capability = lambda *a: (9, 0)
    from hf_mamba import ops
    for _ in range(2):
        print(ops.which("selective_scan", "cuda"), ops.which("causal_conv1d", "cuda", states=4))
    x = torch.randn(1, 3, 4)
    print(ops.selective_scan(x, x, -torch.rand(4, 2), x[..., :2], x[..., :2]).shape)
"""


@pytest.mark.parametrize(
    ("package", "complaint"),
    [
        ("raise ImportError('undefined symbol: _ZN3c105ErrorC2E')", "undefined symbol"),
        ("def selective_scan_fn(u, delta, A): ...", "selective_scan_fn takes"),
        ("def other(): ...", "AttributeError"),
        (
            "def selective_scan_fn(u, delta, A, B, C, D=None, z=None, delta_bias=None, delta_softplus=False,"
            " return_last_state=False): raise RuntimeError('selective_scan_cuda is not installed.')",
            "",  # the trial ends before the kernel where there is no CUDA; the fault is reported all the same
        ),
    ],
    ids=["wrong binary", "other signature", "no function", "no kernel"],
)
def test_a_broken_mamba_ssm_is_reported_once_and_passed_over(tmp_path, package, complaint):
    folder = tmp_path / "mamba_ssm" / "ops"
    folder.mkdir(parents=True)
    for init in (folder, folder.parent):
        (init / "__init__.py").write_text("")
    (folder / "selective_scan_interface.py").write_text(package + "\n")
    done = run_python(FAKE_CUDA, tmp_path)
    assert done.returncode == 0, done.stderr
    assert "mamba_ssm" not in done.stdout
    warnings = [line for line in done.stderr.splitlines() if line.startswith("WARNING The installed mamba_ssm")]
    assert len(warnings) == 1
    assert complaint in warnings[0]


def test_mamba_ssm_is_never_imported_for_cpu_tensors(tmp_path):
    (tmp_path / "mamba_ssm").mkdir()
    (tmp_path / "mamba_ssm" / "__init__.py").write_text("raise SystemExit('imported')")
    code = (
        "import torch\nfrom hf_mamba import ops\nops.available_backends()\nx = torch.randn(1, 3, 4)\nprint(ops.which())"
    )
    done = run_python(code, tmp_path)
    assert (done.returncode, done.stdout) == (0, "cpu\n"), done.stderr


def peer_scan(u, delta, A, B, C, D=None, z=None, delta_bias=None, delta_softplus=False, return_last_state=False):
    """mamba_ssm.selective_scan_fn's signature and layout, (B, E, L)."""
    u, delta, B, C, z = (t.transpose(1, 2) for t in (u, delta, B, C, z))
    return reference.selective_scan(u, delta, A, B, C, D, z, delta_bias, delta_softplus).transpose(1, 2)


def peer_conv(x, weight, bias=None, seq_idx=None, initial_states=None, activation=None):
    return reference.causal_conv1d(x.transpose(1, 2), weight, bias, activation).transpose(1, 2)


@pytest.mark.parametrize("op", ["selective_scan", "causal_conv1d"])
@pytest.mark.parametrize("error", [0.0, 0.01])
def test_the_trial_tells_right_from_wrong(monkeypatch, op, error):
    """The same check as on a GPU, here on stand-ins with the packages' signatures and layouts."""
    peer = {"selective_scan": peer_scan, "causal_conv1d": peer_conv}[op]

    def slightly_wrong(*args, **kw):
        return peer(*args, **kw) * (1 + error)

    slightly_wrong.__signature__ = __import__("inspect").signature(peer)
    monkeypatch.setattr(mamba_ssm_backend, "_imported", lambda module, name: slightly_wrong)
    mamba_ssm_backend.fault_of.cache_clear()
    try:
        fault = mamba_ssm_backend.fault_of(op, "cpu")
    finally:
        mamba_ssm_backend.fault_of.cache_clear()
    assert fault is None if error == 0 else "off by" in fault


def test_what_mamba_ssm_is_not_asked_to_do():
    call = {"op": "selective_scan", "device": "cuda"}
    assert mamba_ssm_backend.cannot_serve(dispatch.Call(**call)) is None
    for refused in (
        {"packed": True},
        {"carried": True},
        {"compiling": True},
        {"states": 300},
        {"dtype": torch.float64},
    ):
        assert mamba_ssm_backend.cannot_serve(dispatch.Call(**call | refused))
    assert mamba_ssm_backend.cannot_serve(dispatch.Call("rms_norm", "cuda"))


@pytest.mark.mamba_ssm
def test_mamba_ssm_itself():
    assert ops.which(device="cuda") == "mamba_ssm"
