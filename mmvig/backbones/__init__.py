"""Backbones of the ViG family, registered as ``mmvig.<name>``."""

from mmvig.backbones.vig import ViG
from mmvig.backbones.vig_h import ViGH

__all__ = ['ViG', 'ViGH']
