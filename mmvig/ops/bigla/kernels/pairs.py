"""Pairs of tokens within a chunk: factored, or by levels where the factors would overflow."""

import triton
import triton.language as tl

from mmvig.ops.bigla.kernels.arithmetic import (
    INTERPRETED,
    cut,
    exp2_minus,
    product,
    shuffled,
    split,
    tf32_ready,
)
from mmvig.ops.bigla.kernels.tiles import tile_sum


@triton.jit
def sum_over(mask, x):
    """Sums of x [BT, BK] over the tokens that a 0/1 matrix [BT, BT] picks.

    In as many products as tf32x3 has, which would leave out x's last two digits: exponents of 20 want them.
    """
    mask = mask.to(tl.float32)
    high = cut(x, 'tf32')
    rest = x - high
    middle = cut(rest, 'tf32')
    c = tl.dot(mask, rest - middle, input_precision='tf32')
    c = tl.dot(mask, middle, c, input_precision='tf32')
    return tl.dot(mask, high, c, input_precision='tf32')


@triton.jit
def decay_over(mask, ld):
    """exp2 of sums of log2 decays [BT, BK] over the tokens that a 0/1 matrix [BT, BT] picks."""
    return tl.exp2(sum_over(mask, ld))


@triton.jit
def decay_to_ends(ld, BT: tl.constexpr, BACKWARD: tl.constexpr):
    """Decay between where the direction enters the chunk and each token, and to where it leaves it."""
    o = tl.arange(0, BT)
    t, j = o[:, None], o[None, :]
    if BACKWARD:
        return decay_over(j >= t, ld), decay_over(j < t, ld)
    else:
        return decay_over(j <= t, ld), decay_over(j > t, ld)


@triton.jit
def level_decays(z, ld, BT: tl.constexpr, BACKWARD: tl.constexpr):
    """Decays of one direction to and from the middle of each block of 2z tokens, [BT, BK], none above 1.

    A pair in different halves has decay(t, s) = decay of one half's token * decay of the other's: the
    factored form with a reference between the two, exact for any gates. Also which tokens have queries in
    such pairs (the second half's, BACKWARD the first's) and which pairs share a block.
    """
    o = tl.arange(0, BT)
    t, j = o[:, None], o[None, :]
    second = (t // z) % 2 == 1
    middle = (t // (2 * z)) * (2 * z) + z
    same = t // (2 * z) == j // (2 * z)
    if BACKWARD:
        mask = tl.where(second, (j >= middle) & (j < t), (j >= t) & (j < middle))
        return (t // z) % 2 == 0, same, decay_over(mask & same, ld)
    else:
        mask = tl.where(second, (j >= middle) & (j <= t), (j > t) & (j < middle))
        return second, same, decay_over(mask & same, ld)


@triton.jit
def pairs(x, y, MODE: tl.constexpr, SPLIT: tl.constexpr):
    """All products x_t . y_s [t, s]; SPLIT: without rounding x."""
    c = tl.zeros((x.shape[0], y.shape[0]), tl.float32)
    if SPLIT:
        x, low = split(x, MODE)
        c = product(low, tl.trans(y), c, MODE)
    return product(x, tl.trans(y), c, MODE)


@triton.jit
def directions(af, ab, BT: tl.constexpr, MODE: tl.constexpr):
    """Forward pairs (t > s) of af, backward pairs of ab, both on the diagonal, where they are the same."""
    o = tl.arange(0, BT)
    t, s = o[:, None], o[None, :]
    if MODE == 'bf16' and not INTERPRETED:  # two elements at once: chosen bit by bit, then times 1 or 2
        past = tl.where(t >= s, -1, 0).to(tl.int16)
        times = tl.where(t == s, 2.0, 1.0).to(tl.bfloat16)
        return tl.inline_asm_elementwise(
            """{
            .reg .b32 zero;
            mov.b32 zero, 0x80008000;
            lop3.b32 $0, $1, $2, $3, 0xca;
            fma.rn.bf16x2 $0, $0, $4, zero;
            }""",
            '=&r,r,r,r,r', [past, af.to(tl.bfloat16), ab.to(tl.bfloat16), times], tl.bfloat16, True, 2,
        )  # fmt: skip
    else:
        return tl.where(t >= s, af, ab) * tl.where(t == s, 2.0, 1.0)


@triton.jit
def pairs_by_levels(
    x, y, lf, lb, BT: tl.constexpr, MODE: tl.constexpr, SPLIT: tl.constexpr, SWAP: tl.constexpr
):
    """All x_t . (decay(t, s) * y_s) of both directions for any gates; x are the queries, SWAP: the keys."""
    o = tl.arange(0, BT)
    a = tl.where(o[:, None] == o[None, :], 2 * pairs(x, y, MODE, SPLIT), 0.0)
    z = 1
    while z < BT:
        for i in tl.static_range(2):
            asks, same, e = level_decays(z, lb if i else lf, BT, i == 1)
            if SWAP:
                asks = asks == 0
            a_z = pairs(tl.where(asks, x * e, 0.0), tl.where(asks, 0.0, y * e), MODE, SPLIT)
            a += tl.where(same, a_z, 0.0)
        z *= 2
    return a


@triton.jit
def chunk_pairs(
    x, y, lf, lb, table, BT: tl.constexpr, MODE: tl.constexpr, PAIR_MODE: tl.constexpr, SWAP: tl.constexpr,
    STRONG: tl.constexpr,
):  # fmt: skip
    """All products of queries x with decayed keys y (SWAP: keys x with queries), [x, y], of each direction.

    And x, decayed to the chunk's middle, and the log2 decays [BT, BK] from there, either in each direction.
    STRONG: the pairs of both directions, twice; x decayed to where a state enters; the decays as they come.
    """
    SHUFFLE: tl.constexpr = PAIR_MODE == 'tf32' and not STRONG
    SPLIT: tl.constexpr = MODE == 'tf32'  # float16 has as many digits as tf32
    y = tf32_ready(y, PAIR_MODE)
    if not SPLIT:
        x = tf32_ready(x, PAIR_MODE)
    if STRONG:
        uf, ub = lf, lb
        af = pairs_by_levels(x, y, lf, lb, BT, PAIR_MODE, SPLIT, SWAP)
        ab = af
        in_f, out_f = decay_to_ends(lf, BT, False)
        in_b, out_b = decay_to_ends(lb, BT, True)
        if SWAP:
            in_f, in_b = out_f, out_b
        xf = x * in_f
        xb = x * in_b
    else:
        uf = tile_sum(table, lf, MODE)
        ub = tile_sum(tl.trans(table), lb, MODE)
        if SWAP:
            xf, yf = x * exp2_minus(uf), y * tl.exp2(uf)
            xb, yb = x * exp2_minus(ub), y * tl.exp2(ub)
        else:
            xf, yf = x * tl.exp2(uf), y * exp2_minus(uf)
            xb, yb = x * tl.exp2(ub), y * exp2_minus(ub)
        if SHUFFLE:
            xf, yf, xb, yb = shuffled(xf), shuffled(yf), shuffled(xb), shuffled(yb)
        af = pairs(xf, yf, PAIR_MODE, SPLIT)
        ab = pairs(xb, yb, PAIR_MODE, SPLIT)
    if SPLIT:
        xf, xb = tf32_ready(xf, PAIR_MODE), tf32_ready(xb, PAIR_MODE)
    return af, ab, xf, xb, uf, ub
