"""The data set `shapes` for mmseg."""

from typing import ClassVar

from mmseg.datasets import BaseSegDataset

from mmvig.datasets.scene import CLASSES, PALETTE
from mmvig.datasets.shapes import ensure_shapes
from mmvig.registry import DATASETS


@DATASETS.register_module()
class ShapesSegDataset(BaseSegDataset):
    """Label maps of the generated shapes, made in `data_root` when they are first loaded.

    Takes the arguments of mmseg's `BaseSegDataset`; `data_prefix` is `dict(img_path='images/train',
    seg_map_path='masks/train')` (or `val`). The background is a class, the first one.
    """

    METAINFO: ClassVar = {
        'classes': ('background', *CLASSES),
        'palette': [(60, 60, 60), *PALETTE],
    }

    def __init__(self, img_suffix: str = '.png', **kwargs) -> None:
        super().__init__(img_suffix=img_suffix, **kwargs)

    def load_data_list(self) -> list[dict]:
        """List the images, after making the data set if it is not there."""
        ensure_shapes(self.data_root)
        return super().load_data_list()
