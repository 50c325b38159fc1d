"""Depthwise 3x3 convolution by Triton: programs walk down strips of a map, row by row."""

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
    launch,
    multiprocessors,
    operator,
)

# Elements of a tile of columns by channels, and the most channels of one.
TILE, BACKWARD_TILE, MAX_CHANNELS = 1024, 512, 128
# Programs that each multiprocessor should get, if maps are large enough for strips of MIN_ROWS rows.
FILL, MIN_ROWS = 16, 8


@triton.jit
def load_row(p_first, h, of_row, inside, columns, H, W, C: tl.constexpr):
    """Row h at the columns left of, at and right of each; zeros outside the map."""
    p_row = p_first + h * of_row
    inside = inside & (h >= 0) & (h < H)
    left = tl.load(p_row - C, mask=inside & (columns > 0), other=0.0)
    middle = tl.load(p_row, mask=inside, other=0.0)
    right = tl.load(p_row + C, mask=inside & (columns < W - 1), other=0.0)
    return left, middle, right


@triton.jit
def load_tap(p_w, channels, of_channel, i: tl.constexpr):
    """The weights [1, BC] of tap i of 9."""
    return tl.load(p_w + channels * 9 + i, mask=of_channel, other=0.0).to(tl.float32)


@triton.jit
def begin(p_w, H, W, R, C: tl.constexpr, BW: tl.constexpr, BC: tl.constexpr):
    """What both kernels begin with.

    A program's columns, which of its tile exist, its first and last row, the step of a row, where row 0 of
    the tile is, the number of the strip, and the weights.
    """
    blocks: tl.constexpr = (C + BC - 1) // BC
    i_strip = tl.program_id(0) // blocks  # of columns, of a map
    across = tl.cdiv(W, BW)
    columns = (i_strip % across * BW + tl.arange(0, BW))[:, None]
    channels = (tl.program_id(0) % blocks * BC + tl.arange(0, BC))[None, :]
    of_channel = channels < C
    first = tl.program_id(1) * R
    last = tl.minimum(first + R, H) - 1
    of_row = W.to(tl.int64) * C
    at = i_strip // across * H * of_row + columns * C + channels
    strip = i_strip * tl.num_programs(1) + tl.program_id(1)
    return (
        columns, (columns < W) & of_channel, first, last, of_row, at, strip,
        load_tap(p_w, channels, of_channel, 0),
        load_tap(p_w, channels, of_channel, 1),
        load_tap(p_w, channels, of_channel, 2),
        load_tap(p_w, channels, of_channel, 3),
        load_tap(p_w, channels, of_channel, 4),
        load_tap(p_w, channels, of_channel, 5),
        load_tap(p_w, channels, of_channel, 6),
        load_tap(p_w, channels, of_channel, 7),
        load_tap(p_w, channels, of_channel, 8),
    )  # fmt: skip


@triton.jit(do_not_specialize=['H', 'W', 'R'])
def forward_kernel(
    p_x, p_w, p_y, p_u, H, W, R, C: tl.constexpr, BW: tl.constexpr, BC: tl.constexpr, ACT: tl.constexpr,
    KEEP: tl.constexpr,
):  # fmt: skip
    """Make R rows of y [B, H, W, C] at BW columns and BC channels; ACT: of u = silu(y), KEEP: and of y."""
    columns, inside, first, last, of_row, at, _, w0, w1, w2, w3, w4, w5, w6, w7, w8 = begin(
        p_w, H, W, R, C, BW, BC
    )
    # What the rows read so far give to the rows above the present one, and at it.
    above = tl.zeros([BW, BC], tl.float32)
    here = tl.zeros([BW, BC], tl.float32)
    next_left, next_mid, next_right = load_row(p_x + at, first - 1, of_row, inside, columns, H, W, C)
    for h in range(first - 1, last + 2):
        left, middle, right = next_left.to(tl.float32), next_mid.to(tl.float32), next_right.to(tl.float32)
        # A row ahead, so that it is under way while this one is used.
        next_left, next_mid, next_right = load_row(p_x + at, h + 1, of_row, inside, columns, H, W, C)
        above += w6 * left + w7 * middle + w8 * right
        there = at + (h - 1) * of_row
        y = above.to(p_y.dtype.element_ty)
        if KEEP:
            tl.store(p_y + there, y, mask=inside & (h > first))
        if ACT:
            y = y.to(tl.float32)
            u = (y / (1 + tl.exp(-y))).to(p_u.dtype.element_ty)
            tl.store(p_u + there, u, mask=inside & (h > first))
        above = here + (w3 * left + w4 * middle + w5 * right)
        here = w0 * left + w1 * middle + w2 * right


@triton.jit(do_not_specialize=['H', 'W', 'R'])
def backward_kernel(
    p_dy, p_x, p_w, p_dx, p_dw, H, W, R, C: tl.constexpr, BW: tl.constexpr, BC: tl.constexpr
):  # fmt: skip
    """Make R rows of dx at BW columns and BC channels, and their share of the weight's gradient.

    dx[h, w] = sum_ij weight[i, j] * dy[h + 1 - i, w + 1 - j]
    dw[i, j] = sum_hw x[h, w] * dy[h + 1 - i, w + 1 - j]

    A row of dy serves the rows of dx and x above, at and below it. dw is [strips, C, 9].
    """
    columns, inside, first, last, of_row, at, strip, w0, w1, w2, w3, w4, w5, w6, w7, w8 = begin(
        p_w, H, W, R, C, BW, BC
    )
    d0 = tl.zeros([BW, BC], tl.float32)
    d1 = tl.zeros([BW, BC], tl.float32)
    d2 = tl.zeros([BW, BC], tl.float32)
    d3 = tl.zeros([BW, BC], tl.float32)
    d4 = tl.zeros([BW, BC], tl.float32)
    d5 = tl.zeros([BW, BC], tl.float32)
    d6 = tl.zeros([BW, BC], tl.float32)
    d7 = tl.zeros([BW, BC], tl.float32)
    d8 = tl.zeros([BW, BC], tl.float32)
    above = tl.zeros([BW, BC], tl.float32)
    here = tl.zeros([BW, BC], tl.float32)
    x_above = tl.zeros([BW, BC], tl.float32)
    x_here = tl.zeros([BW, BC], tl.float32)
    next_left, next_mid, next_right = load_row(p_dy + at, first - 1, of_row, inside, columns, H, W, C)
    next_x = tl.load(p_x + at + first * of_row, mask=inside, other=0.0)
    for h in range(first - 1, last + 2):
        left, middle, right = next_left.to(tl.float32), next_mid.to(tl.float32), next_right.to(tl.float32)
        x_below = next_x.to(tl.float32)
        next_left, next_mid, next_right = load_row(p_dy + at, h + 1, of_row, inside, columns, H, W, C)
        next_x = tl.load(p_x + at + (h + 2) * of_row, mask=inside & (h + 1 < last), other=0.0)
        above += w0 * right + w1 * middle + w2 * left
        p_out = p_dx + at + (h - 1) * of_row
        tl.store(p_out, above.to(p_dx.dtype.element_ty), mask=inside & (h > first))
        above = here + (w3 * right + w4 * middle + w5 * left)
        here = w6 * right + w7 * middle + w8 * left
        d0 += x_above * right
        d1 += x_above * middle
        d2 += x_above * left
        d3 += x_here * right
        d4 += x_here * middle
        d5 += x_here * left
        d6 += x_below * right
        d7 += x_below * middle
        d8 += x_below * left
        x_above = x_here
        x_here = x_below

    blocks: tl.constexpr = (C + BC - 1) // BC
    channels = tl.program_id(0) % blocks * BC + tl.arange(0, BC)
    p_dw += strip.to(tl.int64) * (C * 9) + channels * 9
    tl.store(p_dw, tl.sum(d0, axis=0), mask=channels < C)
    tl.store(p_dw + 1, tl.sum(d1, axis=0), mask=channels < C)
    tl.store(p_dw + 2, tl.sum(d2, axis=0), mask=channels < C)
    tl.store(p_dw + 3, tl.sum(d3, axis=0), mask=channels < C)
    tl.store(p_dw + 4, tl.sum(d4, axis=0), mask=channels < C)
    tl.store(p_dw + 5, tl.sum(d5, axis=0), mask=channels < C)
    tl.store(p_dw + 6, tl.sum(d6, axis=0), mask=channels < C)
    tl.store(p_dw + 7, tl.sum(d7, axis=0), mask=channels < C)
    tl.store(p_dw + 8, tl.sum(d8, axis=0), mask=channels < C)


@functools.lru_cache(maxsize=64)
def constants_of(channels: int, columns: int, block: int, **more) -> Constants:
    """Constants of both kernels."""
    return Constants(C=channels, BW=columns, BC=block, num_warps=4, **more)


@functools.lru_cache(maxsize=1024)
def divide(shape: torch.Size, tile: int, device: torch.device, **more) -> tuple[dict, tuple, int]:
    """Constants (and ``more``), the grid (maps by columns by channels, strips of rows), rows of a strip."""
    batch, height, width, channels = shape
    block = MAX_CHANNELS
    while block > 32 and channels % block:
        block //= 2
    constants = constants_of(channels, tile // block, block, **more)
    programs = batch * ceil_div(width, constants['BW']) * ceil_div(channels, block)
    strips = ceil_div(FILL * multiprocessors(device), programs)
    rows = max(min(MIN_ROWS, height), ceil_div(height, strips))
    return constants, (programs, ceil_div(height, rows), 1), rows


def forward(x: Tensor, weight: Tensor, act: bool = False, keep: bool = True) -> tuple[Tensor, Tensor]:
    """The convolution y of x [B, H, W, C], and u = silu(y) with ``act``, else y again.

    ``keep``: whether y is needed besides u; else it is u again. ViG-T's silu so needs no pass of its own
    (what that gains has not been measured apart).
    """
    x, weight = x.contiguous(), weight.contiguous()
    u = torch.empty_like(x)
    y = torch.empty_like(x) if act and keep else u
    if u.numel():
        constants, grid, rows = divide(x.shape, TILE, x.device, ACT=act, KEEP=keep or not act)
        arguments = (x, weight, y, u, *x.shape[1:3], rows)
        launch(forward_kernel, compile_key(x, weight, y, u), grid, arguments, constants)
    return y, u


def backward(dy: Tensor, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Gradient of x, and programs' shares of the weight's [., C, 1, 3, 3] in float32."""
    dy, x, weight = dy.contiguous(), x.contiguous(), weight.contiguous()
    dx = torch.empty_like(x)
    if not dx.numel():
        return dx, x.new_empty(0, *weight.shape, dtype=torch.float32)
    constants, grid, rows = divide(x.shape, BACKWARD_TILE, x.device)
    strips = grid[0] // ceil_div(x.shape[3], constants['BC']) * grid[1]
    dw = x.new_empty(strips, *weight.shape, dtype=torch.float32)
    arguments = (dy, x, weight, dx, dw, *x.shape[1:3], rows)
    launch(backward_kernel, compile_key(dy, x, weight, dx), grid, arguments, constants)
    return dx, dw


@operator('dwconv3x3(Tensor x, Tensor weight) -> Tensor', lambda x, weight: x.new_empty(x.shape))
def dwconv3x3_op(x: Tensor, weight: Tensor) -> Tensor:
    """:func:`mmvig.ops.dwconv.dwconv3x3` by Triton; arguments are validated."""
    return forward(x, weight)[0]


@operator(
    'dwconv3x3_backward(Tensor dy, Tensor x, Tensor weight) -> (Tensor, Tensor)',
    lambda dy, x, weight: (x.new_empty(x.shape), weight.new_empty(weight.shape)),
)
def dwconv3x3_backward_op(dy: Tensor, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of :func:`dwconv3x3_op`."""
    dx, dw = backward(dy, x, weight)
    return dx, dw.sum(0).to(weight.dtype)


differentiate('dwconv3x3', dwconv3x3_backward_op)
