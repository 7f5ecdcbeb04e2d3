"""Triton kernels of the selective scan that find the state which enters each chunk: every chunk's own part, then the passing on.

A chunk's own part of a scan in its direction is the scan from zero. Its part of a scan the other way is a sum weighted by the
product of the decays before each step, so that one traversal and one exponential a step serve both ways, for the states h of
both directions and, for a gradient, for their adjoints: the gradient by the state that leaves a step, decayed into the step
before it. No decay is ever divided by.

States lie as (slot, batch, chunk, state, channel) in float32; slots: the states of each direction, then the adjoints of each.
"""

# mypy: disable-error-code="no-untyped-def,untyped-decorator,no-untyped-call,assignment"

from __future__ import annotations

import triton
import triton.language as tl

from genossm.kernels.selective_scan_threads import (
    LOG2E,
    across_threads,
    chunk_span,
    load_masked,
    own_channel,
    share,
    silu_and_slope,
    state_places,
    steps_and_slopes,
    store_masked,
)


# A's stride is kept from the compiler, or it would lay out all states like A, across threads.
@triton.jit(do_not_specialize=["A_n"])
def chunk_states_kernel(
    x_ptr,
    dt_ptr,
    A_ptr,
    B_ptr,
    C_ptr,
    bias_ptr,
    z_ptr,
    dy_ptr,
    states_ptr,
    sums_ptr,
    batch,
    length,
    channels,
    size,
    chunks,
    tiles,
    first_direction,
    x_b,
    x_t,
    dt_b,
    dt_t,
    dt_d,
    dt_r,
    A_d,
    A_n,
    A_r,
    B_b,
    B_t,
    B_r,
    C_b,
    C_t,
    C_r,
    bias_d,
    bias_r,
    z_b,
    z_t,
    dy_b,
    dy_t,
    spans_ptr,
    PAIR: tl.constexpr,
    ADJOINT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_Z: tl.constexpr,
    DT_UNIT: tl.constexpr,
    ALIGNED: tl.constexpr,
    SOFTPLUS: tl.constexpr,
    PRECISE: tl.constexpr,
    EVEN_D: tl.constexpr,
    EVEN_N: tl.constexpr,
    T: tl.constexpr,
    M: tl.constexpr,
    K: tl.constexpr,
    LN: tl.constexpr,
    TH: tl.constexpr,
    PLAIN: tl.constexpr,
    PACKED: tl.constexpr,
):
    """One chunk of some channels; grid (batch * chunks * tiles, directions), or one for both with PAIR.

    h_t = w_t h_(t-1) + v_t with w = exp(s A), v = s x B; the adjoint that leaves a step: w_t (adjoint + C_t dy_t).
    """
    program = tl.program_id(0).to(tl.int64)
    tile = (program % tiles).to(tl.int32)
    chunk = program // tiles % chunks
    b = program // tiles // chunks
    slot = tl.program_id(1).to(tl.int64)
    slots = tl.num_programs(1)
    direction = slot + first_direction
    thread = tl.arange(0, TH)
    d = tile * (TH // LN * K) + (thread // LN)[None, :] * K + tl.arange(0, K)[:, None]
    n = (thread % LN)[None, :] * M + tl.arange(0, M)[:, None]
    own = tile * (TH // LN * K) + own_channel(K, LN, TH)
    d_in, n_in, own_in = d < channels, n < size, own < channels
    EVEN: tl.constexpr = EVEN_D and EVEN_N
    d, n, own = d.to(tl.int64), n.to(tl.int64), own.to(tl.int64)
    if not ALIGNED:
        d, n, own = across_threads(d, PLAIN), across_threads(n, PLAIN), across_threads(own, PLAIN)

    place, inside = state_places(tile, channels, size, A_n, A_d, M, K, LN, TH, PLAIN)
    a = load_masked(A_ptr + direction * A_r + place, inside, EVEN).to(tl.float32) * LOG2E
    bias = tl.zeros(own.shape, tl.float32)
    if HAS_BIAS:
        bias = load_masked(bias_ptr + direction * bias_r + own * bias_d, own_in, EVEN_D).to(tl.float32)

    begin, steps = chunk_span(spans_ptr, chunk, length, T, PACKED)
    stride = tl.where(direction == 1, -1, 1).to(tl.int64)
    start = tl.where(direction == 1, begin + steps - 1, begin)
    x_at = x_ptr + b * x_b + d
    dt_d_own = own * dt_d
    if not DT_UNIT:
        dt_d_own = across_threads(dt_d_own, PLAIN)
    dt_at = dt_ptr + b * dt_b + direction * dt_r + dt_d_own
    B_at = B_ptr + b * B_b + direction * B_r + n
    x_raw = load_masked(x_at + start * x_t, d_in, EVEN_D)
    dt_raw = load_masked(dt_at + start * dt_t, own_in, EVEN_D)
    B_raw = load_masked(B_at + start * B_t, n_in, EVEN_N)
    if ADJOINT:
        C_at = C_ptr + b * C_b + direction * C_r + n
        dy_at = dy_ptr + b * dy_b + d
        C_raw = load_masked(C_at + start * C_t, n_in, EVEN_N)
        dy_raw = load_masked(dy_at + start * dy_t, d_in, EVEN_D)
        if HAS_Z:
            z_at = z_ptr + b * z_b + own
            z_raw = load_masked(z_at + start * z_t, own_in, EVEN_D)

    h = tl.zeros([M, K, TH], tl.float32)
    before = tl.full([M, K, TH], 1.0, tl.float32)
    other = tl.zeros([M, K, TH], tl.float32)
    adjoint = tl.zeros([M, K, TH], tl.float32)
    other_adjoint = tl.zeros([M, K, TH], tl.float32)
    total = tl.zeros(own.shape, tl.float32)
    for i in range(0, steps):
        x, dt, B_t_n = x_raw.to(tl.float32), dt_raw.to(tl.float32), B_raw.to(tl.float32)
        following = start + stride * tl.minimum(i + 1, steps - 1)
        x_raw = load_masked(x_at + following * x_t, d_in, EVEN_D)
        dt_raw = load_masked(dt_at + following * dt_t, own_in, EVEN_D)
        B_raw = load_masked(B_at + following * B_t, n_in, EVEN_N)
        s, _ = steps_and_slopes(dt, bias, SOFTPLUS, PRECISE, PLAIN)
        total += s
        s = share(s, K, LN, PLAIN)
        w = tl.exp2(a * s[None, :, :])
        v = B_t_n[:, None, :] * (s * x)[None, :, :]
        h = w * h + v
        if PAIR:
            other += before * v
        if PAIR or ADJOINT:
            before *= w
        if ADJOINT:
            dy = dy_raw.to(tl.float32)
            C_t_n = C_raw.to(tl.float32)
            C_raw = load_masked(C_at + following * C_t, n_in, EVEN_N)
            dy_raw = load_masked(dy_at + following * dy_t, d_in, EVEN_D)
            if HAS_Z:
                gate, _ = silu_and_slope(z_raw.to(tl.float32))
                z_raw = load_masked(z_at + following * z_t, own_in, EVEN_D)
                dy *= share(gate, K, LN, PLAIN)
            r = C_t_n[:, None, :] * dy[None, :, :]
            adjoint += before * r
            if PAIR:
                other_adjoint = w * (other_adjoint + r)

    place, inside = state_places(tile, channels, size, channels, 1, M, K, LN, TH, PLAIN)
    of_slot = tl.cast(batch, tl.int64) * chunks * size * channels
    at = states_ptr + slot * of_slot + (b * chunks + chunk) * size * channels + place
    store_masked(at, h, inside, EVEN)
    if PAIR:
        store_masked(at + of_slot, other, inside, EVEN)
    if ADJOINT:
        if PAIR:
            store_masked(at + 2 * of_slot, adjoint, inside, EVEN)
            store_masked(at + 3 * of_slot, other_adjoint, inside, EVEN)
        else:
            store_masked(at + slots * of_slot, adjoint, inside, EVEN)
    sums_at = sums_ptr + ((slot * batch + b) * chunks + chunk) * channels + own
    store_masked(sums_at, total, own_in, EVEN_D)


@triton.jit
def pass_states_kernel(
    states_ptr,
    sums_ptr,
    A_ptr,
    start_ptr,
    end_ptr,
    batch,
    channels,
    size,
    chunks,
    directions,
    first_direction,
    A_d,
    A_n,
    A_r,
    sums_r,
    firsts_ptr,
    HAS_START: tl.constexpr,
    BLOCK: tl.constexpr,
    AHEAD: tl.constexpr,
    PACKED: tl.constexpr,
):
    """Each chunk's own part becomes, in place, what enters the chunk; grid (blocks * batch, slots).

    start and end are (slot, batch, channel, state), of float32. With PACKED, batch counts the sequences of one row, and
    firsts (batch + 1,) lists where among the row's chunks each one's begin.
    """
    blocks = tl.cdiv(size * channels, BLOCK)
    b = (tl.program_id(0) // blocks).to(tl.int64)
    slot = tl.program_id(1)
    of_adjoint = slot >= directions
    direction = slot % directions
    i = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    inside = i < size * channels
    d = (i % channels).to(tl.int64)
    n = (i // channels).to(tl.int64)
    direction = direction.to(tl.int64)
    a = tl.load(A_ptr + (direction + first_direction) * A_r + d * A_d + n * A_n, mask=inside, other=0.0)
    a = a.to(tl.float32) * LOG2E
    corner = (slot.to(tl.int64) * batch + b) * channels * size + d * size + n
    if HAS_START:
        state = tl.load(start_ptr + corner, mask=inside, other=0.0)
    else:
        state = tl.zeros([BLOCK], tl.float32)

    backwards = (direction + first_direction == 1) != of_adjoint
    stride = tl.where(backwards, -1, 1).to(tl.int64)
    row = tl.cast(channels, tl.int64) * size
    if PACKED:
        before = tl.load(firsts_ptr + b)
        count = (tl.load(firsts_ptr + b + 1) - before).to(tl.int32)
        states_at = states_ptr + (slot.to(tl.int64) * chunks + before) * row + i
        sums_at = sums_ptr + direction * sums_r + before * channels + d
    else:
        count = chunks
        states_at = states_ptr + (slot.to(tl.int64) * batch + b) * chunks * row + i
        sums_at = sums_ptr + direction * sums_r + b * chunks * channels + d
    first = tl.where(backwards, count - 1, 0).to(tl.int64)
    for c in range(0, count, AHEAD):
        # all loads before the first store, behind which no compiler may move them
        parts = ()
        sums = ()
        for k in tl.static_range(AHEAD):
            chunk = first + stride * (c + k)
            there = inside & (c + k < count)
            parts = parts + (tl.load(states_at + chunk * row, mask=there, other=0.0),)  # noqa: RUF005
            sums = sums + (tl.load(sums_at + chunk * channels, mask=there, other=0.0),)  # noqa: RUF005
        for k in tl.static_range(AHEAD):
            chunk = first + stride * (c + k)
            tl.store(states_at + chunk * row, state, mask=inside & (c + k < count))
            state = tl.exp2(a * sums[k]) * state + parts[k]
    tl.store(end_ptr + corner, state, mask=inside)
