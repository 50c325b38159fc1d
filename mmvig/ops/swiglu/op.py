"""Launches the kernels of SwiGLU and makes them PyTorch operators.

Importing this module imports Triton.
"""

import functools

import torch
from torch import Tensor

from mmvig.ops.launch import MAX_GRID, Constants, ceil_div, compile_key, launch, multiprocessors
from mmvig.ops.operator import differentiate, empty_like_each, operator
from mmvig.ops.swiglu.kernels import (
    backward_kernel,
    forward_kernel,
    project_backward_kernel,
    project_kernel,
)

# Rows and columns of a program.
ROWS, COLUMNS = 8, 256
# The widest inputs of products that are one kernel with the activation, forward and backward.
MAX_WIDTH, MAX_BACKWARD_WIDTH = 768, 256
# The widest inputs whose weights stay in shared memory, forward.
MAX_HELD = 192
# Compute capabilities with 163 KB of shared memory for a program or more; others have 99.
LARGE = {(8, 0), (9, 0), (10, 0), (10, 3)}


@functools.lru_cache(maxsize=64)
def constants(width: int) -> Constants:
    """Constants of the kernels for a width D."""
    return Constants(D=width, BM=ROWS, BD=COLUMNS, num_warps=4)


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


@functools.lru_cache(maxsize=8)
def fits(device: torch.device) -> bool:
    """Whether a device has the shared memory for the kernels with products."""
    return device.type != 'cuda' or torch.cuda.get_device_capability(device) in LARGE


def is_fused(x: Tensor, max_width: int) -> bool:
    """Whether the product of x and a weight is one kernel with the activation."""
    return x.element_size() == 2 and x.shape[1] <= max_width and fits(x.device)


def tiling(channels: int, width: int, keep: bool | None) -> dict:
    """Constants of the kernels with products, and ``each``: programs of a multiprocessor, 0 for all.

    ``keep`` is None for the backward pass. Forward, no tile depends on it, so that it changes no bits. The
    best of 158 variants on an H200.
    """
    back = keep is None
    if channels > (MAX_BACKWARD_WIDTH if back else MAX_HELD):
        tile = {'HELD': False, 'BC0': 64, 'BC1': 0, 'STAGES': 3, 'each': 0, 'BM': 128}
        tile |= {'num_warps': 8, 'maxnreg': 128}  # two programs fit
        columns = 64
    else:
        first = max(16, 1 << channels.bit_length() - 1)  # powers of two
        second = max(16, 1 << (channels - first - 1).bit_length()) if channels > first else 0
        stages, each = (2, 3) if back and channels <= 96 else (3, 1 if channels > 192 else 2)
        tile = {'HELD': True, 'BC0': first, 'BC1': second, 'STAGES': stages, 'each': each, 'BM': 64}
        tile |= {'num_warps': 4}
        columns = 32 if (96 if back else 128) < channels <= 192 else 64
    return {**tile, 'BD': min(columns, max(16, 1 << width.bit_length() - 1))}


@functools.lru_cache(maxsize=64)
def product_constants(channels: int, width: int, device: torch.device, keep: bool | None) -> tuple:
    """Constants of a kernel with a product, its tiles of columns, and most programs for each of them."""
    tile, form = tiling(channels, width, keep), {} if keep is None else {'KEEP': keep}
    columns, each = ceil_div(width, tile['BD']), tile.pop('each')
    programs = max(1, each * multiprocessors(device) // columns) if each else MAX_GRID
    return Constants(C=channels, D=width, **form, **tile, num_stages=tile['STAGES']), columns, programs


def run_product(kernel, tensors: tuple[Tensor, ...], width: int, keep: bool | None = None) -> None:
    """Launch a kernel with a product, whose rows the first tensor has; ``keep`` only forward."""
    rows, channels = tensors[0].shape
    if rows:
        chosen, columns, programs = product_constants(channels, width, tensors[0].device, keep)
        grid = columns, min(ceil_div(rows, chosen['BM']), programs), 1
        launch(kernel, compile_key(*tensors), grid, (*tensors, rows), chosen)


def project(y: Tensor, weight: Tensor, keep: bool) -> tuple[Tensor | None, Tensor]:
    """Return h = y W^T of y [M, C] and W [2 D, C], or None without ``keep``, and activate(h)."""
    if not is_fused(y, MAX_WIDTH):
        h = torch.mm(y, weight.t())
        return h if keep else None, activate(h)
    rows, width = y.shape[0], weight.shape[0] // 2
    activated = y.new_empty(rows, width)
    h = y.new_empty(rows, 2 * width) if keep else None
    run_product(project_kernel, (y, weight, h if keep else activated, activated), width, keep)
    return h, activated


def project_backward(dz: Tensor, weight: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
    """Return h's gradient, from dz [M, C] and W [C, D] in z = activate(h) W^T, and activate(h) again."""
    if not is_fused(dz, MAX_BACKWARD_WIDTH):
        return activate_backward(torch.mm(dz, weight), h)
    dh, activated = torch.empty_like(h), h.new_empty(h.shape[0], weight.shape[1])
    run_product(project_backward_kernel, (dz.contiguous(), weight, h, dh, activated), weight.shape[1])
    return dh, activated


@operator(lambda x, weight: x.new_empty(*x.shape[:-1], weight.shape[0]))
def swiglu_op(x: Tensor, weight: Tensor) -> Tensor:
    """:func:`mmvig.ops.swiglu.swiglu` by Triton; arguments are validated and of one dtype."""
    return (activate(x.contiguous()) @ weight.t()).view(*x.shape[:-1], weight.shape[0])


@operator(lambda dz, x, weight: empty_like_each(x, weight))
def swiglu_backward_op(dz: Tensor, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of :func:`swiglu_op`."""
    dz = dz.reshape(-1, weight.shape[0])
    dx, y = activate_backward(dz @ weight, x.contiguous())
    return dx, dz.t() @ y


differentiate('swiglu', swiglu_backward_op)
