"""Launches the kernels of norms and makes them PyTorch operators.

Importing this module imports Triton.
"""

import functools

import torch
import triton
from torch import Tensor

from mmvig.ops.launch import Constants, ceil_div, compile_key, launch, multiprocessors
from mmvig.ops.norm.kernels import backward_kernel, forward_kernel
from mmvig.ops.operator import differentiate, operator

# Elements of a tile. Of the backward pass, whose programs sum up the weights' gradients: also the tiles
# under way at once, and programs a multiprocessor.
TILE, BACKWARD_TILE, STAGES, FILL = 2048, 2048, 3, 2


@functools.lru_cache(maxsize=256)
def constants(
    width: int, back: bool, eps: float, rms: bool, act: str, add: bool, scaled: bool, *others: bool
):
    """Constants of a kernel."""
    block = triton.next_power_of_2(width)
    first, shifted = others
    form = {'BM': max(1, (BACKWARD_TILE if back else TILE) // block), **({'AHEAD': STAGES} if back else {})}
    return Constants(
        C=width, EPS=eps, RMS=rms, ACT=act, USE_BRANCH=add, USE_SCALE=scaled, CHANNELS_FIRST=first,
        USE_SHIFT=shifted, **form, BC=block, num_warps=4 if block <= 2048 else 8,
    )  # fmt: skip


def forward(x, branch, scale, weight, bias, eps, dtype, act, first, shift=None):
    """The sum (None where there is no branch) and its norm."""
    x, branch, scale, weight, bias, shift = contiguous(x, branch, scale, weight, bias, shift)
    batch, height, width, channels = x.shape
    s = None if branch is None else torch.empty_like(x)
    if first:
        y = x.new_empty((batch, channels, height, width), dtype=dtype)
    else:
        y = torch.empty_like(x, dtype=dtype)
    if y.numel():
        rows = batch * height * width
        options = constants(
            channels, False, eps, bias is None, act, branch is not None, scale is not None,
            first, shift is not None,
        )  # fmt: skip
        tensors = [x if each is None else each for each in (x, branch, scale, weight, bias, shift, s, y)]
        grid = ceil_div(rows, options['BM']), 1, 1
        launch(forward_kernel, compile_key(*tensors), grid, (*tensors, rows, height * width), options)
    return s, y


def backward(ds, dy, s, scale, weight, bias, eps, act, first, branch_dtype, shift=None):
    """dx, the branch's gradient (None where there is no ds), and programs' shares of dw [1 to 3, ., C]."""
    ds, dy, s, scale, weight, bias, shift = contiguous(ds, dy, s, scale, weight, bias, shift)
    batch, height, width, channels = s.shape
    dx = torch.empty_like(s)
    dbranch = None if ds is None else torch.empty_like(s, dtype=branch_dtype)
    rows = batch * height * width
    options = constants(
        channels, True, eps, bias is None, act, ds is not None, scale is not None,
        first, shift is not None,
    )  # fmt: skip
    programs = min(ceil_div(rows, options['BM']), FILL * multiprocessors(s.device))
    kinds = 1 + (bias is not None) + (shift is not None)
    dw = s.new_empty(kinds, programs, channels, dtype=torch.float32)
    if programs:
        tensors = ds, dy, s, scale, weight, bias, shift, dx, dbranch
        tensors = [s if each is None else each for each in tensors]
        arguments = (*tensors, dw, rows, height * width)
        launch(backward_kernel, compile_key(*tensors), (programs, 1, 1), arguments, options)
    return dx, dbranch, dw


def contiguous(*tensors: Tensor | None) -> list[Tensor | None]:
    """The tensors, copied where they are not contiguous."""
    return [None if x is None else x.contiguous() for x in tensors]


def of_weights(dw: Tensor, *weights: Tensor | None) -> tuple[Tensor | None, ...]:
    """Gradients of weight, bias and shift in their dtypes, of dw in float32."""
    rows = iter(dw)
    return tuple(None if weight is None else next(rows).to(weight.dtype) for weight in weights)


def shape_of(x: Tensor, first: bool) -> tuple[int, ...]:
    """The shape of maps like ``x``, with channels first or last."""
    batch, height, width, channels = x.shape
    return (batch, channels, height, width) if first else (batch, height, width, channels)


@operator(lambda x, w, b, shift, eps, dtype, act, first: x.new_empty(shape_of(x, first), dtype=dtype))
def norm_op(
    x: Tensor, weight: Tensor, bias: Tensor | None, shift: Tensor | None, eps: float, dtype:
    torch.dtype, act: str, first: bool,
) -> Tensor:  # fmt: skip
    """:func:`mmvig.ops.norm.norm` by Triton; arguments are validated."""
    return forward(x, None, None, weight, bias, eps, dtype, act, first, shift)[1]


@operator(lambda dy, x, weight, bias, shift, *rest: (x.new_empty(x.shape), _fake_dw(weight, bias, shift)))
def norm_backward_op(
    dy: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, shift: Tensor | None, eps: float, act:
    str, first: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Gradients of :func:`norm_op`, those of the weights side by side in float32."""
    dx, _, dw = backward(None, dy, x, None, weight, bias, eps, act, first, None, shift)
    return dx, dw.sum(1)


@operator(
    lambda x, branch, scale, weight, bias, eps, dtype, first: (
        x.new_empty(x.shape),
        x.new_empty(shape_of(x, first), dtype=dtype),
    )
)
def add_norm_op(
    x: Tensor, branch: Tensor, scale: Tensor | None, weight: Tensor, bias: Tensor | None, eps: float,
    dtype: torch.dtype, first: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """:func:`mmvig.ops.norm.add_norm` by Triton; arguments are validated."""
    return forward(x, branch, scale, weight, bias, eps, dtype, 'none', first)


@operator(
    lambda ds, dy, s, scale, weight, bias, eps, first, branch_dtype: (
        s.new_empty(s.shape),
        s.new_empty(s.shape, dtype=branch_dtype),
        _fake_dw(weight, bias),
    )
)
def add_norm_backward_op(
    ds: Tensor, dy: Tensor, s: Tensor, scale: Tensor | None, weight: Tensor, bias: Tensor | None, eps:
    float, first: bool, branch_dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of :func:`add_norm_op`, those of the weights side by side in float32."""
    dx, dbranch, dw = backward(ds, dy, s, scale, weight, bias, eps, 'none', first, branch_dtype)
    return dx, dbranch, dw.sum(1)


def _fake_dw(*weights: Tensor | None) -> Tensor:
    kinds = sum(weight is not None for weight in weights)
    return weights[0].new_empty(kinds, weights[0].shape[0], dtype=torch.float32)


def _norm_backward(dy, x, weight, bias, shift, eps, dtype, act, first):
    dx, dw = norm_backward_op(dy, x, weight, bias, shift, eps, act, first)
    return dx, *of_weights(dw, weight, bias, shift)


def _keep_sum(inputs, output):
    _, branch, scale, weight, bias, eps, _, first = inputs
    return (output[0], scale, weight, bias), (eps, first, branch.dtype)


def _add_norm_backward(ds, dy, s, scale, weight, bias, eps, first, branch_dtype):
    dx, dbranch, dw = add_norm_backward_op(ds, dy, s, scale, weight, bias, eps, first, branch_dtype)
    return dx, dbranch, None, *of_weights(dw, weight, bias)


differentiate('norm', _norm_backward)
differentiate('add_norm', _add_norm_backward, _keep_sum)
