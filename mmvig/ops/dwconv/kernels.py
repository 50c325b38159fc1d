"""Depthwise 3x3 convolution by Triton: threads walk down strips of a map, some columns at two channels."""

import triton
import triton.language as tl

from mmvig.ops.arithmetic import sigmoid

# Columns of a strip: the first number that divides a map's, else the last.
COLUMNS = 7, 4


@triton.jit
def begin(p_w, C: tl.constexpr, BC: tl.constexpr):
    """A program's channels [1, BC], which of them exist, and the weights [1, BC] of the nine taps."""
    blocks: tl.constexpr = (C + BC - 1) // BC
    channels = (tl.program_id(0) % blocks * BC + tl.arange(0, BC))[None, :]
    of_channel = channels < C
    w = ()
    for tap in tl.static_range(9):
        w += (tl.load(p_w + channels * 9 + tap, mask=of_channel, other=0.0).to(tl.float32),)
    return channels, of_channel, w


@triton.jit
def place(tile, strips, H, W, R, C: tl.constexpr, COLUMNS: tl.constexpr, BS: tl.constexpr):
    """First row and column, row after the last, and place of a tile's strips [BS, 1]; which exist."""
    strip = (tile * BS + tl.arange(0, BS))[:, None]
    across = tl.cdiv(W, COLUMNS)
    down = tl.cdiv(H, R)
    row = strip // across % down * R
    column = strip % across * COLUMNS
    at = ((strip // across // down).to(tl.int64) * H + row) * W + column
    return row, column, tl.minimum(row + R, H), at * C, strip < strips


@triton.jit
def load_row(p_row, mask, column, W, C: tl.constexpr, COLUMNS: tl.constexpr, HALO: tl.constexpr):
    """A strip's columns in a row, and HALO more on either side; zeros outside the map."""
    pixels = ()
    for j in tl.static_range(-HALO, COLUMNS + HALO):
        there = mask & (column > 0) if j < 0 else mask & (column + j < W)
        pixels += (tl.load(p_row + j * C, mask=there, other=0.0),)
    return pixels


@triton.jit
def widen(pixels, N: tl.constexpr):
    """N pixels in float32."""
    wide = ()
    for j in tl.static_range(N):
        wide += (pixels[j].to(tl.float32),)
    return wide


@triton.jit(do_not_specialize=['strips', 'H', 'W', 'R'])
def forward_kernel(
    p_x, p_w, p_y, p_u, strips, H, W, R, C: tl.constexpr, COLUMNS: tl.constexpr, AHEAD: tl.constexpr,
    BS: tl.constexpr, BC: tl.constexpr, ACT: tl.constexpr, KEEP: tl.constexpr,
):  # fmt: skip
    """Make BS strips of R rows of y [B, H, W, C] at BC channels; ACT: of u = silu(y), KEEP: and of y."""
    channels, of_channel, w = begin(p_w, C, BC)
    tile = tl.program_id(0) // ((C + BC - 1) // BC)
    row, column, end, at, exists = place(tile, strips, H, W, R, C, COLUMNS, BS)
    at += channels
    mask = exists & of_channel
    last = tl.minimum(end, H - 1)  # that is read
    of_row = W.to(tl.int64) * C
    above = widen(load_row(p_x + at - of_row, mask & (row > 0), column, W, C, COLUMNS, 1), COLUMNS + 2)
    here = widen(load_row(p_x + at, mask, column, W, C, COLUMNS, 1), COLUMNS + 2)
    coming = ()
    for i in tl.static_range(1, AHEAD + 1):
        coming += (load_row(p_x + at + i * of_row, mask & (row + i <= last), column, W, C, COLUMNS, 1),)
    for _ in range(R):
        below = widen(coming[0], COLUMNS + 2)
        p_row = p_x + at + (AHEAD + 1) * of_row
        of_next = mask & (row + (AHEAD + 1) <= last)
        coming = coming[1:]
        coming += (load_row(p_row, of_next, column, W, C, COLUMNS, 1),)
        x = above, here, below
        for j in tl.static_range(COLUMNS):
            total = tl.zeros([BS, BC], tl.float32)
            for tap in tl.static_range(9):
                total += x[tap // 3][j + tap % 3] * w[tap]
            there = mask & (row < H) & (column + j < W)
            y = total.to(p_y.dtype.element_ty)
            if KEEP:
                tl.store(p_y + at + j * C, y, mask=there)
            if ACT:
                y = y.to(tl.float32)
                u = (y * sigmoid(y)).to(p_u.dtype.element_ty)
                tl.store(p_u + at + j * C, u, mask=there)
        above = here
        here = below
        at += of_row
        row += 1


@triton.jit(do_not_specialize=['strips', 'H', 'W', 'R'])
def backward_kernel(
    p_dy, p_x, p_w, p_dx, p_dw, strips, H, W, R, C: tl.constexpr, COLUMNS: tl.constexpr,
    AHEAD: tl.constexpr, BS: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """Make dx at every n-th tile of BS strips and BC channels, and their share of the weight's gradient.

    dx[h, w] = sum_ij weight[i, j] * dy[h + 1 - i, w + 1 - j]
    dw[i, j] = sum_hw x[h, w] * dy[h + 1 - i, w + 1 - j]

    n is the number of shares; dw is [n, C, 9].
    """
    channels, of_channel, w = begin(p_w, C, BC)
    blocks: tl.constexpr = (C + BC - 1) // BC
    share = tl.program_id(0) // blocks
    of_row = W.to(tl.int64) * C
    dw = (tl.zeros([BS, BC], tl.float32),) * 9
    for tile in range(share, tl.cdiv(strips, BS), tl.num_programs(0) // blocks):
        row, column, end, at, exists = place(tile, strips, H, W, R, C, COLUMNS, BS)
        at += channels
        mask = exists & of_channel
        last = tl.minimum(end, H - 1)  # of dy that is read
        above = widen(load_row(p_dy + at - of_row, mask & (row > 0), column, W, C, COLUMNS, 1), COLUMNS + 2)
        here = widen(load_row(p_dy + at, mask, column, W, C, COLUMNS, 1), COLUMNS + 2)
        coming = ()
        coming_x = ()
        for i in tl.static_range(AHEAD):
            p_row = p_dy + at + (i + 1) * of_row
            coming += (load_row(p_row, mask & (row + (i + 1) <= last), column, W, C, COLUMNS, 1),)
            p_row = p_x + at + i * of_row
            coming_x += (load_row(p_row, mask & (row + i < end), column, W, C, COLUMNS, 0),)
        for _ in range(R):
            below = widen(coming[0], COLUMNS + 2)
            x = widen(coming_x[0], COLUMNS)
            p_row = p_dy + at + (AHEAD + 1) * of_row
            of_next = mask & (row + (AHEAD + 1) <= last)
            coming = coming[1:]
            coming += (load_row(p_row, of_next, column, W, C, COLUMNS, 1),)
            p_row = p_x + at + AHEAD * of_row
            coming_x = coming_x[1:]
            coming_x += (load_row(p_row, mask & (row + AHEAD < end), column, W, C, COLUMNS, 0),)
            dy = below, here, above
            for j in tl.static_range(COLUMNS):
                dx = tl.zeros([BS, BC], tl.float32)
                sums = ()
                for tap in tl.static_range(9):
                    of_dy = dy[tap // 3][j + 2 - tap % 3]
                    dx += of_dy * w[tap]
                    sums += (dw[tap] + of_dy * x[j],)
                dw = sums
                there = mask & (row < H) & (column + j < W)
                tl.store(p_dx + at + j * C, dx.to(p_dx.dtype.element_ty), mask=there)
            above = here
            here = below
            at += of_row
            row += 1
    channels = tl.program_id(0) % blocks * BC + tl.arange(0, BC)
    p_dw += share.to(tl.int64) * (C * 9) + channels * 9
    for tap in tl.static_range(9):
        tl.store(p_dw + tap, tl.sum(dw[tap], axis=0), mask=channels < C)
