"""Triton kernel of the selective scan's backward pass; the method is described in `triton_scan`."""

import triton
import triton.language as tl

from hf_mamba.ops.triton_scan import LOG2E, document_cut, program_place, sigmoid, step_size


@triton.jit
def load_row(ptr, step, t, lanes, end, mask):
    """Row t (BE,) in fp32, zero past the end."""
    return tl.load(ptr + t.to(tl.int64) * step + lanes, mask=mask & (t < end), other=0.0).to(tl.float32)


@triton.jit
def load_states(ptr, t, end, n, N: tl.constexpr):
    """Row t of B or C, fp32 (B, L, N) contiguous, as (1, NP), zero past the end and past N."""
    return tl.load(ptr + t.to(tl.int64) * N + n, mask=(n < N) & (t < end), other=0.0)[None, :]


@triton.jit
def scan_backward(
    x_ptr, dt_ptr, z_ptr, A_ptr, B_ptr, C_ptr, D_ptr, bias_ptr, seq_ptr, dy_ptr, checkpoint_ptr, carry_ptr, scratch_ptr,
    dx_ptr, ddt_ptr, dz_ptr, dA_ptr, dB_ptr, dC_ptr, dD_ptr, dbias_ptr, dstart_ptr,
    x_row, x_step, dt_row, dt_step, z_row, z_step, dy_row, dy_step,
    L, E, batch, segment_length, segments,
    N: tl.constexpr, NP: tl.constexpr, BE: tl.constexpr, BLOCK: tl.constexpr, CHUNK: tl.constexpr,
    SOFTPLUS: tl.constexpr, HAS_D: tl.constexpr, HAS_Z: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_SEQ: tl.constexpr,
    ATOMIC: tl.constexpr,
):  # fmt: skip
    """Gradients of one channel block over one segment.

    carry: (B, segments, N, E), exp(Δ A) g arriving from the right. scratch: (programs, CHUNK / BLOCK, BE, NP).
    dA: (segments, B, E, N), dD, dbias: (segments, B, E), partial sums. dstart: (B, N, E).
    dB, dC: (B, L, N), added to atomically, or one such array per channel block.
    """
    row, segment, block, begin, end = program_place(L, E, batch, segment_length, BE)
    lanes = block * BE + tl.arange(0, BE)
    mask = lanes < E
    n = tl.arange(0, NP)
    tile = lanes[:, None] * N + n[None, :]  # (E, N) arrays
    columns = n[None, :] * E + lanes[:, None]  # (N, E) arrays
    tile_mask = mask[:, None] & (n < N)[None, :]
    x_ptr += row * x_row
    dt_ptr += row * dt_row
    z_ptr += row * z_row
    dy_ptr += row * dy_row
    B_ptr += row * L * N
    C_ptr += row * L * N
    seq_ptr += row * L
    dx_ptr += row * L * E
    ddt_ptr += row * L * E
    dz_ptr += row * L * E
    summed = row * L * N
    if not ATOMIC:
        summed += block.to(tl.int64) * batch * L * N
    dB_ptr += summed
    dC_ptr += summed
    checkpoint_ptr += row * tl.cdiv(L, CHUNK) * N * E
    own = tl.arange(0, BE)[:, None] * NP + n[None, :]
    scratch_ptr += tl.program_id(0).to(tl.int64) * (CHUNK // BLOCK * BE * NP)

    rate = tl.load(A_ptr + tile, mask=tile_mask, other=0.0).to(tl.float32)
    bias = tl.zeros([BE], tl.float32)
    if HAS_BIAS:
        bias = tl.load(bias_ptr + lanes, mask=mask, other=0.0).to(tl.float32)
    skip = tl.zeros([BE], tl.float32)
    if HAS_D:
        skip = tl.load(D_ptr + lanes, mask=mask, other=0.0).to(tl.float32)
    place = row * segments + segment
    carry = tl.load(carry_ptr + place * N * E + columns, mask=tile_mask, other=0.0)  # exp(Δ_{t+1} A) g_{t+1}
    d_rate = tl.zeros([BE, NP], tl.float32)
    d_skip = tl.zeros([BE], tl.float32)
    d_bias = tl.zeros([BE], tl.float32)

    chunks = tl.cdiv(end - begin, CHUNK)
    for i in range(chunks):
        first = begin + (chunks - 1 - i) * CHUNK
        blocks = tl.cdiv(tl.minimum(end - first, CHUNK), BLOCK)
        state = tl.load(checkpoint_ptr + (first // CHUNK).to(tl.int64) * N * E + columns, mask=tile_mask, other=0.0)
        for j in range(blocks):
            tl.store(scratch_ptr + j * (BE * NP) + own, state)
            for k in tl.static_range(BLOCK):
                t = first + j * BLOCK + k
                delta, _ = step_size(load_row(dt_ptr, dt_step, t, lanes, end, mask), bias, t < end, SOFTPLUS)
                delta_u = delta * load_row(x_ptr, x_step, t, lanes, end, mask)
                cut = document_cut(seq_ptr, t, end, HAS_SEQ)
                decay = tl.exp2(tl.fma(delta[:, None], rate * LOG2E, cut))
                state = tl.fma(decay, state, delta_u[:, None] * load_states(B_ptr, t, end, n, N))
        tl.debug_barrier()  # the scratch may be read by another thread than wrote it
        for back in range(blocks):
            j = blocks - 1 - back
            state = tl.load(scratch_ptr + j * (BE * NP) + own)
            states = ()
            decays = ()
            for k in tl.static_range(BLOCK):
                t = first + j * BLOCK + k
                delta, _ = step_size(load_row(dt_ptr, dt_step, t, lanes, end, mask), bias, t < end, SOFTPLUS)
                delta_u = delta * load_row(x_ptr, x_step, t, lanes, end, mask)
                cut = document_cut(seq_ptr, t, end, HAS_SEQ)
                decay = tl.exp2(tl.fma(delta[:, None], rate * LOG2E, cut))
                state = tl.fma(decay, state, delta_u[:, None] * load_states(B_ptr, t, end, n, N))
                states = states + (state,)
                decays = decays + (decay,)
            for m in tl.static_range(BLOCK):
                k: tl.constexpr = BLOCK - 1 - m
                t = first + j * BLOCK + k
                inside = mask & (t < end)
                out = t.to(tl.int64) * E + lanes
                u = load_row(x_ptr, x_step, t, lanes, end, mask)
                dy = load_row(dy_ptr, dy_step, t, lanes, end, mask)
                delta, slope = step_size(load_row(dt_ptr, dt_step, t, lanes, end, mask), bias, t < end, SOFTPLUS)
                b = load_states(B_ptr, t, end, n, N)
                c = load_states(C_ptr, t, end, n, N)
                state = states[k]
                if HAS_Z:
                    z = load_row(z_ptr, z_step, t, lanes, end, mask)
                    gate = sigmoid(z)
                    y = tl.fma(skip, u, tl.sum(state * c, 1))
                    dz = dy * y * gate * tl.fma(z, 1.0 - gate, 1.0)
                    tl.store(dz_ptr + out, dz.to(dz_ptr.dtype.element_ty), mask=inside)
                    dy = dy * z * gate
                g = tl.fma(dy[:, None], c, carry)
                drive = (delta * u)[:, None] * b
                gq = g * (state - drive)
                gb = tl.sum(g * b, 1)
                du = tl.fma(delta, gb, skip * dy)
                d_raw = tl.fma(u, gb, tl.sum(rate * gq, 1)) * slope
                d_rate = tl.fma(delta[:, None], gq, d_rate)
                d_skip = tl.fma(dy, u, d_skip)
                d_bias += d_raw
                carry = decays[k] * g
                tl.store(dx_ptr + out, du.to(dx_ptr.dtype.element_ty), mask=inside)
                tl.store(ddt_ptr + out, d_raw.to(ddt_ptr.dtype.element_ty), mask=inside)
                dB = tl.sum(g * (delta * u)[:, None], 0)
                dC = tl.sum(state * dy[:, None], 0)
                place_n = t.to(tl.int64) * N + n
                if ATOMIC:
                    tl.atomic_add(dB_ptr + place_n, dB, mask=(n < N) & (t < end), sem="relaxed")
                    tl.atomic_add(dC_ptr + place_n, dC, mask=(n < N) & (t < end), sem="relaxed")
                else:
                    tl.store(dB_ptr + place_n, dB, mask=(n < N) & (t < end))
                    tl.store(dC_ptr + place_n, dC, mask=(n < N) & (t < end))
        tl.debug_barrier()

    partial = segment.to(tl.int64) * batch + row
    tl.store(dA_ptr + partial * E * N + tile, d_rate, mask=tile_mask)
    if HAS_D:
        tl.store(dD_ptr + partial * E + lanes, d_skip, mask=mask)
    if HAS_BIAS:
        tl.store(dbias_ptr + partial * E + lanes, d_bias, mask=mask)
    if segment == 0:
        tl.store(dstart_ptr + row * N * E + columns, carry, mask=tile_mask)
