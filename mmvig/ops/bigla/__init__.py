"""Bidirectional gated linear attention (BiGLA), the token mixer's operator in ViG.

Source: Liao et al., "ViG: Linear-complexity Visual Sequence Learning with Gated Linear Attention",
AAAI 2025 (arXiv 2405.18425), bidirectional gated linear attention.
"""

import logging
import math

import torch
from torch import Tensor

from mmvig.ops.arguments import FLOATS, check_tensors
from mmvig.ops.backend import why_not_triton
from mmvig.ops.bigla.forms import bigla_chunked
from mmvig.ops.bigla.reference import bigla_reference

__all__ = ['BACKENDS', 'GATE_NORMALIZER', 'bigla', 'bigla_packed']

GATE_NORMALIZER = 16.0

BACKENDS = ('reference', 'chunked', 'triton')
# Widths K and V that the Triton kernels take.
MAX_WIDTH = 256


def bigla(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g_fwd: Tensor,
    g_bwd: Tensor,
    *,
    scale: float | None = None,
    gate_normalizer: float = GATE_NORMALIZER,
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
        backend: 'reference' (token loop, the definition), 'chunked' (plain PyTorch, any device),
            'triton' (CUDA devices from compute capability 8.0, no float64, K and V up to 256; no second
            derivative) or 'auto': 'triton' where it can, else 'chunked'. Default: 'auto'.

    Returns:
        ``[B, N, H, V]`` in v's dtype. Sums are accumulated in float32 (float64 for float64 inputs).

    Raises:
        TypeError: an argument is not a floating-point tensor, or dtypes disagree.
        ValueError: ranks, sizes or devices disagree, an option is out of its range, or 'triton' cannot take
            these inputs.
    """
    _check_tensors(q, k, v, g_fwd, g_bwd)
    scale = _check_options(scale, gate_normalizer, q.shape[-1])
    backend = _choose(backend, q, q.shape[-1], v.shape[-1])
    inputs = (q, k, v, g_fwd, g_bwd)
    if backend == 'triton':
        from mmvig.ops.bigla.op import bigla_op

        return bigla_op(*inputs, scale, gate_normalizer)
    return (bigla_chunked if backend == 'chunked' else bigla_reference)(*inputs, scale, gate_normalizer)


def bigla_packed(
    qkv: Tensor,
    gates: Tensor,
    num_heads: int,
    *,
    scale: float | None = None,
    gate_normalizer: float = GATE_NORMALIZER,
    backend: str = 'auto',
) -> Tensor:
    """:func:`bigla` on the outputs of two fused projections, as they are in memory.

    The Triton backend reads both in place and writes their gradients in place, so that autograd has nothing
    to concatenate.

    Args:
        qkv: queries, keys and values side by side ``[B, N, H * (2 K + V)]``, heads contiguous within each.
        gates: raw logits of the forward and backward gate side by side ``[B, N, 2 * H * K]``.
        num_heads: H.
        scale, gate_normalizer, backend: see :func:`bigla`.

    Returns:
        ``[B, N, H * V]`` in qkv's dtype.

    Raises:
        TypeError, ValueError: as :func:`bigla`, or the widths do not divide into heads.
    """
    for name, x in (('qkv', qkv), ('gates', gates)):
        if not isinstance(x, Tensor):
            raise TypeError(f'{name} must be a torch.Tensor, got {type(x).__name__}')
        if x.ndim != 3:
            raise ValueError(f'{name} must have 3 dimensions [B, N, channels], got {_shape(x)}')
    if isinstance(num_heads, bool) or not isinstance(num_heads, int):
        raise TypeError(f'num_heads must be an int, got {num_heads!r}')
    key_width, value_width = gates.shape[-1] // 2, qkv.shape[-1] - gates.shape[-1]
    if num_heads < 1 or gates.shape[-1] % (2 * num_heads) or value_width <= 0 or value_width % num_heads:
        raise ValueError(
            f'qkv and gates must be H * (2 K + V) and 2 * H * K wide with H = {num_heads}, '
            f'got {_shape(qkv)} and {_shape(gates)}'
        )
    backend = _choose(backend, qkv, key_width // num_heads, value_width // num_heads)
    if backend != 'triton':
        options = {'scale': scale, 'gate_normalizer': gate_normalizer, 'backend': backend}
        return bigla(*unpack(qkv, gates, num_heads), **options).flatten(2)
    if (
        qkv.shape[:2] != gates.shape[:2]
        or gates.dtype not in (qkv.dtype, torch.float32)
        or not (qkv.shape[1] and qkv.device == gates.device and qkv.dtype in FLOATS)
    ):
        _check_tensors(
            *unpack(qkv, gates, num_heads)
        )  # names what disagrees; views take longer than a launch
    scale = _check_options(scale, gate_normalizer, key_width // num_heads)
    from mmvig.ops.bigla.op import bigla_packed_op

    return bigla_packed_op(qkv, gates, num_heads, scale, gate_normalizer)


def unpack(qkv: Tensor, gates: Tensor, num_heads: int) -> tuple[Tensor, ...]:
    """Views q, k, v, g_fwd, g_bwd ``[B, N, H, K or V]`` of the two projections' outputs."""
    keys = gates.shape[-1] // 2
    parts = (*qkv.split([keys, keys, qkv.shape[-1] - 2 * keys], dim=-1), *gates.chunk(2, dim=-1))
    return tuple(x.unflatten(-1, (num_heads, -1)) for x in parts)


def check_backend(backend: str) -> None:
    """Raise ValueError unless ``backend`` is 'auto' or the name of a backend."""
    if backend != 'auto' and backend not in BACKENDS:
        raise ValueError(f"backend must be 'auto' or one of {sorted(BACKENDS)}, got {backend!r}")


def _choose(backend: str, x: Tensor, key_dim: int, value_dim: int) -> str:
    """The backend to run for inputs like ``x``; ValueError where 'triton' is asked for and cannot run."""
    check_backend(backend)
    if backend not in ('auto', 'triton'):
        return backend
    if backend == 'auto' and x.is_meta:
        return 'chunked'
    if backend == 'auto' and x.device.type == 'cpu':
        _announce('the inputs are on the CPU', logging.INFO)
        return 'chunked'
    if max(key_dim, value_dim) > MAX_WIDTH:
        reason = f'it takes widths K and V up to {MAX_WIDTH}, got {key_dim} and {value_dim}'
    else:
        reason = why_not_triton(__name__, x)
    if reason is None:
        return 'triton'
    if backend == 'triton':
        raise ValueError(f"backend 'triton' cannot run here: {reason}; use backend='auto' or 'chunked'")
    _announce(reason, logging.WARNING)
    return 'chunked'


@torch.compiler.assume_constant_result
def _announce(reason: str, level: int) -> None:
    if reason not in _announced:
        _announced.add(reason)
        logging.getLogger('mmvig').log(
            level, "bigla runs on the 'chunked' backend, not on 'triton': %s", reason
        )


_announced: set[str] = set()


def _check_options(scale: float | None, gate_normalizer: float, key_dim: int) -> float:
    if scale is None:
        scale = int(key_dim) ** -0.5  # torch.jit.trace has sizes as tensors
    for name, value in (('scale', scale), ('gate_normalizer', gate_normalizer)):
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise TypeError(f'{name} must be a number, got {value!r}')
    if not abs(scale) < math.inf:
        raise ValueError(f'scale must be a finite number, got {scale}')
    if not 0 < gate_normalizer < math.inf:
        raise ValueError(f'gate_normalizer must be a finite number > 0, got {gate_normalizer}')
    return float(scale)


def _check_tensors(q: Tensor, k: Tensor, v: Tensor, g_fwd: Tensor, g_bwd: Tensor) -> None:
    tensors = {'q': q, 'k': k, 'v': v, 'g_fwd': g_fwd, 'g_bwd': g_bwd}
    check_tensors(tensors)
    for name, x in tensors.items():
        if x.ndim != 4:
            raise ValueError(f'{name} must have 4 dimensions [B, N, H, K or V], got {_shape(x)}')
        allowed = (q.dtype, torch.float32) if name.startswith('g_') else (q.dtype,)
        if x.dtype not in allowed:
            expected = ' or '.join(str(dtype) for dtype in dict.fromkeys(allowed))
            raise TypeError(f'{name} must have dtype {expected} to go with q, got {x.dtype}')
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
