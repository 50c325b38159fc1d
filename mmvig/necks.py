"""Between backbones and heads: a pyramid for backbones of one stride."""

from collections.abc import Sequence

import torch.nn.functional as F
from mmengine.model import BaseModule
from torch import Tensor, nn

from mmvig.backbones.layers import LayerNorm2d
from mmvig.registry import MODELS

# For `norm_cfg` of heads: LayerNorm over the channels of a map.
MODELS.register_module(name='LN2d', module=LayerNorm2d)

EPS = 1e-6


@MODELS.register_module()
class SimpleFPN(BaseModule):
    """ViTDet's simple feature pyramid: maps of strides 4, 8, 16, 32 and more from one of stride 16.

    Each level of the first four scales the map by itself, with transposed convolutions or a maximum, and
    then has a 1x1 and a 3x3 convolution with LayerNorm over channels. Nothing passes between levels. Every
    further level is every second pixel of the one before.

    Source: Li et al., "Exploring Plain Vision Transformer Backbones for Object Detection", ECCV 2022
    (arXiv 2203.16527).

    Args:
        in_channels: channels of the map, a multiple of 4.
        out_channels: channels of every level. Default: 256.
        num_outs: levels, at least 4. Default: 5, up to stride 64.
        init_cfg: mmengine's initialisation. Default: None, PyTorch's.

    Raises:
        ValueError: an argument is out of its range.

    Example:
        >>> maps = SimpleFPN(192)([torch.rand(1, 192, 64, 64)])
        >>> [tuple(x.shape[1:]) for x in maps]
        [(256, 256, 256), (256, 128, 128), (256, 64, 64), (256, 32, 32), (256, 16, 16)]
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int = 256,
        num_outs: int = 5,
        init_cfg: dict | list[dict] | None = None,
    ):
        super().__init__(init_cfg)
        if in_channels < 4 or in_channels % 4:
            raise ValueError(f'in_channels must be a multiple of 4, got {in_channels}')
        if out_channels < 1 or num_outs < 4:
            raise ValueError(
                f'out_channels must be at least 1, num_outs at least 4, got {out_channels} and {num_outs}'
            )
        self.num_outs = num_outs
        half, quarter = in_channels // 2, in_channels // 4
        scales = (
            (
                nn.ConvTranspose2d(in_channels, half, 2, stride=2),
                LayerNorm2d(half, eps=EPS),
                nn.GELU(),
                nn.ConvTranspose2d(half, quarter, 2, stride=2),
            ),
            (nn.ConvTranspose2d(in_channels, half, 2, stride=2),),
            (),
            (nn.MaxPool2d(2),),
        )
        widths = (quarter, half, in_channels, in_channels)
        self.levels = nn.ModuleList(
            nn.Sequential(
                *scale,
                nn.Conv2d(width, out_channels, 1, bias=False),
                LayerNorm2d(out_channels, eps=EPS),
                nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False),
                LayerNorm2d(out_channels, eps=EPS),
            )
            for scale, width in zip(scales, widths, strict=True)
        )

    def forward(self, inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Compute the levels.

        Args:
            inputs: the backbone's one map ``[B, in_channels, H, W]``, in a tuple or list.

        Returns:
            ``[B, out_channels, h, w]`` of each level, with h = 4 H, 2 H, H, H / 2, ... and w alike.

        Raises:
            ValueError: there are several maps, or none.
        """
        if len(inputs) != 1:
            raise ValueError(
                f'SimpleFPN reads one map, got {len(inputs)}: give the backbone one index in out_indices'
            )
        maps = [level(inputs[0]) for level in self.levels]
        while len(maps) < self.num_outs:
            maps.append(F.max_pool2d(maps[-1], 1, stride=2))
        return tuple(maps)
