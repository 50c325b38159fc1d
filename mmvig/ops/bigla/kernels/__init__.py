"""Triton kernels of BiGLA; README.md beside this file derives them, op.py launches them.

Sizes: N tokens, H heads, K and V head widths, BT tokens of a chunk, NC chunks of a segment, BK, BV blocks
of widths, CH chunks (states_kernel: segments) of a program, n_states segments and n_sums chunks of all
sequences. Grids are (runs of CH, heads and blocks of V, images). Strides s_ come in units of UNIT elements;
SAME: k has q's strides and the gates have each other's, and so have their gradients. Sums over tokens are
products with constant tables, so that tiles [BT, BK] stay in the layout of the tensor cores.

All exponents are in base 2; `inv` is 1 / gate_normalizer. MODE is the precision of a product of matrices:
'bf16', 'tf32' or 'tf32x3', always with float32 accumulation; float32 inputs have 'tf32x3'.
"""

from mmvig.ops.bigla.kernels.gradients import gradient_kernel
from mmvig.ops.bigla.kernels.output import output_kernel
from mmvig.ops.bigla.kernels.states import scan_kernel, states_kernel, walk_kernel

__all__ = ['gradient_kernel', 'output_kernel', 'scan_kernel', 'states_kernel', 'walk_kernel']
