"""Operators of ViG in torch (and triton) alone: nothing here knows mmengine or mmcv."""

from mmvig.ops.bigla import bigla

__all__ = ['bigla']
