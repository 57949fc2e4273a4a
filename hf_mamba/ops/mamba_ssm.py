"""The mamba_ssm backend: the kernels of mamba-ssm and causal-conv1d, where they are installed and work.

The scan and the convolution serve one document per row from a zero state. The scan's backward drops the final state's
gradient: a call that asks for one goes elsewhere. The state space dual serves packed documents and states, but takes a
step Δ for decay and weight together: `ssd` must be given rates. Its products round to 16 bits, and those of fp32 to
TF32: fp32 goes elsewhere. Its backward adds up by atomics, but under `torch.use_deterministic_algorithms(True)`.

Each operation is tried once, on small random tensors against the torch backend, before it is trusted: a build against
another PyTorch, or mamba-ssm's default install (which leaves the Mamba-1 kernel out), is reported once and passed over.
Signatures as of mamba-ssm 2.3.2 (selective_scan_interface.py, triton/ssd_combined.py, triton/selective_state_update.py)
and causal-conv1d 1.6.1. Their gated norm is not used: as ours, it is one pass over memory.
"""

import functools
import importlib
import importlib.util
import inspect
import logging
from collections.abc import Callable

import torch
from torch import Tensor

from hf_mamba.ops.operands import Conv, Scan, Ssd
from hf_mamba.ops.reference import document_starts
from hf_mamba.ops.torch import backend as torch_backend
from hf_mamba.sizes import MAMBA_SSM_DUAL_CHUNK

__all__ = ["cannot_serve", "causal_conv1d", "selective_scan", "ssd", "ssd_update", "unavailable"]

Optional = Tensor | None

logger = logging.getLogger("hf_mamba.ops")

SCAN = ("mamba_ssm.ops.selective_scan_interface", "selective_scan_fn")
SCAN_PARAMETERS = ["u", "delta", "A", "B", "C", "D", "z", "delta_bias", "delta_softplus", "return_last_state"]
CONV = ("causal_conv1d", "causal_conv1d_fn")
CONV_PARAMETERS = ["x", "weight", "bias", "seq_idx", "initial_states"]
DUAL = ("mamba_ssm.ops.triton.ssd_combined", "mamba_chunk_scan_combined")
DUAL_PARAMETERS = ["x", "dt", "A", "B", "C", "chunk_size", "D", "z", "dt_bias", "initial_states", "seq_idx"]
UPDATE = ("mamba_ssm.ops.triton.selective_state_update", "selective_state_update")
UPDATE_PARAMETERS = ["state", "x", "dt", "A", "B", "C", "D", "z", "dt_bias", "dt_softplus"]
INSTALL = "MAMBA_KEEP_CUDA_BUILD=TRUE pip install mamba-ssm causal-conv1d --no-build-isolation"
TOLERANCE, TOLERANCE_16_BITS = 1e-3, 3e-2  # of the largest value; a wrong kernel is off by far more


def unavailable() -> str | None:
    """Why mamba-ssm cannot be used on this machine; imports it only where there is a CUDA device."""
    if not torch.cuda.is_available():
        return "PyTorch sees no CUDA device."
    if importlib.util.find_spec("mamba_ssm") is None:
        return f"mamba-ssm is not installed ({INSTALL})."
    return None


def cannot_serve(call) -> str | None:
    """Why this call needs another backend."""
    if call.device != "cuda":
        return f"the tensors are on {call.device}, and mamba-ssm's kernels need CUDA."
    if call.op not in ("selective_scan", "causal_conv1d", "ssd", "ssd_update"):
        return f"it has no {call.op}."
    if call.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return f"its kernels do not take {call.dtype}."
    if call.op.startswith("ssd"):
        return _cannot_serve_dual(call)
    if call.packed:
        return "its scan does not reset at document boundaries."
    if call.carried:
        return "its scan takes no initial state and drops the gradient of the final one."
    if call.compiling:
        return "torch.compile cannot look past its kernels."
    if call.op == "selective_scan":
        return fault_of(call.op) if call.states <= 256 else f"its state size is at most 256, not {call.states}."
    if not 2 <= call.states <= 4:
        return f"its convolution has 2 to 4 taps, not {call.states}."
    if importlib.util.find_spec("causal_conv1d") is None:
        return f"causal-conv1d is not installed ({INSTALL})."
    return fault_of("causal_conv1d")


def _cannot_serve_dual(call) -> str | None:
    if not call.rated:
        return "it takes a rate for each head, and no decay for each step."
    if call.op == "ssd" and call.dtype == torch.float32:
        return "its products round fp32 to TF32."
    if call.compiling:
        return "torch.compile cannot look past its kernels."
    if not 1 <= call.states <= 256:
        return f"its state size is 1 to 256, not {call.states}."
    return fault_of(call.op)


def selective_scan(s: Scan) -> tuple[Tensor, None]:
    """y, and no final state: a call that asks for it goes elsewhere."""
    assert (s.initial_state, s.seq_idx) == (None, None), "cannot_serve refuses these"
    u, delta, B, C, z = (
        None if t is None else t.to(s.x.dtype).transpose(1, 2).contiguous() for t in (s.x, s.dt, s.B, s.C, s.z)
    )
    D, dt_bias = (None if t is None else t.float() for t in (s.D, s.dt_bias))
    return _imported(*SCAN)(u, delta, s.A.float(), B, C, D, z, dt_bias, s.dt_softplus).transpose(1, 2), None


def causal_conv1d(s: Conv) -> Tensor:
    assert (s.initial_state, s.seq_idx) == (None, None), "cannot_serve refuses these"
    bias = None if s.bias is None else s.bias.to(s.weight.dtype)
    channels = s.x.transpose(1, 2)
    # its channels-last form needs multiples of 8
    if any(step % 8 for step in (s.x.shape[2], s.x.stride(0), s.x.stride(1))):
        channels = channels.contiguous()
    return _imported(*CONV)(channels, s.weight, bias, activation="silu" if s.silu else None).transpose(1, 2)


def ssd(s: Ssd) -> tuple[Tensor, Tensor]:
    """y, and the final state in fp32. `s.a` has a rate for each head, (H)."""
    if not s.x.numel():
        return torch_backend.ssd(s._replace(a=s.a * s.w))
    # counted from 0, which is whose the initial state is; a number that comes back is a new document
    seq_idx = None if s.seq_idx is None else document_starts(s.seq_idx).cumsum(1).int()
    y, state = _imported(*DUAL)(
        *(s.x, s.w.float(), s.a.float(), s.B, s.C, MAMBA_SSM_DUAL_CHUNK),
        D=None if s.D is None else s.D.float(),
        initial_states=s.initial_state,
        seq_idx=seq_idx,
        return_final_states=True,
    )
    return y, state.float()


def ssd_update(state: Tensor, x: Tensor, a: Tensor, w: Tensor, B: Tensor, C: Tensor, D: Optional = None) -> Tensor:
    """One step, with `state` (B, H, P, N) replaced in place. x: (B, H, P); a: (H); w: (B, H); B, C: (B, G, N).

    The expanded axes, of stride 0, are how their kernel knows that a head has one rate and one step. It asks the bias
    and D for their strides without looking whether they are there.
    """
    if not x.numel():
        return torch_backend.ssd_update(state, x, a * w, w, B, C, D)
    _, heads, width, states = state.shape
    nothing = state.new_zeros(heads)
    A = a.float()[:, None, None].expand(heads, width, states)
    step = w.float()[..., None].expand(*w.shape, width)
    D, bias = ((nothing if t is None else t.float())[:, None].expand(heads, width) for t in (D, None))
    return _imported(*UPDATE)(state, x, step, A, B, C, D=D, dt_bias=bias)


@functools.cache
def fault_of(op: str, device: str = "cuda") -> str | None:
    """What is wrong with the installed implementation of `op`, found by using it; None if nothing is. Logged once."""
    names, expected, check = {
        "selective_scan": (SCAN, SCAN_PARAMETERS, _check_scan),
        "causal_conv1d": (CONV, CONV_PARAMETERS, _check_conv),
        "ssd": (DUAL, DUAL_PARAMETERS, _check_dual),
        "ssd_update": (UPDATE, UPDATE_PARAMETERS, _check_update),
    }[op]
    package = names[0].partition(".")[0]
    try:
        function = _imported(*names)
        found = list(inspect.signature(function).parameters)
        if found[: len(expected)] == expected:
            fault = check(device)
        else:
            fault = f"{names[1]} takes ({', '.join(found)}), not ({', '.join(expected)}, ...)"
    except Exception as error:  # whatever a broken binary raises
        fault = f"{type(error).__name__}: {error}".splitlines()[0]
    if fault is None:
        return None
    message = f"The installed {package}'s {names[1]} does not work here: {fault}."
    logger.warning("%s Going on without it. To rebuild: %s", message, INSTALL)
    return message


@functools.cache
def _imported(module: str, name: str) -> Callable:
    return getattr(importlib.import_module(module), name)


def _check_scan(device: str) -> str | None:
    def arguments(*shape: int) -> Tensor:
        return torch.randn(*shape, device=device).requires_grad_()

    batch, length, width, states = 2, 35, 16, 16
    x, dt, z = (arguments(batch, length, width) for _ in range(3))
    B, C = (arguments(batch, length, states) for _ in range(2))
    A = (-torch.rand(width, states, device=device) - 0.1).requires_grad_()
    D, dt_bias = arguments(width), arguments(width)
    return _difference(
        lambda s: selective_scan(s)[0],
        lambda s: torch_backend.selective_scan(s)[0],
        Scan(x, dt, A, B, C, D, z, dt_bias),
    )


def _check_conv(device: str) -> str | None:
    x, weight, bias = (torch.randn(*shape, device=device).requires_grad_() for shape in ((2, 35, 16), (16, 4), (16,)))
    return _difference(causal_conv1d, torch_backend.causal_conv1d, Conv(x, weight, bias))


def _dual(device: str, batch: int, length: int) -> Ssd:
    """Operands with rates, at the sizes of most models: what their autotuning finds serves the model, too."""

    def random(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(*shape, device=device, dtype=dtype)

    heads, width, states = 2, 64, 128
    x = random(batch, length, heads, width, dtype=torch.bfloat16)
    B, C = (random(batch, length, 1, states, dtype=torch.bfloat16) for _ in range(2))
    a, w = -torch.rand(heads, device=device) - 0.5, torch.rand(batch, length, heads, device=device) * 0.2
    return Ssd(x, a, w, B, C, random(heads), random(batch, heads, width, states))


def _check_dual(device: str) -> str | None:
    length = MAMBA_SSM_DUAL_CHUNK + 9
    seq_idx = (torch.arange(length, device=device) >= length - 20).int().expand(2, length)
    operands = _dual(device, 2, length)._replace(seq_idx=seq_idx)
    for t in operands:
        if isinstance(t, Tensor) and t.is_floating_point():
            t.requires_grad_()

    def joined(results: tuple[Tensor, Tensor]) -> Tensor:
        return torch.cat([t.float().flatten() for t in results])

    return _difference(
        lambda s: joined(ssd(s)),
        lambda s: joined(torch_backend.ssd(s._replace(a=s.a * s.w))),
        operands,
        TOLERANCE_16_BITS,
    )


def _check_update(device: str) -> str | None:
    s = _dual(device, 2, 1)
    rest = s.w[:, 0], s.B[:, 0], s.C[:, 0], s.D
    assert s.initial_state is not None
    states = [s.initial_state.clone() for _ in range(2)]
    found = ssd_update(states[0], s.x[:, 0], s.a, *rest)
    expected = torch_backend.ssd_update(states[1], s.x[:, 0], s.a * rest[0], *rest)
    return _unequal([found, states[0]], [expected, states[1]], TOLERANCE_16_BITS)


@torch.enable_grad()
def _difference(
    function: Callable, expected: Callable, operands: Scan | Conv | Ssd, tolerance: float = TOLERANCE
) -> str | None:
    """None if the outputs and the gradients of both agree."""
    leaves = [t for t in operands if isinstance(t, Tensor) and t.requires_grad]
    results = []
    for implementation in (function, expected):
        out = implementation(operands)
        results.append([out.detach(), *torch.autograd.grad(out.square().sum(), leaves)])
    return _unequal(results[0], results[1], tolerance)


def _unequal(found: list[Tensor], expected: list[Tensor], tolerance: float) -> str | None:
    for got, want in zip(found, expected, strict=True):
        error = ((got - want).abs().max() / want.abs().max()).item()
        if not error <= tolerance:
            return f"its result is off by {error:.1e} of the largest value"
    return None
