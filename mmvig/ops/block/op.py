"""A whole block of ViG as one operator, on Triton's kernels and PyTorch's products.

    s = x + scale * branch                 u = DWConv3x3(norm1(s))             (or silu of it)
    q, k, v, r, d = split([W_qkv; W_r; W_g1] u)                                one product
    o = BiGLA(q, k, v, W_g2 d + b)         m = mix(o, r + b_r, u)              (ops/gated_mix)
    s' = s + branch_scale * W_o m          a, b = split(W_1 norm2(s'))
    result: s', W_2 (silu(a) * b)

The definition is :class:`mmvig.backbones.block.Block` in plain PyTorch. What one operator gains, besides
the operators of the parts: the three projections of u are one product, forward and backward, so that u is
read and its gradient written once; weights get to half precision in one launch, and their gradients come
from the products in float32; and the host, for which a GPU waits otherwise, has less to do.
ViG-H-T at 224 x 224, batch 128, on an H200: 8.7 instead of 16.4 ms, a training step 40.4 instead of 66.7.

Importing this module imports Triton.
"""

import functools
import math
from collections import defaultdict
from typing import NamedTuple

import torch
from torch import Tensor

from mmvig.ops.bigla import GATE_NORMALIZER
from mmvig.ops.bigla import op as bigla
from mmvig.ops.block import low_rank
from mmvig.ops.block.half_weights import cast
from mmvig.ops.block.operands import (
    Activations,
    BlockGradients,
    BlockWeights,
    HalfWeights,
    Options,
    SmallGradients,
    take,
)
from mmvig.ops.block.partial_sums import sum_partials
from mmvig.ops.dwconv import op as dwconv
from mmvig.ops.gated_mix import op as gated_mix
from mmvig.ops.norm import op as norm
from mmvig.ops.operator import differentiate, operator
from mmvig.ops.persistent import is_capturing, persistent
from mmvig.ops.swiglu import op as swiglu
from mmvig.ops.torch_private import current_stream, strided_view

# Whether PyTorch's products of half inputs can return float32.
HAS_OUT_DTYPE = tuple(map(int, torch.__version__.split('.')[:2])) >= (2, 8)


class Low(NamedTuple):
    """Memory for a block's weights in half precision, used on one stream."""

    key: tuple | None  # dtype, device, stream and widths; None if it is a graph's own
    memory: Tensor  # all weights side by side
    views: HalfWeights
    transposed: HalfWeights


# What no block is using, by key: as many as threads have used at once. Of a stream each, rather than made
# anew where streams take turns: to make it, the host waits for the default stream.
_unused: defaultdict[tuple, list[Low]] = defaultdict(list)


def borrow(dtype: torch.dtype, weights: BlockWeights) -> Low:
    """Copies of the weights in ``dtype``, the caller's until :func:`give_back`, then the next block's.

    They are copied anew each time, since nothing tells of a change by ``weight.data``.
    """
    device, widths = weights.qkv.device, (weights.qkv.shape[1], weights.down.shape[0], weights.fc2.shape[1])
    make = functools.partial(_make, device, dtype, *widths)
    if is_capturing(device):
        low = Low(None, *make())
    else:
        key = dtype, device, current_stream(device), widths
        try:
            low = _unused[key].pop()  # one step, for threads that share a stream
        except IndexError:
            low = Low(key, *persistent(make, device))
            if device.type == 'cuda':  # it is freed if an error comes before give_back()
                low.memory.record_stream(torch.cuda.current_stream(device))
    cast(weights.products(), low.memory)
    return low


def give_back(low: Low) -> None:
    """Let others have the memory that :func:`borrow` has lent; that of a graph stays its own."""
    if low.key:
        _unused[low.key].append(low)


def _make(
    device: torch.device, dtype: torch.dtype, *widths: int
) -> tuple[Tensor, HalfWeights, HalfWeights]:
    """New memory and its views."""
    places, size = _places(*widths)
    memory = torch.empty(size, dtype=dtype, device=device)
    views = [memory.as_strided(*place) for place in places]
    return memory, HalfWeights(*views), HalfWeights(*[view.t() for view in views])


@functools.lru_cache(maxsize=64)
def _places(channels: int, rank: int, hidden: int) -> tuple[list[tuple], int]:
    """Shape, strides and start in _make()'s memory of the first three weights and each other; its size."""
    shapes = (
        (2 * channels, channels), (channels, channels), (rank, channels), (channels, rank), (channels,),
        (channels, channels), (2 * hidden, channels), (channels, hidden),
    )  # fmt: skip
    places, start = [((3 * channels + rank, channels), (channels, 1), 0)], 0
    for shape in shapes:
        places.append((shape, (*shape[1:], 1), start))
        start += math.prod(shape)
    return [places[0], *places[4:]], start


def views_of(wide: Tensor, decay: Tensor, maps: Tensor, heads: int) -> list[Tensor]:
    """q, k, v, g_fwd, g_bwd of the wide product [rows, 3C + rank] and the decay gates [rows, C] of maps."""
    batch, height, across, channels = maps.shape
    places = _of_heads(batch, height * across, heads, channels, wide.shape[1])
    sources = (wide,) * 3 + (decay,) * 2
    return [strided_view(x, *place) for x, place in zip(sources, places, strict=True)]


def gates_of(wide: Tensor, channels: int, rank: int) -> tuple[Tensor, Tensor]:
    """Logits [rows, C] of the mix's gates and reduced decay gates [rows, rank] in the wide product."""
    rows, width = wide.shape
    return (
        strided_view(wide, (rows, channels), (width, 1), 2 * channels),
        strided_view(wide, (rows, rank), (width, 1), 3 * channels),
    )


@functools.lru_cache(maxsize=256)
def _of_heads(batch: int, tokens: int, heads: int, channels: int, width: int) -> list[tuple]:
    """Shape [B, N, H, K or V], strides and start of each view that views_of() returns."""
    keys = channels // 2
    places = []
    for across, start, columns in (
        (width, 0, keys), (width, keys, keys), (width, channels, channels),
        (channels, 0, keys), (channels, keys, keys),
    ):  # fmt: skip
        size = columns // heads
        places.append(((batch, tokens, heads, size), (tokens * across, across, size, 1), start))
    return places


def _fake_block(x, branch, scale, branch_scale, weights, options, dtype):
    channels, rows = x.shape[3], x.shape[0] * x.shape[1] * x.shape[2]

    def low(*shape):
        return x.new_empty(shape, dtype=dtype)

    none = x.new_empty(0)
    kept = Activations(
        s=none if branch is None else x.new_empty(x.shape),
        y=low(*x.shape),
        conved=low(*x.shape) if options.conv_act else low(0),
        u=low(rows, channels),
        wide=low(rows, 3 * channels + weights.down.shape[0]),
        o=low(rows, channels),
        h=low(rows, 2 * weights.fc2.shape[1]),
    )
    return x.new_empty(x.shape), low(*x.shape), *kept


@operator(_fake_block, outputs=2)
def block_op(
    keep, x: Tensor, branch: Tensor | None, scale: Tensor | None, branch_scale: Tensor | None,
    w: BlockWeights, options: Options, dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Activations]:  # fmt: skip
    """A block's s' and its branch, and with ``keep`` the :class:`Activations`; arguments are validated."""
    heads, eps, mix_eps, conv_act, out_act = options
    channels, rank, kept = x.shape[3], w.down.shape[0], {}
    s, y = norm.forward(x, branch, scale, w.norm1, w.norm1_bias, eps, dtype, 'none', False)
    if keep:
        kept['s'] = x.new_empty(0) if branch is None else s  # an operator must not return its input
        kept['y'] = y
    s = x if s is None else s
    low = borrow(dtype, w)
    with torch._C._DisableAutocast():
        conved, u = dwconv.forward(y, w.conv, conv_act, keep)
        if keep:
            kept['conved'] = conved if conv_act else u.new_empty(0)
        u = u.view(-1, channels)
        del conved, y
        wide = torch.mm(u, low.transposed.wide)
        logits, reduced = gates_of(wide, channels, rank)
        views = views_of(wide, torch.addmm(low.views.up_bias, reduced, low.transposed.up), x, heads)
        o = torch.empty_like(u)
        scaling = views[0].shape[3] ** -0.5
        bigla.forward(*views, scaling, GATE_NORMALIZER, o.view_as(views[2]))
        del views
        m = gated_mix.mix(o, logits, u, w.norm_long, w.norm_short, w.gate_bias, mix_eps, out_act)
        if keep:
            kept.update(u=u, wide=wide, o=o)
        del u, wide, logits, reduced, o
        z = torch.mm(m, low.transposed.out)
        del m
        s, y = norm.forward(s, z, branch_scale, w.norm2, w.norm2_bias, eps, dtype, 'none', False)
        del z
        h, activated = swiglu.project(y.view(-1, channels), low.views.fc1, keep)
        if keep:
            kept['h'] = h
        del y
        z = torch.mm(activated, low.transposed.fc2).view_as(x)
    give_back(low)
    return (s, z, *Activations(**kept)) if keep else (s, z)


def _fake_block_backward(dz, ds, scale, branch_scale, s2, w, act, options):
    dtype = w.qkv.dtype

    def of_weight(*shape):
        return s2.new_empty(shape, dtype=dtype)

    return (
        s2.new_empty(s2.shape), s2.new_empty(s2.shape, dtype=act.o.dtype),
        s2.new_empty(sum(w.small_sizes()), dtype=torch.float32),
        of_weight(act.wide.shape[1], w.qkv.shape[1]), *(of_weight(*x.shape) for x in (w.out, w.fc1, w.fc2)),
    )  # fmt: skip


@operator(_fake_block_backward)
def block_backward_op(
    dz: Tensor, ds: Tensor | None, scale: Tensor | None, branch_scale: Tensor | None, s2: Tensor,
    w: BlockWeights, kept: Activations, options: Options,
) -> BlockGradients:  # fmt: skip
    """Gradients of :func:`block_op`."""
    s, y, conved, u, wide, o, h = kept
    heads, eps, mix_eps, conv_act, out_act = options
    channels, rank, dtype, weight_dtype = s.shape[3], w.down.shape[0], o.dtype, w.qkv.dtype
    # Copied again: kept, the copies would take 2 % of a training step's memory.
    low = borrow(dtype, w)
    half = low.views
    ds = torch.zeros_like(s2) if ds is None else ds
    with torch._C._DisableAutocast():
        dz = dz.reshape(-1, channels)
        dh, activated = swiglu.project_backward(dz, half.fc2, h)
        d_fc2 = of_weight(dz, activated, weight_dtype)
        del activated
        # Computed again: kept, it takes 4 % of a training step's memory (ViG-H-S, 800 x 1216, batch 2).
        y2 = norm.forward(s2, None, None, w.norm2, w.norm2_bias, eps, dtype, 'none', False)[1]
        d_fc1 = of_weight(dh, y2.view(-1, channels), weight_dtype)
        del y2
        dy = torch.mm(dh, half.fc1)
        del dh
        ds, dz, d_norm2 = norm.backward(
            ds, dy, s2, branch_scale, w.norm2, w.norm2_bias, eps, 'none', False, dtype
        )
        dz = dz.view(-1, channels)

        d_wide, d_decay = torch.empty_like(wide), torch.empty_like(o)
        logits, reduced = gates_of(wide, channels, rank)
        d_logits, d_reduced = gates_of(d_wide, channels, rank)
        do, du, m, d_mix = gated_mix.mix_backward(
            torch.mm(dz, half.out), o, logits, u, w.norm_long, w.norm_short, w.gate_bias, mix_eps, out_act,
            d_logits,
        )  # fmt: skip
        d_out = of_weight(dz, m, weight_dtype)
        del m, dz
        views = views_of(wide, torch.addmm(half.up_bias, reduced, low.transposed.up), s, heads)
        bigla.backward(
            do.view_as(views[2]), *views, views[0].shape[3] ** -0.5, GATE_NORMALIZER,
            views_of(d_wide, d_decay, s, heads),
        )  # fmt: skip
        del views, do
        d_up = low_rank.backward(d_decay, reduced, half.up, d_reduced)
        del d_decay
        d_in = of_weight(d_wide, u, weight_dtype)
        du = du.addmm_(d_wide, half.wide)  # torch.addmm would copy du first
        give_back(low)
        del d_wide, d_logits, d_reduced
        if conv_act:
            du = torch.ops.aten.silu_backward(du.view_as(s), conved)
        dy, d_conv = dwconv.backward(du, y, w.conv)
        dx, d_branch, d_norm1 = norm.backward(
            ds, dy, s, scale, w.norm1, w.norm1_bias, eps, 'none', False, dtype
        )
    kinds1, programs1 = d_norm1.shape[:2]
    kinds2, programs2 = d_norm2.shape[:2]
    _, programs, heads, head_dim = d_mix.shape
    # (source, rows, columns) of what becomes SmallGradients, in their order.
    segments = (
        *[(0, programs1, channels)] * kinds1, (1, d_conv.shape[0], 9 * channels),
        (2, programs * heads, head_dim), (2, programs * heads, head_dim), (2, programs, channels),
        *[(3, programs2, channels)] * kinds2, (4, *d_up.shape),
    )  # fmt: skip
    small = sum_partials((d_norm1, d_conv, d_mix, d_norm2, d_up), segments)
    return BlockGradients(dx, d_branch, small, d_in, d_out, d_fc1, d_fc2)


def of_weight(d: Tensor, x: Tensor, dtype: torch.dtype) -> Tensor:
    """Gradient of W in a product x W^T from that of the result, without a rounding to half precision."""
    if HAS_OUT_DTYPE and d.is_cuda and dtype == torch.float32 != d.dtype:
        return torch.mm(d.t(), x, out_dtype=dtype)
    product = torch.mm(d.t(), x)
    return product if product.dtype == dtype else product.to(dtype)


def _keep(inputs, output):
    x, branch, scale, branch_scale, *rest = inputs
    weights, options, _ = take(rest, BlockWeights, Options)
    s2, _, *kept = output
    kept = Activations(*kept)
    if branch is None:
        kept = kept._replace(s=x)
    return (scale, branch_scale, s2, *weights, *kept), (*options, branch is not None)


def _backward(ds, dz, *kept):
    *kept, has_branch = kept
    w, act, _ = take(kept[3:], BlockWeights, Activations)
    if dz is None:
        dz = torch.zeros_like(act.y)
    dx, d_branch, small, d_in, d_out, d_fc1, d_fc2 = block_backward_op(dz, ds, *kept)
    d_qkv, d_gate, d_down = torch.split_with_sizes(d_in, [len(x) for x in (w.qkv, w.gate, w.down)])
    small = SmallGradients(*torch.split_with_sizes(small, w.small_sizes()))
    grads = BlockWeights(
        qkv=d_qkv, gate=d_gate, down=d_down, out=d_out, fc1=d_fc1, fc2=d_fc2,
        **{name: like(d, getattr(w, name)) for name, d in small._asdict().items()},
    )  # fmt: skip
    return dx, d_branch if has_branch else None, None, None, *grads


def like(grad: Tensor, weight: Tensor | None) -> Tensor | None:
    """A small gradient in the shape and dtype of its weight."""
    return None if weight is None else grad.view_as(weight).to(weight.dtype)


differentiate('block', _backward, _keep)
