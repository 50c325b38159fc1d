"""BiGLA's factored form for CPUs, of few large products: for gates that are not strong.

decay(t, s) = exp(c_t - h) * exp(h - c_s), c the running sum of log decays and h half the chunk's. Values
decide whether it can, so it is for eager mode. See README.md beside this file.
"""

from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from mmvig.ops.bigla.chunked import entry_states
from mmvig.ops.bigla.gates import OPEN, log_gate, log_gate_slope

# Tokens per chunk at most; largest |log decay| over one, half of which is the largest exponent; and what
# sums of log decays are in, as in float32 an exponent of 20 is a factor with an error of 1e-6. 49 tokens of
# the last stage of a 224x224 image are one chunk without states.
FORMS = (49, 4.0, torch.float32), (49, 40.0, torch.float64), (32, 40.0, torch.float64)
# The last two of the gradients, whose chunks are a power of 2.
GRADIENT_FORMS = (4.0, torch.float32), (40.0, torch.float64)
# With exponents of up to 20, the largest of what a factor multiplies must be in this range.
ORDINARY = 1e-27, 1e27


def mild_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g_fwd: Tensor,
    g_bwd: Tensor,
    scale: float,
    normalizer: float,
    form: tuple[int, float, torch.dtype],
    wanted: Tensor,
) -> tuple[tuple[Tensor] | None, Tensor]:
    """The output in float32, if the form fits a wanted head; and which heads it fits.

    It does not fit where gates are too strong, or a factor more is too much for large or small inputs.

    Args:
        q, k, v, g_fwd, g_bwd, scale, normalizer: see :func:`mmvig.ops.bigla.bigla`.
        form: one of FORMS.
        wanted: some heads, ``[B, H]`` of bool.

    Returns:
        (``[B, N, H, V]``,) or None, and ``[B, H]`` of bool. Heads that it does not fit are wrong.
    """
    most, span, dtype = form
    num_tokens = q.shape[1]
    num_chunks = -(-num_tokens // most)
    size = -(-num_tokens // num_chunks)  # even chunks: the least padding
    sums, halves = _sums(g_fwd, g_bwd, normalizer, num_chunks, size, dtype)
    fits = _are_mild(halves, span)
    if dtype == torch.float64:
        of_k = _largest(k)
        fits &= _are_ordinary(_largest(q), of_k, of_k * _largest(v))
    if not (fits & wanted).any():
        return None, fits
    factors = sums.exp_().to(torch.float32)
    q_c, k_c, v_c = (_chunks(x, num_chunks, size).contiguous() for x in (q, k, v))
    q_c = q_c * (scale / 2)
    forward, backward = slice(q.shape[-1]), slice(q.shape[-1], None)
    queries = (q_c[..., None, :] * factors).flatten(-2)  # [B, n, H, C, 2K]
    keys = (k_c[..., None, :] / factors).flatten(-2)
    pairs = queries[..., forward] @ keys[..., forward].transpose(-1, -2)
    pairs_back = queries[..., backward] @ keys[..., backward].transpose(-1, -2)
    # Chosen, not multiplied by 0: pairs in a direction's wrong order may be infinite.
    pairs = torch.where(_later(size), pairs_back, pairs)
    # A token's own pair has no decay.
    pairs.diagonal(dim1=-2, dim2=-1).copy_(2 * (q_c * k_c).sum(-1))
    o = pairs @ v_c
    if num_chunks > 1:
        to_end, total = _to_end(halves)
        to_end = to_end.flatten(-2)[..., None]  # [B, n, H, 2K, 1]
        update = (keys.transpose(-1, -2) @ v_c) * to_end
        states = [
            entry_states(total[..., 0, :], update[..., forward, :], reverse=False),
            entry_states(total[..., 1, :], update[..., backward, :], reverse=True),
        ]
        o += queries @ (torch.cat(states, -2) * to_end)
    fits &= _are_finite(o)  # a factor more may be too much for large inputs
    return (o.transpose(2, 3).flatten(1, 2)[:, :num_tokens],), fits


def mild_backward(
    do: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g_fwd: Tensor,
    g_bwd: Tensor,
    scale: float,
    normalizer: float,
    form: tuple[float, torch.dtype],
    wanted: Tensor,
) -> tuple[tuple[Tensor, ...] | None, Tensor]:
    """Gradients of q, k, v, g_fwd, g_bwd in float32, given the output's; else as mild_forward().

    ``form``: one of GRADIENT_FORMS.

    Each pair of tokens has a left one and a right one. Forward, queries are on the right and keys on the
    left; backward, the other way round, and all else is the same: both directions are one batch.
    """
    span, dtype = form
    num_tokens = q.shape[1]
    size = 2 ** (num_tokens - 1).bit_length() if num_tokens <= 64 else 32
    num_chunks = -(-num_tokens // size)
    sums, halves = _sums(g_fwd, g_bwd, normalizer, num_chunks, size, dtype)
    fits = _are_mild(halves, span)
    if dtype == torch.float64:
        of_q, of_k, of_v, of_do = (_largest(x) for x in (q, k, v, do))
        products = of_v * of_k, of_do * of_q, of_do * of_v, of_do * of_v * of_k, of_do * of_v * of_q
        fits &= _are_ordinary(of_q, of_k, *products)
    if not (fits & wanted).any():
        return None, fits
    factors = sums.exp_().to(torch.float32)
    q, k, v, do = (_chunks(x, num_chunks, size).contiguous() for x in (q, k, v, do))
    q = q * (scale / 2)
    fwd, bwd = (x.contiguous() for x in factors.unbind(-2))  # those of queries, [B, n, H, C, K]
    right = torch.stack((q * fwd, k / bwd), 3)  # [B, n, H, 2, C, K]
    left = torch.stack((k / fwd, q * bwd), 3)
    d_pairs = do @ v.transpose(-1, -2)  # [B, n, H, C, C]
    own = 2 * d_pairs.diagonal(dim1=-2, dim2=-1)[..., None]
    d_pairs = torch.stack((d_pairs, d_pairs.transpose(-1, -2)), 3).tril_(-1)
    d_right = d_pairs @ left
    d_left = d_pairs.transpose(-1, -2) @ right
    pairs = (right @ left.transpose(-1, -2)).tril_(-1)
    pairs = pairs[..., 0, :, :].transpose(-1, -2) + pairs[..., 1, :, :]  # [B, n, H, C, C], keys first
    pairs.diagonal(dim1=-2, dim2=-1).copy_(2 * (q * k).sum(-1))
    dv = pairs @ do
    # What other chunks' tokens do to a side's gradient, times that side: pairs that reach over all gates
    # between the side's token and the chunk's edge.
    on_right, on_left, across = torch.zeros(3, *right.shape).unbind(0)
    across = across[..., 0, :]  # [B, n, H, 2, K]
    if num_chunks > 1:
        to_end, total = _to_end(halves)
        of_right, of_left = torch.stack((do, v), 3), torch.stack((v, do), 3)  # [B, n, H, 2, C, V]
        from_left, from_right = (
            _states(side.transpose(-1, -2) @ values, to_end, total, reverse)
            for side, values, reverse in ((left, of_left, False), (right, of_right, True))
        )
        across = (from_left * from_right).sum(-1)
        more = of_right @ from_left.transpose(-1, -2)
        on_right = right * more
        d_right += more
        more = of_left @ from_right.transpose(-1, -2)
        on_left = left * more
        d_left += more
        dv += left[..., 0, :, :] @ from_right[..., 0, :, :] + right[..., 1, :, :] @ from_left[..., 1, :, :]
    dq = (d_right[..., 0, :, :] * fwd + d_left[..., 1, :, :] * bwd + own * k) * (scale / 2)
    dk = d_left[..., 0, :, :] / fwd + d_right[..., 1, :, :] / bwd + own * q
    d_gates = _gate_gradients(right, left, d_pairs, on_right, on_left, across)
    fits &= _are_finite(dq) & _are_finite(dk) & _are_finite(dv) & _are_finite(d_gates.flatten(3, 4))
    dq, dk, dv, *d_gates = (
        x.transpose(2, 3).flatten(1, 2)[:, :num_tokens] for x in (dq, dk, dv, *d_gates.unbind(3))
    )
    d_gates = [
        d * log_gate_slope(g.to(torch.float32)) / normalizer
        for d, g in zip(d_gates, (g_fwd, g_bwd), strict=True)
    ]
    return (dq, dk, dv, *d_gates), fits


def _gate_gradients(
    right: Tensor, left: Tensor, d_pairs: Tensor, on_right: Tensor, on_left: Tensor, across: Tensor
) -> Tensor:
    """Gradients of log decays: the sums of right_i * d_pairs_ij * left_j over the pairs around each gate.

    Nothing is subtracted, so that a gate with few or weak pairs has its gradient as exactly as others. The
    pairs of a block are those of its halves and those between the halves. Of the latter a gate in the
    right half has all whose right token comes after it, in the left half all whose left token comes before.

    Args:
        right, left: the decayed queries and keys ``[B, n, H, 2, C, K]``.
        d_pairs: ``[B, n, H, 2, C, C]``, right tokens first.
        on_right, on_left: the sum over pairs with a token outside the chunk, at the token inside it.
        across: the sum over pairs with both tokens outside ``[B, n, H, 2, K]``.

    Returns:
        ``[B, n, H, 2, C, K]``.
    """
    over = across[..., None, :]  # all pairs that reach over a block, [..., blocks, K]
    blocks = d_pairs[..., None, :, :]  # [..., blocks, size, size]
    size = right.shape[-2]
    while size > 1:
        size //= 2
        right_of, left_of, after, before = (
            x.unflatten(-2, (-1, 2, size)).unbind(-3) for x in (right, left, on_right, on_left)
        )
        over = torch.stack((over + after[1].sum(-2), over + before[0].sum(-2)), -2).flatten(-3, -2)
        between = blocks[..., size:, :size]
        after[1].addcmul_(right_of[1], _product(between, left_of[0]))
        before[0].addcmul_(left_of[0], _product(between.transpose(-1, -2), right_of[1]))
        if size > 1:
            blocks = torch.stack((blocks[..., :size, :size], blocks[..., size:, size:]), -3).flatten(-4, -3)
    # Forward, a gate counts for its own token on the right; backward, on the left.
    return over + torch.stack((on_right[..., 0, :, :], on_left[..., 1, :, :]), 3)


def _product(x: Tensor, y: Tensor) -> Tensor:
    """The product x @ y; of many tiny matrices it takes longer than a few operators on all of them."""
    size = x.shape[-1]
    if size > 4:
        return x @ y
    product = x[..., :1] * y[..., :1, :]
    for i in range(1, size):
        product.addcmul_(x[..., i : i + 1], y[..., i : i + 1, :])
    return product


def _states(update: Tensor, to_end: Tensor, total: Tensor, reverse: bool) -> Tensor:
    """States that enter chunks, decayed to the chunk's middle ``[B, n, H, 2, K, V]``."""
    to_end = to_end[..., None]
    update = (update * to_end).flatten(2, 3)
    return entry_states(total.flatten(2, 3), update, reverse).unflatten(2, (-1, 2)) * to_end


def _sums(
    g_fwd: Tensor, g_bwd: Tensor, normalizer: float, num_chunks: int, size: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Logarithms of queries' factors, by which keys are divided, and half of each chunk's |log decay|.

    Returns:
        ``[B, n, H, C, 2, K]`` and ``[B, n, H, 2, K]``, in ``dtype``.
    """
    gates = torch.cat([_chunks(g, num_chunks, size, OPEN) for g in (g_fwd, g_bwd)], -1)
    log_decay = log_gate(gates).unflatten(-1, (2, -1))
    sums = log_decay.cumsum(3, dtype=dtype)
    total = sums[:, :, :, -1:].clone()
    # Backward, the gate of the token itself does not count: the sums up to the token before it.
    sums[..., 1, :] -= log_decay[..., 1, :]
    # And they have the other sign, so that queries take the same factors in both directions.
    sums.sub_(total, alpha=0.5).mul_(torch.tensor([[1 / normalizer], [-1 / normalizer]], dtype=dtype))
    return sums, total[:, :, :, 0].div_(-2 * normalizer)


def _are_mild(halves: Tensor, span: float) -> Tensor:
    """Whether a head's decays are, given half of each chunk's: ``[B, n, H, 2, K]`` -> ``[B, H]``."""
    return 2 * halves.amax((1, 3, 4)) < span


def _to_end(halves: Tensor) -> tuple[Tensor, Tensor]:
    """Decays between a chunk's middle and its ends, and the log decay over it, in float32."""
    return halves.neg().exp_().to(torch.float32), halves.mul(-2).to(torch.float32)


def _chunks(x: Tensor, num_chunks: int, size: int, fill: float = 0.0) -> Tensor:
    """[B, N, H, D] -> [B, n, H, C, D] in float32."""
    pad = num_chunks * size - x.shape[1]
    if pad:
        x = F.pad(x, (0, 0, 0, 0, 0, pad), value=fill)
    return x.unflatten(1, (num_chunks, size)).transpose(2, 3).to(torch.float32)


def _largest(x: Tensor) -> Tensor:
    """The largest |x| of each head ``[B, H]``, in float64."""
    return x.abs().amax((1, 3)).double()


def _are_ordinary(*sizes: Tensor) -> Tensor:
    """Whether all of a head's are 0 or in the range ORDINARY."""
    x = torch.stack(sizes)
    return ((x == 0) | ((x > ORDINARY[0]) & (x < ORDINARY[1]))).all(0)


def _are_finite(x: Tensor) -> Tensor:
    """Whether all of a head's ``[B, n, H, ...]`` are: ``[B, H]``."""
    return x.flatten(3).sum(-1).sum(1).isfinite()


@cache
def _later(size: int) -> Tensor:
    """Where a pair's second token comes after the first."""
    with torch.inference_mode(False):
        return torch.ones(size, size, dtype=torch.bool).triu_(1)
