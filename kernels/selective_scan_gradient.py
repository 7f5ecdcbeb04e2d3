"""The Triton kernel of the selective scan's gradient where each direction has decays of its own.

Two traversals of a chunk for each direction, and nothing that is stored between them but two sums a step and channel:

    along the scan: h_t = g_t + v_t, g_t = w_t h_(t-1); dC_t = sum_d dy_t h_t; alpha_t = sum_n A C_t dy_t g_t
    against it: adjoint a_t of h_t from the steps after t; G_t = a_t + C_t dy_t; dB_t = sum_d s_t x_t G_t;
        d(s x)_t = sum_n B_t G_t; beta_t = sum_n A B_t s_t x_t a_t;  a_(t-1) = w_t G_t

The gradient by the exponent s_t A, E_t = G_t g_t, would need h and its adjoint at one time, which run against each other.
But v_i and C_j dy_j meet in E_t just for i < t <= j, so that E_(t+1) - E_t is what starts at t less what ends there:
sum_n A E_(t+1) = sum_n A E_t + beta_t - alpha_t. Only pairs of different steps occur, which fade as E does, and the sum starts
anew with each chunk, from h times the adjoint that enters it. dA is the derivative of h carried along with h,
k_t = w_t (k_(t-1) + s_t h_(t-1)), times C_t dy_t, and at the chunk's end times the adjoint that enters.
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
def gradient_kernel(
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

    dx, dz are (batch, length, channels), ddt any like dt; dBC is (dB or dC, direction, batch, length, part, state) of float32,
    a part for each warp's channels; the part of dA replaces the states of its direction, those of dt_bias replace the sums,
    and that of D goes after these. In the scratch, (T, 2, channels of a program) of float32, each thread reads back what
    it wrote itself.
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
    waiting = scratch_ptr + tl.program_id(0).to(tl.int64) * T * ROW + mine
    of_slot = tl.cast(batch, tl.int64) * chunks * size * channels
    of_sums = tl.cast(batch, tl.int64) * chunks * channels
    partial_t = tl.cast(tiles, tl.int64) * WARPS * size
    of_partials = tl.cast(batch, tl.int64) * length * partial_t * DIRECTIONS

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

        for k in tl.static_range(DIRECTIONS):
            direction = first_direction + k
            place, inside = state_places(tile, channels, size, A_n, A_d, M, K, LN, TH, PLAIN)
            a = load_masked(A_ptr + direction * A_r + place, inside, EVEN).to(tl.float32) * LOG2E
            bias = tl.zeros(own.shape, tl.float32)
            if HAS_BIAS:
                bias = load_masked(bias_ptr + direction * bias_r + own * bias_d, own_in, EVEN_D).to(
                    tl.float32
                )
            stride = tl.where(direction == 1, -1, 1).to(tl.int64)
            start = tl.where(direction == 1, begin + steps - 1, begin)
            last = tl.where(direction == 1, begin, begin + steps - 1)
            dt_d_own = own * dt_d
            if not DT_UNIT:
                dt_d_own = across_threads(dt_d_own, PLAIN)
            dt_at = dt_ptr + b * dt_b + direction * dt_r + dt_d_own
            ddt_at = ddt_ptr + b * length * ddt_t + k * ddt_r + across_threads(own * ddt_d, PLAIN)
            B_at = B_ptr + b * B_b + direction * B_r + n
            C_at = C_ptr + b * C_b + direction * C_r + n
            dB_at = dBC_at + k * tl.cast(batch, tl.int64) * length * partial_t
            dC_at = dB_at + of_partials

            place, inside = state_places(tile, channels, size, channels, 1, M, K, LN, TH, PLAIN)
            h = load_masked(states_at + k * of_slot + place, inside, EVEN)
            by_A = tl.zeros([M, K, TH], tl.float32)
            dA = tl.zeros([M, K, TH], tl.float32)
            x_raw = load_masked(x_at + start * x_t, d_in, EVEN_D)
            dt_raw = load_masked(dt_at + start * dt_t, own_in, EVEN_D)
            dy_raw = load_masked(dy_at + start * dy_t, d_in, EVEN_D)
            B_raw = load_masked(B_at + start * B_t, n_in, EVEN_N)
            C_raw = load_masked(C_at + start * C_t, n_in, EVEN_N)
            for i in range(0, steps):
                t = start + stride * i
                x, dt, dy = x_raw.to(tl.float32), dt_raw.to(tl.float32), dy_raw.to(tl.float32)
                B_t_n, C_t_n = B_raw.to(tl.float32), C_raw.to(tl.float32)
                following = start + stride * tl.minimum(i + 1, steps - 1)
                x_raw = load_masked(x_at + following * x_t, d_in, EVEN_D)
                dt_raw = load_masked(dt_at + following * dt_t, own_in, EVEN_D)
                dy_raw = load_masked(dy_at + following * dy_t, d_in, EVEN_D)
                B_raw = load_masked(B_at + following * B_t, n_in, EVEN_N)
                C_raw = load_masked(C_at + following * C_t, n_in, EVEN_N)
                if HAS_Z:
                    gate, gate_slope = silu_and_slope(
                        load_masked(z_at + t * z_t, own_in, EVEN_D).to(tl.float32)
                    )
                    dz = pick_own(dy, LN) * gate_slope
                    dy *= share(gate, K, LN, PLAIN)
                own_s, _ = steps_and_slopes(dt, bias, SOFTPLUS, PRECISE, PLAIN)
                s = share(own_s, K, LN, PLAIN)
                w = tl.exp2(a * s[None, :, :])
                by_A = w * (by_A + s[None, :, :] * h)
                carried = w * h
                h = carried + B_t_n[:, None, :] * (s * x)[None, :, :]
                r = C_t_n[:, None, :] * dy[None, :, :]
                dA += r * by_A
                alpha = sum_over_states(a * (r * carried), LN, PLAIN)
                tl.store(waiting + (t - begin) * ROW, alpha)
                dC = sum_over_channels(tl.sum(h * dy[None, :, :], 1), LN, PLAIN)
                tl.store(dC_at + t * partial_t, dC, mask=owner)
                if HAS_Z:
                    y = sum_over_states(h * C_t_n[:, None, :], LN, PLAIN)
                    if k > 0:
                        y += tl.load(waiting + CHANNELS + (t - begin) * ROW)
                    if k < DIRECTIONS - 1:
                        tl.store(waiting + CHANNELS + (t - begin) * ROW, y)
                    else:
                        store_masked(dz_at + t * channels, dz * (y + skip * pick_own(x, LN)), own_in, EVEN_D)

            place, inside = state_places(tile, channels, size, channels, 1, M, K, LN, TH, PLAIN)
            adjoint = load_masked(states_at + (DIRECTIONS + k) * of_slot + place, inside, EVEN)
            dA += by_A * adjoint
            store_masked(states_at + k * of_slot + place, dA, inside, EVEN)
            by_exponent = sum_over_states(a * (h * adjoint), LN, PLAIN)
            dbias = tl.zeros(own.shape, tl.float32)
            x_raw = load_masked(x_at + last * x_t, d_in, EVEN_D)
            dt_raw = load_masked(dt_at + last * dt_t, own_in, EVEN_D)
            dy_raw = load_masked(dy_at + last * dy_t, d_in, EVEN_D)
            B_raw = load_masked(B_at + last * B_t, n_in, EVEN_N)
            C_raw = load_masked(C_at + last * C_t, n_in, EVEN_N)
            for i in range(0, steps):
                t = last - stride * i
                x, dt, dy = x_raw.to(tl.float32), dt_raw.to(tl.float32), dy_raw.to(tl.float32)
                B_t_n, C_t_n = B_raw.to(tl.float32), C_raw.to(tl.float32)
                following = last - stride * tl.minimum(i + 1, steps - 1)
                x_raw = load_masked(x_at + following * x_t, d_in, EVEN_D)
                dt_raw = load_masked(dt_at + following * dt_t, own_in, EVEN_D)
                dy_raw = load_masked(dy_at + following * dy_t, d_in, EVEN_D)
                B_raw = load_masked(B_at + following * B_t, n_in, EVEN_N)
                C_raw = load_masked(C_at + following * C_t, n_in, EVEN_N)
                alpha = tl.load(waiting + (t - begin) * ROW)
                if HAS_Z:
                    gate, _ = silu_and_slope(load_masked(z_at + t * z_t, own_in, EVEN_D).to(tl.float32))
                    dy *= share(gate, K, LN, PLAIN)
                own_s, slope = steps_and_slopes(dt, bias, SOFTPLUS, PRECISE, PLAIN)
                s = share(own_s, K, LN, PLAIN)
                w = tl.exp2(a * s[None, :, :])
                z_n = B_t_n[:, None, :] * adjoint
                beta = tl.sum(a * z_n, 0) * (s * x)
                adjoint += C_t_n[:, None, :] * dy[None, :, :]
                dsx = sum_over_states(B_t_n[:, None, :] * adjoint, LN, PLAIN)
                dB = sum_over_channels(tl.sum(adjoint * (s * x)[None, :, :], 1), LN, PLAIN)
                tl.store(dB_at + t * partial_t, dB, mask=owner)
                adjoint *= w
                by_exponent += alpha - sum_of_parts(beta, LN, PLAIN)
                own_x, own_dy = pick_own(x, LN), pick_own(dy, LN)
                ddt = (dsx * own_x + by_exponent * LN2) * slope
                dbias += ddt
                store_masked(ddt_at + t * ddt_t, ddt, own_in, EVEN_D)
                dx = dsx * own_s
                if k > 0:
                    dx += tl.load(waiting + 2 * CHANNELS + (t - begin) * ROW)
                if k < DIRECTIONS - 1:
                    tl.store(waiting + 2 * CHANNELS + (t - begin) * ROW, dx)
                else:
                    store_masked(dx_at + t * channels, dx + skip * own_dy, own_in, EVEN_D)
                    dD += own_dy * own_x
            store_masked(sums_at + k * of_sums, dbias, own_in, EVEN_D)
        store_masked(sums_at + DIRECTIONS * of_sums, dD, own_in, EVEN_D)
