"""mmdet's detectors as modules that can be exported: one picture to its detections, of any size.

mmdet's own post-processing has loops and branches over how many boxes there are, which an exporter cannot
follow. Here the same is computed by top-k, gathers, torchvision's NMS and RoIAlign, which ONNX has as
standard operators. A part that is not known here is refused: mmdet may compute something else with it.
"""

import math
from collections.abc import Sequence
from itertools import chain
from types import SimpleNamespace

import torch
import torch.nn.functional as F
import torchvision
from mmdet.models.dense_heads import ConditionalDETRHead, DETRHead, RPNHead
from mmdet.models.dense_heads.base_dense_head import BaseDenseHead
from mmdet.models.detectors import DETR, ConditionalDETR, SingleStageDetector, TwoStageDetector
from mmdet.models.roi_heads import StandardRoIHead
from mmdet.models.roi_heads.bbox_heads import BBoxHead
from mmdet.models.roi_heads.mask_heads import FCNMaskHead
from mmdet.models.roi_heads.roi_extractors import SingleRoIExtractor
from mmdet.models.task_modules import DeltaXYWHBBoxCoder, DistancePointBBoxCoder
from torch import Tensor, nn

from mmvig import detection as ours
from mmvig.engine.preflight import SetupError
from mmvig.ops.plain import has_methods_of

Detections = tuple[Tensor, Tensor, Tensor]  # boxes [N, 4], labels [N], scores [N]
Shape = tuple[int, int]  # height and width

_DECODERS = (DeltaXYWHBBoxCoder, ours.DeltaXYWHBBoxCoder, DistancePointBBoxCoder)
_SETTINGS = {'nms_pre', 'min_bbox_size', 'score_thr', 'nms', 'max_per_img', 'mask_thr_binary'}


class Detector(nn.Module):
    """A detector of mmdet without what is for training alone.

    Args:
        model: two-stage with mmdet's or our standard heads, single-stage with a head that predicts as
            mmdet's BaseDenseHead, DETR, or Conditional DETR.

    Raises:
        SetupError: The model has a part that is not known here.
    """

    def __init__(self, model: nn.Module):
        super().__init__()
        check_known(model)
        self.model = model

    @property
    def output_names(self) -> list[str]:
        """What :meth:`forward` gives."""
        names = ['boxes', 'labels', 'scores']
        return [*names, 'masks'] if getattr(self.model, 'with_mask', False) else names

    @property
    def least_side(self) -> int:
        """The least height and width; below, the last map would have a side of 1, which a trace fixes."""
        if isinstance(self.model, DETR):
            return 1
        head = self.model.rpn_head if isinstance(self.model, TwoStageDetector) else self.model.bbox_head
        return max(chain(*head.prior_generator.strides)) + 1

    def forward(self, images: Tensor, size: Tensor) -> tuple[Tensor, ...]:
        """The N detections of one picture, the best first.

        Args:
            images: the picture, normalised and not padded, ``[1, C, H, W]``.
            size: int64 ``[2]``, height h and width w of the picture in whose pixels boxes and masks are
                given; ``[0, 0]`` for those of ``images``.

        Returns:
            Boxes ``[N, 4]`` (left, top, right, bottom), labels ``[N]``, scores ``[N]``, and bool masks
            ``[N, h, w]`` of a model that has them.
        """
        shape = tuple(images.shape[2:])
        sides = torch.stack([torch.scalar_tensor(side, dtype=torch.int64) for side in shape])
        size = torch.where(size > 0, size, sides)
        scale = (size / sides).flip(0).repeat(2)  # of left, top, right, bottom
        images = _padded(images, self.model.data_preprocessor)
        maps = self.model.extract_feat(images)
        if isinstance(self.model, DETR):
            boxes, labels, scores = _queries(self.model, maps, shape, tuple(images.shape[2:]))
        elif isinstance(self.model, TwoStageDetector):
            proposals = _proposals(self.model.rpn_head, maps, shape)
            boxes, labels, scores = _regions(self.model.roi_head, maps, proposals, shape)
        else:
            boxes, labels, scores = _dense(self.model.bbox_head, maps, shape, scale)
        placed = boxes * scale
        if 'masks' not in self.output_names:
            return placed, labels, scores
        return placed, labels, scores, _masks(self.model.roi_head, maps, boxes, labels, placed, size)


def _padded(images: Tensor, preprocessor: nn.Module) -> Tensor:
    """Images ``[1, C, H, W]`` with sides that are multiples of the model's divisor, as mmdet pads them."""
    divisor = preprocessor.pad_size_divisor
    bottom, right = ((side + divisor - 1) // divisor * divisor - side for side in images.shape[2:])
    return F.pad(images, (0, right, 0, bottom), value=preprocessor.pad_value)


def _dense(head: nn.Module, maps: Sequence[Tensor], shape: Shape, scale: Tensor) -> Detections:
    """The detections of a single-stage detector, from the neck's maps ``[1, C, H, W]``.

    Boxes are measured, not given, in the picture that they are scaled to by ``[4]``, as mmdet does.
    """
    cfg = head.test_cfg
    boxes, scores, labels, _, factors = _candidates(head, maps, shape, cfg)
    kept = (scores > cfg.get('score_thr', 0)) & _are_large(boxes * scale, cfg)
    kept = kept.nonzero().squeeze(1)
    return _suppressed(boxes[kept], labels[kept], (scores * factors)[kept], cfg)


def _proposals(head: nn.Module, maps: Sequence[Tensor], shape: Shape) -> Tensor:
    """The region proposals ``[N, 4]``, from the neck's maps ``[1, C, H, W]``."""
    boxes, scores, _, levels, _ = _candidates(head, maps, shape, head.test_cfg)
    kept = _are_large(boxes, head.test_cfg).nonzero().squeeze(1)
    return _suppressed(boxes[kept], levels[kept], scores[kept], head.test_cfg)[0]


def _candidates(head: nn.Module, maps: Sequence[Tensor], shape: Shape, cfg: dict) -> tuple[Tensor, ...]:
    """The ``nms_pre`` best pairs of a box and a class of each level, M in all.

    Returns:
        Boxes ``[M, 4]``, and ``[M]`` each: scores, classes, levels, factors of scores.
    """
    outputs = head(maps)  # of each level: [1, A * classes, H, W], [1, A * 4, H, W] and maybe [1, A, H, W]
    sizes = [tuple(x.shape[2:]) for x in outputs[0]]
    priors = head.prior_generator.grid_priors(sizes, dtype=torch.float32, device='cpu')
    found = []
    for level, (own, logits, deltas, *more) in enumerate(zip(priors, *outputs, strict=True)):
        logits = _rows(logits, head.cls_out_channels)
        scores = logits.sigmoid() if head.use_sigmoid_cls else logits.softmax(-1)[:, :-1]
        classes, scores = scores.shape[1], scores.flatten()
        count = (
            scores.shape[0] if cfg.get('nms_pre', -1) <= 0 else torch.sym_min(scores.shape[0], cfg.nms_pre)
        )
        scores, places = scores.topk(count)
        rows = places // classes
        factors = _rows(more[0], 1)[rows, 0].sigmoid() if more else torch.ones_like(scores)
        boxes = _decoded(head.bbox_coder, own[rows], _rows(deltas, 4)[rows], shape)
        found.append((boxes, scores, places % classes, torch.full_like(places, level), factors))
    return tuple(map(torch.cat, zip(*found, strict=True)))


def _rows(x: Tensor, width: int) -> Tensor:
    """A map ``[1, A * width, H, W]`` in the order of priors, ``[H * W * A, width]``."""
    return x[0].permute(1, 2, 0).reshape(-1, width)


def _decoded(coder: object, priors: Tensor, deltas: Tensor, shape: Shape) -> Tensor:
    """Boxes ``[M, 4]`` within the picture, from anchors ``[M, 4]`` or points ``[M, 2]``."""
    if isinstance(coder, DistancePointBBoxCoder):
        boxes = torch.cat([priors - deltas[:, :2], priors + deltas[:, 2:]], 1)
    else:
        deltas = deltas * torch.tensor(coder.stds) + torch.tensor(coder.means)
        most = abs(math.log(16 / 1000))
        size = priors[:, 2:] - priors[:, :2]
        centre = (priors[:, :2] + priors[:, 2:]) * 0.5 + size * deltas[:, :2]
        half = size * deltas[:, 2:].clamp(min=-most, max=most).exp() * 0.5
        boxes = torch.cat([centre - half, centre + half], 1)
    return _clipped(boxes, shape) if coder.clip_border else boxes


def _clipped(boxes: Tensor, shape: Shape) -> Tensor:
    """Boxes ``[M, 4]`` cut to a picture."""
    x, y = boxes[:, 0::2].clamp(0, shape[1]), boxes[:, 1::2].clamp(0, shape[0])
    return torch.stack([x, y], 2).flatten(1)


def _are_large(boxes: Tensor, cfg: dict) -> Tensor:
    """Of boxes ``[M, 4]``, which have sides above ``min_bbox_size``, ``[M]``."""
    least = cfg.get('min_bbox_size', -1)
    if least < 0:
        return torch.ones_like(boxes[:, 0], dtype=torch.bool)
    return (boxes[:, 2:] - boxes[:, :2] > least).all(1)


def _suppressed(boxes: Tensor, groups: Tensor, scores: Tensor, cfg: dict) -> Detections:
    """The best ``max_per_img`` boxes that NMS within each group leaves of boxes ``[M, 4]``."""
    # As mmcv does: a group's boxes are moved to where no other group's are. The row of zeros is for M = 0.
    furthest = F.pad(boxes, (0, 0, 0, 1)).max()
    moved = boxes + (groups * (furthest + 1))[:, None]
    kept = torchvision.ops.nms(moved, scores, cfg.nms.iou_threshold)
    kept = kept[: cfg.max_per_img]
    return boxes[kept], groups[kept], scores[kept]


def _regions(head: nn.Module, maps: Sequence[Tensor], proposals: Tensor, shape: Shape) -> Detections:
    """The detections of a two-stage detector, from the neck's maps and proposals ``[R, 4]``."""
    logits, deltas = head.bbox_head(_pooled(head.bbox_roi_extractor, maps, proposals))
    scores = logits.softmax(-1)[:, :-1]
    region, label = (scores > head.test_cfg.score_thr).nonzero().unbind(1)
    deltas = deltas.unflatten(1, (-1, 4))  # [R, classes or 1, 4]
    own = deltas[region, label if deltas.shape[1] > 1 else 0]
    boxes = _decoded(head.bbox_head.bbox_coder, proposals[region], own, shape)
    return _suppressed(boxes, label, scores[region, label], head.test_cfg)


def _pooled(extractor: nn.Module, maps: Sequence[Tensor], boxes: Tensor) -> Tensor:
    """Features ``[N, C, h, w]`` of boxes ``[N, 4]``, each of the level that its size chooses."""
    rois = F.pad(boxes, (1, 0))  # [N, 5]: the number of the picture, which is 0, comes first
    maps = maps[: extractor.num_inputs]
    levels = extractor.map_roi_levels(rois, len(maps))
    pooled = rois.new_zeros(rois.shape[0], extractor.out_channels, *extractor.roi_layers[0].output_size)
    for level, (layer, x) in enumerate(zip(extractor.roi_layers, maps, strict=True)):
        places = (levels == level).nonzero().squeeze(1)
        settings = layer.output_size, layer.spatial_scale, layer.sampling_ratio, layer.aligned
        pooled = pooled.index_put((places,), torchvision.ops.roi_align(x, rois[places], *settings))
    return pooled


def _masks(
    head: nn.Module, maps: Sequence[Tensor], boxes: Tensor, labels: Tensor, placed: Tensor, size: Tensor
) -> Tensor:
    """Bool masks ``[N, h, w]`` of boxes ``[N, 4]``, which are ``placed`` in a picture of size (h, w)."""
    masks = head.mask_head(_pooled(head.mask_roi_extractor, maps, boxes)).sigmoid()
    chosen = torch.zeros_like(labels) if head.mask_head.class_agnostic else labels
    masks = masks[torch.arange(labels.shape[0]), chosen]  # [N, 28, 28]
    height, width = size.tolist()
    rows = _weights(placed[:, 1], placed[:, 3], height, masks.shape[1])
    columns = _weights(placed[:, 0], placed[:, 2], width, masks.shape[2])
    return rows @ masks @ columns.transpose(1, 2) >= head.test_cfg.mask_thr_binary


def _weights(first: Tensor, last: Tensor, length: int, count: int) -> Tensor:
    """How ``length`` pixels interpolate ``count`` cells that lie from ``first`` to ``last``.

    With one such matrix for rows and one for columns, a mask is pasted as by mmdet's grid_sample, and no
    grid of all pixels of all masks is made.

    Returns:
        ``[N, length, count]``, of first and last ``[N]``.
    """
    pixels = torch.arange(length) + 0.5
    places = (pixels - first[:, None]) / (last - first)[:, None] * count - 0.5
    return (1 - (places[..., None] - torch.arange(count)).abs()).clamp(min=0)


def _queries(model: DETR, maps: Sequence[Tensor], shape: Shape, padded: Shape) -> Detections:
    """The detections of a DETR, from the neck's maps ``[1, C, H, W]``."""
    meta = SimpleNamespace(img_shape=shape, batch_input_shape=padded)
    states = model.forward_transformer(maps, [meta])
    head = model.bbox_head
    logits, boxes = head(states.pop('hidden_states')[-1:], **states)
    logits, boxes = logits[-1, 0], boxes[-1, 0]  # [queries, classes (+ 1)], [queries, 4]
    count = head.test_cfg.get('max_per_img', len(logits))
    if head.loss_cls.use_sigmoid:
        scores, places = logits.sigmoid().flatten().topk(count)
        query, labels = places // head.num_classes, places % head.num_classes
    else:
        best, classes = logits.softmax(-1)[:, :-1].max(-1)
        scores, query = best.topk(count)
        labels = classes[query]
    centre, half = boxes[query, :2], boxes[query, 2:] / 2
    boxes = torch.cat([centre - half, centre + half], 1)
    scale = torch.stack([torch.scalar_tensor(x) for x in (shape[1], shape[0]) * 2])
    return _clipped(boxes * scale, shape), labels, scores


def check_known(model: nn.Module) -> None:
    """Check that what is above computes what mmdet does with a model.

    Raises:
        SetupError: It does not, or nobody knows, because of one of the model's parts.
    """
    if type(model) in (DETR, ConditionalDETR):
        _must_be(model.bbox_head, 'bbox_head', (DETRHead, ConditionalDETRHead))
        if model.data_preprocessor.pad_size_divisor != 1:
            raise SetupError('a DETR is exported with pad_size_divisor=1 in its data_preprocessor')
    elif has_methods_of(model, TwoStageDetector, 'predict', 'extract_feat'):
        _must_be(getattr(model, 'rpn_head', None), 'rpn_head', (RPNHead, ours.RPNHead))
        _check_head(model.rpn_head, 'rpn_head')
        _check_roi_head(model.roi_head)
    elif has_methods_of(model, SingleStageDetector, 'predict', 'extract_feat'):
        names = 'predict', 'predict_by_feat', '_predict_by_feat_single', '_bbox_post_process'
        if not has_methods_of(model.bbox_head, BaseDenseHead, *names):
            raise _unknown('bbox_head', model.bbox_head)
        _check_head(model.bbox_head, 'bbox_head')
    else:
        raise _unknown('the detector', model)


def _check_roi_head(head: nn.Module) -> None:
    _must_be(head, 'roi_head', (StandardRoIHead, ours.StandardRoIHead))
    box_head = head.bbox_head
    if not has_methods_of(box_head, BBoxHead, 'predict_by_feat', '_predict_by_feat_single'):
        raise _unknown('bbox_head', box_head)
    if (
        head.with_shared_head
        or box_head.custom_cls_channels
        or not (box_head.with_cls and box_head.with_reg)
    ):
        raise SetupError('roi_head: exported are those without a shared head, with classes and boxes')
    _check_coder(box_head.bbox_coder)
    _check_settings(head.test_cfg, 'test_cfg.rcnn')
    extractors = [head.bbox_roi_extractor]
    if head.with_mask:
        _must_be(head.mask_head, 'mask_head', (FCNMaskHead, ours.FCNMaskHead))
        if head.test_cfg.mask_thr_binary < 0:
            raise SetupError('test_cfg.rcnn: mask_thr_binary below 0 cannot be exported')
        extractors.append(head.mask_roi_extractor)
    for extractor in extractors:
        _must_be(extractor, 'the RoI extractor', (SingleRoIExtractor, ours.SingleRoIExtractor))
        for layer in extractor.roi_layers:
            if type(layer).__name__ != 'RoIAlign' or layer.pool_mode != 'avg':
                raise _unknown('roi_layer', layer)


def _check_head(head: nn.Module, name: str) -> None:
    if getattr(head.loss_cls, 'custom_cls_channels', False):
        raise _unknown(f'loss_cls of {name}', head.loss_cls)
    _check_coder(head.bbox_coder)
    _check_settings(head.test_cfg, f'test_cfg of {name}')


def _check_coder(coder: object) -> None:
    _must_be(coder, 'bbox_coder', _DECODERS)
    if getattr(coder, 'add_ctr_clamp', False):
        raise SetupError('bbox_coder: add_ctr_clamp cannot be exported')


def _check_settings(cfg: dict, name: str) -> None:
    if unknown := sorted(set(cfg) - _SETTINGS):
        raise SetupError(f'{name}: {", ".join(unknown)} cannot be exported')
    nms = dict(cfg.get('nms') or {})
    nms.pop('split_thr', None)
    if nms.pop('type', None) != 'nms' or {*nms} != {'iou_threshold'} or 'max_per_img' not in cfg:
        raise SetupError(f"{name}: exported is nms=dict(type='nms', iou_threshold=...) with max_per_img")


def _must_be(part: object, name: str, kinds: tuple[type, ...]) -> None:
    if type(part) not in kinds:
        raise _unknown(name, part)


def _unknown(name: str, part: object) -> SetupError:
    return SetupError(f'{name} is a {type(part).__name__}, which cannot be exported')
