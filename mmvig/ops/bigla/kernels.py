"""Triton kernels of BiGLA; README.md beside this file derives them, triton.py launches them.

Sizes: N tokens, H heads, K and V head widths, BT tokens of a chunk, NC chunks of a segment, BK, BV blocks
of widths, CH chunks (states_kernel: segments) of a program, n_states segments and n_sums chunks of all
sequences. Grids are (runs of CH, heads and blocks of V, images). Strides s_ come in units of UNIT elements;
SAME: k has q's strides and the gates have each other's, and so have their gradients. Sums over tokens are
products with constant tables, so that tiles [BT, BK] stay in the layout of the tensor cores.

All exponents are in base 2; `inv` is 1 / gate_normalizer. MODE is the precision of a product of matrices:
'bf16', 'tf32' or 'tf32x3', always with float32 accumulation; float32 inputs have 'tf32x3'.
"""

import os

import triton
import triton.language as tl

from mmvig.ops.arithmetic import sigmoid
from mmvig.ops.launch import VERSION

INTERPRETED = tl.constexpr(os.environ.get('TRITON_INTERPRET') == '1')
LOG2E = tl.constexpr(1.4426950408889634)
# Largest sum of |log2 decay| over a chunk for the factored form: its factors stay within 2^(+-SPAN / 2), so
# that inputs up to 2^30 do not overflow.
SPAN = tl.constexpr(180.0)
# Binary orders by which a gate's pairs may be smaller than those that its factored form cancels.
LOST = tl.constexpr(4.0)
COLUMNS = tl.constexpr(8 if VERSION >= (3, 5) else 16)  # the fewest of a product
# The least log2 decay of a token: 2 to it is 0 in float32, sums of it are strong, and it fits into float16.
LEAST = tl.constexpr(-1024.0)
# Numbers of the tables [BT, BT] that sum a tile over tokens, as table @ tile.
BALANCED = tl.constexpr(0)  # +1/2 up to the row's token, -1/2 after it
UP_TO = tl.constexpr(1)  # 1 up to the row's token
AFTER = tl.constexpr(2)  # 1 after the row's token
BEFORE = tl.constexpr(3)  # 1 before the row's token
FROM = tl.constexpr(4)  # 1 from the row's token on


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
def log2_sigmoid(x, MODE: tl.constexpr):
    """log2(sigmoid(x / log2 e)) without overflow; x = inf (padding) gives 0."""
    e = exp2_minus_abs(x)
    if MODE == 'tf32x3':
        # log2(1 + e) = e * P(e) on [0, 1], minimax in the relative error: float32 rounding.
        p = e * 0.007549245673541441 - 0.04256731714321047
        p = e * p + 0.11285660997282833
        p = e * p - 0.19711932442780655
        p = e * p + 0.2756415795174285
        p = e * p - 0.3584085153730151
        p = e * p + 0.4806929627347839
        p = e * p - 0.7213402082687197
        p = e * p + 1.4426949974364294
        return tl.minimum(x, 0.0) - e * p
    else:
        return tl.minimum(x, 0.0) - log2(1.0 + e)


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
    W: tl.constexpr = x.shape[1] // 8
    x = tl.permute(tl.reshape(x, (x.shape[0], W, 4, 2)), (0, 1, 3, 2))
    return tl.reshape(x, (x.shape[0], W * 8))


@triton.jit
def load_table(p_table, i: tl.constexpr, BT: tl.constexpr):
    """Table or mask number i, [BT, BT] in its dtype."""
    o = tl.arange(0, BT)
    return tl.load(p_table + i * BT * BT + (o[:, None] * BT + o[None, :]))


@triton.jit
def tile_sum(table, x, MODE: tl.constexpr, TRANSPOSED: tl.constexpr = False):
    """Sum log2 decays x [BT, BK] over tokens: table @ x; TRANSPOSED: trans(table @ x).

    float16 keeps 11 digits of each: an error of 2^-12 |x| in the exponent, so of at most 2^-12 * 0.4 in any
    decay 2^x; half of a float16's last digit is kept by a second term where inputs are float16.
    """
    if TRANSPOSED:
        x = tl.trans(x)
        table = tl.trans(table)
    if MODE == 'tf32x3':
        table = table.to(tl.float32)
        return (
            tl.dot(x, table, input_precision=MODE) if TRANSPOSED else tl.dot(table, x, input_precision=MODE)
        )
    else:
        high = x.to(tl.float16)
        c = tl.dot(high, table) if TRANSPOSED else tl.dot(table, high)
        if MODE == 'tf32':
            low = (x - high.to(tl.float32)).to(tl.float16)
            c = tl.dot(low, table, c) if TRANSPOSED else tl.dot(table, low, c)
        return c


@triton.jit
def whole_sum(x, MODE: tl.constexpr):
    """Sum log2 decays x [BT, BK] over all tokens as tile_sum does: [BK].

    By a product, which leaves it where the rows of a state [BK, BV] are; all columns are the same.
    """
    ones = tl.full((COLUMNS, x.shape[0]), 1.0, tl.float16)
    return tl.sum(tile_sum(ones, x, MODE, True), 1) / COLUMNS


@triton.jit
def add_tokens(
    x, y, ld, table, state, MODE: tl.constexpr, PAIR_MODE: tl.constexpr, ONE_WARP: tl.constexpr
):  # fmt: skip
    """State [BK, BV] + sum over tokens of decayed x [BT, BK] times y [BT, BV]; the decays: 2^(table @ ld).

    ONE_WARP: the decays are made transposed, so that the factor of the product is already where it must
    be; with several warps it has to go through shared memory either way.
    """
    if ONE_WARP:
        x = tl.trans(x) * tl.exp2(tile_sum(table, ld, MODE, True))
    else:
        x = tl.trans(x * tl.exp2(tile_sum(table, ld, MODE)))
    return product(x, y, state, PAIR_MODE)


@triton.jit
def running_sum(table, x, MODE: tl.constexpr):
    """Sum any float32 x [BT, BK], in which large numbers may cancel, over tokens: table @ x."""
    if MODE == 'tf32x3' or INTERPRETED:
        return tl.dot(table.to(tl.float32), x, input_precision='tf32x3')
    else:  # 16 digits of each, at any size
        high, low = split(x, 'bf16')
        return tl.dot(table, low, tl.dot(table, high))


@triton.jit
def at(p, i_b, i_h, s_b, s_h, UNIT: tl.constexpr):
    """Where head i_h of image i_b starts."""
    return p + (i_b.to(tl.int64) * s_b + i_h.to(tl.int64) * s_h) * UNIT


@triton.jit
def load_tile(
    p, i_c, i_d, N, s_n, other, D: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr, UNIT: tl.constexpr
):
    """Columns i_d * BD on of chunk i_c of a [N, D] matrix: [BT, BD], `other` beyond the edges."""
    o_t = tl.arange(0, BT)[:, None]
    o_d = i_d * BD + tl.arange(0, BD)[None, :]
    s_n *= UNIT
    p += s_n.to(tl.int64) * (i_c * BT)
    mask = i_c * BT + o_t < N
    if D % BD != 0:
        mask &= o_d < D
    return tl.load(p + (o_t * s_n + o_d), mask=mask, other=other)


@triton.jit
def store_tile(
    p, x, i_c, i_d, N, s_n, D: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr, UNIT: tl.constexpr,
    wanted=True,
):  # fmt: skip
    """Write [BT, BD] as chunk i_c, columns i_d * BD on, of a [N, D] matrix, in its dtype, if `wanted`."""
    o_t = tl.arange(0, BT)[:, None]
    o_d = i_d * BD + tl.arange(0, BD)[None, :]
    s_n *= UNIT
    p += s_n.to(tl.int64) * (i_c * BT)
    mask = (i_c * BT + o_t < N) & wanted
    if D % BD != 0:
        mask &= o_d < D
    tl.store(p + (o_t * s_n + o_d), x.to(p.dtype.element_ty), mask=mask)


@triton.jit
def load_gates(
    p, i_c, N, s_n, inv, K: tl.constexpr, BT: tl.constexpr, BK: tl.constexpr, UNIT: tl.constexpr,
    MODE: tl.constexpr,
):  # fmt: skip
    """The log2 decays of a chunk's gate logits g [BT, BK], 0 beyond the edges; and g in its dtype."""
    g = load_tile(p, i_c, 0, N, s_n, float('inf'), K, BT, BK, UNIT)
    ld = log2_sigmoid(g.to(tl.float32) * LOG2E, MODE) * inv
    return tl.maximum(ld, LEAST, propagate_nan=tl.PropagateNan.ALL), g


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
    p_o, p_last, i_bh, i_c, i_z, n_chunks, s_on, K: tl.constexpr, V: tl.constexpr,
    BT: tl.constexpr, UNIT: tl.constexpr,
):  # fmt: skip
    """The same for what enters chunk i_c, forward (i_z = 0) or backward: in the chunk's rows of the output.

    Those are written when the state has been read, by the same program. The last chunk may have too few
    rows: p_last [sequences, K, V] holds the only state that enters it.
    """
    s_n = s_on * UNIT
    last = i_c == n_chunks - 1
    p = p_o + (i_c * BT + i_z * K).to(tl.int64) * s_n
    return tl.where(last, p_last + i_bh.to(tl.int64) * (K * V), p), tl.where(last, V, s_n)


@triton.jit
def load_state(place, there, i_v, K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    SHUFFLE: tl.constexpr,
):  # fmt: skip
    """The state in a place, columns i_v * BV on, as float32 [BK, BV]; zeros unless `there`."""
    p, s_k = place
    o_k = channels(BK, SHUFFLE)[:, None]
    o_v = i_v * BV + tl.arange(0, BV)[None, :]
    mask = (o_k < K) & (o_v < V) & there
    return tl.load(p + (o_k * s_k + o_v), mask=mask, other=0.0).to(tl.float32)


@triton.jit
def store_state(place, x, i_v, K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr):
    """Write the state in a place, columns i_v * BV on."""
    p, s_k = place
    o_k = tl.arange(0, BK)[:, None]
    o_v = i_v * BV + tl.arange(0, BV)[None, :]
    tl.store(p + (o_k * s_k + o_v), x.to(p.dtype.element_ty), mask=(o_k < K) & (o_v < V))


@triton.jit
def load_sum(p_sum, i, K: tl.constexpr, BK: tl.constexpr, SHUFFLE: tl.constexpr = False):
    """The sum of log2 decays over chunk i, [BK]."""
    o_k = channels(BK, SHUFFLE)
    return tl.load(p_sum + i * K + o_k, mask=o_k < K, other=0.0)


@triton.jit
def load_half_decay(p_sum, i, K: tl.constexpr, BK: tl.constexpr, SHUFFLE: tl.constexpr = False):
    """2^(half the sum of log2 decays over chunk i), [BK]."""
    return tl.exp2(0.5 * load_sum(p_sum, i, K, BK, SHUFFLE))


@triton.jit
def store_sum(p_sum, x, i, K: tl.constexpr, BK: tl.constexpr):
    """Write x [BK] as the sum of log2 decays over chunk i."""
    o_k = tl.arange(0, BK)
    tl.store(p_sum + i * K + o_k, x, mask=o_k < K)


@triton.jit
def store_row(p_sum, x, i, row: tl.constexpr, K: tl.constexpr, BT: tl.constexpr, BK: tl.constexpr):
    """Write a row of x [BT, BK] as the sum of log2 decays over chunk i."""
    o_t = tl.arange(0, BT)[:, None]
    o_k = tl.arange(0, BK)[None, :]
    tl.store(p_sum + i * K + (0 * o_t + o_k), x, mask=(o_t == row) & (o_k < K))


@triton.jit
def is_strong(sum_f, sum_b, most: tl.constexpr = SPAN):
    """Whether one of these sums of log2 decays, of either direction, is more than `most` binary orders."""
    return tl.min(tl.minimum(sum_f, sum_b)) < -most


@triton.jit
def any_strong(
    p_sum, i, n, n_sums, K: tl.constexpr, BK: tl.constexpr, COUNT: tl.constexpr, most: tl.constexpr = SPAN
):  # fmt: skip
    """Whether a channel of chunks i .. i + min(n, COUNT) - 1 decays by more than `most` binary orders."""
    o_k = tl.arange(0, BK)[None, :]
    o_c = tl.arange(0, COUNT)[:, None]
    p_sum += (i + o_c) * K + o_k
    mask = (o_c < n) & (o_k < K)
    sum_b = tl.load(p_sum + n_sums * K, mask=mask, other=0.0)
    return is_strong(tl.load(p_sum, mask=mask, other=0.0), sum_b, most)


@triton.jit
def chunks_of_program(
    p_sum, n_chunks, n_sums, H, CH, NV: tl.constexpr, K: tl.constexpr, BK: tl.constexpr,
    STRONG: tl.constexpr, EXACT: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """First and end of a program's chunks among all sequences'; STRONG: none if none needs that form."""
    if STRONG:
        first = tl.program_id(0) * CH
        end = tl.minimum(first + CH, n_sums)
        if not EXACT:  # noqa: SIM102  the first is known when this is compiled
            if not any_strong(p_sum, first, end - first, n_sums, K, BK, GROUP):
                end = first
    else:
        i_bh = tl.program_id(2) * H + tl.program_id(1) // NV
        first = i_bh * n_chunks + tl.program_id(0) * CH
        end = tl.minimum(first + CH, (i_bh + 1) * n_chunks)
    return first, end


@triton.jit
def sequence_of(i, n_chunks, H, NV: tl.constexpr, STRONG: tl.constexpr):
    """Image, head and number of the sequence of chunk i; unless STRONG, the program's."""
    if STRONG:
        i_bh = i // n_chunks
        return i_bh // H, i_bh % H, i_bh
    else:
        i_h = tl.program_id(1) // NV
        i_b = tl.program_id(2)
        return i_b, i_h, i_b * H + i_h


# Integers that differ from call to call: Triton must not compile a kernel for their values.
INTS = [
    *['N', 'H', 'CH', 'NS', 'n_states', 'n_sums', 'n_chunks'],
    *(f's_{x}{axis}' for x in [*'qkvfbo', 'dq', 'dk', 'dv', 'df', 'db'] for axis in 'bnh'),
]


@triton.jit(do_not_specialize=INTS)
def states_kernel(
    p_q, p_k, p_v, p_f, p_b, p_o, p_state, p_sum, p_table, N, H, n_states, n_sums,
    s_qb, s_qn, s_qh, s_kb, s_kn, s_kh, s_vb, s_vn, s_vh, s_fb, s_fn, s_fh, s_bb, s_bn, s_bh, s_ob, s_on,
    s_oh, CH, scale, inv,
    K: tl.constexpr, V: tl.constexpr, BT: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    UNIT: tl.constexpr, SAME: tl.constexpr, MODE: tl.constexpr, PAIR_MODE: tl.constexpr, NC: tl.constexpr,
    BACKWARD: tl.constexpr, PARTS: tl.constexpr, ONE_WARP: tl.constexpr,
):  # fmt: skip
    """What each segment alone adds to the states that leave it; each chunk's sums of log2 decays.

    state 0 = sum_s (decay from s to the segment's end * k_s) v_s^T      1: to its start, backward decay
    state 2 = sum_t (decay from the start to t * q_t) do_t^T, BACKWARD   3: from its end, backward decay
    A chunk is PARTS tiles of BT tokens: few registers, so many programs, with few states.
    """
    if SAME:
        s_kb, s_kn, s_kh = s_qb, s_qn, s_qh
        s_bb, s_bn, s_bh = s_fb, s_fn, s_fh
    NV: tl.constexpr = (V + BV - 1) // BV
    i_v = tl.program_id(1) % NV
    i_h = tl.program_id(1) // NV
    i_b = tl.program_id(2)
    i_bh = i_b * H + i_h
    n_chunks = tl.cdiv(N, BT * PARTS)
    n_segments = tl.cdiv(n_chunks, NC)
    p_q = at(p_q, i_b, i_h, s_qb, s_qh, UNIT)
    p_k = at(p_k, i_b, i_h, s_kb, s_kh, UNIT)
    p_v = at(p_v, i_b, i_h, s_vb, s_vh, UNIT)
    p_f = at(p_f, i_b, i_h, s_fb, s_fh, UNIT)
    p_b = at(p_b, i_b, i_h, s_bb, s_bh, UNIT)
    p_o = at(p_o, i_b, i_h, s_ob, s_oh, UNIT)
    p_sum += i_bh * n_chunks * K
    nothing = tl.zeros((BK, BV), tl.float32)
    after = load_table(p_table, AFTER, BT)
    before = load_table(p_table, BEFORE, BT)
    if BACKWARD:
        up_to = load_table(p_table, UP_TO, BT)
    TILES: tl.constexpr = NC * PARTS
    one = tl.full((BK,), 1.0, tl.float32)
    s0, s1, s2, s3 = nothing, nothing, nothing, nothing
    decay_f, decay_b = one, one
    sum_f = tl.zeros((BK,), tl.float32)
    sum_b = tl.zeros((BK,), tl.float32)
    first = tl.program_id(0) * CH
    # One loop over the tiles of all segments, as only loads of an innermost loop are under way ahead.
    for i_t in range(first * TILES, tl.minimum(first + CH, n_segments) * TILES):
        lf, _ = load_gates(p_f, i_t, N, s_fn, inv, K, BT, BK, UNIT, MODE)
        lb, _ = load_gates(p_b, i_t, N, s_bn, inv, K, BT, BK, UNIT, MODE)
        k = load_tile(p_k, i_t, 0, N, s_kn, 0.0, K, BT, BK, UNIT).to(tl.float32)
        v = load_tile(p_v, i_t, i_v, N, s_vn, 0.0, V, BT, BV, UNIT)
        k = tf32_ready(k, PAIR_MODE)
        total_f = whole_sum(lf, MODE)
        total_b = whole_sum(lb, MODE)
        sum_f += total_f
        sum_b += total_b
        i_c = i_t // PARTS
        if i_t % PARTS == PARTS - 1:
            if (i_v == 0) & (i_c < n_chunks):
                store_sum(p_sum, sum_f, i_c, K, BK)
                store_sum(p_sum, sum_b, n_sums + i_c, K, BK)
            sum_f = tl.zeros((BK,), tl.float32)
            sum_b = tl.zeros((BK,), tl.float32)
        over_f = tl.exp2(total_f)
        over_b = tl.exp2(total_b)
        if TILES > 1:
            s0 *= over_f[:, None]
        s0 = add_tokens(k, v, lf, after, s0, MODE, PAIR_MODE, ONE_WARP)
        own = add_tokens(k, v, lb, before, nothing, MODE, PAIR_MODE, ONE_WARP)
        s1 += decay_b[:, None] * own
        if BACKWARD:
            q = load_tile(p_q, i_t, 0, N, s_qn, 0.0, K, BT, BK, UNIT).to(tl.float32)
            q = tf32_ready(q * scale, PAIR_MODE)
            do = load_tile(p_o, i_t, i_v, N, s_on, 0.0, V, BT, BV, UNIT)
            own = add_tokens(q, do, lf, up_to, nothing, MODE, PAIR_MODE, ONE_WARP)
            s2 += decay_f[:, None] * own
            decay_f *= over_f
            if TILES > 1:
                s3 *= over_b[:, None]
            s3 = add_tokens(q, do, lb, tl.trans(up_to), s3, MODE, PAIR_MODE, ONE_WARP)
        decay_b *= over_b
        if i_t % TILES == TILES - 1:
            i_state = i_bh * n_segments + i_t // TILES
            store_state(place_of(p_state, i_state, K, V), s0, i_v, K, V, BK, BV)
            store_state(place_of(p_state, n_states + i_state, K, V), s1, i_v, K, V, BK, BV)
            if BACKWARD:
                store_state(place_of(p_state, n_states * 2 + i_state, K, V), s2, i_v, K, V, BK, BV)
                store_state(place_of(p_state, n_states * 3 + i_state, K, V), s3, i_v, K, V, BK, BV)
            # Nothing of this segment may be left in the next, were it NaN.
            s0, s1, s2, s3 = nothing, nothing, nothing, nothing
            decay_f, decay_b = one, one


@triton.jit(do_not_specialize=INTS)
def walk_kernel(
    p_q, p_k, p_v, p_f, p_b, p_o, p_state, p_sum, p_table, N, H, n_states, n_sums,
    s_qb, s_qn, s_qh, s_kb, s_kn, s_kh, s_vb, s_vn, s_vh, s_fb, s_fn, s_fh, s_bb, s_bn, s_bh, s_ob, s_on,
    s_oh, scale, inv,
    K: tl.constexpr, V: tl.constexpr, BT: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    UNIT: tl.constexpr, SAME: tl.constexpr, MODE: tl.constexpr, PAIR_MODE: tl.constexpr,
    ONE_WARP: tl.constexpr, IN_OUTPUT: tl.constexpr,
):  # fmt: skip
    """What states_kernel and scan_kernel do, for short sequences and NC = 1.

    A program walks along a sequence and carries one of its states, so that nothing is left to scan.
    IN_OUTPUT: p_o is the output, whose memory takes the states until it is written; p_state the last ones.
    """
    if SAME:
        s_kb, s_kn, s_kh = s_qb, s_qn, s_qh
        s_bb, s_bn, s_bh = s_fb, s_fn, s_fh
    NV: tl.constexpr = (V + BV - 1) // BV
    i_z = tl.program_id(0)
    i_v = tl.program_id(1) % NV
    i_h = tl.program_id(1) // NV
    i_b = tl.program_id(2)
    i_bh = i_b * H + i_h
    n_chunks = tl.cdiv(N, BT)
    reverse = (i_z == 1) | (i_z == 2)
    of_keys = i_z < 2
    if of_keys:
        p_x = at(p_k, i_b, i_h, s_kb, s_kh, UNIT)
        p_y = at(p_v, i_b, i_h, s_vb, s_vh, UNIT)
        s_x, s_y = s_kn, s_vn
    else:
        p_x = at(p_q, i_b, i_h, s_qb, s_qh, UNIT)
        p_y = at(p_o, i_b, i_h, s_ob, s_oh, UNIT)
        s_x, s_y = s_qn, s_on
    if i_z % 2 == 0:
        p_g = at(p_f, i_b, i_h, s_fb, s_fh, UNIT)
        s_g = s_fn
    else:
        p_g = at(p_b, i_b, i_h, s_bb, s_bh, UNIT)
        s_g = s_bn
    # AFTER, BEFORE, UP_TO, FROM: how far a token's part is from where the state leaves the chunk.
    i_table = tl.where(of_keys, i_z + AFTER, tl.where(i_z == 2, UP_TO, FROM))
    table = load_table(p_table + i_table * BT * BT, 0, BT)
    p_sum += (i_z % 2 * n_sums + i_bh * n_chunks) * K
    i_state = i_z * n_states.to(tl.int64) + i_bh * n_chunks
    factor = tl.where(of_keys, 1.0, scale)
    state = tl.zeros((BK, BV), tl.float32)
    for i in range(n_chunks - 1):
        i_c = tl.where(reverse, n_chunks - 1 - i, i)
        ld, _ = load_gates(p_g, i_c, N, s_g, inv, K, BT, BK, UNIT, MODE)
        total = whole_sum(ld, MODE)
        x = load_tile(p_x, i_c, 0, N, s_x, 0.0, K, BT, BK, UNIT).to(tl.float32)
        y = load_tile(p_y, i_c, i_v, N, s_y, 0.0, V, BT, BV, UNIT)
        if of_keys & (i_v == 0):
            store_sum(p_sum, total, i_c, K, BK)
        x = tf32_ready(x * factor, PAIR_MODE)
        state *= tl.exp2(total)[:, None]
        state = add_tokens(x, y, ld, table, state, MODE, PAIR_MODE, ONE_WARP)
        if IN_OUTPUT:
            o_at = at(p_o, i_b, i_h, s_ob, s_oh, UNIT)
            enters = tl.where(reverse, i_c - 1, i_c + 1)
            place = place_in_output(o_at, p_state, i_bh, enters, i_z, n_chunks, s_on, K, V, BT, UNIT)
        else:
            place = place_of(p_state, i_state + i_c, K, V)
        store_state(place, state, i_v, K, V, BK, BV)
    if of_keys & (i_v == 0):  # what leaves the last chunk enters none
        i_c = tl.where(reverse, 0, n_chunks - 1)
        last, _ = load_gates(p_g, i_c, N, s_g, inv, K, BT, BK, UNIT, MODE)
        store_sum(p_sum, whole_sum(last, MODE), i_c, K, BK)


@triton.jit
def join(decay_a, state_a, decay_b, state_b):
    """Two runs of segments, a first, as one: (decay over it, state after it)."""
    return decay_a * decay_b, decay_b * state_a + state_b


@triton.jit
def join_before(decay_a, state_a, part_a, before_a, decay_b, state_b, part_b, before_b):
    """The same with (decay to, state at) the start of the last."""
    return decay_a * decay_b, decay_b * state_a + state_b, decay_a * part_b, part_b * state_a + before_b


@triton.jit(do_not_specialize=INTS)
def scan_kernel(
    p_state, p_sum, NS, n_states, n_chunks,
    K: tl.constexpr, V: tl.constexpr, NC: tl.constexpr, BW: tl.constexpr, BR: tl.constexpr,
    ROWS: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """Turn what each segment adds to a state into the state that leaves it, in place; ROWS rows a program.

    States 0 and 3 run from the first segment to the last, 1 and 2 the other way; 0 and 2 with the forward
    decay. BW runs of BR segments at once: a run is summed in one thread's registers.
    """
    i_bh = tl.program_id(0).to(tl.int64)
    i_k = tl.program_id(1) * ROWS
    i_z = tl.program_id(2)
    reverse = (i_z == 1) | (i_z == 2)
    PAIR: tl.constexpr = 2 if V % 2 == 0 else 1
    o_w = tl.arange(0, BW)
    o_r = tl.arange(0, BR)
    o_k = tl.arange(0, ROWS)
    o_v = tl.arange(0, BV)
    p_state += (i_z * n_states.to(tl.int64) + i_bh * NS) * (K * V) + i_k * V
    p_sum += ((i_z % 2) * tl.num_programs(0).to(tl.int64) + i_bh) * n_chunks * K + i_k
    of_row = (o_k * V)[:, None] + o_v[None, :]
    there = (i_k + o_k < K)[:, None] & (o_v < V)[None, :]
    carry = tl.zeros((ROWS, BV), tl.float32)
    for i in range(0, NS, BW * BR):
        o_s = i + o_w[:, None] * BR + o_r[None, :]
        m = o_s < NS
        o_s = tl.where(reverse, NS - 1 - o_s, o_s)
        off = o_s[:, :, None, None].to(tl.int64) * (K * V) + of_row[None, None, :, :]
        if BV != V or ROWS == 1:
            off = tl.max_contiguous(tl.multiple_of(off, (1, 1, 1, PAIR)), (1, 1, 1, PAIR))
        mask = m[:, :, None, None] & there[None, None, :, :]
        state = tl.load(p_state + off, mask=mask, other=0.0).to(tl.float32)
        o_s = o_s[:, :, None]
        m = m[:, :, None] & (i_k + o_k < K)[None, None, :]
        of_sum = p_sum + o_k[None, None, :]
        decay = tl.load(of_sum + o_s * (NC * K), mask=m, other=0.0)
        for j in tl.static_range(1, NC):
            decay += tl.load(of_sum + (o_s * NC + j) * K, mask=m & (o_s * NC + j < n_chunks), other=0.0)
        decay = tl.broadcast_to(tl.exp2(decay)[:, :, :, None], (BW, BR, ROWS, BV))
        decay, state = tl.associative_scan((decay, state), 1, join)
        last = (o_r == BR - 1)[None, :, None, None]
        d = tl.sum(tl.where(last, decay, 0.0), 1)  # [BW, ROWS, BV]
        s = tl.sum(tl.where(last, state, 0.0), 1)
        d, s, part, before = tl.associative_scan(
            (d, s, tl.full((BW, ROWS, BV), 1.0, tl.float32), tl.zeros_like(s)), 0, join_before
        )
        state += decay * (part * carry[None, :, :] + before)[:, None, :, :]
        tl.store(p_state + off, state.to(p_state.dtype.element_ty), mask=mask)
        carry = tl.sum(tl.where((o_w == BW - 1)[:, None, None], d * carry[None, :, :] + s, 0.0), 0)


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
def states_at(
    fwd, bwd, i_c, i_v, p_k, p_v, p_f, p_b, p_table, N, s_kn, s_vn, s_fn, s_bn, inv,
    K: tl.constexpr, V: tl.constexpr, BT: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    UNIT: tl.constexpr, MODE: tl.constexpr, NC: tl.constexpr, SHUFFLE: tl.constexpr,
):  # fmt: skip
    """The states that enter chunk i_c, [BK, BV], from those that enter its segment."""
    first = i_c // NC * NC
    last = tl.minimum(first + NC, tl.cdiv(N, BT)) - 1
    for j in range(first, i_c):
        fwd = state_after(
            fwd, j, i_v, p_k, p_v, p_f, p_table, N, s_kn, s_vn, s_fn, inv, K, V, BT, BK, BV, UNIT, MODE,
            SHUFFLE, False,
        )  # fmt: skip
    for i in range(i_c, last):
        bwd = state_after(
            bwd, last + i_c - i, i_v, p_k, p_v, p_b, p_table, N, s_kn, s_vn, s_bn, inv, K, V, BT, BK, BV,
            UNIT, MODE, SHUFFLE, True,
        )  # fmt: skip
    return fwd, bwd


@triton.jit
def state_after(
    state, i_c, i_v, p_k, p_v, p_g, p_table, N, s_kn, s_vn, s_gn, inv,
    K: tl.constexpr, V: tl.constexpr, BT: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    UNIT: tl.constexpr, MODE: tl.constexpr, SHUFFLE: tl.constexpr, BACKWARD: tl.constexpr,
):  # fmt: skip
    """A state [BK, BV] carried over chunk i_c in one direction."""
    ld, _ = load_gates(p_g, i_c, N, s_gn, inv, K, BT, BK, UNIT, MODE)
    k = load_tile(p_k, i_c, 0, N, s_kn, 0.0, K, BT, BK, UNIT).to(tl.float32)
    v = load_tile(p_v, i_c, i_v, N, s_vn, 0.0, V, BT, BV, UNIT)
    table = load_table(p_table, BEFORE if BACKWARD else AFTER, BT)
    k = tf32_ready(k * tl.exp2(tile_sum(table, ld, MODE)), MODE)
    if SHUFFLE:
        k = shuffled(k)
        ld = shuffled(ld)
    return product(tl.trans(k), v, tl.exp2(whole_sum(ld, MODE))[:, None] * state, MODE)


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


@triton.jit(do_not_specialize=INTS)
def output_kernel(
    p_q, p_k, p_v, p_f, p_b, p_o, p_state, p_sum, p_table, N, H, n_states, n_sums,
    s_qb, s_qn, s_qh, s_kb, s_kn, s_kh, s_vb, s_vn, s_vh, s_fb, s_fn, s_fh, s_bb, s_bn, s_bh, s_ob, s_on,
    s_oh, CH, scale, inv,
    K: tl.constexpr, V: tl.constexpr, BT: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    UNIT: tl.constexpr, SAME: tl.constexpr, MODE: tl.constexpr, PAIR_MODE: tl.constexpr, NC: tl.constexpr,
    ALONE: tl.constexpr, IN_OUTPUT: tl.constexpr, STRONG: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """o_t = the pairs within t's chunk + q_t decayed to the chunk's ends . the two states that enter it.

    NC > 1: the states that enter the segment are carried on to the chunk. ALONE: each sequence is one
    chunk, which no state enters, and p_sum is written here. IN_OUTPUT: as in walk_kernel; what chunks with
    strong gates need is left there. STRONG: for any gates, and only chunks whose
    gates need it; a program looks through GROUP (and CH) chunks of all sequences, the grid is (groups,
    blocks of V).
    """
    if SAME:
        s_kb, s_kn, s_kh = s_qb, s_qn, s_qh
        s_bb, s_bn, s_bh = s_fb, s_fn, s_fh
    EXACT: tl.constexpr = MODE == 'tf32x3'
    SHUFFLE: tl.constexpr = PAIR_MODE == 'tf32' and not STRONG
    NV: tl.constexpr = (V + BV - 1) // BV
    i_v = tl.program_id(1) % NV
    n_chunks = tl.cdiv(N, BT)
    n_segments = tl.cdiv(n_chunks, NC)
    table = load_table(p_table, BALANCED, BT)
    first, end = chunks_of_program(p_sum, n_chunks, n_sums, H, CH, NV, K, BK, STRONG, EXACT, GROUP)
    for j in range(0, end - first):
        i = first + j
        wanted = True
        if STRONG and not EXACT:
            wanted = any_strong(p_sum, i, 1, n_sums, K, BK, 1)
        if wanted:
            i_b, i_h, i_bh = sequence_of(i, n_chunks, H, NV, STRONG)
            i_c = i - i_bh * n_chunks
            q_at = at(p_q, i_b, i_h, s_qb, s_qh, UNIT)
            k_at = at(p_k, i_b, i_h, s_kb, s_kh, UNIT)
            v_at = at(p_v, i_b, i_h, s_vb, s_vh, UNIT)
            f_at = at(p_f, i_b, i_h, s_fb, s_fh, UNIT)
            b_at = at(p_b, i_b, i_h, s_bb, s_bh, UNIT)
            o_at = at(p_o, i_b, i_h, s_ob, s_oh, UNIT)
            if not ALONE:
                i_s = i_c // NC
                i_state = i_bh * n_segments + i_s
                left = i_s > 0
                right = i_s < n_segments - 1
                if IN_OUTPUT:
                    from_left = place_in_output(o_at, p_state, i_bh, i_c, 0, n_chunks, s_on, K, V, BT, UNIT)
                    from_right = place_in_output(
                        o_at, p_state, i_bh, i_c, 1, n_chunks, s_on, K, V, BT, UNIT
                    )
                else:
                    from_left = place_of(p_state, i_state - 1, K, V)
                    from_right = place_of(p_state, n_states + i_state + 1, K, V)
                fwd = load_state(from_left, left, i_v, K, V, BK, BV, SHUFFLE)
                bwd = load_state(from_right, right, i_v, K, V, BK, BV, SHUFFLE)
                if not STRONG:
                    sum_f = load_sum(p_sum, i, K, BK, SHUFFLE)
                    sum_b = load_sum(p_sum, n_sums + i, K, BK, SHUFFLE)
            lf, _ = load_gates(f_at, i_c, N, s_fn, inv, K, BT, BK, UNIT, MODE)
            lb, _ = load_gates(b_at, i_c, N, s_bn, inv, K, BT, BK, UNIT, MODE)
            q = load_tile(q_at, i_c, 0, N, s_qn, 0.0, K, BT, BK, UNIT).to(tl.float32)
            k = load_tile(k_at, i_c, 0, N, s_kn, 0.0, K, BT, BK, UNIT).to(tl.float32)
            v = load_tile(v_at, i_c, i_v, N, s_vn, 0.0, V, BT, BV, UNIT)
            a, ab, qf, qb, uf, ub = chunk_pairs(
                q * scale, k, lf, lb, table, BT, MODE, PAIR_MODE, False, STRONG
            )
            if not STRONG:
                a = directions(a, ab, BT, MODE)
            if ALONE and not STRONG:  # noqa: SIM102  the first is known when this is compiled
                if i_v == 0:
                    store_row(p_sum, 2 * uf, i, BT - 1, K, BT, BK)
                    store_row(p_sum, 2 * ub, n_sums + i, 0, K, BT, BK)
            o = product(tf32_ready(a, MODE), v, tl.zeros((BT, BV), tl.float32), MODE)
            if not ALONE:
                if NC > 1:
                    fwd, bwd = states_at(
                        fwd, bwd, i_c, i_v, k_at, v_at, f_at, b_at, p_table, N, s_kn, s_vn, s_fn, s_bn, inv,
                        K, V, BT, BK, BV, UNIT, MODE, NC, SHUFFLE,
                    )  # fmt: skip
                if STRONG:
                    fwd = tf32_ready(fwd, PAIR_MODE)
                    bwd = tf32_ready(bwd, PAIR_MODE)
                else:
                    fwd *= tf32_ready(tl.exp2(0.5 * sum_f), PAIR_MODE)[:, None]
                    bwd *= tf32_ready(tl.exp2(0.5 * sum_b), PAIR_MODE)[:, None]
                o = product(qf, fwd, o, PAIR_MODE)
                o = product(qb, bwd, o, PAIR_MODE)
            mild = True
            if IN_OUTPUT and not ALONE and not STRONG:
                mild = not is_strong(sum_f, sum_b)
            store_tile(o_at, o, i_c, i_v, N, s_on, V, BT, BV, UNIT, mild)


@triton.jit
def loses_gradients(
    p, i_c, N, s_n, inv, K: tl.constexpr, BT: tl.constexpr, BK: tl.constexpr, UNIT: tl.constexpr,
    MODE: tl.constexpr, BACKWARD: tl.constexpr,
):  # fmt: skip
    """Whether in some channel of a chunk the factored form's rounding may pass for the gates' gradients.

    A gate's gradient is sigmoid(-g) times the pairs over it, of which its own decay leaves little if it is
    strong; its error is sigmoid(-g) times 2^-17 of all pairs. Next to the gradients of mild gates that is
    nothing, but not where all other gates are open.
    """
    ld, g = load_gates(p, i_c, N, s_n, inv, K, BT, BK, UNIT, MODE)
    t = i_c * BT + tl.arange(0, BT)[:, None]
    # The first token's gate, BACKWARD the last's, has no pairs and no error.
    error = tl.where(t == (N - 1 if BACKWARD else 0), 0.0, sigmoid(-g.to(tl.float32)))
    gradient = tl.max(error * tl.exp2(ld), 0)
    return tl.max((gradient < tl.exp2(-LOST) * tl.max(error, 0)).to(tl.int32)) > 0


@triton.jit
def direction_gradients(
    q, k, v, do, g, u, half, dq, dk, da, da_low, da_t, da_t_low, p_v, p_o, p_g, p_dg, p_state, p_mask,
    table, before, mask_q, mask_k, i_c, i_ask, there_ask, i_key, there_key, N, s_vn, s_on, s_gn, s_dgn, inv,
    K: tl.constexpr, V: tl.constexpr, BT: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    UNIT: tl.constexpr, MODE: tl.constexpr, BACKWARD: tl.constexpr, STRONG: tl.constexpr,
    AGAIN: tl.constexpr,
):  # fmt: skip
    """Add one direction's part to dq and dk [BT, BK], and write its gate's gradient.

    da[t, s] = do_t . v_s, in two terms, da and da_low, and its transpose; STRONG: in one. v, do: their
    first BV columns. g: the gate's logits [BT, BK]. u: the log2 decays [BT, BK], STRONG: of each token,
    else from the chunk's middle. half: the decay over half the chunk, not used if STRONG. mask_q, mask_k:
    the pairs of each query, of each key. AGAIN: g, u and the masks are loaded or made anew.

    A pair (t, s) adds p = da[t, s] * q_t * decay * k_s to the log decay of every token between the two:
    summed up as running sums of k_s * dk_s - q_t * dq_t over the chunk's own tokens before the gate, to
    which come the pairs from outside it. Each p enters twice, from the same rounded factors, so what must
    cancel does. STRONG: nothing must, as a block's pairs are those of its halves and those between the two.
    """
    xq = tl.zeros((BT, BK), tl.float32)
    xk = tl.zeros((BT, BK), tl.float32)
    across = tl.zeros((BK,), tl.float32)
    for i_v in range((V + BV - 1) // BV):
        if V > BV:
            v = load_tile(p_v, i_c, i_v, N, s_vn, 0.0, V, BT, BV, UNIT)
            do = load_tile(p_o, i_c, i_v, N, s_on, 0.0, V, BT, BV, UNIT)
        ask = load_state(place_of(p_state, i_ask, K, V), there_ask, i_v, K, V, BK, BV, False)
        key = load_state(place_of(p_state, i_key, K, V), there_key, i_v, K, V, BK, BV, False)
        across += tl.sum(ask * key, 1)
        xq = product(do, tl.trans(tf32_ready(ask, MODE)), xq, MODE)
        xk = product(v, tl.trans(tf32_ready(key, MODE)), xk, MODE)
    if STRONG:
        across *= tl.exp2(tl.sum(u, 0))
        to_q, to_k = decay_to_ends(u, BT, BACKWARD)
        # Either side's by itself: a gate with few or weak pairs would be lost in a difference of many.
        o = tl.arange(0, BT)
        t, s = o[:, None], o[None, :]
        if BACKWARD:
            c = sum_over(s <= t, q * to_q * xq) + sum_over(s > t, k * to_k * xk)
        else:
            c = sum_over(s >= t, q * to_q * xq) + sum_over(s < t, k * to_k * xk)
        dq += to_q * xq
        dk += to_k * xk
        zero = tl.zeros((BT, BK), tl.float32)
        z = 1
        while z < BT:
            first, same, e = level_decays(z, u, BT, BACKWARD)
            q_z = rounded(tl.where(first, q * e, 0.0), MODE)
            k_z = rounded(tl.where(first, 0.0, k * e), MODE)
            dq_z = tl.where(first, product(tl.where(same, da, 0.0), k_z, zero, MODE), 0.0)
            dk_z = tl.where(first, 0.0, product(tl.where(same, da_t, 0.0), q_z, zero, MODE))
            dq += e * dq_z
            dk += e * dk_z
            near = t // z == s // z
            if BACKWARD:
                c += sum_over(near & tl.where(first, s <= t, s > t), q_z * dq_z + k_z * dk_z)
            else:
                c += sum_over(near & tl.where(first, s >= t, s < t), q_z * dq_z + k_z * dk_z)
            z *= 2
    else:
        if AGAIN:
            ld, _ = load_gates(p_g, i_c, N, s_gn, inv, K, BT, BK, UNIT, MODE)
            u = tile_sum(tl.trans(table) if BACKWARD else table, ld, MODE)
            mask_q = load_table(p_mask, BACKWARD, BT)
            mask_k = load_table(p_mask, not BACKWARD, BT)
        eq = tl.exp2(u)
        ek = exp2_minus(u)
        q_u = cut(q * eq, MODE)
        k_u = cut(k * ek, MODE)
        across *= half * half
        xq *= half[None, :]
        xk *= half[None, :]
        qx = q_u * xq
        dq_u = product(masked(da_low, mask_q, MODE), k_u, xq, MODE)
        dq_u = product(masked(da, mask_q, MODE), k_u, dq_u, MODE)
        dk_u = product(masked(da_t_low, mask_k, MODE), q_u, xk, MODE)
        dk_u = product(masked(da_t, mask_k, MODE), q_u, dk_u, MODE)
        p = k_u * dk_u - q_u * dq_u
        dq += eq * dq_u
        dk += ek * dk_u
        across += tl.sum(qx, 0)
        c = running_sum(tl.trans(before) if BACKWARD else before, p, MODE)
    # From log decays to logits: d log sigmoid(g) = sigmoid(-g).
    if AGAIN:
        g = load_tile(p_g, i_c, 0, N, s_gn, 0.0, K, BT, BK, UNIT)
    dg = (across[None, :] + c) * (sigmoid(-g.to(tl.float32)) * inv)
    store_tile(p_dg, dg, i_c, 0, N, s_dgn, K, BT, BK, UNIT)
    return dq, dk


@triton.jit(do_not_specialize=INTS)
def gradient_kernel(
    p_q, p_k, p_v, p_f, p_b, p_o, p_dq, p_dk, p_dv, p_df, p_db, p_state, p_sum, p_table, p_before, p_mask,
    N, H, n_states,
    s_qb, s_qn, s_qh, s_kb, s_kn, s_kh, s_vb, s_vn, s_vh, s_fb, s_fn, s_fh, s_bb, s_bn, s_bh, s_ob, s_on,
    s_oh, s_dqb, s_dqn, s_dqh, s_dkb, s_dkn, s_dkh, s_dvb, s_dvn, s_dvh, s_dfb, s_dfn, s_dfh, s_dbb, s_dbn,
    s_dbh, CH, scale, inv,
    K: tl.constexpr, V: tl.constexpr, BT: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    UNIT: tl.constexpr, SAME: tl.constexpr, MODE: tl.constexpr, PAIR_MODE: tl.constexpr,
    STRONG: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """All gradients from the inputs, do and the entering states.

    STRONG: as in output_kernel; and chunks whose gates' gradients the factored form loses, of which it has
    made the sums of log2 decays strong ones.
    """
    if SAME:
        s_kb, s_kn, s_kh = s_qb, s_qn, s_qh
        s_bb, s_bn, s_bh = s_fb, s_fn, s_fh
        s_dqb, s_dqn, s_dqh = s_qb, s_qn, s_qh
        s_dkb, s_dkn, s_dkh = s_qb, s_qn, s_qh
        s_dfb, s_dfn, s_dfh = s_fb, s_fn, s_fh
        s_dbb, s_dbn, s_dbh = s_fb, s_fn, s_fh
    EXACT: tl.constexpr = MODE == 'tf32x3'
    SHUFFLE: tl.constexpr = PAIR_MODE == 'tf32' and not STRONG
    n_chunks = tl.cdiv(N, BT)
    table = load_table(p_table, BALANCED, BT)
    before = load_table(p_before, 0, BT)
    AGAIN: tl.constexpr = BK > 16 and not STRONG  # registers are short: what can be made again is not kept
    if not AGAIN:
        past = load_table(p_mask, 0, BT)
        future = load_table(p_mask, 1, BT)
    first, end = chunks_of_program(p_sum, n_chunks, n_states, H, CH, 1, K, BK, STRONG, EXACT, GROUP)
    some_strong = False
    for j in range(0, end - first):
        i = first + j
        wanted = True
        if STRONG and not EXACT:
            wanted = any_strong(p_sum, i, 1, n_states, K, BK, 1)
        if wanted:
            i_b, i_h, i_bh = sequence_of(i, n_chunks, H, 1, STRONG)
            i_c = i - i_bh * n_chunks
            v_at = at(p_v, i_b, i_h, s_vb, s_vh, UNIT)
            o_at = at(p_o, i_b, i_h, s_ob, s_oh, UNIT)
            f_at = at(p_f, i_b, i_h, s_fb, s_fh, UNIT)
            b_at = at(p_b, i_b, i_h, s_bb, s_bh, UNIT)
            left, right = i_c > 0, i_c < n_chunks - 1
            q = load_tile(at(p_q, i_b, i_h, s_qb, s_qh, UNIT), i_c, 0, N, s_qn, 0.0, K, BT, BK, UNIT)
            k = load_tile(at(p_k, i_b, i_h, s_kb, s_kh, UNIT), i_c, 0, N, s_kn, 0.0, K, BT, BK, UNIT)
            q = q.to(tl.float32) * scale
            k = k.to(tl.float32)

            half_f = load_half_decay(p_sum, i, K, BK)
            half_b = load_half_decay(p_sum, n_states + i, K, BK)
            some_strong |= tl.min(tl.minimum(half_f, half_b)) < tl.exp2(-0.5 * LOST)
            lf, gf = load_gates(f_at, i_c, N, s_fn, inv, K, BT, BK, UNIT, MODE)
            lb, gb = load_gates(b_at, i_c, N, s_bn, inv, K, BT, BK, UNIT, MODE)
            af, ab, kf, kb, uf, ub = chunk_pairs(k, q, lf, lb, table, BT, MODE, PAIR_MODE, True, STRONG)
            af = tf32_ready(af, MODE)
            if AGAIN:
                past = load_table(p_mask, 0, BT)
                future = load_table(p_mask, 1, BT)
            if not STRONG:
                af = masked(af, future, MODE)
                ab = masked(tf32_ready(ab, MODE), past, MODE)
            da = tl.zeros((BT, BT), tl.float32)
            da_t = tl.zeros((BT, BT), tl.float32)
            for i_v in range((V + BV - 1) // BV):
                v = load_tile(v_at, i_c, i_v, N, s_vn, 0.0, V, BT, BV, UNIT)
                do = load_tile(o_at, i_c, i_v, N, s_on, 0.0, V, BT, BV, UNIT)
                da = product(do, tl.trans(v), da, MODE)
                if not AGAIN:
                    da_t = product(v, tl.trans(do), da_t, MODE)
                from_right = place_of(p_state, n_states * 2 + i + 1, K, V)
                from_left = place_of(p_state, n_states * 3 + i - 1, K, V)
                fwd = load_state(from_right, right, i_v, K, V, BK, BV, SHUFFLE)
                bwd = load_state(from_left, left, i_v, K, V, BK, BV, SHUFFLE)
                if STRONG:
                    fwd = tf32_ready(fwd, PAIR_MODE)
                    bwd = tf32_ready(bwd, PAIR_MODE)
                else:
                    over_f = load_half_decay(p_sum, i, K, BK, SHUFFLE)
                    over_b = load_half_decay(p_sum, n_states + i, K, BK, SHUFFLE)
                    fwd *= tf32_ready(over_f, PAIR_MODE)[:, None]
                    bwd *= tf32_ready(over_b, PAIR_MODE)[:, None]
                dv = product(af, do, tl.zeros((BT, BV), tl.float32), MODE)
                if not STRONG:
                    dv = product(ab, do, dv, MODE)
                dv = product(kf, fwd, dv, PAIR_MODE)
                dv = product(kb, bwd, dv, PAIR_MODE)
                dv_at = at(p_dv, i_b, i_h, s_dvb, s_dvh, UNIT)
                store_tile(dv_at, dv, i_c, i_v, N, s_dvn, V, BT, BV, UNIT)

            # Loaded again, as products want them in another order of shared memory than those above.
            v = load_tile(v_at, i_c, 0, N, s_vn, 0.0, V, BT, BV, UNIT)
            do = load_tile(o_at, i_c, 0, N, s_on, 0.0, V, BT, BV, UNIT)
            if STRONG:
                # A token's own pair counts in both directions, and no gate has a part in it.
                o = tl.arange(0, BT)
                twice = 2 * tl.sum(tl.where(o[:, None] == o[None, :], da, 0.0), 1)[:, None]
                dq = twice * k
                dk = twice * q
                da, da_low = tf32_ready(da, MODE), da  # the last is not used
                da_t, da_t_low = tf32_ready(da_t, MODE), da_t
            else:
                dq = tl.zeros((BT, BK), tl.float32)
                dk = tl.zeros((BT, BK), tl.float32)
                da, da_low = split(da, MODE)
                if AGAIN:
                    da_t, da_t_low = tl.trans(da), tl.trans(da_low)
                else:
                    da_t, da_t_low = split(da_t, MODE)
                q = nudged(q, MODE)
                k = nudged(k, MODE)
            dq, dk = direction_gradients(
                q, k, v, do, gf, uf, half_f, dq, dk, da, da_low, da_t, da_t_low, v_at, o_at, f_at,
                at(p_df, i_b, i_h, s_dfb, s_dfh, UNIT), p_state, p_mask, table, before, past, future, i_c,
                i - 1, left, n_states * 2 + i + 1, right, N, s_vn, s_on, s_fn, s_dfn, inv, K, V, BT, BK, BV,
                UNIT, MODE, False, STRONG, AGAIN,
            )  # fmt: skip
            dq, dk = direction_gradients(
                q, k, v, do, gb, ub, half_b, dq, dk, da, da_low, da_t, da_t_low, v_at, o_at, b_at,
                at(p_db, i_b, i_h, s_dbb, s_dbh, UNIT), p_state, p_mask, table, before, future, past, i_c,
                n_states + i + 1, right, n_states * 3 + i - 1, left, N, s_vn, s_on, s_bn, s_dbn, inv, K, V,
                BT, BK, BV, UNIT, MODE, True, STRONG, AGAIN,
            )  # fmt: skip
            dq_at = at(p_dq, i_b, i_h, s_dqb, s_dqh, UNIT)
            dk_at = at(p_dk, i_b, i_h, s_dkb, s_dkh, UNIT)
            store_tile(dq_at, dq * scale, i_c, 0, N, s_dqn, K, BT, BK, UNIT)
            store_tile(dk_at, dk, i_c, 0, N, s_dkn, K, BT, BK, UNIT)
    if not STRONG:  # noqa: SIM102  the first is known when this is compiled
        if some_strong:
            i_b, i_h, i_bh = sequence_of(first, n_chunks, H, 1, STRONG)
            f_at = at(p_f, i_b, i_h, s_fb, s_fh, UNIT)
            b_at = at(p_b, i_b, i_h, s_bb, s_bh, UNIT)
            # Many mild gates lose nothing: one look at the least of all chunks is cheaper than one at each.
            least = tl.full((BT, BK), float('inf'), tl.float32)
            for i in range(first, end):
                i_c = i - i_bh * n_chunks
                least = tl.minimum(least, load_tile(f_at, i_c, 0, N, s_fn, float('inf'), K, BT, BK, UNIT))
                least = tl.minimum(least, load_tile(b_at, i_c, 0, N, s_bn, float('inf'), K, BT, BK, UNIT))
            if tl.min(log2_sigmoid(least * LOG2E, MODE) * inv) < -LOST:
                for i in range(first, end):
                    if any_strong(p_sum, i, 1, n_states, K, BK, 1, LOST):
                        i_c = i - i_bh * n_chunks
                        lost = loses_gradients(f_at, i_c, N, s_fn, inv, K, BT, BK, UNIT, MODE, False)
                        lost |= loses_gradients(b_at, i_c, N, s_bn, inv, K, BT, BK, UNIT, MODE, True)
                        if lost:
                            tl.debug_barrier()  # all threads have read the sum
                            store_sum(p_sum, tl.full((BK,), LEAST, tl.float32), i, K, BK)
