"""The decay gates in PyTorch; kernels/gates.py has the same for Triton, and reference.py its own.

The log decay of a token is ``log_gate(g) / gate_normalizer`` for the logit g of its gate.
It is never positive.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

OPEN = math.inf  # the logit of a gate that lets all through: padding changes no state


def log_gate(g: Tensor) -> Tensor:
    """log(sigmoid(g)), which grows with g."""
    return F.logsigmoid(g)


def log_gate_slope(g: Tensor) -> Tensor:
    """Its derivative, sigmoid(-g)."""
    return torch.sigmoid(-g)
