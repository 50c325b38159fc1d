"""Every leaf is called, or is exactly what its class does: hooks, replacements, wrapped forwards, weights.

On CPUs, and on a GPU (pytest -m gpu), where a block is one operator as long as its leaves are plain.
"""

import copy
import functools

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize, prune

from mmvig.backbones import ViG, ViGH
from mmvig.backbones.block import DropPath
from mmvig.backbones.layers import LayerNorm2d, RMSNorm2d

ARCH = {'embed_dims': 32, 'depths': [1, 1], 'num_heads': [1, 2]}
PLAIN_ARCH = {'embed_dims': 32, 'depth': 2, 'num_heads': 1, 'conv_act': True, 'out_act': True}
MODELS = {
    'ViGH': lambda **options: ViGH(ARCH, out_indices=(0, 1), **options),
    'ViG': lambda **options: ViG(PLAIN_ARCH, img_size=32, out_indices=(0, 1), **options),
}
DEVICES = ['cpu', pytest.param('cuda', marks=pytest.mark.gpu)]
on_devices = pytest.mark.parametrize('device', DEVICES)


@pytest.fixture(autouse=True)
def exact_convolutions():
    """In float32 on a GPU too, where PyTorch's would take TF32."""
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        yield


def make(family, device='cpu', **options):
    return copy.deepcopy(made(family, **options)).to(device)


@functools.cache
def made(family, **options):
    torch.manual_seed(0)
    model = MODELS[family](**options)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            weight.add_(torch.randn(weight.shape), alpha=2.0 if 'decay' in name else 0.1)
    return model


def leaves_of(model):
    """All leaves of one block, of the stem, of the step down and of the output norms, with DropPath."""
    leaves = [name for name, module in model.named_modules() if not [*module.children()]]
    last = 'stages.1.' if isinstance(model, ViGH) else 'blocks.1.'
    others = 'stages.0.blocks.', 'blocks.0.'
    leaves = [name for name in leaves if not name.startswith(others)]
    assert sum(name.startswith(last) for name in leaves) == 13  # 12 with weights, and DropPath
    return leaves


def ramp(x, dim):
    """Channels times 1 to 2: not one factor for all, which a norm after it would take back."""
    shape = [1] * x.ndim
    shape[dim] = x.shape[dim]
    return x * torch.linspace(1, 2, x.shape[dim], device=x.device).view(shape)


def channels_of(module):
    """The dimension of the channels in what a module returns."""
    return 1 if type(module) in (nn.Conv2d, LayerNorm2d, RMSNorm2d) else -1


class Changed(nn.Module):
    """A module in the place of another."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return ramp(self.inner(x), channels_of(self.inner))


class Rows(nn.Module):
    def forward(self, weight):
        return ramp(weight, 0)


class Seen(torch.Tensor):
    """A weight of a type of its own, with which products and norms are others."""

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        result = super().__torch_function__(function, types, args, kwargs or {})
        dims = {'linear': -1, 'conv2d': 1, 'layer_norm': -1, 'rms_norm': -1}
        name = function.__name__
        return ramp(result.as_subclass(torch.Tensor), dims[name]) if name in dims else result


def hook(model, name):
    model.get_submodule(name).register_forward_hook(
        lambda module, inputs, output: ramp(output, channels_of(module))
    )


def replace(model, name):
    parent, _, child = name.rpartition('.')
    setattr(model.get_submodule(parent), child, Changed(model.get_submodule(name)))


def wrap(model, name):
    module = model.get_submodule(name)
    forward = module.forward
    module.forward = lambda *args: ramp(forward(*args), channels_of(module))


def prehook(model, name):
    """As pruning and the older weight and spectral norms have it: weights are made before each call."""
    module = model.get_submodule(name)
    if isinstance(module, DropPath):
        module.register_forward_pre_hook(lambda module, inputs: (ramp(inputs[0], -1),))
    for leaf, weight in [*module.named_parameters()]:
        prune.custom_from_mask(module, leaf, ramp(torch.ones_like(weight), 0))


def parametrise(model, name):
    module = model.get_submodule(name)
    for leaf, _ in [*module.named_parameters()]:
        parametrize.register_parametrization(module, leaf, Rows())


def subclass(model, name):
    module = model.get_submodule(name)
    module.weight = nn.Parameter(module.weight.detach().as_subclass(Seen))


def run(model, train):
    """Maps, and in training the gradient of the image."""
    model.train(train)
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(2, 3, 32, 24, generator=generator).to(next(model.parameters()).device)
    torch.manual_seed(2)
    with torch.set_grad_enabled(train):
        maps = model(x.requires_grad_(train))
    if not train:
        return maps
    sum(
        (y * torch.linspace(-1, 1, y.numel(), device=y.device).view(y.shape)).sum() for y in maps
    ).backward()
    return [*(y.detach() for y in maps), x.grad]


def is_same(actual, expected):
    pairs = zip(actual, expected, strict=True)
    return all((a - e).abs().max() <= 1e-4 * e.abs().max() for a, e in pairs)


def expected_of(family, device, name, train):
    """What weights with other rows give; of DropPath, which has none, what a hook gives."""
    model = make(family, device)
    module = model.get_submodule(name)
    if isinstance(module, DropPath):
        hook(model, name)
    else:
        with torch.no_grad():
            for weight in module.parameters():
                weight.copy_(ramp(weight, 0))
    return run(model, train)


@on_devices
@pytest.mark.parametrize('family', MODELS)
@pytest.mark.parametrize('train', [True, False], ids=['train', 'eval'])
def test_every_leaf_counts(family, train, device):
    before = run(make(family, device), train)
    for name in leaves_of(make(family)):
        expected = expected_of(family, device, name, train)
        assert not is_same(expected, before), name
        changes = [hook, replace, wrap, prehook, parametrise, subclass]
        if name.endswith('drop_path'):
            changes = changes[:4]  # it has no weight
        for change in changes:
            model = make(family, device)
            change(model, name)
            assert is_same(run(model, train), expected), (name, change.__name__)
            if train and not isinstance(model.get_submodule(name), DropPath | Changed):
                grads = [p.grad for p in model.get_submodule(name).parameters()]
                assert grads and all(grad.abs().max() > 0 for grad in grads), (name, change.__name__)


@on_devices
@pytest.mark.parametrize('train', [True, False], ids=['train', 'eval'])
def test_other_norms_in_a_norms_place_work(train, device):
    """PyTorch's own, one without bias, one of another eps, and none at all."""
    for name in ('norm0', 'norm1', 'stages.1.blocks.0.norm1', 'stages.1.blocks.0.norm2', 'stem.down2.norm'):
        results = []
        for norm in (nn.LayerNorm, Adapted):
            model = make('ViGH', device)
            old = model.get_submodule(name)
            model.set_submodule(name, norm(old.weight.numel(), eps=1e-2, bias=False, device=device))
            results.append(run(model, train))
        assert is_same(*results), name
        model = make('ViGH', device)
        model.set_submodule(name, nn.Identity())
        assert not is_same(run(model, train), results[0])
    for name in ('norm_long', 'norm_short'):
        path, maps = f'stages.1.blocks.0.mixer.{name}', []
        for norm in (nn.RMSNorm, AdaptedRMS):
            model = make('ViGH', device)
            model.set_submodule(path, norm(32, eps=1.0, device=device))
            maps.append(run(model, train))
        assert is_same(*maps) and not is_same(maps[0], run(make('ViGH', device), train)), name
        model.set_submodule(path, nn.Identity())
        assert run(model, train)[0].isfinite().all()


class Adapted(nn.LayerNorm):
    """No type that a fused operator knows, so it is called."""

    def forward(self, x):
        return super().forward(x.movedim(-1, -1))


class AdaptedRMS(nn.RMSNorm):
    def forward(self, x):
        return super().forward(x)


def test_eps_of_an_instance_counts():
    for name in ('mixer.norm_short', 'mixer.norm_long', 'norm1', 'norm2'):
        model = make('ViGH')
        before = run(model, train=False)
        model.get_submodule(f'stages.1.blocks.0.{name}').eps = 10.0
        assert not is_same(run(model, train=False), before), name


def test_drop_path_can_be_taken_out():
    model = make('ViGH', drop_path_rate=0.9)
    for name, module in list(model.named_modules()):
        if isinstance(module, DropPath):
            model.set_submodule(name, nn.Identity())
    assert is_same(run(model, train=True)[:2], run(make('ViGH'), train=False))


@pytest.mark.parametrize('family', MODELS)
def test_hooks_of_output_norms_see_the_maps(family):
    """As tools that draw class activation maps take them: [B, C, H, W], with their gradients."""
    model, seen = make(family), {}
    for i in range(2):
        model.get_submodule(f'norm{i}').register_forward_hook(
            lambda module, inputs, output, i=i: seen.update({i: output})
        )
    maps = model(torch.randn(2, 3, 64, 32))
    for i, y in enumerate(maps):
        assert seen[i].shape == y.shape and torch.equal(seen[i], y)
        assert seen[i].shape[1] == model.num_features[i if family == 'ViGH' else 0]
        assert torch.autograd.grad(y.sum(), seen[i], retain_graph=True)[0].abs().sum() > 0


def test_a_stage_is_handed_no_norm_that_must_be_called():
    """As where accelerate keeps its weights on disk: its hooks move all that a stage is handed."""
    model, handed = make('ViGH'), []
    before = run(model, train=False)
    model.norm1.register_forward_pre_hook(lambda *_: None)
    for stage in model.stages:
        stage.register_forward_pre_hook(lambda module, inputs: handed.append(inputs[1]))
    assert is_same(run(model, train=False), before)
    assert handed == [model.norm0, None]


@pytest.mark.parametrize('family', MODELS)
def test_a_replaced_linear_layer_has_its_bias(family):
    for name in ('mixer.out', 'mixer.qkv', 'mixer.decay_down', 'mlp.fc1', 'mlp.fc2'):
        model = make(family)
        path = f'stages.1.blocks.0.{name}' if family == 'ViGH' else f'blocks.1.{name}'
        old, before = model.get_submodule(path), run(model, train=False)
        new = nn.Linear(old.in_features, old.out_features)
        with torch.no_grad():
            new.weight.copy_(old.weight)
            new.bias.normal_()
        model.set_submodule(path, new)
        assert not is_same(run(model, train=False), before), name
        run(model, train=True)
        assert new.bias.grad.abs().sum() > 0


def test_dynamic_quantisation_keeps_the_result():
    """Its layers have a method in the place of a weight."""
    model = make('ViGH').eval()
    quantised = torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, torch.qint8)
    x = torch.randn(1, 3, 32, 24)
    with torch.no_grad():
        for y, expected in zip(quantised(x), model(x), strict=True):
            assert (y - expected).norm() < 0.1 * expected.norm() and not torch.equal(y, expected)


@pytest.mark.parametrize('family', MODELS)
def test_counters_that_follow_modules_see_every_product(family):
    model, seen = make(family).eval(), []
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            module.register_forward_hook(lambda *_, name=name: seen.append(name))
    model(torch.randn(1, 3, 32, 24))
    assert sorted(seen) == sorted(
        name for name, module in model.named_modules() if isinstance(module, nn.Linear | nn.Conv2d)
    )


@pytest.mark.parametrize('family', MODELS)
def test_runs_on_meta_tensors(family):
    model = make(family).to('meta')
    maps = model(torch.empty(2, 3, 64, 48, device='meta', requires_grad=True))
    assert [y.shape for y in maps] == [y.shape for y in make(family)(torch.zeros(2, 3, 64, 48))]
    sum(y.sum() for y in maps).backward()
    assert all(p.grad.shape == p.shape for p in model.parameters())


@pytest.mark.parametrize('family', MODELS)
def test_gradients_by_sample(family):
    """torch.func.vmap, as for per-sample gradients."""
    model, x = make(family).eval(), torch.randn(3, 3, 32, 24)
    weights = {name: p.detach() for name, p in model.named_parameters()}

    def loss(weights, image):
        return sum(y.square().sum() for y in torch.func.functional_call(model, weights, (image[None],)))

    found = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(weights, x)
    for i in range(3):
        expected = torch.autograd.grad(loss(dict(model.named_parameters()), x[i]), [*model.parameters()])
        for (name, grads), e in zip(found.items(), expected, strict=True):
            assert (grads[i] - e).norm() <= 1e-4 * e.norm(), name


@pytest.mark.parametrize('family', MODELS)
def test_traces_with_and_without_gradients(family):
    """torch.jit.trace, whose graph must not depend on values: checked with other ones."""
    model, x = make(family).eval(), torch.randn(1, 3, 32, 24)
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            traced = torch.jit.trace(model, x)
            for other in (torch.randn(1, 3, 32, 24), 1e3 * x):
                for y, expected in zip(traced(other), model(other), strict=True):
                    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-4)


def test_narrow_maps_in_bf16_take_no_convolution_of_pytorchs(monkeypatch):
    """PyTorch 2.14's strided convolution in bf16 is wrong there on CPUs with AMX."""
    model = make('ViGH').eval()
    x = torch.randn(1, 3, 40, 2)
    with torch.no_grad():
        expected = model(x)

        def refuse(*args):
            raise AssertionError('a strided convolution')

        monkeypatch.setattr(nn.Conv2d, 'forward', refuse)
        with torch.autocast('cpu', torch.bfloat16):
            maps = model(x)
    for y, e in zip(maps, expected, strict=True):
        assert (y - e).norm() < 0.05 * e.norm()


@pytest.mark.parametrize('given, expected', [(-1, (1,)), (0, (0,)), ((-1,), (1,)), ((-1, 0), (0, 1))])
def test_out_indices_as_other_backbones_take_them(given, expected):
    assert ViGH(ARCH, out_indices=given).out_indices == ViG(PLAIN_ARCH, out_indices=given).out_indices
    assert ViGH(ARCH, out_indices=given).out_indices == expected


def test_arch_in_any_case():
    assert ViGH('Tiny', out_indices=0, drop_path_rate=None).depths == (2, 2, 5, 2)
    assert ViG('TINY', out_indices=0).depths == (12,)


@pytest.mark.parametrize('family', MODELS)
@pytest.mark.parametrize(
    'options',
    [
        {'arch': None}, {'out_indices': 'x'}, {'out_indices': (0.0,)}, {'out_indices': ()},
        {'drop_path_rate': float('nan')}, {'drop_path_rate': '0.1'}, {'frozen_stages': True},
        {'frozen_stages': 1.0}, {'with_cp': 'maybe'}, {'in_channels': 0}, {'in_channels': '3'},
        {'in_channels': True}, {'num_heads': 'x'}, {'embed_dims': 2}, {'embed_dims': 16.0},
        {'num_heads': 0}, {'backend': None}, {'cuda_graphs': None},
    ],
)  # fmt: skip
def test_bad_options_are_refused_in_a_line(family, options):
    kind, arch = (ViGH, ARCH) if family == 'ViGH' else (ViG, PLAIN_ARCH)
    name, value = next(iter(options.items()))
    if name in ('num_heads', 'embed_dims'):
        heads = [value, value] if family == 'ViGH' and name == 'num_heads' else value
        options = {'arch': {**arch, name: heads}}
    with pytest.raises((TypeError, ValueError), match=name) as error:
        kind(**{'arch': arch, 'out_indices': (0,), **options})
    assert '\n' not in str(error.value) and 'mmvig' in error.traceback[-1].path.parts


def test_modules_are_called_by_their_parents():
    """Counters such as torchinfo's take what is called after a module, and deeper, for its children."""
    model, calls = make('ViGH'), []
    for name, module in model.named_modules():
        if name:
            module.register_forward_pre_hook(lambda *_, name=name: calls.append(name))
    model(torch.randn(1, 3, 32, 24))
    running = []
    for name in calls:
        while running and not name.startswith(f'{running[-1]}.'):
            running.pop()
        parent = name.rpartition('.')[0]
        while isinstance(model.get_submodule(parent), nn.ModuleList):
            parent = parent.rpartition('.')[0]
        assert parent == (running[-1] if running else ''), name
        running.append(name)
