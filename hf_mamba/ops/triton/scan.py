"""Triton kernels of the selective scan (see `reference.selective_scan` for the mathematics).

Forward: time is serial, a lane is a channel, and its N states stay in registers as N separate vectors, so a step has
neither shuffles nor barriers. B and C come as one packed fp32 array, a 64-bit load per state.

Backward: walks the checkpoints (one state every CHUNK steps) from the last to the first. It replays a chunk, keeping
the state of every BLOCK-th step in a scratch buffer small enough for L2, then goes back block by block with the
BLOCK states in registers. With g_t the gradient of h_t and q_t = h_t - Δ_t u_t B_t (which is exp(Δ_t A) h_{t-1}: no
earlier state needed):

    g_t  = dy_t C_t + exp(Δ_{t+1} A) g_{t+1}
    dB_t = Σ_e g_t Δ_t u_t,   dC_t = Σ_e dy_t h_t,   du_t = Δ_t Σ_n g_t B_t + D dy_t
    dΔ_t = Σ_n g_t (A q_t + u_t B_t),   dA = Σ_t Δ_t g_t q_t

Where too few channels fill the device the sequence is split: the decay of a whole segment is exp(A ΣΔ), so a first
pass keeps only each segment's end state and ΣΔ, `pass_states` chains them, and the main pass starts every segment at
once. The backward does the same with g, from the right.

A packed document starts by adding -1e30 to the exponent: exp gives 0, nothing flows across, in either direction.
Lengths and batch sizes are not specialised: a new one must not compile again.
Exponentials are base 2 with A pre-scaled by log2(e), fp32 throughout (a 16-bit exp is too coarse for decays near 1).
"""
# In a kernel a loop grows a tuple, and Triton has no starred tuples.
# ruff: noqa: RUF005
# mypy: disable-error-code="assignment,var-annotated"

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
CUT = tl.constexpr(-1e30)


@triton.jit
def reciprocal(v):
    """1 / v for v > 0: two instructions, where a division takes five, and as exact to 1e-7 or so."""
    root = tl.rsqrt(v)
    return root * root


@triton.jit
def softplus(s):
    """max(s, 0) + log1p(exp(-|s|)), with log1p(w) = 2 atanh(w / (2 + w)).

    The polynomial for atanh(r) / r in r², off by 4e-9 at most for r <= 1/3, keeps full relative accuracy where the
    hardware's log2 near 1 does not: Δ is often 1e-3.
    """
    w = tl.exp2(tl.abs(s) * -LOG2E)
    r = w * reciprocal(2.0 + w)  # at most 1/3
    r2 = r * r
    p = tl.fma(r2, 0.14087329, 0.13980709)
    p = tl.fma(p, r2, 0.20012427)
    p = tl.fma(p, r2, 0.33333158)
    p = tl.fma(p, r2, 1.0)
    return tl.fma(2.0 * r, p, tl.maximum(s, 0.0))


@triton.jit
def step_size(raw, bias, inside, SOFTPLUS: tl.constexpr):
    """Δ, zero outside the sequence, where the state must stand still."""
    delta = raw.to(tl.float32) + bias
    if SOFTPLUS:
        delta = softplus(delta)
    return tl.where(inside, delta, 0.0)


@triton.jit
def sigmoid(v):
    return reciprocal(1.0 + tl.exp2(-v * LOG2E))


@triton.jit
def document_cut(seq_ptr, t, end, HAS_SEQ: tl.constexpr):
    """What to add to the exponent of step t: CUT where a document starts, never at t = 0."""
    cut = 0.0
    if HAS_SEQ:
        last = tl.minimum(t, end - 1)
        here = tl.load(seq_ptr + last)
        before = tl.load(seq_ptr + tl.maximum(last - 1, 0))
        cut = tl.where((here != before) & (t < end), CUT, 0.0)
    return cut


@triton.jit
def channels(first, E: tl.constexpr, BE: tl.constexpr):
    """BE channels, and which of them there are."""
    lanes = first + tl.arange(0, BE)
    mask = lanes < E
    if E % BE == 0:
        mask = tl.full([BE], True, tl.int1)
    return lanes, mask


@triton.jit
def until(end, t, mask, WHOLE: tl.constexpr):
    """The lanes of `mask` if step t is before the end; it is where all blocks of steps are WHOLE."""
    if not WHOLE:
        mask = mask & (t < end)
    return mask


@triton.jit
def load_step(ptr, STEP: tl.constexpr, lanes, t, k, mask):
    """Row t + k (BE,) in its storage dtype, zero where it is masked; k STEP is an offset within the instruction."""
    return tl.load(ptr + tl.cast(t, tl.int64) * STEP + lanes + k * STEP, mask=mask, other=0.0)


@triton.jit
def load_four(ptr, COUNT: tl.constexpr):
    """Four neighbouring numbers from each of COUNT places, as four vectors: one 128-bit load a lane."""
    four = tl.load(ptr[:, None] + tl.arange(0, 4)[None, :])
    even, odd = tl.split(tl.reshape(four, [COUNT, 2, 2]))
    first, third = tl.split(even)
    second, fourth = tl.split(odd)
    return (first, second, third, fourth)


@triton.jit
def load_states(ptr, N: tl.constexpr, BE: tl.constexpr):
    """N states of B or C of one step, the same for every lane, and what fills the last four."""
    states = ()
    for n in tl.static_range(0, N, 4):
        states = states + load_four(ptr + n + tl.zeros([BE], tl.int32), BE)
    return states


@triton.jit
def work_place(item, L, E, batch, segment_length, BE: tl.constexpr):
    """The row, segment, channel block, and steps [begin, end) of one work item; items are numbered flat, up to 2^31."""
    blocks = tl.cdiv(E, BE)
    block = item % blocks
    row = (item // blocks) % batch
    segment = item // (blocks * batch)
    begin = segment * segment_length
    return tl.cast(row, tl.int64), segment, block, begin, tl.minimum(begin + segment_length, L)


@triton.jit(do_not_specialize=["L", "batch", "segments"])
def scan_forward(
    x_ptr, dt_ptr, z_ptr, A_ptr, bc_ptr, D_ptr, bias_ptr, seq_ptr, start_ptr,
    y_ptr, checkpoint_ptr, end_ptr, delta_sum_ptr, alive_ptr,
    x_row, dt_row, z_row, bc_row, L, batch, segment_length, segments,
    x_step: tl.constexpr, dt_step: tl.constexpr, z_step: tl.constexpr, E: tl.constexpr, WHOLE: tl.constexpr,
    N: tl.constexpr, NP: tl.constexpr, BE: tl.constexpr, UNROLL: tl.constexpr, CHUNK: tl.constexpr,
    SOFTPLUS: tl.constexpr, HAS_D: tl.constexpr, HAS_Z: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_SEQ: tl.constexpr,
    HAS_START: tl.constexpr, SAVE: tl.constexpr, SUMMARY: tl.constexpr,
):  # fmt: skip
    """y, checkpoints and the last state (B, N, E) as `end`.

    With SUMMARY instead each segment's end state from zero (B, segments, N, E), its ΣΔ, and if no document starts
    in it.

    x, dt, z: (B, L, E) by strides. A: (E, N). bc: (B, L in whole blocks, 2, NP). start: (B, segments, N, E).
    checkpoint: (B, chunks, N, E), the states before steps 0, CHUNK, 2 CHUNK...
    """
    row, segment, block, begin, end = work_place(tl.program_id(0), L, E, batch, segment_length, BE)
    lanes, mask = channels(block * BE, E, BE)
    x_ptr += row * x_row
    dt_ptr += row * dt_row
    z_ptr += row * z_row
    bc_ptr += row * bc_row
    y_ptr += row * L * E
    seq_ptr += row * L
    checkpoint_ptr += row * tl.cdiv(L, CHUNK) * N * E
    bias = tl.zeros([BE], tl.float32)
    if HAS_BIAS:
        bias = tl.load(bias_ptr + lanes, mask=mask, other=0.0).to(tl.float32)
    skip = tl.zeros([BE], tl.float32)
    if HAS_D:
        skip = tl.load(D_ptr + lanes, mask=mask, other=0.0).to(tl.float32)
    states = ()
    rates = ()
    for n in tl.static_range(N):
        rates = rates + (tl.load(A_ptr + lanes * N + n, mask=mask, other=0.0).to(tl.float32) * LOG2E,)
        if HAS_START:
            start = ((row * segments + segment) * N + n) * E
            states = states + (tl.load(start_ptr + start + lanes, mask=mask, other=0.0),)
        else:
            states = states + (tl.zeros([BE], tl.float32),)
    delta_sum = tl.zeros([BE], tl.float32)
    alive = 1.0

    # the rows of the next UNROLL steps are in flight while these are computed
    xs = ()
    dts = ()
    zs = ()
    for k in tl.static_range(UNROLL):
        reached = until(end, begin + k, mask, WHOLE)
        xs = xs + (load_step(x_ptr, x_step, lanes, begin, k, reached),)
        dts = dts + (load_step(dt_ptr, dt_step, lanes, begin, k, reached),)
        if HAS_Z:
            zs = zs + (load_step(z_ptr, z_step, lanes, begin, k, reached),)
    for chunk in range(begin, end, CHUNK):
        if SAVE:
            for n in tl.static_range(N):
                tl.store(checkpoint_ptr + tl.cast(chunk // CHUNK * N + n, tl.int64) * E + lanes, states[n], mask=mask)
        for t in range(chunk, tl.minimum(chunk + CHUNK, end), UNROLL):
            next_xs = ()
            next_dts = ()
            next_zs = ()
            more = mask & (t + UNROLL < end)
            for k in tl.static_range(UNROLL):
                reached = until(end, t + UNROLL + k, more, WHOLE)
                next_xs = next_xs + (load_step(x_ptr, x_step, lanes, t, UNROLL + k, reached),)
                next_dts = next_dts + (load_step(dt_ptr, dt_step, lanes, t, UNROLL + k, reached),)
                if HAS_Z:
                    next_zs = next_zs + (load_step(z_ptr, z_step, lanes, t, UNROLL + k, reached),)
            for k in tl.static_range(UNROLL):
                reached = until(end, t + k, mask, WHOLE)
                u = xs[k].to(tl.float32)
                delta = step_size(dts[k], bias, reached, SOFTPLUS)
                cut = document_cut(seq_ptr, t + k, end, HAS_SEQ)
                if HAS_SEQ:
                    alive = tl.where(cut < 0.0, 0.0, alive)
                if SUMMARY:
                    delta_sum += delta
                delta_u = delta * u
                bcs = bc_ptr + tl.cast(t, tl.int64) * (2 * NP) + k * (2 * NP)
                b = load_states(bcs, N, BE)
                if not SUMMARY:
                    y = skip * u
                    c = load_states(bcs + NP, N, BE)
                new_states = ()
                for n in tl.static_range(N):
                    if HAS_SEQ:
                        exponent = tl.fma(delta, rates[n], cut)
                    else:
                        exponent = delta * rates[n]
                    state = tl.fma(tl.exp2(exponent), states[n], delta_u * b[n])
                    if not SUMMARY:
                        y = tl.fma(state, c[n], y)
                    new_states = new_states + (state,)
                states = new_states
                if not SUMMARY:
                    if HAS_Z:
                        z = zs[k].to(tl.float32)
                        y = y * z * sigmoid(z)
                    out = y_ptr + tl.cast(t, tl.int64) * E + lanes + k * E
                    tl.store(out, y.to(y_ptr.dtype.element_ty), mask=reached)
            xs = next_xs
            dts = next_dts
            zs = next_zs

    if SUMMARY:
        place = row * segments + segment
        tl.store(delta_sum_ptr + place * E + lanes, delta_sum, mask=mask)
        tl.store(alive_ptr + place, alive, mask=block == 0)
        for n in tl.static_range(N):
            tl.store(end_ptr + (place * N + n) * E + lanes, states[n], mask=mask)
    elif segment == segments - 1:
        for n in tl.static_range(N):
            tl.store(end_ptr + (row * N + n) * E + lanes, states[n], mask=mask)


@triton.jit(do_not_specialize=["L", "batch", "segments"])
def adjoint_summary(
    dy_ptr, dt_ptr, z_ptr, A_ptr, bc_ptr, bias_ptr, seq_ptr,
    end_ptr, delta_sum_ptr, alive_ptr,
    dy_row, dt_row, z_row, bc_row, L, batch, segment_length, segments,
    dy_step: tl.constexpr, dt_step: tl.constexpr, z_step: tl.constexpr, E: tl.constexpr, WHOLE: tl.constexpr,
    N: tl.constexpr, NP: tl.constexpr, BE: tl.constexpr, UNROLL: tl.constexpr,
    SOFTPLUS: tl.constexpr, HAS_Z: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_SEQ: tl.constexpr,
):  # fmt: skip
    """What a segment sends to its left with nothing from its right: exp(Δ A) g at its first step; and ΣΔ, as above."""
    row, segment, block, begin, end = work_place(tl.program_id(0), L, E, batch, segment_length, BE)
    lanes, mask = channels(block * BE, E, BE)
    dy_ptr += row * dy_row
    dt_ptr += row * dt_row
    z_ptr += row * z_row
    bc_ptr += row * bc_row
    seq_ptr += row * L
    bias = tl.zeros([BE], tl.float32)
    if HAS_BIAS:
        bias = tl.load(bias_ptr + lanes, mask=mask, other=0.0).to(tl.float32)
    carries = ()
    rates = ()
    for n in tl.static_range(N):
        rates = rates + (tl.load(A_ptr + lanes * N + n, mask=mask, other=0.0).to(tl.float32) * LOG2E,)
        carries = carries + (tl.zeros([BE], tl.float32),)
    delta_sum = tl.zeros([BE], tl.float32)
    alive = 1.0
    groups = tl.cdiv(end - begin, UNROLL)
    for i in range(groups):
        t = begin + (groups - 1 - i) * UNROLL
        for j in tl.static_range(UNROLL):
            at = t + (UNROLL - 1 - j)
            reached = until(end, at, mask, WHOLE)
            dy = load_step(dy_ptr, dy_step, lanes, t, UNROLL - 1 - j, reached).to(tl.float32)
            if HAS_Z:
                z = load_step(z_ptr, z_step, lanes, t, UNROLL - 1 - j, reached).to(tl.float32)
                dy = dy * z * sigmoid(z)
            raw = load_step(dt_ptr, dt_step, lanes, t, UNROLL - 1 - j, reached)
            delta = step_size(raw, bias, reached, SOFTPLUS)
            cut = document_cut(seq_ptr, at, end, HAS_SEQ)
            if HAS_SEQ:
                alive = tl.where(cut < 0.0, 0.0, alive)
            delta_sum += delta
            c = load_states(bc_ptr + tl.cast(t, tl.int64) * (2 * NP) + (UNROLL - 1 - j) * (2 * NP) + NP, N, BE)
            new_carries = ()
            for n in tl.static_range(N):
                decay = tl.exp2(tl.fma(delta, rates[n], cut))
                new_carries = new_carries + (decay * tl.fma(dy, c[n], carries[n]),)
            carries = new_carries
    place = row * segments + segment
    tl.store(delta_sum_ptr + place * E + lanes, delta_sum, mask=mask)
    tl.store(alive_ptr + place, alive, mask=block == 0)
    for n in tl.static_range(N):
        tl.store(end_ptr + (place * N + n) * E + lanes, carries[n], mask=mask)


@triton.jit
def pass_states(
    end_ptr, delta_sum_ptr, alive_ptr, A_ptr, first_ptr, start_ptr, E, segments,
    N: tl.constexpr, BE: tl.constexpr, HAS_FIRST: tl.constexpr, REVERSE: tl.constexpr,
):  # fmt: skip
    """Every segment's start: start_{s+1} = alive_s exp(A ΣΔ_s) start_s + end_s, from the right if REVERSE.

    end, start: (B, segments, N, E). delta_sum: (B, segments, E). alive: (B, segments). first: (B, N, E) or zero.
    """
    pid = tl.program_id(0)
    blocks = tl.cdiv(E, BE)
    lanes = pid % blocks * BE + tl.arange(0, BE)
    mask = lanes < E
    n = (pid // blocks) % N
    row = (pid // (blocks * N)).to(tl.int64)
    rate = tl.load(A_ptr + lanes * N + n, mask=mask, other=0.0).to(tl.float32) * LOG2E
    carry = tl.zeros([BE], tl.float32)
    if HAS_FIRST:
        carry = tl.load(first_ptr + (row * N + n) * E + lanes, mask=mask, other=0.0)
    for i in range(segments):
        segment = segments - 1 - i if REVERSE else i
        place = row * segments + segment
        tl.store(start_ptr + (place * N + n) * E + lanes, carry, mask=mask)
        delta_sum = tl.load(delta_sum_ptr + place * E + lanes, mask=mask, other=0.0)
        ended = tl.load(end_ptr + (place * N + n) * E + lanes, mask=mask, other=0.0)
        carry = tl.fma(tl.exp2(delta_sum * rate) * tl.load(alive_ptr + place), carry, ended)
