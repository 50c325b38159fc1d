"""Detectors as they are exported beside mmdet's own predictions, in PyTorch."""

import pytest
import small_detectors
import torch
from mmengine.config import ConfigDict

from mmvig.deploy.check import check_detector, read_pictures
from mmvig.deploy.detectors import Detector
from mmvig.engine.preflight import SetupError

SIZES = (64, 96), (97, 50)
SOFTMAX = ConfigDict(type='CrossEntropyLoss', use_sigmoid=False)
DEFAULT = torch.zeros(2, dtype=torch.long)


def run(detector):
    """What onnxruntime would do."""
    return lambda images, size=DEFAULT: detector(images, size)


def counts(lines):
    return [int(line.split(': ')[1].split()[0]) for line in lines]


@pytest.mark.parametrize('kind', small_detectors.KINDS)
def test_as_mmdet(kind, capsys):
    model = small_detectors.build(small_detectors.config(kind))
    check_detector(model, run(Detector(model)), SIZES, read_pictures(None, [])[:2])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3 and min(counts(lines)) >= 10


@pytest.mark.parametrize(
    ('kind', 'change'),
    [
        ('mask_rcnn', dict(rpn_head=dict(bbox_coder=dict(clip_border=False)))),
        ('mask_rcnn', dict(roi_head=dict(bbox_head=dict(reg_class_agnostic=True)))),
        ('mask_rcnn', dict(roi_head=dict(mask_head=dict(class_agnostic=True)))),
        ('mask_rcnn', dict(test_cfg=dict(rpn=dict(min_bbox_size=12), rcnn=dict(mask_thr_binary=0.3)))),
        ('retinanet', dict(test_cfg=dict(min_bbox_size=10, score_thr=0.9))),
        ('retinanet', dict(bbox_head=dict(loss_cls=SOFTMAX))),
        ('detr', dict(test_cfg=dict(max_per_img=11))),
    ],
)
def test_options_as_mmdet(kind, change, capsys):
    config = small_detectors.config(kind)
    small_detectors.merge(config, change)
    model = small_detectors.build(config)
    check_detector(model, run(Detector(model)), SIZES[:1], read_pictures(None, [])[:1])
    assert min(counts(capsys.readouterr().out.splitlines())) >= 3


def test_own_pixels(capsys):
    """Boxes and masks in a picture of another size than the one that the detector sees."""
    model = small_detectors.build(small_detectors.config('mask_rcnn'))
    images = torch.rand(1, 3, 64, 100)
    boxes, _, _, masks = Detector(model)(images, torch.tensor([0, 0]))
    twice, _, _, larger = Detector(model)(images, torch.tensor([128, 300]))
    torch.testing.assert_close(twice, boxes * torch.tensor([3, 2, 3, 2]))
    assert masks.shape[1:] == (64, 100) and larger.shape[1:] == (128, 300)


def test_a_difference_is_an_error():
    model = small_detectors.build(small_detectors.config('detr'))
    detector = run(Detector(model))

    def off(images, **size):
        boxes, labels, scores = detector(images, **size)
        return boxes + 0.02, labels, scores

    with pytest.raises(SetupError, match=r'at \[64, 96\] .*nothing was written'):
        check_detector(model, off, SIZES[:1], read_pictures(None, [])[:1])


def test_nothing_to_compare_is_said(capsys):
    config = small_detectors.config('mask_rcnn')
    config.test_cfg.rcnn.score_thr = 0.9
    model = small_detectors.build(config)
    check_detector(model, run(Detector(model)), SIZES[:1], read_pictures(None, [])[:1])
    assert 'none was compared' in capsys.readouterr().out


@pytest.mark.parametrize(
    ('kind', 'change', 'message'),
    [
        (
            'mask_rcnn',
            dict(test_cfg=dict(rcnn=dict(nms=dict(type='soft_nms')))),
            'test_cfg.rcnn: exported is',
        ),
        ('mask_rcnn', dict(test_cfg=dict(rpn=dict(max_num=3))), 'test_cfg of rpn_head: max_num'),
        (
            'mask_rcnn',
            dict(roi_head=dict(type='DoubleHeadRoIHead', reg_roi_scale_factor=1.3)),
            'roi_head is a D',
        ),
        ('mask_rcnn', dict(roi_head=dict(bbox_head=dict(with_reg=False))), 'with classes and boxes'),
        ('retinanet', dict(bbox_head=dict(bbox_coder=dict(add_ctr_clamp=True))), 'add_ctr_clamp'),
        (
            'retinanet',
            dict(bbox_head=dict(bbox_coder=dict(type='DeltaXYWHBBoxCoderForGLIP'))),
            'is a DeltaXYWHBBoxCoderForGLIP',
        ),
        ('detr', dict(data_preprocessor=dict(pad_size_divisor=32)), 'pad_size_divisor=1'),
    ],
)
def test_unknown_parts_are_named(kind, change, message):
    config = small_detectors.config(kind)
    small_detectors.merge(config, change)
    with pytest.raises(SetupError, match=message):
        Detector(small_detectors.build(config))
