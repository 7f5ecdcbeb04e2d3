"""The Triton kernel of the selective scan that computes its outputs, chunk by chunk, from the states that enter the chunks."""

# mypy: disable-error-code="no-untyped-def,untyped-decorator,no-untyped-call"

from __future__ import annotations

import triton
import triton.language as tl

from genossm.kernels.selective_scan_threads import (
    LOG2E,
    across_threads,
    chunk_span,
    load_masked,
    own_channel,
    pick_own,
    share,
    silu_and_slope,
    state_places,
    steps_and_slopes,
    store_masked,
    sum_over_states,
)


# A's stride is kept from the compiler, or it would lay out all states like A, across threads.
@triton.jit(do_not_specialize=["A_n"])
def output_kernel(
    x_ptr,
    dt_ptr,
    A_ptr,
    B_ptr,
    C_ptr,
    D_ptr,
    bias_ptr,
    z_ptr,
    y_ptr,
    states_ptr,
    scratch_ptr,
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
    """y of one chunk of some channels after another; any grid. y is (batch, length, channels), contiguous.

    With two directions the first one's outputs wait in float32, in a place of this program's own that stays in the cache,
    (T, channels of a program): each thread reads back what it wrote itself.
    """
    CHANNELS: tl.constexpr = TH // LN * K
    EVEN: tl.constexpr = EVEN_D and EVEN_N
    thread = tl.arange(0, TH)
    group = (thread // LN)[None, :] * K + tl.arange(0, K)[:, None]
    n = (thread % LN)[None, :] * M + tl.arange(0, M)[:, None]
    n_in = n < size
    n = n.to(tl.int64)
    if not ALIGNED:
        n = across_threads(n, PLAIN)
    mine = own_channel(K, LN, TH)
    waiting = scratch_ptr + tl.program_id(0).to(tl.int64) * T * CHANNELS + mine
    of_slot = tl.cast(batch, tl.int64) * chunks * size * channels

    total = tl.cast(batch, tl.int64) * chunks * tiles
    for program in range(tl.program_id(0).to(tl.int64), total, tl.num_programs(0).to(tl.int64)):
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
        if HAS_Z:
            z_at = z_ptr + b * z_b + own
        y_at = y_ptr + b * length * channels + own
        skip = tl.zeros(own.shape, tl.float32)
        if HAS_D:
            skip = load_masked(D_ptr + own, own_in, EVEN_D).to(tl.float32)

        for k in tl.static_range(DIRECTIONS):
            direction = first_direction + k
            place, inside = state_places(tile, channels, size, A_n, A_d, M, K, LN, TH, PLAIN)
            a = load_masked(A_ptr + direction * A_r + place, inside, EVEN).to(tl.float32) * LOG2E
            bias = tl.zeros(own.shape, tl.float32)
            if HAS_BIAS:
                bias = load_masked(bias_ptr + direction * bias_r + own * bias_d, own_in, EVEN_D).to(
                    tl.float32
                )
            states_at = states_ptr + k * of_slot + (b * chunks + chunk) * size * channels
            place, inside = state_places(tile, channels, size, channels, 1, M, K, LN, TH, PLAIN)
            h = load_masked(states_at + place, inside, EVEN)

            stride = tl.where(direction == 1, -1, 1).to(tl.int64)
            start = tl.where(direction == 1, begin + steps - 1, begin)
            dt_d_own = own * dt_d
            if not DT_UNIT:
                dt_d_own = across_threads(dt_d_own, PLAIN)
            dt_at = dt_ptr + b * dt_b + direction * dt_r + dt_d_own
            B_at = B_ptr + b * B_b + direction * B_r + n
            C_at = C_ptr + b * C_b + direction * C_r + n
            x_raw = load_masked(x_at + start * x_t, d_in, EVEN_D)
            dt_raw = load_masked(dt_at + start * dt_t, own_in, EVEN_D)
            B_raw = load_masked(B_at + start * B_t, n_in, EVEN_N)
            C_raw = load_masked(C_at + start * C_t, n_in, EVEN_N)
            for i in range(0, steps):
                t = start + stride * i
                x, dt = x_raw.to(tl.float32), dt_raw.to(tl.float32)
                B_t_n, C_t_n = B_raw.to(tl.float32), C_raw.to(tl.float32)
                following = start + stride * tl.minimum(i + 1, steps - 1)
                x_raw = load_masked(x_at + following * x_t, d_in, EVEN_D)
                dt_raw = load_masked(dt_at + following * dt_t, own_in, EVEN_D)
                B_raw = load_masked(B_at + following * B_t, n_in, EVEN_N)
                C_raw = load_masked(C_at + following * C_t, n_in, EVEN_N)
                s, _ = steps_and_slopes(dt, bias, SOFTPLUS, PRECISE, PLAIN)
                s = share(s, K, LN, PLAIN)
                w = tl.exp2(a * s[None, :, :])
                h = w * h + B_t_n[:, None, :] * (s * x)[None, :, :]
                y = sum_over_states(h * C_t_n[:, None, :], LN, PLAIN)
                if k > 0:
                    y += tl.load(waiting + (t - begin) * CHANNELS)
                if k < DIRECTIONS - 1:
                    tl.store(waiting + (t - begin) * CHANNELS, y)
                else:
                    y += skip * pick_own(x, LN)
                    if HAS_Z:
                        gate, _ = silu_and_slope(load_masked(z_at + t * z_t, own_in, EVEN_D).to(tl.float32))
                        y *= gate
                    store_masked(y_at + t * channels, y, own_in, EVEN_D)
