"""Norms by Triton: a row is all channels of one token, in float32; one pass forward, one backward."""

import triton
import triton.language as tl

from mmvig.ops.arithmetic import normal, sigmoid


@triton.jit
def normalised(x, mask, EPS: tl.constexpr, RMS: tl.constexpr, C: tl.constexpr):
    """Rows without their mean (RMS: with it) and divided by their deviation, and its inverse."""
    if not RMS:
        x = tl.where(mask, x - (tl.sum(x, axis=1) / C)[:, None], 0.0)
    inverse = tl.rsqrt(tl.sum(x * x, axis=1) / C + EPS)[:, None]
    return x * inverse, inverse


@triton.jit
def affine(x, p_w, p_b, columns, RMS: tl.constexpr, C: tl.constexpr):
    """Times the weight, plus the bias."""
    y = x * tl.load(p_w + columns, mask=columns < C, other=0.0).to(tl.float32)[None, :]
    if not RMS:
        y += tl.load(p_b + columns, mask=columns < C, other=0.0).to(tl.float32)[None, :]
    return y


@triton.jit
def activated(y, ACT: tl.constexpr):
    """The activation of y."""
    if ACT == 'gelu':
        distribution, _ = normal(y)
        y *= distribution
    elif ACT == 'silu':
        y *= sigmoid(y)
    return y


@triton.jit
def result_offsets(rows, columns, N, FIRST: tl.constexpr, C: tl.constexpr):
    """Where a row's results are: [B, N, C], FIRST: [B, C, N]."""
    if FIRST:
        sample = rows // N
        return (sample.to(tl.int64) * N * (C - 1) + rows)[:, None] + columns[None, :].to(tl.int64) * N
    else:
        return rows.to(tl.int64)[:, None] * C + columns[None, :]


@triton.jit(do_not_specialize=['M', 'N'])
def forward_kernel(
    p_x, p_branch, p_scale, p_w, p_b, p_shift, p_s, p_y, M, N,
    C: tl.constexpr, EPS: tl.constexpr, RMS: tl.constexpr, ACT: tl.constexpr, ADD: tl.constexpr,
    SCALED: tl.constexpr, FIRST: tl.constexpr, SHIFT: tl.constexpr, BR: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """Make s = x + scale * branch (ADD) and y = act(norm(s)) of M rows [M, C], N of them a sample.

    SHIFT: a vector is added to x.
    """
    rows = tl.program_id(0) * BR + tl.arange(0, BR)
    columns = tl.arange(0, BC)
    mask = (rows < M)[:, None] & (columns < C)[None, :]
    at = rows.to(tl.int64)[:, None] * C + columns[None, :]
    x = tl.load(p_x + at, mask=mask, other=0.0).to(tl.float32)
    if ADD:
        branch = tl.load(p_branch + at, mask=mask, other=0.0).to(tl.float32)
        if SCALED:
            branch *= tl.load(p_scale + rows // N, mask=rows < M, other=0.0).to(tl.float32)[:, None]
        x += branch
        s = x.to(p_s.dtype.element_ty)
        tl.store(p_s + at, s, mask=mask)
        x = s.to(tl.float32)  # as it is kept for the backward pass
    if SHIFT:
        x += tl.load(p_shift + columns, mask=columns < C, other=0.0).to(tl.float32)[None, :]
    x, _ = normalised(x, mask, EPS, RMS, C)
    y = activated(affine(x, p_w, p_b, columns, RMS, C), ACT)
    tl.store(p_y + result_offsets(rows, columns, N, FIRST, C), y.to(p_y.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=['M', 'N'])
def backward_kernel(
    p_ds, p_dy, p_s, p_scale, p_w, p_b, p_shift, p_dx, p_dbranch, p_dw, M, N,
    C: tl.constexpr, EPS: tl.constexpr, RMS: tl.constexpr, ACT: tl.constexpr, ADD: tl.constexpr,
    SCALED: tl.constexpr, FIRST: tl.constexpr, SHIFT: tl.constexpr, BR: tl.constexpr, BC: tl.constexpr,
    AHEAD: tl.constexpr,
):  # fmt: skip
    """Gradients of x, with ADD of the branch, and this program's share of dw [2, programs, C].

    SHIFT: there is one, and its gradient is what dw has last.
    """
    columns = tl.arange(0, BC)
    w = tl.load(p_w + columns, mask=columns < C, other=0.0).to(tl.float32)[None, :]
    dw = tl.zeros([BR, BC], tl.float32)
    db = tl.zeros([BR, BC], tl.float32)
    dshift = tl.zeros([BR, BC], tl.float32)
    for i in tl.range(tl.program_id(0), tl.cdiv(M, BR), tl.num_programs(0), num_stages=AHEAD):
        rows = i * BR + tl.arange(0, BR)
        mask = (rows < M)[:, None] & (columns < C)[None, :]
        at = rows.to(tl.int64)[:, None] * C + columns[None, :]
        s = tl.load(p_s + at, mask=mask, other=0.0).to(tl.float32)
        p_in = p_dy + result_offsets(rows, columns, N, FIRST, C)
        dy = tl.load(p_in, mask=mask, other=0.0).to(tl.float32)
        if SHIFT:
            s += tl.load(p_shift + columns, mask=columns < C, other=0.0).to(tl.float32)[None, :]
        x, inverse = normalised(s, mask, EPS, RMS, C)
        if ACT != 'none':
            y = affine(x, p_w, p_b, columns, RMS, C)
            if ACT == 'gelu':
                distribution, density = normal(y)
                dy *= distribution + y * density
            else:
                gate = sigmoid(y)
                dy *= gate + y * gate * (1 - gate)
        dw += dy * x
        db += dy
        dx = dy * w
        mean = (tl.sum(dx * x, axis=1) / C)[:, None] * x
        if not RMS:
            mean += (tl.sum(dx, axis=1) / C)[:, None]
        dx = inverse * (dx - mean)
        if ADD:
            dx += tl.load(p_ds + at, mask=mask, other=0.0).to(tl.float32)
            dbranch = dx
            if SCALED:
                dbranch *= tl.load(p_scale + rows // N, mask=rows < M, other=0.0).to(tl.float32)[:, None]
            tl.store(p_dbranch + at, dbranch.to(p_dbranch.dtype.element_ty), mask=mask)
        tl.store(p_dx + at, dx.to(p_dx.dtype.element_ty), mask=mask)
        if SHIFT:
            dshift += dx
    p_dw += tl.program_id(0).to(tl.int64) * C + columns
    step = tl.num_programs(0).to(tl.int64) * C
    tl.store(p_dw, tl.sum(dw, axis=0), mask=columns < C)
    if not RMS:
        p_dw += step
        tl.store(p_dw, tl.sum(db, axis=0), mask=columns < C)
    if SHIFT:
        tl.store(p_dw + step, tl.sum(dshift, axis=0), mask=columns < C)
