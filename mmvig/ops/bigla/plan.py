"""How BiGLA's kernels are launched: sizes of blocks, numbers of programs, and where tensors lie.

Importing this module imports Triton.
"""

import functools
import math

import torch
import triton
from torch import Tensor

from mmvig.ops.launch import INTERPRETED, Constants, ceil_div, multiprocessors
from mmvig.ops.persistent import persistent_cache

# Largest number of elements between a chunk's first and last token: offsets within a chunk are 32-bit.
MAX_CHUNK_SPAN = 2**31


@functools.lru_cache(maxsize=256)
def plan(key_dim: int, value_dim: int, dtype: torch.dtype) -> dict:
    """Block sizes and precisions for one (K, V, dtype), fixed so that nothing is tuned at run time.

    K = 16 and 32 are tuned on an H200, other widths only known to be right.
    """
    block_k = max(16, triton.next_power_of_2(key_dim))
    block_v = max(16, triton.next_power_of_2(value_dim))
    block_t = 64 if block_k <= 32 else 32 if block_k <= 64 else 16
    if INTERPRETED:
        block_t = 16  # seams between chunks with few tokens
    block_v = min(block_v, 64 if block_k <= 64 else 32)
    mode = {torch.bfloat16: 'bf16', torch.float16: 'tf32', torch.float32: 'tf32x3'}[dtype]
    state_dtype = torch.bfloat16 if dtype == torch.bfloat16 else torch.float32
    # As many chunks a segment as keep its two states within 2/5 of its inputs.
    state_bytes = 2 * key_dim * value_dim * state_dtype.itemsize
    chunk_bytes = (4 * key_dim + value_dim) * dtype.itemsize * block_t
    chunks = 1
    while chunks < 8 and state_bytes > 0.4 * chunk_bytes * chunks:
        chunks *= 2
    blocks = {'K': key_dim, 'V': value_dim, 'BT': block_t, 'BK': block_k, 'BV': block_v, 'MODE': mode}
    # With chunks of 64, two warps of the gradients' kernel spill registers.
    back = {**blocks, 'BT': min(block_t, 32)}
    parts = 2 if block_k == 16 else 1
    pair_mode = 'tf32x3' if dtype == torch.float32 else 'tf32'
    of_states = 'states', 'back_states', 'walk', 'back_walk', 'short_back_walk'
    # States of chunks of 32 tokens, twice as many, are no more memory where they fit into the output's.
    in_output = mode == 'bf16' and 2 * key_dim <= 32 and block_v <= 32
    # Warps, stages of loads, and the most registers of each kernel.
    if block_k == 16:
        warps = {
            'states': (1, 2) if mode == 'tf32x3' else (1, 2, 160),
            'back_states': (1, 2),
            'walk': (1, 2, 168) if in_output else (1, 3) if mode == 'tf32' else (2, 3),
            'back_walk': (2, 3),
            'short_back_walk': (2, 3) if mode == 'tf32x3' else (1, 2, 128),
            'output': (2, 2) if block_v > 32 else (4, {'bf16': 3, 'tf32': 2, 'tf32x3': 1}[mode], 168),
            'walked_output': (2, 3, 168),
            'gradient': (2, 3) if mode == 'bf16' else (2, 2),
        }
    elif block_k == 32:
        warps = {
            'states': (4, 3) if mode == 'bf16' else (4, 1),
            'back_states': (2, 3) if mode == 'bf16' else (2, 2),
            'walk': (2, 2),
            'back_walk': (2, 2),
            'short_back_walk': (2, 2),
            'output': (4, 3) if mode == 'bf16' else (4, 2),
            'gradient': (2, 2) if mode == 'bf16' else (2, 1),
        }
    else:
        warps = dict.fromkeys((*of_states, 'output', 'gradient'), (4, 1))
    # How many programs an H200's multiprocessor holds at once, as registers and shared memory allow.
    programs = {'states': 12, 'back_states': 8, 'output': 3, 'walked_output': 5, 'gradient': 4}
    if block_k > 16:
        programs = {'states': 3, 'back_states': 4, 'output': 2, 'gradient': 4}
    warps = {
        name: dict(zip(('num_warps', 'num_stages', 'maxnreg'), numbers, strict=False))
        for name, numbers in warps.items()
    }
    for name in of_states:
        warps[name]['ONE_WARP'] = warps[name]['num_warps'] == 1
    both = {
        'output': {**blocks, 'PAIR_MODE': pair_mode, **warps['output']},
        # 32 values at once, as K = 32 is short of registers.
        'gradient': {**back, 'BV': min(block_v, 32), 'PAIR_MODE': pair_mode, **warps['gradient']},
    }
    walked = {**blocks, 'BT': 32} if in_output else blocks
    if in_output:
        both['walked_output'] = {**walked, 'PAIR_MODE': pair_mode, **warps['walked_output']}
    # No stages of loads, as this form hardly waits for any. K = 32: two warps, since with four Triton 3.6
    # makes kernels that read wrong addresses on Hopper.
    strong = {'num_warps': 2 if block_k == 32 else 4, 'num_stages': 1, 'maxnreg': None}
    return {
        'NC': chunks,
        'share': state_bytes / (chunk_bytes * chunks),
        'programs': programs,
        'in_output': in_output,
        'state_dtype': state_dtype,
        'states': {**blocks, 'BT': block_t // parts, 'PARTS': parts, 'PAIR_MODE': mode, **warps['states']},
        'back_states': {**back, 'PARTS': 1, 'PAIR_MODE': pair_mode, **warps['back_states']},
        'walk': {**walked, 'PAIR_MODE': mode, **warps['walk']},
        'back_walk': {**back, 'PAIR_MODE': pair_mode, **warps['back_walk']},
        'short_back_walk': {**back, 'PAIR_MODE': pair_mode, **warps['short_back_walk']},
        **both,
        **{f'strong_{name}': {**constants, **strong} for name, constants in both.items()},
        'scan': {'K': key_dim, 'V': value_dim, 'BV': max(16, triton.next_power_of_2(value_dim))},
    }


@functools.lru_cache(maxsize=4096)
def constants_of(key_dim: int, value_dim: int, dtype: torch.dtype, name: str, **more) -> Constants:
    """All constants of the kernel that :func:`plan` calls ``name``."""
    return Constants(plan(key_dim, value_dim, dtype)[name], **more)


# Segments and numbers of each that a program of the scan takes at once, by how many segments there are at
# most: few sequences are long.
SCANS = {
    128: {'BN': 2, 'BS': 16, 'WIDTH': 64, 'num_warps': 1, 'num_stages': 1},
    float('inf'): {'BN': 8, 'BS': 16, 'WIDTH': 1, 'num_warps': 4, 'num_stages': 1},
}
# Most segments or chunks of a program, where that is not 64: short programs share the memory better.
MAX_RUNS = {'states': 4}
# Sums of chunks, of K channels each, that a program looks through for strong gates.
GROUP = 2048
# Tokens of the longest sequences whose states are walked; the number of sequences must not decide, as
# the rounding of states differs and an image's result would depend on its batch. 784 tokens come in many
# images of 224 x 224 and are better walked, 950 in few large ones and better scanned.
MAX_WALK = 32 if INTERPRETED else 800
MAX_SHORT_WALK = 256
# Bytes of states from which on a forward pass takes half a batch at a time, if they are more than a quarter
# of its inputs: half the memory for a twentieth of the time.
MAX_STATES = 2**24


@persistent_cache
def tables(device: torch.device, block_t: int) -> tuple[Tensor, Tensor, Tensor]:
    """Constants of the kernels: tables [5, BT, BT], BEFORE in bf16, and masks of queries [2, BT, BT]."""
    row = torch.arange(block_t, device=device)[:, None]
    column = row.T
    balanced = (column <= row).float() - 0.5
    sums = [balanced, column <= row, column > row, column < row, column >= row]
    sums = torch.stack(sums).to(torch.float16)
    before = (column < row).to(torch.float32 if INTERPRETED else torch.bfloat16)
    masks = -torch.stack([column <= row, column >= row]).to(torch.int16)
    return sums, before, masks


@functools.lru_cache(maxsize=4096)
def run_length(widths: tuple, name: str, n: int, sequences: int, device: torch.device) -> int:
    """How many of a sequence's n chunks or segments a program of the kernel ``name`` takes."""
    places = plan(*widths)['programs'][name]
    return fill_waves(n, sequences, places * multiprocessors(device), MAX_RUNS.get(name, 64))


def fill_waves(n: int, sequences: int, places: int, most: int = 64) -> int:
    """How many of a sequence's n chunks a program takes, at most, so that whole waves fill ``places``.

    The model, fitted to times on an H200: a last wave of a share x of all places takes (1 + x) / 2 of a
    full one's time, and a program 0.3 chunks' time besides its chunks.
    """

    def time(run: int) -> float:
        waves = ceil_div(n, run) * sequences / places
        return (run + 0.3) * (waves + math.ceil(waves)) / 2

    return min(range(1, min(n, most) + 1), key=time)


@functools.lru_cache(maxsize=4096)
def scan_constants(widths: tuple[int, int, torch.dtype], num_segments: int, chunks: int) -> Constants:
    """Constants of the scan over so many segments of so many chunks."""
    most = next(most for most in SCANS if num_segments <= most)
    blocks = dict(SCANS[most])
    rows = max(1, blocks.pop('WIDTH') // plan(*widths)['scan']['BV'])
    return constants_of(*widths, 'scan', NC=chunks, BK=rows, **blocks)


def compile_key(v: Tensor, gf: Tensor, gb: Tensor, unit: int, strides: tuple[int, ...]) -> tuple:
    """What kernels are compiled for besides constants; () where Triton must look at the arguments."""
    if unit == 1 or max(strides) >= 2**31:
        return ()
    return v.device, v.dtype, gf.dtype, gb.dtype


def address(tensors: tuple, block_t: int) -> tuple[tuple, int, tuple[int, ...], bool]:
    """The tensors (copied where a kernel cannot read them), their common unit, and their strides in units.

    ``tensors``: q, k, v, g_fwd, g_bwd, o or do, and gradients of the first five if there are any. Strides
    are those of batch, token and head of each tensor, one after the other, as the kernels take them. Last,
    whether q and k, g_fwd and g_bwd, and their gradients have the same strides.
    """
    copies, unit, strides, same = layout(tuple((x.shape, x.stride()) for x in tensors), block_t)
    if copies:
        tensors = tuple(x.contiguous() if i in copies else x for i, x in enumerate(tensors))
        return address(tensors, block_t)
    if unit > 1 and any(x.data_ptr() % 16 for x in tensors):
        return tensors, 1, tuple(s * unit for s in strides), same
    return tensors, unit, strides, same


@functools.lru_cache(maxsize=4096)
def layout(shapes_and_strides: tuple, block_t: int) -> tuple[tuple[int, ...], int, tuple[int, ...], bool]:
    """Which tensors must be copied, the largest of 8, 2, 1 to divide all strides, and as in address()."""
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
    of_q, of_k, _, of_gf, of_gb, _, *of_grads = batched(strides, 3)
    same = of_q == of_k and of_gf == of_gb
    if of_grads:
        same = same and of_q == of_grads[0] == of_grads[1] and of_gf == of_grads[3] == of_grads[4]
    return copies, unit, tuple(s // unit for s in strides), same


def batched(items: tuple, n: int) -> list[tuple]:
    """Runs of ``n`` items (itertools.batched needs Python 3.12)."""
    return [items[i : i + n] for i in range(0, len(items), n)]
