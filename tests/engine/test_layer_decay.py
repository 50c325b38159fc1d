"""Learning rates and weight decay by layer, read from the optimisers of whole models."""

from pathlib import Path

import pytest
import torch
from mmengine.config import Config
from mmengine.optim import build_optim_wrapper
from mmengine.registry import MODELS, DefaultScope, init_default_scope
from torch import nn

from mmvig.backbones import ViGH
from mmvig.engine.preflight import SetupError, check_training

CONFIGS = Path(__file__).parents[2] / 'configs'
ARCH = {'embed_dims': 32, 'depths': [1, 2, 1, 1], 'num_heads': [1, 2, 4, 8]}
CHANNELS = [32, 64, 128, 256]
LAST = 6  # five blocks between the stem and the output norms
LR, DECAY, RATE = 1e-3, 0.05, 0.5
CONSTRUCTOR = 'mmvig.LayerDecayOptimWrapperConstructor'
NORMS = (nn.LayerNorm, nn.RMSNorm, nn.GroupNorm, nn.modules.batchnorm._BatchNorm)


class Classifier(nn.Module):
    def __init__(self, backbone=None):
        super().__init__()
        self.backbone = backbone or ViGH(ARCH)
        self.head = nn.Linear(CHANNELS[-1], 10)


def mask_rcnn():
    cfg = Config.fromfile(CONFIGS / 'detection/maskrcnn_vigh_t_shapes_cpu.py')
    cfg.model.backbone.arch, cfg.model.neck.in_channels = ARCH, CHANNELS
    init_default_scope('mmdet')
    return MODELS.build(cfg.model)


def upernet():
    cfg = Config.fromfile(CONFIGS / 'segmentation/upernet_vigh_t_shapes.py')
    cfg.model.backbone.arch, cfg.model.decode_head.in_channels = ARCH, CHANNELS
    cfg.model.decode_head.channels = cfg.model.auxiliary_head.channels = 16
    cfg.model.auxiliary_head.in_channels = CHANNELS[2]
    init_default_scope('mmseg')
    return MODELS.build(cfg.model)


def build(model, optimizer=None, **paramwise):
    optimizer = optimizer or {'type': 'AdamW', 'lr': LR, 'weight_decay': DECAY}
    return build_optim_wrapper(
        model,
        {
            'type': 'OptimWrapper',
            'optimizer': optimizer,
            'constructor': CONSTRUCTOR,
            'paramwise_cfg': {'decay_rate': RATE, **paramwise},
        },
    ).optimizer


def settings(model, optimizer):
    """Group of each parameter by name; every trainable parameter is in exactly one."""
    names = {parameter: name for name, parameter in model.named_parameters()}
    found = [(names[p], group) for group in optimizer.param_groups for p in group['params']]
    assert len(found) == len(dict(found))
    assert set(dict(found)) == {name for parameter, name in names.items() if parameter.requires_grad}
    return dict(found)


@pytest.fixture(scope='module', params=[mask_rcnn, upernet, Classifier])
def model(request):
    return request.param()


@pytest.fixture(scope='module')
def groups(model):
    return settings(model, build(model))


@pytest.mark.parametrize(
    ('part', 'layer'),
    [
        ('stem.down1.conv.weight', 0),
        ('stem.down2.norm.bias', 0),
        ('stages.0.blocks.0.mixer.qkv.weight', 1),
        ('stages.0.downsample.conv.weight', 1),
        ('stages.1.blocks.0.norm1.weight', 2),
        ('stages.1.blocks.1.mlp.fc1.weight', 3),
        ('stages.3.blocks.0.mixer.norm_long.weight', 5),
        ('norm0.weight', LAST),
        ('norm3.bias', LAST),
    ],
)
def test_layers_of_the_backbone(groups, part, layer):
    assert groups[f'backbone.{part}']['lr'] == pytest.approx(LR * RATE ** (LAST - layer), rel=1e-12)


def test_what_is_not_of_the_backbone_learns_at_the_full_rate(groups):
    outside = {name: group['lr'] for name, group in groups.items() if not name.startswith('backbone.')}
    assert set(outside.values()) == {LR}
    assert len(outside) >= 2


def test_norms_and_one_dimensional_parameters_are_not_decayed(model, groups):
    kinds = set()
    for path, module in model.named_modules():
        for key, parameter in module.named_parameters(recurse=False):
            exempt = isinstance(module, NORMS) or key == 'bias' or parameter.ndim == 1
            group = groups[f'{path}.{key}']
            assert group['weight_decay'] == (0 if exempt else DECAY), f'{path}.{key}'
            kinds.add((type(module), key))
    assert {(nn.LayerNorm, 'weight'), (nn.RMSNorm, 'weight'), (nn.Linear, 'weight')} <= kinds
    assert {(nn.Linear, 'bias'), (nn.Conv2d, 'weight')} <= kinds


def test_parameters_that_are_treated_alike_share_a_group(model):
    kinds = [(group['lr'], group['weight_decay']) for group in build(model).param_groups]
    assert (
        len(set(kinds)) == len(kinds) == 2 * LAST + 2
    )  # with decay and without; the last layer's are the head's


def test_position_embeddings_and_wide_norms_are_not_decayed():
    backbone = ViGH(ARCH)
    backbone.pos_embed = nn.Parameter(torch.zeros(1, 4, 32))
    backbone.wide = nn.LayerNorm([4, 4])
    model = Classifier(backbone)
    groups = settings(model, build(model))
    assert groups['backbone.pos_embed']['weight_decay'] == 0
    assert groups['backbone.wide.weight']['weight_decay'] == 0
    assert groups['head.weight']['weight_decay'] == DECAY


def test_custom_keys_multiply_the_layers_rate_as_mmengine_has_them():
    model = Classifier()
    keys = {
        'backbone': {'lr_mult': 0.1},
        'backbone.norm': {'lr_mult': 10, 'decay_mult': 0.5},
        'head': {'decay_mult': 0.0, 'betas': [0.8, 0.9]},
    }
    groups = settings(model, build(model, custom_keys=keys))
    mmengine = build_optim_wrapper(
        model,
        {
            'optimizer': {'type': 'AdamW', 'lr': LR, 'weight_decay': DECAY},
            'paramwise_cfg': {'custom_keys': keys},
        },
    ).optimizer
    for name, expected in settings(model, mmengine).items():
        layer = model.backbone.get_layer_depth(name, 'backbone.')[0]
        expected['lr'] *= RATE ** (LAST - layer)
        for key in ('lr', 'weight_decay', 'betas'):
            assert groups[name][key] == pytest.approx(expected[key], rel=1e-12), (name, key)
    assert groups['backbone.norm2.bias']['lr'] == 10 * LR
    assert groups['backbone.norm2.bias']['weight_decay'] == DECAY / 2


def test_frozen_and_shared_parameters():
    backbone = ViGH(ARCH, frozen_stages=1)
    model = Classifier(backbone)
    model.second_head = model.head
    groups = settings(model, build(model))  # complete, and each once
    assert not any(name.startswith(('backbone.stem', 'backbone.stages.0')) for name in groups)
    assert 'backbone.stages.1.blocks.0.norm1.weight' in groups


def test_a_backbone_alone_and_within_distributed_training():
    backbone = ViGH(ARCH)
    expected = pytest.approx(LR * RATE**LAST, rel=1e-12)
    assert settings(backbone, build(backbone))['stem.down1.conv.weight']['lr'] == expected
    wrapped = nn.Module()
    wrapped.module = Classifier()
    assert settings(wrapped, build(wrapped))['module.backbone.stem.down1.conv.weight']['lr'] == expected


def test_optimisers_own_weight_decay_stays_off_norms():
    """AdamW decays by 0.01 where the config is silent."""
    model = Classifier()
    groups = settings(model, build(model, optimizer={'type': 'AdamW', 'lr': LR}))
    assert groups['backbone.norm0.weight']['weight_decay'] == 0
    assert groups['head.weight']['weight_decay'] == 0.01


def test_backbone_without_layers():
    with pytest.raises(TypeError, match='the backbone Conv2d has no get_layer_depth'):
        build(Classifier(nn.Conv2d(3, 4, 3)))
    with pytest.raises(TypeError, match='the backbone Linear has no get_layer_depth'):
        build(nn.Linear(2, 2))


@pytest.mark.parametrize(
    ('paramwise', 'message'),
    [
        ({'num_layers': 12}, r"takes \['custom_keys', 'decay_rate'\] .* got \['num_layers'\]"),
        ({'norm_decay_mult': 0.0}, r"got \['norm_decay_mult'\]"),
        ({'decay_rate': 1.5}, r'must be in \(0, 1\], got 1\.5'),
        ({'decay_rate': None}, r'must be in \(0, 1\], got None'),
    ],
)
def test_options_are_checked(paramwise, message):
    with pytest.raises(ValueError, match=message):
        build(nn.Module(), **paramwise)


def test_learning_rate_is_needed():
    with pytest.raises(ValueError, match='must give lr'):
        build(nn.Module(), optimizer={'type': 'AdamW'})


@pytest.mark.parametrize('scope', ['mmengine', 'mmdet', 'mmseg', 'mmpretrain'])
def test_every_scope_finds_the_constructor(scope):
    with DefaultScope.overwrite_default_scope(scope):
        assert len(build(ViGH(ARCH)).param_groups) == 2 * LAST + 1


@pytest.mark.parametrize(
    'constructor',
    [
        'LearningRateDecayOptimizerConstructor',
        'mmdet.LearningRateDecayOptimizerConstructor',
        'mmseg.LayerDecayOptimizerConstructor',
    ],
)
def test_layer_decay_of_other_packages_is_refused_with_the_name_of_ours(constructor):
    model = {'type': 'MaskRCNN', 'backbone': {'type': 'mmvig.ViGH', 'arch': 'tiny'}}
    optim_wrapper = {'type': 'OptimWrapper', 'constructor': constructor}
    cfg = Config(
        {
            'model': model,
            'optim_wrapper': optim_wrapper,
            'train_dataloader': {'dataset': {'type': 'BaseDataset'}},
        }
    )
    with pytest.raises(SetupError, match=rf"'{constructor}'.*mmvig\.LayerDecayOptimWrapperConstructor"):
        check_training(cfg)
    cfg.optim_wrapper.constructor = 'mmvig.LayerDecayOptimWrapperConstructor'
    check_training(cfg)
    cfg.optim_wrapper.constructor, cfg.model.backbone.type = constructor, 'ConvNeXt'
    check_training(cfg)
