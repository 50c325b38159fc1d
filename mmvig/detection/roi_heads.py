"""Regions of interest: what they learn from, their features and their masks."""

from collections.abc import Sequence
from itertools import chain

import numpy as np
import torch
from mmdet.models.roi_heads import StandardRoIHead as _StandardRoIHead
from mmdet.models.roi_heads.bbox_heads import BBoxHead
from mmdet.models.roi_heads.mask_heads import FCNMaskHead as _FCNMaskHead
from mmdet.models.roi_heads.roi_extractors import SingleRoIExtractor as _SingleRoIExtractor
from mmdet.models.task_modules import SamplingResult
from mmdet.models.utils import unpack_gt_instances
from mmdet.structures import SampleList
from mmdet.structures.mask import PolygonMasks
from mmengine.config import ConfigDict
from mmengine.structures import InstanceData
from torch import Tensor
from torch.nn.modules.utils import _pair
from torch.nn.utils.rnn import pad_sequence

from mmvig.detection.task_modules import MOST_OVERLAPS, MaxIoUAssigner, RandomSampler
from mmvig.ops.plain import has_methods_of, is_traced

MASKS = 32  # of whose multiples FCNMaskHead makes its batches


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
        if self.norm_cfg is not None or is_traced() or len(x) % MASKS == 0:
            return super().__call__(x)
        filled = torch.cat([x, x.new_zeros(-len(x) % MASKS, *x.shape[1:])])
        return super().__call__(filled)[: len(x)]

    def get_targets(
        self,
        sampling_results: list[SamplingResult],
        batch_gt_instances: list[InstanceData],
        rcnn_train_cfg: ConfigDict,
    ) -> Tensor:
        """What masks of regions with an object are to be, ``[N, h, w]``, in float32.

        Without waiting for the GPU where :class:`StandardRoIHead` has fetched the regions.

        Args:
            sampling_results: each image's regions.
            batch_gt_instances: each image's objects, with ``masks``.
            rcnn_train_cfg: ``mask_size``, and ``soft_mask_target``, by default False.
        """
        fetched = [_fetched(each) for each in sampling_results]
        masks_of = [each.masks for each in batch_gt_instances]
        if None in fetched or not all(type(masks) is PolygonMasks for masks in masks_of):
            return super().get_targets(sampling_results, batch_gt_instances, rcnn_train_cfg)
        device, size = sampling_results[0].pos_priors.device, _pair(rcnn_train_cfg.mask_size)
        binarize = not rcnn_train_cfg.get('soft_mask_target', False)
        targets = []
        for (boxes, owners), masks in zip(fetched, masks_of, strict=True):
            boxes = boxes.clip(0, np.array([masks.width, masks.height] * 2, dtype=boxes.dtype))
            cropped = masks.crop_and_resize(boxes, size, owners, binarize=binarize)
            targets.append(cropped.to_ndarray())
        targets = torch.from_numpy(np.concatenate(targets))
        if device.type == 'cuda':
            targets = targets.pin_memory().to(device, non_blocking=True)
        return targets.float()


def _fetched(result: SamplingResult) -> tuple[np.ndarray, np.ndarray] | None:
    """Boxes ``[N, 4]`` and objects ``[N]`` of regions on the host, if they are there and still the same."""
    of, values = getattr(result, 'fetched', ((None, None), None))
    return values if of[0] is result.pos_priors and of[1] is result.pos_assigned_gt_inds else None


class StandardRoIHead(_StandardRoIHead):
    """mmdet's StandardRoIHead, which draws regions of all images at once. Arguments are mmdet's.

    Losses are mmdet's over other draws of as many regions, with one wait for the GPU instead of one for
    each image and kind. With other parts than :class:`MaxIoUAssigner`, :class:`RandomSampler` and the
    targets of mmdet's BBoxHead, mmdet does it, image by image.
    """

    def loss(
        self, x: Sequence[Tensor], rpn_results_list: list[InstanceData], batch_data_samples: SampleList
    ) -> dict[str, Tensor]:
        """Losses of classes, boxes and masks.

        Args:
            x: the neck's maps ``[B, C, H, W]``.
            rpn_results_list: each image's proposals, ``bboxes``.
            batch_data_samples: each image's objects.
        """
        instances, _, _ = unpack_gt_instances(batch_data_samples)
        proposals = [each.bboxes for each in rpn_results_list]
        if not self._draws_at_once(proposals, [each.bboxes for each in instances]):
            return super().loss(x, rpn_results_list, batch_data_samples)
        drawn = self._draw(proposals, instances)
        losses = {}
        if self.with_bbox:
            rois, targets = self._targets(drawn)
            results = self._bbox_forward(x, rois)
            losses.update(self.bbox_head.loss(results['cls_score'], results['bbox_pred'], rois, *targets))
        if self.with_mask:
            features = results['bbox_feats'] if self.with_bbox else None
            losses.update(self.mask_loss(x, drawn, features, instances)['loss_mask'])
        return losses

    def _draws_at_once(self, proposals: list[Tensor], objects: list[Tensor]) -> bool:
        own = ('loss_and_target', 'get_targets', '_get_targets_single')
        return (
            type(self.bbox_assigner) is MaxIoUAssigner
            and self.bbox_assigner.assigns_each()
            and type(self.bbox_sampler) is RandomSampler
            and self.bbox_sampler.neg_pos_ub < 0
            and (not self.with_bbox or has_methods_of(self.bbox_head, BBoxHead, *own))
            and not (self.with_bbox and (self.bbox_head.reg_decoded_bbox or self.train_cfg.pos_weight > 0))
            and has_methods_of(self, _StandardRoIHead, 'bbox_loss')
            and all(type(each) is Tensor and len(each) for each in (*proposals, *objects))
            and not is_traced()
        )

    def _draw(self, proposals: list[Tensor], instances: list[InstanceData]) -> list[SamplingResult]:
        """Each image's drawn regions, as mmdet's sampler gives them."""
        counts, half = [len(each) for each in instances], len(instances) // 2
        boxes = pad_sequence(proposals, batch_first=True)
        if half and sum(counts) * boxes[..., 0].numel() > MOST_OVERLAPS:
            return [
                *self._draw(proposals[:half], instances[:half]),
                *self._draw(proposals[half:], instances[half:]),
            ]
        objects = torch.cat([each.bboxes for each in instances])
        device = objects.device
        images = torch.cat([objects.new_full((count,), i) for i, count in enumerate(counts)])
        is_other = images[:, None] != torch.arange(len(boxes), device=device)
        overlaps = self.bbox_assigner.iou_calculator(objects, boxes.view(-1, 4))
        overlaps = overlaps.view(len(objects), *boxes.shape[:2]).masked_fill_(is_other[..., None], -1.0)
        numbers, _ = self.bbox_assigner.assign_each(overlaps.flatten(1), [len(objects)])
        numbers = [
            row[: len(own)] for row, own in zip(numbers.view(boxes.shape[:2]), proposals, strict=True)
        ]
        priors = proposals
        with_own = self.bbox_sampler.add_gt_as_proposals
        if with_own:  # each object's box is its own
            own_numbers = torch.arange(1, len(objects) + 1, device=device).split(counts)
            numbers = [torch.cat(pair) for pair in zip(own_numbers, numbers, strict=True)]
            priors = [torch.cat(pair) for pair in zip(objects.split(counts), proposals, strict=True)]
        numbers = pad_sequence(numbers, batch_first=True, padding_value=-1)
        priors = pad_sequence(priors, batch_first=True)
        (positive, is_positive), (negative, is_negative) = self.bbox_sampler.sample_each(numbers)
        owners = (numbers.gather(1, positive) - 1).clamp(min=0)
        boxes = priors.gather(1, positive[..., None].expand(-1, -1, 4))
        # One wait for all that the host must know; float32 has all numbers up to 2^24.
        found = is_positive.sum(1, keepdim=True), is_negative.sum(1, keepdim=True), owners, boxes.flatten(1)
        found = torch.cat([each.detach().float() for each in found], 1).cpu().numpy()
        labels = torch.cat([each.labels for each in instances])
        columns = {
            'pos_inds': positive,
            'neg_inds': negative,
            'pos_priors': boxes,
            'neg_priors': priors.gather(1, negative[..., None].expand(-1, -1, 4)),
            'pos_gt_bboxes': objects[owners],
            'pos_gt_labels': labels[owners],
            'pos_assigned_gt_inds': owners,
        }
        results, first = [], 0
        for i, row in enumerate(found):
            many, few = map(int, row[:2])
            result = SamplingResult.__new__(SamplingResult)
            for name, column in columns.items():
                setattr(result, name, column[i, : many if name.startswith('pos') else few])
            result.pos_assigned_gt_inds = result.pos_assigned_gt_inds - first
            result.pos_is_gt = (result.pos_inds < (counts[i] if with_own else 0)).to(torch.uint8)
            result.num_pos, result.num_neg, result.num_gts = max(many, 1), max(few, 1), counts[i]
            result.avg_factor_with_neg, result.avg_factor = True, result.num_pos + result.num_neg
            own_boxes = row[2 + owners.shape[1] :].reshape(-1, 4)[:many]
            own_owners = row[2 : 2 + many].astype(int) - first
            result.fetched = (result.pos_priors, result.pos_assigned_gt_inds), (own_boxes, own_owners)
            results.append(result)
            first += counts[i]
        return results

    def _targets(self, drawn: list[SamplingResult]) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor, Tensor]]:
        """RoIs ``[N, 5]``; their classes, weights ``[N]``, and what to regress them to, weights ``[N, 4]``.

        Those of an image's objects come before its background.
        """
        head = self.bbox_head
        pairs = [(each.pos_priors, each.neg_priors) for each in drawn]
        boxes = torch.cat(list(chain(*pairs)))
        images = [boxes.new_full((len(one) + len(other), 1), i) for i, (one, other) in enumerate(pairs)]
        most = max(len(other) for _, other in pairs)
        background = boxes.new_full((most,), head.num_classes, dtype=torch.long)
        labels = [(each.pos_gt_labels, background[: len(each.neg_priors)]) for each in drawn]
        deltas = head.bbox_coder.encode(
            torch.cat([one for one, _ in pairs]), torch.cat([each.pos_gt_bboxes for each in drawn])
        )
        counts, nothing = [len(one) for one, _ in pairs], deltas.new_zeros(most, 4)
        rows = [
            (own, nothing[: len(other)])
            for own, (_, other) in zip(deltas.split(counts), pairs, strict=True)
        ]
        one = deltas.new_ones(1, 4)
        weights = [(one.expand(len(own), 4), none) for own, none in rows]
        return torch.cat([torch.cat(images), boxes], 1), (
            torch.cat(list(chain(*labels))),
            boxes.new_ones(len(boxes)),
            torch.cat(list(chain(*rows))),
            torch.cat(list(chain(*weights))),
        )
