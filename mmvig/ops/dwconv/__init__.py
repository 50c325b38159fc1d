"""Depthwise 3x3 convolution of channels-last maps."""

import torch.nn.functional as F
from torch import Tensor

from mmvig.ops.arguments import check_one_dtype, check_tensors
from mmvig.ops.backend import autocast_dtype, use_triton

__all__ = ['dwconv3x3']


def dwconv3x3(x: Tensor, weight: Tensor, *, backend: str = 'auto') -> Tensor:
    """y[h, w, c] = sum_ij weight[c, 0, i, j] * x[h + i - 1, w + j - 1, c], with zeros outside the map.

    Args:
        x: maps ``[B, H, W, C]``.
        weight: ``[C, 1, 3, 3]``.
        backend: 'torch' (``torch.nn.functional.conv2d``), 'triton' (CUDA from compute capability 8.0:
            sums in float32, x and the result are read and written once, and so in the backward pass; no
            second derivative), or 'auto', 'triton' where it can. Default: 'auto'.

    Returns:
        ``[B, H, W, C]`` in x's dtype; under autocast in its dtype, as of any convolution.

    Raises:
        TypeError: an argument is no floating-point tensor, or dtypes disagree without 'triton'.
        ValueError: shapes or devices disagree, the backend is unknown, or 'triton' cannot run.
    """
    check_tensors({'x': x, 'weight': weight})
    if x.ndim != 4 or weight.shape != (x.shape[3], 1, 3, 3):
        raise ValueError(
            f'x must be [B, H, W, C] and weight [C, 1, 3, 3], got {list(x.shape)} and {list(weight.shape)}'
        )
    if use_triton(__name__, backend, x):
        from mmvig.ops.dwconv.op import dwconv3x3_op

        return dwconv3x3_op(x.to(autocast_dtype(x)), weight)
    check_one_dtype(x=x, weight=weight)
    y = F.conv2d(x.permute(0, 3, 1, 2), weight, padding=1, groups=x.shape[3])
    return y.permute(0, 2, 3, 1)
