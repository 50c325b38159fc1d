"""Our parts of detectors give what mmdet's give, and do not round boxes in mixed precision."""

import copy
import pickle
import sys
import threading
from pathlib import Path

import mmvig.compat  # noqa: F401  before what imports mmcv.ops

import pytest
import torch
from mmdet.models.data_preprocessors import DetDataPreprocessor
from mmdet.models.dense_heads import RPNHead
from mmdet.models.roi_heads import StandardRoIHead
from mmdet.models.roi_heads.mask_heads import FCNMaskHead
from mmdet.models.roi_heads.roi_extractors import SingleRoIExtractor
from mmdet.models.task_modules import AnchorGenerator, DeltaXYWHBBoxCoder, MaxIoUAssigner, RandomSampler
from mmdet.structures import DetDataSample
from mmdet.structures.mask import BitmapMasks, PolygonMasks
from mmengine.config import Config, ConfigDict
from mmengine.registry import MODELS, TASK_UTILS
from mmengine.structures import InstanceData
from torch._subclasses import FakeTensorMode
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

from mmvig.cuda_graphs import CALLS
from mmvig.detection.task_modules import Kept

CONFIGS = Path(__file__).resolve().parents[1] / 'configs'
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


@pytest.mark.parametrize('mode', ['iou', 'iof', 'giou'])
@pytest.mark.parametrize('is_aligned', [False, True])
def test_overlaps(mode, is_aligned):
    ours = TASK_UTILS.build(dict(type='mmvig.MaxIoUAssigner', **RPN)).iou_calculator
    theirs = MaxIoUAssigner(**RPN).iou_calculator
    assert type(ours) is not type(theirs)
    generator = torch.Generator().manual_seed(0)
    one, other = boxes(40, generator), boxes(40 if is_aligned else 50, generator)
    one[3, 2:] = one[3, :2]  # without an area
    other[:5] = one[:5]
    for cast in (torch.float32, torch.float64, torch.float16):
        args = one.to(cast), other.to(cast), mode, is_aligned
        assert_close(ours(*args), theirs(*args), rtol=0, atol=0, equal_nan=True)


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


@pytest.mark.parametrize('stds', [(1.0, 1.0, 1.0, 1.0), (0.1, 0.1, 0.2, 0.2)])
@pytest.mark.parametrize('options', [{}, {'clip_border': False}, {'add_ctr_clamp': True}])
@pytest.mark.parametrize('classes', [1, 3])
def test_coder(stds, options, classes):
    options = dict(target_means=(0.0, 0.1, 0.0, 0.0), target_stds=stds, **options)
    ours = TASK_UTILS.build(dict(type='mmvig.DeltaXYWHBBoxCoder', **options))
    theirs = DeltaXYWHBBoxCoder(**options)
    generator = torch.Generator().manual_seed(0)
    priors, truth = boxes(50, generator), boxes(50, generator)
    deltas = torch.randn(50, 4 * classes, generator=generator) * 3
    assert_close(ours.encode(priors, truth), theirs.encode(priors, truth), rtol=0, atol=0)
    for shape in (None, (40, 60), (40, 60, 3)):
        for count in (50, 0):
            actual, expected = (
                each.decode(priors[:count], deltas[:count], shape) for each in (ours, theirs)
            )
            assert_close(actual, expected, rtol=0, atol=0)
    copy.deepcopy(ours)


def test_draws():
    """As many as asked for, each once and of its kind, and each as often as any other."""
    sampler = TASK_UTILS.build(
        dict(type='mmvig.RandomSampler', num=16, pos_fraction=0.5, add_gt_as_proposals=False)
    )
    inds = torch.zeros(3, 100, dtype=torch.long)
    inds[:, 90:] = -1
    inds[0, :20], inds[1, :3] = 5, 1  # enough objects, too few, none
    counts = torch.zeros(3, 100)
    torch.manual_seed(0)
    for _ in range(400):
        (positive, is_positive), (negative, is_negative) = sampler.sample_each(inds)
        assert is_positive.sum(1).tolist() == [8, 3, 0] and is_negative.sum(1).tolist() == [8, 13, 16]
        for i in range(3):
            objects, rest = positive[i][is_positive[i]], negative[i][is_negative[i]]
            assert (inds[i][objects] > 0).all() and (inds[i][rest] == 0).all()
            assert len(objects.unique()) == len(objects) and len(rest.unique()) == len(rest)
            counts[i] += torch.bincount(torch.cat([objects, rest]), minlength=100)
    assert (counts[0, :20] / 400 - 8 / 20).abs().max() < 0.1
    assert (counts[0, 20:90] / 400 - 8 / 70).abs().max() < 0.07


MODEL = Config.fromfile(f'{CONFIGS}/_base_/models/maskrcnn_vigh.py').model


def pair_of(theirs, options):
    """Ours and mmdet's of one part of the config."""
    options = Config(copy.deepcopy(options)).to_dict()
    kind = options.pop('type')
    assert kind == f'mmvig.{theirs.__name__}'
    return MODELS.build({'type': kind, **options}), theirs(**options)


@pytest.mark.parametrize('training', [False, True])
@pytest.mark.parametrize('stacked', [False, True])
@pytest.mark.parametrize(
    'options', [{}, {'pad_value': 7}, {'bgr_to_rgb': False}, {'mean': None, 'std': None}]
)
def test_preprocessor(training, stacked, options):
    ours, theirs = pair_of(DetDataPreprocessor, {**MODEL.data_preprocessor, **options})
    images = [torch.randint(0, 256, (3, 40 - i, 50 + i), dtype=torch.uint8) for i in range(2)]
    inputs = torch.stack([images[0]] * 2) if stacked else images
    results = []
    for each in (ours, theirs):
        samples = [DetDataSample(gt_instances=InstanceData(bboxes=torch.zeros(1, 4))) for _ in images]
        data = {'inputs': inputs, 'data_samples': samples}
        found = each(data, training)
        results.append((found['inputs'], [sample.metainfo for sample in found['data_samples']]))
        assert data['inputs'] is inputs
    assert_close(results[0][0], results[1][0], rtol=0, atol=0)
    assert results[0][1] == results[1][1] and len(results[0][1]) == 2


@pytest.mark.parametrize(
    ('images', 'options'),
    [
        ([(1, 4, 4)], {}),
        ([(4, 4, 4)], {}),
        ([(4, 4, 4)], {'mean': None, 'std': None}),
        ([(3, 4, 4), (1, 4, 4)], {'mean': None, 'std': None, 'bgr_to_rgb': False}),
        ([], {}),
    ],
)
def test_unusual_images_are_what_they_are_to_mmdet(images, options):
    found = []
    for preprocessor in pair_of(DetDataPreprocessor, {**MODEL.data_preprocessor, **options}):
        try:
            data = {'inputs': [torch.ones(size) for size in images], 'data_samples': None}
            found.append(preprocessor(data)['inputs'].tolist())
        except Exception as error:
            found.append((type(error), str(error)))
    assert found[0] == found[1]


@pytest.mark.parametrize('double', [False, True])
def test_images_may_have_a_gradient_and_models_be_double(double):
    found = []
    for preprocessor in pair_of(DetDataPreprocessor, MODEL.data_preprocessor):
        image = torch.ones(3, 4, 5, requires_grad=not double)
        preprocessor = preprocessor.double() if double else preprocessor
        inputs = preprocessor({'inputs': [image], 'data_samples': None})['inputs']
        found.append([inputs] if double else [inputs, *torch.autograd.grad(inputs.square().sum(), image)])
    assert_close(*found, rtol=0, atol=0)
    assert found[0][0].dtype == (torch.float64 if double else torch.float32)


def proposals(head, scale=1.0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    sizes = [(52, 80), (26, 40), (13, 20), (7, 10), (4, 5)]
    maps = [[torch.randn(2, n, *size, generator=generator) * scale for size in sizes] for n in (3, 12)]
    metas = [{'img_shape': (205, 317)}, {'img_shape': (208, 319)}]
    cast = [[x.to(dtype).requires_grad_() for x in each] for each in maps]
    cfg = Config(
        dict(nms_pre=500, max_per_img=100, nms=dict(type='nms', iou_threshold=0.7), min_bbox_size=0)
    )
    return head.predict_by_feat(*cast, batch_img_metas=metas, cfg=cfg)


def test_proposals_are_not_rounded():
    options = {**MODEL.rpn_head, 'train_cfg': MODEL.train_cfg.rpn, 'test_cfg': MODEL.test_cfg.rpn}
    ours, theirs = pair_of(RPNHead, options)
    for actual, expected in zip(proposals(ours), proposals(theirs), strict=True):
        assert_close(actual.bboxes, expected.bboxes, rtol=0, atol=0)
        assert_close(actual.scores, expected.scores, rtol=0, atol=0)
        assert not (actual.bboxes.requires_grad or actual.scores.requires_grad)
    exact, rounded = (proposals(each, 0.0, torch.bfloat16)[0].bboxes for each in (ours, theirs))
    assert exact.dtype == torch.float32 and rounded.dtype == torch.bfloat16
    truth = proposals(theirs, 0.0)[0].bboxes  # of maps that bfloat16 holds exactly: zeros
    assert_close(exact, truth, rtol=0, atol=0)
    assert (rounded.float() - truth).abs().max() > 0.4


def test_one_bad_box_leaves_the_others_apart():
    """A coordinate that is NaN would move all boxes of the image to where none suppresses another."""
    options = {**MODEL.rpn_head, 'train_cfg': MODEL.train_cfg.rpn, 'test_cfg': MODEL.test_cfg.rpn}
    sizes = [(13, 20), (7, 10), (4, 5), (2, 3), (1, 2)]
    generator = torch.Generator().manual_seed(0)
    maps = [[torch.randn(1, n, *size, generator=generator) for size in sizes] for n in (3, 12)]
    maps[1][0][0, 0, 3, 4] = torch.nan
    found = [
        head.predict_by_feat(*maps, batch_img_metas=[{'img_shape': (52, 80)}], cfg=MODEL.test_cfg.rpn)[0]
        for head in pair_of(RPNHead, options)
    ]
    assert_close(found[0].bboxes, found[1].bboxes, rtol=0, atol=0)
    assert 0 < len(found[0].bboxes) < 1000


def rpn_losses(head, counts=(3, 7), pads=((208, 317), (150, 320)), dtype=torch.float32):
    """Losses and the maps' gradients; whole-number corners make ties of IoU."""
    generator = torch.Generator().manual_seed(0)
    sizes = [(52, 80), (26, 40), (13, 20), (7, 10), (4, 5)]
    maps = [
        [torch.randn(2, n, *size, generator=generator).to(dtype).requires_grad_() for size in sizes]
        for n in (3, 12)
    ]
    truth = [
        InstanceData(bboxes=boxes(n, generator, 120), labels=torch.zeros(n, dtype=torch.long))
        for n in counts
    ]
    metas = [{'img_shape': pad, 'pad_shape': pad} for pad in pads]
    losses = head.loss_by_feat(*maps, truth, metas, [InstanceData(bboxes=boxes(1, generator))] * 2)
    losses = {name: sum(each.mean() for each in value) for name, value in losses.items()}
    grads = torch.autograd.grad(sum(losses.values()), [*maps[0], *maps[1]])
    return losses, grads


@pytest.mark.parametrize(
    ('options', 'case'),
    [
        ({}, {}),
        ({}, {'pads': ((208, 320), (208, 320))}),
        ({}, {'counts': (1, 0)}),
        ({}, {'dtype': torch.bfloat16}),
        ({'pos_weight': 0.5}, {}),
        ({'allowed_border': 0}, {}),
        ({'assigner.ignore_iof_thr': 0.5}, {}),
        ({'assigner.match_low_quality': False}, {}),
        ({'assigner.pos_iou_thr': 0.99, 'assigner.match_low_quality': False}, {}),
        ({'sampler.neg_pos_ub': 3}, {}),
        ({}, {'anchor_generator': {'use_box_type': True}}),
        ({}, {'loss_cls': {'ignore_index': 1}}),
        ({}, {'loss_cls': {'reduction': 'none'}, 'loss_bbox': {'reduction': 'none'}}),
    ],
)
def test_losses_of_proposals(options, case):
    """Where all anchors are drawn, there is no chance: the losses are mmdet's."""
    case = dict(case)
    train_cfg = Config(copy.deepcopy(MODEL.train_cfg.rpn))
    train_cfg.merge_from_dict({'sampler.num': 10**6, **options})
    train_cfg = train_cfg._cfg_dict
    seeded = {'train_cfg': train_cfg, 'test_cfg': MODEL.test_cfg.rpn}
    head = copy.deepcopy(MODEL.rpn_head)
    for part in ('anchor_generator', 'loss_cls', 'loss_bbox'):
        head[part].update(case.pop(part, {}))
    ours, theirs = pair_of(RPNHead, {**head, **seeded})
    if train_cfg.sampler.neg_pos_ub > 0:
        torch.manual_seed(0)
        expected = rpn_losses(theirs, **case)
        torch.manual_seed(0)
        actual = rpn_losses(ours, **case)
        assert not ours._draws_at_once()
    else:
        actual, expected = (rpn_losses(each, **case) for each in (ours, theirs))
    for name, value in expected[0].items():
        assert_close(actual[0][name], value, rtol=1e-5, atol=1e-6, check_dtype=False)
    for own, other in zip(actual[1], expected[1], strict=True):
        assert_close(own, other, rtol=1e-4, atol=1e-8)


def test_objects_are_too_many_for_all_images_at_once(monkeypatch):
    """Then overlaps are taken of fewer images; one at a time, as mmdet does, if need be."""
    sizes = []
    for part in ('rpn_head', 'roi_heads'):
        monkeypatch.setattr(f'mmvig.detection.{part}.MOST_OVERLAPS', 1)
    overlaps = type(TASK_UTILS.build(dict(type='mmvig.MaxIoUAssigner', **RPN)).iou_calculator)
    call = overlaps.__call__
    monkeypatch.setattr(
        overlaps,
        '__call__',
        lambda self, one, other: [sizes.append((len(one), len(other))), call(self, one, other)][1],
    )
    train_cfg = copy.deepcopy(MODEL.train_cfg.rpn)
    train_cfg.sampler.num = 10**6
    ours, theirs = pair_of(
        RPNHead, {**MODEL.rpn_head, 'train_cfg': train_cfg, 'test_cfg': MODEL.test_cfg.rpn}
    )
    found, expected = (rpn_losses(each) for each in (ours, theirs))
    assert [size[0] for size in sizes[:2]] == [3, 7] and ours._draws_at_once()
    assert_close(found, expected, rtol=1e-4, atol=1e-6)
    sizes.clear()
    ours, theirs = roi_head(**{'sampler.num': 4000, 'sampler.pos_fraction': 0.5})
    found, expected = (roi_losses(each)[0] for each in (ours, theirs))
    assert sizes[:2] == [(3, 60), (5, 50)]
    assert_close(found, expected, rtol=1e-5, atol=1e-6)


def test_losses_of_few_anchors():
    """256 an image are drawn: losses are those of mmdet's, on average."""
    options = {**MODEL.rpn_head, 'train_cfg': MODEL.train_cfg.rpn, 'test_cfg': MODEL.test_cfg.rpn}
    ours, theirs = pair_of(RPNHead, options)
    assert ours._draws_at_once()
    torch.manual_seed(0)
    runs = [[rpn_losses(each)[0] for _ in range(40)] for each in (ours, theirs)]
    for name in runs[0][0]:
        actual, expected = (torch.stack([each[name] for each in own]).detach() for own in runs)
        error = (actual.var() / 40 + expected.var() / 40).sqrt()
        assert (actual.mean() - expected.mean()).abs() < 4 * error + 1e-6
    grads = rpn_losses(ours)[1]
    drawn = sum(int((x != 0).sum()) for x in grads[:5])
    assert drawn == 2 * 256


def rpn(device='cpu', cuda_graphs='auto', **options):
    options = {
        **MODEL.rpn_head,
        'train_cfg': copy.deepcopy(MODEL.train_cfg.rpn),
        'test_cfg': MODEL.test_cfg.rpn,
        'cuda_graphs': cuda_graphs,
        'in_channels': 16,
        'feat_channels': 16,
        **options,
    }
    torch.manual_seed(0)
    head = MODELS.build(options)
    head.init_weights()
    return head.to(device)


def rpn_input(seed=0, width=40, device='cpu', counts=(3, 7)):
    """The neck's maps, and pictures with objects."""
    generator = torch.Generator().manual_seed(seed)
    sizes = [(26 >> i, width >> i) for i in range(5)]
    maps = [torch.randn(2, 16, *size, generator=generator).to(device).requires_grad_() for size in sizes]
    samples = []
    for count, shape in zip(counts, ((104, 4 * width - 3), (90, 4 * width)), strict=True):
        meta = {'img_shape': shape, 'pad_shape': (104, 4 * width)}
        truth = InstanceData(bboxes=boxes(count, generator, 120).to(device))
        truth.labels = torch.zeros(count, dtype=torch.long, device=device)
        samples.append(DetDataSample(metainfo=meta, gt_instances=truth))
    return maps, samples


def rpn_step(head, maps, samples, call='loss_and_predict'):
    """Losses, gradients and proposals, as one list."""
    torch.manual_seed(0)
    if call == 'parts':  # as mmdet calls them
        outputs = head(maps)
        truth, metas = [each.gt_instances for each in samples], [each.metainfo for each in samples]
        losses = head.loss_by_feat(*outputs, truth, metas)
        found = head.predict_by_feat(*outputs, batch_img_metas=metas)
    else:
        losses, found = head.loss_and_predict(maps, samples)
    losses = [value for values in losses.values() for value in values]
    grads = torch.autograd.grad(sum(losses), [*maps, *head.parameters()])
    return [*losses, *grads, *(x for each in found for x in (each.bboxes, each.scores, each.labels))]


@pytest.mark.parametrize('counts', [(3, 7), (1, 0)])
def test_rpn_in_one_call(counts):
    head = rpn()
    maps, samples = rpn_input(counts=counts)
    assert_close(rpn_step(head, maps, samples), rpn_step(head, maps, samples, 'parts'), rtol=0, atol=0)
    with torch.no_grad():
        outputs, metas = head(maps), [each.metainfo for each in samples]
        found = head.predict(maps, samples), head.predict_by_feat(*outputs, batch_img_metas=metas)
    for actual, expected in zip(*found, strict=True):
        assert_close(actual.bboxes, expected.bboxes, rtol=0, atol=0)
        assert_close(actual.scores, expected.scores, rtol=0, atol=0)


class Waits(TorchDispatchMode):
    """Refuses what waits for a GPU, or copies to it: a capture could not have it."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        names = ('_local_scalar_dense', 'nonzero', 'unique', 'masked_select', 'lift_fresh', 'equal.')
        assert not any(name in str(function) for name in names), function
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize('learns', [True, False])
def test_what_rpn_captures_does_not_wait(learns, monkeypatch):
    head = rpn()
    maps, samples = rpn_input()
    run = head.graphs.run
    calls = []

    def watched(module, call, *inputs, settings):
        calls.append(call)
        monkeypatch.setattr('mmvig.detection.task_modules.is_captured', lambda: True)
        with Waits():
            call(*inputs)
        return run(module, call, *inputs, settings=settings)

    monkeypatch.setattr('mmvig.detection.task_modules.is_traced', lambda: False)  # it takes a mode for one
    monkeypatch.setattr(head.graphs, 'run', watched)
    if learns:
        head.loss_and_predict(maps, samples)
    else:
        head.predict(maps, samples)
    assert calls


def test_what_rpn_captures_depends_on_its_settings():
    head, seen = rpn(), []
    head.graphs.run = lambda module, call, *inputs, settings: [seen.append(settings), call(*inputs)][1]
    maps, samples = rpn_input()

    for part, name, value in (
        (vars(head.bbox_coder), 'means', (0.1, 0.0, 0.0, 0.0)),
        (vars(head.loss_bbox), 'loss_weight', 2.0),
        (vars(head.loss_cls), 'loss_weight', 2.0),
        (head.train_cfg, 'pos_weight', 0.5),
        (head.test_cfg, 'nms_pre', 50),
        (head.test_cfg, 'min_bbox_size', 3),
    ):
        head.loss_and_predict(maps, samples)
        part[name] = value
        head.loss_and_predict(maps, samples)
    assert len(set(seen)) == 7
    head.bbox_coder.note = [[1, {}]]  # which has no hash
    del head.train_cfg['pos_weight']  # which only losses need
    head.predict(maps, samples)
    assert len(set(seen)) == 8
    head.train_cfg = ConfigDict()  # as of a detector for inference alone
    head.predict(maps, samples)
    assert len(set(seen)) == 8


@pytest.mark.parametrize('watch', ['hook', 'global hook', 'compile', 'hook of a loss'])
def test_who_watches_rpn_is_called(watch):
    head, calls = rpn(), []
    maps, samples = rpn_input()
    expected = rpn_step(head, maps, samples)
    handle = None
    if watch == 'hook':
        head.register_forward_hook(lambda *_: calls.append(0))
    elif watch == 'global hook':
        handle = torch.nn.modules.module.register_module_forward_hook(
            lambda module, *_: calls.append(0) if module is head else None
        )
    elif watch == 'compile':
        head._compiled_call_impl = lambda *x: [calls.append(0), head._call_impl(*x)][1]
    else:
        head.loss_bbox.register_forward_hook(lambda *_: calls.append(0))
    try:
        assert_close(rpn_step(head, maps, samples), expected, rtol=0, atol=0)
        head.predict(maps, samples)
    finally:
        if handle:
            handle.remove()
    assert len(calls) == (1 if watch == 'hook of a loss' else 2)


METHODS = dict.fromkeys(('loss_by_feat', 'get_anchors', 'get_targets', 'loss_by_feat_single'), 'losses')
METHODS |= dict.fromkeys(('forward', 'forward_single', 'predict_by_feat', '_bbox_post_process'), 'both')


@pytest.mark.parametrize('of_the_class', [True, False])
@pytest.mark.parametrize('name', METHODS)
def test_methods_of_ones_own_are_called(name, of_the_class):
    head, calls = rpn(), []
    maps, samples = rpn_input()

    def own(self, *args, **kwargs):
        calls.append(0)
        return getattr(super(type(head), self), name)(*args, **kwargs)

    kind = type('Own', (type(head),), {name: own} if of_the_class else {})
    head.__class__ = kind
    if not of_the_class:
        setattr(head, name, own.__get__(head))
    head.loss_and_predict(maps, samples)
    assert calls
    calls.clear()
    head.predict(maps, samples)
    assert bool(calls) == (METHODS[name] == 'both')


@pytest.mark.gpu
@pytest.mark.parametrize('dtype', [None, torch.bfloat16])
def test_rpn_as_graphs(dtype, monkeypatch):
    """Bit for bit as without, at changing sizes, numbers of objects and shapes, learning and not."""
    monkeypatch.setattr(torch.backends.cudnn, 'deterministic', True)
    torch.use_deterministic_algorithms(True, warn_only=True)
    head, plain = rpn('cuda'), rpn('cuda', cuda_graphs=0)
    try:
        with torch.autocast('cuda', dtype, enabled=dtype is not None):
            for step in range(3 * CALLS):
                inputs = rpn_input(step, 40 - 8 * (step % 2), 'cuda', counts=(1 + step, 2))
                actual, expected = (rpn_step(each, *inputs) for each in (head, plain))
                weights = slice(7, 13) if dtype else slice(0)  # autocast's cache sums theirs in bfloat16
                assert_close(actual[weights], expected[weights], rtol=0.02, atol=1e-3)
                del actual[weights], expected[weights]
                assert_close(actual, expected, rtol=0, atol=0)
                with torch.no_grad():
                    found = [each.predict(*inputs) for each in (head, plain)]
                for actual, expected in zip(*found, strict=True):
                    assert_close(actual.bboxes, expected.bboxes, rtol=0, atol=0)
                    assert_close(actual.scores, expected.scores, rtol=0, atol=0)
    finally:
        torch.use_deterministic_algorithms(False)
    assert head.graphs.outcomes() == {'eager': 4 * (CALLS - 1), 'capture': 4, 'replay': 2 * CALLS}
    assert not plain.graphs.outcomes()


def roi_head(**options):
    """Ours and mmdet's, small, with the same weights."""
    layers = dict(in_channels=8, num_classes=5)
    config = Config(copy.deepcopy(dict(MODEL.roi_head)))
    config.merge_from_dict(
        {
            'bbox_head': {**layers, 'fc_out_channels': 16},
            'mask_head': {**layers, 'conv_out_channels': 8},
            **{f'{part}_roi_extractor.out_channels': 8 for part in ('bbox', 'mask')},
        }
    )
    train_cfg = Config(copy.deepcopy(dict(MODEL.train_cfg.rcnn)))
    train_cfg.merge_from_dict(options)
    config = ConfigDict(**config._cfg_dict, train_cfg=train_cfg._cfg_dict, test_cfg=MODEL.test_cfg.rcnn)
    ours = MODELS.build(copy.deepcopy(config))
    config.pop('type')
    theirs = StandardRoIHead(**config)
    ours.init_weights()
    theirs.load_state_dict(ours.state_dict())
    return ours, theirs


def roi_losses(head, proposals=(60, 50), objects=(3, 5), seed=0, classes=5):
    """Losses, and the maps' gradients."""
    generator = torch.Generator().manual_seed(seed)
    maps = [torch.randn(2, 8, 32 >> i, 40 >> i, generator=generator).requires_grad_() for i in range(5)]
    found = [InstanceData(bboxes=boxes(count, generator, 100)) for count in proposals]
    samples = []
    for count in objects:
        truth = InstanceData(bboxes=boxes(count, generator, 100))
        truth.labels = torch.randint(0, classes, (count,), generator=generator)
        corners = truth.bboxes[:, [0, 1, 2, 1, 2, 3, 0, 3]].double().numpy()
        truth.masks = PolygonMasks([[each] for each in corners], 160, 160)
        samples.append(DetDataSample(metainfo={'img_shape': (160, 160)}, gt_instances=truth))
    losses = head.loss(maps, found, samples)
    learned = [value for name, value in losses.items() if name.startswith('loss')]
    return losses, torch.autograd.grad(sum(learned), maps, allow_unused=True)


@pytest.mark.parametrize(
    ('options', 'case'),
    [
        ({}, {}),
        ({}, {'proposals': (60, 60)}),
        ({}, {'objects': (1, 9)}),
        ({}, {'objects': (0, 2)}),
        ({'sampler.add_gt_as_proposals': False}, {}),
        ({'assigner.match_low_quality': True}, {}),
        ({'assigner.pos_iou_thr': 0.95}, {}),  # the objects alone
        ({'pos_weight': 2.0}, {}),
        ({'assigner.ignore_iof_thr': 0.5}, {}),
    ],
)
def test_losses_of_regions(options, case):
    """Where all regions are drawn, there is no chance: the losses are mmdet's."""
    ours, theirs = roi_head(**{'sampler.num': 4000, 'sampler.pos_fraction': 0.5, **options})
    for seed in range(4):
        actual, expected = (roi_losses(each, seed=seed, **case) for each in (ours, theirs))
        assert actual[0].keys() == expected[0].keys()
        assert_close(actual[0], expected[0], rtol=1e-5, atol=1e-6)
        for own, other in zip(actual[1], expected[1], strict=True):
            assert own is other is None or (own - other).norm() <= 1e-5 * other.norm()


def test_losses_of_few_regions():
    """As many are drawn as mmdet draws, of each image and kind."""
    ours, _ = roi_head(**{'sampler.num': 16, 'sampler.pos_fraction': 0.25})
    generator = torch.Generator().manual_seed(0)
    truth = [InstanceData(bboxes=boxes(n, generator, 100)) for n in (3, 9)]
    for each in truth:
        each.labels = torch.arange(len(each)) % 5
    proposals = [torch.cat([boxes(30, generator, 100), each.bboxes + 1]) for each in truth]
    proposals = [each.requires_grad_() for each in proposals]
    seen = set()
    for _ in range(10):
        drawn = ours._draw(proposals, truth)
        for result, each, found in zip(drawn, truth, proposals, strict=True):
            priors = torch.cat([each.bboxes, found])
            expected = ours.bbox_assigner.assign(InstanceData(priors=priors), each)
            assert len(result.pos_inds) == result.num_pos == 4 and len(result.neg_inds) == 12
            numbers = expected.gt_inds[result.pos_inds] - 1
            assert_close(result.pos_assigned_gt_inds, numbers, rtol=0, atol=0)
            assert (expected.gt_inds[result.neg_inds] == 0).all()
            assert_close(result.priors, priors[torch.cat([result.pos_inds, result.neg_inds])])
            assert_close(result.pos_gt_bboxes, each.bboxes[numbers])
            assert_close(result.pos_gt_labels, each.labels[numbers])
            assert result.pos_is_gt.bool().tolist() == (result.pos_inds < len(each)).tolist()
            assert result.num_gts == len(each) and result.avg_factor == 16
            assert_close(torch.from_numpy(result.fetched[1][0]), result.pos_priors, rtol=0, atol=0)
            assert result.fetched[1][1].tolist() == numbers.tolist()
            seen.add((len(each), *result.pos_inds.sort().values.tolist()))
    assert len(seen) > 10  # others each time


@pytest.mark.parametrize('kind', [PolygonMasks, BitmapMasks])
def test_masks_of_regions_on_the_host_are_mmdets(kind, monkeypatch):
    """Polygons without a look at the GPU's memory, bitmaps by mmdet."""
    ours, _ = roi_head()
    generator = torch.Generator().manual_seed(0)
    truth = [InstanceData(bboxes=boxes(n, generator, 100), labels=torch.zeros(n).long()) for n in (3, 9)]
    for each in truth:
        corners = each.bboxes[:, [0, 1, 2, 1, 2, 3, 0, 3]].double().numpy() - 5
        each.masks = PolygonMasks([[own] for own in corners], 90, 80)
        if kind is BitmapMasks:
            each.masks = each.masks.to_bitmap()
    drawn = ours._draw([each.bboxes + 1 for each in truth], truth)
    cfg = ConfigDict(mask_size=(7, 11))
    expected = FCNMaskHead.get_targets(ours.mask_head, drawn, truth, cfg)
    with monkeypatch.context() as patch:
        if kind is PolygonMasks:
            patch.setattr(torch.Tensor, 'cpu', None)
        actual = ours.mask_head.get_targets(drawn, truth, cfg)
    assert 0.1 < actual.mean() < 0.9
    assert_close(actual, expected, rtol=0, atol=0)
    # Who changes the regions, as Grid R-CNN does, has the changed ones' masks.
    drawn[0].pos_priors = drawn[0].pos_priors[:2] + 9
    drawn[0].pos_assigned_gt_inds = drawn[0].pos_assigned_gt_inds[:2]
    expected = FCNMaskHead.get_targets(ours.mask_head, drawn, truth, cfg)
    assert_close(ours.mask_head.get_targets(drawn, truth, cfg), expected, rtol=0, atol=0)


def test_other_targets_are_mmdets(monkeypatch):
    ours, theirs = roi_head(**{'sampler.num': 4000})
    calls = []

    class Other(type(ours.bbox_head)):
        def get_targets(self, *args, **kwargs):
            calls.append(0)
            return super().get_targets(*args, **kwargs)

    ours.bbox_head.__class__ = Other
    assert_close(roi_losses(ours)[0], roi_losses(theirs)[0], rtol=1e-5, atol=1e-6)
    assert calls == [0]


def test_a_box_head_may_be_wrapped():
    """As torch.compile does, whose module hands on what it does not have."""

    class Wrapped(torch.nn.Module):
        def __init__(self, module):
            super().__init__()
            self.module = module

        def __getattr__(self, name):
            return self._modules['module'] if name == 'module' else getattr(self.module, name)

        def forward(self, x):
            return self.module(x)

    ours, theirs = roi_head(**{'sampler.num': 4000})
    ours.bbox_head = Wrapped(ours.bbox_head)
    assert_close(roi_losses(ours)[0], roi_losses(theirs)[0], rtol=1e-5, atol=1e-6)


def extracted(extractor, dtype=None, **options):
    generator = torch.Generator().manual_seed(0)
    feats = [torch.randn(2, 8, 64 >> i, 96 >> i, generator=generator).requires_grad_() for i in range(4)]
    corners = torch.rand(30, 2, generator=generator) * 200
    sides = torch.rand(30, 2, generator=generator) * torch.tensor([20.0, 180.0])[:, None].repeat(15, 1)
    images = torch.randint(0, 2, (30, 1), generator=generator).float()
    rois = torch.cat([images, corners, corners + sides], dim=1)
    with torch.autocast('cpu', dtype, enabled=dtype is not None):
        found = extractor([x if dtype is None else x.to(dtype) for x in feats], rois, **options)
    found.float().square().sum().backward()
    return found, [x.grad for x in feats]


@pytest.mark.parametrize('options', [{}, {'roi_scale_factor': 1.3}])
def test_features_of_rois(options):
    """The RoIs leave two levels without any."""
    mask = {**MODEL.roi_head.mask_roi_extractor, 'out_channels': 8}
    ours, theirs = pair_of(SingleRoIExtractor, mask)
    assert_close(extracted(ours, **options), extracted(theirs, **options))
    assert extracted(ours)[1][3].eq(0).all()
    truth = extracted(theirs)[0]
    actual, rounded = (extracted(each, torch.bfloat16)[0].float() for each in (ours, theirs))
    assert (actual - truth).norm() < 0.02 * truth.norm() < 0.1 * (rounded - truth).norm()


@pytest.mark.parametrize('count', [0, 1, 32, 33])
def test_masks_of_few_sizes(count):
    options = {**MODEL.roi_head.mask_head, 'in_channels': 8, 'conv_out_channels': 8}
    ours, theirs = pair_of(FCNMaskHead, options)
    theirs.load_state_dict(ours.state_dict())
    features = torch.randn(count, 8, 6, 6, generator=torch.Generator().manual_seed(0)).requires_grad_()
    sizes, results = [], []
    ours.register_forward_hook(lambda head, inputs, output: sizes.append(len(output)))
    for head in (ours, theirs):
        masks = head(features)
        results.append((masks, *torch.autograd.grad(masks.square().sum(), [features, *head.parameters()])))
    assert_close(*results, rtol=1e-3, atol=1e-4)
    assert sizes == [-(-count // 32) * 32] and len(results[0][0]) == count


def test_a_mask_head_with_batch_norm_sees_what_it_is_given():
    options = {**MODEL.roi_head.mask_head, 'in_channels': 8, 'conv_out_channels': 8}
    head, _ = pair_of(FCNMaskHead, {**options, 'norm_cfg': dict(type='BN')})
    head.register_forward_hook(lambda head, inputs, output: sizes.append(len(output)))
    sizes = []
    head(torch.randn(3, 8, 6, 6))
    assert sizes == [3]


def test_rois_of_no_level_have_no_features():
    """Of negative area or NaN, as a jitter of boxes or a diverged run makes them."""
    ours, theirs = pair_of(SingleRoIExtractor, {**MODEL.roi_head.bbox_roi_extractor, 'out_channels': 8})
    rois = torch.tensor(
        [[0, 0, 0, 90, 90.0], [0, 9, 9, 4, 40], [0, torch.nan, 0, 9, 9], [0, 1, 1, 300, 300]]
    )
    generator = torch.Generator().manual_seed(0)
    feats = [torch.randn(1, 8, 64 >> i, 64 >> i, generator=generator) for i in range(4)]
    for chosen in (rois, rois[1:3]):
        assert_close(ours(feats, chosen), theirs(feats, chosen), rtol=0, atol=0)
    assert ours(feats, rois)[1:3].eq(0).all() and ours(feats, rois)[0].any()


def test_a_trace_of_masks_fixes_no_count():
    options = {**MODEL.roi_head.mask_head, 'in_channels': 8, 'conv_out_channels': 8}
    head, _ = pair_of(FCNMaskHead, options)
    traced = torch.jit.trace(head, torch.randn(3, 8, 6, 6), check_trace=False)
    assert len(traced(torch.randn(40, 8, 6, 6))) == 40


def test_kept_constants_serve_later_calls():
    coder = TASK_UTILS.build(dict(type='mmvig.DeltaXYWHBBoxCoder', target_stds=(0.1, 0.1, 0.2, 0.2)))
    priors = boxes(5, torch.Generator().manual_seed(0))
    with torch.inference_mode():
        before = coder.decode(priors, torch.ones(5, 4)).tolist()
    deltas = torch.ones(5, 4, requires_grad=True)
    found = coder.decode(priors, deltas)
    found.sum().backward()  # what was made in inference mode could not be saved for it
    assert found.tolist() == before and deltas.grad.any()
    coder.stds = (1.0, 1.0, 1.0, 1.0)
    assert coder.decode(priors, torch.ones(5, 4)).tolist() != before
    with FakeTensorMode():
        coder.decode(torch.ones(2, 4), torch.ones(2, 4))
    assert type(coder.decode(priors, torch.ones(5, 4))) is torch.Tensor


def test_what_is_kept_stays_small(monkeypatch):
    """Anchors of many sizes would fill a GPU; those of one size must stay, however many they are."""
    monkeypatch.setattr('mmvig.detection.task_modules.MOST_KEPT', 1000)
    kept = Kept()
    for n in (50, 100, 1, 2000, 120, 120):
        assert len(kept.made((n,), lambda n=n: [torch.zeros(n), torch.zeros(n)])[0]) == n
        assert sum(8 * size for (size,) in kept) <= max(1000, 8 * n) and (n,) in kept
    assert list(kept) == [(120,)]


def test_copies_start_with_nothing_kept():
    """What is unpickled may be on another device than its key says."""
    head = rpn()
    maps, samples = rpn_input()
    expected = rpn_step(head, maps, samples)
    assert head._kept and head._flags and head.prior_generator._anchors and head.bbox_coder._kept
    for other in (pickle.loads(pickle.dumps(head)), copy.deepcopy(head)):
        parts = other._kept, other._flags, other.prior_generator._anchors, other.bbox_coder._kept
        assert not any(parts) and all(type(each) is Kept for each in parts)
        assert_close(rpn_step(other, maps, samples), expected, rtol=0, atol=0)


def test_shapes_of_pictures_are_kept_one_by_one():
    """Few batches have the same ones, so that keys of all of them would never come again."""
    head = rpn()
    maps, samples = rpn_input()
    for pads in ((104, 160), (90, 160)), ((90, 160), (104, 160)), ((90, 160), (90, 160)):
        for sample, pad in zip(samples, pads, strict=True):
            sample.set_metainfo({'pad_shape': pad})
        head.loss_and_predict(maps, samples)
    assert len(head._flags) == 2


def test_threads_share_what_is_kept():
    generator = TASK_UTILS.build(dict(type='mmvig.AnchorGenerator', scales=[8], ratios=[1.0], strides=[4]))
    interval, errors = sys.getswitchinterval(), []

    def work():
        try:
            for i in range(600):
                assert len(generator.grid_priors([(1 + i % 90, 1)], device='cpu')[0]) == 1 + i % 90
        except Exception as error:
            errors.append(error)

    sys.setswitchinterval(1e-5)
    try:
        threads = [threading.Thread(target=work) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    assert not errors and len(generator._anchors) <= 64


def test_no_rois():
    ours, _ = pair_of(SingleRoIExtractor, MODEL.roi_head.bbox_roi_extractor)
    assert ours([torch.zeros(1, 256, 8 >> i, 8 >> i) for i in range(4)], torch.zeros(0, 5)).shape[0] == 0
