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
    p_dy, p_x, p_weight, p_dx, p_dw, M, C: tl.constexpr, R: tl.constexpr, s_x: tl.constexpr,
    s_dx: tl.constexpr, BR: tl.constexpr, BM: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """Make dx [M, R] of dy [M, C], and this program's share of dw, [C, R] and the bias' [C] after it.

    Rows of x and dx are s_x and s_dx apart. Both products are transposed, with R rows: too few for Hopper's
    own instructions, which Triton 3.6 has trouble with.
    """
    dtype: tl.constexpr = tl.float32 if WIDEN else p_dy.dtype.element_ty
    precision: tl.constexpr = 'tf32x3'  # of float32; halves need none
    o_r = tl.arange(0, BR)[:, None]
    p_dw += tl.program_id(0).to(tl.int64) * (C * R + C)
    for i in range(tl.program_id(0), tl.cdiv(M, BM), tl.num_programs(0)):
        o_m = i * BM + tl.arange(0, BM)
        o_row = o_m.to(tl.int64)
        m_rm = (o_r < R) & (o_m < M)[None, :]
        b_x = tl.load(p_x + o_row[None, :] * s_x + o_r, mask=m_rm, other=0.0).to(dtype)  # [BR, BM]
        b_dx = tl.zeros([BR, BM], tl.float32)
        for start in range(0, C, BC):
            o_c = start + tl.arange(0, BC)
            m_c = o_c < C
            m_mc = (o_m < M)[:, None] & m_c[None, :]
            p_dy_mc = p_dy + o_row[:, None] * C + o_c[None, :]
            b_dy = tl.load(p_dy_mc, mask=m_mc, other=0.0).to(dtype)  # [BM, BC]
            o_rc = o_c[None, :] * R + o_r
            m_rc = (o_r < R) & m_c[None, :]
            b_weight = tl.load(p_weight + o_rc, mask=m_rc, other=0.0).to(dtype)  # [BR, BC]
            b_dx = tl.dot(b_weight, tl.trans(b_dy), b_dx, input_precision=precision)  # [BR, BM]
            b_dw = tl.dot(b_x, b_dy, input_precision=precision)  # [BR, BC]
            b_db = tl.sum(b_dy.to(tl.float32), axis=0)  # [BC]
            # Added to what earlier tiles gave: registers do not hold it for all columns.
            again = i >= tl.num_programs(0)
            b_dw += tl.load(p_dw + o_rc, mask=m_rc & again, other=0.0)  # [BR, BC]
            b_db += tl.load(p_dw + C * R + o_c, mask=m_c & again, other=0.0)  # [BC]
            tl.store(p_dw + o_rc, b_dw, mask=m_rc)
            tl.store(p_dw + C * R + o_c, b_db, mask=m_c)
        tl.store(p_dx + o_row[None, :] * s_dx + o_r, b_dx.to(p_dx.dtype.element_ty), mask=m_rm)
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
        C=channels, R=rank, s_x=of_x, s_dx=of_dx, BR=max(16, triton.next_power_of_2(rank)), BM=rows,
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
