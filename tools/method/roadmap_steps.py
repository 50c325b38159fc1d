"""ViG-T on the way from one direction to the published model: the steps that `roadmap.py` compares.

Every step is built of our own layers and keeps ViG's stem, channel mixer and initialisation; only the token
mixer differs. The first three lack the 2D gated locality, that is the depthwise convolution before the
projections and the short context in the mix (arXiv 2405.18425, the ablation of the token mixer).
"""

import sys
from pathlib import Path

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # this checkout, installed or not
sys.path.append(str(Path(__file__).resolve().parents[1] / 'benchmark'))  # one_direction

from mmvig.backbones import ViG
from mmvig.backbones.layers import fused_backend
from mmvig.backbones.mixer import GATE_RANK, GatedTokenMixer
from mmvig.ops.bigla import bigla, bigla_packed, unpack
from mmvig.ops.cpu import apply_linear
from mmvig.ops.gated_mix import gated_mix

# The steps of the article's roadmap. The last is the model as it is shipped.
STEPS = {
    'one': 'one direction',
    'shared': 'two directions, shared gates',
    'each': 'two directions, a gate each',
    'vig': '2D gated locality: ViG-T',
}
# The same computations in another way, which are only timed.
OTHER_WAYS = {
    'twice': 'a gate each, by two calls of one direction',
    'modules': 'ViG-T, its modules one by one as in the other steps',
}
# sigmoid() of it to the power 1/16 is 0 in any dtype.
CLOSED = -1e5


def one_direction(q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> Tensor:
    """Gated linear attention from the first token to the last, see tools/benchmark/one_direction.py.

    On a GPU by the kernels there, which are for mild gates in bf16 or fp16. On a CPU by BiGLA with a closed
    backward gate: its second state is then the token's own k v^T, which is taken away again.

    Args:
        q, k, g: ``[B, N, H, K]``.
        v: ``[B, N, H, V]``.

    Returns:
        ``[B, N, H, V]``.
    """
    if q.is_cuda:
        from one_direction import one_direction  # imports Triton

        return one_direction(q, k, v, g)
    own = (q * k).sum(-1, keepdim=True) * q.shape[-1] ** -0.5
    return 2 * bigla(q, k, v, g, torch.full_like(g, CLOSED)) - own * v


def twice(q: Tensor, k: Tensor, v: Tensor, g_fwd: Tensor, g_bwd: Tensor) -> Tensor:
    """BiGLA as the mean of two calls of one direction, the second on flipped copies."""
    if q.is_cuda:
        from one_direction import twice

        return twice(q, k, v, g_fwd, g_bwd)
    backward = one_direction(*(x.flip(1) for x in (q, k, v, g_bwd))).flip(1)
    return (one_direction(q, k, v, g_fwd) + backward) / 2


class GlobalMixer(GatedTokenMixer):
    """The token mixer without 2D gated locality.

    With u = x, no convolution and nothing of the short context in the mix::

        o = scan(q, k, v, gates)      g = sigmoid(W_r x + b_r)      out = W_o (g * RMSNorm(o))

    The mix runs on :func:`gated_mix` with a short context of weight 0, so that all steps have its kernel.

    Args:
        *args, **kwargs: of :class:`GatedTokenMixer`; ``conv_act`` has no effect.
        scan: 'one' direction; both with 'shared' gates; a gate for 'each'; 'twice', the same as 'each' by
            two calls of one direction. Default: 'each'.

    Raises:
        ValueError: scan is none of these; else as GatedTokenMixer.
    """

    def __init__(self, *args, scan: str = 'each', **kwargs):
        super().__init__(*args, **kwargs)
        if scan not in ('one', 'shared', 'each', 'twice'):
            raise ValueError(f"scan must be 'one', 'shared', 'each' or 'twice', got {scan!r}")
        self.scan = scan
        self.register_buffer('no_short', torch.zeros_like(self.norm_short.weight), persistent=False)
        del self.dwconv, self.norm_short
        if scan in ('one', 'shared'):
            self.decay_up = nn.Linear(GATE_RANK, self.decay_up.out_features // 2)

    def forward(self, x: Tensor) -> Tensor:
        """Mix tokens: ``[B, H, W, C]`` -> ``[B, H, W, C]``."""
        tokens = x.flatten(1, 2)
        gates = self.decay_up(apply_linear(self.decay_down, tokens))
        o = self._scan(apply_linear(self.qkv, tokens), gates)
        gate = apply_linear(self.mix_gate, tokens)
        weights = self.norm_long.weight, self.no_short, self.out.weight
        options = {'act': self.out_act, 'backend': fused_backend(self.backend)}
        return gated_mix(o, gate, tokens, *weights, self.norm_long.eps, **options).view(x.shape)

    def _scan(self, qkv: Tensor, gates: Tensor) -> Tensor:
        """[B, N, H * (2 K + V)], [B, N, H * K or 2 * H * K] -> [B, N, H * V]."""
        if self.scan in ('one', 'shared'):
            gates = torch.cat([gates, gates], -1)
        if self.scan in ('shared', 'each'):
            return bigla_packed(qkv, gates, self.num_heads, backend=self.backend)
        inputs = unpack(qkv, gates, self.num_heads)
        return (one_direction(*inputs[:4]) if self.scan == 'one' else twice(*inputs)).flatten(2)


class ModuleMixer(GatedTokenMixer):
    """The token mixer as it is; a subclass is no plain one, so no block runs it in its own operator."""


def build_backbone(step: str, **options) -> ViG:
    """ViG with the token mixer of a step, freshly initialised.

    Args:
        step: a key of :data:`STEPS` or :data:`OTHER_WAYS`.
        options: of :class:`ViG`; ``arch`` is 'tiny' by default.

    Raises:
        ValueError: there is no such step.
    """
    if step not in (*STEPS, *OTHER_WAYS):
        raise ValueError(f'step must be one of {[*STEPS, *OTHER_WAYS]}, got {step!r}')
    model = ViG(**options)
    if step == 'vig':
        return model
    for block in model.blocks:
        old = block.mixer
        arguments = model.num_features[0], old.num_heads, old.backend, old.conv_act, old.out_act
        block.mixer = ModuleMixer(*arguments) if step == 'modules' else GlobalMixer(*arguments, scan=step)
    model._initialise()  # the new mixers with the others, as ViG's constructor does
    return model
