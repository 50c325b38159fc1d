"""Configs that follow one of mmdet's or mmseg's differ from it in what is said here alone."""

import importlib
import re
from pathlib import Path

import mmvig.compat  # noqa: F401  before what imports mmcv.ops

import pytest
import torch
from mmengine.config import Config
from mmengine.optim import build_optim_wrapper
from mmengine.registry import MODELS, init_default_scope
from torch import nn

CONFIGS = Path(__file__).parents[1] / 'configs'
COMPARED = (
    'model',
    'train_dataloader',
    'test_dataloader',
    'train_cfg',
    'param_scheduler',
    'optim_wrapper',
    'auto_scale_lr',
    'custom_hooks',
)
# What is ours in each: the backbone, which is tested elsewhere, and the loop, which changes no result.
OURS = re.compile(
    r'model\.(backbone|pretrained|init_cfg|neck\.in_channels|neck\.conv_cfg)|model\.decode_head\.in_channels'
    r'|model\.(roi_head|panoptic_head|decode_head).*(use_torchvision|init_cfg|norm_cfg)$'
    r'|model\.data_preprocessor\.non_blocking'
    r'|.*_dataloader\.(num_workers|pin_memory)|.*\.(backend_args|reduce_zero_label|to_float32)$'
    r'|optim_wrapper\.(constructor|optimizer\.fused|paramwise_cfg)|auto_scale_lr\.enable'
    r'|custom_hooks\.\d\.(type|modules)$'
)
# Values that a config of theirs spells out, though they are the defaults.
DEFAULTS = {
    'add_identity': True,
    'attn_drop': 0.0,
    'batch_augments': None,
    'betas': (0.9, 0.999),
    'dropout': 0.0,
    'dropout_layer': None,
    'eps': 1e-8,
    'im2col_step': 64,
    'img_pad_value': 0,
    'mask_pad_value': 0,
    'norm_type': 2,
    'pad_seg': False,
    'proj_drop': 0.0,
    'resize_type': 'Resize',
    'seg_pad_value': 255,
}
OF_THE_BATCH = {'auto_scale_lr.base_batch_size': (16, None)}
NO_AUXILIARY = {'model.auxiliary_head': (None, None)}
# ours: package, theirs, {key: (ours, theirs)}
RECIPES = {
    # mmdet ships Swin's Cascade Mask R-CNN as ConvNeXt's, at another learning rate and with layer decay.
    'detection/cascade_maskrcnn_vigh_s_3x_ms.py': (
        'mmdet',
        'convnext/cascade-mask-rcnn_convnext-s-p4-w7_fpn_4conv1fc-giou_amp-ms-crop-3x_coco.py',
        {
            # As mmdet's newer detectors: anchors that cross the border learn too.
            'model.train_cfg.rpn.allowed_border': (-1, 0),
            'optim_wrapper.type': ('OptimWrapper', 'AmpOptimWrapper'),  # --amp
            'optim_wrapper.optimizer.lr': (1e-4, 2e-4),
        },
    ),
    'detection/rtmdet_vigh_t.py': (
        'mmdet',
        'rtmdet/rtmdet_l_swin_b_4xb32-100e_coco.py',
        {'auto_scale_lr.base_batch_size': (128, 16)},  # theirs is inherited from ResNet's
    ),
    'detection/dino_vigh_t.py': (
        'mmdet',
        'dino/dino-4scale_r50_8xb2-12e_coco.py',
        {'model.data_preprocessor.pad_size_divisor': (32, 1)},
    ),
    'detection/mask2former_vigh_s.py': (
        'mmdet',
        'mask2former/mask2former_swin-s-p4-w7-224_8xb2-lsj-50e_coco.py',
        {
            'custom_hooks': ((), None),
            'train_dataloader.batch_sampler': (None, None),
            'train_dataloader.batch_sampler.type': (None, 'AspectRatioBatchSampler'),
            'train_dataloader.sampler.type': ('InfiniteSampler', 'DefaultSampler'),
            'train_dataloader.dataset.data_prefix.seg': (None, 'annotations/panoptic_train2017/'),
            'test_dataloader.dataset.data_prefix.seg': (None, 'annotations/panoptic_val2017/'),
            # The same where a crop has one size.
            'train_dataloader.dataset.pipeline.4.crop_type': ('absolute_range', 'absolute'),
        },
    ),
    'segmentation/mask2former_vigh_s.py': (
        'mmseg',
        'mask2former/mask2former_swin-s_8xb2-160k_ade20k-512x512.py',
        NO_AUXILIARY,
    ),
    'segmentation/segformer_vigh_t.py': (
        'mmseg',
        'segformer/segformer_mit-b1_8xb2-160k_ade20k-512x512.py',
        {**OF_THE_BATCH, **NO_AUXILIARY},
    ),
    'segmentation/semfpn_vigh_t.py': (
        'mmseg',
        'poolformer/fpn_poolformer_s12_8xb4-40k_ade20k-512x512.py',
        {
            **NO_AUXILIARY,
            'auto_scale_lr.base_batch_size': (32, None),
            'optim_wrapper.type': ('OptimWrapper', 'AmpOptimWrapper'),  # --amp
        },
    ),
    'segmentation/upernet_vig_s.py': (
        'mmseg',
        'vit/vit_deit-s16_mln_upernet_8xb2-160k_ade20k-512x512.py',
        {
            **OF_THE_BATCH,
            # BEiT's neck: resizing is learnt, and the third map has the backbone's stride.
            'model.neck.type': ('Feature2Pyramid', 'MultiLevelNeck'),
            'model.neck.embed_dim': (384, None),
            'model.neck.out_channels': (None, 384),
            'model.neck.rescales': ((4, 2, 1, 0.5), None),
            'model.neck.scales': (None, (4, 2, 1, 0.5)),
            'model.auxiliary_head.in_index': (2, 3),
        },
    ),
}


def flattened(node, path=''):
    """Every leaf of a config by its path, without the scopes of types."""
    if isinstance(node, dict) and node:
        items = node.items()
    elif isinstance(node, (list, tuple)) and any(isinstance(each, (dict, list, tuple)) for each in node):
        items = enumerate(node)
    else:
        if isinstance(node, str):
            node = re.sub(r'^(mmvig|mmdet|mmseg)\.', '', node)
        return {path.lstrip('.'): tuple(node) if isinstance(node, (list, tuple)) else node}
    return {key: leaf for name, child in items for key, leaf in flattened(child, f'{path}.{name}').items()}


def comparable(cfg):
    """The parts of a config that make its results."""
    parts = {name: cfg[name] for name in COMPARED if name in cfg}
    if isinstance(parts['param_scheduler'], dict):
        parts['param_scheduler'] = [parts['param_scheduler']]
    for loader in ('train_dataloader', 'test_dataloader'):
        if parts[loader]['dataset']['type'] == 'RepeatDataset':  # as InfiniteSampler repeats it anyway
            parts[loader] = {**parts[loader], 'dataset': parts[loader]['dataset']['dataset']}
        pipeline = [
            # Heads resize to the size of the image, whether it is a multiple or not.
            step
            for step in parts[loader]['dataset']['pipeline']
            if step['type'] != 'ResizeToMultiple'
        ]
        parts[loader] = {**parts[loader], 'dataset': {**parts[loader]['dataset'], 'pipeline': pipeline}}
    return flattened(parts)


def both(name):
    """Our config and theirs."""
    package, path, _ = RECIPES[name]
    folder = Path(importlib.import_module(package).__path__[0]) / '.mim/configs'
    return Config.fromfile(CONFIGS / name), Config.fromfile(folder / path)


@pytest.mark.parametrize('name', RECIPES)
def test_a_recipe_is_theirs_but_for_what_is_said_here(name):
    *_, expected = RECIPES[name]
    ours, theirs = (comparable(cfg) for cfg in both(name))
    found = {
        key: (ours.get(key), theirs.get(key))
        for key in {*ours, *theirs}
        if key not in ours or key not in theirs or ours[key] != theirs[key]
    }
    found = {
        key: pair
        for key, pair in found.items()
        if not OURS.match(key)
        and {DEFAULTS.get(key.rpartition('.')[2], ...)} != {value for value in pair if value is not None}
        and not (pair == (None, None) and key.rpartition('.')[2] in DEFAULTS)
    }
    assert found == expected


def rates(cfg, model):
    """Learning rate and weight decay of each parameter."""
    optim_wrapper = build_optim_wrapper(model, cfg.optim_wrapper)
    found = {}
    for group in optim_wrapper.optimizer.param_groups:
        for parameter in group['params']:
            found[parameter] = round(group['lr'], 12), round(group['weight_decay'], 12)
    return found


@pytest.mark.parametrize('name', [name for name in RECIPES if 'cascade' not in name])
def test_parameters_learn_as_by_theirs(name):
    """Where there is decay at all: ours spares norms and biases, which theirs do not all spare."""
    ours, theirs = both(name)
    init_default_scope(ours.default_scope)
    with torch.device('meta'):
        model = MODELS.build(ours.model)
    theirs.optim_wrapper.type = 'OptimWrapper'
    theirs.optim_wrapper.paramwise_cfg = {
        **theirs.optim_wrapper.get('paramwise_cfg', {}),
        'bypass_duplicate': True,
    }
    actual, expected = rates(ours, model), rates(theirs, model)
    assert len(actual) == len(list(model.parameters()))
    for key, parameter in model.named_parameters():
        if parameter.ndim > 1:
            assert actual[parameter] == expected[parameter], key
        else:
            assert actual[parameter][0] == expected[parameter][0], key
            assert actual[parameter][1] in (0, expected[parameter][1]), key
    norms = {'dino': 1e-4, 'segformer': 0.01}.get(Path(name).stem.split('_')[0], 0)
    for key, module in model.named_modules():
        if isinstance(module, (nn.LayerNorm, nn.RMSNorm, nn.GroupNorm, nn.modules.batchnorm._BatchNorm)):
            decayed = norms if norms == 1e-4 or key.startswith('decode_head') else 0
            for parameter in module.parameters():
                assert actual[parameter][1] == decayed, key


@pytest.mark.parametrize(('size', 'width'), [('t', 192), ('s', 384), ('b', 768)])
def test_plain_detectors_have_the_recipe_of_vitdet(size, width):
    """Of the project beside mmdet, which its package does not ship: 100 epochs of COCO at batch 64."""
    cfg = Config.fromfile(CONFIGS / f'detection/maskrcnn_vig_{size}.py')
    warm_up, decay = cfg.param_scheduler
    assert cfg.train_cfg.max_iters == decay.end == 184375
    assert cfg.train_cfg.dynamic_intervals == [(180001, 184375)]  # the last iteration is validated
    assert (warm_up.start_factor, warm_up.end, warm_up.by_epoch) == (0.001, 250, False)
    assert (decay.milestones, decay.gamma, decay.by_epoch) == ([163889, 177546], 0.1, False)
    assert cfg.auto_scale_lr.base_batch_size == 64
    steps = {step.type: step for step in cfg.train_dataloader.dataset.pipeline}
    assert steps['RandomResize'].scale == steps['RandomCrop'].crop_size == (1024, 1024)
    assert steps['RandomResize'].ratio_range == (0.1, 2.0)
    assert cfg.model.data_preprocessor.batch_augments[0].size == (1024, 1024)
    assert cfg.test_dataloader.dataset.pipeline[1].scale == (1024, 1024)

    init_default_scope('mmdet')
    with torch.device('meta'):
        model = MODELS.build(cfg.model)
    assert model.neck.levels[2][0].in_channels == width and model.backbone.pos_embed.shape[1] == 64**2
    found = rates(cfg, model)
    assert len(found) == len(list(model.parameters()))
    for key, parameter in model.named_parameters():
        block = re.match(r'backbone\.blocks\.(\d+)\.', key)
        depth = 1 + int(block[1]) if block else 0 if re.match(r'backbone\.(stem|pos_embed)', key) else 13
        decayed = 0.1 if parameter.ndim > 1 and not key.endswith('pos_embed') else 0
        assert found[parameter] == pytest.approx((1e-4 * 0.7 ** (13 - depth), decayed)), key
