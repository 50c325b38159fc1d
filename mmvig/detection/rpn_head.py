"""The region proposal network, for all images of a batch at once."""

import torch
from mmcv.ops import batched_nms
from mmdet.models.dense_heads import RPNHead as _RPNHead
from mmdet.models.losses import CrossEntropyLoss, L1Loss, l1_loss
from mmdet.structures.bbox import get_box_tensor
from mmengine.structures import InstanceData
from torch import Tensor

from mmvig.detection.task_modules import (
    DeltaXYWHBBoxCoder,
    Kept,
    MaxIoUAssigner,
    RandomSampler,
    clip_boxes,
    is_traced,
)


class RPNHead(_RPNHead):
    """mmdet's RPNHead, for all images of a batch at once. Arguments are mmdet's.

    Proposals are float32 in mixed precision too. The losses are mmdet's over other draws of as many
    anchors. With parts that draw or encode in another way than :class:`MaxIoUAssigner`,
    :class:`RandomSampler` and :class:`DeltaXYWHBBoxCoder`, mmdet computes them, image by image.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self._kept = Kept()

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

        scores = torch.cat([_rows(x, 1).flatten(1) for x in cls_scores], 1)
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

        deltas = torch.cat([_rows(x, 4) for x in bbox_preds], 1)
        deltas = deltas.gather(1, positive[..., None].expand(-1, -1, 4)).reshape(-1, 4)
        owners = (numbers.gather(1, positive) - 1).clamp(min=0).flatten()
        targets = self.bbox_coder.encode(anchors[positive.flatten()], objects[owners])
        is_positive = is_positive.flatten()[:, None]
        targets = torch.where(is_positive, targets, 0.0)  # what was not drawn may be infinite
        weights = is_positive.float().expand(-1, 4)
        if type(self.loss_bbox) is L1Loss:  # it would first wait for whether all weights are 0
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
        if not usual or is_traced():
            return super().predict_by_feat(
                cls_scores, bbox_preds, score_factors, batch_img_metas, cfg, rescale, with_nms
            )
        cfg = self.test_cfg if cfg is None else cfg
        images, most = len(cls_scores[0]), cfg.get('nms_pre', -1)
        sizes, device = [tuple(x.shape[-2:]) for x in cls_scores], cls_scores[0].device
        anchors = self.prior_generator.grid_priors(sizes, device=device)
        scores, deltas, priors = [], [], []
        for own_scores, own_deltas, own in zip(cls_scores, bbox_preds, anchors, strict=True):
            own_scores = _rows(own_scores, 1).flatten(1).sigmoid()
            own_deltas = _rows(own_deltas, 4)
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


def _rows(maps: Tensor, width: int) -> Tensor:
    """Maps ``[B, A * width, H, W]`` in the order of anchors, ``[B, H * W * A, width]``."""
    return maps.permute(0, 2, 3, 1).reshape(len(maps), -1, width)
