"""Depthwise 3x3 convolution by Triton: threads walk down strips of a map, some columns at two channels.

Names are those of mmvig/ops/arithmetic.py; maps are HI x WI pixels, the P strips of all maps L x COLUMNS.
Each pixel of a strip is a block of its own, of BP strips and BC channels.
"""

import triton
import triton.language as tl

from mmvig.ops.arithmetic import sigmoid

COLUMNS = 7  # of a strip; the last in a row may have fewer


@triton.jit
def channels(C: tl.constexpr, BC: tl.constexpr):
    """A program's channels [1, BC], and which of them exist."""
    blocks: tl.constexpr = (C + BC - 1) // BC
    o_c = (tl.program_id(0) % blocks * BC + tl.arange(0, BC))[None, :]
    return o_c, o_c < C


@triton.jit
def load_taps(p_w, o_c, m_c):
    """The weights [1, BC] of the nine taps."""
    b_w = ()
    for tap in tl.static_range(9):
        b_w += (tl.load(p_w + o_c * 9 + tap, mask=m_c, other=0.0).to(tl.float32),)  # [1, BC]
    return b_w


@triton.jit
def place(i_tile, P, HI, WI, L, C: tl.constexpr, COLUMNS: tl.constexpr, BP: tl.constexpr):
    """First row and column, row after the last, and place of a tile's strips [BP, 1]; which exist."""
    o_p = (i_tile * BP + tl.arange(0, BP))[:, None]
    across = tl.cdiv(WI, COLUMNS)
    down = tl.cdiv(HI, L)
    o_hi = o_p // across % down * L
    o_wi = o_p % across * COLUMNS
    o_x = ((o_p // across // down).to(tl.int64) * HI + o_hi) * WI + o_wi
    return o_hi, o_wi, tl.minimum(o_hi + L, HI), o_x * C, o_p < P


@triton.jit
def load_row(p_row, m_pc, o_wi, WI, C: tl.constexpr, COLUMNS: tl.constexpr, HALO: tl.constexpr):
    """A strip's columns in a row, and HALO more on either side; zeros outside the map."""
    b_pixels = ()
    for j in tl.static_range(-HALO, COLUMNS + HALO):
        m_x = m_pc & (o_wi > 0) if j < 0 else m_pc & (o_wi + j < WI)
        b_pixels += (tl.load(p_row + j * C, mask=m_x, other=0.0),)  # [BP, BC]
    return b_pixels


@triton.jit
def widen(b_pixels, N: tl.constexpr):
    """N pixels in float32."""
    b_wide = ()
    for j in tl.static_range(N):
        b_wide += (b_pixels[j].to(tl.float32),)
    return b_wide


@triton.jit(do_not_specialize=['P', 'HI', 'WI', 'L'])
def forward_kernel(
    p_x, p_w, p_y, p_u, P, HI, WI, L, C: tl.constexpr, COLUMNS: tl.constexpr, AHEAD: tl.constexpr,
    BP: tl.constexpr, BC: tl.constexpr, ACT: tl.constexpr, KEEP: tl.constexpr,
):  # fmt: skip
    """Make BP strips of y [B, HI, WI, C] at BC channels; ACT: of u = silu(y), KEEP: and of y."""
    o_c, m_c = channels(C, BC)
    b_w = load_taps(p_w, o_c, m_c)
    i_tile = tl.program_id(0) // ((C + BC - 1) // BC)
    o_hi, o_wi, end, o_pc, m_p = place(i_tile, P, HI, WI, L, C, COLUMNS, BP)
    o_pc += o_c
    m_pc = m_p & m_c
    last = tl.minimum(end, HI - 1)  # that is read
    s_hi = tl.cast(WI, tl.int64) * C
    b_above = widen(load_row(p_x + o_pc - s_hi, m_pc & (o_hi > 0), o_wi, WI, C, COLUMNS, 1), COLUMNS + 2)
    b_here = widen(load_row(p_x + o_pc, m_pc, o_wi, WI, C, COLUMNS, 1), COLUMNS + 2)
    b_coming = ()
    for i in tl.static_range(1, AHEAD + 1):
        b_coming += (load_row(p_x + o_pc + i * s_hi, m_pc & (o_hi + i <= last), o_wi, WI, C, COLUMNS, 1),)
    for _ in range(L):
        b_below = widen(b_coming[0], COLUMNS + 2)
        p_row = p_x + o_pc + (AHEAD + 1) * s_hi
        m_next = m_pc & (o_hi + (AHEAD + 1) <= last)
        b_coming = b_coming[1:]
        b_coming += (load_row(p_row, m_next, o_wi, WI, C, COLUMNS, 1),)
        b_x = b_above, b_here, b_below
        for j in tl.static_range(COLUMNS):
            b_total = tl.zeros([BP, BC], tl.float32)
            for tap in tl.static_range(9):
                b_total += b_x[tap // 3][j + tap % 3] * b_w[tap]
            m_y = m_pc & (o_hi < HI) & (o_wi + j < WI)
            b_y = b_total.to(p_y.dtype.element_ty)
            if KEEP:
                tl.store(p_y + o_pc + j * C, b_y, mask=m_y)
            if ACT:
                b_y = b_y.to(tl.float32)
                b_u = (b_y * sigmoid(b_y)).to(p_u.dtype.element_ty)
                tl.store(p_u + o_pc + j * C, b_u, mask=m_y)
        b_above = b_here
        b_here = b_below
        o_pc += s_hi
        o_hi += 1


@triton.jit(do_not_specialize=['P', 'HI', 'WI', 'L'])
def backward_kernel(
    p_dy, p_x, p_w, p_dx, p_dw, P, HI, WI, L, C: tl.constexpr, COLUMNS: tl.constexpr,
    AHEAD: tl.constexpr, BP: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """Make dx at every n-th tile of BP strips and BC channels, and their share of the weight's gradient.

    dx[h, w] = sum_ij weight[i, j] * dy[h + 1 - i, w + 1 - j]
    dw[i, j] = sum_hw x[h, w] * dy[h + 1 - i, w + 1 - j]

    n is the number of shares; dw is [n, C, 9].
    """
    o_c, m_c = channels(C, BC)
    b_w = load_taps(p_w, o_c, m_c)
    blocks: tl.constexpr = (C + BC - 1) // BC
    i_share = tl.program_id(0) // blocks
    s_hi = tl.cast(WI, tl.int64) * C
    b_dw = (tl.zeros([BP, BC], tl.float32),) * 9
    for i_tile in range(i_share, tl.cdiv(P, BP), tl.num_programs(0) // blocks):
        o_hi, o_wi, end, o_pc, m_p = place(i_tile, P, HI, WI, L, C, COLUMNS, BP)
        o_pc += o_c
        m_pc = m_p & m_c
        last = tl.minimum(end, HI - 1)  # of dy that is read
        b_above = load_row(p_dy + o_pc - s_hi, m_pc & (o_hi > 0), o_wi, WI, C, COLUMNS, 1)
        b_above = widen(b_above, COLUMNS + 2)
        b_here = widen(load_row(p_dy + o_pc, m_pc, o_wi, WI, C, COLUMNS, 1), COLUMNS + 2)
        b_coming = ()
        b_coming_x = ()
        for i in tl.static_range(AHEAD):
            p_row = p_dy + o_pc + (i + 1) * s_hi
            b_coming += (load_row(p_row, m_pc & (o_hi + (i + 1) <= last), o_wi, WI, C, COLUMNS, 1),)
            p_row = p_x + o_pc + i * s_hi
            b_coming_x += (load_row(p_row, m_pc & (o_hi + i < end), o_wi, WI, C, COLUMNS, 0),)
        for _ in range(L):
            b_below = widen(b_coming[0], COLUMNS + 2)
            b_x = widen(b_coming_x[0], COLUMNS)
            p_row = p_dy + o_pc + (AHEAD + 1) * s_hi
            m_next = m_pc & (o_hi + (AHEAD + 1) <= last)
            b_coming = b_coming[1:]
            b_coming += (load_row(p_row, m_next, o_wi, WI, C, COLUMNS, 1),)
            p_row = p_x + o_pc + AHEAD * s_hi
            b_coming_x = b_coming_x[1:]
            b_coming_x += (load_row(p_row, m_pc & (o_hi + AHEAD < end), o_wi, WI, C, COLUMNS, 0),)
            b_dy = b_below, b_here, b_above
            for j in tl.static_range(COLUMNS):
                b_dx = tl.zeros([BP, BC], tl.float32)
                b_sums = ()
                for tap in tl.static_range(9):
                    b_dy_tap = b_dy[tap // 3][j + 2 - tap % 3]
                    b_dx += b_dy_tap * b_w[tap]
                    b_sums += (b_dw[tap] + b_dy_tap * b_x[j],)
                b_dw = b_sums
                m_dx = m_pc & (o_hi < HI) & (o_wi + j < WI)
                tl.store(p_dx + o_pc + j * C, b_dx.to(p_dx.dtype.element_ty), mask=m_dx)
            b_above = b_here
            b_here = b_below
            o_pc += s_hi
            o_hi += 1
    o_c = tl.program_id(0) % blocks * BC + tl.arange(0, BC)
    p_dw += i_share.to(tl.int64) * (C * 9) + o_c * 9
    for tap in tl.static_range(9):
        tl.store(p_dw + tap, tl.sum(b_dw[tap], axis=0), mask=o_c < C)
