"""Operators of ViG in torch (and triton) alone: nothing here knows mmengine or mmcv.

Each is a package: ``__init__`` has the formula and the choice of the backend, ``triton`` the kernels.
``block`` is a whole block of the backbones made of them; the other modules are what they share.
"""

from mmvig.ops.bigla import bigla, bigla_packed
from mmvig.ops.dwconv import dwconv3x3
from mmvig.ops.gated_mix import gated_mix
from mmvig.ops.norm import add_norm, norm
from mmvig.ops.swiglu import swiglu

__all__ = ['add_norm', 'bigla', 'bigla_packed', 'dwconv3x3', 'gated_mix', 'norm', 'swiglu']
