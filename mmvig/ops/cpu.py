"""Linear layers on CPUs without gradients: the same product by oneDNN, faster there than PyTorch's BLAS."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmvig.ops.plain import is_plain, is_watched

__all__ = ['apply_linear', 'linear']

# Narrowest inputs for oneDNN. On 2 cores with AVX-512, 196 tokens: 384 -> 2048 in 1.7 instead of 2.0 ms;
# with 96 or 192 channels nothing is gained. PyTorch's compiler has its products on CPUs by this operator.
MIN_WIDTH = 384
_HAS_ONEDNN = (
    torch.backends.mkldnn.is_available()
    and torch.backends.cpu.get_cpu_capability() in ('AVX2', 'AVX512')
    and hasattr(torch.ops.mkldnn, '_linear_pointwise')
)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """The product x W^T + b as ``torch.nn.functional.linear``."""
    if _by_onednn(x, weight):
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, 'none', [], '')
    return F.linear(x, weight, bias)


def apply_linear(module: nn.Module, x: Tensor) -> Tensor:
    """What ``module(x)`` is, by :func:`linear` where the module is a linear layer and nothing else.

    Raises:
        TypeError: The module is one of PyTorch's quantised layers, and x is not in float32.
    """
    if x.device.type == 'cpu' and is_plain(module, nn.Linear):
        return linear(x, module.weight, module.bias)
    if x.dtype != torch.float32 and not torch.compiler.is_compiling() and _is_quantised(module):
        raise TypeError(f'quantised layers take float32, got {x.dtype}: use no autocast and no .half()')
    return module(x)


def _is_quantised(module: nn.Module) -> bool:
    return type(module).__module__.startswith('torch.ao.nn.quantized.')


def _by_onednn(x: Tensor, weight: Tensor) -> bool:
    # The compiler first: it must meet nothing else. The operator has no gradient and no autocast.
    return (
        not torch.compiler.is_compiling()
        and _HAS_ONEDNN
        and x.device.type == 'cpu'
        and x.dtype == weight.dtype == torch.float32
        and weight.shape[1] >= MIN_WIDTH
        and type(x) is Tensor
        and type(weight) in (Tensor, nn.Parameter)
        and x.numel() > 0
        and not (torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad))
        and not torch.is_autocast_enabled('cpu')
        and not is_watched()
        and torch.autograd.forward_ad._current_level < 0
        and torch._C._get_mkldnn_enabled()
    )
