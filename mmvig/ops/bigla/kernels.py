"""Triton kernels of BiGLA; README.md beside this file derives them, triton.py launches them.

Sizes: N tokens, H heads, K and V head widths, BT tokens of a chunk, NC chunks of a segment, BK, BV blocks
of widths. Strides s_ come in units of UNIT elements. What depends on gates is a tile [BT // R, R, BK] of
runs of R neighbouring tokens: loads put a run's tokens in one thread's registers, where a running sum costs
one addition a token.

All exponents are in base 2; `inv` is 1 / gate_normalizer. MODE is the precision of a product of matrices:
'bf16', 'tf32' or 'tf32x3', always with float32 accumulation. EXACT marks float32 inputs.
"""

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
# Largest sum of |log2 decay| over a chunk for the factored form: its factors stay within 2^(+-SPAN / 2), so
# that inputs up to 2^30 do not overflow.
SPAN = tl.constexpr(180.0)


@triton.jit
def log2_sigmoid(x, EXACT: tl.constexpr):
    """log2(sigmoid(x)) of float32 logits without overflow; x = inf (padding) gives 0."""
    e = tl.exp2(-tl.abs(x) * LOG2E)
    # log2(1 + e) = e * P(e) on [0, 1], minimax in the relative error: 1.4e-6, or (EXACT) float32 rounding.
    if EXACT:
        p = e * 0.007549245673541441 - 0.04256731714321047
        p = e * p + 0.11285660997282833
        p = e * p - 0.19711932442780655
        p = e * p + 0.2756415795174285
        p = e * p - 0.3584085153730151
        p = e * p + 0.4806929627347839
        p = e * p - 0.7213402082687197
        p = e * p + 1.4426949974364294
    else:
        p = e * 0.020401374404640373 - 0.09579812014615048
        p = e * p + 0.21528519407813626
        p = e * p - 0.3390893687699849
        p = e * p + 0.4776684594420525
        p = e * p - 0.7211594814407546
        p = e * p + 1.4426932109820305
    return tl.minimum(x, 0.0) * LOG2E - e * p


@triton.jit
def rounded(x, MODE: tl.constexpr):
    """What a product in MODE reads of float32 x, as float32."""
    if MODE == 'bf16' or MODE == 'bf16 interpreted':
        return x.to(tl.bfloat16).to(tl.float32)
    elif MODE == 'tf32':
        bits = (x.to(tl.uint32, bitcast=True) + 0x1000) & 0xFFFFE000
        return bits.to(tl.float32, bitcast=True)
    else:
        return x


@triton.jit
def product(a, b, MODE: tl.constexpr):
    """Matrix product in MODE's precision."""
    if MODE == 'bf16 interpreted':  # the interpreter has no bf16 product
        return tl.dot(rounded(a.to(tl.float32), 'bf16'), rounded(b.to(tl.float32), 'bf16'))
    elif MODE == 'bf16':
        return tl.dot(a.to(tl.bfloat16), b.to(tl.bfloat16))
    else:
        # The hardware drops digits of tf32 operands; round them first.
        return tl.dot(
            rounded(a.to(tl.float32), MODE), rounded(b.to(tl.float32), MODE), input_precision=MODE
        )


@triton.jit
def add_run(sum_a, before_a, sum_b, before_b):
    """Two neighbours, a first, as one: the sum over both, and over what lies before the last."""
    return sum_a + sum_b, sum_a + before_b


@triton.jit
def prefix(x, REVERSE: tl.constexpr):
    """Inclusive sums of a tile over the tokens up to each (REVERSE: from each on), and over all [BK].

    The runs before are summed, not subtracted: no digit of a small sum is lost beside a large gate.
    """
    part = tl.sum(x, 1)
    _, before = tl.associative_scan((part, tl.zeros_like(part)), 0, add_run, reverse=REVERSE)
    return tl.cumsum(x, 1, reverse=REVERSE) + before[:, None, :], tl.sum(part, 0)


@triton.jit
def suffix(x, c, total, EXACT: tl.constexpr):
    """Inclusive sums over the tokens from each on; c, total: prefix(x). Half precision may subtract."""
    if EXACT:
        return prefix(x, True)[0]
    else:
        return total[None, None, :] - (c - x)


@triton.jit
def flat(x):
    """[W, R, BK] -> [BT, BK]."""
    return tl.reshape(x, (x.shape[0] * x.shape[1], x.shape[2]))


@triton.jit
def load_tile(
    p, i_c, N, s_n, D, other, BT: tl.constexpr, R: tl.constexpr, BK: tl.constexpr, UNIT: tl.constexpr
):
    """Chunk i_c of a [N, D] matrix as a float32 tile; `other` beyond the edges."""
    PAIR: tl.constexpr = min(UNIT, 2)
    o_t = (tl.arange(0, BT // R) * R)[:, None, None] + tl.arange(0, R)[None, :, None]
    o_k = tl.arange(0, BK)[None, None, :]
    s_n *= UNIT
    # Said to be contiguous by two only: lanes then lie along channels and runs, a run in one thread.
    off = tl.max_contiguous(tl.multiple_of(o_t * s_n + o_k, (1, 1, PAIR)), (1, 1, PAIR))
    p += s_n.to(tl.int64) * (i_c * BT)
    return tl.load(p + off, mask=(i_c * BT + o_t < N) & (o_k < D), other=other).to(tl.float32)


@triton.jit
def store_tile(
    p, x, i_c, N, s_n, D, BT: tl.constexpr, R: tl.constexpr, BK: tl.constexpr, UNIT: tl.constexpr
):
    """Write a tile as chunk i_c of a [N, D] matrix, in its dtype."""
    PAIR: tl.constexpr = min(UNIT, 2)
    o_t = (tl.arange(0, BT // R) * R)[:, None, None] + tl.arange(0, R)[None, :, None]
    o_k = tl.arange(0, BK)[None, None, :]
    s_n *= UNIT
    off = tl.max_contiguous(tl.multiple_of(o_t * s_n + o_k, (1, 1, PAIR)), (1, 1, PAIR))
    p += s_n.to(tl.int64) * (i_c * BT)
    tl.store(p + off, x.to(p.dtype.element_ty), mask=(i_c * BT + o_t < N) & (o_k < D))


@triton.jit
def load_rows(p, i_c, i_v, N, s_n, D, BT: tl.constexpr, BV: tl.constexpr, UNIT: tl.constexpr):
    """Chunk i_c, columns i_v * BV on, of a [N, D] matrix: [BT, BV] in its dtype, zeros beyond the edges."""
    o_t = tl.arange(0, BT)[:, None]
    o_v = i_v * BV + tl.arange(0, BV)[None, :]
    s_n *= UNIT
    p += s_n.to(tl.int64) * (i_c * BT)
    return tl.load(p + (o_t * s_n + o_v), mask=(i_c * BT + o_t < N) & (o_v < D), other=0.0)


@triton.jit
def store_rows(p, x, i_c, i_v, N, s_n, D, BT: tl.constexpr, BV: tl.constexpr, UNIT: tl.constexpr):
    """Write [BT, BV] as chunk i_c, columns i_v * BV on, of a [N, D] matrix, in its dtype."""
    o_t = tl.arange(0, BT)[:, None]
    o_v = i_v * BV + tl.arange(0, BV)[None, :]
    s_n *= UNIT
    p += s_n.to(tl.int64) * (i_c * BT)
    tl.store(p + (o_t * s_n + o_v), x.to(p.dtype.element_ty), mask=(i_c * BT + o_t < N) & (o_v < D))


@triton.jit
def state_block(i_state, i_v, K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr):
    """Where state number i_state, columns i_v * BV on, lies in [.., K, V]: offsets and mask [BK, BV]."""
    o_k = tl.arange(0, BK)[:, None]
    o_v = i_v * BV + tl.arange(0, BV)[None, :]
    return i_state.to(tl.int64) * (K * V) + (o_k * V + o_v), (o_k < K) & (o_v < V)


@triton.jit
def load_state(
    p, i_state, there, i_v, K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr
):
    """State number i_state, columns i_v * BV on, as float32 [BK, BV]; zeros unless `there`."""
    off, m = state_block(i_state, i_v, K, V, BK, BV)
    return tl.load(p + off, mask=m & there, other=0.0).to(tl.float32)


@triton.jit
def store_state(p, x, i_state, i_v, K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr):
    """Write state number i_state, columns i_v * BV on."""
    off, m = state_block(i_state, i_v, K, V, BK, BV)
    tl.store(p + off, x.to(p.dtype.element_ty), mask=m)


@triton.jit
def locate(i, N, H, BT: tl.constexpr, NC: tl.constexpr):
    """Image, head and segment (NC chunks) of the i-th, heads fastest; how many segments; its state."""
    n_segments = tl.cdiv(N, BT * NC)
    i_h = i % H
    i_s = (i // H) % n_segments
    i_b = (i // H // n_segments).to(tl.int64)
    return i_b, i_h.to(tl.int64), i_s, n_segments, (i_b * H + i_h) * n_segments + i_s


@triton.jit
def load_decays(p, i_c, N, s_n, inv, K: tl.constexpr, BT: tl.constexpr, R: tl.constexpr, BK: tl.constexpr,
                UNIT: tl.constexpr, EXACT: tl.constexpr):  # fmt: skip
    """log2 decay of each token, tile; 0 beyond the edges."""
    return log2_sigmoid(load_tile(p, i_c, N, s_n, K, float('inf'), BT, R, BK, UNIT), EXACT) * inv


# Integers that differ from call to call: Triton must not compile a kernel for their values.
INTS = ['N', 'NS', 'H', 'n_states', 'n_chunks', 's_qb', 's_qn', 's_qh', 's_kb', 's_kn', 's_kh', 's_vb',
's_vn', 's_vh',
        's_fb', 's_fn', 's_fh', 's_bb', 's_bn', 's_bh', 's_ob', 's_on', 's_oh', 's_dqb', 's_dqn', 's_dqh',
        's_dkb',
        's_dkn', 's_dkh', 's_dfb', 's_dfn', 's_dfh', 's_dbb', 's_dbn', 's_dbh']  # fmt: skip


@triton.jit(do_not_specialize=INTS)
def states_kernel(
    p_q, p_k, p_v, p_f, p_b, p_o, p_state, p_decay, N, H, n_states,
    s_qb, s_qn, s_qh, s_kb, s_kn, s_kh, s_vb, s_vn, s_vh, s_fb, s_fn, s_fh, s_bb, s_bn, s_bh, s_ob, s_on,
    s_oh,
    scale, inv,
    K: tl.constexpr, V: tl.constexpr, BT: tl.constexpr, R: tl.constexpr, NC: tl.constexpr, BK: tl.constexpr,
    BV: tl.constexpr, UNIT: tl.constexpr, MODE: tl.constexpr, EXACT: tl.constexpr, BACKWARD: tl.constexpr,
):  # fmt: skip
    """What each segment alone adds to the states that leave it, and its decays.

    state 0 = sum_s (decay from s to the segment's end * k_s) v_s^T      1: to its start, backward decay
    state 2 = sum_t (decay from the start to t * q_t) do_t^T, BACKWARD   3: from its end, backward decay
    """
    i_b, i_h, i_s, _, i_state = locate(tl.program_id(0), N, H, BT, NC)
    i_v = tl.program_id(1)
    p_q += (i_b * s_qb + i_h * s_qh) * UNIT
    p_k += (i_b * s_kb + i_h * s_kh) * UNIT
    p_v += (i_b * s_vb + i_h * s_vh) * UNIT
    p_f += (i_b * s_fb + i_h * s_fh) * UNIT
    p_b += (i_b * s_bb + i_h * s_bh) * UNIT
    p_o += (i_b * s_ob + i_h * s_oh) * UNIT
    s0 = tl.zeros((BK, BV), tl.float32)
    s1 = tl.zeros((BK, BV), tl.float32)
    s2 = tl.zeros((BK, BV), tl.float32)
    s3 = tl.zeros((BK, BV), tl.float32)
    sum_f = tl.zeros((BK,), tl.float32)
    sum_b = tl.zeros((BK,), tl.float32)
    for j in range(NC):
        i_c = i_s * NC + j
        lf = load_decays(p_f, i_c, N, s_fn, inv, K, BT, R, BK, UNIT, EXACT)
        lb = load_decays(p_b, i_c, N, s_bn, inv, K, BT, R, BK, UNIT, EXACT)
        k = load_tile(p_k, i_c, N, s_kn, K, 0.0, BT, R, BK, UNIT)
        v = load_rows(p_v, i_c, i_v, N, s_vn, V, BT, BV, UNIT)
        cf, total_f = prefix(lf, False)
        cb, total_b = prefix(lb, False)
        kf = flat(k * tl.exp2(suffix(lf, cf, total_f, EXACT) - lf))
        kb = flat(k * tl.exp2(cb - lb))
        s0 = tl.exp2(total_f)[:, None] * s0 + product(tl.trans(kf), v, MODE)  # [BK, BT] @ [BT, BV]
        s1 += tl.exp2(sum_b)[:, None] * product(tl.trans(kb), v, MODE)
        if BACKWARD:
            q = load_tile(p_q, i_c, N, s_qn, K, 0.0, BT, R, BK, UNIT) * scale
            do = load_rows(p_o, i_c, i_v, N, s_on, V, BT, BV, UNIT)
            qf = flat(q * tl.exp2(cf))
            qb = flat(q * tl.exp2(suffix(lb, cb, total_b, EXACT)))
            s2 += tl.exp2(sum_f)[:, None] * product(tl.trans(qf), do, MODE)
            s3 = tl.exp2(total_b)[:, None] * s3 + product(tl.trans(qb), do, MODE)
        sum_f += total_f
        sum_b += total_b
    store_state(p_state, s0, i_state, i_v, K, V, BK, BV)
    store_state(p_state, s1, n_states + i_state, i_v, K, V, BK, BV)
    if BACKWARD:
        store_state(p_state, s2, n_states * 2 + i_state, i_v, K, V, BK, BV)
        store_state(p_state, s3, n_states * 3 + i_state, i_v, K, V, BK, BV)
    if i_v == 0:
        o_k = tl.arange(0, BK)
        tl.store(p_decay + i_state * K + o_k, tl.exp2(sum_f), mask=o_k < K)
        tl.store(p_decay + (n_states + i_state) * K + o_k, tl.exp2(sum_b), mask=o_k < K)


@triton.jit
def join(decay_a, state_a, decay_b, state_b):
    """Two runs of segments, a first, as one: (decay over it, state after it)."""
    return decay_a * decay_b, decay_b * state_a + state_b


@triton.jit
def join_before(decay_a, state_a, part_a, before_a, decay_b, state_b, part_b, before_b):
    """The same with (decay to, state at) the start of the last."""
    return decay_a * decay_b, decay_b * state_a + state_b, decay_a * part_b, part_b * state_a + before_b


@triton.jit(do_not_specialize=INTS)
def scan_kernel(p_state, p_decay, NS, n_states, K: tl.constexpr, V: tl.constexpr, BW: tl.constexpr,
    BR: tl.constexpr,
                BV: tl.constexpr):  # fmt: skip
    """Turn what each segment adds to a state into the state that leaves it, in place; one row a program.

    States 0 and 3 run from the first segment to the last, 1 and 2 the other way; 0 and 2 with the forward
    decay. BW runs of BR segments at once: a run is summed in one thread's registers.
    """
    i_k = tl.program_id(0)
    i_bh = tl.program_id(1).to(tl.int64)
    i_z = tl.program_id(2)
    reverse = (i_z == 1) | (i_z == 2)
    PAIR: tl.constexpr = 2 if V % 2 == 0 else 1
    o_w = tl.arange(0, BW)
    o_r = tl.arange(0, BR)
    o_v = tl.arange(0, BV)
    p_state += (i_z * n_states.to(tl.int64) + i_bh * NS) * (K * V) + i_k * V
    p_decay += ((i_z % 2) * n_states.to(tl.int64) + i_bh * NS) * K + i_k
    carry = tl.zeros((BV,), tl.float32)
    for i in range(0, NS, BW * BR):
        o_s = i + o_w[:, None] * BR + o_r[None, :]
        m = o_s < NS
        o_s = tl.where(reverse, NS - 1 - o_s, o_s)
        off = o_s[:, :, None].to(tl.int64) * (K * V) + o_v[None, None, :]
        off = tl.max_contiguous(tl.multiple_of(off, (1, 1, PAIR)), (1, 1, PAIR))
        m3 = m[:, :, None] & (o_v < V)[None, None, :]
        state = tl.load(p_state + off, mask=m3, other=0.0).to(tl.float32)
        decay = tl.load(p_decay + o_s * K, mask=m, other=1.0)
        decay = tl.broadcast_to(decay[:, :, None], (BW, BR, BV))
        decay, state = tl.associative_scan((decay, state), 1, join)
        last = (o_r == BR - 1)[None, :, None]
        d = tl.sum(tl.where(last, decay, 0.0), 1)  # [BW, BV]
        s = tl.sum(tl.where(last, state, 0.0), 1)
        d, s, part, before = tl.associative_scan(
            (d, s, tl.full((BW, BV), 1.0, tl.float32), tl.zeros_like(s)), 0, join_before
        )
        state += decay * (part * carry[None, :] + before)[:, None, :]
        tl.store(p_state + off, state.to(p_state.dtype.element_ty), mask=m3)
        carry = tl.sum(tl.where((o_w == BW - 1)[:, None], d * carry[None, :] + s, 0.0), 0)


@triton.jit
def decay_sum(mask, ld):
    """exp2 of sums over the tokens that a 0/1 matrix [BT, BT] picks: [BT, BK]."""
    return tl.exp2(tl.dot(mask.to(tl.float32), ld, input_precision='tf32x3'))


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
        return (t // z) % 2 == 0, same, decay_sum(mask & same, ld)
    else:
        mask = tl.where(second, (j >= middle) & (j <= t), (j > t) & (j < middle))
        return second, same, decay_sum(mask & same, ld)


@triton.jit
def pairs(q, k, MODE: tl.constexpr, SWAP: tl.constexpr):
    """All products q_t . k_s, [t, s] or (SWAP) [s, t]."""
    if SWAP:
        return product(k, tl.trans(q), MODE)
    else:
        return product(q, tl.trans(k), MODE)


@triton.jit
def directions(af, ab, BT: tl.constexpr, SWAP: tl.constexpr):
    """Forward pairs (t > s) of af, backward pairs of ab, both on the diagonal; [t, s], SWAP: [s, t]."""
    o = tl.arange(0, BT)
    t, s = o[:, None], o[None, :]
    if SWAP:
        t, s = s, t
    return tl.where(t > s, af, tl.where(t < s, ab, af + ab))


@triton.jit
def pairs_by_levels(q, k, lf, lb, BT: tl.constexpr, MODE: tl.constexpr, SWAP: tl.constexpr):
    """A[t, s] = q_t . (decay(t, s) * k_s) of both directions for any gates; q, k, ld [BT, BK]."""
    o = tl.arange(0, BT)
    a = tl.where(o[:, None] == o[None, :], 2 * pairs(q, k, MODE, SWAP), 0.0)
    z = 1
    while z < BT:
        asks, same, e = level_decays(z, lf, BT, False)
        a_z = pairs(tl.where(asks, q * e, 0.0), tl.where(asks, 0.0, k * e), MODE, SWAP)
        asks, same, e = level_decays(z, lb, BT, True)
        a_z += pairs(tl.where(asks, q * e, 0.0), tl.where(asks, 0.0, k * e), MODE, SWAP)
        a += tl.where(same, a_z, 0.0)
        z *= 2
    return a


@triton.jit
def output_chunk(
    i, p_q, p_k, p_v, p_f, p_b, p_o, p_state, p_strong, N, H, n_states,
    s_qb, s_qn, s_qh, s_kb, s_kn, s_kh, s_vb, s_vn, s_vh, s_fb, s_fn, s_fh, s_bb, s_bn, s_bh, s_ob, s_on,
    s_oh,
    scale, inv,
    K: tl.constexpr, V: tl.constexpr, BT: tl.constexpr, R: tl.constexpr, NC: tl.constexpr, BK: tl.constexpr,
    BV: tl.constexpr, UNIT: tl.constexpr, PAIR_MODE: tl.constexpr, MODE: tl.constexpr, EXACT: tl.constexpr,
    SWAP: tl.constexpr, STRONG: tl.constexpr,
):  # fmt: skip
    """o_t = the pairs within t's chunk + q_t decayed to the chunk's ends . the two states that enter it.

    SWAP: queries and keys change places, v is do and o is dv. NC > 1: the states that enter the segment are
    carried on to the chunk. STRONG is for any gates; without it, chunks whose gates are too strong are
    marked in p_strong.
    """
    i_b, i_h, i_c, n_chunks, _ = locate(i, N, H, BT, 1)
    i_v = tl.program_id(1)
    i_s = i_c // NC
    NS = tl.cdiv(n_chunks, NC)
    p_q += (i_b * s_qb + i_h * s_qh) * UNIT
    p_k += (i_b * s_kb + i_h * s_kh) * UNIT
    p_v += (i_b * s_vb + i_h * s_vh) * UNIT
    p_f += (i_b * s_fb + i_h * s_fh) * UNIT
    p_b += (i_b * s_bb + i_h * s_bh) * UNIT
    p_o += (i_b * s_ob + i_h * s_oh) * UNIT

    # The states that enter the chunk: 0 from the left, 1 from the right; SWAP: 2 from the right, 3 from the
    # left.
    i_state = (i_b * H + i_h) * NS + i_s
    if SWAP:
        fwd = load_state(p_state, n_states * 2 + i_state + 1, i_s < NS - 1, i_v, K, V, BK, BV)
        bwd = load_state(p_state, n_states * 3 + i_state - 1, i_s > 0, i_v, K, V, BK, BV)
    else:
        fwd = load_state(p_state, i_state - 1, i_s > 0, i_v, K, V, BK, BV)
        bwd = load_state(p_state, n_states + i_state + 1, i_s < NS - 1, i_v, K, V, BK, BV)
    if NC > 1:
        first = i_s * NC
        last = tl.minimum(first + NC, n_chunks) - 1
        for j in range(first, i_c):
            ld = load_decays(p_f, j, N, s_fn, inv, K, BT, R, BK, UNIT, EXACT)
            c, total = prefix(ld, False)
            k2 = load_tile(p_k, j, N, s_kn, K, 0.0, BT, R, BK, UNIT) * tl.exp2(
                suffix(ld, c, total, EXACT) - ld
            )
            v2 = load_rows(p_v, j, i_v, N, s_vn, V, BT, BV, UNIT)
            fwd = tl.exp2(total)[:, None] * fwd + product(tl.trans(flat(k2)), v2, MODE)
        for i2 in range(i_c, last):
            j = last + i_c - i2
            ld = load_decays(p_b, j, N, s_bn, inv, K, BT, R, BK, UNIT, EXACT)
            c, total = prefix(ld, False)
            k2 = load_tile(p_k, j, N, s_kn, K, 0.0, BT, R, BK, UNIT) * tl.exp2(c - ld)
            v2 = load_rows(p_v, j, i_v, N, s_vn, V, BT, BV, UNIT)
            bwd = tl.exp2(total)[:, None] * bwd + product(tl.trans(flat(k2)), v2, MODE)

    lf = load_decays(p_f, i_c, N, s_fn, inv, K, BT, R, BK, UNIT, EXACT)
    lb = load_decays(p_b, i_c, N, s_bn, inv, K, BT, R, BK, UNIT, EXACT)
    q = load_tile(p_q, i_c, N, s_qn, K, 0.0, BT, R, BK, UNIT) * scale
    k = load_tile(p_k, i_c, N, s_kn, K, 0.0, BT, R, BK, UNIT)
    v = load_rows(p_v, i_c, i_v, N, s_vn, V, BT, BV, UNIT)
    cf, total_f = prefix(lf, False)
    cb, total_b = prefix(lb, False)
    if STRONG:
        a = pairs_by_levels(flat(q), flat(k), flat(lf), flat(lb), BT, PAIR_MODE, SWAP)
        if SWAP:
            xf = flat(k * tl.exp2(prefix(lf, True)[0] - lf))
            xb = flat(k * tl.exp2(cb - lb))
        else:
            xf = flat(q * tl.exp2(cf))
            xb = flat(q * tl.exp2(prefix(lb, True)[0]))
    else:
        tl.store(p_strong + i, (-tl.minimum(tl.min(total_f), tl.min(total_b)) < SPAN) == 0)
        half_f = 0.5 * total_f  # a reference in the chunk's middle
        half_b = 0.5 * total_b
        uf = cf - half_f[None, None, :]
        ub = cb - lb - half_b[None, None, :]
        qf = flat(q * tl.exp2(uf))
        kf = flat(k * tl.exp2(-uf))
        qb = flat(q * tl.exp2(-ub))
        kb = flat(k * tl.exp2(ub))
        a = directions(pairs(qf, kf, PAIR_MODE, SWAP), pairs(qb, kb, PAIR_MODE, SWAP), BT, SWAP)
        fwd *= tl.exp2(half_f)[:, None]
        bwd *= tl.exp2(half_b)[:, None]
        if SWAP:
            xf = kf
            xb = kb
        else:
            xf = qf
            xb = qb
    o = product(a, v, MODE)
    o += product(xf, fwd, PAIR_MODE)
    o += product(xb, bwd, PAIR_MODE)
    store_rows(p_o, o, i_c, i_v, N, s_on, V, BT, BV, UNIT)


@triton.jit(do_not_specialize=INTS)
def output_kernel(
    p_q, p_k, p_v, p_f, p_b, p_o, p_state, p_strong, N, H, n_states, n_chunks,
    s_qb, s_qn, s_qh, s_kb, s_kn, s_kh, s_vb, s_vn, s_vh, s_fb, s_fn, s_fh, s_bb, s_bn, s_bh, s_ob, s_on,
    s_oh,
    scale, inv,
    K: tl.constexpr, V: tl.constexpr, BT: tl.constexpr, R: tl.constexpr, NC: tl.constexpr, BK: tl.constexpr,
    BV: tl.constexpr, UNIT: tl.constexpr, PAIR_MODE: tl.constexpr, MODE: tl.constexpr, EXACT: tl.constexpr,
    SWAP: tl.constexpr, STRONG: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """One chunk a program; STRONG: those among GROUP chunks that are marked."""
    if STRONG:
        o_i = tl.program_id(0) * GROUP + tl.arange(0, GROUP)
        if tl.max(tl.load(p_strong + o_i, mask=o_i < n_chunks, other=0).to(tl.int32)) > 0:
            for j in range(GROUP):
                i = tl.program_id(0) * GROUP + j
                if i < n_chunks:  # noqa: SIM102  Triton evaluates both sides of `and`
                    if tl.load(p_strong + i).to(tl.int32) > 0:
                        output_chunk(
                            i, p_q, p_k, p_v, p_f, p_b, p_o, p_state, p_strong, N, H, n_states,
                            s_qb, s_qn, s_qh, s_kb, s_kn, s_kh, s_vb, s_vn, s_vh, s_fb, s_fn, s_fh, s_bb,
                            s_bn, s_bh,
                            s_ob, s_on, s_oh, scale, inv, K, V, BT, R, NC, BK, BV, UNIT, PAIR_MODE, MODE,
                            EXACT, SWAP,
                            True,
                        )  # fmt: skip
    else:
        output_chunk(
            tl.program_id(0), p_q, p_k, p_v, p_f, p_b, p_o, p_state, p_strong, N, H, n_states,
            s_qb, s_qn, s_qh, s_kb, s_kn, s_kh, s_vb, s_vn, s_vh, s_fb, s_fn, s_fh, s_bb, s_bn, s_bh,
            s_ob, s_on, s_oh,
            scale, inv, K, V, BT, R, NC, BK, BV, UNIT, PAIR_MODE, MODE, EXACT, SWAP, False,
        )  # fmt: skip


@triton.jit
def sigmoid_minus(x):
    """sigmoid(-x) without overflow."""
    e = tl.exp2(-tl.abs(x) * LOG2E)
    return tl.where(x >= 0, e, 1.0) / (1.0 + e)


@triton.jit
def block_products(
    p_v, p_o, p_state, i_c, i_v, i_ask, there_ask, i_key, there_key, N, s_vn, s_on,
    K: tl.constexpr, V: tl.constexpr, BT: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    UNIT: tl.constexpr, MODE: tl.constexpr,
):  # fmt: skip
    """Sums over a block of V: do_t.v_s as [t, s] and [s, t], do and v with the entering states."""
    v = load_rows(p_v, i_c, i_v, N, s_vn, V, BT, BV, UNIT)
    do = load_rows(p_o, i_c, i_v, N, s_on, V, BT, BV, UNIT)
    state_q = load_state(p_state, i_ask, there_ask, i_v, K, V, BK, BV)
    state_k = load_state(p_state, i_key, there_key, i_v, K, V, BK, BV)
    da = product(do, tl.trans(v), MODE)
    dat = product(v, tl.trans(do), MODE)  # a product of its own is cheaper than a transposition
    xq = product(do, tl.trans(state_q), MODE)
    xk = product(v, tl.trans(state_k), MODE)
    return da, dat, xq, xk, tl.sum(state_q * state_k, 1)


@triton.jit
def direction_gradients(
    q, k, dq, dk, p_v, p_o, p_g, p_dg, p_state, i_c, i_ask, there_ask, i_key, there_key, N, s_vn, s_on,
    s_gn, s_dgn, inv,
    K: tl.constexpr, V: tl.constexpr, BT: tl.constexpr, R: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    UNIT: tl.constexpr, MODE: tl.constexpr, EXACT: tl.constexpr, BACKWARD: tl.constexpr,
    STRONG: tl.constexpr,
):  # fmt: skip
    """Add one direction's part to dq and dk (tiles), and write its gate's gradient.

    A pair (t, s) adds p = do_t.v_s * q_t * decay * k_s to the log decay of every token between the two:
    summed up as running sums of q_t * dq_t - k_s * dk_s over the chunk's own tokens, to which come the
    pairs from outside it. Each p enters twice, from the same rounded factors, so that what must cancel
    does.
    """
    W: tl.constexpr = BT // R
    o = tl.arange(0, BT)
    row, column = o[:, None], o[None, :]
    g = load_tile(p_g, i_c, N, s_gn, K, float('inf'), BT, R, BK, UNIT)
    ld = log2_sigmoid(g, EXACT) * inv
    c, total = prefix(ld, False)
    half = 0.5 * total

    da, dat, xq, xk, across = block_products(
        p_v, p_o, p_state, i_c, 0, i_ask, there_ask, i_key, there_key, N, s_vn, s_on, K, V, BT, BK, BV,
        UNIT, MODE,
    )  # fmt: skip
    if BV < V:
        for i_v in range(1, tl.cdiv(V, BV)):
            da_v, dat_v, xq_v, xk_v, across_v = block_products(
                p_v, p_o, p_state, i_c, i_v, i_ask, there_ask, i_key, there_key, N, s_vn, s_on, K, V, BT,
                BK, BV, UNIT, MODE,
            )  # fmt: skip
            da += da_v
            dat += dat_v
            xq += xq_v
            xk += xk_v
            across += across_v
    if BACKWARD:
        da = tl.where(row < column, da, 0.0)
        dat = tl.where(row > column, dat, 0.0)
        u = c - ld - half[None, None, :]
        u = -u
    else:
        da = tl.where(row > column, da, 0.0)
        dat = tl.where(row < column, dat, 0.0)
        u = c - half[None, None, :]
    xq3 = tl.reshape(xq, (W, R, BK))
    xk3 = tl.reshape(xk, (W, R, BK))

    if STRONG:
        if BACKWARD:
            to_q = tl.exp2(prefix(ld, True)[0])
            to_k = tl.exp2(c - ld)
        else:
            to_q = tl.exp2(c)
            to_k = tl.exp2(prefix(ld, True)[0] - ld)
        kx = k * to_k * xk3
        p = q * to_q * xq3 - kx
        dq += to_q * xq3
        dk += to_k * xk3
        q2, k2, l2 = flat(q), flat(k), flat(ld)
        dq2 = tl.zeros((BT, BK), tl.float32)
        dk2 = tl.zeros((BT, BK), tl.float32)
        p2 = tl.zeros((BT, BK), tl.float32)
        z = 1
        while z < BT:
            asks, same, e = level_decays(z, l2, BT, BACKWARD)
            q_z = rounded(tl.where(asks, q2 * e, 0.0), MODE)
            k_z = rounded(tl.where(asks, 0.0, k2 * e), MODE)
            dq_z = tl.where(asks, product(tl.where(same, da, 0.0), k_z, MODE), 0.0)
            dk_z = tl.where(asks, 0.0, product(tl.where(same, dat, 0.0), q_z, MODE))
            dq2 += e * dq_z
            dk2 += e * dk_z
            p2 += q_z * dq_z - k_z * dk_z
            z *= 2
        dq += tl.reshape(dq2, (W, R, BK))
        dk += tl.reshape(dk2, (W, R, BK))
        p += tl.reshape(p2, (W, R, BK))
    else:
        eq = tl.exp2(u)
        ek = tl.exp2(-u)
        eh = tl.exp2(half)[None, None, :]
        q_u = rounded(q * eq, MODE)
        k_u = rounded(k * ek, MODE)
        kx = k_u * (eh * xk3)
        dq_u = tl.reshape(product(da, flat(k_u), MODE), (W, R, BK)) + eh * xq3
        dk_u = tl.reshape(product(dat, flat(q_u), MODE), (W, R, BK)) + eh * xk3
        p = q_u * dq_u - k_u * dk_u
        dq += eq * dq_u
        dk += ek * dk_u

    across = tl.exp2(total) * across + tl.sum(tl.sum(kx, 1), 0)
    c, total = prefix(p, False)
    if not BACKWARD:
        c = suffix(p, c, total, EXACT)
    # From log decays to logits: d logsigmoid(g) = sigmoid(-g).
    store_tile(
        p_dg, (across[None, None, :] + c) * sigmoid_minus(g) * inv, i_c, N, s_dgn, K, BT, R, BK, UNIT
    )
    return dq, dk


@triton.jit
def gradient_chunk(
    i, p_q, p_k, p_v, p_f, p_b, p_o, p_dq, p_dk, p_df, p_db, p_state, N, H, n_states,
    s_qb, s_qn, s_qh, s_kb, s_kn, s_kh, s_vb, s_vn, s_vh, s_fb, s_fn, s_fh, s_bb, s_bn, s_bh, s_ob, s_on,
    s_oh,
    s_dqb, s_dqn, s_dqh, s_dkb, s_dkn, s_dkh, s_dfb, s_dfn, s_dfh, s_dbb, s_dbn, s_dbh, scale, inv,
    K: tl.constexpr, V: tl.constexpr, BT: tl.constexpr, R: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    UNIT: tl.constexpr, MODE: tl.constexpr, EXACT: tl.constexpr, STRONG: tl.constexpr,
):  # fmt: skip
    """dq, dk and both gates' gradients of one chunk, from its inputs, do and the entering states."""
    i_b, i_h, i_c, n_chunks, i_state = locate(i, N, H, BT, 1)
    p_q += (i_b * s_qb + i_h * s_qh) * UNIT
    p_k += (i_b * s_kb + i_h * s_kh) * UNIT
    p_v += (i_b * s_vb + i_h * s_vh) * UNIT
    p_f += (i_b * s_fb + i_h * s_fh) * UNIT
    p_b += (i_b * s_bb + i_h * s_bh) * UNIT
    p_o += (i_b * s_ob + i_h * s_oh) * UNIT
    p_dq += (i_b * s_dqb + i_h * s_dqh) * UNIT
    p_dk += (i_b * s_dkb + i_h * s_dkh) * UNIT
    p_df += (i_b * s_dfb + i_h * s_dfh) * UNIT
    p_db += (i_b * s_dbb + i_h * s_dbh) * UNIT
    q = load_tile(p_q, i_c, N, s_qn, K, 0.0, BT, R, BK, UNIT) * scale
    k = load_tile(p_k, i_c, N, s_kn, K, 0.0, BT, R, BK, UNIT)
    # A token's own pair counts in both directions.
    twice = tl.zeros((BT,), tl.float32)
    for i_v in tl.static_range((V + BV - 1) // BV):
        v = load_rows(p_v, i_c, i_v, N, s_vn, V, BT, BV, UNIT)
        do = load_rows(p_o, i_c, i_v, N, s_on, V, BT, BV, UNIT)
        twice += 2 * tl.sum(v.to(tl.float32) * do.to(tl.float32), 1)
    twice = tl.reshape(twice, (BT // R, R))
    dq = twice[:, :, None] * k
    dk = twice[:, :, None] * q
    left, right = i_c > 0, i_c < n_chunks - 1
    dq, dk = direction_gradients(
        q, k, dq, dk, p_v, p_o, p_f, p_df, p_state, i_c, i_state - 1, left, n_states * 2 + i_state + 1,
        right,
        N, s_vn, s_on, s_fn, s_dfn, inv, K, V, BT, R, BK, BV, UNIT, MODE, EXACT, False, STRONG,
    )  # fmt: skip
    dq, dk = direction_gradients(
        q, k, dq, dk, p_v, p_o, p_b, p_db, p_state, i_c, n_states + i_state + 1, right,
        n_states * 3 + i_state - 1, left,
        N, s_vn, s_on, s_bn, s_dbn, inv, K, V, BT, R, BK, BV, UNIT, MODE, EXACT, True, STRONG,
    )  # fmt: skip
    store_tile(p_dq, dq * scale, i_c, N, s_dqn, K, BT, R, BK, UNIT)
    store_tile(p_dk, dk, i_c, N, s_dkn, K, BT, R, BK, UNIT)


@triton.jit(do_not_specialize=INTS)
def gradient_kernel(
    p_q, p_k, p_v, p_f, p_b, p_o, p_dq, p_dk, p_df, p_db, p_state, p_strong, N, H, n_states, n_chunks,
    s_qb, s_qn, s_qh, s_kb, s_kn, s_kh, s_vb, s_vn, s_vh, s_fb, s_fn, s_fh, s_bb, s_bn, s_bh, s_ob, s_on,
    s_oh,
    s_dqb, s_dqn, s_dqh, s_dkb, s_dkn, s_dkh, s_dfb, s_dfn, s_dfh, s_dbb, s_dbn, s_dbh, scale, inv,
    K: tl.constexpr, V: tl.constexpr, BT: tl.constexpr, R: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    UNIT: tl.constexpr, MODE: tl.constexpr, EXACT: tl.constexpr, STRONG: tl.constexpr,
    GROUP: tl.constexpr,
):  # fmt: skip
    """One chunk a program; STRONG: those among GROUP chunks that are marked."""
    if STRONG:
        o_i = tl.program_id(0) * GROUP + tl.arange(0, GROUP)
        if tl.max(tl.load(p_strong + o_i, mask=o_i < n_chunks, other=0).to(tl.int32)) > 0:
            for j in range(GROUP):
                i = tl.program_id(0) * GROUP + j
                if i < n_chunks:  # noqa: SIM102  Triton evaluates both sides of `and`
                    if tl.load(p_strong + i).to(tl.int32) > 0:
                        gradient_chunk(
                            i, p_q, p_k, p_v, p_f, p_b, p_o, p_dq, p_dk, p_df, p_db, p_state, N, H,
                            n_states,
                            s_qb, s_qn, s_qh, s_kb, s_kn, s_kh, s_vb, s_vn, s_vh, s_fb, s_fn, s_fh, s_bb,
                            s_bn, s_bh,
                            s_ob, s_on, s_oh, s_dqb, s_dqn, s_dqh, s_dkb, s_dkn, s_dkh, s_dfb, s_dfn, s_dfh,
                            s_dbb, s_dbn, s_dbh, scale, inv, K, V, BT, R, BK, BV, UNIT, MODE, EXACT, True,
                        )  # fmt: skip
    else:
        gradient_chunk(
            tl.program_id(0), p_q, p_k, p_v, p_f, p_b, p_o, p_dq, p_dk, p_df, p_db, p_state, N, H, n_states,
            s_qb, s_qn, s_qh, s_kb, s_kn, s_kh, s_vb, s_vn, s_vh, s_fb, s_fn, s_fh, s_bb, s_bn, s_bh,
            s_ob, s_on, s_oh,
            s_dqb, s_dqn, s_dqh, s_dkb, s_dkn, s_dkh, s_dfb, s_dfn, s_dfh, s_dbb, s_dbn, s_dbh, scale, inv,
            K, V, BT, R, BK, BV, UNIT, MODE, EXACT, False,
        )  # fmt: skip
