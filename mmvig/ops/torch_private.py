"""What PyTorch has faster than in its public interface, or not there at all."""

import contextlib

import torch
from torch import Tensor


def device_of(x: Tensor) -> contextlib.AbstractContextManager:
    """Make the device of a tensor the current one, as ``torch.cuda.device_of``, which takes longer."""
    if not x.is_cuda or torch._C._cuda_getDevice() == x.get_device():
        return _NOTHING
    return torch.cuda.device(x.get_device())


_NOTHING = contextlib.nullcontext()


def current_stream(device: torch.device) -> int:
    """A device's current stream, as CUDA knows it."""
    return torch._C._cuda_getCurrentRawStream(device.index) if device.type == 'cuda' else 0


# (tensor, shape, strides, start after the tensor's own) -> a view that autograd does not know of.
# Inductor's as_strided, which takes half as long.
strided_view = torch._C._dynamo.guards._reinterpret_tensor


def is_in_backward_pass() -> bool:
    """Whether autograd runs this, as in a hook or where activations are computed again."""
    return torch._C._current_graph_task_id() != -1


def clear_cublas_workspaces() -> None:
    """Free what cuBLAS keeps for each stream."""
    torch._C._cuda_clearCublasWorkspaces()


def end_allocations(device: torch.device, handle: tuple) -> None:
    """Tell the allocator that a capture which has failed to end is over, unless PyTorch has done so.

    Until then, it never frees what another stream has used.
    """
    with contextlib.suppress(RuntimeError):  # it says that it is not recording
        torch._C._cuda_endAllocateToPool(device.index, handle)
