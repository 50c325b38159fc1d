"""Parts of mmdet's two-stage and anchor-based heads, with the same results in less time on a GPU.

mmdet's own wait for the GPU once for each object, shuffle all 240,000 anchors on the CPU to draw 256, and
make the anchors of a size anew for each batch.
"""

import torch
from mmdet.models.task_modules import AnchorGenerator as _AnchorGenerator
from mmdet.models.task_modules import AssignResult
from mmdet.models.task_modules import MaxIoUAssigner as _MaxIoUAssigner
from mmdet.models.task_modules import RandomSampler as _RandomSampler
from torch import Tensor

from mmvig.registry import TASK_UTILS

MOST_SIZES = 64  # of which an AnchorGenerator keeps anchors


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
