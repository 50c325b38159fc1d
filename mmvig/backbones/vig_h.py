"""ViG-H, the hierarchical vision backbone of linear complexity.

Source: Liao et al., "ViG: Linear-complexity Visual Sequence Learning with Gated Linear Attention",
AAAI 2025 (arXiv 2405.18425).
"""

from collections.abc import Sequence
from functools import partial

import torch
from mmengine.registry import MODELS as ROOT_MODELS
from torch import Tensor, nn

from mmvig.backbones.base import Backbone, check_positive_ints, parse_arch
from mmvig.backbones.block import Block, draw_factors, run_block
from mmvig.backbones.layers import (
    MAP_NORMS,
    ConvNorm,
    LayerNorm2d,
    Residual,
    SwiGLU,
    add_and_normalise,
    fused_backend,
    is_plain_norm,
    normalise,
)
from mmvig.backbones.mixer import GatedTokenMixer
from mmvig.registry import MODELS

ARCHS = {
    'tiny': {'embed_dims': 96, 'depths': [2, 2, 5, 2], 'num_heads': [3, 6, 12, 24]},
    'small': {'embed_dims': 96, 'depths': [2, 2, 17, 2], 'num_heads': [3, 6, 12, 24]},
    'base': {'embed_dims': 128, 'depths': [2, 2, 17, 2], 'num_heads': [4, 8, 16, 32]},
}
DROP_PATH_RATES = {'tiny': 0.2, 'small': 0.3, 'base': 0.6}


class Stem(nn.Module):
    """Two ConvNorm with GELU between them: image to tokens of stride 4."""

    def __init__(self, in_channels: int, channels: int, backend: str):
        super().__init__()
        self.down1 = ConvNorm(in_channels, channels // 2, backend, act='gelu')
        self.down2 = ConvNorm(channels // 2, channels, backend)

    def forward(self, x: Tensor) -> Tensor:
        """[B, H, W, C_in] -> [B, ceil(H / 4), ceil(W / 4), C]."""
        return self.down2(self.down1(x))


class Stage(nn.Module):
    """Blocks at one resolution, and the step down to the next one."""

    def __init__(
        self,
        channels: int,
        num_heads: int,
        drop_paths: Sequence[float],
        downsample: bool,
        with_cp: bool,
        backend: str,
    ):
        super().__init__()
        self.blocks = nn.ModuleList(
            Block(
                partial(nn.LayerNorm, channels),
                GatedTokenMixer(channels, num_heads, backend),
                SwiGLU(channels, 32, backend),
                drop_path,
                backend,
            )
            for drop_path in drop_paths
        )
        self.downsample = ConvNorm(channels, 2 * channels, backend) if downsample else None
        self.with_cp = with_cp
        self.backend = fused_backend(backend)

    def forward(self, x: Tensor, norm: nn.Module | None = None) -> tuple[Tensor, Tensor, Tensor | None]:
        """[B, H, W, C] -> the next stage's input, this one's result, and the map [B, C, H, W] of its norm.

        ``norm``, the backbone's output norm, is computed here, in one pass with the last sum. The backbone
        does not hand over one that must be called; it calls that itself, where counters look for it.
        """
        residual = Residual(x)
        factors = draw_factors((block.drop_path for block in self.blocks), x)
        for block, of_block in zip(self.blocks, factors, strict=True):
            residual = run_block(block, residual, of_block, self.with_cp)
        if norm is not None:
            x, y = add_and_normalise(norm, residual, self.backend, as_map=True)
        else:
            x, y = residual.sum(), None
        return x if self.downsample is None else self.downsample(x), x, y


@ROOT_MODELS.register_module()  # for `type='ViGH'` after `custom_imports`
@MODELS.register_module()
class ViGH(Backbone):
    """ViG-H backbone: a tuple of feature maps at strides 4, 8, 16, 32.

    Stages without an output at or after them are not built, so every parameter gets a gradient.
    Any image side >= 1 works: a stride-2 step turns n into ceil(n / 2).

    Args:
        arch: 'tiny', 'small', 'base' in any case, or a dict with ``embed_dims`` (width of the first stage,
            at least 4, doubled at each further one), ``depths`` and ``num_heads`` (one entry a stage; its
            width must be a multiple of twice its heads). Default: 'tiny'.
        in_channels: channels of the image. Default: 3.
        out_indices: stages whose normalised maps are returned, lowest first; a negative index counts from
            the last, an int is one stage. Map i is what the module ``norm{i}`` returns, so that is the
            layer to hook. Default: (0, 1, 2, 3).
        drop_path_rate: stochastic depth of the last block, growing linearly from 0 at the first. None:
            the published 0.2 / 0.3 / 0.6 for tiny / small / base, 0 for a dict. Default: None.
        frozen_stages: -1 freezes nothing, 0 the stem, i > 0 also the first i stages with their output
            norms and downsamples (no gradient, evaluation mode). Default: -1.
        with_cp: recompute each block in the backward pass to save memory. Default: False.
        cuda_graphs: which inputs to run as CUDA graphs (:mod:`mmvig.cuda_graphs`). 'auto': those
            that come again and again. A number: the most graphs at a time; with_cp takes none.
            Default: 'auto'.
        backend: BiGLA's, see :func:`mmvig.ops.bigla.bigla`; all else in a block is on fused kernels with
            'triton', and with 'auto' where they can run. Default: 'auto'.
        init_cfg: mmengine's initialisation. ``dict(type='Pretrained', checkpoint=FILE)`` takes official
            classification and backbone files and our own, strictly (:mod:`mmvig.checkpoints`); an optional
            ``prefix`` picks a submodule's keys. Default: None, the published initialisation.

    Raises:
        TypeError: an argument is of another type.
        ValueError: an argument is out of its range.

    Example:
        >>> maps = ViGH('tiny')(torch.rand(1, 3, 800, 1216))
        >>> [tuple(x.shape[1:]) for x in maps]
        [(96, 200, 304), (192, 100, 152), (384, 50, 76), (768, 25, 38)]
    """

    units = 'stages'
    official_norm, official_head = 'classifier.norm', 'classifier.head'

    def __init__(
        self,
        arch: str | dict = 'tiny',
        in_channels: int = 3,
        out_indices: int | Sequence[int] = (0, 1, 2, 3),
        drop_path_rate: float | None = None,
        frozen_stages: int = -1,
        with_cp: bool = False,
        cuda_graphs: int | str = 'auto',
        backend: str = 'auto',
        init_cfg: dict | list[dict] | None = None,
    ):
        name, arch = parse_arch(arch, ARCHS)
        embed_dims, depths, num_heads = _check_arch(arch)
        if drop_path_rate is None:
            drop_path_rate = DROP_PATH_RATES.get(name, 0.0)
        super().__init__(
            len(depths),
            in_channels,
            out_indices,
            drop_path_rate,
            frozen_stages,
            with_cp,
            cuda_graphs,
            init_cfg,
        )
        self.depths = tuple(depths)
        num_stages = max(self.out_indices) + 1
        self.num_features = [embed_dims * 2**i for i in range(num_stages)]

        self.stem = Stem(in_channels, embed_dims, backend)
        drop_paths = torch.linspace(0, drop_path_rate, sum(depths), device='cpu').tolist()
        self.stages = nn.ModuleList()
        for i, channels in enumerate(self.num_features):
            first = sum(depths[:i])
            self.stages.append(
                Stage(
                    channels,
                    num_heads[i],
                    drop_paths[first : first + depths[i]],
                    downsample=i + 1 < num_stages,
                    with_cp=with_cp,
                    backend=backend,
                )
            )
        for i in self.out_indices:
            self.add_module(f'norm{i}', LayerNorm2d(self.num_features[i]))

        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        self._freeze()

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """Compute the feature maps.

        Args:
            x: images ``[B, in_channels, H, W]``.

        Returns:
            One contiguous ``[B, C_i, ceil(H / s_i), ceil(W / s_i)]`` per output, strides s_i = 4 * 2^i.

        Raises:
            ValueError: x is not a batch of images with ``in_channels`` channels.
        """
        return self._run(x)

    def _compute(self, x: Tensor) -> tuple[Tensor, ...]:
        x = self.stem(x.permute(0, 2, 3, 1))
        maps = []
        for i, stage in enumerate(self.stages):
            norm = getattr(self, f'norm{i}', None)
            is_plain = norm is not None and is_plain_norm(norm, self.num_features[i], MAP_NORMS)
            x, result, y = stage(x, norm if is_plain else None)
            if norm is not None:
                maps.append(y if is_plain else normalise(norm, result, as_map=True))
        return tuple(maps)

    def get_layer_depth(self, param_name: str, prefix: str = '') -> tuple[int, int]:
        """Depth of a parameter for layer-wise learning-rate decay.

        Args:
            param_name: full name of the parameter.
            prefix: what to strip from it, such as 'backbone.'. Default: ''.

        Returns:
            (depth, number of layers): 0 for the stem, 1.. for the blocks in order (a downsample counts
            with the block before it), the last for output norms and everything outside the backbone.
        """
        depths = [len(stage.blocks) for stage in self.stages]
        num_layers = sum(depths) + 2
        if not param_name.startswith(prefix):
            return num_layers - 1, num_layers
        parts = param_name[len(prefix) :].split('.')
        if parts[0] == 'stem':
            return 0, num_layers
        if parts[0] != 'stages':
            return num_layers - 1, num_layers
        stage = int(parts[1])
        block = int(parts[3]) if parts[2] == 'blocks' else depths[stage] - 1
        return 1 + sum(depths[:stage]) + block, num_layers


def _check_arch(arch: dict) -> tuple[int, Sequence[int], Sequence[int]]:
    """(embed_dims, depths, num_heads) of an arch, checked."""
    keys = set(ARCHS['tiny'])
    if set(arch) != keys:
        raise ValueError(f'arch as a dict must have the keys {sorted(keys)}, got {sorted(map(str, arch))}')
    embed_dims, depths, num_heads = arch['embed_dims'], arch['depths'], arch['num_heads']
    if not (isinstance(depths, (list, tuple)) and isinstance(num_heads, (list, tuple))):
        raise TypeError(
            f'arch: depths and num_heads must be lists of ints, got {depths!r} and {num_heads!r}'
        )
    if not depths or len(depths) != len(num_heads):
        raise ValueError(
            f'arch must give as many depths as num_heads, at least one, got {depths} and {num_heads}'
        )
    check_positive_ints(embed_dims=[embed_dims], depths=depths, num_heads=num_heads)
    # The stem starts with half of it, and a norm over one channel would lose the image.
    if embed_dims % 2 or embed_dims < 4:
        raise ValueError(f'arch: embed_dims must be even and at least 4, got {embed_dims}')
    return embed_dims, depths, num_heads
