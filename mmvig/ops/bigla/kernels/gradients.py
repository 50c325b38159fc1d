"""All gradients from the inputs, the output's gradient and the states that enter a chunk."""

import triton
import triton.language as tl

from mmvig.ops.bigla.kernels.arithmetic import (
    cut,
    exp2_minus,
    masked,
    nudged,
    product,
    rounded,
    split,
    tf32_ready,
)
from mmvig.ops.bigla.kernels.gates import log2_gate, log_gate_slope
from mmvig.ops.bigla.kernels.pairs import (
    chunk_pairs,
    decay_to_ends,
    level_decays,
    sum_over,
)
from mmvig.ops.bigla.kernels.tiles import (
    BALANCED,
    INTS,
    LEAST,
    SPAN,
    any_strong,
    at,
    chunks_of_program,
    load_gates,
    load_half_decay,
    load_state,
    load_table,
    load_tile,
    place_of,
    running_sum,
    sequence_of,
    store_sum,
    store_tile,
    tile_sum,
)

# Binary orders by which a gate's pairs may be smaller than those that its factored form cancels.
LOST = tl.constexpr(4.0)


@triton.jit
def loses_gradients(
    p, i_t, T, s_t, inv, K: tl.constexpr, BT: tl.constexpr, BK: tl.constexpr, UNIT: tl.constexpr,
    MODE: tl.constexpr, BACKWARD: tl.constexpr,
):  # fmt: skip
    """Whether in some channel of a chunk the factored form's rounding may pass for the gates' gradients.

    A gate's gradient is its slope times the pairs over it, of which its own decay leaves little if it is
    strong; its error is its slope times 2^-17 of all pairs. Next to the gradients of mild gates that is
    nothing, but not where all other gates are open.
    """
    b_ld, b_g = load_gates(p, i_t, T, s_t, inv, K, BT, BK, UNIT, MODE)  # [BT, BK]
    t = i_t * BT + tl.arange(0, BT)[:, None]
    # The first token's gate, BACKWARD the last's, has no pairs and no error.
    b_error = tl.where(t == (T - 1 if BACKWARD else 0), 0.0, log_gate_slope(b_g))
    b_gradient = tl.max(b_error * tl.exp2(b_ld), 0)
    return tl.max((b_gradient < tl.exp2(-LOST) * tl.max(b_error, 0)).to(tl.int32)) > 0


@triton.jit
def direction_gradients(
    b_q, b_k, b_v, b_do, b_g, b_u, b_half, b_dq, b_dk, b_da, b_da_low, b_da_t, b_da_t_low,
    p_v, p_do, p_g, p_dg, p_state, p_mask, b_table, b_before, m_q, m_k,
    i_t, i_ask, there_ask, i_key, there_key, T, s_vt, s_dot, s_gt, s_dgt, inv,
    K: tl.constexpr, V: tl.constexpr, BT: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    UNIT: tl.constexpr, MODE: tl.constexpr, BACKWARD: tl.constexpr, STRONG: tl.constexpr,
    AGAIN: tl.constexpr,
):  # fmt: skip
    """Add one direction's part to dq and dk [BT, BK], and write its gate's gradient.

    da[t, s] = do_t . v_s, in two terms, da and da_low, and its transpose; STRONG: in one. v, do: their
    first BV columns. g: the gate's logits [BT, BK]. u: the log2 decays [BT, BK], STRONG: of each token,
    else from the chunk's middle. half: the decay over half the chunk, not used if STRONG. m_q, m_k: the
    pairs of each query, of each key. AGAIN: g, u and the masks are loaded or made anew.

    A pair (t, s) adds p = da[t, s] * q_t * decay * k_s to the log decay of every token between the two:
    summed up as running sums of k_s * dk_s - q_t * dq_t over the chunk's own tokens before the gate, to
    which come the pairs from outside it. Each p enters twice, from the same rounded factors, so what must
    cancel does. STRONG: nothing must, as a block's pairs are those of its halves and those between the two.
    """
    b_xq = tl.zeros((BT, BK), tl.float32)
    b_xk = tl.zeros((BT, BK), tl.float32)
    b_across = tl.zeros((BK,), tl.float32)
    for i_v in range((V + BV - 1) // BV):
        if V > BV:
            b_v = load_tile(p_v, i_t, i_v, T, s_vt, 0.0, V, BT, BV, UNIT)  # [BT, BV]
            b_do = load_tile(p_do, i_t, i_v, T, s_dot, 0.0, V, BT, BV, UNIT)  # [BT, BV]
        b_ask = load_state(place_of(p_state, i_ask, K, V), there_ask, i_v, K, V, BK, BV, False)  # [BK, BV]
        b_key = load_state(place_of(p_state, i_key, K, V), there_key, i_v, K, V, BK, BV, False)  # [BK, BV]
        b_across += tl.sum(b_ask * b_key, 1)
        b_xq = product(b_do, tl.trans(tf32_ready(b_ask, MODE)), b_xq, MODE)  # [BT, BK]
        b_xk = product(b_v, tl.trans(tf32_ready(b_key, MODE)), b_xk, MODE)  # [BT, BK]
    if STRONG:
        b_across *= tl.exp2(tl.sum(b_u, 0))
        b_to_q, b_to_k = decay_to_ends(b_u, BT, BACKWARD)
        # Either side's by itself: a gate with few or weak pairs would be lost in a difference of many.
        o_t = tl.arange(0, BT)
        t, s = o_t[:, None], o_t[None, :]
        if BACKWARD:
            b_c = sum_over(s <= t, b_q * b_to_q * b_xq) + sum_over(s > t, b_k * b_to_k * b_xk)
        else:
            b_c = sum_over(s >= t, b_q * b_to_q * b_xq) + sum_over(s < t, b_k * b_to_k * b_xk)
        b_dq += b_to_q * b_xq
        b_dk += b_to_k * b_xk
        b_zero = tl.zeros((BT, BK), tl.float32)
        z = 1
        while z < BT:
            m_first, m_same, b_e = level_decays(z, b_u, BT, BACKWARD)
            b_q_z = rounded(tl.where(m_first, b_q * b_e, 0.0), MODE)
            b_k_z = rounded(tl.where(m_first, 0.0, b_k * b_e), MODE)
            # Both [BT, BK].
            b_dq_z = tl.where(m_first, product(tl.where(m_same, b_da, 0.0), b_k_z, b_zero, MODE), 0.0)
            b_dk_z = tl.where(m_first, 0.0, product(tl.where(m_same, b_da_t, 0.0), b_q_z, b_zero, MODE))
            b_dq += b_e * b_dq_z
            b_dk += b_e * b_dk_z
            m_near = t // z == s // z
            if BACKWARD:
                b_c += sum_over(m_near & tl.where(m_first, s <= t, s > t), b_q_z * b_dq_z + b_k_z * b_dk_z)
            else:
                b_c += sum_over(m_near & tl.where(m_first, s >= t, s < t), b_q_z * b_dq_z + b_k_z * b_dk_z)
            z *= 2
    else:
        if AGAIN:
            b_ld, _ = load_gates(p_g, i_t, T, s_gt, inv, K, BT, BK, UNIT, MODE)  # [BT, BK]
            b_u = tile_sum(tl.trans(b_table) if BACKWARD else b_table, b_ld, MODE)  # [BT, BK]
            m_q = load_table(p_mask, BACKWARD, BT)  # [BT, BT]
            m_k = load_table(p_mask, not BACKWARD, BT)  # [BT, BT]
        b_eq = tl.exp2(b_u)
        b_ek = exp2_minus(b_u)
        b_q_u = cut(b_q * b_eq, MODE)
        b_k_u = cut(b_k * b_ek, MODE)
        b_across *= b_half * b_half
        b_xq *= b_half[None, :]
        b_xk *= b_half[None, :]
        b_qx = b_q_u * b_xq
        b_dq_u = product(masked(b_da_low, m_q, MODE), b_k_u, b_xq, MODE)  # [BT, BK]
        b_dq_u = product(masked(b_da, m_q, MODE), b_k_u, b_dq_u, MODE)  # [BT, BK]
        b_dk_u = product(masked(b_da_t_low, m_k, MODE), b_q_u, b_xk, MODE)  # [BT, BK]
        b_dk_u = product(masked(b_da_t, m_k, MODE), b_q_u, b_dk_u, MODE)  # [BT, BK]
        b_p = b_k_u * b_dk_u - b_q_u * b_dq_u
        b_dq += b_eq * b_dq_u
        b_dk += b_ek * b_dk_u
        b_across += tl.sum(b_qx, 0)
        b_c = running_sum(tl.trans(b_before) if BACKWARD else b_before, b_p, MODE)  # [BT, BK]
    if AGAIN:
        b_g = load_tile(p_g, i_t, 0, T, s_gt, 0.0, K, BT, BK, UNIT)  # [BT, BK]
    b_dg = (b_across[None, :] + b_c) * (log_gate_slope(b_g) * inv)
    store_tile(p_dg, b_dg, i_t, 0, T, s_dgt, K, BT, BK, UNIT)
    return b_dq, b_dk


@triton.jit(do_not_specialize=INTS)
def gradient_kernel(
    p_q, p_k, p_v, p_gf, p_gb, p_do, p_dq, p_dk, p_dv, p_dgf, p_dgb,
    p_state, p_sum, p_table, p_before, p_mask, T, H, n_states,
    s_qb, s_qt, s_qh, s_kb, s_kt, s_kh, s_vb, s_vt, s_vh, s_gfb, s_gft, s_gfh, s_gbb, s_gbt, s_gbh,
    s_dob, s_dot, s_doh, s_dqb, s_dqt, s_dqh, s_dkb, s_dkt, s_dkh, s_dvb, s_dvt, s_dvh,
    s_dgfb, s_dgft, s_dgfh, s_dgbb, s_dgbt, s_dgbh, CH, scale, inv,
    K: tl.constexpr, V: tl.constexpr, BT: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    UNIT: tl.constexpr, SAME: tl.constexpr, MODE: tl.constexpr, PAIR_MODE: tl.constexpr,
    STRONG: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """All gradients from the inputs, do and the entering states.

    STRONG: as in output_kernel; and chunks whose gates' gradients the factored form loses, of which it has
    made the sums of log2 decays strong ones.
    """
    if SAME:
        s_kb, s_kt, s_kh = s_qb, s_qt, s_qh
        s_gbb, s_gbt, s_gbh = s_gfb, s_gft, s_gfh
        s_dqb, s_dqt, s_dqh = s_qb, s_qt, s_qh
        s_dkb, s_dkt, s_dkh = s_qb, s_qt, s_qh
        s_dgfb, s_dgft, s_dgfh = s_gfb, s_gft, s_gfh
        s_dgbb, s_dgbt, s_dgbh = s_gfb, s_gft, s_gfh
    EXACT: tl.constexpr = MODE == 'tf32x3'
    SHUFFLE: tl.constexpr = PAIR_MODE == 'tf32' and not STRONG
    NT = tl.cdiv(T, BT)
    b_table = load_table(p_table, BALANCED, BT)  # [BT, BT]
    b_before = load_table(p_before, 0, BT)  # [BT, BT]
    AGAIN: tl.constexpr = BK > 16 and not STRONG  # registers are short: what can be made again is not kept
    if not AGAIN:
        m_past = load_table(p_mask, 0, BT)  # [BT, BT]
        m_future = load_table(p_mask, 1, BT)  # [BT, BT]
    first, end = chunks_of_program(p_sum, NT, n_states, H, CH, 1, K, BK, STRONG, EXACT, GROUP)
    some_strong = False
    for j in range(0, end - first):
        i_tg = first + j
        wanted = True
        if STRONG and not EXACT:
            wanted = any_strong(p_sum, i_tg, 1, n_states, K, BK, 1, SPAN)
        if wanted:
            i_b, i_h, i_bh = sequence_of(i_tg, NT, H, 1, STRONG)
            i_t = i_tg - i_bh * NT
            p_v_bh = at(p_v, i_b, i_h, s_vb, s_vh, UNIT)
            p_do_bh = at(p_do, i_b, i_h, s_dob, s_doh, UNIT)
            p_gf_bh = at(p_gf, i_b, i_h, s_gfb, s_gfh, UNIT)
            p_gb_bh = at(p_gb, i_b, i_h, s_gbb, s_gbh, UNIT)
            left, right = i_t > 0, i_t < NT - 1
            p_q_bh = at(p_q, i_b, i_h, s_qb, s_qh, UNIT)
            b_q = load_tile(p_q_bh, i_t, 0, T, s_qt, 0.0, K, BT, BK, UNIT)  # [BT, BK]
            p_k_bh = at(p_k, i_b, i_h, s_kb, s_kh, UNIT)
            b_k = load_tile(p_k_bh, i_t, 0, T, s_kt, 0.0, K, BT, BK, UNIT)  # [BT, BK]
            b_q = b_q.to(tl.float32) * scale
            b_k = b_k.to(tl.float32)

            b_half_f = load_half_decay(p_sum, i_tg, K, BK)  # [BK]
            b_half_b = load_half_decay(p_sum, n_states + i_tg, K, BK)  # [BK]
            some_strong |= tl.min(tl.minimum(b_half_f, b_half_b)) < tl.exp2(-0.5 * LOST)
            b_lf, b_gf = load_gates(p_gf_bh, i_t, T, s_gft, inv, K, BT, BK, UNIT, MODE)  # [BT, BK]
            b_lb, b_gb = load_gates(p_gb_bh, i_t, T, s_gbt, inv, K, BT, BK, UNIT, MODE)  # [BT, BK]
            b_af, b_ab, b_kf, b_kb, b_uf, b_ub = chunk_pairs(
                b_k, b_q, b_lf, b_lb, b_table, BT, MODE, PAIR_MODE, True, STRONG
            )  # the pairs [BT, BT], others [BT, BK]
            b_af = tf32_ready(b_af, MODE)
            if AGAIN:
                m_past = load_table(p_mask, 0, BT)  # [BT, BT]
                m_future = load_table(p_mask, 1, BT)  # [BT, BT]
            if not STRONG:
                b_af = masked(b_af, m_future, MODE)
                b_ab = masked(tf32_ready(b_ab, MODE), m_past, MODE)
            b_da = tl.zeros((BT, BT), tl.float32)
            b_da_t = tl.zeros((BT, BT), tl.float32)
            for i_v in range((V + BV - 1) // BV):
                b_v = load_tile(p_v_bh, i_t, i_v, T, s_vt, 0.0, V, BT, BV, UNIT)  # [BT, BV]
                b_do = load_tile(p_do_bh, i_t, i_v, T, s_dot, 0.0, V, BT, BV, UNIT)  # [BT, BV]
                b_da = product(b_do, tl.trans(b_v), b_da, MODE)  # [BT, BT]
                if not AGAIN:
                    b_da_t = product(b_v, tl.trans(b_do), b_da_t, MODE)  # [BT, BT]
                from_right = place_of(p_state, n_states * 2 + i_tg + 1, K, V)
                from_left = place_of(p_state, n_states * 3 + i_tg - 1, K, V)
                b_fwd = load_state(from_right, right, i_v, K, V, BK, BV, SHUFFLE)  # [BK, BV]
                b_bwd = load_state(from_left, left, i_v, K, V, BK, BV, SHUFFLE)  # [BK, BV]
                if STRONG:
                    b_fwd = tf32_ready(b_fwd, PAIR_MODE)
                    b_bwd = tf32_ready(b_bwd, PAIR_MODE)
                else:
                    b_over_f = load_half_decay(p_sum, i_tg, K, BK, SHUFFLE)  # [BK]
                    b_over_b = load_half_decay(p_sum, n_states + i_tg, K, BK, SHUFFLE)  # [BK]
                    b_fwd *= tf32_ready(b_over_f, PAIR_MODE)[:, None]
                    b_bwd *= tf32_ready(b_over_b, PAIR_MODE)[:, None]
                b_dv = product(b_af, b_do, tl.zeros((BT, BV), tl.float32), MODE)  # [BT, BV]
                if not STRONG:
                    b_dv = product(b_ab, b_do, b_dv, MODE)  # [BT, BV]
                b_dv = product(b_kf, b_fwd, b_dv, PAIR_MODE)  # [BT, BV]
                b_dv = product(b_kb, b_bwd, b_dv, PAIR_MODE)  # [BT, BV]
                p_dv_bh = at(p_dv, i_b, i_h, s_dvb, s_dvh, UNIT)
                store_tile(p_dv_bh, b_dv, i_t, i_v, T, s_dvt, V, BT, BV, UNIT)

            # Loaded again, as products want them in another order of shared memory than those above.
            b_v = load_tile(p_v_bh, i_t, 0, T, s_vt, 0.0, V, BT, BV, UNIT)  # [BT, BV]
            b_do = load_tile(p_do_bh, i_t, 0, T, s_dot, 0.0, V, BT, BV, UNIT)  # [BT, BV]
            if STRONG:
                # A token's own pair counts in both directions, and no gate has a part in it.
                o_t = tl.arange(0, BT)
                b_twice = 2 * tl.sum(tl.where(o_t[:, None] == o_t[None, :], b_da, 0.0), 1)[:, None]
                b_dq = b_twice * b_k
                b_dk = b_twice * b_q
                b_da, b_da_low = tf32_ready(b_da, MODE), b_da  # the last is not used
                b_da_t, b_da_t_low = tf32_ready(b_da_t, MODE), b_da_t
            else:
                b_dq = tl.zeros((BT, BK), tl.float32)
                b_dk = tl.zeros((BT, BK), tl.float32)
                b_da, b_da_low = split(b_da, MODE)
                if AGAIN:
                    b_da_t, b_da_t_low = tl.trans(b_da), tl.trans(b_da_low)
                else:
                    b_da_t, b_da_t_low = split(b_da_t, MODE)
                b_q = nudged(b_q, MODE)
                b_k = nudged(b_k, MODE)
            p_dgf_bh = at(p_dgf, i_b, i_h, s_dgfb, s_dgfh, UNIT)
            b_dq, b_dk = direction_gradients(
                b_q, b_k, b_v, b_do, b_gf, b_uf, b_half_f, b_dq, b_dk, b_da, b_da_low, b_da_t, b_da_t_low,
                p_v_bh, p_do_bh, p_gf_bh, p_dgf_bh, p_state, p_mask, b_table, b_before, m_past, m_future,
                i_t, i_tg - 1, left, n_states * 2 + i_tg + 1, right, T, s_vt, s_dot, s_gft, s_dgft, inv,
                K, V, BT, BK, BV, UNIT, MODE, False, STRONG, AGAIN,
            )  # fmt: skip
            p_dgb_bh = at(p_dgb, i_b, i_h, s_dgbb, s_dgbh, UNIT)
            b_dq, b_dk = direction_gradients(
                b_q, b_k, b_v, b_do, b_gb, b_ub, b_half_b, b_dq, b_dk, b_da, b_da_low, b_da_t, b_da_t_low,
                p_v_bh, p_do_bh, p_gb_bh, p_dgb_bh, p_state, p_mask, b_table, b_before, m_future, m_past,
                i_t, n_states + i_tg + 1, right, n_states * 3 + i_tg - 1, left, T, s_vt, s_dot, s_gbt,
                s_dgbt, inv, K, V, BT, BK, BV, UNIT, MODE, True, STRONG, AGAIN,
            )  # fmt: skip
            p_dq_bh = at(p_dq, i_b, i_h, s_dqb, s_dqh, UNIT)
            p_dk_bh = at(p_dk, i_b, i_h, s_dkb, s_dkh, UNIT)
            store_tile(p_dq_bh, b_dq * scale, i_t, 0, T, s_dqt, K, BT, BK, UNIT)
            store_tile(p_dk_bh, b_dk, i_t, 0, T, s_dkt, K, BT, BK, UNIT)
    if not STRONG:  # noqa: SIM102  the first is known when this is compiled
        if some_strong:
            i_b, i_h, i_bh = sequence_of(first, NT, H, 1, STRONG)
            p_gf_bh = at(p_gf, i_b, i_h, s_gfb, s_gfh, UNIT)
            p_gb_bh = at(p_gb, i_b, i_h, s_gbb, s_gbh, UNIT)
            # Many mild gates lose nothing: one look at the least of all chunks is cheaper than one at each.
            b_least = tl.full((BT, BK), float('inf'), tl.float32)
            for i_tg in range(first, end):
                i_t = i_tg - i_bh * NT
                b_g = load_tile(p_gf_bh, i_t, 0, T, s_gft, float('inf'), K, BT, BK, UNIT)  # [BT, BK]
                b_least = tl.minimum(b_least, b_g)
                b_g = load_tile(p_gb_bh, i_t, 0, T, s_gbt, float('inf'), K, BT, BK, UNIT)  # [BT, BK]
                b_least = tl.minimum(b_least, b_g)
            if tl.min(log2_gate(b_least, MODE) * inv) < -LOST:
                for i_tg in range(first, end):
                    if any_strong(p_sum, i_tg, 1, n_states, K, BK, 1, LOST):
                        i_t = i_tg - i_bh * NT
                        lost = loses_gradients(p_gf_bh, i_t, T, s_gft, inv, K, BT, BK, UNIT, MODE, False)
                        lost |= loses_gradients(p_gb_bh, i_t, T, s_gbt, inv, K, BT, BK, UNIT, MODE, True)
                        if lost:
                            tl.debug_barrier()  # all threads have read the sum
                            store_sum(p_sum, tl.full((BK,), LEAST, tl.float32), i_tg, K, BK)
