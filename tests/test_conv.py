"""mmvig.Conv2d: what PyTorch's gives, as a product."""

import mmdet.models  # noqa: F401  registers the neck
import pytest
import torch
from mmdet.registry import MODELS
from mmengine.config import Config
from mmengine.registry import DefaultScope
from torch.testing import assert_close

from mmvig.conv import Conv2d


def pair(dtype, device='cpu', **options):
    torch.manual_seed(0)
    ours = Conv2d(6, 5, 1, **options).to(device, dtype)
    theirs = torch.nn.Conv2d(6, 5, 1, **options).to(device, dtype)
    theirs.load_state_dict(ours.state_dict())
    return ours, theirs


def results(conv, x):
    """Output and gradients."""
    x = x.detach().requires_grad_()
    y = conv(x)
    weights = torch.linspace(-1, 1, y.numel(), dtype=y.dtype, device=y.device).view(y.shape)
    return y, *torch.autograd.grad((y * weights).sum(), [x, *conv.parameters()])


LAYOUTS = {
    'contiguous': lambda x: x,
    'channels last': lambda x: x.contiguous(memory_format=torch.channels_last),
    'a part': lambda x: x[:, :, 1:, ::2],
}


@pytest.mark.parametrize('bias', [True, False])
@pytest.mark.parametrize('layout', LAYOUTS)
def test_a_1x1_convolution_is_a_product(layout, bias, monkeypatch):
    ours, theirs = pair(torch.float64, bias=bias)
    monkeypatch.setattr(Conv2d, '_is_product', lambda *_: True)
    monkeypatch.setattr(torch.nn.Conv2d, 'forward', None)
    x = LAYOUTS[layout](torch.randn(2, 6, 5, 8, dtype=torch.float64))
    actual = results(ours, x)
    monkeypatch.undo()
    assert_close(actual, results(theirs, x))


def test_a_tracer_sees_a_convolution():
    traced = torch.fx.symbolic_trace(torch.nn.Sequential(Conv2d(6, 5, 1)))
    x = torch.randn(2, 6, 4, 4)
    assert traced(x).shape == (2, 5, 4, 4) and 'conv2d' in traced.code


def test_the_configs_neck_and_rpn_have_them():
    model = Config.fromfile('configs/_base_/models/maskrcnn_vigh.py').model
    with DefaultScope.overwrite_default_scope('mmdet'):
        neck = MODELS.build(model.neck)
        head = MODELS.build({**model.rpn_head, 'train_cfg': None, 'test_cfg': None})
    assert all(type(each.conv) is Conv2d for each in (*neck.lateral_convs, *neck.fpn_convs))
    assert type(head.rpn_cls) is type(head.rpn_reg) is Conv2d and type(head.rpn_conv) is torch.nn.Conv2d


@pytest.mark.gpu
@pytest.mark.parametrize('layout', LAYOUTS)
@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
def test_products_in_half_precision(dtype, layout, monkeypatch):
    ours, theirs = pair(torch.float32, 'cuda')
    x = LAYOUTS[layout](torch.randn(2, 6, 5, 8, device='cuda'))
    expected = results(theirs.double(), x.double())
    monkeypatch.setattr(torch.nn.Conv2d, 'forward', None)
    with torch.autocast('cuda', dtype):
        actual = results(ours, x)
    assert actual[0].dtype == dtype
    rtol = 0.03 if dtype == torch.bfloat16 else 0.004
    assert_close([each.double() for each in actual], list(expected), rtol=rtol, atol=rtol)


@pytest.mark.gpu
def test_float32_is_left_to_pytorch():
    ours, theirs = pair(torch.float32, 'cuda')
    x = torch.randn(2, 6, 5, 8, device='cuda')
    assert not ours._is_product(x)
    assert_close(results(ours, x), results(theirs, x), rtol=0, atol=0)


OTHERS = {'kernel_size': 3}, {'stride': 2}, {'padding': 1}, {'groups': 2}


@pytest.mark.gpu
@pytest.mark.parametrize('options', [{}, *OTHERS])
def test_other_convolutions_are_none(options):
    conv = Conv2d(**{'in_channels': 4, 'out_channels': 4, 'kernel_size': 1, **options}).half().cuda()
    x = torch.zeros(1, 4, 8, 8, device='cuda', dtype=torch.float16)
    assert conv._is_product(x) == (not options)
    assert not conv._is_product(x[:0]) and not conv._is_product(x.float())
    conv.__class__ = type('Own', (Conv2d,), {})
    assert not conv._is_product(x)
