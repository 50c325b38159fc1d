"""What holds for ViG-H and plain ViG alike."""

import copy
import pickle

import pytest
import torch

from mmvig.backbones import ViG, ViGH
from mmvig.backbones.block import DropPath, draw_factors

MAKERS = {
    'ViGH': lambda: ViGH({'embed_dims': 16, 'depths': [1, 1, 2, 1], 'num_heads': [1, 2, 4, 8]}),
    'ViG': lambda: ViG(
        {'embed_dims': 32, 'depth': 4, 'num_heads': 2, 'conv_act': True}, out_indices=(0, 1, 2, 3)
    ),
}


@pytest.fixture(params=MAKERS)
def model(request):
    torch.manual_seed(0)
    return MAKERS[request.param]()


def test_pickled_and_copied_models_compute_the_same(model):
    model.eval()
    x = torch.randn(1, 3, 48, 32)
    for twin in (pickle.loads(pickle.dumps(model)), copy.deepcopy(model)):
        for a, b in zip(model(x), twin(x), strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float64])
def test_other_dtypes(model, dtype):
    model.eval()
    x = torch.randn(1, 3, 48, 48)
    tolerance = 0.1 if dtype == torch.bfloat16 else 1e-4
    for out, e in zip(copy.deepcopy(model).to(dtype)(x.to(dtype)), model(x), strict=True):
        assert out.dtype == dtype
        torch.testing.assert_close(out.float(), e, rtol=0, atol=tolerance)


def test_autocast_trains(model):
    model.train()
    with torch.autocast('cpu', torch.bfloat16):
        maps = model(torch.randn(2, 3, 56, 40))
    sum(out.float().square().sum() for out in maps).backward()
    for parameter in model.parameters():
        assert parameter.grad.dtype == torch.float32 and parameter.grad.isfinite().all()


def test_factors_of_drop_path_have_mean_one():
    torch.manual_seed(0)
    x, rates = torch.empty(4000, 1), [0.0, 0.5, 0.75, 0.5]
    modules = [DropPath(rate) for rate in rates]
    modules[3].eval()  # as in a frozen stage
    first, *drawn, frozen = draw_factors(modules, x)
    assert first == frozen == (None, None)
    for rate, pair in zip(rates[1:3], drawn, strict=True):
        assert not torch.equal(*pair)
        for factors in pair:
            assert set(factors.tolist()) == {0, 1 / (1 - rate)}
            assert factors.mean() == pytest.approx(1, abs=0.1)
    assert draw_factors(modules[:1], x) == [(None, None)]
    assert set(modules[1](torch.ones(4000, 1)).flatten().tolist()) == {0, 2}


def test_factors_of_drop_path_are_aligned():
    """Or their kernels would be looked up by Triton, which takes longer than they do."""
    factors = draw_factors([DropPath(0.1), DropPath(0.2)], torch.empty(2, 1))
    assert all(x.shape == (2,) and x.data_ptr() % 16 == 0 for pair in factors for x in pair)
