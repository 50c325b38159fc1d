"""Exponentials, roundings and products, in the fewest instructions."""

import triton
import triton.language as tl

from mmvig.ops.arithmetic import INTERPRETED


@triton.jit
def exp2_minus(x):
    """2^-x."""
    if INTERPRETED:
        return tl.exp2(-x)
    else:  # Triton negates by a subtraction; as a part of the instruction it is free
        return tl.inline_asm_elementwise(
            '{ neg.f32 $0, $1; ex2.approx.ftz.f32 $0, $0; }', '=&f,f', [x], tl.float32, True, 1
        )


@triton.jit
def exp2_minus_abs(x):
    """2^-|x|."""
    if INTERPRETED:
        return tl.exp2(-tl.abs(x))
    else:
        return tl.inline_asm_elementwise(
            '{ abs.f32 $0, $1; neg.f32 $0, $0; ex2.approx.ftz.f32 $0, $0; }',
            '=&f,f', [x], tl.float32, True, 1,
        )  # fmt: skip


@triton.jit
def log2(x):
    """Base 2 logarithm of x from 1 to 2, with an absolute error of 2^-22."""
    if INTERPRETED:
        return tl.log2(x)
    else:  # libdevice's is exact for tiny numbers too, at ten times the instructions
        return tl.inline_asm_elementwise('lg2.approx.ftz.f32 $0, $1;', '=f,f', [x], tl.float32, True, 1)


@triton.jit
def nudged(x, MODE: tl.constexpr):
    """Make x such that cutting it to MODE's digits rounds it, with an RMS error of 0.3 of the last digit.

    Half a digit, added to the bits, would round better but turn NaN into a number.
    """
    if MODE == 'tf32':
        return x * (1 + 0.7 / 2048)
    elif MODE == 'bf16':
        return x * (1 + 0.7 / 256)
    else:
        return x


@triton.jit
def rounded(x, MODE: tl.constexpr):
    """What a product in MODE reads of float32 x, rounded to nearest, as float32."""
    if MODE == 'tf32x3':
        return x
    else:
        last: tl.constexpr = 0x8000 if MODE == 'bf16' else 0x1000
        digits = (x.to(tl.uint32, bitcast=True) + last) & (0xFFFF0000 if MODE == 'bf16' else 0xFFFFE000)
        return tl.where(x == x, digits.to(tl.float32, bitcast=True), x)  # the addition may end NaN


@triton.jit
def tf32_ready(x, MODE: tl.constexpr):
    """Make float32 x ready for product(), which rounds to bf16 by itself but cuts to tf32."""
    if MODE == 'tf32' and not INTERPRETED:  # which cuts nothing
        return nudged(x, MODE)
    else:
        return x


@triton.jit
def cut(x, MODE: tl.constexpr):
    """What a product in MODE reads of nudged float32 x, as float32."""
    if MODE == 'tf32x3':
        return x
    else:
        digits = x.to(tl.uint32, bitcast=True) & (0xFFFF0000 if MODE == 'bf16' else 0xFFFFE000)
        return digits.to(tl.float32, bitcast=True)


@triton.jit
def split(x, MODE: tl.constexpr):
    """Return float32 x as two terms of twice as many digits as a product in MODE reads of one."""
    high = cut(x, MODE)
    if MODE == 'bf16' and not INTERPRETED:
        return high.to(tl.bfloat16), (x - high).to(tl.bfloat16)
    else:
        return high, x - high


@triton.jit
def product(a, b, acc, MODE: tl.constexpr):
    """Add a @ b to acc in MODE's precision: rounds to bf16, cuts to tf32."""
    if MODE == 'bf16':
        a = a.to(tl.bfloat16)
        b = b.to(tl.bfloat16)
        if INTERPRETED:  # it has no bf16 product
            a = a.to(tl.float32)
            b = b.to(tl.float32)
        return tl.dot(a, b, acc)
    else:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), acc, input_precision=MODE)


@triton.jit
def masked(x, mask, MODE: tl.constexpr):
    """Keep x where mask (int16) is -1, and 0 where it is 0."""
    if MODE == 'bf16' and not INTERPRETED:  # two elements an instruction
        x = x.to(tl.bfloat16)
        return tl.inline_asm_elementwise('and.b32 $0, $1, $2;', '=r,r,r', [x, mask], tl.bfloat16, True, 2)
    else:
        return tl.where(mask != 0, x, 0.0)


@triton.jit
def shuffled(x):
    """Columns 0 1 2 .. 7 of each eight as 0 2 4 6 1 3 5 7.

    That is how a tf32 product wants what another product left in a thread's registers; a sum over columns
    does not mind, if both factors are shuffled.
    """
    EIGHTS: tl.constexpr = x.shape[1] // 8
    x = tl.permute(tl.reshape(x, (x.shape[0], EIGHTS, 4, 2)), (0, 1, 3, 2))
    return tl.reshape(x, (x.shape[0], EIGHTS * 8))
