"""The tools that measure the method's claims: what the steps compute, and that both tools run, on a CPU."""

import json
import multiprocessing
import re
import statistics
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from mmvig.backbones import ViG
from mmvig.backbones.mixer import GATE_RANK, GatedTokenMixer
from mmvig.engine.preflight import SetupError

ROOT = Path(__file__).resolve().parents[1]
ARCH = dict(embed_dims=32, depth=2, num_heads=2, conv_act=True, out_act=True)
C, HEADS = ARCH['embed_dims'], ARCH['num_heads']
K, V = C // 2 // HEADS, C // HEADS


@pytest.fixture
def steps(load):
    return load('tools/method/roadmap_steps.py')


@pytest.fixture
def training(load):
    return load('tools/method/small_training.py')


@pytest.fixture
def data(tmp_path, monkeypatch):
    """A folder of two classes, dark and bright, with six pictures to train on and four to test."""
    monkeypatch.chdir(tmp_path)
    draw = np.random.default_rng(0)
    for split, number in (('train', 3), ('val', 2)):
        for label, level in (('bright', 190), ('dark', 0)):
            (tmp_path / 'data' / split / label).mkdir(parents=True)
            for i in range(number):
                image = draw.integers(level, level + 60, (16, 16, 3), np.uint8)
                cv2.imwrite(f'data/{split}/{label}/{i}.png', image)
    return tmp_path


@pytest.fixture
def small(training, load, monkeypatch):
    """Both tools with a small ViG and a small DeiT."""
    build = training.build_backbone
    for module in (training, load('tools/method/roadmap.py')):
        monkeypatch.setattr(module, 'build_backbone', lambda step, **o: build(step, arch=ARCH, **o))
    deit = dict(embed_dims=32, num_layers=2, num_heads=2, feedforward_channels=64)
    transformer = training.VisionTransformer
    monkeypatch.setattr(training, 'VisionTransformer', lambda **o: transformer(**{**o, 'arch': deit}))
    monkeypatch.setattr(training, 'WIDTH', 32)
    monkeypatch.setattr(training, 'ROUNDS', 2)
    monkeypatch.setattr(training, 'WARM_UP_SECONDS', 0)


def scan(q, k, v, g, order):
    """Gated linear attention, token by token: q, k, g [N, H, K], v [N, H, V], the order of the tokens."""
    state = torch.zeros(HEADS, K, V, dtype=q.dtype)
    out = torch.empty_like(v)
    for t in order:
        decay = torch.sigmoid(g[t]) ** (1 / 16)
        state = decay[..., None] * state + k[t, :, :, None] * v[t, :, None, :]
        out[t] = torch.einsum('hk,hkv->hv', q[t], state) / K**0.5
    return out


def both(q, k, v, g_fwd, g_bwd):
    n = len(q)
    return (scan(q, k, v, g_fwd, range(n)) + scan(q, k, v, g_bwd, reversed(range(n)))) / 2


EXPECTED = {
    'one': lambda q, k, v, gates: scan(q, k, v, gates[0], range(len(q))),
    'shared': lambda q, k, v, gates: both(q, k, v, gates[0], gates[0]),
    'each': lambda q, k, v, gates: both(q, k, v, *gates),
    'twice': lambda q, k, v, gates: both(q, k, v, *gates),
}


def mixer_of(steps, step):
    """A mixer in float64 whose gates, norms and biases are not as they are initialised."""
    torch.manual_seed(0)
    mixer = steps.GlobalMixer(C, HEADS, out_act=True, scan=step).double()
    for parameter in mixer.parameters():
        nn.init.normal_(parameter, std=0.5)
    return mixer


@pytest.mark.parametrize('step', EXPECTED)
def test_a_step_computes_its_scan(steps, step):
    """Against the definition, token by token, with gradients of the input and all weights."""
    mixer = mixer_of(steps, step)
    x = torch.randn(1, 3, 5, C, dtype=torch.float64, requires_grad=True)
    tokens = x[0].flatten(0, 1)
    q, k, v = (tokens @ mixer.qkv.weight.T).split([C // 2, C // 2, C], -1)
    q, k, v = (each.unflatten(-1, (HEADS, -1)) for each in (q, k, v))
    logits = tokens @ mixer.decay_down.weight.T @ mixer.decay_up.weight.T + mixer.decay_up.bias
    gates = [each.unflatten(-1, (HEADS, K)) for each in logits.split(C // 2, -1)]
    o = EXPECTED[step](q, k, v, gates)
    o = o * (o.square().mean(-1, keepdim=True) + 1e-6).rsqrt() * mixer.norm_long.weight
    gate = torch.sigmoid(tokens @ mixer.mix_gate.weight.T + mixer.mix_gate.bias)
    expected = F.silu(gate * o.flatten(1)) @ mixer.out.weight.T

    actual = mixer(x)
    torch.testing.assert_close(actual[0].flatten(0, 1), expected, rtol=1e-9, atol=1e-10)
    upstream = torch.randn_like(expected)
    leaves = [x, *mixer.parameters()]
    pairs = zip(
        torch.autograd.grad(actual[0].flatten(0, 1), leaves, upstream),
        torch.autograd.grad(expected, leaves, upstream),
        strict=True,
    )
    for one, other in pairs:
        torch.testing.assert_close(one, other, rtol=1e-7, atol=1e-9)


def test_one_direction_sees_no_later_token(steps):
    x = torch.randn(1, 1, 6, C, dtype=torch.float64)
    changed = x.clone()
    changed[0, 0, 3] += 1
    for step in EXPECTED:
        mixer = mixer_of(steps, step)
        difference = (mixer(x) - mixer(changed)).abs().amax((0, 1, 3))
        earlier, rest = difference[:3].max().item(), difference[3:].min().item()
        assert rest > 1e-6
        assert earlier < 1e-12 if step == 'one' else earlier > 1e-6


def test_one_direction_with_strong_gates(steps):
    """Those of the closed other direction and its own do not overflow, in float32."""
    torch.manual_seed(0)
    q, k, g = torch.randn(3, 1, 40, HEADS, K).unbind()
    g, v = 1000 * g, torch.randn(1, 40, HEADS, V)
    expected = scan(*(x[0].double() for x in (q, k, v, g)), range(40))
    torch.testing.assert_close(steps.one_direction(q, k, v, g)[0], expected.float(), rtol=1e-4, atol=1e-4)


def test_parameters_of_the_steps(steps):
    """A gate is a projection from the low rank; locality is a 3x3 filter and a norm's weight."""
    count = {
        step: sum(p.numel() for p in steps.build_backbone(step, arch=ARCH).parameters())
        for step in [*steps.STEPS, *steps.OTHER_WAYS]
    }
    depth = ARCH['depth']
    assert count['one'] == count['shared']
    assert count['each'] - count['shared'] == depth * (GATE_RANK + 1) * C // 2
    assert count['vig'] - count['each'] == depth * (9 * C + V)
    assert count['twice'] == count['each'] and count['modules'] == count['vig']
    assert count['vig'] == sum(p.numel() for p in ViG(ARCH).parameters())


def test_steps_are_initialised_as_vig_is(steps):
    """The new mixers' projections too: xavier_uniform with gain 2^-2.5, and no bias but zero."""
    for step in ('one', 'each', 'modules'):
        for block in steps.build_backbone(step, arch=ARCH).blocks:
            mixer = block.mixer
            bound = 2**-2.5 * (6 / (2 * C)) ** 0.5
            assert 0.8 * bound < mixer.out.weight.abs().max() <= bound
            assert not mixer.mix_gate.bias.any() and not mixer.decay_up.bias.any()


def test_vig_module_by_module_is_vig(steps):
    shipped = steps.build_backbone('vig', arch=ARCH)
    assert type(shipped) is ViG and all(type(block.mixer) is GatedTokenMixer for block in shipped.blocks)
    modules = steps.build_backbone('modules', arch=ARCH)
    modules.load_state_dict(shipped.state_dict())
    assert all(type(block.mixer) is not GatedTokenMixer for block in modules.blocks)
    x = torch.randn(2, 3, 48, 32)
    torch.testing.assert_close(modules(x)[0], shipped(x)[0])


def test_unknown_steps(steps):
    with pytest.raises(ValueError, match=r"step must be one of .*'vig'.*got 'two'"):
        steps.build_backbone('two')
    with pytest.raises(ValueError, match=r"scan must be .* got 'vig'"):
        steps.GlobalMixer(C, HEADS, scan='vig')


def test_crops_are_of_the_picture(training):
    """Of a picture of its own coordinates: the crops' corners, sizes and directions."""
    torch.manual_seed(0)
    n, side = 500, 32
    x = (torch.arange(side) + 0.5).expand(side, side)
    picture = torch.stack([x, x.T])
    crops = training.random_crops(picture.expand(n, 2, side, side), 64)
    assert crops.shape == (n, 2, 64, 64)
    assert crops.min() >= 0 and crops.max() <= side
    middle = crops[:, :, 8:56, 8:56]  # far from the border, where a pixel's centre is the last to be seen
    across = (middle[:, 0, 0, -1] - middle[:, 0, 0, 0]) / 47 * 64
    down = (middle[:, 1, -1, 0] - middle[:, 1, 0, 0]) / 47 * 64
    assert 0.4 < (across < 0).float().mean() < 0.6 and (down > 0).all()
    area, aspect = across.abs() * down / side**2, across.abs() / down
    assert 0.3 < area.min() < 0.45 and 0.9 < area.max() <= 1.01  # below 0.4 where a side was cut
    assert 0.7 < aspect.min() < 0.8 and 1.25 < aspect.max() < 1.4


def test_pictures_are_as_they_are_on_disk(training, data):
    pictures = training.Pictures('data/val', 'cpu', 32)
    assert pictures.classes == ('bright', 'dark') or pictures.classes == ['bright', 'dark']
    assert pictures.labels.tolist() == [0, 0, 1, 1]
    image = cv2.imread('data/val/dark/1.png')
    assert np.array_equal(pictures.pixels[3].permute(1, 2, 0).numpy(), image[..., ::-1])  # RGB
    batch = pictures[[3, 0]]
    assert batch['inputs'].shape == (2, 3, 32, 32)
    assert [sample.gt_label.tolist() for sample in batch['data_samples']] == [[1], [0]]


def test_pictures_of_two_sizes(training, data):
    cv2.imwrite('data/val/dark/9.png', np.zeros((16, 20, 3), np.uint8))
    with pytest.raises(SetupError, match=r'9\.png: all pictures must have one size, found 16x16 and 16x20'):
        training.Pictures('data/val', 'cpu', 32)
    Path('data/val/dark/9.png').write_text('no picture')
    with pytest.raises(SetupError, match=r'9\.png cannot be read as a picture'):
        training.Pictures('data/val', 'cpu', 32)


def test_intervals(training):
    """Student's t for three values is 4.303; a poll of 1000 is right within 3.1 points."""
    half = pytest.approx(4.303 * statistics.stdev([61.0, 63.5, 62.2]) / 3**0.5, rel=1e-3)
    assert training.interval([61.0, 63.5, 62.2], 2000) == {
        'mean': pytest.approx(62.233, abs=1e-3),
        'half': half,
        'of': 'seeds',
    }
    assert training.interval([50.0], 1000) == {
        'mean': 50.0,
        'half': pytest.approx(3.1, abs=0.01),
        'of': 'pictures',
    }
    assert training.gain([3.0, 5.0], [1.0, 3.0]) == {'mean': 2.0, 'half': 0.0}
    assert training.gain([3.0], [1.0]) is None


def test_a_training_learns_and_repeats(training, small, data):
    """Dark and bright are told apart; a seed gives the same weights again, another seed others."""
    shared = dict(name='one', size=16, epochs=40, batch=6, data='data', device='cpu')
    jobs = [
        training.Job(seed=seed, weights=folder, **shared) for seed, folder in ((3, 'a'), (3, 'b'), (4, 'a'))
    ]
    assert list(training.train_all(jobs, 1)) == jobs
    val = training.pictures('data', 'val', 'cpu', 16)
    models = [training.load(job, 2) for job in jobs]
    assert [training.top1(model, val, 16) for model in models] == [100, 100, 100]
    first, again, other = (model.backbone.pos_embed for model in models)
    assert torch.equal(first, again) and not torch.equal(first, other)
    written = jobs[0].path.stat().st_mtime_ns
    assert list(training.train_all(jobs[:1], 1)) == jobs[:1] and jobs[0].path.stat().st_mtime_ns == written


def test_top1_counts(training, data):
    """A classifier that sees red alone, at whatever size."""
    val = training.pictures('data', 'val', 'cpu', 16)

    class Red(nn.Module):
        def data_preprocessor(self, batch):
            return batch

        def forward(self, x, mode):
            assert mode == 'tensor' and x.shape[1:] == (3, 40, 40)
            red = x[:, 0].mean((1, 2))
            return torch.stack([red, 100 - red], 1)

    assert training.top1(Red(), val, 40) == 100
    val.labels[0] = 1
    assert training.top1(Red(), val, 40) == 75


RUN = ['--data', 'data', '--size', '16', '--epochs', '3', '--batch', '6', '--seeds', '0', '1']


def run(tool, monkeypatch, capsys, *arguments):
    monkeypatch.setattr(sys, 'argv', ['tool', *map(str, arguments)])
    start_method = multiprocessing.get_start_method()
    tool.main()
    assert multiprocessing.get_start_method() == start_method  # tests after this one have workers
    return capsys.readouterr().out


def test_roadmap(load, small, data, monkeypatch, capsys):
    tool = load('tools/method/roadmap.py')
    options = [*RUN, '--time-size', 16, '--time-batch', 1]
    said = run(tool, monkeypatch, capsys, *options)
    report = json.loads(Path('work_dirs/method/roadmap.json').read_text())
    times, trained = report['timing']['steps'], report['training']
    assert set(times) == set(report['parameters']) == {*tool.STEPS, *tool.OTHER_WAYS}
    assert all(row[kind]['median'] > 0 for row in times.values() for kind in tool.KINDS)
    seeds = {step: set(by_seed) for step, by_seed in trained['top1'].items()}
    assert seeds == {step: {'0', '1'} for step in tool.STEPS}
    for step, found in trained['summary'].items():
        assert found['mean'] == pytest.approx(sum(trained['top1'][step].values()) / 2)
        assert (found['gain'] is None) == (step == 'one')
    for label in (tool.STEPS | tool.OTHER_WAYS).values():
        assert f'| {label} |' in said
    assert 'training: the merged operator changes the time by' in said
    assert Path('work_dirs/method/roadmap.png').read_bytes().startswith(b'\x89PNG')
    assert len(list(Path('work_dirs/method/weights').glob('*.pth'))) == 8
    # Trainings alone, again: nothing is trained, and the times that were measured are kept.
    monkeypatch.setattr(
        load('tools/method/small_training.py'), 'train', lambda job: pytest.fail(f'{job} is trained again')
    )
    run(tool, monkeypatch, capsys, *options, '--part', 'train')
    again = json.loads(Path('work_dirs/method/roadmap.json').read_text())
    assert again['timing'] == report['timing']
    assert again['training']['top1'] == trained['top1']


def test_resolution(load, small, data, monkeypatch, capsys):
    tool = load('tools/method/resolution.py')
    said = run(tool, monkeypatch, capsys, *RUN, '--sizes', 16, 48, '--time-batch', 1)
    report = json.loads(Path('work_dirs/method/resolution.json').read_text())
    assert [row['vig']['batch'] for row in report['times'].values()] == [9, 1]
    assert all(set(row) == set(tool.TIMED) for row in report['times'].values())
    for size in ('16', '48'):
        for name in tool.TRAINED:
            assert set(report['top1'][name][size]) == {'0', '1'}
            values = report['top1'][name][size].values()
            assert report['summary'][size][name]['mean'] == pytest.approx(sum(values) / 2)
    assert len(re.findall(r'^\| (?:16|48) \| ', said, re.MULTILINE)) == 6
    assert 'at 48: ViG-T has' in said
    assert Path('work_dirs/method/resolution.png').read_bytes().startswith(b'\x89PNG')


def test_attention_that_is_not_fused_is_the_same(load):
    tool = load('tools/method/resolution.py')
    fused, plain = tool.build('deit', 32), tool.build('plain', 32)
    plain.load_state_dict(fused.state_dict())
    for model in (fused, plain):
        model.eval()
    assert 'pyimpl' in plain.layers[0].attn.scaled_dot_product_attention.__name__
    x = torch.randn(1, 3, 64, 64)
    torch.testing.assert_close(plain(x)[0], fused(x)[0], rtol=1e-4, atol=1e-4)


def test_operations_of_published_models(load):
    """DeiT-T has 1.26 G at 224 (its authors' 1.3 G), ViG-T 1.17 G; ViG-T's grow with the pixels."""
    tool = load('tools/method/resolution.py')
    assert tool.operations('deit', 224, 224) == pytest.approx(1.26e9, rel=0.01)
    assert tool.operations('vig', 224, 224) == pytest.approx(1.17e9, rel=0.01)
    assert tool.operations('vig', 64, 128) == 4 * tool.operations('vig', 64, 64)


@pytest.mark.parametrize(
    ('tool', 'options', 'message'),
    [
        ('roadmap', ['--epochs', 2], '--epochs must be at least 3, got 2'),
        ('roadmap', ['--time-size', 8], '--time-size must be at least 16, got 8'),
        ('roadmap', ['--seeds', 1, 1], '--seeds takes numbers, each once, got [1, 1]'),
        ('roadmap', ['--data', 'elsewhere'], 'pictures are missing: expected '),
        ('roadmap', ['--batch', 7, '--part', 'train'], '--batch 7: data/train has only 6 pictures'),
        ('roadmap', ['--at-once', 0], '--at-once must be at least 1, got 0'),
        (
            'resolution',
            ['--sizes', 32, 40],
            '--size and --sizes must be multiples of 16, got 16 and [32, 40]',
        ),
        ('resolution', ['--sizes', 32, 16], '--sizes must grow, got [32, 16]'),
    ],
)
def test_errors_in_one_line(load, small, data, monkeypatch, capsys, tool, options, message):
    monkeypatch.setattr(sys, 'argv', ['tool', *RUN, *map(str, options)])
    with pytest.raises(SystemExit) as exit_:
        load(f'tools/method/{tool}.py').main()
    assert exit_.value.code == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith('error: ')]
    assert message in line
