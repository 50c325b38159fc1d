"""mmvig.compat.convolutions, called through mmcv's own layers, against definitions in loops."""

import importlib
import itertools

from mmvig.compat import mmcv_ext

import pytest
import torch

HALF_DTYPES = [torch.float16, torch.bfloat16]


@pytest.fixture(autouse=True)
def mmcv_calls_the_stand_in(monkeypatch):
    """Also on a machine whose mmcv has its own operators, these tests are about the stand-in."""
    for name in ('deform_conv', 'modulated_deform_conv', 'carafe', 'masked_conv'):
        monkeypatch.setattr(importlib.import_module(f'mmcv.ops.{name}'), 'ext_module', mmcv_ext)


def random(*shape, seed, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()


def sample(feature, y, x):
    """Bilinear sample of [C, H, W] at one point, with zeros around it; differentiable in all three."""
    rows, columns = (torch.arange(size, dtype=y.dtype) for size in feature.shape[1:])
    down, across = ((1 - (at - grid).abs()).clamp(min=0) for at, grid in ((y, rows), (x, columns)))
    return torch.einsum('chw,h,w->c', feature, down, across)


def deform_conv_by_definition(
    x, offset, mask, weight, bias, stride, padding, dilation, groups, deform_groups
):
    """Each output pixel: the kernel's points, moved by their offsets, sampled, weighted and summed."""
    batch, channels = x.shape[:2]
    filters, _, kernel_h, kernel_w = weight.shape
    height, width = offset.shape[2:]
    offset = offset.unflatten(1, (deform_groups, kernel_h, kernel_w, 2))
    mask = mask.unflatten(1, (deform_groups, kernel_h, kernel_w))
    pixels = []
    for b, row, column in itertools.product(range(batch), range(height), range(width)):
        total = 0
        for i, j in itertools.product(range(kernel_h), range(kernel_w)):
            parts = []
            for g, feature in enumerate(x[b].chunk(deform_groups)):
                dy, dx = offset[b, g, i, j, :, row, column]
                y = row * stride[0] - padding[0] + i * dilation[0] + dy
                z = column * stride[1] - padding[1] + j * dilation[1] + dx
                parts.append(mask[b, g, i, j, row, column] * sample(feature, y, z))
            samples = torch.cat(parts).view(groups, channels // groups)
            kernels = weight[:, :, i, j].view(groups, filters // groups, -1)
            total = total + torch.einsum('goc,gc->go', kernels, samples).flatten()
        pixels.append(total + bias)
    return torch.stack(pixels).view(batch, height, width, filters).permute(0, 3, 1, 2)


STRIDED = {'stride': (2, 1), 'padding': (1, 0), 'dilation': (1, 2), 'groups': 2, 'deform_groups': 1}
GROUPED = {'stride': (1, 1), 'padding': (1, 1), 'dilation': (1, 1), 'groups': 1, 'deform_groups': 2}


def deform_conv_arguments(sizes, dtype=torch.float64):
    """Two images of four channels, 4 x 5; six filters of 3 x 2; some samples fall outside the image."""
    image, kernel = (4, 5), (3, 2)
    out = [
        (n + 2 * p - d * (k - 1) - 1) // s + 1
        for n, p, d, k, s in zip(
            image, sizes['padding'], sizes['dilation'], kernel, sizes['stride'], strict=True
        )
    ]
    points = 6 * sizes['deform_groups']
    return (
        random(2, 4, *image, seed=0, dtype=dtype),
        random(2, 2 * points, *out, seed=1, dtype=dtype),
        random(2, points, *out, seed=2, dtype=dtype),
        random(6, 4 // sizes['groups'], *kernel, seed=3, dtype=dtype),
        random(6, seed=4, dtype=dtype),
    )


def version_1(x, offset, weight, stride, padding, dilation, groups, deform_groups):
    from mmcv.ops.deform_conv import deform_conv2d

    return deform_conv2d(x, offset, weight, stride, padding, dilation, groups, deform_groups)


def version_2(x, offset, mask, weight, bias, stride, padding, dilation, groups, deform_groups):
    from mmcv.ops.modulated_deform_conv import modulated_deform_conv2d

    sizes = (stride, padding, dilation, groups, deform_groups)
    return modulated_deform_conv2d(x, offset, mask, weight, bias, *sizes)


def values_and_gradients(output, leaves):
    weight = random(*output.shape, seed=9).detach()
    return output.detach(), *torch.autograd.grad((output.double() * weight).sum(), leaves)


def assert_same(actual, expected):
    for one, other in zip(actual, expected, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize('sizes', [STRIDED, GROUPED], ids=['strided', 'grouped'])
def test_deformable_convolution_1_and_its_gradients_follow_the_definition(sizes):
    x, offset, mask, weight, bias = deform_conv_arguments(sizes)
    leaves = (x, offset, weight)
    expected = deform_conv_by_definition(
        x, offset, torch.ones_like(mask), weight, torch.zeros_like(bias), **sizes
    )
    assert_same(
        values_and_gradients(version_1(x, offset, weight, **sizes), leaves),
        values_and_gradients(expected, leaves),
    )


@pytest.mark.parametrize('with_bias', [True, False])
@pytest.mark.parametrize('sizes', [STRIDED, GROUPED], ids=['strided', 'grouped'])
def test_deformable_convolution_2_and_its_gradients_follow_the_definition(sizes, with_bias):
    *leaves, bias = deform_conv_arguments(sizes)
    actual = version_2(*leaves, bias if with_bias else None, **sizes)
    expected = deform_conv_by_definition(*leaves, bias if with_bias else torch.zeros(6).double(), **sizes)
    leaves += [bias] * with_bias
    assert_same(values_and_gradients(actual, leaves), values_and_gradients(expected, leaves))


def test_offsets_of_a_larger_map_are_read_as_mmcvs_kernel_does():
    """DyHead hands on those of another level: sample [c, y, x] lies at (c * height + y) * width + x."""
    x, offset, mask, weight, bias = deform_conv_arguments(GROUPED)
    height, width = offset.shape[2:]
    large = [random(2, y.shape[1], height + 3, 2 * width, seed=5 + i) for i, y in enumerate((offset, mask))]
    small = []
    for y in large:
        order = torch.arange(y.shape[1] * height * width).view(-1, height, width)
        small.append(y.flatten(1)[:, order])
    leaves = [x, *large, weight, bias]
    expected = deform_conv_by_definition(x, *small, weight, bias, **GROUPED)
    assert_same(
        values_and_gradients(version_2(*leaves, **GROUPED), leaves), values_and_gradients(expected, leaves)
    )


@pytest.mark.parametrize('frozen', ['weight', 'input'])
def test_deformable_convolution_1_gives_gradients_to_a_part_alone(frozen):
    x, offset, _, weight, _ = deform_conv_arguments(GROUPED)
    leaves = [x, offset] if frozen == 'weight' else [weight]
    expected = torch.autograd.grad(version_1(x, offset, weight, **GROUPED).sum(), leaves)
    alone = [leaf if any(leaf is y for y in leaves) else leaf.detach() for leaf in (x, offset, weight)]
    assert_same(torch.autograd.grad(version_1(*alone, **GROUPED).sum(), leaves), expected)


@pytest.mark.parametrize('dtype', HALF_DTYPES)
@pytest.mark.parametrize('version', [1, 2])
def test_deformable_convolutions_in_half_precision_round_once(version, dtype):
    leaves = list(deform_conv_arguments(GROUPED, dtype))
    if version == 1:
        del leaves[4], leaves[2]
    function = version_1 if version == 1 else version_2
    exact = [leaf.detach().float().requires_grad_() for leaf in leaves]
    output, expected = function(*leaves, **GROUPED), function(*exact, **GROUPED)
    assert torch.equal(output, expected.to(dtype))
    weight = random(*output.shape, seed=9).detach().to(dtype)
    output.backward(weight)
    expected.backward(weight.float())
    assert all(torch.equal(x.grad, y.grad.to(dtype)) for x, y in zip(leaves, exact, strict=True))


def carafe_by_definition(features, masks, kernel_size, group_size, scale):
    """Each new pixel: the window around the old one, weighted by the new pixel's own kernel."""
    batch, channels, height, width = features.shape
    masks = masks.unflatten(1, (group_size, kernel_size, kernel_size))
    reach = kernel_size // 2
    output = []
    for b, c, y, x in itertools.product(
        range(batch), range(channels), range(height * scale), range(width * scale)
    ):
        kernel = masks[b, c // (channels // group_size), :, :, y, x]
        total = 0 * kernel.sum()
        for i, j in itertools.product(range(kernel_size), range(kernel_size)):
            row, column = y // scale + i - reach, x // scale + j - reach
            if 0 <= row < height and 0 <= column < width:
                total = total + kernel[i, j] * features[b, c, row, column]
        output.append(total)
    return torch.stack(output).view(batch, channels, height * scale, width * scale)


@pytest.mark.parametrize('kernel_size, group_size, scale', [(3, 1, 2), (3, 2, 1), (1, 2, 3)])
def test_carafe_and_its_gradients_follow_the_definition(kernel_size, group_size, scale):
    from mmcv.ops.carafe import carafe

    sizes = (kernel_size, group_size, scale)
    features = random(2, 4, 3, 2, seed=0)
    masks = random(2, group_size * kernel_size**2, 3 * scale, 2 * scale, seed=1)
    assert_same(
        values_and_gradients(carafe(features, masks, *sizes), (features, masks)),
        values_and_gradients(carafe_by_definition(features, masks, *sizes), (features, masks)),
    )


def test_naive_carafe_is_the_same():
    from mmcv.ops.carafe import carafe, carafe_naive

    leaves = (random(2, 4, 3, 2, seed=0), random(2, 18, 6, 4, seed=1))
    output, *grads = values_and_gradients(carafe(*leaves, 3, 2, 2), leaves)
    assert torch.equal(carafe_naive(*leaves, 3, 2, 2), output)
    buffers = [torch.full_like(leaf, torch.nan) for leaf in leaves]  # mmcv's own function wants a GPU
    weight = random(*output.shape, seed=9).detach()
    sizes = {'kernel_size': 3, 'group_size': 2, 'scale_factor': 2}
    mmcv_ext.carafe_naive_backward(weight, *leaves, *buffers, **sizes)
    assert_same(buffers, grads)


@pytest.mark.parametrize('dtype', HALF_DTYPES)
def test_carafe_in_half_precision_rounds_once(dtype):
    from mmcv.ops.carafe import carafe

    leaves = [random(2, 4, 3, 2, seed=0, dtype=dtype), random(2, 9, 6, 4, seed=1, dtype=dtype)]
    exact = [leaf.detach().float().requires_grad_() for leaf in leaves]
    output, expected = carafe(*leaves, 3, 1, 2), carafe(*exact, 3, 1, 2)
    assert torch.equal(output, expected.to(dtype))
    weight = random(*output.shape, seed=9).detach().to(dtype)
    output.backward(weight)
    expected.backward(weight.float())
    assert all(torch.equal(x.grad, y.grad.to(dtype)) for x, y in zip(leaves, exact, strict=True))


@pytest.mark.parametrize('kernel, padding', [(1, 0), (3, 1), ((3, 5), (1, 2))])
def test_a_masked_convolution_is_the_convolution_where_the_mask_is_and_zero_elsewhere(kernel, padding):
    from mmcv.ops import MaskedConv2d

    torch.manual_seed(0)
    layer = MaskedConv2d(4, 6, kernel, padding=padding).double()
    x, mask = random(1, 4, 5, 7, seed=0).detach(), random(1, 5, 7, seed=1) > 0
    with torch.no_grad():
        actual, expected = layer(x, mask), layer(x) * mask
    assert 0 < mask.sum() < mask.numel()
    torch.testing.assert_close(actual, expected)


@pytest.mark.gpu
def test_operators_on_cuda_agree_with_the_cpu():
    from mmcv.ops.carafe import carafe

    leaves = deform_conv_arguments(GROUPED)
    x, offset, _, weight, _ = leaves
    maps = (random(2, 4, 3, 2, seed=0), random(2, 9, 6, 4, seed=1))
    cases = [
        (lambda *t: version_1(*t, **GROUPED), (x, offset, weight)),
        (lambda *t: version_2(*t, **GROUPED), leaves),
        (lambda *t: carafe(*t, 3, 1, 2), maps),
    ]
    for function, given in cases:
        on_cuda = [leaf.detach().cuda().requires_grad_() for leaf in given]
        output = function(*on_cuda)
        weights = random(*output.shape, seed=9).detach().cuda()
        actual = (output.detach(), *torch.autograd.grad((output * weights).sum(), on_cuda))
        assert_same([y.cpu() for y in actual], values_and_gradients(function(*given), given))
