"""BiGLA on GPUs: launches the kernels of kernels.py and makes them PyTorch operators.

Importing this module imports Triton. Forward: three launches (what each segment adds to the states, a scan over segments,
the output), one where a sequence is a single segment. Training keeps the inputs and nothing else.
"""

import functools
import os

import torch
import triton
from torch import Tensor

from mmvig.ops.bigla import kernels

INTERPRETED = os.environ.get('TRITON_INTERPRET') == '1'
# Older launchers take other arguments.
FAST_LAUNCH = not INTERPRETED and tuple(map(int, triton.__version__.split('.')[:2])) >= (3, 4)
MIN_CAPABILITY = (8, 0)
# Largest number of elements between a chunk's first and last token: offsets within a chunk are 32-bit.
MAX_CHUNK_SPAN = 2**31


def unavailable(q: Tensor) -> str | None:
    """Why the Triton backend cannot take tensors like ``q``; None if it can."""
    if q.dtype == torch.float64:
        return 'it computes in float32, and the inputs are float64'
    if q.device.type == 'cuda':
        capability = torch.cuda.get_device_capability(q.device)
        if capability < MIN_CAPABILITY:
            return f'it needs compute capability 8.0 or newer, this GPU has {".".join(map(str, capability))}'
        return None
    if q.device.type == 'cpu' and INTERPRETED:
        return None
    return f'it runs on CUDA devices, and the inputs are on {q.device}'


@functools.lru_cache(maxsize=256)
def plan(key_dim: int, value_dim: int, dtype: torch.dtype) -> dict:
    """Block sizes and precisions for one (K, V, dtype): measured on an H200, not tuned at run time."""
    block_k = max(16, triton.next_power_of_2(key_dim))
    block_v = max(16, triton.next_power_of_2(value_dim))
    block_t = 64 if block_k <= 32 else 32 if block_k <= 64 else 16
    block_v = min(block_v, 64 if block_k <= 64 else 32)
    mode = {torch.bfloat16: 'bf16', torch.float16: 'tf32', torch.float32: 'tf32x3'}[dtype]
    if INTERPRETED and mode == 'bf16':
        mode = 'bf16 interpreted'
    pair_mode = 'tf32x3' if dtype == torch.float32 else 'tf32'
    state_dtype = torch.bfloat16 if dtype == torch.bfloat16 else torch.float32
    # As many chunks a segment as keep its two states under a fifth of its inputs' bytes.
    states = 2 * key_dim * value_dim * state_dtype.itemsize
    inputs = (4 * key_dim + value_dim) * dtype.itemsize * block_t
    chunks = 1
    while chunks < 8 and states > 0.2 * inputs * chunks:
        chunks *= 2
    exact = dtype == torch.float32
    blocks = {'K': key_dim, 'V': value_dim, 'BT': block_t, 'BK': block_k, 'BV': block_v, 'EXACT': exact}
    return {
        'chunks': chunks,
        'state_dtype': state_dtype,
        'states': {**blocks, 'MODE': pair_mode, 'R': 4, 'num_warps': 4},
        'output': {**blocks, 'PAIR_MODE': pair_mode, 'MODE': mode, 'R': 4, 'num_warps': 4},
        'gradient': {**blocks, 'MODE': mode, 'R': 8, 'num_warps': 2},
        'scan': {'K': key_dim, 'V': value_dim, 'BS': 64, 'BE': 32, 'num_warps': 4},
        'exact': exact,
    }


# Compiled kernels by (kernel, what it was compiled for): Triton's own look-up takes longer than a small launch.
_compiled: dict = {}


def launch(kernel, key: tuple, grid: tuple, args: tuple, constants: dict) -> None:
    """Launch ``kernel``; ``key``: all that its compilation depends on besides ``constants``, or () for a fresh look-up."""
    key = (kernel, key, *constants.values())
    if key in _compiled:
        compiled, values = _compiled[key]
        compiled[grid](*args, *values)
        return
    compiled = kernel[grid](*args, **constants, num_stages=1)
    if FAST_LAUNCH and key[1] and max(x for x in args if isinstance(x, int)) < 2**31:
        _compiled[key] = compiled, [constants[name] for name in kernel.arg_names if name in constants]


def forward(q: Tensor, k: Tensor, v: Tensor, gf: Tensor, gb: Tensor, scale: float, normalizer: float, o: Tensor) -> None:
    """Write the output for ``[B, N, H, K or V]`` inputs into ``o``, of v's shape."""
    batch, num_tokens, heads, key_dim = q.shape
    value_dim = v.shape[-1]
    if batch == 0:
        return
    p = plan(key_dim, value_dim, v.dtype)
    chunks, block_t = p['chunks'], p['output']['BT']
    inputs = (*(addressable(x, block_t) for x in (q, k, v, gf, gb)), o)
    unit = alignment(inputs)
    common = (scale / 2, 1 / normalizer)
    strides = element_strides(inputs, unit)
    num_segments = triton.cdiv(num_tokens, block_t * chunks)
    n_states = batch * heads * num_segments
    key = compile_key(v, gf, gb, unit)
    with torch.cuda.device_of(q):
        state = None
        if num_segments > 1:
            state = v.new_empty(2, n_states, key_dim, value_dim, dtype=p['state_dtype'])
            make_states(inputs, state, num_segments, chunks, strides, common, unit, key, p)
        n_chunks = batch * heads * triton.cdiv(num_tokens, block_t)
        strong = v.new_empty(n_chunks, dtype=torch.uint8)
        sizes = (num_tokens, heads, n_states, n_chunks)
        pointers = (*inputs, v if state is None else state, strong)
        constants = {'NC': chunks, 'UNIT': unit, 'SWAP': False}
        blocks_v = triton.cdiv(value_dim, p['output']['BV'])
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
        kernels.states_kernel, key, (n_states, triton.cdiv(value_dim, p['states']['BV']), 1),
        (*inputs, state, decay, num_tokens, heads, n_states, *strides, *common),
        {**p['states'], 'NC': chunks, 'UNIT': unit, 'BACKWARD': kinds == 4},
    )  # fmt: skip
    blocks = triton.cdiv(key_dim * value_dim, p['scan']['BE'])
    args = (state, decay, num_segments, n_states)
    launch(kernels.scan_kernel, key, (blocks, n_states // num_segments, kinds), args, p['scan'])


def mild_then_strong(kernel, key, n_chunks, rest, args, constants, strong, exact) -> None:
    """Run ``kernel`` on all chunks in the factored form, then on those it marked as too strong for that; by levels on
    all if ``exact``."""
    if exact:
        strong.fill_(1)
        launch(kernel, key, (n_chunks, *rest, 1), args, {**constants, 'STRONG': True, 'GROUP': 1})
    else:
        launch(kernel, key, (n_chunks, *rest, 1), args, {**constants, 'STRONG': False, 'GROUP': 1})
        launch(kernel, key, (triton.cdiv(n_chunks, 16), *rest, 1), args, {**constants, 'STRONG': True, 'GROUP': 16})


def backward(
    do: Tensor, q: Tensor, k: Tensor, v: Tensor, gf: Tensor, gb: Tensor, scale: float, normalizer: float, grads: tuple
) -> None:
    """Write the gradients into ``grads``: dq, dk, dv, dgf, dgb, in the inputs' shapes."""
    batch, num_tokens, heads, key_dim = q.shape
    value_dim = v.shape[-1]
    if batch == 0:
        return
    p = plan(key_dim, value_dim, v.dtype)
    block_t = p['output']['BT']
    q, k, v, gf, gb, do = inputs = tuple(addressable(x, block_t) for x in (q, k, v, gf, gb, do))
    dq, dk, dv, dgf, dgb = grads
    unit = alignment((*inputs, *grads))
    common = (scale / 2, 1 / normalizer)
    num_chunks = triton.cdiv(num_tokens, block_t)
    n_chunks = batch * heads * num_chunks
    strides = element_strides(inputs, unit)
    key = compile_key(v, gf, gb, unit)
    with torch.cuda.device_of(q):
        state = v
        if num_chunks > 1:
            state = v.new_empty(4, n_chunks, key_dim, value_dim, dtype=p['state_dtype'])
            make_states(inputs, state, num_chunks, 1, strides, common, unit, key, p)
        strong = v.new_empty(n_chunks, dtype=torch.uint8)
        sizes = (num_tokens, heads, n_chunks, n_chunks)
        swapped = (q, k, do, gf, gb, dv)
        mild_then_strong(
            kernels.output_kernel, key, n_chunks, (triton.cdiv(value_dim, p['output']['BV']),),
            (*swapped, state, strong, *sizes, *element_strides(swapped, unit), *common),
            {**p['output'], 'NC': 1, 'UNIT': unit, 'SWAP': True}, strong, p['exact'],
        )  # fmt: skip
        outputs = (dq, dk, dgf, dgb)
        mild_then_strong(
            kernels.gradient_kernel, key, n_chunks, (1,),
            (*inputs, *outputs, state, strong, *sizes, *strides, *element_strides(outputs, unit), *common),
            {**p['gradient'], 'UNIT': unit}, strong, p['exact'],
        )  # fmt: skip


def compile_key(v: Tensor, gf: Tensor, gb: Tensor, unit: int) -> tuple:
    """What kernels are compiled for besides constants; () where Triton must look at the arguments itself."""
    return (v.device, v.dtype, gf.dtype, gb.dtype) if unit > 1 else ()


def addressable(x: Tensor, block_t: int) -> Tensor:
    """``x``, copied only if its last dimension is strided or a chunk's tokens lie too far apart."""
    if x.stride(-1) != 1 and x.shape[-1] > 1 or x.stride(1) * block_t >= MAX_CHUNK_SPAN:
        return x.contiguous()
    return x


def alignment(tensors: tuple) -> int:
    """Largest of 8, 2 and 1 elements that divides every offset of a token's head in all tensors."""
    for unit in (8, 2):
        if all(
            x.data_ptr() % 16 == 0 and all(s % unit == 0 for s, n in zip(x.stride()[:3], x.shape, strict=False) if n > 1)
            for x in tensors
        ):
            return unit
    return 1


def element_strides(tensors: tuple, unit: int) -> list[int]:
    """Strides of batch, token and head of each tensor in units; 0 where there is one."""
    return [s // unit if n > 1 else 0 for x in tensors for s, n in zip(x.stride()[:3], x.shape, strict=False)]


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
    do: Tensor, q: Tensor, k: Tensor, v: Tensor, g_fwd: Tensor, g_bwd: Tensor, scale: float, normalizer: float
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of :func:`bigla_op`, each contiguous."""
    grads = tuple(x.new_empty(x.shape) for x in (q, k, v, g_fwd, g_bwd))
    backward(do, q, k, v, g_fwd, g_bwd, scale, normalizer, grads)
    return grads


@bigla_backward_op.register_fake
def _(do, q, k, v, g_fwd, g_bwd, scale, normalizer):
    return tuple(x.new_empty(x.shape) for x in (q, k, v, g_fwd, g_bwd))


def _save(ctx, inputs, output):
    *tensors, ctx.scale, ctx.normalizer = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx, do):
    return *bigla_backward_op(do, *ctx.saved_tensors, ctx.scale, ctx.normalizer), None, None


def _no_double_backward(ctx, *grads):
    raise RuntimeError("bigla's Triton backend has no second derivative; use backend='chunked' for it")


bigla_op.register_autograd(_backward, setup_context=_save)
bigla_backward_op.register_autograd(_no_double_backward)
