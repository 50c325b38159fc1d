"""The gated mix by Triton, one pass forward and one backward, before PyTorch's product.

A row is one head of one token.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from mmvig.ops.launch import (
    ceil_div,
    compile_key,
    differentiate,
    empty_like_each,
    launch,
    multiprocessors,
    operator,
)

# Elements of a tile; programs of the backward pass, which sum up the weights' gradients, a multiprocessor.
TILE, BACKWARD_TILE, FILL = 2048, 1024, 8


@triton.jit
def load_row(p_x, at, mask, V: tl.constexpr, EPS: tl.constexpr):
    """Rows divided by their root mean square, and its inverse."""
    x = tl.load(p_x + at, mask=mask, other=0.0).to(tl.float32)
    inverse = tl.rsqrt(tl.sum(x * x, axis=1) / V + EPS)[:, None]
    return x * inverse, inverse


@triton.jit(do_not_specialize=['M'])
def forward_kernel(
    p_long, p_gate, p_short, p_wl, p_ws, p_y, M,
    V: tl.constexpr, EPS: tl.constexpr, ACT: tl.constexpr, BR: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """Make y [M, V] of long, gate and short [M, V]."""
    rows = tl.program_id(0) * BR + tl.arange(0, BR)
    columns = tl.arange(0, BV)
    mask = (rows < M)[:, None] & (columns < V)[None, :]
    at = rows.to(tl.int64)[:, None] * V + columns[None, :]
    long, _ = load_row(p_long, at, mask, V, EPS)
    short, _ = load_row(p_short, at, mask, V, EPS)
    long *= tl.load(p_wl + columns, mask=columns < V, other=0.0).to(tl.float32)[None, :]
    short *= tl.load(p_ws + columns, mask=columns < V, other=0.0).to(tl.float32)[None, :]
    gate = tl.sigmoid(tl.load(p_gate + at, mask=mask, other=0.0).to(tl.float32))
    y = short + gate * (long - short)
    if ACT:
        y *= tl.sigmoid(y)
    tl.store(p_y + at, y.to(p_y.dtype.element_ty), mask=mask)


@triton.jit
def store_row_gradient(p_dx, at, mask, x, inverse, dx, V: tl.constexpr):
    """Gradient of what load_row() read, of that of x = what it returned."""
    dx = inverse * (dx - x * (tl.sum(dx * x, axis=1) / V)[:, None])
    tl.store(p_dx + at, dx.to(p_dx.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=['M'])
def backward_kernel(
    p_dy, p_long, p_gate, p_short, p_wl, p_ws, p_dlong, p_dgate, p_dshort, p_y, p_dw, M,
    V: tl.constexpr, EPS: tl.constexpr, ACT: tl.constexpr, BR: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """Gradients and y [M, V], and this program's share of the weights' in dw [2, programs, V]."""
    columns = tl.arange(0, BV)
    wl = tl.load(p_wl + columns, mask=columns < V, other=0.0).to(tl.float32)[None, :]
    ws = tl.load(p_ws + columns, mask=columns < V, other=0.0).to(tl.float32)[None, :]
    dwl = tl.zeros([BR, BV], tl.float32)
    dws = tl.zeros([BR, BV], tl.float32)
    for i in range(tl.program_id(0), tl.cdiv(M, BR), tl.num_programs(0)):
        rows = i * BR + tl.arange(0, BR)
        mask = (rows < M)[:, None] & (columns < V)[None, :]
        at = rows.to(tl.int64)[:, None] * V + columns[None, :]
        dy = tl.load(p_dy + at, mask=mask, other=0.0).to(tl.float32)
        long, inverse_long = load_row(p_long, at, mask, V, EPS)
        short, inverse_short = load_row(p_short, at, mask, V, EPS)
        gate = tl.sigmoid(tl.load(p_gate + at, mask=mask, other=0.0).to(tl.float32))
        difference = long * wl - short * ws
        y = short * ws + gate * difference
        if ACT:
            s = tl.sigmoid(y)
            dy *= s + y * s * (1 - s)
            y *= s
        tl.store(p_y + at, y.to(p_y.dtype.element_ty), mask=mask)
        dgate = dy * difference * gate * (1 - gate)
        tl.store(p_dgate + at, dgate.to(p_dgate.dtype.element_ty), mask=mask)
        of_long = dy * gate
        of_short = dy - of_long
        dwl += of_long * long
        dws += of_short * short
        store_row_gradient(p_dlong, at, mask, long, inverse_long, of_long * wl, V)
        store_row_gradient(p_dshort, at, mask, short, inverse_short, of_short * ws, V)
    p_dw += tl.program_id(0) * V + columns
    tl.store(p_dw, tl.sum(dwl, axis=0), mask=columns < V)
    tl.store(p_dw + tl.num_programs(0) * V, tl.sum(dws, axis=0), mask=columns < V)


def constants(weight: Tensor, eps: float, act: bool, tile: int) -> dict:
    """Constants of a kernel with tiles of about ``tile`` elements."""
    width = weight.shape[0]
    block = triton.next_power_of_2(width)
    rows = max(1, tile // block)
    return {'V': width, 'EPS': eps, 'ACT': act, 'BR': rows, 'BV': block, 'num_warps': 4}


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
    inputs = [x.contiguous() for x in (long, gate, short, weight_long, weight_short)]
    y = long.new_empty(long.shape)
    if y.numel():
        options = constants(weight_long, eps, act, TILE)
        rows = y.numel() // options['V']
        with torch.cuda.device_of(y):
            key = compile_key(*inputs, y)
            launch(forward_kernel, key, (ceil_div(rows, options['BR']), 1, 1), (*inputs, y, rows), options)
    return y @ weight_out.t()


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
    dy = dz @ weight_out
    inputs = [x.contiguous() for x in (dy, long, gate, short, weight_long, weight_short)]
    grads = empty_like_each(long, gate, short)
    y = torch.empty_like(dy)
    options = constants(weight_long, eps, act, BACKWARD_TILE)
    rows = dy.numel() // options['V']
    programs = min(ceil_div(rows, options['BR']), FILL * multiprocessors(dy.device))
    dw = dy.new_empty(2, programs, options['V'], dtype=torch.float32)
    if programs:
        with torch.cuda.device_of(dy):
            key = compile_key(*inputs, *grads, y)
            launch(backward_kernel, key, (programs, 1, 1), (*inputs, *grads, y, dw, rows), options)
    return *grads, dw.sum(1), dz.t() @ y


def backward(dz, *kept):
    """Gradients of the six tensors."""
    *grads, dw, dweight_out = gated_mix_backward_op(dz, *kept)
    return *grads, dw[0].to(kept[3].dtype), dw[1].to(kept[4].dtype), dweight_out


differentiate('gated_mix', backward)
