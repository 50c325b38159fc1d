"""mmvig's nodes in mmengine's registry tree.

Each node is a child of mmengine's root with scope ``mmvig``, so a config may say ``type='mmvig.ViGH'``
under any default scope and needs no ``custom_imports``: mmengine imports ``mmvig.registry`` when it
meets the scope, and the node imports its ``locations`` on first use.
"""

import importlib
from collections.abc import Callable

try:
    from mmengine import registry as _root
except ImportError as error:
    raise ImportError(
        'mmvig needs mmengine, which is not installed: run `pip install "mmvig[openmmlab]"` '
        '(the maintained onedl packages) or install the OpenMMLab line that you already use.'
    ) from error

MODELS = _root.Registry(
    'model', parent=_root.MODELS, scope='mmvig', locations=['mmvig.backbones', 'mmvig.conv', 'mmvig.necks']
)


def _built_lazily(module: str, name: str) -> Callable:
    """A builder that imports its module when it is called: a backbone must not cost mmdet's import."""

    def build(**kwargs):
        return getattr(importlib.import_module(module), name)(**kwargs)

    return build


for _name in ('DetDataPreprocessor', 'FCNMaskHead', 'RPNHead', 'SingleRoIExtractor', 'StandardRoIHead'):
    MODELS.register_module(name=_name, module=_built_lazily('mmvig.detection', _name))

DATASETS = _root.Registry(
    'dataset', parent=_root.DATASETS, scope='mmvig', locations=['mmvig.datasets.registered']
)
TRANSFORMS = _root.Registry(
    'transform', parent=_root.TRANSFORMS, scope='mmvig', locations=['mmvig.datasets.registered']
)
OPTIM_WRAPPER_CONSTRUCTORS = _root.Registry(
    'optimizer wrapper constructor',
    parent=_root.OPTIM_WRAPPER_CONSTRUCTORS,
    scope='mmvig',
    locations=['mmvig.engine.layer_decay', 'mmvig.engine.optim'],
)
RUNNERS = _root.Registry('runner', parent=_root.RUNNERS, scope='mmvig', locations=['mmvig.engine.runner'])
HOOKS = _root.Registry(
    'hook',
    parent=_root.HOOKS,
    scope='mmvig',
    locations=[
        f'mmvig.engine.{name}' for name in ('cuda_graphs_hook', 'gc_freeze_hook', 'runtime_info_hook')
    ],
)
TASK_UTILS = _root.Registry(
    'task util', parent=_root.TASK_UTILS, scope='mmvig', locations=['mmvig.detection']
)
