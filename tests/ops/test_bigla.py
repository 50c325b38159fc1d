"""BiGLA's backends against the token loop in float64."""

import importlib.util
import itertools
import logging
import math
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses import FakeTensorMode
from torch.autograd import gradcheck
from torch.fx.experimental.proxy_tensor import make_fx

from mmvig.ops import bigla
from mmvig.ops.bigla import chunked, forms, mild

# Chunks of 8 tokens, groups of 16 chunks: below, at and above the boundaries of one and more of each.
LENGTHS = [1, 2, 7, 8, 9, 49, 127, 128, 129, 260]
GATES = ['normal', 'strong', 'closed', 'open', 'mixed']
# Error allowed relative to the largest value: rounding of the inputs is not counted.
TOLERANCE = {torch.float64: 1e-13, torch.float32: 2e-6, torch.bfloat16: 8e-3, torch.float16: 1e-3}


def make_inputs(num_tokens, key=4, value=5, batch=2, heads=3, gates='normal', dtype=torch.float64):
    generator = torch.Generator().manual_seed(num_tokens)

    def randn(width):
        return torch.randn(batch, num_tokens, heads, width, generator=generator).to(dtype)

    g_fwd, g_bwd = randn(key), randn(key)
    if gates == 'strong':
        g_fwd, g_bwd = 100 * g_fwd, 100 * g_bwd
    elif gates in ('closed', 'open'):
        g_fwd, g_bwd = (torch.full_like(g, -1000 if gates == 'closed' else 1000) for g in (g_fwd, g_bwd))
    elif gates == 'mixed':  # per token and channel, with ordinary gates between the extremes
        g_fwd, g_bwd = (torch.where(g.abs() > 1, 1000 * g.sign(), g) for g in (g_fwd, g_bwd))
    return [randn(key), randn(key), randn(value), g_fwd, g_bwd]


def run(inputs, backend, **options):
    """Output and the five gradients of a fixed random projection of it."""
    inputs = [x.detach().requires_grad_() for x in inputs]
    out = bigla(*inputs, backend=backend, **options)
    weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out.dtype)
    return [out.detach(), *torch.autograd.grad((out * weight).sum(), inputs)]


def assert_close(actual, expected, tolerance):
    for name, a, e in zip(('o', 'q', 'k', 'v', 'g_fwd', 'g_bwd'), actual, expected, strict=True):
        assert a.isfinite().all(), name
        error, largest = (a.double() - e).abs().max().item(), e.abs().max().item()
        smallest = torch.finfo(a.dtype).tiny  # what half precision cannot hold counts as 0
        assert error <= max(tolerance * largest, smallest), (name, error, largest)


def test_reference_is_the_definition():
    """Against the closed form written as one sum over all pairs of tokens."""
    q, k, v, g_fwd, g_bwd = make_inputs(6)
    log_a = torch.nn.functional.logsigmoid(g_fwd) / 16
    log_b = torch.nn.functional.logsigmoid(g_bwd) / 16
    expected = torch.zeros_like(v)
    for t in range(6):
        for s in range(6):
            if s <= t:
                decay = log_a[:, s + 1 : t + 1].sum(1).exp()
                expected[:, t] += (q[:, t] * decay * k[:, s]).sum(-1, keepdim=True) * v[:, s] / 4
            if s >= t:
                decay = log_b[:, t:s].sum(1).exp()
                expected[:, t] += (q[:, t] * decay * k[:, s]).sum(-1, keepdim=True) * v[:, s] / 4
    torch.testing.assert_close(bigla(q, k, v, g_fwd, g_bwd, backend='reference'), expected)


@pytest.mark.parametrize('gates', GATES)
@pytest.mark.parametrize('num_tokens', LENGTHS)
@pytest.mark.parametrize('dtype', [torch.float64, torch.float32])
def test_chunked_equals_reference(num_tokens, gates, dtype):
    inputs = make_inputs(num_tokens, gates=gates, dtype=dtype)
    expected = run([x.double() for x in inputs], 'reference')
    assert_close(run(inputs, 'chunked'), expected, TOLERANCE[dtype])


def mild_heads(inputs, form=mild.FORMS[-1]):
    return mild.mild_forward(*inputs, 0.25, 16.0, form, torch.ones(2, 3, dtype=torch.bool))[1]


def test_each_form_is_right(monkeypatch):
    """On a CPU gates decide which form computes; both sides of each limit are right, and it is a limit."""
    inputs = make_inputs(150, 16, 32, dtype=torch.float32)
    expected = run([x.double() for x in inputs], 'reference')
    results = []
    for first in range(len(mild.FORMS) + 1):
        monkeypatch.setattr(forms, 'FORMS', mild.FORMS[first:])
        monkeypatch.setattr(forms, 'GRADIENT_FORMS', mild.GRADIENT_FORMS[first:])
        assert all(mild_heads(inputs, form).all() for form in forms.FORMS)
        results.append(run(inputs, 'chunked'))
        assert_close(results[-1], expected, TOLERANCE[torch.float32])
    assert not any(torch.equal(a[0], b[0]) for a, b in itertools.combinations(results, 2))


def test_auto_says_once_what_it_chose(caplog, monkeypatch):
    monkeypatch.setattr(sys.modules['mmvig.ops.bigla'], '_announced', set())
    with caplog.at_level(logging.INFO, 'mmvig'):
        for _ in range(2):
            bigla(*make_inputs(3, dtype=torch.float32))
        bigla(*make_inputs(3, dtype=torch.float32), backend='chunked')
    assert [record.getMessage() for record in caplog.records] == [
        "bigla runs on the 'chunked' backend, not on 'triton': the inputs are on the CPU"
    ]


def test_strong_gates_take_the_general_form():
    for gates in ('strong', 'closed', 'mixed'):
        assert not mild_heads(make_inputs(40, gates=gates, dtype=torch.float32)).any()


def open_with_one_strong(open_logit, strong_logit, num_tokens=49):
    inputs = make_inputs(num_tokens, dtype=torch.float32)
    for g in inputs[3:]:
        g.fill_(open_logit)[:, num_tokens // 3] = strong_logit
    return inputs


@pytest.mark.parametrize('open_logit', [2, 5, 20])
@pytest.mark.parametrize('strong_logit', [-600, -100, -2])
def test_open_gates_and_a_rare_strong_one(open_logit, strong_logit):
    """Their gradients differ by up to 1e9, so none may be the difference of sums that hold the others'."""
    inputs = open_with_one_strong(open_logit, strong_logit)
    assert mild_heads(inputs).all()
    expected = run([x.double() for x in inputs], 'reference')
    actual = run(inputs, 'chunked')
    assert_close(actual, expected, 6e-7)
    for a, e in zip(actual[4:], expected[4:], strict=True):  # each gate by itself, too
        assert ((a.double() - e).abs() <= 2e-6 * e.abs().amax((0, 2, 3), keepdim=True)).all()


@pytest.mark.parametrize('size', [1e15, 1e18, 1e-20, 1e-30])
def test_large_and_small_inputs(size):
    for open_logit, strong_logit in ((0, 0), (3, -600)):
        q, k, v, *gates = open_with_one_strong(open_logit, strong_logit)
        inputs = q * size if size > 1 else q, k * size, v, *gates
        assert_close(run(inputs, 'chunked'), run([x.double() for x in inputs], 'reference'), 6e-7)


def test_infinite_logits():
    """Of -inf the decay is 0, of inf it is 1; neither has a gradient."""
    for dtype in (torch.float32, torch.float64):
        inputs = make_inputs(60, dtype=dtype)
        for i, g in enumerate(inputs[3:]):
            g[:, 7 + i] = -math.inf
            g[:, 20:25, 1] = math.inf
            g[0, 40 + i, 2, 1] = -math.inf
        expected = run([x.double() for x in inputs], 'reference')
        actual = run(inputs, 'chunked')
        assert_close(actual, expected, TOLERANCE[dtype])
        for g, d in zip(inputs[3:], actual[4:], strict=True):
            assert not d[g.isinf()].any()


def test_no_head_decides_for_others():
    """Neither in output nor gradients: strong gates, NaN, and too large numbers take their own form."""
    inputs = make_inputs(60, dtype=torch.float32)
    clean = run(inputs, 'chunked')
    for which, value in (
        (3, -1000.0),
        (3, math.nan),
        (4, -math.inf),
        (0, math.nan),
        (1, 1e30),
        (2, math.inf),
    ):
        changed = [x.clone() for x in inputs]
        changed[which][0, 20, 1, 2] = value
        for a, c in zip(run(changed, 'chunked'), clean, strict=True):
            assert torch.equal(a[1], c[1]) and torch.equal(a[0, :, ::2], c[0, :, ::2]), (which, value)


def test_chunked_equals_reference_over_many_groups():
    inputs = make_inputs(1500, batch=1, heads=1, dtype=torch.float32)
    expected = run([x.double() for x in inputs], 'reference')
    assert_close(run(inputs, 'chunked'), expected, TOLERANCE[torch.float32])


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
@pytest.mark.parametrize('gates', GATES)
def test_half_precision_accumulates_in_float32(dtype, gates):
    inputs = make_inputs(130, key=16, value=32, gates=gates, dtype=dtype)
    expected = run([x.double() for x in inputs], 'reference')
    for backend in ('reference', 'chunked'):
        actual = run(inputs, backend)
        assert actual[0].dtype == dtype
        assert_close(actual, expected, TOLERANCE[dtype])


def test_float32_gates_go_with_half_precision_inputs():
    q, k, v, g_fwd, g_bwd = make_inputs(20, dtype=torch.bfloat16)
    out = bigla(q, k, v, g_fwd.float(), g_bwd.float())
    assert out.dtype == torch.bfloat16


@pytest.mark.parametrize('gates', GATES)
def test_gradcheck(gates):
    inputs = [x.requires_grad_() for x in make_inputs(11, 3, 2, batch=1, heads=1, gates=gates)]
    assert gradcheck(lambda *x: bigla(*x, backend='chunked'), inputs)
    assert gradcheck(lambda *x: bigla(*x, backend='reference'), inputs)


@settings(max_examples=40, deadline=None)
@given(
    batch=st.integers(1, 3),
    num_tokens=st.integers(1, 300),
    heads=st.integers(1, 5),
    key=st.integers(1, 33),
    value=st.integers(1, 33),
    gates=st.sampled_from(GATES),
    scale=st.sampled_from([None, 0.5, 1.0]),
    gate_normalizer=st.sampled_from([1.0, 16.0]),
)
def test_any_size(batch, num_tokens, heads, key, value, gates, scale, gate_normalizer):
    options = {'scale': scale, 'gate_normalizer': gate_normalizer}
    inputs = make_inputs(num_tokens, key, value, batch, heads, gates)
    expected = bigla(*inputs, backend='reference', **options)
    actual = bigla(*inputs, backend='chunked', **options)
    torch.testing.assert_close(actual, expected, rtol=1e-11, atol=1e-11)


def test_strided_views_give_the_same_bits():
    fused = torch.randn(2, 50, 3 * 16)
    gates = torch.randn(2, 50, 2 * 12)
    q, k, v = (x.unflatten(-1, (3, -1)) for x in fused.split([12, 12, 24], dim=-1))
    g_fwd, g_bwd = (x.unflatten(-1, (3, -1)) for x in gates.chunk(2, dim=-1))
    views = (q, k, v, g_fwd, g_bwd)
    assert not q.is_contiguous()
    assert torch.equal(bigla(*views), bigla(*(x.contiguous() for x in views)))


def test_empty_batch():
    assert bigla(*make_inputs(5, batch=1)).shape == (1, 5, 3, 5)
    for backend in ('chunked', 'reference'):
        for dtype in (torch.float64, torch.float32, torch.bfloat16):
            inputs = [x[:0].to(dtype).requires_grad_() for x in make_inputs(5)]
            out = bigla(*inputs, backend=backend)
            assert out.shape == (0, 5, 3, 5) and out.dtype == dtype
            grads = torch.autograd.grad(out, inputs, torch.zeros_like(out))
            assert [x.shape for x in grads] == [x.shape for x in inputs]


def test_directions_are_mirror_images():
    q, k, v, g_fwd, g_bwd = make_inputs(100)
    out = bigla(q, k, v, g_fwd, g_bwd)
    mirrored = bigla(*(x.flip(1) for x in (q, k, v, g_bwd, g_fwd)))
    torch.testing.assert_close(mirrored.flip(1), out)


def test_nan_stays_in_its_head():
    inputs = make_inputs(40)
    inputs[1][0, 20, 1] = float('nan')
    out = bigla(*inputs)
    assert out[0, :, 1].isnan().any()
    assert out[:, :, [0, 2]].isfinite().all() and out[1].isfinite().all()


def test_autocast_does_not_lower_the_precision():
    inputs = make_inputs(100, dtype=torch.float32)
    inputs = [x.requires_grad_() for x in inputs]
    with torch.autocast('cpu', torch.bfloat16):
        actual = bigla(*inputs)
    expected = bigla(*inputs)
    assert torch.equal(actual, expected)
    for a, e in zip(
        torch.autograd.grad(actual.sum(), inputs),
        torch.autograd.grad(expected.sum(), inputs),
        strict=True,
    ):
        assert torch.equal(a, e)


def test_training_keeps_only_the_inputs():
    inputs = [x.requires_grad_() for x in make_inputs(64, dtype=torch.float32)]
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        bigla(*inputs, backend='chunked')
    storages = {x.data_ptr() for x in inputs}
    assert all(x.data_ptr() in storages for x in kept)


def test_a_sample_of_the_fuzzer():
    path = Path(__file__).parents[1] / 'reliability' / 'fuzz_bigla.py'
    spec = importlib.util.spec_from_file_location('fuzz_bigla', path)
    fuzzer = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(fuzzer)
    assert not fuzzer.fuzz(range(60), 1, 'chunked', 'cpu')['failures']


def test_memory_and_work_are_linear_in_tokens():
    from torch.utils.flop_counter import FlopCounterMode

    def flops(num_tokens):
        with FlopCounterMode(display=False) as counter:
            bigla(*make_inputs(num_tokens, batch=1, heads=1, dtype=torch.float32))
        return counter.get_total_flops()

    assert flops(32768) == pytest.approx(8 * flops(4096), rel=0.06)


def test_compiled_with_dynamic_length_and_backward(monkeypatch):
    monkeypatch.setattr(chunked, 'TRACED_STEPS', 1)  # 2 groups; tracing takes 3 s a step
    compiled = torch.compile(bigla, fullgraph=True, backend='aot_eager', dynamic=True)
    for num_tokens in (40, 41, 200):
        inputs = [x.requires_grad_() for x in make_inputs(num_tokens)]
        out = compiled(*inputs)
        grads = torch.autograd.grad(out.sum(), inputs)
        expected = bigla(*inputs)
        torch.testing.assert_close(out, expected)
        torch.testing.assert_close(grads, torch.autograd.grad(expected.sum(), inputs))


def test_exports_with_dynamic_length():
    class Op(torch.nn.Module):
        def forward(self, q, k, v, g_fwd, g_bwd):
            return bigla(q, k, v, g_fwd, g_bwd, backend='chunked')

    length = torch.export.Dim('length', min=2, max=1 << 20)
    inputs = tuple(make_inputs(40))
    shapes = {name: {1: length} for name in ['q', 'k', 'v', 'g_fwd', 'g_bwd']}
    exported = torch.export.export(Op(), inputs, dynamic_shapes=shapes).module()
    for num_tokens in (2, 100, 3000):
        inputs = make_inputs(num_tokens)
        torch.testing.assert_close(exported(*inputs), bigla(*inputs))


def logits_of_other_strength(factor):
    return [x.requires_grad_() for x in (*make_inputs(20)[:3], *(factor * g for g in make_inputs(20)[3:]))]


@pytest.mark.parametrize('grad', [False, True])
def test_a_trace_decides_nothing_by_values(grad):
    """Recorded at mild gates, right at strong ones, with gradients."""
    mild_ones = [x.detach().float().requires_grad_(grad) for x in logits_of_other_strength(1)]
    traced = torch.jit.trace(bigla, mild_ones)
    inputs = [x.detach().float().requires_grad_() for x in logits_of_other_strength(300)]
    o = traced(*inputs)
    weight = torch.randn(o.shape, generator=torch.Generator().manual_seed(1))
    actual = [o.detach(), *torch.autograd.grad((o * weight).sum(), inputs)]
    assert_close(actual, run([x.detach().double() for x in inputs], 'reference'), TOLERANCE[torch.float32])


def test_fake_tensors_and_graphs_by_them():
    inputs = make_inputs(20)
    graph = make_fx(lambda *x: bigla(*x, backend='chunked'), tracing_mode='fake')(*inputs)
    inputs = logits_of_other_strength(300)
    torch.testing.assert_close(graph(*inputs), bigla(*inputs))
    with FakeTensorMode() as mode:
        inputs = [mode.from_tensor(x) for x in inputs]
        grads = torch.autograd.grad(bigla(*inputs, backend='chunked').sum(), inputs)
        assert [x.shape for x in grads] == [x.shape for x in inputs]
    assert bigla(*make_inputs(20)).isfinite().all()  # nothing fake was kept


@pytest.mark.parametrize('strict', [False, True])
def test_exports_what_has_parameters(strict, monkeypatch):
    class Op(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.ones(4, dtype=torch.float64))

        def forward(self, q, *others):
            return bigla(q * self.weight, *others, backend='chunked')

    monkeypatch.setattr(chunked, 'TRACED_STEPS', 1)
    inputs = make_inputs(20)
    exported = torch.export.export(Op(), tuple(inputs), strict=strict).module()
    torch.testing.assert_close(exported(*inputs), bigla(*inputs))


def test_meta_tensors_have_shapes():
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        inputs = [x.to('meta', dtype).requires_grad_() for x in make_inputs(20)]
        o = bigla(*inputs)
        assert (o.shape, o.dtype, o.device.type) == (inputs[2].shape, dtype, 'meta')
        grads = torch.autograd.grad(o.sum(), inputs)
        assert [x.shape for x in grads] == [x.shape for x in inputs]


def test_gradients_of_each_sample():
    """torch.func.vmap over torch.func.grad, and forward-mode derivatives."""

    def loss(*inputs):
        return bigla(*(x[None] for x in inputs), backend='chunked').pow(2).sum()

    inputs = [x.requires_grad_() for x in make_inputs(11)]
    expected = torch.autograd.grad(bigla(*inputs).pow(2).sum(), inputs)
    plain = [x.detach() for x in inputs]
    actual = torch.func.vmap(torch.func.grad(loss, argnums=tuple(range(5))))(*plain)
    torch.testing.assert_close(actual, expected)
    tangents = [torch.randn_like(x) for x in plain]
    one = [x[0] for x in plain], [x[0] for x in tangents]
    _, along = torch.func.jvp(loss, *map(tuple, one))
    torch.testing.assert_close(along, sum((e[0] * t).sum() for e, t in zip(expected, one[1], strict=True)))


def replace(name, value):
    names = ['q', 'k', 'v', 'g_fwd', 'g_bwd']
    inputs = make_inputs(6, dtype=torch.float32)
    inputs[names.index(name)] = value(inputs[names.index(name)])
    return inputs


@pytest.mark.parametrize(
    ('name', 'value', 'error', 'message'),
    [
        ('k', lambda x: x.tolist(), TypeError, 'k must be a torch.Tensor, got list'),
        ('q', lambda x: x.int(), TypeError, 'q must be float16, .*got torch.int32'),
        ('v', lambda x: x.double(), TypeError, 'v must have dtype torch.float32 .*torch.float64'),
        ('g_bwd', lambda x: x.half(), TypeError, 'g_bwd must have dtype torch.float32 .*float16'),
        ('q', lambda x: x[0], ValueError, r'q must have 4 dimensions .*\[6, 3, 4\]'),
        ('k', lambda x: x[:, :5], ValueError, r'k must have the shape of q, \[2, 6, 3, 4\], .*5'),
        ('g_fwd', lambda x: x[..., :1], ValueError, 'g_fwd must have the shape of q'),
        ('v', lambda x: x[:, :, :2], ValueError, r'v must agree with q in \[B, N, H\]'),
        ('v', lambda x: x[..., :0], ValueError, 'v must have N, H and width >= 1'),
        ('k', lambda x: x.to('meta'), ValueError, 'k must be on the device of q, cpu, got meta'),
    ],
)
def test_bad_tensors_are_named(name, value, error, message):
    with pytest.raises(error, match=message):
        bigla(*replace(name, value))


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        ({'backend': 'fast'}, "backend must be 'auto' or one of"),
        ({'scale': float('nan')}, 'scale must be a finite number, got nan'),
        ({'gate_normalizer': 0.0}, 'gate_normalizer must be a finite number > 0, got 0.0'),
    ],
)
def test_bad_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        bigla(*make_inputs(3), **options)


def test_no_tokens_is_an_error():
    with pytest.raises(ValueError, match='q must have N, H and width >= 1'):
        bigla(*(x[:, :0] for x in make_inputs(3)))
