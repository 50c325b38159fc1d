"""The small layers that both families are built of; channels last, ``[B, H, W, C]``.

A parent computes what a child does only where the child is exactly what its type says (``is_plain``), and
calls it otherwise: hooks, replaced and wrapped modules, parametrisations and weights of other types count.

``backend`` is a model's: 'auto' has norms, depthwise convolutions, gates and activations on fused kernels
where they can run, 'triton' insists on them, anything else takes PyTorch's.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmvig.ops.backend import autocast_dtype, use_triton
from mmvig.ops.conv_norm import conv_norm, takes
from mmvig.ops.cpu import MIN_WIDTH, apply_linear, linear
from mmvig.ops.dwconv import dwconv3x3
from mmvig.ops.norm import ACTIVATIONS, add, add_norm, norm
from mmvig.ops.plain import PLAIN_TENSORS, is_plain, is_watched
from mmvig.ops.swiglu import swiglu


def fused_backend(backend: str) -> str:
    """The backend of the operators around BiGLA, 'auto', 'torch' or 'triton', for a model's."""
    return backend if backend in ('auto', 'triton') else 'torch'


def use_any_device(model: nn.Module) -> None:
    """Have parts that were built with backend='triton' choose for themselves, as on a CPU they must."""
    for module in model.modules():
        if getattr(module, 'backend', None) == 'triton':
            module.backend = 'auto'


def randomise(model: nn.Module) -> None:
    """Draw matrices and kernels anew, so that an error in any part of a model shows in its outputs.

    Through initial weights BiGLA hardly reaches them.
    """
    for parameter in model.parameters():
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=0.5 * parameter[0].numel() ** -0.5)


def is_plain_projection(module: nn.Module) -> bool:
    """Whether a module is a linear layer without bias and nothing else."""
    return is_plain(module, nn.Linear) and module.bias is None


def dtype_of(module: nn.Module, default: torch.dtype) -> torch.dtype:
    """The dtype of a module's weight, the default where it has none."""
    weight = getattr(module, 'weight', None)
    return weight.dtype if isinstance(weight, Tensor) and weight.is_floating_point() else default


class LayerNorm2d(nn.LayerNorm):
    """LayerNorm over the channels of a map, ``[B, C, H, W]`` -> ``[B, C, H, W]``."""

    def forward(self, x: Tensor) -> Tensor:
        """Normalise each pixel's channels."""
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2).contiguous()


class RMSNorm2d(nn.RMSNorm):
    """RMSNorm over the channels of a map, ``[B, C, H, W]`` -> ``[B, C, H, W]``."""

    def forward(self, x: Tensor) -> Tensor:
        """Normalise each pixel's channels."""
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2).contiguous()


NORMS, MAP_NORMS = (nn.LayerNorm, nn.RMSNorm), (LayerNorm2d, RMSNorm2d)


def is_plain_norm(module: nn.Module, channels: int, kinds: tuple[type, ...]) -> bool:
    """Whether a module is a LayerNorm or RMSNorm as mmvig.ops.norm computes it, of one of these types."""
    return (
        type(module) in kinds
        and is_plain(module, type(module))
        and module.normalized_shape == (channels,)
        and module.weight is not None
        and module.eps is not None  # RMSNorm: then it depends on the dtype
        and (isinstance(module, nn.RMSNorm) or module.bias is not None)
    )


class Residual(NamedTuple):
    """The residual stream, x + scale * branch: a sum that is left to the norm after it, for one pass."""

    x: Tensor  # [B, H, W, C]
    branch: Tensor | None = None  # alike; None: nothing to add
    scale: Tensor | None = None  # of each sample, [B]; None: 1

    def sum(self) -> Tensor:
        """The sum, ``[B, H, W, C]``."""
        return self.x if self.branch is None else add(*self)


def add_and_normalise(
    module: nn.Module,
    residual: Residual,
    backend: str,
    dtype: torch.dtype | None = None,
    as_map: bool = False,
) -> tuple[Tensor, Tensor]:
    """The residual stream's sum s and a norm of s, in one pass where the norm is plain.

    Args:
        module: the norm, ``[B, H, W, C]`` -> ``[B, H, W, C]``.
        residual: the stream.
        backend: 'auto', 'torch' or 'triton'.
        dtype: of the norm's result; None: that of the stream.
        as_map: whether the result is a contiguous ``[B, C, H, W]``. The module then takes and returns
            such maps, as :class:`LayerNorm2d` does; PyTorch's LayerNorm and RMSNorm, which cannot, are
            given channels last. Default: False.

    Returns:
        s and the norm of s.
    """
    x = residual.x
    dtype = dtype or x.dtype
    kinds = MAP_NORMS if as_map else NORMS
    if is_plain_norm(module, x.shape[3], kinds):
        rms = isinstance(module, nn.RMSNorm)
        weights = module.weight, None if rms else module.bias, module.eps
        options = {'rms': rms, 'dtype': dtype, 'channels_first': as_map, 'backend': backend}
        if residual.branch is None:
            return x, norm(x, *weights, **options)
        return add_norm(*residual, *weights, **options)
    x = residual.sum()
    return x, normalise(module, x, as_map).to(dtype)


def normalise(module: nn.Module, x: Tensor, as_map: bool = False) -> Tensor:
    """The norm that :func:`add_and_normalise` has of a sum, by a call of the module."""
    x = x.to(dtype_of(module, x.dtype))  # norms take no mixture of dtypes everywhere
    if not as_map:
        return module(x)
    if isinstance(module, NORMS) and not isinstance(module, MAP_NORMS):
        return module(x).permute(0, 3, 1, 2).contiguous()
    return module(x.permute(0, 3, 1, 2)).contiguous()


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
        conv = self.conv
        # The residual connections start where no activation follows.
        dtype = dtype_of(self.norm, x.dtype) if self.act == 'none' else autocast_dtype(x)
        plain = _is_plain_conv(conv)
        plain_norm = plain and is_plain_norm(self.norm, conv.out_channels, (nn.LayerNorm,))
        if plain_norm and use_triton('mmvig.ops.norm', self.backend, x):
            return self._fused(x, dtype)
        if plain and _is_product(conv, x):
            x = _conv_by_product(conv, x)
        else:
            x = x.permute(0, 3, 1, 2)
            if torch.compiler.is_compiling() or not is_watched():  # torch.func knows no memory formats
                x = x.contiguous(memory_format=torch.channels_last)
            x = conv(x).permute(0, 2, 3, 1)
        return ACTIVATIONS[self.act](normalise(self.norm, x)).to(dtype)

    def _fused(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """:meth:`forward` on Triton's kernels."""
        conv, weights = self.conv, (self.norm.weight, self.norm.bias, self.norm.eps)
        options = {'act': self.act, 'dtype': dtype, 'backend': self.backend}
        if takes(x, conv.weight):
            return conv_norm(x, conv.weight, conv.bias, *weights, stride=conv.stride[0], **options)
        # The convolution's bias with the norm: PyTorch's add it in a pass of its own.
        options['shift'] = conv.bias
        if torch.compiler.is_compiling():  # Inductor must not know it, see there
            from mmvig.ops.conv import conv_op

            low = autocast_dtype(x)
            return norm(conv_op(x.to(low), conv.weight.to(low), conv.stride[0]), *weights, **options)
        x = x.permute(0, 3, 1, 2).contiguous(memory_format=torch.channels_last)
        x = F.conv2d(x, conv.weight, None, conv.stride, conv.padding)
        return norm(x.permute(0, 2, 3, 1), *weights, **options)


def _is_plain_conv(conv: nn.Module) -> bool:
    """Whether a module is a convolution as ConvNorm has built it."""
    return (
        is_plain(conv, nn.Conv2d)
        and conv.bias is not None
        and conv.stride[0] == conv.stride[1]
        and (conv.padding, conv.dilation, conv.groups) == ((1, 1), (1, 1), 1)
        and conv.padding_mode == 'zeros'
    )


def _is_product(conv: nn.Conv2d, x: Tensor) -> bool:
    """Whether a plain convolution on a CPU is to be a product.

    - Where its patches take less memory than its weight: PyTorch's copies the weight twice a call, and
      malloc may give what it frees back to the system, for page faults later: without, ViG-H-T takes 8 %
      less time at 224x224.
    - Where the result in bf16 has one or two columns or rows: PyTorch 2.14's is wrong there with AMX.
    """
    if x.device.type != 'cpu' or _is_exporting():
        return False
    height, width = (
        (n + 2 - k) // conv.stride[0] + 1 for n, k in zip(x.shape[1:3], conv.kernel_size, strict=True)
    )
    if autocast_dtype(x) == torch.bfloat16 and min(height, width) <= 2:
        return True
    return not torch.compiler.is_compiling() and 0 < x.shape[0] * height * width < conv.out_channels


# An exported graph may not branch on sizes that it leaves open.
_is_exporting = getattr(torch.compiler, 'is_exporting', torch.compiler.is_compiling)


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
        if self.is_as_built():
            return dwconv3x3(x, self.weight, backend=self.backend)
        return super().forward(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)

    def is_as_built(self) -> bool:
        """Whether nobody has changed its stride, padding or dilation, given it a bias or another tensor."""
        return (
            self.stride == self.padding == self.dilation == (1, 1)
            and self.bias is None
            and type(self.weight) in PLAIN_TENSORS
        )


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
        if not is_plain_projection(self.fc2):
            a, b = apply_linear(self.fc1, x).chunk(2, dim=-1)
            return self.fc2(F.silu(a) * b)
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
            and not (torch.compiler.is_compiling() or is_watched())
            and is_plain_projection(self.fc1)
        )
