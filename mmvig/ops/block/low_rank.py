"""Backward pass of a projection y = x W^T + b from few channels x, in one pass over y's gradient.

One launch instead of five for the decay gates of a block; with BiGLA's walks, 47.2 to 43.9 ms of GPU time
in a training step of ViG-H-S at 224 x 224, batch 128, on an H200.

Importing this module imports Triton.
"""

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from mmvig.ops.launch import INTERPRETED, Constants, ceil_div, compile_key, launch, multiprocessors

# Columns of a tile, its rows where there are many and where there are few, and programs a multiprocessor.
COLUMNS, MANY_ROWS, FEW_ROWS, FILL = 64, 128, 32, 2
WIDEN = tl.constexpr(INTERPRETED)  # the interpreter has no product of bf16


@triton.jit(do_not_specialize=['M'])
def backward_kernel(
    p_dy, p_x, p_weight, p_dx, p_dw, M, C: tl.constexpr, R: tl.constexpr, S_X: tl.constexpr,
    S_DX: tl.constexpr, BR: tl.constexpr, BM: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """Make dx [M, R] of dy [M, C], and this program's share of dw, [C, R] and the bias' [C] after it.

    Rows of x and dx are S_X and S_DX apart. Both products are transposed, with R rows: too few for Hopper's
    own instructions, which Triton 3.6 has trouble with.
    """
    dtype: tl.constexpr = tl.float32 if WIDEN else p_dy.dtype.element_ty
    precision: tl.constexpr = 'tf32x3'  # of float32; halves need none
    ranks = tl.arange(0, BR)[:, None]
    p_dw += tl.program_id(0).to(tl.int64) * (C * R + C)
    for i in range(tl.program_id(0), tl.cdiv(M, BM), tl.num_programs(0)):
        rows = i * BM + tl.arange(0, BM)
        row = rows.to(tl.int64)
        of_rank = (ranks < R) & (rows < M)[None, :]
        x = tl.load(p_x + row[None, :] * S_X + ranks, mask=of_rank, other=0.0).to(dtype)  # [R, M]
        dx = tl.zeros([BR, BM], tl.float32)
        for start in range(0, C, BC):
            columns = start + tl.arange(0, BC)
            inside = columns < C
            mask = (rows < M)[:, None] & inside[None, :]
            dy = tl.load(p_dy + row[:, None] * C + columns[None, :], mask=mask, other=0.0).to(dtype)
            at = columns[None, :] * R + ranks
            of_weight = (ranks < R) & inside[None, :]
            weight = tl.load(p_weight + at, mask=of_weight, other=0.0).to(dtype)
            dx = tl.dot(weight, tl.trans(dy), dx, input_precision=precision)
            dw = tl.dot(x, dy, input_precision=precision)
            db = tl.sum(dy.to(tl.float32), axis=0)
            # Added to what earlier tiles gave: registers do not hold it for all columns.
            again = i >= tl.num_programs(0)
            dw += tl.load(p_dw + at, mask=of_weight & again, other=0.0)
            db += tl.load(p_dw + C * R + columns, mask=inside & again, other=0.0)
            tl.store(p_dw + at, dw, mask=of_weight)
            tl.store(p_dw + C * R + columns, db, mask=inside)
        tl.store(p_dx + row[None, :] * S_DX + ranks, dx.to(p_dx.dtype.element_ty), mask=of_rank)
        tl.debug_barrier()  # the next tile's loads are not of the threads that stored


@functools.lru_cache(maxsize=256)
def divide(
    shape: torch.Size, rank: int, strides: tuple[int, int], dtype: torch.dtype, device: torch.device
) -> tuple[Constants, int]:
    """Constants for dy of a shape, and how many programs."""
    rows, channels = shape
    processors = multiprocessors(device)
    many = rows >= MANY_ROWS * processors and dtype.itemsize == 2  # float32 would spill registers
    block = MANY_ROWS if many else FEW_ROWS
    programs = min(ceil_div(rows, block), FILL * processors)
    return constants_of(channels, rank, *strides, block), programs


@functools.lru_cache(maxsize=256)
def constants_of(channels: int, rank: int, of_x: int, of_dx: int, rows: int) -> Constants:
    """Constants for strides of x and dx, and tiles of ``rows``."""
    return Constants(
        C=channels, R=rank, S_X=of_x, S_DX=of_dx, BR=max(16, triton.next_power_of_2(rank)), BM=rows,
        BC=COLUMNS, num_warps=4, num_stages=2,
    )  # fmt: skip


def backward(dy: Tensor, x: Tensor, weight: Tensor, dx: Tensor) -> Tensor:
    """Write the gradient of x into ``dx``, and return programs' shares of the others in float32.

    Args:
        dy: gradient of y [rows, C], contiguous.
        x: [rows, rank], of any stride of rows.
        weight: [C, rank], contiguous.
        dx: like x.

    Returns:
        [programs, C * rank + C]: gradients of the weight, then of the bias, to be summed over programs.
    """
    rows, channels = dy.shape
    rank = x.shape[1]
    strides = x.stride(0), dx.stride(0)
    constants, programs = divide(dy.shape, rank, strides, dy.dtype, dy.device)
    dw = torch.empty((programs, channels * rank + channels), dtype=torch.float32, device=dy.device)
    if programs:
        tensors = dy, x, weight, dx
        launch(backward_kernel, compile_key(*tensors), (programs, 1, 1), (*tensors, dw, rows), constants)
    return dw
