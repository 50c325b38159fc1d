"""Launches the kernels of the gated mix and makes them PyTorch operators.

Importing this module imports Triton.
"""

import functools
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from mmvig.ops.gated_mix.kernels import backward_kernel, forward_kernel
from mmvig.ops.launch import Constants, ceil_div, compile_key, launch, multiprocessors
from mmvig.ops.operator import differentiate, empty_like_each, operator

# Elements of a tile. Of the backward pass, whose programs sum up the weights' gradients: also the tiles
# under way at once, and programs a multiprocessor.
TILE, BACKWARD_TILE, STAGES, FILL = 2048, 512, 1, 8


@functools.lru_cache(maxsize=256)
def constants(width: int, head_dim: int, eps: float, act: bool, bias: bool, back: bool) -> Constants:
    """Constants of a kernel."""
    block = triton.next_power_of_2(head_dim)
    rows = max(1, (BACKWARD_TILE if back else TILE) // block)
    form = {'BT': rows, 'AHEAD': STAGES} if back else {'BM': rows}
    return Constants(
        H=width // head_dim, V=head_dim, EPS=eps, ACT=act, USE_BIAS=bias, **form, BV=block, num_warps=4
    )


def mix(long, gate, short, weight_long, weight_short, bias, eps, act):
    """What W_o takes, ``[rows, H * V]`` as long and short are; gate may have a wider stride of rows.

    ``bias``: ``[H * V]``, to be added to the gate's logits, or None.
    """
    y = torch.empty_like(long)
    if y.numel():
        options = constants(long.shape[1], weight_long.shape[0], eps, act, bias is not None, False)
        rows = y.numel() // options['V']
        tensors = long, gate, short, weight_long, weight_short, weight_long if bias is None else bias, y
        grid = ceil_div(rows, options['BM']), 1, 1
        arguments = (*tensors, rows, gate.stride(0))
        launch(forward_kernel, compile_key(*tensors), grid, arguments, options)
    return y


def mix_backward(dy, long, gate, short, weight_long, weight_short, bias, eps, act, dgate):
    """Gradients of long and short, :func:`mix`'s result again, and partial sums [2 or 3, ., H, V].

    These are gradients of the two weights, to be summed up over the second and third dimension, and of
    the bias, if there is one. The gate's is written into ``dgate``, of its strides.
    """
    dlong, dshort, y = torch.empty_like(long), torch.empty_like(long), torch.empty_like(dy)
    options = constants(long.shape[1], weight_long.shape[0], eps, act, bias is not None, True)
    heads, rows = options['H'], dy.numel() // options['V']
    programs = ceil_div(rows, options['BT'] * heads)
    programs = min(programs, max(1, FILL * multiprocessors(dy.device) // heads))
    dw = dy.new_empty(2 if bias is None else 3, programs, heads, options['V'], dtype=torch.float32)
    if programs:
        tensors = (
            dy, long, gate, short, weight_long, weight_short, weight_long if bias is None else bias,
            dlong, dgate, dshort, y,
        )  # fmt: skip
        arguments = (*tensors, dw, rows, gate.stride(0))
        launch(backward_kernel, compile_key(*tensors), (programs, heads, 1), arguments, options)
    return dlong, dshort, y, dw


class Inputs(NamedTuple):
    """What the operator takes."""

    long: Tensor  # [..., H * V], as gate and short are
    gate: Tensor
    short: Tensor
    weight_long: Tensor  # [V]
    weight_short: Tensor  # [V]
    weight_out: Tensor  # [C, H * V]


@operator(lambda x, eps, act: x.long.new_empty(*x.long.shape[:-1], x.weight_out.shape[0]))
def gated_mix_op(inputs: Inputs, eps: float, act: bool) -> Tensor:
    """:func:`mmvig.ops.gated_mix.gated_mix` by Triton; arguments are validated, W_o of long's dtype."""
    *_, weight_long, weight_short, weight_out = inputs
    y = mix(*rows_of(*inputs[:3]), weight_long.contiguous(), weight_short.contiguous(), None, eps, act)
    return (y @ weight_out.t()).view(*inputs.long.shape[:-1], weight_out.shape[0])


def _fake_gradients(dz, x, eps, act):
    long, gate, short, weight_out = empty_like_each(x.long, x.gate, x.short, x.weight_out)
    return long, gate, short, dz.new_empty(2, x.weight_long.shape[0], dtype=torch.float32), weight_out


@operator(_fake_gradients)
def gated_mix_backward_op(
    dz: Tensor, inputs: Inputs, eps: float, act: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of :func:`gated_mix_op`, those of the norms' weights side by side ``[2, V]`` in float32."""
    *_, weight_long, weight_short, weight_out = inputs
    dz = dz.reshape(-1, weight_out.shape[0])
    weights = weight_long.contiguous(), weight_short.contiguous()
    rows = rows_of(*inputs[:3])
    dgate = torch.empty_like(rows[1])
    dlong, dshort, y, dw = mix_backward(dz @ weight_out, *rows, *weights, None, eps, act, dgate)
    grads = (x.view(inputs.long.shape) for x in (dlong, dgate, dshort))
    return *grads, dw.sum((1, 2)), dz.t() @ y


def rows_of(*tensors: Tensor) -> list[Tensor]:
    """[..., H * V] -> [rows, H * V], contiguous."""
    return [x.contiguous().view(-1, x.shape[-1]) for x in tensors]


def backward(dz, *kept):
    """Gradients of the six tensors."""
    *grads, dw, dweight_out = gated_mix_backward_op(dz, *kept)
    return *grads, dw[0].to(kept[3].dtype), dw[1].to(kept[4].dtype), dweight_out


differentiate('gated_mix', backward)
