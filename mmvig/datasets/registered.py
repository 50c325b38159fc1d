"""Registers the data sets whose library is installed.

mmdet and mmseg are optional: the data set whose library is missing stays registered under its name and
says what to install when it is asked for.
"""

import importlib.util
from typing import NoReturn

import mmvig.compat  # noqa: F401  # before mmdet and mmseg, which import mmcv.ops

from mmvig.registry import DATASETS


def _unavailable(name: str, library: str) -> None:
    def build(**kwargs) -> NoReturn:
        raise ImportError(f'{name} needs {library}: run `pip install "mmvig[openmmlab]"`')

    DATASETS.register_module(name=name, module=build)


if importlib.util.find_spec('mmdet') is None:
    _unavailable('ShapesDetDataset', 'mmdet')
else:
    from mmvig.datasets.detection import ShapesDetDataset as ShapesDetDataset

if importlib.util.find_spec('mmseg') is None:
    _unavailable('ShapesSegDataset', 'mmseg')
else:
    from mmvig.datasets.segmentation import ShapesSegDataset as ShapesSegDataset
