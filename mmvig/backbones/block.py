"""The block that both families repeat: token mixer and channel mixer with their residual connections."""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from mmvig.backbones.layers import DWConv, LayerNorm, RMSNorm, SwiGLU, fused_backend
from mmvig.backbones.mixer import GatedTokenMixer
from mmvig.ops.bigla import MAX_WIDTH as MAX_HEAD_DIM
from mmvig.ops.choice import autocast_dtype, has_global_hooks, has_hooks, use_triton
from mmvig.ops.norm import MAX_WIDTH

Factors = tuple[Tensor | None, Tensor | None]


class DropPath(nn.Module):
    """Stochastic depth: in training, a sample's residual branch is dropped with probability ``rate``."""

    def __init__(self, rate: float):
        super().__init__()
        self.rate = rate

    def forward(self, x: Tensor) -> Factors:
        """The factors of each sample of a batch of maps."""
        return draw_factors([self], x)[0]

    def extra_repr(self) -> str:
        """Show the rate in ``print(model)``."""
        return f'rate={self.rate:.3f}'


def draw_factors(drop_paths: Iterable[DropPath], x: Tensor) -> list[Factors]:
    """The factors [B] of each sample in the two branches of each block, drawn at once for all of them.

    0, or 1 / (1 - rate) where kept; None if all are kept.
    """
    rates = [module.rate if module.training else 0.0 for module in drop_paths]
    keep = [1 - rate for rate in rates for _ in range(2) if rate > 0]
    if not keep:
        return [(None, None)] * len(rates)
    # Rows start at multiples of 16 bytes: kernels that can count on it are launched faster.
    drawn = torch.rand(len(keep), (x.shape[0] + 3) // 4 * 4, device=x.device)
    rows = drawn[:, : x.shape[0]].unbind()
    torch._foreach_add_(rows, keep)
    drawn.floor_()
    torch._foreach_div_(rows, keep)
    pairs = iter(zip(rows[::2], rows[1::2], strict=True))
    return [next(pairs) if rate > 0 else (None, None) for rate in rates]


# What one operator computes the same as the modules do.
PLAIN = frozenset((nn.Linear, nn.RMSNorm, DWConv, DropPath, GatedTokenMixer, LayerNorm, RMSNorm, SwiGLU))


class Block(nn.Module):
    """s = x + DropPath(mixer(norm(x))), then s + DropPath(SwiGLU(norm(s))).

    Each sum is left to the norm after it, which computes both in one pass: a block takes x with the branch
    still to be added, and returns the like. On a GPU all of it is one operator (:mod:`mmvig.ops.block`),
    unless a submodule has been replaced or has hooks: then the modules run one by one.
    """

    def __init__(
        self,
        make_norm: Callable[[], nn.Module],
        mixer: GatedTokenMixer,
        mlp: SwiGLU,
        drop_path: float,
        backend: str,
    ):
        super().__init__()
        self.norm1 = make_norm()
        self.mixer = mixer
        self.norm2 = make_norm()
        self.mlp = mlp
        self.drop_path = DropPath(drop_path)
        self.backend = fused_backend(backend)

    def forward(
        self,
        x: Tensor,
        branch: Tensor | None = None,
        scale: Tensor | None = None,
        factors: Factors | None = None,
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """[B, H, W, C], a branch alike (None: nothing to add) and its scale [B] -> the next three.

        ``factors``: those of DropPath, where they have been drawn already.
        """
        dtype = autocast_dtype(x)
        scales = self.drop_path(x) if factors is None else factors
        if self._is_one_operator(x):
            return *self._run(x, branch, scale, scales[0], dtype), scales[1]
        x, y = self.norm1(x, branch, scale, dtype=dtype)
        x, y = self.norm2(x, self.mixer(y), scales[0], dtype=dtype)
        return x, self.mlp(y), scales[1]

    def _is_one_operator(self, x: Tensor) -> bool:
        mixer = self._modules['mixer']
        head_dim = x.shape[-1] // mixer.num_heads if type(mixer) is GatedTokenMixer else 0
        if not 0 < head_dim <= MAX_HEAD_DIM or x.shape[-1] > MAX_WIDTH:
            return False
        runs = use_triton('mmvig.ops.bigla', self.backend, x) and use_triton(
            'mmvig.ops.dwconv', self.backend, x
        )
        return runs and self._is_plain()

    def _is_plain(self) -> bool:
        if has_global_hooks():
            return False
        # nn.Module's own look-up of submodules takes longer than all else here.
        modules = self._modules
        children = *modules.values(), *modules['mixer']._modules.values(), *modules['mlp']._modules.values()
        for child in children:
            if type(child) not in PLAIN or has_hooks(child):
                return False
        return modules['norm1'].eps == modules['norm2'].eps

    def _run(
        self,
        x: Tensor,
        branch: Tensor | None,
        scale: Tensor | None,
        branch_scale: Tensor | None,
        dtype: torch.dtype,
    ) -> tuple[Tensor, Tensor]:
        from mmvig.ops.block import block_op

        modules = self._modules
        mixer, norm1, norm2 = modules['mixer'], modules['norm1'], modules['norm2']
        of_mixer, of_mlp = mixer._modules, modules['mlp']._modules
        up, gate, norm_long = of_mixer['decay_up'], of_mixer['mix_gate'], of_mixer['norm_long']
        return block_op(
            x, branch, scale, branch_scale, _get(norm1, 'weight'), _get(norm1, 'bias'),
            _get(of_mixer['dwconv'], 'weight'), _get(of_mixer['qkv'], 'weight'), _get(gate, 'weight'),
            _get(gate, 'bias'), _get(of_mixer['decay_down'], 'weight'), _get(up, 'weight'),
            _get(up, 'bias'), _get(norm_long, 'weight'), _get(of_mixer['norm_short'], 'weight'),
            _get(of_mixer['out'], 'weight'), _get(norm2, 'weight'), _get(norm2, 'bias'),
            _get(of_mlp['fc1'], 'weight'), _get(of_mlp['fc2'], 'weight'),
            mixer.num_heads, norm1.eps, norm_long.eps, mixer.conv_act, mixer.out_act, dtype,
        )[:2]  # fmt: skip


def _get(module: nn.Module, name: str) -> Tensor | None:
    """A parameter; nn.Module's own look-up takes longer, but also finds what FSDP sets in its place."""
    parameter = module._parameters.get(name)
    return getattr(module, name, None) if parameter is None else parameter
