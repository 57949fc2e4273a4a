"""Triton kernels of one decoding step: state and window are updated in place, so their addresses never change.

See `reference.selective_state_update` and `reference.causal_conv1d_update`.
"""

import triton
import triton.language as tl

from hf_mamba.ops.triton.scan import LOG2E, sigmoid, step_size


@triton.jit
def state_update(
    state_ptr, x_ptr, dt_ptr, z_ptr, A_ptr, B_ptr, C_ptr, D_ptr, bias_ptr, y_ptr,
    x_row, dt_row, z_row, B_row, C_row, E,
    N: tl.constexpr, NP: tl.constexpr, BE: tl.constexpr,
    SOFTPLUS: tl.constexpr, HAS_D: tl.constexpr, HAS_Z: tl.constexpr, HAS_BIAS: tl.constexpr,
):  # fmt: skip
    """state: (B, E, N), y: (B, E). A program updates BE channels of one row."""
    pid = tl.program_id(0)
    blocks = tl.cdiv(E, BE)
    lanes = pid % blocks * BE + tl.arange(0, BE)
    row = (pid // blocks).to(tl.int64)
    mask = lanes < E
    n = tl.arange(0, NP)
    tile = lanes[:, None] * N + n[None, :]
    tile_mask = mask[:, None] & (n < N)[None, :]
    bias = tl.zeros([BE], tl.float32)
    if HAS_BIAS:
        bias = tl.load(bias_ptr + lanes, mask=mask, other=0.0).to(tl.float32)
    u = tl.load(x_ptr + row * x_row + lanes, mask=mask, other=0.0).to(tl.float32)
    raw = tl.load(dt_ptr + row * dt_row + lanes, mask=mask, other=0.0)
    delta = step_size(raw, bias, mask, SOFTPLUS)
    rate = tl.load(A_ptr + tile, mask=tile_mask, other=0.0).to(tl.float32) * LOG2E
    b = tl.load(B_ptr + row * B_row + n, mask=n < N, other=0.0).to(tl.float32)
    c = tl.load(C_ptr + row * C_row + n, mask=n < N, other=0.0).to(tl.float32)
    own = state_ptr + row * E * N + tile
    state = tl.load(own, mask=tile_mask, other=0.0).to(tl.float32)
    state = tl.fma(tl.exp2(delta[:, None] * rate), state, (delta * u)[:, None] * b[None, :])
    tl.store(own, state.to(state_ptr.dtype.element_ty), mask=tile_mask)
    y = tl.sum(state * c[None, :], 1)
    if HAS_D:
        y = tl.fma(tl.load(D_ptr + lanes, mask=mask, other=0.0).to(tl.float32), u, y)
    if HAS_Z:
        z = tl.load(z_ptr + row * z_row + lanes, mask=mask, other=0.0).to(tl.float32)
        y = y * z * sigmoid(z)
    tl.store(y_ptr + row * E + lanes, y.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def conv_update(
    x_ptr, window_ptr, w_ptr, bias_ptr, y_ptr, x_row, E,
    TAPS: tl.constexpr, BE: tl.constexpr, SILU: tl.constexpr, HAS_BIAS: tl.constexpr,
):  # fmt: skip
    """window: (B, E, k), shifted by one in place; y: (B, E)."""
    pid = tl.program_id(0)
    blocks = tl.cdiv(E, BE)
    lanes = pid % blocks * BE + tl.arange(0, BE)
    row = (pid // blocks).to(tl.int64)
    mask = lanes < E
    window = window_ptr + (row * E + lanes) * TAPS
    new = tl.load(x_ptr + row * x_row + lanes, mask=mask, other=0.0)
    y = tl.zeros([BE], tl.float32)
    if HAS_BIAS:
        y += tl.load(bias_ptr + lanes, mask=mask, other=0.0).to(tl.float32)
    for j in tl.static_range(TAPS):
        w = tl.load(w_ptr + lanes * TAPS + j, mask=mask, other=0.0).to(tl.float32)
        if j == TAPS - 1:
            value = new.to(window_ptr.dtype.element_ty)
            y = tl.fma(new.to(tl.float32), w, y)
        else:
            value = tl.load(window + j + 1, mask=mask, other=0.0)
            y = tl.fma(value.to(tl.float32), w, y)
        tl.store(window + j, value, mask=mask)
    if SILU:
        y = y * sigmoid(y)
    tl.store(y_ptr + row * E + lanes, y.to(y_ptr.dtype.element_ty), mask=mask)
