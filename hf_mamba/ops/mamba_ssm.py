"""The mamba_ssm backend: the CUDA kernels of mamba-ssm and causal-conv1d, where they are installed and work.

They serve one document per row from a zero state. Their backward drops the final state's gradient: a call that asks
for one goes elsewhere. Both packages are tried once, on small random tensors against the torch backend, before they
are trusted: a build against another PyTorch, or mamba-ssm's default install (which leaves the Mamba-1 kernel out), is
reported once and passed over. Signatures as of mamba-ssm 2.3.2 (selective_scan_interface.py), causal-conv1d 1.6.1.
"""

import functools
import importlib
import importlib.util
import inspect
import logging
from collections.abc import Callable

import torch
from torch import Tensor

from hf_mamba.ops.operands import Conv, Scan
from hf_mamba.ops.torch import backend as torch_backend

__all__ = ["cannot_serve", "causal_conv1d", "selective_scan", "unavailable"]

logger = logging.getLogger("hf_mamba.ops")

SCAN = ("mamba_ssm.ops.selective_scan_interface", "selective_scan_fn")
SCAN_PARAMETERS = ["u", "delta", "A", "B", "C", "D", "z", "delta_bias", "delta_softplus", "return_last_state"]
CONV = ("causal_conv1d", "causal_conv1d_fn")
CONV_PARAMETERS = ["x", "weight", "bias", "seq_idx", "initial_states"]
INSTALL = "MAMBA_KEEP_CUDA_BUILD=TRUE pip install mamba-ssm causal-conv1d --no-build-isolation"
TOLERANCE = 1e-3  # of the largest value; a wrong kernel is off by far more


def unavailable() -> str | None:
    """Why mamba-ssm cannot be used on this machine; imports it only where there is a CUDA device."""
    if not torch.cuda.is_available():
        return "PyTorch sees no CUDA device."
    if importlib.util.find_spec("mamba_ssm") is None:
        return f"mamba-ssm is not installed ({INSTALL})."
    return fault_of("selective_scan")


def cannot_serve(call) -> str | None:
    """Why this call needs another backend."""
    if call.device != "cuda":
        return f"the tensors are on {call.device}, and mamba-ssm's kernels need CUDA."
    if call.op not in ("selective_scan", "causal_conv1d"):
        return f"it has no {call.op}."
    if call.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return f"its kernels do not take {call.dtype}."
    if call.packed:
        return "its scan does not reset at document boundaries."
    if call.carried:
        return "its scan takes no initial state and drops the gradient of the final one."
    if call.compiling:
        return "torch.compile cannot look past its kernels."
    if call.op == "selective_scan":
        return None if call.states <= 256 else f"its state size is at most 256, not {call.states}."
    if not 2 <= call.states <= 4:
        return f"its convolution has 2 to 4 taps, not {call.states}."
    if importlib.util.find_spec("causal_conv1d") is None:
        return f"causal-conv1d is not installed ({INSTALL})."
    return fault_of("causal_conv1d")


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


@functools.cache
def fault_of(op: str, device: str = "cuda") -> str | None:
    """What is wrong with the installed implementation of `op`, found by using it; None if nothing is. Logged once."""
    names, expected, check = {
        "selective_scan": (SCAN, SCAN_PARAMETERS, _check_scan),
        "causal_conv1d": (CONV, CONV_PARAMETERS, _check_conv),
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
    message = f"The installed {package} does not work here: {fault}."
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


@torch.enable_grad()
def _difference(function: Callable, expected: Callable, operands: Scan | Conv) -> str | None:
    """None if the outputs and the gradients of both agree."""
    leaves = [t for t in operands if isinstance(t, Tensor)]
    results = []
    for implementation in (function, expected):
        out = implementation(operands)
        results.append([out.detach(), *torch.autograd.grad(out.square().sum(), leaves)])
    for got, want in zip(*results, strict=True):
        error = ((got - want).abs().max() / want.abs().max()).item()
        if not error <= TOLERANCE:
            return f"its result is off by {error:.1e} of the largest value"
    return None
