"""Plain ViG: golden outputs of the released code, shapes, options, training, checkpoints."""

from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from golden import (
    GOLDEN,
    PLAIN_MINI,
    array,
    assert_equal,
    from_file,
    official_plain_shapes,
    official_plain_state_dict,
)
from mmengine.model import BaseModel
from mmengine.runner import load_checkpoint

from mmvig import checkpoints
from mmvig.backbones import ViG, ViGH
from mmvig.ops import bigla

MINI = {'embed_dims': 32, 'depth': 4, 'num_heads': 2, 'conv_act': True}
OUTPUTS = (0, 1, 3)
CASE = 'vig_t/2x3x224x224'


def mini(**options):
    options = {'out_indices': OUTPUTS, 'drop_path_rate': 0.0, **options}
    torch.manual_seed(0)
    return ViG(MINI, **options)


def tokens(side):
    """A convolution's output size, twice."""
    side = (side + 2 - 9) // 8 + 1
    return (side + 2 - 3) // 2 + 1


@pytest.fixture(scope='module')
def golden():
    return np.load(GOLDEN)


@pytest.fixture(scope='module')
def tiny():
    return official_plain_state_dict('tiny')


@pytest.mark.parametrize('mode', ['eval', 'train'])
def test_golden_outputs(golden, tiny, mode):
    model = ViG('tiny', backend='chunked').train(mode == 'train')
    model.load_state_dict(tiny)
    with torch.no_grad():
        (features,) = model(array('input' + CASE, (2, 3, 224, 224)))
    logits = features.mean((2, 3)) @ tiny['head.weight'].T + tiny['head.bias']
    expected = torch.from_numpy(golden[f'{CASE}/{mode}/logits'])
    torch.testing.assert_close(logits, expected, rtol=0, atol=5e-4)
    if mode == 'eval':
        expected = torch.from_numpy(golden[f'{CASE}/eval/feat'])
        torch.testing.assert_close(features[:, ::4], expected, rtol=0, atol=5e-4)


def by_definition(weights, x, heads, silu):
    """The final feature map from official weights, in the formulas of the method."""

    def linear(name, x):
        return F.linear(x, weights[f'{name}.weight'], weights.get(f'{name}.bias'))

    def rms_norm(name, x):
        return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * weights[f'{name}.weight']

    def conv_norm(i, x, stride):
        conv, norm = (f'patch_embed.proj.{j}' for j in (i, i + 1))
        x = F.conv2d(x, weights[f'{conv}.weight'], weights[f'{conv}.bias'], stride=stride, padding=1)
        x = x - x.mean(1, keepdim=True)
        x = (x / (x.square().mean(1, keepdim=True) + 1e-5).sqrt()).movedim(1, -1)
        return (x * weights[f'{norm}.weight'] + weights[f'{norm}.bias']).movedim(-1, 1)

    def act(x):
        return x * x.sigmoid() if silu else x

    def split(x, *widths):
        return [part.unflatten(-1, (heads, -1)) for part in x.split(widths, -1)]

    x = conv_norm(3, F.silu(conv_norm(0, x, 8)), 2)  # [B, C, H, W]
    batch, channels, height, width = x.shape
    position = weights['pos_embed'].mT.reshape(1, channels, 14, 14)
    x = x + F.interpolate(position, (height, width), mode='bicubic', align_corners=False)
    x = x.flatten(2).mT  # [B, N, C]
    for j in range(12):
        mixer = f'blocks.{j}.attn'
        u = rms_norm(f'{mixer}_norm', x).mT.reshape(batch, channels, height, width)
        u = F.conv2d(u, weights[f'{mixer}.in_proj.0.weight'], padding=1, groups=channels)
        u = act(u).flatten(2).mT
        q, k, v = split(linear(f'{mixer}.qkv_proj', u), channels // 2, channels // 2, channels)
        gates = linear(f'{mixer}.gk_proj.1', linear(f'{mixer}.gk_proj.0', u))
        o = bigla(q, k, v, *split(gates, channels // 2, channels // 2), backend='reference')
        (g,) = split(linear(f'{mixer}.g_proj', u).sigmoid(), channels)
        (u,) = split(u, channels)
        y = g * rms_norm(f'{mixer}.g_norm', o) + (1 - g) * rms_norm(f'{mixer}.l_norm', u)
        x = x + linear(f'{mixer}.o_proj', act(y.flatten(2)))
        a, b = linear(f'blocks.{j}.mlp.gate_proj', rms_norm(f'blocks.{j}.mlp_norm', x)).chunk(2, -1)
        x = x + linear(f'blocks.{j}.mlp.down_proj', F.silu(a) * b)
    return rms_norm('norm', x).mT.reshape(batch, channels, height, width)


@pytest.mark.parametrize(('arch', 'heads', 'silu'), [('tiny', 3, True), ('small', 6, False)])
def test_definition_on_another_grid(arch, heads, silu):
    weights = official_plain_state_dict(arch)
    model = ViG(arch).eval()
    model.load_state_dict(weights)
    x = array('another grid', (2, 3, 70, 97))
    with torch.no_grad():
        (features,) = model(x)
        expected = by_definition(weights, x, heads, silu)
    torch.testing.assert_close(features, expected, rtol=0, atol=5e-4)


@pytest.mark.parametrize(
    ('arch', 'parameters'), [('tiny', 5_834_536), ('small', 22_615_144), ('base', 89_022_184)]
)
def test_parameter_counts(arch, parameters):
    with torch.device('meta'):
        model = ViG(arch)
    head = model.num_features[0] * 1000 + 1000
    assert sum(p.numel() for p in model.parameters()) + head == parameters


@pytest.mark.parametrize('size', [(7, 7), (8, 50), (23, 24), (31, 64), (112, 137)])
def test_grids_of_any_size(size):
    maps = mini()(torch.randn(2, 3, *size))
    assert len(maps) == len(OUTPUTS)
    for out in maps:
        assert out.shape == (2, 32, tokens(size[0]), tokens(size[1]))
        assert out.is_contiguous()


def test_large_odd_size():
    with torch.no_grad():
        (out,) = mini(out_indices=None).eval()(torch.randn(1, 3, 800, 1333))
    assert out.shape == (1, 32, 50, 83) and out.isfinite().all()


@pytest.mark.parametrize('out_indices', [(0, 1, 3), (3,), (0,), (2, 0), None])
def test_every_parameter_gets_a_gradient(out_indices):
    model = mini(out_indices=out_indices, in_channels=4).train()
    maps = model(torch.randn(2, 4, 70, 90))
    assert len(maps) == len(out_indices or (3,))
    sum((out * torch.randn_like(out)).sum() for out in maps).backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())


def test_only_the_outputs_have_norms_and_blocks():
    model = mini(out_indices=(1,))
    assert {name for name, _ in model.named_children()} == {'stem', 'blocks', 'norm1'}
    assert len(model.blocks) == 2


def test_outputs_are_what_a_shorter_network_computes():
    model, x = mini().eval(), torch.randn(1, 3, 64, 64)
    for i, out in zip(OUTPUTS, model(x), strict=True):
        short = ViG(MINI, out_indices=(i,)).eval()
        short.load_state_dict(model.state_dict())
        assert torch.equal(short(x)[0], out)


def test_position_embedding_is_resized_only_to_another_grid():
    model = mini(img_size=64)
    assert model.pos_embed.shape == (1, 16, 32)
    grid = model.pos_embed.unflatten(1, (4, 4))
    assert torch.equal(model._position_embedding(4, 4), grid)
    expected = F.interpolate(grid.permute(0, 3, 1, 2), (3, 6), mode='bicubic').permute(0, 2, 3, 1)
    assert torch.equal(model._position_embedding(3, 6), expected)
    assert [mini(img_size=n).pos_embed.shape[1] for n in (7, 22, 23, 224, 512)] == [1, 1, 4, 196, 1024]


def test_checkpointed_blocks_compute_the_same():
    torch.manual_seed(0)
    x = torch.randn(2, 3, 40, 56)
    grads = []
    for with_cp in (False, True):
        model = mini(with_cp=with_cp, drop_path_rate=0.5).train()
        torch.manual_seed(1)  # the same paths are dropped
        sum(out.square().sum() for out in model(x)).backward()
        grads.append([p.grad for p in model.parameters()])
    torch.testing.assert_close(grads[0], grads[1])


@pytest.mark.parametrize('with_cp', [False, True])
@pytest.mark.parametrize('frozen_stages', [-1, 0, 1, 4])
def test_frozen_stages(frozen_stages, with_cp):
    model = mini(frozen_stages=frozen_stages, with_cp=with_cp, drop_path_rate=0.9)
    assert model.train() is model
    frozen = {'stem', 'pos_embed'} if frozen_stages >= 0 else set()
    for i in range(max(frozen_stages, 0)):
        frozen |= {f'blocks.{i}', f'norm{i}'}
    for name, module in model.named_modules():
        if name in frozen:
            assert not module.training
    for name, parameter in model.named_parameters():
        is_frozen = name in frozen or any(name.startswith(f'{prefix}.') for prefix in frozen)
        assert parameter.requires_grad == (not is_frozen), name
    if frozen_stages < 4:
        sum(out.sum() for out in model(torch.randn(1, 3, 32, 48))).backward()
        assert all((p.grad is not None) == p.requires_grad for p in model.parameters())


def test_drop_path_grows_linearly_and_acts_only_in_training():
    for arch, last in (('tiny', 0.0), ('small', 0.2)):
        with torch.device('meta'):
            rates = [block.drop_path.rate for block in ViG(arch).blocks]
        assert rates == pytest.approx([last * i / 11 for i in range(12)])
    assert ViG('base', out_indices=(1,)).blocks[1].drop_path.rate == pytest.approx(0.5 / 11)
    model = mini(drop_path_rate=0.9)
    x = torch.randn(4, 3, 48, 48)
    assert not torch.equal(model.train()(x)[2], model(x)[2])
    assert torch.equal(model.eval()(x)[2], model(x)[2])


def test_training_and_evaluation_compute_the_same():
    model = mini()
    x = torch.randn(1, 3, 40, 56)
    for a, b in zip(model.train()(x), model.eval()(x), strict=True):
        assert torch.equal(a, b)


def test_switches():
    archs = [{**MINI, 'conv_act': a, 'out_act': b} for a in (False, True) for b in (False, True)]
    x = torch.randn(1, 3, 48, 48)
    outs = []
    for arch in archs:
        torch.manual_seed(0)
        outs.append(ViG(arch).eval()(x)[0])
    assert all(not torch.equal(outs[i], outs[j]) for i in range(4) for j in range(i))
    torch.manual_seed(0)
    plain = {key: MINI[key] for key in ('embed_dims', 'depth', 'num_heads')}
    assert torch.equal(ViG(plain).eval()(x)[0], outs[0])


def test_initialisation():
    torch.manual_seed(0)
    model = ViG('tiny')
    assert model.pos_embed.std().item() == pytest.approx(0.02, rel=0.1)
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and '.mixer.' in name:
            bound = 2**-2.5 * (6 / (module.in_features + module.out_features)) ** 0.5
            assert 0.9 * bound < module.weight.abs().max() <= bound, name
            assert module.bias is None or not module.bias.any()
        elif isinstance(module, torch.nn.Linear):
            assert module.weight.std().item() == pytest.approx(0.02, rel=0.05), name
        elif isinstance(module, torch.nn.LayerNorm):
            assert (module.weight == 1).all() and not module.bias.any()
        elif isinstance(module, torch.nn.RMSNorm):
            assert (module.weight == 1).all() and module.eps == 1e-6
        elif isinstance(module, torch.nn.Conv2d) and module.groups > 1:
            bound = 2**-2.5 * (6 / (9 + 9 * module.out_channels)) ** 0.5
            assert 0.9 * bound < module.weight.abs().max() <= bound
        elif isinstance(module, torch.nn.Conv2d):
            bound = (module.in_channels * module.kernel_size[0] ** 2) ** -0.5  # PyTorch's default
            assert 0.9 * bound < module.weight.abs().max() <= bound


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        ({'arch': 'huge'}, "arch must be one of .*'tiny'.* got 'huge'"),
        ({'arch': {'embed_dims': 16}}, 'arch as a dict must have the keys'),
        ({'arch': {**MINI, 'depths': 4}}, 'arch as a dict must have the keys'),
        ({'arch': {**MINI, 'depth': 0}}, 'depth must be positive, got 0'),
        ({'arch': {**MINI, 'embed_dims': 34}}, 'multiple of 2 \\* num_heads'),
        ({'out_indices': (12,)}, r'out_indices must be in -12..11, got \(12,\)'),
        ({'out_indices': (-13,)}, r'out_indices must be in -12..11, got \(-13,\)'),
        ({'out_indices': ()}, 'at least one block'),
        ({'out_indices': (1, 1)}, 'each once'),
        ({'drop_path_rate': 1.0}, r'drop_path_rate must be in \[0, 1\), got 1.0'),
        ({'frozen_stages': 13}, 'frozen_stages must be in -1..12, got 13'),
        ({'frozen_stages': 3, 'out_indices': (1,)}, 'frozen_stages must be in -1..2, got 3'),
        ({'img_size': 6}, 'img_size must be an int of at least 7, got 6'),
        ({'img_size': (224, 224)}, r'img_size must be an int of at least 7, got \(224, 224\)'),
        ({'backend': 'cuda'}, "backend must be 'auto' or one of"),
    ],
)
def test_bad_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        ViG(**options)


def test_unknown_arguments_are_refused():
    with pytest.raises(TypeError, match='patch_size'):
        ViG(patch_size=16)


@pytest.mark.parametrize('shape', [(3, 32, 32), (1, 4, 32, 32), (1, 3, 6, 32), (1, 3, 32, 0)])
def test_bad_images_are_named(shape):
    with pytest.raises(ValueError, match=r'images must be \[B, 3, H, W\] with H, W >= 7'):
        mini()(torch.zeros(shape))


def test_layer_depth():
    model = ViG('tiny')
    expected = {
        'backbone.stem.down1.conv.weight': 0,
        'backbone.pos_embed': 0,
        'backbone.blocks.0.mixer.qkv.weight': 1,
        'backbone.blocks.11.mlp.fc1.weight': 12,
        'backbone.norm11.weight': 13,
        'decode_head.conv_seg.weight': 13,
    }
    for name, depth in expected.items():
        assert model.get_layer_depth(name, 'backbone.') == (depth, 14), name


# Checkpoints: what tests/test_checkpoints.py shows of ViG-H, as far as ViG has its own names.

narrow = partial(ViG, PLAIN_MINI)


@pytest.fixture(scope='module')
def official():
    return official_plain_state_dict('mini')


@pytest.fixture(scope='module')
def loaded(official):
    model = narrow()
    model.load_state_dict(official)
    return model.state_dict()


class Detector(BaseModel):
    """What a detector is to a checkpoint: a backbone and something else."""

    def __init__(self, **options):
        super().__init__()
        self.backbone = narrow(**options)
        self.head = torch.nn.Linear(2, 2)

    def forward(self, x):
        return self.head(x)


@pytest.mark.parametrize('arch', ['tiny', 'small', 'base'])
def test_every_official_name_is_known(arch):
    with torch.device('meta'):
        own = {name: tuple(value.shape) for name, value in ViG(arch).state_dict().items()}
    ours = {checkpoints.our_name(name): shape for name, shape in official_plain_shapes(arch).items()}
    assert ours.pop('head.weight') and ours.pop('head.bias')
    ours['norm11.weight'] = ours.pop('norm.weight')
    assert ours == own


@pytest.mark.parametrize(
    'wrap',
    [
        lambda weights: weights,
        lambda weights: {'model': weights},
        lambda weights: {'state_dict': weights, 'meta': {'epoch': 3}},
        lambda weights: {'model_ema': {f'module.{k}': v for k, v in weights.items()}},
        lambda weights: {'state_dict': {f'backbone.{k}': v for k, v in weights.items()}},
    ],
)
@pytest.mark.parametrize('names', ['official', 'own'])
def test_wrapped_files_and_dicts(tmp_path, official, loaded, wrap, names):
    content = wrap(official if names == 'official' else dict(loaded))
    assert_equal(from_file(narrow, tmp_path, content), loaded)
    model = narrow()
    model.load_state_dict(content)
    assert_equal(model, loaded)


def test_official_names_inside_a_detector(tmp_path, official, loaded):
    content = {f'backbone.{name}': value for name, value in official.items()}
    content.update({'head.weight': torch.zeros(2, 2), 'head.bias': torch.zeros(2)})
    detector = Detector()
    detector.load_state_dict(content)
    assert_equal(detector.backbone, loaded)
    torch.save({'state_dict': content}, tmp_path / 'detector.pth')
    detector = Detector()
    load_checkpoint(detector, str(tmp_path / 'detector.pth'), strict=True)
    assert_equal(detector.backbone, loaded)
    assert_equal(from_file(narrow, tmp_path, {'state_dict': content}, prefix='backbone.'), loaded)


@pytest.mark.parametrize('out_indices', [(2, 5), (5, 11)])
def test_other_outputs_take_what_they_need(tmp_path, official, loaded, out_indices):
    model = from_file(narrow, tmp_path, official, out_indices=out_indices)
    for name, value in model.state_dict().items():
        initial = name.startswith('norm') and name != 'norm11.weight'
        assert (value == 1).all() if initial else torch.equal(value, loaded[name]), name


def test_position_embedding_of_another_grid(tmp_path, official, loaded):
    grid = official['pos_embed'].mT.reshape(1, 64, 14, 14)
    expected = F.interpolate(grid, (32, 32), mode='bicubic', align_corners=False).flatten(2).mT
    names = list(official)
    model = narrow(img_size=512)
    model.load_state_dict(official)
    detector = Detector(img_size=512)
    content = {f'backbone.{name}': value for name, value in loaded.items()}
    torch.save({'state_dict': content}, tmp_path / 'detector.pth')
    load_checkpoint(detector, str(tmp_path / 'detector.pth'))
    for each in (model, from_file(narrow, tmp_path, official, img_size=512), detector.backbone):
        assert_equal(each, {**loaded, 'pos_embed': expected})
    assert list(official) == names and official['pos_embed'].shape == (1, 196, 64)


def test_a_resized_position_embedding_is_what_runs_on_that_grid():
    x = torch.randn(1, 3, 64, 64)
    model, larger = mini().eval(), mini(img_size=64).eval()
    larger.load_state_dict(model.state_dict())
    for a, b in zip(model(x), larger(x), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-5)


def test_mismatches_are_listed(tmp_path, official):
    broken = dict(official)
    for name in ('norm.weight', 'blocks.3.attn.g_norm.weight', 'pos_embed'):
        del broken[name]
    broken['blocks.0.extra.weight'] = torch.zeros(3)
    broken['norm.bias'] = torch.zeros(64)
    broken['patch_embed.proj.0.weight'] = torch.zeros(32, 4, 9, 9)
    expected = [
        'missing: norm11.weight',
        'missing: blocks.3.mixer.norm_long.weight',
        'missing: pos_embed',
        'unexpected: blocks.0.extra.weight',
        'unexpected: norm11.bias',
        'shape of stem.down1.conv.weight: [32, 4, 9, 9], expected [32, 3, 9, 9]',
    ]
    for load in (narrow().load_state_dict, lambda content: from_file(narrow, tmp_path, content)):
        with pytest.raises(RuntimeError, match='does not fit this ViG ') as error:
            load(broken)
        for line in expected:
            assert line in str(error.value)


@pytest.mark.parametrize('shape', [(1, 197, 64), (1, 196, 128), (196, 64), (2, 196, 64), (1, 0, 64)])
def test_position_embeddings_that_are_no_square_grid_are_refused(official, shape):
    with pytest.raises(RuntimeError, match=r'shape of pos_embed: .*, expected \[1, 196, 64\]'):
        narrow().load_state_dict({**official, 'pos_embed': torch.zeros(shape)})


def test_another_arch_is_refused_on_every_way(tmp_path, official, loaded):
    other = ViGH({'embed_dims': 64, 'depths': [1, 1], 'num_heads': [2, 4]}, out_indices=(0,))
    with pytest.raises(RuntimeError, match='does not fit this ViG '):
        ViG('small', out_indices=(3,)).load_state_dict(official)
    with pytest.raises(RuntimeError, match='does not fit this ViGH '):
        other.load_state_dict(official)
    with pytest.raises(RuntimeError, match='does not fit this ViG '):
        narrow().load_state_dict(other.state_dict())
    longer = {f'backbone.{name.replace("blocks.11.", "blocks.12.")}': loaded[name] for name in loaded}
    torch.save({'state_dict': longer}, tmp_path / 'detector.pth')
    with pytest.raises(RuntimeError, match=r'backbone\.blocks\.12'):
        load_checkpoint(Detector(), str(tmp_path / 'detector.pth'), strict=True)


def test_not_strict_is_not_strict(official):
    partial = {name: value for name, value in official.items() if not name.startswith('blocks')}
    model = narrow(img_size=64)
    result = model.load_state_dict(partial, strict=False)
    assert 'blocks.0.norm1.weight' in result.missing_keys
    assert torch.equal(model.norm11.weight, official['norm.weight'])
    assert model.pos_embed.std() > 0.005
