"""SwiGLU's gated activation by Triton, one pass forward and one backward, around PyTorch's products.

Where a product has few input channels, it and the activation are one kernel: its result, and in the
backward pass the activation's gradient, take longer to write and to read again than to compute.
Names are those of mmvig/ops/arithmetic.py.
"""

import triton
import triton.language as tl

from mmvig.ops.arithmetic import dot, rounded, sigmoid


@triton.jit(do_not_specialize=['M'])
def forward_kernel(p_x, p_y, M, D: tl.constexpr, BM: tl.constexpr, BD: tl.constexpr):
    """Make y [M, D] of x [M, 2 D]."""
    o_m = tl.program_id(0) * BM + tl.arange(0, BM)
    o_d = tl.program_id(1) * BD + tl.arange(0, BD)
    m_md = (o_m < M)[:, None] & (o_d < D)[None, :]
    o_m = o_m.to(tl.int64)[:, None]
    p_a = p_x + o_m * (2 * D) + o_d[None, :]
    b_a = tl.load(p_a, mask=m_md, other=0.0).to(tl.float32)  # [BM, BD]
    b_b = tl.load(p_a + D, mask=m_md, other=0.0).to(tl.float32)  # [BM, BD]
    b_y = b_a * sigmoid(b_a) * b_b
    tl.store(p_y + o_m * D + o_d[None, :], b_y.to(p_y.dtype.element_ty), mask=m_md)


@triton.jit
def gradients(b_dy, b_a, b_b):
    """Gradients of a and b of y = silu(a) * b, and y again."""
    b_s = sigmoid(b_a)
    b_silu = b_a * b_s
    return b_dy * b_b * (b_s + b_silu * (1 - b_s)), b_dy * b_silu, b_silu * b_b


@triton.jit(do_not_specialize=['M'])
def backward_kernel(p_dy, p_x, p_dx, p_y, M, D: tl.constexpr, BM: tl.constexpr, BD: tl.constexpr):
    """Make dx [M, 2 D] of dy [M, D] and x [M, 2 D], and y again."""
    o_m = tl.program_id(0) * BM + tl.arange(0, BM)
    o_d = tl.program_id(1) * BD + tl.arange(0, BD)
    m_md = (o_m < M)[:, None] & (o_d < D)[None, :]
    o_m = o_m.to(tl.int64)[:, None]
    o_md = o_m * D + o_d[None, :]
    o_a = o_md + o_m * D
    b_a = tl.load(p_x + o_a, mask=m_md, other=0.0).to(tl.float32)  # [BM, BD]
    b_b = tl.load(p_x + o_a + D, mask=m_md, other=0.0).to(tl.float32)  # [BM, BD]
    b_dy = tl.load(p_dy + o_md, mask=m_md, other=0.0).to(tl.float32)  # [BM, BD]
    b_da, b_db, b_y = gradients(b_dy, b_a, b_b)
    tl.store(p_dx + o_a, b_da.to(p_dx.dtype.element_ty), mask=m_md)
    tl.store(p_dx + o_a + D, b_db.to(p_dx.dtype.element_ty), mask=m_md)
    tl.store(p_y + o_md, b_y.to(p_y.dtype.element_ty), mask=m_md)


@triton.jit
def load(p, STRIDE: tl.constexpr, o_c, C: tl.constexpr, RAGGED: tl.constexpr):
    """Load channels of C, which are STRIDE apart at p; RAGGED if there are some beyond C, which are 0."""
    if RAGGED:
        return tl.load(p + o_c * STRIDE, mask=o_c < C, other=0.0)
    else:
        return tl.load(p + o_c * STRIDE)


@triton.jit
def columns_of(D: tl.constexpr, BD: tl.constexpr, TIMES: tl.constexpr):
    """Return the program's BD of D columns, each several times; the last tile overlaps the one before."""
    first = tl.program_id(0) * BD
    o_d = tl.arange(0, TIMES * BD) // TIMES
    if D < BD:
        o_d = tl.minimum(o_d, D - 1)
    elif D % BD:
        first = tl.multiple_of(tl.minimum(first, D - BD), D & -D)
    return first + o_d


@triton.jit(do_not_specialize=['M'])
def project_kernel(
    p_y, p_weight, p_h, p_act, M, C: tl.constexpr, D: tl.constexpr, KEEP: tl.constexpr, HELD: tl.constexpr,
    BM: tl.constexpr, BD: tl.constexpr, BC0: tl.constexpr, BC1: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Make act [M, D] of y [M, C] and weight [2 D, C], and with KEEP h = y weight^T [M, 2 D].

    A program walks over tiles of rows, all of one tile of columns. With HELD, its weights stay in shared
    memory, in two parts of BC0 and BC1 channels; else they are read for each tile, BC0 channels at a time.
    Columns of a and b alternate in the product, so that a thread has both of a result. Rows beyond the last
    one are that again, written with the same bits as columns of two tiles are: nothing needs a mask.
    """
    o_d = columns_of(D, BD, 1)
    p_weight += (columns_of(D, BD, 2) + tl.arange(0, 2 * BD) % 2 * D)[None, :] * C
    o_c0 = tl.arange(0, BC0)
    if HELD:
        b_w0 = load(p_weight, 1, o_c0[:, None], C, C < BC0)  # [BC0, 2 BD]
        if BC1:
            o_c1 = BC0 + tl.arange(0, BC1)
            b_w1 = load(p_weight, 1, o_c1[:, None], C, C < BC0 + BC1)  # [BC1, 2 BD]
    for first in tl.range(tl.program_id(1) * BM, M, tl.num_programs(1) * BM, num_stages=STAGES):
        start = tl.cast(first, tl.int64)
        o_m = tl.minimum(tl.arange(0, BM), M - first - 1)[:, None]
        p_y_m = p_y + start * C + o_m * C
        b_ab = tl.zeros((BM, 2 * BD), tl.float32)
        if HELD:
            b_ab = dot(load(p_y_m, 1, o_c0[None, :], C, C < BC0), b_w0, b_ab)  # [BM, 2 BD]
            if BC1:
                b_ab = dot(load(p_y_m, 1, o_c1[None, :], C, C < BC0 + BC1), b_w1, b_ab)  # [BM, 2 BD]
        else:
            for i in range(0, C, BC0):
                b_y = load(p_y_m, 1, i + o_c0[None, :], C, C % BC0 != 0)  # [BM, BC0]
                b_w = load(p_weight, 1, i + o_c0[:, None], C, C % BC0 != 0)  # [BC0, 2 BD]
                b_ab = dot(b_y, b_w, b_ab)  # [BM, 2 BD]
        b_a, b_b = tl.split(tl.reshape(b_ab, (BM, BD, 2)))
        b_a, b_b = rounded(b_a, p_act), rounded(b_b, p_act)
        if KEEP:
            p_a = p_h + start * (2 * D) + o_m * (2 * D) + o_d[None, :]
            tl.store(p_a, b_a.to(p_h.dtype.element_ty))
            tl.store(p_a + D, b_b.to(p_h.dtype.element_ty))
        b_y = b_a * sigmoid(b_a) * b_b
        tl.store(p_act + start * D + o_m * D + o_d[None, :], b_y.to(p_act.dtype.element_ty))


@triton.jit(do_not_specialize=['M'])
def project_backward_kernel(
    p_dz, p_weight, p_h, p_dh, p_act, M, C: tl.constexpr, D: tl.constexpr, HELD: tl.constexpr,
    BM: tl.constexpr, BD: tl.constexpr, BC0: tl.constexpr, BC1: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Make dh [M, 2 D] of dz [M, C], weight [C, D] and h, and act again; programs as project_kernel's."""
    o_d = columns_of(D, BD, 1)
    p_weight += o_d[None, :]
    o_c0 = tl.arange(0, BC0)
    if HELD:
        b_w0 = load(p_weight, D, o_c0[:, None], C, C < BC0)  # [BC0, BD]
        if BC1:
            o_c1 = BC0 + tl.arange(0, BC1)
            b_w1 = load(p_weight, D, o_c1[:, None], C, C < BC0 + BC1)  # [BC1, BD]
    for first in tl.range(tl.program_id(1) * BM, M, tl.num_programs(1) * BM, num_stages=STAGES):
        start = tl.cast(first, tl.int64)
        o_m = tl.minimum(tl.arange(0, BM), M - first - 1)[:, None]
        o_a = o_m * (2 * D) + o_d[None, :]
        b_a = tl.load(p_h + start * (2 * D) + o_a)  # [BM, BD]
        b_b = tl.load(p_h + start * (2 * D) + o_a + D)  # [BM, BD]
        p_dz_m = p_dz + start * C + o_m * C
        b_dy = tl.zeros((BM, BD), tl.float32)
        if HELD:
            b_dy = dot(load(p_dz_m, 1, o_c0[None, :], C, C < BC0), b_w0, b_dy)  # [BM, BD]
            if BC1:
                b_dy = dot(load(p_dz_m, 1, o_c1[None, :], C, C < BC0 + BC1), b_w1, b_dy)  # [BM, BD]
        else:
            for i in range(0, C, BC0):
                b_dz = load(p_dz_m, 1, i + o_c0[None, :], C, C % BC0 != 0)  # [BM, BC0]
                b_w = load(p_weight, D, i + o_c0[:, None], C, C % BC0 != 0)  # [BC0, BD]
                b_dy = dot(b_dz, b_w, b_dy)  # [BM, BD]
        b_dy = b_dy.to(p_act.dtype.element_ty).to(tl.float32)
        b_da, b_db, b_y = gradients(b_dy, b_a.to(tl.float32), b_b.to(tl.float32))
        p_a = p_dh + start * (2 * D) + o_a
        tl.store(p_a, b_da.to(p_dh.dtype.element_ty))
        tl.store(p_a + D, b_db.to(p_dh.dtype.element_ty))
        tl.store(p_act + start * D + o_m * D + o_d[None, :], b_y.to(p_act.dtype.element_ty))
