"""Which backend serves a call.

    device          first choice and why                             then
    CPU             cpu: fused kernels, fp32 and bf16                torch
    CUDA            mamba_ssm: where installed; the scan neither     triton, then torch
                    of packed documents nor with a carried
                    state; ssd in 16 bits, of Mamba-2's kind
    anything else   torch
    fp64            torch: the kernels compute in fp32

Under torch.func's transforms (vmap, grad, jvp) and forward-mode autograd the definitions serve, whichever backend is
forced: they are made of torch's own operations, which alone can be transformed. They take a loop over the tokens.

A forced backend (`HF_MAMBA_BACKEND`, or `with ops.backend(name)`) serves the call or raises; it never falls back.
"""

import importlib
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch

logger = logging.getLogger("hf_mamba.ops")

ENVIRONMENT = "HF_MAMBA_BACKEND"
NAMES = ("reference", "torch", "cpu", "triton", "mamba_ssm")
ORDER = {"cpu": ("cpu", "torch"), "cuda": ("mamba_ssm", "triton", "torch")}
TAKE_RATES = ("mamba_ssm",)  # whose ssd has a rate for each head instead of a decay for each step
MODULES = {
    "reference": "reference",
    "torch": "torch.backend",
    "cpu": "cpu.kernels",
    "triton": "triton.backend",
    "mamba_ssm": "mamba_ssm",
}


@dataclass(frozen=True)
class Call:
    """What the choice of a backend depends on."""

    op: str  # the name of a function of ops
    device: str = "cpu"
    dtype: torch.dtype = torch.float32
    packed: bool = False  # seq_idx is given
    carried: bool = False  # an initial state is given, or the final one asked for
    states: int = 16  # N for the scan, k for the convolution
    width: int = 0  # P, the channels of a head of ssd
    rated: bool = False  # ssd's decay is a rate times its weight, as Mamba-2's
    compiling: bool = False  # inside torch.compile


_modules: dict[str, ModuleType] = {}
_forced: list[str] = []  # process-wide: a recomputed forward runs in autograd's own thread
_choices: dict[tuple, str] = {}
_logged: set[str] = set()


@contextmanager
def backend(name: str) -> Iterator[None]:
    """Force one backend for every operation inside the `with`, in the whole process."""
    _check_name(name)
    _forced.append(name)
    try:
        yield
    finally:
        _forced.pop()


def forced() -> str | None:
    """The backend forced by the innermost `with backend(...)`; the environment's is read where a choice is made."""
    return _forced[-1] if _forced else None


@torch.compiler.assume_constant_result
def choose(*call: Any) -> str:
    """The backend's name for a call: the fields of `Call`, then the forced backend or None.

    Raises:
        ValueError: when the forced backend cannot serve the call.
    """
    key = (*call, os.environ.get(ENVIRONMENT))
    if key not in _choices:
        _choices[key] = _decide(Call(*call[:-1]), call[-1] or os.environ.get(ENVIRONMENT) or None)
    return _choices[key]


def which(
    op: str = "selective_scan",
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    packed: bool = False,
    carried: bool = False,
    states: int = 16,
    width: int = 0,
    rated: bool = False,
    compiling: bool = False,
) -> str:
    """The backend that serves such a call here and now."""
    return choose(op, torch.device(device).type, dtype, packed, carried, states, width, rated, compiling, forced())


def available_backends() -> dict[str, str]:
    """Every backend with "available", or the reason why it cannot run on this machine."""
    return {name: _unavailable(name) or "available" for name in NAMES}


def module(name: str) -> ModuleType:
    """The module of a backend. Each has `unavailable`, `cannot_serve` and functions named like the operations."""
    if name not in _modules:
        _modules[name] = importlib.import_module(f".{MODULES[name]}", __package__)
    return _modules[name]


def _decide(call: Call, required: str | None) -> str:
    if required is not None:
        _check_name(required)
        if reason := _reason_against(required, call):
            raise ValueError(
                f"The backend {required!r} is forced but cannot serve {call.op} on {call.device}: {reason} "
                f"Unset {ENVIRONMENT} or leave ops.backend(...) to let a backend be chosen, or force 'torch'."
            )
        return required
    for name in ORDER.get(call.device, ("torch",)):
        reason = _reason_against(name, call)
        if not reason:
            _log_once(f"{call.op} on {call.device} ({call.dtype}): {name} backend")
            return name
        _log_once(f"{call.op} on {call.device} ({call.dtype}): not {name}: {reason}")
    raise AssertionError("the torch backend serves every call")


def _log_once(message: str) -> None:
    if message not in _logged:
        _logged.add(message)
        logger.info(message)


def _reason_against(name: str, call: Call) -> str | None:
    """A sentence, or None when the backend serves the call."""
    if name == "mamba_ssm" and call.device != "cuda":
        return "mamba-ssm's kernels need CUDA tensors."  # and importing it for others would be pointless
    if reason := _unavailable(name):
        return reason
    if not hasattr(module(name), call.op):
        return f"it has no {call.op}."
    return module(name).cannot_serve(call)


def _unavailable(name: str) -> str | None:
    try:
        return module(name).unavailable()
    except ImportError as error:
        return f"{type(error).__name__}: {error}"


def _check_name(name: str) -> None:
    if name not in NAMES:
        raise ValueError(f"There is no backend {name!r}: choose one of {', '.join(NAMES)}.")
