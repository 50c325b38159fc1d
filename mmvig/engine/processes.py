"""Signals and tensors between a run, its data workers and who started it."""

import ctypes
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from functools import partial
from multiprocessing.reduction import ForkingPickler
from multiprocessing.util import Finalize

import torch
from torch import Tensor
from torch.multiprocessing.reductions import reduce_tensor
from torch.utils.data import DataLoader

_PR_SET_PDEATHSIG = 1  # linux/prctl.h
_SAME_REQUEST = 5.0  # seconds
SMALL = 2**16  # bytes of a tensor that is sent by value


class StopSignal:
    """Notes SIGTERM while it is entered, so that a run can end where it can be resumed.

    One that follows within five seconds is the same request: a scheduler signals all processes of a job,
    and torchrun hands on what it gets. A later one ends the process. Only a main thread can receive
    signals.
    """

    received = False

    def __enter__(self) -> 'StopSignal':
        self._main = threading.current_thread() is threading.main_thread()
        if self._main:
            self._before = signal.signal(signal.SIGTERM, self._note)
        return self

    def __exit__(self, *_) -> None:
        if self._main:
            signal.signal(signal.SIGTERM, self._before)

    def ignore(self) -> None:
        """Ignore SIGTERM from here on, in a process that is ending."""
        self._before = signal.SIG_IGN
        if self._main:
            signal.signal(signal.SIGTERM, signal.SIG_IGN)

    def _note(self, *_) -> None:
        now = time.monotonic()
        if not self.received:
            self.received, self._since = True, now
        elif now - self._since > _SAME_REQUEST:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            signal.raise_signal(signal.SIGTERM)


def tie_workers(loader: DataLoader) -> DataLoader:
    """Let a loader's workers end with this process, however it ends, and by nothing sent to its group.

    They send small tensors by value: PyTorch hands over a file for each, which costs more than
    the boxes and labels of a picture are worth.

    Args:
        loader: changed in place; its own ``worker_init_fn`` is kept.
    """
    if loader.num_workers:
        context = loader.multiprocessing_context or multiprocessing
        # A worker of a fork server is the server's child, and the server ends with this process.
        parent = None if context.get_start_method() == 'forkserver' else os.getpid()
        loader.worker_init_fn = partial(_tie, parent, loader.worker_init_fn)
        Finalize(None, kill_workers, exitpriority=0)  # before multiprocessing waits for them at exit
    return loader


def _tie(parent: int | None, init: Callable[[int], None] | None, worker_id: int) -> None:
    """Run in a new worker, before the loader's own ``worker_init_fn``."""
    if sys.platform == 'linux':
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if parent is not None and os.getppid() != parent:  # it ended before prctl
            os._exit(1)
    ForkingPickler.register(Tensor, _reduced)
    # A scheduler sends it to all processes of a job; the run still needs its data then.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if init is not None:
        init(worker_id)


def _reduced(x: Tensor) -> tuple:
    """How a worker's tensor is pickled."""
    plain = x.device.type == 'cpu' and x.layout == torch.strided and not x.requires_grad
    if not plain or x.nbytes > SMALL or x.dtype == torch.bfloat16 or x.is_shared():
        return reduce_tensor(x)
    return torch.from_numpy, (x.numpy(),)


def kill_workers() -> None:
    """End this process's data workers, at its exit: they ignore what multiprocessing would send."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's handler would report it as a failure
    for child in multiprocessing.active_children():
        if child.daemon:
            child.kill()
