"""Thousands of training steps at changing sizes: memory must not grow, steps must not get slower.

    python tests/reliability/soak.py --device cuda --steps 5000
    python tests/reliability/soak.py --device cpu --steps 500

Trains ViG-H-T (on a CPU, a smaller one) on noise, with evaluation passes in between. Sizes come from a list
of two dozen, the same number of times in each of ten windows: at random in every other one, in runs in the
rest. For each window it prints the median step, the memory that PyTorch has allocated and reserved at its
most, and the process's resident memory. It ends with status 1 if the tenth window has taken over 2 % more
memory than the fourth, which has the same order, or 10 % longer.
"""

import argparse
import contextlib
import gc
import random
import statistics
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # this checkout, installed or not

from mmvig.backbones import ViGH

WINDOWS = 10
SMALL = {'embed_dims': 32, 'depths': [1, 1, 2, 1], 'num_heads': [1, 2, 4, 8]}


def resident() -> int:
    """The process's resident memory in bytes."""
    return int(Path('/proc/self/statm').read_text().split()[1]) * 4096


def main() -> None:
    """Train, print a table of windows, and judge it."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('--device', default='cpu', help='default: %(default)s')
    parser.add_argument('--steps', type=int, default=500, help='default: %(default)s')
    parser.add_argument('--cuda-graphs', default='auto', help="'auto' or a number; default: %(default)s")
    args = parser.parse_args()
    graphs = args.cuda_graphs if args.cuda_graphs == 'auto' else int(args.cuda_graphs)
    on_gpu = args.device.startswith('cuda')
    torch.manual_seed(0)
    model = ViGH('tiny' if on_gpu else SMALL, drop_path_rate=0.1, cuda_graphs=graphs).to(args.device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    side = (96, 128, 160, 200, 256) if on_gpu else (32, 40, 56, 72, 96)
    sizes = [(height, width) for height in side for width in side][:24]
    images = torch.randn(2, 3, max(side), max(side), device=args.device)
    amp = torch.autocast('cuda', torch.bfloat16) if on_gpu else contextlib.nullcontext()
    per_window = -(-args.steps // (WINDOWS * len(sizes))) * len(sizes)
    print(f'{per_window * WINDOWS} steps on {args.device}; MiB')
    print('window  ms (median)  allocated  reserved  resident')
    rows = []
    for window in range(WINDOWS):
        order = sizes * (per_window // len(sizes))
        # Sizes in runs, so that graphs come and go, and alternating.
        order = sorted(order) if window % 2 else random.Random(window).sample(order, len(order))
        times = []
        if on_gpu:
            torch.cuda.reset_peak_memory_stats()
        for i, (height, width) in enumerate(order):
            x = images[:, :, :height, :width]
            start = time.perf_counter()
            with amp:
                maps = model.train()(x)
                loss = sum(y.float().square().mean() for y in maps)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            if i % 10 == 0:
                with torch.no_grad(), amp:
                    model.eval()(x)
            if on_gpu:
                torch.cuda.synchronize()
            times.append((time.perf_counter() - start) * 1e3)
        gc.collect()
        memory = [resident()]
        if on_gpu:
            memory = [torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved(), *memory]
        rows.append((statistics.median(times), *memory))
        shown = ['-'] * (3 - len(memory)) + [f'{each / 2**20:.0f}' for each in memory]
        print(f'{window:6}  {rows[-1][0]:11.1f}  {shown[0]:>9}  {shown[1]:>8}  {shown[2]:>8}', flush=True)
    # Windows of one kind of order: the fourth and the last.
    early, late = rows[3], rows[-1]
    names = ('ms', 'allocated', 'reserved', 'resident') if on_gpu else ('ms', 'resident')
    grown = [
        f'{name} grew from {a:.4g} to {b:.4g}'
        for name, a, b in zip(names, early, late, strict=True)
        if b > a * (1.1 if name == 'ms' else 1.02)
    ]
    print('; '.join(grown) or 'nothing grew')
    sys.exit(bool(grown))


if __name__ == '__main__':
    main()
