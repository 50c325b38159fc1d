"""The second half of SwiGLU: its gated activation and the projection after it."""

import torch.nn.functional as F
from torch import Tensor

from mmvig.ops.arguments import check_one_dtype, check_tensors
from mmvig.ops.backend import autocast_dtype, use_triton
from mmvig.ops.cpu import linear

__all__ = ['swiglu']


def swiglu(x: Tensor, weight: Tensor, *, backend: str = 'auto') -> Tensor:
    """W (silu(a) * b) with a, b = split(x).

    Args:
        x: ``[..., 2 D]``, the two halves side by side.
        weight: W ``[C, D]``.
        backend: 'torch' (the definition), 'triton' (CUDA from compute capability 8.0: the activation in one
            pass with one rounding, made again on the way by the backward pass instead of being kept; no
            second derivative), or 'auto', 'triton' where it can. Default: 'auto'.

    Returns:
        ``[..., C]`` in x's dtype; under autocast in its dtype, as of any product. With 'triton', x and the
        weight are all that is kept for the backward pass.

    Raises:
        TypeError: an argument is no floating-point tensor, or dtypes disagree without 'triton'.
        ValueError: widths or devices disagree, the backend is unknown, or 'triton' cannot run.

    Source: Shazeer, "GLU Variants Improve Transformer" (arXiv 2002.05202).
    """
    check_tensors({'x': x, 'weight': weight})
    if x.ndim < 1 or weight.ndim != 2 or x.shape[-1] != 2 * weight.shape[1]:
        raise ValueError(
            f'x must be [..., 2 D] and weight [C, D], got {list(x.shape)}, {list(weight.shape)}'
        )
    if use_triton(__name__, backend, x):
        from mmvig.ops.swiglu.op import swiglu_op

        dtype = autocast_dtype(x)
        return swiglu_op(x.to(dtype), weight.to(dtype))
    check_one_dtype(x=x, weight=weight)
    a, b = x.chunk(2, dim=-1)
    return linear(F.silu(a) * b, weight)
