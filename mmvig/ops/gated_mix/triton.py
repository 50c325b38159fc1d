"""The gated mix by Triton, one pass forward and one backward, before PyTorch's product.

The gate's logits may be columns of a wider tensor, without their bias.
"""

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from mmvig.ops.arithmetic import sigmoid
from mmvig.ops.launch import (
    Constants,
    ceil_div,
    compile_key,
    differentiate,
    empty_like_each,
    launch,
    multiprocessors,
    operator,
)

# Elements of a tile. Of the backward pass, whose programs sum up the weights' gradients: also the tiles
# under way at once, and programs a multiprocessor.
TILE, BACKWARD_TILE, STAGES, FILL = 2048, 512, 1, 8


@triton.jit
def load_row(p_x, at, mask, V: tl.constexpr, EPS: tl.constexpr):
    """Rows divided by their root mean square, and its inverse."""
    x = tl.load(p_x + at, mask=mask, other=0.0).to(tl.float32)
    inverse = tl.rsqrt(tl.sum(x * x, axis=1) / V + EPS)[:, None]
    return x * inverse, inverse


@triton.jit
def load_gate(p_gate, tokens, channels, bias, mask, S):
    """Gates of tokens [BR, 1], which are S apart, at channels [BR or 1, BV], and where they are."""
    at = tokens.to(tl.int64) * S + channels
    return sigmoid(tl.load(p_gate + at, mask=mask, other=0.0).to(tl.float32) + bias), at


@triton.jit(do_not_specialize=['M', 'S'])
def forward_kernel(
    p_long, p_gate, p_short, p_wl, p_ws, p_bias, p_y, M, S,
    H: tl.constexpr, V: tl.constexpr, EPS: tl.constexpr, ACT: tl.constexpr, BIAS: tl.constexpr,
    BR: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """Make y [M, V] of long and short [M, V] and the gates [M / H, H * V]."""
    rows = tl.program_id(0) * BR + tl.arange(0, BR)
    columns = tl.arange(0, BV)
    mask = (rows < M)[:, None] & (columns < V)[None, :]
    at = rows.to(tl.int64)[:, None] * V + columns[None, :]
    long, _ = load_row(p_long, at, mask, V, EPS)
    short, _ = load_row(p_short, at, mask, V, EPS)
    long *= tl.load(p_wl + columns, mask=columns < V, other=0.0).to(tl.float32)[None, :]
    short *= tl.load(p_ws + columns, mask=columns < V, other=0.0).to(tl.float32)[None, :]
    channels = (rows % H * V)[:, None] + columns[None, :]
    bias = 0.0
    if BIAS:
        bias = tl.load(p_bias + channels, mask=mask, other=0.0).to(tl.float32)
    gate, _ = load_gate(p_gate, (rows // H)[:, None], channels, bias, mask, S)
    y = short + gate * (long - short)
    if ACT:
        y *= sigmoid(y)
    tl.store(p_y + at, y.to(p_y.dtype.element_ty), mask=mask)


@triton.jit
def store_row_gradient(p_dx, at, mask, x, inverse, dx, V: tl.constexpr):
    """Gradient of what load_row() read, of that of x = what it returned."""
    dx = inverse * (dx - x * (tl.sum(dx * x, axis=1) / V)[:, None])
    tl.store(p_dx + at, dx.to(p_dx.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=['M', 'S'])
def backward_kernel(
    p_dy, p_long, p_gate, p_short, p_wl, p_ws, p_bias, p_dlong, p_dgate, p_dshort, p_y, p_dw, M, S,
    H: tl.constexpr, V: tl.constexpr, EPS: tl.constexpr, ACT: tl.constexpr, BIAS: tl.constexpr,
    BR: tl.constexpr, BV: tl.constexpr, AHEAD: tl.constexpr,
):  # fmt: skip
    """Gradients and y of one head, and this program's share of the weights' in dw [2 or 3, programs, H, V].

    The third is that of the gate's bias.
    """
    columns = tl.arange(0, BV)
    wl = tl.load(p_wl + columns, mask=columns < V, other=0.0).to(tl.float32)[None, :]
    ws = tl.load(p_ws + columns, mask=columns < V, other=0.0).to(tl.float32)[None, :]
    dwl = tl.zeros([BR, BV], tl.float32)
    dws = tl.zeros([BR, BV], tl.float32)
    dbias = tl.zeros([BR, BV], tl.float32)
    head = tl.program_id(1)
    channels = head * V + columns[None, :]
    bias = 0.0
    if BIAS:
        bias = tl.load(p_bias + channels, mask=columns[None, :] < V, other=0.0).to(tl.float32)
    for i in tl.range(tl.program_id(0), tl.cdiv(M, BR * H), tl.num_programs(0), num_stages=AHEAD):
        tokens = (i * BR + tl.arange(0, BR))[:, None]
        mask = (tokens < M // H) & (columns < V)[None, :]
        at = tokens.to(tl.int64) * (H * V) + channels
        dy = tl.load(p_dy + at, mask=mask, other=0.0).to(tl.float32)
        long, inverse_long = load_row(p_long, at, mask, V, EPS)
        short, inverse_short = load_row(p_short, at, mask, V, EPS)
        gate, at_gate = load_gate(p_gate, tokens, channels, bias, mask, S)
        difference = long * wl - short * ws
        y = short * ws + gate * difference
        if ACT:
            s = sigmoid(y)
            dy *= s + y * s * (1 - s)
            y *= s
        tl.store(p_y + at, y.to(p_y.dtype.element_ty), mask=mask)
        dgate = dy * difference * gate * (1 - gate)
        tl.store(p_dgate + at_gate, dgate.to(p_dgate.dtype.element_ty), mask=mask)
        dbias += dgate
        of_long = dy * gate
        of_short = dy - of_long
        dwl += of_long * long
        dws += of_short * short
        store_row_gradient(p_dlong, at, mask, long, inverse_long, of_long * wl, V)
        store_row_gradient(p_dshort, at, mask, short, inverse_short, of_short * ws, V)
    of_kind = tl.num_programs(0) * (H * V)
    p_dw += (tl.program_id(0) * H + head) * V + columns
    tl.store(p_dw, tl.sum(dwl, axis=0), mask=columns < V)
    tl.store(p_dw + of_kind, tl.sum(dws, axis=0), mask=columns < V)
    if BIAS:
        tl.store(p_dw + 2 * of_kind, tl.sum(dbias, axis=0), mask=columns < V)


@functools.lru_cache(maxsize=256)
def constants(width: int, head_dim: int, eps: float, act: bool, bias: bool, back: bool) -> Constants:
    """Constants of a kernel."""
    block = triton.next_power_of_2(head_dim)
    form = {'BR': max(1, (BACKWARD_TILE if back else TILE) // block), **({'AHEAD': STAGES} if back else {})}
    return Constants(
        H=width // head_dim, V=head_dim, EPS=eps, ACT=act, BIAS=bias, **form, BV=block, num_warps=4
    )


def mix(long, gate, short, weight_long, weight_short, bias, eps, act):
    """What W_o takes, ``[rows, H * V]`` as long and short are; gate may have a wider stride of rows.

    ``bias``: ``[H * V]``, to be added to the gate's logits, or None.
    """
    y = torch.empty_like(long)
    if y.numel():
        options = constants(long.shape[1], weight_long.shape[0], eps, act, bias is not None, False)
        rows = y.numel() // options['V']
        tensors = long, gate, short, weight_long, weight_short, weight_long if bias is None else bias, y
        grid = ceil_div(rows, options['BR']), 1, 1
        arguments = (*tensors, rows, gate.stride(0))
        launch(forward_kernel, compile_key(*tensors), grid, arguments, options)
    return y


def mix_backward(dy, long, gate, short, weight_long, weight_short, bias, eps, act, dgate):
    """Gradients of long and short, :func:`mix`'s result again, and partial sums [2 or 3, ., H, V].

    These are gradients of the two weights, to be summed up over the second and third dimension, and of
    the bias, if there is one. The gate's is written into ``dgate``, of its strides.
    """
    dlong, dshort, y = torch.empty_like(long), torch.empty_like(long), torch.empty_like(dy)
    options = constants(long.shape[1], weight_long.shape[0], eps, act, bias is not None, True)
    heads, rows = options['H'], dy.numel() // options['V']
    programs = ceil_div(rows, options['BR'] * heads)
    programs = min(programs, max(1, FILL * multiprocessors(dy.device) // heads))
    dw = dy.new_empty(2 if bias is None else 3, programs, heads, options['V'], dtype=torch.float32)
    if programs:
        tensors = (
            dy, long, gate, short, weight_long, weight_short, weight_long if bias is None else bias,
            dlong, dgate, dshort, y,
        )  # fmt: skip
        arguments = (*tensors, dw, rows, gate.stride(0))
        launch(backward_kernel, compile_key(*tensors), (programs, heads, 1), arguments, options)
    return dlong, dshort, y, dw


INPUTS = (
    'Tensor long, Tensor gate, Tensor short, Tensor weight_long, Tensor weight_short, Tensor weight_out, '
    'float eps, bool act'
)


@operator(
    f'gated_mix({INPUTS}) -> Tensor',
    lambda long, gate, short, wl, ws, weight_out, *rest: long.new_empty(
        *long.shape[:-1], weight_out.shape[0]
    ),
)
def gated_mix_op(long, gate, short, weight_long, weight_short, weight_out, eps, act):
    """:func:`mmvig.ops.gated_mix.gated_mix` by Triton; arguments are validated, W_o of long's dtype."""
    shape = long.shape
    inputs = rows_of(long, gate, short)
    y = mix(*inputs, weight_long.contiguous(), weight_short.contiguous(), None, eps, act)
    return (y @ weight_out.t()).view(*shape[:-1], weight_out.shape[0])


@operator(
    f'gated_mix_backward(Tensor dz, {INPUTS}) -> (Tensor, Tensor, Tensor, Tensor, Tensor)',
    lambda dz, *inputs: (
        *empty_like_each(*inputs[:3]),
        dz.new_empty(2, inputs[3].shape[0], dtype=torch.float32),
        inputs[5].new_empty(inputs[5].shape),
    ),
)
def gated_mix_backward_op(dz, long, gate, short, weight_long, weight_short, weight_out, eps, act):
    """Gradients of :func:`gated_mix_op`, those of the norms' weights side by side ``[2, V]`` in float32."""
    dz = dz.reshape(-1, weight_out.shape[0])
    weights = weight_long.contiguous(), weight_short.contiguous()
    shape = long.shape
    inputs = rows_of(long, gate, short)
    dgate = torch.empty_like(inputs[1])
    dlong, dshort, y, dw = mix_backward(dz @ weight_out, *inputs, *weights, None, eps, act, dgate)
    grads = (x.view(shape) for x in (dlong, dgate, dshort))
    return *grads, dw.sum((1, 2)), dz.t() @ y


def rows_of(*tensors: Tensor) -> list[Tensor]:
    """[..., H * V] -> [rows, H * V], contiguous."""
    return [x.contiguous().view(-1, x.shape[-1]) for x in tensors]


def backward(dz, *kept):
    """Gradients of the six tensors."""
    *grads, dw, dweight_out = gated_mix_backward_op(dz, *kept)
    return *grads, dw[0].to(kept[3].dtype), dw[1].to(kept[4].dtype), dweight_out


differentiate('gated_mix', backward)
