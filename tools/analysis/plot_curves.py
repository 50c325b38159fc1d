"""Plot the training curves of one or several runs: losses, learning rate, validation metrics."""

import argparse
import json
import sys
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path

import matplotlib

matplotlib.use('Agg')  # a picture file, so no display is needed

import matplotlib.pyplot as plt
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # this checkout, installed or not

from mmvig.engine.preflight import SetupError, one_line_errors

BOOKKEEPING = {'step', 'iter', 'epoch', 'time', 'data_time', 'memory'}
LINE_STYLES = ['-', '--', ':', '-.']

Curve = list[tuple[int, float]]  # (iteration, value)


@dataclass
class Run:
    """What one run logged."""

    curves: dict[str, Curve] = field(default_factory=lambda: defaultdict(list))
    validated: set[str] = field(default_factory=set)  # the keys that validation logged


def parse_args() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        'runs', nargs='+', help="work dirs, or scalars.json files of mmengine's LocalVisBackend"
    )
    parser.add_argument(
        '--keys', nargs='+', help='what to plot; default: losses, learning rate, main metrics'
    )
    parser.add_argument('--out', help='PNG to write; default: curves.png in the first run')
    return parser.parse_args()


def scalar_files(run: str) -> list[Path]:
    """The scalars of one run, oldest first: a resumed run has a file for each start.

    Raises:
        SetupError: There are none.
    """
    path = Path(run)
    files = sorted(path.glob('*/vis_data/scalars.json')) if path.is_dir() else [path]
    if not files or not files[0].is_file():
        raise SetupError(f'no scalars in {run}: expected a work dir that was trained in, or a JSON')
    return files


def read_run(files: list[Path]) -> Run:
    """Read what a run logged; where it was resumed, the later start replaces the earlier one.

    Validation lines carry the epoch, the iteration or nothing of use, as the config has it, so each
    is placed at the iteration of the training line before it.
    """
    records: list[tuple[int, bool, dict]] = []
    for file in files:
        here = None
        for record in map(json.loads, file.read_text().splitlines()):
            training = 'lr' in record or 'loss' in record
            if training:
                if here is None:
                    records = [old for old in records if old[0] < record['step']]
                here = record['step']
            records.append((here or 0, training, record))
    run = Run()
    for step, training, record in records:
        for key, value in record.items():
            if key not in BOOKKEEPING and isinstance(value, (int, float)):
                run.curves[key].append((step, value))
                if not training:
                    run.validated.add(key)
    return run


def panel_of(key: str) -> str:
    """Name the panel that a key is drawn in."""
    if key.rpartition('/')[2] in ('lr', 'base_lr'):
        return 'Learning rate'
    return 'Loss' if 'loss' in key else 'Metrics'


def choose_keys(runs: list[Run], wanted: list[str] | None) -> list[str]:
    """The keys to plot.

    By default these are the losses, the learning rate and the metrics of validation, less those
    that detail another (bbox_mAP_50 details bbox_mAP).

    Raises:
        SetupError: A wanted key is in no run.
    """
    known = list(dict.fromkeys(key for run in runs for key in run.curves))
    if wanted:
        absent = [key for key in wanted if key not in known]
        if absent:
            raise SetupError(f'no {", ".join(absent)} in the runs; there is {", ".join(known)}')
        return wanted
    validated = set().union(*(run.validated for run in runs))
    details = {key for key in known for shorter in known if key.startswith(f'{shorter}_')}
    return [k for k in known if panel_of(k) != 'Metrics' or k in validated - details]


def smooth(values: np.ndarray) -> np.ndarray:
    """A running mean over a fortieth of the curve, shorter at its ends."""
    half = len(values) // 80
    sums = np.cumsum(np.insert(values, 0, 0.0))
    i = np.arange(len(values))
    first, last = np.maximum(i - half, 0), np.minimum(i + half + 1, len(values))
    return (sums[last] - sums[first]) / (last - first)


def draw_curve(axis: plt.Axes, curve: Curve, color: str, **line) -> None:
    """Draw one curve: smoothed over its raw values if it is noisy, with its last value if short."""
    steps, values = np.array(curve, dtype=float).T
    if axis.get_title() == 'Loss':
        axis.plot(steps, values, color=color, linewidth=1, alpha=0.2)
        values = smooth(values)
    axis.plot(steps, values, color=color, marker='o' if len(steps) < 20 else None, **line)
    if axis.get_title() == 'Metrics':
        axis.annotate(
            f'{values[-1]:.3g}',
            (steps[-1], values[-1]),
            xytext=(5, 4),
            textcoords='offset points',
            color=color,
            fontsize=9,
        )


def draw(runs: dict[str, Run], keys: list[str]) -> plt.Figure:
    """Draw a panel for each kind of key; colours are keys, line styles are runs."""
    plt.style.use('seaborn-v0_8-whitegrid')
    panels = [p for p in ('Loss', 'Learning rate', 'Metrics') if p in map(panel_of, keys)]
    figure, axes = plt.subplots(
        1,
        len(panels),
        sharex=True,
        squeeze=False,
        layout='constrained',
        figsize=(5.2 * len(panels), 4.2),
    )
    for axis, panel in zip(axes[0], panels, strict=True):
        axis.set_title(panel)
        axis.set_xlabel('iteration')
        axis.spines[['top', 'right']].set_visible(False)
        for i, key in enumerate(key for key in keys if panel_of(key) == panel):
            for j, (name, run) in enumerate(runs.items()):
                if key in run.curves:
                    draw_curve(
                        axis,
                        run.curves[key],
                        color=f'C{i % 10}',
                        linestyle=LINE_STYLES[j % len(LINE_STYLES)],
                        linewidth=2.5 if key == 'loss' else 1.5,
                        label=f'{key} ({name})' if len(runs) > 1 else key,
                    )
        axis.legend(fontsize=8, frameon=True)
        axis.margins(x=0.08)
        axis.set_ylim(bottom=min(0, axis.get_ylim()[0]))
    return figure


def main() -> None:
    """Read the runs, draw them and print where the picture is."""
    with one_line_errors():
        args = parse_args()
        names = [Path(run).resolve().name for run in args.runs]
        if len(set(names)) < len(names):
            names = args.runs
        runs = {name: read_run(scalar_files(run)) for name, run in zip(names, args.runs, strict=True)}
        keys = choose_keys(list(runs.values()), args.keys)
    first = Path(args.runs[0])
    out = Path(args.out or (first if first.is_dir() else first.parent) / 'curves.png')
    out.parent.mkdir(parents=True, exist_ok=True)
    figure = draw(runs, keys)
    if len(runs) == 1:
        figure.suptitle(names[0])
    figure.savefig(out, dpi=150)
    print(out)


if __name__ == '__main__':
    main()
