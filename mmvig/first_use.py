"""Kernels compiled side by side before a module's first pass, not one by one as the pass meets them."""

import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, as_completed, wait
from contextlib import ExitStack, contextmanager, suppress
from typing import TextIO

import torch
from mmengine.dist import is_main_process
from mmengine.logging import print_log
from mmengine.utils import ProgressBar
from torch import Tensor, nn

from mmvig.ops.backend import why_not_triton
from mmvig.ops.persistent import is_capturing
from mmvig.ops.plain import (
    PLAIN_TENSORS,
    has_saved_tensors_hooks,
    is_known,
    is_watched,
    leaves_no_trace,
)
from mmvig.ops.torch_private import is_in_backward_pass

if os.name == 'posix':
    import fcntl

PATIENCE = 2.0  # seconds of compiling or waiting from which on we say so
_one_by_one = threading.Lock()


class FirstUse:
    """Compiles what a module's passes launch, before the first of each kind; a copied one starts anew.

    A kind is the input's device and dtype, whether it gets a gradient, autocast's dtype, training mode and
    whether gradients are recorded. One pass, with its gradients, is run to note the kernels, and thrown
    away: random states, weights and their gradients stay as they are. What other sizes need besides is
    compiled as it is met. So is everything where that pass could be seen: with hooks on submodules,
    parameters or saved tensors, modules that are not ours or PyTorch's, buffers, FSDP's or DataParallel's
    parameters, in a backward pass, in torch.compile, a tracer, torch.func, or a capture.
    """

    def __init__(self):
        self._kinds: set[tuple] = set()

    def __reduce__(self):
        return FirstUse, ()

    def prepare(self, module: nn.Module, call: Callable, x: Tensor) -> None:
        """Compile what ``call(x)`` and its gradients launch, if it is the first of its kind.

        Args:
            module: what ``call`` takes its parameters from.
            call: a method of the module, from a tensor to a tuple of tensors.
            x: its argument.
        """
        if torch.compiler.is_compiling() or not x.is_cuda or type(x) not in PLAIN_TENSORS:
            return
        autocast = torch.is_autocast_enabled('cuda') and torch.get_autocast_dtype('cuda')
        kind = x.device, x.dtype, x.requires_grad, autocast, module.training, torch.is_grad_enabled()
        if kind in self._kinds:
            return
        with _one_by_one, torch.cuda.device(x.device):  # a second thread waits, and finds all compiled
            if kind not in self._kinds and _is_unseen(module, call, x):
                compile_all(note(module, call, x), x.device)
            self._kinds.add(kind)


def _is_unseen(module: nn.Module, call: Callable, x: Tensor) -> bool:
    """Whether a pass through a module leaves no trace but kernels, and may launch some."""
    inner, parameters = list(module.modules())[1:], list(module.parameters())
    return (
        x.numel() > 0
        and why_not_triton('mmvig.ops.norm', x) is None
        and any(getattr(each, 'backend', None) in ('auto', 'triton') for each in inner)
        and bool(parameters)
        and getattr(call, '__self__', None) is module  # nobody has put another in its place
        and all(type(p) in PLAIN_TENSORS and not p._backward_hooks for p in parameters)
        and is_known(module)
        and leaves_no_trace(module)
        and not (is_watched() or is_capturing(x.device))
        # There, this thread may compute the outer pass's gradients while it waits for those of this one.
        and not is_in_backward_pass()
        and not has_saved_tensors_hooks()
    )


def note(module: nn.Module, call: Callable, x: Tensor) -> list[tuple]:
    """What a pass and its gradients launch and is not compiled, as arguments for ``compile_kernel``.

    Longest code first: a kernel that takes long to compile and starts last would be waited for.
    """
    from mmvig.ops.launch import noting

    x, device = x.detach().requires_grad_(x.requires_grad), x.device
    learning = [p for p in (*module.parameters(), x) if p.requires_grad]
    autocast = torch.get_autocast_dtype(device.type), torch.is_autocast_enabled(device.type)
    with (
        noting() as kernels,
        torch.random.fork_rng([device] if x.is_cuda else []),
        # Casts of weights that autocast keeps would belong to this pass's graph.
        torch.autocast(device.type, *autocast, cache_enabled=False),
        torch.autograd.set_multithreading_enabled(False),  # only this thread notes
    ):
        maps = [y for y in call(x) if y.requires_grad]
        if maps:
            torch.autograd.grad(maps, learning, list(map(torch.zeros_like, maps)), allow_unused=True)
    return sorted(kernels.values(), key=lambda each: len(each[0].fn.__code__.co_code), reverse=True)


def compile_all(kernels: list[tuple], device: torch.device) -> None:
    """Compile kernels that :func:`note` has found; one process at a time does so in a cache folder."""
    if not kernels:
        return
    from mmvig.ops.launch import cache_folder, compile_kernel, prepare_compiler

    folder = cache_folder()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count() or 1
    threads = min(len(kernels), cores)
    with _alone(folder), ThreadPoolExecutor(threads) as pool:
        prepare_compiler(device)
        jobs = [pool.submit(compile_kernel, device, *each) for each in kernels]
        try:
            if wait(jobs, PATIENCE).not_done:
                name = torch.cuda.get_device_name(device)
                print_log(
                    f'compiling {len(jobs)} kernels for {device} ({name}) with {threads} threads, once; '
                    f'they are kept in {folder}',
                    'current',
                )
                _show_progress(jobs)
            for job in jobs:
                job.result()
        finally:
            pool.shutdown(cancel_futures=True)


def _show_progress(jobs: list[Future]) -> None:
    """Show a bar until all jobs are done, where somebody can see it."""
    if not (is_main_process() and sys.stderr.isatty()):
        return
    bar = ProgressBar(len(jobs), file=sys.stderr)
    for _ in as_completed(jobs):
        bar.update()
    sys.stderr.write('\n')


@contextmanager
def _alone(folder: str) -> Iterator[None]:
    """Have other processes that compile into a folder wait; the system ends the lock with the process.

    Where it cannot be locked, nobody waits: each compiles for itself, and Triton's files are whole anyway.
    """
    with ExitStack() as stack:
        if os.name == 'posix':
            with suppress(OSError):
                os.makedirs(folder, exist_ok=True)
                _wait_for(stack.enter_context(open(os.path.join(folder, 'mmvig.lock'), 'a')))
        yield


def _wait_for(lock: TextIO) -> None:
    """Take a lock, and say so if that takes long."""
    start, is_said = time.monotonic(), False
    while True:
        try:
            # Unlike flock's, these locks are not inherited by data workers, and NFS knows them.
            return fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if not is_said and time.monotonic() - start > PATIENCE:
                print_log(f'waiting for another process that compiles kernels ({lock.name})', 'current')
                is_said = True
            time.sleep(0.05)
