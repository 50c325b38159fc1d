"""Gated linear attention in one direction: what BiGLA's merged kernels are measured against.

Built as the merged kernels are, from the same pieces and with the same block sizes, warps, stages and
precisions; mmvig/ops/bigla/README.md derives them. Only the factored form for mild gates: a chunk whose
decays sum up to more than SPAN binary orders (kernels/tiles.py) in some channel may overflow, and nothing
looks for such chunks. In bf16 and fp16 alone, as the merged operator takes another form in float32.
"""

import functools
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from mmvig.ops.bigla import kernels
from mmvig.ops.bigla.kernels.arithmetic import exp2_minus, nudged, product, shuffled, split, tf32_ready
from mmvig.ops.bigla.kernels.gradients import direction_gradients
from mmvig.ops.bigla.kernels.output import state_after
from mmvig.ops.bigla.kernels.pairs import pairs
from mmvig.ops.bigla.kernels.states import add_tokens
from mmvig.ops.bigla.kernels.tiles import (
    AFTER,
    BALANCED,
    UP_TO,
    load_gates,
    load_half_decay,
    load_state,
    load_table,
    load_tile,
    place_of,
    store_state,
    store_sum,
    store_tile,
    tile_sum,
    whole_sum,
)
from mmvig.ops.bigla.kernels.tiles import INTS as SHARED_INTS
from mmvig.ops.bigla.plan import (
    address,
    batched,
    compile_key,
    fill_waves,
    plan,
    run_length,
    scan_constants,
    tables,
)
from mmvig.ops.launch import Constants, ceil_div, launch, multiprocessors
from mmvig.ops.operator import empty_like_each

NORMALIZER = 16.0
INTS = [*SHARED_INTS, *(f's_{x}{axis}' for x in ('g', 'dg') for axis in 'bth')]


@triton.jit(do_not_specialize=INTS)
def states_kernel(
    p_q, p_k, p_v, p_g, p_o, p_state, p_sum, p_table, T, H, n_states,
    s_qb, s_qt, s_qh, s_kb, s_kt, s_kh, s_vb, s_vt, s_vh, s_gb, s_gt, s_gh, s_ob, s_ot, s_oh, CH, scale,
    inv,
    K: tl.constexpr, V: tl.constexpr, BT: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    UNIT: tl.constexpr, SAME: tl.constexpr, MODE: tl.constexpr, PAIR_MODE: tl.constexpr, NC: tl.constexpr,
    BACKWARD: tl.constexpr, ONE_WARP: tl.constexpr,
):  # fmt: skip
    """What each segment alone adds to the states that leave it; each chunk's sums of log2 decays.

    state 0 = sum_s (decay from s to the segment's end * k_s) v_s^T
    state 1 = sum_t (decay from the start to t * q_t) do_t^T, BACKWARD, where a segment is a chunk (NC = 1)
    """
    if SAME:
        s_kb, s_kt, s_kh = s_qb, s_qt, s_qh
    NV: tl.constexpr = (V + BV - 1) // BV
    i_v = tl.program_id(1) % NV
    i_h = (tl.program_id(1) // NV).to(tl.int64)
    i_b = tl.program_id(2).to(tl.int64)
    i_bh = i_b * H + i_h
    n_chunks = tl.cdiv(T, BT)
    n_segments = tl.cdiv(n_chunks, NC)
    every = tl.num_programs(2).to(tl.int64) * H * n_chunks
    p_q += (i_b * s_qb + i_h * s_qh) * UNIT
    p_k += (i_b * s_kb + i_h * s_kh) * UNIT
    p_v += (i_b * s_vb + i_h * s_vh) * UNIT
    p_g += (i_b * s_gb + i_h * s_gh) * UNIT
    p_o += (i_b * s_ob + i_h * s_oh) * UNIT
    p_sum += i_bh * n_chunks * K
    nothing = tl.zeros((BK, BV), tl.float32)
    after = load_table(p_table, AFTER, BT)
    if BACKWARD:
        up_to = load_table(p_table, UP_TO, BT)
    s0 = nothing
    s1 = nothing
    first = tl.program_id(0) * CH
    for i_c in range(first * NC, tl.minimum(first + CH, n_segments) * NC):
        ld, _ = load_gates(p_g, i_c, T, s_gt, inv, K, BT, BK, UNIT, MODE)
        k = load_tile(p_k, i_c, 0, T, s_kt, 0.0, K, BT, BK, UNIT).to(tl.float32)
        v = load_tile(p_v, i_c, i_v, T, s_vt, 0.0, V, BT, BV, UNIT)
        k = tf32_ready(k, PAIR_MODE)
        total = whole_sum(ld, MODE)
        if i_v == 0:  # noqa: SIM102  the two do not combine: Triton has no lazy `and`
            if i_c < n_chunks:
                store_sum(p_sum, total, i_c, K, BK)
                if BACKWARD:  # scan_kernel reads the sums of its second state there
                    store_sum(p_sum, total, every + i_c, K, BK)
        s0 = tl.where(i_c % NC == 0, 0.0, s0)  # a segment
        if NC > 1:
            s0 *= tl.exp2(total)[:, None]
        s0 = add_tokens(k, v, ld, after, s0, MODE, PAIR_MODE, ONE_WARP)
        if BACKWARD:
            q = load_tile(p_q, i_c, 0, T, s_qt, 0.0, K, BT, BK, UNIT).to(tl.float32)
            q = tf32_ready(q * scale, PAIR_MODE)
            do = load_tile(p_o, i_c, i_v, T, s_ot, 0.0, V, BT, BV, UNIT)
            s1 = add_tokens(q, do, ld, up_to, nothing, MODE, PAIR_MODE, ONE_WARP)
        if i_c % NC == NC - 1:
            i_state = i_bh * n_segments + i_c // NC
            store_state(place_of(p_state, i_state, K, V), s0, i_v, K, V, BK, BV)
            if BACKWARD:
                store_state(place_of(p_state, n_states + i_state, K, V), s1, i_v, K, V, BK, BV)


@triton.jit(do_not_specialize=INTS)
def output_kernel(
    p_q, p_k, p_v, p_g, p_o, p_state, p_sum, p_table, T, H, n_states,
    s_qb, s_qt, s_qh, s_kb, s_kt, s_kh, s_vb, s_vt, s_vh, s_gb, s_gt, s_gh, s_ob, s_ot, s_oh, CH, scale,
    inv,
    K: tl.constexpr, V: tl.constexpr, BT: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    UNIT: tl.constexpr, SAME: tl.constexpr, MODE: tl.constexpr, PAIR_MODE: tl.constexpr, NC: tl.constexpr,
    ALONE: tl.constexpr, SWAP: tl.constexpr,
):  # fmt: skip
    """o_t = the pairs within t's chunk + q_t decayed to the chunk's start . the state that enters it.

    SWAP: queries and keys change places, v is do and o is dv. NC > 1: the state that enters the segment is
    carried on to the chunk. ALONE: each sequence is one chunk, which no state enters.
    """
    if SAME:
        s_kb, s_kt, s_kh = s_qb, s_qt, s_qh
    SHUFFLE: tl.constexpr = PAIR_MODE == 'tf32'
    SPLIT: tl.constexpr = MODE == 'tf32'  # float16 has as many digits as tf32
    NV: tl.constexpr = (V + BV - 1) // BV
    i_v = tl.program_id(1) % NV
    i_h = (tl.program_id(1) // NV).to(tl.int64)
    i_b = tl.program_id(2).to(tl.int64)
    i_bh = i_b * H + i_h
    n_chunks = tl.cdiv(T, BT)
    n_segments = tl.cdiv(n_chunks, NC)
    p_q += (i_b * s_qb + i_h * s_qh) * UNIT
    p_k += (i_b * s_kb + i_h * s_kh) * UNIT
    p_v += (i_b * s_vb + i_h * s_vh) * UNIT
    p_g += (i_b * s_gb + i_h * s_gh) * UNIT
    p_o += (i_b * s_ob + i_h * s_oh) * UNIT
    p_sum += i_bh * n_chunks * K
    table = load_table(p_table, BALANCED, BT)
    rows, columns = tl.arange(0, BT)[:, None], tl.arange(0, BT)[None, :]
    first = tl.program_id(0) * CH
    for i_c in range(first, tl.minimum(first + CH, n_chunks)):
        if not ALONE:
            # What enters: 0 from the left; SWAP: 1 from the right.
            i_s = i_c // NC
            i_state = i_bh * n_segments + i_s
            if SWAP:
                there = i_s < n_segments - 1
                place = place_of(p_state, n_states + i_state + 1, K, V)
            else:
                there = i_s > 0
                place = place_of(p_state, i_state - 1, K, V)
            state = load_state(place, there, i_v, K, V, BK, BV, SHUFFLE)
            half = load_half_decay(p_sum, i_c, K, BK, SHUFFLE)
        ld, _ = load_gates(p_g, i_c, T, s_gt, inv, K, BT, BK, UNIT, MODE)
        q = load_tile(p_q, i_c, 0, T, s_qt, 0.0, K, BT, BK, UNIT).to(tl.float32)
        k = load_tile(p_k, i_c, 0, T, s_kt, 0.0, K, BT, BK, UNIT).to(tl.float32)
        v = load_tile(p_v, i_c, i_v, T, s_vt, 0.0, V, BT, BV, UNIT)
        q *= scale
        u = tile_sum(table, ld, MODE)  # decays from the chunk's middle to the token
        if SWAP:
            x, y = k, q
        else:
            x, y = q, k
        y = tf32_ready(y, PAIR_MODE)
        if not SPLIT:
            x = tf32_ready(x, PAIR_MODE)
        if SWAP:
            x, y = x * exp2_minus(u), y * tl.exp2(u)
            causal = rows <= columns
        else:
            x, y = x * tl.exp2(u), y * exp2_minus(u)
            causal = rows >= columns
        if SHUFFLE:
            x, y = shuffled(x), shuffled(y)
        a = tl.where(causal, pairs(x, y, PAIR_MODE, SPLIT), 0.0)
        if SPLIT:
            x = tf32_ready(x, PAIR_MODE)
        o = product(tf32_ready(a, MODE), v, tl.zeros((BT, BV), tl.float32), MODE)
        if not ALONE:
            if NC > 1:
                for j in range(i_c // NC * NC, i_c):
                    state = state_after(
                        state, j, i_v, p_k, p_v, p_g, p_table, T, s_kt, s_vt, s_gt, inv, K, V, BT, BK, BV,
                        UNIT, MODE, SHUFFLE, False,
                    )  # fmt: skip
            o = product(x, state * tf32_ready(half, PAIR_MODE)[:, None], o, PAIR_MODE)
        store_tile(p_o, o, i_c, i_v, T, s_ot, V, BT, BV, UNIT)


@triton.jit(do_not_specialize=INTS)
def gradient_kernel(
    p_q, p_k, p_v, p_g, p_o, p_dq, p_dk, p_dg, p_state, p_sum, p_table, p_up_to, p_mask, T, H, n_states,
    s_qb, s_qt, s_qh, s_kb, s_kt, s_kh, s_vb, s_vt, s_vh, s_gb, s_gt, s_gh, s_ob, s_ot, s_oh, s_dqb, s_dqt,
    s_dqh, s_dkb, s_dkt, s_dkh, s_dgb, s_dgt, s_dgh, CH, scale, inv,
    K: tl.constexpr, V: tl.constexpr, BT: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    UNIT: tl.constexpr, SAME: tl.constexpr, MODE: tl.constexpr,
):  # fmt: skip
    """dq, dk and the gate's gradient from the inputs, do and the entering states."""
    if SAME:
        s_kb, s_kt, s_kh = s_qb, s_qt, s_qh
        s_dqb, s_dqt, s_dqh = s_qb, s_qt, s_qh
        s_dkb, s_dkt, s_dkh = s_qb, s_qt, s_qh
        s_dgb, s_dgt, s_dgh = s_gb, s_gt, s_gh
    i_h = tl.program_id(1).to(tl.int64)
    i_b = tl.program_id(2).to(tl.int64)
    i_bh = i_b * H + i_h
    n_chunks = tl.cdiv(T, BT)
    p_q += (i_b * s_qb + i_h * s_qh) * UNIT
    p_k += (i_b * s_kb + i_h * s_kh) * UNIT
    p_v += (i_b * s_vb + i_h * s_vh) * UNIT
    p_g += (i_b * s_gb + i_h * s_gh) * UNIT
    p_o += (i_b * s_ob + i_h * s_oh) * UNIT
    p_dq += (i_b * s_dqb + i_h * s_dqh) * UNIT
    p_dk += (i_b * s_dkb + i_h * s_dkh) * UNIT
    p_dg += (i_b * s_dgb + i_h * s_dgh) * UNIT
    p_sum += i_bh * n_chunks * K
    AGAIN: tl.constexpr = BK > 16  # registers are short: what can be made again is not kept
    table = load_table(p_table, BALANCED, BT)
    up_to = load_table(p_up_to, 0, BT)
    past = load_table(p_mask, 0, BT)
    future = load_table(p_mask, 1, BT)
    nothing = tl.zeros((BT, BK), tl.float32)
    first = tl.program_id(0) * CH
    for i_c in range(first, tl.minimum(first + CH, n_chunks)):
        ld, g = load_gates(p_g, i_c, T, s_gt, inv, K, BT, BK, UNIT, MODE)
        half = load_half_decay(p_sum, i_c, K, BK)
        v = load_tile(p_v, i_c, 0, T, s_vt, 0.0, V, BT, BV, UNIT)
        do = load_tile(p_o, i_c, 0, T, s_ot, 0.0, V, BT, BV, UNIT)
        u = tile_sum(table, ld, MODE)
        da = tl.zeros((BT, BT), tl.float32)
        da_t = tl.zeros((BT, BT), tl.float32)
        for i_v in range((V + BV - 1) // BV):
            if V > BV:
                v = load_tile(p_v, i_c, i_v, T, s_vt, 0.0, V, BT, BV, UNIT)
                do = load_tile(p_o, i_c, i_v, T, s_ot, 0.0, V, BT, BV, UNIT)
            da = product(do, tl.trans(v), da, MODE)
            if not AGAIN:
                da_t = product(v, tl.trans(do), da_t, MODE)
        da, da_low = split(da, MODE)
        if AGAIN:
            da_t, da_t_low = tl.trans(da), tl.trans(da_low)
        else:
            da_t, da_t_low = split(da_t, MODE)
        q = load_tile(p_q, i_c, 0, T, s_qt, 0.0, K, BT, BK, UNIT).to(tl.float32)
        k = load_tile(p_k, i_c, 0, T, s_kt, 0.0, K, BT, BK, UNIT).to(tl.float32)
        q *= scale
        i_state = i_bh * n_chunks + i_c
        dq, dk = direction_gradients(
            nudged(q, MODE), nudged(k, MODE), v, do, g, u, half, nothing, nothing, da, da_low, da_t,
            da_t_low, p_v, p_o, p_g, p_dg, p_state, p_mask, table, up_to, past, future, i_c, i_state - 1,
            i_c > 0, n_states + i_state + 1, i_c < n_chunks - 1, T, s_vt, s_ot, s_gt, s_dgt, inv, K, V, BT,
            BK, BV, UNIT, MODE, False, False, AGAIN,
        )  # fmt: skip
        store_tile(p_dq, dq * scale, i_c, 0, T, s_dqt, K, BT, BK, UNIT)
        store_tile(p_dk, dk, i_c, 0, T, s_dkt, K, BT, BK, UNIT)


@functools.lru_cache(maxsize=64)
def constants_of(widths: tuple[int, int, torch.dtype], name: str, **more) -> Constants:
    """Constants of a kernel as the merged operator has them; dv, part of its gradients, is one here."""
    p = plan(*widths)
    constants = {**p['gradient' if name == 'dv' else name], **more}
    constants.pop('PARTS', None)
    if name == 'states':  # one direction has registers for whole chunks
        constants |= {'BT': p['output']['BT'], 'maxnreg': None}
    if name == 'gradient':
        del constants['PAIR_MODE']
    elif name == 'dv' and constants['BK'] == 16:
        constants['num_warps'] = 1
    return Constants(constants)


class Pass:
    """A forward or backward pass: what its launches share.

    Args:
        tensors: q, k, v, g, o or do, and the gradients of the first four if there are any.
        scale: factor on the queries.
        name: the kernel, in plan(), whose chunks the pass has.
    """

    def __init__(self, tensors: tuple, scale: float, name: str):
        q, _, v, g, _, *grads = tensors
        self.widths = q.shape[-1], v.shape[-1], v.dtype
        block_t = plan(*self.widths)[name]['BT']
        # address() takes two gates and the gradients of both.
        tensors, unit, strides, same = address((*tensors[:4], g, *tensors[4:], *grads[3:]), block_t)
        self.tensors, self.strides = ((*x[:4], *x[5:10]) for x in (tensors, batched(strides, 3)))
        self.key = compile_key(v, g, g, unit, strides)
        self.more = {'UNIT': unit, 'SAME': same}
        self.scale = scale
        self.num_chunks = ceil_div(q.shape[1], block_t)
        self.tables = tables(v.device, block_t)

    def make_states(self, name: str, chunks: int, kinds: int) -> None:
        """The ``kinds`` (1 or 2) of states that leave each segment of ``chunks`` chunks, and decays."""
        batch, _, heads, key_dim = self.tensors[0].shape
        num_segments = ceil_div(self.num_chunks, chunks)
        n_states = batch * heads * num_segments
        new = self.tensors[0].new_empty
        state_dtype = plan(*self.widths)['state_dtype']
        self.state = new(kinds, n_states, *self.widths[:2], dtype=state_dtype)
        self.sums = new(kinds, batch * heads * self.num_chunks, key_dim, dtype=torch.float32)
        self.run(states_kernel, name, range(5), num_segments, NC=chunks, BACKWARD=kinds == 2)
        scan = scan_constants(self.widths, num_segments, chunks)
        launch(
            kernels.scan_kernel, self.key, (batch * heads, ceil_div(key_dim, scan['BK']), kinds),
            (self.state, self.sums, num_segments, n_states, self.num_chunks), scan,
        )  # fmt: skip

    def run(self, kernel, name: str, which: Sequence[int], n: int, **more) -> None:
        """Launch a kernel on some of the tensors, over a sequence's ``n`` chunks or segments."""
        batch, num_tokens, heads, _ = self.tensors[0].shape
        constants = constants_of(self.widths, name, **self.more, **more)
        last = kernel is gradient_kernel
        blocks = 1 if last else ceil_div(constants['V'], constants['BV'])
        sequences, device = batch * heads * blocks, self.tensors[0].device
        if name == 'dv':  # not a kernel of the merged operator: 8 programs a multiprocessor
            length = fill_waves(n, sequences, 8 * multiprocessors(device))
        else:
            length = run_length(self.widths, name, n, sequences, device)
        launch(
            kernel, self.key, (ceil_div(n, length), heads * blocks, batch),
            (*(self.tensors[i] for i in which), self.state, self.sums, *self.tables[: 3 if last else 1],
             num_tokens, heads, self.state.shape[1], *(s for i in which for s in self.strides[i]), length,
             self.scale, 1 / NORMALIZER),
            constants,
        )  # fmt: skip


def forward(q: Tensor, k: Tensor, v: Tensor, g: Tensor, scale: float) -> Tensor:
    """The output for ``[B, N, H, K or V]`` inputs."""
    o = v.new_empty(v.shape)
    this = Pass((q, k, v, g, o), scale, 'output')
    p = plan(*this.widths)
    alone = this.num_chunks == 1
    if alone:  # nothing is read, but kernels are compiled for the dtypes
        this.state = v.new_empty(1, 0, dtype=p['state_dtype'])
        this.sums = v.new_empty(0, dtype=torch.float32)
    else:
        this.make_states('states', p['NC'], 1)
    this.run(output_kernel, 'output', range(5), this.num_chunks, NC=p['NC'], ALONE=alone, SWAP=False)
    return o


def backward(do: Tensor, q: Tensor, k: Tensor, v: Tensor, g: Tensor, scale: float) -> tuple[Tensor, ...]:
    """The gradients of :func:`forward`: dq, dk, dv, dg."""
    grads = empty_like_each(q, k, v, g)
    this = Pass((q, k, v, g, do, *grads), scale, 'gradient')
    this.make_states('back_states', 1, 2)
    n = this.num_chunks
    # do in place of v, dv in place of o.
    this.run(output_kernel, 'dv', (0, 1, 4, 3, 7), n, NC=1, ALONE=False, SWAP=True)
    this.run(gradient_kernel, 'gradient', (0, 1, 2, 3, 4, 5, 6, 8), n)
    return grads


class _OneDirection(torch.autograd.Function):
    """Keeps the inputs and nothing else, as the merged operator does."""

    @staticmethod
    def forward(ctx, q, k, v, g, scale):
        ctx.save_for_backward(q, k, v, g)
        ctx.scale = scale
        return forward(q, k, v, g, scale)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, do):
        return *backward(do, *ctx.saved_tensors, ctx.scale), None


def one_direction(q: Tensor, k: Tensor, v: Tensor, g: Tensor, scale: float | None = None) -> Tensor:
    """Gated linear attention from the first token to the last, for mild gates (see the top of this file).

    With a_t = exp(logsigmoid(g_t) / 16)::

        S_t = diag(a_t) S_(t-1) + k_t v_t^T        o_t = scale * q_t^T S_t

    Args:
        q: queries ``[B, N, H, K]`` in bf16 or fp16, any strides, N >= 1.
        k: keys ``[B, N, H, K]``.
        v: values ``[B, N, H, V]``.
        g: gate, raw logits ``[B, N, H, K]``.
        scale: factor on the queries. None: K ** -0.5.

    Returns:
        ``[B, N, H, V]`` in v's dtype.

    Raises:
        ValueError: inputs are neither in bf16 nor in fp16.
    """
    if any(x.dtype not in (torch.bfloat16, torch.float16) for x in (q, k, v)):
        raise ValueError(
            f'one direction is in bf16 and fp16 alone, got q, k, v in {q.dtype, k.dtype, v.dtype}'
        )
    return _OneDirection.apply(q, k, v, g, q.shape[-1] ** -0.5 if scale is None else scale)


def twice(q: Tensor, k: Tensor, v: Tensor, g_fwd: Tensor, g_bwd: Tensor) -> Tensor:
    """The same as :func:`mmvig.ops.bigla.bigla` by one direction, twice: the second on flipped copies.

    Spends as little around the kernels as it can: the halves of the mean are in the scale, the sum is in
    place, and the flipped copies are gone before the other direction begins, where no gradient keeps them.
    """
    scale = q.shape[-1] ** -0.5 / 2
    o = one_direction(*(x.flip(1) for x in (q, k, v, g_bwd)), scale).flip(1)
    return o.add_(one_direction(q, k, v, g_fwd, scale))
