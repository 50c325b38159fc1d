"""Backbones of the ViG family, registered as ``mmvig.<name>``."""

from mmvig.backbones.vig_h import ViGH

__all__ = ['ViGH']
