"""The gated mix by Triton, one pass forward and one backward, before PyTorch's product.

The gate's logits may be columns of a wider tensor, without their bias.
"""

import triton
import triton.language as tl

from mmvig.ops.arithmetic import sigmoid


@triton.jit
def load_row(p_x, at, mask, V: tl.constexpr, EPS: tl.constexpr):
    """Rows divided by their root mean square, and its inverse."""
    x = tl.load(p_x + at, mask=mask, other=0.0).to(tl.float32)
    inverse = tl.rsqrt(tl.sum(x * x, axis=1) / V + EPS)[:, None]
    return x * inverse, inverse


@triton.jit
def load_gate(p_gate, tokens, channels, bias, mask, S):
    """Gates of tokens [BR, 1], which are S apart, at channels [BR or 1, BV], and where they are."""
    at = tokens.to(tl.int64) * S + channels
    return sigmoid(tl.load(p_gate + at, mask=mask, other=0.0).to(tl.float32) + bias), at


@triton.jit(do_not_specialize=['M', 'S'])
def forward_kernel(
    p_long, p_gate, p_short, p_wl, p_ws, p_bias, p_y, M, S,
    H: tl.constexpr, V: tl.constexpr, EPS: tl.constexpr, ACT: tl.constexpr, BIAS: tl.constexpr,
    BR: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """Make y [M, V] of long and short [M, V] and the gates [M / H, H * V]."""
    rows = tl.program_id(0) * BR + tl.arange(0, BR)
    columns = tl.arange(0, BV)
    mask = (rows < M)[:, None] & (columns < V)[None, :]
    at = rows.to(tl.int64)[:, None] * V + columns[None, :]
    long, _ = load_row(p_long, at, mask, V, EPS)
    short, _ = load_row(p_short, at, mask, V, EPS)
    long *= tl.load(p_wl + columns, mask=columns < V, other=0.0).to(tl.float32)[None, :]
    short *= tl.load(p_ws + columns, mask=columns < V, other=0.0).to(tl.float32)[None, :]
    channels = (rows % H * V)[:, None] + columns[None, :]
    bias = 0.0
    if BIAS:
        bias = tl.load(p_bias + channels, mask=mask, other=0.0).to(tl.float32)
    gate, _ = load_gate(p_gate, (rows // H)[:, None], channels, bias, mask, S)
    y = short + gate * (long - short)
    if ACT:
        y *= sigmoid(y)
    tl.store(p_y + at, y.to(p_y.dtype.element_ty), mask=mask)


@triton.jit
def store_row_gradient(p_dx, at, mask, x, inverse, dx, V: tl.constexpr):
    """Gradient of what load_row() read, of that of x = what it returned."""
    dx = inverse * (dx - x * (tl.sum(dx * x, axis=1) / V)[:, None])
    tl.store(p_dx + at, dx.to(p_dx.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=['M', 'S'])
def backward_kernel(
    p_dy, p_long, p_gate, p_short, p_wl, p_ws, p_bias, p_dlong, p_dgate, p_dshort, p_y, p_dw, M, S,
    H: tl.constexpr, V: tl.constexpr, EPS: tl.constexpr, ACT: tl.constexpr, BIAS: tl.constexpr,
    BR: tl.constexpr, BV: tl.constexpr, AHEAD: tl.constexpr,
):  # fmt: skip
    """Gradients and y of one head, and this program's share of the weights' in dw [2 or 3, programs, H, V].

    The third is that of the gate's bias.
    """
    columns = tl.arange(0, BV)
    wl = tl.load(p_wl + columns, mask=columns < V, other=0.0).to(tl.float32)[None, :]
    ws = tl.load(p_ws + columns, mask=columns < V, other=0.0).to(tl.float32)[None, :]
    dwl = tl.zeros([BR, BV], tl.float32)
    dws = tl.zeros([BR, BV], tl.float32)
    dbias = tl.zeros([BR, BV], tl.float32)
    head = tl.program_id(1)
    channels = head * V + columns[None, :]
    bias = 0.0
    if BIAS:
        bias = tl.load(p_bias + channels, mask=columns[None, :] < V, other=0.0).to(tl.float32)
    for i in tl.range(tl.program_id(0), tl.cdiv(M, BR * H), tl.num_programs(0), num_stages=AHEAD):
        tokens = (i * BR + tl.arange(0, BR))[:, None]
        mask = (tokens < M // H) & (columns < V)[None, :]
        at = tokens.to(tl.int64) * (H * V) + channels
        dy = tl.load(p_dy + at, mask=mask, other=0.0).to(tl.float32)
        long, inverse_long = load_row(p_long, at, mask, V, EPS)
        short, inverse_short = load_row(p_short, at, mask, V, EPS)
        gate, at_gate = load_gate(p_gate, tokens, channels, bias, mask, S)
        difference = long * wl - short * ws
        y = short * ws + gate * difference
        if ACT:
            s = sigmoid(y)
            dy *= s + y * s * (1 - s)
            y *= s
        tl.store(p_y + at, y.to(p_y.dtype.element_ty), mask=mask)
        dgate = dy * difference * gate * (1 - gate)
        tl.store(p_dgate + at_gate, dgate.to(p_dgate.dtype.element_ty), mask=mask)
        dbias += dgate
        of_long = dy * gate
        of_short = dy - of_long
        dwl += of_long * long
        dws += of_short * short
        store_row_gradient(p_dlong, at, mask, long, inverse_long, of_long * wl, V)
        store_row_gradient(p_dshort, at, mask, short, inverse_short, of_short * ws, V)
    of_kind = tl.num_programs(0) * (H * V)
    p_dw += (tl.program_id(0) * H + head) * V + columns
    tl.store(p_dw, tl.sum(dwl, axis=0), mask=columns < V)
    tl.store(p_dw + of_kind, tl.sum(dws, axis=0), mask=columns < V)
    if BIAS:
        tl.store(p_dw + 2 * of_kind, tl.sum(dbias, axis=0), mask=columns < V)
