"""Convolution of an image and its norm by Triton: a program makes all channels of some pixels."""

import triton
import triton.language as tl

from mmvig.ops.arithmetic import dot, rounded
from mmvig.ops.norm.kernels import activated, affine, normalised


@triton.jit
def load_kernel(p_k, p_z, first, C: tl.constexpr, PATCH: tl.constexpr, BK: tl.constexpr, BC: tl.constexpr):
    """The convolution's weights [BK, BC] of BK numbers of a patch."""
    columns = tl.arange(0, BC)[None, :]
    k = first + tl.arange(0, BK)[:, None]
    weights = tl.load(p_k + columns * PATCH + k, mask=(k < PATCH) & (columns < C), other=0.0)
    return weights.to(p_z.dtype.element_ty)


@triton.jit(do_not_specialize=['M', 'H', 'W', 'HO', 'WO', 's_b', 's_c', 's_h', 's_w'])
def forward_kernel(
    p_x, p_k, p_shift, p_w, p_b, p_z, p_y, M, H, W, HO, WO, s_b, s_c, s_h, s_w,
    CIN: tl.constexpr, KS: tl.constexpr, STRIDE: tl.constexpr, C: tl.constexpr, EPS: tl.constexpr,
    ACT: tl.constexpr, KEEP: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """Make y = act(norm(z + shift)) of z = conv(x) at M pixels [M, C]; KEEP: and z.

    x has strides s. A program walks over tiles of BM pixels. Their patches are loaded as [patch, pixels],
    so that neighbours in a row of the image are side by side.
    """
    PATCH: tl.constexpr = CIN * KS * KS
    columns = tl.arange(0, BC)
    if PATCH <= BK:
        weights = load_kernel(p_k, p_z, 0, C, PATCH, BK, BC)
    shift = tl.load(p_shift + columns, mask=columns < C, other=0.0).to(tl.float32)[None, :]
    for first in range(tl.program_id(0) * BM, M, tl.num_programs(0) * BM):
        rows = first + tl.arange(0, BM)
        h = rows // WO % HO * STRIDE - 1
        w = rows % WO * STRIDE - 1
        image = rows // (HO * WO)
        p_first = p_x + image.to(tl.int64) * s_b + h.to(tl.int64) * s_h + w.to(tl.int64) * s_w
        z = tl.zeros([BM, BC], tl.float32)
        for start in range(0, PATCH, BK):
            k = start + tl.arange(0, BK)
            i = k % (KS * KS) // KS
            j = k % KS
            at_h = h[None, :] + i[:, None]
            at_w = w[None, :] + j[:, None]
            inside = (at_h >= 0) & (at_h < H) & (at_w >= 0) & (at_w < W)
            inside = inside & (k < PATCH)[:, None] & (rows < M)[None, :]
            of_patch = (k // (KS * KS)).to(tl.int64) * s_c + i.to(tl.int64) * s_h + j.to(tl.int64) * s_w
            patch = tl.load(p_first[None, :] + of_patch[:, None], mask=inside, other=0.0)
            if PATCH > BK:
                weights = load_kernel(p_k, p_z, start, C, PATCH, BK, BC)
            z = dot(tl.trans(patch.to(p_z.dtype.element_ty)), weights, z)
        x = rounded(z, p_z)  # as it is kept for the backward pass
        mask = (rows < M)[:, None] & (columns < C)[None, :]
        at = rows.to(tl.int64)[:, None] * C + columns[None, :]
        if KEEP:
            tl.store(p_z + at, x.to(p_z.dtype.element_ty), mask=mask)
        x, _ = normalised(x + shift, mask, EPS, False, C)
        y = activated(affine(x, p_w, p_b, columns, False, C), ACT)
        tl.store(p_y + at, y.to(p_y.dtype.element_ty), mask=mask)
