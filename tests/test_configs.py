"""Every config builds and trains a step; its recipe is the published one; its data loads.

Classification is in test_classification.py.
"""

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from mmdet.testing import demo_mm_inputs
from mmengine.config import Config
from mmengine.dataset import pseudo_collate
from mmengine.optim import build_optim_wrapper
from mmengine.registry import DATASETS, MODELS, init_default_scope
from mmengine.structures import PixelData
from mmseg.structures import SegDataSample
from torch import nn

from mmvig.datasets.shapes import ensure_shapes

FOLDER = Path(__file__).parents[1] / 'configs'
DETECTION = sorted(str(path.relative_to(FOLDER)) for path in FOLDER.glob('detection/*.py'))
SEGMENTATION = sorted(str(path.relative_to(FOLDER)) for path in FOLDER.glob('segmentation/*.py'))
CONFIGS = DETECTION + SEGMENTATION
# Full recipes, those that test_recipes.py compares with mmdet's and mmseg's own among them.
PUBLISHED = [name for name in CONFIGS if re.search(r'_vigh?_[tsb](_3x_ms)?\.py$', name)]
SWINS = [name for name in PUBLISHED if re.search(r'/(maskrcnn|retinanet|fcos|upernet)_vigh_', name)]
BATCHES = {'rtmdet_vigh_t': 128, 'semfpn_vigh_t': 32, **{f'maskrcnn_vig_{size}': 64 for size in 'tsb'}}
SIZE = (32, 64)  # of an image
LOADED = (
    'detection/maskrcnn_vigh_t.py',
    'detection/maskrcnn_vigh_t_3x_ms.py',
    'detection/maskrcnn_vigh_t_shapes.py',
    'detection/maskrcnn_vigh_t_shapes_cpu.py',
    'detection/rtmdet_vigh_t.py',
    'detection/dino_vigh_t.py',
    'detection/mask2former_vigh_s.py',
    'detection/maskrcnn_vig_t.py',
    'segmentation/upernet_vigh_t.py',
    'segmentation/mask2former_vigh_s.py',
    'segmentation/upernet_vigh_t_shapes.py',
)


def load(name):
    cfg = Config.fromfile(FOLDER / name)
    init_default_scope(cfg.default_scope)
    return cfg


def has_masks(cfg):
    return 'panoptic_head' in cfg.model or 'mask_head' in cfg.model.get('roi_head', {})


def number_of_classes(cfg):
    if 'panoptic_head' in cfg.model:
        return cfg.model.panoptic_head.num_things_classes
    head = cfg.model.get('roi_head', cfg.model).bbox_head
    return (head[0] if isinstance(head, list) else head).num_classes


def batch_for(cfg, size=SIZE):
    """Two random images with ground truth, as the data loader gives them."""
    if cfg.default_scope == 'mmdet':
        batch = demo_mm_inputs(
            2,
            [(3, *size)] * 2,
            num_items=[4, 4],
            num_classes=number_of_classes(cfg) + 1,
            with_mask=has_masks(cfg),
        )
        for sample in batch['data_samples']:
            sample.gt_instances.labels -= 1  # drawn from 1 on
        return batch
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randint(0, 256, (2, 3, *size), generator=generator, dtype=torch.uint8)
    classes = cfg.model.decode_head.num_classes
    samples = []
    for _ in range(2):
        meta = {'img_shape': size, 'ori_shape': size, 'pad_shape': size}
        sample = SegDataSample(metainfo=meta)
        labels = torch.randint(0, classes, (1, *size), generator=generator)
        sample.gt_sem_seg = PixelData(data=labels)
        samples.append(sample)
    return {'inputs': list(inputs), 'data_samples': samples}


def take_few_regions(cfg):
    """Of what a config has, at most this many: most of a step on a small image would be theirs."""
    train, test = cfg.model.train_cfg, cfg.model.test_cfg
    for holder, key in (
        *((each.sampler, 'num') for each in (train.rcnn if isinstance(train.rcnn, list) else [train.rcnn])),
        (train.rpn_proposal, 'max_per_img'),
        (test.rpn, 'max_per_img'),
    ):
        holder[key] = min(holder[key], 32)


# Heads that are larger than a small image: fewer queries, layers and points. What meets the backbone stays.
SMALL_MASK2FORMER = {
    'num_queries': 10,
    'pixel_decoder.encoder.num_layers': 1,
    'transformer_decoder.num_layers': 1,
}
SMALL = {
    'detection/dino_vigh_t.py': {
        'model.num_queries': 20,
        'model.encoder.num_layers': 1,
        'model.decoder.num_layers': 2,
        'model.dn_cfg.group_cfg.num_dn_queries': 4,
        'model.test_cfg.max_per_img': 10,
    },
    'detection/mask2former_vigh_s.py': {
        **{f'model.panoptic_head.{key}': value for key, value in SMALL_MASK2FORMER.items()},
        'model.train_cfg.num_points': 64,
        'model.test_cfg.max_per_image': 10,
    },
    'segmentation/mask2former_vigh_s.py': {
        **{f'model.decode_head.{key}': value for key, value in SMALL_MASK2FORMER.items()},
        'model.decode_head.train_cfg.num_points': 64,
    },
}


# Configs that differ in data or schedule alone have one model and one optimiser.
STEPS = {}
for name in CONFIGS:
    cfg = Config.fromfile(FOLDER / name)
    STEPS.setdefault(repr((cfg.model, cfg.optim_wrapper)), name)


@pytest.mark.parametrize('name', STEPS.values())
def test_model_trains_a_step_and_predicts(name):
    torch.manual_seed(0)
    cfg = load(name)
    cfg.merge_from_dict(SMALL.get(name, {}))
    preprocessor = cfg.model.data_preprocessor
    if 'size' in preprocessor:
        preprocessor.size = SIZE
    for augment in preprocessor.get('batch_augments', ()):
        augment.size = SIZE
    if 'roi_head' in cfg.model:
        take_few_regions(cfg)
    model = MODELS.build(cfg.model)
    for hook in cfg.get('custom_hooks', []):
        for part in hook.get('modules', []):  # of CudaGraphsHook, which leaves out what it cannot capture
            assert not list(model.get_submodule(part).buffers()), part
    model.init_weights()  # as mmengine's Runner does: DINO has embeddings that nothing else initialises
    optim_wrapper = build_optim_wrapper(model, cfg.optim_wrapper)
    last_norm = getattr(model.backbone, f'norm{model.backbone.out_indices[-1]}')
    before = last_norm.weight.detach().clone()

    model.train()
    losses = model(**model.data_preprocessor(batch_for(cfg), True), mode='loss')
    loss, _ = model.parse_losses(losses)
    assert torch.isfinite(loss)
    optim_wrapper.backward(loss)
    without_gradient = [key for key, value in model.named_parameters() if value.grad is None]
    assert without_gradient == [], 'unused parameters stop distributed training'
    optim_wrapper.step()
    assert not torch.equal(last_norm.weight, before)

    model.eval()
    with torch.no_grad():
        predictions = model.test_step(batch_for(cfg))
    assert len(predictions) == 2
    if cfg.default_scope == 'mmdet':
        found = predictions[0].pred_instances
        assert not has_masks(cfg) or found.masks.shape == (len(found), *SIZE)
        assert found.bboxes.shape == (len(found), 4)
    else:
        assert predictions[0].pred_sem_seg.shape == SIZE


# config: arch, drop path, channels of the four stages
BACKBONES = {
    't': ('tiny', 0.2, [96, 192, 384, 768]),
    's': ('small', 0.3, [96, 192, 384, 768]),
    'b': ('base', 0.6, [128, 256, 512, 1024]),
}


@pytest.mark.parametrize('name', [name for name in PUBLISHED if '_vigh_' in name])
def test_backbone_is_the_one_in_the_name(name):
    cfg = load(name)
    arch, drop_path, channels = BACKBONES[re.search(r'_vigh_([tsb])', name)[1]]
    expected = {'type': 'mmvig.ViGH', 'arch': arch, 'drop_path_rate': drop_path}
    if 'bbox_head' in cfg.model:  # reads no map of stride 4
        expected['out_indices'], channels = (1, 2, 3), channels[1:]
    assert cfg.model.backbone == expected
    receivers = [cfg.model.get(part) for part in ('neck', 'panoptic_head', 'decode_head')]
    assert next(each for each in receivers if each).in_channels == channels


@pytest.mark.parametrize('name', [name for name in PUBLISHED if '_vig_' in name])
def test_plain_backbone_is_the_one_in_the_name(name):
    cfg = load(name)
    arch, width = {'t': ('tiny', 192), 's': ('small', 384), 'b': ('base', 768)}[Path(name).stem[-1]]
    expected = {'type': 'mmvig.ViG', 'arch': arch, 'drop_path_rate': 0.1}
    if name in DETECTION:
        assert cfg.model.backbone == {**expected, 'img_size': 1024}
        assert cfg.model.neck == {'type': 'mmvig.SimpleFPN', 'in_channels': width, 'out_channels': 256}
    else:
        assert cfg.model.backbone == {**expected, 'img_size': 512, 'out_indices': (2, 5, 8, 11)}
        assert cfg.model.neck.embed_dim == cfg.model.auxiliary_head.in_channels == width
        assert cfg.model.decode_head.in_channels == [width] * 4


@pytest.mark.parametrize('name', [name for name in SWINS if name in DETECTION])
def test_detection_recipe(name):
    cfg = load(name)
    epochs, steps = (36, [27, 33]) if '3x' in name else (12, [8, 11])
    warm_up, decay = cfg.param_scheduler
    assert (cfg.train_cfg.type, cfg.train_cfg.max_epochs) == ('EpochBasedTrainLoop', epochs)
    assert (decay.type, decay.milestones, decay.by_epoch) == ('MultiStepLR', steps, True)
    assert decay.gamma == 0.1 and decay.end == epochs
    assert (warm_up.type, warm_up.start_factor, warm_up.end) == ('LinearLR', 0.001, 1000)
    assert not warm_up.by_epoch
    optimizer = cfg.optim_wrapper.optimizer
    assert (optimizer.type, optimizer.lr, optimizer.weight_decay) == ('AdamW', 1e-4, 0.05)
    assert cfg.train_dataloader.dataset.data_root == 'data/coco/'
    assert cfg.val_evaluator.metric == (['bbox', 'segm'] if 'roi_head' in cfg.model else ['bbox'])
    test_resize = cfg.test_dataloader.dataset.pipeline[1]
    assert (test_resize.type, test_resize.scale) == ('Resize', (1333, 800))
    if '3x' in name:
        plain, cropped = cfg.train_dataloader.dataset.pipeline[3].transforms
        assert [scale[0] for scale in plain[0].scales] == [*range(480, 801, 32)]
        assert [step.type for step in cropped] == [
            'RandomChoiceResize',
            'RandomCrop',
            'RandomChoiceResize',
        ]
        assert cropped[1].crop_size == (384, 600)
    else:
        assert cfg.train_dataloader.dataset.pipeline[2] == test_resize


@pytest.mark.parametrize('name', [name for name in SWINS if name in SEGMENTATION])
def test_segmentation_recipe(name):
    cfg = load(name)
    warm_up, decay = cfg.param_scheduler
    assert (cfg.train_cfg.type, cfg.train_cfg.max_iters) == ('IterBasedTrainLoop', 160000)
    assert (decay.type, decay.power, decay.begin, decay.end) == ('PolyLR', 1.0, 1500, 160000)
    assert (warm_up.type, warm_up.begin, warm_up.end) == ('LinearLR', 0, 1500)
    assert not warm_up.by_epoch and not decay.by_epoch
    optimizer = cfg.optim_wrapper.optimizer
    assert (optimizer.type, optimizer.lr, optimizer.weight_decay) == ('AdamW', 6e-5, 0.01)
    assert cfg.train_dataloader.dataset.data_root == 'data/ade/ADEChallengeData2016'
    assert cfg.model.data_preprocessor.size == (512, 512)
    steps = {step.type: step for step in cfg.train_dataloader.dataset.pipeline}
    assert steps['RandomCrop'].crop_size == (512, 512)
    assert steps['RandomResize'].scale == (2048, 512)
    assert steps['RandomResize'].ratio_range == (0.5, 2.0)
    head, auxiliary = cfg.model.decode_head, cfg.model.auxiliary_head
    assert (head.type, auxiliary.type) == ('UPerHead', 'FCNHead')
    assert head.norm_cfg.type == auxiliary.norm_cfg.type == 'SyncBN'
    assert (auxiliary.in_index, auxiliary.loss_decode.loss_weight) == (2, 0.4)


@pytest.mark.parametrize('name', CONFIGS)
def test_checkpoints_and_batch_size(name):
    cfg = load(name)
    checkpoint = cfg.default_hooks.checkpoint
    assert checkpoint.interval > 0 and checkpoint.max_keep_ckpts >= 2
    assert checkpoint.save_best == ('coco/bbox_mAP' if name in DETECTION else 'mIoU')
    by_epoch = cfg.train_cfg.type == 'EpochBasedTrainLoop'
    assert checkpoint.get('by_epoch', True) == cfg.log_processor.by_epoch == by_epoch
    assert not cfg.auto_scale_lr.enable
    batch = 16 if name in PUBLISHED else 8
    assert cfg.auto_scale_lr.base_batch_size == BATCHES.get(Path(name).stem, batch)
    if not by_epoch:
        train_cfg = cfg.train_cfg
        # mmengine saves after the last iteration too, and validates there where a last interval says so.
        assert (
            checkpoint.interval == train_cfg.val_interval or train_cfg.max_iters % checkpoint.interval == 0
        )
        assert checkpoint.get('save_last', True)
        (_, last), *_ = train_cfg.get('dynamic_intervals', [(0, train_cfg.val_interval)])
        assert train_cfg.max_iters % last == 0
        assert cfg.param_scheduler[-1].end == train_cfg.max_iters


@pytest.mark.parametrize('path', sorted(FOLDER.glob('[a-z]*/*.py')), ids=lambda path: path.stem)
def test_the_optimiser_takes_its_step_in_few_launches(path):
    optim_wrapper = Config.fromfile(path).optim_wrapper
    layers = 'LayerDecay' if path.stem.startswith('maskrcnn_vig_') else ''
    assert optim_wrapper.constructor == f'mmvig.{layers}OptimWrapperConstructor'
    assert optim_wrapper.optimizer.fused


@pytest.mark.parametrize('name', ['detection/maskrcnn_vigh_t.py', 'segmentation/upernet_vigh_t.py'])
def test_norms_and_biases_are_not_decayed(name):
    cfg = load(name)
    model = MODELS.build(cfg.model)
    optimizer = build_optim_wrapper(model, cfg.optim_wrapper).optimizer
    decay = {id(p): group['weight_decay'] for group in optimizer.param_groups for p in group['params']}
    assert len(decay) == len(list(model.parameters()))
    assert len(optimizer.param_groups) == 2 and all(group['fused'] for group in optimizer.param_groups)

    norms = (nn.LayerNorm, nn.RMSNorm, nn.modules.batchnorm._BatchNorm)
    seen = set()
    for module in model.modules():
        for key, parameter in module.named_parameters(recurse=False):
            exempt = isinstance(module, norms) or key == 'bias'
            expected = 0.0 if exempt else cfg.optim_wrapper.optimizer.weight_decay
            assert decay[id(parameter)] == expected, f'{type(module).__name__}.{key}'
            seen.add((type(module), key))
    assert {(nn.LayerNorm, 'weight'), (nn.RMSNorm, 'weight'), (nn.Linear, 'bias')} <= seen
    assert {(nn.Conv2d, 'weight'), (nn.Linear, 'weight')} <= seen


def test_pretrained_weights_are_an_option_of_the_command_line():
    cfg = load('detection/maskrcnn_vigh_t.py')
    cfg.merge_from_dict(
        {
            'model.backbone.init_cfg.type': 'Pretrained',
            'model.backbone.init_cfg.checkpoint': 'vig_h_t.pth',
        }
    )
    backbone = MODELS.build(cfg.model.backbone)
    assert backbone.init_cfg == {'type': 'Pretrained', 'checkpoint': 'vig_h_t.pth'}


@pytest.fixture(scope='module')
def shapes_root(tmp_path_factory):
    return str(ensure_shapes(tmp_path_factory.mktemp('data') / 'shapes', num_train=4, num_val=2))


def on_shapes(cfg, loader, root, pipeline=None):
    """Build a loader's data set, and any other data set's pipelines upon the shapes."""
    split = 'train' if loader == 'train_dataloader' else 'val'
    dataset = cfg[loader].dataset
    dataset.data_root = root
    if pipeline is not None:
        dataset.pipeline = pipeline
    if dataset.type == 'CocoDataset':
        dataset.type = 'mmvig.ShapesDetDataset'
        dataset.ann_file = f'annotations/instances_{split}.json'
        dataset.data_prefix = {'img': f'images/{split}/'}
    elif dataset.type == 'ADE20KDataset':
        dataset.update(type='mmvig.ShapesSegDataset', reduce_zero_label=True)
        dataset.data_prefix = {'img_path': f'images/{split}', 'seg_map_path': f'masks/{split}'}
    return DATASETS.build(dataset)


@pytest.mark.parametrize('name', LOADED)
def test_data_pipelines(name, shapes_root):
    np.random.seed(0)  # now and then a random crop holds no object
    cfg = load(name)
    train = on_shapes(cfg, 'train_dataloader', shapes_root)
    count = 10 if 'rtmdet' in name else 4  # the fifth image is the first in a mosaic
    batch = pseudo_collate([train[i % 4] for i in range(count)])
    assert len(train) == 4
    samples = batch['data_samples']
    if cfg.default_scope == 'mmdet':
        for image, sample in zip(batch['inputs'], samples, strict=True):
            truth = sample.gt_instances
            sizes = {tuple(image.shape[1:]), sample.img_shape}
            if has_masks(cfg):
                sizes.add((truth.masks.height, truth.masks.width))
            assert len(sizes) == 1
            assert len(truth) and truth.labels.min() >= 0 and truth.labels.max() < 6
    else:
        labels = torch.cat([sample.gt_sem_seg.data.flatten() for sample in samples]).unique()
        ignored = {255} if 'shapes' not in name else set()
        assert set(labels.tolist()) - ignored <= set(range(cfg.model.decode_head.num_classes))
        assert ignored <= set(labels.tolist()) and len(labels) > 3

    val = on_shapes(cfg, 'val_dataloader', shapes_root)
    assert val[0]['data_samples'].ori_shape == (240, 320)
    views = on_shapes(load(name), 'test_dataloader', shapes_root, cfg.tta_pipeline)[0]
    assert sorted({sample.flip for sample in views['data_samples']}) == [False, True]
    assert len(views['inputs']) == len(views['data_samples']) >= 2


def test_masks_are_polygons_unless_the_loss_reads_them_whole():
    loads = {
        name: load(name).train_dataloader.dataset.pipeline[1] for name in PUBLISHED if name in DETECTION
    }
    with_masks = {name: each.type for name, each in loads.items() if each.get('with_mask')}
    bitmaps = [name for name, kind in with_masks.items() if kind != 'mmvig.LoadAnnotations']
    assert bitmaps == ['detection/mask2former_vigh_s.py'] and len(with_masks) == 10


def test_the_last_epochs_of_rtmdet_have_plain_images(shapes_root):
    cfg = load('detection/rtmdet_vigh_t.py')
    (hook,) = (hook for hook in cfg.custom_hooks if hook.type == 'PipelineSwitchHook')
    assert hook.switch_epoch == 90 == cfg.train_cfg.dynamic_intervals[0][0]
    before = {step.type for step in cfg.train_dataloader.dataset.pipeline}
    after = {step.type for step in hook.switch_pipeline}
    assert after < before and before - after == {'CachedMosaic', 'CachedMixUp'}
    train = on_shapes(cfg, 'train_dataloader', shapes_root, hook.switch_pipeline)
    assert train[0]['inputs'].shape == (3, 640, 640)


@pytest.mark.parametrize('name', [name for name in CONFIGS if name.startswith('segmentation')])
def test_segmentation_has_its_data_preprocessor_where_mmseg_looks_too(name):
    cfg = load(name)
    assert cfg.data_preprocessor == cfg.model.data_preprocessor


def test_roi_layers_work_in_bfloat16():
    cfg = load('detection/maskrcnn_vigh_t_shapes_cpu.py')  # convolutions in bfloat16 are slow on a CPU
    take_few_regions(cfg)
    cfg.model.train_cfg.rcnn.sampler.num = 8
    model = MODELS.build(cfg.model)
    with torch.autocast('cpu', dtype=torch.bfloat16):
        losses = model(**model.data_preprocessor(batch_for(cfg), True), mode='loss')
        loss, _ = model.parse_losses(losses)
    loss.backward()
    gradients = [parameter.grad for parameter in model.roi_head.parameters()]
    assert torch.isfinite(loss) and all(gradient.isfinite().all() for gradient in gradients)
