"""The output from a chunk's pairs and the states that enter it."""

import triton
import triton.language as tl

from mmvig.ops.bigla.kernels.arithmetic import product, shuffled, tf32_ready
from mmvig.ops.bigla.kernels.pairs import chunk_pairs, directions
from mmvig.ops.bigla.kernels.tiles import (
    AFTER,
    BALANCED,
    BEFORE,
    INTS,
    any_strong,
    at,
    chunks_of_program,
    is_strong,
    load_gates,
    load_state,
    load_sum,
    load_table,
    load_tile,
    place_in_output,
    place_of,
    sequence_of,
    store_row,
    store_tile,
    tile_sum,
    whole_sum,
)


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
