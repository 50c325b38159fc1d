"""Compile what Inductor copies of each forward kernel, and print whether its machine code is the kernel's.

Run by test_bigla_triton.py in a process of its own, as compile_kernels.py is. Inductor copies a kernel's
functions and constants as text, by name: what it leaves out, or two of one name, would show here.
"""

import importlib.util
import re
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

import compile_kernels
from torch._inductor.codegen.wrapper import user_defined_triton_kernel_transitive_closure_source_code


def copied(kernel, folder: str):
    """The kernel that Inductor's copy defines."""
    text = user_defined_triton_kernel_transitive_closure_source_code(kernel)
    path = Path(folder, f'{kernel.__module__}.{kernel.__name__}.py')
    path.write_text(f'import triton\nimport triton.language as tl\n\n\n@triton.jit\n{text}')
    spec = importlib.util.spec_from_file_location('copied', path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return getattr(module, kernel.__name__)


def main() -> None:
    for launches, types in (
        (compile_kernels.bigla_launches(), compile_kernels.TYPES),
        (compile_kernels.fused_launches(), compile_kernels.FUSED_TYPES),
    ):
        for kernel, constants in launches:
            if re.search('backward|gradient|cast|sum_kernel', kernel.__name__):
                continue
            with tempfile.TemporaryDirectory() as folder:
                kernels = kernel, copied(kernel, folder)
                codes = [compile_kernels.compile_for(90, x, constants, types).asm['cubin'] for x in kernels]
            print(kernel.__module__, kernel.__name__, codes[0] == codes[1], flush=True)


if __name__ == '__main__':
    main()
