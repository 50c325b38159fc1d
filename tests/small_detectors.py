"""Small detectors of each kind that can be exported, with random weights that detect something."""

import copy
from pathlib import Path

import torch
from mmengine.config import Config, ConfigDict
from mmengine.hub import get_config
from mmengine.registry import MODELS, DefaultScope
from torch import nn

MODEL_CONFIGS = Path(__file__).resolve().parents[1] / 'configs/_base_/models'
KINDS = ('mask_rcnn', 'faster_rcnn', 'retinanet', 'fcos', 'detr', 'conditional_detr')
ARCH = dict(embed_dims=32, depths=[1, 1], num_heads=[1, 2])


def config(kind: str) -> ConfigDict:
    """A model's config: two stages of a backbone, 16 channels, 6 classes."""
    model = {
        'mask_rcnn': _two_stage,
        'faster_rcnn': lambda: _upstream(_two_stage()),
        'retinanet': lambda: _single_stage('retinanet_vigh.py'),
        'fcos': lambda: _single_stage('fcos_vigh.py'),
        'detr': lambda: _detr('detr/detr_r50_8xb2-150e_coco.py'),
        'conditional_detr': lambda: _detr('conditional_detr/conditional-detr_r50_8xb2-50e_coco.py'),
    }[kind]()
    model.backbone = dict(type='mmvig.ViGH', arch=ARCH, out_indices=(1,) if 'detr' in kind else (0, 1))
    return model


def merge(model: ConfigDict, change: dict) -> None:
    """Set what a nested dictionary names; a ConfigDict in it takes the place of what was there."""
    for key, value in change.items():
        if type(value) is dict and isinstance(model.get(key), dict):
            merge(model[key], value)
        else:
            model[key] = value


def build(model: ConfigDict, seed: int = 0) -> nn.Module:
    """The model, in evaluation mode."""
    torch.manual_seed(seed)
    with DefaultScope.overwrite_default_scope('mmdet'):
        detector = MODELS.build(copy.deepcopy(model)).eval().requires_grad_(False)
    for parameter in detector.parameters():
        nn.init.normal_(parameter, std=0.1 if parameter.ndim > 1 else 0.5)
    return detector


def _two_stage() -> ConfigDict:
    model = Config.fromfile(MODEL_CONFIGS / 'maskrcnn_vigh.py').model
    model.neck.update(in_channels=[32, 64], out_channels=16, num_outs=2)
    model.rpn_head.update(in_channels=16, feat_channels=16)
    model.rpn_head.anchor_generator.strides = [4, 8]
    head = model.roi_head
    for extractor in (head.bbox_roi_extractor, head.mask_roi_extractor):
        extractor.update(out_channels=16, featmap_strides=[4, 8])
    head.bbox_head.update(in_channels=16, fc_out_channels=32, num_classes=6)
    head.mask_head.update(in_channels=16, conv_out_channels=16, num_convs=1, num_classes=6)
    model.test_cfg.rpn.update(nms_pre=200, max_per_img=50)
    model.test_cfg.rcnn.update(max_per_img=20)
    return model


def _upstream(model: ConfigDict) -> ConfigDict:
    """Faster R-CNN of mmdet's own parts alone."""
    model.type = 'FasterRCNN'
    model.roi_head.mask_head = model.roi_head.mask_roi_extractor = None
    parts = [model]
    while parts:
        part = parts.pop()
        if 'type' in part:
            part.type = part.type.removeprefix('mmvig.')
        parts += [x for x in part.values() if isinstance(x, dict)]
    return model


def _single_stage(name: str) -> ConfigDict:
    model = Config.fromfile(MODEL_CONFIGS / name).model
    model.neck.update(in_channels=[32, 64], out_channels=16, num_outs=3)
    model.bbox_head.update(in_channels=16, feat_channels=16, stacked_convs=1, num_classes=6)
    if name == 'fcos_vigh.py':
        model.bbox_head.norm_cfg = dict(type='GN', num_groups=4)
        model.bbox_head.strides = [4, 8, 16]
        model.bbox_head.regress_ranges = ((-1, 64), (64, 128), (128, 1e8))
    else:
        model.bbox_head.anchor_generator.strides = [4, 8, 16]
    model.test_cfg.update(nms_pre=100, max_per_img=20)
    return model


def _detr(name: str) -> ConfigDict:
    model = get_config(f'mmdet::{name}').model
    model.neck.in_channels = [64]
    model.encoder.num_layers = model.decoder.num_layers = 1
    model.bbox_head.num_classes = 6
    model.num_queries = model.test_cfg.max_per_img = 20
    return model
