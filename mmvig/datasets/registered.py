"""Registers the data sets and transforms whose library is installed.

mmdet and mmseg are optional: what needs a missing library stays registered under its name and says what to
install when it is asked for.
"""

import importlib.util
from typing import NoReturn

import mmvig.compat  # noqa: F401  # before mmdet and mmseg, which import mmcv.ops

from mmengine import Registry

from mmvig.registry import DATASETS, TRANSFORMS


def _unavailable(registry: Registry, name: str, library: str) -> None:
    def build(**kwargs) -> NoReturn:
        raise ImportError(f'{name} needs {library}: run `pip install "mmvig[openmmlab]"`')

    registry.register_module(name=name, module=build)


if importlib.util.find_spec('mmdet') is None:
    _unavailable(DATASETS, 'ShapesDetDataset', 'mmdet')
    _unavailable(TRANSFORMS, 'LoadAnnotations', 'mmdet')
else:
    from mmvig.datasets.detection import ShapesDetDataset as ShapesDetDataset
    from mmvig.datasets.transforms import LoadAnnotations as LoadAnnotations

if importlib.util.find_spec('mmseg') is None:
    _unavailable(DATASETS, 'ShapesSegDataset', 'mmseg')
else:
    from mmvig.datasets.segmentation import ShapesSegDataset as ShapesSegDataset
