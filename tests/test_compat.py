import importlib
import importlib.util
import itertools
import logging
import pickle
import subprocess
import sys
from collections import OrderedDict

import mmvig.compat
from mmvig.compat import mmcv_ext

import pytest
import torch

HALF_DTYPES = [torch.float16, torch.bfloat16]


def random_boxes(count, size=40.0, seed=0):
    generator = torch.Generator().manual_seed(seed)
    corner = torch.rand(count, 2, generator=generator) * size
    side = torch.rand(count, 2, generator=generator) * size / 2 + 1
    return torch.cat([corner, corner + side], 1), torch.rand(count, generator=generator)


def greedy_nms(boxes, scores, threshold, offset):
    """Non-maximum suppression by its definition, box by box."""
    kept = []
    for i in scores.argsort(descending=True).tolist():
        for j in kept:
            low = torch.maximum(boxes[i, :2], boxes[j, :2])
            high = torch.minimum(boxes[i, 2:], boxes[j, 2:])
            inter = (high - low + offset).clamp(min=0).prod()
            areas = [(boxes[k, 2:] - boxes[k, :2] + offset).prod() for k in (i, j)]
            if inter / (sum(areas) - inter) > threshold:
                break
        else:
            kept.append(i)
    return kept


def bilinear(feature, y, x):
    """Sample [C, H, W] at one point; outside by more than a pixel is zero, less is clamped."""
    height, width = feature.shape[1:]
    if not (-1 <= y <= height and -1 <= x <= width):
        return feature.new_zeros(feature.shape[0])
    y, x = min(max(y, 0), height - 1), min(max(x, 0), width - 1)
    y0, x0 = int(y), int(x)
    y1, x1 = min(y0 + 1, height - 1), min(x0 + 1, width - 1)
    dy, dx = y - y0, x - x0
    top = feature[:, y0, x0] * (1 - dx) + feature[:, y0, x1] * dx
    bottom = feature[:, y1, x0] * (1 - dx) + feature[:, y1, x1] * dx
    return top * (1 - dy) + bottom * dy


def roi_align_by_definition(features, rois, size, scale, sampling_ratio, aligned):
    """Average of bilinear samples on a regular grid in each bin, differentiable in `features`."""
    shift = 0.5 if aligned else 0.0
    pooled = []
    for index, *box in rois.tolist():
        x1, y1, x2, y2 = (c * scale - shift for c in box)
        width, height = x2 - x1, y2 - y1
        if not aligned:
            width, height = max(width, 1.0), max(height, 1.0)
        bin_h, bin_w = height / size[0], width / size[1]
        grid_h = sampling_ratio or -int(-bin_h // 1)
        grid_w = sampling_ratio or -int(-bin_w // 1)
        for row in range(size[0]):
            for column in range(size[1]):
                samples = [
                    bilinear(
                        features[int(index)],
                        y1 + bin_h * (row + (i + 0.5) / grid_h),
                        x1 + bin_w * (column + (j + 0.5) / grid_w),
                    )
                    for i in range(grid_h)
                    for j in range(grid_w)
                ]
                pooled.append(torch.stack(samples).mean(0))
    pooled = torch.stack(pooled).view(len(rois), *size, -1)
    return pooled.permute(0, 3, 1, 2)


def roi_align(features, rois, size=(3, 2), scale=0.25, sampling_ratio=0, aligned=True):
    """The stand-in, called through mmcv's own autograd function."""
    from mmcv.ops.roi_align import RoIAlignFunction

    return RoIAlignFunction.apply(features, rois, size, scale, sampling_ratio, 'avg', aligned)


def deform_attn_arguments(dtype=torch.float64, seed=0):
    """Two images, two maps (5 x 7 and 3 x 4), four heads; some samples fall outside the maps."""
    generator = torch.Generator().manual_seed(seed)
    shapes = torch.tensor([[5, 7], [3, 4]])
    value = torch.randn(2, 47, 4, 3, generator=generator)
    locations = torch.rand(2, 6, 4, 2, 3, 2, generator=generator) * 1.4 - 0.2
    weights = torch.rand(2, 6, 4, 2, 3, generator=generator)
    leaves = [x.to(dtype).requires_grad_() for x in (value, locations, weights)]
    return shapes, *leaves


def deform_attn(shapes, value, locations, weights):
    """The stand-in, called through mmcv's own autograd function."""
    from mmcv.ops.multi_scale_deform_attn import MultiScaleDeformableAttnFunction

    starts = torch.tensor([0, 35])
    return MultiScaleDeformableAttnFunction.apply(value, shapes, starts, locations, weights, 64)


def sample(feature, y, x):
    """Bilinear sample of [C, H, W] at one point, with zeros around it; differentiable in all three."""
    height, width = feature.shape[1:]
    total = feature.new_zeros(feature.shape[0])
    for row in range(height):
        for column in range(width):
            weight = (1 - (y - row).abs()).clamp(min=0) * (1 - (x - column).abs()).clamp(min=0)
            total = total + feature[:, row, column] * weight
    return total


def deform_attn_by_definition(shapes, value, locations, weights):
    """Multi-scale deformable attention, sample by sample."""
    batch, queries, heads, levels, points = weights.shape
    maps = value.split([height * width for height, width in shapes.tolist()], 1)
    result = []
    for b, q, h in itertools.product(range(batch), range(queries), range(heads)):
        total = 0
        for level, point in itertools.product(range(levels), range(points)):
            height, width = shapes[level].tolist()
            feature = maps[level][b, :, h].T.unflatten(1, (height, width))
            x, y = locations[b, q, h, level, point]
            pixel = sample(feature, y * height - 0.5, x * width - 0.5)
            total = total + weights[b, q, h, level, point] * pixel
        result.append(total)
    return torch.stack(result).view(batch, queries, -1)


def focal_loss(logits, target, weight=None, gamma=2.0, alpha=0.25, reduction='none'):
    """The stand-in, called through mmcv's own autograd function."""
    from mmcv.ops.focal_loss import SigmoidFocalLossFunction

    return SigmoidFocalLossFunction.apply(logits, target, gamma, alpha, weight, reduction)


def focal_loss_by_definition(logits, target, gamma, alpha):
    """-a_t (1 - p_t)^gamma log p_t, p_t being the probability of what is so."""
    so = torch.nn.functional.one_hot(target, logits.shape[1] + 1)[:, :-1].bool()
    p = logits.sigmoid()
    p_t, a_t = torch.where(so, p, 1 - p), torch.where(so, alpha, 1 - alpha)
    return -a_t * (1 - p_t) ** gamma * p_t.log()


@pytest.fixture(autouse=True)
def mmcv_calls_the_stand_in(monkeypatch):
    """Also on a machine whose mmcv has its own operators, these tests are about the stand-in."""
    # By name: mmcv.ops also has functions that are called nms and roi_align.
    for name in (
        'mmcv.ops.nms',
        'mmcv.ops.roi_align',
        'mmcv.ops.multi_scale_deform_attn',
        'mmcv.ops.focal_loss',
    ):
        monkeypatch.setattr(importlib.import_module(name), 'ext_module', mmcv_ext)


@pytest.mark.parametrize('offset', [0, 1])
@pytest.mark.parametrize('threshold', [0.1, 0.5, 0.9])
def test_nms_keeps_what_its_definition_keeps(offset, threshold):
    boxes, scores = random_boxes(60)
    given = boxes.clone()
    kept = mmcv_ext.nms(boxes, scores, iou_threshold=threshold, offset=offset)
    assert kept.tolist() == greedy_nms(boxes, scores, threshold, offset)
    assert torch.equal(boxes, given)


def test_nms_offset_matters_for_these_boxes():
    boxes, scores = random_boxes(60)
    assert greedy_nms(boxes, scores, 0.1, 0) != greedy_nms(boxes, scores, 0.1, 1)


@pytest.mark.parametrize('dtype', HALF_DTYPES)
@pytest.mark.parametrize('scores_too', [True, False])
def test_nms_of_half_precision_boxes(dtype, scores_too):
    boxes, scores = random_boxes(60)
    boxes, scores = boxes.to(dtype), scores.to(dtype).float()
    expected = mmcv_ext.nms(boxes.float(), scores, 0.4, 0)
    kept = mmcv_ext.nms(boxes, scores.to(dtype) if scores_too else scores, 0.4, 0)
    assert torch.equal(kept, expected)


def test_nms_through_mmcv_by_class_with_score_threshold():
    from mmcv.ops import batched_nms, nms

    boxes, scores = random_boxes(60)
    dets, kept = nms(boxes, scores, 0.5, score_threshold=0.3, max_num=5)
    expected = [i for i in greedy_nms(boxes, scores, 0.5, 0) if scores[i] > 0.3][:5]
    assert kept.tolist() == expected
    assert torch.equal(dets, torch.cat([boxes[kept], scores[kept, None]], 1))

    classes = torch.arange(60) % 3
    _, kept = batched_nms(boxes, scores, classes, dict(type='nms', iou_threshold=0.5))
    per_class = [
        i
        for c in range(3)
        for i in (classes == c)
        .nonzero()[:, 0][greedy_nms(boxes[classes == c], scores[classes == c], 0.5, 0)]
        .tolist()
    ]
    assert sorted(kept.tolist()) == sorted(per_class)


def test_nms_of_no_boxes():
    kept = mmcv_ext.nms(torch.zeros(0, 4), torch.zeros(0), iou_threshold=0.5, offset=1)
    assert kept.shape == (0,)
    assert kept.dtype == torch.int64


@pytest.mark.parametrize('aligned', [True, False])
@pytest.mark.parametrize('sampling_ratio', [0, 2])
def test_roi_align_and_its_gradient_follow_the_definition(aligned, sampling_ratio):
    torch.manual_seed(0)
    features = torch.randn(2, 3, 9, 11, dtype=torch.float64, requires_grad=True)
    boxes, _ = random_boxes(7)  # some reach beyond the 44 x 36 image
    rois = torch.cat([torch.arange(7)[:, None] % 2, boxes], 1).double()
    weight = torch.randn(7, 3, 3, 2, dtype=torch.float64)
    results = []
    for function in (roi_align, roi_align_by_definition):
        pooled = function(features, rois, (3, 2), 0.25, sampling_ratio, aligned)
        (grad,) = torch.autograd.grad((pooled * weight).sum(), features)
        results.append((pooled.detach(), grad))
    (pooled, grad), (expected_pooled, expected_grad) = results
    torch.testing.assert_close(pooled, expected_pooled)
    torch.testing.assert_close(grad, expected_grad)


@pytest.mark.parametrize('dtype', HALF_DTYPES)
def test_roi_align_in_half_precision_rounds_once(dtype):
    torch.manual_seed(0)
    features = torch.randn(2, 3, 9, 11).to(dtype).requires_grad_()
    boxes, _ = random_boxes(7)
    rois = torch.cat([torch.arange(7)[:, None] % 2, boxes], 1).to(dtype)
    exact = features.detach().float().requires_grad_()
    weight = torch.randn(7, 3, 3, 2).to(dtype)

    pooled, expected = roi_align(features, rois), roi_align(exact, rois.float())
    assert torch.equal(pooled, expected.to(dtype))
    pooled.backward(weight)
    expected.backward(weight.float())
    assert features.grad.dtype == dtype
    assert torch.equal(features.grad, exact.grad.to(dtype))


@pytest.mark.parametrize('dtype', [torch.float32, *HALF_DTYPES])
def test_roi_align_of_no_rois(dtype):
    features = torch.randn(2, 3, 9, 11).to(dtype).requires_grad_()
    pooled = roi_align(features, torch.zeros(0, 5, dtype=dtype))
    assert pooled.shape == (0, 3, 3, 2)
    pooled.sum().backward()
    assert not features.grad.any()


def test_deformable_attention_and_its_gradients_follow_the_definition():
    shapes, *leaves = deform_attn_arguments()
    weight = torch.randn(2, 6, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    results = []
    for function in (deform_attn, deform_attn_by_definition):
        output = function(shapes, *leaves)
        results.append((output.detach(), *torch.autograd.grad((output * weight).sum(), leaves)))
    for actual, expected in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize('dtype', HALF_DTYPES)
def test_deformable_attention_in_half_precision_rounds_once(dtype):
    shapes, *leaves = deform_attn_arguments(dtype)
    exact = [x.detach().float().requires_grad_() for x in leaves]
    output, expected = deform_attn(shapes, *leaves), deform_attn(shapes, *exact)
    assert torch.equal(output, expected.to(dtype))
    weight = torch.randn(output.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    output.backward(weight)
    expected.backward(weight.float())
    assert all(torch.equal(x.grad, y.grad.to(dtype)) for x, y in zip(leaves, exact, strict=True))


@pytest.mark.parametrize('gamma, alpha', [(2.0, 0.25), (1.5, 0.5)])
def test_focal_loss_and_its_gradient_follow_the_definition(gamma, alpha):
    generator = torch.Generator().manual_seed(0)
    logits = (3 * torch.randn(9, 4, generator=generator, dtype=torch.float64)).requires_grad_()
    target = torch.arange(9) % 5  # 4 is the background
    weight = torch.rand(9, 4, generator=generator, dtype=torch.float64)
    results = []
    for function in (focal_loss, focal_loss_by_definition):
        loss = function(logits, target, gamma=gamma, alpha=alpha)
        results.append((loss.detach(), torch.autograd.grad((loss * weight).sum(), logits)[0]))
    for actual, expected in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected)


def test_focal_loss_weights_rows_by_their_target():
    logits, target = (
        torch.randn(4, 3, generator=torch.Generator().manual_seed(0)),
        torch.tensor([0, 2, 1, 2]),
    )
    by_class = torch.tensor([1.0, 2.0, 4.0])
    weighted = focal_loss(logits, target, by_class)
    torch.testing.assert_close(weighted, focal_loss(logits, target) * by_class[target, None])


def test_focal_loss_of_certain_logits_is_finite():
    logits = torch.tensor([[200.0, -200.0]], requires_grad=True)
    for target, expected in ((0, 0.0), (1, 0.75 * 200 + 0.25 * 200)):
        loss = focal_loss(logits, torch.tensor([target]), reduction='sum')
        assert loss.item() == pytest.approx(expected)
        (grad,) = torch.autograd.grad(loss, logits)
        assert grad.isfinite().all()


@pytest.mark.gpu
def test_models_call_the_stand_in_on_cuda():
    """On GPUs only, mmdet's focal loss and mmcv's attention layer take these operators."""
    from mmcv.ops import MultiScaleDeformableAttention
    from mmdet.models.losses import FocalLoss

    torch.manual_seed(0)
    layer = MultiScaleDeformableAttention(32, num_heads=4, num_levels=2, batch_first=True)
    torch.nn.init.normal_(layer.attention_weights.weight)
    value, reference = torch.randn(2, 47, 32), torch.rand(2, 47, 2, 2)
    shapes, starts = torch.tensor([[5, 7], [3, 4]]), torch.tensor([0, 35])
    logits, target = torch.randn(9, 4), torch.arange(9) % 5
    results = []
    for device in ('cpu', 'cuda'):
        query, scores = (x.to(device).detach().requires_grad_() for x in (value, logits))
        arguments = [x.to(device) for x in (reference, shapes, starts)]
        keys = ('reference_points', 'spatial_shapes', 'level_start_index')
        output = layer.to(device).eval()(query, **dict(zip(keys, arguments, strict=True)))
        loss = FocalLoss().to(device)(scores, target.to(device))
        (output.square().sum() + loss).backward()
        results.append([x.detach().cpu() for x in (output, loss, query.grad, scores.grad)])
    for actual, expected in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.gpu
@pytest.mark.parametrize('dtype', [torch.float32, *HALF_DTYPES])
def test_operators_on_cuda_agree_with_the_cpu(dtype):
    boxes, scores = random_boxes(60)
    boxes, scores = boxes.to(dtype), scores.to(dtype)
    kept = mmcv_ext.nms(boxes.cuda(), scores.cuda(), 0.4, 1)
    assert torch.equal(kept.cpu(), mmcv_ext.nms(boxes, scores, 0.4, 1))

    torch.manual_seed(0)
    features = torch.randn(2, 3, 9, 11).to(dtype)
    rois = torch.cat([torch.zeros(60, 1), boxes.float()], 1).to(dtype)
    weight = torch.randn(60, 3, 3, 2).to(dtype)
    results = []
    for device in ('cpu', 'cuda'):
        local = features.to(device).detach().requires_grad_()
        with torch.autocast('cuda', enabled=dtype == torch.float16):
            pooled = roi_align(local, rois.to(device))
        pooled.backward(weight.to(device))
        results.append((pooled.detach().cpu(), local.grad.cpu()))
    torch.testing.assert_close(results[1], results[0])


def test_max_pooling_is_refused():
    from mmcv.ops import RoIAlign

    layer = RoIAlign((2, 2), pool_mode='max')
    with pytest.raises(NotImplementedError, match=r"pool_mode='max'.*pool_mode='avg'"):
        layer(torch.randn(1, 1, 4, 4), torch.zeros(1, 5))


def test_any_other_operator_is_there_but_says_what_to_do_when_called():
    with pytest.raises(NotImplementedError, match=r"'softnms'.*compiled operators"):
        mmcv_ext.softnms(torch.zeros(1, 4))


def test_the_stand_in_has_no_invented_dunder_attributes():
    assert not hasattr(mmcv_ext, '__path__')


def test_mmcv_and_mmengine_find_the_extension():
    from mmcv.utils.ext_loader import check_ops_exist
    from mmengine.utils.dl_utils.misc import mmcv_full_available

    assert importlib.util.find_spec('mmcv._ext') is not None
    assert mmcv_full_available()
    if sys.version_info < (3, 14):  # it calls pkgutil.find_loader, which 3.14 lacks
        assert check_ops_exist()


@pytest.fixture
def fake_mmcv(tmp_path, monkeypatch):
    """An mmcv without anything in it, in place of the installed one."""
    for name in [name for name in sys.modules if name.partition('.')[0] == 'mmcv']:
        monkeypatch.delitem(sys.modules, name)
    (tmp_path / 'mmcv').mkdir()
    (tmp_path / 'mmcv' / '__init__.py').touch()
    monkeypatch.syspath_prepend(tmp_path)
    return tmp_path / 'mmcv'


def test_the_stand_in_is_put_in_place_once_and_says_so(fake_mmcv, caplog):
    caplog.set_level(logging.INFO)
    for _ in range(2):
        mmvig.compat._stand_in_for_mmcv_ext()
    assert sys.modules.pop('mmcv._ext') is mmcv_ext
    (record,) = caplog.records
    assert record.levelno == logging.INFO
    assert 'mmcv' in record.message
    assert 'torchvision' in record.message


def test_without_mmcv_nothing_happens(monkeypatch, caplog):
    caplog.set_level(logging.INFO)
    monkeypatch.delitem(sys.modules, 'mmcv._ext', raising=False)
    monkeypatch.setitem(sys.modules, 'mmcv', None)  # as if it were not installed
    mmvig.compat._stand_in_for_mmcv_ext()
    assert 'mmcv._ext' not in sys.modules
    assert not caplog.records


def test_compiled_operators_are_left_alone(tmp_path):
    (tmp_path / 'mmcv').mkdir()
    (tmp_path / 'mmcv' / '__init__.py').touch()
    (tmp_path / 'mmcv' / '_ext.py').write_text('compiled = True\n')
    program = f"""
import logging, sys
logging.basicConfig(level=logging.INFO)
sys.path.insert(0, {str(tmp_path)!r})
import mmvig.compat
assert 'mmvig.compat.mmcv_ext' not in sys.modules
assert 'mmcv' not in sys.modules
import mmcv._ext
assert mmcv._ext.compiled
"""
    result = subprocess.run([sys.executable, '-c', program], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert 'mmvig' not in result.stderr


def test_mmdet_imported_earlier_gets_the_operators_that_it_missed(monkeypatch):
    from mmcv.ops import batched_nms, roi_align
    from mmdet.evaluation.metrics import dump_odvg_results
    from mmdet.structures.mask import structures

    def missed():
        raise RuntimeError

    for module, name in ((structures, 'roi_align'), (dump_odvg_results, 'batched_nms')):
        fallback = type(missed)(missed.__code__, {'__name__': module.__name__})  # as if defined there
        monkeypatch.setattr(module, name, fallback)
    mmvig.compat._give_mmdet_its_operators()
    assert structures.roi_align is roi_align
    assert dump_odvg_results.batched_nms is batched_nms


def test_mmdet_with_its_operators_keeps_them(monkeypatch):
    from mmdet.structures.mask import structures

    monkeypatch.setattr(structures, 'roi_align', wrapped := lambda *args: None)
    mmvig.compat._give_mmdet_its_operators()
    assert structures.roi_align is wrapped


@pytest.fixture
def upstream_mmengine(monkeypatch):
    """An mmengine that leaves torch.load as it is, as upstream's does."""
    from mmengine.runner import checkpoint

    monkeypatch.delattr(checkpoint, 'get_torch_safe_globals', raising=False)
    before = torch.serialization.get_safe_globals()
    yield
    torch.serialization.clear_safe_globals()
    torch.serialization.add_safe_globals(before)


def test_checkpoints_with_a_log_history_can_be_read_with_weights_only(upstream_mmengine, tmp_path):
    from mmengine.logging import HistoryBuffer

    history = HistoryBuffer()
    history.update(0.5)
    torch.save({'message_hub': {'loss': history}}, tmp_path / 'it.pth')
    with pytest.raises(pickle.UnpicklingError):
        torch.load(tmp_path / 'it.pth', weights_only=True)
    mmvig.compat._let_torch_load_mmengine_checkpoints()
    loaded = torch.load(tmp_path / 'it.pth', weights_only=True)
    assert loaded['message_hub']['loss'].current() == 0.5


class Attack:
    def __reduce__(self):
        return getattr, (OrderedDict, 'fromkeys')


def test_a_checkpoint_may_ask_for_no_other_attribute(upstream_mmengine, tmp_path):
    torch.save({'state_dict': Attack()}, tmp_path / 'it.pth')
    mmvig.compat._let_torch_load_mmengine_checkpoints()
    with pytest.raises(pickle.UnpicklingError, match='fromkeys'):
        torch.load(tmp_path / 'it.pth', weights_only=True)
