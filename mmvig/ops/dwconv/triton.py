"""Depthwise 3x3 convolution by Triton: threads walk down strips of a map, some columns at two channels."""

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
    launch,
    multiprocessors,
    operator,
)

# Tuples in kernels: tried with 3.3.1, 3.4, 3.6 and 3.8.
OLDEST_TRITON = 3, 3
# Columns of a strip: the first number that divides a map's, else the last.
COLUMNS = 7, 4
# Rows under way while one is made, warps of a program, channels of a thread, the most of a program, and the
# tiles that a multiprocessor should get, if maps are large enough for strips of MIN_ROWS rows.
FORWARD = {'AHEAD': 1, 'num_warps': 4, 'channels': 2, 'block': 64, 'fill': 8}
BACKWARD = {'AHEAD': 1, 'num_warps': 4, 'channels': 2, 'block': 64, 'fill': 8}
MIN_ROWS = 7
# Programs of the backward pass that a multiprocessor has room for (registers), which share its tiles.
RESIDENT = 3


@triton.jit
def begin(p_w, C: tl.constexpr, BC: tl.constexpr):
    """A program's channels [1, BC], which of them exist, and the weights [1, BC] of the nine taps."""
    blocks: tl.constexpr = (C + BC - 1) // BC
    channels = (tl.program_id(0) % blocks * BC + tl.arange(0, BC))[None, :]
    of_channel = channels < C
    w = ()
    for tap in tl.static_range(9):
        w += (tl.load(p_w + channels * 9 + tap, mask=of_channel, other=0.0).to(tl.float32),)
    return channels, of_channel, w


@triton.jit
def place(tile, strips, H, W, R, C: tl.constexpr, COLUMNS: tl.constexpr, BS: tl.constexpr):
    """First row and column, row after the last, and place of a tile's strips [BS, 1]; which exist."""
    strip = (tile * BS + tl.arange(0, BS))[:, None]
    across = tl.cdiv(W, COLUMNS)
    down = tl.cdiv(H, R)
    row = strip // across % down * R
    column = strip % across * COLUMNS
    at = ((strip // across // down).to(tl.int64) * H + row) * W + column
    return row, column, tl.minimum(row + R, H), at * C, strip < strips


@triton.jit
def load_row(p_row, mask, column, W, C: tl.constexpr, COLUMNS: tl.constexpr, HALO: tl.constexpr):
    """A strip's columns in a row, and HALO more on either side; zeros outside the map."""
    pixels = ()
    for j in tl.static_range(-HALO, COLUMNS + HALO):
        there = mask & (column > 0) if j < 0 else mask & (column + j < W)
        pixels += (tl.load(p_row + j * C, mask=there, other=0.0),)
    return pixels


@triton.jit
def widen(pixels, N: tl.constexpr):
    """N pixels in float32."""
    wide = ()
    for j in tl.static_range(N):
        wide += (pixels[j].to(tl.float32),)
    return wide


@triton.jit(do_not_specialize=['strips', 'H', 'W', 'R'])
def forward_kernel(
    p_x, p_w, p_y, p_u, strips, H, W, R, C: tl.constexpr, COLUMNS: tl.constexpr, AHEAD: tl.constexpr,
    BS: tl.constexpr, BC: tl.constexpr, ACT: tl.constexpr, KEEP: tl.constexpr,
):  # fmt: skip
    """Make BS strips of R rows of y [B, H, W, C] at BC channels; ACT: of u = silu(y), KEEP: and of y."""
    channels, of_channel, w = begin(p_w, C, BC)
    tile = tl.program_id(0) // ((C + BC - 1) // BC)
    row, column, end, at, exists = place(tile, strips, H, W, R, C, COLUMNS, BS)
    at += channels
    mask = exists & of_channel
    last = tl.minimum(end, H - 1)  # that is read
    of_row = W.to(tl.int64) * C
    above = widen(load_row(p_x + at - of_row, mask & (row > 0), column, W, C, COLUMNS, 1), COLUMNS + 2)
    here = widen(load_row(p_x + at, mask, column, W, C, COLUMNS, 1), COLUMNS + 2)
    coming = ()
    for i in tl.static_range(1, AHEAD + 1):
        coming += (load_row(p_x + at + i * of_row, mask & (row + i <= last), column, W, C, COLUMNS, 1),)
    for _ in range(R):
        below = widen(coming[0], COLUMNS + 2)
        p_row = p_x + at + (AHEAD + 1) * of_row
        of_next = mask & (row + (AHEAD + 1) <= last)
        coming = coming[1:]
        coming += (load_row(p_row, of_next, column, W, C, COLUMNS, 1),)
        x = above, here, below
        for j in tl.static_range(COLUMNS):
            total = tl.zeros([BS, BC], tl.float32)
            for tap in tl.static_range(9):
                total += x[tap // 3][j + tap % 3] * w[tap]
            there = mask & (row < H) & (column + j < W)
            y = total.to(p_y.dtype.element_ty)
            if KEEP:
                tl.store(p_y + at + j * C, y, mask=there)
            if ACT:
                y = y.to(tl.float32)
                u = (y * sigmoid(y)).to(p_u.dtype.element_ty)
                tl.store(p_u + at + j * C, u, mask=there)
        above = here
        here = below
        at += of_row
        row += 1


@triton.jit(do_not_specialize=['strips', 'H', 'W', 'R'])
def backward_kernel(
    p_dy, p_x, p_w, p_dx, p_dw, strips, H, W, R, C: tl.constexpr, COLUMNS: tl.constexpr,
    AHEAD: tl.constexpr, BS: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """Make dx at every n-th tile of BS strips and BC channels, and their share of the weight's gradient.

    dx[h, w] = sum_ij weight[i, j] * dy[h + 1 - i, w + 1 - j]
    dw[i, j] = sum_hw x[h, w] * dy[h + 1 - i, w + 1 - j]

    n is the number of shares; dw is [n, C, 9].
    """
    channels, of_channel, w = begin(p_w, C, BC)
    blocks: tl.constexpr = (C + BC - 1) // BC
    share = tl.program_id(0) // blocks
    of_row = W.to(tl.int64) * C
    dw = (tl.zeros([BS, BC], tl.float32),) * 9
    for tile in range(share, tl.cdiv(strips, BS), tl.num_programs(0) // blocks):
        row, column, end, at, exists = place(tile, strips, H, W, R, C, COLUMNS, BS)
        at += channels
        mask = exists & of_channel
        last = tl.minimum(end, H - 1)  # of dy that is read
        above = widen(load_row(p_dy + at - of_row, mask & (row > 0), column, W, C, COLUMNS, 1), COLUMNS + 2)
        here = widen(load_row(p_dy + at, mask, column, W, C, COLUMNS, 1), COLUMNS + 2)
        coming = ()
        coming_x = ()
        for i in tl.static_range(AHEAD):
            p_row = p_dy + at + (i + 1) * of_row
            coming += (load_row(p_row, mask & (row + (i + 1) <= last), column, W, C, COLUMNS, 1),)
            p_row = p_x + at + i * of_row
            coming_x += (load_row(p_row, mask & (row + i < end), column, W, C, COLUMNS, 0),)
        for _ in range(R):
            below = widen(coming[0], COLUMNS + 2)
            x = widen(coming_x[0], COLUMNS)
            p_row = p_dy + at + (AHEAD + 1) * of_row
            of_next = mask & (row + (AHEAD + 1) <= last)
            coming = coming[1:]
            coming += (load_row(p_row, of_next, column, W, C, COLUMNS, 1),)
            p_row = p_x + at + AHEAD * of_row
            coming_x = coming_x[1:]
            coming_x += (load_row(p_row, mask & (row + AHEAD < end), column, W, C, COLUMNS, 0),)
            dy = below, here, above
            for j in tl.static_range(COLUMNS):
                dx = tl.zeros([BS, BC], tl.float32)
                sums = ()
                for tap in tl.static_range(9):
                    of_dy = dy[tap // 3][j + 2 - tap % 3]
                    dx += of_dy * w[tap]
                    sums += (dw[tap] + of_dy * x[j],)
                dw = sums
                there = mask & (row < H) & (column + j < W)
                tl.store(p_dx + at + j * C, dx.to(p_dx.dtype.element_ty), mask=there)
            above = here
            here = below
            at += of_row
            row += 1
    channels = tl.program_id(0) % blocks * BC + tl.arange(0, BC)
    p_dw += share.to(tl.int64) * (C * 9) + channels * 9
    for tap in tl.static_range(9):
        tl.store(p_dw + tap, tl.sum(dw[tap], axis=0), mask=channels < C)


@functools.lru_cache(maxsize=64)
def constants_of(C: int, columns: int, channels: int, block: int, num_warps: int, **more) -> Constants:
    """Constants of both kernels."""
    while C % block and block > 32:
        block //= 2
    strips = 32 * num_warps * channels // block
    return Constants(C=C, COLUMNS=columns, BS=strips, BC=block, num_warps=num_warps, **more)


@functools.lru_cache(maxsize=1024)
def divide(shape: torch.Size, device: torch.device, fill: int, **form) -> tuple[Constants, tuple, int, int]:
    """Constants, numbers of strips and of their rows, of tiles of strips, of programs for one of these."""
    batch, height, width, channels = shape
    columns = next((x for x in COLUMNS if width % x == 0), COLUMNS[-1])
    constants = constants_of(channels, columns, **form)
    blocks = ceil_div(channels, constants['BC'])
    across, most = batch * ceil_div(width, columns), ceil_div(height, MIN_ROWS)
    down = min(most, ceil_div(fill * multiprocessors(device) * constants['BS'], across * blocks))
    down = next((x for x in range(down, most + 1) if height % x == 0), down)  # or the last is shorter
    rows = ceil_div(height, down)
    strips = across * ceil_div(height, rows)
    return constants, (strips, height, width, rows), ceil_div(strips, constants['BS']), blocks


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
