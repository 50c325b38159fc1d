"""Operators of ViG in torch (and triton) alone: nothing here knows mmengine or mmcv.

Each is a package: ``__init__`` has the formula and the choice of the backend, ``kernels`` the Triton
kernels, ``op`` launches them and makes them PyTorch operators. ``block`` is a whole block of the backbones
made of them. What they share: ``backend`` (which form runs), ``operator`` (a function made a PyTorch
operator), ``launch``, ``persistent`` (memory that outlives a call), ``plain`` (what may be by-passed),
``cpu``, ``torch_private``.
"""

from mmvig.ops.bigla import bigla, bigla_packed
from mmvig.ops.dwconv import dwconv3x3
from mmvig.ops.gated_mix import gated_mix
from mmvig.ops.norm import add_norm, norm
from mmvig.ops.swiglu import swiglu

__all__ = ['add_norm', 'bigla', 'bigla_packed', 'dwconv3x3', 'gated_mix', 'norm', 'swiglu']
