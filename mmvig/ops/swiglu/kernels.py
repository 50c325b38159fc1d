"""SwiGLU's gated activation by Triton, one pass forward and one backward, around PyTorch's products.

Where a product has few input channels, it and the activation are one kernel: its result, and in the
backward pass the activation's gradient, take longer to write and to read again than to compute.
"""

import triton
import triton.language as tl

from mmvig.ops.arithmetic import dot, rounded, sigmoid


@triton.jit(do_not_specialize=['M'])
def forward_kernel(p_x, p_y, M, D: tl.constexpr, BR: tl.constexpr, BD: tl.constexpr):
    """Make y [M, D] of x [M, 2 D]."""
    rows = tl.program_id(0) * BR + tl.arange(0, BR)
    columns = tl.program_id(1) * BD + tl.arange(0, BD)
    mask = (rows < M)[:, None] & (columns < D)[None, :]
    rows = rows.to(tl.int64)[:, None]
    p_a = p_x + rows * (2 * D) + columns[None, :]
    a = tl.load(p_a, mask=mask, other=0.0).to(tl.float32)
    b = tl.load(p_a + D, mask=mask, other=0.0).to(tl.float32)
    y = a * sigmoid(a) * b
    tl.store(p_y + rows * D + columns[None, :], y.to(p_y.dtype.element_ty), mask=mask)


@triton.jit
def gradients(dy, a, b):
    """Gradients of a and b of y = silu(a) * b, and y again."""
    s = sigmoid(a)
    silu = a * s
    return dy * b * (s + silu * (1 - s)), dy * silu, silu * b


@triton.jit(do_not_specialize=['M'])
def backward_kernel(p_dy, p_x, p_dx, p_y, M, D: tl.constexpr, BR: tl.constexpr, BD: tl.constexpr):
    """Make dx [M, 2 D] of dy [M, D] and x [M, 2 D], and y again."""
    rows = tl.program_id(0) * BR + tl.arange(0, BR)
    columns = tl.program_id(1) * BD + tl.arange(0, BD)
    mask = (rows < M)[:, None] & (columns < D)[None, :]
    rows = rows.to(tl.int64)[:, None]
    at = rows * D + columns[None, :]
    at_a = at + rows * D
    a = tl.load(p_x + at_a, mask=mask, other=0.0).to(tl.float32)
    b = tl.load(p_x + at_a + D, mask=mask, other=0.0).to(tl.float32)
    dy = tl.load(p_dy + at, mask=mask, other=0.0).to(tl.float32)
    da, db, y = gradients(dy, a, b)
    tl.store(p_dx + at_a, da.to(p_dx.dtype.element_ty), mask=mask)
    tl.store(p_dx + at_a + D, db.to(p_dx.dtype.element_ty), mask=mask)
    tl.store(p_y + at, y.to(p_y.dtype.element_ty), mask=mask)


@triton.jit
def load(p, STRIDE: tl.constexpr, k, C: tl.constexpr, RAGGED: tl.constexpr):
    """Load channels k of C, which are STRIDE apart at p; RAGGED if there are some beyond C, which are 0."""
    if RAGGED:
        return tl.load(p + k * STRIDE, mask=k < C, other=0.0)
    else:
        return tl.load(p + k * STRIDE)


@triton.jit
def columns_of(D: tl.constexpr, BN: tl.constexpr, TIMES: tl.constexpr):
    """Return the program's BN of D columns, each several times; the last tile overlaps the one before."""
    first = tl.program_id(0) * BN
    columns = tl.arange(0, TIMES * BN) // TIMES
    if D < BN:
        columns = tl.minimum(columns, D - 1)
    elif D % BN:
        first = tl.multiple_of(tl.minimum(first, D - BN), D & -D)
    return first + columns


@triton.jit(do_not_specialize=['M'])
def project_kernel(
    p_y, p_weight, p_h, p_act, M, C: tl.constexpr, D: tl.constexpr, KEEP: tl.constexpr, HELD: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, K0: tl.constexpr, K1: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Make act [M, D] of y [M, C] and weight [2 D, C], and with KEEP h = y weight^T [M, 2 D].

    A program walks over tiles of rows, all of one tile of columns. With HELD, its weights stay in shared
    memory, in two parts of K0 and K1 channels; else they are read for each tile, K0 channels at a time.
    Columns of a and b alternate in the product, so that a thread has both of a result. Rows beyond the last
    one are that again, written with the same bits as columns of two tiles are: nothing needs a mask.
    """
    columns = columns_of(D, BN, 1)
    p_weight += (columns_of(D, BN, 2) + tl.arange(0, 2 * BN) % 2 * D)[None, :] * C
    k0 = tl.arange(0, K0)
    if HELD:
        w0 = load(p_weight, 1, k0[:, None], C, C < K0)
        if K1:
            k1 = K0 + tl.arange(0, K1)
            w1 = load(p_weight, 1, k1[:, None], C, C < K0 + K1)
    for first in tl.range(tl.program_id(1) * BM, M, tl.num_programs(1) * BM, num_stages=STAGES):
        start = tl.cast(first, tl.int64)
        row = tl.minimum(tl.arange(0, BM), M - first - 1)[:, None]
        of_y = p_y + start * C + row * C
        ab = tl.zeros((BM, 2 * BN), tl.float32)
        if HELD:
            ab = dot(load(of_y, 1, k0[None, :], C, C < K0), w0, ab)
            if K1:
                ab = dot(load(of_y, 1, k1[None, :], C, C < K0 + K1), w1, ab)
        else:
            for i in range(0, C, K0):
                y = load(of_y, 1, i + k0[None, :], C, C % K0 != 0)
                ab = dot(y, load(p_weight, 1, i + k0[:, None], C, C % K0 != 0), ab)
        a, b = tl.split(tl.reshape(ab, (BM, BN, 2)))
        a, b = rounded(a, p_act), rounded(b, p_act)
        if KEEP:
            p_a = p_h + start * (2 * D) + row * (2 * D) + columns[None, :]
            tl.store(p_a, a.to(p_h.dtype.element_ty))
            tl.store(p_a + D, b.to(p_h.dtype.element_ty))
        y = a * sigmoid(a) * b
        tl.store(p_act + start * D + row * D + columns[None, :], y.to(p_act.dtype.element_ty))


@triton.jit(do_not_specialize=['M'])
def project_backward_kernel(
    p_dz, p_weight, p_h, p_dh, p_act, M, C: tl.constexpr, D: tl.constexpr, HELD: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, K0: tl.constexpr, K1: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Make dh [M, 2 D] of dz [M, C], weight [C, D] and h, and act again; programs as project_kernel's."""
    columns = columns_of(D, BN, 1)
    p_weight += columns[None, :]
    k0 = tl.arange(0, K0)
    if HELD:
        w0 = load(p_weight, D, k0[:, None], C, C < K0)
        if K1:
            k1 = K0 + tl.arange(0, K1)
            w1 = load(p_weight, D, k1[:, None], C, C < K0 + K1)
    for first in tl.range(tl.program_id(1) * BM, M, tl.num_programs(1) * BM, num_stages=STAGES):
        start = tl.cast(first, tl.int64)
        row = tl.minimum(tl.arange(0, BM), M - first - 1)[:, None]
        at_a = row * (2 * D) + columns[None, :]
        a = tl.load(p_h + start * (2 * D) + at_a)
        b = tl.load(p_h + start * (2 * D) + at_a + D)
        of_dz = p_dz + start * C + row * C
        dy = tl.zeros((BM, BN), tl.float32)
        if HELD:
            dy = dot(load(of_dz, 1, k0[None, :], C, C < K0), w0, dy)
            if K1:
                dy = dot(load(of_dz, 1, k1[None, :], C, C < K0 + K1), w1, dy)
        else:
            for i in range(0, C, K0):
                dz = load(of_dz, 1, i + k0[None, :], C, C % K0 != 0)
                dy = dot(dz, load(p_weight, D, i + k0[:, None], C, C % K0 != 0), dy)
        dy = dy.to(p_act.dtype.element_ty).to(tl.float32)
        da, db, y = gradients(dy, a.to(tl.float32), b.to(tl.float32))
        p_a = p_dh + start * (2 * D) + at_a
        tl.store(p_a, da.to(p_dh.dtype.element_ty))
        tl.store(p_a + D, db.to(p_dh.dtype.element_ty))
        tl.store(p_act + start * D + row * D + columns[None, :], y.to(p_act.dtype.element_ty))
