"""BiGLA chunk by chunk in plain PyTorch: any device, linear in N, exportable, nothing overflows.

Every decay in the general form is the exponential of a sum of log gates over exactly the tokens between two
positions. The sums are products with constant 0/1 matrices, never differences of running sums, so no
exponent is positive and none loses digits, however strong the gates are. See README.md beside this file.
"""

from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from mmvig.ops.bigla.gates import log_gate
from mmvig.ops.plain import is_watched

# Tokens per chunk: the pairwise decays take K * CHUNK floats a token, the states K * V / CHUNK.
CHUNK = 8
# Chunks that are solved at once by their pairwise decays, and how many may be without grouping.
GROUP = 16
UNGROUPED = 32
# The strongest log decay of a token: exp() of it is 0 in any dtype. So none is -inf, which times 0 is NaN.
STRONGEST = -1000.0
# Doubling steps in a traced graph, where N is symbolic: enough for 2^20 groups, 134 million tokens.
TRACED_STEPS = 20


def general_forward(
    q: Tensor, k: Tensor, v: Tensor, g_fwd: Tensor, g_bwd: Tensor, scale: float, normalizer: float
) -> Tensor:
    """Both directions in one pass over chunks of tokens.

    Arguments and result are those of :func:`mmvig.ops.bigla.bigla`, already validated. Computes in
    float32 (float64 if ``v`` is float64), and looks at no value.
    """
    compute_dtype = torch.float64 if v.dtype == torch.float64 else torch.float32
    num_tokens = q.shape[1]
    q_c = _split(q.to(compute_dtype) * (scale / 2))  # [B, n, H, K, C]
    k_c = _split(k.to(compute_dtype))
    v_c = _split(v.to(compute_dtype)).transpose(-1, -2)  # [B, n, H, C, V]
    # Padding has log decay 0 and k = v = 0: it changes no state.
    la, lb = (_split(_log_decay(g.to(compute_dtype), normalizer)).contiguous() for g in (g_fwd, g_bwd))

    o = _within_chunk(q_c, k_c, la, lb) @ v_c  # [B, n, H, C, V]
    o = o + _from_other_chunks(q_c, k_c, v_c, la, reverse=False)
    o = o + _from_other_chunks(q_c, k_c, v_c, lb, reverse=True)

    o = o.transpose(2, 3).flatten(1, 2)  # [B, n * C, H, V]
    # Not a slice: a traced graph would need a proof that it is no longer than the padded sequence.
    return o.index_select(1, torch.arange(num_tokens, device=o.device)).to(v.dtype)


def _log_decay(g: Tensor, normalizer: float) -> Tensor:
    return (log_gate(g) / normalizer).clamp_min(STRONGEST)


def _split(x: Tensor) -> Tensor:
    """[B, N, H, D] -> [B, n, H, D, C], zeros after the last token."""
    num_tokens = x.shape[1]
    if torch.compiler.is_compiling():
        block = CHUNK * GROUP
        num_blocks = (num_tokens + 2 * block - 1) // block  # never 1, on which tracing specialises
        num_chunks = num_blocks * GROUP
    else:
        num_chunks = -(-num_tokens // CHUNK)
    x = F.pad(x, (0, 0, 0, 0, 0, num_chunks * CHUNK - num_tokens))
    return x.unflatten(1, (num_chunks, CHUNK)).permute(0, 1, 3, 4, 2)


def _within_chunk(q: Tensor, k: Tensor, la: Tensor, lb: Tensor) -> Tensor:
    """A[t, s] = q_t . (decay(t, s) * k_s) for all pairs of a chunk, both directions in one matrix.

    Args:
        q, k, la, lb: ``[B, n, H, K, C]``.

    Returns:
        ``[B, n, H, C, C]``; the diagonal counts twice, once for each direction.
    """
    fwd, bwd = (_masks(CHUNK, reverse, q) for reverse in (False, True))
    log_decay = F.linear(la, fwd['to']) + F.linear(lb, bwd['to'])
    decay = log_decay.exp().unflatten(-1, (CHUNK, CHUNK))
    return (q[..., :, None] * decay * k[..., None, :]).sum(-3) * fwd['twice']


def _from_other_chunks(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, reverse: bool) -> Tensor:
    """What the tokens of all earlier chunks (later ones if ``reverse``) add to the output.

    Args:
        q, k, log_decay: ``[B, n, H, K, C]``.
        v: ``[B, n, H, C, V]``.

    Returns:
        ``[B, n, H, C, V]``.
    """
    masks = _masks(CHUNK, reverse, q)
    update = (k * F.linear(log_decay, masks['after']).exp()) @ v  # [B, n, H, K, V]
    state = entry_states(log_decay.sum(-1), update, reverse)
    return (q * F.linear(log_decay, masks['upto']).exp()).transpose(-1, -2) @ state


def entry_states(log_decay: Tensor, update: Tensor, reverse: bool, grouped: bool = False) -> Tensor:
    """State at each chunk's entry: S_(c+1) = exp(log_decay_c) S_c + update_c, S = 0 at the first.

    ``reverse`` walks from the last chunk to the first. A group of chunks is solved at once by its pairwise
    decays; the entry states of the groups are the same problem, GROUP times smaller (``grouped``).

    Args:
        log_decay: ``[B, n, H, K]``.
        update: ``[B, n, H, K, V]``.

    Returns:
        ``[B, n, H, K, V]``.
    """
    num_chunks = log_decay.shape[1]
    tracing = torch.compiler.is_compiling()
    if tracing and grouped:
        return _entry_states_by_doubling(log_decay, update, reverse)
    alone = not tracing and num_chunks <= UNGROUPED
    size = num_chunks if alone else GROUP
    pad = 0 if tracing else -num_chunks % size  # a traced sequence is split into whole groups
    d = F.pad(log_decay, (0, 0, 0, 0, 0, pad)).unflatten(1, (-1, size))
    d = d.permute(0, 1, 3, 4, 2).contiguous()  # [B, m, H, K, G]
    u = F.pad(update, (0, 0, 0, 0, 0, 0, 0, pad)).unflatten(1, (-1, size))
    u = u.permute(0, 1, 3, 4, 2, 5)  # [B, m, H, K, G, V]

    masks = _masks(size, reverse, d)
    between = F.linear(d, masks['between']).exp().unflatten(-1, (size, size))
    state = (between * masks['prior']) @ u  # [B, m, H, K, G, V]
    if not alone:
        group_update = F.linear(d, masks['after']).exp()[..., None, :] @ u
        carry = entry_states(d.sum(-1), group_update.squeeze(-2), reverse, grouped=True)
        state = state + F.linear(d, masks['prior']).exp()[..., None] * carry[..., None, :]
    state = state.permute(0, 1, 4, 2, 3, 5).flatten(1, 2)
    return state[:, :num_chunks] if pad else state


def _entry_states_by_doubling(log_decay: Tensor, update: Tensor, reverse: bool) -> Tensor:
    """The same in a fixed number of steps: step i joins each run of 2^i chunks to the run before it.

    A traced graph cannot nest groups to a depth that depends on N.
    """
    num_chunks = log_decay.shape[1]
    position = torch.arange(num_chunks, device=log_decay.device)

    def before(x: Tensor, distance: int) -> Tensor:
        source = position + distance if reverse else position - distance
        inside = (source >= 0) & (source < num_chunks)
        x_before = x[:, source.clamp(0, num_chunks - 1)]
        return x_before * inside.view(-1, *[1] * (x.ndim - 2))

    decay, state = log_decay.exp()[..., None], update
    for i in range(TRACED_STEPS):
        state = state + decay * before(state, 2**i)
        decay = decay * before(decay, 2**i)
    return before(state, 1)


def _masks(size: int, reverse: bool, like: Tensor) -> dict[str, Tensor]:
    """0/1 matrices that sum log gates over part of a run of ``size``, in ``like``'s dtype and device."""
    # A tracer would record them being made the first time only.
    traced = torch.compiler.is_compiling() or is_watched()
    make = _make_masks.__wrapped__ if traced else _make_masks
    return make(size, reverse, like.dtype, like.device)


@cache  # for good: CUDA graphs read them
def _make_masks(size: int, reverse: bool, dtype: torch.dtype, device: torch.device) -> dict[str, Tensor]:
    """Rows of a matrix are what F.linear sums to: positions t, or pairs of positions (t, s).

    Positions count in walking order, which ``reverse`` turns round.
    """
    with torch.inference_mode(False):  # kept for later calls, which may need gradients
        i = torch.arange(size, device=device)
        i = size - 1 - i if reverse else i
        t, s = i[:, None, None], i[:, None]  # the last dimension, j, is the gate
        masks = {
            'to': ((s < i) & (i <= t)).flatten(0, 1),  # from a token to a later one
            'between': ((s < i) & (i < t)).flatten(0, 1),  # strictly between two chunks
            'upto': i <= i[:, None],  # from the entry to a token
            'prior': i < i[:, None],  # from the entry to a chunk's entry; also, which chunks come before
            'after': i > i[:, None],  # from a token or chunk to the exit
            'twice': torch.eye(size, device=device) + 1,
        }
        return {name: mask.to(dtype) for name, mask in masks.items()}
