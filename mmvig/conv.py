"""Convolutions for the necks and heads of other packages."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmvig.ops.plain import PLAIN_TENSORS, is_traced
from mmvig.registry import MODELS


@MODELS.register_module()
class Conv2d(nn.Conv2d):
    """PyTorch's Conv2d, which is a matrix product where it is 1x1. Arguments are PyTorch's.

    For each new size of a map cuDNN plans a convolution and its gradients anew: 18 ms for a 1x1 on the host
    of an H200, and Mask R-CNN's neck and RPN have fourteen of them. A product needs no plan. It is one on a
    GPU in half precision; in float32 PyTorch lets convolutions compute in TF32, but not products. For
    configs with a ``conv_cfg``: ``conv_cfg=dict(type='mmvig.Conv2d')``.
    """

    def forward(self, input: Tensor) -> Tensor:
        """[B, C_in, H, W] -> [B, C_out, H', W']."""
        if not self._is_product(input):
            return super().forward(input)
        weight, bias = self.weight.flatten(1), self.bias
        if not input.is_contiguous() and input.is_contiguous(memory_format=torch.channels_last):
            return F.linear(input.permute(0, 2, 3, 1), weight, bias).permute(0, 3, 1, 2)
        weight, columns = weight.expand(len(input), -1, -1), input.flatten(2)
        y = torch.bmm(weight, columns) if bias is None else torch.baddbmm(bias[:, None], weight, columns)
        return y.unflatten(2, input.shape[2:])

    def _is_product(self, x: Tensor) -> bool:
        if not (
            type(self) is Conv2d
            and type(x) in PLAIN_TENSORS  # first: a tracer's stand-in answers no question
            and type(self.weight) in PLAIN_TENSORS
            and self.kernel_size == self.stride == (1, 1)
            and self.padding == (0, 0)
            and self.groups == 1
            and x.is_cuda
            and x.ndim == 4
        ):
            return False
        is_half = torch.is_autocast_enabled('cuda') or x.dtype in (torch.float16, torch.bfloat16)
        return is_half and x.numel() > 0 and not is_traced()
