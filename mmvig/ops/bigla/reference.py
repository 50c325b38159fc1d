"""BiGLA token by token: the definition that every other backend is measured against."""

import torch
import torch.nn.functional as F
from torch import Tensor


def bigla_reference(
    q: Tensor, k: Tensor, v: Tensor, g_fwd: Tensor, g_bwd: Tensor, scale: float, normalizer: float
) -> Tensor:
    """Walk the tokens once in each direction.

    Arguments and result are those of :func:`mmvig.ops.bigla.bigla`, already validated. Computes in
    float32, or in float64 if ``v`` is float64.
    """
    compute_dtype = torch.float64 if v.dtype == torch.float64 else torch.float32
    q, k, v_, g_fwd, g_bwd = (x.to(compute_dtype) for x in (q, k, v, g_fwd, g_bwd))
    num_tokens = q.shape[1]
    o_fwd = _one_direction(q, k, v_, g_fwd, normalizer, range(num_tokens))
    o_bwd = _one_direction(q, k, v_, g_bwd, normalizer, reversed(range(num_tokens)))
    return ((o_fwd + o_bwd) * (scale / 2)).to(v.dtype)


def _one_direction(q: Tensor, k: Tensor, v: Tensor, g: Tensor, normalizer: float, order) -> Tensor:
    """o_t = q_t^T S_t with S_t = diag(exp(logsigmoid(g_t) / normalizer)) S_(t-1) + k_t v_t^T."""
    decay = torch.exp(F.logsigmoid(g) / normalizer)  # [B, N, H, K]
    state = q.new_zeros(*q.shape[:1], *q.shape[2:], v.shape[-1])  # [B, H, K, V]
    outputs = [None] * q.shape[1]
    for t in order:
        state = decay[:, t, :, :, None] * state + k[:, t, :, :, None] * v[:, t, :, None, :]
        outputs[t] = (q[:, t, :, :, None] * state).sum(-2)  # [B, H, V]
    return torch.stack(outputs, dim=1)
