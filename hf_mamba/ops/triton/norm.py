"""Triton kernels of RMSNorm and of residual-add + RMSNorm (see `reference.rms_norm`).

A program normalises whole rows held in registers: statistics in fp32, output in the weight's dtype. The residual
stream stays fp32. The backward keeps one fp32 number per row; a fixed number of programs strides over the rows, and
each one's part of the weight gradient is added up afterwards in a fixed order.
"""

import triton
import triton.language as tl

from hf_mamba.ops.triton.scan import sigmoid


@triton.jit
def load_row(ptr, lanes, mask):
    """A row in fp32, zeros where it is masked."""
    return tl.load(ptr + lanes, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def norm_forward(
    x_ptr, residual_ptr, weight_ptr, y_ptr, sum_ptr, rstd_ptr, x_row, residual_row, d, eps,
    BLOCK: tl.constexpr, HAS_RESIDUAL: tl.constexpr,
):  # fmt: skip
    """y = weight · s / sqrt(mean(s²) + eps), a row of (M, d) per program; s = x, or x + residual, which is stored."""
    row = tl.program_id(0).to(tl.int64)
    lanes = tl.arange(0, BLOCK)
    mask = lanes < d
    x = load_row(x_ptr + row * x_row, lanes, mask)
    if HAS_RESIDUAL:
        x += load_row(residual_ptr + row * residual_row, lanes, mask)
        tl.store(sum_ptr + row * d + lanes, x, mask=mask)
    rstd = 1.0 / tl.sqrt_rn(tl.sum(x * x, 0) / d + eps)
    weight = load_row(weight_ptr, lanes, mask)
    tl.store(y_ptr + row * d + lanes, (weight * (x * rstd)).to(y_ptr.dtype.element_ty), mask=mask)
    tl.store(rstd_ptr + row, rstd)


@triton.jit(do_not_specialize=["M", "programs"])
def norm_backward(
    dy_ptr, dsum_ptr, x_ptr, weight_ptr, rstd_ptr, dx_ptr, dresidual_ptr, dweight_ptr,
    dy_row, dsum_row, x_row, M, d, programs,
    BLOCK: tl.constexpr, HAS_RESIDUAL: tl.constexpr,
):  # fmt: skip
    """dx (M, d), with HAS_RESIDUAL plus the stored sum's gradient, and again in fp32. dweight: (programs, d)."""
    pid = tl.program_id(0)
    lanes = tl.arange(0, BLOCK)
    mask = lanes < d
    weight = load_row(weight_ptr, lanes, mask)
    d_weight = tl.zeros([BLOCK], tl.float32)
    for i in range(pid, M, programs):
        row = tl.cast(i, tl.int64)
        rstd = tl.load(rstd_ptr + row)
        normed = load_row(x_ptr + row * x_row, lanes, mask) * rstd
        dy = load_row(dy_ptr + row * dy_row, lanes, mask)
        d_weight = tl.fma(dy, normed, d_weight)
        d_normed = dy * weight
        along = tl.sum(d_normed * normed, 0) / d
        dx = tl.fma(normed, -along, d_normed) * rstd
        if HAS_RESIDUAL:
            dx += load_row(dsum_ptr + row * dsum_row, lanes, mask)
            tl.store(dresidual_ptr + row * d + lanes, dx.to(dresidual_ptr.dtype.element_ty), mask=mask)
        tl.store(dx_ptr + row * d + lanes, dx.to(dx_ptr.dtype.element_ty), mask=mask)
    tl.store(dweight_ptr + pid * d + lanes, d_weight, mask=mask)


@triton.jit
def gated_norm_forward(
    x_ptr, z_ptr, weight_ptr, y_ptr, rstd_ptr, x_row, z_row, part, groups, eps, BLOCK: tl.constexpr
):  # fmt: skip
    """y = weight · v / sqrt(mean(v²) + eps) with v = x silu(z), over one of a row's `groups` parts per program."""
    pid = tl.program_id(0).to(tl.int64)
    row, group = pid // groups, pid % groups
    lanes = tl.arange(0, BLOCK)
    mask = lanes < part
    lanes += group * part
    x = load_row(x_ptr + row * x_row, lanes, mask)
    z = load_row(z_ptr + row * z_row, lanes, mask)
    v = x * z * sigmoid(z)
    rstd = 1.0 / tl.sqrt_rn(tl.sum(v * v, 0) / part + eps)
    weight = load_row(weight_ptr, lanes, mask)
    tl.store(y_ptr + row * part * groups + lanes, (weight * (v * rstd)).to(y_ptr.dtype.element_ty), mask=mask)
    tl.store(rstd_ptr + pid, rstd)


@triton.jit
def gated_norm_backward(
    dy_ptr, x_ptr, z_ptr, weight_ptr, rstd_ptr, dx_ptr, dz_ptr, dweight_ptr, dy_row, x_row, z_row, M, part, groups,
    programs, BLOCK: tl.constexpr,
):  # fmt: skip
    """dx, dz (M, E), dweight (programs, E); a program has the same part of every programs-th row."""
    pid = tl.program_id(0).to(tl.int64)
    first, group = pid // groups, pid % groups
    lanes = tl.arange(0, BLOCK)
    mask = lanes < part
    lanes += group * part
    weight = load_row(weight_ptr, lanes, mask)
    d_weight = tl.zeros([BLOCK], tl.float32)
    for row in range(first, M, programs):
        rstd = tl.load(rstd_ptr + row * groups + group)
        x = load_row(x_ptr + row * x_row, lanes, mask)
        z = load_row(z_ptr + row * z_row, lanes, mask)
        dy = load_row(dy_ptr + row * dy_row, lanes, mask)
        gate = sigmoid(z)
        silu = z * gate
        normed = x * silu * rstd
        d_weight = tl.fma(dy, normed, d_weight)
        d_normed = dy * weight
        dv = tl.fma(normed, -tl.sum(d_normed * normed, 0) / part, d_normed) * rstd
        to = row * part * groups + lanes
        tl.store(dx_ptr + to, (dv * silu).to(dx_ptr.dtype.element_ty), mask=mask)
        tl.store(dz_ptr + to, (dv * x * (gate + silu * (1.0 - gate))).to(dz_ptr.dtype.element_ty), mask=mask)
    tl.store(dweight_ptr + first * part * groups + lanes, d_weight, mask=mask)
