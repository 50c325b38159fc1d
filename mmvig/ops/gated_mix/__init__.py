"""The mix of short and long context by a learned gate, and the projection that ends ViG's token mixer."""

import torch
import torch.nn.functional as F
from torch import Tensor

from mmvig.ops.arguments import check_eps, check_flags, check_tensors
from mmvig.ops.backend import autocast_dtype, use_triton
from mmvig.ops.cpu import linear

__all__ = ['gated_mix']


def gated_mix(
    long: Tensor,
    gate: Tensor,
    short: Tensor,
    weight_long: Tensor,
    weight_short: Tensor,
    weight_out: Tensor,
    eps: float = 1e-6,
    *,
    act: bool = False,
    backend: str = 'auto',
) -> Tensor:
    """W_o (g * RMSNorm(long) + (1 - g) * RMSNorm(short)) with g = sigmoid(gate), norms per head.

    The mix is the paper's 2D gated locality injection (arXiv 2405.18425): ``long`` is BiGLA's output,
    ``short`` that of the depthwise convolution.

    Args:
        long, gate, short: ``[..., H * V]``, heads contiguous, of one shape and dtype.
        weight_long, weight_short: weights ``[V]`` of the two norms, shared by the heads.
        weight_out: W_o ``[C, H * V]``.
        eps: of the norms. Default: 1e-6.
        act: whether SiLU is applied to what W_o takes, as in plain ViG-T. Default: False.
        backend: 'torch' (the definition), 'triton' (CUDA from compute capability 8.0: the mix in one pass
            with one rounding, made again on the way by the backward pass instead of being kept; no second
            derivative), or 'auto', 'triton' where it can. Default: 'auto'.

    Returns:
        ``[..., C]`` in the inputs' dtype; under autocast in its dtype, as of any product. With 'triton',
        the inputs are all that is kept for the backward pass.

    Raises:
        TypeError: an argument is of another type, or no floating-point tensor.
        ValueError: shapes, dtypes or devices disagree, the backend is unknown, or 'triton' cannot run.
    """
    tensors = {'long': long, 'gate': gate, 'short': short, 'weight_out': weight_out}
    check_tensors({**tensors, 'weight_long': weight_long, 'weight_short': weight_short})
    check_eps(eps)
    check_flags(act=act)
    if not long.shape == gate.shape == short.shape or not long.dtype == gate.dtype == short.dtype:
        found = ', '.join(f'{list(x.shape)} {x.dtype}' for x in (long, gate, short))
        raise ValueError(f'long, gate and short must have one shape and dtype, got {found}')
    head_dim = weight_long.shape[-1] if weight_long.ndim == 1 else 0
    if weight_long.shape != weight_short.shape or head_dim < 1 or long.shape[-1] % head_dim:
        raise ValueError(
            f'weight_long and weight_short must be [V] with V a divisor of the width {long.shape[-1]}, '
            f'got {list(weight_long.shape)} and {list(weight_short.shape)}'
        )
    if weight_out.ndim != 2 or weight_out.shape[1] != long.shape[-1]:
        raise ValueError(f'weight_out must be [C, {long.shape[-1]}], got {list(weight_out.shape)}')
    if use_triton(__name__, backend, long):
        from mmvig.ops.gated_mix.op import gated_mix_op

        dtype = autocast_dtype(long)
        long, gate, short, weight_out = (x.to(dtype) for x in (long, gate, short, weight_out))
        return gated_mix_op(long, gate, short, weight_long, weight_short, weight_out, eps, act)
    parts = [
        # In the weight's dtype: under autocast x is half, and RMSNorm has no autocast rule everywhere.
        F.rms_norm(x.unflatten(-1, (-1, head_dim)).to(weight.dtype), (head_dim,), weight, eps)
        for x, weight in ((short, weight_short), (long, weight_long))
    ]
    y = torch.lerp(*parts, gate.sigmoid().unflatten(-1, (-1, head_dim)).to(parts[0].dtype))
    if act:
        y = F.silu(y)
    return linear(y.flatten(-2).to(long.dtype), weight_out)
