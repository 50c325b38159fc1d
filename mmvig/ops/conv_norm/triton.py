"""Convolution of an image and its norm by Triton: a program makes all channels of some pixels."""

import functools

import torch
import triton
import triton.language as tl

from mmvig.ops.arithmetic import dot, rounded
from mmvig.ops.launch import (
    Constants,
    ceil_div,
    compile_key,
    differentiate,
    launch,
    multiprocessors,
    operator,
    refuse_gradients,
)
from mmvig.ops.norm import triton as norm
from mmvig.ops.norm.triton import activated, affine, normalised

# Numbers of a patch in a product, pixels of a tile, programs a multiprocessor.
BLOCK, PIXELS, FILL = 32, 64, 8


@triton.jit
def load_kernel(p_k, p_z, first, C: tl.constexpr, PATCH: tl.constexpr, BK: tl.constexpr, BC: tl.constexpr):
    """The convolution's weights [BK, BC] of BK numbers of a patch."""
    columns = tl.arange(0, BC)[None, :]
    k = first + tl.arange(0, BK)[:, None]
    weights = tl.load(p_k + columns * PATCH + k, mask=(k < PATCH) & (columns < C), other=0.0)
    return weights.to(p_z.dtype.element_ty)


@triton.jit(do_not_specialize=['M', 'H', 'W', 'HO', 'WO', 's_b', 's_c', 's_h', 's_w'])
def forward_kernel(
    p_x, p_k, p_shift, p_w, p_b, p_z, p_y, M, H, W, HO, WO, s_b, s_c, s_h, s_w,
    CIN: tl.constexpr, KS: tl.constexpr, STRIDE: tl.constexpr, C: tl.constexpr, EPS: tl.constexpr,
    ACT: tl.constexpr, KEEP: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """Make y = act(norm(z + shift)) of z = conv(x) at M pixels [M, C]; KEEP: and z.

    x has strides s. A program walks over tiles of BM pixels. Their patches are loaded as [patch, pixels],
    so that neighbours in a row of the image are side by side.
    """
    PATCH: tl.constexpr = CIN * KS * KS
    columns = tl.arange(0, BC)
    if PATCH <= BK:
        weights = load_kernel(p_k, p_z, 0, C, PATCH, BK, BC)
    shift = tl.load(p_shift + columns, mask=columns < C, other=0.0).to(tl.float32)[None, :]
    for first in range(tl.program_id(0) * BM, M, tl.num_programs(0) * BM):
        rows = first + tl.arange(0, BM)
        h = rows // WO % HO * STRIDE - 1
        w = rows % WO * STRIDE - 1
        image = rows // (HO * WO)
        p_first = p_x + image.to(tl.int64) * s_b + h.to(tl.int64) * s_h + w.to(tl.int64) * s_w
        z = tl.zeros([BM, BC], tl.float32)
        for start in range(0, PATCH, BK):
            k = start + tl.arange(0, BK)
            i = k % (KS * KS) // KS
            j = k % KS
            at_h = h[None, :] + i[:, None]
            at_w = w[None, :] + j[:, None]
            inside = (at_h >= 0) & (at_h < H) & (at_w >= 0) & (at_w < W)
            inside = inside & (k < PATCH)[:, None] & (rows < M)[None, :]
            of_patch = (k // (KS * KS)).to(tl.int64) * s_c + i.to(tl.int64) * s_h + j.to(tl.int64) * s_w
            patch = tl.load(p_first[None, :] + of_patch[:, None], mask=inside, other=0.0)
            if PATCH > BK:
                weights = load_kernel(p_k, p_z, start, C, PATCH, BK, BC)
            z = dot(tl.trans(patch.to(p_z.dtype.element_ty)), weights, z)
        x = rounded(z, p_z)  # as it is kept for the backward pass
        mask = (rows < M)[:, None] & (columns < C)[None, :]
        at = rows.to(tl.int64)[:, None] * C + columns[None, :]
        if KEEP:
            tl.store(p_z + at, x.to(p_z.dtype.element_ty), mask=mask)
        x, _ = normalised(x + shift, mask, EPS, False, C)
        y = activated(affine(x, p_w, p_b, columns, False, C), ACT)
        tl.store(p_y + at, y.to(p_y.dtype.element_ty), mask=mask)


@functools.lru_cache(maxsize=64)
def constants(weight: torch.Size, stride: int, eps: float, act: str, keep: bool) -> Constants:
    """Constants of the kernel."""
    channels, in_channels, side, _ = weight
    return Constants(
        CIN=in_channels, KS=side, STRIDE=stride, C=channels, EPS=eps, ACT=act, KEEP=keep,
        BM=PIXELS, BK=BLOCK,
        BC=max(16, triton.next_power_of_2(channels)), num_warps=4, num_stages=1,
    )  # fmt: skip


def forward(keep, x, conv_weight, conv_bias, weight, bias, eps, stride, low, dtype, act):
    """y, and with ``keep`` the convolution z without its bias."""
    batch, height, width, _ = x.shape
    channels, _, side, _ = conv_weight.shape
    size = batch, (height + 2 - side) // stride + 1, (width + 2 - side) // stride + 1, channels
    y, z = x.new_empty(size, dtype=dtype), x.new_empty(size if keep else 0, dtype=low)
    if y.numel():
        options = constants(conv_weight.shape, stride, eps, act, keep)
        rows, strides = size[0] * size[1] * size[2], x.stride()
        tensors = x, *norm.contiguous(conv_weight, conv_bias, weight, bias), z, y
        numbers = rows, height, width, *size[1:3], strides[0], strides[3], *strides[1:3]
        grid = min(ceil_div(rows, options['BM']), FILL * multiprocessors(x.device)), 1, 1
        launch(forward_kernel, compile_key(*tensors), grid, (*tensors, *numbers), options)
    return y, z


def _fake(x, conv_weight, conv_bias, weight, bias, eps, stride, low, dtype, act):
    batch, height, width, _ = x.shape
    channels, _, side, _ = conv_weight.shape
    size = batch, (height + 2 - side) // stride + 1, (width + 2 - side) // stride + 1, channels
    return x.new_empty(size, dtype=dtype), x.new_empty(size, dtype=low)


WEIGHTS = 'Tensor conv_weight, Tensor conv_bias, Tensor weight, Tensor bias'
INPUTS = f'Tensor x, {WEIGHTS}, float eps, int stride, ScalarType low, ScalarType dtype, str act'


@operator(f'conv_norm_inference({INPUTS}) -> Tensor', lambda *args: _fake(*args)[0])
def conv_norm_inference_op(*args):
    """:func:`conv_norm_op` where nothing is kept for a backward pass."""
    return forward(False, *args)[0]


@operator(
    f'conv_norm({INPUTS}) -> (Tensor, Tensor)',
    _fake,
    inference=lambda *args: (conv_norm_inference_op(*args),),
)
def conv_norm_op(*args):
    """:func:`mmvig.ops.conv_norm.conv_norm` by Triton, and what is kept; arguments are validated."""
    return forward(True, *args)


@operator(
    f'conv_norm_backward(Tensor dy, Tensor x, {WEIGHTS}, Tensor z, float eps, int stride, str act,'
    ' bool images) -> (Tensor, Tensor, Tensor)',
    lambda dy, x, conv_weight, conv_bias, weight, bias, z, eps, stride, act, images: (
        x.new_empty(x.shape if images else 0),
        conv_weight.new_empty(conv_weight.shape),
        weight.new_empty(3, weight.shape[0], dtype=torch.float32),
    ),
)
def conv_norm_backward_op(dy, x, conv_weight, conv_bias, weight, bias, z, eps, stride, act, images):
    """Gradients of :func:`conv_norm_op`: of the image if it has one, the kernel, the vectors in float32."""
    dz, _, vectors = norm.backward(None, dy, z, None, weight, bias, eps, act, False, None, conv_bias)
    low = [t.to(z.dtype, memory_format=torch.channels_last) for t in (x.permute(0, 3, 1, 2), conv_weight)]
    dx, d_kernel, _ = torch.ops.aten.convolution_backward(
        dz.permute(0, 3, 1, 2), *low, None, [stride] * 2, [1, 1], [1, 1], False, [0, 0], 1,
        [images, True, False],
    )  # fmt: skip
    dx = dx.permute(0, 2, 3, 1).to(x.dtype).contiguous() if images else x.new_empty(0)
    return dx, d_kernel.to(conv_weight.dtype).contiguous(), vectors.sum(1)


def _keep(inputs, output):
    *tensors, eps, stride, _, _, act = inputs
    return (*tensors, output[1]), (eps, stride, act)


def _backward(dy, x, conv_weight, conv_bias, weight, bias, z, eps, stride, act):
    images = x.requires_grad
    dx, d_kernel, vectors = conv_norm_backward_op(
        dy, x, conv_weight, conv_bias, weight, bias, z, eps, stride, act, images
    )
    d_weight, d_bias, d_shift = norm.of_weights(vectors, weight, bias, conv_bias)
    return dx if images else None, d_kernel, d_shift, d_weight, d_bias


differentiate('conv_norm', _backward, _keep, outputs=1)
refuse_gradients('conv_norm_inference')
