"""Triton kernels of the SSD scan: step sizes, chunk states, their passing on, and the output.

Both directions run in one program: whatever is seen from the left decays by differences of one cumulative sum (`left`),
whatever is seen from the right by differences of another (`right`), all in units of log2. For the scan itself `left` is
the inclusive sum of the forward decays and `right` the exclusive sum of the reverse ones. The gradient with regard to x
is the same scan of dy with B and C, and `left` and `right`, changed for each other; its step sizes then belong to the
position written rather than to those read (ADJOINT).

Layouts: x (batch, length, heads, head_dim), B and C (batch, length, groups, state), any strides but the last, which is
1; sums and steps (direction, batch, heads, length); states (direction, chunks of all sequences, heads, head_dim,
state). A chunk is numbered over all sequences; SPANS lists first and end position of each where sequences are packed.
"""

# mypy: disable-error-code="untyped-decorator, no-untyped-def"
# Functions of Triton's own language have no types.

from __future__ import annotations

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LEAST_STEP = tl.constexpr(1e-20)
"""Stands for smaller step sizes, zero among them, where they are a factor: it can be divided out again."""
OF_LENGTH = (
    "length chunks totals blocks final_plane left right forward reverse step_left step_right step_forward step_reverse "
    "total_left total_right"
).split()
"""Arguments that change with the length and need no kernel of their own where they are 1 or a multiple of 16."""


@triton.jit
def chunk_span(SPANS, chunk, chunks, length, Q: tl.constexpr, PACKED: tl.constexpr):
    """Batch row, first position (both int64) and number of positions of a chunk."""
    if PACKED:
        batch = chunk * 0
        first = tl.load(SPANS + 2 * chunk)
        size = (tl.load(SPANS + 2 * chunk + 1) - first).to(tl.int32)
    else:
        batch = chunk // chunks
        first = (chunk - batch * chunks) * Q
        size = tl.minimum(length - first, Q).to(tl.int32)
    return batch, first, size


@triton.jit
def below(index, limit, ALWAYS: tl.constexpr):
    """index < limit, as a constant where that is known, so that loads go without a mask."""
    if ALWAYS:
        inside = tl.full(index.shape, True, tl.int1)
    else:
        inside = index < limit
    return inside


@triton.jit
def softplus(x):
    """log(1 + exp(x)) with small relative error for every x: a series where exp(-|x|) is small."""
    t = tl.exp2(-tl.abs(x) * LOG2E)
    log1p = tl.where(t < 0.01, t * (1.0 - t * (0.5 - t * (0.33333334 - t * 0.25))), tl.log(1.0 + t))
    return tl.where(x > 20.0, x, tl.maximum(x, 0.0) + log1p)


@triton.jit
def decay(exponent):
    """2 ** exponent for exponents that are <= 0 but for rounding, and for what is masked."""
    return tl.exp2(tl.minimum(exponent, 0.0))


@triton.jit(do_not_specialize=OF_LENGTH)
def ssd_steps(
    DT, BIAS, A, STEP, SUM, STEPPED, TOTAL, FAR, FAR_ADJOINT, SPANS, heads, length, chunks, plane, totals,
    dt_batch, dt_row, dt_head, dt_direction, bias_head, bias_direction, a_head, a_direction,
    Q: tl.constexpr, HB: tl.constexpr, FORWARD: tl.constexpr, REVERSE: tl.constexpr, SEPARATE: tl.constexpr,
    HAS_BIAS: tl.constexpr, SOFTPLUS: tl.constexpr, PACKED: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """Step sizes, their sums times A over each chunk (forward: inclusive, reverse: exclusive) and each chunk's total.

    FAR gets each position's decay up to the middle of its chunk, how the other half sees it, times the step size (first
    half: forward, second: reverse); FAR_ADJOINT the adjoint's, without (reverse, forward). STEPPED gets forward sums
    less log2 of the step size, and reverse sums plus it: a pair's decay times its step size is then one exponential.
    """
    chunk = tl.program_id(0).to(tl.int64)
    batch, first, size = chunk_span(SPANS, chunk, chunks, length, Q, PACKED)
    q = tl.arange(0, Q)
    h = tl.program_id(1).to(tl.int64) * HB + tl.arange(0, HB)
    seen = (q[:, None] < size) & (h[None, :] < heads)
    to = (batch * heads + h[None, :]) * length + first + q[:, None]
    HALF: tl.constexpr = Q // 2
    early = q[:, None] < HALF
    far = tl.zeros([Q, HB], tl.float32)
    far_adjoint = tl.zeros([Q, HB], tl.float32)
    for direction in tl.static_range(1 - FORWARD, 1 + REVERSE):
        index = direction - (1 - FORWARD)
        at = DT + batch * dt_batch + h[None, :] * dt_head + direction * dt_direction
        step = tl.load(at + (first + q[:, None]) * dt_row, mask=seen, other=0.0).to(tl.float32)
        if HAS_BIAS:
            step += tl.load(BIAS + h * bias_head + direction * bias_direction, mask=h < heads, other=0.0)[
                None, :
            ]
        if SOFTPLUS:
            step = softplus(step)
        if HAS_BIAS or SOFTPLUS:  # else it is 0 there (and Triton 3.6 cannot compile the choice)
            step = tl.where(seen, step, 0.0)
        weight = tl.maximum(step, LEAST_STEP)
        a = (
            tl.load(A + h * a_head + direction * a_direction, mask=h < heads, other=0.0).to(tl.float32)
            * LOG2E
        )
        exponent = step * a[None, :]
        sums = tl.cumsum(exponent, 0)
        if direction == 0:
            last_early = tl.sum(tl.where(q[:, None] == HALF - 1, sums, 0.0), 0)[None, :]
            first_late = tl.sum(tl.where(q[:, None] == HALF, sums, 0.0), 0)[None, :]
            far = tl.where(early, decay(last_early - sums) * step, far)
            far_adjoint = tl.where(early, far_adjoint, decay(sums - first_late))
            stepped = sums - tl.log2(weight)
        else:
            sums -= exponent
            last_early = tl.sum(tl.where(q[:, None] == HALF - 1, sums, 0.0), 0)[None, :]
            first_late = tl.sum(tl.where(q[:, None] == HALF, sums, 0.0), 0)[None, :]
            far = tl.where(early, far, decay(sums - first_late) * step)
            far_adjoint = tl.where(early, decay(last_early - sums), far_adjoint)
            stepped = sums + tl.log2(weight)
        tl.store(SUM + index * plane + to, sums, mask=seen)
        tl.store(STEPPED + index * plane + to, stepped, mask=seen)
        tl.store(TOTAL + index * totals + chunk * heads + h, tl.sum(exponent, 0), mask=h < heads)
        if SEPARATE or index == 0:
            tl.store(STEP + index * plane + to, step, mask=seen)
    tl.store(FAR + to, far, mask=seen)
    tl.store(FAR_ADJOINT + to, far_adjoint, mask=seen)


@triton.jit(do_not_specialize=OF_LENGTH)
def ssd_states(
    X, B, SUM, STEP, TOTAL, LOCAL, SPANS, heads, per_group, length, chunks,
    x_batch, x_row: tl.constexpr, x_head, b_batch, b_row: tl.constexpr, b_group,
    left, right, step_left, step_right, total_left, plane,
    Q: tl.constexpr, BK: tl.constexpr, P: tl.constexpr, N: tl.constexpr, BP: tl.constexpr, BN: tl.constexpr,
    LEFT: tl.constexpr, RIGHT: tl.constexpr, ADJOINT: tl.constexpr, PACKED: tl.constexpr, EVEN: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """What each chunk adds to the state that leaves it, to the right (LEFT: seen from the left) and to the left."""
    pid = tl.program_id(0).to(tl.int64)
    chunk = pid // heads
    head = pid - chunk * heads
    batch, first, size = chunk_span(SPANS, chunk, chunks, length, Q, PACKED)
    p = tl.arange(0, BP)
    in_p = below(p, P, BP == P)
    n = tl.arange(0, BN)
    in_n = below(n, N, BN == N)
    k = tl.arange(0, BK)
    row = (batch * heads + head) * length + first
    x_at = X + batch * x_batch + first * x_row + head * x_head
    b_at = B + batch * b_batch + first * b_row + (head // per_group) * b_group
    to_right = tl.zeros([BP, BN], tl.float32)
    to_left = tl.zeros([BP, BN], tl.float32)
    if LEFT:
        total = tl.load(TOTAL + total_left + chunk * heads + head)
    for k0 in range(0, size, BK):
        rows = k0 + k
        seen = below(rows, size, EVEN)
        x = tl.load(x_at + rows[None, :] * x_row + p[:, None], mask=seen[None, :] & in_p[:, None], other=0.0)
        b = tl.load(b_at + rows[:, None] * b_row + n[None, :], mask=seen[:, None] & in_n[None, :], other=0.0)
        if LEFT:
            weight = decay(total - tl.load(SUM + left + row + rows, mask=seen, other=0.0))
            if not ADJOINT:
                weight *= tl.load(STEP + step_left + row + rows, mask=seen, other=0.0)
            to_right = tl.dot((x * weight[None, :]).to(b.dtype), b, to_right, input_precision=PRECISION)
        if RIGHT:
            weight = decay(tl.load(SUM + right + row + rows, mask=seen, other=0.0))
            if not ADJOINT:
                weight *= tl.load(STEP + step_right + row + rows, mask=seen, other=0.0)
            to_left = tl.dot((x * weight[None, :]).to(b.dtype), b, to_left, input_precision=PRECISION)
    to = LOCAL + (pid * P + p[:, None]) * N + n[None, :]
    kept = in_p[:, None] & in_n[None, :]
    if LEFT:
        tl.store(to, to_right.to(LOCAL.dtype.element_ty), mask=kept)
    if RIGHT:
        tl.store(to + LEFT * plane, to_left.to(LOCAL.dtype.element_ty), mask=kept)


@triton.jit(do_not_specialize=OF_LENGTH)
def ssd_pass(
    LOCAL, CARRY, TOTAL, INITIAL, FINAL, FIRSTS, heads, chunks, size, blocks, plane, final_plane,
    total_left, total_right,
    LEFT: tl.constexpr, RIGHT: tl.constexpr, ADJOINT: tl.constexpr, HAS_INITIAL: tl.constexpr, PACKED: tl.constexpr,
    BLOCK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """The state that enters each chunk from its left and from its right, and the one that leaves the last.

    INITIAL and FINAL are in the order forward, reverse; an adjoint runs the other way, so its left one is the reverse.
    """
    pid = tl.program_id(0).to(tl.int64)
    block = pid % blocks
    head = (pid // blocks) % heads
    rest = pid // blocks // heads
    sequence = rest // (LEFT + RIGHT)
    index = rest % (LEFT + RIGHT)
    from_right = (index == 1) | (LEFT == 0)
    if PACKED:
        first = tl.load(FIRSTS + sequence)
        count = (tl.load(FIRSTS + sequence + 1) - first).to(tl.int32)
    else:
        first = sequence * chunks
        count = chunks
    i = block * BLOCK + tl.arange(0, BLOCK)
    seen = i < size
    totals = TOTAL + tl.where(from_right, total_right, total_left) + head
    place = LEFT + RIGHT - 1 - index if ADJOINT else index
    at_end = place * final_plane + (sequence * heads + head) * size + i
    state = tl.zeros([BLOCK], tl.float32)
    if HAS_INITIAL:
        state = tl.load(INITIAL + at_end, mask=seen, other=0.0).to(tl.float32)
    start = first + tl.where(from_right, count - 1, 0)
    stride = tl.where(from_right, -1, 1).to(tl.int64)
    for c in tl.range(0, count, num_stages=STAGES):
        chunk = start + c * stride
        at = index * plane + (chunk * heads + head) * size + i
        new = tl.load(LOCAL + at, mask=seen, other=0.0).to(tl.float32)
        total = tl.load(totals + chunk * heads)
        tl.store(CARRY + at, state.to(CARRY.dtype.element_ty), mask=seen)
        state = decay(total) * state + new
    tl.store(FINAL + at_end, state, mask=seen)


@triton.jit
def near_weights(
    left_rows, right_rows, left_columns, right_columns, r, k, LEFT: tl.constexpr, RIGHT: tl.constexpr
):
    """Decay between positions k (columns) and r (rows) of the same half, times the step size in one of the sums."""
    nothing: tl.constexpr = -float("inf")
    if LEFT:
        exponent = left_rows[:, None] - left_columns[None, :]
        other = right_columns[None, :] - right_rows[:, None] if RIGHT else nothing
        exponent = tl.where(r[:, None] >= k[None, :], exponent, other)
    else:
        exponent = tl.where(r[:, None] <= k[None, :], right_columns[None, :] - right_rows[:, None], nothing)
    return tl.exp2(exponent)


@triton.jit(do_not_specialize=OF_LENGTH)
def ssd_output(
    X, B, C, SUM, STEPPED, STEP, TOTAL, FAR, CARRY, D, Z, Y, SPANS, heads, per_group, length, chunks,
    x_batch, x_row: tl.constexpr, x_head, b_batch, b_row: tl.constexpr, b_group, c_batch, c_row: tl.constexpr,
    c_group, z_batch, z_row: tl.constexpr, z_head,
    left, right, step_left, step_right, total_right, plane,
    Q: tl.constexpr, HEADS: tl.constexpr, P: tl.constexpr, N: tl.constexpr, BP: tl.constexpr, BN: tl.constexpr,
    LEFT: tl.constexpr, RIGHT: tl.constexpr, ADJOINT: tl.constexpr,
    D_DIM: tl.constexpr, HAS_Z: tl.constexpr, PACKED: tl.constexpr, EVEN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """y of half a chunk and HEADS heads of one group, which share C B^T.

    Pairs within the half (near) take an exponential each. Pairs of the two halves (far) do not: the decay from one to
    the middle of the chunk times that from there to the other.
    """
    HALF: tl.constexpr = Q // 2
    BK: tl.constexpr = HALF // 2
    pid = tl.program_id(0).to(tl.int64)
    programs = heads // HEADS
    head = pid % programs * HEADS
    pid = pid // programs
    chunk = pid // 2
    late = (pid % 2).to(tl.int32)
    own = late * HALF
    batch, first, size = chunk_span(SPANS, chunk, chunks, length, Q, PACKED)
    if own >= size:
        return
    p = tl.arange(0, BP)
    in_p = below(p, P, BP == P)
    n = tl.arange(0, BN)
    in_n = below(n, N, BN == N)
    r = own + tl.arange(0, HALF)
    k0 = own + tl.arange(0, BK)
    k1 = own + BK + tl.arange(0, BK)
    k2 = HALF - own + tl.arange(0, BK)
    k3 = HALF - own + BK + tl.arange(0, BK)
    mine = below(r, size, EVEN)
    group = head // per_group
    b_at = B + batch * b_batch + first * b_row + group * b_group + n[:, None]
    c_at = C + batch * c_batch + first * c_row + group * c_group + n[None, :]
    c = tl.load(c_at + r[:, None] * c_row, mask=mine[:, None] & in_n[None, :], other=0.0)
    b = tl.load(b_at + k0[None, :] * b_row, mask=below(k0, size, EVEN)[None, :] & in_n[:, None], other=0.0)
    near0 = tl.dot(c, b, input_precision=PRECISION).to(c.dtype)
    b = tl.load(b_at + k1[None, :] * b_row, mask=below(k1, size, EVEN)[None, :] & in_n[:, None], other=0.0)
    near1 = tl.dot(c, b, input_precision=PRECISION).to(c.dtype)
    b = tl.load(b_at + k2[None, :] * b_row, mask=below(k2, size, EVEN)[None, :] & in_n[:, None], other=0.0)
    far0 = tl.dot(c, b, input_precision=PRECISION).to(c.dtype)
    b = tl.load(b_at + k3[None, :] * b_row, mask=below(k3, size, EVEN)[None, :] & in_n[:, None], other=0.0)
    far1 = tl.dot(c, b, input_precision=PRECISION).to(c.dtype)

    kept = mine[:, None] & in_p[None, :]
    state_kept = in_n[:, None] & in_p[None, :]
    if LEFT and RIGHT:  # position r sees itself once more
        b = tl.load(
            B + batch * b_batch + first * b_row + group * b_group + r[:, None] * b_row + n[None, :],
            mask=mine[:, None] & in_n[None, :], other=0.0,
        )  # fmt: skip
        itself = tl.sum(c.to(tl.float32) * b.to(tl.float32), 1)

    x_at = X + batch * x_batch + first * x_row + head * x_head
    z_at = batch * z_batch + first * z_row + head * z_head
    y_at = Y + (batch * length + first) * heads * P + head * P
    at = (batch * heads + head) * length + first
    chunk_head = chunk * heads + head
    sign = tl.where(late == 1, 1.0, -1.0)
    middle = tl.where(late == 1, HALF - 1, HALF)
    far_sums = SUM + tl.where(late == 1, left, right)
    seen_far = (middle < size) & (tl.where(late == 1, LEFT, RIGHT) == 1)
    for index in range(0, HEADS):
        x0 = tl.load(
            x_at + k0[:, None] * x_row + p[None, :],
            mask=below(k0, size, EVEN)[:, None] & in_p[None, :],
            other=0.0,
        )
        x1 = tl.load(
            x_at + k1[:, None] * x_row + p[None, :],
            mask=below(k1, size, EVEN)[:, None] & in_p[None, :],
            other=0.0,
        )
        x2 = tl.load(
            x_at + k2[:, None] * x_row + p[None, :],
            mask=below(k2, size, EVEN)[:, None] & in_p[None, :],
            other=0.0,
        )
        x3 = tl.load(
            x_at + k3[:, None] * x_row + p[None, :],
            mask=below(k3, size, EVEN)[:, None] & in_p[None, :],
            other=0.0,
        )
        state_at = CARRY + chunk_head * (P * N) + p[None, :] * N + n[:, None]
        # Infinities keep positions past the end out.
        columns = (SUM if ADJOINT else STEPPED) + at
        left0, left1, right0, right1 = 0.0, 0.0, 0.0, 0.0
        left_own, right_own = r * 0.0, r * 0.0
        if LEFT:
            left_own = tl.load(SUM + left + at + r, mask=mine, other=-float("inf"))
        if RIGHT:
            right_own = tl.load(SUM + right + at + r, mask=mine, other=float("inf"))
            total = tl.load(TOTAL + total_right + chunk_head)
        left_rows, right_rows = left_own, right_own
        if ADJOINT:
            if LEFT:
                left_rows = tl.load(STEPPED + left + at + r, mask=mine, other=-float("inf"))
                step_left_own = tl.load(STEP + step_left + at + r, mask=mine, other=0.0)
            if RIGHT:
                right_rows = tl.load(STEPPED + right + at + r, mask=mine, other=float("inf"))
        if RIGHT:
            step_right_own = tl.load(STEP + step_right + at + r, mask=mine, other=0.0)
        between = tl.load(far_sums + at + middle, mask=seen_far, other=0.0)
        acc = tl.zeros([HALF, BP], tl.float32)
        if LEFT:
            weight = decay(left_own)
            if ADJOINT:
                weight *= step_left_own
            state = tl.load(state_at, mask=state_kept, other=0.0)
            acc = tl.dot(c, state, input_precision=PRECISION) * weight[:, None]
        if RIGHT:
            weight = decay(total - right_own)
            if ADJOINT:
                weight *= step_right_own
            state = tl.load(state_at + LEFT * plane, mask=state_kept, other=0.0)
            acc += tl.dot(c, state, input_precision=PRECISION) * weight[:, None]
        if LEFT:
            left0 = tl.load(columns + left + k0, mask=below(k0, size, EVEN), other=float("inf"))
        if RIGHT:
            right0 = tl.load(columns + right + k0, mask=below(k0, size, EVEN), other=-float("inf"))
        weights = near_weights(left_rows, right_rows, left0, right0, r, k0, LEFT, RIGHT)
        acc = tl.dot(near0 * weights.to(x0.dtype), x0, acc, input_precision=PRECISION)
        if LEFT:
            left1 = tl.load(columns + left + k1, mask=below(k1, size, EVEN), other=float("inf"))
        if RIGHT:
            right1 = tl.load(columns + right + k1, mask=below(k1, size, EVEN), other=-float("inf"))
        weights = near_weights(left_rows, right_rows, left1, right1, r, k1, LEFT, RIGHT)
        acc = tl.dot(near1 * weights.to(x0.dtype), x1, acc, input_precision=PRECISION)
        here = decay(sign * (tl.where(late == 1, left_own, right_own) - between))
        if ADJOINT:
            if LEFT and RIGHT:
                here *= tl.where(late == 1, step_left_own, step_right_own)
            else:
                here *= step_left_own if LEFT else step_right_own
        there0 = tl.load(FAR + at + k2, mask=below(k2, size, EVEN), other=0.0)
        weights = (here[:, None] * there0[None, :]).to(x0.dtype)
        acc = tl.dot(far0 * weights, x2, acc, input_precision=PRECISION)
        there1 = tl.load(FAR + at + k3, mask=below(k3, size, EVEN), other=0.0)
        weights = (here[:, None] * there1[None, :]).to(x0.dtype)
        acc = tl.dot(far1 * weights, x3, acc, input_precision=PRECISION)
        if D_DIM > 0 or (LEFT and RIGHT):
            skip = tl.zeros([HALF, 1], tl.float32)
            if LEFT and RIGHT:
                skip += (itself * step_right_own)[:, None]
            if D_DIM == 1:
                skip += tl.load(D + head + index).to(tl.float32)
            if D_DIM == 2:
                skip += tl.load(D + (head + index) * P + p, mask=p < P, other=0.0).to(tl.float32)[None, :]
            x = tl.load(x_at + r[:, None] * x_row + p[None, :], mask=kept, other=0.0)
            acc += skip * x.to(tl.float32)
        if HAS_Z:
            z = tl.load(Z + z_at + r[:, None] * z_row + p[None, :], mask=kept, other=0.0).to(tl.float32)
            acc *= z / (1.0 + tl.exp2(-z * LOG2E))
        tl.store(y_at + r[:, None] * (heads * P) + p[None, :], acc.to(Y.dtype.element_ty), mask=kept)
        x_at += x_head
        z_at += z_head
        y_at += P
        at += length
        chunk_head += 1
