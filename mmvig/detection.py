"""Parts of mmdet's detectors that wait less for the GPU and keep boxes in float32.

mmdet's own wait for the GPU once for each object and each level, shuffle all 240,000 anchors on the CPU to
draw 256, and make the anchors of a size anew for each batch. In mixed precision they round boxes to the
maps' dtype: in bfloat16 to whole multiples of 4 or 8 pixels from 512 on.
"""

from collections.abc import Mapping, Sequence

import mmvig.compat  # noqa: F401  # before mmdet, which imports mmcv.ops

import torch
from mmdet.models.data_preprocessors import DetDataPreprocessor as _DetDataPreprocessor
from mmdet.models.dense_heads import RPNHead as _RPNHead
from mmdet.models.roi_heads.roi_extractors import SingleRoIExtractor as _SingleRoIExtractor
from mmdet.models.task_modules import AnchorGenerator as _AnchorGenerator
from mmdet.models.task_modules import AssignResult
from mmdet.models.task_modules import MaxIoUAssigner as _MaxIoUAssigner
from mmdet.models.task_modules import RandomSampler as _RandomSampler
from torch import Tensor

from mmvig.registry import TASK_UTILS

MOST_SIZES = 64  # of which an AnchorGenerator keeps anchors


class DetDataPreprocessor(_DetDataPreprocessor):
    """mmdet's DetDataPreprocessor, which swaps channels without a wait. Arguments are mmdet's."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self._swaps, self._channel_conversion = self._channel_conversion, False

    def forward(self, data: dict, training: bool = False) -> dict:
        """Normalise, pad and stack a batch.

        Args:
            data: ``inputs``, images ``[3, H, W]`` or a batch of them, and ``data_samples``.
            training: whether to pad masks too, and to augment the batch.
        """
        if self._swaps and isinstance(data, Mapping):
            inputs = data['inputs']
            if isinstance(inputs, Tensor):
                inputs = self._swapped(inputs)
            elif isinstance(inputs, Sequence):
                inputs = [self._swapped(each) for each in inputs]
            data = {**data, 'inputs': inputs}
        return super().forward(data, training)

    def _swapped(self, images: Tensor) -> Tensor:
        # By an index, as mmdet does it, PyTorch would copy the index to the GPU and wait.
        return images.to(self.device, non_blocking=self._non_blocking).flip(-3)


class RPNHead(_RPNHead):
    """mmdet's RPNHead, whose proposals are float32 in mixed precision too. Arguments are mmdet's."""

    def predict_by_feat(self, cls_scores: list[Tensor], bbox_preds: list[Tensor], *args, **kwargs) -> list:
        """Proposals of each image from the levels' scores ``[B, A, H, W]`` and boxes ``[B, 4A, H, W]``."""
        single = ([x.float() for x in maps] for maps in (cls_scores, bbox_preds))
        return super().predict_by_feat(*single, *args, **kwargs)


class SingleRoIExtractor(_SingleRoIExtractor):
    """mmdet's SingleRoIExtractor with one wait for the GPU, and RoIs that are not rounded under autocast.

    Arguments are mmdet's. torchvision's RoIAlign computes in float32 under autocast; where the layer is
    mmcv's, RoIs have the maps' dtype, as it asks for.
    """

    def forward(
        self, feats: Sequence[Tensor], rois: Tensor, roi_scale_factor: float | None = None
    ) -> Tensor:
        """Features ``[N, C, h, w]`` of RoIs ``[N, 5]`` (image, left, top, right, bottom).

        Args:
            feats: each level's maps ``[B, C, H, W]``.
            rois: the regions, in pixels of the image.
            roi_scale_factor: scales them around their centres. Default: None, not at all.
        """
        if len(feats) == 1 or len(rois) == 0:
            return super().forward(feats, rois, roi_scale_factor)
        levels = self.map_roi_levels(rois, len(feats))
        if roi_scale_factor is not None:
            rois = self.roi_rescale(rois, roi_scale_factor)
        keeps = torch.is_autocast_enabled(rois.device.type) and all(
            getattr(layer, 'use_torchvision', False) for layer in self.roi_layers
        )
        rois = rois.float() if keeps else rois.type_as(feats[0])
        order = levels.argsort(stable=True)
        counts = torch.bincount(levels, minlength=len(feats)).tolist()
        found, unused = [], []
        for layer, x, own in zip(self.roi_layers, feats, rois[order].split(counts), strict=False):
            if len(own):
                found.append(layer(x, own))
            else:
                unused.append(x.sum() * 0.0)  # a gradient for each level, as DDP wants it
        found = torch.cat(found)
        result = torch.empty_like(found).index_copy_(0, order, found)
        return result + sum(unused) if unused else result


@TASK_UTILS.register_module()
class MaxIoUAssigner(_MaxIoUAssigner):
    """mmdet's MaxIoUAssigner without waiting for the GPU. Arguments are mmdet's."""

    def assign_wrt_overlaps(self, overlaps: Tensor, gt_labels: Tensor) -> AssignResult:
        """Assign boxes to objects.

        Args:
            overlaps: IoU of k objects and n boxes, ``[k, n]``.
            gt_labels: the objects' classes, ``[k]``.

        Returns:
            For each box, in ``gt_inds``: 1 + its object, 0 for background, -1 for neither; and its largest
            IoU and class, as mmdet's.
        """
        if overlaps.numel() == 0 or not self.gt_max_assign_all:
            return super().assign_wrt_overlaps(overlaps, gt_labels)
        largest, nearest = overlaps.max(dim=0)
        low, high = self.neg_iou_thr if isinstance(self.neg_iou_thr, tuple) else (0, self.neg_iou_thr)
        inds = torch.where((largest >= low) & (largest < high), 0, -1)
        inds = torch.where(largest >= self.pos_iou_thr, nearest + 1, inds)
        if self.match_low_quality:
            best = overlaps.amax(dim=1, keepdim=True)
            is_best = (overlaps == best) & (best >= self.min_pos_iou)
            numbers = torch.arange(1, len(overlaps) + 1, device=overlaps.device, dtype=torch.int32)
            # Of several objects, mmdet's loop leaves the last one's number.
            last = torch.where(is_best, numbers[:, None], 0).amax(dim=0)
            inds = torch.where(last > 0, last, inds)
        labels = torch.where(inds > 0, gt_labels[(inds - 1).clamp(min=0)], -1)
        return AssignResult(len(overlaps), inds, largest, labels)


@TASK_UTILS.register_module()
class RandomSampler(_RandomSampler):
    """mmdet's RandomSampler, which draws where the boxes are. Arguments are mmdet's."""

    def random_choice(self, gallery, num: int):
        """``num`` of the gallery's elements, each at most once.

        Args:
            gallery: a tensor ``[n]``; an array or a list is left to mmdet.
            num: how many, at most n.
        """
        if not isinstance(gallery, Tensor):
            return super().random_choice(gallery, num)
        return gallery[torch.randperm(len(gallery), device=gallery.device)[:num]]


@TASK_UTILS.register_module()
class AnchorGenerator(_AnchorGenerator):
    """mmdet's AnchorGenerator, which keeps the anchors of the last sizes. Arguments are mmdet's."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self._kept: dict[tuple, list[Tensor]] = {}

    def _keep(self, make, sizes: list[tuple[int, int]], *rest) -> list[Tensor]:
        key = (make.__name__, *map(tuple, sizes), *rest)
        if key not in self._kept:
            if len(self._kept) >= 2 * MOST_SIZES:
                self._kept.pop(next(iter(self._kept)))
            self._kept[key] = make(sizes, *rest)
        return [each.clone() for each in self._kept[key]]  # the caller's own

    def grid_priors(self, featmap_sizes, dtype=torch.float32, device='cuda') -> list[Tensor]:
        """Anchors of each level, ``[H * W * A, 4]``."""
        return self._keep(super().grid_priors, featmap_sizes, dtype, device)

    def valid_flags(self, featmap_sizes, pad_shape, device='cuda') -> list[Tensor]:
        """Whether each level's anchors are within the picture, ``[H * W * A]``."""
        return self._keep(super().valid_flags, featmap_sizes, tuple(pad_shape), device)
