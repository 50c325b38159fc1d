"""The states between chunks: of each segment, and from one to the next."""

import triton
import triton.language as tl

from mmvig.ops.bigla.kernels.arithmetic import product, tf32_ready
from mmvig.ops.bigla.kernels.tiles import (
    AFTER,
    BEFORE,
    FROM,
    INTS,
    UP_TO,
    as_float32,
    at,
    load_gates,
    load_table,
    load_tile,
    place_in_output,
    place_of,
    store_state,
    store_sum,
    tile_sum,
    whole_sum,
)


@triton.jit
def add_tokens(
    b_x, b_y, b_ld, b_table, b_state, MODE: tl.constexpr, PAIR_MODE: tl.constexpr, ONE_WARP: tl.constexpr
):  # fmt: skip
    """State [BK, BV] + sum over tokens of decayed x [BT, BK] times y [BT, BV]; the decays: 2^(table @ ld).

    ONE_WARP: the decays are made transposed, so that the factor of the product is already where it must
    be; with several warps it has to go through shared memory either way.
    """
    if ONE_WARP:
        b_x = tl.trans(b_x) * tl.exp2(tile_sum(b_table, b_ld, MODE, True))  # [BK, BT]
    else:
        b_x = tl.trans(b_x * tl.exp2(tile_sum(b_table, b_ld, MODE)))  # [BK, BT]
    return product(b_x, b_y, b_state, PAIR_MODE)  # [BK, BV]


@triton.jit(do_not_specialize=INTS)
def states_kernel(
    p_q, p_k, p_v, p_gf, p_gb, p_do, p_state, p_sum, p_table, T, H, n_states, n_sums,
    s_qb, s_qt, s_qh, s_kb, s_kt, s_kh, s_vb, s_vt, s_vh, s_gfb, s_gft, s_gfh, s_gbb, s_gbt, s_gbh,
    s_dob, s_dot, s_doh, CH, scale, inv,
    K: tl.constexpr, V: tl.constexpr, BT: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    UNIT: tl.constexpr, SAME: tl.constexpr, MODE: tl.constexpr, PAIR_MODE: tl.constexpr, NC: tl.constexpr,
    BACKWARD: tl.constexpr, PARTS: tl.constexpr, ONE_WARP: tl.constexpr,
):  # fmt: skip
    """What each segment alone adds to the states that leave it; each chunk's sums of log2 decays.

    state 0 = sum_s (decay from s to the segment's end * k_s) v_s^T      1: to its start, backward decay
    state 2 = sum_t (decay from the start to t * q_t) do_t^T, BACKWARD   3: from its end, backward decay
    A chunk i_c is PARTS tiles i_t of BT tokens: few registers, so many programs, with few states.
    """
    scale, inv = as_float32(scale, inv)
    if SAME:
        s_kb, s_kt, s_kh = s_qb, s_qt, s_qh
        s_gbb, s_gbt, s_gbh = s_gfb, s_gft, s_gfh
    NV: tl.constexpr = (V + BV - 1) // BV
    i_v = tl.program_id(1) % NV
    i_h = tl.program_id(1) // NV
    i_b = tl.program_id(2)
    i_bh = i_b * H + i_h
    NT = tl.cdiv(T, BT * PARTS)
    NS = tl.cdiv(NT, NC)
    p_q = at(p_q, i_b, i_h, s_qb, s_qh, UNIT)
    p_k = at(p_k, i_b, i_h, s_kb, s_kh, UNIT)
    p_v = at(p_v, i_b, i_h, s_vb, s_vh, UNIT)
    p_gf = at(p_gf, i_b, i_h, s_gfb, s_gfh, UNIT)
    p_gb = at(p_gb, i_b, i_h, s_gbb, s_gbh, UNIT)
    p_do = at(p_do, i_b, i_h, s_dob, s_doh, UNIT)
    p_sum += i_bh * NT * K
    b_zero = tl.zeros((BK, BV), tl.float32)
    b_after = load_table(p_table, AFTER, BT)  # [BT, BT]
    b_before = load_table(p_table, BEFORE, BT)  # [BT, BT]
    if BACKWARD:
        b_up_to = load_table(p_table, UP_TO, BT)  # [BT, BT]
    TILES: tl.constexpr = NC * PARTS
    b_one = tl.full((BK,), 1.0, tl.float32)
    b_s0, b_s1, b_s2, b_s3 = b_zero, b_zero, b_zero, b_zero
    b_decay_f, b_decay_b = b_one, b_one
    b_sum_f = tl.zeros((BK,), tl.float32)
    b_sum_b = tl.zeros((BK,), tl.float32)
    first = tl.program_id(0) * CH
    # One loop over the tiles of all segments, as only loads of an innermost loop are under way ahead.
    for i_t in range(first * TILES, tl.minimum(first + CH, NS) * TILES):
        b_lf, _ = load_gates(p_gf, i_t, T, s_gft, inv, K, BT, BK, UNIT, MODE)  # [BT, BK]
        b_lb, _ = load_gates(p_gb, i_t, T, s_gbt, inv, K, BT, BK, UNIT, MODE)  # [BT, BK]
        b_k = load_tile(p_k, i_t, 0, T, s_kt, 0.0, K, BT, BK, UNIT).to(tl.float32)  # [BT, BK]
        b_v = load_tile(p_v, i_t, i_v, T, s_vt, 0.0, V, BT, BV, UNIT)  # [BT, BV]
        b_k = tf32_ready(b_k, PAIR_MODE)
        b_total_f = whole_sum(b_lf, MODE)  # [BK]
        b_total_b = whole_sum(b_lb, MODE)  # [BK]
        b_sum_f += b_total_f
        b_sum_b += b_total_b
        i_c = i_t // PARTS
        if i_t % PARTS == PARTS - 1:
            if (i_v == 0) & (i_c < NT):
                store_sum(p_sum, b_sum_f, i_c, K, BK)
                store_sum(p_sum, b_sum_b, n_sums + i_c, K, BK)
            b_sum_f = tl.zeros((BK,), tl.float32)
            b_sum_b = tl.zeros((BK,), tl.float32)
        b_over_f = tl.exp2(b_total_f)
        b_over_b = tl.exp2(b_total_b)
        if TILES > 1:
            b_s0 *= b_over_f[:, None]
        b_s0 = add_tokens(b_k, b_v, b_lf, b_after, b_s0, MODE, PAIR_MODE, ONE_WARP)  # [BK, BV]
        b_own = add_tokens(b_k, b_v, b_lb, b_before, b_zero, MODE, PAIR_MODE, ONE_WARP)  # [BK, BV]
        b_s1 += b_decay_b[:, None] * b_own
        if BACKWARD:
            b_q = load_tile(p_q, i_t, 0, T, s_qt, 0.0, K, BT, BK, UNIT).to(tl.float32)  # [BT, BK]
            b_q = tf32_ready(b_q * scale, PAIR_MODE)
            b_do = load_tile(p_do, i_t, i_v, T, s_dot, 0.0, V, BT, BV, UNIT)  # [BT, BV]
            b_own = add_tokens(b_q, b_do, b_lf, b_up_to, b_zero, MODE, PAIR_MODE, ONE_WARP)  # [BK, BV]
            b_s2 += b_decay_f[:, None] * b_own
            b_decay_f *= b_over_f
            if TILES > 1:
                b_s3 *= b_over_b[:, None]
            b_from = tl.trans(b_up_to)
            b_s3 = add_tokens(b_q, b_do, b_lb, b_from, b_s3, MODE, PAIR_MODE, ONE_WARP)  # [BK, BV]
        b_decay_b *= b_over_b
        if i_t % TILES == TILES - 1:
            i_state = i_bh * NS + i_t // TILES
            store_state(place_of(p_state, i_state, K, V), b_s0, i_v, K, V, BK, BV)
            store_state(place_of(p_state, n_states + i_state, K, V), b_s1, i_v, K, V, BK, BV)
            if BACKWARD:
                store_state(place_of(p_state, n_states * 2 + i_state, K, V), b_s2, i_v, K, V, BK, BV)
                store_state(place_of(p_state, n_states * 3 + i_state, K, V), b_s3, i_v, K, V, BK, BV)
            # Nothing of this segment may be left in the next, were it NaN.
            b_s0, b_s1, b_s2, b_s3 = b_zero, b_zero, b_zero, b_zero
            b_decay_f, b_decay_b = b_one, b_one


@triton.jit(do_not_specialize=INTS)
def walk_kernel(
    p_q, p_k, p_v, p_gf, p_gb, p_o, p_state, p_sum, p_table, T, H, n_states, n_sums,
    s_qb, s_qt, s_qh, s_kb, s_kt, s_kh, s_vb, s_vt, s_vh, s_gfb, s_gft, s_gfh, s_gbb, s_gbt, s_gbh,
    s_ob, s_ot, s_oh, scale, inv,
    K: tl.constexpr, V: tl.constexpr, BT: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    UNIT: tl.constexpr, SAME: tl.constexpr, MODE: tl.constexpr, PAIR_MODE: tl.constexpr,
    ONE_WARP: tl.constexpr, IN_OUTPUT: tl.constexpr,
):  # fmt: skip
    """What states_kernel and scan_kernel do, for short sequences and NC = 1.

    A program walks along a sequence and carries one of its states, so that nothing is left to scan.
    p_o is do for gradients; IN_OUTPUT: it is the output, whose memory takes the states until it is written,
    and p_state has the last ones.
    """
    scale, inv = as_float32(scale, inv)
    if SAME:
        s_kb, s_kt, s_kh = s_qb, s_qt, s_qh
        s_gbb, s_gbt, s_gbh = s_gfb, s_gft, s_gfh
    NV: tl.constexpr = (V + BV - 1) // BV
    i_z = tl.program_id(0)
    i_v = tl.program_id(1) % NV
    i_h = tl.program_id(1) // NV
    i_b = tl.program_id(2)
    i_bh = i_b * H + i_h
    NT = tl.cdiv(T, BT)
    reverse = (i_z == 1) | (i_z == 2)
    of_keys = i_z < 2
    if of_keys:
        p_x = at(p_k, i_b, i_h, s_kb, s_kh, UNIT)
        p_y = at(p_v, i_b, i_h, s_vb, s_vh, UNIT)
        s_x, s_y = s_kt, s_vt
    else:
        p_x = at(p_q, i_b, i_h, s_qb, s_qh, UNIT)
        p_y = at(p_o, i_b, i_h, s_ob, s_oh, UNIT)
        s_x, s_y = s_qt, s_ot
    if i_z % 2 == 0:
        p_g = at(p_gf, i_b, i_h, s_gfb, s_gfh, UNIT)
        s_g = s_gft
    else:
        p_g = at(p_gb, i_b, i_h, s_gbb, s_gbh, UNIT)
        s_g = s_gbt
    # AFTER, BEFORE, UP_TO, FROM: how far a token's part is from where the state leaves the chunk.
    i_table = tl.where(of_keys, i_z + AFTER, tl.where(i_z == 2, UP_TO, FROM))
    b_table = load_table(p_table + i_table * BT * BT, 0, BT)  # [BT, BT]
    p_sum += (i_z % 2 * n_sums + i_bh * NT) * K
    i_state = i_z * tl.cast(n_states, tl.int64) + i_bh * NT
    factor = tl.where(of_keys, 1.0, scale)
    b_state = tl.zeros((BK, BV), tl.float32)
    for i in range(NT - 1):
        i_t = tl.where(reverse, NT - 1 - i, i)
        b_ld, _ = load_gates(p_g, i_t, T, s_g, inv, K, BT, BK, UNIT, MODE)  # [BT, BK]
        b_total = whole_sum(b_ld, MODE)  # [BK]
        b_x = load_tile(p_x, i_t, 0, T, s_x, 0.0, K, BT, BK, UNIT).to(tl.float32)  # [BT, BK]
        b_y = load_tile(p_y, i_t, i_v, T, s_y, 0.0, V, BT, BV, UNIT)  # [BT, BV]
        if of_keys & (i_v == 0):
            store_sum(p_sum, b_total, i_t, K, BK)
        b_x = tf32_ready(b_x * factor, PAIR_MODE)
        b_state *= tl.exp2(b_total)[:, None]
        b_state = add_tokens(b_x, b_y, b_ld, b_table, b_state, MODE, PAIR_MODE, ONE_WARP)  # [BK, BV]
        if IN_OUTPUT:
            p_o_bh = at(p_o, i_b, i_h, s_ob, s_oh, UNIT)
            i_enters = tl.where(reverse, i_t - 1, i_t + 1)
            place = place_in_output(p_o_bh, p_state, i_bh, i_enters, i_z, NT, s_ot, K, V, BT, UNIT)
        else:
            place = place_of(p_state, i_state + i_t, K, V)
        store_state(place, b_state, i_v, K, V, BK, BV)
    if of_keys & (i_v == 0):  # what leaves the last chunk enters none
        i_t = tl.where(reverse, 0, NT - 1)
        b_last, _ = load_gates(p_g, i_t, T, s_g, inv, K, BT, BK, UNIT, MODE)  # [BT, BK]
        store_sum(p_sum, whole_sum(b_last, MODE), i_t, K, BK)


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
    p_state, p_sum, NS, n_states, NT,
    K: tl.constexpr, V: tl.constexpr, NC: tl.constexpr, BN: tl.constexpr, BS: tl.constexpr,
    BK: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """Turn what each segment adds to a state into the state that leaves it, in place; BK rows a program.

    States 0 and 3 run from the first segment to the last, 1 and 2 the other way; 0 and 2 with the forward
    decay. BN runs of BS segments at once: a run is summed in one thread's registers.
    """
    i_bh = tl.program_id(0).to(tl.int64)
    i_k = tl.program_id(1) * BK
    i_z = tl.program_id(2)
    reverse = (i_z == 1) | (i_z == 2)
    PAIR: tl.constexpr = 2 if V % 2 == 0 else 1
    o_n = tl.arange(0, BN)
    o_s = tl.arange(0, BS)
    o_k = tl.arange(0, BK)
    o_v = tl.arange(0, BV)
    p_state += (i_z * tl.cast(n_states, tl.int64) + i_bh * NS) * (K * V) + i_k * V
    p_sum += ((i_z % 2) * tl.num_programs(0).to(tl.int64) + i_bh) * NT * K + i_k
    o_kv = (o_k * V)[:, None] + o_v[None, :]
    m_kv = (i_k + o_k < K)[:, None] & (o_v < V)[None, :]
    b_carry = tl.zeros((BK, BV), tl.float32)
    for i in range(0, NS, BN * BS):
        o_ns = i + o_n[:, None] * BS + o_s[None, :]
        m_ns = o_ns < NS
        o_ns = tl.where(reverse, NS - 1 - o_ns, o_ns)
        o_state = o_ns[:, :, None, None].to(tl.int64) * (K * V) + o_kv[None, None, :, :]
        if BV != V or BK == 1:
            o_state = tl.max_contiguous(tl.multiple_of(o_state, (1, 1, 1, PAIR)), (1, 1, 1, PAIR))
        m_state = m_ns[:, :, None, None] & m_kv[None, None, :, :]
        b_state = tl.load(p_state + o_state, mask=m_state, other=0.0).to(tl.float32)  # [BN, BS, BK, BV]
        o_ns = o_ns[:, :, None]
        m_ns = m_ns[:, :, None] & (i_k + o_k < K)[None, None, :]
        p_sum_k = p_sum + o_k[None, None, :]
        b_decay = tl.load(p_sum_k + o_ns * (NC * K), mask=m_ns, other=0.0)  # [BN, BS, BK]
        for j in tl.static_range(1, NC):
            b_decay += tl.load(p_sum_k + (o_ns * NC + j) * K, mask=m_ns & (o_ns * NC + j < NT), other=0.0)
        b_decay = tl.broadcast_to(tl.exp2(b_decay)[:, :, :, None], (BN, BS, BK, BV))
        b_decay, b_state = tl.associative_scan((b_decay, b_state), 1, join)
        m_last = (o_s == BS - 1)[None, :, None, None]
        b_d = tl.sum(tl.where(m_last, b_decay, 0.0), 1)  # [BN, BK, BV]
        b_s = tl.sum(tl.where(m_last, b_state, 0.0), 1)  # [BN, BK, BV]
        b_d, b_s, b_part, b_before = tl.associative_scan(
            (b_d, b_s, tl.full((BN, BK, BV), 1.0, tl.float32), tl.zeros_like(b_s)), 0, join_before
        )
        b_state += b_decay * (b_part * b_carry[None, :, :] + b_before)[:, None, :, :]
        tl.store(p_state + o_state, b_state.to(p_state.dtype.element_ty), mask=m_state)
        b_carry = tl.sum(tl.where((o_n == BN - 1)[:, None, None], b_d * b_carry[None, :, :] + b_s, 0.0), 0)
