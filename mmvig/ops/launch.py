"""Launching Triton's kernels, and compiling them ahead.

Importing this module imports Triton.
"""

import contextlib
import functools
import os
import shutil
import threading
from collections.abc import Callable, Iterator

import torch
import triton
from torch import Tensor

INTERPRETED = os.environ.get('TRITON_INTERPRET') == '1'
# The launcher's arguments are Triton's own affair: known for these versions, others go the public way.
VERSION = tuple(map(int, triton.__version__.split('.')[:2]))
FAST_LAUNCH = not INTERPRETED and (3, 4) <= VERSION <= (3, 8)
MIN_CAPABILITY = (8, 0)
MAX_GRID = 65535  # programs in a grid's second and third dimensions


def unavailable(device: torch.device, dtype: torch.dtype, oldest: tuple[int, int] = (0, 0)) -> str | None:
    """Why Triton's kernels cannot run on a device and dtype, or None if they can.

    ``oldest``: the first version of Triton that compiles them.
    """
    if dtype == torch.float64:
        return 'it computes in float32, and the inputs are float64'
    if device.type == 'meta':
        return 'the inputs are on the meta device, without values'
    if INTERPRETED:
        return None
    if oldest > VERSION:
        return f'it needs Triton {oldest[0]}.{oldest[1]} or newer, this is {triton.__version__}'
    if device.type != 'cuda':
        return f'it runs on CUDA devices, and the inputs are on {device}'
    capability = torch.cuda.get_device_capability(device)
    if capability < MIN_CAPABILITY:
        return f'it needs compute capability 8.0 or newer, {device} has {".".join(map(str, capability))}'
    if not any(map(shutil.which, (os.environ.get('CC', 'cc'), 'gcc', 'clang'))):
        return 'it needs a C compiler (gcc or clang, or CC set) for its launchers, and there is none'
    return None


class Constants(dict):
    """A kernel's constants and Triton's ``num_warps`` and ``num_stages``; not to be changed.

    They keep the compiled kernels, by what these are compiled for besides: Triton's own look-up takes
    longer than a small launch.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.compiled: dict = {}


def launch(kernel, key: tuple, grid: tuple, args: tuple, constants: Constants) -> None:
    """Launch a kernel on the current device and stream.

    Args:
        kernel: a Triton kernel whose parameters are ``args``, then ``constants``.
        key: what it is compiled for besides ``constants``, the device first; () if Triton must look.
        grid: three numbers of programs.
        args: its arguments, tensors first.
        constants: its constants.
    """
    found = constants.compiled.get((kernel.fn, key))
    if found:
        run, before, tensors, values = found
        stream = torch._C._cuda_getCurrentRawStream(key[0].index)
        # Addresses, as the launcher would look each up with the driver; the callers have seen the devices.
        run(*grid, stream, *before, *map(Tensor.data_ptr, args[:tensors]), *args[tensors:], *values)
    elif _noting.kernels is not None:
        if key:
            dtypes = [x.dtype if isinstance(x, Tensor) else x for x in args]
            _noting.kernels[kernel.fn, key, id(constants)] = kernel, dtypes, constants
    elif found is None and FAST_LAUNCH and key:
        constants.compiled[kernel.fn, key] = _launch_first(kernel, key, grid, args, constants)
    else:
        kernel[grid](*args, **constants)


class _Noting(threading.local):
    kernels: dict | None = None


_noting = _Noting()


@contextlib.contextmanager
def noting() -> Iterator[dict]:
    """Note what this thread would launch but for a compilation, and do not launch it; its results are void.

    Yields:
        A dict whose values are arguments for :func:`compile_kernel`, each kernel once. Kernels for which
        Triton must look (see :func:`launch`) are not among them.
    """
    _noting.kernels = {}
    try:
        yield _noting.kernels
    finally:
        _noting.kernels = None


@triton.jit
def _nothing():
    pass


def prepare_compiler(device: torch.device) -> None:
    """Set up what all compilations share, which threads that start together would each do."""
    compile_kernel(device, _nothing, [], Constants())


def compile_kernel(device: torch.device, kernel, dtypes: list, constants: Constants) -> None:
    """Compile what :func:`noting` has found on a device, or read it from Triton's cache; for any thread."""
    with torch.cuda.device(device):
        compiled = kernel.warmup(*dtypes, grid=(1, 1, 1), **constants)
        if VERSION < (3, 7):  # its launcher is compiled too, and kept on disk
            triton.runtime.driver.active.launcher_cls(compiled.src, compiled.metadata)


def cache_folder() -> str:
    """Where Triton keeps what it compiles."""
    if hasattr(triton, 'knobs'):
        return triton.knobs.cache.dir
    return os.environ.get('TRITON_CACHE_DIR', '').strip() or os.path.expanduser('~/.triton/cache')


def _launch_first(kernel, key: tuple, grid: tuple, args: tuple, constants: Constants) -> tuple:
    """Launch a kernel as Triton does; what :func:`launch` needs to do it itself, () if Triton must.

    Triton must where it gives the launcher other arguments than we would: wrong ones can end the process.
    """
    compiled = kernel.warmup(*args, grid=grid, **constants)
    with _recorded(compiled) as calls:
        kernel[grid](*args, **constants)
    values = [constants[name] for name in kernel.arg_names if name in constants]
    tensors = sum(isinstance(x, Tensor) for x in args)
    stream = torch._C._cuda_getCurrentRawStream(key[0].index)
    ours = *grid, stream, *_between(compiled), *args, *values
    if not any(_are_same(each, ours) for each in calls):
        return ()
    return *_launcher(compiled), tensors, values


@contextlib.contextmanager
def _recorded(compiled) -> Iterator[list[tuple]]:
    """Yield a list of the arguments that a compiled kernel's launcher is called with meanwhile."""
    launcher, calls = compiled.run, []

    def record(*arguments):
        calls.append(arguments)
        launcher(*arguments)

    name = 'run' if VERSION == (3, 4) else '_run'
    setattr(compiled, name, record)
    try:
        yield calls
    finally:
        setattr(compiled, name, launcher)


def _are_same(theirs: tuple, ours: tuple) -> bool:
    """Whether a launcher's arguments do the same; hooks can be chains of none, metadata is for hooks."""
    if any(getattr(hook, 'calls', hook) for hook in theirs[7:9]):
        return False
    pairs = zip((*theirs[:6], None, None, None, *theirs[9:]), ours, strict=False)
    return len(theirs) == len(ours) and all(
        a is b or (type(a) is type(b) is int and a == b) for a, b in pairs
    )


def _between(compiled) -> tuple:
    """A launcher's arguments between the stream and the kernel's own; None: no metadata and hooks."""
    return compiled.function, compiled.packed_metadata, None, None, None


def _launcher(compiled) -> tuple[Callable, tuple]:
    """What launches a compiled kernel, and its arguments between the stream and the kernel's."""
    launcher, arguments = compiled.run, _between(compiled)
    scratch = 'global_scratch_size', 'profile_scratch_size'
    if VERSION == (3, 6) and not any(getattr(launcher, name) for name in scratch):
        flags = launcher.launch_cooperative_grid, launcher.launch_pdl, None, None
        return launcher.launch, (arguments[0], *flags, *arguments[1:])  # as its __call__ does, in Python
    return launcher, arguments


def ceil_div(a: int, b: int) -> int:
    """Quotient rounded up (triton.cdiv takes microseconds)."""
    return -(-a // b)


@functools.lru_cache(maxsize=64)
def multiprocessors(device: torch.device) -> int:
    """How many multiprocessors a GPU has; 1 for the interpreter."""
    if device.type != 'cuda':
        return 1
    return torch.cuda.get_device_properties(device).multi_processor_count


def compile_key(*tensors: Tensor) -> tuple:
    """The key for :func:`launch` of kernels that are compiled for no number among their arguments.

    () where Triton must look: at an address that is no multiple of 16, or a tensor elsewhere, which it
    refuses.
    """
    device = tensors[0].get_device()
    for x in tensors:
        if x.data_ptr() % 16 or x.get_device() != device:
            return ()
    return tensors[0].device, *[x.dtype for x in tensors]
