"""The data set `shapes` for mmdet."""

from typing import ClassVar

from mmdet.datasets import CocoDataset

from mmvig.datasets.scene import CLASSES, PALETTE
from mmvig.datasets.shapes import ensure_shapes
from mmvig.registry import DATASETS


@DATASETS.register_module()
class ShapesDetDataset(CocoDataset):
    """Boxes and masks of the generated shapes, made in `data_root` when they are first loaded.

    Takes the arguments of mmdet's `CocoDataset`; `ann_file` is `annotations/instances_train.json`
    (or `_val`), `data_prefix` is `dict(img='images/train')` (or `val`).
    """

    METAINFO: ClassVar = {'classes': CLASSES, 'palette': PALETTE}

    def load_data_list(self) -> list[dict]:
        """Load the annotations, after making the data set if it is not there."""
        ensure_shapes(self.data_root)
        return super().load_data_list()
