"""The memory of graphs: what one module's need between passes, and what all of a stream share."""

import contextlib
import gc
import threading
import weakref
from collections.abc import Iterator

import torch
from torch import Tensor

from mmvig.ops.torch_private import clear_cublas_workspaces, end_allocations

CAPTURING = threading.Lock()  # one capture at a time, in any thread


@contextlib.contextmanager
def _own_workspace() -> Iterator[None]:
    """Let cuBLAS take its workspace from this capture's memory, and the next one not from there.

    It keeps one for each stream, which would outlive the graphs, or be lost with some that others do not
    know of (pytorch/pytorch#193402).
    """
    clear_cublas_workspaces()
    try:
        yield
    finally:
        clear_cublas_workspaces()


@contextlib.contextmanager
def _no_collection() -> Iterator[None]:
    """Collect no garbage meanwhile: there may be a graph in it, whose end breaks a capture."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


class Lane:
    """What the graphs of one thread and stream share, of all modules: they run one after the other.

    Its memory is that of passes which leave nothing: backward passes, and those without gradients. Who uses
    it holds the lock, as another thread may run the backward pass.
    """

    def __init__(self, device: torch.device):
        self.stream = torch.cuda.Stream(device)
        self.handle = torch.cuda.graph_pool_handle()
        self.lock = threading.Lock()
        with torch.cuda.device(device), _no_collection():
            self._holder = self._record_little(self.handle)  # memory without a graph cannot be used again

    @classmethod
    def of(cls, where: tuple) -> 'Lane':
        """The lane of a device, thread and stream, for as long as somebody holds it."""
        lane = _lanes.get(where)
        if lane is None:
            lane = _lanes[where] = cls(where[0])
        return lane

    @contextlib.contextmanager
    def recording(self, graph: torch.cuda.CUDAGraph, handle: tuple) -> Iterator[None]:
        """Record what is launched meanwhile, in the memory of a handle.

        As ``torch.cuda.graph`` does, which besides waits for the GPU and gives all cached memory back: the
        passes after it then take as long again to get that.
        """
        with torch.cuda.stream(self.stream), _no_collection(), _own_workspace():
            # Not the mode 'global': other threads may pin memory for the next batches.
            graph.capture_begin(handle, capture_error_mode='thread_local')
            try:
                yield
                graph.capture_end()
            except BaseException:
                self._abandon(graph, handle)
                raise

    def _abandon(self, graph: torch.cuda.CUDAGraph, handle: tuple) -> None:
        """End a capture that has failed, and undo what PyTorch then leaves half done."""
        try:
            graph.capture_end()
        except RuntimeError:  # it says no more than that something has failed
            end_allocations(self.stream.device, handle)
            self._record_little()  # the random generator refuses to draw until a capture ends well

    def _record_little(self, *handle: tuple) -> torch.cuda.CUDAGraph:
        place, graph = torch.empty(1, device=self.stream.device), torch.cuda.CUDAGraph()
        with torch.cuda.stream(self.stream):
            graph.capture_begin(*handle, capture_error_mode='thread_local')
            place.zero_()
            graph.capture_end()
        return graph


_lanes: 'weakref.WeakValueDictionary[tuple, Lane]' = weakref.WeakValueDictionary()


class Pool:
    """The memory of one module's graphs in a lane, of which one is in use at a time."""

    def __init__(self, where: tuple):
        self.where = where
        with CAPTURING:
            self.lane = Lane.of(where)
            torch.cuda.empty_cache()  # of the eager passes, whose place its graphs take
        self.handle = torch.cuda.graph_pool_handle()
        self.size = 0  # bytes that nothing else can use, with what it has added to the lane's
        self.node: weakref.ref | None = None

    def is_needed(self) -> bool:
        """Whether a backward pass may still come that needs what the last forward pass has left."""
        return self.node is not None and self.node() is not None


class _Memory:
    """A tensor's memory in a graph's pool or lane, which holds it for as long as there is a graph.

    The tensor itself must go: graphs that share a pool reuse what is free when they are captured.
    """

    def __init__(self, x: Tensor):
        self.size = 1 + sum((n - 1) * step for n, step in zip(x.shape, x.stride(), strict=True))
        self.__cuda_array_interface__ = {
            'version': 3,
            'typestr': '|u1',
            'shape': (self.size * x.element_size(),),
            'data': (x.data_ptr(), False),
        }


def alias(x: Tensor) -> Tensor:
    """The same memory as a tensor that does not own it."""
    flat = torch.as_tensor(_Memory(x), device=x.device).view(x.dtype)
    return flat.as_strided(x.shape, x.stride())


def places(tensors: list[Tensor]) -> list[Tensor]:
    """Memory for copies of the same shapes, of which a capture records no write.

    In PyTorch's deterministic mode it would: a replay would then fill in NaN what has been copied there.
    """
    deterministic = torch.utils.deterministic
    before = deterministic.fill_uninitialized_memory
    deterministic.fill_uninitialized_memory = False
    try:
        return list(map(torch.empty_like, tensors))
    finally:
        deterministic.fill_uninitialized_memory = before
