"""Classifiers: official weights, the published recipe, training and testing by the tools, small data."""

import importlib.util
import json
import logging
import math
import pickle
import sys
from functools import lru_cache
from pathlib import Path
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
import torch
from golden import (
    GOLDEN,
    array,
    official_plain_shapes,
    official_plain_state_dict,
    official_shapes,
    official_state_dict,
    weight,
)
from mmengine.config import Config
from mmengine.model import is_model_wrapper
from mmengine.optim import CosineAnnealingLR, LinearLR, build_optim_wrapper
from mmengine.registry import DefaultScope
from mmengine.runner import load_checkpoint
from mmpretrain import get_model
from mmpretrain.structures import DataSample
from PIL import Image
from programs import run_well
from torch import nn

from mmvig.backbones import ViG, ViGH
from mmvig.engine import cli
from mmvig.engine.preflight import SetupError, check_testing

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / 'configs/classification'
# Published: arch, drop path, parameters, learning rate at batch 512, weight decay.
MODELS_OF = {
    'vigh_t': ('tiny', 0.2, 28_600_680, 8e-4, 0.05),
    'vigh_s': ('small', 0.3, 50_051_688, 5e-4, 0.05),
    'vigh_b': ('base', 0.6, 88_904_360, 5e-4, 0.05),
    'vig_t': ('tiny', 0.0, 5_834_536, 1e-3, 0.05),
    'vig_s': ('small', 0.2, 22_615_144, 5e-4, 0.1),
    'vig_b': ('base', 0.5, 89_022_184, 1e-3, 0.05),
}
# On Tiny-ImageNet's 40 classes.
SMALL_DATA = ('vigh_t', 'swin_t', 'convnext_t')


def load(name):
    return Config.fromfile(FOLDER / f'{name}_in1k.py')


def build(name, **changes):
    cfg = load(name)
    cfg.model.backbone.update(changes)
    with DefaultScope.overwrite_default_scope('mmpretrain'):
        return cli.build_model(cfg).eval()


@lru_cache(maxsize=2)
def golden_weights(name):
    arch = MODELS_OF[name][0]
    return official_state_dict(arch, classifier=True) if 'vigh' in name else official_plain_state_dict(arch)


def official(name):
    """An official classification file's state dict with the golden weights."""
    return dict(golden_weights(name))


def save(content, tmp_path):
    path = tmp_path / 'official.pth'
    torch.save(content, path)
    return str(path)


def loaded(name, tmp_path, content):
    model = build(name)
    cli.load_strictly(model, save(content, tmp_path))
    return model


def test_every_config_is_tested():
    names = {*(f'{name}_in1k' for name in MODELS_OF), *(f'{name}_tin' for name in SMALL_DATA)}
    assert {path.stem for path in FOLDER.glob('*.py')} == names


@pytest.mark.parametrize(
    ('name', 'images', 'shape', 'logits'),
    [
        ('vigh_t', 'inputvig_h_t/cls', (2, 3, 64, 64), 'vig_h_t/cls/logits'),
        ('vig_t', 'inputvig_t/2x3x224x224', (2, 3, 224, 224), 'vig_t/2x3x224x224/eval/logits'),
    ],
)
def test_official_files_give_the_released_codes_logits(tmp_path, name, images, shape, logits):
    model = loaded(name, tmp_path, {'model': official(name)})
    with torch.no_grad():
        found = model(array(images, shape))
    torch.testing.assert_close(found, torch.from_numpy(np.load(GOLDEN)[logits]), atol=5e-4, rtol=0)


def test_official_vigh_s_continues_the_released_codes_features(tmp_path):
    """Of ViG-H-S there are the normalised features: the same norm in the classifier gives its logits."""
    weights = official('vigh_s')
    for leaf in ('weight', 'bias'):
        weights[f'classifier.norm.{leaf}'] = weight(f'outnorm3.{leaf}', (768,))
    model = loaded('vigh_s', tmp_path, {'model': weights})
    features = torch.from_numpy(np.load(GOLDEN)['vig_h_s/1x3x96x64/eval/out3']).mean((2, 3))
    expected = features @ weights['classifier.head.weight'].T + weights['classifier.head.bias']
    with torch.no_grad():
        found = model(array('inputvig_h_s/1x3x96x64', (1, 3, 96, 64)))
    torch.testing.assert_close(found, expected, atol=5e-4, rtol=0)


@pytest.mark.parametrize('name', ['vigh_b', 'vig_s', 'vig_b'])
def test_other_official_files_give_their_backbones_logits(tmp_path, name):
    """Against the backbone, which its own tests hold to the method, and a classifier by hand."""
    family, arch = (ViGH if 'vigh' in name else ViG), MODELS_OF[name][0]
    shapes = official_shapes(arch, classifier=True) if family is ViGH else official_plain_shapes(arch)
    torch.manual_seed(0)
    weights = {key: torch.randn(shape) / math.prod(shape[1:]) ** 0.5 for key, shape in shapes.items()}
    with torch.device('meta'):
        model = build(name)
        backbone = family(arch, out_indices=(3,)) if family is ViGH else family(arch)
    for module in (model, backbone):
        module.to_empty(device='cpu')  # initialisation takes seconds, and the file has every weight
    cli.load_strictly(model, save(weights, tmp_path))
    backbone.load_state_dict(weights)
    images = array('classifier', (1, 3, 64, 96))
    with torch.no_grad():
        features = backbone.eval()(images)[-1].mean((2, 3))
        found = model(images)
    head = family.official_head
    expected = features @ weights[f'{head}.weight'].T + weights[f'{head}.bias']
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize('name', MODELS_OF)
def test_recipe(name):
    arch, drop_path, parameters, base_lr, decay = MODELS_OF[name]
    cfg = load(name)
    backbone = cfg.model.backbone
    assert backbone.type == ('mmvig.ViGH' if 'vigh' in name else 'mmvig.ViG')
    assert (backbone.arch, backbone.drop_path_rate) == (arch, drop_path)
    with torch.device('meta'):
        model = build(name)
    assert sum(p.numel() for p in model.parameters()) == parameters
    optimizer = cfg.optim_wrapper.optimizer
    assert (optimizer.type, optimizer.lr, optimizer.weight_decay) == ('AdamW', 2 * base_lr, decay)
    assert (optimizer.betas, cfg.optim_wrapper.clip_grad) == ((0.9, 0.999), {'max_norm': 5.0})
    assert cfg.train_cfg.max_epochs == 300
    assert cfg.auto_scale_lr == {'enable': False, 'base_batch_size': 8 * cfg.train_dataloader.batch_size}
    assert cfg.train_dataloader.batch_size == 128
    (ema,) = cfg.custom_hooks
    assert (ema.type, ema.momentum) == ('EMAHook', pytest.approx(1 - 0.9999))
    augments = model.data_preprocessor.batch_augments
    assert [(type(each).__name__, each.alpha) for each in augments.augments] == [
        ('Mixup', 0.8),
        ('CutMix', 1.0),
    ]
    assert augments.probs is None  # which is: each as often
    assert (model.head.loss_module.label_smooth_val, model.head.loss_module.mode) == (0.1, 'original')
    for loader, split in (('train_dataloader', 'train'), ('test_dataloader', 'val')):
        assert cfg[loader].dataset.type == 'ImageNet'
        assert (cfg[loader].dataset.data_root, cfg[loader].dataset.split) == ('data/imagenet', split)
    steps = {step.type: step for step in cfg.train_dataloader.dataset.pipeline}
    assert steps['RandomResizedCrop'].scale == 224
    augment, erasing = steps['RandAugment'], steps['RandomErasing']
    assert (augment.policies, augment.magnitude_level, augment.magnitude_std) == ('timm_increasing', 9, 0.5)
    assert (erasing.erase_prob, erasing.mode) == (0.25, 'rand')
    assert cfg.default_hooks.checkpoint.save_best == 'accuracy/top1'


@pytest.mark.parametrize('name', ['vigh_t', 'vigh_b', 'vig_t', 'vig_b'])
def test_learning_rate_warms_up_and_falls_as_published(name):
    """By its formula, in epochs of two iterations."""
    cfg, peak = load(name), 2 * MODELS_OF[name][3]
    optimizer = torch.optim.SGD(nn.Linear(1, 1).parameters(), lr=peak)
    kinds = {'LinearLR': LinearLR, 'CosineAnnealingLR': CosineAnnealingLR}
    schedulers = []
    for scheduler in cfg.param_scheduler:
        options = {key: value for key, value in scheduler.items() if key != 'type'}
        assert options.pop('convert_to_iter_based') is True
        kind = kinds[scheduler.type]
        schedulers.append(kind.build_iter_from_epoch(optimizer, **options, epoch_length=2))
    rates = []
    for _ in range(600):
        rates.append(optimizer.param_groups[0]['lr'])
        optimizer.step()
        for scheduler in schedulers:
            scheduler.step()
    assert rates[0] == pytest.approx(1e-6)
    assert rates[20] == pytest.approx(1e-6 + (peak - 1e-6) * 20 / 39, rel=1e-6)
    assert max(rates) == pytest.approx(peak)
    for i in (60, 320, 500, 599):
        cosine = 1e-5 + (peak - 1e-5) * (1 + math.cos(math.pi * (i - 40) / 560)) / 2
        assert rates[i] == pytest.approx(cosine, rel=1e-3)


@pytest.mark.parametrize('name', ['vigh_t', 'vig_t'])
def test_no_decay_of_one_dimensional_parameters(name):
    cfg = load(name)
    with torch.device('meta'):
        model = build(name)
    with DefaultScope.overwrite_default_scope('mmpretrain'):
        optimizer = build_optim_wrapper(model, cfg.optim_wrapper).optimizer
    decay = {id(p): group['weight_decay'] for group in optimizer.param_groups for p in group['params']}
    names = dict(model.named_parameters())
    assert decay.keys() == {id(p) for p in names.values()}
    wrong = [key for key, p in names.items() if decay[id(p)] != (0.05 if p.ndim > 1 else 0.0)]
    assert wrong == []
    flat = {key.rpartition('.')[2] for key, p in names.items() if p.ndim == 1}
    assert flat == {'weight', 'bias'}
    assert any('norm_long' in key and decay[id(p)] == 0 for key, p in names.items())  # an RMSNorm


SHRINK = """
_base_ = [{base!r}]
model = dict(
    backbone=dict(arch=dict(_delete_=True, embed_dims=32, depths=[1, 1, 1, 1], num_heads=[1, 2, 4, 8])),
    head=dict(in_channels=256),
)
train_cfg = dict(max_epochs=1)
default_hooks = dict(logger=dict(interval=1))
"""
SMALL_LOADERS = [
    f'{split}_dataloader.{option}'
    for split in ('train', 'val', 'test')
    for option in ('batch_size=2', 'num_workers=0', 'persistent_workers=False')
]


@pytest.fixture(scope='module')
def imagenet(tmp_path_factory):
    """Four pictures a split, with annotation files: class folders would have to be a thousand."""
    root = tmp_path_factory.mktemp('imagenet')
    generator = np.random.default_rng(0)
    (root / 'meta').mkdir()
    for split in ('train', 'val'):
        (root / split).mkdir()
        lines = []
        for i, size in enumerate([(301, 400), (260, 270), (430, 300), (96, 64)]):
            # Noise, which every way to resize treats otherwise, over patches.
            patches = cv2.resize(generator.uniform(50, 205, (6, 8, 3)), size[::-1])
            image = (patches + generator.uniform(-50, 50, (*size, 3))).astype(np.uint8)
            cv2.imwrite(str(root / split / f'{i}.png'), image)
            lines.append(f'{i}.png {i}\n')
        (root / f'meta/{split}.txt').write_text(''.join(lines))
    return root


def metrics_of(folder):
    return json.loads(max(folder.glob('*/*.json')).read_text())


def test_a_classifier_trains_and_is_tested(tmp_path, imagenet):
    config = tmp_path / 'small.py'
    config.write_text(SHRINK.format(base=str(FOLDER / 'vigh_t_in1k.py')))
    options = ['--cfg-options', f'data_root={imagenet}', *SMALL_LOADERS]
    run_well('train.py', config, *options, cwd=tmp_path)
    run = tmp_path / 'work_dirs/small'
    (scalars,) = run.glob('*/vis_data/scalars.json')
    records = [json.loads(line) for line in scalars.read_text().splitlines()]
    losses = [record['loss'] for record in records if 'loss' in record]
    assert len(losses) == 2 and all(abs(loss - math.log(1000)) < 0.5 for loss in losses)
    assert records[0]['lr'] == pytest.approx(1e-6)
    assert 'accuracy/top1' in records[-1] and 'accuracy/top5' in records[-1]

    checkpoint = torch.load(run / 'epoch_1.pth', weights_only=False)
    averages, last = checkpoint['state_dict'], checkpoint['ema_state_dict']
    assert any(not torch.equal(averages[key], last[f'module.{key}']) for key in averages)

    cfg = Config.fromfile(config)
    with DefaultScope.overwrite_default_scope('mmpretrain'):
        model = cli.build_model(cfg)
    cli.load_strictly(model, str(run / 'epoch_1.pth'))
    assert all(torch.equal(value, averages[key]) for key, value in model.state_dict().items())


def published_preprocessing(path):
    """Short side to 256 (bicubic), centre crop of 224, ImageNet's mean and deviation, in RGB."""
    image = Image.open(path).convert('RGB')
    short = min(image.size)
    image = image.resize([int(side * 256 / short) for side in image.size], Image.Resampling.BICUBIC)
    left, top = ((side - 224) // 2 for side in image.size)
    pixels = np.asarray(image.crop((left, top, left + 224, top + 224)), dtype=np.float32) / 255
    normalised = (pixels - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]
    return torch.from_numpy(normalised.astype(np.float32)).permute(2, 0, 1)


def test_official_file_by_the_test_tool(tmp_path, imagenet):
    """The whole way of the published accuracy: the file, the pictures, the logits, the count."""
    weights = official('vigh_t')
    backbone = ViGH('tiny', out_indices=(3,)).eval()
    backbone.load_state_dict(weights)
    images = torch.stack([published_preprocessing(imagenet / f'val/{i}.png') for i in range(4)])
    with torch.no_grad():
        features = backbone(images)[0].mean((2, 3))
    logits = features @ weights['classifier.head.weight'].T + weights['classifier.head.bias']
    expected = logits.argmax(1).tolist()

    # Right for all but the last, whose label is far from the first five.
    data = tmp_path / 'imagenet'
    (data / 'meta').mkdir(parents=True)
    (data / 'val').symlink_to(imagenet / 'val')
    labels = [*expected[:3], logits[3].argmin().item()]
    lines = [f'{i}.png {label}\n' for i, label in enumerate(labels)]
    (data / 'meta/val.txt').write_text(''.join(lines))

    path = save({'model': {f'module.{key}': value for key, value in weights.items()}}, tmp_path)
    flags = ['--out', 'found.pkl', '--show-dir', 'shown', '--work-dir', 'tested']
    options = ['--cfg-options', f'data_root={data}', *SMALL_LOADERS]
    run_well('test.py', FOLDER / 'vigh_t_in1k.py', path, *flags, *options, cwd=tmp_path)
    metrics = metrics_of(tmp_path / 'tested')
    assert (metrics['accuracy/top1'], metrics['accuracy/top5']) == (75.0, 75.0)
    found = pickle.loads((tmp_path / 'found.pkl').read_bytes())
    scores = torch.stack([sample['pred_score'] for sample in found])
    torch.testing.assert_close(scores, logits.softmax(1), rtol=1e-3, atol=1e-6)
    assert [sample['pred_label'].item() for sample in found] == expected
    assert len(list((tmp_path / 'shown').glob('*.png'))) == 4


class Malicious:
    def __reduce__(self):
        return print, ('code ran',)


@pytest.mark.parametrize(
    ('change', 'message'),
    [
        (lambda w: w.pop('classifier.head.weight'), r'Missing key.*head\.fc\.weight'),
        (lambda w: w.pop('classifier.norm.bias'), r'Missing key.*backbone\.norm3\.bias'),
        (
            lambda w: w.pop('layers.2.blocks.1.op.o_proj.weight'),
            r'Missing key.*backbone\.stages\.2\..*\.mixer\.out',
        ),
        (lambda w: w.update(extra=torch.zeros(1)), r'Unexpected key.*backbone\.extra'),
        (lambda w: w.update({'classifier.head.bias': torch.zeros(9)}), r'size mismatch for head\.fc\.bias'),
        (lambda w: w.update(bad=Malicious()), 'cannot be read as a checkpoint of tensors'),
    ],
)
def test_what_does_not_fit_is_named_in_one_line(tmp_path, capsys, change, message):
    weights = official('vigh_t')
    change(weights)
    with pytest.raises(SetupError, match=message) as error:
        loaded('vigh_t', tmp_path, {'model': weights})
    assert len(str(error.value)) < 600 and '\n' not in str(error.value)
    assert 'code ran' not in capsys.readouterr().out


def test_an_official_file_of_another_size_is_refused(tmp_path):
    with pytest.raises(SetupError, match=r'Missing key.*backbone\.stages\.2\.blocks\.5'):
        loaded('vigh_s', tmp_path, official('vigh_t'))


def test_the_test_tool_says_what_does_not_fit(tmp_path, imagenet, monkeypatch, capsys):
    weights = official('vig_t')
    del weights['head.bias']
    path = save(weights, tmp_path)
    spec = importlib.util.spec_from_file_location('test_tool', ROOT / 'tools/test.py')
    tool = importlib.util.module_from_spec(spec)
    monkeypatch.setattr(sys, 'path', list(sys.path))
    spec.loader.exec_module(tool)
    arguments = [str(FOLDER / 'vig_t_in1k.py'), path, '--cfg-options', f'data_root={imagenet}']
    monkeypatch.setattr(sys, 'argv', ['test.py', *arguments])
    monkeypatch.setattr(logging.getLogger('mmvig'), 'handlers', [])
    monkeypatch.setattr(cli, 'build_runner', lambda _: SimpleNamespace(model=build('vig_t')))
    with pytest.raises(SystemExit, match=r'^2$'):
        tool.main()
    written = capsys.readouterr().err  # also of handlers that hold an earlier test's closed stream
    (line,) = [each for each in written.splitlines() if each.startswith('error: ')]
    assert line.startswith(f'error: checkpoint {path} cannot be loaded') and 'head.fc.bias' in line


def test_mmengine_and_wrapped_models_load_official_files(tmp_path):
    weights = official('vig_t')
    expected = loaded('vig_t', tmp_path, weights).state_dict()
    path = save({'model_ema': weights}, tmp_path)
    model = build('vig_t')
    load_checkpoint(model, path, strict=True)
    wrapped = nn.DataParallel(build('vig_t'))
    assert is_model_wrapper(wrapped)
    cli.load_strictly(wrapped, path)
    for key, value in expected.items():
        assert torch.equal(model.state_dict()[key], value), key
        assert torch.equal(wrapped.module.state_dict()[key], value), key


def test_our_own_names_stay(tmp_path):
    model = build('vig_t', drop_path_rate=0.1)
    path = save({'state_dict': model.state_dict()}, tmp_path)
    other = build('vig_t')
    cli.load_strictly(other, path)
    for key, value in model.state_dict().items():
        assert torch.equal(other.state_dict()[key], value), key


@pytest.mark.parametrize('missing', ['', 'val', 'meta/val.txt'])
def test_missing_imagenet_is_asked_for(tmp_path, monkeypatch, missing):
    monkeypatch.chdir(tmp_path)
    cfg = load('vigh_t')
    cfg.load_from = save({}, tmp_path)
    if missing:
        (tmp_path / 'data/imagenet').mkdir(parents=True)
    if missing == 'meta/val.txt':  # class folders then: not missing
        (tmp_path / 'data/imagenet/val').mkdir()
        check_testing(cfg)
        return
    with pytest.raises(SetupError, match=r'image-net\.org') as error:
        check_testing(cfg)
    assert str(tmp_path / 'data/imagenet' / missing) in str(error.value)


def test_peers_on_small_data_differ_in_the_backbone_alone():
    recipes = [Config.fromfile(FOLDER / f'{name}_tin.py') for name in SMALL_DATA]
    assert len({recipe.model.backbone.type for recipe in recipes}) == 3
    assert {recipe.model.backbone.drop_path_rate for recipe in recipes} == {0.1}
    for recipe in recipes:
        del recipe.model['backbone'], recipe.model['neck']  # ConvNeXt averages by itself
    assert recipes[0].to_dict() == recipes[1].to_dict() == recipes[2].to_dict()
    assert recipes[0].model.head.num_classes == recipes[0].data_preprocessor.num_classes == 40


@pytest.mark.parametrize('name', ['vigh_t', 'vig_t'])
def test_a_data_preprocessor_at_the_top_of_a_config_is_the_models(name, tmp_path):
    """As in mmpretrain's own configs."""
    text = f'_base_ = {str(FOLDER / f"{name}_in1k.py")!r}\ndata_preprocessor = dict(num_classes=7)\n'
    (tmp_path / 'mine.py').write_text(text)
    cfg = Config.fromfile(tmp_path / 'mine.py')
    with DefaultScope.overwrite_default_scope('mmpretrain'):
        ours = cli.build_model(Config(cfg.to_dict()))
    for model in (ours, get_model(cfg)):
        assert (model.data_preprocessor.num_classes, model.data_preprocessor.to_rgb) == (7, True)
        assert model.data_preprocessor.mean.flatten().tolist() == pytest.approx([123.675, 116.28, 103.53])


@pytest.mark.parametrize('name', SMALL_DATA[1:])  # the tool trains ViG-H below
def test_a_peer_on_small_data_trains_a_step(name):
    torch.manual_seed(0)
    cfg = Config.fromfile(FOLDER / f'{name}_tin.py')
    with DefaultScope.overwrite_default_scope('mmpretrain'):
        model = cli.build_model(cfg).train()
    sizes = {cfg.train_dataloader.dataset.pipeline[1].scale, *cfg.test_dataloader.dataset.pipeline[1].scale}
    (side,) = sizes
    samples = [DataSample().set_gt_label(label) for label in (3, 39)]
    batch = {'inputs': torch.randint(0, 256, (2, 3, side, side)), 'data_samples': samples}
    loss = model(**model.data_preprocessor(batch, True), mode='loss')['loss']
    assert abs(loss.item() - math.log(40)) < 1
    loss.backward()
    assert [key for key, value in model.named_parameters() if value.grad is None] == []


def test_a_classifier_of_small_data_starts_a_detectors_backbone(tmp_path, imagenet):
    """Trained on class folders by the tool; its checkpoint, as it is, in ``init_cfg``."""
    for split in ('train', 'val'):
        for i in range(4):
            folder = tmp_path / f'data/tin40/{split}/n{i % 2}'
            folder.mkdir(parents=True, exist_ok=True)
            (folder / f'{i}.png').symlink_to(imagenet / f'{split}/{i}.png')
    config = tmp_path / 'small.py'
    config.write_text(SHRINK.format(base=str(FOLDER / 'vigh_t_tin.py')))
    schedule = ['train_cfg.val_interval=1', 'param_scheduler.0.end=1', 'param_scheduler.1.begin=0']
    run_well('train.py', config, '--cfg-options', *SMALL_LOADERS, *schedule, cwd=tmp_path)
    run = tmp_path / 'work_dirs/small'
    (scalars,) = run.glob('*/vis_data/scalars.json')
    assert 'accuracy/top1' in json.loads(scalars.read_text().splitlines()[-1])

    path = str(run / 'epoch_1.pth')
    arch = dict(Config.fromfile(config).model.backbone.arch)
    backbone = ViGH(arch, init_cfg={'type': 'Pretrained', 'checkpoint': path})
    backbone.init_weights()
    trained = torch.load(path, weights_only=False)['state_dict']
    own = backbone.state_dict()
    without = {key for key in own if f'backbone.{key}' not in trained}
    assert without == {f'norm{i}.{leaf}' for i in range(3) for leaf in ('weight', 'bias')}
    assert all(torch.equal(own[key], trained[f'backbone.{key}']) for key in own.keys() - without)
