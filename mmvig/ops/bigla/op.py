"""BiGLA on GPUs: launches the kernels of kernels/ and makes them PyTorch operators.

Importing this module imports Triton. Forward: what each segment adds to the states, a scan over segments,
the output; only the output where a sequence is a single segment. Training keeps the inputs and nothing
else.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from mmvig.ops.bigla import kernels
from mmvig.ops.bigla.plan import (
    GROUP,
    MAX_SHORT_WALK,
    MAX_STATES,
    MAX_WALK,
    SCANS,
    address,
    compile_key,
    constants_of,
    plan,
    run_length,
    scan_constants,
    tables,
)
from mmvig.ops.launch import INTERPRETED, MAX_GRID, ceil_div, launch
from mmvig.ops.operator import differentiate, empty_like_each, operator

if INTERPRETED:
    SCANS = {float('inf'): {'BN': 2, 'BS': 2, 'WIDTH': 64, 'num_warps': 1, 'num_stages': 1}}


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gf: Tensor,
    gb: Tensor,
    scale: float,
    normalizer: float,
    o: Tensor,
    whole: bool = False,
) -> None:
    """Write the output for ``[B, N, H, K or V]`` inputs into ``o``, of v's shape.

    ``whole``: all images at once, whatever memory that takes.
    """
    batch, num_tokens, heads, key_dim = q.shape
    value_dim = v.shape[-1]
    if batch == 0:
        return
    p = plan(key_dim, value_dim, v.dtype)
    most = MAX_GRID
    if p['share'] > 1 / 4 and not whole:  # noqa: SIM102  what follows takes longer
        if p['share'] * (4 * q.nbytes + v.nbytes) > MAX_STATES:
            most = min(most, ceil_div(batch, 2))
    if batch > most:
        for part in zip(*(x.split(most) for x in (q, k, v, gf, gb, o)), strict=True):
            forward(*part[:5], scale, normalizer, part[5], True)
        return
    # Sequences that are walked have their states in the output's memory.
    in_output = p['in_output'] and p['output']['BT'] < num_tokens <= MAX_WALK
    name = 'walked_output' if in_output else 'output'
    chunks = 1 if in_output else p['NC']
    block_t = p[name]['BT']
    inputs, unit, strides, same = address((q, k, v, gf, gb, o), block_t)
    common = (scale / 2, 1 / normalizer)
    num_chunks = ceil_div(num_tokens, block_t)
    n_states = batch * heads * ceil_div(num_chunks, chunks)
    key = compile_key(v, gf, gb, unit, strides)
    sums = v.new_empty(2, batch * heads * num_chunks, key_dim, dtype=torch.float32)
    # Empty for a single chunk, but of the dtype that kernels are compiled for.
    alone = num_chunks == 1
    held = batch * heads if in_output else 0 if alone else 2 * n_states
    state = v.new_empty(held, key_dim, value_dim, dtype=p['state_dtype'])
    widths = key_dim, value_dim, v.dtype
    if not alone:
        make_states(
            inputs, state, sums, num_chunks, strides, common, key, widths, 'states', unit, same, chunks,
            in_output,
        )  # fmt: skip
    table = tables(v.device, block_t)[0]
    sizes = num_tokens, heads, n_states, batch * heads * num_chunks
    mild_then_strong(
        kernels.output_kernel, key, num_chunks, (heads, ceil_div(value_dim, p[name]['BV']), batch),
        (*inputs, state, sums, table, *sizes, *strides), common, widths, name,
        {'UNIT': unit, 'SAME': same, 'NC': chunks, 'ALONE': alone, 'IN_OUTPUT': in_output},
    )  # fmt: skip


def make_states(
    inputs, state, sums, num_chunks, strides, common, key, widths, name, unit, same, chunks,
    in_output=False,
) -> None:  # fmt: skip
    """Fill ``state [kinds * B * H * segments, K, V]`` with what leaves each segment, and ``sums``.

    Two kinds of states for the output, four for gradients.
    ``in_output``: as in the kernels; ``state`` is [B * H, K, V].
    """
    batch, num_tokens, heads, key_dim = inputs[0].shape
    value_dim = state.shape[-1]
    kinds = 4 if name == 'back_states' else 2
    num_segments = ceil_div(num_chunks, chunks)
    n_states = batch * heads * num_segments
    n_sums = batch * heads * num_chunks
    if chunks == 1 and num_tokens <= MAX_WALK:
        walk = 'walk' if kinds == 2 else 'short_back_walk' if num_tokens <= MAX_SHORT_WALK else 'back_walk'
        constants = constants_of(*widths, walk, UNIT=unit, SAME=same, IN_OUTPUT=in_output)
        launch(
            kernels.walk_kernel, key, (kinds, heads * ceil_div(value_dim, constants['BV']), batch),
            (*inputs, state, sums, tables(state.device, constants['BT'])[0], num_tokens, heads, n_states,
             n_sums, *strides, *common), constants,
        )  # fmt: skip
        return
    constants = constants_of(*widths, name, UNIT=unit, SAME=same, NC=chunks, BACKWARD=kinds == 4)
    blocks_v = ceil_div(value_dim, constants['BV'])
    run = run_length(widths, name, num_segments, batch * heads * blocks_v, state.device)
    launch(
        kernels.states_kernel, key, (ceil_div(num_segments, run), heads * blocks_v, batch),
        (*inputs, state, sums, tables(state.device, constants['BT'])[0], num_tokens, heads, n_states,
         n_sums, *strides, run, *common), constants,
    )  # fmt: skip
    scan = scan_constants(widths, num_segments, chunks)
    launch(
        kernels.scan_kernel, key, (batch * heads, ceil_div(key_dim, scan['BK']), kinds),
        (state, sums, num_segments, n_states, num_chunks), scan,
    )  # fmt: skip


def mild_then_strong(kernel, key, num_chunks, parts, arguments, common, widths, name, more) -> None:
    """Run ``kernel`` in the factored form, then by levels on chunks whose gates need it; all in float32.

    ``parts``: numbers of heads, blocks of V, images. ``more``: constants besides those of ``name`` in
    :func:`plan` for ``widths``.
    """
    heads, blocks_v, batch = parts
    mild = constants_of(*widths, name, STRONG=False, GROUP=1, **more)
    exact = mild['MODE'] == 'tf32x3'
    if not exact:
        run = run_length(widths, name, num_chunks, heads * blocks_v * batch, arguments[0].device)
        grid = ceil_div(num_chunks, run), heads * blocks_v, batch
        launch(kernel, key, grid, (*arguments, run, *common), mild)
    group = 1 if exact else GROUP // mild['BK']
    launch(
        kernel, key, (ceil_div(num_chunks * heads * batch, group), blocks_v, 1),
        (*arguments, group, *common),
        constants_of(*widths, f'strong_{name}', STRONG=True, GROUP=group, **more),
    )  # fmt: skip


def backward(
    do: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gf: Tensor,
    gb: Tensor,
    scale: float,
    normalizer: float,
    grads: tuple,
) -> None:
    """Write the gradients into ``grads``: dq, dk, dv, dgf, dgb, in the inputs' shapes."""
    batch, num_tokens, heads, key_dim = q.shape
    value_dim = v.shape[-1]
    if batch == 0:
        return
    if batch > MAX_GRID:
        parts = zip(*(x.split(MAX_GRID) for x in (do, q, k, v, gf, gb, *grads)), strict=True)
        for part in parts:
            backward(*part[:6], scale, normalizer, part[6:])
        return
    p = plan(key_dim, value_dim, v.dtype)
    block_t = p['gradient']['BT']
    tensors, unit, strides, same = address((q, k, v, gf, gb, do, *grads), block_t)
    (q, k, v, gf, gb, do, dq, dk, dv, dgf, dgb) = tensors
    inputs = (q, k, v, gf, gb, do)
    common = (scale / 2, 1 / normalizer)
    num_chunks = ceil_div(num_tokens, block_t)
    n_states = batch * heads * num_chunks
    key = compile_key(v, gf, gb, unit, strides)
    sums = v.new_empty(2, n_states, key_dim, dtype=torch.float32)
    state = v.new_empty(4 * n_states, key_dim, value_dim, dtype=p['state_dtype'])
    widths = key_dim, value_dim, v.dtype
    make_states(
        inputs, state, sums, num_chunks, strides[:18], common, key, widths, 'back_states', unit, same, 1
    )
    table, before, masks = tables(v.device, block_t)
    mild_then_strong(
        kernels.gradient_kernel, key, num_chunks, (heads, 1, batch),
        (*inputs, dq, dk, dv, dgf, dgb, state, sums, table, before, masks, num_tokens, heads, n_states,
         *strides),
        common, widths, 'gradient', {'UNIT': unit, 'SAME': same},
    )  # fmt: skip


class Inputs(NamedTuple):
    """What the operator takes, or the gradients of it."""

    q: Tensor  # [B, N, H, K], as k and the gates are
    k: Tensor
    v: Tensor  # [B, N, H, V]
    g_fwd: Tensor
    g_bwd: Tensor


@operator(lambda inputs, *options: inputs.v.new_empty(inputs.v.shape))
def bigla_op(inputs: Inputs, scale: float, normalizer: float) -> Tensor:
    """:func:`mmvig.ops.bigla.bigla` by Triton; arguments are validated."""
    o = inputs.v.new_empty(inputs.v.shape)
    forward(*inputs, scale, normalizer, o)
    return o


@operator(lambda do, inputs, *options: empty_like_each(*inputs))
def bigla_backward_op(do: Tensor, inputs: Inputs, scale: float, normalizer: float) -> Inputs:
    """Gradients of :func:`bigla_op`."""
    grads = empty_like_each(*inputs)
    backward(do, *inputs, scale, normalizer, grads)
    return grads


def views_of(qkv: Tensor, gates: Tensor, heads: int) -> tuple[Tensor, ...]:
    """What unpack() returns, but not for autograd: 10 us instead of 19 (CPU), and each call takes two."""
    batch, num_tokens, width = qkv.shape
    keys = gates.shape[-1] // 2
    views = []
    for x, start, channels in (
        (qkv, 0, keys), (qkv, keys, keys), (qkv, 2 * keys, width - 2 * keys),
        (gates, 0, keys), (gates, keys, keys),
    ):  # fmt: skip
        of_batch, of_token, step = x.stride()
        size = (batch, num_tokens, heads, channels // heads)
        strides = (of_batch, of_token, channels // heads * step, step)
        views.append(x.as_strided(size, strides, x.storage_offset() + start * step))
    return tuple(views)


@operator(lambda qkv, gates, *rest: qkv.new_empty(*qkv.shape[:2], qkv.shape[2] - gates.shape[2]))
def bigla_packed_op(qkv: Tensor, gates: Tensor, num_heads: int, scale: float, normalizer: float) -> Tensor:
    """:func:`mmvig.ops.bigla.bigla_packed` by Triton; arguments are validated."""
    views = views_of(qkv, gates, num_heads)
    o = qkv.new_empty(views[2].shape)
    forward(*views, scale, normalizer, o)
    return o.flatten(2)


@operator(lambda do, qkv, gates, *rest: empty_like_each(qkv, gates))
def bigla_packed_backward_op(
    do: Tensor, qkv: Tensor, gates: Tensor, num_heads: int, scale: float, normalizer: float
) -> tuple[Tensor, Tensor]:
    """Gradients of :func:`bigla_packed_op`, written side by side where a concatenation would put them."""
    grads = empty_like_each(qkv, gates)
    do = do.unflatten(-1, (num_heads, -1))
    views = views_of(qkv, gates, num_heads)
    backward(do, *views, scale, normalizer, views_of(*grads, num_heads))
    return grads


differentiate('bigla', bigla_backward_op)
differentiate('bigla_packed', bigla_packed_backward_op)
