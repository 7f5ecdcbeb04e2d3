"""The Triton kernel of the selective scan's gradient for both directions with the same decays: one exponential serves both.

The forward scan's states run along with the reverse scan's adjoints, to the right, and the reverse scan's states with the
forward scan's adjoints, to the left. Otherwise as in selective_scan_gradient.py, whose letters these are.
"""

# mypy: disable-error-code="no-untyped-def,untyped-decorator,no-untyped-call"

from __future__ import annotations

import triton
import triton.language as tl

from genossm.kernels.selective_scan_threads import (
    LN2,
    LOG2E,
    across_threads,
    chunk_span,
    load_masked,
    own_channel,
    owned_state,
    pick_own,
    share,
    silu_and_slope,
    state_places,
    steps_and_slopes,
    store_masked,
    sum_of_parts,
    sum_over_channels,
    sum_over_states,
)


# A's stride is kept from the compiler, or it would lay out all states like A, across threads.
@triton.jit(do_not_specialize=["A_n"])
def pair_gradient_kernel(
    x_ptr,
    dt_ptr,
    A_ptr,
    B_ptr,
    C_ptr,
    D_ptr,
    bias_ptr,
    z_ptr,
    dy_ptr,
    states_ptr,
    sums_ptr,
    scratch_ptr,
    dx_ptr,
    ddt_ptr,
    dz_ptr,
    dBC_ptr,
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
    ddt_t,
    ddt_d,
    ddt_r,
    spans_ptr,
    DIRECTIONS: tl.constexpr,
    HAS_D: tl.constexpr,
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
    """The gradients of one chunk of some channels after another; any grid.

    As for `gradient_kernel`, with one part of dA and of dt_bias for both directions, and dBC (dB or dC, batch, length, part,
    state); the scratch is (T + 1, 3, channels of a program): the first row of its first sum lies before the chunk.
    """
    CHANNELS: tl.constexpr = TH // LN * K
    EVEN: tl.constexpr = EVEN_D and EVEN_N
    WARPS: tl.constexpr = TH // 32
    ROW: tl.constexpr = 3 * CHANNELS
    thread = tl.arange(0, TH)
    group = (thread // LN)[None, :] * K + tl.arange(0, K)[:, None]
    n = (thread % LN)[None, :] * M + tl.arange(0, M)[:, None]
    n_in = n < size
    n = n.to(tl.int64)
    if not ALIGNED:
        n = across_threads(n, PLAIN)
    owned, first_owner = owned_state(M, LN, TH)
    owner = first_owner & (owned < size)
    mine = own_channel(K, LN, TH)
    waiting = scratch_ptr + tl.program_id(0).to(tl.int64) * (T + 1) * ROW + mine
    of_slot = tl.cast(batch, tl.int64) * chunks * size * channels
    of_sums = tl.cast(batch, tl.int64) * chunks * channels
    partial_t = tl.cast(tiles, tl.int64) * WARPS * size
    of_partials = tl.cast(batch, tl.int64) * length * partial_t

    total_programs = tl.cast(batch, tl.int64) * chunks * tiles
    for program in range(tl.program_id(0).to(tl.int64), total_programs, tl.num_programs(0).to(tl.int64)):
        tile = (program % tiles).to(tl.int32)
        chunk = program // tiles % chunks
        b = program // tiles // chunks
        d = tile * CHANNELS + group
        own = tile * CHANNELS + mine
        d_in, own_in = d < channels, own < channels
        d, own = d.to(tl.int64), own.to(tl.int64)
        if not ALIGNED:
            d, own = across_threads(d, PLAIN), across_threads(own, PLAIN)
        begin, steps = chunk_span(spans_ptr, chunk, length, T, PACKED)
        x_at = x_ptr + b * x_b + d
        dy_at = dy_ptr + b * dy_b + d
        if HAS_Z:
            z_at = z_ptr + b * z_b + own
        dx_at = dx_ptr + b * length * channels + own
        dz_at = dz_ptr + b * length * channels + own
        dBC_at = dBC_ptr + b * length * partial_t + (tile * WARPS + thread // 32)[None, :] * size + owned
        sums_at = sums_ptr + (b * chunks + chunk) * channels + own
        states_at = states_ptr + (b * chunks + chunk) * size * channels
        skip = tl.zeros(own.shape, tl.float32)
        if HAS_D:
            skip = load_masked(D_ptr + own, own_in, EVEN_D).to(tl.float32)
        dD = tl.zeros(own.shape, tl.float32)
        place, inside = state_places(tile, channels, size, A_n, A_d, M, K, LN, TH, PLAIN)
        a = load_masked(A_ptr + place, inside, EVEN).to(tl.float32) * LOG2E
        bias = tl.zeros(own.shape, tl.float32)
        if HAS_BIAS:
            bias = load_masked(bias_ptr + own * bias_d, own_in, EVEN_D).to(tl.float32)
        dt_d_own = own * dt_d
        if not DT_UNIT:
            dt_d_own = across_threads(dt_d_own, PLAIN)
        dt_at = dt_ptr + b * dt_b + dt_d_own
        ddt_at = ddt_ptr + b * length * ddt_t + across_threads(own * ddt_d, PLAIN)
        B_at = B_ptr + b * B_b + n
        C_at = C_ptr + b * C_b + n
        dB_at = dBC_at
        dC_at = dB_at + of_partials

        place, inside = state_places(tile, channels, size, channels, 1, M, K, LN, TH, PLAIN)
        h = load_masked(states_at + place, inside, EVEN)
        adjoint = load_masked(states_at + 3 * of_slot + place, inside, EVEN)
        by_A = tl.zeros([M, K, TH], tl.float32)
        dA = tl.zeros([M, K, TH], tl.float32)
        alpha_before = tl.zeros([K, TH], tl.float32)
        x_raw = load_masked(x_at + begin * x_t, d_in, EVEN_D)
        dt_raw = load_masked(dt_at + begin * dt_t, own_in, EVEN_D)
        dy_raw = load_masked(dy_at + begin * dy_t, d_in, EVEN_D)
        B_raw = load_masked(B_at + begin * B_t, n_in, EVEN_N)
        C_raw = load_masked(C_at + begin * C_t, n_in, EVEN_N)
        for i in range(0, steps):
            t = begin + i
            x, dt, dy = x_raw.to(tl.float32), dt_raw.to(tl.float32), dy_raw.to(tl.float32)
            B_t_n, C_t_n = B_raw.to(tl.float32), C_raw.to(tl.float32)
            following = begin + tl.minimum(i + 1, steps - 1)
            x_raw = load_masked(x_at + following * x_t, d_in, EVEN_D)
            dt_raw = load_masked(dt_at + following * dt_t, own_in, EVEN_D)
            dy_raw = load_masked(dy_at + following * dy_t, d_in, EVEN_D)
            B_raw = load_masked(B_at + following * B_t, n_in, EVEN_N)
            C_raw = load_masked(C_at + following * C_t, n_in, EVEN_N)
            if HAS_Z:
                gate, _ = silu_and_slope(load_masked(z_at + t * z_t, own_in, EVEN_D).to(tl.float32))
                dy *= share(gate, K, LN, PLAIN)
            own_s, _ = steps_and_slopes(dt, bias, SOFTPLUS, PRECISE, PLAIN)
            s = share(own_s, K, LN, PLAIN)
            sx = s * x
            w = tl.exp2(a * s[None, :, :])
            by_A = w * (by_A + s[None, :, :] * h)
            carried = w * h
            h = carried + B_t_n[:, None, :] * sx[None, :, :]
            r = C_t_n[:, None, :] * dy[None, :, :]
            dA += r * by_A
            alpha = tl.sum(a * (r * carried), 0)
            beta = tl.sum(a * (B_t_n[:, None, :] * adjoint), 0) * sx
            adjoint += r
            dsx = tl.sum(B_t_n[:, None, :] * adjoint, 0)
            dC = sum_over_channels(tl.sum(h * dy[None, :, :], 1), LN, PLAIN)
            dB = sum_over_channels(tl.sum(adjoint * sx[None, :, :], 1), LN, PLAIN)
            adjoint *= w
            tl.store(waiting + i * ROW, sum_of_parts(alpha_before + beta, LN, PLAIN))
            alpha_before = alpha
            tl.store(waiting + CHANNELS + i * ROW, sum_of_parts(dsx, LN, PLAIN))
            if HAS_Z:
                y = sum_over_states(h * C_t_n[:, None, :], LN, PLAIN)
                tl.store(waiting + 2 * CHANNELS + i * ROW, y)
            tl.store(dB_at + t * partial_t, dB, mask=owner)
            tl.store(dC_at + t * partial_t, dC, mask=owner)

        # at the right end: of the forward scan the adjoint that enters, of the reverse scan the state that does
        tl.store(waiting + steps * ROW, sum_of_parts(alpha_before, LN, PLAIN))
        place, inside = state_places(tile, channels, size, channels, 1, M, K, LN, TH, PLAIN)
        from_right = load_masked(states_at + 2 * of_slot + place, inside, EVEN)
        dA += by_A * from_right
        ends = a * (h * from_right)
        h = load_masked(states_at + of_slot + place, inside, EVEN)
        ends += a * (adjoint * h)
        by_exponent = sum_over_states(ends, LN, PLAIN)
        adjoint = from_right
        by_A = tl.zeros([M, K, TH], tl.float32)
        dbias = tl.zeros(own.shape, tl.float32)
        final = begin + steps - 1
        alpha_after = tl.zeros([K, TH], tl.float32)
        x_raw = load_masked(x_at + final * x_t, d_in, EVEN_D)
        dt_raw = load_masked(dt_at + final * dt_t, own_in, EVEN_D)
        dy_raw = load_masked(dy_at + final * dy_t, d_in, EVEN_D)
        B_raw = load_masked(B_at + final * B_t, n_in, EVEN_N)
        C_raw = load_masked(C_at + final * C_t, n_in, EVEN_N)
        for j in range(0, steps):
            i = steps - 1 - j
            t = begin + i
            x, dt, dy = x_raw.to(tl.float32), dt_raw.to(tl.float32), dy_raw.to(tl.float32)
            B_t_n, C_t_n = B_raw.to(tl.float32), C_raw.to(tl.float32)
            following = begin + tl.maximum(i - 1, 0)
            x_raw = load_masked(x_at + following * x_t, d_in, EVEN_D)
            dt_raw = load_masked(dt_at + following * dt_t, own_in, EVEN_D)
            dy_raw = load_masked(dy_at + following * dy_t, d_in, EVEN_D)
            B_raw = load_masked(B_at + following * B_t, n_in, EVEN_N)
            C_raw = load_masked(C_at + following * C_t, n_in, EVEN_N)
            left_exponent = tl.load(waiting + (i + 1) * ROW)
            left_dsx = tl.load(waiting + CHANNELS + i * ROW)
            left_dB = tl.load(dB_at + t * partial_t, mask=owner, other=0.0)
            left_dC = tl.load(dC_at + t * partial_t, mask=owner, other=0.0)
            if HAS_Z:
                gate, gate_slope = silu_and_slope(load_masked(z_at + t * z_t, own_in, EVEN_D).to(tl.float32))
                dz = pick_own(dy, LN) * gate_slope
                dy *= share(gate, K, LN, PLAIN)
            own_s, slope = steps_and_slopes(dt, bias, SOFTPLUS, PRECISE, PLAIN)
            s = share(own_s, K, LN, PLAIN)
            sx = s * x
            w = tl.exp2(a * s[None, :, :])
            by_A = w * (by_A + s[None, :, :] * h)
            carried = w * h
            h = carried + B_t_n[:, None, :] * sx[None, :, :]
            r = C_t_n[:, None, :] * dy[None, :, :]
            dA += r * by_A
            alpha = tl.sum(a * (r * carried), 0)
            beta = tl.sum(a * (B_t_n[:, None, :] * adjoint), 0) * sx
            adjoint += r
            dsx = left_dsx + sum_over_states(B_t_n[:, None, :] * adjoint, LN, PLAIN)
            dC = left_dC + sum_over_channels(tl.sum(h * dy[None, :, :], 1), LN, PLAIN)
            dB = left_dB + sum_over_channels(tl.sum(adjoint * sx[None, :, :], 1), LN, PLAIN)
            adjoint *= w
            by_exponent += left_exponent - sum_of_parts(alpha_after + beta, LN, PLAIN)
            alpha_after = alpha
            own_x, own_dy = pick_own(x, LN), pick_own(dy, LN)
            ddt = (dsx * own_x + by_exponent * LN2) * slope
            dbias += ddt
            dD += own_dy * own_x
            store_masked(ddt_at + t * ddt_t, ddt, own_in, EVEN_D)
            store_masked(dx_at + t * channels, dsx * own_s + skip * own_dy, own_in, EVEN_D)
            if HAS_Z:
                y = sum_over_states(h * C_t_n[:, None, :], LN, PLAIN)
                y += tl.load(waiting + 2 * CHANNELS + i * ROW) + skip * own_x
                store_masked(dz_at + t * channels, dz * y, own_in, EVEN_D)
            tl.store(dB_at + t * partial_t, dB, mask=owner)
            tl.store(dC_at + t * partial_t, dC, mask=owner)
        # the reverse scan's adjoint that entered on the left, for what its states on the left owe to A
        place, inside = state_places(tile, channels, size, channels, 1, M, K, LN, TH, PLAIN)
        dA += by_A * load_masked(states_at + 3 * of_slot + place, inside, EVEN)
        store_masked(states_at + place, dA, inside, EVEN)
        store_masked(sums_at, dbias, own_in, EVEN_D)
        store_masked(sums_at + of_sums, dD, own_in, EVEN_D)
