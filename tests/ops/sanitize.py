"""The Triton kernels on small shapes, forward and backward, for compute-sanitizer on a GPU.

PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool memcheck python tests/ops/sanitize.py

Arguments: bigla, fused; default both.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # what the tests import

import test_bigla_triton as bigla
import test_block as block
import test_fused as fused
import torch

from mmvig.backbones import ViG, ViGH

HALF = torch.bfloat16, torch.float16


def run_bigla() -> None:
    for num_tokens in (1, 50, 200, 1100):  # one chunk, walks, a scan
        for key, value in ((16, 32), (32, 64), (24, 48)):
            for gates in ('normal', 'mixed'):
                inputs = bigla.make_inputs(
                    num_tokens, key, value, heads=2, gates=gates, dtype=torch.bfloat16
                )
                bigla.run(inputs, 'triton')
    for dtype in (torch.float16, torch.float32):
        bigla.run(bigla.make_inputs(200, heads=2, gates='mixed', dtype=dtype), 'triton')


def run_fused() -> None:
    for dtype in (*HALF, torch.float32):
        for case in fused.CASES.values():
            fused.run(case, fused.make_inputs(case, dtype=dtype), 'triton')
    for family in block.FAMILIES:
        for channels in (96, 384):  # the product of SwiGLU with its activation in one kernel, and not
            for dtype in (*HALF, None):
                inputs = block.make_inputs((2, 5, 7), channels)
                block.run(block.make(family, channels=channels, heads=channels // 32), inputs, dtype)
    for kind, arch in (
        (ViGH, dict(embed_dims=96, depths=[1, 1, 1, 1], num_heads=[3, 6, 12, 24])),
        (ViG, 'tiny'),
    ):
        model = kind(arch, cuda_graphs=0).cuda()
        for dtype in HALF:
            with torch.autocast('cuda', dtype):
                maps = model(torch.randn(2, 3, 64, 96, device='cuda'))
            torch.autograd.backward(maps, [torch.ones_like(y) for y in maps])


JOBS = {'bigla': run_bigla, 'fused': run_fused}

if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('jobs', nargs='*', metavar='JOB', help=f'some of {list(JOBS)}; default: all')
    jobs = parser.parse_args().jobs or JOBS
    if unknown := [name for name in jobs if name not in JOBS]:
        parser.error(f'unknown job {unknown[0]}, choose from {list(JOBS)}')
    for name in jobs:
        JOBS[name]()
        torch.cuda.synchronize()
        print(name, 'done')
