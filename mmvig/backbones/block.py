"""The block that both families repeat: token mixer and channel mixer with their residual connections."""

import contextlib
import threading
from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mmvig.backbones.layers import (
    NORMS,
    DWConv,
    Residual,
    SwiGLU,
    add_and_normalise,
    fused_backend,
    is_plain_norm,
    is_plain_projection,
)
from mmvig.backbones.mixer import GatedTokenMixer
from mmvig.ops.backend import autocast_dtype, use_triton
from mmvig.ops.bigla import MAX_WIDTH as MAX_HEAD_DIM
from mmvig.ops.block.operands import BlockWeights, Options
from mmvig.ops.norm import MAX_WIDTH
from mmvig.ops.plain import is_plain

Factors = tuple[Tensor | None, Tensor | None]


class DropPath(nn.Module):
    """Stochastic depth: in training, a sample's residual branch is dropped with probability ``rate``."""

    def __init__(self, rate: float):
        super().__init__()
        self.rate = rate

    def forward(self, branch: Tensor) -> Tensor:
        """The branch [B, ...] times 0, or 1 / (1 - rate), by sample; blocks need not call it."""
        ((scale, _),) = draw_factors([self], branch)
        return branch if scale is None else branch * scale.view(-1, *[1] * (branch.ndim - 1))

    def extra_repr(self) -> str:
        """Show the rate in ``print(model)``."""
        return f'rate={self.rate:.3f}'


def draw_factors(drop_paths: Iterable[nn.Module], x: Tensor) -> list[Factors]:
    """The factors [B] of each sample in the two branches of each block, drawn at once for all of them.

    0, or 1 / (1 - rate) where kept; None if all are kept, or the block calls what is no plain DropPath.
    """
    rates = [
        module.rate if is_plain(module, DropPath) and module.training else 0.0 for module in drop_paths
    ]
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


class Block(nn.Module):
    """s = x + DropPath(mixer(norm(x))), then s + DropPath(SwiGLU(norm(s))).

    Each sum is left to the norm after it: a block takes and returns a :class:`Residual`. On a GPU all of it
    is one operator (:mod:`mmvig.ops.block`), unless one of its modules does anything else than its type:
    then they run one by one.
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

    def forward(self, residual: Residual, factors: Factors | None = None) -> Residual:
        """The residual stream after this block; ``factors``: DropPath's, where they have been drawn."""
        x = residual.x
        dtype = autocast_dtype(x)
        scales = draw_factors([self.drop_path], x)[0] if factors is None else factors
        weights = self._operands(x)
        if weights is not None:
            from mmvig.ops.block.op import block_op

            mixer = self.mixer
            options = Options(
                mixer.num_heads, self.norm1.eps, mixer.norm_long.eps, mixer.conv_act, mixer.out_act
            )
            x, branch, *_ = block_op(*residual, scales[0], *weights, *options, dtype)
            return Residual(x, branch, scales[1])
        x, y = add_and_normalise(self.norm1, residual, self.backend, dtype)
        residual = Residual(x, self._drop(self.mixer(y)), scales[0])
        x, y = add_and_normalise(self.norm2, residual, self.backend, dtype)
        return Residual(x, self._drop(self.mlp(y)), scales[1])

    def _drop(self, branch: Tensor) -> Tensor:
        """The branch as it is where its factors are drawn for all blocks at once."""
        return branch if is_plain(self.drop_path, DropPath) else self.drop_path(branch)

    def _operands(self, x: Tensor) -> BlockWeights | None:
        """The weights for the block's operator; None where modules do what it does not."""
        mixer, mlp, channels = self.mixer, self.mlp, x.shape[3]
        containers = (mixer, GatedTokenMixer), (mlp, SwiGLU), (self.drop_path, DropPath)
        if not all(is_plain(module, kind) for module, kind in containers):
            return None
        head_dim = channels // mixer.num_heads
        if head_dim > MAX_HEAD_DIM or channels > MAX_WIDTH:
            return None
        if not all(use_triton(f'mmvig.ops.{name}', self.backend, x) for name in ('bigla', 'dwconv')):
            return None

        norm1, norm2, norm_long, norm_short = self.norm1, self.norm2, mixer.norm_long, mixer.norm_short
        conv, qkv, gate, out = mixer.dwconv, mixer.qkv, mixer.mix_gate, mixer.out
        down, up, fc1, fc2 = mixer.decay_down, mixer.decay_up, mlp.fc1, mlp.fc2
        if not (
            all(is_plain_norm(norm, channels, NORMS) for norm in (norm1, norm2))
            and all(is_plain_norm(norm, head_dim, NORMS[1:]) for norm in (norm_long, norm_short))
            and (norm1.eps, norm_long.eps) == (norm2.eps, norm_short.eps)
            and all(is_plain_projection(linear) for linear in (qkv, down, out, fc1, fc2))
            and all(is_plain(linear, nn.Linear) and linear.bias is not None for linear in (gate, up))
            and is_plain(conv, DWConv)
            and conv.is_as_built()
        ):
            return None
        bias1, bias2 = (None if type(norm) is nn.RMSNorm else norm.bias for norm in (norm1, norm2))
        return BlockWeights(
            norm1=norm1.weight, norm1_bias=bias1, conv=conv.weight, qkv=qkv.weight, gate=gate.weight,
            gate_bias=gate.bias, down=down.weight, up=up.weight, up_bias=up.bias,
            norm_long=norm_long.weight, norm_short=norm_short.weight, out=out.weight, norm2=norm2.weight,
            norm2_bias=bias2, fc1=fc1.weight, fc2=fc2.weight,
        )  # fmt: skip


_forced = threading.local()  # not a module's attribute: another thread may run, or capture, the same one


@contextlib.contextmanager
def recomputing() -> Iterator[None]:
    """Let this thread's passes recompute their blocks, whatever ``with_cp`` is."""
    _forced.recompute = True
    try:
        yield
    finally:
        _forced.recompute = False


def run_block(block: Block, residual: Residual, factors: Factors, with_cp: bool) -> Residual:
    """The residual stream after a block, which ``with_cp`` is computed again in the backward pass."""
    # No compiler meets the thread's own: a compiled backbone runs without graphs, so nothing beside them.
    if not with_cp and not torch.compiler.is_compiling():
        with_cp = getattr(_forced, 'recompute', False)
    if with_cp and torch.is_grad_enabled():
        return checkpoint(block, residual, factors, use_reentrant=False)
    return block(residual, factors)
