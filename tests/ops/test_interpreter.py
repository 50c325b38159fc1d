"""The hurried interpreter gives what Triton's own gives."""

import importlib.util

import pytest
import torch

if importlib.util.find_spec('triton') is None or torch.cuda.is_available():
    pytest.skip('nothing is interpreted', allow_module_level=True)

import interpreter
import triton
import triton.language as tl
from triton.runtime.interpreter import ScanOps


@triton.jit
def join(a, x, b, y):
    return a * b, b * x + y


@triton.jit
def larger(x, y):
    return tl.maximum(x, y)


@triton.jit
def scan_kernel(p_a, p_x, p_out, AXIS: tl.constexpr, REVERSE: tl.constexpr):
    o = tl.arange(0, 4)[:, None] * 8 + tl.arange(0, 8)[None, :]
    a, x = tl.load(p_a + o), tl.load(p_x + o)
    decay, state = tl.associative_scan((a, x), AXIS, join, reverse=REVERSE)
    largest = tl.associative_scan(x, AXIS, larger, reverse=REVERSE)
    line = tl.associative_scan(tl.load(p_x + tl.arange(0, 32)), 0, larger, reverse=REVERSE)
    tl.store(p_out + o, decay)
    tl.store(p_out + 32 + o, state)
    tl.store(p_out + 64 + o, largest)
    tl.store(p_out + 96 + tl.arange(0, 32), line)


@pytest.mark.parametrize('axis', [0, 1])
@pytest.mark.parametrize('reverse', [False, True])
@pytest.mark.parametrize('dtype', [torch.float32, torch.float16])
def test_scans(axis, reverse, dtype, monkeypatch):
    a, x = torch.randn(2, 4, 8, generator=torch.Generator().manual_seed(0)).to(dtype)
    results = []
    for scan in (interpreter.scan_slices, interpreter.scan_numbers):
        monkeypatch.setattr(ScanOps, 'generic_scan', scan)
        out = torch.zeros(4, 32, dtype=dtype)
        scan_kernel[(1,)](a, x, out, axis, reverse)
        results.append(out)
    assert torch.equal(*results) and all(out.any() for out in results[0])
