"""Time the first pass of ViG-H in a process, which compiles kernels or finds them on disk.

    python tools/benchmark/first_use.py
    python tools/benchmark/first_use.py --arch tiny --shapes '224x224 b1' --steps inference

Each figure is of a process of its own, from the call to the end of the GPU's work. With an empty cache,
kernels are compiled side by side, as by default, or one by one, as the pass meets them; 'from disk' has the
cache of 'side by side'. Importing PyTorch and starting CUDA are not counted. bf16 under autocast; a
training step is a forward and a backward pass. Fewer seconds are better.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # this checkout, installed or not

from common import machine_name

from mmvig.backbones import ViGH
from mmvig.first_use import FirstUse

STEPS = 'inference', 'training'
WAYS = 'side by side', 'one by one', 'from disk'


def time_first(arch: str, shape: str, step: str, way: str) -> float:
    """Seconds of the first pass of this process."""
    size, batch = shape.split(' b')
    height, width = map(int, size.split('x'))
    torch.manual_seed(0)
    model = ViGH(arch).cuda().train(step == 'training')
    x = torch.randn(int(batch), 3, height, width, device='cuda')
    if way == 'one by one':
        FirstUse.prepare = lambda *args: None
    torch.cuda.synchronize()
    start = time.perf_counter()
    with torch.autocast('cuda', torch.bfloat16), torch.set_grad_enabled(step == 'training'):
        maps = model(x)
    if step == 'training':
        sum(y.sum() for y in maps).backward()
    torch.cuda.synchronize()
    return time.perf_counter() - start


def run(arch: str, shape: str, step: str, way: str, cache: str) -> float:
    """:func:`time_first` in a process of its own, with Triton's cache in a folder."""
    job = '--job', arch, shape, step, way
    env = {**os.environ, 'TRITON_CACHE_DIR': cache}
    done = subprocess.run([sys.executable, __file__, *job], env=env, check=True, stdout=subprocess.PIPE)
    return float(done.stdout.split()[-1])


def main() -> None:
    """Time and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('--arch', default='small', help='default: small')
    parser.add_argument('--shapes', nargs='+', default=['800x1216 b2', '224x224 b1'], help='HxW bN')
    parser.add_argument('--steps', nargs='+', choices=STEPS, default=STEPS, help='default: both')
    parser.add_argument('--ways', nargs='+', choices=WAYS, default=WAYS, help='default: all')
    parser.add_argument('--job', nargs=4, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error('kernels are compiled for a GPU, and there is none')
    if args.job:
        print(time_first(*args.job))
        return
    print(f'ViG-H {args.arch}, {machine_name("cuda")}, {len(os.sched_getaffinity(0))} cores; seconds')
    for shape in args.shapes:
        for step in args.steps:
            with tempfile.TemporaryDirectory() as first, tempfile.TemporaryDirectory() as other:
                caches = {'one by one': other}
                for way in args.ways:
                    seconds = run(args.arch, shape, step, way, caches.get(way, first))
                    print(f'{shape:12} {step:10} {way:13} {seconds:6.1f}', flush=True)


if __name__ == '__main__':
    main()
