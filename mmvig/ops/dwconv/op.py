"""Launches the kernels of the depthwise convolution and makes them PyTorch operators.

Importing this module imports Triton.
"""

import functools

import torch
from torch import Tensor

from mmvig.ops.dwconv.kernels import COLUMNS, backward_kernel, forward_kernel
from mmvig.ops.launch import Constants, ceil_div, compile_key, launch, multiprocessors
from mmvig.ops.operator import differentiate, empty_like_each, operator

# Tuples in kernels: tried with 3.3.1, 3.4, 3.6 and 3.8.
OLDEST_TRITON = 3, 3
# Rows under way while one is made, warps of a program, channels of a thread, the most of a program, and the
# tiles that a multiprocessor should get, if maps are large enough for strips of MIN_ROWS rows.
FORWARD = {'AHEAD': 1, 'num_warps': 4, 'channels': 2, 'block': 64, 'fill': 8}
BACKWARD = {'AHEAD': 1, 'num_warps': 4, 'channels': 2, 'block': 64, 'fill': 8}
MIN_ROWS = 7
# Programs of the backward pass that a multiprocessor has room for (registers), which share its tiles.
RESIDENT = 3


@functools.lru_cache(maxsize=64)
def constants_of(C: int, channels: int, block: int, num_warps: int, **more) -> Constants:
    """Constants of both kernels."""
    while C % block and block > 32:
        block //= 2
    strips = 32 * num_warps * channels // block
    return Constants(C=C, COLUMNS=COLUMNS, BP=strips, BC=block, num_warps=num_warps, **more)


@functools.lru_cache(maxsize=1024)
def divide(shape: torch.Size, device: torch.device, fill: int, **form) -> tuple[Constants, tuple, int, int]:
    """Constants, numbers of strips and of their rows, of tiles of strips, of programs for one of these."""
    batch, height, width, channels = shape
    constants = constants_of(channels, **form)
    blocks = ceil_div(channels, constants['BC'])
    across, most = batch * ceil_div(width, COLUMNS), ceil_div(height, MIN_ROWS)
    down = min(most, ceil_div(fill * multiprocessors(device) * constants['BP'], across * blocks))
    down = next((x for x in range(down, most + 1) if height % x == 0), down)  # or the last is shorter
    rows = ceil_div(height, down)
    strips = across * ceil_div(height, rows)
    return constants, (strips, height, width, rows), ceil_div(strips, constants['BP']), blocks


def forward(x: Tensor, weight: Tensor, act: bool = False, keep: bool = True) -> tuple[Tensor, Tensor]:
    """The convolution y of x [B, H, W, C], and u = silu(y) with ``act``, else y again.

    ``keep``: whether y is needed besides u; else it is u again. ViG-T's silu so needs no pass of its own
    (what that gains has not been measured apart).
    """
    x, weight = x.contiguous(), weight.contiguous()
    u = torch.empty_like(x)
    y = torch.empty_like(x) if act and keep else u
    if u.numel():
        options = {'ACT': act, 'KEEP': keep or not act}
        constants, sizes, tiles, blocks = divide(x.shape, x.device, **options, **FORWARD)
        arguments = (x, weight, y, u, *sizes)
        launch(forward_kernel, compile_key(x, weight, y, u), (tiles * blocks, 1, 1), arguments, constants)
    return y, u


def backward(dy: Tensor, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Gradient of x, and programs' shares of the weight's [., C, 1, 3, 3] in float32."""
    dy, x, weight = dy.contiguous(), x.contiguous(), weight.contiguous()
    dx = torch.empty_like(x)
    if not dx.numel():
        return dx, x.new_empty(0, *weight.shape, dtype=torch.float32)
    constants, sizes, tiles, blocks = divide(x.shape, x.device, **BACKWARD)
    # As many tiles for each share, as far as possible.
    shares = ceil_div(tiles, ceil_div(tiles * blocks, RESIDENT * multiprocessors(x.device)))
    dw = x.new_empty(shares, *weight.shape, dtype=torch.float32)
    arguments = (dy, x, weight, dx, dw, *sizes)
    launch(backward_kernel, compile_key(dy, x, weight, dx), (shares * blocks, 1, 1), arguments, constants)
    return dx, dw


@operator(lambda x, weight: x.new_empty(x.shape))
def dwconv3x3_op(x: Tensor, weight: Tensor) -> Tensor:
    """:func:`mmvig.ops.dwconv.dwconv3x3` by Triton; arguments are validated."""
    return forward(x, weight)[0]


@operator(lambda dy, x, weight: empty_like_each(x, weight))
def dwconv3x3_backward_op(dy: Tensor, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of :func:`dwconv3x3_op`."""
    dx, dw = backward(dy, x, weight)
    return dx, dw.sum(0).to(weight.dtype)


differentiate('dwconv3x3', dwconv3x3_backward_op)
