"""The tools that look into a backbone: the numbers behind their pictures, what they say to bad input."""

import math
import re
import shlex
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.model import BaseModule
from mmengine.registry import MODELS
from PIL import Image
from torch import nn

from mmvig.backbones import ViG, ViGH
from mmvig.engine.preflight import SetupError
from mmvig.ops.bigla import bigla_packed, unpack

ROOT = Path(__file__).resolve().parents[1]
ANALYSIS = ROOT / 'tools/analysis'
PAGE = (ROOT / 'docs/analysis.md').read_text()
COMMANDS = [
    command
    for block in re.findall(r'^```sh\n(.*?)^```', PAGE, re.MULTILINE | re.DOTALL)
    for command in block.splitlines()
]
ARCH = dict(embed_dims=32, depths=[1, 2, 1, 1], num_heads=[1, 2, 4, 8])
PLAIN_ARCH = dict(embed_dims=32, depth=5, num_heads=2)
SMALL = """
_base_ = [{base!r}]
model = dict(backbone=dict(arch=dict(_delete_=True, **{arch})))
"""
BASES = {
    'detector': 'detection/maskrcnn_vigh_t.py',
    'segmentor': 'segmentation/upernet_vigh_t.py',
    'classifier': 'classification/vigh_t_in1k.py',
    'plain': 'classification/vig_t_in1k.py',
}
MEAN, STD = [123.675, 116.28, 103.53], [58.395, 57.12, 57.375]


class Maps(BaseModule):
    """A stranger of a backbone, with a map at stride 2."""

    def __init__(self, init_cfg=None):
        super().__init__(init_cfg)
        self.conv = nn.Conv2d(3, 4, 3, stride=2, padding=1)

    def forward(self, x):
        return (self.conv(x),)


class Vector(Maps):
    """A backbone without maps."""

    def forward(self, x):
        return (self.conv(x).mean((2, 3)),)


@pytest.fixture(autouse=True)
def strangers(monkeypatch):
    """The two, registered for one test."""
    monkeypatch.setitem(MODELS.module_dict, 'AnalysisMaps', Maps)
    monkeypatch.setitem(MODELS.module_dict, 'AnalysisVector', Vector)


@pytest.fixture
def erf(load):
    return load('tools/analysis/effective_receptive_field.py')


@pytest.fixture
def gates(load):
    return load('tools/analysis/gate_maps.py')


@pytest.fixture
def files(tmp_path, monkeypatch):
    """A folder with small configs of each kind, a picture, and weights of the ViGH in them."""
    monkeypatch.chdir(tmp_path)
    for name, base in BASES.items():
        arch = PLAIN_ARCH if name == 'plain' else ARCH
        (tmp_path / f'{name}.py').write_text(SMALL.format(base=str(ROOT / 'configs' / base), arch=arch))
    (tmp_path / 'maps.py').write_text("model = dict(type='X', backbone=dict(type='AnalysisMaps'))\n")
    (tmp_path / 'vector.py').write_text("model = dict(type='X', backbone=dict(type='AnalysisVector'))\n")
    (tmp_path / 'headless.py').write_text("model = dict(type='AnalysisMaps')\n")
    (tmp_path / 'bare.py').write_text(f"model = dict(type='mmvig.ViGH', arch={ARCH})\n")
    (tmp_path / 'reads.py').write_text(
        f"model = dict(type='mmvig.ViGH', arch={ARCH})\n"
        "test_pipeline = [dict(type='mmcv.LoadImageFromFile')]\n"
    )
    (tmp_path / 'no_model.py').write_text('x = 1\n')
    (tmp_path / 'text.png').write_text('no picture')
    cv2.imwrite('a.png', np.random.default_rng(0).integers(0, 256, (48, 80, 3), np.uint8))
    torch.save(whole_model(weights()), 'it.pth')
    return tmp_path


def weights():
    """State dict of a ViGH of ARCH that the tools cannot have made themselves."""
    torch.manual_seed(7)
    backbone = ViGH(ARCH)
    for mixer in (block.mixer for stage in backbone.stages for block in stage.blocks):
        nn.init.normal_(mixer.decay_down.weight)
        nn.init.normal_(mixer.decay_up.weight)
        nn.init.normal_(mixer.decay_up.bias)
    return backbone.state_dict()


def whole_model(backbone):
    state = {f'backbone.{key}': value for key, value in backbone.items()}
    return {'state_dict': {**state, 'neck.lateral.weight': torch.zeros(1)}}


def run(module, monkeypatch, capsys, *arguments):
    """Run a tool in this process; what it printed, line by line."""
    monkeypatch.setattr(sys, 'argv', ['tool', *map(str, arguments), '--device', 'cpu'])
    module.main()
    lines = capsys.readouterr().out.splitlines()
    # What a library says at its first import in this process comes before.
    return lines[[line.startswith(('the fewest pixels', 'block ')) for line in lines].index(True) :]


def error_of(module, monkeypatch, capsys, *arguments):
    """Run a tool that must fail; the one line that it says."""
    monkeypatch.setattr(sys, 'argv', ['tool', *map(str, arguments)])
    with pytest.raises(SystemExit) as exit_:
        module.main()
    assert exit_.value.code == 2
    # What a library says at its first import in this process comes before.
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith('error: ')]
    return line


# Effective receptive field


class Conv(nn.Module):
    """A linear convolution, or its square."""

    def __init__(self, power):
        super().__init__()
        self.conv = nn.Conv2d(3, 1, 5, stride=4, padding=2, bias=False).double()
        self.power = power

    def forward(self, x):
        return (x, self.conv(x) ** self.power)


def test_field_of_a_linear_convolution_is_its_kernel(erf):
    torch.manual_seed(0)
    model = Conv(power=1)
    images = torch.randn(3, 1, 3, 24, 40, dtype=torch.float64)
    expected = np.zeros((24, 40))  # the map is 6 x 10, its centre (3, 5), which looks around (12, 20)
    expected[10:15, 18:23] = model.conv.weight.detach()[0].abs().mean(0).numpy()
    np.testing.assert_allclose(erf.effective_receptive_field(model, images), expected, rtol=1e-12)


def test_field_is_the_mean_over_images_and_of_the_chosen_map(erf):
    torch.manual_seed(0)
    model = Conv(power=2)
    images = torch.randn(4, 1, 3, 24, 40, dtype=torch.float64)
    with torch.no_grad():
        at_centre = torch.stack([model.conv(image)[0, 0, 3, 5] for image in images])
    kernel = model.conv.weight.detach()[0].abs().mean(0)
    expected = np.zeros((24, 40))
    expected[10:15, 18:23] = (2 * at_centre.abs().mean() * kernel).numpy()
    np.testing.assert_allclose(erf.effective_receptive_field(model, images), expected, rtol=1e-12)
    itself = np.zeros((24, 40))
    itself[12, 20] = 1 / 3  # one colour in three: each of the token's channels is a colour
    found = erf.effective_receptive_field(model, images, output=0)
    np.testing.assert_allclose(found, 3 * itself, rtol=1e-12)


def test_field_survives_the_norm_that_makes_channels_sum_to_a_constant(erf):
    torch.manual_seed(0)
    backbone = ViGH(ARCH).eval()
    image = torch.randn(1, 3, 64, 64, requires_grad=True)
    token = backbone(image)[-1][0, :, 1, 1]
    (plain,) = torch.autograd.grad(token.sum(), image)
    assert erf.effective_receptive_field(backbone, [image]).max() > 1000 * plain.abs().max().item()


def test_field_that_is_nothing(erf):
    model = Conv(power=1)
    nn.init.zeros_(model.conv.weight)
    with pytest.raises(SetupError, match='Conv is zero'):
        erf.effective_receptive_field(model, [torch.zeros(1, 3, 8, 8, dtype=torch.float64)])


def test_area_is_the_fewest_pixels_that_hold_a_share(erf):
    assert erf.area_of(np.array([[1.0, 4.0], [3.0, 2.0]]), 0.4) == 0.25
    assert erf.area_of(np.array([[1.0, 4.0], [3.0, 2.0]]), 0.5) == 0.5
    assert erf.area_of(np.array([[1.0, 4.0], [3.0, 2.0]]), 0.99) == 1
    for share in (0.2, 0.5, 0.99):
        assert erf.area_of(np.full((10, 10), 0.5), share) == pytest.approx(share)


def test_a_stage_is_found_among_the_outputs(erf):
    backbone = ViGH(ARCH, out_indices=(1, 3))
    assert [erf.output_of(backbone, stage, 'x.py') for stage in (None, 1, 3)] == [-1, 0, 1]
    with pytest.raises(SetupError, match=r'--stage 0 is no output of x\.py: choose one of 1, 3'):
        erf.output_of(backbone, 0, 'x.py')


def test_fields_of_several_models_side_by_side(erf, files, monkeypatch, capsys):
    """A detector with weights of a whole model, the same without, and a stranger; on an image."""
    drawn = {}
    draw = erf.draw
    monkeypatch.setattr(erf, 'draw', lambda fields: drawn.update(fields) or draw(fields))
    models = ['detector.py', 'it.pth', 'detector.py', 'none', 'detector.py', 'it.pth']
    options = ['--stage', 1, '--shape', 40, 40, '--images', 'a.png', '--out', 'deep/field.png']
    *table, path = run(erf, monkeypatch, capsys, *models, *options)
    assert path == 'deep/field.png'
    assert cv2.imread(path) is not None

    image = np.float64(cv2.imread('a.png'))
    image = cv2.resize(image.astype(np.uint8)[:, :, ::-1].copy(), (67, 40), interpolation=cv2.INTER_AREA)
    pixels = torch.from_numpy((image[:, 13:53] - MEAN) / STD).float().permute(2, 0, 1)[None]
    backbone = ViGH(ARCH, out_indices=(0, 1))
    backbone.load_state_dict(weights())
    expected = erf.effective_receptive_field(backbone.eval(), [pixels])
    first, untrained, again = drawn.values()
    np.testing.assert_allclose(first, expected, rtol=1e-3, atol=1e-5 * expected.max())
    np.testing.assert_array_equal(first, again)
    assert abs(untrained - expected).max() > 0.1 * expected.max()
    half = f'{erf.area_of(first, 0.5):.1%}'
    assert table[1].startswith('detector, it.pth') and half in table[1]
    assert table[2].startswith('detector, no checkpoint')


def test_fields_of_strangers_and_other_kinds_of_config(erf, files, monkeypatch, capsys):
    models = ['maps.py', 'segmentor.py', 'classifier.py', 'plain.py', 'bare.py']
    options = ['--shape', 32, 48, '--noise', 1, '--out', 'it.pdf']
    table = run(erf, monkeypatch, capsys, *models, *options)
    assert [line.partition(',')[0] for line in table[1:-1]] == [name[:-3] for name in models]
    assert Path('it.pdf').read_bytes().startswith(b'%PDF')


def test_random_weights_are_the_same_at_each_call(erf, files):
    cfg = Config.fromfile('bare.py')
    first, second = (erf.inputs.load_backbone(cfg, None) for _ in range(2))
    assert not first.training
    assert not any(parameter.requires_grad for parameter in first.parameters())
    for one, other in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(one, other)


def test_pixels_are_normalised_as_each_package_says(erf):
    image = np.full((2, 3, 3), (10, 20, 30), np.uint8)  # BGR

    def colours(kind, **settings):
        settings = dict(type=kind, mean=[1, 2, 3], std=[1, 2, 4], **settings)
        pixels = erf.preprocess(Config(dict(model=dict(data_preprocessor=settings))), image)
        assert pixels.shape == (1, 3, 2, 3)
        return pixels[0, :, 1, 2].tolist()

    detection, segmentation = 'mmdet.DetDataPreprocessor', 'mmseg.SegDataPreProcessor'
    assert colours(detection, pad_size_divisor=32) == colours(segmentation, size=(64, 64)) == [9, 9, 6.75]
    assert colours(detection, bgr_to_rgb=True) == colours(segmentation, bgr_to_rgb=True) == [29, 9, 1.75]
    assert colours('mmpretrain.ClsDataPreprocessor', to_rgb=True) == [29, 9, 1.75]
    cfg = Config(dict(model=dict(), data_preprocessor=dict(mean=[0, 0, 0], std=[1, 1, 1])))
    assert erf.preprocess(cfg, image)[0, :, 0, 0].tolist() == [10, 20, 30]  # mmpretrain's place, and type


# Gates


def bias_gates(mixer, logits):
    """Make the gates of a mixer the same for all tokens; logits [2, H, K]."""
    nn.init.zeros_(mixer.decay_up.weight)
    with torch.no_grad():
        mixer.decay_up.bias.copy_(logits.flatten())


def test_gate_maps_of_known_gates(gates):
    """Against the formula, for gates that differ in direction, head and channel."""
    backbone = ViGH(ARCH)
    mixers = gates.choose_blocks(backbone, ['1.1'])
    mixer = backbone.stages[1].blocks[1].mixer
    assert mixers == {'1.1': mixer}
    torch.manual_seed(0)
    logits = 3 * torch.randn(2, 2, 16)  # 64 channels: 2 heads, keys 16 wide
    bias_gates(mixer, logits)

    def decay_of(g):
        return (1 / (1 + math.exp(-g))) ** (1 / 16)

    image = torch.randn(1, 3, 32, 48)
    for heads, channels in ((None, None), ([1], None), ([0], [3, 5]), (None, [15])):
        maps = gates.gate_maps(backbone, image, mixers, heads, channels)['1.1']
        assert maps.decay.shape == maps.memory.shape == (2, 4, 6)
        for direction in (0, 1):
            chosen = [
                decay_of(logits[direction, head, channel].item())
                for head in (heads or range(2))
                for channel in (channels or range(16))
            ]
            np.testing.assert_allclose(maps.decay[direction], sum(chosen) / len(chosen), rtol=1e-6)
            mean_log = sum(map(math.log, chosen)) / len(chosen)
            np.testing.assert_allclose(maps.memory[direction], -1 / mean_log, rtol=1e-5)


def test_gate_maps_are_what_the_operator_gets_and_lie_where_the_tokens_are(gates, monkeypatch):
    torch.manual_seed(0)
    backbone = ViG(PLAIN_ARCH)
    mixers = gates.choose_blocks(backbone, None)
    assert list(mixers) == ['1', '2', '3', '4']  # the last of each quarter of five blocks
    seen = []

    def spy(qkv, logits, num_heads, **options):
        seen.append(unpack(qkv, logits, num_heads)[3:])
        return bigla_packed(qkv, logits, num_heads, **options)

    monkeypatch.setattr('mmvig.backbones.mixer.bigla_packed', spy)
    maps = gates.gate_maps(backbone, torch.randn(1, 3, 48, 80), mixers)
    for name, block in maps.items():
        for logits, decay in zip(seen[int(name)], block.decay, strict=True):
            expected = logits.double().sigmoid().pow(1 / 16).mean((0, 2, 3)).reshape(3, 5)
            np.testing.assert_allclose(decay, expected.numpy(), rtol=1e-6)
            assert np.ptp(decay) > 0
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in backbone.modules())


def test_decay_is_what_the_state_loses_at_a_token(gates):
    """An impulse in the operator fades by the maps' decay: forward after it, backward before it."""
    logits = torch.tensor([1.0, -2.0]).expand(1, 7, 2).double()  # one head with one key channel
    qkv = torch.ones(1, 7, 3, dtype=torch.float64)
    qkv[..., 2] = 0
    qkv[0, 3, 2] = 1  # the value of the token in the middle
    o = bigla_packed(qkv, logits, 1)[0, :, 0]
    (maps,) = {gates._maps(logits, (1, 7), 1, None, None).decay[:, 0, 0].tobytes()}
    forward, backward = np.frombuffer(maps)
    torch.testing.assert_close(o[6] / o[5], torch.tensor(forward))
    torch.testing.assert_close(o[0] / o[1], torch.tensor(backward))


def test_gate_maps_of_a_detector(gates, files, monkeypatch, capsys):
    """The picture, and medians of the checkpoint's gates."""
    state = weights()
    for key, value in state.items():
        if key.endswith('decay_up.weight'):
            value.zero_()
        if key.endswith('decay_up.bias'):
            forward, backward = value.chunk(2)
            forward.fill_(0)
            backward.fill_(4)
    torch.save(whole_model(state), 'known.pth')
    *lines, path = run(
        gates, monkeypatch, capsys, 'detector.py', 'known.pth', 'a.png', '--out', 'gates.png'
    )
    assert path == 'gates.png'
    assert cv2.imread(path) is not None
    table = [line.split() for line in lines if re.match(r'\d\.\d ', line)]
    assert [row[0] for row in table] == ['0.0', '0.0', '1.1', '1.1', '2.0', '2.0', '3.0', '3.0']
    assert [row[1:4] for row in table[:4:2]] == [['12', 'x', '20'], ['6', 'x', '10']]
    for row in table:
        logit = 0 if row[4] == 'forward' else 4
        log_decay = -math.log1p(math.exp(-logit)) / 16
        assert float(row[5]) == pytest.approx(math.exp(log_decay), abs=1e-4)
        assert float(row[6]) == pytest.approx(-1 / log_decay, abs=0.06)


def test_gate_maps_of_plain_vig_and_of_gates_that_never_forget(gates, files, monkeypatch, capsys):
    options = ['--heads', 1, '--channels', 0, 7, '--shape', 32, 32, '--out', 'it.svg']
    lines = run(gates, monkeypatch, capsys, 'plain.py', 'none', 'a.png', '--blocks', 4, 0, *options)
    assert [line.split()[0] for line in lines[1:-1]] == ['4', '4', '0', '0']
    assert '<svg' in Path('it.svg').read_text()

    backbone = ViGH(ARCH)
    mixers = gates.choose_blocks(backbone, ['0.0'])
    bias_gates(mixers['0.0'], torch.full((2, 1, 16), 1000.0))
    maps = gates.gate_maps(backbone, torch.randn(1, 3, 32, 32), mixers)
    assert np.isposinf(maps['0.0'].memory).all()
    figure = gates.draw(np.zeros((32, 32, 3), np.uint8), maps)
    figure.canvas.draw()


CHANNELS = """
_base_ = ['detector.py']
model = dict(
    data_preprocessor=dict(_delete_=True, type='DetDataPreprocessor', mean=[100.0], std=[50.0]),
    backbone=dict(in_channels={channels}),
)
steps = [dict(type={loader}), dict(type='PackDetInputs')]
test_dataloader = dict(dataset=dict(pipeline=steps))
"""


@pytest.mark.parametrize('channels', [1, 5])
def test_images_of_other_channels_and_numbers(erf, gates, files, monkeypatch, capsys, channels):
    """As the pipeline loads them, and normalised as the config says; noise has as many channels."""
    loader = (
        "'LoadImageFromFile', color_type='unchanged'" if channels < 5 else "'mmseg.LoadImageFromNpyFile'"
    )
    Path('other.py').write_text(CHANNELS.format(channels=channels, loader=loader))
    pixels = np.random.default_rng(1).integers(0, 60000, (40, 72, channels)).astype(np.uint16)
    name = 'it.npy' if channels == 5 else 'it.png'
    np.save(name, pixels) if channels == 5 else cv2.imwrite(name, pixels)
    seen = []
    maps = gates.gate_maps
    monkeypatch.setattr(
        gates, 'gate_maps', lambda _, image, *rest: seen.append(image) or maps(_, image, *rest)
    )
    run(gates, monkeypatch, capsys, 'other.py', 'none', name, '--out', 'gates.png')
    expected = (torch.from_numpy(pixels.astype(np.float32)).permute(2, 0, 1)[None] - 100) / 50
    torch.testing.assert_close(seen[0], expected)
    for more in (['--images', name], ['--noise', 1]):
        run(erf, monkeypatch, capsys, 'other.py', '--shape', 32, 32, '--out', 'field.png', *more)
    line = error_of(gates, monkeypatch, capsys, 'other.py', 'none', 'a.png', '--out', 'it.png')
    assert f'a.png has 3 channels as the test pipeline loads it, and ViGH takes {channels}' in line


def test_images_are_turned_as_the_pipeline_turns_them(erf, files):
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (20, 30, 3), np.uint8))
    exif = image.getexif()
    exif[0x0112] = 6
    image.save('it.jpg', exif=exif)

    def size(**settings):
        steps = [dict(type='mmcv.LoadImageFromFile', **settings)]
        reader = erf.ImageReader(Config(dict(test_pipeline=steps)))
        return erf.inputs.read_image(reader, 'it.jpg', None).shape

    assert size() == size(imdecode_backend='pillow') == (30, 20, 3)
    assert size(color_type='color_ignore_orientation') == (20, 30, 3)
    assert size(color_type='grayscale') == (30, 20, 1)


# The architecture


@pytest.fixture
def drawing(load):
    return load('tools/analysis/draw_architecture.py')


def words_of(svg):
    return re.findall(r'<text [^>]*>([^<]+)<', svg)


def test_the_picture_in_the_docs_is_the_one_that_is_drawn(drawing, tmp_path, monkeypatch, capsys):
    out = tmp_path / 'it.svg'
    monkeypatch.setattr(sys, 'argv', ['tool', '--out', str(out)])
    drawing.main()
    assert capsys.readouterr().out.splitlines()[-1] == str(out)
    words = words_of(out.read_text())
    assert [f'Stage {i}' in words for i in range(1, 6)] == [True] * 4 + [False]
    assert words_of((ROOT / 'docs/architecture.svg').read_text()) == words
    drawing.main()
    assert out.read_bytes() == drawing.draw('tiny')


def test_the_drawn_stages_are_those_of_the_model(drawing):
    stages = drawing.stages_of('small')
    assert [stage['blocks'] for stage in stages] == [2, 2, 17, 2]
    assert [stage['stride'] for stage in stages] == [4, 8, 16, 32]
    assert [stage['channels'] for stage in stages] == [96, 192, 384, 768]
    assert [stage['heads'] for stage in stages] == [3, 6, 12, 24]


def test_the_drawing_is_an_svg(drawing, monkeypatch, capsys):
    monkeypatch.setattr(drawing, 'draw', None)
    line = error_of(drawing, monkeypatch, capsys, '--out', 'it.png')
    assert '--out it.png' in line and '.svg' in line


# Errors


@pytest.mark.parametrize(
    ('arguments', 'said'),
    [
        ('no.py', ['config is missing', 'no.py']),
        ('detector.py no.pth', ['checkpoint is missing', 'no.pth', 'tools/train.py']),
        ('it.pth', ['it.pth follows no config']),
        ("detector.py ''", ['checkpoint is missing']),
        ('detector.py it.pth it.pth', ['it.pth follows no config']),
        ('plain.py it.pth', ['it.pth', 'does not fit this ViG']),
        ('maps.py it.pth', ['it.pth', 'Missing key']),
        ('detector.py --stage 4', ['--stage 4', '0, 1, 2, 3', 'out_indices']),
        ('maps.py --stage 0', ['Maps has no out_indices']),
        ('vector.py', ['Vector gives no feature maps']),
        ('headless.py', ['headless.py', 'Maps, has no backbone']),
        ('no_model.py', ['no_model.py has no model']),
        ('detector.py --images no.png', ['image is missing', 'no.png']),
        ('detector.py --images text.png', ['text.png cannot be read by LoadImageFromFile']),
        ('bare.py --images a.png', ['bare.py has no test pipeline']),
        ('detector.py --noise 0', ['--noise must be from 1']),
        ('plain.py --shape 6 32', ['ViG takes image sides from 7 on', '6 x 32']),
        ('detector.py --shape 0 32', ['--shape', '0 32']),
        ('detector.py --device abc', ['--device abc']),
        ('detector.py --out it.txt', ['it.txt', '.png']),
        ('detector.py --shape 32 32 --noise 1 --out it.pth/x.png', ['it.pth/x.png cannot be written']),
    ],
)
def test_bad_input_to_the_receptive_field(erf, files, monkeypatch, capsys, arguments, said):
    line = error_of(erf, monkeypatch, capsys, '--out', 'it.png', *shlex.split(arguments))
    assert all(part in line for part in said), line
    assert not Path('it.png').exists()


@pytest.mark.parametrize(
    ('arguments', 'said'),
    [
        ('detector.py no.pth a.png', ['checkpoint is missing', 'no.pth', 'tools/train.py']),
        ('detector.py none no.png', ['image is missing', 'no.png']),
        ('maps.py none a.png', ['maps.py has a Maps for a backbone', 'mmvig.ViGH']),
        ('detector.py none a.png --blocks 1.1 1.2 4', ['no 1.2, 4', '0.0, 1.0, 1.1']),
        ('plain.py none a.png --blocks 0.0', ['ViG has no 0.0', '0, 1, 2, 3, 4']),
        ('detector.py none a.png --heads 1', ['--heads 1', 'block 0.0 has 0 to 0']),
        ('detector.py none a.png --heads -1', ['--heads -1']),
        ('detector.py none a.png --channels 3 16', ['--channels 16', '0 to 15']),
        ('bare.py none a.png', ['bare.py has no test pipeline']),
        ('reads.py none a.png', ['reads.py has no data_preprocessor']),
    ],
)
def test_bad_input_to_the_gate_maps(gates, files, monkeypatch, capsys, arguments, said):
    line = error_of(gates, monkeypatch, capsys, '--out', 'it.png', *arguments.split())
    assert all(part in line for part in said), line
    assert not Path('it.png').exists()


def test_weights_that_a_config_starts_from_are_missing(gates, files, monkeypatch, capsys):
    pretrained = "dict(type='Pretrained', checkpoint='gone.pth')"
    Path('start.py').write_text(
        f"_base_ = ['detector.py']\nmodel = dict(backbone=dict(init_cfg={pretrained}))\n"
    )
    line = error_of(gates, monkeypatch, capsys, 'start.py', 'none', 'a.png', '--out', 'it.png')
    assert 'start.py starts from' in line and 'gone.pth' in line


# The page


@pytest.mark.parametrize('command', COMMANDS)
def test_commands_of_the_page_are_ones_that_the_tools_take(load, monkeypatch, command):
    python, script, *arguments = shlex.split(command)
    assert python == 'python'
    monkeypatch.setattr(sys, 'argv', [script, *arguments])
    load(script).parse_args()
    for argument in arguments:
        if argument.startswith('configs/'):
            assert (ROOT / argument).is_file()


def test_the_page_has_every_tool():
    scripts = {command.split()[1] for command in COMMANDS}
    tools = {path.relative_to(ROOT).as_posix() for path in ANALYSIS.glob('*.py')}
    assert scripts == tools - {'tools/analysis/inputs.py'} | {'tools/benchmark/backbone.py'}
