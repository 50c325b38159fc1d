"""Our operators in inference, as launches of Triton's kernels that torch.export and AOTInductor see.

By themselves they are closed to compilers and launch their kernels without PyTorch's knowledge, so that a
compiled package would need mmvig. Under :func:`visible` a model's operators are these functions instead:
PyTorch's operators and ``torch.library.wrap_triton``, for any size that the graph leaves open.

How kernels are launched is planned for the size that is traced, and right for all others: where the plan is
a number of tiles a program, the grid has as many programs as that takes. What mmvig.ops chooses by size
besides, a sequence of one chunk and half a batch at a time, is left out.

Importing this module imports Triton.
"""

import contextlib
import importlib
from collections.abc import Iterator
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor

from mmvig.backbones import layers
from mmvig.ops import plain
from mmvig.ops.bigla import GATE_NORMALIZER, kernels
from mmvig.ops.bigla import plan as bigla_plan
from mmvig.ops.block.operands import BlockWeights, Options, take
from mmvig.ops.conv_norm import op as conv_norm_op
from mmvig.ops.dwconv import op as dwconv_op
from mmvig.ops.gated_mix import op as gated_mix_op
from mmvig.ops.launch import Constants, ceil_div, multiprocessors
from mmvig.ops.norm import op as norm_op
from mmvig.ops.swiglu import op as swiglu_op

Size = int | torch.SymInt
_tables: dict[int, Tensor] = {}  # BiGLA's, of the graph that is being traced
TRACED = {FakeTensor, FunctionalTensor}  # what torch.export has for a model's parameters


@contextlib.contextmanager
def visible() -> Iterator[None]:
    """Have models that are exported meanwhile, in inference, call the functions below."""
    with contextlib.ExitStack() as stack:
        for name, function in STAND_INS.items():
            module, attribute = name.rsplit('.', 1)
            module = importlib.import_module(f'mmvig.ops.{module}')
            stack.enter_context(mock.patch.object(module, attribute, function))
        for module in (plain, layers):
            stack.enter_context(mock.patch.object(module, 'PLAIN_TENSORS', plain.PLAIN_TENSORS | TRACED))
        stack.callback(_tables.clear)
        yield


def traced(size: Size) -> int:
    """A size as it is where the graph is traced."""
    return size.node.hint if isinstance(size, torch.SymInt) else size


def launch(kernel, grid: tuple[Size, ...], args: tuple, constants: Constants) -> None:
    """A launch in the graph. Inductor has no ``maxnreg``, which bounds registers and changes no result."""
    options = {name: value for name, value in constants.items() if name != 'maxnreg'}
    torch.library.wrap_triton(kernel)[grid](*args, **options)


def norm(
    x: Tensor, weight: Tensor, bias: Tensor | None, shift: Tensor | None, eps: float, dtype: torch.dtype,
    act: str, first: bool,
) -> Tensor:  # fmt: skip
    """``mmvig::norm``."""
    return _norm(x, None, None, weight, bias, eps, dtype, act, first, shift)[1]


def add_norm(
    x: Tensor, branch: Tensor, scale: Tensor | None, weight: Tensor, bias: Tensor | None, eps: float,
    dtype: torch.dtype, first: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """``mmvig::add_norm``."""
    return _norm(x, branch, scale, weight, bias, eps, dtype, 'none', first)


def _norm(x, branch, scale, weight, bias, eps, dtype, act, first, shift=None) -> tuple[Tensor, Tensor]:
    """The sum of x [B, H, W, C] and the branch, x if there is none, and its norm."""
    x, branch, scale, weight, bias, shift = norm_op.contiguous(x, branch, scale, weight, bias, shift)
    batch, height, width, channels = x.shape
    s = None if branch is None else torch.empty_like(x)
    y = x.new_empty(norm_op.shape_of(x, first), dtype=dtype)
    constants = norm_op.constants(
        channels, False, eps, bias is None, act, branch is not None, scale is not None, first,
        shift is not None,
    )  # fmt: skip
    # The weight stands for what is not there: Inductor may copy an activation once for each place.
    tensors = [weight if each is None else each for each in (x, branch, scale, weight, bias, shift, s, y)]
    rows = batch * height * width
    grid = ceil_div(rows, constants['BM']), 1, 1
    launch(norm_op.forward_kernel, grid, (*tensors, rows, height * width), constants)
    return x if s is None else s, y


def conv_norm(
    x: Tensor, conv_weight: Tensor, conv_bias: Tensor, weight: Tensor, bias: Tensor, eps: float,
    stride: int, low: torch.dtype, dtype: torch.dtype, act: str,
) -> tuple[Tensor]:  # fmt: skip
    """``mmvig::conv_norm_inference``."""
    weights = conv_norm_op.Weights(*norm_op.contiguous(conv_weight, conv_bias, weight, bias))
    size = conv_norm_op.size_of(x, weights, stride)
    y, z = x.new_empty(size, dtype=dtype), x.new_empty(0, dtype=low)
    constants = conv_norm_op.constants(conv_weight.shape, stride, eps, act, False)
    rows, strides = size[0] * size[1] * size[2], x.stride()
    programs = conv_norm_op.FILL * multiprocessors(x.device)
    grid = torch.sym_min(ceil_div(rows, constants['BM']), programs), 1, 1
    sizes = rows, *x.shape[1:3], *size[1:3], strides[0], strides[3], *strides[1:3]
    launch(conv_norm_op.forward_kernel, grid, (x, *weights, z, y, *sizes), constants)
    return (y,)


def conv(x: Tensor, weight: Tensor, stride: int) -> Tensor:
    """``mmvig::conv``, as the convolution that Inductor knows."""
    return F.conv2d(x.permute(0, 3, 1, 2), weight, None, stride, 1).permute(0, 2, 3, 1).contiguous()


def dwconv(x: Tensor, weight: Tensor, act: bool) -> Tensor:
    """Depthwise convolution of x [B, H, W, C], or silu of it with ``act``."""
    x, weight = x.contiguous(), weight.contiguous()
    batch, height, width, _ = x.shape
    size = torch.Size(map(traced, x.shape))
    constants, (_, _, _, rows), _, blocks = dwconv_op.divide(
        size, x.device, ACT=act, KEEP=not act, **dwconv_op.FORWARD
    )
    strips = batch * ceil_div(width, dwconv_op.COLUMNS) * ceil_div(height, rows)
    u = torch.empty_like(x)
    grid = ceil_div(strips, constants['BP']) * blocks, 1, 1
    launch(dwconv_op.forward_kernel, grid, (x, weight, u, u, strips, height, width, rows), constants)
    return u


def bigla(wide: Tensor, decay: Tensor, batch: Size, heads: int) -> Tensor:
    """BiGLA [B * N, C] of the wide product [B * N, 3C + rank] and the decay gates' logits [B * N, C]."""
    (rows, channels), width = decay.shape, wide.shape[1]
    tokens, keys = rows // batch, channels // 2
    key_dim, value_dim = keys // heads, channels // heads
    q, k, v = wide[:, :keys], wide[:, keys:channels], wide[:, channels : 2 * channels]
    gf, gb = decay[:, :keys], decay[:, keys:]
    o = torch.empty_like(decay)
    unit = next(x for x in (8, 2, 1) if all(n % x == 0 for n in (width, key_dim, value_dim)))
    of_tensors = (width, key_dim), (width, key_dim), (width, value_dim), *[(channels, key_dim)] * 2
    strides = [
        n // unit
        for across, head in (*of_tensors, (channels, value_dim))
        for n in (tokens * across, across, head)
    ]
    inputs = q, k, v, gf, gb, o
    widths = key_dim, value_dim, wide.dtype
    plan = bigla_plan.plan(*widths)
    walked = traced(tokens) <= bigla_plan.MAX_WALK and (plan['in_output'] or plan['NC'] == 1)
    in_output = walked and plan['in_output']
    name, per_segment = ('walked_output', 1) if in_output else ('output', plan['NC'])
    blocks = plan[name]
    chunks = ceil_div(tokens, blocks['BT'])
    segments = ceil_div(chunks, per_segment)
    sequences, parts_of_v = batch * heads, ceil_div(value_dim, blocks['BV'])
    n_states, n_sums = sequences * segments, sequences * chunks
    sums = wide.new_empty(2, n_sums, key_dim, dtype=torch.float32)
    held = sequences if in_output else 2 * n_states
    state = wide.new_empty(held, key_dim, value_dim, dtype=plan['state_dtype'])
    sizes, common = (tokens, heads, n_states, n_sums, *strides), (key_dim**-0.5 / 2, 1 / GATE_NORMALIZER)

    def table(name: str) -> Tensor:
        # Made in the graph, once for all blocks: what mmvig keeps between calls is no part of it.
        size = plan[name]['BT']
        if size not in _tables:
            _tables[size] = bigla_plan.tables.__wrapped__(wide.device, size)[0]
        return _tables[size]

    def constants(name: str, **more) -> Constants:
        return bigla_plan.constants_of(*widths, name, UNIT=unit, SAME=True, **more)

    def run_of(name: str, n: Size) -> int:
        several = traced(sequences) * parts_of_v
        return bigla_plan.run_length(widths, name, traced(n), several, wide.device)

    if walked:
        arguments = (*inputs, state, sums, table('walk'), *sizes, *common)
        launch(
            kernels.walk_kernel, (2, heads * parts_of_v, batch), arguments,
            constants('walk', IN_OUTPUT=in_output),
        )  # fmt: skip
    else:
        run = run_of('states', segments)
        arguments = (*inputs, state, sums, table('states'), *sizes, run, *common)
        launch(
            kernels.states_kernel, (ceil_div(segments, run), heads * parts_of_v, batch), arguments,
            constants('states', NC=per_segment, BACKWARD=False),
        )  # fmt: skip
        scan = bigla_plan.scan_constants(widths, traced(segments), per_segment)
        launch(
            kernels.scan_kernel, (sequences, ceil_div(key_dim, scan['BK']), 2),
            (state, sums, segments, n_states, chunks), scan,
        )  # fmt: skip
    form = {'NC': per_segment, 'ALONE': False, 'IN_OUTPUT': in_output}
    arguments = (*inputs, state, sums, table(name), *sizes)
    exact = blocks['MODE'] == 'tf32x3'
    if not exact:
        run = run_of(name, chunks)
        launch(
            kernels.output_kernel, (ceil_div(chunks, run), heads * parts_of_v, batch),
            (*arguments, run, *common), constants(name, STRONG=False, GROUP=1, **form),
        )  # fmt: skip
    group = 1 if exact else bigla_plan.GROUP // blocks['BK']
    launch(
        kernels.output_kernel, (ceil_div(n_sums, group), parts_of_v, 1), (*arguments, group, *common),
        constants(f'strong_{name}', STRONG=True, GROUP=group, **form),
    )  # fmt: skip
    return o


def mix(long, gate, short, weight_long, weight_short, bias, eps: float, act: bool) -> Tensor:
    """The gated mix [rows, C] of long and short [rows, C] by gates whose rows may be further apart."""
    weights = weight_long.contiguous(), weight_short.contiguous(), bias
    y = torch.empty_like(long)
    constants = gated_mix_op.constants(long.shape[1], weight_long.shape[0], eps, act, True, False)
    rows = long.shape[0] * constants['H']
    arguments = long, gate, short, *weights, y, rows, gate.stride(0)
    launch(gated_mix_op.forward_kernel, (ceil_div(rows, constants['BM']), 1, 1), arguments, constants)
    return y


def activated_product(y: Tensor, weight: Tensor) -> Tensor:
    """SwiGLU's activation [rows, D] of y W^T, of y [rows, C] and W [2 D, C]."""
    (rows, channels), width = y.shape, weight.shape[0] // 2
    result = y.new_empty(rows, width)
    if swiglu_op.is_fused(y, swiglu_op.MAX_WIDTH):
        constants, columns, most = swiglu_op.product_constants(channels, width, y.device, False)
        grid = columns, torch.sym_min(ceil_div(rows, constants['BM']), most), 1
        launch(swiglu_op.project_kernel, grid, (y, weight, result, result, rows), constants)
    else:
        constants = swiglu_op.constants(width)
        grid = ceil_div(rows, swiglu_op.ROWS), ceil_div(width, swiglu_op.COLUMNS), 1
        launch(swiglu_op.forward_kernel, grid, (torch.mm(y, weight.t()), result, rows), constants)
    return result


def block(
    x: Tensor, branch: Tensor | None, scale: None, branch_scale: None, *rest
) -> tuple[Tensor, Tensor]:
    """``mmvig::block_inference``."""
    w, options, (dtype,) = take(rest, BlockWeights, Options)
    heads, eps, mix_eps, conv_act, out_act = options
    channels = x.shape[3]
    low = {name: getattr(w, name).to(dtype) for name in ('up', 'up_bias', 'out', 'fc1', 'fc2')}
    s, y = _norm(x, branch, scale, w.norm1, w.norm1_bias, eps, dtype, 'none', False)
    u = dwconv(y, w.conv, conv_act).view(-1, channels)
    wide = torch.mm(u, torch.cat([w.qkv, w.gate, w.down]).to(dtype).t())
    logits, reduced = wide[:, 2 * channels : 3 * channels], wide[:, 3 * channels :]
    o = bigla(wide, torch.addmm(low['up_bias'], reduced, low['up'].t()), x.shape[0], heads)
    m = mix(o, logits, u, w.norm_long, w.norm_short, w.gate_bias, mix_eps, out_act)
    z = torch.mm(m, low['out'].t()).view(x.shape)
    s, y = _norm(s, z, branch_scale, w.norm2, w.norm2_bias, eps, dtype, 'none', False)
    activated = activated_product(y.view(-1, channels), low['fc1'])
    return s, torch.mm(activated, low['fc2'].t()).view(x.shape)


STAND_INS = {
    'norm.op.norm_op': norm,
    'norm.op.add_norm_op': add_norm,
    'conv_norm.op.conv_norm_op': conv_norm,
    'conv.conv_op': conv,
    'block.op.block_op': block,
}
