"""The compiled kernels as a loaded library, and operands in the forms that they read."""

import ctypes
import functools

import torch
from torch import Tensor

from hf_mamba.ops.cpu import build, structures

SMALL = 1 << 16  # multiply-adds or so: below this, waking threads costs more than it saves


@functools.cache
def library(states: int) -> ctypes.CDLL:
    """The kernels for a scan with so many states.

    Raises:
        BuildError: where they cannot be had on this machine.
    """
    found = build.load(states)
    if fault := structures.difference(found):
        raise build.BuildError(f"the compiled kernels lay out their operands otherwise: {fault}.")
    for name in structures.KERNELS:
        getattr(found, name).restype = None
    return found


def library_of_any_size() -> ctypes.CDLL:
    """All but the scan is the same in every library; 16 is the state size of all published Mamba-1 models."""
    return library(16)


def dense(t: Tensor) -> Tensor:
    """In a dtype the kernels read, with its last axis dense; other strides are theirs to follow."""
    if t.dtype not in (torch.float32, torch.bfloat16):
        t = t.float()
    return t if t.stride(-1) == 1 else t.contiguous()


def gradient_of(t: Tensor) -> Tensor:
    """Dense room for a gradient, in a dtype the kernels write."""
    return t.new_empty(t.shape, dtype=t.dtype if t.dtype == torch.bfloat16 else torch.float32)


def exact(t: Tensor | None) -> Tensor | None:
    """In fp32, and contiguous."""
    return None if t is None else t.float().contiguous()
