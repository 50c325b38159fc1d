"""The small layers that both families are built of; channels last, ``[B, H, W, C]``.

``backend`` is a model's: 'auto' has norms, depthwise convolutions, gates and activations on fused kernels
where they can run, 'triton' insists on them, anything else takes PyTorch's.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmvig.ops.choice import autocast_dtype, is_plain, use_triton
from mmvig.ops.conv_norm import conv_norm, takes
from mmvig.ops.dwconv import dwconv3x3
from mmvig.ops.linear import MIN_WIDTH, apply_linear, linear
from mmvig.ops.norm import add_norm, norm
from mmvig.ops.swiglu import swiglu


def fused_backend(backend: str) -> str:
    """The backend of the operators around BiGLA, 'auto', 'torch' or 'triton', for a model's."""
    return backend if backend in ('auto', 'triton') else 'torch'


def use_any_device(model: nn.Module) -> None:
    """Have parts that were built with backend='triton' choose for themselves, as on a CPU they must."""
    for module in model.modules():
        if getattr(module, 'backend', None) == 'triton':
            module.backend = 'auto'


class _ResidualNorm:
    """What LayerNorm and RMSNorm add to PyTorch's: the residual connection before them, in one pass."""

    def __init__(self, channels: int, backend: str, **options):
        super().__init__(channels, **options)
        self.backend = fused_backend(backend)

    def forward(
        self, x: Tensor, branch: Tensor | None = None, scale: Tensor | None = None, **options
    ) -> tuple[Tensor, Tensor]:
        """(x, norm(x)) where there is no branch, else (s, norm(s)) with s = x + scale * branch.

        ``options``: see :func:`mmvig.ops.norm.add_norm`.
        """
        weights = self.weight, getattr(self, 'bias', None), self.eps
        if branch is None:
            return x, norm(x, *weights, backend=self.backend, **options)
        return add_norm(x, branch, scale, *weights, backend=self.backend, **options)


class LayerNorm(_ResidualNorm, nn.LayerNorm):
    """LayerNorm over channels of x, or of the sum of x and a residual branch."""


class RMSNorm(_ResidualNorm, nn.RMSNorm):
    """RMSNorm over channels of x, or of the sum of x and a residual branch."""


class ConvNorm(nn.Module):
    """Strided convolution with padding 1, then LayerNorm over channels, then an activation if one is named.

    A side n becomes floor((n + 2 - kernel_size) / stride) + 1: by default, 3x3 of stride 2, ceil(n / 2).
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        backend: str,
        kernel_size: int = 3,
        stride: int = 2,
        act: str = 'none',
    ):
        super().__init__()
        self.conv = nn.Conv2d(in_channels, out_channels, kernel_size, stride=stride, padding=1)
        self.norm = nn.LayerNorm(out_channels)
        self.act = act
        self.backend = fused_backend(backend)

    def forward(self, x: Tensor) -> Tensor:
        """[B, H, W, C_in] -> [B, H', W', C_out], in float32 under autocast unless an activation follows."""
        conv, weights = self.conv, (self.norm.weight, self.norm.bias, self.norm.eps)
        # The residual connections start where no activation follows.
        dtype = self.norm.weight.dtype if self.act == 'none' else autocast_dtype(x)
        options = {'act': self.act, 'dtype': dtype, 'backend': self.backend}
        plain = is_plain(conv, nn.Conv2d)
        fused = plain and use_triton('mmvig.ops.norm', self.backend, x)
        if fused and takes(x, conv.weight):
            return conv_norm(x, conv.weight, conv.bias, *weights, stride=conv.stride[0], **options)
        if fused and torch.compiler.is_compiling():  # Inductor must not know it, see there
            from mmvig.ops.conv import conv_op

            low = autocast_dtype(x)
            x = conv_op(x.to(low), conv.weight.to(low), conv.stride[0])
            return norm(x, *weights, shift=conv.bias, **options)
        if plain and _few_patches(conv, x):
            return norm(_conv_by_product(conv, x), *weights, **options)
        x = x.permute(0, 3, 1, 2).contiguous(memory_format=torch.channels_last)
        if fused:
            # Its bias with the norm: PyTorch's convolutions on a GPU add it in a pass of its own.
            x, options['shift'] = F.conv2d(x, conv.weight, None, conv.stride, conv.padding), conv.bias
        else:
            x = conv(x)
        return norm(x.permute(0, 2, 3, 1), *weights, **options)


def _few_patches(conv: nn.Conv2d, x: Tensor) -> bool:
    """Whether a convolution on a CPU is to be a product, its patches taking less memory than its weight.

    PyTorch's copies the weight twice a call, and malloc may give what it frees back to the system, for page
    faults later: without, ViG-H-T takes 8 % less time at 224x224.
    """
    if x.device.type != 'cpu' or torch.compiler.is_compiling():
        return False
    height, width = ((n + 2 - conv.kernel_size[0]) // conv.stride[0] + 1 for n in x.shape[1:3])
    return 0 < x.shape[0] * height * width < conv.out_channels


def _conv_by_product(conv: nn.Conv2d, x: Tensor) -> Tensor:
    """[B, H, W, C_in] -> [B, H', W', C_out]."""
    (height, width), (down, right) = conv.kernel_size, conv.stride
    patches = F.pad(x, (0, 0, 1, 1, 1, 1)).unfold(1, height, down).unfold(2, width, right)
    return linear(patches.flatten(3), conv.weight.flatten(1), conv.bias)


class DWConv(nn.Conv2d):
    """Depthwise 3x3 convolution without bias."""

    def __init__(self, channels: int, backend: str):
        super().__init__(channels, channels, 3, padding=1, groups=channels, bias=False)
        self.backend = fused_backend(backend)

    def forward(self, x: Tensor) -> Tensor:
        """[B, H, W, C] -> [B, H, W, C]."""
        return dwconv3x3(x, self.weight, backend=self.backend)


class SwiGLU(nn.Module):
    """W_2 (silu(a) * b) with a, b = split(W_1 x): the channel mixer.

    The hidden width is 8C / 3, rounded up to a multiple of ``multiple_of``.
    """

    def __init__(self, channels: int, multiple_of: int, backend: str):
        super().__init__()
        hidden = multiple_of * -(-int(8 * channels / 3) // multiple_of)
        self.fc1 = nn.Linear(channels, 2 * hidden, bias=False)
        self.fc2 = nn.Linear(hidden, channels, bias=False)
        self.backend = fused_backend(backend)

    def forward(self, x: Tensor) -> Tensor:
        """[..., C] -> [..., C]."""
        if self._in_halves(x):
            a, b = (linear(x, weight) for weight in self.fc1.weight.chunk(2))
            return linear(F.silu(a, inplace=True).mul_(b), self.fc2.weight)
        return swiglu(apply_linear(self.fc1, x), self.fc2.weight, backend=self.backend)

    def _in_halves(self, x: Tensor) -> bool:
        """Whether a and b are to be products of their own, in whose memory the rest is computed.

        On 2 cores, 60,800 tokens of 96 channels take 108 instead of 154 ms, 784 of 192 take 2.8 instead of
        3.0; wide layers, whose products are oneDNN's, would take 3.5 instead of 3.1 (196 of 384).
        """
        return (
            x.device.type == 'cpu'
            and self.backend != 'triton'
            and x.shape[-1] < MIN_WIDTH
            and not torch.is_grad_enabled()
            and not torch.compiler.is_compiling()
            and is_plain(self.fc1, nn.Linear)
        )
