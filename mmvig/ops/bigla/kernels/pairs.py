"""Pairs of tokens within a chunk: factored, or by levels where the factors would overflow."""

import triton
import triton.language as tl

from mmvig.ops.arithmetic import INTERPRETED
from mmvig.ops.bigla.kernels.arithmetic import (
    cut,
    exp2_minus,
    product,
    shuffled,
    split,
    tf32_ready,
)
from mmvig.ops.bigla.kernels.tiles import tile_sum


@triton.jit
def sum_over(m_ts, b_x):
    """Sums of x [BT, BK] over the tokens that a 0/1 matrix [BT, BT] picks.

    In as many products as tf32x3 has, which would leave out x's last two digits: exponents of 20 want them.
    """
    m_ts = m_ts.to(tl.float32)
    b_high = cut(b_x, 'tf32')
    b_rest = b_x - b_high
    b_middle = cut(b_rest, 'tf32')
    b_c = tl.dot(m_ts, b_rest - b_middle, input_precision='tf32')  # [BT, BK]
    b_c = tl.dot(m_ts, b_middle, b_c, input_precision='tf32')  # [BT, BK]
    return tl.dot(m_ts, b_high, b_c, input_precision='tf32')  # [BT, BK]


@triton.jit
def decay_over(m_ts, b_ld):
    """exp2 of sums of log2 decays [BT, BK] over the tokens that a 0/1 matrix [BT, BT] picks."""
    return tl.exp2(sum_over(m_ts, b_ld))


@triton.jit
def decay_to_ends(b_ld, BT: tl.constexpr, BACKWARD: tl.constexpr):
    """Decays [BT, BK] from where the direction enters the chunk to a token, and to where it leaves it."""
    o = tl.arange(0, BT)
    t, j = o[:, None], o[None, :]
    if BACKWARD:
        return decay_over(j >= t, b_ld), decay_over(j < t, b_ld)
    else:
        return decay_over(j <= t, b_ld), decay_over(j > t, b_ld)


@triton.jit
def level_decays(z, b_ld, BT: tl.constexpr, BACKWARD: tl.constexpr):
    """Decays of one direction to and from the middle of each block of 2z tokens, [BT, BK], none above 1.

    A pair in different halves has decay(t, s) = decay of one half's token * decay of the other's: the
    factored form with a reference between the two, exact for any gates. Also which tokens have queries in
    such pairs (the second half's, BACKWARD the first's) and which pairs share a block.
    """
    o = tl.arange(0, BT)
    t, j = o[:, None], o[None, :]
    m_second = (t // z) % 2 == 1
    middle = (t // (2 * z)) * (2 * z) + z
    m_same = t // (2 * z) == j // (2 * z)
    if BACKWARD:
        m_ts = tl.where(m_second, (j >= middle) & (j < t), (j >= t) & (j < middle))
        return (t // z) % 2 == 0, m_same, decay_over(m_ts & m_same, b_ld)
    else:
        m_ts = tl.where(m_second, (j >= middle) & (j <= t), (j > t) & (j < middle))
        return m_second, m_same, decay_over(m_ts & m_same, b_ld)


@triton.jit
def pairs(b_x, b_y, MODE: tl.constexpr, SPLIT: tl.constexpr):
    """All products x_t . y_s [t, s]; SPLIT: without rounding x."""
    b_a = tl.zeros((b_x.shape[0], b_y.shape[0]), tl.float32)
    if SPLIT:
        b_x, b_low = split(b_x, MODE)
        b_a = product(b_low, tl.trans(b_y), b_a, MODE)  # [BT, BT]
    return product(b_x, tl.trans(b_y), b_a, MODE)  # [BT, BT]


@triton.jit
def directions(b_af, b_ab, BT: tl.constexpr, MODE: tl.constexpr):
    """Forward pairs (t > s) of af, backward pairs of ab, both on the diagonal, where they are the same."""
    o = tl.arange(0, BT)
    t, s = o[:, None], o[None, :]
    if MODE == 'bf16' and not INTERPRETED:  # two elements at once: chosen bit by bit, then times 1 or 2
        b_past = tl.where(t >= s, -1, 0).to(tl.int16)
        b_times = tl.where(t == s, 2.0, 1.0).to(tl.bfloat16)
        return tl.inline_asm_elementwise(
            """{
            .reg .b32 zero;
            mov.b32 zero, 0x80008000;
            lop3.b32 $0, $1, $2, $3, 0xca;
            fma.rn.bf16x2 $0, $0, $4, zero;
            }""",
            '=&r,r,r,r,r', [b_past, b_af.to(tl.bfloat16), b_ab.to(tl.bfloat16), b_times], tl.bfloat16,
            True, 2,
        )  # fmt: skip
    else:
        return tl.where(t >= s, b_af, b_ab) * tl.where(t == s, 2.0, 1.0)


@triton.jit
def pairs_by_levels(
    b_x, b_y, b_lf, b_lb, BT: tl.constexpr, MODE: tl.constexpr, SPLIT: tl.constexpr, SWAP: tl.constexpr
):
    """All x_t . (decay(t, s) * y_s) of both directions for any gates; x are the queries, SWAP: the keys."""
    o = tl.arange(0, BT)
    b_a = tl.where(o[:, None] == o[None, :], 2 * pairs(b_x, b_y, MODE, SPLIT), 0.0)  # [BT, BT]
    z = 1
    while z < BT:
        for i in tl.static_range(2):
            m_asks, m_same, b_e = level_decays(z, b_lb if i else b_lf, BT, i == 1)
            if SWAP:
                m_asks = m_asks == 0
            b_a_z = pairs(tl.where(m_asks, b_x * b_e, 0.0), tl.where(m_asks, 0.0, b_y * b_e), MODE, SPLIT)
            b_a += tl.where(m_same, b_a_z, 0.0)
        z *= 2
    return b_a


@triton.jit
def chunk_pairs(
    b_x, b_y, b_lf, b_lb, b_table, BT: tl.constexpr, MODE: tl.constexpr, PAIR_MODE: tl.constexpr,
    SWAP: tl.constexpr, STRONG: tl.constexpr,
):  # fmt: skip
    """All products of queries x with decayed keys y (SWAP: keys x with queries), [x, y], of each direction.

    And x, decayed to the chunk's middle, and the log2 decays [BT, BK] from there, either in each direction.
    STRONG: the pairs of both directions, twice; x decayed to where a state enters; the decays as they come.
    """
    SHUFFLE: tl.constexpr = PAIR_MODE == 'tf32' and not STRONG
    SPLIT: tl.constexpr = MODE == 'tf32'  # float16 has as many digits as tf32
    b_y = tf32_ready(b_y, PAIR_MODE)
    if not SPLIT:
        b_x = tf32_ready(b_x, PAIR_MODE)
    if STRONG:
        b_uf, b_ub = b_lf, b_lb
        b_af = pairs_by_levels(b_x, b_y, b_lf, b_lb, BT, PAIR_MODE, SPLIT, SWAP)
        b_ab = b_af
        b_in_f, b_out_f = decay_to_ends(b_lf, BT, False)
        b_in_b, b_out_b = decay_to_ends(b_lb, BT, True)
        if SWAP:
            b_in_f, b_in_b = b_out_f, b_out_b
        b_xf = b_x * b_in_f
        b_xb = b_x * b_in_b
    else:
        b_uf = tile_sum(b_table, b_lf, MODE)  # [BT, BK]
        b_ub = tile_sum(tl.trans(b_table), b_lb, MODE)  # [BT, BK]
        if SWAP:
            b_xf, b_yf = b_x * exp2_minus(b_uf), b_y * tl.exp2(b_uf)
            b_xb, b_yb = b_x * exp2_minus(b_ub), b_y * tl.exp2(b_ub)
        else:
            b_xf, b_yf = b_x * tl.exp2(b_uf), b_y * exp2_minus(b_uf)
            b_xb, b_yb = b_x * tl.exp2(b_ub), b_y * exp2_minus(b_ub)
        if SHUFFLE:
            b_xf, b_yf, b_xb, b_yb = shuffled(b_xf), shuffled(b_yf), shuffled(b_xb), shuffled(b_yb)
        b_af = pairs(b_xf, b_yf, PAIR_MODE, SPLIT)  # [BT, BT]
        b_ab = pairs(b_xb, b_yb, PAIR_MODE, SPLIT)  # [BT, BT]
    if SPLIT:
        b_xf, b_xb = tf32_ready(b_xf, PAIR_MODE), tf32_ready(b_xb, PAIR_MODE)
    return b_af, b_ab, b_xf, b_xb, b_uf, b_ub
