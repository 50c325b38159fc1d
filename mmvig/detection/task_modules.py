"""Assigner, sampler, anchors and box coder, and what is kept of sizes."""

import itertools
import math
import threading
from collections.abc import Callable, Sequence

import torch
from mmdet.models.task_modules import AnchorGenerator as _AnchorGenerator
from mmdet.models.task_modules import AssignResult, BboxOverlaps2D
from mmdet.models.task_modules import DeltaXYWHBBoxCoder as _DeltaXYWHBBoxCoder
from mmdet.models.task_modules import MaxIoUAssigner as _MaxIoUAssigner
from mmdet.models.task_modules import RandomSampler as _RandomSampler
from mmdet.structures.bbox import get_box_tensor
from torch import Tensor

from mmvig.ops.plain import is_traced
from mmvig.registry import TASK_UTILS

MOST_SIZES = 64  # keys of which a Kept has what was made
MOST_KEPT = 2**27  # bytes that it has: of the largest pictures of COCO, 18 sizes' anchors
MOST_OVERLAPS = 2**26  # of all images' objects with all boxes, at 24 bytes; above it, of fewer images


class _Overlaps(BboxOverlaps2D):
    """IoU of boxes ``[k, 4]`` and ``[n, 4]``; mmdet copies its epsilon to the GPU and waits."""

    def __call__(self, bboxes1, bboxes2, mode: str = 'iou', is_aligned: bool = False) -> Tensor:
        one, other = get_box_tensor(bboxes1), get_box_tensor(bboxes2)
        plain = all(x.shape[1:] == (4,) and x.dtype == torch.float32 for x in (one, other))
        if mode != 'iou' or is_aligned or not plain:
            return super().__call__(bboxes1, bboxes2, mode, is_aligned)
        areas = [(x[:, 2] - x[:, 0]) * (x[:, 3] - x[:, 1]) for x in (one, other)]
        one = one[:, None]
        sides = torch.minimum(one[..., 2:], other[:, 2:]) - torch.maximum(one[..., :2], other[:, :2])
        width, height = sides.clamp_(min=0).unbind(-1)
        shared = width * height
        return shared / (areas[0][:, None] + areas[1] - shared).clamp_(min=1e-6)


@TASK_UTILS.register_module()
class MaxIoUAssigner(_MaxIoUAssigner):
    """mmdet's MaxIoUAssigner without waiting for the GPU. Arguments are mmdet's."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        if type(self.iou_calculator) is BboxOverlaps2D and self.iou_calculator.dtype is None:
            self.iou_calculator = _Overlaps()

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
        inds, largest = (each[0] for each in self.assign_each(overlaps, [len(overlaps)]))
        labels = torch.where(inds > 0, gt_labels[(inds - 1).clamp(min=0)], -1)
        return AssignResult(len(overlaps), inds, largest, labels)

    def assigns_each(self) -> bool:
        """Whether :meth:`assign_each` does all that the arguments ask for."""
        return (
            self.gt_max_assign_all
            and self.ignore_iof_thr <= 0
            and self.gpu_assign_thr <= 0
            and self.perm_repeat_gt_cfg is None
        )

    def assign_each(self, overlaps: Tensor, counts: list[int]) -> tuple[Tensor, Tensor]:
        """Assign the same boxes to the objects of each of B images.

        Args:
            overlaps: IoU of all images' k objects and n boxes, ``[k, n]``.
            counts: how many objects each image has, at least one.

        Returns:
            ``[B, n]``: 1 + the object's number among all k, 0 for background, -1 for neither; and the
            largest IoU, ``[B, n]``.
        """
        largest, nearest = zip(*(part.max(dim=0) for part in overlaps.split(counts)), strict=True)
        first = itertools.accumulate(counts, initial=1)
        nearest = torch.stack([own + before for own, before in zip(nearest, first, strict=False)])
        largest = torch.stack(largest)
        low, high = self.neg_iou_thr if isinstance(self.neg_iou_thr, tuple) else (0, self.neg_iou_thr)
        inds = torch.where((largest >= low) & (largest < high), 0, -1)
        inds = torch.where(largest >= self.pos_iou_thr, nearest, inds)
        if self.match_low_quality:
            best = overlaps.amax(dim=1, keepdim=True)
            is_best = (overlaps == best) & (best >= self.min_pos_iou)
            numbers = torch.arange(1, len(overlaps) + 1, device=overlaps.device, dtype=torch.int32)
            numbers = torch.where(is_best, numbers[:, None], 0)
            # Of several objects, mmdet's loop leaves the last one's number.
            last = torch.stack([part.amax(dim=0) for part in numbers.split(counts)])
            inds = torch.where(last > 0, last, inds)
        return inds, largest


@TASK_UTILS.register_module()
class RandomSampler(_RandomSampler):
    """mmdet's RandomSampler, which draws where the boxes are. Arguments are mmdet's."""

    def random_choice(self, gallery, num: int):
        """``num`` of the gallery's elements, each at most once.

        Args:
            gallery: a tensor ``[n]``; an array or a list is left to mmdet.
            num: how many, at most n.
        """
        if not isinstance(gallery, Tensor) or len(gallery) < num:
            return super().random_choice(gallery, num)
        return gallery[torch.randperm(len(gallery), device=gallery.device)[:num]]

    def samples_each(self) -> bool:
        """Whether :meth:`sample_each` does all that the arguments ask for."""
        return self.neg_pos_ub < 0 and not self.add_gt_as_proposals

    def sample_each(self, inds: Tensor) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
        """Draw boxes of each of B images without knowing how many there are to draw from.

        Args:
            inds: of each box, positive for an object, 0 for background, ``[B, n]``.

        Returns:
            Places ``[B, num * pos_fraction]`` of objects' boxes and whether each has been drawn (else there
            were too few); and those of background, ``[B, num]``.
        """
        keys = torch.rand(inds.shape, device=inds.device)
        drawn = []
        for wanted, most in ((inds > 0, int(self.num * self.pos_fraction)), (inds == 0, self.num)):
            largest, places = torch.where(wanted, keys, -1.0).topk(min(most, inds.shape[1]))
            drawn.append((places, largest >= 0))
        (positive, is_positive), (negative, is_negative) = drawn
        left = self.num - is_positive.sum(1, keepdim=True)
        is_negative &= torch.arange(negative.shape[1], device=inds.device) < left
        return (positive, is_positive), (negative, is_negative)


_keeping = threading.Lock()  # of all: one of its own could not be copied with a model


class Kept(dict):
    """What was made for the last keys; a copied or unpickled one has none.

    Its keys name devices, which what is unpickled may not be on.
    """

    def __reduce__(self):
        return Kept, ()

    def made(self, key: tuple, make: Callable):
        """What ``make()`` has returned for this key, or returns now."""
        if is_traced() or is_captured():  # what is made now belongs to the trace, or the graph's memory
            return make()
        found = self.get(key)
        if found is None:
            with torch.inference_mode(False):  # later calls may need gradients
                found = (make(),)
            with _keeping:
                size = _size(found)
                while self and (
                    len(self) >= MOST_SIZES or size + sum(map(_size, self.values())) > MOST_KEPT
                ):
                    del self[next(iter(self))]
                self[key] = found
        return found[0]


def _size(made) -> int:
    """Bytes of tensors in tuples and lists."""
    if isinstance(made, Tensor):
        return made.numel() * made.element_size()
    return sum(map(_size, made)) if isinstance(made, (tuple, list)) else 0


def is_captured() -> bool:
    """Whether a CUDA graph is being captured, which may outlive what it reads."""
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


@TASK_UTILS.register_module()
class AnchorGenerator(_AnchorGenerator):
    """mmdet's AnchorGenerator, which keeps the anchors of the last sizes. Arguments are mmdet's."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self._anchors, self._flags = Kept(), Kept()

    def _copies(self, kept: Kept, make: Callable, sizes: list[tuple[int, int]], *rest) -> list[Tensor]:
        made = kept.made((*map(tuple, sizes), *rest), lambda: make(sizes, *rest))
        return [each.clone() for each in made]  # the caller's own

    def grid_priors(self, featmap_sizes, dtype=torch.float32, device='cuda') -> list[Tensor]:
        """Anchors of each level, ``[H * W * A, 4]``."""
        return self._copies(self._anchors, super().grid_priors, featmap_sizes, dtype, device)

    def valid_flags(self, featmap_sizes, pad_shape, device='cuda') -> list[Tensor]:
        """Whether each level's anchors are within the picture, ``[H * W * A]``."""
        return self._copies(self._flags, super().valid_flags, featmap_sizes, tuple(pad_shape), device)


@TASK_UTILS.register_module()
class DeltaXYWHBBoxCoder(_DeltaXYWHBBoxCoder):
    """mmdet's, which copies its means and deviations to a GPU once. Arguments are mmdet's."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self._kept = Kept()

    def _constants(self, like: Tensor) -> tuple[Tensor, Tensor]:
        return self._kept.made(
            (like.device, like.dtype, *self.means, *self.stds),
            lambda: tuple(
                torch.stack([like.new_full((), value) for value in values])  # without a wait
                for values in (self.means, self.stds)
            ),
        )

    def encode(self, bboxes: Tensor, gt_bboxes: Tensor) -> Tensor:
        """The deltas ``[n, 4]`` from boxes ``[n, 4]`` to objects' ``[n, 4]``."""
        boxes, truth = (get_box_tensor(each).float() for each in (bboxes, gt_bboxes))
        if boxes.shape != truth.shape:
            return super().encode(bboxes, gt_bboxes)  # which says what is wrong
        size, true_size = (each[..., 2:] - each[..., :2] for each in (boxes, truth))
        centre, true_centre = ((each[..., :2] + each[..., 2:]) * 0.5 for each in (boxes, truth))
        deltas = torch.cat([(true_centre - centre) / size, (true_size / size).log()], dim=-1)
        means, stds = self._constants(deltas)
        return deltas.sub_(means).div_(stds)

    def decode(
        self,
        bboxes: Tensor,
        pred_bboxes: Tensor,
        max_shape: Sequence[int] | None = None,
        wh_ratio_clip: float = 16 / 1000,
    ) -> Tensor:
        """Boxes ``[n, 4 * classes]`` from boxes ``[n, 4]`` and what regression gives, ``[n, 4 * classes]``.

        Args:
            bboxes: left, top, right, bottom.
            pred_bboxes: the deltas.
            max_shape: height and width of the image, within which boxes are cut. Default: not at all.
            wh_ratio_clip: sides grow and shrink by no larger factor than its inverse.
        """
        if (
            pred_bboxes.ndim != 2
            or len(pred_bboxes) == 0
            or len(pred_bboxes) != len(bboxes)
            or self.use_box_type
            or self.add_ctr_clamp
            or wh_ratio_clip <= 0
            or is_traced()
        ):
            return super().decode(bboxes, pred_bboxes, max_shape, wh_ratio_clip)
        deltas = pred_bboxes.reshape(len(pred_bboxes), -1, 4)
        means, stds = self._constants(deltas)
        deltas = deltas * stds + means
        boxes = get_box_tensor(bboxes)[:, None]
        size = boxes[..., 2:] - boxes[..., :2]
        most = abs(math.log(wh_ratio_clip))
        centre = (boxes[..., :2] + boxes[..., 2:]) * 0.5 + size * deltas[..., :2]
        half = size * deltas[..., 2:].clamp(min=-most, max=most).exp() * 0.5
        found = torch.cat([centre - half, centre + half], dim=-1)
        if self.clip_border and max_shape is not None:
            clip_boxes(found, max_shape)
        return found.reshape(len(found), -1)


def clip_boxes(boxes: Tensor, shape: Sequence[int]) -> None:
    """Cut boxes ``[..., 4]`` to an image of ``shape`` (height, width, ...) in place."""
    boxes[..., 0::2].clamp_(min=0, max=shape[1])
    boxes[..., 1::2].clamp_(min=0, max=shape[0])
