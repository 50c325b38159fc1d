"""ONNX and torch.export of backbones, classifiers, UperNet and detectors, through the command line."""

import importlib
import importlib.util
import logging
import sys
from pathlib import Path

import cv2
import onnx
import onnxruntime
import pytest
import small_detectors
import torch
from mmengine.config import Config
from mmengine.model import revert_sync_batchnorm
from mmengine.registry import MODELS, DefaultScope
from torch import nn

from mmvig.backbones import ViG, mixer
from mmvig.deploy.check import predict, read_pictures
from mmvig.deploy.comparison import Detections, compare

ROOT = Path(__file__).resolve().parents[1]
BACKBONE = """
arch = dict(embed_dims=32, depths=[1, 1], num_heads=[1, 2])
model = dict(type='mmvig.ViGH', arch=arch, in_channels=4, out_indices=(0, 1))
"""
PLAIN = "model = dict(type='mmvig.ViG', arch=dict(embed_dims=32, depth=1, num_heads=1))\n"
CLASSIFIER = f"""
_base_ = [{str(ROOT / 'configs/classification/vig_t_in1k.py')!r}]
model = dict(
    backbone=dict(arch=dict(_delete_=True, embed_dims=32, depth=1, num_heads=1, conv_act=True)),
    head=dict(num_classes=10, in_channels=32),
)
"""
# Two of four scales, which test_pooling_is_pytorchs has all, and two of four stages.
UPERNET = f"""
_base_ = [{str(ROOT / 'configs/segmentation/upernet_vigh_t_shapes.py')!r}]
arch = dict(_delete_=True, embed_dims=32, depths=[1, 1], num_heads=[1, 2])
model = dict(
    backbone=dict(arch=arch, out_indices=(0, 1)),
    decode_head=dict(in_channels=[32, 64], in_index=[0, 1], channels=16, pool_scales=(1, 3)),
    auxiliary_head=dict(in_channels=64, in_index=1, channels=16),
)
"""
MASK_RCNN = f"""
_base_ = [{str(ROOT / 'configs/detection/maskrcnn_vigh_t_shapes_cpu.py')!r}]
arch = dict(_delete_=True, embed_dims=32, depths=[1, 1], num_heads=[1, 2])
model = dict(backbone=dict(arch=arch, out_indices=(0, 1)))
"""
RETINANET = MASK_RCNN.replace('maskrcnn_vigh_t_shapes_cpu', 'retinanet_vigh_t')
SOFT_NMS = f"{MASK_RCNN}model['test_cfg'] = dict(rcnn=dict(nms=dict(type='soft_nms')))"
DUAL = f"""{UPERNET}
head = dict(type='DAHead', in_channels=64, in_index=1, channels=16, pam_channels=4, num_classes=7)
model['decode_head'] = dict(_delete_=True, **head)
"""
READ = [dict(type='LoadImageFromFile')]


@pytest.fixture(scope='module')
def export():
    """The tool as a module, so that what it makes once for all models is made once here."""
    spec = importlib.util.spec_from_file_location('export_onnx', ROOT / 'tools/export_onnx.py')
    module = importlib.util.module_from_spec(spec)
    path = list(sys.path)
    spec.loader.exec_module(module)
    sys.path[:] = path
    with pytest.MonkeyPatch.context() as patch:
        # Steps for 128 * 2^2 tokens, enough here and soon traced; tests/ops exports all of them.
        patch.setattr(importlib.import_module('mmvig.ops.bigla.chunked'), 'TRACED_STEPS', 2)
        yield module


@pytest.fixture(autouse=True)
def quiet(monkeypatch):
    """Keep torch's structured trace, thousands of records, from pytest's capture."""
    monkeypatch.setattr(logging.getLogger('torch.__trace'), 'propagate', False)


@pytest.fixture
def tool(export, run_main, monkeypatch, tmp_path):
    """Run the tool in an empty folder with a config's text: (exit status, output, errors)."""
    monkeypatch.chdir(tmp_path)

    def run(config, *arguments):
        if isinstance(config, str):
            (tmp_path / 'cfg.py').write_text(config)
            config = 'cfg.py'
        return run_main(export, config, *arguments)

    return run


def build(text, scope, tmp_path):
    """A config's model with weights that no initialisation gives, saved as a training checkpoint."""
    (tmp_path / 'cfg.py').write_text(text)
    cfg = Config.fromfile(tmp_path / 'cfg.py').model
    with DefaultScope.overwrite_default_scope(scope):
        model = revert_sync_batchnorm(MODELS.build(cfg)).eval()
    torch.manual_seed(1)
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.running_mean.normal_()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2 if parameter.ndim > 1 else 0.5)
    torch.save({'meta': {}, 'state_dict': model.state_dict()}, tmp_path / 'it.pth')
    return model


def opened(path):
    """An ONNX file as a function."""
    session = onnxruntime.InferenceSession(path, providers=['CPUExecutionProvider'])
    names = [output.name for output in session.get_outputs()]

    def run(images, **more):
        inputs = {name: x.numpy() for name, x in dict(more, images=images).items()}
        return dict(zip(names, session.run(None, inputs), strict=True))

    return run


def run_onnx(path, images):
    return opened(path)(images)


def domains(path):
    """Of the operators in an ONNX file, which has no functions of its own."""
    model = onnx.load(path)
    onnx.checker.check_model(model)
    assert not model.functions
    return {node.domain for node in model.graph.node} | {opset.domain for opset in model.opset_import}


def test_random_weights_show_an_error_of_bigla(export, monkeypatch):
    cfg = Config.fromfile(ROOT / 'configs/classification/vigh_t_in1k.py')
    cfg.model.backbone.arch = dict(embed_dims=32, depths=[1, 1, 1, 1], num_heads=[1, 2, 4, 8])
    cfg.model.head.in_channels = 256
    model = export.build(cfg, None, False, onnx=False)
    images = export.samples(model, (64, 64))
    good = [export.listed(model(x)) for x in images]
    found = iter(good)
    export.check(model, lambda _: next(found), images)
    real = mixer.bigla_packed  # times -1, since what comes after it is the same for all positive factors
    monkeypatch.setattr(mixer, 'bigla_packed', lambda *args, **options: -real(*args, **options))
    found = iter(good)
    with pytest.raises(export.SetupError, match='nothing was written'):
        export.check(model, lambda _: next(found), images, 5e-2)


def test_backbone_of_four_channels_to_onnx(tool, tmp_path):
    model = build(BACKBONE, None, tmp_path)
    status, said, errors = tool(BACKBONE, 'it.pth', '--out', 'b.onnx', '--shape', '64', '48')
    assert (status, said[-1]) == (0, 'b.onnx'), errors
    assert [line.partition(':')[0] for line in said[:3]] == ['2 x 64 x 48', '1 x 42 x 60', '3 x 33 x 33']
    assert domains('b.onnx') == {''}
    # Sizes that the tool did not check, one of them with many chunks of tokens, one with a single image.
    for shape in ((1, 4, 100, 77), (4, 4, 33, 200), (2, 4, 64, 64)):
        images = torch.randn(shape)
        found = run_onnx('b.onnx', images)
        with torch.no_grad():
            expected = model(images)
        assert list(found) == ['map0', 'map1']
        for x, y in zip(found.values(), expected, strict=True):
            torch.testing.assert_close(torch.from_numpy(x), y, atol=1e-4, rtol=1e-4)


def test_classifier_to_onnx(tool, tmp_path):
    model = build(CLASSIFIER, 'mmpretrain', tmp_path)
    status, said, errors = tool(CLASSIFIER, 'it.pth', '--out', 'c.onnx', '--shape', '96', '64')
    assert (status, said[-1]) == (0, 'c.onnx'), errors
    images = torch.randn(3, 3, 77, 118)
    with torch.no_grad():
        expected = model(images)
    found = run_onnx('c.onnx', images)
    torch.testing.assert_close(torch.from_numpy(found['logits']), expected, atol=1e-4, rtol=1e-4)


def test_upernet_to_onnx(tool, tmp_path):
    model = build(UPERNET, 'mmseg', tmp_path)
    status, said, errors = tool(UPERNET, 'it.pth', '--out', 'u.onnx', '--shape', '64', '96')
    assert (status, said[-1]) == (0, 'u.onnx'), errors
    images = torch.randn(1, 3, 101, 70)
    meta = dict(ori_shape=(101, 70), img_shape=(101, 70), pad_shape=(101, 70))
    with torch.no_grad():
        expected = model.encode_decode(images, [meta])
    found = run_onnx('u.onnx', images)
    logits = torch.from_numpy(found['logits'])
    assert logits.shape == (1, 7, 101, 70)
    torch.testing.assert_close(logits, expected, atol=1e-3, rtol=1e-3)
    assert found['labels'].shape == (1, 101, 70)
    assert (torch.from_numpy(found['labels']) != expected.argmax(1)).float().mean() < 1e-3


def detector(config):
    """A detector with random weights, its config and checkpoint in files."""
    model = small_detectors.build(config)
    Config(dict(default_scope='mmdet', test_pipeline=READ, model=config)).dump('d.py')
    torch.save({'meta': {}, 'state_dict': model.state_dict()}, 'it.pth')
    return model


def compare_detections(model, run, sizes):
    """In the pixels of what a detector takes, and of the pictures as they were."""
    count = 0
    for picture, size in zip(read_pictures(None, []), sizes, strict=True):
        for own in (False, True):
            images, expected = predict(model, picture, size, own)
            more = {'size': torch.tensor(picture.shape[:2])} if own else {}
            found = map(torch.from_numpy, run(images, **more).values())
            count += compare(Detections(*found), expected).count
    return count


def test_mask_rcnn_to_onnx(tool):
    config = small_detectors.config('mask_rcnn')
    config.test_cfg.rcnn.score_thr = 0.276  # above what it finds where there is nothing
    model = detector(config)
    cv2.imwrite('picture.png', read_pictures(None, [])[0])
    arguments = '--out', 'd.onnx', '--shape', '64', '96', '--pictures', 'picture.png'
    status, said, errors = tool(Path('d.py'), 'it.pth', *arguments)
    assert (status, said[-1]) == (0, 'd.onnx'), errors
    assert [line.partition(':')[0] for line in said[-5:-2]] == [
        '1 x 64 x 96',
        '1 x 42 x 120',
        '1 x 33 x 34',
    ]
    assert domains('d.onnx') == {''}
    run = opened('d.onnx')
    assert compare_detections(model, run, [(120, 160), (97, 200), (64, 64)]) >= 5
    found = run(torch.zeros(1, 3, 64, 64))
    assert [x.shape for x in found.values()] == [(0, 4), (0,), (0,), (0, 64, 64)]


def test_detr_to_onnx(tool):
    config = small_detectors.config('detr')
    config.backbone.update(arch=dict(embed_dims=32, depths=[1], num_heads=[1]), out_indices=(0,))
    config.neck.in_channels = [32]
    model = detector(config)
    status, said, errors = tool(Path('d.py'), 'it.pth', '--out', 'd.onnx', '--shape', '64', '96')
    assert (status, said[-1]) == (0, 'd.onnx'), errors
    assert domains('d.onnx') == {''}
    assert compare_detections(model, opened('d.onnx'), [(120, 160), (97, 200), (33, 64)]) == 120


def test_backbone_of_any_model_by_torch_export(tool, export, tmp_path, monkeypatch):
    model = build(PLAIN, None, tmp_path)
    text = CLASSIFIER.replace(', conv_act=True', '')
    detector = {f'backbone.{key}': value for key, value in model.state_dict().items()}
    torch.save({'state_dict': {**detector, 'head.fc.weight': torch.zeros(1)}}, 'it.pth')
    load, loaded = torch.export.load, []
    monkeypatch.setattr(torch.export, 'load', lambda file: loaded.append(load(file)) or loaded[0])
    status, said, errors = tool(text, 'it.pth', '--backbone', '--out', 'p.pt2', '--shape', '64', '96')
    assert (status, said[-1]) == (0, 'p.pt2'), errors
    assert Path('p.pt2').stat().st_size > 0
    images = torch.randn(1, 3, 85, 64)
    with torch.no_grad():
        (expected,) = model(images)
        (found,) = loaded[0].module()(images)  # from the bytes that were written; loading takes seconds
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(('height', 'width'), [(2, 3), (7, 13), (30, 6)])
@pytest.mark.parametrize('size', [1, 2, 3, 6, (4, 5)])
def test_pooling_is_pytorchs(export, height, width, size):
    pool, x = nn.AdaptiveAvgPool2d(size), torch.randn(2, 3, height, width)
    torch.testing.assert_close(export._adaptive_average(pool, x), pool(x))


def test_upsampling_by_mmseg_is_traced_for_all_sizes(export):
    from mmseg.models.utils import Upsample

    layer = Upsample(scale_factor=2, mode='bilinear', align_corners=False)
    sides = {i: torch.export.Dim(f'side{i}', min=2, max=99) for i in (2, 3)}
    with export._traceable():
        program = torch.export.export(layer, (torch.rand(1, 3, 8, 8),), dynamic_shapes=(sides,))
        assert Upsample(size=(4, 5))(torch.rand(1, 3, 2, 2)).shape[2:] == (4, 5)
    x = torch.rand(1, 3, 5, 9)
    torch.testing.assert_close(program.module()(x), layer(x))


def test_a_wrong_export_is_not_written(tool, export, monkeypatch):
    """Beyond the traced size alone: a model whose output is off only there."""
    monkeypatch.setattr(export, 'to_onnx', lambda *_: b'')

    build, built = export.build, []

    def watched(*arguments):
        built.append(build(*arguments))
        return built[0]

    def run(images):
        return [x + (0.1 if images.shape[2] != 64 else 0) for x in built[0](images)]

    monkeypatch.setattr(export, 'build', watched)
    monkeypatch.setattr(export, 'run_onnx', lambda _: run)
    status, said, (line,) = tool(BACKBONE, '--out', 'b.onnx', '--shape', '64', '48')
    assert any(said_line.startswith('2 x 64 x 48: differs from PyTorch by 0.0') for said_line in said)
    assert status == 2 and 'differs from PyTorch by' in line and 'nothing was written' in line
    assert not Path('b.onnx').exists()


@pytest.mark.parametrize(
    ('config', 'arguments', 'message'),
    [
        ('no.py', ['--out', 'a.onnx'], 'config is missing'),
        (MASK_RCNN, ['--out', 'a.pt2'], 'is a detector, which is exported as .onnx'),
        (DUAL, ['--out', 'a.onnx'], 'decode_head is a DAHead'),
        (
            RETINANET,
            ['--out', 'a.onnx', '--shape', '128', '256'],
            'at least 129 and up to 16384, got 128 256',
        ),
        (SOFT_NMS, ['--out', 'a.onnx'], "test_cfg.rcnn: exported is nms=dict(type='nms'"),
        (MASK_RCNN, ['--out', 'a.onnx', '--pictures', 'no.png'], 'no.png cannot be read'),
        (BACKBONE, ['--out', 'a.onnx', '--pictures', 'no.png'], '--pictures are for detectors'),
        (BACKBONE, ['--out', 'a.onnx', '--backbone'], 'has none'),
        ('a = 1', ['--out', 'a.onnx'], 'has no model to export'),
        (BACKBONE, ['--out', 'nowhere/a.onnx'], 'there is no folder'),
        (BACKBONE, ['--out', 'a.pth'], 'must end in .onnx or .pt2'),
        (BACKBONE, ['--out', 'a.onnx', '--shape', '32', '64'], 'at least 33 and up to 16384, got 32 64'),
        (BACKBONE, ['--out', 'a.onnx', '--opset', '17'], 'from 18 to 23, got 17'),
        (BACKBONE, ['--out', 'a.onnx', '--opset', '30'], 'from 18 to 23, got 30'),
        (BACKBONE, ['--out', 'a.pt2', '--opset', '20'], '--opset is for .onnx files'),
        (BACKBONE, ['--out', 'folder.onnx'], 'must be a file, and is a folder'),
        (BACKBONE, ['--out', 'broken.pth/a.onnx'], 'broken.pth is a file, not a folder'),
        (BACKBONE, ['no.pth', '--out', 'a.onnx'], 'no.pth'),
        (BACKBONE, ['other.pth', '--out', 'a.onnx'], 'is it of another arch'),
        (BACKBONE, ['broken.pth', '--out', 'a.onnx'], 'cannot be read as a checkpoint'),
    ],
)
def test_what_cannot_be_exported(tool, tmp_path, config, arguments, message):
    torch.save(ViG(dict(embed_dims=32, depth=1, num_heads=1)).state_dict(), tmp_path / 'other.pth')
    (tmp_path / 'broken.pth').write_bytes(b'not a checkpoint')
    (tmp_path / 'folder.onnx').mkdir()
    status, _, lines = tool(Path(config) if config == 'no.py' else config, *arguments)
    # What a library says at its first use in this process may come before.
    errors = [line for line in lines if line.startswith('error: ')]
    assert status == 2 and len(errors) == 1 and message in errors[0], lines
    assert not list(tmp_path.glob('**/a.*'))


def test_missing_packages_are_named(tool, export, monkeypatch):
    found = importlib.util.find_spec

    def find(name):
        return None if name in ('onnxruntime', 'onnxscript') else found(name)

    monkeypatch.setattr(export.importlib.util, 'find_spec', find)
    status, _, (line,) = tool(BACKBONE, '--out', 'a.onnx')
    assert status == 2 and line.endswith('pip install onnxruntime onnxscript')


def test_what_cannot_be_written_leaves_what_was_there(tool, export, monkeypatch):
    def no_space(*_):
        raise OSError('No space left on device')

    Path('a.onnx').write_text('old')
    monkeypatch.setattr(export, 'to_onnx', lambda *_: b'new')
    monkeypatch.setattr(export, 'check', lambda *_: None)
    monkeypatch.setattr(export, 'run_onnx', lambda _: None)
    monkeypatch.setattr('os.fsync', no_space)
    status, _, (line,) = tool(BACKBONE, '--out', 'a.onnx')
    assert status == 2 and 'No space left' in line
    assert Path('a.onnx').read_text() == 'old' and len(list(Path().glob('*.onnx*'))) == 1
