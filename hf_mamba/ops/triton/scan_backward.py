"""Triton kernel of the selective scan's backward pass; the method is described in `triton_scan`.

A lane holds 4 states of 4 channels: of its own channel and of the lanes whose numbers differ from its own in 8, 16 or
both. Its number's two upper bits say which 4 of 16 states. So the work on a state never leaves its lane; a sum over the
states takes 3 shuffles, and the sums over channels (dB and dC, of which each lane keeps one number) take 7 in all. No
step has a barrier and nothing is added up by atomics: each warp leaves its dB and dC in the program's scratch, and
after a chunk the program adds up its warps'. More than 16 states are walked through 16 at a time, chunk by chunk.
"""
# In a kernel a loop grows a tuple, and Triton has no starred tuples.
# ruff: noqa: RUF005
# mypy: disable-error-code="assignment,var-annotated,misc"

import triton
import triton.language as tl

from hf_mamba.ops.triton.scan import (
    LOG2E,
    channels,
    document_cut,
    load_four,
    load_step,
    sigmoid,
    step_size,
    until,
    work_place,
)

LN2 = tl.constexpr(0.6931471805599453)
STATES = tl.constexpr(16)  # of a channel at a time, in four lanes


@triton.jit
def across(v, BIT: tl.constexpr):
    """The value of the lane whose number differs in the bit of value BIT.

    Taken from the sum of the two as integers, which is exact: the compiler makes one shuffle of it.
    """
    pairs = tl.reshape(v.to(tl.int32, bitcast=True), [v.shape[0] // (2 * BIT), 2, BIT])
    other = tl.sum(pairs, 1, keep_dims=True) - pairs
    other = other.to(tl.int64).to(tl.int32)  # the interpreter adds up in 64 bits
    return tl.reshape(other, v.shape).to(tl.float32, bitcast=True)


@triton.jit
def of_four(v):
    """A value of each of the four channels that a lane holds states of."""
    far = across(v, 16)
    return (v, across(v, 8), far, across(far, 8))


@triton.jit
def over_states(parts):
    """The sum for the lane's own channel, out of every lane's parts for its four channels."""
    return parts[0] + across(parts[2], 16) + across(parts[1] + across(parts[3], 16), 8)


@triton.jit
def halve(low, high, upper, MASK: tl.constexpr):
    """The pair's sum of `low` in lanes without the bit of MASK, and of `high` in those with it (`upper`)."""
    return tl.where(upper, high, low) + across(tl.where(upper, low, high), MASK)


@triton.jit
def over_channels(low, high, lane):
    """Of eight values, four of them in `low`, lane l gets number l % 8, summed over the eight lanes of its l // 8."""
    four = ()
    for i in tl.static_range(4):
        four = four + (halve(low[i], high[i], (lane & 4) != 0, 4),)
    first = halve(four[0], four[2], (lane & 2) != 0, 2)
    second = halve(four[1], four[3], (lane & 2) != 0, 2)
    return halve(first, second, (lane & 1) != 0, 1)


@triton.jit
def advance(states, rates, delta, delta_u, b, cut, HAS_SEQ: tl.constexpr):
    """The states after a step, out of those before it."""
    deltas = of_four(delta)
    inputs = of_four(delta_u)
    after = ()
    for i in tl.static_range(16):
        exponent = deltas[i // 4] * rates[i]
        if HAS_SEQ:
            exponent += cut
        after = after + (tl.fma(tl.exp2(exponent), states[i], inputs[i // 4] * b[i % 4]),)
    return after


@triton.jit
def back_one_step(carry, d_rates, rates, before, after, b, c, deltas, inputs, dys, cut,
                  BE: tl.constexpr, HAS_SEQ: tl.constexpr):  # fmt: skip
    """The states' part of a step: the new carry and dA, four states' dB and dC, four channels' sums over states.

    before, after: h around the step. deltas, inputs (Δ u), dys: of four channels.
    """
    zero = tl.zeros([BE], tl.float32)
    dB = (zero, zero, zero, zero)
    dC = (zero, zero, zero, zero)
    new_carry = ()
    new_rates = ()
    sums_b = ()
    sums_rate = ()
    sums_c = ()
    for h in tl.static_range(4):
        sum_b = zero
        sum_rate = zero
        sum_c = zero
        new_dB = ()
        new_dC = ()
        for n in tl.static_range(4):
            g = tl.fma(dys[h], c[n], carry[4 * h + n])
            exponent = deltas[h] * rates[4 * h + n]
            if HAS_SEQ:
                exponent += cut
            passed = tl.exp2(exponent) * g
            gq = passed * before[4 * h + n]
            new_carry = new_carry + (passed,)
            new_rates = new_rates + (tl.fma(deltas[h], gq, d_rates[4 * h + n]),)
            sum_b = tl.fma(g, b[n], sum_b)
            sum_rate = tl.fma(gq, rates[4 * h + n], sum_rate)
            sum_c = tl.fma(after[4 * h + n], c[n], sum_c)
            new_dB = new_dB + (tl.fma(g, inputs[h], dB[n]),)
            new_dC = new_dC + (tl.fma(after[4 * h + n], dys[h], dC[n]),)
        sums_b = sums_b + (sum_b,)
        sums_rate = sums_rate + (sum_rate,)
        sums_c = sums_c + (sum_c,)
        dB = new_dB
        dC = new_dC
    return new_carry, new_rates, dB, dC, sums_b, sums_rate, sums_c


@triton.jit
def held_place(block, place, group, h: tl.constexpr, N: tl.constexpr, E: tl.constexpr, BE: tl.constexpr):
    """The channel of the h-th state that the lanes hold, of `group` + h % 4, and where there is such a state."""
    channel = block * BE + (place ^ (h // 4 * 8))
    there = tl.full([BE], True, tl.int1)
    if E % BE != 0:
        there = channel < E
    if N % 16 != 0:
        there = there & (group + h % 4 < N)
    return channel, there


@triton.jit
def store_kept(ptr, states, BE: tl.constexpr):
    for h in tl.static_range(4):
        even = tl.join(states[4 * h], states[4 * h + 2])
        odd = tl.join(states[4 * h + 1], states[4 * h + 3])
        four = tl.reshape(tl.join(even, odd), [BE, 4])
        tl.store((ptr + h * 4 * BE)[:, None] + tl.arange(0, 4)[None, :], four)


@triton.jit
def load_kept(ptr, BE: tl.constexpr):
    near = load_four(ptr, BE) + load_four(ptr + 4 * BE, BE)
    return near + load_four(ptr + 8 * BE, BE) + load_four(ptr + 12 * BE, BE)


@triton.jit(do_not_specialize=["L", "batch", "segments", "items"])
def scan_backward(
    x_ptr, dt_ptr, z_ptr, A_ptr, bc_ptr, D_ptr, bias_ptr, seq_ptr, dy_ptr, checkpoint_ptr, carry_ptr, scratch_ptr,
    dx_ptr, ddt_ptr, dz_ptr, dA_ptr, dbc_ptr, dD_ptr, dbias_ptr,
    x_row, dt_row, z_row, dy_row, bc_row, L, batch, segment_length, segments, items,
    x_step: tl.constexpr, dt_step: tl.constexpr, z_step: tl.constexpr, dy_step: tl.constexpr, E: tl.constexpr,
    WHOLE: tl.constexpr,
    N: tl.constexpr, NP: tl.constexpr, BE: tl.constexpr, BLOCK: tl.constexpr, CHUNK: tl.constexpr,
    SOFTPLUS: tl.constexpr, HAS_D: tl.constexpr, HAS_Z: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_SEQ: tl.constexpr,
):  # fmt: skip
    """All gradients. An item is one channel block over one segment of a row; a program takes every num_programs-th.

    carry: (B, segments, N, E), exp(Δ A) g arriving from the right; replaced by what goes on to the left.
    checkpoint: (B, chunks, N, E). bc: (B, L in whole blocks, 2, NP).
    scratch: per program CHUNK / BLOCK states (BE, 16), CHUNK rows (BE) of each warp's dB and dC, CHUNK of Δ, and where
    there are more than 16 states 3 CHUNK of sums over those before.
    dA: (segments, B, E, N), dD, dbias: (segments, B, E), partial sums.
    dbc: (channel blocks, B, L, NP / 16, 32), partial sums, each row as `over_channels` leaves it.
    """
    place = tl.arange(0, BE)
    lane = place % 32
    quarter = lane // 8 * 4
    KEPT: tl.constexpr = CHUNK // BLOCK * BE * 16
    SEVERAL: tl.constexpr = NP > 16
    kept_ptr = scratch_ptr + tl.program_id(0).to(tl.int64) * (KEPT + (5 if SEVERAL else 2) * CHUNK * BE)
    rows_ptr = kept_ptr + KEPT
    deltas_ptr = rows_ptr + CHUNK * BE
    sums_ptr = deltas_ptr + CHUNK * BE
    for item in range(tl.program_id(0), items, tl.num_programs(0)):
        row, segment, block, begin, end = work_place(item, L, E, batch, segment_length, BE)
        lanes, mask = channels(block * BE, E, BE)
        bias = tl.zeros([BE], tl.float32)
        if HAS_BIAS:
            bias = tl.load(bias_ptr + lanes, mask=mask, other=0.0).to(tl.float32)
        skip = tl.zeros([BE], tl.float32)
        if HAS_D:
            skip = tl.load(D_ptr + lanes, mask=mask, other=0.0).to(tl.float32)
        d_skip = tl.zeros([BE], tl.float32)
        d_bias = tl.zeros([BE], tl.float32)
        partial = tl.cast(segment, tl.int64) * batch + row
        carries_ptr = carry_ptr + (row * segments + segment) * N * E
        d_rates_ptr = dA_ptr + partial * E * N
        own_x = x_ptr + row * x_row
        own_dt = dt_ptr + row * dt_row
        own_z = z_ptr + row * z_row
        own_dy = dy_ptr + row * dy_row
        own_seq = seq_ptr + row * L

        chunks = tl.cdiv(end - begin, CHUNK)
        for i in range(chunks):
            first = begin + (chunks - 1 - i) * CHUNK
            blocks = tl.cdiv(tl.minimum(end - first, CHUNK), BLOCK)
            before_ptr = checkpoint_ptr + (row * tl.cdiv(L, CHUNK) + first // CHUNK) * N * E
            for part in range(NP // 16):
                states = ()
                rates = ()
                carry = ()
                d_rates = ()
                group = part * 16 + quarter
                for h in tl.static_range(16):
                    channel, there = held_place(block, place, group, h, N, E, BE)
                    columns = group * E + channel
                    rate = tl.load(A_ptr + channel * N + group + h % 4, mask=there, other=0.0).to(tl.float32) * LOG2E
                    rates = rates + (rate,)
                    states = states + (tl.load(before_ptr + columns + h % 4 * E, mask=there, other=0.0),)
                    carry = carry + (tl.load(carries_ptr + columns + h % 4 * E, mask=there, other=0.0),)
                    d_rates = d_rates + (tl.zeros([BE], tl.float32),)
                own_bc = bc_ptr + row * bc_row + group

                # the states before each block of steps
                for j in range(blocks):
                    store_kept(kept_ptr + j * (BE * 16) + place * 4, states, BE)
                    start = first + j * BLOCK
                    bcs = own_bc + tl.cast(start, tl.int64) * (2 * NP)
                    deltas = ()
                    for k in tl.static_range(BLOCK):
                        reached = until(end, start + k, mask, WHOLE)
                        raw = load_step(own_dt, dt_step, lanes, start, k, reached)
                        delta = step_size(raw, bias, reached, SOFTPLUS)
                        tl.store(deltas_ptr + j * (BLOCK * BE) + k * BE + place, delta)
                        deltas = deltas + (delta,)
                    if j < blocks - 1:
                        for k in tl.static_range(BLOCK):
                            reached = until(end, start + k, mask, WHOLE)
                            u = load_step(own_x, x_step, lanes, start, k, reached).to(tl.float32)
                            b = load_four(bcs + k * (2 * NP), BE)
                            cut = document_cut(own_seq, start + k, end, HAS_SEQ)
                            states = advance(states, rates, deltas[k], deltas[k] * u, b, cut, HAS_SEQ)
                tl.debug_barrier()  # another chunk's rows have been added up

                for back in range(blocks):
                    j = blocks - 1 - back
                    start = first + j * BLOCK
                    kept = kept_ptr + j * (BE * 16) + place * 4
                    bcs = own_bc + tl.cast(start, tl.int64) * (2 * NP)
                    states = load_kept(kept, BE)
                    staged = deltas_ptr + j * (BLOCK * BE) + place
                    history = (states,)
                    for k in tl.static_range(BLOCK):
                        delta = tl.load(staged + k * BE)
                        reached = until(end, start + k, mask, WHOLE)
                        u = load_step(own_x, x_step, lanes, start, k, reached).to(tl.float32)
                        cut = document_cut(own_seq, start + k, end, HAS_SEQ)
                        b = load_four(bcs + k * (2 * NP), BE)
                        states = advance(states, rates, delta, delta * u, b, cut, HAS_SEQ)
                        history = history + (states,)
                    for m in tl.static_range(BLOCK):
                        t = start + (BLOCK - 1 - m)
                        reached = until(end, t, mask, WHOLE)
                        # read again, not kept: the decays are computed again, since all of them would spill
                        delta = tl.load(staged + (BLOCK - 1 - m) * BE)
                        u = load_step(own_x, x_step, lanes, start, BLOCK - 1 - m, reached).to(tl.float32)
                        dy_out = load_step(own_dy, dy_step, lanes, start, BLOCK - 1 - m, reached).to(tl.float32)
                        dy = dy_out
                        if HAS_Z:
                            z = load_step(own_z, z_step, lanes, start, BLOCK - 1 - m, reached).to(tl.float32)
                            gate = sigmoid(z)
                            dy = dy_out * z * gate
                        b = load_four(bcs + (BLOCK - 1 - m) * (2 * NP), BE)
                        c = load_four(bcs + (BLOCK - 1 - m) * (2 * NP) + NP, BE)
                        cut = document_cut(own_seq, t, end, HAS_SEQ)
                        before = history[BLOCK - 1 - m]
                        if m == BLOCK - 1:
                            before = load_kept(kept, BE)
                        carry, d_rates, dB, dC, sums_b, sums_rate, sums_c = back_one_step(
                            carry, d_rates, rates, before, history[BLOCK - m], b, c,
                            of_four(delta), of_four(delta * u), of_four(dy), cut, BE, HAS_SEQ)  # fmt: skip
                        tl.store(rows_ptr + (j * BLOCK + (BLOCK - 1 - m)) * BE + place, over_channels(dB, dC, lane))

                        # the channel's part
                        gb = over_states(sums_b)
                        rate_part = over_states(sums_rate)
                        y = tl.zeros([BE], tl.float32)
                        if HAS_Z:
                            y = over_states(sums_c)
                        last = True
                        if SEVERAL:
                            mine = sums_ptr + (j * BLOCK + (BLOCK - 1 - m)) * (3 * BE) + place
                            if part > 0:
                                gb += tl.load(mine)
                                rate_part += tl.load(mine + BE)
                                y += tl.load(mine + 2 * BE)
                            tl.store(mine, gb)
                            tl.store(mine + BE, rate_part)
                            tl.store(mine + 2 * BE, y)
                            last = part == NP // 16 - 1
                        if last:
                            d_raw = tl.fma(u, gb, rate_part * LN2)
                            if SOFTPLUS:
                                raw = load_step(own_dt, dt_step, lanes, start, BLOCK - 1 - m, reached)
                                d_raw *= sigmoid(raw.to(tl.float32) + bias)
                            out = row * L * E + tl.cast(start, tl.int64) * E + (BLOCK - 1 - m) * E + lanes
                            du = tl.fma(delta, gb, skip * dy)
                            tl.store(dx_ptr + out, du.to(dx_ptr.dtype.element_ty), mask=reached)
                            tl.store(ddt_ptr + out, d_raw.to(ddt_ptr.dtype.element_ty), mask=reached)
                            d_skip = tl.fma(dy, u, d_skip)
                            d_bias += tl.where(reached, d_raw, 0.0)
                            if HAS_Z:
                                dz = dy_out * tl.fma(skip, u, y) * gate * tl.fma(z, 1.0 - gate, 1.0)
                                tl.store(dz_ptr + out, dz.to(dz_ptr.dtype.element_ty), mask=reached)

                for h in tl.static_range(16):
                    channel, there = held_place(block, place, group, h, N, E, BE)
                    tl.store(carries_ptr + group * E + channel + h % 4 * E, carry[h], mask=there)
                    into = d_rates_ptr + channel * N + group + h % 4
                    so_far = tl.load(into, mask=there & (i > 0), other=0.0)
                    tl.store(into, so_far + d_rates[h], mask=there)

                tl.debug_barrier()  # the rows are read by other threads than wrote them
                WARPS: tl.constexpr = BE // 32
                dbc = dbc_ptr + (tl.cast(block, tl.int64) * batch + row) * L * (2 * NP) + part * 32
                for k0 in range(0, CHUNK, 16):
                    k = k0 + tl.arange(0, 16)[:, None]
                    member = tl.arange(0, 32)[None, :]
                    total = tl.load(rows_ptr + k * BE + member)
                    for w in tl.static_range(1, WARPS):
                        total += tl.load(rows_ptr + k * BE + w * 32 + member)
                    to = dbc + (first + k).to(tl.int64) * (2 * NP) + member
                    tl.store(to, total, mask=first + k < end)

        if HAS_D:
            tl.store(dD_ptr + partial * E + lanes, d_skip, mask=mask)
        if HAS_BIAS:
            tl.store(dbias_ptr + partial * E + lanes, d_bias, mask=mask)
