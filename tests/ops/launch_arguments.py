"""Compare launches of kernels by mmvig with Triton's own, without a GPU: prints numbers of arguments.

Run by test_first_use.py in a process of its own, since Triton launches nothing where it interprets. The
driver and what is below Triton's launcher, in C, are stand-ins; kernels are compiled for compute capability
9.0. With 'compile' as an argument, they are compiled as before a first pass, and counted.
"""

import contextlib
import sys
import types

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia import compiler as nvidia_compiler
from triton.backends.nvidia import driver as nvidia

from mmvig.first_use import compile_all
from mmvig.ops import launch
from mmvig.ops.block import half_weights, partial_sums
from mmvig.ops.norm import op as norm

STREAM, DEVICE = 7, torch.device('cuda', 0)
calls: list[tuple] = []


class Utils:
    """What Triton's driver has in C."""

    @staticmethod
    def launch(*args):
        calls.append(args)

    @staticmethod
    def load_binary(*args):
        return 1, 2, 32, 0, 1024

    @staticmethod
    def get_device_properties(device):
        return {'max_shared_mem': 232448}

    @staticmethod
    def unload_module(module):
        pass

    @staticmethod
    def build_signature_metadata(signature):
        return signature


class Driver:
    """A driver without a device."""

    utils = Utils()
    launcher_cls = nvidia.CudaLauncher

    @staticmethod
    def get_current_target():
        return GPUTarget('cuda', 90, 32)

    @staticmethod
    def get_current_device():
        return 0

    @staticmethod
    def get_current_stream(device):
        return STREAM


def plain(x):
    """An argument's meaning in C: a tensor is its address; None where there are no hooks, or for them."""
    if isinstance(x, torch.Tensor):
        return x.data_ptr()
    if isinstance(x, tuple):
        return tuple(map(plain, x))
    return None if getattr(x, 'calls', None) == [] or type(x).__name__ == 'LazyDict' else x


def kernels():
    """Kernels, their tensors and numbers, and their constants."""
    weights = [torch.zeros(n) for n in (64, 32, 16, 16, 16, 64, 128, 64)]
    low = torch.zeros(400, dtype=torch.bfloat16)
    yield (
        half_weights.cast_kernel,
        (*weights, low),
        half_weights.constants(tuple(x.numel() for x in weights))[0],
    )
    partials = [torch.zeros(4, 64) for _ in range(5)]
    table, out = torch.zeros(1, 6, dtype=torch.int64), torch.zeros(64)
    yield partial_sums.sum_kernel, (*partials, table, out), partial_sums.CONSTANTS
    x, weight = torch.zeros(8, 96), torch.zeros(96)
    tensors = x, low[:0], weight, weight, weight, x, x
    options = norm.constants(96, False, 1e-5, False, 'none', True, True, False, False)
    names = [name for name in norm.forward_kernel.arg_names if name not in options]
    pointers = sum(name.startswith('p_') for name in names)
    args = *(tensors * 2)[:pointers], *[8] * (len(names) - pointers)
    yield norm.forward_kernel, args, options


def compare(kernel, args: tuple, constants: launch.Constants) -> None:
    """Launch a kernel three times: compiled ahead and launched first by Triton, then by mmvig."""
    key = DEVICE, kernel.__name__
    with launch.noting() as noted:
        launch.launch(kernel, key, (2, 3, 4), args, constants)
    assert not calls and len(noted) == 1
    for each in noted.values():
        launch.compile_kernel(DEVICE, *each)
    compiled = list(kernel.device_caches[0][0].values())
    launch.launch(kernel, key, (2, 3, 4), args, constants)
    assert list(kernel.device_caches[0][0].values()) == compiled, 'compiled twice'
    found = constants.compiled.get((kernel.fn, key))
    assert bool(found) == launch.FAST_LAUNCH, 'launched by Triton alone'
    launch.launch(kernel, key, (2, 3, 4), args, constants)
    theirs, ours = calls
    assert len(theirs) == len(ours) and plain(theirs) == plain(ours), f'{theirs}\n{ours}'
    print(kernel.__name__, len(ours), 'arguments', flush=True)
    calls.clear()


def compile_and_count() -> None:
    """Compile the kernels side by side."""
    made, make = [], nvidia_compiler.CUDABackend.make_cubin
    nvidia_compiler.CUDABackend.make_cubin = lambda *args: made.append(1) or make(*args)
    with launch.noting() as noted:
        for kernel, args, constants in kernels():
            launch.launch(kernel, (DEVICE, kernel.__name__), (2, 3, 4), args, constants)
    compile_all(list(noted.values()), DEVICE)
    print(f'compiled {len(made)} of {len(noted)}')


def main() -> None:
    triton.runtime.driver.set_active(Driver())
    torch.cuda.device, torch.cuda.get_device_name = contextlib.nullcontext, str
    torch._C._cuda_getCurrentRawStream = lambda index: STREAM
    if launch.VERSION < (3, 7):  # these have a launcher in C for each kernel
        nvidia.library_dirs = list
        nvidia.compile_module_from_src = lambda **options: types.SimpleNamespace(launch=Utils.launch)
    else:
        nvidia.PyKernelArg = dict  # how the one for all is told of arguments
    if sys.argv[1:] == ['compile']:
        compile_and_count()
        return
    for each in kernels():
        compare(*each)


if __name__ == '__main__':
    main()
