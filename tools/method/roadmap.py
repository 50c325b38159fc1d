"""The method's roadmap, measured: one direction, both, a gate for each, 2D gated locality.

    python tools/method/roadmap.py --data data/tin40 --at-once 6

Each step of ViG-T (roadmap_steps.py) is timed, then trained on the same small data with the same recipe and
seeds. The table has, for each step, its parameters, top-1 with a 95 % confidence interval and the gain over
the step before by seed; and the time and peak memory of a training step (forward and backward pass of the
backbone) and of inference. Two more rows are only timed: a gate for each direction by two calls of one
direction and a sum, which the merged operator replaces, and ViG-T without its block operator, module by
module as the other steps run. On a GPU all are replayed as CUDA graphs, and timed in turns.

docs/method.md has the article's claims and what was found.
"""

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path

import matplotlib

matplotlib.use('Agg')  # a picture file, so no display is needed

import matplotlib.pyplot as plt
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # this checkout, installed or not
sys.path.append(str(Path(__file__).resolve().parents[1] / 'benchmark'))  # common, steps

import small_training
from common import MEGABYTE, machine, peak_memory, release, save
from roadmap_steps import OTHER_WAYS, STEPS, build_backbone
from steps import capture, check_step, make_step

from mmvig.backbones.vig import tokens_along
from mmvig.engine.preflight import one_line_errors

KINDS = ('training', 'inference')


def parse_args() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    small_training.add_shared_arguments(parser)
    parser.add_argument('--time-size', type=int, default=224, help='side that is timed; default: 224')
    parser.add_argument('--time-batch', type=int, default=128, help='images that are timed; default: 128')
    parser.add_argument(
        '--part', choices=('time', 'train'), help='one of the two; default: the times, then the trainings'
    )
    return parser.parse_args()


def check_args(args: argparse.Namespace) -> None:
    """Check the arguments.

    Raises:
        SetupError: one is out of its range.
    """
    small_training.check_shared_arguments(args)
    small_training.check_least(args, {'time_size': 16, 'time_batch': 1})


def make(step: str, kind: str, size: int, batch: int, device: str) -> Callable:
    """What is timed of a step: a call on random images, checked once.

    Args:
        step: of STEPS or OTHER_WAYS.
        kind: of KINDS.
        size: side of the images.
        batch: how many.
        device: 'cuda', in bf16 AMP, or 'cpu', in float32.
    """
    torch.manual_seed(0)
    model = build_backbone(step, img_size=size, cuda_graphs=0).to(device)
    x = torch.randn(batch, 3, size, size, device=device)
    function = make_step(model, model, x, 'bf16' if device == 'cuda' else 'fp32', kind)
    check_step(function, model, [(batch, *model.num_features, *[tokens_along(size)] * 2)])
    return function


def time_steps(size: int, batch: int, device: str) -> dict[str, dict]:
    """Time and peak memory of all steps.

    Returns:
        ``{step: {kind: {median, p10, p90, memory}}}``: seconds, and bytes or None on a CPU.
    """
    steps = [*STEPS, *OTHER_WAYS]
    rows = {step: {} for step in steps}
    for kind in KINDS:
        memory = {}
        for step in steps:  # alone on the device
            function = make(step, kind, size, batch, device)
            memory[step] = peak_memory(function, device)
            del function
            release(device)
        functions = {step: make(step, kind, size, batch, device) for step in steps}
        if device == 'cuda':
            functions = {step: capture(function) for step, function in functions.items()}
        for step, times in small_training.in_turns(functions, device).items():
            rows[step][kind] = {**times, 'memory': memory[step]}
        del functions
        release(device)
    return rows


def parameters(model: nn.Module) -> int:
    """How many a model has."""
    return sum(parameter.numel() for parameter in model.parameters())


def train_steps(args: argparse.Namespace, report: dict, path: Path) -> None:
    """Train and test each step; after each run the report is written, with its ``training``."""
    data = small_training.pictures(args.data, 'val', args.device, args.size)
    found = {'pictures': len(data), 'top1': {step: {} for step in STEPS}, **conditions(args)}
    report['training'] = found
    for job in small_training.train_all(small_training.jobs_of(args, STEPS), args.at_once):
        model = small_training.load(job, len(data.classes))
        top1 = small_training.top1(model, data, args.size)
        found['top1'][job.name][str(job.seed)] = top1
        save(report, path)
        print(f'{STEPS[job.name]}, seed {job.seed}: top-1 {top1:.2f}', flush=True)
    found['summary'] = summarise(found['top1'], len(data))
    save(report, path)


def conditions(args: argparse.Namespace) -> dict:
    """What a part of the report was made with."""
    return {'machine': machine(args.device), 'settings': vars(args)}


def summarise(top1: dict[str, dict[str, float]], pictures: int) -> dict[str, dict]:
    """Mean and interval of each step, and the gain over the step before."""
    summary, before = {}, None
    for step, by_seed in top1.items():
        values = [by_seed[seed] for seed in sorted(by_seed, key=int)]
        summary[step] = {
            **small_training.interval(values, pictures),
            'gain': before and small_training.gain(values, before),
        }
        before = values
    return summary


def table(report: dict) -> list[str]:
    """The report as lines of a Markdown table; what was not measured is a dash."""
    lines = [
        '| step | parameters | top-1 | gain over the step before | training step, ms | memory, MB '
        '| inference, ms | memory, MB |',
        '|---|---|---|---|---|---|---|---|',
    ]
    times = report.get('timing', {}).get('steps', {})
    for step, label in (STEPS | OTHER_WAYS).items():
        found = report.get('training', {}).get('summary', {}).get(step)
        accuracy = small_training.with_interval(found)
        increase = small_training.with_interval(found and found['gain'], '+.2f')
        cells = [f'{report["parameters"][step] / 1e6:.3f} M', accuracy, increase]
        for kind in KINDS:
            row = times.get(step, {}).get(kind)
            cells.append(f'{row["median"] * 1e3:.2f}' if row else '-')
            cells.append(f'{row["memory"] / MEGABYTE:.0f}' if row and row['memory'] else '-')
        lines.append(f'| {label} | {" | ".join(cells)} |')
    return lines


def draw(report: dict) -> plt.Figure:
    """Top-1 of the steps with intervals and seeds; training time and memory of all rows."""
    names = STEPS | OTHER_WAYS
    figure, axes = plt.subplots(1, 3, figsize=(13, 3.4), layout='constrained')
    times = report.get('timing', {}).get('steps', {})
    for step, found in report.get('training', {}).get('summary', {}).items():
        place = list(STEPS).index(step)
        axes[0].errorbar(found['mean'], place, xerr=found['half'], fmt='o', color='C0', capsize=4)
        seeds = list(report['training']['top1'][step].values())
        axes[0].plot(seeds, [place] * len(seeds), '|', color='C7', markersize=12)
    axes[0].set_yticks(range(len(STEPS)), STEPS.values())
    axes[0].set_xlabel('top-1, % (95 % interval; a mark a seed)')
    for axis, key, unit, what in (
        (axes[1], 'median', 1e-3, 'training step, ms'),
        (axes[2], 'memory', MEGABYTE, 'memory of a training step, MB'),
    ):
        rows = [times.get(step, {}).get('training', {}) for step in names]
        axis.barh(range(len(names)), [(row.get(key) or 0) / unit for row in rows])
        axis.set_yticks(range(len(names)), ['' if axis is axes[2] else label for label in names.values()])
        axis.set_xlabel(what)
    for axis in axes:
        axis.invert_yaxis()
    return figure


def compare(times: dict[str, dict]) -> list[str]:
    """What the merged operator changes against two calls of one direction, as lines."""
    lines = []
    for kind in KINDS:
        merged, calls = times['each'][kind], times['twice'][kind]
        text = (
            f'{kind}: the merged operator changes the time by {merged["median"] / calls["median"] - 1:+.1%}'
        )
        if merged['memory']:
            text += f' and the memory by {merged["memory"] / calls["memory"] - 1:+.1%}'
        lines.append(text)
    return lines


def main() -> None:
    """Time, train, print and draw."""
    with one_line_errors():
        args = parse_args()
        check_args(args)
        path = Path(args.out, 'roadmap.json')
        # The part that is not run stays as it was.
        report = json.loads(path.read_text()) if args.part and path.is_file() else {}
        report['parameters'] = {
            step: parameters(build_backbone(step, img_size=args.size)) for step in STEPS | OTHER_WAYS
        }
        if args.part != 'train':
            steps = time_steps(args.time_size, args.time_batch, args.device)
            report['timing'] = {'steps': steps, **conditions(args)}
            save(report, path)
        if args.part != 'time':
            if args.device == 'cuda':  # compile the kernels here once, not in each process
                for step in STEPS:
                    make(step, 'training', args.size, args.batch, args.device)
                release(args.device)
            train_steps(args, report, path)
        print(*table(report), sep='\n')
        if 'timing' in report:
            print(*compare(report['timing']['steps']), sep='\n')
        small_training.write_picture(draw(report), path.with_suffix('.png'))
    print(path, path.with_suffix('.png'))


if __name__ == '__main__':
    main()
