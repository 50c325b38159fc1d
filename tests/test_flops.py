"""Multiply-adds against the published figures, and against a count of layer by layer through hooks."""

import importlib.util
import sys
from pathlib import Path

import pytest
import torch
import yaml
from torch import nn

from mmvig.backbones import ViG, ViGH
from mmvig.backbones.mixer import GatedTokenMixer

ROOT = Path(__file__).resolve().parents[1]
MASK_RCNN = ROOT / 'configs/detection/maskrcnn_vigh_t_shapes_cpu.py'
UPERNET = ROOT / 'configs/segmentation/upernet_vigh_t_shapes.py'
CLASSIFIER = """
default_scope = 'mmpretrain'
model = dict(
    type='ImageClassifier',
    backbone=dict(type='mmvig.ViG', arch=dict(embed_dims=32, depth=2, num_heads=2)),
    neck=dict(type='GlobalAveragePooling'),
    head=dict(type='LinearClsHead', num_classes=10, in_channels=32),
)
"""
BACKBONE = """
arch = dict(embed_dims=32, depths=[1, 1], num_heads=[1, 2])
model = dict(type='mmvig.ViGH', arch=arch, out_indices=(0, 1))
"""


@pytest.fixture(scope='module')
def flops():
    spec = importlib.util.spec_from_file_location('get_flops', ROOT / 'tools/analysis/get_flops.py')
    module = importlib.util.module_from_spec(spec)
    path = list(sys.path)
    spec.loader.exec_module(module)
    sys.path[:] = path
    return module


@pytest.mark.parametrize(
    ('backbone', 'arch', 'published'),
    [
        (ViGH, 'tiny', 4.49),
        (ViGH, 'small', 8.75),
        (ViGH, 'base', 15.56),
        (ViG, 'tiny', 1.17),
        (ViG, 'small', 4.48),
        (ViG, 'base', 17.55),
    ],
)
def test_published_figures(flops, backbone, arch, published):
    """To the last digit that was published."""
    model = backbone(arch)
    row = flops.count(model, torch.zeros(1, 3, 224, 224))['total']
    assert row['macs'] / 1e9 == pytest.approx(published, abs=0.0051)
    assert row['params'] == sum(parameter.numel() for parameter in model.parameters())


def test_cost_is_linear_in_the_tokens(flops):
    model = ViGH(dict(embed_dims=32, depths=[1, 1], num_heads=[1, 2]), out_indices=(0, 1))
    one, four = (flops.count(model, torch.zeros(1, 3, side, side))['total']['macs'] for side in (64, 128))
    assert four == 4 * one
    assert flops.count(model, torch.zeros(3, 3, 64, 64))['total']['macs'] == 3 * one


class LayerByLayer:
    """The sum over convolutions, linear layers and mixers, from the shapes that pass through them."""

    def __init__(self, model):
        self.macs = 0
        for module in model.modules():
            if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d, nn.Linear, GatedTokenMixer)):
                module.register_forward_hook(self.add)

    def add(self, module, inputs, output):
        if isinstance(module, nn.Linear):
            self.macs += output.numel() * module.in_features
        elif isinstance(module, GatedTokenMixer):
            channels = output.shape[-1]
            heads, tokens = module.num_heads, output.numel() // channels
            self.macs += tokens * heads * 4 * (channels // 2 // heads) * (channels // heads)
        else:
            places = inputs[0] if isinstance(module, nn.ConvTranspose2d) else output
            per_place = module.weight[0].numel()
            self.macs += places.numel() * per_place


def parameters(module):
    return sum(parameter.numel() for parameter in module.parameters())


@pytest.mark.parametrize(
    ('config', 'shape', 'unused'),
    [
        (MASK_RCNN, (96, 128), []),
        (UPERNET, (64, 96), ['auxiliary_head']),
        (CLASSIFIER, (96, 64), []),
        (BACKBONE, None, ['norm0', 'norm1']),
    ],
    ids=['Mask R-CNN', 'UperNet', 'classifier', 'backbone'],
)
def test_whole_models(flops, monkeypatch, tmp_path, config, shape, unused):
    if isinstance(config, str):
        (tmp_path / 'cfg.py').write_text(config)
        config = tmp_path / 'cfg.py'
    seen = []
    count = flops.count

    def watched(model, *inputs, **options):
        seen.extend([model, LayerByLayer(model)])
        return count(model, *inputs, **options)

    monkeypatch.setattr(flops, 'count', watched)
    rows, found_shape = flops.count_config(str(config), shape)
    model, expected = seen
    assert found_shape == (shape or (224, 224))
    total = rows.pop('total')
    assert total == {'params': parameters(model), 'macs': expected.macs}
    assert {name: row['params'] for name, row in rows.items()} == {
        name: parameters(child) for name, child in model.named_children() if parameters(child)
    }
    assert sum(row['macs'] for row in rows.values()) == total['macs']
    assert [name for name, row in rows.items() if row['macs'] == 0] == unused


@pytest.mark.parametrize(
    ('name', 'shape', 'times'),
    [
        ('segmentation/segformer_vigh_t', (128, 512), 16),
        ('segmentation/semfpn_vigh_t', (128, 512), 16),
        ('detection/rtmdet_vigh_t', (160, 256), 25),
    ],
)
def test_figures_of_the_model_zoo(flops, name, shape, times):
    """Of models all of whose cost grows with the image, counted on a part of it."""
    metafile = yaml.safe_load((ROOT / 'configs' / Path(name).parent / 'metafile.yml').read_text())
    (entry,) = (each for each in metafile['Models'] if each['Config'] == f'configs/{name}.py')
    rows, _ = flops.count_config(str(ROOT / entry['Config']), shape)
    assert entry['Metadata']['FLOPs'] / 1e9 == pytest.approx(
        times * rows['total']['macs'] / 1e9, abs=0.0051
    )


def test_regions_of_a_cascade(flops, tmp_path):
    """1000 through each box head and 100 through each mask head, of narrow ones."""
    base = str(ROOT / 'configs/detection/cascade_maskrcnn_vigh_s_3x_ms.py')
    (tmp_path / 'cfg.py').write_text(f"""
_base_ = [{base!r}]
heads = _base_.model.roi_head.bbox_head
for head in heads:
    head.update(conv_out_channels=16, fc_out_channels=32, num_shared_convs=1)
model = dict(
    backbone=dict(arch=dict(_delete_=True, embed_dims=32, depths=[1, 1, 1, 1], num_heads=[1, 2, 4, 8])),
    neck=dict(in_channels=[32, 64, 128, 256]),
    roi_head=dict(bbox_head=heads, mask_head=dict(num_convs=1, conv_out_channels=16)),
)
""")
    rows, _ = flops.count_config(str(tmp_path / 'cfg.py'), (64, 96))
    box = 49 * 256 * 16 * 9 + 49 * 16 * 32 + 32 * (81 + 320)
    mask = 196 * 256 * 16 * 9 + 196 * 16 * 16 * 4 + 784 * 16 * 80
    assert rows['roi_head']['macs'] == 3 * (1000 * box + 100 * mask)


def test_segmentor_with_a_head_of_mmdets(flops, tmp_path):
    base = str(ROOT / 'configs/segmentation/mask2former_vigh_s.py')
    (tmp_path / 'cfg.py').write_text(f"""
_base_ = [{base!r}]
model = dict(
    backbone=dict(arch=dict(_delete_=True, embed_dims=32, depths=[1, 1, 1, 1], num_heads=[1, 2, 4, 8])),
    decode_head=dict(
        in_channels=[32, 64, 128, 256],
        num_queries=10,
        pixel_decoder=dict(encoder=dict(num_layers=1)),
        transformer_decoder=dict(num_layers=1),
    ),
)
""")
    rows, _ = flops.count_config(str(tmp_path / 'cfg.py'), (64, 96))
    mask_feature, queries = 16 * 24 * 256 * 256, 10 * 256 * 16 * 24
    assert rows['decode_head']['macs'] > mask_feature + 2 * queries  # masks before and after the layer


def test_nothing_is_left_of_the_counting(flops):
    model = ViGH(dict(embed_dims=32, depths=[1], num_heads=[1]), out_indices=(0,)).eval()
    x = torch.rand(1, 3, 16, 16)
    before = model(x)[0]  # of the real operator
    flops.count(model, x)
    assert torch.equal(model(x)[0], before)


@pytest.mark.parametrize('channels', [1, 4])
def test_images_of_other_channels(flops, tmp_path, channels):
    """They differ in the stem's first convolution, of kernel 3 and stride 2, to 16 channels."""
    for number in (3, channels):
        (tmp_path / f'{number}.py').write_text(BACKBONE.replace('arch=', f'in_channels={number}, arch='))
    three, other = (
        flops.count_config(str(tmp_path / f'{n}.py'), (64, 96))[0]['total'] for n in (3, channels)
    )
    assert other['params'] - three['params'] == (channels - 3) * 16 * 9
    assert other['macs'] - three['macs'] == (channels - 3) * 16 * 9 * 32 * 48


def test_the_table(flops, monkeypatch, tmp_path, capsys):
    (tmp_path / 'cfg.py').write_text(BACKBONE)
    monkeypatch.setattr(sys, 'argv', ['get_flops.py', str(tmp_path / 'cfg.py'), '--shape', '64', '96'])
    flops.main()
    first, *_, last = capsys.readouterr().out.splitlines()
    assert first.endswith('cfg.py, one image of 64 x 96')
    assert last.split()[::2] == ['total', 'M', 'G']


@pytest.mark.parametrize(
    ('text', 'options', 'message'),
    [
        (BACKBONE, ['--shape', '0', '4'], 'at least 1 and up to 16384, got 0 4'),
        (BACKBONE, ['--shape', '4', '-4'], 'got 4 -4'),
        (BACKBONE, ['--shape', '1000000000', '4'], 'got 1000000000 4'),
        (CLASSIFIER, ['--shape', '3', '3'], 'got [1, 3, 3, 3]'),
        (BACKBONE.replace('ViGH', 'ViGHH'), [], 'ViGHH'),
        ('a = 1', [], 'has no model to count'),
        (None, [], 'config is missing'),
    ],
)
def test_what_cannot_be_counted(flops, monkeypatch, tmp_path, capsys, text, options, message):
    if text:
        (tmp_path / 'cfg.py').write_text(text)
    monkeypatch.setattr(sys, 'argv', ['get_flops.py', str(tmp_path / 'cfg.py'), *options])
    with pytest.raises(SystemExit) as exit_:
        flops.main()
    # What a library says at its first import in this process comes before.
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith('error: ')]
    assert exit_.value.code == 2 and message in line
