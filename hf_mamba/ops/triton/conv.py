"""Triton kernels of the causal depthwise convolution with SiLU (see `reference.causal_conv1d`).

A program works on a tile of BT steps by BE channels. A tap d steps back counts only if no document starts in
between; before the row's first step lie the carried inputs (B, E, k-1), which belong to its first document. The
backward recomputes the convolution for the k steps that an input reaches, from 2k-1 shifted tiles of x held in
registers, so nothing but the inputs is saved. Weight and bias gradients are partial sums per program, added up
afterwards in a fixed order.
"""
# In a kernel a loop grows a tuple, and Triton has no starred tuples.
# ruff: noqa: RUF005
# mypy: disable-error-code="assignment,var-annotated"

import triton
import triton.language as tl

from hf_mamba.ops.triton.scan import sigmoid


@triton.jit
def load_inputs(x_ptr, x_step, init_ptr, t, lanes, mask, L, TAPS: tl.constexpr, HAS_INIT: tl.constexpr):
    """Inputs of steps t (BT,) as (BT, BE) fp32; steps -(k-1)..-1 come from the carried inputs, the rest is zero."""
    rows = t.to(tl.int64)[:, None] * x_step + lanes[None, :]
    x = tl.load(x_ptr + rows, mask=((t >= 0) & (t < L))[:, None] & mask[None, :], other=0.0).to(tl.float32)
    if HAS_INIT:
        where = lanes[None, :] * (TAPS - 1) + (t + TAPS - 1)[:, None]
        carried = ((t < 0) & (t >= 1 - TAPS))[:, None] & mask[None, :]
        x += tl.load(init_ptr + where, mask=carried, other=0.0).to(tl.float32)
    return x


@triton.jit
def no_start(seq_ptr, t, L):
    """(BT,) 1.0 unless step t starts a document (steps outside 1..L-1 never do)."""
    inner = (t > 0) & (t < L)
    here = tl.load(seq_ptr + t, mask=inner, other=0)
    before = tl.load(seq_ptr + t - 1, mask=inner, other=0)
    return tl.where(here == before, 1.0, 0.0)


@triton.jit(do_not_specialize=["L", "batch"])
def conv_forward(
    x_ptr, w_ptr, bias_ptr, init_ptr, seq_ptr, y_ptr, x_row, x_step, L, E, batch,
    TAPS: tl.constexpr, BT: tl.constexpr, BE: tl.constexpr, SILU: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_INIT: tl.constexpr, HAS_SEQ: tl.constexpr,
):  # fmt: skip
    """y: (B, L, E)."""
    pid = tl.program_id(0)
    blocks = tl.cdiv(E, BE)
    lanes = pid % blocks * BE + tl.arange(0, BE)
    row = ((pid // blocks) % batch).to(tl.int64)
    t = pid // (blocks * batch) * BT + tl.arange(0, BT)
    mask = lanes < E
    x_ptr += row * x_row
    init_ptr += row * E * (TAPS - 1)
    seq_ptr += row * L
    y = tl.zeros([BT, BE], tl.float32)
    if HAS_BIAS:
        y += tl.load(bias_ptr + lanes, mask=mask, other=0.0).to(tl.float32)[None, :]
    same = tl.full([BT], 1.0, tl.float32)
    for d in tl.static_range(TAPS):
        w = tl.load(w_ptr + lanes * TAPS + (TAPS - 1 - d), mask=mask, other=0.0).to(tl.float32)
        x = load_inputs(x_ptr, x_step, init_ptr, t - d, lanes, mask, L, TAPS, HAS_INIT)
        if HAS_SEQ:
            x = tl.where(same[:, None] > 0.0, x, 0.0)
            same *= no_start(seq_ptr, t - d, L)
        y = tl.fma(x, w[None, :], y)
    if SILU:
        y = y * sigmoid(y)
    out = y_ptr + row * L * E + t.to(tl.int64)[:, None] * E + lanes[None, :]
    tl.store(out, y.to(y_ptr.dtype.element_ty), mask=(t < L)[:, None] & mask[None, :])


@triton.jit(do_not_specialize=["L", "batch", "tiles"])
def conv_backward(
    x_ptr, w_ptr, bias_ptr, init_ptr, seq_ptr, dy_ptr, dx_ptr, dinit_ptr, dw_ptr, dbias_ptr,
    x_row, x_step, dy_row, dy_step, L, E, batch, tiles,
    TAPS: tl.constexpr, BT: tl.constexpr, BE: tl.constexpr, SILU: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_INIT: tl.constexpr, HAS_SEQ: tl.constexpr,
):  # fmt: skip
    """Gradients of BE channels over `tiles` tiles of a row, whose steps begin at -(k-1) if inputs are carried.

    dx: (B, L, E). dinit: (B, E, k-1). dw: (B * parts, k, E) and dbias: (B * parts, E), partial sums.
    """
    pid = tl.program_id(0)
    blocks = tl.cdiv(E, BE)
    lanes = pid % blocks * BE + tl.arange(0, BE)
    row = ((pid // blocks) % batch).to(tl.int64)
    part = pid // (blocks * batch)
    mask = lanes < E
    x_ptr += row * x_row
    dy_ptr += row * dy_row
    init_ptr += row * E * (TAPS - 1)
    seq_ptr += row * L
    bias = tl.zeros([BE], tl.float32)
    if HAS_BIAS:
        bias = tl.load(bias_ptr + lanes, mask=mask, other=0.0).to(tl.float32)
    weights = ()  # weights[d] multiplies the input d steps back
    d_weights = ()
    for d in tl.static_range(TAPS):
        w = tl.load(w_ptr + lanes * TAPS + (TAPS - 1 - d), mask=mask, other=0.0).to(tl.float32)
        weights = weights + (w[None, :],)
        d_weights = d_weights + (tl.zeros([BE], tl.float32),)
    d_bias = tl.zeros([BE], tl.float32)
    first = 1 - TAPS if HAS_INIT else 0

    for i in range(tiles):
        s = first + (part * tiles + i) * BT + tl.arange(0, BT)
        inputs = ()  # inputs[j]: x of steps s - (k-1) + j
        joined = ()  # joined[j]: step s - (k-1) + j does not start a document
        for j in tl.static_range(2 * TAPS - 1):
            at = s + (j - TAPS + 1)
            inputs = inputs + (load_inputs(x_ptr, x_step, init_ptr, at, lanes, mask, L, TAPS, HAS_INIT),)
            if HAS_SEQ:
                joined = joined + (no_start(seq_ptr, at, L),)
        dx = tl.zeros([BT, BE], tl.float32)
        reach = tl.full([BT], 1.0, tl.float32)
        for f in tl.static_range(TAPS):  # the output f steps ahead
            t = s + f
            valid = ((t >= 0) & (t < L))[:, None] & mask[None, :]
            rows = t.to(tl.int64)[:, None] * dy_step + lanes[None, :]
            d_pre = tl.load(dy_ptr + rows, mask=valid, other=0.0).to(tl.float32)
            if SILU:
                pre = tl.zeros([BT, BE], tl.float32) + bias[None, :]
                same = tl.full([BT], 1.0, tl.float32)
                for d in tl.static_range(TAPS):
                    x = inputs[f - d + TAPS - 1]
                    if HAS_SEQ:
                        x = tl.where(same[:, None] > 0.0, x, 0.0)
                        same *= joined[f - d + TAPS - 1]
                    pre = tl.fma(x, weights[d], pre)
                gate = sigmoid(pre)
                d_pre *= gate * tl.fma(pre, 1.0 - gate, 1.0)
            if f == 0:
                d_bias += tl.sum(d_pre, 0)
                same = tl.full([BT], 1.0, tl.float32)
                sums = ()
                for d in tl.static_range(TAPS):
                    x = inputs[TAPS - 1 - d]
                    if HAS_SEQ:
                        x = tl.where(same[:, None] > 0.0, x, 0.0)
                        same *= joined[TAPS - 1 - d]
                    sums = sums + (d_weights[d] + tl.sum(d_pre * x, 0),)
                d_weights = sums
            elif HAS_SEQ:
                reach *= joined[f + TAPS - 1]
            if HAS_SEQ:
                d_pre = tl.where(reach[:, None] > 0.0, d_pre, 0.0)
            dx = tl.fma(d_pre, weights[f], dx)
        own = ((s >= 0) & (s < L))[:, None] & mask[None, :]
        out = dx_ptr + row * L * E + s.to(tl.int64)[:, None] * E + lanes[None, :]
        tl.store(out, dx.to(dx_ptr.dtype.element_ty), mask=own)
        if HAS_INIT:
            where = dinit_ptr + row * E * (TAPS - 1) + lanes[None, :] * (TAPS - 1) + (s + TAPS - 1)[:, None]
            tl.store(where, dx.to(dinit_ptr.dtype.element_ty), mask=(s < 0)[:, None] & mask[None, :])

    partial = (part * batch + row) * E
    for d in tl.static_range(TAPS):
        tl.store(dw_ptr + partial * TAPS + (TAPS - 1 - d) * E + lanes, d_weights[d], mask=mask)
    if HAS_BIAS:
        tl.store(dbias_ptr + partial + lanes, d_bias, mask=mask)
