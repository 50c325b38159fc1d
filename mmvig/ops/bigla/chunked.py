"""BiGLA chunk by chunk in plain PyTorch: any device, linear in N, exportable, nothing overflows.

Every decay in the general form is the exponential of a sum of log gates over exactly the tokens between two
positions. The sums are products with constant 0/1 matrices, never differences of running sums, so no
exponent is positive and none loses digits, however strong the gates are. See README.md beside this file.
"""

import math
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

# Tokens per chunk: the pairwise decays take K * CHUNK floats a token, the states K * V / CHUNK.
CHUNK = 8
# Chunks that are solved at once by their pairwise decays, and how many may be without grouping.
GROUP = 16
UNGROUPED = 32
# The factored form on CPUs: tokens per chunk at most, fewer where the gates are too strong for the first,
# and the largest |log decay| over one. Its factors stay within exp(+-20), where float32 loses no more than
# a digit. 49 tokens of the last stage of a 224x224 image are one chunk without states.
MILD_CHUNKS = 49, 32
MILD_SPAN = 40.0
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
        reads_gates = v.device.type == 'cpu' and not torch.compiler.is_compiling() and v.numel() > 0
        if compute_dtype == torch.float32 and reads_gates:
            for most in MILD_CHUNKS:
                o = _mild_forward(q, k, v, g_fwd, g_bwd, scale, normalizer, most)
                if o is not None:
                    return o.to(v.dtype)
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


def _mild_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g_fwd: Tensor,
    g_bwd: Tensor,
    scale: float,
    normalizer: float,
    most: int = MILD_CHUNKS[0],
) -> Tensor | None:
    """The same in float32 in the factored form; None if gates are too strong for ``most`` tokens a chunk.

    decay(t, s) = exp(c_t - h) * exp(h - c_s), c the running sum of log decays and h half the chunk's.
    Reads gate values to decide, so it is for eager mode on CPUs.
    """
    num_tokens = q.shape[1]
    num_chunks = -(-num_tokens // most)
    size = -(-num_tokens // num_chunks)  # even chunks: the least padding
    pad = num_chunks * size - num_tokens

    def chunks(x: Tensor, fill: float = 0.0) -> Tensor:
        """[B, N, H, D] -> [B, n, H, C, D] in float32."""
        if pad:
            x = F.pad(x, (0, 0, 0, 0, 0, pad), value=fill)
        return x.unflatten(1, (num_chunks, size)).transpose(2, 3).to(torch.float32)

    # Both directions side by side, [B, n, H, C, 2K], as few large operators have the least overhead; sums
    # of the backward one have the other sign, so that queries take the same factors in both.
    # A logit of +inf is a log decay of 0: padding changes no state.
    key_dim = q.shape[-1]
    forward, backward = slice(key_dim), slice(key_dim, None)
    log_decay = F.logsigmoid(torch.cat((chunks(g_fwd, math.inf), chunks(g_bwd, math.inf)), -1))
    log_decay[..., forward].div_(normalizer)
    log_decay[..., backward].div_(-normalizer)
    sums = log_decay.cumsum(-2)
    halves = sums[..., -1:, :] / 2
    if not 2 * halves.abs().max().item() < MILD_SPAN:
        return None
    # Backward, the gate of the token itself does not count: the sums up to the token before it.
    sums[..., backward] -= log_decay[..., backward]
    factors = sums.sub_(halves).exp_().unflatten(-1, (2, key_dim))
    q_c, k_c, v_c = (x.contiguous() for x in (chunks(q) * (scale / 2), chunks(k), chunks(v)))
    queries = (q_c[..., None, :] * factors).flatten(-2)
    keys = (k_c[..., None, :] / factors).flatten(-2)
    pairs = queries[..., forward] @ keys[..., forward].transpose(-1, -2)
    pairs_back = queries[..., backward] @ keys[..., backward].transpose(-1, -2)
    pairs = pairs.lerp_(pairs_back, _later(size, pairs.device))
    # A token's own pair has no decay, so no gate has a gradient from it.
    pairs.diagonal(dim1=-2, dim2=-1).copy_(2 * (q_c * k_c).sum(-1))
    o = pairs @ v_c
    if num_chunks > 1:
        halves = -halves.abs().transpose(-1, -2)  # [B, n, H, 2K, 1]
        to_end = halves.exp()
        update = (keys.transpose(-1, -2) @ v_c) * to_end
        totals = 2 * halves.squeeze(-1)
        states = [
            _entry_states(totals[..., forward], update[..., forward, :], reverse=False),
            _entry_states(totals[..., backward], update[..., backward, :], reverse=True),
        ]
        o += queries @ (torch.cat(states, -2) * to_end)
    return o.transpose(2, 3).flatten(1, 2)[:, :num_tokens]


@cache
def _later(size: int, device: torch.device) -> Tensor:
    """1 where a pair's second token comes after the first, else 0: the smallest of _make_masks()'s."""
    with torch.inference_mode(False):
        return torch.ones(size, size, device=device).triu_(1)


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
    state = _entry_states(log_decay.sum(-1), update, reverse)
    return (q * F.linear(log_decay, masks['upto']).exp()).transpose(-1, -2) @ state


def _entry_states(log_decay: Tensor, update: Tensor, reverse: bool, grouped: bool = False) -> Tensor:
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
        carry = _entry_states(d.sum(-1), group_update.squeeze(-2), reverse, grouped=True)
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
    make = _make_masks.__wrapped__ if torch.compiler.is_compiling() else _make_masks
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
