"""Launches the kernels of the convolution of an image and its norm and makes them PyTorch operators.

Importing this module imports Triton.
"""

import functools
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from mmvig.ops.conv_norm.kernels import forward_kernel
from mmvig.ops.launch import Constants, ceil_div, compile_key, launch, multiprocessors
from mmvig.ops.norm import op as norm
from mmvig.ops.operator import differentiate, empty_like_each, operator

# Numbers of a patch in a product, pixels of a tile, programs a multiprocessor.
BLOCK, PIXELS, FILL = 32, 64, 8


@functools.lru_cache(maxsize=64)
def constants(weight: torch.Size, stride: int, eps: float, act: str, keep: bool) -> Constants:
    """Constants of the kernel."""
    channels, in_channels, side, _ = weight
    return Constants(
        CI=in_channels, SIDE=side, STRIDE=stride, C=channels, EPS=eps, ACT=act, KEEP=keep, BM=PIXELS,
        BPATCH=BLOCK, BC=max(16, triton.next_power_of_2(channels)), num_warps=4, num_stages=1,
    )  # fmt: skip


class Weights(NamedTuple):
    """Weights of the convolution and the norm."""

    conv_weight: Tensor  # [C, C_in, k, k]
    conv_bias: Tensor  # [C], as the norm's are
    weight: Tensor
    bias: Tensor


def size_of(x: Tensor, weights: Weights, stride: int) -> tuple[int, ...]:
    """The result's shape [B, H', W', C]."""
    batch, height, width, _ = x.shape
    channels, _, side, _ = weights.conv_weight.shape
    return batch, (height + 2 - side) // stride + 1, (width + 2 - side) // stride + 1, channels


def _fake(x, weights, eps, stride, low, dtype, act):
    size = size_of(x, weights, stride)
    return x.new_empty(size, dtype=dtype), x.new_empty(size, dtype=low)


@operator(_fake, outputs=1)
def conv_norm_op(
    keep, x: Tensor, weights: Weights, eps: float, stride: int, low: torch.dtype, dtype: torch.dtype,
    act: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """:func:`mmvig.ops.conv_norm.conv_norm` by Triton; arguments are validated.

    With ``keep`` also the convolution z without its bias.
    """
    size = size_of(x, weights, stride)
    y, z = x.new_empty(size, dtype=dtype), x.new_empty(size if keep else 0, dtype=low)
    if y.numel():
        options = constants(weights.conv_weight.shape, stride, eps, act, keep)
        rows, strides = size[0] * size[1] * size[2], x.stride()
        tensors = x, *norm.contiguous(*weights), z, y
        numbers = rows, *x.shape[1:3], *size[1:3], strides[0], strides[3], *strides[1:3]
        grid = min(ceil_div(rows, options['BM']), FILL * multiprocessors(x.device)), 1, 1
        launch(forward_kernel, compile_key(*tensors), grid, (*tensors, *numbers), options)
    return y, z


@operator(
    lambda dy, x, weights, z, eps, stride, act, images: (
        x.new_empty(x.shape if images else 0),
        *empty_like_each(weights.conv_weight),
        x.new_empty(3, weights.weight.shape[0], dtype=torch.float32),
    )
)
def conv_norm_backward_op(
    dy: Tensor, x: Tensor, weights: Weights, z: Tensor, eps: float, stride: int, act: str, images: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of :func:`conv_norm_op`: of the image if it has one, the kernel, the vectors in float32."""
    conv_weight, conv_bias, weight, bias = weights
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


def _backward(dy, x, *kept):
    images = x.requires_grad
    dx, d_kernel, vectors = conv_norm_backward_op(dy, x, *kept, images)
    _, conv_bias, weight, bias = kept[:4]
    d_weight, d_bias, d_shift = norm.of_weights(vectors, weight, bias, conv_bias)
    return dx if images else None, d_kernel, d_shift, d_weight, d_bias


differentiate('conv_norm', _backward, _keep)
