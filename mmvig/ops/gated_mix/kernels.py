"""The gated mix by Triton, one pass forward and one backward, before PyTorch's product.

The gate's logits may be columns of a wider tensor, without their bias. Names are those of
mmvig/ops/arithmetic.py; a row is a head of a token.
"""

import triton
import triton.language as tl

from mmvig.ops.arithmetic import sigmoid


@triton.jit
def load_row(p_x, o, m, V: tl.constexpr, EPS: tl.constexpr):
    """Rows [BM, BV] divided by their root mean square, and its inverse [BM, 1]."""
    b_x = tl.load(p_x + o, mask=m, other=0.0).to(tl.float32)  # [BM, BV]
    b_rstd = tl.rsqrt(tl.sum(b_x * b_x, axis=1) / V + EPS)[:, None]
    return b_x * b_rstd, b_rstd


@triton.jit
def load_gate(p_gate, o_t, o_c, b_bias, m, s_gate):
    """Gates of tokens [BT, 1], which are s_gate apart, at channels [BT or 1, BV]; and where they are."""
    o_gate = o_t.to(tl.int64) * s_gate + o_c
    b_gate = tl.load(p_gate + o_gate, mask=m, other=0.0).to(tl.float32)  # [BT, BV]
    return sigmoid(b_gate + b_bias), o_gate


@triton.jit(do_not_specialize=['M', 's_gate'])
def forward_kernel(
    p_long, p_gate, p_short, p_wl, p_ws, p_b, p_y, M, s_gate,
    H: tl.constexpr, V: tl.constexpr, EPS: tl.constexpr, ACT: tl.constexpr, USE_BIAS: tl.constexpr,
    BM: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """Make y [M, V] of long and short [M, V] and the gates [M / H, H * V]."""
    o_m = tl.program_id(0) * BM + tl.arange(0, BM)
    o_v = tl.arange(0, BV)
    m_mv = (o_m < M)[:, None] & (o_v < V)[None, :]
    o_mv = o_m.to(tl.int64)[:, None] * V + o_v[None, :]
    b_long, _ = load_row(p_long, o_mv, m_mv, V, EPS)  # [BM, BV]
    b_short, _ = load_row(p_short, o_mv, m_mv, V, EPS)  # [BM, BV]
    b_long *= tl.load(p_wl + o_v, mask=o_v < V, other=0.0).to(tl.float32)[None, :]  # [1, BV]
    b_short *= tl.load(p_ws + o_v, mask=o_v < V, other=0.0).to(tl.float32)[None, :]  # [1, BV]
    o_c = (o_m % H * V)[:, None] + o_v[None, :]
    b_bias = 0.0
    if USE_BIAS:
        b_bias = tl.load(p_b + o_c, mask=m_mv, other=0.0).to(tl.float32)  # [BM, BV]
    b_gate, _ = load_gate(p_gate, (o_m // H)[:, None], o_c, b_bias, m_mv, s_gate)  # [BM, BV]
    b_y = b_short + b_gate * (b_long - b_short)
    if ACT:
        b_y *= sigmoid(b_y)
    tl.store(p_y + o_mv, b_y.to(p_y.dtype.element_ty), mask=m_mv)


@triton.jit
def store_row_gradient(p_dx, o, m, b_x, b_rstd, b_dx, V: tl.constexpr):
    """Gradient of what load_row() read, of that of x = what it returned."""
    b_dx = b_rstd * (b_dx - b_x * (tl.sum(b_dx * b_x, axis=1) / V)[:, None])
    tl.store(p_dx + o, b_dx.to(p_dx.dtype.element_ty), mask=m)


@triton.jit(do_not_specialize=['M', 's_gate'])
def backward_kernel(
    p_dy, p_long, p_gate, p_short, p_wl, p_ws, p_b, p_dlong, p_dgate, p_dshort, p_y, p_dw, M, s_gate,
    H: tl.constexpr, V: tl.constexpr, EPS: tl.constexpr, ACT: tl.constexpr, USE_BIAS: tl.constexpr,
    BT: tl.constexpr, BV: tl.constexpr, AHEAD: tl.constexpr,
):  # fmt: skip
    """Gradients and y of one head, and this program's share of the weights' in dw [2 or 3, programs, H, V].

    The third is that of the gate's bias.
    """
    o_v = tl.arange(0, BV)
    b_wl = tl.load(p_wl + o_v, mask=o_v < V, other=0.0).to(tl.float32)[None, :]  # [1, BV]
    b_ws = tl.load(p_ws + o_v, mask=o_v < V, other=0.0).to(tl.float32)[None, :]  # [1, BV]
    b_dwl = tl.zeros([BT, BV], tl.float32)
    b_dws = tl.zeros([BT, BV], tl.float32)
    b_dbias = tl.zeros([BT, BV], tl.float32)
    i_h = tl.program_id(1)
    o_c = i_h * V + o_v[None, :]
    b_bias = 0.0
    if USE_BIAS:
        b_bias = tl.load(p_b + o_c, mask=o_v[None, :] < V, other=0.0).to(tl.float32)  # [1, BV]
    for i in tl.range(tl.program_id(0), tl.cdiv(M, BT * H), tl.num_programs(0), num_stages=AHEAD):
        o_t = (i * BT + tl.arange(0, BT))[:, None]
        m_tv = (o_t < M // H) & (o_v < V)[None, :]
        o_tv = o_t.to(tl.int64) * (H * V) + o_c
        b_dy = tl.load(p_dy + o_tv, mask=m_tv, other=0.0).to(tl.float32)  # [BT, BV]
        b_long, b_rstd_long = load_row(p_long, o_tv, m_tv, V, EPS)  # [BT, BV]
        b_short, b_rstd_short = load_row(p_short, o_tv, m_tv, V, EPS)  # [BT, BV]
        b_gate, o_gate = load_gate(p_gate, o_t, o_c, b_bias, m_tv, s_gate)  # [BT, BV]
        b_difference = b_long * b_wl - b_short * b_ws
        b_y = b_short * b_ws + b_gate * b_difference
        if ACT:
            b_s = sigmoid(b_y)
            b_dy *= b_s + b_y * b_s * (1 - b_s)
            b_y *= b_s
        tl.store(p_y + o_tv, b_y.to(p_y.dtype.element_ty), mask=m_tv)
        b_dgate = b_dy * b_difference * b_gate * (1 - b_gate)
        tl.store(p_dgate + o_gate, b_dgate.to(p_dgate.dtype.element_ty), mask=m_tv)
        b_dbias += b_dgate
        b_dlong = b_dy * b_gate
        b_dshort = b_dy - b_dlong
        b_dwl += b_dlong * b_long
        b_dws += b_dshort * b_short
        store_row_gradient(p_dlong, o_tv, m_tv, b_long, b_rstd_long, b_dlong * b_wl, V)
        store_row_gradient(p_dshort, o_tv, m_tv, b_short, b_rstd_short, b_dshort * b_ws, V)
    s_kind = tl.num_programs(0) * (H * V)
    p_dw += (tl.program_id(0) * H + i_h) * V + o_v
    tl.store(p_dw, tl.sum(b_dwl, axis=0), mask=o_v < V)
    tl.store(p_dw + s_kind, tl.sum(b_dws, axis=0), mask=o_v < V)
    if USE_BIAS:
        tl.store(p_dw + 2 * s_kind, tl.sum(b_dbias, axis=0), mask=o_v < V)
