"""Operators of ViG in torch (and triton) alone: nothing here knows mmengine or mmcv."""

from mmvig.ops.bigla import bigla, bigla_packed

__all__ = ['bigla', 'bigla_packed']
