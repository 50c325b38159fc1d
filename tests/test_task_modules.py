"""Our assigner, sampler and anchors give what mmdet's give."""

import copy

import mmvig.compat  # noqa: F401  before what imports mmcv.ops

import pytest
import torch
from mmdet.models.task_modules import AnchorGenerator, MaxIoUAssigner, RandomSampler
from mmengine.registry import TASK_UTILS
from mmengine.structures import InstanceData
from torch.testing import assert_close

RPN = dict(pos_iou_thr=0.7, neg_iou_thr=0.3, min_pos_iou=0.3, match_low_quality=True)
RCNN = dict(pos_iou_thr=0.5, neg_iou_thr=0.5, min_pos_iou=0.5, match_low_quality=False)
OTHERS = [dict(RPN, neg_iou_thr=(0.1, 0.3)), dict(RPN, gt_max_assign_all=False), dict(RPN, min_pos_iou=0.0)]


def boxes(count, generator, size=64):
    corners = torch.randint(0, size, (count, 2), generator=generator).float()
    return torch.cat(
        [corners, corners + torch.randint(1, size // 2, (count, 2), generator=generator)], dim=1
    )


@pytest.mark.parametrize('options', [RPN, RCNN, *OTHERS])
@pytest.mark.parametrize('objects', [0, 1, 9])
def test_assigner(options, objects):
    """Whole-number corners make ties of IoU common."""
    ours = TASK_UTILS.build(dict(type='mmvig.MaxIoUAssigner', **options))
    theirs = MaxIoUAssigner(**options)
    for seed in range(20):
        generator = torch.Generator().manual_seed(seed)
        priors = InstanceData(priors=boxes(300, generator))
        truth = InstanceData(
            bboxes=boxes(objects, generator), labels=torch.randint(0, 5, (objects,), generator=generator)
        )
        truth.bboxes[1:2] = truth.bboxes[:1]  # two objects in one place
        actual, expected = (each.assign(copy.deepcopy(priors), truth) for each in (ours, theirs))
        for name in ('num_gts', 'gt_inds', 'max_overlaps', 'labels'):
            assert_close(getattr(actual, name), getattr(expected, name), rtol=0, atol=0)


def test_sampler():
    options = dict(num=16, pos_fraction=0.5)
    results = []
    for sampler in (
        TASK_UTILS.build(dict(type='mmvig.RandomSampler', **options)),
        RandomSampler(**options),
    ):
        generator = torch.Generator().manual_seed(0)
        priors, truth = boxes(400, generator), InstanceData(bboxes=boxes(30, generator))
        truth.labels = torch.zeros(30, dtype=torch.long)
        assigned = MaxIoUAssigner(**RCNN).assign(InstanceData(priors=priors), truth)
        torch.manual_seed(1)
        found = sampler.sample(assigned, InstanceData(priors=priors), truth)
        results.append((found.pos_inds, found.neg_inds))
    assert_close(*results)
    assert len(results[0][0]) <= 8 < 16 == sum(map(len, results[0]))


def test_anchors():
    options = dict(scales=[8], ratios=[0.5, 1.0, 2.0], strides=[4, 8])
    ours, theirs = (
        TASK_UTILS.build(dict(type='mmvig.AnchorGenerator', **options)),
        AnchorGenerator(**options),
    )
    for side in (8, 12, 8, 12):
        sizes = [torch.Size((side, side + 4)), (side // 2, side // 2 + 2)]
        for name, more in (('grid_priors', ()), ('valid_flags', ((4 * side - 3, 4 * side, 3),))):
            actual, expected = (getattr(each, name)(sizes, *more, device='cpu') for each in (ours, theirs))
            assert_close(actual, expected, rtol=0, atol=0)
            for each in actual:
                each.zero_()  # the caller's own
    assert ours.grid_priors(sizes, torch.float64, 'cpu')[0].dtype == torch.float64
    assert len(copy.deepcopy(ours).grid_priors(sizes, device='cpu')) == 2
