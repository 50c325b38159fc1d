"""Compile BiGLA's kernels for a compute capability without a GPU: prints names and bytes of shared memory.

Run by test_bigla_triton.py in a process of its own, since Triton compiles nothing where it interprets.
"""

import sys

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from mmvig.ops.bigla import kernels
from mmvig.ops.bigla.triton import plan


def compile_for(capability: int, name: str, constants: dict) -> int:
    kernel, constants = getattr(kernels, name), dict(constants)
    options = {option: constants.pop(option) for option in ('num_warps', 'num_stages')}
    types = {'p_sum': '*fp32', 'p_table': '*fp16', 'p_mask': '*i16', 'scale': 'fp32', 'inv': 'fp32'}
    signature = {}
    for argument in kernel.arg_names:
        default = '*bf16' if argument.startswith('p_') else 'i32'
        signature[argument] = 'constexpr' if argument in constants else types.get(argument, default)
    attributes = {
        (i,): [['tt.divisibility', 16]] for i, x in enumerate(signature.values()) if x.startswith('*')
    }
    source = ASTSource(kernel, signature, constexprs=constants, attrs=attributes)
    return triton.compile(source, target=GPUTarget('cuda', capability, 32), options=options).metadata.shared


def main() -> None:
    p = plan(16, 32, torch.bfloat16)
    shared = {'UNIT': 8, 'SAME': True}
    launches = [
        ('states_kernel', {**p['states'], **shared, 'NC': 1, 'BACKWARD': True}),
        ('scan_kernel', {**p['scan'], 'NC': 1, 'BW': 2, 'BR': 8, 'num_warps': 1, 'num_stages': 1}),
    ]
    for strong in (False, True):
        form = {**shared, 'STRONG': strong, 'GROUP': 16}
        launches.append(('output_kernel', {**p['output'], 'NC': 1, 'ALONE': False, 'SWAP': False, **form}))
        launches.append(('gradient_kernel', {**p['gradient'], **form}))
    for name, constants in launches:
        print(name, compile_for(int(sys.argv[1]), name, constants), flush=True)


if __name__ == '__main__':
    main()
