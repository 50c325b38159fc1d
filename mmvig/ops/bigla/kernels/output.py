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
    SPAN,
    any_strong,
    as_float32,
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
    b_fwd, b_bwd, i_t, i_v, p_k, p_v, p_gf, p_gb, p_table, T, s_kt, s_vt, s_gft, s_gbt, inv,
    K: tl.constexpr, V: tl.constexpr, BT: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    UNIT: tl.constexpr, MODE: tl.constexpr, NC: tl.constexpr, SHUFFLE: tl.constexpr,
):  # fmt: skip
    """The states [BK, BV] that enter chunk i_t, from those that enter its segment."""
    first = i_t // NC * NC
    last = tl.minimum(first + NC, tl.cdiv(T, BT)) - 1
    for j in range(first, i_t):
        b_fwd = state_after(
            b_fwd, j, i_v, p_k, p_v, p_gf, p_table, T, s_kt, s_vt, s_gft, inv, K, V, BT, BK, BV, UNIT, MODE,
            SHUFFLE, False,
        )  # fmt: skip
    for i in range(i_t, last):
        b_bwd = state_after(
            b_bwd, last + i_t - i, i_v, p_k, p_v, p_gb, p_table, T, s_kt, s_vt, s_gbt, inv, K, V, BT, BK,
            BV, UNIT, MODE, SHUFFLE, True,
        )  # fmt: skip
    return b_fwd, b_bwd


@triton.jit
def state_after(
    b_state, i_t, i_v, p_k, p_v, p_g, p_table, T, s_kt, s_vt, s_gt, inv,
    K: tl.constexpr, V: tl.constexpr, BT: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    UNIT: tl.constexpr, MODE: tl.constexpr, SHUFFLE: tl.constexpr, BACKWARD: tl.constexpr,
):  # fmt: skip
    """A state [BK, BV] carried over chunk i_t in one direction."""
    b_ld, _ = load_gates(p_g, i_t, T, s_gt, inv, K, BT, BK, UNIT, MODE)  # [BT, BK]
    b_k = load_tile(p_k, i_t, 0, T, s_kt, 0.0, K, BT, BK, UNIT).to(tl.float32)  # [BT, BK]
    b_v = load_tile(p_v, i_t, i_v, T, s_vt, 0.0, V, BT, BV, UNIT)  # [BT, BV]
    b_table = load_table(p_table, BEFORE if BACKWARD else AFTER, BT)  # [BT, BT]
    b_k = tf32_ready(b_k * tl.exp2(tile_sum(b_table, b_ld, MODE)), MODE)  # [BT, BK]
    if SHUFFLE:
        b_k = shuffled(b_k)
        b_ld = shuffled(b_ld)
    b_k = tl.trans(b_k)
    return product(b_k, b_v, tl.exp2(whole_sum(b_ld, MODE))[:, None] * b_state, MODE)  # [BK, BV]


@triton.jit(do_not_specialize=INTS)
def output_kernel(
    p_q, p_k, p_v, p_gf, p_gb, p_o, p_state, p_sum, p_table, T, H, n_states, n_sums,
    s_qb, s_qt, s_qh, s_kb, s_kt, s_kh, s_vb, s_vt, s_vh, s_gfb, s_gft, s_gfh, s_gbb, s_gbt, s_gbh,
    s_ob, s_ot, s_oh, CH, scale, inv,
    K: tl.constexpr, V: tl.constexpr, BT: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    UNIT: tl.constexpr, SAME: tl.constexpr, MODE: tl.constexpr, PAIR_MODE: tl.constexpr, NC: tl.constexpr,
    ALONE: tl.constexpr, IN_OUTPUT: tl.constexpr, STRONG: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """o_t = the pairs within t's chunk + q_t decayed to the chunk's ends . the two states that enter it.

    NC > 1: the states that enter the segment are carried on to the chunk. ALONE: each sequence is one
    chunk, which no state enters, and p_sum is written here. IN_OUTPUT: as in walk_kernel; what chunks with
    strong gates need is left there. STRONG: for any gates, and only chunks whose gates need it; a program
    looks through GROUP (and CH) chunks of all sequences, the grid is (groups, blocks of V).
    """
    scale, inv = as_float32(scale, inv)
    if SAME:
        s_kb, s_kt, s_kh = s_qb, s_qt, s_qh
        s_gbb, s_gbt, s_gbh = s_gfb, s_gft, s_gfh
    EXACT: tl.constexpr = MODE == 'tf32x3'
    SHUFFLE: tl.constexpr = PAIR_MODE == 'tf32' and not STRONG
    NV: tl.constexpr = (V + BV - 1) // BV
    i_v = tl.program_id(1) % NV
    NT = tl.cdiv(T, BT)
    NS = tl.cdiv(NT, NC)
    b_table = load_table(p_table, BALANCED, BT)  # [BT, BT]
    first, end = chunks_of_program(p_sum, NT, n_sums, H, CH, NV, K, BK, STRONG, EXACT, GROUP)
    for j in range(0, end - first):
        i_tg = first + j
        wanted = True
        if STRONG and not EXACT:
            wanted = any_strong(p_sum, i_tg, 1, n_sums, K, BK, 1, SPAN)
        if wanted:
            i_b, i_h, i_bh = sequence_of(i_tg, NT, H, NV, STRONG)
            i_t = i_tg - i_bh * NT
            p_q_bh = at(p_q, i_b, i_h, s_qb, s_qh, UNIT)
            p_k_bh = at(p_k, i_b, i_h, s_kb, s_kh, UNIT)
            p_v_bh = at(p_v, i_b, i_h, s_vb, s_vh, UNIT)
            p_gf_bh = at(p_gf, i_b, i_h, s_gfb, s_gfh, UNIT)
            p_gb_bh = at(p_gb, i_b, i_h, s_gbb, s_gbh, UNIT)
            p_o_bh = at(p_o, i_b, i_h, s_ob, s_oh, UNIT)
            if not ALONE:
                i_s = i_t // NC
                i_state = i_bh * NS + i_s
                left = i_s > 0
                right = i_s < NS - 1
                if IN_OUTPUT:
                    from_left = place_in_output(p_o_bh, p_state, i_bh, i_t, 0, NT, s_ot, K, V, BT, UNIT)
                    from_right = place_in_output(p_o_bh, p_state, i_bh, i_t, 1, NT, s_ot, K, V, BT, UNIT)
                else:
                    from_left = place_of(p_state, i_state - 1, K, V)
                    from_right = place_of(p_state, n_states + i_state + 1, K, V)
                b_fwd = load_state(from_left, left, i_v, K, V, BK, BV, SHUFFLE)  # [BK, BV]
                b_bwd = load_state(from_right, right, i_v, K, V, BK, BV, SHUFFLE)  # [BK, BV]
                if not STRONG:
                    b_sum_f = load_sum(p_sum, i_tg, K, BK, SHUFFLE)  # [BK]
                    b_sum_b = load_sum(p_sum, n_sums + i_tg, K, BK, SHUFFLE)  # [BK]
            b_lf, _ = load_gates(p_gf_bh, i_t, T, s_gft, inv, K, BT, BK, UNIT, MODE)  # [BT, BK]
            b_lb, _ = load_gates(p_gb_bh, i_t, T, s_gbt, inv, K, BT, BK, UNIT, MODE)  # [BT, BK]
            b_q = load_tile(p_q_bh, i_t, 0, T, s_qt, 0.0, K, BT, BK, UNIT).to(tl.float32)  # [BT, BK]
            b_k = load_tile(p_k_bh, i_t, 0, T, s_kt, 0.0, K, BT, BK, UNIT).to(tl.float32)  # [BT, BK]
            b_v = load_tile(p_v_bh, i_t, i_v, T, s_vt, 0.0, V, BT, BV, UNIT)  # [BT, BV]
            b_a, b_ab, b_qf, b_qb, b_uf, b_ub = chunk_pairs(
                b_q * scale, b_k, b_lf, b_lb, b_table, BT, MODE, PAIR_MODE, False, STRONG
            )  # the pairs [BT, BT], others [BT, BK]
            if not STRONG:
                b_a = directions(b_a, b_ab, BT, MODE)
            if ALONE and not STRONG:  # noqa: SIM102  the first is known when this is compiled
                if i_v == 0:
                    store_row(p_sum, 2 * b_uf, i_tg, BT - 1, K, BT, BK)
                    store_row(p_sum, 2 * b_ub, n_sums + i_tg, 0, K, BT, BK)
            b_o = product(tf32_ready(b_a, MODE), b_v, tl.zeros((BT, BV), tl.float32), MODE)  # [BT, BV]
            if not ALONE:
                if NC > 1:
                    b_fwd, b_bwd = states_at(
                        b_fwd, b_bwd, i_t, i_v, p_k_bh, p_v_bh, p_gf_bh, p_gb_bh, p_table, T, s_kt, s_vt,
                        s_gft, s_gbt, inv, K, V, BT, BK, BV, UNIT, MODE, NC, SHUFFLE,
                    )  # fmt: skip
                if STRONG:
                    b_fwd = tf32_ready(b_fwd, PAIR_MODE)
                    b_bwd = tf32_ready(b_bwd, PAIR_MODE)
                else:
                    b_fwd *= tf32_ready(tl.exp2(0.5 * b_sum_f), PAIR_MODE)[:, None]
                    b_bwd *= tf32_ready(tl.exp2(0.5 * b_sum_b), PAIR_MODE)[:, None]
                b_o = product(b_qf, b_fwd, b_o, PAIR_MODE)  # [BT, BV]
                b_o = product(b_qb, b_bwd, b_o, PAIR_MODE)  # [BT, BV]
            mild = True
            if IN_OUTPUT and not ALONE and not STRONG:
                mild = not is_strong(b_sum_f, b_sum_b, SPAN)
            store_tile(p_o_bh, b_o, i_t, i_v, T, s_ot, V, BT, BV, UNIT, mild)
