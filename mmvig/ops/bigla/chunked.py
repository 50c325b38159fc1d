"""BiGLA chunk by chunk in plain PyTorch: any device, linear in N, exportable, nothing overflows.

Every decay here is the exponential of a sum of log gates over exactly the tokens that lie between two
positions. The sums are products with constant 0/1 matrices, never differences of running sums, so no
exponent is positive and none loses digits, however strong the gates are. See README.md beside this file.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

# Tokens per chunk: the pairwise decays take K * CHUNK floats a token, the states K * V / CHUNK.
CHUNK = 8
# Chunks that are solved at once by their pairwise decays; groups of them by doubling.
GROUP = 16
# Doubling steps in a traced graph, where N is symbolic: enough for 2^20 groups, 134 million tokens.
TRACED_STEPS = 20


def bigla_chunked(
    q: Tensor, k: Tensor, v: Tensor, g_fwd: Tensor, g_bwd: Tensor, scale: float, normalizer: float
) -> Tensor:
    """Both directions in one pass over chunks of tokens.

    Arguments and result are those of :func:`mmvig.ops.bigla.bigla`, already validated. Computes in
    float32 (float64 if ``v`` is float64), under autocast too. Training keeps only the inputs and
    computes the rest again in the backward pass.
    """
    inputs = (q, k, v, g_fwd, g_bwd)
    if torch.is_grad_enabled() and any(x.requires_grad for x in inputs):
        return checkpoint(
            _forward, *inputs, scale, normalizer, use_reentrant=False, preserve_rng_state=False
        )
    return _forward(*inputs, scale, normalizer)


def _forward(
    q: Tensor, k: Tensor, v: Tensor, g_fwd: Tensor, g_bwd: Tensor, scale: float, normalizer: float
) -> Tensor:
    with torch.autocast(v.device.type, enabled=False):
        compute_dtype = torch.float64 if v.dtype == torch.float64 else torch.float32
        num_tokens = q.shape[1]
        q_c = _split(q.to(compute_dtype) * (scale / 2))  # [B, n, H, K, C]
        k_c = _split(k.to(compute_dtype))
        v_c = _split(v.to(compute_dtype)).transpose(-1, -2)  # [B, n, H, C, V]
        # Padding has log decay 0 and k = v = 0: it changes no state.
        la = _split(F.logsigmoid(g_fwd.to(compute_dtype)) / normalizer).contiguous()
        lb = _split(F.logsigmoid(g_bwd.to(compute_dtype)) / normalizer).contiguous()

        o = _within_chunk(q_c, k_c, la, lb) @ v_c  # [B, n, H, C, V]
        o = o + _from_other_chunks(q_c, k_c, v_c, la, reverse=False)
        o = o + _from_other_chunks(q_c, k_c, v_c, lb, reverse=True)

        o = o.transpose(2, 3).flatten(1, 2)  # [B, n * C, H, V]
        # Not a slice: a traced graph would need a proof that it is no longer than the padded sequence.
        return o.index_select(1, torch.arange(num_tokens, device=o.device)).to(v.dtype)


def _split(x: Tensor) -> Tensor:
    """[B, N, H, D] -> [B, n, H, D, C], zeros after the last token, n a multiple of the group's size."""
    num_tokens = x.shape[1]
    block = CHUNK * _group_size(num_tokens)
    if torch.compiler.is_compiling():
        num_blocks = (num_tokens + 2 * block - 1) // block  # never 1, on which tracing specialises
    else:
        num_blocks = -(-num_tokens // block)
    x = F.pad(x, (0, 0, 0, 0, 0, num_blocks * block - num_tokens))
    return x.unflatten(1, (num_blocks * (block // CHUNK), CHUNK)).permute(0, 1, 3, 4, 2)


def _group_size(num_tokens: int) -> int:
    """Chunks in a group: GROUP, or all of them if they are fewer."""
    if torch.compiler.is_compiling():
        return GROUP
    return min(GROUP, -(-num_tokens // CHUNK))


def _sum_where(mask: Tensor, x: Tensor) -> Tensor:
    """Sums of ``x [..., C]`` over subsets of C: ``mask [C, ...]`` -> ``[..., prod(...)]``."""
    return F.linear(x, mask.flatten(1).T.to(x.dtype))


def _num_blocks(length: int, size: int) -> int:
    """Blocks of ``size`` that cover ``length``."""
    if torch.compiler.is_compiling():
        return (
            length + 2 * size - 1
        ) // size  # never 0 or 1, on which a traced graph would specialise
    return -(-length // size)


def _within_chunk(q: Tensor, k: Tensor, la: Tensor, lb: Tensor) -> Tensor:
    """A[t, s] = q_t . (decay(t, s) * k_s) for all pairs of a chunk, both directions in one matrix.

    Args:
        q, k, la, lb: ``[B, n, H, K, C]``.

    Returns:
        ``[B, n, H, C, C]``; the diagonal counts twice, once for each direction.
    """
    i = torch.arange(CHUNK, device=q.device)
    j, t, s = i[:, None, None], i[:, None], i
    log_decay = _sum_where((s < j) & (j <= t), la) + _sum_where((t <= j) & (j < s), lb)
    decay = log_decay.exp().unflatten(-1, (CHUNK, CHUNK))
    twice = torch.eye(CHUNK, dtype=q.dtype, device=q.device) + 1
    return (q[..., :, None] * decay * k[..., None, :]).sum(-3) * twice


def _from_other_chunks(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, reverse: bool) -> Tensor:
    """What the tokens of all earlier chunks (later ones if ``reverse``) add to the output.

    Args:
        q, k, log_decay: ``[B, n, H, K, C]``.
        v: ``[B, n, H, C, V]``.

    Returns:
        ``[B, n, H, C, V]``.
    """
    i = torch.arange(CHUNK, device=q.device)
    if reverse:
        i = CHUNK - 1 - i
    upto = _sum_where(i[:, None] <= i, log_decay)  # gates between the chunk's entry and a token
    after = _sum_where(i[:, None] > i, log_decay)  # gates between a token and the chunk's exit
    update = (k * after.exp()) @ v  # [B, n, H, K, V]
    state = _entry_states(log_decay.sum(-1), update, reverse)
    return (q * upto.exp()).transpose(-1, -2) @ state


def _entry_states(log_decay: Tensor, update: Tensor, reverse: bool) -> Tensor:
    """State at each chunk's entry: S_(c+1) = exp(log_decay_c) S_c + update_c, S = 0 at the first.

    ``reverse`` walks from the last chunk to the first.

    Args:
        log_decay: ``[B, n, H, K]``.
        update: ``[B, n, H, K, V]``.

    Returns:
        ``[B, n, H, K, V]``.
    """
    size = _group_size(log_decay.shape[1] * CHUNK)
    d = log_decay.unflatten(1, (-1, size)).permute(0, 1, 3, 4, 2).contiguous()  # [B, m, H, K, G]
    u = update.unflatten(1, (-1, size)).permute(0, 1, 3, 4, 2, 5)  # [B, m, H, K, G, V]

    i = torch.arange(size, device=d.device)
    if reverse:
        i = size - 1 - i
    j, t, s = i[:, None, None], i[:, None], i
    between = _sum_where((s < j) & (j < t), d)  # [B, m, H, K, G * G]
    state = (between.exp().unflatten(-1, (size, size)) * (s < t)) @ u  # [B, m, H, K, G, V]

    group_update = _sum_where(i[:, None] > i, d).exp()[..., None, :] @ u
    carry = _entry_states_of_groups(d.sum(-1), group_update.squeeze(-2), reverse)
    state = state + _sum_where(i[:, None] < i, d).exp()[..., None] * carry[..., None, :]
    return state.permute(0, 1, 4, 2, 3, 5).flatten(1, 2)


def _entry_states_of_groups(log_decay: Tensor, update: Tensor, reverse: bool) -> Tensor:
    """The same for groups, by doubling: step i joins each run of 2^i groups to the run before it.

    Args:
        log_decay: ``[B, m, H, K]``.
        update: ``[B, m, H, K, V]``.

    Returns:
        ``[B, m, H, K, V]``.
    """
    num_groups = log_decay.shape[1]
    steps = TRACED_STEPS if torch.compiler.is_compiling() else (num_groups - 1).bit_length()
    position = torch.arange(num_groups, device=log_decay.device)

    def before(x: Tensor, distance: int) -> Tensor:
        source = position + distance if reverse else position - distance
        inside = (source >= 0) & (source < num_groups)
        x_before = x[:, source.clamp(0, num_groups - 1)]
        return x_before * inside.view(-1, *[1] * (x.ndim - 2))

    decay, state = log_decay.exp()[..., None], update
    for i in range(steps):
        state = state + decay * before(state, 2**i)
        decay = decay * before(decay, 2**i)
    return before(state, 1)
