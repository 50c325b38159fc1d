"""Whether an operator's Triton form can run, and whether its parts may be called past their modules."""

import functools
import importlib

import torch
from torch import Tensor, nn

PLAIN_TENSORS = frozenset((Tensor, nn.Parameter))


def why_not_triton(operator: str, x: Tensor) -> str | None:
    """Why the Triton form of an operator cannot take inputs like ``x``, None if it can.

    Args:
        operator: the package whose module ``triton`` has the kernels and registers the PyTorch operators.
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
        module = importlib.import_module(f'{operator}.triton')
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


def has_hooks(module: nn.Module) -> bool:
    """Whether calling a module does more than its forward()."""
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
    )


def has_global_hooks() -> bool:
    """Whether calling any module does."""
    modules = nn.modules.module
    return bool(
        modules._global_forward_hooks
        or modules._global_forward_pre_hooks
        or modules._global_backward_hooks
        or modules._global_backward_pre_hooks
    )


def is_plain(module: nn.Module, kind: type) -> bool:
    """Whether calling a module is what its type ``kind`` does with plain tensors, and nothing else.

    Not so with hooks, a ``forward`` of the instance (as accelerate sets), parametrisations (which change
    the type) and weights of a subclass of Tensor (DTensor, torchao's).
    """
    if type(module) is not kind or has_own_forward(module) or has_hooks(module) or has_global_hooks():
        return False
    own = module.__dict__  # FSDP puts views of its flat parameter there
    weights = *module._parameters.values(), own.get('weight'), own.get('bias')
    return all(x is None or type(x) in PLAIN_TENSORS for x in weights)


def has_own_forward(module: nn.Module) -> bool:
    """Whether a module's ``forward`` has been set in the instance, in place of its type's."""
    return 'forward' in module.__dict__


def is_watched() -> bool:
    """Whether a dispatch mode, a tracer or a transform of torch.func must see each operator."""
    return (
        torch._C._len_torch_dispatch_stack() > 0
        or torch._C._get_tracing_state() is not None
        or torch._C._functorch.peek_interpreter_stack() is not None
    )
