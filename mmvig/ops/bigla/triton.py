"""BiGLA on GPUs: launches the kernels of kernels.py and makes them PyTorch operators.

Importing this module imports Triton. Forward: what each segment adds to the states, a scan over segments,
the output; only the output where a sequence is a single segment. Training keeps the inputs and nothing
else.
"""

import functools
import os
import shutil

import torch
import triton
from torch import Tensor

from mmvig.ops.bigla import kernels, unpack

INTERPRETED = os.environ.get('TRITON_INTERPRET') == '1'
# The launcher's arguments are Triton's own affair: known for these versions, others go the public way.
FAST_LAUNCH = not INTERPRETED and (3, 4) <= tuple(map(int, triton.__version__.split('.')[:2])) <= (3, 8)
MIN_CAPABILITY = (8, 0)
# Largest number of elements between a chunk's first and last token: offsets within a chunk are 32-bit.
MAX_CHUNK_SPAN = 2**31


def unavailable(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why these kernels cannot run on a device and dtype, or None if they can."""
    if dtype == torch.float64:
        return 'it computes in float32, and the inputs are float64'
    if INTERPRETED:
        return None
    if device.type != 'cuda':
        return f'it runs on CUDA devices, and the inputs are on {device}'
    capability = torch.cuda.get_device_capability(device)
    if capability < MIN_CAPABILITY:
        return f'it needs compute capability 8.0 or newer, {device} has {".".join(map(str, capability))}'
    if not any(map(shutil.which, (os.environ.get('CC', 'cc'), 'gcc', 'clang'))):
        return 'it needs a C compiler (gcc or clang, or CC set) for its launchers, and there is none'
    return None


@functools.lru_cache(maxsize=256)
def plan(key_dim: int, value_dim: int, dtype: torch.dtype) -> dict:
    """Block sizes and precisions for one (K, V, dtype), fixed so that nothing is tuned at run time.

    K = 16 is measured on an H200; other widths are only known to be right there.
    """
    block_k = max(16, triton.next_power_of_2(key_dim))
    block_v = max(16, triton.next_power_of_2(value_dim))
    block_t = 64 if block_k <= 32 else 32 if block_k <= 64 else 16
    if INTERPRETED:
        block_t = 16  # seams between chunks with few tokens
    block_v = min(block_v, 64 if block_k <= 64 else 32)
    mode = {torch.bfloat16: 'bf16', torch.float16: 'tf32', torch.float32: 'tf32x3'}[dtype]
    if INTERPRETED and mode == 'bf16':
        mode = 'bf16 interpreted'
    pair_mode = 'tf32x3' if dtype == torch.float32 else 'tf32'
    state_dtype = torch.bfloat16 if dtype == torch.bfloat16 else torch.float32
    # As many chunks a segment as keep its two states within a fifth of its inputs.
    state_bytes = 2 * key_dim * value_dim * state_dtype.itemsize
    chunk_bytes = (4 * key_dim + value_dim) * dtype.itemsize * block_t
    chunks = 1
    while chunks < 8 and state_bytes > 0.2 * chunk_bytes * chunks:
        chunks *= 2
    exact = dtype == torch.float32
    states_width = {'R': 16, 'num_warps': 1} if block_k == 16 else {'R': 4, 'num_warps': 4}
    blocks = {'K': key_dim, 'V': value_dim, 'BT': block_t, 'BK': block_k, 'BV': block_v, 'EXACT': exact}
    return {
        'chunks': chunks,
        'state_dtype': state_dtype,
        'states': {**blocks, 'MODE': pair_mode, **states_width},
        'output': {**blocks, 'PAIR_MODE': pair_mode, 'MODE': mode, 'R': 4, 'num_warps': 4},
        # Two warps: with four, Triton 3.6 makes this kernel read wrong addresses on Hopper.
        'gradient': {**blocks, 'MODE': mode, 'R': 4, 'num_warps': 2},
        'scan': {'K': key_dim, 'V': value_dim, 'BV': max(16, triton.next_power_of_2(value_dim))},
        'exact': exact,
    }


# Segments that the scan takes at once: few sequences are long, many are short.
SCAN_SHORT = {'BW': 2, 'BR': 8, 'num_warps': 1}
SCAN_LONG = {'BW': 16, 'BR': 16, 'num_warps': 8}
SCAN_LIMIT = 64
if INTERPRETED:
    SCAN_SHORT = SCAN_LONG = {'BW': 2, 'BR': 2, 'num_warps': 1}

# Compiled kernels by what they were compiled for: Triton's own look-up takes longer than a small launch.
_compiled: dict = {}


def launch(kernel, key: tuple, grid: tuple, args: tuple, constants: dict) -> None:
    """Launch ``kernel``; ``key``: what it is compiled for besides ``constants``, () if Triton must look."""
    found = _compiled.get((kernel.fn, key, *constants.values()))
    if found:
        run, function, metadata, values = found
        stream = torch._C._cuda_getCurrentRawStream(key[0].index)
        run(*grid, stream, function, metadata, None, None, None, *args, *values)
        return
    compiled = kernel[grid](*args, **constants, num_stages=1)
    if FAST_LAUNCH and key:
        values = [constants[name] for name in kernel.arg_names if name in constants]
        record = compiled.run, compiled.function, compiled.packed_metadata, values
        _compiled[(kernel.fn, key, *constants.values())] = record


def forward(
    q: Tensor, k: Tensor, v: Tensor, gf: Tensor, gb: Tensor, scale: float, normalizer: float, o: Tensor
) -> None:
    """Write the output for ``[B, N, H, K or V]`` inputs into ``o``, of v's shape."""
    batch, num_tokens, heads, key_dim = q.shape
    value_dim = v.shape[-1]
    if batch == 0:
        return
    p = plan(key_dim, value_dim, v.dtype)
    chunks, block_t = p['chunks'], p['output']['BT']
    inputs, unit, strides = address((q, k, v, gf, gb, o), block_t)
    common = (scale / 2, 1 / normalizer)
    num_segments = ceil_div(num_tokens, block_t * chunks)
    n_states = batch * heads * num_segments
    key = compile_key(v, gf, gb, unit, strides)
    with torch.cuda.device_of(q):
        # Empty for a single segment, but of the dtype that kernels are compiled for.
        several = num_segments > 1
        state = v.new_empty(2, n_states if several else 0, key_dim, value_dim, dtype=p['state_dtype'])
        if several:
            make_states(inputs, state, num_segments, chunks, strides, common, unit, key, p)
        n_chunks = batch * heads * ceil_div(num_tokens, block_t)
        strong = v.new_empty(n_chunks, dtype=torch.uint8)
        sizes = (num_tokens, heads, n_states, n_chunks)
        pointers = (*inputs, state, strong)
        constants = {'NC': chunks, 'UNIT': unit, 'SWAP': False}
        blocks_v = ceil_div(value_dim, p['output']['BV'])
        mild_then_strong(
            kernels.output_kernel, key, n_chunks, (blocks_v,), (*pointers, *sizes, *strides, *common),
            {**p['output'], **constants}, strong, p['exact'],
        )  # fmt: skip


def make_states(inputs, state, num_segments, chunks, strides, common, unit, key, p) -> None:
    """Fill ``state [2 or 4, B * H * segments, K, V]`` with the states that leave each segment."""
    _, num_tokens, heads, _ = inputs[0].shape
    kinds, n_states, key_dim, value_dim = state.shape
    decay = state.new_empty(2, n_states, key_dim, dtype=torch.float32)
    launch(
        kernels.states_kernel, key, (n_states, ceil_div(value_dim, p['states']['BV']), 1),
        (*inputs, state, decay, num_tokens, heads, n_states, *strides, *common),
        {**p['states'], 'NC': chunks, 'UNIT': unit, 'BACKWARD': kinds == 4},
    )  # fmt: skip
    grid = (key_dim, n_states // num_segments, kinds)
    width = SCAN_SHORT if num_segments <= SCAN_LIMIT else SCAN_LONG
    launch(kernels.scan_kernel, key, grid, (state, decay, num_segments, n_states), {**p['scan'], **width})


def mild_then_strong(kernel, key, n_chunks, rest, args, constants, strong, exact) -> None:
    """Run ``kernel`` in the factored form, then by levels on chunks it marked; all by levels if exact."""
    if exact:
        strong.fill_(1)
        launch(kernel, key, (n_chunks, *rest, 1), args, {**constants, 'STRONG': True, 'GROUP': 1})
    else:
        launch(kernel, key, (n_chunks, *rest, 1), args, {**constants, 'STRONG': False, 'GROUP': 1})
        launch(
            kernel,
            key,
            (ceil_div(n_chunks, 16), *rest, 1),
            args,
            {**constants, 'STRONG': True, 'GROUP': 16},
        )


def backward(
    do: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gf: Tensor,
    gb: Tensor,
    scale: float,
    normalizer: float,
    grads: tuple,
) -> None:
    """Write the gradients into ``grads``: dq, dk, dv, dgf, dgb, in the inputs' shapes."""
    batch, num_tokens, heads, key_dim = q.shape
    value_dim = v.shape[-1]
    if batch == 0:
        return
    p = plan(key_dim, value_dim, v.dtype)
    block_t = p['gradient']['BT']
    p = {**p, 'states': {**p['states'], 'BT': block_t}, 'swapped': {**p['output'], 'BT': block_t}}
    (q, k, v, gf, gb, do, dq, dk, dv, dgf, dgb), unit, strides = address(
        (q, k, v, gf, gb, do, *grads), block_t
    )
    of_q, of_k, _, of_gf, of_gb, of_do, of_dq, of_dk, of_dv, of_dgf, of_dgb = batched(strides, 3)
    inputs = (q, k, v, gf, gb, do)
    common = (scale / 2, 1 / normalizer)
    num_chunks = ceil_div(num_tokens, block_t)
    n_chunks = batch * heads * num_chunks
    key = compile_key(v, gf, gb, unit, strides)
    with torch.cuda.device_of(q):
        several = num_chunks > 1
        state = v.new_empty(4, n_chunks if several else 0, key_dim, value_dim, dtype=p['state_dtype'])
        if several:
            make_states(inputs, state, num_chunks, 1, strides[:18], common, unit, key, p)
        strong = v.new_empty(n_chunks, dtype=torch.uint8)
        sizes = (num_tokens, heads, n_chunks, n_chunks)
        swapped = (q, k, do, gf, gb, dv)
        mild_then_strong(
            kernels.output_kernel, key, n_chunks, (ceil_div(value_dim, p['output']['BV']),),
            (*swapped, state, strong, *sizes, *of_q, *of_k, *of_do, *of_gf, *of_gb, *of_dv, *common),
            {**p['swapped'], 'NC': 1, 'UNIT': unit, 'SWAP': True}, strong, p['exact'],
        )  # fmt: skip
        outputs = (dq, dk, dgf, dgb)
        mild_then_strong(
            kernels.gradient_kernel, key, n_chunks, (1,),
            (*inputs, *outputs, state, strong, *sizes, *strides[:18],
             *of_dq, *of_dk, *of_dgf, *of_dgb, *common),
            {**p['gradient'], 'UNIT': unit}, strong, p['exact'],
        )  # fmt: skip


def compile_key(v: Tensor, gf: Tensor, gb: Tensor, unit: int, strides: tuple[int, ...]) -> tuple:
    """What kernels are compiled for besides constants; () where Triton must look at the arguments."""
    if unit == 1 or max(strides) >= 2**31:
        return ()
    return v.device, v.dtype, gf.dtype, gb.dtype


def address(tensors: tuple, block_t: int) -> tuple[tuple, int, tuple[int, ...]]:
    """The tensors (copied where a kernel cannot read them), their common unit, and their strides in units.

    Strides are those of batch, token and head of each tensor, one after the other, as the kernels take
    them.
    """
    copies, unit, strides = layout(tuple((x.shape, x.stride()) for x in tensors), block_t)
    if copies:
        tensors = tuple(x.contiguous() if i in copies else x for i, x in enumerate(tensors))
        return address(tensors, block_t)
    if unit > 1 and any(x.data_ptr() % 16 for x in tensors):
        return tensors, 1, tuple(s * unit for s in strides)
    return tensors, unit, strides


@functools.lru_cache(maxsize=4096)
def layout(shapes_and_strides: tuple, block_t: int) -> tuple[tuple[int, ...], int, tuple[int, ...]]:
    """Which tensors must be copied, the largest of 8, 2, 1 to divide all strides, and the strides in it."""
    copies = tuple(
        i
        for i, (shape, stride) in enumerate(shapes_and_strides)
        if (stride[-1] != 1 and shape[-1] > 1) or stride[1] * block_t >= MAX_CHUNK_SPAN
    )
    strides = [
        s if n > 1 else 0
        for shape, stride in shapes_and_strides
        for s, n in zip(stride[:3], shape, strict=False)
    ]
    unit = next(unit for unit in (8, 2, 1) if all(s % unit == 0 for s in strides))
    return copies, unit, tuple(s // unit for s in strides)


def batched(items: tuple, n: int) -> list[tuple]:
    """Runs of ``n`` items (itertools.batched needs Python 3.12)."""
    return [items[i : i + n] for i in range(0, len(items), n)]


def ceil_div(a: int, b: int) -> int:
    """Quotient rounded up (triton.cdiv takes microseconds)."""
    return -(-a // b)


@torch.library.custom_op('mmvig::bigla', mutates_args=())
def bigla_op(
    q: Tensor, k: Tensor, v: Tensor, g_fwd: Tensor, g_bwd: Tensor, scale: float, normalizer: float
) -> Tensor:
    """:func:`mmvig.ops.bigla.bigla` by Triton, as a PyTorch operator; arguments already validated."""
    o = v.new_empty(v.shape)
    forward(q, k, v, g_fwd, g_bwd, scale, normalizer, o)
    return o


@bigla_op.register_fake
def _(q, k, v, g_fwd, g_bwd, scale, normalizer):
    return v.new_empty(v.shape)


@torch.library.custom_op('mmvig::bigla_backward', mutates_args=())
def bigla_backward_op(
    do: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g_fwd: Tensor,
    g_bwd: Tensor,
    scale: float,
    normalizer: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of :func:`bigla_op`, each contiguous."""
    grads = tuple(x.new_empty(x.shape) for x in (q, k, v, g_fwd, g_bwd))
    backward(do, q, k, v, g_fwd, g_bwd, scale, normalizer, grads)
    return grads


@bigla_backward_op.register_fake
def _(do, q, k, v, g_fwd, g_bwd, scale, normalizer):
    return tuple(x.new_empty(x.shape) for x in (q, k, v, g_fwd, g_bwd))


@torch.library.custom_op('mmvig::bigla_packed', mutates_args=())
def bigla_packed_op(qkv: Tensor, gates: Tensor, num_heads: int, scale: float, normalizer: float) -> Tensor:
    """:func:`mmvig.ops.bigla.bigla_packed` by Triton, as a PyTorch operator; arguments are validated."""
    views = unpack(qkv, gates, num_heads)
    o = qkv.new_empty(views[2].shape)
    forward(*views, scale, normalizer, o)
    return o.flatten(2)


@bigla_packed_op.register_fake
def _(qkv, gates, num_heads, scale, normalizer):
    batch, num_tokens, channels = qkv.shape
    return qkv.new_empty(batch, num_tokens, channels - gates.shape[-1])


@torch.library.custom_op('mmvig::bigla_packed_backward', mutates_args=())
def bigla_packed_backward_op(
    do: Tensor, qkv: Tensor, gates: Tensor, num_heads: int, scale: float, normalizer: float
) -> tuple[Tensor, Tensor]:
    """Gradients of :func:`bigla_packed_op`, written side by side where a concatenation would put them."""
    grads = qkv.new_empty(qkv.shape), gates.new_empty(gates.shape)
    do = do.unflatten(-1, (num_heads, -1))
    backward(do, *unpack(qkv, gates, num_heads), scale, normalizer, unpack(*grads, num_heads))
    return grads


@bigla_packed_backward_op.register_fake
def _(do, qkv, gates, num_heads, scale, normalizer):
    return qkv.new_empty(qkv.shape), gates.new_empty(gates.shape)


def _save(ctx, inputs, output):
    tensors = [x for x in inputs if isinstance(x, Tensor)]
    ctx.options = inputs[len(tensors) :]
    ctx.save_for_backward(*tensors)


def _backward(op):
    def run(ctx, do):
        return *op(do, *ctx.saved_tensors, *ctx.options), *[None] * len(ctx.options)

    return run


def _no_second_derivative(ctx, *grads):
    raise RuntimeError("bigla's Triton backend has no second derivative; use backend='chunked' for one")


bigla_op.register_autograd(_backward(bigla_backward_op), setup_context=_save)
bigla_packed_op.register_autograd(_backward(bigla_packed_backward_op), setup_context=_save)
bigla_backward_op.register_autograd(_no_second_derivative)
bigla_packed_backward_op.register_autograd(_no_second_derivative)
