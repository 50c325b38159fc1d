"""What a run starts from: strict, with a classifier's backbone and other classes as the two exceptions."""

import logging

import pytest
import torch
from golden import MINI, official_state_dict
from mmengine.model import BaseModel
from torch import nn

from mmvig.backbones import ViG, ViGH
from mmvig.engine import loading


class Model(BaseModel):
    """What a detector, or a classifier, is to a checkpoint."""

    def __init__(self, classes=3, head='roi_head', backbone=None):
        super().__init__()
        self.backbone = backbone or ViGH(MINI, out_indices=(3,))
        if head == 'roi_head':
            self.neck = nn.Conv2d(256, 8, 1)
        self.add_module(head, nn.ModuleDict({'fc': nn.Linear(8 if head == 'roi_head' else 256, classes)}))

    def forward(self, inputs, data_samples=None, mode='tensor'):
        raise NotImplementedError


def start(model, content, caplog):
    """Load as a run does; what was logged."""
    with caplog.at_level(logging.INFO, logger='mmvig'):
        logging.getLogger('mmvig').propagate = True
        model.load_state_dict(loading.to_start_from(model, content, 'file.pth'))
    return ' '.join(record.getMessage() for record in caplog.records)


@pytest.fixture(scope='module')
def official():
    return official_state_dict('mini', classifier=True)


def stem(model):
    return model.backbone.stem.down1.conv.weight


def test_official_classifier_into_a_detector(official, caplog):
    model = Model()
    before = model.roi_head['fc'].weight.clone()
    said = start(model, {'model': official}, caplog)
    assert torch.equal(stem(model), official['patch_embed.0.weight'])
    assert torch.equal(model.backbone.norm3.weight, official['classifier.norm.weight'])
    assert torch.equal(model.roi_head['fc'].weight, before)
    assert 'the backbone takes' in said and 'neck, roi_head keep their initial values' in said


def test_our_classifier_and_our_bare_backbone_into_a_detector(caplog):
    classifier = Model(1000, 'head')
    for content in ({'state_dict': classifier.state_dict()}, classifier.backbone.state_dict()):
        model = Model()
        said = start(model, content, caplog)
        assert torch.equal(stem(model), stem(classifier))
    assert 'nothing is left out' in said


def test_official_and_bare_files_into_a_classifier(official, caplog):
    classifier = Model(1000, 'head')
    start(classifier, official, caplog)
    assert torch.equal(classifier.head['fc'].weight, official['classifier.head.weight'])
    other = Model(5, 'head')
    said = start(other, official, caplog)
    assert torch.equal(stem(other), official['patch_embed.0.weight'])
    assert 'head.fc.weight (1000 outputs, here 5)' in said
    start(Model(5, 'head'), classifier.backbone.state_dict(), caplog)


def test_other_classes_keep_their_initial_values(caplog):
    trained, model = Model(80), Model(3)
    before = model.roi_head['fc'].weight.clone()
    said = start(model, {'state_dict': trained.state_dict()}, caplog)
    assert torch.equal(model.neck.weight, trained.neck.weight)
    assert torch.equal(model.roi_head['fc'].weight, before)
    assert 'roi_head.fc.weight (80 outputs, here 3), roi_head.fc.bias (80 outputs, here 3)' in said


def without(state_dict, word):
    return {key: value for key, value in state_dict.items() if word not in key}


@pytest.mark.parametrize(
    'content',
    [
        lambda own: without(own, 'neck'),
        lambda own: without(own, 'fc.bias'),
        lambda own: {**own, 'bbox_head.fc.weight': torch.ones(1)},
        lambda own: {**own, 'neck.bias': torch.ones(9)},  # a width, not classes
        lambda own: {**own, 'roi_head.fc.weight': torch.ones(3, 9)},
        lambda own: {**own, 'roi_head.fc.weight': torch.ones(4, 8), 'neck.weight': torch.ones(8, 7, 1, 1)},
        lambda own: {**own, 'backbone.stem.down1.conv.bias': torch.ones(1)},
        lambda own: {key.replace('roi_head', 'decode_head'): value for key, value in own.items()},
        lambda own: ViGH({**MINI, 'depths': [2, 2, 6, 2]}, out_indices=(3,)).state_dict(),
        lambda own: ViG(dict(embed_dims=32, depth=2, num_heads=1)).state_dict(),
        lambda own: {'layer1.0.conv1.weight': torch.ones(1)},
        lambda own: {f'backbone.{key}': value for key, value in nn.Linear(1, 1).state_dict().items()},
        lambda own: {**own, 'backbone.patch_embed.0.bias': torch.ones(16)},  # a second name
    ],
)
def test_anything_else_is_refused(content, caplog):
    model = Model()
    with pytest.raises(RuntimeError, match=r'does not fit|loading state_dict|two names'):
        start(model, {'state_dict': content(Model().state_dict())}, caplog)


def test_only_checkpoints_of_runs_are_resumed():
    content = {
        'meta': {'epoch': 1, 'iter': 2},
        'state_dict': {'a': torch.ones(1)},
        'message_hub': {},
        'optimizer': {},
    }
    assert loading.to_resume_from(content, 'file.pth') is content
    for key in ('message_hub', 'optimizer'):
        with pytest.raises(RuntimeError, match=f'file.pth is no checkpoint of a run to resume: no {key}'):
            loading.to_resume_from({**content, key: None}, 'file.pth')
    for broken in ({**content, 'meta': {}}, {'a': torch.ones(1)}):
        with pytest.raises(RuntimeError, match=r'no meta\.epoch, meta\.iter'):
            loading.to_resume_from(broken, 'file.pth')
    with pytest.raises(RuntimeError, match=r"NaN or infinite values in 'module\.a'"):
        loading.to_resume_from(
            {**content, 'ema_state_dict': {'module.a': torch.tensor(torch.nan)}}, 'file.pth'
        )
