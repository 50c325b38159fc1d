"""ViG-H, a linear-complexity vision backbone, as an OpenMMLab plugin.

Importing this package alone imports nothing else: mmengine finds the models through
`mmvig.registry`, and the operators live in `mmvig.ops`.
"""

import sys

__version__ = '0.1.0'

# `custom_imports=['mmvig']` is run by mmengine: from then on `type='ViGH'` needs no scope.
if 'mmengine' in sys.modules:
    import mmvig.backbones  # noqa: F401
