"""Triton kernels of the SSD scan's gradient that have no twin in the forward pass: pairs, B and C, step sizes.

With G_ij = dy_i . x_j, S_ij = C_i . B_j and W_ij the decay between i and j (1 on the diagonal), a pair of positions adds
G S W dt_j to the loss' derivative by the exponents between them, G S W to that by dt_j, and G W dt_j to what dC_i
multiplies B_j by. `ssd_pairs` makes these for all heads of a group, so that dB and dC (`ssd_keys`) each cost one matrix
product, and `ssd_step_gradient` gathers what reaches dt and A. All sums run in a fixed order.

Layouts as in ssd_triton_scan; `pairs` is (chunks of all sequences, groups, Q, Q).
"""

# mypy: disable-error-code="untyped-decorator, no-untyped-def"
# Functions of Triton's own language have no types.

from __future__ import annotations

import triton
import triton.language as tl

from genossm.kernels.ssd_triton_scan import LEAST_STEP, LOG2E, OF_LENGTH, below, chunk_span, decay


@triton.jit
def _added(a, b, c, d):
    return a + c, b + d


@triton.jit(do_not_specialize=OF_LENGTH)
def ssd_pairs(
    X, DY, B, C, SUM, STEPPED, STEP, PAIRS, ROWS, COLUMNS, DIAGONAL, SPANS, heads, groups, length, chunks,
    x_batch, x_row: tl.constexpr, x_head, g_batch, g_row: tl.constexpr, g_head, b_batch, b_row: tl.constexpr,
    b_group, c_batch, c_row: tl.constexpr, c_group, reverse, step_reverse, plane,
    Q: tl.constexpr, BT: tl.constexpr, P: tl.constexpr, N: tl.constexpr, BP: tl.constexpr, BN: tl.constexpr,
    FORWARD: tl.constexpr, REVERSE: tl.constexpr, ITSELF: tl.constexpr, PACKED: tl.constexpr, EVEN: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """BT outputs i (rows) against BT inputs j (columns), the same positions (ITSELF) or others, all heads of a group.

    T, the gradient of a pair's weight times that weight, is summed over j to ROWS (one plane for each block of columns)
    and over i to COLUMNS (one for each block of rows); pairs of a block with itself are forward there, and reverse in
    one more plane. The diagonal is in neither (it has no exponent, and large step sizes would leave its rounding errors
    there): DIAGONAL gets its gradient without, and with C B^T.
    """
    BLOCKS: tl.constexpr = Q // BT
    OTHERS: tl.constexpr = 1 if ITSELF else BLOCKS - 1
    pid = tl.program_id(0).to(tl.int64)
    zero = pid * 0  # an int64, for offsets of several planes
    block = (pid % (BLOCKS * OTHERS)).to(tl.int32)
    chunk_group = pid // (BLOCKS * OTHERS)
    chunk = chunk_group // groups
    group = chunk_group - chunk * groups
    batch, first, size = chunk_span(SPANS, chunk, chunks, length, Q, PACKED)
    of_rows = block // OTHERS
    of_columns = of_rows
    if ITSELF == 0:
        of_columns = block % OTHERS
        of_columns += (of_columns >= of_rows).to(tl.int32)
    i = of_rows * BT + tl.arange(0, BT)
    j = of_columns * BT + tl.arange(0, BT)
    if (of_rows * BT >= size) | (of_columns * BT >= size):
        return
    pairs_at = PAIRS + (chunk_group * Q + i[:, None]) * Q + j[None, :]
    from_left = of_rows > of_columns
    if ITSELF == 0:
        if ((FORWARD == 0) & from_left) | ((REVERSE == 0) & (of_rows < of_columns)):
            if of_rows * BT // (Q // 2) == of_columns * BT // (Q // 2):  # ssd_keys reads all of a half
                tl.store(pairs_at, tl.zeros([BT, BT], PAIRS.dtype.element_ty))
            return
    has_i = below(i, size, EVEN)
    has_j = below(j, size, EVEN)
    p = tl.arange(0, BP)
    in_p = below(p, P, BP == P)
    n = tl.arange(0, BN)
    in_n = below(n, N, BN == N)
    c_at = C + batch * c_batch + first * c_row + group * c_group
    b_at = B + batch * b_batch + first * b_row + group * b_group
    c = tl.load(c_at + i[:, None] * c_row + n[None, :], mask=has_i[:, None] & in_n[None, :], other=0.0)
    b = tl.load(b_at + j[None, :] * b_row + n[:, None], mask=has_j[None, :] & in_n[:, None], other=0.0)
    products = tl.dot(c, b, input_precision=PRECISION)
    per_group = heads // groups
    x_at = X + batch * x_batch + first * x_row + group * per_group * x_head
    g_at = DY + batch * g_batch + first * g_row + group * per_group * g_head
    at = (batch * heads + group * per_group) * length + first
    summed = tl.zeros([BT, BT], tl.float32)
    on_diagonal = i[:, None] == j[None, :]
    if ITSELF:
        products_itself = tl.sum(tl.where(on_diagonal, products, 0.0), 1)
        twice = tl.zeros([BT], tl.float32)
    sign = tl.where(from_left, 1.0, -1.0)
    towards = tl.where(from_left, 0, reverse)
    for _ in range(0, per_group):
        x = tl.load(x_at + j[None, :] * x_row + p[:, None], mask=has_j[None, :] & in_p[:, None], other=0.0)
        dy = tl.load(g_at + i[:, None] * g_row + p[None, :], mask=has_i[:, None] & in_p[None, :], other=0.0)
        gradient = tl.dot(dy, x, input_precision=PRECISION)
        if ITSELF == 0:
            there = tl.where(
                has_i, sign * tl.load(SUM + towards + at + i, mask=has_i, other=0.0), -float("inf")
            )
            here = tl.where(
                has_j, sign * tl.load(STEPPED + towards + at + j, mask=has_j, other=0.0), float("inf")
            )
            gradient *= tl.exp2(there[:, None] - here[None, :])
            summed += gradient
            weighted = gradient * products
            tl.store(ROWS + (zero + of_columns) * plane + at + i, tl.sum(weighted, 1), mask=has_i)
            tl.store(COLUMNS + (zero + of_rows) * plane + at + j, tl.sum(weighted, 0), mask=has_j)
        else:
            itself = tl.sum(tl.where(on_diagonal, gradient, 0.0), 1)
            tl.store(DIAGONAL + at + i, itself, mask=has_i)
            tl.store(DIAGONAL + plane + at + i, itself * products_itself, mask=has_i)
            not_before = i[:, None] >= j[None, :]
            if FORWARD:
                there = tl.load(SUM + at + i, mask=has_i, other=-float("inf"))
                here = tl.load(STEPPED + at + j, mask=has_j, other=float("inf"))
                exponent = there[:, None] - here[None, :]
            if REVERSE:
                there = tl.load(SUM + reverse + at + i, mask=has_i, other=float("inf"))
                here = tl.load(STEPPED + reverse + at + j, mask=has_j, other=-float("inf"))
                if FORWARD:
                    exponent = tl.where(not_before, exponent, here[None, :] - there[:, None])
                    twice += itself * tl.load(STEP + step_reverse + at + i, mask=has_i, other=0.0)
                else:
                    exponent = here[None, :] - there[:, None]
            gradient *= tl.exp2(exponent)
            if FORWARD + REVERSE == 1:
                gradient = tl.where(not_before if FORWARD else i[:, None] <= j[None, :], gradient, 0.0)
            summed += gradient
            weighted = gradient * products
            of_forward = tl.where(i[:, None] > j[None, :], weighted, 0.0)
            of_reverse = tl.where(not_before, 0.0, weighted)
            rows = ROWS + at + i
            columns = COLUMNS + at + j
            if FORWARD + REVERSE == 2:
                to_rows, to_rows_reverse = tl.reduce((of_forward, of_reverse), 1, _added)
                to_columns, to_columns_reverse = tl.reduce((of_forward, of_reverse), 0, _added)
                tl.store(rows + (zero + of_rows) * plane, to_rows, mask=has_i)
                tl.store(rows + (zero + BLOCKS) * plane, to_rows_reverse, mask=has_i)
                tl.store(columns + (zero + of_rows) * plane, to_columns, mask=has_j)
                tl.store(columns + (zero + BLOCKS) * plane, to_columns_reverse, mask=has_j)
            elif FORWARD:
                tl.store(rows + (zero + of_rows) * plane, tl.sum(of_forward, 1), mask=has_i)
                tl.store(columns + (zero + of_rows) * plane, tl.sum(of_forward, 0), mask=has_j)
            else:
                tl.store(rows + (zero + BLOCKS) * plane, tl.sum(of_reverse, 1), mask=has_i)
                tl.store(columns + (zero + BLOCKS) * plane, tl.sum(of_reverse, 0), mask=has_j)
        x_at += x_head
        g_at += g_head
        at += length
    if ITSELF:  # in both directions a position sees itself twice
        summed += tl.where(on_diagonal, twice[:, None], 0.0)
    tl.store(pairs_at, summed.to(PAIRS.dtype.element_ty))


@triton.jit(do_not_specialize=OF_LENGTH)
def ssd_keys(
    V, OWN, OTHER, SUM, STEP, TOTAL, PAIRS, STATES, ACROSS, GRADIENT, CARRIED, INNER, SPANS,
    heads, groups, length, chunks, totals,
    v_batch, v_row: tl.constexpr, v_head, own_batch, own_row: tl.constexpr, own_group, other_batch,
    other_row: tl.constexpr, other_group,
    left, right, step_left, step_right, total_left, total_right, plane, state_plane,
    Q: tl.constexpr, BT: tl.constexpr, P: tl.constexpr, N: tl.constexpr, BP: tl.constexpr, BN: tl.constexpr,
    LEFT: tl.constexpr, RIGHT: tl.constexpr, ADJOINT: tl.constexpr, PACKED: tl.constexpr, EVEN: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradient of OWN at BT positions: dC from V = dy, OTHER = B and the states; dB from x, C and the adjoints.

    CARRIED gets, for each position and head, dy . (carried-in part of y) in planes 0 (forward) and 1 (reverse), and
    x . (carried-in part of dx / dt) in 2 and 3; INNER each chunk's <state in, adjoint in>, forward then reverse.
    """
    BLOCKS: tl.constexpr = Q // BT
    # What the adjoint sees from its left is of the reverse direction.
    LEFT_PLANE: tl.constexpr = 3 if ADJOINT else 0
    RIGHT_PLANE: tl.constexpr = 2 if ADJOINT else 1
    pid = tl.program_id(0).to(tl.int64)
    zero = pid * 0  # an int64, for offsets of several planes
    block = (pid % BLOCKS).to(tl.int32)
    chunk_group = pid // BLOCKS
    chunk = chunk_group // groups
    group = chunk_group - chunk * groups
    batch, first, size = chunk_span(SPANS, chunk, chunks, length, Q, PACKED)
    own = block * BT
    if own >= size:
        return
    r = own + tl.arange(0, BT)
    mine = below(r, size, EVEN)
    p = tl.arange(0, BP)
    in_p = below(p, P, BP == P)
    n = tl.arange(0, BN)
    in_n = below(n, N, BN == N)
    kept_n = mine[:, None] & in_n[None, :]
    kept_p = mine[:, None] & in_p[None, :]
    own_at = OWN + batch * own_batch + first * own_row + group * own_group
    other_at = OTHER + batch * other_batch + first * other_row + group * other_group
    pairs_at = PAIRS + chunk_group * Q * Q
    gradient = tl.zeros([BT, BN], tl.float32)
    # Pairs of the two halves are there for the directions that are run only.
    half = own // (Q // 2) * (Q // 2)
    for k0 in range(0 if LEFT else half, size if RIGHT else tl.minimum(half + Q // 2, size), BT):
        k = k0 + tl.arange(0, BT)
        if ADJOINT:
            written = below(k, size, EVEN)[None, :] & mine[:, None]
            pairs = tl.load(pairs_at + k[None, :] * Q + r[:, None], mask=written, other=0.0)
        else:
            written = below(k, size, EVEN)[None, :] & mine[:, None]
            pairs = tl.load(pairs_at + r[:, None] * Q + k[None, :], mask=written, other=0.0)
        seen = below(k, size, EVEN)[:, None] & in_n[None, :]
        other = tl.load(other_at + k[:, None] * other_row + n[None, :], mask=seen, other=0.0)
        gradient = tl.dot(pairs, other, gradient, input_precision=PRECISION)

    keys = tl.load(own_at + r[:, None] * own_row + n[None, :], mask=kept_n, other=0.0)
    per_group = heads // groups
    head = group * per_group
    v_at = V + batch * v_batch + first * v_row + head * v_head
    at = (batch * heads + head) * length + first
    chunk_head = chunk * heads + head
    kept = in_p[:, None] & in_n[None, :]
    for _ in range(0, per_group):
        v = tl.load(v_at + r[:, None] * v_row + p[None, :], mask=kept_p, other=0.0)
        state_at = chunk_head * (P * N) + p[:, None] * N + n[None, :]
        # What is loaded by position comes first, so that it arrives while the states are multiplied.
        if LEFT:
            left_weight = decay(tl.load(SUM + left + at + r, mask=mine, other=0.0))
            if ADJOINT:
                left_step = tl.load(STEP + step_left + at + r, mask=mine, other=0.0)
        if RIGHT:
            total = tl.load(TOTAL + total_right + chunk_head)
            right_weight = decay(total - tl.load(SUM + right + at + r, mask=mine, other=0.0))
            if ADJOINT:
                right_step = tl.load(STEP + step_right + at + r, mask=mine, other=0.0)
        if LEFT:
            state = tl.load(STATES + state_at, mask=kept, other=0.0)
            product = tl.dot(v, state, input_precision=PRECISION) * left_weight[:, None]
            tl.store(CARRIED + (zero + LEFT_PLANE) * plane + at + r, tl.sum(product * keys, 1), mask=mine)
            gradient += product * left_step[:, None] if ADJOINT else product
            if ADJOINT:
                if own == 0:
                    across = tl.load(ACROSS + RIGHT * state_plane + state_at, mask=kept, other=0.0)
                    inner = tl.sum(tl.sum(across.to(tl.float32) * state.to(tl.float32), 1), 0)
                    tl.store(INNER + totals + chunk_head, inner)
        if RIGHT:
            state = tl.load(STATES + LEFT * state_plane + state_at, mask=kept, other=0.0)
            product = tl.dot(v, state, input_precision=PRECISION) * right_weight[:, None]
            tl.store(CARRIED + (zero + RIGHT_PLANE) * plane + at + r, tl.sum(product * keys, 1), mask=mine)
            gradient += product * right_step[:, None] if ADJOINT else product
            if ADJOINT:
                if own == 0:
                    across = tl.load(ACROSS + state_at, mask=kept, other=0.0)
                    inner = tl.sum(tl.sum(across.to(tl.float32) * state.to(tl.float32), 1), 0)
                    tl.store(INNER + chunk_head, inner)
        v_at += v_head
        at += length
        chunk_head += 1
    to = ((batch * length + first + r[:, None]) * groups + group) * N + n[None, :]
    tl.store(GRADIENT + to, gradient.to(GRADIENT.dtype.element_ty), mask=kept_n)


@triton.jit(do_not_specialize=OF_LENGTH)
def ssd_step_gradient(
    DT, BIAS, A, STEP, TOTAL, ROWS, COLUMNS, DIAGONAL, CARRIED, INNER, DDT, DBIAS, DA, SPANS,
    heads, length, chunks, plane, totals,
    dt_batch, dt_row, dt_head, dt_direction, bias_head, bias_direction, a_head, a_direction,
    Q: tl.constexpr, BLOCKS: tl.constexpr, FORWARD: tl.constexpr, REVERSE: tl.constexpr, SEPARATE_STEP: tl.constexpr,
    SEPARATE_DT: tl.constexpr, HAS_BIAS: tl.constexpr, SOFTPLUS: tl.constexpr, PACKED: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """Gradient of dt of one chunk and head, and the chunk's part of that of the bias and of A, for each direction."""
    pid = tl.program_id(0).to(tl.int64)
    chunk = pid // heads
    head = pid - chunk * heads
    batch, first, size = chunk_span(SPANS, chunk, chunks, length, Q, PACKED)
    q = tl.arange(0, Q)
    own = q // (Q // BLOCKS)
    seen = below(q, size, EVEN)
    row = (batch * heads + head) * length + first + q
    zero = pid * 0  # an int64, for offsets of several planes
    diagonal = tl.load(DIAGONAL + plane + row, mask=seen, other=0.0)
    ddt = tl.zeros([Q], tl.float32)
    for direction in tl.static_range(1 - FORWARD, 1 + REVERSE):
        index = direction - (1 - FORWARD)
        step = tl.load(STEP + index * SEPARATE_STEP * plane + row, mask=seen, other=0.0)
        rows = tl.zeros([Q], tl.float32)
        weighted = tl.zeros([Q], tl.float32)
        for block in tl.static_range(BLOCKS):
            # Forward: rows from blocks up to their own, columns from their own on. One past the end wrote nothing.
            written = seen & (block * (Q // BLOCKS) < size)
            of_rows = (own >= block) if direction == 0 else (own < block)
            of_columns = (own <= block) if direction == 0 else (own > block)
            rows += tl.load(ROWS + (zero + block) * plane + row, mask=written & of_rows, other=0.0)
            weighted += tl.load(COLUMNS + (zero + block) * plane + row, mask=written & of_columns, other=0.0)
        if direction == 1:
            rows += tl.load(ROWS + (zero + BLOCKS) * plane + row, mask=seen, other=0.0)
            weighted += tl.load(COLUMNS + (zero + BLOCKS) * plane + row, mask=seen, other=0.0)
        columns = weighted / tl.maximum(step, LEAST_STEP)
        out = tl.load(CARRIED + direction * plane + row, mask=seen, other=0.0)
        into = tl.load(CARRIED + (zero + 2 + direction) * plane + row, mask=seen, other=0.0)
        total = tl.load(TOTAL + index * totals + pid)
        across = tl.load(INNER + direction * totals + pid) * decay(total)
        carried = step * into
        inside = rows - weighted
        if direction == 0:
            exponent = tl.cumsum(inside + out, 0, reverse=True) + tl.cumsum(carried, 0) - carried + across
        else:
            later = carried - inside
            exponent = tl.cumsum(later, 0, reverse=True) - later + tl.cumsum(out, 0) + across
        a = tl.load(A + head * a_head + direction * a_direction).to(tl.float32)
        gradient = columns + diagonal + into + a * exponent
        tl.store(DA + index * totals + pid, tl.sum(tl.where(seen, step * exponent, 0.0), 0))
        if SOFTPLUS:
            at = DT + batch * dt_batch + head * dt_head + direction * dt_direction
            raw = tl.load(at + (first + q) * dt_row, mask=seen, other=0.0).to(tl.float32)
            if HAS_BIAS:
                raw += tl.load(BIAS + head * bias_head + direction * bias_direction).to(tl.float32)
            gradient *= 1.0 / (1.0 + tl.exp2(-raw * LOG2E))
        gradient = tl.where(seen, gradient, 0.0)
        if HAS_BIAS:
            tl.store(DBIAS + index * totals + pid, tl.sum(gradient, 0))
        if SEPARATE_DT:
            to = DDT + ((batch * length + first + q) * heads + head) * 2 + direction
            tl.store(to, gradient.to(DDT.dtype.element_ty), mask=seen)
        else:
            ddt += gradient
    if SEPARATE_DT == 0:
        to = DDT + (batch * length + first + q) * heads + head
        tl.store(to, ddt.to(DDT.dtype.element_ty), mask=seen)


@triton.jit(do_not_specialize=OF_LENGTH)
def ssd_skip_gradient(
    X, DY, PARTS, SPANS, heads, length, chunks, x_batch, x_row: tl.constexpr, x_head, g_batch, g_row: tl.constexpr,
    g_head,
    Q: tl.constexpr, BK: tl.constexpr, P: tl.constexpr, BP: tl.constexpr, PACKED: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """Each chunk's part of the gradient of D, for every element of head_dim."""
    pid = tl.program_id(0).to(tl.int64)
    chunk = pid // heads
    head = pid - chunk * heads
    batch, first, size = chunk_span(SPANS, chunk, chunks, length, Q, PACKED)
    p = tl.arange(0, BP)
    in_p = below(p, P, BP == P)
    acc = tl.zeros([BP], tl.float32)
    for k0 in range(0, size, BK):
        k = k0 + tl.arange(0, BK)
        kept = below(k, size, EVEN)[:, None] & in_p[None, :]
        x_at = X + batch * x_batch + head * x_head + (first + k)[:, None] * x_row + p[None, :]
        g_at = DY + batch * g_batch + head * g_head + (first + k)[:, None] * g_row + p[None, :]
        x = tl.load(x_at, mask=kept, other=0.0).to(tl.float32)
        acc += tl.sum(x * tl.load(g_at, mask=kept, other=0.0).to(tl.float32), 0)
    tl.store(PARTS + pid * P + p, acc, mask=p < P)
