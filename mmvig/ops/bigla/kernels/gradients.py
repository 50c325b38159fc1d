"""All gradients from the inputs, the output's gradient and the states that enter a chunk."""

import triton
import triton.language as tl

from mmvig.ops.arithmetic import sigmoid
from mmvig.ops.bigla.kernels.arithmetic import (
    LOG2E,
    cut,
    exp2_minus,
    log2_sigmoid,
    masked,
    nudged,
    product,
    rounded,
    split,
    tf32_ready,
)
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
