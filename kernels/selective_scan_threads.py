"""How the selective scan's Triton kernels share work out: one thread owns a few channels with a part of their states.

A program has TH = 32 * num_warps threads, and every tensor's last axis is the thread, so that all of its other elements lie
in one thread's registers and no step of a scan needs shared memory or a barrier. LN neighbouring threads share K channels,
each with M of the N states (LN * M >= N). What is summed over states or channels passes between the lanes of a warp. What is
to be done once for a channel, each of the LN threads does for KO of the K, its own.

Letters: TH threads, M states and K channels of one thread, LN threads that share channels, KO a thread's own channels.
"""

# mypy: disable-error-code="no-untyped-def,untyped-decorator,no-untyped-call"

from __future__ import annotations

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def _fast_log2(x, PLAIN: tl.constexpr):
    if PLAIN:
        result = tl.log2(x)
    else:
        result = tl.inline_asm_elementwise(
            "lg2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
        )
    return result


@triton.jit
def steps_and_slopes(raw, bias, SOFTPLUS: tl.constexpr, PRECISE: tl.constexpr, PLAIN: tl.constexpr):
    """s = softplus(raw + bias), or raw + bias, and its derivative."""
    x = raw + bias
    if SOFTPLUS:
        e = tl.exp2(tl.minimum(x, 20.0) * LOG2E)
        # log(1 + e) loses the digits of a small e
        if PRECISE:
            u = 1.0 + e
            s = tl.log(u) + (e - (u - 1.0)) / u
        else:
            series = e * (1.0 - e * (0.5 - e * (0.33333333 - e * (0.25 - e * 0.2))))
            s = tl.where(e < 0.0625, series, _fast_log2(1.0 + e, PLAIN) * LN2)
        large = x > 20.0
        s = tl.where(large, x, s)
        slope = tl.where(large, 1.0, e / (1.0 + e))
    else:
        s = x
        slope = x * 0.0 + 1.0
    return s, slope


@triton.jit
def swap(x, BIT: tl.constexpr, PLAIN: tl.constexpr):
    """Each thread's counterpart of x (., TH) in the thread whose number differs in the bit."""
    if PLAIN:
        other = tl.arange(0, x.shape[1]) ^ BIT
        swapped = tl.gather(x, tl.broadcast_to(other[None, :], x.shape), 1)
    else:
        swapped = tl.inline_asm_elementwise(
            f"shfl.sync.bfly.b32 $0, $1, {BIT}, 31, 0xffffffff;",
            "=f,f",
            [x],
            dtype=tl.float32,
            is_pure=True,
            pack=1,
        )
    return swapped


@triton.jit
def _halve(x, BIT: tl.constexpr, FIRST: tl.constexpr, END: tl.constexpr, PLAIN: tl.constexpr):
    """Sum over a bit of the thread's number in [FIRST, END); while there are rows, each of two threads keeps half of them."""
    if BIT < FIRST or BIT >= END:
        result = x
    elif x.shape[0] == 1:
        result = x + swap(x, BIT, PLAIN)
    else:
        halves = tl.permute(tl.reshape(x, [2, x.shape[0] // 2, x.shape[1]]), [1, 2, 0])
        low, high = tl.split(halves)
        upper = ((tl.arange(0, x.shape[1]) & BIT) != 0)[None, :]
        kept = tl.where(upper, high, low)
        given = tl.where(upper, low, high)
        result = kept + swap(given, BIT, PLAIN)
    return result


@triton.jit
def sum_over_channels(x, LN: tl.constexpr, PLAIN: tl.constexpr):
    """The sum of x (M, TH) over a warp's threads of the same states; rows are shared out as in `owned_state`."""
    x = _halve(x, 16, LN, 32, PLAIN)
    x = _halve(x, 8, LN, 32, PLAIN)
    x = _halve(x, 4, LN, 32, PLAIN)
    x = _halve(x, 2, LN, 32, PLAIN)
    x = _halve(x, 1, LN, 32, PLAIN)
    return x


@triton.jit
def sum_of_parts(x, LN: tl.constexpr, PLAIN: tl.constexpr):
    """The sum of x (K, TH) over the LN threads that share channels, (KO, TH): each gets it for its own channels."""
    x = _halve(x, 16, 1, LN, PLAIN)
    x = _halve(x, 8, 1, LN, PLAIN)
    x = _halve(x, 4, 1, LN, PLAIN)
    x = _halve(x, 2, 1, LN, PLAIN)
    x = _halve(x, 1, 1, LN, PLAIN)
    return x


@triton.jit
def sum_over_states(x, LN: tl.constexpr, PLAIN: tl.constexpr):
    """The sum of x (M, K, TH) over all states, (KO, TH)."""
    return sum_of_parts(tl.sum(x, 0), LN, PLAIN)


@triton.jit
def _pick(x, BIT: tl.constexpr, LN: tl.constexpr):
    if BIT >= LN or x.shape[0] == 1:
        result = x
    else:
        low, high = tl.split(tl.permute(tl.reshape(x, [2, x.shape[0] // 2, x.shape[1]]), [1, 2, 0]))
        result = tl.where(((tl.arange(0, x.shape[1]) & BIT) != 0)[None, :], high, low)
    return result


@triton.jit
def pick_own(x, LN: tl.constexpr):
    """The rows of x (K, TH) that are a thread's own channels, (KO, TH)."""
    x = _pick(x, 16, LN)
    x = _pick(x, 8, LN)
    x = _pick(x, 4, LN)
    x = _pick(x, 2, LN)
    return _pick(x, 1, LN)


@triton.jit
def _join(x, BIT: tl.constexpr, K: tl.constexpr, LN: tl.constexpr, PLAIN: tl.constexpr):
    if BIT >= LN or BIT * K < LN:
        result = x
    else:
        other = swap(x, BIT, PLAIN)
        upper = ((tl.arange(0, x.shape[1]) & BIT) != 0)[None, :]
        both = tl.join(tl.where(upper, other, x), tl.where(upper, x, other))
        result = tl.reshape(tl.permute(both, [2, 0, 1]), [2 * x.shape[0], x.shape[1]])
    return result


@triton.jit
def share(x, K: tl.constexpr, LN: tl.constexpr, PLAIN: tl.constexpr):
    """x (K, TH) of all of a thread's channels from the (KO, TH) that each of the LN threads has of its own."""
    x = _join(x, 1, K, LN, PLAIN)
    x = _join(x, 2, K, LN, PLAIN)
    x = _join(x, 4, K, LN, PLAIN)
    x = _join(x, 8, K, LN, PLAIN)
    return _join(x, 16, K, LN, PLAIN)


@triton.jit
def own_channel(K: tl.constexpr, LN: tl.constexpr, TH: tl.constexpr):
    """Which of a program's channels are each thread's own, (KO, TH): those that it takes the step sizes and sums of."""
    KO: tl.constexpr = K // LN if K > LN else 1
    SAME: tl.constexpr = LN // K if LN > K else 1
    return (tl.arange(0, TH) // SAME)[None, :] * KO + tl.arange(0, KO)[:, None]


@triton.jit
def owned_state(M: tl.constexpr, LN: tl.constexpr, TH: tl.constexpr):
    """Which states the rows of `sum_over_channels` are, (rows, TH), and which threads are the first to hold them, (1, TH)."""
    LANES: tl.constexpr = 32 // LN
    ROWS: tl.constexpr = M // LANES if M > LANES else 1
    SPARE: tl.constexpr = LANES // M if M < LANES else 1
    thread = tl.arange(0, TH)
    # the highest bits of the lane choose the rows, in the order of halving; the bits just above the part are spare
    lane = (thread % 32) // LN // SPARE
    row = (thread % LN) * M + lane * ROWS
    first = (thread % 32) // LN % SPARE == 0
    return row[None, :] + tl.arange(0, ROWS)[:, None], first[None, :]


@triton.jit
def across_threads(offsets, PLAIN: tl.constexpr):
    """Integer offsets (..., TH) as they are, laid out with each thread's own in its registers when they are loaded from.

    The layout of a load is the compiler's choice, by what it knows of how offsets grow; versions differ where it knows of
    nothing. So it is kept from seeing their making, and told that they follow each other along the threads. That they may
    not is of no effect: as it knows of no alignment either, it loads elements one by one.
    """
    if not PLAIN:
        # offsets that are the same in all threads would be folded into smaller tensors, which the hint does not fit
        zero = tl.inline_asm_elementwise(
            "and.b32 $0, $1, 0;",
            "=r,r",
            [tl.arange(0, offsets.shape[len(offsets.shape) - 1])],
            dtype=tl.int32,
            is_pure=True,
            pack=1,
        )
        offsets += zero[None, None, :] if len(offsets.shape) == 3 else zero[None, :]
        if offsets.dtype == tl.int32:
            offsets = tl.inline_asm_elementwise(
                "mov.u32 $0, $1;", "=r,r", [offsets], dtype=tl.int32, is_pure=True, pack=1
            )
        else:
            offsets = tl.inline_asm_elementwise(
                "mov.u64 $0, $1;", "=l,l", [offsets], dtype=tl.int64, is_pure=True, pack=1
            )
        if len(offsets.shape) == 3:
            offsets = tl.max_contiguous(offsets, [1, 1, offsets.shape[2]])
        else:
            offsets = tl.max_contiguous(offsets, [1, offsets.shape[1]])
    return offsets


@triton.jit
def state_places(
    tile,
    channels,
    size,
    stride_n,
    stride_d,
    M: tl.constexpr,
    K: tl.constexpr,
    LN: tl.constexpr,
    TH: tl.constexpr,
    PLAIN: tl.constexpr,
):
    """Where each thread's states lie in a (state, channel) matrix of these strides, (M, K, TH), and whether they are in it.

    Found afresh at each call, since the compiler would keep all of these in registers from one call to the next.
    """
    thread = tl.arange(0, TH)
    if not PLAIN:
        thread = tl.inline_asm_elementwise(
            "mov.u32 $0, $1;", "=r,r", [thread], dtype=tl.int32, is_pure=False, pack=1
        )
    n = (thread % LN)[None, :] * M + tl.arange(0, M)[:, None]
    d = tile * (TH // LN * K) + (thread // LN)[None, :] * K + tl.arange(0, K)[:, None]
    inside = (n < size)[:, None, :] & (d < channels)[None, :, :]
    places = (n * stride_n)[:, None, :] + (d * stride_d)[None, :, :]
    return across_threads(places, PLAIN), inside


@triton.jit
def chunk_span(spans_ptr, chunk, length, T: tl.constexpr, PACKED: tl.constexpr):
    """A chunk's first position and how many it has: T but for the last of a sequence, or as spans (chunk, 2) lists."""
    if PACKED:
        begin = tl.load(spans_ptr + 2 * chunk)
        steps = (tl.load(spans_ptr + 2 * chunk + 1) - begin).to(tl.int32)
    else:
        begin = chunk * T
        steps = tl.minimum(length - begin, T).to(tl.int32)
    return begin, steps


@triton.jit
def load_masked(pointers, inside, EVEN: tl.constexpr):
    """What the pointers hold, in its own dtype; 0 where not inside, which EVEN says is nowhere."""
    if EVEN:
        values = tl.load(pointers)
    else:
        values = tl.load(pointers, mask=inside, other=0.0)
    return values


@triton.jit
def store_masked(pointers, values, inside, EVEN: tl.constexpr):
    """Store in the pointers' dtype, where inside, which EVEN says is everywhere."""
    if EVEN:
        tl.store(pointers, values.to(pointers.dtype.element_ty))
    else:
        tl.store(pointers, values.to(pointers.dtype.element_ty), mask=inside)


@triton.jit
def silu_and_slope(z):
    """z sigmoid(z) and its derivative."""
    sigmoid = 1.0 / (1.0 + tl.exp2(-z * LOG2E))
    return z * sigmoid, sigmoid * (1.0 + z * (1.0 - sigmoid))
