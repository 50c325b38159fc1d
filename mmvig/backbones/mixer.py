"""The gated token mixer of ViG: short (3x3) and long (BiGLA) context, mixed by a learned gate."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmvig.backbones.layers import (
    DWConv,
    fused_backend,
    is_plain_norm,
    is_plain_projection,
    normalise,
)
from mmvig.ops.bigla import bigla_packed, check_backend
from mmvig.ops.cpu import apply_linear
from mmvig.ops.gated_mix import gated_mix

# Width of the low-rank step that makes the decay gates' logits.
GATE_RANK = 16


class GatedTokenMixer(nn.Module):
    """Token mixer with 2D gated locality injection (arXiv 2405.18425).

    The mix of the short and the long context::

        u = DWConv3x3(x)                q, k, v = split(W_qkv u)       g_f, g_b = split(W_g2 W_g1 u + b)
        o = BiGLA(q, k, v, g_f, g_b)    g = sigmoid(W_r u + b_r)
        out = W_o (g * RMSNorm(o) + (1 - g) * RMSNorm(u))

    Tokens are in raster order. Both norms are per head, with one weight shared by the heads.

    Args:
        channels: width C of the input and the output.
        num_heads: heads H; keys are C / 2H wide, values C / H.
        backend: BiGLA's, see :func:`mmvig.ops.bigla.bigla`; all else in a block is on fused kernels with
            'triton', and with 'auto' where they can run. Default: 'auto'.
        conv_act: whether u is silu(DWConv3x3(x)), as in plain ViG-T. Default: False.
        out_act: whether SiLU is applied to what W_o takes, as in plain ViG-T. Default: False.

    Raises:
        ValueError: C is no multiple of 2H, or the backend is unknown.
    """

    def __init__(
        self,
        channels: int,
        num_heads: int,
        backend: str = 'auto',
        conv_act: bool = False,
        out_act: bool = False,
    ):
        super().__init__()
        if channels % (2 * num_heads):
            raise ValueError(
                f'channels must be a multiple of 2 * num_heads, got {channels} and {num_heads}'
            )
        check_backend(backend)
        self.num_heads = num_heads
        self.backend = backend
        self.conv_act = conv_act
        self.out_act = out_act
        self.dwconv = DWConv(channels, backend)
        self.qkv = nn.Linear(channels, 2 * channels, bias=False)
        self.decay_down = nn.Linear(channels, GATE_RANK, bias=False)
        self.decay_up = nn.Linear(GATE_RANK, channels)
        self.mix_gate = nn.Linear(channels, channels)
        self.norm_long = nn.RMSNorm(channels // num_heads, eps=1e-6)
        self.norm_short = nn.RMSNorm(channels // num_heads, eps=1e-6)
        self.out = nn.Linear(channels, channels, bias=False)
        nn.init.xavier_uniform_(self.dwconv.weight, gain=2**-2.5)

    def forward(self, x: Tensor) -> Tensor:
        """Mix tokens: ``[B, H, W, C]`` -> ``[B, H, W, C]``."""
        u = self.dwconv(x)
        if self.conv_act:
            u = F.silu(u)
        tokens = u.flatten(1, 2)  # [B, N, C]
        decay_gates = self.decay_up(apply_linear(self.decay_down, tokens))
        qkv = apply_linear(self.qkv, tokens)
        o = bigla_packed(qkv, decay_gates, self.num_heads, backend=self.backend)
        gate = apply_linear(self.mix_gate, tokens)
        if self._has_plain_mix(x.shape[3]):
            weights = self.norm_long.weight, self.norm_short.weight, self.out.weight
            options = {'act': self.out_act, 'backend': fused_backend(self.backend)}
            return gated_mix(o, gate, tokens, *weights, self.norm_long.eps, **options).view(x.shape)
        long, short = (
            normalise(norm, each.unflatten(-1, (self.num_heads, -1))).flatten(-2)
            for norm, each in ((self.norm_long, o), (self.norm_short, tokens))
        )
        y = torch.lerp(short, long, gate.sigmoid().to(short.dtype))
        return self.out(F.silu(y) if self.out_act else y).view(x.shape)

    def _has_plain_mix(self, channels: int) -> bool:
        """Whether norms and projection of the mix do what :func:`gated_mix` computes."""
        head_dim, norms = channels // self.num_heads, (self.norm_long, self.norm_short)
        return (
            all(is_plain_norm(norm, head_dim, (nn.RMSNorm,)) for norm in norms)
            and self.norm_long.eps == self.norm_short.eps
            and is_plain_projection(self.out)
        )
