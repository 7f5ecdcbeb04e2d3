"""The short convolution's Triton kernels: every filter of a position, of both directions, from one load of x.

A program owns a block of channels and a span of windows, and slides down the sequence with width rows in registers.
Window p holds rows p - width + 1 to p; the causal filter makes y_p of it, the centred y_{p - width // 2} and the
reverse y_{p - width + 1}, so both directions are two filters on one window. For the gradient the same window yields
the pre-activations again, and scatters du to the width rows of dx that it touched, kept in registers until complete.
Sums over positions are written once a program and added up in a fixed order.

Names ending in _2 belong to the second filter (reverse, of padding 3, both), the others to the only or causal one.
Paddings: 0 causal, 1 reverse, 2 centred, 3 both. Activations: 0 none, 1 SiLU, 2 SiLU with inline PTX.
"""
# mypy: ignore-errors
# ruff: noqa: RUF005
# Functions of Triton's own language: it has no types, and tuples grow by addition only.

from __future__ import annotations

import triton
import triton.language as tl

from genossm.kernels.triton_support import sigmoid


@triton.jit
def load_rows(x, stride, first, lowest, highest, right, end, width_row, channel, present,
              HAS_RIGHT: tl.constexpr, COUNT: tl.constexpr):  # fmt: skip
    """COUNT rows from x on, whose place in the span is first and following, as a tuple in float32.

    Rows outside lowest to highest are zeros; those from end on stand at right, where there is such.
    """
    rows = ()
    for i in tl.static_range(COUNT):
        base = x + i * stride
        row = first + i
        if HAS_RIGHT:
            base = tl.where(row >= end, right + (row - end) * width_row, base)
        inside = present & (row >= lowest) & (row < highest)
        rows = rows + (tl.load(base + channel, mask=inside, other=0.0).to(tl.float32),)
    return rows


@triton.jit
def load_inside(dy, stride, first, lowest, end, channel, present, COUNT: tl.constexpr):
    """COUNT rows from dy on, as a tuple in float32, zeros outside lowest to end."""
    rows = ()
    for i in tl.static_range(COUNT):
        inside = present & (first + i >= lowest) & (first + i < end)
        rows = rows + (tl.load(dy + i * stride + channel, mask=inside, other=0.0).to(tl.float32),)
    return rows


@triton.jit
def load_filter(
    weight, bias, channel, present, WIDTH: tl.constexpr, FLIPPED: tl.constexpr, HAS_BIAS: tl.constexpr
):
    """A filter in float32: its factor for each row of a window, and its bias."""
    filter = ()
    for j in tl.static_range(WIDTH):
        tap = WIDTH - 1 - j if FLIPPED else j
        filter = filter + (tl.load(weight + channel * WIDTH + tap, mask=present, other=0.0).to(tl.float32),)
    if HAS_BIAS:
        filter = filter + (tl.load(bias + channel, mask=present, other=0.0).to(tl.float32),)
    else:
        filter = filter + (tl.zeros(channel.shape, tl.float32),)
    return filter


@triton.jit
def apply_filter(rows, filter, FIRST: tl.constexpr, WIDTH: tl.constexpr):
    """The filter's bias plus the rows FIRST to FIRST + WIDTH, each times its factor."""
    total = filter[WIDTH]
    for j in tl.static_range(WIDTH):
        total += rows[FIRST + j] * filter[j]
    return total


@triton.jit
def store_output(y, row, lowest, highest, channel, present, value, ACTIVATION: tl.constexpr):
    """One row of an output, where it is one."""
    if ACTIVATION > 0:
        value = value * sigmoid(value, ACTIVATION == 2)
    mask = present & (row >= lowest) & (row < highest)
    tl.store(y + channel, value.to(y.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["batch", "length", "span", "spans", "grouped"])
def short_conv_forward_kernel(
    x, left, right, weight, bias, y_first, y_second,
    batch, length, channels, span, spans, grouped, x_batch, x_row, weight_filter, bias_filter,
    PADDING: tl.constexpr, WIDTH: tl.constexpr, HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr,
    HAS_BIAS: tl.constexpr, ACTIVATION: tl.constexpr, GROUPED: tl.constexpr, BLOCK: tl.constexpr,
    UNROLL: tl.constexpr,
):  # fmt: skip
    """y of a span of windows; x (batch, length, channels) with any strides but 1 for channels."""
    TAIL: tl.constexpr = WIDTH - 1
    SHIFT: tl.constexpr = TAIL if PADDING == 1 else (WIDTH // 2 if PADDING == 2 else 0)
    program = tl.program_id(0)
    blocks = tl.cdiv(channels, BLOCK)
    channel = (program % blocks) * BLOCK + tl.arange(0, BLOCK)
    present = channel < channels
    start = (program // blocks % spans).to(tl.int64) * span
    first_sequence = (program // blocks // spans).to(tl.int64) * grouped
    stride = tl.cast(x_row, tl.int64)
    wide = tl.cast(channels, tl.int64)
    # places within the span, from here on: where the sequence ends, and where its rows begin and end
    end = tl.minimum(length - start, span + TAIL).to(tl.int32)
    lowest = tl.maximum(-start, -TAIL).to(tl.int32)
    highest = end + TAIL if HAS_RIGHT else end

    filter = load_filter(weight, bias, channel, present, WIDTH, PADDING == 1, HAS_BIAS)
    if PADDING == 3:
        weight_2, bias_2 = weight + weight_filter, bias + bias_filter
        filter_2 = load_filter(weight_2, bias_2, channel, present, WIDTH, True, HAS_BIAS)

    count = 1
    if GROUPED:
        count = tl.minimum(grouped, batch - first_sequence).to(tl.int32)
    for member in range(0, count):
        sequence = first_sequence + member
        x_at = x + sequence * x_batch + start * stride
        right_at = right + sequence * TAIL * wide
        y_at = y_first + (sequence * length + start - SHIFT) * wide
        y_at_2 = y_second + (sequence * length + start - TAIL) * wide
        history = load_rows(
            x_at - TAIL * stride, stride, -TAIL, lowest, highest, right_at, end, wide, channel, present,
            HAS_RIGHT, TAIL,
        )  # fmt: skip
        if HAS_LEFT:
            if start == 0:
                left_at = left + sequence * TAIL * wide
                history = load_inside(left_at, wide, 0, 0, TAIL, channel, present, TAIL)
        for window in range(0, span, UNROLL):
            rows = history + load_rows(
                x_at, stride, window, lowest, highest, right_at, end, wide, channel, present, HAS_RIGHT, UNROLL
            )  # fmt: skip
            for i in tl.static_range(UNROLL):
                place = window + i - SHIFT
                u = apply_filter(rows, filter, i, WIDTH)
                store_output(y_at + i * wide, place, lowest, end, channel, present, u, ACTIVATION)
                if PADDING == 3:
                    u = apply_filter(rows, filter_2, i, WIDTH)
                    store_output(
                        y_at_2 + i * wide, place - TAIL, lowest, end, channel, present, u, ACTIVATION
                    )
            history = rows[UNROLL:]
            x_at += UNROLL * stride
            y_at += UNROLL * wide
            y_at_2 += UNROLL * wide


@triton.jit
def scatter(rows, filter, dy, dx, dfilter, FIRST: tl.constexpr, WIDTH: tl.constexpr, ACTIVATION: tl.constexpr,
            COUNTED: tl.constexpr):  # fmt: skip
    """dx of the rows of one window, and the filter's own gradient where COUNTED, after its output's gradient dy."""
    du = dy
    if ACTIVATION > 0:
        u = apply_filter(rows, filter, FIRST, WIDTH)
        s = sigmoid(u, ACTIVATION == 2)
        y = u * s
        du = dy * (s + (y - y * s))
    dx_new = ()
    for j in tl.static_range(WIDTH):
        dx_new = dx_new + (dx[j] + du * filter[j],)
    dfilter_new = dfilter
    if COUNTED:
        dfilter_new = ()
        for j in tl.static_range(WIDTH):
            dfilter_new = dfilter_new + (dfilter[j] + du * rows[FIRST + j],)
        dfilter_new = dfilter_new + (dfilter[WIDTH] + du,)
    return dx_new, dfilter_new


@triton.jit
def store_dx(dx, dleft, dright, row, lowest, end, width_row, channel, present, value,
             HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr, TAIL: tl.constexpr):  # fmt: skip
    """One complete row of dx; beyond the ends it belongs to a state."""
    base = dx
    highest = end
    if HAS_LEFT:
        base = tl.where(row < 0, dleft + (row + TAIL) * width_row, base)
    if HAS_RIGHT:
        base = tl.where(row >= end, dright + (row - end) * width_row, base)
        highest = end + TAIL
    tl.store(base + channel, value.to(dx.dtype.element_ty), mask=present & (row >= lowest) & (row < highest))


@triton.jit(do_not_specialize=["batch", "length", "span", "spans", "grouped"])
def short_conv_backward_kernel(
    x, left, right, weight, bias, dy_first, dy_second, dx, dleft, dright, sums,
    batch, length, channels, span, spans, grouped, x_batch, x_row, weight_filter, bias_filter,
    first_batch, first_row, second_batch, second_row,
    PADDING: tl.constexpr, WIDTH: tl.constexpr, HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr,
    HAS_BIAS: tl.constexpr, ACTIVATION: tl.constexpr, GROUPED: tl.constexpr, BLOCK: tl.constexpr,
    UNROLL: tl.constexpr,
):  # fmt: skip
    """dx of a span, and its sums (filters, width + 1, channels) for dweight, by row of the window, and dbias."""
    TAIL: tl.constexpr = WIDTH - 1
    SHIFT: tl.constexpr = TAIL if PADDING == 1 else (WIDTH // 2 if PADDING == 2 else 0)
    ENTRIES: tl.constexpr = 2 * (WIDTH + 1) if PADDING == 3 else WIDTH + 1
    program = tl.program_id(0)
    blocks = tl.cdiv(channels, BLOCK)
    channel = (program % blocks) * BLOCK + tl.arange(0, BLOCK)
    present = channel < channels
    start = (program // blocks % spans).to(tl.int64) * span
    first_sequence = (program // blocks // spans).to(tl.int64) * grouped
    stride = tl.cast(x_row, tl.int64)
    stride_dy = tl.cast(first_row, tl.int64)
    stride_dy_2 = tl.cast(second_row, tl.int64)
    wide = tl.cast(channels, tl.int64)
    end = tl.minimum(length - start, span + 2 * TAIL).to(tl.int32)
    lowest = tl.maximum(-start, -TAIL).to(tl.int32)
    highest = end + TAIL if HAS_RIGHT else end
    # a row before the span is finished by the program before it; before the first row there is only the state
    lowest_dx = 0
    if HAS_LEFT:
        lowest_dx = tl.where(start == 0, -TAIL, 0)

    zero = tl.zeros((BLOCK,), tl.float32)
    filter = load_filter(weight, bias, channel, present, WIDTH, PADDING == 1, HAS_BIAS)
    dfilter = (zero,) * (WIDTH + 1)
    if PADDING == 3:
        weight_2, bias_2 = weight + weight_filter, bias + bias_filter
        filter_2 = load_filter(weight_2, bias_2, channel, present, WIDTH, True, HAS_BIAS)
        dfilter_2 = (zero,) * (WIDTH + 1)

    count = 1
    if GROUPED:
        count = tl.minimum(grouped, batch - first_sequence).to(tl.int32)
    for member in range(0, count):
        sequence = first_sequence + member
        x_at = x + sequence * x_batch + start * stride
        dy_at = dy_first + sequence * first_batch + (start - SHIFT) * stride_dy
        dy_at_2 = dy_second + sequence * second_batch + (start - TAIL) * stride_dy_2
        dx_at = dx + (sequence * length + start - TAIL) * wide
        right_at = right + sequence * TAIL * wide
        dleft_at = dleft + sequence * TAIL * wide
        dright_at = dright + sequence * TAIL * wide
        history = load_rows(
            x_at - TAIL * stride, stride, -TAIL, lowest, highest, right_at, end, wide, channel, present,
            HAS_RIGHT, TAIL,
        )  # fmt: skip
        if HAS_LEFT:
            if start == 0:
                left_at = left + sequence * TAIL * wide
                history = load_inside(left_at, wide, 0, 0, TAIL, channel, present, TAIL)
        pending = (zero,) * TAIL
        for window in range(0, span, UNROLL):
            rows = history + load_rows(
                x_at, stride, window, lowest, highest, right_at, end, wide, channel, present, HAS_RIGHT, UNROLL
            )  # fmt: skip
            dy = load_inside(dy_at, stride_dy, window - SHIFT, lowest, end, channel, present, UNROLL)
            if PADDING == 3:
                dy_2 = load_inside(dy_at_2, stride_dy_2, window - TAIL, lowest, end, channel, present, UNROLL)
            for i in tl.static_range(UNROLL):
                touched = pending + (zero,)
                touched, dfilter = scatter(rows, filter, dy[i], touched, dfilter, i, WIDTH, ACTIVATION, True)
                if PADDING == 3:
                    touched, dfilter_2 = scatter(
                        rows, filter_2, dy_2[i], touched, dfilter_2, i, WIDTH, ACTIVATION, True
                    )
                store_dx(
                    dx_at + i * wide, dleft_at, dright_at, window + i - TAIL, lowest_dx, end, wide, channel, present,
                    touched[0], HAS_LEFT, HAS_RIGHT, TAIL,
                )  # fmt: skip
                pending = touched[1:]
            history = rows[UNROLL:]
            x_at += UNROLL * stride
            dy_at += UNROLL * stride_dy
            dy_at_2 += UNROLL * stride_dy_2
            dx_at += UNROLL * wide

        # windows after the span reach back into its last rows
        if TAIL > 0:
            rows = history + load_rows(
                x_at, stride, span, lowest, highest, right_at, end, wide, channel, present, HAS_RIGHT, TAIL
            )
            dy = load_inside(dy_at, stride_dy, span - SHIFT, lowest, end, channel, present, TAIL)
            if PADDING == 3:
                dy_2 = load_inside(dy_at_2, stride_dy_2, span - TAIL, lowest, end, channel, present, TAIL)
            for i in tl.static_range(TAIL):
                touched = pending + (zero,)
                touched, dfilter = scatter(rows, filter, dy[i], touched, dfilter, i, WIDTH, ACTIVATION, False)
                if PADDING == 3:
                    touched, dfilter_2 = scatter(
                        rows, filter_2, dy_2[i], touched, dfilter_2, i, WIDTH, ACTIVATION, False
                    )
                store_dx(
                    dx_at + i * wide, dleft_at, dright_at, span + i - TAIL, lowest_dx, end, wide, channel, present,
                    touched[0], HAS_LEFT, HAS_RIGHT, TAIL,
                )  # fmt: skip
                pending = touched[1:]

    sums += (program // blocks).to(tl.int64) * ENTRIES * wide
    for j in tl.static_range(WIDTH + 1):
        tl.store(sums + j * wide + channel, dfilter[j], mask=present)
        if PADDING == 3:
            tl.store(sums + (WIDTH + 1 + j) * wide + channel, dfilter_2[j], mask=present)


@triton.jit
def column_sum(sums, entry, count, channels, channel, present, ENTRIES: tl.constexpr, ROWS: tl.constexpr,
               BLOCK: tl.constexpr):  # fmt: skip
    """The sum of one entry over the programs, always in the same order."""
    total = tl.zeros((ROWS, BLOCK), tl.float32)
    row = tl.arange(0, ROWS)
    for first in range(0, count, ROWS):
        offset = ((first + row).to(tl.int64) * ENTRIES + entry) * channels
        mask = (first + row < count)[:, None] & present[None, :]
        total += tl.load(sums + offset[:, None] + channel[None, :], mask=mask, other=0.0)
    return tl.sum(total, 0)


@triton.jit(do_not_specialize=["count"])
def short_conv_reduce_kernel(
    sums, dweight, dbias, count, channels,
    PADDING: tl.constexpr, WIDTH: tl.constexpr, ONE_WEIGHT: tl.constexpr, ONE_BIAS: tl.constexpr,
    HAS_BIAS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """dweight (filters, channels, width) and dbias (filters, channels) from the sums of all programs."""
    ENTRIES: tl.constexpr = 2 * (WIDTH + 1) if PADDING == 3 else WIDTH + 1
    channel = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    present = channel < channels
    entry = tl.program_id(1)
    number = entry // (WIDTH + 1)
    tap = entry % (WIDTH + 1)
    # the entry of the reverse filter's factor for the same tap, which is at the mirrored row of the window
    mirrored = 2 * WIDTH - tap
    if tap < WIDTH:
        total = column_sum(sums, entry, count, channels, channel, present, ENTRIES, ROWS, BLOCK)
        wanted = present
        place = tap
        if PADDING == 1:
            place = WIDTH - 1 - tap
        if PADDING == 3:
            if ONE_WEIGHT:
                total += column_sum(sums, mirrored, count, channels, channel, present, ENTRIES, ROWS, BLOCK)
                wanted = present & (number == 0)
            else:
                place = tl.where(number == 1, WIDTH - 1 - tap, tap)
        place += (number * channels + channel) * WIDTH
        tl.store(dweight + place, total.to(dweight.dtype.element_ty), mask=wanted)
    elif HAS_BIAS:
        total = column_sum(sums, entry, count, channels, channel, present, ENTRIES, ROWS, BLOCK)
        wanted = present
        if PADDING == 3 and ONE_BIAS:
            total += column_sum(sums, ENTRIES - 1, count, channels, channel, present, ENTRIES, ROWS, BLOCK)
            wanted = present & (number == 0)
        tl.store(dbias + number * channels + channel, total.to(dbias.dtype.element_ty), mask=wanted)
