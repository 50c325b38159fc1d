"""ViG-H, a linear-complexity vision backbone, as an OpenMMLab plugin.

Importing this package imports nothing else: mmengine finds the models through `mmvig.registry`,
and the operators live in `mmvig.ops`.
"""

__version__ = '0.1.0'
