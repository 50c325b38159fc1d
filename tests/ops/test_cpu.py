"""Linear layers and convolutions as products on a CPU: PyTorch's results, and hooks are called."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from mmvig.backbones.layers import ConvNorm, SwiGLU
from mmvig.ops.cpu import MIN_WIDTH, apply_linear, linear


@pytest.fixture
def tensors():
    generator = torch.Generator().manual_seed(0)
    shapes = (2, 3, MIN_WIDTH), (5, MIN_WIDTH), (5,)
    return [torch.randn(shape, generator=generator) for shape in shapes]


@pytest.mark.parametrize('mode', [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize('dtype', [torch.float32, torch.float64, torch.bfloat16])
def test_linear(tensors, dtype, mode):
    x, weight, bias = (t.to(dtype) for t in tensors)
    with mode():
        for arguments in ((x, weight, bias), (x, weight), (x[:, ::2], weight, bias), (x[:0], weight)):
            y = linear(*arguments)
            assert y.dtype == dtype
            torch.testing.assert_close(y, F.linear(*arguments), rtol=1e-4, atol=1e-4)
        with torch.autocast('cpu', torch.bfloat16):
            assert linear(x, weight, bias).dtype == F.linear(x, weight, bias).dtype


def test_gradients(tensors):
    x, weight, bias = (t.requires_grad_() for t in tensors)
    results = [
        torch.autograd.grad(function(x, weight, bias).square().sum(), (x, weight, bias))
        for function in (linear, F.linear)
    ]
    for a, e in zip(*results, strict=True):
        torch.testing.assert_close(a, e)
    x, weight, bias = (t.detach() for t in tensors)
    y, tangent = torch.func.jvp(lambda x: linear(x, weight), (x,), (x,))
    torch.testing.assert_close(tangent, y)


def test_modules_with_hooks_are_called(tensors):
    module, seen = nn.Linear(MIN_WIDTH, 5), []
    with torch.no_grad():
        expected = apply_linear(module, tensors[0])
        module.register_forward_hook(lambda *_: seen.append('linear'))
        torch.testing.assert_close(apply_linear(module, tensors[0]), expected)
    assert seen == ['linear']


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
def test_swiglu_in_halves(dtype):
    torch.manual_seed(0)
    layer, seen = SwiGLU(24, 8, 'auto'), []
    x = torch.randn(2, 3, 24)
    for tokens in (x, x[:, ::2], x[:0]):
        before = tokens.clone()
        with torch.autocast('cpu', dtype, enabled=dtype != torch.float32):
            expected = layer(tokens).detach()
            with torch.no_grad():
                assert layer._in_halves(tokens)
                y = layer(tokens)
        assert y.dtype == expected.dtype == dtype and torch.equal(tokens, before)
        torch.testing.assert_close(y, expected)
    layer.fc1.register_forward_hook(lambda *_: seen.append('fc1'))
    with torch.no_grad():
        layer(x)
    assert seen == ['fc1']


@pytest.mark.parametrize('size', [(1, 7, 7), (2, 2, 5), (1, 1, 1)])
def test_convolutions_of_few_patches(size):
    torch.manual_seed(0)
    layer, seen = ConvNorm(8, 32, 'torch'), []
    x = torch.randn(*size, 8)
    results = []
    for _ in range(2):
        layer.zero_grad()
        leaf = x.clone().requires_grad_()
        y = layer(leaf)
        y.square().sum().backward()
        results.append([y.detach(), leaf.grad, *[p.grad.clone() for p in layer.parameters()]])
        layer.conv.register_forward_hook(lambda *_: seen.append('conv'))
    assert seen == ['conv']
    for a, e in zip(*results, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-4, atol=1e-4)
