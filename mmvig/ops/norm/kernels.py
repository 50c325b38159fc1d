"""Norms by Triton: a row is all channels of one token, in float32; one pass forward, one backward.

Names are those of mmvig/ops/arithmetic.py.
"""

import triton
import triton.language as tl

from mmvig.ops.arithmetic import normal, sigmoid


@triton.jit
def normalised(b_x, m_mc, EPS: tl.constexpr, RMS: tl.constexpr, C: tl.constexpr):
    """Rows [BM, BC], centred unless RMS and divided by their deviation, and its inverse [BM, 1]."""
    if not RMS:
        b_x = tl.where(m_mc, b_x - (tl.sum(b_x, axis=1) / C)[:, None], 0.0)
    b_rstd = tl.rsqrt(tl.sum(b_x * b_x, axis=1) / C + EPS)[:, None]
    return b_x * b_rstd, b_rstd


@triton.jit
def affine(b_x, p_w, p_b, o_c, RMS: tl.constexpr, C: tl.constexpr):
    """Times the weight, plus the bias."""
    b_y = b_x * tl.load(p_w + o_c, mask=o_c < C, other=0.0).to(tl.float32)[None, :]  # [1, BC]
    if not RMS:
        b_y += tl.load(p_b + o_c, mask=o_c < C, other=0.0).to(tl.float32)[None, :]  # [1, BC]
    return b_y


@triton.jit
def activated(b_y, ACT: tl.constexpr):
    """The activation of y."""
    if ACT == 'gelu':
        b_distribution, _ = normal(b_y)
        b_y *= b_distribution
    elif ACT == 'silu':
        b_y *= sigmoid(b_y)
    return b_y


@triton.jit
def result_offsets(o_m, o_c, T, CHANNELS_FIRST: tl.constexpr, C: tl.constexpr):
    """Where rows' results are, [BM, BC]: of [B, T, C], CHANNELS_FIRST: of [B, C, T]."""
    if CHANNELS_FIRST:
        i_b = o_m // T
        return (i_b.to(tl.int64) * T * (C - 1) + o_m)[:, None] + o_c[None, :].to(tl.int64) * T
    else:
        return o_m.to(tl.int64)[:, None] * C + o_c[None, :]


@triton.jit(do_not_specialize=['M', 'T'])
def forward_kernel(
    p_x, p_branch, p_scale, p_w, p_b, p_shift, p_s, p_y, M, T,
    C: tl.constexpr, EPS: tl.constexpr, RMS: tl.constexpr, ACT: tl.constexpr, USE_BRANCH: tl.constexpr,
    USE_SCALE: tl.constexpr, CHANNELS_FIRST: tl.constexpr, USE_SHIFT: tl.constexpr, BM: tl.constexpr,
    BC: tl.constexpr,
):  # fmt: skip
    """Make s = x + scale * branch and y = act(norm(s + shift)) of M rows [M, C], T of them an image."""
    o_m = tl.program_id(0) * BM + tl.arange(0, BM)
    o_c = tl.arange(0, BC)
    m_mc = (o_m < M)[:, None] & (o_c < C)[None, :]
    o_mc = o_m.to(tl.int64)[:, None] * C + o_c[None, :]
    b_x = tl.load(p_x + o_mc, mask=m_mc, other=0.0).to(tl.float32)  # [BM, BC]
    if USE_BRANCH:
        b_branch = tl.load(p_branch + o_mc, mask=m_mc, other=0.0).to(tl.float32)  # [BM, BC]
        if USE_SCALE:
            b_scale = tl.load(p_scale + o_m // T, mask=o_m < M, other=0.0)  # [BM]
            b_branch *= b_scale.to(tl.float32)[:, None]
        b_x += b_branch
        b_s = b_x.to(p_s.dtype.element_ty)
        tl.store(p_s + o_mc, b_s, mask=m_mc)
        b_x = b_s.to(tl.float32)  # as it is kept for the backward pass
    if USE_SHIFT:
        b_x += tl.load(p_shift + o_c, mask=o_c < C, other=0.0).to(tl.float32)[None, :]  # [1, BC]
    b_x, _ = normalised(b_x, m_mc, EPS, RMS, C)
    b_y = activated(affine(b_x, p_w, p_b, o_c, RMS, C), ACT)
    tl.store(p_y + result_offsets(o_m, o_c, T, CHANNELS_FIRST, C), b_y.to(p_y.dtype.element_ty), mask=m_mc)


@triton.jit(do_not_specialize=['M', 'T'])
def backward_kernel(
    p_ds, p_dy, p_s, p_scale, p_w, p_b, p_shift, p_dx, p_dbranch, p_dw, M, T,
    C: tl.constexpr, EPS: tl.constexpr, RMS: tl.constexpr, ACT: tl.constexpr, USE_BRANCH: tl.constexpr,
    USE_SCALE: tl.constexpr, CHANNELS_FIRST: tl.constexpr, USE_SHIFT: tl.constexpr, BM: tl.constexpr,
    BC: tl.constexpr, AHEAD: tl.constexpr,
):  # fmt: skip
    """Gradients of x and the branch, and this program's share of dw [1 to 3, programs, C].

    These are gradients of the weight, without RMS the bias, and with USE_SHIFT the shift.
    """
    o_c = tl.arange(0, BC)
    b_w = tl.load(p_w + o_c, mask=o_c < C, other=0.0).to(tl.float32)[None, :]  # [1, BC]
    b_dw = tl.zeros([BM, BC], tl.float32)
    b_db = tl.zeros([BM, BC], tl.float32)
    b_dshift = tl.zeros([BM, BC], tl.float32)
    for i in tl.range(tl.program_id(0), tl.cdiv(M, BM), tl.num_programs(0), num_stages=AHEAD):
        o_m = i * BM + tl.arange(0, BM)
        m_mc = (o_m < M)[:, None] & (o_c < C)[None, :]
        o_mc = o_m.to(tl.int64)[:, None] * C + o_c[None, :]
        b_s = tl.load(p_s + o_mc, mask=m_mc, other=0.0).to(tl.float32)  # [BM, BC]
        p_dy_mc = p_dy + result_offsets(o_m, o_c, T, CHANNELS_FIRST, C)
        b_dy = tl.load(p_dy_mc, mask=m_mc, other=0.0).to(tl.float32)  # [BM, BC]
        if USE_SHIFT:
            b_s += tl.load(p_shift + o_c, mask=o_c < C, other=0.0).to(tl.float32)[None, :]  # [1, BC]
        b_x, b_rstd = normalised(b_s, m_mc, EPS, RMS, C)
        if ACT != 'none':
            b_y = affine(b_x, p_w, p_b, o_c, RMS, C)
            if ACT == 'gelu':
                b_distribution, b_density = normal(b_y)
                b_dy *= b_distribution + b_y * b_density
            else:
                b_gate = sigmoid(b_y)
                b_dy *= b_gate + b_y * b_gate * (1 - b_gate)
        b_dw += b_dy * b_x
        b_db += b_dy
        b_dx = b_dy * b_w
        b_mean = (tl.sum(b_dx * b_x, axis=1) / C)[:, None] * b_x
        if not RMS:
            b_mean += (tl.sum(b_dx, axis=1) / C)[:, None]
        b_dx = b_rstd * (b_dx - b_mean)
        if USE_BRANCH:
            b_dx += tl.load(p_ds + o_mc, mask=m_mc, other=0.0).to(tl.float32)  # [BM, BC]
            b_dbranch = b_dx
            if USE_SCALE:
                b_scale = tl.load(p_scale + o_m // T, mask=o_m < M, other=0.0)  # [BM]
                b_dbranch *= b_scale.to(tl.float32)[:, None]
            tl.store(p_dbranch + o_mc, b_dbranch.to(p_dbranch.dtype.element_ty), mask=m_mc)
        tl.store(p_dx + o_mc, b_dx.to(p_dx.dtype.element_ty), mask=m_mc)
        if USE_SHIFT:
            b_dshift += b_dx
    p_dw += tl.program_id(0).to(tl.int64) * C + o_c
    s_kind = tl.num_programs(0).to(tl.int64) * C
    tl.store(p_dw, tl.sum(b_dw, axis=0), mask=o_c < C)
    if not RMS:
        p_dw += s_kind
        tl.store(p_dw, tl.sum(b_db, axis=0), mask=o_c < C)
    if USE_SHIFT:
        tl.store(p_dw + s_kind, tl.sum(b_dshift, axis=0), mask=o_c < C)
