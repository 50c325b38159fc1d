"""Triton kernels of BiGLA; README.md beside this file derives them, triton.py launches them.

Sizes: N tokens, H heads, K and V head widths, BT tokens of a chunk, NC chunks of a segment, BK, BV blocks of widths.
Strides s_ come in units of UNIT elements. A chunk is walked in runs of R neighbouring tokens, [BT // R, R, BK]: loads
put a run's tokens in one thread's registers, where running sums cost one addition.

All exponents are in base 2; `inv` is 1 / gate_normalizer. MODE is the precision of a product of matrices: 'bf16',
'tf32' or 'tf32x3', always with float32 accumulation. EXACT marks float32 inputs.
"""

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
# Largest sum of |log2 decay| over a chunk for which decays are differences of running sums. Factors then stay within
# 2^(+-SPAN / 2), so that inputs up to 2^30 do not overflow; float32 inputs also keep their digits.
SPAN = tl.constexpr(180.0)
SPAN_EXACT = tl.constexpr(20.0)


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
    if MODE == 'bf16 interpreted':  # the interpreter has no bf16 product
        return tl.dot(rounded(a.to(tl.float32), 'bf16'), rounded(b.to(tl.float32), 'bf16'))
    elif MODE == 'bf16':
        return tl.dot(a.to(tl.bfloat16), b.to(tl.bfloat16))
    else:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), input_precision=MODE)


@triton.jit
def add_run(sum_a, before_a, sum_b, before_b):
    """Two neighbours, a first, as one: the sum over both, and over what lies before the last."""
    return sum_a + sum_b, sum_a + before_b


@triton.jit
def prefix(x, R: tl.constexpr, REVERSE: tl.constexpr):
    """Inclusive sums over the tokens up to each (REVERSE: from each on), [BT, BK].

    The runs before are summed, not subtracted: no digit of a small sum is lost beside a large gate.
    """
    BT: tl.constexpr = x.shape[0]
    BK: tl.constexpr = x.shape[1]
    x = tl.reshape(x, (BT // R, R, BK))
    part = tl.sum(x, 1)
    _, before = tl.associative_scan((part, tl.zeros_like(part)), 0, add_run, reverse=REVERSE)
    return tl.reshape(tl.cumsum(x, 1, reverse=REVERSE) + before[:, None, :], (BT, BK))


@triton.jit
def is_mild(total_f, total_b, EXACT: tl.constexpr):
    """Whether differences of running sums will do; False for NaN."""
    return -tl.minimum(tl.min(total_f), tl.min(total_b)) < (SPAN_EXACT if EXACT else SPAN)


@triton.jit
def load_tile(p, i_c, N, s_n, D, other, BT: tl.constexpr, R: tl.constexpr, BK: tl.constexpr, UNIT: tl.constexpr):
    """Chunk i_c of a [N, D] matrix as float32 [BT, BK]; `other` beyond the edges."""
    PAIR: tl.constexpr = min(UNIT, 2)
    o_t = (tl.arange(0, BT // R) * R)[:, None, None] + tl.arange(0, R)[None, :, None]
    o_k = tl.arange(0, BK)[None, None, :]
    s_n *= UNIT
    # Said to be contiguous by two only: lanes then lie along channels and runs, and a run's tokens in one thread.
    off = tl.max_contiguous(tl.multiple_of(o_t * s_n + o_k, (1, 1, PAIR)), (1, 1, PAIR))
    p += (i_c * BT).to(tl.int64) * s_n
    x = tl.load(p + off, mask=(i_c * BT + o_t < N) & (o_k < D), other=other)
    return tl.reshape(x.to(tl.float32), (BT, BK))


@triton.jit
def load_rows(p, i_c, i_v, N, s_n, D, BT: tl.constexpr, BV: tl.constexpr, UNIT: tl.constexpr):
    """Chunk i_c, columns i_v * BV on, of a [N, D] matrix: [BT, BV] in its dtype, zeros beyond the edges."""
    o_t = tl.arange(0, BT)[:, None]
    o_v = i_v * BV + tl.arange(0, BV)[None, :]
    s_n *= UNIT
    p += (i_c * BT).to(tl.int64) * s_n
    return tl.load(p + (o_t * s_n + o_v), mask=(i_c * BT + o_t < N) & (o_v < D), other=0.0)


@triton.jit
def store_rows(p, x, i_c, i_v, N, s_n, D, BT: tl.constexpr, BV: tl.constexpr, UNIT: tl.constexpr):
    o_t = tl.arange(0, BT)[:, None]
    o_v = i_v * BV + tl.arange(0, BV)[None, :]
    s_n *= UNIT
    p += (i_c * BT).to(tl.int64) * s_n
    tl.store(p + (o_t * s_n + o_v), x.to(p.dtype.element_ty), mask=(i_c * BT + o_t < N) & (o_v < D))


@triton.jit
def state_block(i_state, i_v, K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr):
    """Where state number i_state, columns i_v * BV on, lies in [.., K, V]: offsets and mask [BK, BV]."""
    o_k = tl.arange(0, BK)[:, None]
    o_v = i_v * BV + tl.arange(0, BV)[None, :]
    return i_state.to(tl.int64) * (K * V) + o_k * V + o_v, (o_k < K) & (o_v < V)


@triton.jit
def load_state(p, i_state, there, i_v, K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr):
    off, m = state_block(i_state, i_v, K, V, BK, BV)
    return tl.load(p + off, mask=m & there, other=0.0).to(tl.float32)


@triton.jit
def store_state(p, x, i_state, i_v, K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr):
    off, m = state_block(i_state, i_v, K, V, BK, BV)
    tl.store(p + off, x.to(p.dtype.element_ty), mask=m)


@triton.jit
def locate(N, H, BT: tl.constexpr, NC: tl.constexpr):
    """This program's image, head and segment (NC chunks), heads fastest; number of segments; its state's number."""
    n_segments = tl.cdiv(N, BT * NC)
    pid = tl.program_id(0)
    i_h = pid % H
    i_s = (pid // H) % n_segments
    i_b = (pid // H // n_segments).to(tl.int64)
    return i_b, i_h, i_s, n_segments, (i_b * H + i_h) * n_segments + i_s


@triton.jit
def chunk_decays(p_f, p_b, i_c, N, s_fn, s_bn, inv, K: tl.constexpr, BT: tl.constexpr, R: tl.constexpr,
                 BK: tl.constexpr, UNIT: tl.constexpr, EXACT: tl.constexpr):  # fmt: skip
    """log2 decays of both directions over a chunk, all [BT, BK] but the totals [BK]: those of each token, inclusive
    running sums, totals; and whether they are mild."""
    lf = log2_sigmoid(load_tile(p_f, i_c, N, s_fn, K, float('inf'), BT, R, BK, UNIT), EXACT) * inv
    lb = log2_sigmoid(load_tile(p_b, i_c, N, s_bn, K, float('inf'), BT, R, BK, UNIT), EXACT) * inv
    total_f = tl.sum(lf, 0)
    total_b = tl.sum(lb, 0)
    return lf, lb, prefix(lf, R, False), prefix(lb, R, False), total_f, total_b, is_mild(total_f, total_b, EXACT)


# Integers that differ from call to call: Triton must not compile a kernel for their values.
INTS = ['N', 'NS', 'H', 'n_states', 's_qb', 's_qn', 's_qh', 's_kb', 's_kn', 's_kh', 's_vb', 's_vn', 's_vh', 's_fb', 's_fn',
        's_fh', 's_bb', 's_bn', 's_bh', 's_ob', 's_on', 's_oh', 's_dqb', 's_dqn', 's_dqh', 's_dkb', 's_dkn', 's_dkh',
        's_dvb', 's_dvn', 's_dvh', 's_dfb', 's_dfn', 's_dfh', 's_dbb', 's_dbn', 's_dbh']  # fmt: skip


@triton.jit(do_not_specialize=INTS)
def states_kernel(
    p_q, p_k, p_v, p_f, p_b, p_o, p_state, p_decay, N, H, n_states,
    s_qb, s_qn, s_qh, s_kb, s_kn, s_kh, s_vb, s_vn, s_vh, s_fb, s_fn, s_fh, s_bb, s_bn, s_bh, s_ob, s_on, s_oh,
    scale, inv,
    K: tl.constexpr, V: tl.constexpr, BT: tl.constexpr, R: tl.constexpr, NC: tl.constexpr, BK: tl.constexpr,
    BV: tl.constexpr, UNIT: tl.constexpr, MODE: tl.constexpr, EXACT: tl.constexpr, BACKWARD: tl.constexpr,
):  # fmt: skip
    """What each segment alone adds to the states that leave it, and its log2 decays.

    state 0 = sum_s (decay from s to the segment's end * k_s) v_s^T         state 1: to its start, backward decay
    state 2 = sum_t (decay from the start to t * q_t) do_t^T (BACKWARD)     state 3: from the end, backward decay
    """
    i_b, i_h, i_s, _, i_state = locate(N, H, BT, NC)
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
        lf, lb, cf, cb, total_f, total_b, mild = chunk_decays(p_f, p_b, i_c, N, s_fn, s_bn, inv, K, BT, R, BK, UNIT,
                                                              EXACT)  # fmt: skip
        if mild:
            after_f = total_f[None, :] - cf
        else:
            after_f = prefix(lf, R, True) - lf
        k = load_tile(p_k, i_c, N, s_kn, K, 0.0, BT, R, BK, UNIT)
        v = load_rows(p_v, i_c, i_v, N, s_vn, V, BT, BV, UNIT)
        kf = k * tl.exp2(after_f)
        kb = k * tl.exp2(cb - lb)
        s0 = tl.exp2(total_f)[:, None] * s0 + product(tl.trans(kf), v, MODE)  # [BK, BT] @ [BT, BV]
        s1 += tl.exp2(sum_b)[:, None] * product(tl.trans(kb), v, MODE)
        if BACKWARD:
            if mild:
                from_b = total_b[None, :] - (cb - lb)
            else:
                from_b = prefix(lb, R, True)
            q = load_tile(p_q, i_c, N, s_qn, K, 0.0, BT, R, BK, UNIT) * scale
            do = load_rows(p_o, i_c, i_v, N, s_on, V, BT, BV, UNIT)
            qf = q * tl.exp2(cf)
            qb = q * tl.exp2(from_b)
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
        tl.store(p_decay + i_state * K + o_k, sum_f, mask=o_k < K)
        tl.store(p_decay + (n_states + i_state) * K + o_k, sum_b, mask=o_k < K)


@triton.jit
def join(decay_a, state_a, decay_b, state_b):
    """Two runs of segments, a first, as one: (log2 decay, state)."""
    return decay_a + decay_b, tl.exp2(decay_b) * state_a + state_b


@triton.jit(do_not_specialize=INTS)
def scan_kernel(p_state, p_decay, NS, n_states, K: tl.constexpr, V: tl.constexpr, BS: tl.constexpr,
                BE: tl.constexpr):  # fmt: skip
    """Turn what each segment adds to a state into the state that leaves it, in place.

    States 0 and 3 run from the first segment to the last, 1 and 2 the other way; 0 and 2 with the forward decay.
    """
    i_e = tl.program_id(0)
    i_bh = tl.program_id(1).to(tl.int64)
    i_z = tl.program_id(2)
    reverse = (i_z == 1) | (i_z == 2)
    o_e = i_e * BE + tl.arange(0, BE)
    o_i = tl.arange(0, BS)
    p_state += (i_z * n_states.to(tl.int64) + i_bh * NS) * (K * V)
    p_decay += ((i_z % 2) * n_states.to(tl.int64) + i_bh * NS) * K
    carry = tl.zeros((BE,), tl.float32)
    for i in range(0, NS, BS):
        o_s = i + o_i
        m = (o_s < NS)[:, None] & (o_e < K * V)[None, :]
        o_s = tl.where(reverse, NS - 1 - o_s, o_s).to(tl.int64)
        off = o_s[:, None] * (K * V) + o_e[None, :]
        state = tl.load(p_state + off, mask=m, other=0.0).to(tl.float32)
        decay = tl.load(p_decay + o_s[:, None] * K + (o_e // V)[None, :], mask=m, other=0.0)
        run, state = tl.associative_scan((decay, state), 0, join)
        state += tl.exp2(run) * carry[None, :]
        tl.store(p_state + off, state.to(p_state.dtype.element_ty), mask=m)
        carry = tl.sum(tl.where((o_i == BS - 1)[:, None], state, 0.0), 0)


@triton.jit
def decay_sum(mask, l):
    """exp2 of sums over the tokens that a 0/1 matrix [BT, BT] picks: [BT, BK]."""
    return tl.exp2(tl.dot(mask.to(tl.float32), l, input_precision='tf32x3'))


@triton.jit
def level_decays(z, lf, lb, BT: tl.constexpr):
    """Decays to and from the middle of each block of 2z tokens, [BT, BK] forward and backward, none above 1.

    A pair in different halves has decay(t, s) = decay of one half's token * decay of the other's: the factored form
    with a reference between the two, exact for any gates. Also which tokens are in second halves, and which pairs in
    one block.
    """
    o = tl.arange(0, BT)
    t, j = o[:, None], o[None, :]
    second = (t // z) % 2 == 1
    middle = (t // (2 * z)) * (2 * z) + z
    same = t // (2 * z) == j // (2 * z)
    to_f = tl.where(second, (j >= middle) & (j <= t), (j > t) & (j < middle)) & same
    to_b = tl.where(second, (j >= middle) & (j < t), (j >= t) & (j < middle)) & same
    return second, same, decay_sum(to_f, lf), decay_sum(to_b, lb)


@triton.jit
def pairs(q, k, MODE: tl.constexpr, TRANSPOSED: tl.constexpr):
    """All products q_t . k_s, [t, s] or (TRANSPOSED) [s, t]."""
    if TRANSPOSED:
        return product(k, tl.trans(q), MODE)
    else:
        return product(q, tl.trans(k), MODE)


@triton.jit
def pairs_by_levels(q, k, lf, lb, BT: tl.constexpr, MODE: tl.constexpr, TRANSPOSED: tl.constexpr):
    """A[t, s] = q_t . (decay(t, s) * k_s), both directions, by levels of halving blocks; q, k, l [BT, BK]."""
    o = tl.arange(0, BT)
    a = tl.where(o[:, None] == o[None, :], 2 * pairs(q, k, MODE, TRANSPOSED), 0.0)
    z = 1
    while z < BT:
        second, same, ef, eb = level_decays(z, lf, lb, BT)
        af = pairs(tl.where(second, q * ef, 0.0), tl.where(second, 0.0, k * ef), MODE, TRANSPOSED)
        ab = pairs(tl.where(second, 0.0, q * eb), tl.where(second, k * eb, 0.0), MODE, TRANSPOSED)
        a += tl.where(same, af + ab, 0.0)
        z *= 2
    return a


@triton.jit
def pairs_by_middle(q, k, uf, ub, BT: tl.constexpr, MODE: tl.constexpr, TRANSPOSED: tl.constexpr):
    """The same for mild decays, in the factored form with one reference; u: running sums from it [BT, BK]."""
    o = tl.arange(0, BT)
    t, s = o[:, None], o[None, :]
    af = pairs(q * tl.exp2(uf), k * tl.exp2(-uf), MODE, TRANSPOSED)
    ab = pairs(q * tl.exp2(-ub), k * tl.exp2(ub), MODE, TRANSPOSED)
    if TRANSPOSED:
        t, s = s, t
    return tl.where(t > s, af, tl.where(t < s, ab, af + ab))


@triton.jit(do_not_specialize=INTS)
def output_kernel(
    p_q, p_k, p_v, p_f, p_b, p_o, p_state, N, H, n_states,
    s_qb, s_qn, s_qh, s_kb, s_kn, s_kh, s_vb, s_vn, s_vh, s_fb, s_fn, s_fh, s_bb, s_bn, s_bh, s_ob, s_on, s_oh,
    scale, inv,
    K: tl.constexpr, V: tl.constexpr, BT: tl.constexpr, R: tl.constexpr, NC: tl.constexpr, BK: tl.constexpr,
    BV: tl.constexpr, UNIT: tl.constexpr, PAIR_MODE: tl.constexpr, MODE: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """o_t = sum over the pairs within t's chunk + q_t decayed to the chunk's ends . the two states that enter it.

    The states that enter the segment are read; those that enter the chunk are carried there from the segment's ends.
    """
    i_b, i_h, i_c, n_chunks, _ = locate(N, H, BT, 1)
    i_v = tl.program_id(1)
    i_s = i_c // NC
    NS = tl.cdiv(n_chunks, NC)
    p_q += (i_b * s_qb + i_h * s_qh) * UNIT
    p_k += (i_b * s_kb + i_h * s_kh) * UNIT
    p_v += (i_b * s_vb + i_h * s_vh) * UNIT
    p_f += (i_b * s_fb + i_h * s_fh) * UNIT
    p_b += (i_b * s_bb + i_h * s_bh) * UNIT
    p_o += (i_b * s_ob + i_h * s_oh) * UNIT

    # The states that enter the chunk.
    i_state = (i_b * H + i_h) * NS + i_s
    fwd = load_state(p_state, i_state - 1, i_s > 0, i_v, K, V, BK, BV)
    bwd = load_state(p_state, n_states + i_state + 1, i_s < NS - 1, i_v, K, V, BK, BV)
    if NC > 1:
        first = i_s * NC
        last = tl.minimum(first + NC, n_chunks) - 1
        for i in range(last - first):
            # Chunks before this one forward, then those after it from the last back.
            ahead = first + i < i_c
            j = tl.where(ahead, first + i, last - (i - (i_c - first)))
            p_g = p_f if ahead else p_b
            s_gn = tl.where(ahead, s_fn, s_bn)
            l = log2_sigmoid(load_tile(p_g, j, N, s_gn, K, float('inf'), BT, R, BK, UNIT), EXACT) * inv
            total = tl.sum(l, 0)
            k2 = load_tile(p_k, j, N, s_kn, K, 0.0, BT, R, BK, UNIT)
            v2 = load_rows(p_v, j, i_v, N, s_vn, V, BT, BV, UNIT)
            if ahead:
                k2 *= tl.exp2(prefix(l, R, True) - l)
                fwd = tl.exp2(total)[:, None] * fwd + product(tl.trans(k2), v2, MODE)
            else:
                k2 *= tl.exp2(prefix(l, R, False) - l)
                bwd = tl.exp2(total)[:, None] * bwd + product(tl.trans(k2), v2, MODE)

    lf, lb, cf, cb, total_f, total_b, mild = chunk_decays(p_f, p_b, i_c, N, s_fn, s_bn, inv, K, BT, R, BK, UNIT,
                                                          EXACT)  # fmt: skip
    q = load_tile(p_q, i_c, N, s_qn, K, 0.0, BT, R, BK, UNIT) * scale
    k = load_tile(p_k, i_c, N, s_kn, K, 0.0, BT, R, BK, UNIT)
    v = load_rows(p_v, i_c, i_v, N, s_vn, V, BT, BV, UNIT)
    if mild:
        half_f = 0.5 * total_f  # a reference in the chunk's middle
        half_b = 0.5 * total_b
        uf = cf - half_f[None, :]
        ub = cb - lb - half_b[None, :]
        qf = q * tl.exp2(uf)
        qb = q * tl.exp2(-ub)
        a = pairs_by_middle(q, k, uf, ub, BT, PAIR_MODE, False)
        fwd *= tl.exp2(half_f)[:, None]
        bwd *= tl.exp2(half_b)[:, None]
    else:
        a = pairs_by_levels(q, k, lf, lb, BT, PAIR_MODE, False)
        qf = q * tl.exp2(cf)
        qb = q * tl.exp2(prefix(lb, R, True))
    o = product(a, v, MODE)
    o += product(qf, fwd, PAIR_MODE)
    o += product(qb, bwd, PAIR_MODE)
    store_rows(p_o, o, i_c, i_v, N, s_on, V, BT, BV, UNIT)


@triton.jit(do_not_specialize=INTS)
def gradient_kernel(
    p_q, p_k, p_v, p_f, p_b, p_o, p_dq, p_dk, p_dv, p_df, p_db, p_state, N, H, n_states,
    s_qb, s_qn, s_qh, s_kb, s_kn, s_kh, s_vb, s_vn, s_vh, s_fb, s_fn, s_fh, s_bb, s_bn, s_bh, s_ob, s_on, s_oh,
    s_dqb, s_dqn, s_dqh, s_dkb, s_dkn, s_dkh, s_dvb, s_dvn, s_dvh, s_dfb, s_dfn, s_dfh, s_dbb, s_dbn, s_dbh,
    scale, inv,
    K: tl.constexpr, V: tl.constexpr, BT: tl.constexpr, R: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    UNIT: tl.constexpr, OUT_UNIT: tl.constexpr, PAIR_MODE: tl.constexpr, MODE: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """All five gradients of one chunk from do, the chunk's inputs and the four states that enter it.

    A pair (t, s) adds p = do_t.v_s * q_t * decay * k_s to the log decay of every token between the two. Summed up as
    running sums of q_t * dq_t - k_s * dk_s over the chunk's own tokens only; each p enters twice, from the same rounded
    factors, so that what must cancel does.
    """
    i_b, i_h, i_c, n_chunks, i_state = locate(N, H, BT, 1)
    p_q += (i_b * s_qb + i_h * s_qh) * UNIT
    p_k += (i_b * s_kb + i_h * s_kh) * UNIT
    p_v += (i_b * s_vb + i_h * s_vh) * UNIT
    p_f += (i_b * s_fb + i_h * s_fh) * UNIT
    p_b += (i_b * s_bb + i_h * s_bh) * UNIT
    p_o += (i_b * s_ob + i_h * s_oh) * UNIT
    p_dq += (i_b * s_dqb + i_h * s_dqh) * OUT_UNIT
    p_dk += (i_b * s_dkb + i_h * s_dkh) * OUT_UNIT
    p_dv += (i_b * s_dvb + i_h * s_dvh) * OUT_UNIT
    p_df += (i_b * s_dfb + i_h * s_dfh) * OUT_UNIT
    p_db += (i_b * s_dbb + i_h * s_dbh) * OUT_UNIT
    o_t = tl.arange(0, BT)
    t, s = o_t[:, None], o_t[None, :]

    lf, lb, cf, cb, total_f, total_b, mild = chunk_decays(p_f, p_b, i_c, N, s_fn, s_bn, inv, K, BT, R, BK, UNIT,
                                                          EXACT)  # fmt: skip
    q = load_tile(p_q, i_c, N, s_qn, K, 0.0, BT, R, BK, UNIT) * scale
    k = load_tile(p_k, i_c, N, s_kn, K, 0.0, BT, R, BK, UNIT)
    half_f = 0.5 * total_f
    half_b = 0.5 * total_b
    # Decays between each token and the chunk's ends, and the pairs within the chunk.
    to_qf = tl.exp2(cf)
    to_kb = tl.exp2(cb - lb)
    if mild:
        uf = cf - half_f[None, :]
        ub = cb - lb - half_b[None, :]
        to_kf = tl.exp2(total_f[None, :] - cf)
        to_qb = tl.exp2(total_b[None, :] - cb + lb)
        at = pairs_by_middle(q, k, uf, ub, BT, PAIR_MODE, True)
    else:
        to_kf = tl.exp2(prefix(lf, R, True) - lf)
        to_qb = tl.exp2(prefix(lb, R, True))
        at = pairs_by_levels(q, k, lf, lb, BT, PAIR_MODE, True)

    da = tl.zeros((BT, BT), tl.float32)
    dat = tl.zeros((BT, BT), tl.float32)  # transposed again by a product, cheaper than through shared memory
    dqf = tl.zeros((BT, BK), tl.float32)
    dqb = tl.zeros((BT, BK), tl.float32)
    dkf = tl.zeros((BT, BK), tl.float32)
    dkb = tl.zeros((BT, BK), tl.float32)
    across_f = tl.zeros((BK,), tl.float32)
    across_b = tl.zeros((BK,), tl.float32)
    for i_v in range(tl.cdiv(V, BV)):
        v = load_rows(p_v, i_c, i_v, N, s_vn, V, BT, BV, UNIT)
        do = load_rows(p_o, i_c, i_v, N, s_on, V, BT, BV, UNIT)
        s0 = load_state(p_state, i_state - 1, i_c > 0, i_v, K, V, BK, BV)
        s1 = load_state(p_state, n_states + i_state + 1, i_c < n_chunks - 1, i_v, K, V, BK, BV)
        s2 = load_state(p_state, n_states * 2 + i_state + 1, i_c < n_chunks - 1, i_v, K, V, BK, BV)
        s3 = load_state(p_state, n_states * 3 + i_state - 1, i_c > 0, i_v, K, V, BK, BV)
        da += product(do, tl.trans(v), MODE)
        dat += product(v, tl.trans(do), MODE)
        dqf += product(do, tl.trans(s0), MODE)
        dqb += product(do, tl.trans(s1), MODE)
        dkf += product(v, tl.trans(s2), MODE)
        dkb += product(v, tl.trans(s3), MODE)
        across_f += tl.sum(s0 * s2, 1)
        across_b += tl.sum(s1 * s3, 1)
        dv = product(at, do, MODE)
        dv += product(k * to_kf, s2, PAIR_MODE)
        dv += product(k * to_kb, s3, PAIR_MODE)
        store_rows(p_dv, dv, i_c, i_v, N, s_dvn, V, BT, BV, OUT_UNIT)

    # Pairs with one token in the chunk, then pairs within it.
    dq = to_qf * dqf + to_qb * dqb
    dk = to_kf * dkf + to_kb * dkb
    pf = q * to_qf * dqf
    pb = q * to_qb * dqb
    kf = k * to_kf * dkf
    kb = k * to_kb * dkb
    across_f = tl.exp2(total_f) * across_f + tl.sum(kf, 0)
    across_b = tl.exp2(total_b) * across_b + tl.sum(kb, 0)
    pf -= kf
    pb -= kb
    twice = 2 * tl.sum(tl.where(t == s, da, 0.0), 1)[:, None]
    dq += twice * k
    dk += twice * q
    daf = rounded(tl.where(t > s, da, 0.0), MODE)  # [t, s]
    dab = rounded(tl.where(t < s, da, 0.0), MODE)
    datf = rounded(tl.where(s > t, dat, 0.0), MODE)  # [s, t]
    datb = rounded(tl.where(s < t, dat, 0.0), MODE)
    if mild:
        uf = cf - half_f[None, :]
        ub = cb - lb - half_b[None, :]
        ef = tl.exp2(uf)
        eif = tl.exp2(-uf)
        eb = tl.exp2(ub)
        eib = tl.exp2(-ub)
        qf = rounded(q * ef, MODE)
        kf = rounded(k * eif, MODE)
        qb = rounded(q * eib, MODE)
        kb = rounded(k * eb, MODE)
        dqf = product(daf, kf, MODE)
        dqb = product(dab, kb, MODE)
        dkf = product(datf, qf, MODE)
        dkb = product(datb, qb, MODE)
        dq += ef * dqf + eib * dqb
        dk += eif * dkf + eb * dkb
        pf += qf * dqf - kf * dkf
        pb += qb * dqb - kb * dkb
    else:
        z = 1
        while z < BT:
            second, same, ef, eb = level_decays(z, lf, lb, BT)
            qf = rounded(tl.where(second, q * ef, 0.0), MODE)
            kf = rounded(tl.where(second, 0.0, k * ef), MODE)
            qb = rounded(tl.where(second, 0.0, q * eb), MODE)
            kb = rounded(tl.where(second, k * eb, 0.0), MODE)
            dqf = tl.where(second, product(tl.where(same, daf, 0.0), kf, MODE), 0.0)
            dqb = tl.where(second, 0.0, product(tl.where(same, dab, 0.0), kb, MODE))
            dkf = tl.where(second, 0.0, product(tl.where(same, datf, 0.0), qf, MODE))
            dkb = tl.where(second, product(tl.where(same, datb, 0.0), qb, MODE), 0.0)
            dq += ef * dqf + eb * dqb
            dk += ef * dkf + eb * dkb
            pf += qf * dqf - kf * dkf
            pb += qb * dqb - kb * dkb
            z *= 2
    store_rows(p_dq, dq * scale, i_c, 0, N, s_dqn, K, BT, BK, OUT_UNIT)
    store_rows(p_dk, dk, i_c, 0, N, s_dkn, K, BT, BK, OUT_UNIT)

    # From log decays to logits: d logsigmoid(g) = sigmoid(-g).
    dlf = across_f[None, :] + tl.sum(pf, 0)[None, :] - (prefix(pf, R, False) - pf)
    dlb = across_b[None, :] + prefix(pb, R, False)
    gf = load_tile(p_f, i_c, N, s_fn, K, 0.0, BT, R, BK, UNIT)
    gb = load_tile(p_b, i_c, N, s_bn, K, 0.0, BT, R, BK, UNIT)
    store_rows(p_df, dlf * sigmoid_minus(gf) * inv, i_c, 0, N, s_dfn, K, BT, BK, OUT_UNIT)
    store_rows(p_db, dlb * sigmoid_minus(gb) * inv, i_c, 0, N, s_dbn, K, BT, BK, OUT_UNIT)


@triton.jit
def sigmoid_minus(x):
    """sigmoid(-x) without overflow."""
    e = tl.exp2(-tl.abs(x) * LOG2E)
    return tl.where(x >= 0, e, 1.0) / (1.0 + e)
