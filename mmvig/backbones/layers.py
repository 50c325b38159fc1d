"""The small layers that both families are built of; channels last, ``[B, H, W, C]``."""

import torch.nn.functional as F
from torch import Tensor, nn


class ConvNorm(nn.Module):
    """Strided convolution with padding 1, then LayerNorm over channels.

    A side n becomes floor((n + 2 - kernel_size) / stride) + 1: by default, 3x3 of stride 2, ceil(n / 2).
    """

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int = 3, stride: int = 2):
        super().__init__()
        self.conv = nn.Conv2d(in_channels, out_channels, kernel_size, stride=stride, padding=1)
        self.norm = nn.LayerNorm(out_channels)

    def forward(self, x: Tensor) -> Tensor:
        """[B, H, W, C_in] -> [B, H', W', C_out]."""
        x = self.conv(x.permute(0, 3, 1, 2))
        return self.norm(x.permute(0, 2, 3, 1))


class SwiGLU(nn.Module):
    """W_2 (silu(a) * b) with a, b = split(W_1 x): the channel mixer.

    The hidden width is 8C / 3, rounded up to a multiple of ``multiple_of``.
    """

    def __init__(self, channels: int, multiple_of: int):
        super().__init__()
        hidden = multiple_of * -(-int(8 * channels / 3) // multiple_of)
        self.fc1 = nn.Linear(channels, 2 * hidden, bias=False)
        self.fc2 = nn.Linear(hidden, channels, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """[..., C] -> [..., C]."""
        a, b = self.fc1(x).chunk(2, dim=-1)
        return self.fc2(F.silu(a) * b)


class DropPath(nn.Module):
    """Stochastic depth: in training, zero a sample's residual branch with probability ``rate``."""

    def __init__(self, rate: float):
        super().__init__()
        self.rate = rate

    def forward(self, x: Tensor) -> Tensor:
        """[B, ...] -> [B, ...], scaled by 1 / (1 - rate) where kept."""
        if not self.training or self.rate == 0:
            return x
        keep = x.new_empty(x.shape[:1] + (1,) * (x.ndim - 1)).bernoulli_(1 - self.rate)
        return x * keep.div_(1 - self.rate)

    def extra_repr(self) -> str:
        """Show the rate in ``print(model)``."""
        return f'rate={self.rate:.3f}'
