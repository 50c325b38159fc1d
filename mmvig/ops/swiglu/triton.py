"""SwiGLU's gated activation by Triton, one pass forward and one backward, around PyTorch's products.

Where a product has few input channels, it and the activation are one kernel: its result, and in the
backward pass the activation's gradient, take longer to write and to read again than to compute.
"""

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from mmvig.ops.arithmetic import dot, rounded, sigmoid
from mmvig.ops.launch import (
    Constants,
    ceil_div,
    compile_key,
    differentiate,
    empty_like_each,
    launch,
    multiprocessors,
    operator,
)

# Rows and columns of a program.
ROWS, COLUMNS = 8, 256
# The widest inputs of products that are one kernel with the activation, forward and backward.
MAX_WIDTH, MAX_BACKWARD_WIDTH = 768, 256
# The widest inputs whose weights stay in shared memory, forward.
MAX_HELD = 192
# Compute capabilities with 163 KB of shared memory for a program or more; others have 99.
LARGE = {(8, 0), (9, 0), (10, 0), (10, 3)}
MAX_GRID = 65535  # in a grid's second dimension


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
    y = a * sigmoid(a) * b
    tl.store(p_y + rows * D + columns[None, :], y.to(p_y.dtype.element_ty), mask=mask)


@triton.jit
def gradients(dy, a, b):
    """Gradients of a and b of y = silu(a) * b, and y again."""
    s = sigmoid(a)
    silu = a * s
    return dy * b * (s + silu * (1 - s)), dy * silu, silu * b


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
    da, db, y = gradients(dy, a, b)
    tl.store(p_dx + at_a, da.to(p_dx.dtype.element_ty), mask=mask)
    tl.store(p_dx + at_a + D, db.to(p_dx.dtype.element_ty), mask=mask)
    tl.store(p_y + at, y.to(p_y.dtype.element_ty), mask=mask)


@triton.jit
def load(p, STRIDE: tl.constexpr, k, C: tl.constexpr, RAGGED: tl.constexpr):
    """Load channels k of C, which are STRIDE apart at p; RAGGED if there are some beyond C, which are 0."""
    if RAGGED:
        return tl.load(p + k * STRIDE, mask=k < C, other=0.0)
    else:
        return tl.load(p + k * STRIDE)


@triton.jit
def columns_of(D: tl.constexpr, BN: tl.constexpr, TIMES: tl.constexpr):
    """Return the program's BN of D columns, each several times; the last tile overlaps the one before."""
    first = tl.program_id(0) * BN
    columns = tl.arange(0, TIMES * BN) // TIMES
    if D < BN:
        columns = tl.minimum(columns, D - 1)
    elif D % BN:
        first = tl.multiple_of(tl.minimum(first, D - BN), D & -D)
    return first + columns


@triton.jit(do_not_specialize=['M'])
def project_kernel(
    p_y, p_weight, p_h, p_act, M, C: tl.constexpr, D: tl.constexpr, KEEP: tl.constexpr, HELD: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, K0: tl.constexpr, K1: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Make act [M, D] of y [M, C] and weight [2 D, C], and with KEEP h = y weight^T [M, 2 D].

    A program walks over tiles of rows, all of one tile of columns. With HELD, its weights stay in shared
    memory, in two parts of K0 and K1 channels; else they are read for each tile, K0 channels at a time.
    Columns of a and b alternate in the product, so that a thread has both of a result. Rows beyond the last
    one are that again, written with the same bits as columns of two tiles are: nothing needs a mask.
    """
    columns = columns_of(D, BN, 1)
    p_weight += (columns_of(D, BN, 2) + tl.arange(0, 2 * BN) % 2 * D)[None, :] * C
    k0 = tl.arange(0, K0)
    if HELD:
        w0 = load(p_weight, 1, k0[:, None], C, C < K0)
        if K1:
            k1 = K0 + tl.arange(0, K1)
            w1 = load(p_weight, 1, k1[:, None], C, C < K0 + K1)
    for first in tl.range(tl.program_id(1) * BM, M, tl.num_programs(1) * BM, num_stages=STAGES):
        start = tl.cast(first, tl.int64)
        row = tl.minimum(tl.arange(0, BM), M - first - 1)[:, None]
        of_y = p_y + start * C + row * C
        ab = tl.zeros((BM, 2 * BN), tl.float32)
        if HELD:
            ab = dot(load(of_y, 1, k0[None, :], C, C < K0), w0, ab)
            if K1:
                ab = dot(load(of_y, 1, k1[None, :], C, C < K0 + K1), w1, ab)
        else:
            for i in range(0, C, K0):
                y = load(of_y, 1, i + k0[None, :], C, C % K0 != 0)
                ab = dot(y, load(p_weight, 1, i + k0[:, None], C, C % K0 != 0), ab)
        a, b = tl.split(tl.reshape(ab, (BM, BN, 2)))
        a, b = rounded(a, p_act), rounded(b, p_act)
        if KEEP:
            p_a = p_h + start * (2 * D) + row * (2 * D) + columns[None, :]
            tl.store(p_a, a.to(p_h.dtype.element_ty))
            tl.store(p_a + D, b.to(p_h.dtype.element_ty))
        y = a * sigmoid(a) * b
        tl.store(p_act + start * D + row * D + columns[None, :], y.to(p_act.dtype.element_ty))


@triton.jit(do_not_specialize=['M'])
def project_backward_kernel(
    p_dz, p_weight, p_h, p_dh, p_act, M, C: tl.constexpr, D: tl.constexpr, HELD: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, K0: tl.constexpr, K1: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Make dh [M, 2 D] of dz [M, C], weight [C, D] and h, and act again; programs as project_kernel's."""
    columns = columns_of(D, BN, 1)
    p_weight += columns[None, :]
    k0 = tl.arange(0, K0)
    if HELD:
        w0 = load(p_weight, D, k0[:, None], C, C < K0)
        if K1:
            k1 = K0 + tl.arange(0, K1)
            w1 = load(p_weight, D, k1[:, None], C, C < K0 + K1)
    for first in tl.range(tl.program_id(1) * BM, M, tl.num_programs(1) * BM, num_stages=STAGES):
        start = tl.cast(first, tl.int64)
        row = tl.minimum(tl.arange(0, BM), M - first - 1)[:, None]
        at_a = row * (2 * D) + columns[None, :]
        a = tl.load(p_h + start * (2 * D) + at_a)
        b = tl.load(p_h + start * (2 * D) + at_a + D)
        of_dz = p_dz + start * C + row * C
        dy = tl.zeros((BM, BN), tl.float32)
        if HELD:
            dy = dot(load(of_dz, 1, k0[None, :], C, C < K0), w0, dy)
            if K1:
                dy = dot(load(of_dz, 1, k1[None, :], C, C < K0 + K1), w1, dy)
        else:
            for i in range(0, C, K0):
                dz = load(of_dz, 1, i + k0[None, :], C, C % K0 != 0)
                dy = dot(dz, load(p_weight, D, i + k0[:, None], C, C % K0 != 0), dy)
        dy = dy.to(p_act.dtype.element_ty).to(tl.float32)
        da, db, y = gradients(dy, a.to(tl.float32), b.to(tl.float32))
        p_a = p_dh + start * (2 * D) + at_a
        tl.store(p_a, da.to(p_dh.dtype.element_ty))
        tl.store(p_a + D, db.to(p_dh.dtype.element_ty))
        tl.store(p_act + start * D + row * D + columns[None, :], y.to(p_act.dtype.element_ty))


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
        tile = {'HELD': False, 'K0': 64, 'K1': 0, 'STAGES': 3, 'each': 0, 'BM': 128}
        tile |= {'num_warps': 8, 'maxnreg': 128}  # two programs fit
        columns = 64
    else:
        first = max(16, 1 << channels.bit_length() - 1)  # powers of two
        second = max(16, 1 << (channels - first - 1).bit_length()) if channels > first else 0
        stages, each = (2, 3) if back and channels <= 96 else (3, 1 if channels > 192 else 2)
        tile = {'HELD': True, 'K0': first, 'K1': second, 'STAGES': stages, 'each': each, 'BM': 64}
        tile |= {'num_warps': 4}
        columns = 32 if (96 if back else 128) < channels <= 192 else 64
    return {**tile, 'BN': min(columns, max(16, 1 << width.bit_length() - 1))}


@functools.lru_cache(maxsize=64)
def product_constants(channels: int, width: int, device: torch.device, keep: bool | None) -> tuple:
    """Constants of a kernel with a product, its tiles of columns, and most programs for each of them."""
    tile, form = tiling(channels, width, keep), {} if keep is None else {'KEEP': keep}
    columns, each = ceil_div(width, tile['BN']), tile.pop('each')
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
