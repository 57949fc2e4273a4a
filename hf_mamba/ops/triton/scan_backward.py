"""Triton kernel of the selective scan's backward pass; the method is described in `triton_scan`.

Work per channel is done on (SUB, BE) tiles of steps by channels, work per state on (BE, NP) tiles, one step after
the other. Vectors pass between the two through rows of the program's own scratch, which L1 and L2 serve. N is padded
to NP, a power of two; padded states have rate 0 and B = C = 0, so they stay 0.
"""
# In a kernel a loop grows a tuple, and Triton has no starred tuples.
# ruff: noqa: RUF005
# mypy: disable-error-code="assignment,var-annotated"

import triton
import triton.language as tl

from hf_mamba.ops.triton.scan import LOG2E, document_cut, sigmoid, step_size, work_place

LN2 = tl.constexpr(0.6931471805599453)
# the three sums over n that a step leaves for its channels, side by side so that they are stored together
SUM_GB, SUM_RATE, SUM_C = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)


@triton.jit
def load_tile(ptr, step, t, lanes, inside):
    """Steps t (SUB,) by channels (BE,) in fp32, zero outside."""
    return tl.load(ptr + t.to(tl.int64)[:, None] * step + lanes[None, :], mask=inside, other=0.0).to(tl.float32)


@triton.jit
def load_states(ptr, t, end, n, N: tl.constexpr):
    """Row t of B or C, fp32 (B, L, N) contiguous, as (1, NP). Past the end the last row: Δ and dy are zero there."""
    return tl.load(ptr + tl.cast(tl.minimum(t, end - 1), tl.int64) * N + n, mask=n < N, other=0.0)[None, :]


@triton.jit
def stage_steps(x_ptr, x_step, dt_ptr, dt_step, bias, delta_rows, first, end, lanes, mask,
                BE: tl.constexpr, SUB: tl.constexpr, CHUNK: tl.constexpr, SOFTPLUS: tl.constexpr):  # fmt: skip
    """Δ and Δu of a chunk into the scratch."""
    for i in range(CHUNK // SUB):
        k = i * SUB + tl.arange(0, SUB)
        t = first + k
        inside = (t < end)[:, None] & mask[None, :]
        delta, _ = step_size(load_tile(dt_ptr, dt_step, t, lanes, inside), bias[None, :], inside, SOFTPLUS)
        delta_u = delta * load_tile(x_ptr, x_step, t, lanes, inside)
        where = delta_rows + k[:, None] * BE + tl.arange(0, BE)[None, :]
        tl.store(where, delta)
        tl.store(where + CHUNK * BE, delta_u)


@triton.jit
def advance(state, rate, delta_rows, B_ptr, seq_ptr, first, k, end, n,
            N: tl.constexpr, BE: tl.constexpr, CHUNK: tl.constexpr, HAS_SEQ: tl.constexpr):  # fmt: skip
    """The state after step first + k, out of the one before it."""
    channel = tl.arange(0, BE)
    delta = tl.load(delta_rows + k * BE + channel)
    delta_u = tl.load(delta_rows + (CHUNK + k) * BE + channel)
    exponent = delta[:, None] * rate
    if HAS_SEQ:
        exponent += document_cut(seq_ptr, first + k, end, HAS_SEQ)
    return tl.fma(tl.exp2(exponent), state, delta_u[:, None] * load_states(B_ptr, first + k, end, n, N))


@triton.jit
def replay(state, rate, delta_rows, states_ptr, B_ptr, seq_ptr, first, end, blocks, own, n,
           N: tl.constexpr, NP: tl.constexpr, BE: tl.constexpr, BLOCK: tl.constexpr, CHUNK: tl.constexpr,
           HAS_SEQ: tl.constexpr):  # fmt: skip
    """Run through a chunk, storing the state before every block."""
    for j in range(blocks - 1):
        tl.store(states_ptr + j * (BE * NP) + own, state)
        for k in tl.static_range(BLOCK):
            state = advance(
                state, rate, delta_rows, B_ptr, seq_ptr, first, j * BLOCK + k, end, n, N, BE, CHUNK, HAS_SEQ
            )
    tl.store(states_ptr + (blocks - 1) * (BE * NP) + own, state)


@triton.jit
def walk_back(carry, d_rate, rate, one, delta_rows, sub_rows, states_ptr, B_ptr, C_ptr, dB_ptr, dC_ptr, seq_ptr,
              first, base, end, own, n,
              N: tl.constexpr, NP: tl.constexpr, BE: tl.constexpr, BLOCK: tl.constexpr, SUB: tl.constexpr,
              CHUNK: tl.constexpr, HAS_SEQ: tl.constexpr, ATOMIC: tl.constexpr):  # fmt: skip
    """The states' part of SUB steps, last to first: returns the new carry and dA; stores dB, dC and the sums over n."""
    channel = tl.arange(0, BE)
    quads = channel[:, None] * 4 + tl.arange(0, 4)[None, :]
    for back in range(SUB // BLOCK):
        block = base // BLOCK + SUB // BLOCK - 1 - back
        if first + block * BLOCK < end:
            state = tl.load(states_ptr + block * (BE * NP) + own)
            states = ()
            for k in tl.static_range(BLOCK):
                at = block * BLOCK + k
                state = advance(state, rate, delta_rows, B_ptr, seq_ptr, first, at, end, n, N, BE, CHUNK, HAS_SEQ)
                states = states + (state,)
            for m in tl.static_range(BLOCK):
                k = block * BLOCK + (BLOCK - 1 - m)
                t = first + k
                row = sub_rows + (k - base) * (5 * BE)
                delta = tl.load(delta_rows + k * BE + channel)
                delta_u = tl.load(delta_rows + (CHUNK + k) * BE + channel)
                dy = tl.load(row + 4 * BE + channel)
                b = load_states(B_ptr, t, end, n, N)
                c = load_states(C_ptr, t, end, n, N)
                state = states[BLOCK - 1 - m]
                g = tl.fma(dy[:, None], c, carry)
                gq = g * tl.fma(delta_u[:, None], -b, state)
                d_rate = tl.fma(delta[:, None], gq, d_rate)
                # `one` hides from the compiler that the decays were computed above: keeping them all would spill
                exponent = (delta * one)[:, None] * rate
                if HAS_SEQ:
                    exponent += document_cut(seq_ptr, t, end, HAS_SEQ)
                carry = tl.exp2(exponent) * g
                sum_c = tl.sum(state * c, 1)
                sums = tl.join(tl.join(tl.sum(g * b, 1), sum_c), tl.join(tl.sum(gq * rate, 1), sum_c))
                tl.store(row + quads, tl.reshape(sums, [BE, 4]))
                where = tl.cast(t, tl.int64) * N + n
                keep = (n < N) & (t < end)
                dB = tl.sum(g * delta_u[:, None], 0)
                dC = tl.sum(state * dy[:, None], 0)
                if ATOMIC:
                    tl.atomic_add(dB_ptr + where, dB, mask=keep, sem="relaxed")
                    tl.atomic_add(dC_ptr + where, dC, mask=keep, sem="relaxed")
                else:
                    tl.store(dB_ptr + where, dB, mask=keep)
                    tl.store(dC_ptr + where, dC, mask=keep)
    return carry, d_rate


@triton.jit(do_not_specialize=["L", "batch", "segments", "items"])
def scan_backward(
    x_ptr, dt_ptr, z_ptr, A_ptr, B_ptr, C_ptr, D_ptr, bias_ptr, seq_ptr, dy_ptr, checkpoint_ptr, carry_ptr, scratch_ptr,
    dx_ptr, ddt_ptr, dz_ptr, dA_ptr, dB_ptr, dC_ptr, dD_ptr, dbias_ptr, dstart_ptr,
    x_row, x_step, dt_row, dt_step, z_row, z_step, dy_row, dy_step,
    L, E, batch, segment_length, segments, items, one,
    N: tl.constexpr, NP: tl.constexpr, BE: tl.constexpr, BLOCK: tl.constexpr, SUB: tl.constexpr, CHUNK: tl.constexpr,
    SOFTPLUS: tl.constexpr, HAS_D: tl.constexpr, HAS_Z: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_SEQ: tl.constexpr,
    ATOMIC: tl.constexpr,
):  # fmt: skip
    """All gradients. An item is one channel block over one segment of a row; a program takes every num_programs-th.

    carry: (B, segments, N, E), exp(Δ A) g arriving from the right. checkpoint: (B, chunks, N, E). dstart: (B, N, E).
    scratch: per program CHUNK / BLOCK states (BE, NP), 2 CHUNK rows and 5 SUB rows (BE,).
    dA: (segments, B, E, N), dD, dbias: (segments, B, E), partial sums.
    dB, dC: (B, L, N), added to atomically, or one such array per channel block.
    """
    n = tl.arange(0, NP)
    own = tl.arange(0, BE)[:, None] * NP + n[None, :]
    STATES: tl.constexpr = CHUNK // BLOCK * BE * NP
    states_ptr = scratch_ptr + tl.program_id(0).to(tl.int64) * (STATES + (2 * CHUNK + 5 * SUB) * BE)
    delta_rows = states_ptr + STATES
    sub_rows = delta_rows + 2 * CHUNK * BE
    for item in range(tl.program_id(0), items, tl.num_programs(0)):
        row, segment, block, begin, end = work_place(item, L, E, batch, segment_length, BE)
        lanes = block * BE + tl.arange(0, BE)
        mask = lanes < E
        tile = lanes[:, None] * N + n[None, :]  # of (E, N)
        columns = n[None, :] * E + lanes[:, None]  # of (N, E)
        tile_mask = mask[:, None] & (n < N)[None, :]
        summed = row * L * N
        if not ATOMIC:
            summed += tl.cast(block, tl.int64) * batch * L * N
        rate = tl.load(A_ptr + tile, mask=tile_mask, other=0.0).to(tl.float32) * LOG2E
        bias = tl.zeros([BE], tl.float32)
        if HAS_BIAS:
            bias = tl.load(bias_ptr + lanes, mask=mask, other=0.0).to(tl.float32)
        skip = tl.zeros([BE], tl.float32)
        if HAS_D:
            skip = tl.load(D_ptr + lanes, mask=mask, other=0.0).to(tl.float32)
        # exp(Δ_{t+1} A) g_{t+1}
        carry = tl.load(carry_ptr + (row * segments + segment) * N * E + columns, mask=tile_mask, other=0.0)
        d_rate = tl.zeros([BE, NP], tl.float32)
        d_skip = tl.zeros([BE], tl.float32)
        d_bias = tl.zeros([BE], tl.float32)

        chunks = tl.cdiv(end - begin, CHUNK)
        for i in range(chunks):
            first = begin + (chunks - 1 - i) * CHUNK
            blocks = tl.cdiv(tl.minimum(end - first, CHUNK), BLOCK)
            stage_steps(x_ptr + row * x_row, x_step, dt_ptr + row * dt_row, dt_step, bias, delta_rows, first, end,
                        lanes, mask, BE, SUB, CHUNK, SOFTPLUS)  # fmt: skip
            tl.debug_barrier()  # the rows are read by other threads than wrote them
            start = (row * tl.cdiv(L, CHUNK) + first // CHUNK) * N * E
            state = tl.load(checkpoint_ptr + start + columns, mask=tile_mask, other=0.0)
            replay(state, rate, delta_rows, states_ptr, B_ptr + row * L * N, seq_ptr + row * L, first, end, blocks,
                   own, n, N, NP, BE, BLOCK, CHUNK, HAS_SEQ)  # fmt: skip
            for j in range(CHUNK // SUB):
                base = CHUNK - SUB * (j + 1)
                k = tl.arange(0, SUB)
                t = first + base + k
                inside = (t < end)[:, None] & mask[None, :]
                sums = sub_rows + k[:, None] * (5 * BE) + 4 * tl.arange(0, BE)[None, :]
                dys = sub_rows + k[:, None] * (5 * BE) + 4 * BE + tl.arange(0, BE)[None, :]
                dy = load_tile(dy_ptr + row * dy_row, dy_step, t, lanes, inside)
                if HAS_Z:
                    z = load_tile(z_ptr + row * z_row, z_step, t, lanes, inside)
                    dy = dy * z * sigmoid(z)
                tl.store(dys, dy)
                tl.debug_barrier()
                carry, d_rate = walk_back(
                    carry, d_rate, rate, one, delta_rows, sub_rows, states_ptr,
                    B_ptr + row * L * N, C_ptr + row * L * N, dB_ptr + summed, dC_ptr + summed, seq_ptr + row * L,
                    first, base, end, own, n,
                    N, NP, BE, BLOCK, SUB, CHUNK, HAS_SEQ, ATOMIC)  # fmt: skip
                tl.debug_barrier()
                # the channels' part of the same steps
                raw = load_tile(dt_ptr + row * dt_row, dt_step, t, lanes, inside)
                delta, slope = step_size(raw, bias[None, :], inside, SOFTPLUS)
                u = load_tile(x_ptr + row * x_row, x_step, t, lanes, inside)
                gb = tl.load(sums + SUM_GB)
                d_raw = tl.fma(u, gb, tl.load(sums + SUM_RATE) * LN2) * slope
                dy = tl.load(dys)
                out = row * L * E + t.to(tl.int64)[:, None] * E + lanes[None, :]
                du = tl.fma(delta, gb, skip[None, :] * dy)
                tl.store(dx_ptr + out, du.to(dx_ptr.dtype.element_ty), mask=inside)
                tl.store(ddt_ptr + out, d_raw.to(ddt_ptr.dtype.element_ty), mask=inside)
                d_skip += tl.sum(tl.where(inside, dy * u, 0.0), 0)
                d_bias += tl.sum(tl.where(inside, d_raw, 0.0), 0)
                if HAS_Z:
                    z = load_tile(z_ptr + row * z_row, z_step, t, lanes, inside)
                    gate = sigmoid(z)
                    y = tl.fma(skip[None, :], u, tl.load(sums + SUM_C))
                    dy = load_tile(dy_ptr + row * dy_row, dy_step, t, lanes, inside)
                    dz = dy * y * gate * tl.fma(z, 1.0 - gate, 1.0)
                    tl.store(dz_ptr + out, dz.to(dz_ptr.dtype.element_ty), mask=inside)
                tl.debug_barrier()  # the rows are free again

        partial = tl.cast(segment, tl.int64) * batch + row
        tl.store(dA_ptr + partial * E * N + tile, d_rate, mask=tile_mask)
        if HAS_D:
            tl.store(dD_ptr + partial * E + lanes, d_skip, mask=mask)
        if HAS_BIAS:
            tl.store(dbias_ptr + partial * E + lanes, d_bias, mask=mask)
        if segment == 0:
            tl.store(dstart_ptr + row * N * E + columns, carry, mask=tile_mask)
