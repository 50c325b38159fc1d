"""The simple feature pyramid against its definition, by einsum in float64."""

import mmvig.compat  # noqa: F401  before what imports mmcv.ops

import pytest
import torch
import torch.nn.functional as F
from mmcv.cnn import build_norm_layer
from mmengine.registry import MODELS
from torch import nn
from torch.testing import assert_close

from mmvig.backbones.layers import LayerNorm2d


def doubled(x, conv):
    """A transposed convolution of kernel and stride 2: each pixel becomes 2 x 2."""
    b, _, h, w = x.shape
    pixels = torch.einsum('bchw,cdij->bdhiwj', x, conv.weight) + conv.bias[:, None, None, None, None]
    return pixels.reshape(b, -1, 2 * h, 2 * w)


def normalised(x, norm):
    x = x - x.mean(1, keepdim=True)
    x = x / (x.square().mean(1, keepdim=True) + 1e-6).sqrt()
    return x * norm.weight[:, None, None] + norm.bias[:, None, None]


def convolved(x, one, norm_one, three, norm_three):
    x = normalised(torch.einsum('bchw,dc->bdhw', x, one.weight[:, :, 0, 0]), norm_one)
    b, _, h, w = x.shape
    columns = F.unfold(x, 3, padding=1)  # [B, C * 9, H * W]
    x = torch.einsum('bkn,dk->bdn', columns, three.weight.flatten(1)).reshape(b, -1, h, w)
    return normalised(x, norm_three)


def test_levels_are_those_of_the_definition():
    torch.manual_seed(0)
    neck = MODELS.build(dict(type='mmvig.SimpleFPN', in_channels=8, out_channels=6, num_outs=6)).double()
    for parameter in neck.parameters():
        nn.init.normal_(parameter, std=0.5)  # norms' too
    x = torch.randn(2, 8, 8, 12, dtype=torch.float64)
    maps = neck((x,))

    (up1, norm, _, up2, *four), (up, *two), one, (_, *half) = neck.levels
    hidden = normalised(doubled(x, up1), norm)
    hidden = hidden * (1 + torch.erf(hidden / 2**0.5)) / 2
    expected = [
        convolved(doubled(hidden, up2), *four),
        convolved(doubled(x, up), *two),
        convolved(x, *one),
        convolved(x.reshape(2, 8, 4, 2, 6, 2).amax((3, 5)), *half),
    ]
    for _ in range(2):
        expected.append(expected[-1][:, :, ::2, ::2])
    assert [tuple(each.shape[2:]) for each in maps] == [(32, 48), (16, 24), (8, 12), (4, 6), (2, 3), (1, 2)]
    for actual, wanted in zip(maps, expected, strict=True):
        assert_close(actual, wanted)

    sum(each.square().sum() for each in maps).backward()
    assert all(parameter.grad.any() for parameter in neck.parameters())


@pytest.mark.parametrize(
    ('options', 'said'),
    [
        (dict(in_channels=6), 'multiple of 4, got 6'),
        (dict(in_channels=0), 'multiple of 4, got 0'),
        (dict(in_channels=8, out_channels=0), 'got 0 and 5'),
        (dict(in_channels=8, num_outs=3), 'num_outs at least 4, got 256 and 3'),
    ],
)
def test_what_it_cannot_be_built_with(options, said):
    with pytest.raises(ValueError, match=said):
        MODELS.build(dict(type='mmvig.SimpleFPN', **options))


@pytest.mark.parametrize('count', [0, 2])
def test_it_reads_one_map(count):
    neck = MODELS.build(dict(type='mmvig.SimpleFPN', in_channels=8))
    with pytest.raises(ValueError, match=f'one map, got {count}: .* out_indices'):
        neck([torch.rand(1, 8, 4, 4)] * count)


def test_heads_find_the_norm_by_its_scope():
    name, norm = build_norm_layer(dict(type='mmvig.LN2d', eps=1e-3), 5)
    assert (name, type(norm), norm.normalized_shape, norm.eps) == ('ln', LayerNorm2d, (5,), 1e-3)
