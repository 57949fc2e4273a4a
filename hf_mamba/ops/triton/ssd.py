"""Triton kernels of the state space dual: chunks as in ops/torch/ssd.py, in BT steps of a chunk at a time.

Forward: `chunk_states` (what each chunk gives to the state), `pass_states` (one chunk after the other), `outputs`.
Backward: the first two again, in reverse, then `input_gradients` (of x and w, by head), `shared_gradients` (of B or C,
summed over the heads of a group in a program). Nothing is added up by atomics: the same bits every time.

Symbols: LP is the length in whole chunks; T steps of a chunk; R heads of a group; P a head's width, N states.
The numbers of each step are fp32, (B, H, LP): `sums` of the log2 decays within its chunk, `w`, `from_start` (the decay
of the state before the chunk), `to_end` (to the chunk's end). `open` (B, LP) is the first step that reaches it.
"""

import triton
import triton.language as tl


@triton.jit
def places(ptr, start, row, L, column, WIDTH: tl.constexpr, BT: tl.constexpr, BW: tl.constexpr):
    """Where steps from `start` on lie, as (BT, BW), and which of them are within the length and the width."""
    t = start + tl.arange(0, BT)
    c = tl.arange(0, BW)
    mask = (t < L)[:, None] & (c < WIDTH)[None, :]
    return ptr + t.to(tl.int64)[:, None] * row + column + c[None, :], mask


@triton.jit
def tile(ptr, start, row, L, column, WIDTH: tl.constexpr, BT: tl.constexpr, BW: tl.constexpr):
    """(BT, BW) in fp32, zeros beyond the length and the width."""
    at, mask = places(ptr, start, row, L, column, WIDTH, BT, BW)
    return tl.load(at, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def put_tile(ptr, value, start, row, L, column, WIDTH: tl.constexpr, BT: tl.constexpr, BW: tl.constexpr):
    at, mask = places(ptr, start, row, L, column, WIDTH, BT, BW)
    tl.store(at, value.to(ptr.dtype.element_ty), mask=mask)


@triton.jit
def state_places(ptr, number, P: tl.constexpr, N: tl.constexpr, BP: tl.constexpr, BN: tl.constexpr):
    """Where state `number` of a buffer (..., P, N) lies, as (BP, BN), and which of it there is."""
    p, n = tl.arange(0, BP), tl.arange(0, BN)
    mask = (p < P)[:, None] & (n < N)[None, :]
    return ptr + number * P * N + p[:, None] * N + n[None, :], mask


@triton.jit
def state_tile(ptr, number, P: tl.constexpr, N: tl.constexpr, BP: tl.constexpr, BN: tl.constexpr):
    at, mask = state_places(ptr, number, P, N, BP, BN)
    return tl.load(at, mask=mask, other=0.0)


@triton.jit
def product(a, b, PRECISION: tl.constexpr):
    return tl.dot(a, b, input_precision=PRECISION)


@triton.jit
def decay_between(sums_t, sums_s, open_t, t, s):
    """From steps s (columns) to steps t (rows); zero where s does not reach t."""
    reached = (s[None, :] <= t[:, None]) & (s[None, :] >= open_t[:, None])
    return tl.exp2(tl.where(reached, sums_t[:, None] - sums_s[None, :], float("-inf")))


@triton.jit
def chunk_states(
    x_ptr, scale_ptr, b_ptr, out_ptr, x_batch, x_row, b_batch, b_row, L, LP, H,
    P: tl.constexpr, N: tl.constexpr, R: tl.constexpr, T: tl.constexpr, BT: tl.constexpr, BP: tl.constexpr,
    BN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """out (B, chunks, H, P, N): the sum over a chunk's steps of scale x bᵀ. A program has one head of one chunk."""
    pid = tl.program_id(0).to(tl.int64)
    chunks = LP // T
    h, chunk, batch = pid % H, pid // H % chunks, pid // H // chunks
    total = tl.zeros([BP, BN], tl.float32)
    for start in range(0, T, BT):
        t0 = chunk * T + start
        scale = tl.load(scale_ptr + (batch * H + h) * LP + t0 + tl.arange(0, BT))
        x = tile(x_ptr + batch * x_batch, t0, x_row, L, h * P, P, BT, BP) * scale[:, None]
        b = tile(b_ptr + batch * b_batch, t0, b_row, L, h // R * N, N, BT, BN)
        total += product(tl.trans(x), b, PRECISION)
    at, mask = state_places(out_ptr, pid, P, N, BP, BN)
    tl.store(at, total, mask=mask)


@triton.jit
def pass_states(
    states_ptr, whole_ptr, first_ptr, last_ptr, chunks, H, SIZE,
    BLOCK: tl.constexpr, HAS_FIRST: tl.constexpr, REVERSE: tl.constexpr,
):  # fmt: skip
    """Replace what each chunk gives, (B, chunks, H, SIZE), by the state before it (after it with REVERSE), in place.

    whole (B, H, chunks) is the decay over a chunk; first and last are (B, H, SIZE).
    """
    pid = tl.program_id(0).to(tl.int64)
    blocks = tl.cdiv(SIZE, BLOCK)
    lanes, row = pid % blocks * BLOCK + tl.arange(0, BLOCK), pid // blocks
    mask = lanes < SIZE
    state = tl.zeros([BLOCK], tl.float32)
    if HAS_FIRST:
        state = tl.load(first_ptr + row * SIZE + lanes, mask=mask, other=0.0)
    for i in range(chunks):
        chunk = chunks - 1 - i if REVERSE else i
        at = states_ptr + ((row // H * chunks + chunk) * H + row % H) * SIZE + lanes
        given = tl.load(at, mask=mask, other=0.0)
        tl.store(at, state, mask=mask)
        state = tl.fma(tl.load(whole_ptr + row * chunks + chunk), state, given)
    tl.store(last_ptr + row * SIZE + lanes, state, mask=mask)


@triton.jit
def outputs(
    x_ptr, B_ptr, C_ptr, D_ptr, sums_ptr, w_ptr, from_ptr, open_ptr, states_ptr, y_ptr,
    x_batch, x_row, B_batch, B_row, C_batch, C_row, L, LP, H,
    P: tl.constexpr, N: tl.constexpr, R: tl.constexpr, T: tl.constexpr, BT: tl.constexpr, BP: tl.constexpr,
    BN: tl.constexpr, HAS_D: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """y (B, L, H, P). A program has BT steps of one head."""
    pid = tl.program_id(0).to(tl.int64)
    parts = T // BT
    part, h, chunk = pid % parts, pid // parts % H, pid // parts // H % (LP // T)
    batch = pid // parts // H // (LP // T)
    t0 = chunk * T + part * BT
    t = t0 + tl.arange(0, BT)
    step = (batch * H + h) * LP
    sums_t, open_t = tl.load(sums_ptr + step + t), tl.load(open_ptr + batch * LP + t)
    C = tile(C_ptr + batch * C_batch, t0, C_row, L, h // R * N, N, BT, BN)
    state = state_tile(states_ptr, (batch * (LP // T) + chunk) * H + h, P, N, BP, BN)
    y = product(C, tl.trans(state), PRECISION) * tl.load(from_ptr + step + t)[:, None]
    for other in range(0, part + 1):
        s0 = chunk * T + other * BT
        s = s0 + tl.arange(0, BT)
        B = tile(B_ptr + batch * B_batch, s0, B_row, L, h // R * N, N, BT, BN)
        x = tile(x_ptr + batch * x_batch, s0, x_row, L, h * P, P, BT, BP)
        decay = decay_between(sums_t, tl.load(sums_ptr + step + s), open_t, t, s)
        weights = product(C, tl.trans(B), PRECISION) * decay * tl.load(w_ptr + step + s)[None, :]
        y += product(weights, x, PRECISION)
    if HAS_D:
        own = tile(x_ptr + batch * x_batch, t0, x_row, L, h * P, P, BT, BP)
        y = tl.fma(tl.load(D_ptr + h).to(tl.float32), own, y)
    put_tile(y_ptr + batch * L * H * P, y, t0, H * P, L, h * P, P, BT, BP)


@triton.jit
def input_gradients(
    x_ptr, B_ptr, C_ptr, D_ptr, g_ptr, sums_ptr, w_ptr, to_end_ptr, open_ptr, states_ptr, carries_ptr,
    dx_ptr, dw_ptr, later_ptr, ended_ptr, dD_ptr, through_ptr,
    x_batch, x_row, B_batch, B_row, C_batch, C_row, g_batch, g_row, L, LP, H,
    P: tl.constexpr, N: tl.constexpr, R: tl.constexpr, T: tl.constexpr, BT: tl.constexpr, BP: tl.constexpr,
    BN: tl.constexpr, HAS_D: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dx (B, L, H, P); of each step, (B, H, LP): dw, the sum of its pairs with later steps, what it gives to the state.

    dD, through: (programs): the part of D's gradient, and the product of the state with its gradient (the first part).
    A program has BT steps s of one head.
    """
    pid = tl.program_id(0).to(tl.int64)
    parts = T // BT
    part, h, chunk = pid % parts, pid // parts % H, pid // parts // H % (LP // T)
    batch = pid // parts // H // (LP // T)
    s0 = chunk * T + part * BT
    s = s0 + tl.arange(0, BT)
    step = (batch * H + h) * LP
    sums_s, w = tl.load(sums_ptr + step + s), tl.load(w_ptr + step + s)
    x = tile(x_ptr + batch * x_batch, s0, x_row, L, h * P, P, BT, BP)
    B = tile(B_ptr + batch * B_batch, s0, B_row, L, h // R * N, N, BT, BN)
    number = (batch * (LP // T) + chunk) * H + h
    carry = state_tile(carries_ptr, number, P, N, BP, BN)
    if part == 0:
        state = state_tile(states_ptr, number, P, N, BP, BN)
        tl.store(through_ptr + number, tl.sum(tl.sum(state * carry, 1), 0))
    dv = product(B, tl.trans(carry), PRECISION) * tl.load(to_end_ptr + step + s)[:, None]
    tl.store(ended_ptr + step + s, tl.sum(dv * x, 1) * w)
    later = tl.zeros([BT], tl.float32)
    for other in range(part, parts):
        t0 = chunk * T + other * BT
        t = t0 + tl.arange(0, BT)
        g = tile(g_ptr + batch * g_batch, t0, g_row, L, h * P, P, BT, BP)
        C = tile(C_ptr + batch * C_batch, t0, C_row, L, h // R * N, N, BT, BN)
        sums_t, open_t = tl.load(sums_ptr + step + t), tl.load(open_ptr + batch * LP + t)
        weights = product(C, tl.trans(B), PRECISION) * decay_between(sums_t, sums_s, open_t, t, s)
        dv += product(tl.trans(weights), g, PRECISION)
        pairs = product(g, tl.trans(x), PRECISION) * weights
        later += tl.sum(tl.where(s[None, :] < t[:, None], pairs, 0.0), 0)  # a step's own decay is 1
    tl.store(later_ptr + step + s, later * w)
    tl.store(dw_ptr + step + s, tl.sum(dv * x, 1))
    g = tile(g_ptr + batch * g_batch, s0, g_row, L, h * P, P, BT, BP)
    tl.store(dD_ptr + pid, tl.sum(tl.sum(g * x, 1), 0))
    dx = dv * w[:, None]
    if HAS_D:
        dx = tl.fma(tl.load(D_ptr + h).to(tl.float32), g, dx)
    put_tile(dx_ptr + batch * L * H * P, dx, s0, H * P, L, h * P, P, BT, BP)


@triton.jit
def shared_gradients(
    x_ptr, B_ptr, C_ptr, g_ptr, sums_ptr, w_ptr, scale_ptr, open_ptr, states_ptr, out_ptr, earlier_ptr, along_ptr,
    x_batch, x_row, B_batch, B_row, C_batch, C_row, g_batch, g_row, L, LP, H,
    P: tl.constexpr, N: tl.constexpr, R: tl.constexpr, T: tl.constexpr, BT: tl.constexpr, BP: tl.constexpr,
    BN: tl.constexpr, OF_C: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The gradient of C with the states before each chunk, or of B with the gradients of those after it: (B, L, G, N).

    With OF_C also, by head and step: `earlier` (parts, B, H, LP), the sum of the pairs with the earlier steps of each
    part of the chunk, and `along` (B, H, LP), what the state before gives. A program has BT steps of one group.
    """
    pid = tl.program_id(0).to(tl.int64)
    parts, groups = T // BT, H // R
    part, group, chunk = pid % parts, pid // parts % groups, pid // parts // groups % (LP // T)
    batch = pid // parts // groups // (LP // T)
    own0 = chunk * T + part * BT
    own = own0 + tl.arange(0, BT)
    rows = batch * H * LP
    whole = tl.num_programs(0).to(tl.int64) // parts // groups * H * T  # B H LP
    out = tl.zeros([BT, BN], tl.float32)
    C_own = tile(C_ptr + batch * C_batch, own0, C_row, L, group * N, N, BT, BN)
    open_own = tl.load(open_ptr + batch * LP + own)
    first, last = (0, part + 1) if OF_C else (part, parts)
    for other in range(first, last):
        there0 = chunk * T + other * BT
        there = there0 + tl.arange(0, BT)
        open_there = tl.load(open_ptr + batch * LP + there)
        if OF_C:
            shared = tile(B_ptr + batch * B_batch, there0, B_row, L, group * N, N, BT, BN)
            products = product(C_own, tl.trans(shared), PRECISION)
        else:
            shared = tile(C_ptr + batch * C_batch, there0, C_row, L, group * N, N, BT, BN)
        total = tl.zeros([BT, BT], tl.float32)  # rows are this program's steps
        for r in range(R):
            h = group * R + r
            step = rows + h * LP
            sums_own, sums_there = tl.load(sums_ptr + step + own), tl.load(sums_ptr + step + there)
            if OF_C:
                g = tile(g_ptr + batch * g_batch, own0, g_row, L, h * P, P, BT, BP)
                x = tile(x_ptr + batch * x_batch, there0, x_row, L, h * P, P, BT, BP)
                decay = decay_between(sums_own, sums_there, open_own, own, there)
                pairs = product(g, tl.trans(x), PRECISION) * decay * tl.load(w_ptr + step + there)[None, :]
                weighted = tl.where(there[None, :] < own[:, None], pairs * products, 0.0)
                tl.store(earlier_ptr + other * whole + step + own, tl.sum(weighted, 1))
            else:
                x = tile(x_ptr + batch * x_batch, own0, x_row, L, h * P, P, BT, BP)
                g = tile(g_ptr + batch * g_batch, there0, g_row, L, h * P, P, BT, BP)
                decay = tl.trans(decay_between(sums_there, sums_own, open_there, there, own))
                pairs = product(x, tl.trans(g), PRECISION) * decay * tl.load(w_ptr + step + own)[:, None]
            total += pairs
        out += product(total, shared, PRECISION)
    for r in range(R):
        h = group * R + r
        step = rows + h * LP
        state = state_tile(states_ptr, (batch * (LP // T) + chunk) * H + h, P, N, BP, BN)
        scale = tl.load(scale_ptr + step + own)
        if OF_C:
            given = tile(g_ptr + batch * g_batch, own0, g_row, L, h * P, P, BT, BP)
            part_of_it = product(given, state, PRECISION) * scale[:, None]
            tl.store(along_ptr + step + own, tl.sum(part_of_it * C_own, 1))
        else:
            given = tile(x_ptr + batch * x_batch, own0, x_row, L, h * P, P, BT, BP)
            part_of_it = product(given, state, PRECISION) * scale[:, None]
        out += part_of_it
    put_tile(out_ptr + batch * L * groups * N, out, own0, groups * N, L, group * N, N, BT, BN)


@triton.jit
def update(
    state_ptr, x_ptr, a_ptr, w_ptr, B_ptr, C_ptr, D_ptr, y_ptr, x_batch, B_batch, C_batch, H,
    P: tl.constexpr, N: tl.constexpr, R: tl.constexpr, BP: tl.constexpr, BN: tl.constexpr, HAS_D: tl.constexpr,
):  # fmt: skip
    """One decoding step: state (B, H, P, N) in place, y (B, H, P); a in log2, w: (B, H). A program has one head."""
    pid = tl.program_id(0).to(tl.int64)
    batch, h = pid // H, pid % H
    p, n = tl.arange(0, BP), tl.arange(0, BN)
    x = tl.load(x_ptr + batch * x_batch + h * P + p, mask=p < P, other=0.0).to(tl.float32)
    B = tl.load(B_ptr + batch * B_batch + h // R * N + n, mask=n < N, other=0.0).to(tl.float32)
    C = tl.load(C_ptr + batch * C_batch + h // R * N + n, mask=n < N, other=0.0).to(tl.float32)
    decay, w = tl.exp2(tl.load(a_ptr + pid)), tl.load(w_ptr + pid)
    own, mask = state_places(state_ptr, pid, P, N, BP, BN)
    state = tl.load(own, mask=mask, other=0.0).to(tl.float32)
    state = tl.fma(state, decay, (x * w)[:, None] * B[None, :])
    tl.store(own, state.to(state_ptr.dtype.element_ty), mask=mask)
    y = tl.sum(state * C[None, :], 1)
    if HAS_D:
        y = tl.fma(tl.load(D_ptr + h).to(tl.float32), x, y)
    tl.store(y_ptr + pid * P + p, y.to(y_ptr.dtype.element_ty), mask=p < P)
