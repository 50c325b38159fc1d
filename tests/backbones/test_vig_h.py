"""ViG-H: golden outputs of the released code, shapes, options, training."""

import importlib
import json

import numpy as np
import pytest
import torch
from golden import GOLDEN, array, official_state_dict

from mmvig.backbones import ViGH
from mmvig.checkpoints import our_name

MINI = {'embed_dims': 16, 'depths': [1, 2, 1], 'num_heads': [1, 2, 4]}


def mini(**options):
    options.setdefault('out_indices', (0, 1, 2))
    torch.manual_seed(0)
    return ViGH(MINI, **options)


@pytest.fixture(scope='module')
def golden():
    return np.load(GOLDEN)


CASES = [
    ('tiny', 'vig_h_t/2x3x64x96', (2, 3, 64, 96)),
    ('small', 'vig_h_s/1x3x96x64', (1, 3, 96, 64)),
]


@pytest.mark.parametrize(('arch', 'case', 'shape'), CASES)
def test_golden_outputs(golden, arch, case, shape):
    model = ViGH(arch).eval()
    model.load_state_dict(official_state_dict(arch))
    with torch.no_grad():
        maps = model(array('input' + case, shape))
    for i, out in enumerate(maps):
        expected = torch.from_numpy(golden[f'{case}/eval/out{i}'])
        torch.testing.assert_close(out, expected, rtol=0, atol=5e-4)


@pytest.mark.parametrize(('arch', 'case', 'shape'), CASES)
def test_golden_loss_and_gradients(golden, arch, case, shape):
    model = ViGH(arch, drop_path_rate=0.0).train()
    model.load_state_dict(official_state_dict(arch))
    x = array('input' + case, shape).requires_grad_()
    maps = model(x)
    loss = sum((y * array(f'w{i}' + case, y.shape)).sum() for i, y in enumerate(maps))
    loss.backward()
    assert loss.item() == pytest.approx(golden[f'{case}/loss'].item(), rel=1e-3)
    assert x.grad.norm().item() == pytest.approx(golden[f'{case}/grad/input_norm'].item(), rel=1e-3)
    expected = json.loads(bytes(golden[f'{case}/grad/json']))
    parameters = dict(model.named_parameters())
    assert {our_name(name) for name in expected} == set(parameters)
    for name, (norm, probe) in expected.items():
        grad = parameters[our_name(name)].grad.double()
        assert grad.norm().item() == pytest.approx(norm, rel=1e-3), name
        product = (grad * array('probe' + name, grad.shape)).sum().item()
        assert product == pytest.approx(probe, rel=1e-3, abs=1e-3 * norm), name


def test_golden_logits(golden):
    """The official classifier file: its norm becomes the output norm of the only output, stage 3."""
    weights = official_state_dict('tiny', classifier=True)
    model = ViGH('tiny', out_indices=(3,)).eval()
    model.load_state_dict({'model': weights})
    with torch.no_grad():
        (features,) = model(array('inputvig_h_t/cls', (2, 3, 64, 64)))
    pooled = features.mean((2, 3))
    logits = pooled @ weights['classifier.head.weight'].T + weights['classifier.head.bias']
    torch.testing.assert_close(logits, torch.from_numpy(golden['vig_h_t/cls/logits']), rtol=0, atol=5e-4)


@pytest.mark.parametrize(
    ('arch', 'parameters'), [('tiny', 27_833_024), ('small', 49_284_032), ('base', 87_881_152)]
)
def test_parameter_counts(arch, parameters):
    with torch.device('meta'):
        assert sum(p.numel() for p in ViGH(arch).parameters()) == parameters


@pytest.mark.parametrize('size', [(1, 1), (3, 50), (31, 31), (32, 64), (112, 137)])
def test_strides_of_any_size(size):
    maps = mini()(torch.randn(2, 3, *size))
    height, width = size
    for i, out in enumerate(maps):
        for _ in range(2 if i == 0 else 1):
            height, width = -(-height // 2), -(-width // 2)
        assert out.shape == (2, 16 * 2**i, height, width)
        assert out.is_contiguous()


def test_large_odd_size():
    arch = {'embed_dims': 16, 'depths': [1, 1, 1, 1], 'num_heads': [1, 2, 4, 8]}
    with torch.no_grad():
        (out,) = ViGH(arch, out_indices=(3,)).eval()(torch.randn(1, 3, 800, 1333))
    assert out.shape == (1, 128, 25, 42) and out.isfinite().all()


@pytest.mark.parametrize('out_indices', [(0, 1, 2), (2,), (0,), (0, 1)])
def test_every_parameter_gets_a_gradient(out_indices):
    model = mini(out_indices=out_indices, in_channels=4).train()
    maps = model(torch.randn(2, 4, 33, 47))
    assert len(maps) == len(out_indices)
    sum((out * torch.randn_like(out)).sum() for out in maps).backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())


def test_only_the_outputs_have_norms():
    names = {name for name, _ in mini(out_indices=(1,)).named_children()}
    assert names == {'stem', 'stages', 'norm1'}


def test_checkpointed_blocks_compute_the_same():
    torch.manual_seed(0)
    x = torch.randn(2, 3, 40, 40)
    grads = []
    for with_cp in (False, True):
        model = mini(with_cp=with_cp, drop_path_rate=0.5).train()
        torch.manual_seed(1)  # the same paths are dropped
        sum(out.square().sum() for out in model(x)).backward()
        grads.append([p.grad for p in model.parameters()])
    torch.testing.assert_close(grads[0], grads[1])


@pytest.mark.parametrize('frozen_stages', [-1, 0, 1, 3])
def test_frozen_stages(frozen_stages):
    model = mini(frozen_stages=frozen_stages, drop_path_rate=0.9)
    assert model.train() is model
    frozen = {'stem'} if frozen_stages >= 0 else set()
    for i in range(max(frozen_stages, 0)):
        frozen |= {f'stages.{i}', f'norm{i}'}
    for name, module in model.named_modules():
        if name in frozen:
            assert not module.training
    for name, parameter in model.named_parameters():
        is_frozen = any(name.startswith(f'{prefix}.') for prefix in frozen)
        assert parameter.requires_grad == (not is_frozen), name
    if frozen_stages < 3:
        sum(out.sum() for out in model(torch.randn(1, 3, 32, 32))).backward()


def test_drop_path_grows_linearly_and_acts_only_in_training():
    with torch.device('meta'):
        models = [ViGH(arch) for arch in ('tiny', 'small', 'base')]
    rates = [block.drop_path.rate for stage in models[0].stages for block in stage.blocks]
    assert rates == pytest.approx([0.2 * i / 10 for i in range(11)])
    assert [model.stages[3].blocks[1].drop_path.rate for model in models[1:]] == pytest.approx([0.3, 0.6])
    model = mini(drop_path_rate=0.9)
    x = torch.randn(4, 3, 32, 32)
    assert not torch.equal(model.train()(x)[2], model(x)[2])
    assert torch.equal(model.eval()(x)[2], model(x)[2])


def test_training_and_evaluation_compute_the_same():
    model = mini(drop_path_rate=0.0)
    x = torch.randn(1, 3, 40, 56)
    for a, b in zip(model.train()(x), model.eval()(x), strict=True):
        assert torch.equal(a, b)


def test_initialisation():
    torch.manual_seed(0)
    model = ViGH('tiny')
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear):
            assert module.weight.std().item() == pytest.approx(0.02, rel=0.1), name
            assert module.weight.abs().max() <= 2.0
            assert module.bias is None or not module.bias.any()
        elif isinstance(module, torch.nn.LayerNorm):
            assert (module.weight == 1).all() and not module.bias.any()
        elif isinstance(module, torch.nn.RMSNorm):
            assert (module.weight == 1).all()
        elif isinstance(module, torch.nn.Conv2d) and module.groups > 1:
            bound = 2**-2.5 * (6 / (9 + 9 * module.out_channels)) ** 0.5
            assert 0.9 * bound < module.weight.abs().max() <= bound
        elif isinstance(module, torch.nn.Conv2d):
            bound = (module.in_channels * 9) ** -0.5  # PyTorch's default
            assert 0.9 * bound < module.weight.abs().max() <= bound


def test_exports_with_dynamic_size(monkeypatch):
    # Steps for 128 * 2^2 tokens, enough here and soon traced; tests/ops exports all of them.
    monkeypatch.setattr(importlib.import_module('mmvig.ops.bigla.chunked'), 'TRACED_STEPS', 2)
    model = ViGH({'embed_dims': 16, 'depths': [1, 1], 'num_heads': [1, 2]}, out_indices=(0, 1)).eval()
    sizes = {
        2: torch.export.Dim('height', min=9, max=4096),
        3: torch.export.Dim('width', min=9, max=4096),
    }
    example = torch.randn(1, 3, 64, 96)
    with torch.no_grad():
        exported = torch.export.export(model, (example,), dynamic_shapes={'x': sizes}).module()
        for size in [(64, 64), (33, 47), (90, 77)]:
            x = torch.randn(1, 3, *size)
            for out, expected in zip(exported(x), model(x), strict=True):
                torch.testing.assert_close(out, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        ({'arch': 'huge'}, "arch must be one of .*'tiny'.* got 'huge'"),
        ({'arch': {'embed_dims': 16}}, 'arch as a dict must have the keys'),
        (
            {'arch': {'embed_dims': 16, 'depths': [1, 1], 'num_heads': [1]}},
            'as many depths as num_heads',
        ),
        (
            {'arch': {'embed_dims': 18, 'depths': [1], 'num_heads': [2]}},
            'multiple of 2 \\* num_heads',
        ),
        ({'out_indices': (4,)}, r'out_indices must be in -4..3, got \(4,\)'),
        ({'out_indices': ()}, 'at least one stage'),
        ({'out_indices': (1, 1)}, 'each once'),
        ({'drop_path_rate': 1.0}, r'drop_path_rate must be in \[0, 1\), got 1.0'),
        ({'frozen_stages': 5}, 'frozen_stages must be in -1..4, got 5'),
        ({'backend': 'cuda'}, "backend must be 'auto' or one of"),
    ],
)
def test_bad_options_are_named(options, message):
    if isinstance(options.get('arch'), dict):
        options = {'out_indices': (0,), **options}
    with pytest.raises(ValueError, match=message):
        ViGH(**options)


def test_unknown_arguments_are_refused():
    with pytest.raises(TypeError, match='window_size'):
        ViGH(window_size=7)


@pytest.mark.parametrize('shape', [(3, 32, 32), (1, 4, 32, 32), (1, 3, 0, 32)])
def test_bad_images_are_named(shape):
    with pytest.raises(ValueError, match=r'images must be \[B, 3, H, W\]'):
        mini()(torch.zeros(shape))


def test_layer_depth():
    with torch.device('meta'):
        model = ViGH('tiny')
    expected = {
        'backbone.stem.down1.conv.weight': 0,
        'backbone.stages.0.blocks.0.mixer.qkv.weight': 1,
        'backbone.stages.0.downsample.conv.weight': 2,
        'backbone.stages.3.blocks.1.mlp.fc1.weight': 11,
        'backbone.norm0.weight': 12,
        'decode_head.conv_seg.weight': 12,
    }
    for name, depth in expected.items():
        assert model.get_layer_depth(name, 'backbone.') == (depth, 13), name
