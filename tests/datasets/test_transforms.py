"""Masks as polygons: the same as mmdet's bitmaps, and truer mask targets."""

import copy

import numpy as np
import pycocotools.mask
import pytest
import torch
from mmdet.models.data_preprocessors import DetDataPreprocessor
from mmdet.structures.mask import BitmapMasks, PolygonMasks, mask_target
from mmengine.config import ConfigDict
from mmengine.registry import TRANSFORMS, DefaultScope

import mmvig.datasets.registered  # noqa: F401

SHAPE = (60, 80)
SQUARE = [[10, 10, 41, 10, 41, 31, 10, 31]]  # integers, as files may have them
PARTS = [[50.5, 5.0, 70.0, 7.5, 60.0, 20.0], [50.0, 30.0, 60.0, 30.0, 55.0, 45.5]]


def rle(box, compressed=False):
    mask = np.zeros(SHAPE, np.uint8)
    mask[box[1] : box[3], box[0] : box[2]] = 1
    encoded = pycocotools.mask.encode(np.asfortranarray(mask))
    if compressed:
        return {'size': encoded['size'], 'counts': encoded['counts'].decode()}
    flat = mask.flatten('F')  # runs of zeros and ones, in turn, as COCO has its crowds
    ends = np.flatnonzero(np.diff(flat)) + 1
    return {'size': [*SHAPE], 'counts': np.diff([0, *ends, flat.size]).tolist()}


def instance(mask, box, ignored=0, label=1):
    return {'mask': mask, 'bbox': box, 'bbox_label': label, 'ignore_flag': ignored}


POLYGONS = [instance(SQUARE, [10, 10, 41, 31]), instance(PARTS, [50, 5, 70, 45.5], label=2)]
CROWD = instance(rle((20, 40, 70, 55)), [20, 40, 70, 55], ignored=1)
RLE = instance(rle((20, 40, 70, 55), compressed=True), [20, 40, 70, 55])


def load(instances, kind='mmvig.LoadAnnotations', **more):
    results = {'ori_shape': SHAPE, 'img_shape': SHAPE, 'height': SHAPE[0], 'width': SHAPE[1]}
    noise = np.random.default_rng(0).integers(0, 255, (*SHAPE, 3), dtype=np.uint8)
    results.update(img=noise, img_id=0, img_path='', instances=copy.deepcopy(instances))
    return build(type=kind, with_bbox=True, with_mask=True, **more)(results)


def build(**cfg):
    with DefaultScope.overwrite_default_scope('mmdet'):
        return TRANSFORMS.build(cfg)


def test_pictures_of_polygons_keep_them():
    ours, theirs = load(POLYGONS), load(POLYGONS, 'LoadAnnotations')
    assert isinstance(ours['gt_masks'], PolygonMasks)
    assert (ours['gt_masks'].height, ours['gt_masks'].width) == SHAPE
    assert np.array_equal(ours['gt_masks'].to_ndarray(), theirs['gt_masks'].masks)  # what is drawn of them
    assert isinstance(load([])['gt_masks'], PolygonMasks)


@pytest.mark.parametrize('instances', [[*POLYGONS, RLE], [RLE], [*POLYGONS, CROWD, RLE]])
def test_pictures_with_other_masks_have_bitmaps(instances):
    ours, theirs = load(instances), load(instances, 'LoadAnnotations')
    assert isinstance(ours['gt_masks'], BitmapMasks)
    assert np.array_equal(ours['gt_ignore_flags'], theirs['gt_ignore_flags'])
    kept = ~theirs['gt_ignore_flags']
    assert np.array_equal(ours['gt_masks'].masks[kept], theirs['gt_masks'].masks[kept])


def test_crowds_are_outlined():
    ours, theirs = load([CROWD, *POLYGONS]), load([CROWD, *POLYGONS], 'LoadAnnotations')
    masks = ours['gt_masks']
    assert isinstance(masks, PolygonMasks) and ours['gt_ignore_flags'].tolist() == [True, False, False]
    assert np.array_equal(masks.to_ndarray()[1:], theirs['gt_masks'].masks[1:])
    outline, crowd = masks.to_ndarray()[0], theirs['gt_masks'].masks[0].astype(bool)
    assert (outline & crowd).sum() > 0.9 * (outline | crowd).sum()
    packed = build(type='PackDetInputs', meta_keys=())(ours)['data_samples']
    assert (len(packed.gt_instances), len(packed.ignored_instances)) == (2, 1)


def test_broken_masks_are_ignored_as_mmdet_does():
    broken = [
        instance([[1, 2, 3, 4]], [1, 2, 3, 4]),
        *POLYGONS,
        instance(rle((0, 0, 0, 0)), [0, 0, 9, 9], 1),
    ]
    ours, theirs = load(broken), load(broken, 'LoadAnnotations')
    assert (
        ours['gt_ignore_flags'].tolist() == theirs['gt_ignore_flags'].tolist() == [True, False, False, True]
    )
    assert not ours['gt_masks'].to_ndarray()[[0, 3]].any()


@pytest.mark.parametrize('mask', [{}, {'size': [80, 90]}, {'size': [80, 90], 'counts': None}])
def test_ignored_masks_that_are_none_are_empty(mask):
    ours = load([*POLYGONS, instance(mask, [0, 0, 9, 9], 1)])
    theirs = load([*POLYGONS, instance(mask, [0, 0, 9, 9], 1)], 'LoadAnnotations')
    assert ours['gt_ignore_flags'].tolist() == theirs['gt_ignore_flags'].tolist()
    assert isinstance(ours['gt_masks'], PolygonMasks) and not ours['gt_masks'].to_ndarray()[-1].any()


def test_the_transform_decides():
    with pytest.raises(TypeError, match='poly2mask'):
        build(type='mmvig.LoadAnnotations', poly2mask=True)


def test_integer_coordinates_are_scaled_as_floats():
    results = build(type='Resize', scale=(104, 78), keep_ratio=True)(load(POLYGONS))
    assert np.allclose(results['gt_masks'].masks[0][0], np.array(SQUARE[0]) * 1.3)


EXACT = {
    'RandomFlip': {'prob': 1.0, 'direction': 'diagonal'},
    'Pad': {'size_divisor': 32},
    'RandomCrop': {'crop_size': (30, 40), 'crop_type': 'absolute_range', 'allow_negative_crop': True},
}
RESAMPLED = {
    'Resize': {'scale': (160, 160)},
    'RandomResize': {'scale': (160, 120), 'ratio_range': (0.8, 1.5), 'keep_ratio': True},
    'RandomChoiceResize': {'scales': [(120, 90), (160, 120)], 'keep_ratio': True},
    'MinIoURandomCrop': {},
    'Rotate': {'prob': 1.0, 'level': 5},
    'ShearX': {'prob': 1.0, 'level': 5},
    'TranslateY': {'prob': 1.0, 'level': 5},
    'Mosaic': {'img_scale': (80, 80), 'prob': 1.0},
    'MixUp': {'img_scale': (80, 80), 'flip_ratio': 1.0},
}


def transformed(kind, options, loader):
    np.random.seed(5)
    results = load(POLYGONS, loader)
    if kind in ('Mosaic', 'MixUp', 'CopyPaste'):
        results['mix_results'] = [load(POLYGONS[:1], loader) for _ in range(3 if kind == 'Mosaic' else 1)]
    return build(type=kind, **options)(results)


@pytest.mark.parametrize('kind', [*EXACT, *RESAMPLED])
def test_transforms_take_polygons_as_they_take_bitmaps(kind):
    options = {**EXACT, **RESAMPLED}[kind]
    ours = transformed(kind, options, 'mmvig.LoadAnnotations')
    theirs = transformed(kind, options, 'LoadAnnotations')
    assert np.array_equal(ours['img'], theirs['img'])
    torch.testing.assert_close(ours['gt_bboxes'].tensor, theirs['gt_bboxes'].tensor)
    assert (
        isinstance(ours['gt_masks'], PolygonMasks) and len(ours['gt_masks']) == len(theirs['gt_masks']) > 0
    )
    drawn, masks = ours['gt_masks'].to_ndarray(), theirs['gt_masks'].masks.astype(bool)
    assert drawn.shape == masks.shape
    both, either = (drawn & masks).sum(), (drawn | masks).sum()
    assert both >= (0.97 if kind in EXACT else 0.9) * either > 0


@pytest.mark.parametrize(
    ('kind', 'options'),
    [
        ('Expand', {'prob': 1.0}),
        ('CopyPaste', {}),
        ('RandomErasing', {'n_patches': 2, 'ratio': 0.2}),
    ],
)
def test_transforms_of_bitmaps_refuse_polygons(kind, options):
    assert transformed(kind, options, 'LoadAnnotations') is not None
    with pytest.raises(
        (NotImplementedError, AttributeError, TypeError, ValueError, np.exceptions.AxisError)
    ):
        transformed(kind, options, 'mmvig.LoadAnnotations')


def test_a_batch_mixes_both():
    pack = build(type='PackDetInputs', meta_keys=('img_shape', 'ori_shape'))
    samples = [pack(load(POLYGONS)), pack(load([*POLYGONS, RLE]))]
    batch = {key: [sample[key] for sample in samples] for key in ('inputs', 'data_samples')}
    preprocessor = DetDataPreprocessor(pad_size_divisor=32, pad_mask=True, non_blocking=True)
    truth = [sample.gt_instances for sample in preprocessor(batch, training=True)['data_samples']]
    assert [(type(each.masks), each.masks.height) for each in truth] == [
        (PolygonMasks, 64),
        (BitmapMasks, 64),
    ]
    boxes, indices = [each.bboxes for each in truth], [torch.arange(len(each)) for each in truth]
    targets = mask_target(boxes, indices, [each.masks for each in truth], ConfigDict(mask_size=28))
    assert targets.shape == (5, 28, 28) and set(targets.unique().tolist()) == {0.0, 1.0}
    assert targets[0].all()  # a square fills its box
    assert ((targets[:2] != targets[2:4]).float().mean((1, 2)) < 0.1).all()


def test_mask_targets_are_nearer_to_the_polygons_than_those_of_bitmaps():
    generator = np.random.default_rng(0)
    found = {'mmvig.LoadAnnotations': [], 'LoadAnnotations': []}
    for _ in range(8):
        angles = np.sort(generator.uniform(0, 2 * np.pi, 12))
        radii = generator.uniform(4, 14, 12)
        points = np.stack([40 + radii * np.cos(angles), 30 + radii * np.sin(angles)], 1)
        box = [*points.min(0), *points.max(0)]
        fine = None
        for kind, overlaps in found.items():
            results = build(type='Resize', scale=(144, 108), keep_ratio=True)(
                load([instance([points.flatten().tolist()], box)], kind)
            )
            boxes, masks = [results['gt_bboxes'].tensor], [results['gt_masks']]
            if fine is None:
                fine = mask_target(
                    boxes, [torch.zeros(1, dtype=torch.long)], masks, ConfigDict(mask_size=448)
                )
                fine = torch.nn.functional.avg_pool2d(fine, 16) > 0.5
            target = (
                mask_target(boxes, [torch.zeros(1, dtype=torch.long)], masks, ConfigDict(mask_size=28)) > 0
            )
            overlaps.append(((target & fine).sum() / (target | fine).sum()).item())
    ours, theirs = (np.mean(found[kind]) for kind in ('mmvig.LoadAnnotations', 'LoadAnnotations'))
    assert ours > 0.96 and ours > theirs + 0.01, (ours, theirs)
