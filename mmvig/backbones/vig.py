"""ViG, the plain (isotropic) vision backbone of linear complexity.

Source: Liao et al., "ViG: Linear-complexity Visual Sequence Learning with Gated Linear Attention",
AAAI 2025 (arXiv 2405.18425).
"""

import math
from collections.abc import Sequence
from functools import partial

import torch
import torch.nn.functional as F
from mmengine.logging import print_log
from mmengine.registry import MODELS as ROOT_MODELS
from torch import Tensor, nn

from mmvig.backbones.base import Backbone, check_positive_ints, parse_arch
from mmvig.backbones.block import Block, draw_factors, run_block
from mmvig.backbones.layers import ConvNorm, Residual, RMSNorm2d, SwiGLU, add_and_normalise, fused_backend
from mmvig.backbones.mixer import GatedTokenMixer
from mmvig.registry import MODELS

ARCHS = {
    'tiny': {'embed_dims': 192, 'depth': 12, 'num_heads': 3, 'conv_act': True, 'out_act': True},
    'small': {'embed_dims': 384, 'depth': 12, 'num_heads': 6},
    'base': {'embed_dims': 768, 'depth': 12, 'num_heads': 12},
}
DROP_PATH_RATES = {'tiny': 0.0, 'small': 0.2, 'base': 0.5}


class Stem(nn.Module):
    """ConvNorm 9x9 of stride 8, SiLU, ConvNorm 3x3 of stride 2: image to tokens of stride 16."""

    def __init__(self, in_channels: int, channels: int, backend: str):
        super().__init__()
        self.down1 = ConvNorm(in_channels, channels // 2, backend, kernel_size=9, stride=8, act='silu')
        self.down2 = ConvNorm(channels // 2, channels, backend)

    def forward(self, x: Tensor) -> Tensor:
        """[B, H, W, C_in] -> [B, n(H), n(W), C] with n = :func:`tokens_along`; H, W >= 7."""
        return self.down2(self.down1(x))


def tokens_along(side: int) -> int:
    """Tokens that the stem makes of an image side: ceil(floor((side + 1) / 8) / 2)."""
    return ((side + 1) // 8 + 1) // 2


@ROOT_MODELS.register_module()  # for `type='ViG'` after `custom_imports`
@MODELS.register_module()
class ViG(Backbone):
    """Plain ViG backbone: feature maps of blocks of one width, all at stride 16.

    Blocks after the last output are not built, so every parameter gets a gradient. An image side n >= 7
    becomes ceil(floor((n + 1) / 8) / 2) tokens, n / 16 for multiples of 16. The position embedding is
    resized (bicubic) to any other grid than its own, per image and when a checkpoint is loaded.

    Args:
        arch: 'tiny', 'small', 'base' in any case, or a dict with ``embed_dims`` (a multiple of twice the
            heads), ``depth``, ``num_heads`` and, optionally, ``conv_act`` and ``out_act``: whether the
            mixer has a SiLU after its depthwise convolution and one before its output projection (default:
            False; True in 'tiny'). Default: 'tiny'.
        in_channels: channels of the image. Default: 3.
        img_size: side of the square image whose grid the position embedding has, at least 7.
            Default: 224, a grid of 14 x 14.
        out_indices: blocks, from 0, whose normalised maps are returned, lowest first; a negative index
            counts from the last, an int is one block. Map i is what the module ``norm{i}`` returns, so that
            is the layer to hook. The last block's norm is the published model's final norm. Default: None,
            the last block.
        drop_path_rate: stochastic depth of the last block, growing linearly from 0 at the first. None:
            the published 0 / 0.2 / 0.5 for tiny / small / base, 0 for a dict. Default: None.
        frozen_stages: -1 freezes nothing, 0 the stem and the position embedding, i > 0 also the first i
            blocks with their output norms (no gradient, evaluation mode). Default: -1.
        with_cp: recompute each block in the backward pass to save memory. Default: False.
        cuda_graphs: which inputs to run as CUDA graphs (:mod:`mmvig.cuda_graphs`). 'auto': those
            that come again and again. A number: the most graphs at a time; with_cp takes none.
            Default: 'auto'.
        backend: BiGLA's, see :func:`mmvig.ops.bigla.bigla`; all else in a block is on fused kernels with
            'triton', and with 'auto' where they can run. Default: 'auto'.
        init_cfg: mmengine's initialisation. ``dict(type='Pretrained', checkpoint=FILE)`` takes official
            files and our own, strictly (:mod:`mmvig.checkpoints`); an optional ``prefix`` picks a
            submodule's keys. Default: None, the published initialisation.

    Raises:
        TypeError: an argument is of another type.
        ValueError: an argument is out of its range.

    Example:
        >>> maps = ViG('tiny', out_indices=(5, 11))(torch.rand(1, 3, 512, 768))
        >>> [tuple(x.shape[1:]) for x in maps]
        [(192, 32, 48), (192, 32, 48)]
    """

    units = 'blocks'
    min_side = 7
    official_norm, official_head = 'norm', 'head'
    owns_final_norm = True

    def __init__(
        self,
        arch: str | dict = 'tiny',
        in_channels: int = 3,
        img_size: int = 224,
        out_indices: int | Sequence[int] | None = None,
        drop_path_rate: float | None = None,
        frozen_stages: int = -1,
        with_cp: bool = False,
        cuda_graphs: int | str = 'auto',
        backend: str = 'auto',
        init_cfg: dict | list[dict] | None = None,
    ):
        name, arch = parse_arch(arch, ARCHS)
        channels, depth, mixer = _check_arch(arch)
        if drop_path_rate is None:
            drop_path_rate = DROP_PATH_RATES.get(name, 0.0)
        if out_indices is None:
            out_indices = (depth - 1,)
        if type(img_size) is not int or img_size < self.min_side:
            raise ValueError(f'img_size must be an int of at least {self.min_side}, got {img_size!r}')
        super().__init__(
            depth, in_channels, out_indices, drop_path_rate, frozen_stages, with_cp, cuda_graphs, init_cfg
        )
        self.depths = (depth,)
        self.backend = fused_backend(backend)
        self.num_features = [channels]
        self.with_cp = with_cp

        self.stem = Stem(in_channels, channels, backend)
        self.pos_embed = nn.Parameter(torch.empty(1, tokens_along(img_size) ** 2, channels))
        self.blocks = nn.ModuleList(
            Block(
                partial(nn.RMSNorm, channels, eps=1e-6),
                GatedTokenMixer(channels, backend=backend, **mixer),
                SwiGLU(channels, 256, backend),
                drop_path_rate * i / max(depth - 1, 1),
                backend,
            )
            for i in range(max(self.out_indices) + 1)
        )
        for i in self.out_indices:
            self.add_module(f'norm{i}', RMSNorm2d(channels, eps=1e-6))
        self._initialise()
        self._freeze()

    def _initialise(self) -> None:
        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        for block in self.blocks:
            for module in block.mlp.children():
                nn.init.normal_(module.weight, std=0.02)
            for module in block.mixer.children():
                if isinstance(module, nn.Linear):
                    nn.init.xavier_uniform_(module.weight, gain=2**-2.5)
                    if module.bias is not None:
                        nn.init.zeros_(module.bias)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """Compute the feature maps.

        Args:
            x: images ``[B, in_channels, H, W]``, H and W at least 7.

        Returns:
            One contiguous ``[B, C, n(H), n(W)]`` per output with n = :func:`tokens_along`, H / 16 where 16
            divides H.

        Raises:
            ValueError: x is not a batch of images with ``in_channels`` channels, or they are too small.
        """
        return self._run(x)

    def _compute(self, x: Tensor) -> tuple[Tensor, ...]:
        x = self.stem(x.permute(0, 2, 3, 1))
        x = x + self._position_embedding(x.shape[1], x.shape[2])
        maps, residual = [], Residual(x)
        factors = draw_factors((block.drop_path for block in self.blocks), x)
        for i, (block, of_block) in enumerate(zip(self.blocks, factors, strict=True)):
            residual = run_block(block, residual, of_block, self.with_cp)
            if i in self.out_indices:
                norm = getattr(self, f'norm{i}')
                x, y = add_and_normalise(norm, residual, self.backend, as_map=True)
                maps.append(y)
                residual = Residual(x)
        return tuple(maps)

    def _position_embedding(self, height: int, width: int) -> Tensor:
        """[1, height, width, C]."""
        side = math.isqrt(self.pos_embed.shape[1])
        # An export with dynamic sizes may not branch on them; resizing to its own grid changes nothing.
        if not torch.compiler.is_compiling() and (height, width) == (side, side):
            return self.pos_embed.unflatten(1, (side, side))
        return _resize(self.pos_embed, height, width)

    def _freeze(self) -> None:
        super()._freeze()
        if self.frozen_stages >= 0:
            self.pos_embed.requires_grad_(False)

    def _adapt(self, state_dict: dict, prefix: str, strict: bool) -> None:
        loaded, own = state_dict.get(f'{prefix}pos_embed'), self.pos_embed
        if loaded is not None and _is_other_grid(loaded, own):
            old, new = math.isqrt(loaded.shape[1]), math.isqrt(own.shape[1])
            state_dict[f'{prefix}pos_embed'] = _resize(loaded.to(own.dtype), new, new).flatten(1, 2)
            print_log(f'pos_embed: resized from {old} x {old} to {new} x {new}', logger='current')
        super()._adapt(state_dict, prefix, strict)

    def get_layer_depth(self, param_name: str, prefix: str = '') -> tuple[int, int]:
        """Depth of a parameter for layer-wise learning-rate decay.

        Args:
            param_name: full name of the parameter.
            prefix: what to strip from it, such as 'backbone.'. Default: ''.

        Returns:
            (depth, number of layers): 0 for the stem and the position embedding, 1.. for the blocks in
            order, the last for output norms and everything outside the backbone.
        """
        num_layers = len(self.blocks) + 2
        if not param_name.startswith(prefix):
            return num_layers - 1, num_layers
        parts = param_name[len(prefix) :].split('.')
        if parts[0] in ('stem', 'pos_embed'):
            return 0, num_layers
        if parts[0] == 'blocks':
            return 1 + int(parts[1]), num_layers
        return num_layers - 1, num_layers


def _resize(pos_embed: Tensor, height: int, width: int) -> Tensor:
    """Position embedding of a square grid [1, n * n, C] -> [1, height, width, C], bicubic."""
    side = math.isqrt(pos_embed.shape[1])
    grid = pos_embed.unflatten(1, (side, side))
    if torch.compiler.is_compiling():  # flattening would fix sizes that an export leaves open
        grid = F.interpolate(grid.permute(0, 3, 1, 2), (height, width), mode='bicubic', align_corners=False)
        return grid.permute(0, 2, 3, 1)
    # One axis after the other, with channels as columns: PyTorch's kernel for a GPU takes all channels of a
    # pixel in one thread, which was 0.4 ms of ViG-T's 13.6 at 2048 x 2048, batch 8.
    columns = _resize_rows(grid.transpose(1, 2), width).transpose(1, 2)
    return _resize_rows(columns, height)


def _resize_rows(grid: Tensor, rows: int) -> Tensor:
    """[1, n, m, C] -> [1, rows, m, C]."""
    image = grid.flatten(2)[:, None]
    resized = F.interpolate(image, (rows, image.shape[3]), mode='bicubic', align_corners=False)
    return resized[:, 0].unflatten(2, grid.shape[2:])


def _is_other_grid(loaded: Tensor, own: Tensor) -> bool:
    """Whether ``loaded`` is ``own`` but for the side of its square grid."""
    if loaded.ndim != 3 or loaded.shape[0] != 1 or loaded.shape[2] != own.shape[2]:
        return False
    tokens = loaded.shape[1]
    return tokens not in (0, own.shape[1]) and math.isqrt(tokens) ** 2 == tokens


def _check_arch(arch: dict) -> tuple[int, int, dict]:
    """(embed_dims, depth, the mixer's arguments) of an arch, checked."""
    required, optional = ['embed_dims', 'depth', 'num_heads'], ['conv_act', 'out_act']
    if not {*required} <= {*arch} <= {*required, *optional}:
        raise ValueError(
            f'arch as a dict must have the keys {required} and may have {optional}, '
            f'got {sorted(map(str, arch))}'
        )
    check_positive_ints(**{key: [arch[key]] for key in required})
    if arch['embed_dims'] < 4:  # the stem starts with half of it: a norm over one channel loses the image
        raise ValueError(f'arch: embed_dims must be at least 4, got {arch["embed_dims"]}')
    for key in optional:
        if not isinstance(arch.get(key, False), bool):
            raise TypeError(f'arch: {key} must be True or False, got {arch[key]!r}')
    mixer = {key: value for key, value in arch.items() if key not in ('embed_dims', 'depth')}
    return arch['embed_dims'], arch['depth'], mixer
