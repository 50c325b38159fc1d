"""Benchmarks of whole models, at tiny sizes on the CPU: that they run and report, not what they find."""

import argparse
import importlib
import json
import math
import os
import signal
import sys
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from mmengine.config import Config
from mmengine.registry import MODELS, DefaultScope, init_default_scope
from programs import run_well
from small_configs import write_small
from torch import nn

from mmvig.engine.preflight import SetupError
from mmvig.ops import bigla

ROOT = Path(__file__).resolve().parents[1]
BENCHMARKS = ROOT / 'tools/benchmark'
MASK_RCNN = ROOT / 'configs/detection/maskrcnn_vigh_t_shapes_cpu.py'
UPERNET = ROOT / 'configs/segmentation/upernet_vigh_t_shapes.py'
SMALL_MASK_RCNN = f"""
_base_ = [{str(MASK_RCNN)!r}]
arch = dict(_delete_=True, embed_dims=32, depths=[1, 1, 1, 1], num_heads=[1, 2, 4, 8])
model = dict(backbone=dict(arch=arch), neck=dict(in_channels=[32, 64, 128, 256]))
"""
# With a head of few channels; the backbone is one that has peers.
SMALL_UPERNET = f"""
_base_ = [{str(UPERNET)!r}]
model = dict(decode_head=dict(channels=16), auxiliary_head=dict(channels=16))
"""
CPU = ['--device', 'cpu']
TIMES = {'median', 'p10', 'p90'}


def assert_positive(row, keys):
    assert keys <= row.keys()
    for key in keys:
        assert math.isfinite(row[key]) and row[key] > 0, (key, row[key])


@pytest.fixture
def module(monkeypatch):
    """Import a benchmark's module."""
    monkeypatch.setattr(sys, 'path', [str(BENCHMARKS), *sys.path])
    before = set(sys.modules)
    yield importlib.import_module
    for name in {path.stem for path in BENCHMARKS.glob('*.py')} - before:
        sys.modules.pop(name, None)


def test_backbones(tmp_path):
    models = ['--models', 'ViG-H-T', 'Swin-T', 'DeiT-T', '--peers-from', 'torchvision']
    said = run_well('benchmark/backbone.py', *CPU, '--quick', '--shapes', '32x64 b2', *models, cwd=tmp_path)
    out = tmp_path / 'work_dirs/benchmark'
    report = json.loads((out / 'backbone.json').read_text())
    assert report['complete'] and report['torch'] == torch.__version__
    rows = {(row['model'], row['step']): row for row in report['rows']}
    assert len(rows) == len(report['rows']) == 6
    for step in ('inference', 'training'):
        ours, swin = rows['ViG-H-T', step], rows['Swin-T', step]
        for row in (ours, swin):
            assert row['status'] == 'ok'
            assert_positive(row, TIMES | {'latency', 'host', 'images_per_second', 'repeats'})
            assert row['images_per_second'] == pytest.approx(2 / row['median'])
        assert ours['ratios'] == {'Swin-T': pytest.approx(swin['median'] / ours['median'])}
        assert ours['errors']['maps'] < 1e-4 and swin['ratios'] == {}
        assert rows['DeiT-T', step]['status'] == 'absent'
    assert 'DeiT-T is timed from timm alone' in said
    assert (out / 'backbone.png').read_bytes().startswith(b'\x89PNG')


def test_detectors_and_segmentors(tmp_path):
    (tmp_path / 'mask_rcnn.py').write_text(SMALL_MASK_RCNN)
    (tmp_path / 'upernet.py').write_text(SMALL_UPERNET)
    few = ['--repeats', '2', '--warm-up', '1', '--batch', '2', '--shape', '32', '64', '--out', 'here']
    said = run_well('benchmark/detector.py', *CPU, 'mask_rcnn.py', 'upernet.py', *few, cwd=tmp_path)
    report = json.loads((tmp_path / 'here/detector.json').read_text())
    assert report['complete']
    detector, ours, swin = report['rows']
    name = 'upernet'
    assert [row['name'] for row in report['rows']] == ['mask_rcnn', name, f'{name} with swin']
    for row in report['rows']:
        assert row['status'] == 'ok' and row['shape'] == [32, 64] and row['precision'] == 'fp32'
        assert_positive(row['training'], TIMES | {'backbone_forward', 'backbone_backward', 'loss'})
        assert_positive(row['inference'], TIMES | {'backbone_forward'})
        for step in ('training', 'inference'):
            assert 0 < row[step]['backbone_share'] < 1
    assert detector['inference']['detections'] > 0 and 'detections' not in ours['inference']
    for step in ('training', 'inference'):
        assert swin['ratios'][step] == pytest.approx(swin[step]['median'] / ours[step]['median'])
    assert f'{name} with swin' in said


def test_plain_vig_next_to_vit(module, monkeypatch, tmp_path):
    detector = module('detector')
    config = str(ROOT / 'configs/detection/maskrcnn_vig_t.py')
    options = ['--device', 'cpu', '--peers', 'vit', '--shape', '64', '96', '--out', str(tmp_path)]
    monkeypatch.setattr(sys, 'argv', ['detector.py', config, *options])
    (_, ours, shape), (name, vit, _) = detector.choose_models(detector.parse_args())
    assert name == 'maskrcnn_vig_t with vit'
    x = torch.zeros(1, 3, *shape)
    for cfg in (ours, vit):
        (augment,) = cfg.model.data_preprocessor.batch_augments
        assert augment.size == shape
        init_default_scope('mmdet')
        backbone = MODELS.build(cfg.model.backbone)
        (found,) = backbone(x)
        assert found.shape == (1, 192, 4, 6)
        backbone.get_layer_depth('pos_embed', '')  # for the config's learning rates


def test_segmentors_get_images_of_the_shape(module, monkeypatch, tmp_path):
    detector = module('detector')
    options = ['--device', 'cpu', '--peers', 'none', '--shape', '64', '96', '--out', str(tmp_path)]
    monkeypatch.setattr(sys, 'argv', ['detector.py', str(UPERNET), *options])
    ((_, cfg, shape),) = detector.choose_models(detector.parse_args())
    init_default_scope('mmseg')
    preprocessor = MODELS.build(cfg.model.data_preprocessor)
    data = preprocessor(detector.random_batch(cfg, 2, shape), training=True)
    assert data['inputs'].shape == (2, 3, 64, 96)


def test_fused_operators(module, monkeypatch, tmp_path):
    fused = module('fused')
    # The interpreter takes milliseconds a program.
    monkeypatch.setattr(fused, 'kernel_time', lambda function, device, graph: function() and 1.0)
    monkeypatch.setattr(fused, 'copy_bandwidth', lambda device: 1e9)
    options = ['--device', 'cpu', '--shapes', '1,2,3,32', '--dtype', 'fp32', '--out', str(tmp_path)]
    monkeypatch.setattr(sys, 'argv', ['fused.py', *options])
    fused.main()
    rows = json.loads((tmp_path / 'fused.json').read_text())['rows']
    assert [row['operator'] for row in rows] == [name for name in fused.OPERATORS if name != 'conv_norm']
    assert not any(row['wrong'] for row in rows)
    by_name = {row['operator']: row for row in rows}
    size = 1 * 2 * 3 * 32 * 4
    assert by_name['add_norm']['floor'] * 1e9 == 4 * size + 2 * 32 * 4  # x, branch, sum, norm; weights
    # Forward x and y; backward dy, x and dx; three times the weight's size.
    assert by_name['dwconv']['training_floor'] * 1e9 == 2 * size + 3 * size + 3 * 32 * 9 * 4
    options[5:6] = ['bf16', '--operators', 'conv_norm']
    monkeypatch.setattr(sys, 'argv', ['fused.py', *options])
    fused.main()
    (row,) = json.loads((tmp_path / 'fused.json').read_text())['rows']
    assert row['operator'] == 'conv_norm' and not row['wrong']
    assert row['floor'] * 1e9 == 2 * (3 * 4 * 6 + 2 * 3 * 32) + 4 * (32 * 27 + 3 * 32)


@pytest.mark.parametrize(
    ('tokens', 'key', 'value', 'dtype', 'chunks'),
    [
        (1, 16, 32, torch.bfloat16, None),
        (17, 12, 24, torch.float16, 1),  # two chunks, as the interpreter's have 16 tokens
        (50, 16, 32, torch.bfloat16, 2),  # two segments
    ],
)
def test_one_direction_twice_is_the_operator(module, monkeypatch, tokens, key, value, dtype, chunks):
    one_direction = module('one_direction')
    if chunks:
        plan = one_direction.plan
        monkeypatch.setattr(one_direction, 'plan', lambda *widths: {**plan(*widths), 'NC': chunks})
    device = 'cuda' if torch.cuda.is_available() else 'cpu'
    inputs = module('bigla').make_inputs((1, 1, tokens, key, value), dtype, device)
    do = torch.randn_like(inputs[2])
    results = []
    for function, dtype_of in (
        (one_direction.twice, dtype),
        (lambda *x: bigla(*x, backend='reference'), torch.float64),
    ):
        leaves = [x.detach().to(dtype_of).requires_grad_() for x in inputs]
        o = function(*leaves)
        results.append([o, *torch.autograd.grad(o, leaves, do.to(dtype_of))])
    tolerance = 2e-2 if dtype == torch.bfloat16 else 2e-3
    for name, a, e in zip(('o', 'q', 'k', 'v', 'g_fwd', 'g_bwd'), *results, strict=True):
        assert a.dtype == dtype and a.isfinite().all(), name
        assert (a - e).abs().max() <= tolerance * e.abs().max(), name


def test_one_direction_refuses_float32(module):
    with pytest.raises(ValueError, match='bf16 and fp16 alone'):
        module('one_direction').one_direction(*torch.zeros(4, 1, 3, 1, 16))


def test_bigla_leaves_out_what_cannot_run(module, capsys):
    benchmark = module('bigla')
    for dtype, device in (('bf16', 'cpu'), ('fp32', 'cuda')):
        assert list(benchmark.candidates([], ['twice'], dtype, device)) == []
        assert 'one direction twice runs on GPUs' in capsys.readouterr().out
    assert list(benchmark.candidates([], ['twice'], 'fp16', 'cuda')) == ['one direction twice']


def test_backward_marks_enclose_the_backbone_alone(module, monkeypatch):
    """Against a head and a backbone with backward passes of known times, by a clock of the test itself."""
    detector, common = module('detector'), module('common')
    now = [0.0]
    monkeypatch.setattr(common, 'time', SimpleNamespace(perf_counter=lambda: now[0]))

    class Slow(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, seconds):
            ctx.seconds = seconds
            return x.clone()

        @staticmethod
        def backward(ctx, gradient):
            now[0] += ctx.seconds
            return gradient, None

    class Backbone(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(4))

        def forward(self, x):
            first = Slow.apply(self.weight * x, 0.01)
            return first * 1, Slow.apply(first, 0.02) * 1

    backbone = Backbone()
    marks = detector.BackboneMarks(backbone, common.Clock('cpu'))
    maps = backbone(torch.ones(4))
    sum(Slow.apply(each, 0.1).sum() for each in maps).backward()
    marks.end_backward()
    taken = marks.take()
    assert taken['backward end'] - taken['backward begin'] == pytest.approx(0.03)
    assert marks.take() == {}


def test_a_wrong_result_is_not_timed(module, monkeypatch):
    steps, models = module('steps'), module('models')
    from mmvig.backbones import mixer

    real = mixer.bigla_packed

    def wrong(*inputs, backend):
        o = real(*inputs, backend=backend)
        return o.roll(1, dims=1) if backend == 'auto' else o

    monkeypatch.setattr(mixer, 'bigla_packed', wrong)
    with pytest.raises(steps.Wrong, match='error of the'):
        steps.check_ours(models.MODELS['ViG-T'], 'fp32', 'cpu')


def test_the_profile_lists_the_largest_first(module):
    x, y = torch.rand(400, 400), torch.rand(10)

    def step():
        y.sin()
        y.sin()
        return x @ x

    rows = module('steps').kernels(step, 'cpu')
    found = {row['name']: row for row in rows}
    assert rows[0]['name'] == 'aten::mm' and rows[0]['share'] > 0.5
    assert found['aten::mm']['count'] == 1 and found['aten::sin']['count'] == 2
    assert sum(row['share'] for row in rows) == pytest.approx(1)
    for row in rows[:2]:
        assert_positive(row, {'seconds', 'count', 'share'})


@pytest.mark.parametrize(
    ('value', 'shape', 'message'),
    [(math.nan, (2, 3), 'not finite'), (1.0, (3, 2), 'have the shapes'), (1.0, (2, 3), 'such as unused')],
)
def test_broken_steps_are_found(module, value, shape, message):
    steps = module('steps')
    model = nn.Module()
    model.unused = nn.Parameter(torch.ones(1))
    maps = (torch.full((2, 3), value, requires_grad=True),)
    with pytest.raises(steps.Wrong, match=message):
        steps.check_step(lambda: maps, model, [shape])


@pytest.mark.parametrize('power', [1, 2])
def test_growth_finds_the_power(module, power):
    sides = {64: 4, 128: 1, 256: 1}
    shared = {'status': 'ok', 'mode': 'default', 'model': 'it', 'step': 'inference', 'dtype': 'fp32'}
    rows = [
        {**shared, 'pixels': batch * side**2, 'batch': batch, 'median': batch * float(side**2) ** power}
        for side, batch in sides.items()
    ]
    (found,) = module('backbone').growth(rows).values()
    assert found['exponent'] == pytest.approx(power)
    assert found['ratio'] == pytest.approx(16 ** (power - 1))


def test_memory_running_out_ends_one_row(module, monkeypatch, tmp_path):
    backbone = module('backbone')

    def full(*_):
        raise torch.cuda.OutOfMemoryError('full')

    monkeypatch.setattr(backbone, 'peak_memory', full)
    options = dict(device='cpu', seconds=0.01, peers_from='torchvision', backend='auto', profile=False)
    args = argparse.Namespace(**options, compile=[], graph=False, eager=False, best=False)
    benchmark = backbone.Benchmark(args, tmp_path / 'it.json')
    swin = backbone.choose(['Swin-T'])[0]
    benchmark.run(swin, backbone.Shape(1, 32, 32), 'fp32', ['inference'])
    monkeypatch.undo()
    monkeypatch.setattr(sys, 'path', [str(BENCHMARKS), *sys.path])
    benchmark.run(swin, backbone.Shape(1, 32, 32), 'fp32', ['inference'])
    rows = json.loads((tmp_path / 'it.json').read_text())['rows']
    assert [row['status'] for row in rows] == ['out of memory', 'ok']


def test_compiled_modes(module, monkeypatch, tmp_path):
    backbone, asked = module('backbone'), []
    monkeypatch.setattr(torch, 'compile', lambda model, mode: asked.append(mode) or model)
    options = dict(device='cpu', seconds=0.01, peers_from='torchvision', backend='auto', profile=False)
    compiled = ['reduce-overhead', 'default']
    args = argparse.Namespace(**options, compile=compiled, graph=False, eager=False, best=False)
    benchmark = backbone.Benchmark(args, tmp_path / 'it.json')
    benchmark.run(backbone.choose(['Swin-T'])[0], backbone.Shape(1, 32, 32), 'fp32', ['inference'])
    assert asked == ['default', 'reduce-overhead']
    assert [row['mode'] for row in benchmark.rows] == ['default', 'compiled', 'comp+graph']
    assert all(row['status'] == 'ok' for row in benchmark.rows)


def test_peers_at_their_best(module, monkeypatch, tmp_path):
    backbone = module('backbone')
    monkeypatch.setattr(torch, 'compile', lambda model, mode: model)
    monkeypatch.setattr(backbone, 'capture', lambda step: step)
    times = iter((4.0, 2.0, 3.0, 1.0))
    monkeypatch.setattr(backbone, 'measure', lambda *_: {'median': next(times), 'p10': 1.0, 'p90': 1.0})
    options = dict(device='cpu', seconds=0.01, peers_from='torchvision', backend='auto', profile=False)
    args = argparse.Namespace(**options, compile=[], graph=False, eager=False, best=True)
    benchmark = backbone.Benchmark(args, tmp_path / 'it.json')
    for entry in backbone.choose(['Swin-T', 'ViG-H-T']):
        benchmark.run(entry, backbone.Shape(1, 32, 32), 'fp32', ['inference'])
    assert [row['mode'] for row in benchmark.rows] == ['default', 'graph', 'captured', 'default']
    assert benchmark.rows[-1]['ratios'] == {'Swin-T': 2.0}
    benchmark.rows[1]['status'] = 'failed'
    assert benchmark.ratios(entry, benchmark.rows[-1]) == {}
    benchmark.rows[1]['status'] = 'ok'
    backbone.plot_accuracy(benchmark.rows, tmp_path / 'it.png')
    assert (tmp_path / 'it.png').read_bytes().startswith(b'\x89PNG')


def test_models_that_are_as_accurate_and_faster(module):
    backbone = module('backbone')
    times = {'ViG-H-S': 4.0, 'ViG-H-B': 3.0, 'EfficientViT-L2': 2.0, 'Swin-S': 1.0, 'DaViT-S': 5.0}
    rows = [
        {'status': 'ok', 'model': name, 'median': each * slower, 'batch': 2}
        | {'shape': '64x64 b2', 'dtype': 'bf16', 'step': 'inference', 'mode': mode}
        for name, each in times.items()
        for mode, slower in (('default', 4), ('graph', 1))
    ]
    rows.append({**rows[0], 'model': 'ConvNeXt-B', 'median': 0.1})
    rows.append({**rows[-1], 'status': 'failed', 'mode': 'captured'})
    assert backbone.ahead(rows) == {
        'ViG-H-S 64x64 b2 bf16 inference': ['ViG-H-B', 'EfficientViT-L2'],
        'ViG-H-B 64x64 b2 bf16 inference': ['EfficientViT-L2'],
    }


def test_peers_maps(module):
    models = module('models')
    for name in ('ResNet-50', 'MambaOut-T', 'EfficientViT-L1', 'Hiera-T', 'DeiT-T'):
        entry = models.MODELS[name]
        model = models.build(entry, 64, 96).eval()
        x = torch.zeros(1, 3, 64, 96).to(memory_format=entry.memory_format)
        assert [tuple(y.shape) for y in model(x)] == entry.shapes(model, 1, 64, 96)


@pytest.mark.parametrize(
    ('name', 'options', 'message'),
    [
        ('backbone', [], 'no CUDA device'),
        ('backbone', ['--device', 'cpu', '--best'], '--best needs a CUDA device'),
        ('backbone', ['--device', 'cpu', '--best', '--sweep'], 'leave out --sweep'),
        ('backbone', ['--device', 'cpu', '--models', 'Wine-*'], "no model matches 'Wine-*'"),
        ('backbone', ['--device', 'cpu', '--shapes', '100x64 b1'], "multiples of 32, got '100x64 b1'"),
        ('backbone', ['--device', 'cpu', '--shapes', '64 b1'], "expected 'HxW bN'"),
        ('backbone', ['--device', 'cpu', '--sweep', '--shapes', '64x64 b1'], 'leave out --shapes'),
        ('backbone', ['--device', 'cpu', '--seconds', '0'], 'above 0'),
        ('backbone', ['--device', 'cpu', '--seconds', 'inf'], 'above 0'),
        ('backbone', ['--device', 'cpu', '--out', 'empty.py/x'], 'empty.py is a file'),
        ('backbone', ['--device', 'cpu', '--graph'], '--graph needs a CUDA device'),
        ('bigla', [], 'no CUDA device'),
        ('bigla', ['--device', 'cpu', '--graph'], '--graph needs a CUDA device'),
        ('bigla', ['--device', 'cpu', '--shapes', '1,x,1,4,4,4'], "got '1,x,1,4,4,4'"),
        ('fused', ['--device', 'cpu', '--shapes', '0,2,2,32'], "got '0,2,2,32'"),
        ('detector', [], 'no CUDA device'),
        ('detector', ['--device', 'cpu', 'nowhere.py'], 'config is missing'),
        ('detector', ['--device', 'cpu', 'empty.py'], 'no config of a detector'),
        ('detector', ['--device', 'cpu', str(MASK_RCNN), '--shape', '0', '4'], 'at least 1, got 0 4'),
        ('detector', ['--device', 'cpu', '--repeats', '1'], '--repeats must be at least 2'),
        ('detector', ['--device', 'cpu', '--precision', 'fp16'], 'fp16 needs a CUDA device'),
    ],
)
def test_bad_options(module, monkeypatch, capsys, tmp_path, name, options, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'empty.py').write_text('a = 1\n')
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: False)
    monkeypatch.setattr(sys, 'argv', [f'{name}.py', *options])
    main = module(name).main
    capsys.readouterr()  # what torch says of this machine's CUDA at its first import
    with pytest.raises(SystemExit) as exit_:
        main()
    (line,) = capsys.readouterr().err.splitlines()
    assert exit_.value.code == 2 and message in line


@pytest.mark.parametrize(
    ('config', 'shape'),
    [
        ('detection/maskrcnn_vigh_t.py', (800, 1333)),
        ('detection/maskrcnn_vigh_t_3x_ms.py', (800, 1333)),
        ('segmentation/upernet_vigh_t.py', (512, 512)),
        ('segmentation/upernet_vigh_t_camvid.py', (352, 480)),
    ],
)
def test_images_have_the_configs_size(module, config, shape):
    detector = module('detector')
    args = argparse.Namespace(configs=[str(ROOT / 'configs' / config)], shape=None, peers=['swin'])
    (_, ours, found), (_, swin, _) = detector.choose_models(args)
    assert found == shape
    assert swin.model.backbone.type == 'SwinTransformer'
    swin.model.backbone = ours.model.backbone
    assert swin.to_dict() == ours.to_dict()


@pytest.mark.gpu
def test_a_captured_step_keeps_what_it_reads(module):
    steps = module('steps')

    def make() -> Callable:
        model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Dropout(), nn.Conv2d(8, 8, 3)).cuda()
        x = torch.randn(2, 3, 32, 32, device='cuda')
        step = steps.make_step(model, lambda x: (model(x),), x, 'fp32', 'training')
        step()
        return step

    replay = steps.capture(make())
    torch.manual_seed(0)
    before = replay()[0].clone()
    freed = [torch.full((216,), math.nan, device='cuda') for _ in range(1000)]  # as many as weights
    torch.manual_seed(0)
    torch.testing.assert_close(replay()[0], before)
    del freed


def test_a_package_and_its_model_take_turns(module, monkeypatch, capsys):
    aoti = module('aoti')
    clock, calls = aoti.Clock('cpu'), []
    monkeypatch.setattr(aoti, 'Clock', lambda _: clock)
    found = aoti.take_turns({name: partial(calls.append, name) for name in ('eager', 'package')}, 3)
    assert calls == ['eager', 'package'] * (aoti.WARM_UP + 3)
    assert found.keys() == {'eager', 'package'} and found['package'].keys() == TIMES
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: True)
    monkeypatch.setattr(sys, 'argv', ['aoti.py', 'cfg.py', 'no.pt2'])
    with pytest.raises(SystemExit):
        aoti.main()
    assert 'error: package is missing' in capsys.readouterr().err


@pytest.fixture(scope='module')
def small(tmp_path_factory):
    """A detector's config and a segmentor's, of a few small pictures."""
    return write_small(tmp_path_factory.mktemp('small'), 6, 3, 4)


def test_the_job(small, tmp_path):
    """A model of each config, in processes of their own."""
    options = ['--peers', '--amp', 'none', '--warm-up', 1, '--iterations', 4, '--turn', 2, '--skip', 1]
    said = run_well('benchmark/training.py', *map(str, small), *options, cwd=tmp_path)
    out = tmp_path / 'work_dirs/benchmark'
    row, other = json.loads((out / 'training.json').read_text())['rows']
    assert [row['name'], other['name']] == [Path(path).stem for path in small]
    assert other['status'] == 'ok' and other['pixels'] > 0
    assert row['status'] == 'ok' and row['iterations'] == 4 and (out / 'training.png').exists()
    assert row['mean'] == pytest.approx(sum(row['parts'].values()))
    assert_positive(
        row['parts'], {'data', 'preprocessing', 'backbone', 'neck', 'heads', 'backward', 'step'}
    )
    assert sum(row['sizes'].values()) == 6 and row['replayed'] is None and row['gpu'] is None
    assert f'{row["mean"] * 1e3:.1f}' in said


@pytest.mark.parametrize('turns', [0, 2])
def test_the_job_is_interrupted(small, tmp_path, module, monkeypatch, turns):
    """By SIGTERM, as `timeout` sends it: what has been timed is written, and nothing goes on."""
    training, left = module('training'), [turns]

    def measure(model, iterations, skip):
        if not left[0]:
            os.kill(os.getpid(), signal.SIGTERM)
        left[0] -= 1
        model.rows += [{'whole': 0.5, 'data': 0.1}] * iterations

    class Started(training.Model):
        def __init__(self, name, *args):
            self.name, self.rows, self.sizes, self.passes = name, [], Counter(), None
            self.facts, self.killed = {'first': 1.0}, []

        receive = start = finish_warm_up = turn = end = lambda self, *args: None
        kill = lambda self: self.killed.append(1)  # noqa: E731

    Started.measure = measure
    monkeypatch.setattr(training, 'Model', Started)
    out = tmp_path / 'out'
    options = '--amp none --peers resnet50 --loops ours --turn 3 --iterations 60'
    monkeypatch.setattr(sys, 'argv', ['training.py', str(small[0]), *options.split(), '--out', str(out)])
    handler = signal.getsignal(signal.SIGTERM)
    try:
        with pytest.raises(SystemExit, match='interrupted'):
            training.main()
    finally:
        signal.signal(signal.SIGTERM, handler)
    assert (out / 'training.json').exists() == (turns > 0)
    if turns:
        rows = json.loads((out / 'training.json').read_text())['rows']
        assert [(row['iterations'], row['mean']) for row in rows] == [(3, 0.5), (3, 0.5)]


@pytest.mark.parametrize('which', [0, 1])
@pytest.mark.parametrize('inference', [False, True])
def test_turns_of_the_job(small, tmp_path, module, monkeypatch, which, inference):
    monkeypatch.setattr('mmengine.runner.runner.collect_env', dict)
    monkeypatch.setattr('yapf.yapflib.yapf_api.FormatCode', lambda text, **_: (text, False))
    training = module('training')
    cfg = Config.fromfile(small[which])
    cfg.launcher, cfg.work_dir = 'none', str(tmp_path)
    asked, found = iter([2, -1, 0]), []
    turns = training.Turns(0.0, lambda facts: found.append(facts['rows']) or next(asked))
    with DefaultScope.overwrite_default_scope(cfg.default_scope):
        training.run(cfg, inference, turns)
    assert [len(rows) for rows in found] == [1, 2, 1]
    for row in found[1]:
        parts = {name: row[name] for name in training.PARTS if name in row}
        assert row['whole'] == pytest.approx(sum(parts.values()))
        assert ('backward' in parts) == (not inference) and min(parts.values()) >= 0


def test_peers_of_the_job(module):
    training = module('training')
    cfg = Config.fromfile(ROOT / 'configs/detection/maskrcnn_vigh_s.py')
    swin = training.with_peer(cfg, 'swin')
    assert swin.model.backbone.depths == (2, 2, 18, 2) and 'mmvig.RPNHead' in str(swin)
    own = training.with_own_loop(swin)
    used = 'model', 'train_dataloader', 'val_dataloader', 'optim_wrapper', 'default_hooks', 'custom_hooks'
    assert 'mmvig.' not in str([own[key] for key in used])
    assert own.train_dataloader.num_workers == 2 and own.runner_type == 'Runner'
    assert own.model.rpn_head.anchor_generator == {
        **swin.model.rpn_head.anchor_generator,
        'type': 'AnchorGenerator',
    }
    assert cfg.model.backbone.type == 'mmvig.ViGH' and swin.train_dataloader.num_workers == 4
    resnet = training.with_peer(
        Config.fromfile(ROOT / 'configs/segmentation/upernet_vigh_s.py'), 'resnet50'
    )
    assert resnet.model.decode_head.in_channels == [256, 512, 1024, 2048]
    retina = Config.fromfile(ROOT / 'configs/detection/retinanet_vigh_t.py')  # without the first map
    others = [training.with_peer(retina, peer) for peer in training.PEERS]
    assert [other.model.backbone.out_indices for other in others] == [(1, 2, 3)] * 3
    assert [other.model.neck.in_channels[0] for other in others] == [192, 192, 512]
    assert 'mmvig.' not in str([training.with_own_loop(others[0])[key] for key in used])
    with pytest.raises(SetupError, match='no swin of the size'):
        cfg.model.backbone.arch = {'embed_dims': 32}
        training.with_peer(cfg, 'swin')


def test_busy_time_counts_what_overlaps_once(module):
    cuda = torch.autograd.DeviceType.CUDA
    spans = [
        (0, 10, cuda),
        (5, 20, cuda),
        (30, 31, cuda),
        (6, 7, cuda),
        (40, 90, torch.autograd.DeviceType.CPU),
    ]
    events = [
        SimpleNamespace(time_range=SimpleNamespace(start=start, end=end), device_type=device)
        for start, end, device in spans
    ]
    busy = module('training').busy_seconds(SimpleNamespace(events=lambda: events))
    assert busy == pytest.approx(21e-6)
