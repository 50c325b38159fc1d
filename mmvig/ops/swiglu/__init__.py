"""The gated activation of SwiGLU."""

import torch.nn.functional as F
from torch import Tensor

from mmvig.ops.choice import use_triton

__all__ = ['swiglu']


def swiglu(x: Tensor, *, backend: str = 'auto') -> Tensor:
    """Gate ``silu(a) * b`` with a, b = split(x).

    Args:
        x: ``[..., 2 D]``, the two halves side by side.
        backend: 'torch' (the definition), 'triton' (CUDA from compute capability 8.0: one pass over x with
            one rounding, the same in the backward pass, no second derivative), or 'auto', 'triton' where it
            can. Default: 'auto'.

    Returns:
        ``[..., D]`` in x's dtype. Nothing but x is kept for the backward pass with 'triton'.

    Raises:
        ValueError: the width is odd or 0, the backend is unknown, or 'triton' cannot run.

    Source: Shazeer, "GLU Variants Improve Transformer" (arXiv 2002.05202).
    """
    if x.ndim < 1 or x.shape[-1] % 2 or not x.shape[-1]:
        raise ValueError(f'x must have an even width >= 2, got {list(x.shape)}')
    if use_triton(__name__, backend, x):
        from mmvig.ops.swiglu.triton import swiglu_op

        return swiglu_op(x)
    a, b = x.chunk(2, dim=-1)
    return F.silu(a) * b
