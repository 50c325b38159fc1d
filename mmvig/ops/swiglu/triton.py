"""SwiGLU's gated activation by Triton, one pass forward and one backward, around PyTorch's products."""

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from mmvig.ops.launch import (
    Constants,
    ceil_div,
    compile_key,
    differentiate,
    empty_like_each,
    launch,
    operator,
)

# Rows and columns of a program.
ROWS, COLUMNS = 8, 256


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
def backward_kernel(p_dy, p_x, p_dx, p_y, M, D: tl.constexpr, BR: tl.constexpr, BD: tl.constexpr):
    """Make dx [M, 2 D] of dy [M, D] and x [M, 2 D], and y again."""
    rows = tl.program_id(0) * BR + tl.arange(0, BR)
    columns = tl.program_id(1) * BD + tl.arange(0, BD)
    mask = (rows < M)[:, None] & (columns < D)[None, :]
    rows = rows.to(tl.int64)[:, None]
    at = rows * D + columns[None, :]
    at_a = at + rows * D
    a = tl.load(p_x + at_a, mask=mask, other=0.0).to(tl.float32)
    b = tl.load(p_x + at_a + D, mask=mask, other=0.0).to(tl.float32)
    dy = tl.load(p_dy + at, mask=mask, other=0.0).to(tl.float32)
    s = tl.sigmoid(a)
    silu = a * s
    da = dy * b * (s + silu * (1 - s))
    tl.store(p_dx + at_a, da.to(p_dx.dtype.element_ty), mask=mask)
    tl.store(p_dx + at_a + D, (dy * silu).to(p_dx.dtype.element_ty), mask=mask)
    tl.store(p_y + at, (silu * b).to(p_y.dtype.element_ty), mask=mask)


@functools.lru_cache(maxsize=64)
def constants(width: int) -> Constants:
    """Constants of the kernels for a width D."""
    return Constants(D=width, BR=ROWS, BD=COLUMNS, num_warps=4)


def run(kernel, tensors: tuple[Tensor, ...], width: int, rows: int) -> None:
    """Launch a kernel over ``rows`` rows of ``width`` results."""
    if rows:
        grid = ceil_div(rows, ROWS), ceil_div(width, COLUMNS), 1
        launch(kernel, compile_key(*tensors), grid, (*tensors, rows), constants(width))


def activate(x: Tensor) -> Tensor:
    """silu(a) * b [rows, D] of x [..., 2 D], contiguous."""
    width = x.shape[-1] // 2
    y = x.new_empty(x.numel() // (2 * width), width)
    run(forward_kernel, (x, y), width, y.shape[0])
    return y


def activate_backward(dy: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """Gradient of x, of dy [rows, D], and y again."""
    dx, y = torch.empty_like(x), torch.empty_like(dy)
    run(backward_kernel, (dy, x, dx, y), *reversed(dy.shape))
    return dx, y


@operator(
    'swiglu(Tensor x, Tensor weight) -> Tensor',
    lambda x, weight: x.new_empty(*x.shape[:-1], weight.shape[0]),
)
def swiglu_op(x: Tensor, weight: Tensor) -> Tensor:
    """:func:`mmvig.ops.swiglu.swiglu` by Triton; arguments are validated and of one dtype."""
    return (activate(x.contiguous()) @ weight.t()).view(*x.shape[:-1], weight.shape[0])


@operator(
    'swiglu_backward(Tensor dz, Tensor x, Tensor weight) -> (Tensor, Tensor)',
    lambda dz, x, weight: empty_like_each(x, weight),
)
def swiglu_backward_op(dz: Tensor, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of :func:`swiglu_op`."""
    dz = dz.reshape(-1, weight.shape[0])
    dx, y = activate_backward(dz @ weight, x.contiguous())
    return dx, dz.t() @ y


differentiate('swiglu', swiglu_backward_op)
