"""The region proposal network, for all images of a batch at once."""

from collections.abc import Callable, Sequence
from functools import partial

import torch
from mmcv.ops import batched_nms
from mmdet.models.dense_heads import RPNHead as _RPNHead
from mmdet.models.losses import CrossEntropyLoss, L1Loss, l1_loss
from mmdet.models.utils import unpack_gt_instances
from mmdet.structures import SampleList
from mmdet.structures.bbox import get_box_tensor
from mmengine.structures import InstanceData
from torch import Tensor

from mmvig.conv import Conv2d
from mmvig.cuda_graphs import CudaGraphs
from mmvig.detection.task_modules import (
    MOST_OVERLAPS,
    DeltaXYWHBBoxCoder,
    Kept,
    MaxIoUAssigner,
    RandomSampler,
)
from mmvig.ops.plain import has_global_hooks, has_hooks, has_methods_of, is_plain, is_traced


class RPNHead(_RPNHead):
    """mmdet's RPNHead, for all images of a batch at once, and as CUDA graphs.

    Proposals are float32 in mixed precision too. The losses are mmdet's over other draws of as many
    anchors. With parts that draw or encode in another way than :class:`MaxIoUAssigner`,
    :class:`RandomSampler` and :class:`DeltaXYWHBBoxCoder`, or with methods that a subclass overrides,
    mmdet computes them, image by image.

    Args:
        *args: mmdet's.
        cuda_graphs: how many sizes have a graph, of the pass from the neck's maps to losses and to what
            non-maximum suppression chooses from: as the backbones' argument. Default: 'auto'.
        **kwargs: mmdet's.
    """

    def __init__(self, *args, cuda_graphs: int | str = 'auto', **kwargs):
        super().__init__(*args, **kwargs)
        self.graphs = CudaGraphs(cuda_graphs)
        self._kept, self._flags = Kept(), Kept()

    def _init_layers(self) -> None:
        super()._init_layers()
        for name in ('rpn_cls', 'rpn_reg'):
            theirs = getattr(self, name)
            setattr(self, name, Conv2d(theirs.in_channels, theirs.out_channels, 1))

    def loss_and_predict(
        self, x: Sequence[Tensor], batch_data_samples: SampleList, proposal_cfg: dict | None = None
    ) -> tuple[dict[str, list[Tensor]], list[InstanceData]]:
        """Losses and proposals: as :meth:`loss_by_feat` and :meth:`predict_by_feat`.

        Args:
            x: the neck's maps ``[B, C, H, W]``.
            batch_data_samples: each image's objects and ``img_shape``, ``pad_shape``.
            proposal_cfg: as ``cfg`` of :meth:`predict_by_feat`.
        """
        instances, _, metas = unpack_gt_instances(batch_data_samples)
        objects = [each.bboxes for each in instances]
        if not (
            self._is_usual()
            and self._draws_at_once()
            and has_methods_of(self, RPNHead, 'loss_by_feat')
            and all(map(len, objects))
            and is_plain(self.loss_bbox, L1Loss)  # others wait for the GPU, which a capture cannot
            and self.loss_cls.class_weight is None
        ):
            return super().loss_and_predict(x, batch_data_samples, proposal_cfg)
        cfg = self.test_cfg if proposal_cfg is None else proposal_cfg
        drawn = self._draw(x, objects, metas)

        def call(x, drawn, anchors, limits):
            maps = type(self).forward(self, x)
            return self._losses(*maps, *drawn), self._select(*maps, anchors, limits, cfg)

        (loss_cls, loss_bbox), selected = self._run(call, x, drawn, metas=metas, cfg=cfg)
        losses = {'loss_rpn_cls': [loss_cls], 'loss_rpn_bbox': [loss_bbox]}
        return losses, self._suppress(*selected, x, cfg)

    def predict(
        self, x: Sequence[Tensor], batch_data_samples: SampleList, rescale: bool = False
    ) -> list[InstanceData]:
        """Proposals of each image, as :meth:`predict_by_feat`.

        Args:
            x: the neck's maps ``[B, C, H, W]``.
            batch_data_samples: each image's ``img_shape``.
            rescale: whether to give boxes in pixels of the image as it was read.
        """
        if rescale or not self._is_usual():
            return super().predict(x, batch_data_samples, rescale)
        metas = [each.metainfo for each in batch_data_samples]

        def call(x, anchors, limits):
            return self._select(*type(self).forward(self, x), anchors, limits, self.test_cfg)

        return self._suppress(*self._run(call, x, metas=metas, cfg=self.test_cfg), x, self.test_cfg)

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
        drawn = self._draw(cls_scores, objects, batch_img_metas)
        loss_cls, loss_bbox = self._losses(cls_scores, bbox_preds, *drawn)
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
        if rescale or not with_nms or not self._selects_at_once() or is_traced():
            cls_scores, bbox_preds = (
                [x.detach().float() for x in maps] for maps in (cls_scores, bbox_preds)
            )
            return super().predict_by_feat(
                cls_scores, bbox_preds, score_factors, batch_img_metas, cfg, rescale, with_nms
            )
        cfg = self.test_cfg if cfg is None else cfg
        anchors, limits = self._anchors(cls_scores), self._limits(cls_scores[0], batch_img_metas)
        selected = self._select(cls_scores, bbox_preds, anchors, limits, cfg)
        return self._suppress(*selected, cls_scores, cfg)

    def _is_usual(self) -> bool:
        """Whether nothing watches, so that graphs may do all from the neck's maps on."""
        return (
            self._selects_at_once()
            and has_methods_of(self, RPNHead, 'predict_by_feat')
            and has_methods_of(self, _RPNHead, 'forward', 'forward_single')
            and not is_traced()
            and not (has_hooks(self) or has_global_hooks())
            and self._compiled_call_impl is None
            and next(self.buffers(), None) is None  # a capture would change them
        )

    def _run(self, call: Callable, x: Sequence[Tensor], *rest: Sequence[Tensor], metas: list, cfg: dict):
        """``call(x, *rest, anchors, limits)``, through graphs."""
        parts = (self.bbox_coder, self.loss_cls, self.loss_bbox)
        settings = (
            *(cfg.get(name) for name in ('nms_pre', 'min_bbox_size')),
            (self.train_cfg or {}).get('pos_weight'),
            *(pair for part in parts for pair in _plain_attributes(part)),
        )
        inputs = tuple(x), *rest, self._anchors(x), self._limits(x[0], metas)
        return self.graphs.run(self, call, *inputs, settings=settings)

    def _draw(
        self, maps: Sequence[Tensor], objects: list[Tensor], metas: list[dict]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Anchors to learn from, P with an object and N without.

        Returns:
            Their places ``[B, P + N]``; whether each has been drawn, or else there were too few; and what
            to regress those with an object to, ``[B, P, 4]``.
        """
        anchors, counts = self._anchors(maps), [len(each) for each in objects]
        if len(objects) > 1 and sum(counts) * len(anchors) > MOST_OVERLAPS:
            half = len(objects) // 2
            parts = [
                self._draw(maps, objects[part], metas[part]) for part in (slice(half), slice(half, None))
            ]
            return tuple(map(torch.cat, zip(*parts, strict=True)))
        valid = self._valid(maps, metas)
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
        owners = (numbers.gather(1, positive) - 1).clamp(min=0).flatten()
        targets = self.bbox_coder.encode(anchors[positive.flatten()], objects[owners])
        targets = targets.view(*positive.shape, 4)
        return torch.cat([positive, negative], 1), torch.cat([is_positive, is_negative], 1), targets

    def _losses(
        self,
        cls_scores: Sequence[Tensor],
        bbox_preds: Sequence[Tensor],
        places: Tensor,
        found: Tensor,
        targets: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """The losses of what :meth:`_draw` has drawn."""
        most = targets.shape[1]
        scores = torch.cat([_rows(x, 1).flatten(1) for x in cls_scores], 1).gather(1, places)
        labels = found & (torch.arange(found.shape[1], device=found.device) < most)
        weights = found.float()
        if self.train_cfg['pos_weight'] > 0:
            weights = torch.where(labels, self.train_cfg['pos_weight'], weights)
        is_positive, is_negative = found[:, :most], found[:, most:]
        count = sum(each.sum(1).clamp(min=1) for each in (is_positive, is_negative)).sum()
        loss_cls = self.loss_cls(
            scores.reshape(-1, 1), labels.reshape(-1, 1), weights.reshape(-1, 1), avg_factor=count
        )

        deltas = torch.cat([_rows(x, 4) for x in bbox_preds], 1)
        deltas = deltas.gather(1, places[:, :most, None].expand(-1, -1, 4)).reshape(-1, 4)
        is_positive = is_positive.flatten()[:, None]
        targets = torch.where(is_positive, targets.view(-1, 4), 0.0)  # what was not drawn may be infinite
        weights = is_positive.float().expand(-1, 4)
        if is_plain(self.loss_bbox, L1Loss):  # it would first wait for whether all weights are 0
            loss_bbox = self.loss_bbox.loss_weight * l1_loss(deltas, targets, weights, avg_factor=count)
        else:
            loss_bbox = self.loss_bbox(deltas, targets, weights, avg_factor=count)
        return loss_cls, loss_bbox

    @torch.no_grad()
    def _select(
        self,
        cls_scores: Sequence[Tensor],
        bbox_preds: Sequence[Tensor],
        anchors: Tensor,
        limits: Tensor,
        cfg: dict,
    ) -> tuple[Tensor, ...]:
        """What non-maximum suppression chooses from: K boxes of each image.

        Returns:
            Boxes ``[B, K, 4]``; the same, moved so that those of different levels do not meet; scores
            ``[B, K]``; whether each is large enough ``[B, K]``; whether all of an image are ``[B]``.
        """
        images, most = len(cls_scores[0]), cfg.get('nms_pre', -1)
        scores, deltas, priors = [], [], []
        counts = [x[0].numel() for x in cls_scores]
        for own_scores, own_deltas, own in zip(cls_scores, bbox_preds, anchors.split(counts), strict=True):
            own_scores = _rows(own_scores, 1).flatten(1).float().sigmoid()
            own_deltas = _rows(own_deltas, 4).float()
            own = own.expand(images, -1, 4)
            if 0 < most < own_scores.shape[1]:
                own_scores, places = own_scores.sort(descending=True)
                own_scores, places = own_scores[:, :most], places[:, :most, None].expand(-1, -1, 4)
                own_deltas, own = own_deltas.gather(1, places), own.gather(1, places)
            scores.append(own_scores)
            deltas.append(own_deltas)
            priors.append(own)
        boxes = self.bbox_coder.decode(torch.cat(priors, 1).view(-1, 4), torch.cat(deltas, 1).view(-1, 4))
        boxes = boxes.view(images, -1, 4)
        if self.bbox_coder.clip_border:
            boxes = torch.minimum(boxes.clamp(min=0), limits[:, None])
        sides = boxes[..., 2:] - boxes[..., :2]
        least = cfg.get('min_bbox_size', -1)
        is_large = (sides > least if least >= 0 else torch.ones_like(sides, dtype=torch.bool)).all(-1)
        levels = self._levels(cls_scores, cfg).to(boxes.dtype)
        # Of small ones too, a coordinate that is NaN would move all boxes to nowhere.
        largest = boxes.masked_fill(~is_large[..., None], -torch.inf).amax((1, 2))
        moved = boxes + (levels * (largest[:, None] + 1))[..., None]
        return boxes, moved, torch.cat(scores, 1), is_large, is_large.all(1)

    def _suppress(
        self,
        boxes: Tensor,
        moved: Tensor,
        scores: Tensor,
        is_large: Tensor,
        are_large: Tensor,
        maps: Sequence[Tensor],
        cfg: dict,
    ) -> list[InstanceData]:
        """Proposals from what :meth:`_select` returns."""
        levels = self._levels(maps, cfg)
        nms = cfg['nms'] and {**cfg['nms'], 'class_agnostic': True}
        if cfg['nms'] and cfg['nms'].get('class_agnostic', False):
            moved = boxes
        results = []
        for i, keeps_all in enumerate(are_large.tolist()):
            own = boxes[i], moved[i], scores[i], levels
            if not keeps_all:
                places = is_large[i].nonzero().flatten()
                own = [each[places] for each in own]
            own_boxes, own_moved, own_scores, own_levels = own
            if len(own_boxes):
                found, kept = batched_nms(own_moved, own_scores, own_levels, nms)
                kept = kept[: cfg['max_per_img']]
                own_boxes, own_scores = own_boxes[kept], found[: cfg['max_per_img'], -1]
            labels = levels.new_zeros(len(own_boxes))
            results.append(InstanceData(bboxes=own_boxes, scores=own_scores, labels=labels))
        return results

    def _selects_at_once(self) -> bool:
        own = '_predict_by_feat_single', '_bbox_post_process'
        return self.use_sigmoid_cls and self._has_plain_boxes() and has_methods_of(self, _RPNHead, *own)

    def _draws_at_once(self) -> bool:
        own = 'get_anchors', 'get_targets', '_get_targets_single', 'loss_by_feat_single'
        return (
            self._has_plain_boxes()
            and has_methods_of(self, _RPNHead, *own)
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

    def _anchors(self, maps: Sequence[Tensor]) -> Tensor:
        """All anchors of maps of these sizes, ``[N, 4]``; not to be written to."""
        sizes, device = [tuple(x.shape[-2:]) for x in maps], maps[0].device
        return self._kept.made(
            ('anchors', self.prior_generator, *sizes, device),
            lambda: torch.cat(self.prior_generator.grid_priors(sizes, device=device)),
        )

    def _valid(self, maps: Sequence[Tensor], metas: list[dict]) -> Tensor | None:
        """Which anchors are within each image, ``[B, N]``; None if all are."""
        sizes, device = [tuple(x.shape[-2:]) for x in maps], maps[0].device
        pads = [tuple(meta['pad_shape'][:2]) for meta in metas]

        def make(pad: tuple[int, int]) -> tuple[Tensor, bool]:
            flags = torch.cat(self.prior_generator.valid_flags(sizes, pad, device))
            return flags, bool(flags.all())

        # Each shape by itself: few batches have the same ones.
        keys = [(self.prior_generator, *sizes, pad, device) for pad in pads]
        made = [self._flags.made(key, partial(make, pad)) for key, pad in zip(keys, pads, strict=True)]
        flags, are_valid = zip(*made, strict=True)
        return None if all(are_valid) else torch.stack(flags)

    def _levels(self, maps: Sequence[Tensor], cfg: dict) -> Tensor:
        """The number of the level of each box that is selected, ``[K]``."""
        anchors, most = self.prior_generator.num_base_priors, cfg.get('nms_pre', -1)
        counts = [x.shape[-2] * x.shape[-1] * each for x, each in zip(maps, anchors, strict=True)]
        counts = tuple(min(count, most) if most > 0 else count for count in counts)
        device = maps[0].device
        return self._kept.made(
            ('levels', counts, device),
            lambda: torch.cat([torch.full((n,), i, device=device) for i, n in enumerate(counts)]),
        )

    @staticmethod
    def _limits(like: Tensor, metas: list[dict]) -> Tensor:
        """The largest coordinates within each image, ``[B, 4]``, filled in without waiting."""
        limits = like.new_empty(len(metas), 4, dtype=torch.float32)
        for own, meta in zip(limits, metas, strict=True):
            height, width = meta['img_shape'][:2]
            own[0::2].fill_(width)
            own[1::2].fill_(height)
        return limits


def _rows(maps: Tensor, width: int) -> Tensor:
    """Maps ``[B, A * width, H, W]`` in the order of anchors, ``[B, H * W * A, width]``."""
    return maps.permute(0, 2, 3, 1).reshape(len(maps), -1, width)


def _plain_attributes(part: object) -> list[tuple]:
    """Names and values of what has been set of an object."""
    return [
        (name, repr(value) if type(value) in (tuple, list) else value)  # what is in it may have no hash
        for name, value in vars(part).items()
        if type(value) in (bool, int, float, str, tuple, list, type(None))
    ]
