"""mmdet's loading of annotations, with masks left as the polygons that they are."""

import numpy as np
from mmdet.datasets.transforms import LoadAnnotations as _LoadAnnotations
from mmdet.structures.mask import PolygonMasks
from mmdet.structures.mask.structures import bitmap_to_polygon

from mmvig.registry import TRANSFORMS


@TRANSFORMS.register_module()
class LoadAnnotations(_LoadAnnotations):
    """mmdet's LoadAnnotations, which decides by picture whether masks become bitmaps.

    Masks are ``PolygonMasks`` where all in a picture are polygons, else ``BitmapMasks``: an RLE mask is
    never lost, as it is with mmdet's ``poly2mask=False``. RLE masks of ignored instances, as COCO's crowds
    have them, which no loss reads, become their outlines, without holes. Coordinates are floats, whatever
    the file has: mmdet rounds scaled integers down.

    Bitmaps are large, and are drawn, resized, sent from worker to trainer and padded; polygons are not, and
    mask targets are drawn from them at once. mmdet's transforms and its Mask R-CNN take both, also mixed in
    one batch. mmdet has bitmaps alone for Expand, Albu, CopyPaste and RandomErasing, and for Mosaic and
    MixUp of data of which only a part has RLE masks: take its own LoadAnnotations there, and for Rotate
    with mmdet 3.3.0, which turns polygons another way than bitmaps.

    Args:
        kwargs: mmdet's, without ``poly2mask``.
    """

    def __init__(self, **kwargs):
        super().__init__(poly2mask=False, **kwargs)

    def _load_masks(self, results: dict) -> None:
        instances = [self._outlined(each, *results['ori_shape']) for each in results.get('instances', [])]
        self.poly2mask = not all(isinstance(each['mask'], list) for each in instances)
        loaded = {**results, 'instances': instances}
        super()._load_masks(loaded)
        masks = loaded['gt_masks']
        if isinstance(masks, PolygonMasks):
            masks.masks = [[np.asarray(part, dtype=np.float64) for part in mask] for mask in masks.masks]
        results.update(gt_masks=masks, gt_ignore_flags=loaded['gt_ignore_flags'])

    def _outlined(self, instance: dict, height: int, width: int) -> dict:
        """An instance, whose RLE mask is replaced by its outlines if it is ignored."""
        if not (instance['ignore_flag'] and isinstance(instance['mask'], dict)):
            return instance
        mask = instance['mask']
        if not (mask.get('size') and isinstance(mask.get('counts'), (list, str, bytes))):
            return {**instance, 'mask': [[0.0] * 6]}  # as mmdet has masks that are none
        outlines, _ = bitmap_to_polygon(self._poly2mask(mask, height, width))
        return {**instance, 'mask': [outline.reshape(-1) for outline in outlines]}
