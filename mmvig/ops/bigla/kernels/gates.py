"""The decay gates by Triton: see ../gates.py.

The log2 decay of a token is ``log2_gate(g) * inv``; a gate whose logit is infinite lets all through.
"""

import triton
import triton.language as tl

from mmvig.ops.arithmetic import LOG2E, sigmoid
from mmvig.ops.bigla.kernels.arithmetic import exp2_minus_abs, log2


@triton.jit
def log2_gate(g, MODE: tl.constexpr):
    """log2(sigmoid(g)) in float32, which grows with g."""
    return log2_sigmoid(g.to(tl.float32) * LOG2E, MODE)


@triton.jit
def log_gate_slope(g):
    """The derivative of log(sigmoid(g)), sigmoid(-g), in float32."""
    return sigmoid(-g.to(tl.float32))


@triton.jit
def log2_sigmoid(x, MODE: tl.constexpr):
    """log2(sigmoid(x / log2 e)) without overflow; x = inf gives 0."""
    e = exp2_minus_abs(x)
    if MODE == 'tf32x3':
        # log2(1 + e) = e * P(e) on [0, 1], minimax in the relative error: float32 rounding.
        p = e * 0.007549245673541441 - 0.04256731714321047
        p = e * p + 0.11285660997282833
        p = e * p - 0.19711932442780655
        p = e * p + 0.2756415795174285
        p = e * p - 0.3584085153730151
        p = e * p + 0.4806929627347839
        p = e * p - 0.7213402082687197
        p = e * p + 1.4426949974364294
        return tl.minimum(x, 0.0) - e * p
    else:
        return tl.minimum(x, 0.0) - log2(1.0 + e)
