"""Triton kernels of RMSNorm and of residual-add + RMSNorm (see `reference.rms_norm`).

A program normalises whole rows held in registers: statistics in fp32, output in the weight's dtype. The residual
stream stays fp32. The backward keeps one fp32 number per row; a fixed number of programs strides over the rows, and
each one's part of the weight gradient is added up afterwards in a fixed order.
"""

import triton
import triton.language as tl


@triton.jit
def norm_forward(
    x_ptr, residual_ptr, weight_ptr, y_ptr, sum_ptr, rstd_ptr, x_row, residual_row, d, eps,
    BLOCK: tl.constexpr, HAS_RESIDUAL: tl.constexpr,
):  # fmt: skip
    """y = weight · s / sqrt(mean(s²) + eps), a row of (M, d) per program; s = x, or x + residual, which is stored."""
    row = tl.program_id(0).to(tl.int64)
    lanes = tl.arange(0, BLOCK)
    mask = lanes < d
    x = tl.load(x_ptr + row * x_row + lanes, mask=mask, other=0.0).to(tl.float32)
    if HAS_RESIDUAL:
        x += tl.load(residual_ptr + row * residual_row + lanes, mask=mask, other=0.0).to(tl.float32)
        tl.store(sum_ptr + row * d + lanes, x, mask=mask)
    rstd = 1.0 / tl.sqrt_rn(tl.sum(x * x, 0) / d + eps)
    weight = tl.load(weight_ptr + lanes, mask=mask, other=0.0).to(tl.float32)
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
    weight = tl.load(weight_ptr + lanes, mask=mask, other=0.0).to(tl.float32)
    d_weight = tl.zeros([BLOCK], tl.float32)
    for i in range(pid, M, programs):
        row = tl.cast(i, tl.int64)
        rstd = tl.load(rstd_ptr + row)
        normed = tl.load(x_ptr + row * x_row + lanes, mask=mask, other=0.0).to(tl.float32) * rstd
        dy = tl.load(dy_ptr + row * dy_row + lanes, mask=mask, other=0.0).to(tl.float32)
        d_weight = tl.fma(dy, normed, d_weight)
        d_normed = dy * weight
        along = tl.sum(d_normed * normed, 0) / d
        dx = tl.fma(normed, -along, d_normed) * rstd
        if HAS_RESIDUAL:
            dx += tl.load(dsum_ptr + row * dsum_row + lanes, mask=mask, other=0.0).to(tl.float32)
            tl.store(dresidual_ptr + row * d + lanes, dx.to(dresidual_ptr.dtype.element_ty), mask=mask)
        tl.store(dx_ptr + row * d + lanes, dx.to(dx_ptr.dtype.element_ty), mask=mask)
    tl.store(dweight_ptr + pid * d + lanes, d_weight, mask=mask)
