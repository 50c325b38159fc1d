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
