"""The first layer of a backbone: a strided convolution of an image, a LayerNorm and an activation."""

import torch
import torch.nn.functional as F
from torch import Tensor

from mmvig.ops.arguments import check_dtype, check_eps, check_one_dtype, check_tensors
from mmvig.ops.backend import autocast_dtype, use_triton
from mmvig.ops.norm import ACTIVATIONS, norm

__all__ = ['conv_norm', 'takes']

# Most channels of an image and of the result, and halves, that the Triton kernel takes.
MAX_IN, MAX_OUT = 4, 256
HALVES = torch.float16, torch.bfloat16


def conv_norm(
    x: Tensor,
    conv_weight: Tensor,
    conv_bias: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float = 1e-5,
    *,
    stride: int,
    act: str = 'none',
    dtype: torch.dtype | None = None,
    backend: str = 'auto',
) -> Tensor:
    """act(norm(conv(x))) with a padding of 1, for images, whose few channels suit no convolution's kernels.

    Args:
        x: images ``[B, H, W, C_in]`` of any strides.
        conv_weight: ``[C, C_in, k, k]``.
        conv_bias, weight, bias: ``[C]``, the convolution's, and the LayerNorm's over channels.
        eps, act, dtype: see :func:`mmvig.ops.norm.norm`; dtype's default is the convolution's.
        stride: of the convolution.
        backend: 'torch' (the definition), 'triton' (CUDA from compute capability 8.0, half precision,
            C_in up to 4, C up to 256: the image is read as it lies, and in inference nothing but the result
            is written; gradients of the convolution by PyTorch's), or 'auto', 'triton' where it can.
            Default: 'auto'.

    Returns:
        ``[B, H', W', C]`` with H' = floor((H + 2 - k) / stride) + 1.

    Raises:
        TypeError: an argument is of another type, or no floating-point tensor.
        ValueError: shapes or devices disagree, the activation or the backend is unknown, or 'triton' cannot
            run.
    """
    check_tensors(
        {'x': x, 'conv_weight': conv_weight, 'conv_bias': conv_bias, 'weight': weight, 'bias': bias}
    )
    check_eps(eps)
    check_dtype(dtype)
    if type(stride) is not int or stride < 1:
        raise ValueError(f'stride must be an int of at least 1, got {stride!r}')
    if act not in list(ACTIVATIONS):
        raise ValueError(f'act must be one of {list(ACTIVATIONS)}, got {act!r}')
    for name, each in (('conv_bias', conv_bias), ('weight', weight), ('bias', bias)):
        if each.shape != conv_weight.shape[:1]:
            raise ValueError(
                f'{name} must be [C], as conv_weight {list(conv_weight.shape)} says, got {list(each.shape)}'
            )
    low, fits = autocast_dtype(x), takes(x, conv_weight)
    if not fits and backend == 'triton':
        raise ValueError(
            f"backend 'triton' takes half precision, up to {MAX_IN} channels in and {MAX_OUT} out, "
            f'got {low}, {x.shape[3]} and {conv_weight.shape[0]}'
        )
    if fits and use_triton(__name__, backend, x):
        from mmvig.ops.conv_norm.op import conv_norm_op

        weights = conv_weight, conv_bias, weight, bias
        return conv_norm_op(x, *weights, eps, stride, low, dtype or low, act)[0]
    check_one_dtype(x=x, conv_weight=conv_weight)
    y = F.conv2d(x.permute(0, 3, 1, 2), conv_weight, None, stride, 1).permute(0, 2, 3, 1)
    return norm(y, weight, bias, eps, shift=conv_bias, act=act, dtype=dtype, backend=backend)


def takes(x: Tensor, conv_weight: Tensor) -> bool:
    """Whether the kernel of :func:`conv_norm` is made for these channels and, under autocast, this dtype.

    Raises:
        ValueError: shapes disagree.
    """
    if x.ndim != 4 or conv_weight.ndim != 4 or x.shape[3] != conv_weight.shape[1]:
        found = f'{list(x.shape)} and {list(conv_weight.shape)}'
        raise ValueError(f'x must be [B, H, W, C_in] and conv_weight [C, C_in, k, k], got {found}')
    if conv_weight.shape[2] != conv_weight.shape[3] or min(x.shape[1:3]) + 2 < conv_weight.shape[2]:
        found = f'{list(x.shape)} and {list(conv_weight.shape)}'
        raise ValueError(f'x must have H, W >= k - 2 for conv_weight [C, C_in, k, k], got {found}')
    return autocast_dtype(x) in HALVES and x.shape[3] <= MAX_IN and conv_weight.shape[0] <= MAX_OUT
