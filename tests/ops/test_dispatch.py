"""The choice of a backend: what serves what, what a forced one refuses, and what a broken package does (nothing)."""

import os
import subprocess
import sys
import textwrap

import pytest
import torch
from scan_cases import assert_close, documents, leaves, reference, with_gradients

from hf_mamba import ops
from hf_mamba.ops import dispatch
from hf_mamba.ops import mamba_ssm as mamba_ssm_backend
from hf_mamba.ops.operands import Ssd


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


def peer_dual(
    x, dt, A, B, C, chunk_size, D=None, z=None, dt_bias=None, initial_states=None, seq_idx=None, cu_seqlens=None,
    dt_softplus=False, dt_limit=(0.0, float("inf")), return_final_states=False, return_varlen_states=False,
):  # fmt: skip
    """A stand-in for mamba_ssm.mamba_chunk_scan_combined, by the whole mask of its paper: no chunks, no kernels.

    As there, tokens of equal numbers see each other, and those of number 0 the initial state.
    """
    assert (z, dt_bias, dt_softplus) == (None, None, False)
    assert dt.dtype == A.dtype == torch.float32
    assert A.shape == dt.shape[2:]
    exact = torch.float64
    sums = (dt * A).to(exact).cumsum(1)
    same = torch.ones(x.shape[:2] + x.shape[1:2], dtype=torch.bool).tril()
    first = torch.ones(x.shape[:2], dtype=torch.bool)
    if seq_idx is not None:
        assert seq_idx.dtype == torch.int32
        same, first = same & (seq_idx[:, :, None] == seq_idx[:, None]), seq_idx == 0
    decay = (sums[:, :, None] - sums[:, None]).masked_fill(~same[..., None], -torch.inf).exp()  # (B, t, s, H)
    u = (x * dt[..., None]).to(exact)
    B, C = (t.to(exact).repeat_interleave(x.shape[2] // t.shape[2], 2) for t in (B, C))
    y = torch.einsum("bthn,bshn,btsh,bshp->bthp", C, B, decay, u)
    final = torch.einsum("bshn,bsh,bshp->bhpn", B, decay[:, -1], u)
    if initial_states is not None:
        started = sums.exp() * first[..., None]
        y = y + torch.einsum("bthn,bth,bhpn->bthp", C, started, initial_states.to(exact))
        final = final + started[:, -1, :, None, None] * initial_states
    y = y if D is None else y + x * D[:, None]
    return (y.to(x.dtype), final.float()) if return_final_states else y.to(x.dtype)


def peer_update(state, x, dt, A, B, C, D=None, z=None, dt_bias=None, dt_softplus=False, state_batch_indices=None):
    """A stand-in for mamba_ssm's selective_state_update with heads; the kernel wants strides of 0 to know them."""
    assert dt.shape == x.shape
    assert A.shape == state.shape[1:]
    assert D.shape == dt_bias.shape == A.shape[:2]
    assert A.stride()[1:] == (0, 0)
    assert dt.stride(-1) == dt_bias.stride(-1) == 0
    dt = dt + dt_bias
    B, C = (t.repeat_interleave(x.shape[1] // t.shape[1], 1)[:, :, None] for t in (B, C))
    state.copy_(state * torch.exp(dt[..., None] * A) + dt[..., None] * B * x[..., None])
    return ((state * C).sum(-1) + x * D).to(x.dtype)


PEERS = {"selective_scan": peer_scan, "causal_conv1d": peer_conv, "ssd": peer_dual, "ssd_update": peer_update}


def scaled(found, factor):
    return tuple(t * factor for t in found) if isinstance(found, tuple) else found * factor


@pytest.mark.parametrize("packed", [False, True], ids=["whole", "packed"])
@pytest.mark.parametrize("absent", ["nothing", "D", "initial_state"])
def test_a_dual_with_rates_is_handed_over_exactly(monkeypatch, packed, absent):
    """To a stand-in that computes the published formula: with steps of 0, and with numbers that come back."""
    monkeypatch.setattr(mamba_ssm_backend, "_imported", lambda module, name: peer_dual)
    generator = torch.Generator().manual_seed(0)
    shapes = {"x": (2, 33, 4, 3), "a": (4,), "w": (2, 33, 4), "B": (2, 33, 2, 5), "C": (2, 33, 2, 5), "D": (4,)}
    given = {k: torch.randn(v, generator=generator) for k, v in (shapes | {"initial_state": (2, 4, 3, 5)}).items()}
    given["a"], given["w"] = -given["a"].abs(), given["w"].abs()
    given["w"][:, 5:9] = 0.0  # padding
    given.pop(absent, None)
    options = {"seq_idx": documents(2, 33) % 2 + 3} if packed else {}
    want = with_gradients(reference.ssd, leaves(given, torch.float64), **options, return_final_state=True)
    got = with_gradients(lambda **kw: mamba_ssm_backend.ssd(Ssd(**kw)), leaves(given), **options)
    assert_close(got, want, 1e-5)

    monkeypatch.setattr(mamba_ssm_backend, "_imported", lambda module, name: peer_update)
    states = [torch.zeros(2, 4, 3, 5) if absent == "initial_state" else given["initial_state"].clone() for _ in "ab"]
    for t in (0, 6):
        step = (
            *(given[name] if name == "a" else given[name][:, t] for name in ("x", "a", "w", "B", "C")),
            given.get("D"),
        )
        found, expected = mamba_ssm_backend.ssd_update(states[0], *step), reference.ssd_update(states[1], *step)
        assert_close({"y": found, "state": states[0]}, {"y": expected, "state": states[1]}, 1e-5)


@pytest.mark.parametrize("op", PEERS)
@pytest.mark.parametrize("error", [0.0, 0.1])
def test_the_trial_tells_right_from_wrong(monkeypatch, op, error):
    """The same check as on a GPU, here on stand-ins with the packages' signatures and layouts."""
    peer = PEERS[op]

    def slightly_wrong(*args, **kw):
        return scaled(peer(*args, **kw), 1 + error)

    slightly_wrong.__signature__ = __import__("inspect").signature(peer)
    monkeypatch.setattr(mamba_ssm_backend, "_imported", lambda module, name: slightly_wrong)
    mamba_ssm_backend.fault_of.cache_clear()
    try:
        fault = mamba_ssm_backend.fault_of(op, "cpu")
    finally:
        mamba_ssm_backend.fault_of.cache_clear()
    assert fault is None if error == 0 else "off by" in fault


def test_what_mamba_ssm_is_not_asked_to_do(monkeypatch):
    call = {"op": "selective_scan", "device": "cuda"}
    monkeypatch.setattr(mamba_ssm_backend, "fault_of", lambda op: None)
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
    for op in ("ssd", "ssd_update"):
        dual = {"op": op, "device": "cuda", "dtype": torch.bfloat16, "rated": True, "packed": True, "carried": True}
        assert mamba_ssm_backend.cannot_serve(dispatch.Call(**dual)) is None
        for refused in ({"rated": False}, {"compiling": True}, {"states": 300}, {"dtype": torch.float64}):
            assert mamba_ssm_backend.cannot_serve(dispatch.Call(**dual | refused))
    assert "TF32" in mamba_ssm_backend.cannot_serve(dispatch.Call("ssd", "cuda", rated=True))


@pytest.mark.mamba_ssm
def test_mamba_ssm_itself():
    assert ops.which(device="cuda") == "mamba_ssm"


@pytest.mark.mamba_ssm
def test_mamba_ssm_itself_serves_a_dual():
    """What its trial has compared with the torch backend; never run by us."""
    for op in ("ssd", "ssd_update"):
        found = ops.which(op, "cuda", torch.bfloat16, packed=True, carried=True, states=128, width=64, rated=True)
        assert found == "mamba_ssm", mamba_ssm_backend.fault_of(op)
