"""LayerNorm and RMSNorm over the last dimension with what stands around them in a residual network."""

import torch
import torch.nn.functional as F
from torch import Tensor

from mmvig.ops.arguments import check_dtype, check_eps, check_flags, check_tensors
from mmvig.ops.backend import use_triton

__all__ = ['ACTIVATIONS', 'add', 'add_norm', 'norm']

ACTIVATIONS = {'none': lambda x: x, 'gelu': F.gelu, 'silu': F.silu}
# Widest rows that the Triton kernels take.
MAX_WIDTH = 8192


def norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    rms: bool = False,
    shift: Tensor | None = None,
    act: str = 'none',
    channels_first: bool = False,
    dtype: torch.dtype | None = None,
    backend: str = 'auto',
) -> Tensor:
    """LayerNorm or RMSNorm over channels, with what stands around it.

    Args:
        x: maps ``[B, H, W, C]``.
        weight: ``[C]``.
        bias: ``[C]``, or None for none. Default: None.
        eps: added to the variance or mean square. Default: 1e-5.
        rms: whether it is RMSNorm, which has no bias. Default: False.
        shift: ``[C]``, added to x before: the bias of a convolution. Default: None.
        act: activation of the result, 'none', 'gelu' (exact) or 'silu'. Default: 'none'.
        channels_first: whether the result is laid out as ``[B, C, H, W]``. Default: False.
        dtype: of the result. None: x's. Default: None.
        backend: 'torch' (the definition), 'triton' (CUDA from compute capability 8.0, C up to 8192: one
            pass in float32, the same in the backward pass, no second derivative), or 'auto', 'triton'
            where it can. Default: 'auto'.

    Returns:
        ``[B, H, W, C]``, with channels_first ``[B, C, H, W]``, contiguous. Nothing but the inputs is kept
        for the backward pass with 'triton'.

    Raises:
        TypeError: an argument is of another type, or no floating-point tensor.
        ValueError: shapes or devices disagree, the activation or the backend is unknown, or 'triton' cannot
            run.
    """
    _check(x, weight, bias, eps, rms, act, shift)
    check_dtype(dtype)
    check_flags(channels_first=channels_first)
    dtype = dtype or x.dtype
    if _fits(backend, x):
        from mmvig.ops.norm.op import norm_op

        return norm_op(
            x, weight, _bias_for_kernels(weight, bias, rms), shift, eps, dtype, act, channels_first
        )
    x = x if shift is None else x + shift
    y = _norm(x, weight, bias, eps, rms, act).to(dtype)
    return y.permute(0, 3, 1, 2).contiguous() if channels_first else y


def add_norm(
    x: Tensor,
    branch: Tensor,
    scale: Tensor | None,
    weight: Tensor,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    rms: bool = False,
    dtype: torch.dtype | None = None,
    channels_first: bool = False,
    backend: str = 'auto',
) -> tuple[Tensor, Tensor]:
    """Residual connection s = x + scale * branch, and :func:`norm` of s after it.

    Args:
        x: maps ``[B, H, W, C]``.
        branch: ``[B, H, W, C]``, in any dtype.
        scale: a factor for each sample ``[B]``, as stochastic depth has it; no gradient. None: 1.
        weight, bias, eps, rms, channels_first, dtype, backend: see :func:`norm`.

    Returns:
        s ``[B, H, W, C]`` in x's dtype, and the norm. With 'triton', s and the weights are what is kept for
        the backward pass.

    Raises:
        TypeError, ValueError: as :func:`norm`, or scale asks for a gradient.
    """
    _check(x, weight, bias, eps, rms, 'none')
    check_dtype(dtype)
    check_flags(channels_first=channels_first)
    check_tensors({'x': x, 'branch': branch}, {'scale': scale})
    if branch.shape != x.shape or (scale is not None and scale.shape != x.shape[:1]):
        found = f'{list(branch.shape)} and {None if scale is None else list(scale.shape)}'
        raise ValueError(f'branch must have the shape of x, {list(x.shape)}, and scale [B], got {found}')
    if scale is not None and scale.requires_grad and torch.is_grad_enabled():
        raise ValueError('scale gets no gradient, and this one asks for it: give scale.detach()')
    dtype = dtype or x.dtype
    if _fits(backend, x):
        from mmvig.ops.norm.op import add_norm_op

        bias = _bias_for_kernels(weight, bias, rms)
        return add_norm_op(x, branch, scale, weight, bias, eps, dtype, channels_first)
    x = add(x, branch, scale)
    y = _norm(x, weight, bias, eps, rms, 'none').to(dtype)
    return x, y.permute(0, 3, 1, 2).contiguous() if channels_first else y


def add(x: Tensor, branch: Tensor, scale: Tensor | None) -> Tensor:
    """The sum that :func:`add_norm` has the norm of."""
    if scale is not None:
        branch = branch * scale[:, None, None, None]
    return x + branch.to(x.dtype)


def _bias_for_kernels(weight: Tensor, bias: Tensor | None, rms: bool) -> Tensor | None:
    """The kernels compute RMSNorm where there is no bias."""
    return torch.zeros_like(weight) if bias is None and not rms else bias


def _norm(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float, rms: bool, act: str) -> Tensor:
    x = x.to(weight.dtype)  # RMSNorm has no autocast rule everywhere, LayerNorm takes no mixture on GPUs
    if rms:
        y = F.rms_norm(x, weight.shape, weight, eps)
    else:
        y = F.layer_norm(x, weight.shape, weight, bias, eps)
    return ACTIVATIONS[act](y)


def _check(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    eps: float,
    rms: bool,
    act: str,
    shift: Tensor | None = None,
) -> None:
    check_tensors({'x': x, 'weight': weight}, {'bias': bias, 'shift': shift})
    check_eps(eps)
    check_flags(rms=rms)
    weights = weight, bias, shift
    if x.ndim != 4 or any(w is not None and w.shape != x.shape[3:] for w in weights):
        found = f'{list(x.shape)} and {[None if w is None else list(w.shape) for w in weights]}'
        raise ValueError(f'x must be [B, H, W, C], weight, bias and shift [C], got {found}')
    if rms and bias is not None:
        raise ValueError('RMSNorm (rms=True) has no bias')
    if act not in list(ACTIVATIONS):
        raise ValueError(f'act must be one of {list(ACTIVATIONS)}, got {act!r}')


def _fits(backend: str, x: Tensor) -> bool:
    if x.shape[3] > MAX_WIDTH:
        if backend == 'triton':
            raise ValueError(f"backend 'triton' takes up to {MAX_WIDTH} channels, got {x.shape[3]}")
        backend = 'torch'
    return use_triton(__name__, backend, x)
