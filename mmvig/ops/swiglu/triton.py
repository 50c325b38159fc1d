"""The gated activation of SwiGLU by Triton: one pass forward, one backward."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from mmvig.ops.launch import ceil_div, compile_key, differentiate, launch, operator

# Rows and columns of a program, and its warps.
BLOCKS = {'BR': 8, 'BD': 256, 'num_warps': 4}


@triton.jit(do_not_specialize=['M'])
def forward_kernel(p_x, p_y, M, D: tl.constexpr, BR: tl.constexpr, BD: tl.constexpr):
    """Make y [M, D] of x [M, 2 D]."""
    rows = tl.program_id(0) * BR + tl.arange(0, BR)
    columns = tl.program_id(1) * BD + tl.arange(0, BD)
    mask = (rows < M)[:, None] & (columns < D)[None, :]
    rows = rows.to(tl.int64)[:, None]
    p_a = p_x + rows * (2 * D) + columns[None, :]
    a = tl.load(p_a, mask=mask, other=0.0).to(tl.float32)
    b = tl.load(p_a + D, mask=mask, other=0.0).to(tl.float32)
    y = a * tl.sigmoid(a) * b
    tl.store(p_y + rows * D + columns[None, :], y.to(p_y.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=['M'])
def backward_kernel(p_dy, p_x, p_dx, M, D: tl.constexpr, BR: tl.constexpr, BD: tl.constexpr):
    """Make dx [M, 2 D] of dy [M, D] and x [M, 2 D]."""
    rows = tl.program_id(0) * BR + tl.arange(0, BR)
    columns = tl.program_id(1) * BD + tl.arange(0, BD)
    mask = (rows < M)[:, None] & (columns < D)[None, :]
    rows = rows.to(tl.int64)[:, None]
    at = rows * (2 * D) + columns[None, :]
    a = tl.load(p_x + at, mask=mask, other=0.0).to(tl.float32)
    b = tl.load(p_x + at + D, mask=mask, other=0.0).to(tl.float32)
    dy = tl.load(p_dy + rows * D + columns[None, :], mask=mask, other=0.0).to(tl.float32)
    s = tl.sigmoid(a)
    silu = a * s
    da = dy * b * (s + silu * (1 - s))
    tl.store(p_dx + at, da.to(p_dx.dtype.element_ty), mask=mask)
    tl.store(p_dx + at + D, (dy * silu).to(p_dx.dtype.element_ty), mask=mask)


def run(kernel, tensors: tuple[Tensor, ...], width: int, rows: int) -> None:
    """Launch a kernel over ``rows`` rows of ``width`` results."""
    grid = ceil_div(rows, BLOCKS['BR']), ceil_div(width, BLOCKS['BD']), 1
    with torch.cuda.device_of(tensors[0]):
        launch(kernel, compile_key(*tensors), grid, (*tensors, rows), {'D': width, **BLOCKS})


@operator('swiglu(Tensor x) -> Tensor', lambda x: x.new_empty(*x.shape[:-1], x.shape[-1] // 2))
def swiglu_op(x: Tensor) -> Tensor:
    """:func:`mmvig.ops.swiglu.swiglu` by Triton; x is validated."""
    x = x.contiguous()
    y = x.new_empty(*x.shape[:-1], x.shape[-1] // 2)
    if y.numel():
        run(forward_kernel, (x, y), y.shape[-1], y.numel() // y.shape[-1])
    return y


@operator('swiglu_backward(Tensor dy, Tensor x) -> Tensor', lambda dy, x: x.new_empty(x.shape))
def swiglu_backward_op(dy: Tensor, x: Tensor) -> Tensor:
    """Gradient of :func:`swiglu_op`."""
    dy, x = dy.contiguous(), x.contiguous()
    dx = x.new_empty(x.shape)
    if dx.numel():
        run(backward_kernel, (dy, x, dx), dy.shape[-1], dy.numel() // dy.shape[-1])
    return dx


differentiate('swiglu', swiglu_backward_op)
