"""What several kernels compute, in the fewest instructions.

Kernels have flash-linear-attention's names. Sizes: B images, T tokens of an image, H heads, K and V their
widths, C channels, D the width inside SwiGLU, M rows of a matrix, R a rank. BX is a program's block of X,
NX the number of its blocks. i_ are numbers of blocks, o_ offsets, m_ masks, s_ strides, p_ pointers, and b_
blocks in registers, with their shapes beside loads and products. USE_X: whether there is an X.

Importing this module imports Triton.
"""

import os

import triton
import triton.language as tl

INTERPRETED = tl.constexpr(os.environ.get('TRITON_INTERPRET') == '1')
LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def dot(x, y, acc):
    """Return acc + x @ y of halves."""
    if INTERPRETED:  # it has no bf16 product
        x = x.to(tl.float32)
        y = y.to(tl.float32)
    return tl.dot(x, y, acc)


@triton.jit
def rounded(x, p):
    """Float32 x rounded to the numbers of what p points to, as float32."""
    if p.dtype.element_ty == tl.bfloat16 and not INTERPRETED:  # two at once; by x.to() each alone, slowly
        code: tl.constexpr = (
            '{ .reg .b32 t; cvt.rn.bf16x2.f32 t, $3, $2; shl.b32 $0, t, 16; and.b32 $1, t, 0xffff0000; }'
        )
        return tl.inline_asm_elementwise(code, '=f,=f,f,f', [x], tl.float32, True, 2)
    else:
        return x.to(p.dtype.element_ty).to(tl.float32)


@triton.jit
def exp2(x):
    """2^x of float32 x in one instruction; tl.exp2 has four, for subnormal results."""
    if INTERPRETED:
        return tl.exp2(x)
    else:
        return tl.inline_asm_elementwise('ex2.approx.ftz.f32 $0, $1;', '=f,f', [x], tl.float32, True, 1)


@triton.jit
def reciprocal(x):
    """1 / x of float32 x in one instruction."""
    if INTERPRETED:
        return 1 / x
    else:
        return tl.inline_asm_elementwise('rcp.approx.ftz.f32 $0, $1;', '=f,f', [x], tl.float32, True, 1)


@triton.jit
def sigmoid(x):
    """1 / (1 + exp(-x)) of float32 x."""
    return reciprocal(1 + exp2(x * -LOG2E))


@triton.jit
def normal(x):
    """Distribution and density of the normal distribution at float32 x, with an error of 1e-7.

    erf by Abramowitz and Stegun, Handbook of Mathematical Functions, 7.1.26, which shares the density's
    exponential; libdevice's takes twice as many instructions.
    """
    bell = exp2(x * x * -0.7213475204444817)
    t = reciprocal(1 + 0.23164189 * tl.abs(x))
    polynomial = (
        (((1.061405429 * t - 1.453152027) * t + 1.421413741) * t - 0.284496736) * t + 0.254829592
    ) * t
    tail = 0.5 * bell * polynomial
    return tl.where(x < 0, tail, 1 - tail), 0.3989422804014327 * bell
