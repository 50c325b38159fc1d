"""Triton kernels of BiGLA; README.md beside this file derives them, op.py launches them.

Names are those of mmvig/ops/arithmetic.py; T is README.md's N. A chunk is BT tokens, number i_t of those of
its sequence i_bh and i_tg of all. A sequence has NT chunks and NS segments of NC chunks, all sequences
together have n_sums chunks and n_states segments. A program takes CH chunks (states_kernel: segments);
grids are (runs of CH, heads and blocks of V, images). gf and gb are the logits of the forward and backward
gates, lf and lb their log2 decays.

Strides s_ come in units of UNIT elements; SAME: k has q's strides and the gates have each other's, and so
have their gradients. They are no tuples, since Triton compiles a kernel anew for what a tuple's numbers are
divisible by, whatever do_not_specialize says. Sums over tokens are products with constant tables, so that
tiles [BT, BK] stay in the layout of the tensor cores.

All exponents are in base 2; `inv` is 1 / gate_normalizer. MODE is the precision of a product of matrices:
'bf16', 'tf32' or 'tf32x3', always with float32 accumulation; float32 inputs have 'tf32x3'.
"""

from mmvig.ops.bigla.kernels.gradients import gradient_kernel
from mmvig.ops.bigla.kernels.output import output_kernel
from mmvig.ops.bigla.kernels.states import scan_kernel, states_kernel, walk_kernel

__all__ = ['gradient_kernel', 'output_kernel', 'scan_kernel', 'states_kernel', 'walk_kernel']
