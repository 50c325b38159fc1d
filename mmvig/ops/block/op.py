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

from mmvig.ops.bigla import op as bigla
from mmvig.ops.block import low_rank
from mmvig.ops.block.half_weights import cast
from mmvig.ops.block.partial_sums import sum_partials
from mmvig.ops.dwconv import op as dwconv
from mmvig.ops.gated_mix import op as gated_mix
from mmvig.ops.norm import op as norm
from mmvig.ops.operator import differentiate, operator, refuse_gradients
from mmvig.ops.persistent import is_capturing, persistent
from mmvig.ops.swiglu import op as swiglu
from mmvig.ops.torch_private import current_stream, strided_view

GATE_NORMALIZER = 16.0
# Whether PyTorch's products of half inputs can return float32.
HAS_OUT_DTYPE = tuple(map(int, torch.__version__.split('.')[:2])) >= (2, 8)

INPUTS = (
    'Tensor x, Tensor? branch, Tensor? scale, Tensor? branch_scale, '
    'Tensor norm1_weight, Tensor? norm1_bias, Tensor conv, Tensor qkv, Tensor gate, Tensor gate_bias, '
    'Tensor down, Tensor up, Tensor up_bias, Tensor norm_long, Tensor norm_short, Tensor out, '
    'Tensor norm2_weight, Tensor? norm2_bias, Tensor fc1, Tensor fc2, '
    'int heads, float eps, float mix_eps, bool conv_act, bool out_act, ScalarType dtype'
)
TENSORS = INPUTS.count('Tensor')
KEPT = (
    'Tensor? scale, Tensor? branch_scale, Tensor norm1_weight, Tensor? norm1_bias, Tensor conv, '
    'Tensor gate_bias, Tensor norm_long, Tensor norm_short, Tensor norm2_weight, Tensor? norm2_bias, '
    'Tensor s, Tensor y, Tensor conved, Tensor u, Tensor wide, Tensor o, Tensor s2, Tensor h, '
    'Tensor qkv, Tensor gate, Tensor down, Tensor up, Tensor up_bias, Tensor out, Tensor fc1, Tensor fc2'
)
OPTIONS = 'int heads, float eps, float mix_eps, bool conv_act, bool out_act'


class Low(NamedTuple):
    """Memory for a block's weights in half precision, used on one stream."""

    key: tuple | None  # dtype, device, stream and widths; None if it is a graph's own
    memory: Tensor  # all weights side by side
    views: tuple[Tensor, ...]  # [W_qkv; W_r; W_g1], W_g2, b, W_o, W_1, W_2, and these transposed


# What no block is using, by key: as many as threads have used at once. Of a stream each, rather than made
# anew where streams take turns: to make it, the host waits for the default stream.
_unused: defaultdict[tuple, list[Low]] = defaultdict(list)


def borrow(dtype: torch.dtype, weights: tuple[Tensor, ...]) -> Low:
    """Copies of the weights in ``dtype``, the caller's until :func:`give_back`, then the next block's.

    They are copied anew each time, since nothing tells of a change by ``weight.data``.
    """
    device, widths = weights[0].device, (weights[0].shape[1], weights[2].shape[0], weights[7].shape[1])
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
    cast(weights, low.memory)
    return low


def give_back(low: Low) -> None:
    """Let others have the memory that :func:`borrow` has lent; that of a graph stays its own."""
    if low.key:
        _unused[low.key].append(low)


def _make(device: torch.device, dtype: torch.dtype, *widths: int) -> tuple[Tensor, tuple[Tensor, ...]]:
    """New memory and its views."""
    places, size = _places(*widths)
    memory = torch.empty(size, dtype=dtype, device=device)
    views = [memory.as_strided(*place) for place in places]
    return memory, (*views, *[view.t() for view in views])


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


def _fake_block(x, branch, *args):
    fc2, dtype = args[TENSORS - 3], args[-1]
    down, conv_act = args[8], args[-3]
    channels, rows = x.shape[3], x.shape[0] * x.shape[1] * x.shape[2]

    def low(*shape):
        return x.new_empty(shape, dtype=dtype)

    none = x.new_empty(0)
    return (
        x.new_empty(x.shape), low(*x.shape), none if branch is None else x.new_empty(x.shape),
        low(*x.shape), low(*x.shape) if conv_act else low(0), low(rows, channels),
        low(rows, 3 * channels + down.shape[0]), low(rows, channels), low(rows, 2 * fc2.shape[1]),
    )  # fmt: skip


def forward(
    keep, x, branch, scale, branch_scale, norm1_weight, norm1_bias, conv, qkv, gate, gate_bias, down, up,
    up_bias, norm_long, norm_short, out, norm2_weight, norm2_bias, fc1, fc2,
    heads, eps, mix_eps, conv_act, out_act, dtype,
) -> tuple[Tensor, ...]:  # fmt: skip
    """s', its branch, and with ``keep`` what the backward pass needs."""
    channels, rank, kept = x.shape[3], down.shape[0], []
    s, y = norm.forward(x, branch, scale, norm1_weight, norm1_bias, eps, dtype, 'none', False)
    if keep:
        kept += x.new_empty(0) if branch is None else s, y  # an operator must not return its input
    s = x if s is None else s
    low = borrow(dtype, (qkv, gate, down, up, up_bias, out, fc1, fc2))
    w_1, (w_in, w_up, b_up, w_out, _, w_2) = low.views[4], low.views[6:]  # these transposed
    with torch._C._DisableAutocast():
        conved, u = dwconv.forward(y, conv, conv_act, keep)
        if keep:
            kept.append(conved if conv_act else u.new_empty(0))
        u = u.view(-1, channels)
        del conved, y
        wide = torch.mm(u, w_in)
        logits, reduced = gates_of(wide, channels, rank)
        views = views_of(wide, torch.addmm(b_up, reduced, w_up), x, heads)
        o = torch.empty_like(u)
        scaling = views[0].shape[3] ** -0.5
        bigla.forward(*views, scaling, GATE_NORMALIZER, o.view_as(views[2]))
        del views
        m = gated_mix.mix(o, logits, u, norm_long, norm_short, gate_bias, mix_eps, out_act)
        if keep:
            kept += u, wide, o
        del u, wide, logits, reduced, o
        z = torch.mm(m, w_out)
        del m
        s, y = norm.forward(s, z, branch_scale, norm2_weight, norm2_bias, eps, dtype, 'none', False)
        del z
        h, activated = swiglu.project(y.view(-1, channels), w_1, keep)
        if keep:
            kept.append(h)
        del y
        z = torch.mm(activated, w_2).view_as(x)
    give_back(low)
    return s, z, *kept


@operator(f'block_inference({INPUTS}) -> (Tensor, Tensor)', lambda *args: _fake_block(*args)[:2])
def block_inference_op(*args):
    """:func:`block_op` where nothing is kept for a backward pass."""
    return forward(False, *args)


@operator(f'block({INPUTS}) -> ({", ".join(["Tensor"] * 9)})', _fake_block, inference=block_inference_op)
def block_op(*args):
    """A block's s' and its branch, and what the backward pass needs; arguments are validated."""
    return forward(True, *args)


def small_sizes(channels: int, rank: int, head_dim: int, rms1: bool, rms2: bool) -> tuple[int, ...]:
    """Numbers of the gradients of norm1, conv, norm_long, norm_short, the gate's bias, norm2, W_g2, b."""
    return (
        channels, 0 if rms1 else channels, 9 * channels, head_dim, head_dim, channels,
        channels, 0 if rms2 else channels, channels * rank, channels,
    )  # fmt: skip


def _fake_block_backward(dz, ds, scale, branch_scale, *rest):
    _, norm1_bias, _, _, norm_long, _, _, norm2_bias = rest[:8]
    s, o, weight_dtype = rest[8], rest[13], rest[16].dtype
    channels, hidden = s.shape[3], rest[15].shape[1] // 2
    rank = rest[12].shape[1] - 3 * channels

    def of_weight(*shape):
        return s.new_empty(shape, dtype=weight_dtype)

    small = sum(small_sizes(channels, rank, norm_long.shape[0], norm1_bias is None, norm2_bias is None))
    return (
        s.new_empty(s.shape), s.new_empty(s.shape, dtype=o.dtype), s.new_empty(small, dtype=torch.float32),
        of_weight(3 * channels + rank, channels), of_weight(channels, channels),
        of_weight(2 * hidden, channels), of_weight(channels, hidden),
    )  # fmt: skip


@operator(
    f'block_backward(Tensor dz, Tensor? ds, {KEPT}, {OPTIONS}) -> ({", ".join(["Tensor"] * 7)})',
    _fake_block_backward,
)
def block_backward_op(
    dz, ds, scale, branch_scale, norm1_weight, norm1_bias, conv, gate_bias, norm_long, norm_short,
    norm2_weight, norm2_bias, s, y, conved, u, wide, o, s2, h,
    qkv, gate, down, up, up_bias, out, fc1, fc2, heads, eps, mix_eps, conv_act, out_act,
):  # fmt: skip
    """Gradients of :func:`block_op`: of x, the branch and the weights, the small ones in one vector."""
    channels, rank, dtype, weight_dtype = s.shape[3], down.shape[0], o.dtype, qkv.dtype
    # Copied again: kept, the copies would take 2 % of a training step's memory.
    low = borrow(dtype, (qkv, gate, down, up, up_bias, out, fc1, fc2))
    (w_in, w_up, b_up, w_out, w_1, w_2), w_up_t = low.views[:6], low.views[7]
    ds = torch.zeros_like(s2) if ds is None else ds
    with torch._C._DisableAutocast():
        dz = dz.reshape(-1, channels)
        dh, activated = swiglu.project_backward(dz, w_2, h)
        d_fc2 = of_weight(dz, activated, weight_dtype)
        del activated
        # Computed again: kept, it takes 4 % of a training step's memory (ViG-H-S, 800 x 1216, batch 2).
        y2 = norm.forward(s2, None, None, norm2_weight, norm2_bias, eps, dtype, 'none', False)[1]
        d_fc1 = of_weight(dh, y2.view(-1, channels), weight_dtype)
        del y2
        dy = torch.mm(dh, w_1)
        del dh
        ds, dz, d_norm2 = norm.backward(
            ds, dy, s2, branch_scale, norm2_weight, norm2_bias, eps, 'none', False, dtype
        )
        dz = dz.view(-1, channels)

        d_wide, d_decay = torch.empty_like(wide), torch.empty_like(o)
        logits, reduced = gates_of(wide, channels, rank)
        d_logits, d_reduced = gates_of(d_wide, channels, rank)
        do, du, m, d_mix = gated_mix.mix_backward(
            torch.mm(dz, w_out), o, logits, u, norm_long, norm_short, gate_bias, mix_eps, out_act, d_logits
        )
        d_out = of_weight(dz, m, weight_dtype)
        del m, dz
        views = views_of(wide, torch.addmm(b_up, reduced, w_up_t), s, heads)
        bigla.backward(
            do.view_as(views[2]), *views, views[0].shape[3] ** -0.5, GATE_NORMALIZER,
            views_of(d_wide, d_decay, s, heads),
        )  # fmt: skip
        del views, do
        d_up = low_rank.backward(d_decay, reduced, w_up, d_reduced)
        del d_decay
        d_in = of_weight(d_wide, u, weight_dtype)
        du = du.addmm_(d_wide, w_in)  # torch.addmm would copy du first
        give_back(low)
        del d_wide, d_logits, d_reduced
        if conv_act:
            du = torch.ops.aten.silu_backward(du.view_as(s), conved)
        dy, d_conv = dwconv.backward(du, y, conv)
        dx, d_branch, d_norm1 = norm.backward(
            ds, dy, s, scale, norm1_weight, norm1_bias, eps, 'none', False, dtype
        )
    kinds1, programs1 = d_norm1.shape[:2]
    kinds2, programs2 = d_norm2.shape[:2]
    _, programs, heads, head_dim = d_mix.shape
    segments = (
        *[(0, programs1, channels)] * kinds1, (1, d_conv.shape[0], 9 * channels),
        (2, programs * heads, head_dim), (2, programs * heads, head_dim), (2, programs, channels),
        *[(3, programs2, channels)] * kinds2, (4, *d_up.shape),
    )  # fmt: skip
    small = sum_partials((d_norm1, d_conv, d_mix, d_norm2, d_up), segments)
    return dx, d_branch, small, d_in, d_out, d_fc1, d_fc2


def of_weight(d: Tensor, x: Tensor, dtype: torch.dtype) -> Tensor:
    """Gradient of W in a product x W^T from that of the result, without a rounding to half precision."""
    if HAS_OUT_DTYPE and d.is_cuda and dtype == torch.float32 != d.dtype:
        return torch.mm(d.t(), x, out_dtype=dtype)
    product = torch.mm(d.t(), x)
    return product if product.dtype == dtype else product.to(dtype)


def _keep(inputs, output):
    x, branch, scale, branch_scale, norm1_weight, norm1_bias, conv, qkv, gate, gate_bias = inputs[:10]
    down, up, up_bias, norm_long, norm_short, out, norm2_weight, norm2_bias, fc1, fc2 = inputs[10:TENSORS]
    s2, _, s, y, conved, u, wide, o, h = output
    tensors = (
        scale, branch_scale, norm1_weight, norm1_bias, conv, gate_bias, norm_long, norm_short,
        norm2_weight, norm2_bias, x if branch is None else s, y, conved, u, wide, o, s2, h,
        qkv, gate, down, up, up_bias, out, fc1, fc2,
    )  # fmt: skip
    return tensors, (*inputs[TENSORS:-1], branch is not None)


def _backward(ds, dz, *kept):
    *kept, has_branch = kept
    norm1_weight, norm1_bias, conv, gate_bias, norm_long, norm_short, norm2_weight, norm2_bias, s = kept[
        2:11
    ]
    if dz is None:
        dz = torch.zeros_like(kept[11])
    dx, d_branch, small, d_in, d_out, d_fc1, d_fc2 = block_backward_op(dz, ds, *kept)
    channels = s.shape[3]
    rank = d_in.shape[0] - 3 * channels
    d_qkv, d_gate, d_down = torch.split_with_sizes(d_in, (2 * channels, channels, rank))
    sizes = small_sizes(channels, rank, norm_long.shape[0], norm1_bias is None, norm2_bias is None)
    d_norm1, d_bias1, d_conv, d_long, d_short, d_gate_bias, d_norm2, d_bias2, d_up, d_up_bias = (
        torch.split_with_sizes(small, sizes)
    )
    return (
        dx, d_branch if has_branch else None, None, None, like(d_norm1, norm1_weight),
        like(d_bias1, norm1_bias), like(d_conv.view_as(conv), conv), d_qkv, d_gate,
        like(d_gate_bias, gate_bias), d_down, like(d_up.view(channels, rank), d_in), like(d_up_bias, d_in),
        like(d_long, norm_long), like(d_short, norm_short), d_out, like(d_norm2, norm2_weight),
        like(d_bias2, norm2_bias), d_fc1, d_fc2,
    )  # fmt: skip


def like(grad: Tensor, weight: Tensor | None) -> Tensor | None:
    """A weight's gradient in the dtype of it, or of another one."""
    return None if weight is None else grad if grad.dtype == weight.dtype else grad.to(weight.dtype)


differentiate('block', _backward, _keep, outputs=2)
refuse_gradients('block_inference')
