"""Backward pass of a low-rank projection: in Triton's interpreter, and on a GPU (pytest -m gpu)."""

import pytest
import torch

from mmvig.ops.block import low_rank

# On a CPU, conftest.py has Triton interpret its kernels.
DEVICE = 'cuda' if torch.cuda.is_available() else 'cpu'
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
ROUNDING = {torch.float32: 2e-6, torch.bfloat16: 2**-8, torch.float16: 2**-11}


def assert_accurate(rows, channels, rank, dtype):
    """Gradients next to float64's; x and dx are columns of wide tensors."""
    generator = torch.Generator().manual_seed(0)

    def make(*shape):
        return torch.randn(shape, generator=generator).to(DEVICE, dtype)

    dy, wide, weight = make(rows, channels), make(rows, channels + rank), make(channels, rank)
    d_wide = torch.full_like(wide, 7)
    x, dx = wide[:, channels:], d_wide[:, channels:]
    dw = low_rank.backward(dy, x, weight, dx)
    assert dw.dtype == torch.float32 and dw.shape[1:] == (channels * rank + channels,)
    assert (d_wide[:, :channels] == 7).all()
    assert torch.equal(dw, low_rank.backward(dy, x, weight, dx))
    of_weight, of_bias = dw.sum(0).split((channels * rank, channels))
    truth = dy.double() @ weight.double()
    slack = 2 if dtype == torch.bfloat16 and DEVICE == 'cpu' else 1  # the interpreter truncates to bf16
    torch.testing.assert_close(dx.double(), truth, rtol=slack * ROUNDING[dtype], atol=1e-5 * channels**0.5)
    size = {'rtol': 0, 'atol': 2e-6 * max(rows, 16)}
    expected = dy.double().t() @ x.double()
    torch.testing.assert_close(of_weight.view(channels, rank).double(), expected, **size)
    torch.testing.assert_close(of_bias.double(), dy.double().sum(0), **size)


@pytest.mark.parametrize('dtype', DTYPES)
@pytest.mark.parametrize(
    'rows, channels, rank',
    [(0, 48, 16), (1, 48, 16), (70, 96, 16), (33, 768, 16), (300, 20, 20), (40, 64, 3)],
)
def test_accurate(rows, channels, rank, dtype):
    assert_accurate(rows, channels, rank, dtype)


# On a GPU from here on.


@pytest.mark.gpu
@pytest.mark.parametrize('dtype', DTYPES)
@pytest.mark.parametrize('channels', [48, 96, 192, 384, 768, 1024])
def test_sweep(channels, dtype):
    for rows in (1, 31, 1900, 7600, 34000, 121600):
        assert_accurate(rows, channels, 16, dtype)
