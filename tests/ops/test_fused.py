"""The fused operators: small cases in Triton's interpreter, a model's sizes on a GPU (pytest -m gpu)."""

import importlib
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from compiled import compile_and_see
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from mmvig.backbones import ViG, ViGH
from mmvig.backbones.layers import ConvNorm, use_any_device
from mmvig.ops.backend import _why_not_triton_cached
from mmvig.ops.conv_norm import conv_norm
from mmvig.ops.dwconv import dwconv3x3
from mmvig.ops.gated_mix import gated_mix
from mmvig.ops.norm import add_norm, norm
from mmvig.ops.swiglu import swiglu

ON_GPU = torch.cuda.is_available()
DEVICE = 'cuda' if ON_GPU else 'cpu'  # where conftest.py has Triton interpret its kernels
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SIZE = (2, 5, 7, 24)  # batch, height, width, channels
gpu = pytest.mark.gpu


@dataclass
class Case:
    """An operator with the shapes of its tensors for maps [B, H, W, C], ``weights`` of them last."""

    run: Callable
    shapes: Callable[..., list[tuple[int, ...]]]
    weights: int = 0


def norm_case(act='none', rms=False, channels_first=False):
    def run(x, *weights, **options):
        return norm(x, *weights, rms=rms, act=act, channels_first=channels_first, **options)

    return Case(run, lambda *s: [s, *[s[-1:]] * (2 - rms)], 2 - rms)


def add_norm_case(rms=False, scaled=False, channels_first=False):
    def run(x, branch, *weights, **options):
        scale = torch.arange(len(x), device=x.device) / 4 if scaled else None
        return add_norm(x, branch, scale, *weights, rms=rms, channels_first=channels_first, **options)

    return Case(run, lambda *s: [s, s, *[s[-1:]] * (2 - rms)], 2 - rms)


def gated_mix_case(act):
    def run(*tensors, **options):
        return gated_mix(*tensors, act=act, **options)

    def shapes(*s):
        head = s[-1] // 2 if s[-1] % 2 == 0 else s[-1]
        return [s, s, s, (head,), (head,), (5, s[-1])]

    return Case(run, shapes, 3)


CASES = {
    'norm': norm_case(),
    'norm gelu': norm_case('gelu'),
    'norm silu first': norm_case('silu', channels_first=True),
    'norm rms first': norm_case(rms=True, channels_first=True),
    'add_norm': add_norm_case(),
    'add_norm scaled first': add_norm_case(scaled=True, channels_first=True),
    'add_norm rms scaled': add_norm_case(rms=True, scaled=True),
    'gated_mix': gated_mix_case(False),
    'gated_mix act': gated_mix_case(True),
    'swiglu': Case(swiglu, lambda *s: [(*s[:-1], 2 * s[-1]), (5, s[-1])], 1),
    'dwconv': Case(dwconv3x3, lambda *s: [s, (s[-1], 1, 3, 3)], 1),
}
every_case = pytest.mark.parametrize('name', CASES)


def make_inputs(case, size=SIZE, dtype=torch.float32, weight_dtype=None, seed=0):
    """Tensors of a case, mild weights around 1 among them."""
    generator = torch.Generator().manual_seed(seed)
    shapes = case.shapes(*size)
    inputs = []
    for i, shape in enumerate(shapes):
        x = torch.randn(shape, generator=generator)
        is_weight = i >= len(shapes) - case.weights
        x = 1 + x / 4 if is_weight else x + 0.3
        of_norm = is_weight and x.ndim == 1
        inputs.append(x.to(DEVICE, weight_dtype if weight_dtype and of_norm else dtype))
    return inputs


def run(case, inputs, backend, seed=1):
    """Outputs and the gradients of all inputs of a fixed random projection of them."""
    inputs = [x.detach().requires_grad_() for x in inputs]
    outputs = case.run(*inputs, backend=backend)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    generator = torch.Generator().manual_seed(seed)
    # Of few digits, so that they are the same in every dtype.
    given = [torch.randn(x.shape, generator=generator).bfloat16().to(x) for x in outputs]
    return [*(x.detach() for x in outputs), *torch.autograd.grad(outputs, inputs, given)]


def assert_accurate(case, inputs, least=1e-2):
    """Errors against float64 of at most twice plain PyTorch's in the same dtype, or of a few roundings.

    ``least`` is the size of values for the latter.

    The interpreter truncates to bf16 where a GPU rounds: twice the error.
    """
    truth = run(case, [x.double() for x in inputs], 'torch')
    plain, actual = run(case, inputs, 'torch'), run(case, inputs, 'triton')
    for i, (a, p, t) in enumerate(zip(actual, plain, truth, strict=True)):
        assert a.dtype == p.dtype and a.shape == p.shape and a.is_contiguous(), i
        largest = max(t.abs().max().item(), least)  # inputs are near 1
        error, plain_error = ((x.double() - t).abs().max().item() for x in (a, p))
        few = {torch.float32: 4e-6, torch.bfloat16: 2**-8, torch.float16: 2**-11}[a.dtype]
        slack = 2 if a.dtype == torch.bfloat16 and not ON_GPU else 1
        assert error <= slack * max(2 * plain_error, few * largest), (i, error, plain_error, largest)


@every_case
def test_accurate(name):
    assert_accurate(CASES[name], make_inputs(CASES[name]))


@every_case
@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
def test_half_precision_with_float32_norms(name, dtype):
    case = CASES[name]
    if name.startswith(('norm', 'add_norm', 'gated_mix')):  # products and convolutions take one dtype
        assert_accurate(case, make_inputs(case, (1, 3, 4, 24), dtype, torch.float32))
    assert_accurate(case, make_inputs(case, (1, 3, 4, 24), dtype))


@every_case
@pytest.mark.parametrize('size', [(1, 1, 1, 1), (2, 1, 9, 33), (1, 12, 1, 130), (3, 2, 40, 3)])
def test_odd_sizes(name, size):
    # A norm of one channel divides roundings of gradients that cancel by the root of eps.
    assert_accurate(CASES[name], make_inputs(CASES[name], size), least=1e-2 if size[3] > 1 else 2)


@settings(max_examples=8, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    name=st.sampled_from(list(CASES)),
    size=st.tuples(*(st.integers(1, n) for n in (2, 6, 9, 40))),
    order=st.permutations([0, 1, 2, 3]),
)
def test_any_size_and_stride(name, size, order):
    inputs = make_inputs(CASES[name], size)
    back = [order.index(i) for i in range(4)]
    strided = [
        x.permute(order).contiguous().permute(back) if x.shape[:3] == size[:3] else x for x in inputs
    ]
    for a, e in zip(run(CASES[name], strided, 'triton'), run(CASES[name], inputs, 'triton'), strict=True):
        torch.testing.assert_close(a, e)


def test_residuals_stay_in_float32():
    """A sum in float32 of a branch in bf16, its norm in bf16: as autocast has them."""
    x, branch, weight, bias = (
        y.requires_grad_() for y in make_inputs(CASES['add_norm'], weight_dtype=torch.float32)
    )
    results = {}
    for backend in ('torch', 'triton'):
        low = branch.bfloat16()
        s, y = add_norm(x, low, None, weight, bias, dtype=torch.bfloat16, backend=backend)
        assert s.dtype == torch.float32 and y.dtype == torch.bfloat16
        grads = torch.autograd.grad((s.sum() + y.float().square().sum()), (x, low, weight, bias))
        assert [g.dtype for g in grads] == [torch.float32, torch.bfloat16, torch.float32, torch.float32]
        results[backend] = s, y.float(), *(g.float() for g in grads)
    for a, e in zip(results['triton'], results['torch'], strict=True):
        torch.testing.assert_close(a, e, rtol=0, atol=2**-6 * e.abs().max().item())


def test_half_precision_of_a_convolution_is_autocasts():
    x, weight = make_inputs(CASES['dwconv'])
    with torch.autocast(DEVICE, torch.bfloat16):
        for backend in ('torch', 'triton'):
            assert dwconv3x3(x, weight, backend=backend).dtype == torch.bfloat16


@every_case
def test_same_bits_however_it_runs(name):
    """Twice; in training and evaluation."""
    inputs = make_inputs(CASES[name])
    first, second = (run(CASES[name], inputs, 'triton') for _ in range(2))
    assert all(map(torch.equal, first, second))
    with torch.no_grad():
        outputs = CASES[name].run(*inputs, backend='triton')
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    assert all(map(torch.equal, outputs, first))


@every_case
def test_empty_batch(name):
    case = CASES[name]
    for a, e in zip(
        *(run(case, make_inputs(case, (0, *SIZE[1:])), b) for b in ('triton', 'torch')), strict=True
    ):
        assert a.shape == e.shape and not a.count_nonzero()


@every_case
def test_second_derivative_is_refused(name):
    inputs = [x.requires_grad_() for x in make_inputs(CASES[name])]
    outputs = CASES[name].run(*inputs, backend='triton')
    out = outputs[-1] if isinstance(outputs, tuple) else outputs
    (grad,) = torch.autograd.grad(out.square().sum(), inputs[:1], create_graph=True)
    with pytest.raises(RuntimeError, match='no second derivative'):
        torch.autograd.grad(grad.sum(), inputs)


@every_case
def test_is_a_torch_operator(name):
    inputs = [x.requires_grad_() for x in make_inputs(CASES[name])]
    torch.library.opcheck(operator_of(name), arguments_of(name, inputs))


def operator_of(name):
    """The PyTorch operator that a case calls."""
    import mmvig.ops.dwconv.op
    import mmvig.ops.gated_mix.op
    import mmvig.ops.norm.op
    import mmvig.ops.swiglu.op  # noqa: F401

    first = name.split()[0]
    return getattr(torch.ops.mmvig, {'dwconv': 'dwconv3x3'}.get(first, first)).default


def arguments_of(name, inputs):
    """All arguments of the operator of a case."""
    words = name.split()
    bias = [None] if 'rms' in words else []
    if words[0] == 'norm':
        act = next((word for word in words if word in ('gelu', 'silu')), 'none')
        return *inputs, *bias, None, 1e-5, torch.float32, act, 'first' in words
    if words[0] == 'add_norm':
        scale = torch.rand(len(inputs[0]), device=DEVICE) if 'scaled' in words else None
        return *inputs[:2], scale, *inputs[2:], *bias, 1e-5, torch.float32, 'first' in words
    if words[0] == 'gated_mix':
        return *inputs, 1e-6, 'act' in words
    return tuple(inputs)


@every_case
def test_torch_compile_with_dynamic_sizes(name):
    case = CASES[name]

    def function(*x):
        outputs = case.run(*x, backend='triton')
        return sum(y.sin().sum() for y in outputs) if isinstance(outputs, tuple) else outputs.sin().sum()

    backend = 'inductor' if ON_GPU else 'aot_eager'
    torch.compiler.reset()  # the cases share code, and one function is compiled only so often
    compiled = torch.compile(function, fullgraph=True, dynamic=True, backend=backend)
    for size in ((2, 5, 7, 24), (2, 9, 3, 24)):
        inputs = [x.requires_grad_() for x in make_inputs(case, size)]
        results = [torch.autograd.grad(f(*inputs), inputs) for f in (compiled, function)]
        for a, e in zip(*results, strict=True):
            torch.testing.assert_close(a, e)


@pytest.mark.parametrize('backend', ['torch', 'triton'])
def test_a_layer_norm_without_bias_is_no_rms_norm(backend):
    x, branch, weight = (torch.randn(2, 3, 4, 24, device=DEVICE) for _ in range(3))
    weight = weight[0, 0, 0].requires_grad_()
    expected = torch.nn.functional.layer_norm(x + branch, (24,), weight)
    _, actual = add_norm(x, branch, None, weight, backend=backend)
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(norm(x + branch, weight, backend=backend), expected, rtol=1e-5, atol=1e-5)
    grads = [torch.autograd.grad(y.square().sum(), weight)[0] for y in (actual, expected)]
    torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    'call, message',
    [
        (lambda x: norm(x, x[0, 0, 0], x[0, 0, 0], rms=True), 'has no bias'),
        (lambda x: add_norm(x, x, x[:, 0, 0, 0].requires_grad_(), x[0, 0, 0]), 'scale gets no gradient'),
        (lambda x: swiglu(x, x[0, 0]), r'\[\.\.\., 2 D\]'),
        (lambda x: swiglu(x, x[0, 0, :, :12], backend='cuda'), "'auto', 'torch' or 'triton'"),
        (lambda x: swiglu(x.double(), x[0, 0, :, :12], backend='triton'), 'float64'),
        (lambda x: dwconv3x3(x, x), r'\[C, 1, 3, 3\]'),
        (lambda x: norm(x, x), r'bias and shift \[C\]'),
        (lambda x: norm(x, x[0, 0, 0], act='relu'), "one of .*'gelu'"),
        (lambda x: add_norm(x, x[:1], None, x[0, 0, 0]), 'shape of x'),
        (lambda x: gated_mix(x, x, x[:1], x[0, 0, 0], x[0, 0, 0], x[0, 0]), 'one shape and dtype'),
        (lambda x: gated_mix(x, x, x, x[0, 0, 0, :5], x[0, 0, 0, :5], x[0, 0]), 'divisor of the width'),
        (lambda x: gated_mix(x, x, x, x[0, 0, 0], x[0, 0, 0], x), r'weight_out must be \[C, 24\]'),
    ],
)
def test_wrong_arguments_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call(torch.zeros(SIZE))


def make_products(rows, channels, width, dtype):
    """Tensors y and dz [rows, C], W_1 [2 D, C] and W_2 [C, D] of results near 1."""
    generator = torch.Generator(DEVICE).manual_seed(0)
    shapes = (rows, channels), (rows, channels), (2 * width, channels), (channels, width)
    y, dz, *weights = (torch.randn(s, generator=generator, device=DEVICE) for s in shapes)
    return [x.to(dtype) for x in (y, dz, *(w / channels**0.5 for w in weights))]


def assert_products(rows, channels, width, dtype):
    """Products with the activation: the same bits with h and without, errors like those of two kernels."""
    from mmvig.ops.swiglu import op as ops

    y, dz, w_1, w_2 = make_products(rows, channels, width, dtype)
    assert ops.is_fused(y, ops.MAX_WIDTH) and ops.is_fused(dz, ops.MAX_BACKWARD_WIDTH)
    h, activated = ops.project(y, w_1, True)
    assert torch.equal(ops.project(y, w_1, False)[1], activated)
    dh, again = ops.project_backward(dz, w_2, h)
    assert torch.equal(again, activated)
    a, b = (y.double() @ w_1.double().t()).chunk(2, dim=1)
    s = a.sigmoid()
    d = dz.double() @ w_2.double()
    truth = torch.cat([a, b], 1), a * s * b, torch.cat([d * b * (s + a * s * (1 - s)), d * a * s], 1)
    plain_h = y @ w_1.t()
    plain = plain_h, ops.activate(plain_h), ops.activate_backward(dz @ w_2, plain_h)[0]
    slack = 1.1 if ON_GPU or dtype == torch.float16 else 4.0  # the interpreter truncates to bf16
    for x, p, t in zip((h, activated, dh), plain, truth, strict=True):
        error, plain_error = ((v - t).norm().item() for v in (x, p))
        rounding = torch.finfo(dtype).eps / 2 * t.norm().item()
        assert error <= slack * max(plain_error, rounding), (error, plain_error)


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
@pytest.mark.parametrize('size', [(1, 1, 1), (5, 24, 64), (150, 96, 40), (3, 33, 17), (70, 200, 48)])
def test_products_with_their_activation(size, dtype):
    assert_products(*size, dtype)


def test_products_take_any_gradient_and_no_rows():
    from mmvig.ops.swiglu import op as ops

    y, dz, w_1, w_2 = make_products(9, 24, 16, torch.float16)
    h, _ = ops.project(y, w_1, True)
    for x in (dz[:1, :1].expand(9, 24), dz.t().contiguous().t()):
        expected = ops.project_backward(x.contiguous(), w_2, h)
        assert all(map(torch.equal, ops.project_backward(x, w_2, h), expected))
    assert [x.shape for x in ops.project(y[:0], w_1, True)] == [(0, 32), (0, 16)]
    assert [x.shape for x in ops.project_backward(dz[:0], w_2, h[:0])] == [(0, 32), (0, 16)]


MODELS = {
    'ViGH': lambda **k: ViGH(
        {'embed_dims': 16, 'depths': [1, 2], 'num_heads': [1, 2]}, out_indices=(1,), **k
    ),
    'ViG': lambda **k: ViG(
        {'embed_dims': 32, 'depth': 2, 'num_heads': 1, 'conv_act': True, 'out_act': True},
        out_indices=(0, 1),
        img_size=32,
        **k,
    ),
}


def compute(model, x, dtype=None):
    """Maps and gradients of all parameters, dropped paths among them the same each time."""
    torch.manual_seed(0)
    with torch.autocast(DEVICE, dtype, enabled=dtype is not None):
        maps = model(x)
    grads = torch.autograd.grad(sum(y.double().sin().sum() for y in maps), list(model.parameters()))
    return maps, grads


@pytest.mark.parametrize('name, with_cp', [('ViGH', False), ('ViGH', True), ('ViG', False)])
def test_models_compute_the_same(name, with_cp):
    torch.manual_seed(0)
    plain = MODELS[name](backend='chunked', drop_path_rate=0.5).to(DEVICE).train()
    fused = MODELS[name](backend='triton', drop_path_rate=0.5, with_cp=with_cp).to(DEVICE).train()
    fused.load_state_dict(plain.state_dict())
    x = torch.randn(2, 3, 9, 12, device=DEVICE)
    for a, e in zip(*(sum(map(tuple, compute(model, x)), ()) for model in (fused, plain)), strict=True):
        torch.testing.assert_close(a, e, rtol=0, atol=2e-5 * max(e.abs().max().item(), 1e-3))


def test_any_device_runs_what_was_built_for_triton(monkeypatch):
    fused = MODELS['ViGH'](backend='triton').eval()
    use_any_device(fused)
    plain = MODELS['ViGH'](backend='chunked').eval()
    plain.load_state_dict(fused.state_dict())
    x = torch.randn(1, 3, 9, 12)
    monkeypatch.setattr('mmvig.ops.launch.unavailable', lambda *_: 'it is not here')
    _why_not_triton_cached.cache_clear()
    with torch.no_grad():
        assert torch.equal(fused(x)[0], plain(x)[0])
    with pytest.raises(ValueError, match='it is not here'):
        MODELS['ViGH'](backend='triton')(x)
    _why_not_triton_cached.cache_clear()


def test_mixed_precision_gives_nothing_away():
    torch.manual_seed(0)
    plain = MODELS['ViGH'](backend='chunked').to(DEVICE).train()
    fused = MODELS['ViGH'](backend='triton').to(DEVICE).train()
    fused.load_state_dict(plain.state_dict())
    x = torch.randn(1, 3, 8, 12, device=DEVICE)
    results = [compute(model, x, torch.bfloat16) for model in (fused, plain)]
    truth = compute(plain.double(), x.double())
    slack = 1.25 if ON_GPU else 4.0  # the interpreter truncates to bf16
    for actual, low, true in zip(*results, truth, strict=True):  # of the maps, then of the gradients
        assert [y.dtype for y in actual] == [y.dtype for y in low]
        error, plain_error = (
            torch.stack([(y - t).norm() for y, t in zip(of, true, strict=True)]).norm().item()
            for of in (actual, low)
        )
        assert error <= slack * plain_error, (error, plain_error)


# On a GPU from here on.


@gpu
@every_case
@pytest.mark.parametrize('dtype', DTYPES)
def test_sweep(name, dtype):
    case = CASES[name]
    for size in ((2, 56, 56, 96), (3, 25, 38, 768), (1, 14, 15, 1024), (2, 200, 304, 48)):
        assert_accurate(case, make_inputs(case, size, dtype))


@gpu
@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
@pytest.mark.parametrize('size', [(6273, 96, 256), (3001, 192, 512), (999, 128, 352), (70, 72, 100)])
def test_sweep_of_products(size, dtype):
    assert_products(*size, dtype)


@gpu
def test_products_of_more_elements_than_32_bits_count():
    from mmvig.ops.swiglu import op as ops

    y, dz, w_1, w_2 = make_products(4_300_000, 96, 256, torch.bfloat16)  # 2.2e9 elements
    h, activated = ops.project(y, w_1, True)
    dh, _ = ops.project_backward(dz, w_2, h)
    last = ops.project(y[-1000:], w_1, True)
    assert torch.equal(h[-1000:], last[0]) and torch.equal(activated[-1000:], last[1])
    assert torch.equal(dh[-1000:], ops.project_backward(dz[-1000:], w_2, h[-1000:])[0])


@gpu
@every_case
def test_compiles_for_no_size(name):
    case = CASES[name]

    def compiled():
        module = importlib.import_module(f'mmvig.ops.{name.split()[0].removeprefix("add_")}.op')
        kernels = module.forward_kernel, module.backward_kernel
        return sum(len(cache[0]) for kernel in kernels for cache in kernel.device_caches.values())

    run(case, make_inputs(case, (2, 5, 7, 32)), 'triton')
    before = compiled()
    for i in range(20):
        run(case, make_inputs(case, (1 + i % 3, 1 + 3 * i, 1 + 5 * i, 32)), 'triton')
    assert compiled() == before


@gpu
@every_case
def test_cuda_graph(name):
    case = CASES[name]
    inputs = make_inputs(case)
    with torch.no_grad():
        expected = case.run(*inputs, backend='triton')
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            actual = case.run(*inputs, backend='triton')
    graph.replay()
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)


@gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason='needs two GPUs')
@every_case
def test_runs_on_the_tensors_device(name):
    case = CASES[name]
    inputs = make_inputs(case)
    expected = run(case, inputs, 'triton')
    with torch.cuda.device(0):
        for a, e in zip(run(case, [x.to('cuda:1') for x in inputs], 'triton'), expected, strict=True):
            assert a.device.index == 1 and torch.equal(a.to(e.device), e)


@gpu
def test_a_weight_elsewhere_is_refused():
    x, weight = torch.randn(1, 8, 8, 32, device='cuda'), torch.randn(32, 1, 3, 3)
    for _ in range(2):  # also once kernels are launched with addresses
        dwconv3x3(x, weight.cuda(), backend='triton')
        with pytest.raises(ValueError, match='cpu tensor'):
            dwconv3x3(x, weight, backend='triton')


@gpu
@pytest.mark.parametrize('name', [name for name in CASES if 'scaled' not in name])  # its factors differ
def test_more_elements_than_32_bits_count(name):
    case = CASES[name]
    size = (3, 1000, 8192, 96)  # 2.4e9 elements
    inputs: list[Tensor] = []
    for shape in case.shapes(*size):
        inputs.append(torch.randn(shape, device='cuda', dtype=torch.bfloat16))
    with torch.no_grad():
        outputs = case.run(*inputs, backend='triton')
        small = [x[2:] if x.shape[0] == 3 and x.ndim == 4 else x for x in inputs]
        last = case.run(*small, backend='triton')
    for a, e in zip(*(x if isinstance(x, tuple) else (x,) for x in (outputs, last)), strict=True):
        assert torch.equal(a[2:], e)


def conv_norm_inputs(size=(2, 3, 9, 14), channels=24, side=3, dtype=torch.float32):
    """An image [B, C, H, W], and weights."""
    generator = torch.Generator().manual_seed(0)
    shapes = [size, (channels, size[1], side, side), (channels,), (channels,), (channels,)]
    inputs = [torch.randn(shape, generator=generator) for shape in shapes]
    inputs[3] = 1 + inputs[3] / 4
    return [x.to(DEVICE, dtype) for x in inputs]


def run_conv_norm(inputs, backend, low=None, layout=torch.contiguous_format, **options):
    """The result and all gradients."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    with torch.autocast(DEVICE, low, enabled=low is not None):
        x = leaves[0].contiguous(memory_format=layout).permute(0, 2, 3, 1)
        y = conv_norm(x, *leaves[1:], backend=backend, **options)
    given = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).bfloat16().to(y)
    return [y.detach(), *torch.autograd.grad(y, leaves, given)]


@pytest.mark.parametrize('low', [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    'size, side, stride, act',
    [((2, 3, 9, 14), 3, 2, 'gelu'), ((1, 3, 23, 16), 9, 8, 'silu'), ((1, 1, 4, 4), 2, 1, 'none')],
)
def test_conv_norm(size, side, stride, act, low):
    inputs, options = conv_norm_inputs(size, side=side), {'stride': stride, 'act': act}
    truth = run_conv_norm([x.double() for x in inputs], 'torch', **options)
    plain, actual = (run_conv_norm(inputs, backend, low, **options) for backend in ('torch', 'triton'))
    for i, (a, p, t) in enumerate(zip(actual, plain, truth, strict=True)):
        assert a.dtype == p.dtype and a.shape == p.shape, i
        error, plain_error = ((x.double() - t).norm() for x in (a, p))
        # The interpreter truncates to bf16 where a GPU rounds.
        slack = 1.3 if ON_GPU else 4 if low == torch.bfloat16 else 2
        few = {torch.bfloat16: 2**-8, torch.float16: 2**-11}[low] * slack * t.norm()
        assert error <= max(slack * plain_error, few), (i, error, plain_error)
    last = run_conv_norm(inputs, 'triton', low, torch.channels_last, **options)
    assert torch.equal(last[0], actual[0])
    with torch.no_grad(), torch.autocast(DEVICE, low):
        y = conv_norm(inputs[0].permute(0, 2, 3, 1), *inputs[1:], backend='triton', **options)
    assert torch.equal(y, actual[0])


@pytest.mark.parametrize('images', [False, True])
def test_conv_norm_is_a_torch_operator(images):
    import mmvig.ops.conv_norm.op  # noqa: F401

    x, *weights = conv_norm_inputs()
    arguments = x.permute(0, 2, 3, 1).requires_grad_(images), *[w.requires_grad_() for w in weights]
    options = 1e-5, 2, torch.float16, torch.float32, 'gelu'
    tests = 'test_schema', 'test_autograd_registration', 'test_faketensor', 'test_aot_dispatch_dynamic'
    torch.library.opcheck(
        torch.ops.mmvig.conv_norm.default, (*arguments, *options), test_utils=tests, atol=2e-2, rtol=2e-2
    )
    if not images:
        torch.library.opcheck(
            torch.ops.mmvig.conv_norm_inference.default, (*[x.detach() for x in arguments], *options)
        )


def test_compiled_conv_norm_keeps_nothing_in_inference():
    x, *weights = conv_norm_inputs()
    arguments = x.permute(0, 2, 3, 1), *[w.requires_grad_() for w in weights]

    def function(*x):
        with torch.autocast(DEVICE, torch.float16):
            return conv_norm(*x, stride=2, backend='triton')

    compiled, seen = compile_and_see(function)
    with torch.no_grad():
        assert torch.equal(compiled(*arguments), function(*arguments))
    assert seen == ['mmvig.conv_norm_inference.default']
    assert torch.equal(compiled(*arguments), function(*arguments))
    assert seen[1:] == ['mmvig.conv_norm.default']


def test_conv_is_a_torch_operator():
    from mmvig.ops.conv import conv_op

    x = torch.randn(2, 5, 6, 8, dtype=torch.float64, device=DEVICE, requires_grad=True)
    weight = torch.randn(12, 8, 3, 3, dtype=torch.float64, device=DEVICE, requires_grad=True)
    y = conv_op(x, weight, 2)
    expected = torch.nn.functional.conv2d(x.permute(0, 3, 1, 2), weight, None, 2, 1).permute(0, 2, 3, 1)
    assert y.is_contiguous() and torch.equal(y, expected)
    dy = torch.randn_like(y)
    grads = [torch.autograd.grad(z, (x, weight), dy) for z in (y, expected)]
    torch.testing.assert_close(*grads)
    torch.library.opcheck(conv_op.op, (x, weight, 2))


def test_compiled_layers_hide_their_convolutions():
    """From Inductor, which would have channels last where they are already."""
    torch.manual_seed(0)
    layer = ConvNorm(8, 16, 'triton').to(DEVICE)
    x = torch.randn(2, 6, 6, 8, device=DEVICE, requires_grad=True)
    compiled, seen = compile_and_see(layer)
    inputs, dy = (x, *layer.parameters()), torch.randn(2, 3, 3, 16, device=DEVICE)
    results = [torch.autograd.grad(f(x), inputs, dy) for f in (compiled, layer)]
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-2 if ON_GPU else 1e-5)  # TF32 there
    operators = [name.split('.')[1] for name in seen]
    assert operators == ['conv', 'norm', 'norm_backward', 'conv_backward']


def test_old_versions_of_triton_are_named(monkeypatch):
    from mmvig.ops import launch
    from mmvig.ops.dwconv.op import OLDEST_TRITON

    monkeypatch.setattr(launch, 'INTERPRETED', False)
    monkeypatch.setattr(launch, 'VERSION', (3, 1))
    device = torch.device('cuda')
    assert 'needs Triton 3.3 or newer' in launch.unavailable(device, torch.float32, OLDEST_TRITON)


def test_conv_norm_names_what_is_wrong():
    inputs = conv_norm_inputs()
    x = inputs[0].permute(0, 2, 3, 1)
    with pytest.raises(ValueError, match=r'x must be \[B, H, W, C_in\]'):
        conv_norm(inputs[0], *inputs[1:], stride=2)
    with pytest.raises(ValueError, match='takes half precision'):
        conv_norm(x, *inputs[1:], stride=2, backend='triton')
    with pytest.raises(ValueError, match='act must be one of'):
        conv_norm(x, *inputs[1:], stride=2, act='relu')


def test_conv_norm_of_nothing():
    inputs = conv_norm_inputs((0, 3, 8, 8))
    for result in run_conv_norm(inputs, 'triton', torch.bfloat16, stride=2):
        assert not result.count_nonzero()


def test_shift_is_added_before_the_norm():
    """A convolution's bias, as ConvNorm leaves it to the norm."""
    generator = torch.Generator().manual_seed(0)
    x, weight, bias, shift = (
        torch.randn(shape, generator=generator).to(DEVICE) for shape in ((2, 3, 5, 24), *[(24,)] * 3)
    )
    results = []
    for dtype, backend in ((torch.float64, 'torch'), (torch.float32, 'triton')):
        leaves = [t.detach().to(dtype).requires_grad_() for t in (x, weight, bias, shift)]
        y = norm(*leaves[:3], shift=leaves[3], act='gelu', backend=backend)
        results.append([y, *torch.autograd.grad(y.square().sum(), leaves)])
    for e, a in zip(*results, strict=True):
        torch.testing.assert_close(a.double(), e, rtol=1e-4, atol=1e-4)


def test_cast():
    from mmvig.ops.block.half_weights import BLOCK, cast

    sizes = (3, BLOCK), (BLOCK + 1,), (1,), (2, 5), (7,), (BLOCK,), (3, 1, 2), (11,)
    sources = [torch.randn(size, device=DEVICE) for size in sizes]
    sources[3] = sources[3].t()  # copied first
    out = torch.empty(sum(x.numel() for x in sources), dtype=torch.float16, device=DEVICE)
    cast(sources, out)
    assert torch.equal(out, torch.cat([x.flatten() for x in sources]).half())
