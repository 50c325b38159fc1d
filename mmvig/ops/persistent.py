"""Memory on a GPU that outlives the call that makes it, such as constants of kernels."""

import functools
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

__all__ = ['is_capturing', 'persistent', 'persistent_cache']

Result = TypeVar('Result')


def is_capturing(device: torch.device) -> bool:
    """Whether the current stream is being captured, so that new memory belongs to a graph."""
    return device.type == 'cuda' and torch.cuda.is_current_stream_capturing()


def persistent(make: Callable[[], Result], device: torch.device) -> Result:
    """What ``make()`` returns, with tensors that later calls may use, on any stream.

    Not to be called during a capture, which may forbid other threads to allocate.

    Where Inductor uses CUDA graphs (mode 'reduce-overhead'), all that its thread allocates (in older
    versions of PyTorch: its stream) comes from a private pool, and must not outlive the call but as a
    result. So this is done by another thread, on the default stream. That has finished when this returns;
    but to it the memory belongs: before other streams' memory is freed, record_stream must name them.
    """
    if device.type != 'cuda':
        with torch.inference_mode(False):  # later calls may need gradients
            return make()

    def run() -> Result:
        with torch.cuda.device(device):
            made = make()
            torch.cuda.current_stream().synchronize()
        return made

    with ThreadPoolExecutor(max_workers=1) as thread:
        return thread.submit(run).result()


def persistent_cache(make: Callable[..., Result]) -> Callable[..., Result]:
    """Keep what ``make(device, *more)`` returns, for good, since CUDA graphs may read it.

    Made during a capture, it belongs to that graph, which fills it at each replay, and is not kept.
    """
    cache: dict[tuple, Result] = {}

    @functools.wraps(make)
    def get(device: torch.device, *more) -> Result:
        found = cache.get((device, more))
        if found is None:
            if is_capturing(device):
                return make(device, *more)
            made = persistent(functools.partial(make, device, *more), device)
            found = cache.setdefault((device, more), made)  # another thread's may be in use already
        return found

    return get
