"""The losses as epilogues of one matrix product, in Triton: one program makes one tile.

b rows (images) on this rank, N columns (captions) on all ranks, c columns in a strip, d embedding.
A program computes a tile of similarities s = I T^T in registers, makes -inf of what is no
candidate, and writes what a loss takes of it: a number a row and a column, or the gradient.

Every tile writes its own partial results, (c / width, b) of rows and (b / height, c) of columns.
The host joins them in the order of the tiles. No program adds to what another one writes, so the
bits are the same at every run.

Row i's own pair is column `offset + i` of the global batch; a strip begins with column `start`.
A softmax's similarities are logits in bits (to base 2).
"""

import triton
import triton.language as tl

LOW = tl.constexpr(-1e30)  # no logit is as low, and 2^(LOW - LOW) is 1
FAR = tl.constexpr(64.0)  # bits that powers may differ by without one of them vanishing
FAINT = tl.constexpr(2.0**-64)  # a sum of powers above it has lost no digit
NOWHERE = tl.constexpr(2147483647)
LOG2_E = tl.constexpr(1.4426950408889634)
SOFTMAX, SIGMOID, HINGES = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)
NONE, MASK, POSITIVE = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)  # duplicates
GROUP = tl.constexpr(8)  # tiles of rows that follow each other: L2 then holds them

# A ragged batch compiles nothing again.
VARYING = ("rows", "columns", "total", "offset", "start")
UNALIGNED = ("row_level", "column_level", "row_weight", "column_weight")


# More than eight parameters: a kernel gets pointers and numbers, nothing that holds them.
@triton.jit
def _tile(
    images, captions, codes, marks, rows, columns, total, d, offset, start,
    duplicates: tl.constexpr, kinds: tl.constexpr, precision: tl.constexpr,
    height: tl.constexpr, width: tl.constexpr, depth: tl.constexpr,
):  # fmt: skip
    """Return a tile's similarities, its place (m, n), its rows i, columns j and its mark."""
    tall, wide = tl.cdiv(rows, height), tl.cdiv(columns, width)
    program = tl.program_id(0)
    first = program // (GROUP * wide) * GROUP
    together = tl.minimum(tall - first, GROUP)
    m, n = first + program % (GROUP * wide) % together, program % (GROUP * wide) // together
    i, j = m * height + tl.arange(0, height), n * width + tl.arange(0, width)

    # Past the end the first rows are read again: only the end of d needs a mask.
    left = images + (i % rows).to(tl.int64)[:, None] * d
    right = captions + (j % columns).to(tl.int64)[:, None] * d
    s = tl.zeros((height, width), dtype=tl.float32)
    for k in range(0, d, depth):
        at = (k + tl.arange(0, depth))[None, :]
        x = tl.load(left + at, mask=at < d, other=0.0)
        y = tl.load(right + at, mask=at < d, other=0.0)
        s = tl.dot(x, y.T, s, input_precision=precision)

    # Nearly all tiles lie within the edges, off the own pairs and hold no duplicate.
    marked = False
    if kinds > 0:
        marked = tl.load(marks + m * wide + n) != 0
    own = offset - start  # row i's own pair is the strip's column own + i
    edge = (m * height + height > rows) | (n * width + width > columns)
    diagonal = (m * height + height + own > n * width) & (m * height + own < n * width + width)
    if edge | diagonal:
        s = tl.where((i < rows)[:, None] & (j < columns)[None, :], s, float("-inf"))
        s = tl.where((i + own)[:, None] == j[None, :], float("-inf"), s)
    if duplicates == MASK:
        if marked:
            s = _without_duplicates(s, i, j, codes, rows, columns, total, offset, start, kinds)
    return s, m, n, i, j, marked


# More than eight parameters: a kernel gets pointers and numbers, nothing that holds them.
@triton.jit
def _without_duplicates(
    s, i, j, codes, rows, columns, total, offset, start, kinds: tl.constexpr
):  # fmt: skip
    """Return similarities, -inf where a row and a column share the code of any kind."""
    for kind in tl.static_range(kinds):
        of_rows = tl.load(codes + kind * total + offset + i, mask=i < rows, other=-1)
        of_columns = tl.load(codes + kind * total + start + j, mask=j < columns, other=-2)
        s = tl.where(of_rows[:, None] == of_columns[None, :], float("-inf"), s)
    return s


# More than eight parameters: a kernel gets pointers and numbers, nothing that holds them.
@triton.jit(do_not_specialize=VARYING)
def softmax_sums(
    images, captions, codes, marks, row_max, row_sum, largest, column_max, column_sum,
    rows, columns, total, d, offset, start,
    duplicates: tl.constexpr, kinds: tl.constexpr, precision: tl.constexpr,
    height: tl.constexpr, width: tl.constexpr, depth: tl.constexpr,
):  # fmt: skip
    """Write r_i = max_j s_ij with sum_j 2^(s_ij - r_i), and the same of columns.

    `largest` is the maximum of negatives alone.
    """
    s, m, n, i, j, marked = _tile(
        images, captions, codes, marks, rows, columns, total, d, offset, start,
        duplicates, kinds, precision, height, width, depth,
    )  # fmt: skip
    r = tl.maximum(tl.max(s, 1), LOW)
    top = tl.max(r, 0)
    # One power serves row and column as long as all are near the tile's maximum. A maximum of
    # each column lies across the threads and is dear.
    p = tl.exp2(s - top)
    of_rows, of_columns = tl.sum(p, 1), tl.sum(p, 0)
    c = tl.zeros((width,), dtype=tl.float32) + top
    if tl.minimum(tl.min(of_rows, 0), tl.min(of_columns, 0)) > FAINT:
        of_rows *= tl.exp2(top - r)
    else:
        c = tl.maximum(tl.max(s, 0), LOW)
        of_rows = tl.sum(tl.exp2(s - r[:, None]), 1)
        of_columns = tl.sum(tl.exp2(s - c[None, :]), 0)
    tl.store(row_max + n * rows + i, r, mask=i < rows)
    tl.store(row_sum + n * rows + i, of_rows, mask=i < rows)
    tl.store(column_max + m * columns + j, c, mask=j < columns)
    tl.store(column_sum + m * columns + j, of_columns, mask=j < columns)
    if duplicates == POSITIVE:
        if marked:
            s = _without_duplicates(s, i, j, codes, rows, columns, total, offset, start, kinds)
            r = tl.max(s, 1)
        tl.store(largest + n * rows + i, r, mask=i < rows)


# More than eight parameters: a kernel gets pointers and numbers, nothing that holds them.
@triton.jit(do_not_specialize=VARYING, do_not_specialize_on_alignment=UNALIGNED)
def pair_sums(
    images, captions, codes, marks, row_level, column_level,
    largest, row_sum, row_count, column_sum, column_count,
    rows, columns, total, d, offset, start, loss: tl.constexpr,
    duplicates: tl.constexpr, kinds: tl.constexpr, precision: tl.constexpr,
    height: tl.constexpr, width: tl.constexpr, depth: tl.constexpr,
):  # fmt: skip
    """Write sums over single pairs, of z = s - level: softplus(z), or max(0, z) and [z > 0].

    A sigmoid's level is minus the bias, alike for all rows; its columns have no sums.
    """
    s, m, n, i, j, marked = _tile(
        images, captions, codes, marks, rows, columns, total, d, offset, start,
        duplicates, kinds, precision, height, width, depth,
    )  # fmt: skip
    z = s - tl.load(row_level + i, mask=i < rows, other=0.0)[:, None]
    if loss == SIGMOID:
        value = tl.maximum(z, 0.0) + _log_one_plus(tl.exp2(-tl.abs(z) * LOG2_E))
        tl.store(row_sum + n * rows + i, tl.sum(value, 1), mask=i < rows)
    else:
        tl.store(row_sum + n * rows + i, tl.sum(_hinge(z), 1), mask=i < rows)
        tl.store(row_count + n * rows + i, tl.sum(tl.where(z > 0, 1.0, 0.0), 1), mask=i < rows)
        z = s - tl.load(column_level + j, mask=j < columns, other=0.0)[None, :]
        at = m * columns + j
        tl.store(column_sum + at, tl.sum(_hinge(z), 0), mask=j < columns)
        tl.store(column_count + at, tl.sum(tl.where(z > 0, 1.0, 0.0), 0), mask=j < columns)
    if duplicates == POSITIVE:
        if marked:
            s = _without_duplicates(s, i, j, codes, rows, columns, total, offset, start, kinds)
    tl.store(largest + n * rows + i, tl.max(s, 1), mask=i < rows)


@triton.jit
def _hinge(z):
    """Return max(0, z), and NaN of NaN: such a loss ends the run."""
    return tl.maximum(z, 0.0, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _log_one_plus(x):
    """Return log(1 + x) for x in [0, 1]: 2 artanh(y) of y = x / (2 + x), exact for small x too."""
    y = x / (2 + x)
    q = y * y
    series = 1 / 9 + q * (1 / 11 + q * (1 / 13))
    return 2 * y * (1 + q * (1 / 3 + q * (1 / 5 + q * (1 / 7 + q * series))))


# More than eight parameters: a kernel gets pointers and numbers, nothing that holds them.
@triton.jit(do_not_specialize=VARYING)
def hardest(
    images, captions, codes, marks, row_value, row_index, column_value, column_index,
    rows, columns, total, d, offset, start, tolerance,
    duplicates: tl.constexpr, kinds: tl.constexpr, precision: tl.constexpr,
    height: tl.constexpr, width: tl.constexpr, depth: tl.constexpr,
):  # fmt: skip
    """Write max_j s_ij and the lowest j within the tolerance of it, and the same of columns."""
    s, m, n, i, j, marked = _tile(
        images, captions, codes, marks, rows, columns, total, d, offset, start,
        duplicates, kinds, precision, height, width, depth,
    )  # fmt: skip
    value = tl.max(s, 1)
    index = tl.min(tl.where(s >= (value - tolerance)[:, None], (start + j)[None, :], NOWHERE), 1)
    tl.store(row_value + n * rows + i, value, mask=i < rows)
    tl.store(row_index + n * rows + i, index, mask=i < rows)
    value = tl.max(s, 0)
    index = tl.min(tl.where(s >= (value - tolerance)[None, :], (offset + i)[:, None], NOWHERE), 0)
    tl.store(column_value + m * columns + j, value, mask=j < columns)
    tl.store(column_index + m * columns + j, index, mask=j < columns)


# More than eight parameters: a kernel gets pointers and numbers, nothing that holds them.
@triton.jit(do_not_specialize=VARYING, do_not_specialize_on_alignment=UNALIGNED)
def weights(
    images, captions, codes, marks, row_level, column_level, row_weight, column_weight,
    out, row_total, rows, columns, total, d, offset, start, loss: tl.constexpr,
    duplicates: tl.constexpr, kinds: tl.constexpr, precision: tl.constexpr,
    height: tl.constexpr, width: tl.constexpr, depth: tl.constexpr,
):  # fmt: skip
    """Write the gradient in the similarities (b, c), of the level r_i of rows, c_j of columns.

    Softmax: 2^(s - r) + 2^(s - c). Sigmoid: sigmoid(s - r), with its sums over each row's tile.
    Hinges: u_i [s > r] + v_j [s > c].
    """
    s, m, n, i, j, marked = _tile(
        images, captions, codes, marks, rows, columns, total, d, offset, start,
        duplicates, kinds, precision, height, width, depth,
    )  # fmt: skip
    # Past the end: again the last one's, which changes neither the least nor the greatest.
    r = tl.load(row_level + tl.minimum(i, rows - 1))
    if loss == SIGMOID:
        w = 1 / (1 + tl.exp2((r[:, None] - s) * LOG2_E))
        tl.store(row_total + n * rows + i, tl.sum(w, 1), mask=i < rows)
    else:
        c = tl.load(column_level + tl.minimum(j, columns - 1))
        if loss == HINGES:
            u = tl.load(row_weight + i, mask=i < rows, other=0.0)
            v = tl.load(column_weight + j, mask=j < columns, other=0.0)
            w = tl.where(s > r[:, None], u[:, None], 0.0)
            w += tl.where(s > c[None, :], v[None, :], 0.0)
        else:
            low = tl.minimum(tl.min(r, 0), tl.min(c, 0))
            if tl.maximum(tl.max(r, 0), tl.max(c, 0)) - low < FAR:  # one power serves both
                w = tl.exp2(s - low) * (tl.exp2(low - r)[:, None] + tl.exp2(low - c)[None, :])
            else:
                w = tl.exp2(s - r[:, None]) + tl.exp2(s - c[None, :])
    at = i[:, None] * columns + j[None, :]
    inside = (i < rows)[:, None] & (j < columns)[None, :]
    tl.store(out + at, w.to(out.dtype.element_ty), mask=inside)


# More than eight parameters: a kernel gets pointers and numbers, nothing that holds them.
@triton.jit(do_not_specialize=("rows", "columns", "start"))
def mark(
    order, first, last, marks, rows, columns, start,
    height: tl.constexpr, width: tl.constexpr, size: tl.constexpr,
):  # fmt: skip
    """Mark each tile where a row meets a column of its code; those are `order[first:last]`."""
    i = (tl.program_id(0) * size + tl.arange(0, size))[:, None]
    begin = tl.load(first + i, mask=i < rows, other=0)
    end = tl.load(last + i, mask=i < rows, other=0)
    for step in range(0, tl.max(end - begin), size):
        at = begin + step + tl.arange(0, size)[None, :]
        j = tl.load(order + at, mask=at < end, other=0) - start
        inside = (at < end) & (j >= 0) & (j < columns)
        tl.store(marks + i // height * tl.cdiv(columns, width) + j // width, 1, mask=inside)
