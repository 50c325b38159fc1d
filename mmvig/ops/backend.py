"""Whether an operator's Triton form can run."""

import functools
import importlib

import torch
from torch import Tensor


def why_not_triton(operator: str, x: Tensor) -> str | None:
    """Why the Triton form of an operator cannot take inputs like ``x``, None if it can.

    Args:
        operator: the package whose module ``op`` launches the kernels and registers the PyTorch operators.
        x: an input.
    """
    return _why_not_triton(operator, x.device.type, x.device.index, x.dtype)


@torch.compiler.assume_constant_result
def _why_not_triton(operator: str, device_type: str, index: int | None, dtype: torch.dtype) -> str | None:
    # A function of its own: torch.compile looks through a cache.
    return _why_not_triton_cached(operator, device_type, index, dtype)


@functools.lru_cache(maxsize=256)
def _why_not_triton_cached(
    operator: str, device_type: str, index: int | None, dtype: torch.dtype
) -> str | None:
    try:
        from mmvig.ops.launch import unavailable
    except ImportError as error:
        return f'Triton cannot be imported ({error})'
    device = torch.device(device_type, index)
    reason = unavailable(device, dtype)
    if reason is None:
        module = importlib.import_module(f'{operator}.op')
        reason = unavailable(device, dtype, getattr(module, 'OLDEST_TRITON', (0, 0)))
    return reason


def use_triton(operator: str, backend: str, x: Tensor) -> bool:
    """Whether an operator with the backends 'torch' and 'triton' is to run on the latter.

    Args:
        operator: as for :func:`why_not_triton`.
        backend: 'torch', 'triton', or 'auto' for 'triton' where it can.
        x: an input.

    Raises:
        ValueError: the backend is unknown, or is 'triton' and cannot run.
    """
    if backend == 'torch' or (backend == 'auto' and x.device.type == 'cpu'):
        return False
    if backend not in ('auto', 'triton'):
        raise ValueError(f"backend must be 'auto', 'torch' or 'triton', got {backend!r}")
    reason = why_not_triton(operator, x)
    if reason and backend == 'triton':
        raise ValueError(f"backend 'triton' cannot run here: {reason}; use backend='auto' or 'torch'")
    return reason is None


def autocast_dtype(x: Tensor) -> torch.dtype:
    """The dtype that autocast would compute a product with ``x`` in: its own where autocast is off."""
    kind = x.device.type
    if kind == 'meta':  # PyTorch has no autocast for it
        return x.dtype
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
