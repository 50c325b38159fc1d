"""What a block's operator takes, keeps and gives back: each list once, in the order of its fields."""

from collections.abc import Sequence
from typing import NamedTuple, TypeVar

from torch import Tensor

Kind = TypeVar('Kind', bound=tuple)


class BlockWeights(NamedTuple):
    """A block's weights, those of products as ``[out, in]``; D is the width of SwiGLU."""

    norm1: Tensor  # [C]
    norm1_bias: Tensor | None  # [C]; None: RMSNorm
    conv: Tensor  # [C, 1, 3, 3]
    qkv: Tensor  # [2C, C]
    gate: Tensor  # [C, C]
    gate_bias: Tensor  # [C]
    down: Tensor  # [rank, C]
    up: Tensor  # [C, rank]
    up_bias: Tensor  # [C]
    norm_long: Tensor  # [V]
    norm_short: Tensor  # [V]
    out: Tensor  # [C, C]
    norm2: Tensor  # [C]
    norm2_bias: Tensor | None  # [C]; None: RMSNorm
    fc1: Tensor  # [2D, C]
    fc2: Tensor  # [C, D]

    def products(self) -> tuple[Tensor, ...]:
        """Those that go to half precision side by side; the first three are one product."""
        return self.qkv, self.gate, self.down, self.up, self.up_bias, self.out, self.fc1, self.fc2

    def small_sizes(self) -> 'SmallGradients':
        """How many numbers each small gradient has."""
        given = (getattr(self, name) for name in SmallGradients._fields)
        return SmallGradients(*(0 if weight is None else weight.numel() for weight in given))


class SmallGradients(NamedTuple):
    """Gradients, or their sizes, that leave the backward pass side by side in one float32 vector."""

    norm1: Tensor
    norm1_bias: Tensor
    conv: Tensor
    norm_long: Tensor
    norm_short: Tensor
    gate_bias: Tensor
    norm2: Tensor
    norm2_bias: Tensor
    up: Tensor
    up_bias: Tensor


class BlockGradients(NamedTuple):
    """What the backward pass gives: of x, the branch, and weights that are one product or alone."""

    x: Tensor
    branch: Tensor
    small: Tensor  # SmallGradients side by side
    wide: Tensor  # [3C + rank, C]: of qkv, gate and down
    out: Tensor
    fc1: Tensor
    fc2: Tensor


class Options(NamedTuple):
    """What else decides what a block computes."""

    heads: int
    eps: float
    mix_eps: float
    conv_act: bool
    out_act: bool


class Activations(NamedTuple):
    """What the backward pass needs of the forward pass besides s'; rows are those of maps, B * H * W."""

    s: Tensor  # [B, H, W, C], x with its branch; empty where that is x
    y: Tensor  # [B, H, W, C], norm1(s)
    conved: Tensor  # the convolution before its activation; empty without one
    u: Tensor  # [rows, C]
    wide: Tensor  # [rows, 3C + rank]
    o: Tensor  # [rows, C]
    h: Tensor  # [rows, 2D]


class HalfWeights(NamedTuple):
    """Copies of a block's weights in the dtype of its products."""

    wide: Tensor  # [3C + rank, C]: W_qkv, W_r and W_g1
    up: Tensor
    up_bias: Tensor
    out: Tensor
    fc1: Tensor
    fc2: Tensor


def take(values: Sequence, *kinds: type[Kind]) -> tuple:
    """A flat list of arguments as NamedTuples, and at the end what is left over."""
    found = []
    for kind in kinds:
        count = len(kind._fields)
        found.append(kind(*values[:count]))
        values = values[count:]
    return *found, values
