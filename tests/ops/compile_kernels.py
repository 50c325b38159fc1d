"""Compile all kernels for a compute capability without a GPU.

Prints each one's name, its bytes of shared memory, and a hash of its machine code, which stays the same
where a kernel has only been moved. Run by test_bigla_triton.py in a process of its own, since Triton
compiles nothing where it interprets.
"""

import hashlib
import os
import sys

os.environ['TRITON_DISABLE_LINE_INFO'] = '1'  # else machine code holds names of files and numbers of lines

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from mmvig.ops.bigla import kernels
from mmvig.ops.bigla.plan import plan, scan_constants

TYPES = {'p_sum': '*fp32', 'p_table': '*fp16', 'p_mask': '*i16', 'scale': 'fp32', 'inv': 'fp32'}
# Of the fused operators: the residual stream, weights and their gradients are in float32.
FLOATS = ['p_s', 'p_ds', 'p_scale', 'p_w', 'p_b', 'p_wl', 'p_ws', 'p_dw', 'p_kernel', 'p_shift']
PARTIALS = [f'p_{i}' for i in range(8)]
FUSED_TYPES = {'p_table': '*i64', **dict.fromkeys([*FLOATS, *PARTIALS, 'p_out'], '*fp32')}


def compile_for(capability: int, kernel, constants: dict, types: dict):
    constants = dict(constants)
    names = constants.keys() & {'num_warps', 'num_stages', 'maxnreg'}
    options = {name: constants.pop(name) for name in names}
    missing = [x.name for x in kernel.params if x.is_constexpr and x.name not in constants]
    assert not missing, f'{kernel.__name__} needs {missing}'
    signature = {}
    for argument in kernel.arg_names:
        default = '*bf16' if argument.startswith('p_') else 'i32'
        signature[argument] = 'constexpr' if argument in constants else types.get(argument, default)
    attributes = {
        (i,): [['tt.divisibility', 16]] for i, x in enumerate(signature.values()) if x.startswith('*')
    }
    source = ASTSource(kernel, signature, constexprs=constants, attrs=attributes)
    return triton.compile(source, target=GPUTarget('cuda', capability, 32), options=options)


def bigla_launches():
    """Kernels and constants of BiGLA at K = 16, V = 32."""
    p = plan(16, 32, torch.bfloat16)
    shared = {'UNIT': 8, 'SAME': True}
    yield kernels.states_kernel, {**p['back_states'], **shared, 'NC': 1, 'BACKWARD': True}
    yield kernels.walk_kernel, {**p['walk'], **shared, 'IN_OUTPUT': True}
    yield kernels.scan_kernel, scan_constants((16, 32, torch.bfloat16), 100, 1)
    for strong in (False, True):
        form = {**shared, 'STRONG': strong, 'GROUP': 16}
        yield kernels.output_kernel, {**p['output'], 'NC': 1, 'ALONE': False, 'IN_OUTPUT': False, **form}
        yield kernels.gradient_kernel, {**p['gradient'], **form}
    form = {**shared, 'STRONG': False, 'GROUP': 16}
    yield kernels.output_kernel, {**p['walked_output'], 'NC': 1, 'ALONE': False, 'IN_OUTPUT': True, **form}


def fused_launches():
    """Kernels and constants of the fused operators at 384 channels."""
    from mmvig.ops.block import half_weights, low_rank, partial_sums
    from mmvig.ops.conv_norm import op as conv_norm
    from mmvig.ops.dwconv import op as dwconv
    from mmvig.ops.gated_mix import op as gated_mix
    from mmvig.ops.norm import op as norm
    from mmvig.ops.swiglu import op as swiglu

    stem = torch.Size((96, 3, 9, 9))
    yield conv_norm.forward_kernel, conv_norm.constants(stem, 8, 1e-5, 'gelu', True)
    yield (
        half_weights.cast_kernel,
        half_weights.constants((73728, 36864, 3072, 3072, 192, 36864, 98304, 49152))[0],
    )
    yield partial_sums.sum_kernel, partial_sums.CONSTANTS
    yield low_rank.backward_kernel, low_rank.constants_of(384, 16, 1168, 1168, 128)
    cpu = torch.device('cpu')
    for name in ('forward_kernel', 'backward_kernel'):
        forward = name == 'forward_kernel'
        yield getattr(swiglu, name), swiglu.constants(1024)
        for channels, width in ((96, 256), (192, 512), (256, 704), (384, 1024)):
            product = swiglu.project_kernel if forward else swiglu.project_backward_kernel
            keep = True if forward else None
            yield product, swiglu.product_constants(channels, width, cpu, keep)[0]
        yield getattr(gated_mix, name), gated_mix.constants(384, 32, 1e-6, False, True, not forward)
        form = {**dwconv.FORWARD, 'ACT': True, 'KEEP': True} if forward else dwconv.BACKWARD
        yield getattr(dwconv, name), dwconv.divide((2, 14, 14, 384), cpu, **form)[0]
        options = norm.constants(384, not forward, 1e-5, False, 'none', True, True, False, False)
        yield getattr(norm, name), options


def main() -> None:
    for launches, types in ((bigla_launches(), TYPES), (fused_launches(), FUSED_TYPES)):
        for kernel, constants in launches:
            compiled = compile_for(int(sys.argv[1]), kernel, constants, types)
            code = hashlib.sha256(compiled.asm['cubin']).hexdigest()[:12]
            print(kernel.__module__, kernel.__name__, compiled.metadata.shared, code, flush=True)


if __name__ == '__main__':
    main()
