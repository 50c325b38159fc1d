"""What the Triton backends share: where they run, launching kernels, making PyTorch operators.

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

from mmvig.ops.choice import PLAIN_TENSORS, is_watched

INTERPRETED = os.environ.get('TRITON_INTERPRET') == '1'
# The launcher's arguments are Triton's own affair: known for these versions, others go the public way.
VERSION = tuple(map(int, triton.__version__.split('.')[:2]))
FAST_LAUNCH = not INTERPRETED and (3, 4) <= VERSION <= (3, 8)
MIN_CAPABILITY = (8, 0)


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


def device_of(x: Tensor) -> contextlib.AbstractContextManager:
    """Make the device of a tensor the current one, as ``torch.cuda.device_of``, which takes longer."""
    if not x.is_cuda or torch._C._cuda_getDevice() == x.get_device():
        return _NOTHING
    return torch.cuda.device(x.get_device())


_NOTHING = contextlib.nullcontext()


def current_stream(device: torch.device) -> int:
    """A device's current stream, as CUDA knows it."""
    return torch._C._cuda_getCurrentRawStream(device.index) if device.type == 'cuda' else 0


def ceil_div(a: int, b: int) -> int:
    """Quotient rounded up (triton.cdiv takes microseconds)."""
    return -(-a // b)


@functools.lru_cache(maxsize=64)
def multiprocessors(device: torch.device) -> int:
    """How many multiprocessors a GPU has; 1 for the interpreter."""
    if device.type != 'cuda':
        return 1
    return torch.cuda.get_device_properties(device).multi_processor_count


# Not custom_op: on a CPU, empty functions take 67 us so, forward and backward, and 102 with it.
_library = torch.library.Library('mmvig', 'FRAGMENT')


_functions: dict[str, Callable] = {}
_nodes: dict[str, type[torch.autograd.Function]] = {}  # of operators, in autograd's graph


def operator(schema: str, fake: Callable, inference: Callable | None = None) -> Callable:
    """Make a function the PyTorch operator ``mmvig::<schema>``; ``fake`` makes its empty results.

    ``inference`` takes its place where no gradient is asked for, and returns the first of its results as a
    tuple. It is another operator (see :func:`refuse_gradients`), as a compiled graph must have either.

    What is returned calls the function itself where nothing watches PyTorch's operators (no compiler,
    tracer, dispatch mode, tensor subclass): the dispatcher took 40 to 120 us a call on an H200's host.
    """

    def register(function: Callable) -> Callable:
        name = schema.split('(')[0]
        function = on_device(function)
        _library.define(schema, tags=torch.Tag.pt2_compliant_tag)
        _library.impl(name, function, 'CompositeExplicitAutograd')
        torch.library.register_fake(f'mmvig::{name}', fake, lib=_library)
        op = getattr(torch.ops.mmvig, name).default
        _functions[name] = function

        @functools.wraps(function)
        def call(*args):
            if inference and not torch.is_grad_enabled():
                return inference(*args)
            if torch.compiler.is_compiling() or is_watched() or not PLAIN.issuperset(map(type, args)):
                return op(*args)
            if torch.is_grad_enabled():
                for x in args:
                    if type(x) in PLAIN_TENSORS and x.requires_grad:
                        return _nodes[name].apply(*args)
            return (inference or function)(*args)

        call.op = op
        return call

    return register


def on_device(function: Callable) -> Callable:
    """The function, run with the device of its first argument as the current one."""

    @functools.wraps(function)
    def run(*args):
        with device_of(args[0]):
            return function(*args)

    return run


PLAIN = PLAIN_TENSORS | {int, float, bool, str, torch.dtype, type(None)}


def keep_inputs(inputs: tuple, output: object) -> tuple[tuple, tuple]:
    """What an operator keeps for its backward one: its tensors and, after them, its options."""
    count = sum(x is None or isinstance(x, Tensor) for x in inputs)
    return inputs[:count], inputs[count:]


def differentiate(
    name: str, backward: Callable, keep: Callable = keep_inputs, outputs: int | None = None
) -> None:
    """Make ``backward`` the gradients of the operator ``mmvig::<name>``; it has none itself.

    Args:
        name: the operator's; that of its gradients is ``<name>_backward``.
        backward: takes the gradients of the outputs, the tensors and options that ``keep`` returns, and
            returns the gradients of the operator's first arguments.
        keep: takes the operator's arguments and result, and returns the tensors and the options kept.
        outputs: how many of the results have gradients (the others are there to be kept); theirs can be
            None then. Default: all of them.
    """

    def save(ctx, inputs, output):
        tensors, ctx.options = keep(inputs, output)
        ctx.arguments = len(inputs)
        ctx.save_for_backward(*tensors)

    def run(ctx, *grads):
        result = backward(*grads[:outputs], *ctx.saved_tensors, *ctx.options)
        result = result if isinstance(result, tuple) else (result,)
        return *result, *[None] * (ctx.arguments - len(result))

    torch.library.register_autograd(f'mmvig::{name}', run, setup_context=save, lib=_library)
    _nodes[name] = _node(name, run, save, outputs)
    why = f"{name}'s Triton backend has no second derivative; choose another backend for one"
    refuse_gradients(f'{name}_backward', why)


NO_GRADIENT = 'this was computed, or its graph made, with gradients disabled, and nothing is kept for any'


def refuse_gradients(name: str, why: str = NO_GRADIENT) -> None:
    """Have the backward pass through the operator ``mmvig::<name>`` raise an error that says why."""

    def refuse(ctx, *grads):
        raise RuntimeError(why)

    torch.library.register_autograd(f'mmvig::{name}', refuse, lib=_library)
    _nodes[name] = _node(name, refuse, None, None)


def _node(name: str, run: Callable, save: Callable | None, outputs: int | None) -> type:
    """An operator's node in autograd's graph for calls that pass by PyTorch's dispatcher."""
    function = _functions[name]

    def forward(ctx, *inputs):
        with torch._C._AutoDispatchBelowAutograd():
            output = function(*inputs)
        if save:
            save(ctx, inputs, output)
        if outputs is not None:
            ctx.set_materialize_grads(False)
            output = output[:outputs]
        return output

    members = {'forward': staticmethod(forward), 'backward': staticmethod(run)}
    return type(name, (torch.autograd.Function,), members)


# (tensor, shape, strides, start after the tensor's own) -> a view that autograd does not know of.
# Inductor's as_strided, which takes half as long.
strided_view = torch._C._dynamo.guards._reinterpret_tensor


def empty_like_each(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Contiguous tensors of the same shapes."""
    return tuple(x.new_empty(x.shape) for x in tensors)


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
