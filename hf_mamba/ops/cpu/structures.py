"""The C kernels' structures as ctypes sees them, compared field by field with the compiler's own when a library loads.

A field that is moved, added or renamed on one side alone would give wrong numbers and no error: `check` refuses it.
The shapes stand beside the fields in kernels/.
"""

import ctypes
from ctypes import c_double, c_int64, c_void_p

import torch
from torch import Tensor as TorchTensor


class Tensor(ctypes.Structure):
    _fields_ = (("data", c_void_p), ("batch_stride", c_int64), ("row_stride", c_int64), ("is_bf16", c_int64))


def _fields(kind: type, names: str) -> tuple[tuple[str, type], ...]:
    return tuple((name, kind) for name in names.split())


class Scan(ctypes.Structure):
    _fields_ = (
        *_fields(c_int64, "next batch length width chunks softplus"),
        *_fields(Tensor, "x dt z B C y"),
        *_fields(c_void_p, "A D bias initial starts final saved"),
        *_fields(Tensor, "grad_y grad_x grad_dt grad_z"),
        *_fields(c_void_p, "grad_final grad_initial grad_A grad_D grad_bias grad_B grad_C"),
    )


class Conv(ctypes.Structure):
    _fields_ = (
        *_fields(c_int64, "next batch length width taps silu"),
        *_fields(Tensor, "x y"),
        *_fields(c_void_p, "weight bias initial starts"),
        *_fields(Tensor, "grad_y grad_x"),
        *_fields(c_void_p, "grad_weight grad_initial"),
    )


class Step(ctypes.Structure):
    _fields_ = (
        *_fields(c_int64, "next batch width softplus log_A"),
        *_fields(Tensor, "x dt z B C y"),
        *_fields(c_void_p, "A D bias state"),
    )


class ConvStep(ctypes.Structure):
    _fields_ = (
        *_fields(c_int64, "next batch width taps silu"),
        *_fields(Tensor, "x y weight"),
        ("bias", c_void_p),
        ("state", Tensor),
    )


class Norm(ctypes.Structure):
    _fields_ = (
        *_fields(c_int64, "next rows width"),
        ("eps", c_double),
        *_fields(Tensor, "x weight y"),
        *_fields(c_void_p, "residual sum"),
    )


class Linear(ctypes.Structure):
    _fields_ = (*_fields(c_int64, "next rows width count"), *_fields(Tensor, "weight bias x y"))


class Ssd(ctypes.Structure):
    _fields_ = (
        *_fields(c_int64, "next batch length heads width groups states chunks"),
        *_fields(Tensor, "x B C y"),
        *_fields(c_void_p, "a w D initial starts products final saved"),
        *_fields(Tensor, "grad_y grad_x grad_B grad_C"),
        *_fields(c_void_p, "grad_final carries grad_initial grad_a grad_w grad_D"),
    )


class SsdStep(ctypes.Structure):
    _fields_ = (
        *_fields(c_int64, "next batch heads width groups states"),
        *_fields(Tensor, "x B C y"),
        *_fields(c_void_p, "a w D state"),
    )


class GatedNorm(ctypes.Structure):
    _fields_ = (
        *_fields(c_int64, "next rows width groups"),
        ("eps", c_double),
        *_fields(Tensor, "x z weight y"),
        ("scale", c_void_p),
        *_fields(Tensor, "grad_y grad_x grad_z"),
        ("grad_weight", c_void_p),
    )


STRUCTURES: tuple[type[ctypes.Structure], ...] = (
    *(Tensor, Scan, Conv, Step, ConvStep, Norm, Linear),
    *(Ssd, SsdStep, GatedNorm),
)


KERNELS = (
    *("scan_forward", "scan_backward", "conv_forward", "conv_backward"),
    *("ssd_products", "ssd_forward", "ssd_carries", "ssd_backward", "gated_norm_forward", "gated_norm_backward"),
    *("scan_step", "conv_step", "ssd_step", "norm_forward", "linear_forward"),
)


class _Field(ctypes.Structure):
    _fields_ = (("name", ctypes.c_char_p), ("offset", ctypes.c_size_t))


def difference(library: ctypes.CDLL) -> str | None:
    """Name the first field whose place differs between `library` and the structures here; None if there is none."""
    for structure in STRUCTURES:
        name = structure.__name__
        ours = [(field[0], getattr(structure, field[0]).offset) for field in structure._fields_]
        for mine, theirs in zip([*ours, (None, ctypes.sizeof(structure))], _layout(library, name), strict=False):
            if mine != theirs:
                found, expected = (f"{field or 'the end'} at byte {at}" for field, at in (theirs, mine))
                return f"{name} of kernels/ has {found} where ops/cpu/structures.py has {expected}"
    return None


def _layout(library: ctypes.CDLL, name: str) -> list[tuple[str | None, int]]:
    """The (field, offset) of a structure as layout.c exports them, the last without a name and with the size."""
    entry = ctypes.pointer(_Field.in_dll(library, f"{name}_layout"))
    found: list[tuple[str | None, int]] = []
    while not found or found[-1][0] is not None:
        field = entry[len(found)]
        found.append((field.name.decode() if field.name else None, field.offset))
    return found


def strided(t: TorchTensor | None) -> Tensor:
    """(batch, rows, width) or (batch, width) as the kernels read it; an absent one has no data."""
    if t is None:
        return Tensor()
    return Tensor(t.data_ptr(), t.stride(0), t.stride(1), t.dtype == torch.bfloat16)


def address(t: TorchTensor | None) -> int | None:
    return None if t is None else t.data_ptr()
