"""A strided convolution of ``[B, H, W, C]`` for compiled graphs, in which it is one operator.

Of a convolution that it knows, Inductor has all tensors of four dimensions before and after it channels
last, and takes [B, H, W, C] for [B, C, H, W]: copies were a tenth of a compiled training step's kernel time
(four blocks, 224 x 224, batch 128, on an H200).
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from mmvig.ops.operator import differentiate, empty_like_each, operator


def _fake(x, weight, stride):
    height, width = ((n + 2 - k) // stride + 1 for n, k in zip(x.shape[1:3], weight.shape[2:], strict=True))
    return x.new_empty(x.shape[0], height, width, weight.shape[0])


@operator(_fake)
def conv_op(x: Tensor, weight: Tensor, stride: int) -> Tensor:
    """Convolution of x ``[B, H, W, C_in]`` with a weight ``[C, C_in, k, k]`` of its dtype; padding is 1."""
    return F.conv2d(x.permute(0, 3, 1, 2), weight, None, stride, 1).permute(0, 2, 3, 1).contiguous()


@operator(lambda dy, x, weight, stride: empty_like_each(x, weight))
def conv_backward_op(dy: Tensor, x: Tensor, weight: Tensor, stride: int) -> tuple[Tensor, Tensor]:
    """Gradients of :func:`conv_op`."""
    dx, d_weight, _ = torch.ops.aten.convolution_backward(
        dy.permute(0, 3, 1, 2), x.permute(0, 3, 1, 2), weight, None, [stride] * 2, [1, 1], [1, 1], False,
        [0, 0], 1, [True, True, False],
    )  # fmt: skip
    return dx.permute(0, 2, 3, 1).contiguous(), d_weight.contiguous()


differentiate('conv', conv_backward_op)
