"""Checks of arguments that the operators share, with errors that name the argument."""

import math

import torch
from torch import Tensor

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def check_tensors(required: dict[str, Tensor], optional: dict[str, Tensor | None] | None = None) -> None:
    """Check that arguments are floating-point tensors on one device; those of ``optional`` may be None.

    Raises:
        TypeError: one is no tensor, or of another dtype.
        ValueError: one is on another device than the first.
    """
    given = {name: x for name, x in (optional or {}).items() if x is not None}
    device = None
    for name, x in {**required, **given}.items():
        if not isinstance(x, Tensor):
            raise TypeError(f'{name} must be a torch.Tensor, got {type(x).__name__}')
        if x.dtype not in FLOATS:
            raise TypeError(f'{name} must be float16, bfloat16, float32 or float64, got {x.dtype}')
        device = x.device if device is None else device
        if x.device != device:
            first = next(iter(required))
            raise ValueError(f'{name} must be on the device of {first}, {device}, got {x.device}')


def check_eps(eps: float) -> None:
    """Raise TypeError unless eps is a number, ValueError unless it is finite and not negative."""
    if isinstance(eps, bool) or not isinstance(eps, (int, float)):
        raise TypeError(f'eps must be a number, got {eps!r}')
    if not 0 <= eps < math.inf:
        raise ValueError(f'eps must be a finite number >= 0, got {eps}')


def check_dtype(dtype: torch.dtype | None) -> None:
    """Raise TypeError unless a result can have this dtype; None stands for the inputs'."""
    if dtype is not None and dtype not in FLOATS:
        raise TypeError(f'dtype must be float16, bfloat16, float32 or float64, got {dtype!r}')


def check_flags(**flags: bool) -> None:
    """Raise TypeError unless all are True or False."""
    for name, value in flags.items():
        if not isinstance(value, bool):
            raise TypeError(f'{name} must be True or False, got {value!r}')


def check_one_dtype(**tensors: Tensor) -> None:
    """Raise TypeError unless tensors have one dtype, for products of PyTorch without autocast."""
    dtypes = {x.dtype for x in tensors.values()}
    device = next(iter(tensors.values())).device.type
    if len(dtypes) > 1 and not torch.is_autocast_enabled(device):
        found = ', '.join(f'{name} {x.dtype}' for name, x in tensors.items())
        raise TypeError(f'{" and ".join(tensors)} must have one dtype without autocast, got {found}')
