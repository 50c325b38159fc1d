"""Parts of mmdet's detectors that wait less for the GPU and keep boxes in float32.

mmdet's own wait for the GPU once for each object and each level, shuffle all 240,000 anchors on the CPU to
draw 256, and make the anchors of a size anew for each batch. In mixed precision they round boxes to the
maps' dtype: in bfloat16 to whole multiples of 4 or 8 pixels from 512 on.
"""

import itertools
import math
import threading
from collections.abc import Callable, Mapping, Sequence

import mmvig.compat  # noqa: F401  # before mmdet, which imports mmcv.ops

import torch
from mmcv.ops import batched_nms
from mmdet.models.data_preprocessors import DetDataPreprocessor as _DetDataPreprocessor
from mmdet.models.dense_heads import RPNHead as _RPNHead
from mmdet.models.losses import CrossEntropyLoss, L1Loss, l1_loss
from mmdet.models.roi_heads.mask_heads import FCNMaskHead as _FCNMaskHead
from mmdet.models.roi_heads.roi_extractors import SingleRoIExtractor as _SingleRoIExtractor
from mmdet.models.task_modules import AnchorGenerator as _AnchorGenerator
from mmdet.models.task_modules import AssignResult, BboxOverlaps2D
from mmdet.models.task_modules import DeltaXYWHBBoxCoder as _DeltaXYWHBBoxCoder
from mmdet.models.task_modules import MaxIoUAssigner as _MaxIoUAssigner
from mmdet.models.task_modules import RandomSampler as _RandomSampler
from mmdet.structures.bbox import get_box_tensor
from mmengine.structures import InstanceData
from torch import Tensor

from mmvig.ops.plain import is_watched
from mmvig.registry import TASK_UTILS

MOST_SIZES = 64  # of which an AnchorGenerator keeps anchors
MASKS = 32


class DetDataPreprocessor(_DetDataPreprocessor):
    """mmdet's DetDataPreprocessor, which puts images where they belong in a batch. Arguments are mmdet's.

    mmdet's own swaps channels by an index, which is copied to the GPU with a wait, and computes sizes with
    tensors on the CPU, which wakes all of PyTorch's threads for a few numbers.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self._swaps, self._channel_conversion = self._channel_conversion, False
        self._normalizes, self._enable_normalize = self._enable_normalize, False

    def cast_data(self, data):
        """Move a batch to the device; the usual images are normalised, padded and stacked there."""
        data = super().cast_data(data)
        usual = isinstance(data, Mapping) and self._are_usual(data.get('inputs'))
        self._channel_conversion = self._swaps and not usual
        self._enable_normalize = self._normalizes and not usual
        return {**data, 'inputs': self._stacked(data['inputs'])} if usual else data

    def _are_usual(self, images: object) -> bool:
        """Whether they are several images [C, H, W] of as many channels as normalisation is for."""
        if not isinstance(images, (list, tuple)) or not images:
            return False
        if not all(isinstance(x, Tensor) and x.ndim == 3 and not x.requires_grad for x in images):
            return False
        channels = len(images[0])
        normalizes = not self._normalizes or (
            len(self.mean) in (1, channels) and self.mean.dtype == torch.float32
        )
        return normalizes and all(len(x) == channels for x in images) and (not self._swaps or channels == 3)

    def _stacked(self, images: Sequence[Tensor]) -> Tensor:
        sides = [max(image.shape[axis] for image in images) for axis in (1, 2)]
        height, width = (-(-side // self.pad_size_divisor) * self.pad_size_divisor for side in sides)
        shape = len(images), len(images[0]), height, width
        batch = torch.full(shape, self.pad_value, dtype=torch.float32, device=images[0].device)
        for place, image in zip(batch, images, strict=True):
            image = (image.flip(0) if self._swaps else image).float()
            if self._normalizes:
                image = (image - self.mean) / self.std
            place[:, : image.shape[1], : image.shape[2]] = image
        return batch


class RPNHead(_RPNHead):
    """mmdet's RPNHead, for all images of a batch at once. Arguments are mmdet's.

    Proposals are float32 in mixed precision too. The losses are mmdet's over other draws of as many
    anchors. With parts that draw or encode in another way than :class:`MaxIoUAssigner`,
    :class:`RandomSampler` and :class:`DeltaXYWHBBoxCoder`, mmdet computes them, image by image.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self._kept = _Kept()

    def loss_by_feat(
        self,
        cls_scores: list[Tensor],
        bbox_preds: list[Tensor],
        batch_gt_instances: list[InstanceData],
        batch_img_metas: list[dict],
        batch_gt_instances_ignore: list[InstanceData] | None = None,
    ) -> dict[str, list[Tensor]]:
        """``loss_rpn_cls`` and ``loss_rpn_bbox``, of all levels together.

        Args:
            cls_scores: ``[B, A, H, W]`` of each level.
            bbox_preds: ``[B, 4A, H, W]`` of each level.
            batch_gt_instances: each image's objects.
            batch_img_metas: each image's ``pad_shape``.
            batch_gt_instances_ignore: each image's regions to ignore.
        """
        objects = [each.bboxes for each in batch_gt_instances]
        if not (self._draws_at_once() and all(map(len, objects))):
            return super().loss_by_feat(
                cls_scores, bbox_preds, batch_gt_instances, batch_img_metas, batch_gt_instances_ignore
            )
        sizes, device = [tuple(x.shape[-2:]) for x in cls_scores], cls_scores[0].device
        anchors = torch.cat(self.prior_generator.grid_priors(sizes, device=device))
        valid = self._valid(sizes, [tuple(meta['pad_shape'][:2]) for meta in batch_img_metas], device)
        counts = [len(each) for each in objects]
        objects = torch.cat([get_box_tensor(each) for each in objects])
        overlaps = self.assigner.iou_calculator(objects, anchors)
        if valid is not None:
            for part, of_image in zip(overlaps.split(counts), valid, strict=True):
                part.masked_fill_(~of_image, -1.0)  # no object's nearest
        numbers, _ = self.assigner.assign_each(overlaps, counts)
        del overlaps
        if valid is not None:
            numbers = torch.where(valid, numbers, -1)
        (positive, is_positive), (negative, is_negative) = self.sampler.sample_each(numbers)

        scores = torch.cat([x.permute(0, 2, 3, 1).flatten(1) for x in cls_scores], 1)
        scores = scores.gather(1, torch.cat([positive, negative], 1))
        found = torch.cat([is_positive, is_negative], 1)
        labels = found & (torch.arange(found.shape[1], device=found.device) < positive.shape[1])
        weights = found.float()
        if self.train_cfg['pos_weight'] > 0:
            weights = torch.where(labels, self.train_cfg['pos_weight'], weights)
        drawn = [each.sum(1).clamp(min=1) for each in (is_positive, is_negative)]
        count = (drawn[0] + drawn[1]).sum()
        loss_cls = self.loss_cls(
            scores.reshape(-1, 1), labels.reshape(-1, 1), weights.reshape(-1, 1), avg_factor=count
        )

        deltas = torch.cat([x.permute(0, 2, 3, 1).reshape(len(x), -1, 4) for x in bbox_preds], 1)
        deltas = deltas.gather(1, positive[..., None].expand(-1, -1, 4)).reshape(-1, 4)
        owners = (numbers.gather(1, positive) - 1).clamp(min=0).flatten()
        targets = self.bbox_coder.encode(anchors[positive.flatten()], objects[owners])
        is_positive = is_positive.flatten()[:, None]
        targets = torch.where(is_positive, targets, 0.0)  # what was not drawn may be infinite
        weights = is_positive.float().expand(-1, 4)
        if type(self.loss_bbox) is L1Loss and self.loss_bbox.reduction == 'mean':
            # L1Loss itself first waits for whether all weights are 0.
            loss_bbox = self.loss_bbox.loss_weight * l1_loss(deltas, targets, weights, avg_factor=count)
        else:
            loss_bbox = self.loss_bbox(deltas, targets, weights, avg_factor=count)
        return {'loss_rpn_cls': [loss_cls], 'loss_rpn_bbox': [loss_bbox]}

    def predict_by_feat(
        self,
        cls_scores: list[Tensor],
        bbox_preds: list[Tensor],
        score_factors: None = None,
        batch_img_metas: list[dict] | None = None,
        cfg: dict | None = None,
        rescale: bool = False,
        with_nms: bool = True,
    ) -> list[InstanceData]:
        """Proposals of each image, in float32: ``bboxes``, ``scores`` and ``labels``.

        Args:
            cls_scores: ``[B, A, H, W]`` of each level.
            bbox_preds: ``[B, 4A, H, W]`` of each level.
            score_factors: not used.
            batch_img_metas: each image's ``img_shape``.
            cfg: ``nms_pre``, ``nms``, ``max_per_img`` and ``min_bbox_size``. Default: the head's test_cfg.
            rescale: whether to give boxes in pixels of the image as it was read.
            with_nms: as mmdet's; it must be True.
        """
        cls_scores, bbox_preds = ([x.detach().float() for x in maps] for maps in (cls_scores, bbox_preds))
        usual = with_nms and not rescale and self.use_sigmoid_cls and self._has_plain_boxes()
        if not usual or _is_traced():
            return super().predict_by_feat(
                cls_scores, bbox_preds, score_factors, batch_img_metas, cfg, rescale, with_nms
            )
        cfg = self.test_cfg if cfg is None else cfg
        images, most = len(cls_scores[0]), cfg.get('nms_pre', -1)
        sizes, device = [tuple(x.shape[-2:]) for x in cls_scores], cls_scores[0].device
        anchors = self.prior_generator.grid_priors(sizes, device=device)
        scores, deltas, priors = [], [], []
        for own_scores, own_deltas, own in zip(cls_scores, bbox_preds, anchors, strict=True):
            own_scores = own_scores.permute(0, 2, 3, 1).flatten(1).sigmoid()
            own_deltas = own_deltas.permute(0, 2, 3, 1).reshape(images, -1, 4)
            own = own.expand(images, -1, 4)
            if 0 < most < own_scores.shape[1]:
                own_scores, places = own_scores.sort(descending=True)
                own_scores, places = own_scores[:, :most], places[:, :most, None].expand(-1, -1, 4)
                own_deltas, own = own_deltas.gather(1, places), own.gather(1, places)
            scores.append(own_scores)
            deltas.append(own_deltas)
            priors.append(own)
        levels = self._levels(tuple(own.shape[1] for own in scores), device)
        scores = torch.cat(scores, 1)
        boxes = self.bbox_coder.decode(torch.cat(priors, 1).view(-1, 4), torch.cat(deltas, 1).view(-1, 4))
        boxes = boxes.view(images, -1, 4)
        if self.bbox_coder.clip_border:
            for own, meta in zip(boxes, batch_img_metas, strict=True):
                clip_boxes(own, meta['img_shape'])
        whole = None
        if cfg.get('min_bbox_size', -1) >= 0:
            whole = ((boxes[..., 2:] - boxes[..., :2]) > cfg['min_bbox_size']).all(-1)
            all_whole = whole.all(1).tolist()
        results = []
        for i in range(images):
            own, own_scores, own_levels = boxes[i], scores[i], levels
            if whole is not None and not all_whole[i]:
                places = whole[i].nonzero().flatten()
                own, own_scores, own_levels = own[places], own_scores[places], levels[places]
            if len(own):
                found, kept = batched_nms(own, own_scores, own_levels, cfg['nms'])
                own, own_scores = own[kept[: cfg['max_per_img']]], found[: cfg['max_per_img'], -1]
            labels = own_levels.new_zeros(len(own))
            results.append(InstanceData(bboxes=own, scores=own_scores, labels=labels))
        return results

    def _draws_at_once(self) -> bool:
        return (
            self._has_plain_boxes()
            and type(self.assigner) is MaxIoUAssigner
            and self.assigner.assigns_each()
            and type(self.sampler) is RandomSampler
            and self.sampler.samples_each()
            and type(self.loss_cls) is CrossEntropyLoss
            and self.loss_cls.use_sigmoid
            and self.loss_cls.ignore_index is None
            and self.loss_cls.reduction == getattr(self.loss_bbox, 'reduction', None) == 'mean'
            and not self.reg_decoded_bbox
            and self.train_cfg['allowed_border'] < 0
        )

    def _has_plain_boxes(self) -> bool:
        coder = self.bbox_coder
        return type(coder) is DeltaXYWHBBoxCoder and not (
            coder.use_box_type or coder.add_ctr_clamp or self.prior_generator.use_box_type
        )

    def _valid(self, sizes: list[tuple], pads: list[tuple], device: torch.device) -> Tensor | None:
        """Which anchors are within each image, ``[B, N]``; None if all are."""

        def make() -> Tensor | None:
            flags = [torch.cat(self.prior_generator.valid_flags(sizes, pad, device)) for pad in pads]
            return None if all(own.all() for own in flags) else torch.stack(flags)

        return self._kept.made((*sizes, None, *pads, device), make)

    def _levels(self, counts: tuple[int, ...], device: torch.device) -> Tensor:
        """Numbers of the levels of which each has some anchors."""
        return self._kept.made(
            (counts, device),
            lambda: torch.cat([torch.full((n,), i, device=device) for i, n in enumerate(counts)]),
        )


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
        # mmdet gives zeros for RoIs of no level, whose area is negative or NaN.
        levels = torch.where((levels >= 0) & (levels < len(feats)), levels, len(feats))
        order = levels.argsort(stable=True)
        counts = (levels[:, None] == torch.arange(len(feats) + 1, device=levels.device)).sum(0).tolist()
        found, unused = [], []
        for layer, x, own in zip(self.roi_layers, feats, rois[order].split(counts), strict=False):
            if len(own):
                found.append(layer(x, own))
            else:
                unused.append(x.sum() * 0.0)  # a gradient for each level, as DDP wants it
        like = found[0] if found else feats[0]
        result = like.new_zeros(len(rois), self.out_channels, *self.roi_layers[0].output_size)
        if found:
            result.index_copy_(0, order[: len(rois) - counts[-1]], torch.cat(found))
        return result + sum(unused) if unused else result


class FCNMaskHead(_FCNMaskHead):
    """mmdet's FCNMaskHead, which meets few sizes of batches. Arguments are mmdet's.

    How many RoIs have masks changes in each iteration, and cuDNN plans each convolution anew for each
    number. So they are filled up with zeros to a multiple of :data:`MASKS`, which is left out again.
    """

    def __call__(self, x: Tensor) -> Tensor:
        """Masks ``[N, classes, 2h, 2w]`` from features of RoIs ``[N, C, h, w]``."""
        # A batch norm would count them, and a trace would fix how many there are.
        if self.norm_cfg is not None or _is_traced() or len(x) % MASKS == 0:
            return super().__call__(x)
        filled = torch.cat([x, x.new_zeros(-len(x) % MASKS, *x.shape[1:])])
        return super().__call__(filled)[: len(x)]


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


class _Kept(dict):
    """What was made for the last keys."""

    def made(self, key: tuple, make: Callable):
        """What ``make()`` has returned for this key, or returns now."""
        if _is_traced():  # what is made now belongs to the trace
            return make()
        found = self.get(key)
        if found is None:
            with torch.inference_mode(False):  # later calls may need gradients
                found = (make(),)
            with _keeping:
                while len(self) >= MOST_SIZES:
                    del self[next(iter(self))]
                self[key] = found
        return found[0]


def _is_traced() -> bool:
    """Whether a compiler, tracer or exporter looks on, for which sizes must stay open."""
    return torch.compiler.is_compiling() or is_watched() or torch.onnx.is_in_onnx_export()


@TASK_UTILS.register_module()
class AnchorGenerator(_AnchorGenerator):
    """mmdet's AnchorGenerator, which keeps the anchors of the last sizes. Arguments are mmdet's."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self._kept = _Kept()

    def _keep(self, make: Callable, sizes: list[tuple[int, int]], *rest) -> list[Tensor]:
        key = (make.__name__, *map(tuple, sizes), *rest)
        made = self._kept.made(key, lambda: make(sizes, *rest))
        return [each.clone() for each in made]  # the caller's own

    def grid_priors(self, featmap_sizes, dtype=torch.float32, device='cuda') -> list[Tensor]:
        """Anchors of each level, ``[H * W * A, 4]``."""
        return self._keep(super().grid_priors, featmap_sizes, dtype, device)

    def valid_flags(self, featmap_sizes, pad_shape, device='cuda') -> list[Tensor]:
        """Whether each level's anchors are within the picture, ``[H * W * A]``."""
        return self._keep(super().valid_flags, featmap_sizes, tuple(pad_shape), device)


@TASK_UTILS.register_module()
class DeltaXYWHBBoxCoder(_DeltaXYWHBBoxCoder):
    """mmdet's, which copies its means and deviations to a GPU once. Arguments are mmdet's."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self._kept = _Kept()

    def _constants(self, like: Tensor) -> tuple[Tensor, Tensor]:
        return self._kept.made(
            (like.device, like.dtype, *self.means, *self.stds),
            lambda: (like.new_tensor(self.means), like.new_tensor(self.stds)),
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
            or _is_traced()
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
