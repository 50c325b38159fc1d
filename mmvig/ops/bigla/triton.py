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
    return {
        'chunks': chunks,
        'state_dtype': state_dtype,
        'state_mode': pair_mode,
        'blocks': {'K': key_dim, 'V': value_dim, 'BT': block_t, 'BK': block_k, 'BV': block_v},
        'states': {'R': 4, 'num_warps': 4},
        'output': {'R': 4, 'num_warps': 4},
        'gradient': {'R': 8, 'num_warps': 2},
        'modes': {'PAIR_MODE': pair_mode, 'MODE': mode},
        'exact': dtype == torch.float32,
    }


def forward(q: Tensor, k: Tensor, v: Tensor, gf: Tensor, gb: Tensor, scale: float, normalizer: float, o: Tensor) -> None:
    """Write the output for ``[B, N, H, K or V]`` inputs into ``o``, of v's shape."""
    batch, num_tokens, heads, key_dim = q.shape
    value_dim = v.shape[-1]
    if batch == 0:
        return
    p = plan(key_dim, value_dim, v.dtype)
    blocks = p['blocks']
    q, k, v, gf, gb = (addressable(x, blocks['BT']) for x in (q, k, v, gf, gb))
    chunks = p['chunks']
    num_segments = triton.cdiv(num_tokens, blocks['BT'] * chunks)
    inputs = (q, k, v, gf, gb, o)
    unit = alignment(inputs)
    strides = [s for x in inputs for s in element_strides(x, unit)]
    constants = {'UNIT': unit, 'EXACT': p['exact'], 'NC': chunks, **blocks}
    factors = (scale / 2, 1 / normalizer)
    n_states = batch * heads * num_segments
    v_blocks = triton.cdiv(value_dim, blocks['BV'])
    with device_of(q):
        state = v
        if num_segments > 1:
            state = v.new_empty(2, n_states, key_dim, value_dim, dtype=p['state_dtype'])
            decay = v.new_empty(2, n_states, key_dim, dtype=torch.float32)
            kernels.states_kernel[(n_states, v_blocks)](
                *inputs, state, decay, num_tokens, heads, n_states, *strides, *factors,
                MODE=p['state_mode'], BACKWARD=False, **constants, **p['states'], num_stages=1,
            )  # fmt: skip
            scan(state, decay, batch * heads, num_segments)
        num_chunks = triton.cdiv(num_tokens, blocks['BT'])
        kernels.output_kernel[(batch * heads * num_chunks, v_blocks)](
            *inputs, state, num_tokens, heads, n_states, *strides, *factors,
            **p['modes'], **constants, **p['output'], num_stages=1,
        )  # fmt: skip


def backward(
    do: Tensor, q: Tensor, k: Tensor, v: Tensor, gf: Tensor, gb: Tensor, scale: float, normalizer: float, grads: tuple
) -> None:
    """Write the gradients into ``grads``: dq, dk, dv, dgf, dgb, in the inputs' shapes."""
    batch, num_tokens, heads, key_dim = q.shape
    value_dim = v.shape[-1]
    if batch == 0:
        return
    p = plan(key_dim, value_dim, v.dtype)
    blocks = p['blocks']
    q, k, v, gf, gb, do = inputs = tuple(addressable(x, blocks['BT']) for x in (q, k, v, gf, gb, do))
    num_chunks = triton.cdiv(num_tokens, blocks['BT'])
    unit, out_unit = alignment(inputs), alignment(grads)
    strides = [s for x in inputs for s in element_strides(x, unit)]
    out_strides = [s for x in grads for s in element_strides(x, out_unit)]
    constants = {'UNIT': unit, 'EXACT': p['exact'], **blocks}
    factors = (scale / 2, 1 / normalizer)
    n_states = batch * heads * num_chunks
    with device_of(q):
        state = v
        if num_chunks > 1:
            state = v.new_empty(4, n_states, key_dim, value_dim, dtype=p['state_dtype'])
            decay = v.new_empty(2, n_states, key_dim, dtype=torch.float32)
            kernels.states_kernel[(n_states, triton.cdiv(value_dim, blocks['BV']))](
                *inputs, state, decay, num_tokens, heads, n_states, *strides, *factors,
                MODE=p['state_mode'], BACKWARD=True, NC=1, **constants, **p['states'], num_stages=1,
            )  # fmt: skip
            scan(state, decay, batch * heads, num_chunks)
        kernels.gradient_kernel[(n_states,)](
            *inputs, *grads, state, num_tokens, heads, n_states, *strides, *out_strides, *factors,
            OUT_UNIT=out_unit, **p['modes'], **constants, **p['gradient'], num_stages=1,
        )  # fmt: skip


def scan(state: Tensor, decay: Tensor, num_sequences: int, num_segments: int) -> None:
    """Turn ``state [2 or 4, B * H * segments, K, V]`` from what segments add into what leaves them, in place."""
    kinds, n_states, key_dim, value_dim = state.shape
    block = 32
    kernels.scan_kernel[(triton.cdiv(key_dim * value_dim, block), num_sequences, kinds)](
        state, decay, num_segments, n_states, K=key_dim, V=value_dim, BS=64, BE=block, num_warps=4
    )


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


def element_strides(x: Tensor, unit: int) -> list[int]:
    """Strides of batch, token and head in units; 0 where there is one."""
    batch, token, head = (s // unit if n > 1 else 0 for s, n in zip(x.stride()[:3], x.shape, strict=False))
    return [batch, token, head]


def device_of(x: Tensor) -> torch.cuda.device:
    """Launch on the tensors' device, not the current one."""
    return torch.cuda.device_of(x)


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
