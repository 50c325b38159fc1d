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
# Chunks (and groups of chunks) that one level of the state scan combines.
GROUP = 16
# Levels of the scan in a traced graph, where N is symbolic: the last level takes whatever is left.
TRACED_LEVELS = 4


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
        return o[:, :num_tokens].to(v.dtype)


def _split(x: Tensor) -> Tensor:
    """[B, N, H, D] -> [B, n, H, D, C], zeros after the last token."""
    num_tokens = x.shape[1]
    num_chunks = (num_tokens + CHUNK - 1) // CHUNK
    x = F.pad(x, (0, 0, 0, 0, 0, num_chunks * CHUNK - num_tokens))
    return x.unflatten(1, (num_chunks, CHUNK)).permute(0, 1, 3, 4, 2)


def _sum_where(mask: Tensor, x: Tensor) -> Tensor:
    """Sums of ``x [..., C]`` over subsets of C: ``mask [C, ...]`` -> ``[..., prod(...)]``."""
    return F.linear(x, mask.flatten(1).T.to(x.dtype))


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
    state = _exclusive_scan(log_decay.sum(-1), update, reverse, _num_levels(q.shape[1]))
    return (q * upto.exp()).transpose(-1, -2) @ state


def _num_levels(num_chunks: int) -> int:
    """Levels of the scan: as many as N needs, or a fixed number when N may be symbolic."""
    if torch.compiler.is_compiling():
        return TRACED_LEVELS
    levels = 1
    while num_chunks > GROUP:
        num_chunks, levels = -(-num_chunks // GROUP), levels + 1
    return levels


def _exclusive_scan(log_decay: Tensor, update: Tensor, reverse: bool, levels: int) -> Tensor:
    """State at each chunk's entry: S_(c+1) = exp(log_decay_c) S_c + update_c, S = 0 at the first.

    Groups of chunks are solved at once by their pairwise decays; the groups' own entry states are
    the same problem, GROUP times smaller. ``reverse`` walks from the last chunk to the first.

    Args:
        log_decay: ``[B, n, H, K]``.
        update: ``[B, n, H, K, V]``.

    Returns:
        ``[B, n, H, K, V]``.
    """
    num_chunks = log_decay.shape[1]
    size = num_chunks if levels == 1 else GROUP
    num_groups = (num_chunks + size - 1) // size
    pad = num_groups * size - num_chunks
    d = F.pad(log_decay, (0, 0, 0, 0, 0, pad)).unflatten(1, (num_groups, size))
    d = d.permute(0, 1, 3, 4, 2).contiguous()  # [B, m, H, K, G]
    u = F.pad(update, (0, 0, 0, 0, 0, 0, 0, pad)).unflatten(1, (num_groups, size))
    u = u.permute(0, 1, 3, 4, 2, 5)  # [B, m, H, K, G, V]

    i = torch.arange(size, device=d.device)
    if reverse:
        i = size - 1 - i
    j, t, s = i[:, None, None], i[:, None], i
    between = _sum_where((s < j) & (j < t), d)  # [B, m, H, K, G * G]
    decay = between.exp().unflatten(-1, (size, size)) * (s < t)
    state = decay @ u  # [B, m, H, K, G, V]
    if levels > 1:
        group_update = _sum_where(i[:, None] > i, d).exp()[..., None, :] @ u
        carry = _exclusive_scan(d.sum(-1), group_update.squeeze(-2), reverse, levels - 1)
        state = state + _sum_where(i[:, None] < i, d).exp()[..., None] * carry[..., None, :]
    return state.permute(0, 1, 4, 2, 3, 5).flatten(1, 2)[:, :num_chunks]
