"""Sums of what programs of several kernels leave as their shares of small gradients, in one launch.

Importing this module imports Triton.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from mmvig.ops.launch import Constants, compile_key, launch
from mmvig.ops.persistent import persistent_cache

ROWS, COLUMNS, SOURCES = 32, 64, 5
CONSTANTS = Constants(BM=ROWS, BC=COLUMNS, num_warps=4)


@triton.jit
def sum_kernel(p_0, p_1, p_2, p_3, p_4, p_table, p_out, BM: tl.constexpr, BC: tl.constexpr):
    """Sum the rows of a block of columns; the table has of each its source, place, shape and target."""
    p_row = p_table + tl.program_id(0) * 6
    source = tl.load(p_row)
    start = tl.load(p_row + 1)
    rows = tl.load(p_row + 2)
    s_m = tl.load(p_row + 3)
    o_c = tl.arange(0, BC)
    m_c = o_c < tl.load(p_row + 4)
    b_total = tl.zeros([BM, BC], tl.float32)
    for first in range(0, rows, BM):
        o_m = first + tl.arange(0, BM)
        m_mc = (o_m < rows)[:, None] & m_c[None, :]
        o_mc = start + o_m.to(tl.int64)[:, None] * s_m + o_c[None, :]
        if source == 0:
            b_total += tl.load(p_0 + o_mc, mask=m_mc, other=0.0)  # [BM, BC]
        elif source == 1:
            b_total += tl.load(p_1 + o_mc, mask=m_mc, other=0.0)  # [BM, BC]
        elif source == 2:
            b_total += tl.load(p_2 + o_mc, mask=m_mc, other=0.0)  # [BM, BC]
        elif source == 3:
            b_total += tl.load(p_3 + o_mc, mask=m_mc, other=0.0)  # [BM, BC]
        else:
            b_total += tl.load(p_4 + o_mc, mask=m_mc, other=0.0)  # [BM, BC]
    tl.store(p_out + tl.load(p_row + 5) + o_c, tl.sum(b_total, axis=0), mask=m_c)


@persistent_cache
def _table(device: torch.device, segments: tuple[tuple[int, int, int], ...]) -> Tensor:
    """The kernel's table. Computed where it is needed: a capture allows no copy from the host."""
    parts, target, starts = [], 0, [0] * SOURCES
    for source, rows, width in segments:
        column = torch.arange(0, width, COLUMNS, device=device)
        start, columns = starts[source] + column, (width - column).clamp(max=COLUMNS)
        of_source, step = torch.full_like(column, source), torch.full_like(column, width)
        of_rows = torch.full_like(column, rows)
        parts.append(torch.stack([of_source, start, of_rows, step, columns, target + column], 1))
        starts[source] += rows * width
        target += width
    return torch.cat(parts)


def sum_partials(sources: Sequence[Tensor], segments: tuple[tuple[int, int, int], ...]) -> Tensor:
    """Sums over rows, one after the other in one vector.

    Args:
        sources: five contiguous tensors in float32.
        segments: (source, rows, columns) of matrices that follow each other in each source.
    """
    table = _table(sources[0].device, segments)
    out = sources[0].new_empty(sum(width for _, _, width in segments))
    arguments = (*sources, table, out)
    launch(sum_kernel, compile_key(*sources), (table.shape[0], 1, 1), arguments, CONSTANTS)
    return out
