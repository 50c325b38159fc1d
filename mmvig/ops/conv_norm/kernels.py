"""Convolution of an image and its norm by Triton: a program makes all channels of some pixels.

Names are those of mmvig/ops/arithmetic.py; images are HI x WI pixels of CI channels, results HO x WO.
"""

import triton
import triton.language as tl

from mmvig.ops.arithmetic import dot, rounded
from mmvig.ops.norm.kernels import activated, affine, normalised


@triton.jit
def load_kernel(
    p_kernel, p_z, first, C: tl.constexpr, PATCH: tl.constexpr, BPATCH: tl.constexpr, BC: tl.constexpr
):
    """The convolution's weights [BPATCH, BC] of BPATCH numbers of a patch."""
    o_c = tl.arange(0, BC)[None, :]
    o_patch = first + tl.arange(0, BPATCH)[:, None]
    b_w = tl.load(p_kernel + o_c * PATCH + o_patch, mask=(o_patch < PATCH) & (o_c < C), other=0.0)
    return b_w.to(p_z.dtype.element_ty)  # [BPATCH, BC]


@triton.jit(do_not_specialize=['M', 'HI', 'WI', 'HO', 'WO', 's_b', 's_c', 's_hi', 's_wi'])
def forward_kernel(
    p_x, p_kernel, p_shift, p_w, p_b, p_z, p_y, M, HI, WI, HO, WO, s_b, s_c, s_hi, s_wi,
    CI: tl.constexpr, SIDE: tl.constexpr, STRIDE: tl.constexpr, C: tl.constexpr, EPS: tl.constexpr,
    ACT: tl.constexpr, KEEP: tl.constexpr, BM: tl.constexpr, BPATCH: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """Make y = act(norm(z + shift)) of z = conv(x) at M pixels [M, C]; KEEP: and z.

    x has strides s. A program walks over tiles of BM pixels. Their patches are loaded as [patch, pixels],
    so that neighbours in a row of the image are side by side.
    """
    PATCH: tl.constexpr = CI * SIDE * SIDE
    o_c = tl.arange(0, BC)
    if PATCH <= BPATCH:
        b_w = load_kernel(p_kernel, p_z, 0, C, PATCH, BPATCH, BC)  # [BPATCH, BC]
    b_shift = tl.load(p_shift + o_c, mask=o_c < C, other=0.0).to(tl.float32)[None, :]  # [1, BC]
    for first in range(tl.program_id(0) * BM, M, tl.num_programs(0) * BM):
        o_m = first + tl.arange(0, BM)
        o_hi = o_m // WO % HO * STRIDE - 1
        o_wi = o_m % WO * STRIDE - 1
        i_b = o_m // (HO * WO)
        p_x_m = p_x + i_b.to(tl.int64) * s_b + o_hi.to(tl.int64) * s_hi + o_wi.to(tl.int64) * s_wi
        b_z = tl.zeros([BM, BC], tl.float32)
        for start in range(0, PATCH, BPATCH):
            o_patch = start + tl.arange(0, BPATCH)
            i = o_patch % (SIDE * SIDE) // SIDE
            j = o_patch % SIDE
            o_h = o_hi[None, :] + i[:, None]
            o_w = o_wi[None, :] + j[:, None]
            m_patch = (o_h >= 0) & (o_h < HI) & (o_w >= 0) & (o_w < WI)
            m_patch = m_patch & (o_patch < PATCH)[:, None] & (o_m < M)[None, :]
            o_x = (o_patch // (SIDE * SIDE)).to(tl.int64) * s_c
            o_x = o_x + i.to(tl.int64) * s_hi + j.to(tl.int64) * s_wi
            b_patch = tl.load(p_x_m[None, :] + o_x[:, None], mask=m_patch, other=0.0)  # [BPATCH, BM]
            if PATCH > BPATCH:
                b_w = load_kernel(p_kernel, p_z, start, C, PATCH, BPATCH, BC)  # [BPATCH, BC]
            b_z = dot(tl.trans(b_patch.to(p_z.dtype.element_ty)), b_w, b_z)  # [BM, BC]
        b_x = rounded(b_z, p_z)  # as it is kept for the backward pass
        m_mc = (o_m < M)[:, None] & (o_c < C)[None, :]
        o_mc = o_m.to(tl.int64)[:, None] * C + o_c[None, :]
        if KEEP:
            tl.store(p_z + o_mc, b_x.to(p_z.dtype.element_ty), mask=m_mc)
        b_x, _ = normalised(b_x + b_shift, m_mc, EPS, False, C)
        b_y = activated(affine(b_x, p_w, p_b, o_c, False, C), ACT)
        tl.store(p_y + o_mc, b_y.to(p_y.dtype.element_ty), mask=m_mc)
