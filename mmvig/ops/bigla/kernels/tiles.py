"""Tiles, states, sums of log decays and constant tables: where they lie, and sums over tokens."""

import triton
import triton.language as tl

from mmvig.ops.arithmetic import INTERPRETED
from mmvig.ops.bigla.kernels.arithmetic import split
from mmvig.ops.bigla.kernels.gates import log2_gate
from mmvig.ops.launch import VERSION

# Largest sum of |log2 decay| over a chunk for the factored form: its factors stay within 2^(+-SPAN / 2), so
# that inputs up to 2^30 do not overflow.
SPAN = tl.constexpr(180.0)
COLUMNS = tl.constexpr(8 if VERSION >= (3, 5) else 16)  # the fewest of a product
# The least log2 decay of a token: 2 to it is 0 in float32, sums of it are strong, and it fits into float16.
LEAST = tl.constexpr(-1024.0)
# Numbers of the tables [BT, BT] that sum a tile over tokens, as table @ tile.
BALANCED = tl.constexpr(0)  # +1/2 up to the row's token, -1/2 after it
UP_TO = tl.constexpr(1)  # 1 up to the row's token
AFTER = tl.constexpr(2)  # 1 after the row's token
BEFORE = tl.constexpr(3)  # 1 before the row's token
FROM = tl.constexpr(4)  # 1 from the row's token on
# Integers that differ from call to call: Triton must not compile a kernel for their values.
INTS = [
    *['T', 'H', 'CH', 'NS', 'NT', 'n_states', 'n_sums'],
    *(f's_{x}{axis}' for x in [*'qkvo', 'gf', 'gb'] for axis in 'bth'),
    *(f's_d{x}{axis}' for x in [*'qkvo', 'gf', 'gb'] for axis in 'bth'),
]


@triton.jit
def load_table(p_table, i: tl.constexpr, BT: tl.constexpr):
    """Table or mask number i, [BT, BT] in its dtype."""
    o_t = tl.arange(0, BT)
    return tl.load(p_table + i * BT * BT + (o_t[:, None] * BT + o_t[None, :]))  # [BT, BT]


@triton.jit
def tile_sum(b_table, b_x, MODE: tl.constexpr, TRANSPOSED: tl.constexpr = False):
    """Sum log2 decays x [BT, BK] over tokens: table @ x [BT, BK]; TRANSPOSED: trans(table @ x).

    float16 keeps 11 digits of each: an error of 2^-12 |x| in the exponent, so of at most 2^-12 * 0.4 in any
    decay 2^x; half of a float16's last digit is kept by a second term where inputs are float16.
    """
    if TRANSPOSED:
        b_x = tl.trans(b_x)
        b_table = tl.trans(b_table)
    if MODE == 'tf32x3':
        b_table = b_table.to(tl.float32)
        return (  # [BT, BK]
            tl.dot(b_x, b_table, input_precision=MODE)
            if TRANSPOSED
            else tl.dot(b_table, b_x, input_precision=MODE)
        )
    else:
        b_high = b_x.to(tl.float16)
        b_c = tl.dot(b_high, b_table) if TRANSPOSED else tl.dot(b_table, b_high)  # [BT, BK]
        if MODE == 'tf32':
            b_low = (b_x - b_high.to(tl.float32)).to(tl.float16)
            b_c = tl.dot(b_low, b_table, b_c) if TRANSPOSED else tl.dot(b_table, b_low, b_c)
        return b_c


@triton.jit
def whole_sum(b_x, MODE: tl.constexpr):
    """Sum log2 decays x [BT, BK] over all tokens as tile_sum does: [BK].

    By a product, which leaves it where the rows of a state [BK, BV] are; all columns are the same.
    """
    b_ones = tl.full((COLUMNS, b_x.shape[0]), 1.0, tl.float16)
    return tl.sum(tile_sum(b_ones, b_x, MODE, True), 1) / COLUMNS  # [BK, COLUMNS] -> [BK]


@triton.jit
def running_sum(b_table, b_x, MODE: tl.constexpr):
    """Sum any float32 x [BT, BK], in which large numbers may cancel, over tokens: table @ x."""
    if MODE == 'tf32x3' or INTERPRETED:
        return tl.dot(b_table.to(tl.float32), b_x, input_precision='tf32x3')  # [BT, BK]
    else:  # 16 digits of each, at any size
        b_high, b_low = split(b_x, 'bf16')
        return tl.dot(b_table, b_low, tl.dot(b_table, b_high))  # [BT, BK]


@triton.jit
def as_float32(scale, inv):
    """Two numbers, which Inductor passes as float64, as Triton does."""
    return tl.cast(scale, tl.float32), tl.cast(inv, tl.float32)


@triton.jit
def at(p, i_b, i_h, s_b, s_h, UNIT: tl.constexpr):
    """Where head i_h of image i_b starts."""
    return p + (i_b.to(tl.int64) * s_b + i_h.to(tl.int64) * s_h) * UNIT


@triton.jit
def load_tile(
    p, i_t, i_w, T, s_t, other, W: tl.constexpr, BT: tl.constexpr, BW: tl.constexpr, UNIT: tl.constexpr
):
    """Block i_t of tokens and i_w of columns of a [T, W] matrix; `other` beyond the edges."""
    o_t = tl.arange(0, BT)[:, None]
    o_w = i_w * BW + tl.arange(0, BW)[None, :]
    s_t *= UNIT
    p += tl.cast(s_t, tl.int64) * (i_t * BT)
    m_tw = i_t * BT + o_t < T
    if W % BW != 0:
        m_tw &= o_w < W
    return tl.load(p + (o_t * s_t + o_w), mask=m_tw, other=other)  # [BT, BW]


@triton.jit
def store_tile(
    p, b_x, i_t, i_w, T, s_t, W: tl.constexpr, BT: tl.constexpr, BW: tl.constexpr, UNIT: tl.constexpr,
    wanted=True,
):  # fmt: skip
    """Write x [BT, BW] where load_tile() reads it, in the matrix's dtype, if `wanted`."""
    o_t = tl.arange(0, BT)[:, None]
    o_w = i_w * BW + tl.arange(0, BW)[None, :]
    s_t *= UNIT
    p += tl.cast(s_t, tl.int64) * (i_t * BT)
    m_tw = (i_t * BT + o_t < T) & wanted
    if W % BW != 0:
        m_tw &= o_w < W
    tl.store(p + (o_t * s_t + o_w), b_x.to(p.dtype.element_ty), mask=m_tw)


@triton.jit
def load_gates(
    p, i_t, T, s_t, inv, K: tl.constexpr, BT: tl.constexpr, BK: tl.constexpr, UNIT: tl.constexpr,
    MODE: tl.constexpr,
):  # fmt: skip
    """The log2 decays [BT, BK] of a chunk's gate logits, 0 beyond the edges; and these in their dtype."""
    b_g = load_tile(p, i_t, 0, T, s_t, float('inf'), K, BT, BK, UNIT)  # [BT, BK]
    b_ld = log2_gate(b_g, MODE) * inv
    return tl.maximum(b_ld, LEAST, propagate_nan=tl.PropagateNan.ALL), b_g


@triton.jit
def channels(BK: tl.constexpr, SHUFFLE: tl.constexpr):
    """Numbers of the channels 0 .. BK - 1, SHUFFLE: in the order of shuffled()."""
    o_k = tl.arange(0, BK)
    if SHUFFLE:
        o_k = o_k // 8 * 8 + o_k % 4 * 2 + o_k // 4 % 2
    return o_k


@triton.jit
def place_of(p_state, i, K: tl.constexpr, V: tl.constexpr):
    """Where state number i begins, and from a row of it to the next."""
    return p_state + i.to(tl.int64) * (K * V), V


@triton.jit
def place_in_output(
    p_o, p_last, i_bh, i_t, i_z, NT, s_ot, K: tl.constexpr, V: tl.constexpr,
    BT: tl.constexpr, UNIT: tl.constexpr,
):  # fmt: skip
    """The same for what enters chunk i_t, forward (i_z = 0) or backward: in the chunk's rows of the output.

    Those are written when the state has been read, by the same program. The last chunk may have too few
    rows: p_last [sequences, K, V] holds the only state that enters it.
    """
    s_t = s_ot * UNIT
    last = i_t == NT - 1
    p = p_o + (i_t * BT + i_z * K).to(tl.int64) * s_t
    return tl.where(last, p_last + i_bh.to(tl.int64) * (K * V), p), tl.where(last, V, s_t)


@triton.jit
def load_state(place, there, i_v, K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    SHUFFLE: tl.constexpr,
):  # fmt: skip
    """Block i_v of columns of the state in a place, as float32; zeros unless `there`."""
    p, s_k = place
    o_k = channels(BK, SHUFFLE)[:, None]
    o_v = i_v * BV + tl.arange(0, BV)[None, :]
    m_kv = (o_k < K) & (o_v < V) & there
    return tl.load(p + (o_k * s_k + o_v), mask=m_kv, other=0.0).to(tl.float32)  # [BK, BV]


@triton.jit
def store_state(place, b_x, i_v, K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr):
    """Write x [BK, BV] as block i_v of columns of the state in a place."""
    p, s_k = place
    o_k = tl.arange(0, BK)[:, None]
    o_v = i_v * BV + tl.arange(0, BV)[None, :]
    tl.store(p + (o_k * s_k + o_v), b_x.to(p.dtype.element_ty), mask=(o_k < K) & (o_v < V))


@triton.jit
def load_sum(p_sum, i, K: tl.constexpr, BK: tl.constexpr, SHUFFLE: tl.constexpr = False):
    """The sum of log2 decays over chunk i."""
    o_k = channels(BK, SHUFFLE)
    return tl.load(p_sum + i * K + o_k, mask=o_k < K, other=0.0)  # [BK]


@triton.jit
def load_half_decay(p_sum, i, K: tl.constexpr, BK: tl.constexpr, SHUFFLE: tl.constexpr = False):
    """2^(half the sum of log2 decays over chunk i), [BK]."""
    return tl.exp2(0.5 * load_sum(p_sum, i, K, BK, SHUFFLE))


@triton.jit
def store_sum(p_sum, b_x, i, K: tl.constexpr, BK: tl.constexpr):
    """Write x [BK] as the sum of log2 decays over chunk i."""
    o_k = tl.arange(0, BK)
    tl.store(p_sum + i * K + o_k, b_x, mask=o_k < K)


@triton.jit
def store_row(p_sum, b_x, i, row: tl.constexpr, K: tl.constexpr, BT: tl.constexpr, BK: tl.constexpr):
    """Write a row of x [BT, BK] as the sum of log2 decays over chunk i."""
    o_t = tl.arange(0, BT)[:, None]
    o_k = tl.arange(0, BK)[None, :]
    tl.store(p_sum + i * K + (0 * o_t + o_k), b_x, mask=(o_t == row) & (o_k < K))


@triton.jit
def is_strong(b_sum_f, b_sum_b, most: tl.constexpr):
    """Whether one of these sums of log2 decays, of either direction, is more than `most` binary orders."""
    return tl.min(tl.minimum(b_sum_f, b_sum_b)) < -most


@triton.jit
def any_strong(
    p_sum, i_tg, n, n_sums, K: tl.constexpr, BK: tl.constexpr, COUNT: tl.constexpr,
    most: tl.constexpr,
):  # fmt: skip
    """Whether a channel of min(n, COUNT) chunks from i_tg on decays by more than `most` binary orders."""
    o_k = tl.arange(0, BK)[None, :]
    o_t = tl.arange(0, COUNT)[:, None]
    p_sum += (i_tg + o_t) * K + o_k
    m_tk = (o_t < n) & (o_k < K)
    b_sum_b = tl.load(p_sum + n_sums * K, mask=m_tk, other=0.0)  # [COUNT, BK]
    return is_strong(tl.load(p_sum, mask=m_tk, other=0.0), b_sum_b, most)  # [COUNT, BK]


@triton.jit
def chunks_of_program(
    p_sum, NT, n_sums, H, CH, NV: tl.constexpr, K: tl.constexpr, BK: tl.constexpr,
    STRONG: tl.constexpr, EXACT: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """First and end of a program's chunks among all sequences'; STRONG: none if none needs that form."""
    if STRONG:
        first = tl.program_id(0) * CH
        end = tl.minimum(first + CH, n_sums)
        if not EXACT:  # noqa: SIM102  the first is known when this is compiled
            if not any_strong(p_sum, first, end - first, n_sums, K, BK, GROUP, SPAN):
                end = first
    else:
        i_bh = tl.program_id(2) * H + tl.program_id(1) // NV
        first = i_bh * NT + tl.program_id(0) * CH
        end = tl.minimum(first + CH, (i_bh + 1) * NT)
    return first, end


@triton.jit
def sequence_of(i_tg, NT, H, NV: tl.constexpr, STRONG: tl.constexpr):
    """Image, head and number of the sequence of chunk i_tg; unless STRONG, the program's."""
    if STRONG:
        i_bh = i_tg // NT
        return i_bh // H, i_bh % H, i_bh
    else:
        i_h = tl.program_id(1) // NV
        i_b = tl.program_id(2)
        return i_b, i_h, i_b * H + i_h
