"""Launches the kernels of the convolution of an image and its norm and makes them PyTorch operators.

Importing this module imports Triton.
"""

import functools

import torch
import triton

from mmvig.ops.conv_norm.kernels import forward_kernel
from mmvig.ops.launch import Constants, ceil_div, compile_key, launch, multiprocessors
from mmvig.ops.norm import op as norm
from mmvig.ops.operator import differentiate, operator, refuse_gradients

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
