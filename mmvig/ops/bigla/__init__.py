"""Bidirectional gated linear attention (BiGLA), the token mixer's operator in ViG.

Source: Liao et al., "ViG: Linear-complexity Visual Sequence Learning with Gated Linear Attention",
AAAI 2025 (arXiv 2405.18425), bidirectional gated linear attention.
"""

import math

import torch
from torch import Tensor

from mmvig.ops.bigla.chunked import bigla_chunked
from mmvig.ops.bigla.reference import bigla_reference

__all__ = ['BACKENDS', 'bigla']

BACKENDS = {'reference': bigla_reference, 'chunked': bigla_chunked}
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def bigla(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g_fwd: Tensor,
    g_bwd: Tensor,
    *,
    scale: float | None = None,
    gate_normalizer: float = 16.0,
    backend: str = 'auto',
) -> Tensor:
    """Gated linear attention over a token sequence in both directions at once.

    With a_t = exp(logsigmoid(g_fwd_t) / gate_normalizer) and b_t likewise from g_bwd::

        S_t = diag(a_t) S_(t-1) + k_t v_t^T        R_t = diag(b_t) R_(t+1) + k_t v_t^T
        o_t = scale * q_t^T (S_t + R_t) / 2

    A token's own key and value count in both directions. Time and memory are linear in N with
    'chunked'. The result is differentiable with respect to all five tensors.

    Args:
        q: queries ``[B, N, H, K]`` (batch, tokens, heads, key width), any strides, N >= 1.
        k: keys ``[B, N, H, K]``.
        v: values ``[B, N, H, V]``.
        g_fwd: forward decay gate, raw logits ``[B, N, H, K]``, in q's dtype or float32.
        g_bwd: backward decay gate, raw logits ``[B, N, H, K]``, in q's dtype or float32.
        scale: factor on the queries. None: K ** -0.5.
        gate_normalizer: divisor of the log gates, > 0. Default: 16.
        backend: 'reference' (token loop, the definition), 'chunked' (plain PyTorch, any device) or
            'auto' (the fastest that runs here). Default: 'auto'.

    Returns:
        ``[B, N, H, V]`` in v's dtype. Sums are accumulated in float32 (float64 for float64 inputs).

    Raises:
        TypeError: an argument is not a floating-point tensor, or dtypes disagree.
        ValueError: ranks, sizes or devices disagree, or an option is out of its range.
    """
    _check_tensors(q, k, v, g_fwd, g_bwd)
    if scale is None:
        scale = q.shape[-1] ** -0.5
    if not abs(scale) < math.inf:
        raise ValueError(f'scale must be a finite number, got {scale}')
    if not 0 < gate_normalizer < math.inf:
        raise ValueError(f'gate_normalizer must be a finite number > 0, got {gate_normalizer}')
    check_backend(backend)
    function = BACKENDS['chunked' if backend == 'auto' else backend]
    return function(q, k, v, g_fwd, g_bwd, scale, gate_normalizer)


def check_backend(backend: str) -> None:
    """Raise ValueError unless ``backend`` is 'auto' or the name of a backend."""
    if backend != 'auto' and backend not in BACKENDS:
        raise ValueError(f"backend must be 'auto' or one of {sorted(BACKENDS)}, got {backend!r}")


def _check_tensors(q: Tensor, k: Tensor, v: Tensor, g_fwd: Tensor, g_bwd: Tensor) -> None:
    tensors = {'q': q, 'k': k, 'v': v, 'g_fwd': g_fwd, 'g_bwd': g_bwd}
    for name, x in tensors.items():
        if not isinstance(x, Tensor):
            raise TypeError(f'{name} must be a torch.Tensor, got {type(x).__name__}')
        if x.dtype not in DTYPES:
            raise TypeError(f'{name} must be float16, bfloat16, float32 or float64, got {x.dtype}')
        if x.ndim != 4:
            raise ValueError(f'{name} must have 4 dimensions [B, N, H, K or V], got {_shape(x)}')
        allowed = (q.dtype, torch.float32) if name.startswith('g_') else (q.dtype,)
        if x.dtype not in allowed:
            expected = ' or '.join(str(dtype) for dtype in dict.fromkeys(allowed))
            raise TypeError(f'{name} must have dtype {expected} to go with q, got {x.dtype}')
        if x.device != q.device:
            raise ValueError(f'{name} must be on the device of q, {q.device}, got {x.device}')
        if name != 'v' and x.shape != q.shape:
            raise ValueError(f'{name} must have the shape of q, {_shape(q)}, got {_shape(x)}')
    if v.shape[:3] != q.shape[:3]:
        raise ValueError(
            f'v must agree with q in [B, N, H], {_shape(q)[:3]}, got {_shape(v)[:3]} of {_shape(v)}'
        )
    for name, x in (('q', q), ('v', v)):
        if 0 in x.shape[1:]:
            raise ValueError(f'{name} must have N, H and width >= 1, got {_shape(x)}')


def _shape(x: Tensor) -> list[int]:
    return list(x.shape)
