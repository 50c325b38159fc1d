"""The few lines that other packages' versions force on us, each with its reason and when it can go.

`import mmvig.compat` before anything that imports ``mmcv.ops``, and so before mmdet and mmseg. Each
part does nothing where its trouble is absent.
"""

import importlib
import importlib.util
import logging
import sys
from importlib.machinery import PathFinder

logger = logging.getLogger(__name__)


def _stand_in_for_mmcv_ext() -> None:
    """Let ``mmcv.ops`` be imported, and what common models call of it run, without compiled operators.

    Why: mmcv's wheels for current PyTorch versions hold no compiled operators, and without them
    `import mmcv.ops` fails. Can go when mmcv ships them for every PyTorch that we support.
    """
    mmcv = importlib.util.find_spec('mmcv')
    if mmcv is None or 'mmcv._ext' in sys.modules:
        return
    # Looked up in mmcv's folder, since find_spec('mmcv._ext') would import all of mmcv.
    if PathFinder.find_spec('mmcv._ext', mmcv.submodule_search_locations) is not None:
        return
    from mmvig.compat import mmcv_ext

    sys.modules['mmcv._ext'] = mmcv_ext
    logger.info(
        'mmcv has no compiled operators here: nms, roi_align and deformable convolution run through '
        'torchvision; deformable attention, the focal loss, CARAFE and masked convolution in plain '
        'PyTorch; every other one raises an error when called.'
    )


def _give_mmdet_its_operators() -> None:
    """Put mmcv's operators where mmdet, imported earlier than this, put functions that only raise.

    Why: without compiled operators, imports such as ``mmdet.apis`` succeed, but Mask R-CNN then cannot be
    trained, even from a config whose ``custom_imports`` name this module. Can go with the stand-in.
    """
    for name, operator in (
        ('mmdet.structures.mask.structures', 'roi_align'),
        ('mmdet.evaluation.metrics.dump_odvg_results', 'batched_nms'),
        ('mmdet.utils.large_image', 'batched_nms'),
    ):
        module = sys.modules.get(name)
        if module is not None and getattr(module, operator).__module__ == name:
            setattr(module, operator, getattr(importlib.import_module('mmcv.ops'), operator))


def _let_torch_load_mmengine_checkpoints() -> None:
    """Let ``torch.load`` read what mmengine puts into its checkpoints beside tensors.

    Why: from PyTorch 2.6 on, ``torch.load`` refuses types that it was not told of, and upstream's
    mmengine (up to 0.10.7) tells it of none: it can neither resume from nor test its own
    checkpoints. The onedl line does, and is left alone. Can go when upstream does too.
    """
    if importlib.util.find_spec('mmengine') is None:
        return
    import torch
    from mmengine.runner import checkpoint
    from mmengine.utils import digit_version

    from mmvig.reading import safe_globals

    if digit_version(torch.__version__) >= digit_version('2.6') and not hasattr(
        checkpoint, 'get_torch_safe_globals'
    ):
        torch.serialization.add_safe_globals(safe_globals())


def _register_for_custom_imports() -> None:
    """Register the backbones under their bare names.

    Why: a config's ``custom_imports=['mmvig']`` does that by importing mmvig, which does nothing when
    mmvig is there already, as it is here. Can go with mmengine's ``custom_imports``.
    """
    if importlib.util.find_spec('mmengine') is not None:
        importlib.import_module('mmvig.backbones')


_stand_in_for_mmcv_ext()
_give_mmdet_its_operators()
_let_torch_load_mmengine_checkpoints()
_register_for_custom_imports()
