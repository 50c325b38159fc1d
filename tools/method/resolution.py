"""ViG-T and DeiT-T trained at one size and tested at larger ones: top-1, time, memory and operations.

    python tools/method/resolution.py --data data/tin40 --sizes 128 256 384 512 768 1024 --at-once 6

Both train on the same small data with the same recipe and seeds. They are tested, without further training,
on the same pictures enlarged (bilinear) to each side, with position embeddings resized (bicubic) as each
model's own code does it: :class:`ViG`, and mmpretrain's VisionTransformer. Time and memory are those of
inference of the backbone, in bf16 AMP on a GPU, replayed as CUDA graphs and timed in turns, with as many
images at each size as make the same number of pixels. DeiT-T is timed with PyTorch's fused attention, which
mmpretrain takes, and with attention as a product, a softmax and a product, as it was common when the method
was published; both give the same top-1.

docs/method.md has the article's claims and what was found.
"""

import argparse
import sys
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import matplotlib

matplotlib.use('Agg')  # a picture file, so no display is needed

import matplotlib.pyplot as plt
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # this checkout, installed or not
sys.path += [str(Path(__file__).resolve().parents[1] / name) for name in ('benchmark', 'analysis')]

import small_training
from common import MEGABYTE, machine, peak_memory, release, save
from get_flops import count
from mmpretrain.models.utils.attention import scaled_dot_product_attention_pyimpl
from small_training import DEIT
from steps import capture, make_step

from mmvig.engine.preflight import SetupError, one_line_errors

TRAINED = {'vig': 'ViG-T', DEIT: 'DeiT-T'}
PLAIN = 'plain'
TIMED = {**TRAINED, PLAIN: 'DeiT-T, attention not fused'}
# Sides that ViG-T's stem and DeiT-T's patches both turn into side / 16 tokens.
MULTIPLE = 16


def parse_args() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    small_training.add_shared_arguments(parser)
    parser.add_argument(
        '--sizes',
        type=int,
        nargs='+',
        help=f'sides to test at, multiples of {MULTIPLE}; default: 1, 2, 3, 4, 6 and 8 times --size',
    )
    parser.add_argument(
        '--time-batch', type=int, default=16, help='images that are timed at the largest size; default: 16'
    )
    return parser.parse_args()


def check_args(args: argparse.Namespace) -> None:
    """Check the arguments, and choose the sizes where none are named.

    Raises:
        SetupError: one is out of its range.
    """
    small_training.check_shared_arguments(args)
    small_training.check_least(args, {'time_batch': 1})
    if args.sizes is None:
        args.sizes = [args.size * factor for factor in (1, 2, 3, 4, 6, 8)]
    if args.size % MULTIPLE or any(size < MULTIPLE or size % MULTIPLE for size in args.sizes):
        raise SetupError(
            f'--size and --sizes must be multiples of {MULTIPLE}, got {args.size} and {args.sizes}'
        )
    if any(a >= b for a, b in pairwise(args.sizes)):
        raise SetupError(f'--sizes must grow, got {args.sizes}')


def build(name: str, size: int, **options) -> nn.Module:
    """The backbone of TIMED, with a position embedding for another size, as a trained one has it."""
    backbone = small_training.build_classifier(DEIT if name == PLAIN else name, size, 1, **options).backbone
    if name == PLAIN:
        for layer in backbone.layers:
            layer.attn.scaled_dot_product_attention = scaled_dot_product_attention_pyimpl
    return backbone


def operations(name: str, trained_at: int, size: int) -> int:
    """Multiply-adds of the backbone on one image, as get_flops.py counts them."""
    # DeiT-T's attention as products, which the counter sees; the stand-in for BiGLA has no meta device.
    device = 'meta' if name == DEIT else 'cpu'
    backbone = build(PLAIN if name == DEIT else name, trained_at).to(device)
    backbone.eval()  # returns None in mmpretrain's
    return count(backbone, torch.zeros(1, 3, size, size, device=device))['total']['macs']


def make(name: str, trained_at: int, size: int, batch: int, device: str) -> Callable:
    """Inference of a backbone of TIMED on random images."""
    torch.manual_seed(0)
    options = {'cuda_graphs': 0} if name == 'vig' else {}
    model = build(name, trained_at, **options).to(device)
    x = torch.randn(batch, 3, size, size, device=device)
    return make_step(model, model, x, 'bf16' if device == 'cuda' else 'fp32', 'inference')


def measure(trained_at: int, size: int, batch: int, device: str) -> dict[str, dict]:
    """Time and memory of the backbones of TIMED at one size.

    Returns:
        ``{name: {median, p10, p90, memory, batch}}``: seconds of the batch, and bytes at most, weights and
        images included, None on a CPU.
    """
    memory, functions = {}, {}
    for name in TIMED:  # alone on the device
        function = make(name, trained_at, size, batch, device)
        function()  # sets up libraries
        memory[name] = peak_memory(function, device)
        del function
        release(device)
    for name in TIMED:
        function = make(name, trained_at, size, batch, device)
        functions[name] = capture(function) if device == 'cuda' else function
    times = small_training.in_turns(functions, device)
    del functions
    release(device)
    return {name: {**times[name], 'memory': memory[name], 'batch': batch} for name in TIMED}


def test_all(args: argparse.Namespace, report: dict, path: Path) -> None:
    """Train both models, test them at each size, and write the report after each run."""
    report['top1'] = {name: {str(size): {} for size in args.sizes} for name in TRAINED}
    data = small_training.pictures(args.data, 'val', args.device, args.size)
    report['pictures'] = len(data)
    for job in small_training.train_all(small_training.jobs_of(args, TRAINED), args.at_once):
        model = small_training.load(job, len(data.classes))
        found = {size: small_training.top1(model, data, size) for size in args.sizes}
        for size, value in found.items():
            report['top1'][job.name][str(size)][str(job.seed)] = value
        save(report, path)
        said = ', '.join(f'{value:.2f} at {size}' for size, value in found.items())
        print(f'{TRAINED[job.name]}, seed {job.seed}: top-1 {said}', flush=True)
        del model
        release(args.device)


def summarise(report: dict) -> dict[str, dict]:
    """Mean and interval of each model at each size, and what ViG-T gains over DeiT-T by seed."""
    summary = {}
    for size in report['top1']['vig']:
        values = {
            name: [sizes[size][seed] for seed in sorted(sizes[size], key=int)]
            for name, sizes in report['top1'].items()
        }
        summary[size] = {
            **{name: small_training.interval(each, report['pictures']) for name, each in values.items()},
            'gain': small_training.gain(values['vig'], values[DEIT]),
        }
    return summary


def table(report: dict) -> list[str]:
    """The report as lines of a Markdown table; what was not measured is a dash."""
    lines = [
        '| side | model | top-1 | multiply-adds, G | inference, ms an image | memory, MB an image |',
        '|---|---|---|---|---|---|',
    ]
    for size, rows in report['times'].items():
        for name, label in TIMED.items():
            trained = DEIT if name == PLAIN else name
            row = rows[name]
            found = report['summary'][size][trained]
            memory = f'{row["memory"] / row["batch"] / MEGABYTE:.1f}' if row['memory'] else '-'
            cells = [
                small_training.with_interval(found),
                f'{report["operations"][trained][size] / 1e9:.2f}',
                f'{row["median"] / row["batch"] * 1e3:.4f}',
                memory,
            ]
            lines.append(f'| {size} | {label} | {" | ".join(cells)} |')
    return lines


def compare(report: dict) -> list[str]:
    """ViG-T against DeiT-T at the largest size, as lines."""
    size = list(report['times'])[-1]
    rows, counts = report['times'][size], report['operations']
    ours = rows['vig']
    accuracy = [report['summary'][size][name]['mean'] for name in TRAINED]
    lines = [
        f'at {size}: ViG-T has {accuracy[0] - accuracy[1]:+.2f} top-1 over DeiT-T, whose operations are '
        f'{counts[DEIT][size] / counts["vig"][size]:.2f} times its own'
    ]
    for name in (DEIT, PLAIN):
        ratio = rows[name]['median'] / ours['median']
        text = f'at {size}: ViG-T is {ratio:.2f} times as fast as {TIMED[name]}'
        if ours['memory']:
            text += f' and changes the memory by {ours["memory"] / rows[name]["memory"] - 1:+.1%}'
        lines.append(text)
    return lines


def draw(report: dict) -> plt.Figure:
    """Top-1 with intervals, time and memory against the side."""
    figure, axes = plt.subplots(1, 3, figsize=(13, 3.8), layout='constrained')
    sizes = list(map(int, report['times']))
    for name, label in TRAINED.items():
        found = [report['summary'][str(size)][name] for size in sizes]
        means, halves = ([each[key] for each in found] for key in ('mean', 'half'))
        axes[0].errorbar(sizes, means, yerr=halves, marker='o', capsize=4, label=label)
    for axis, key, unit in ((axes[1], 'median', 1e-3), (axes[2], 'memory', MEGABYTE)):
        for name, label in TIMED.items():
            rows = [report['times'][str(size)][name] for size in sizes]
            if rows[0][key] is not None:
                values = [row[key] / row['batch'] / unit for row in rows]
                axis.plot(sizes, values, '--' if name == PLAIN else '-', marker='o', label=label)
        if axis.lines:  # memory is not measured on a CPU
            axis.set_yscale('log')
            axis.legend()
    axes[0].legend()
    titles = ('top-1, % (95 % interval)', 'inference, ms an image', 'peak memory, MB an image')
    for axis, title in zip(axes, titles, strict=True):
        axis.set_xscale('log')
        axis.set_xticks(sizes, list(map(str, sizes)))
        axis.minorticks_off()
        axis.set_xlabel(f'side of the picture (trained at {report["settings"]["size"]})')
        axis.set_title(title)
        axis.grid(alpha=0.3)
    return figure


def main() -> None:
    """Count, time, train, test, print and draw."""
    with one_line_errors():
        args = parse_args()
        check_args(args)
        path = Path(args.out, 'resolution.json')
        report = {**machine(args.device), 'settings': vars(args)}
        report['operations'] = {
            name: {str(size): operations(name, args.size, size) for size in args.sizes} for name in TRAINED
        }
        report['times'] = {}
        for size in args.sizes:
            batch = max(1, args.time_batch * args.sizes[-1] ** 2 // size**2)
            report['times'][str(size)] = measure(args.size, size, batch, args.device)
            save(report, path)
        test_all(args, report, path)
        report['summary'] = summarise(report)
        save(report, path)
        print(*table(report), *compare(report), sep='\n')
        small_training.write_picture(draw(report), path.with_suffix('.png'))
    print(path, path.with_suffix('.png'))


if __name__ == '__main__':
    main()
