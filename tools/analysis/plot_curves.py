"""Plot the training curves of one or several runs: losses, learning rate, validation metrics."""

import argparse
import io
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

from mmvig.engine.files import write_whole
from mmvig.engine.preflight import SetupError, check_writable, one_line_errors

BOOKKEEPING = {'step', 'iter', 'epoch', 'time', 'data_time', 'memory'}
LINE_STYLES = ['-', '--', ':', '-.']

Curve = list[tuple[int, float]]  # (iteration, value)


@dataclass
class Run:
    """What one run logged."""

    curves: dict[str, Curve] = field(default_factory=lambda: defaultdict(list))
    validated: set[str] = field(default_factory=set)  # the keys that validation logged
    not_finite: dict[str, int] = field(default_factory=lambda: defaultdict(int))  # values left out


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
    if not files or not all(file.is_file() for file in files):
        raise SetupError(f'no scalars in {run}: expected a work dir that was trained in, or a JSON')
    return files


def read_records(file: Path) -> list[dict]:
    """The lines of a log; a last one that is cut off, as a run that is killed leaves it, is left out.

    Raises:
        SetupError: The file is no such log.
    """
    try:
        lines = file.read_text().splitlines(keepends=True)
    except (OSError, ValueError) as error:
        raise SetupError(f'{file} cannot be read as a log: {error}') from error
    records = []
    for number, line in enumerate(lines, start=1):
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            if number == len(lines) > 1 and not line.endswith('\n'):
                print(f'{file}: the last line is cut off, so it is left out')
                break
            raise SetupError(f'{file}, line {number} is no JSON: {error}') from error
        if not isinstance(record, dict) or not isinstance(record.get('step', 0), (int, float)):
            raise SetupError(f'{file}, line {number} is no record of a run: {line.strip()[:80]}')
        if ('lr' in record or 'loss' in record) and not 0 <= record.get('step', -1) < 2**53:
            raise SetupError(f'{file}, line {number} has no step: {line.strip()[:80]}')
        records.append(record)
    return records


def read_run(files: list[Path]) -> Run:
    """Read what a run logged; where it was resumed, the later start replaces the earlier one.

    Validation lines carry the epoch, the iteration or nothing of use, as the config has it, so each
    is placed at the iteration of the training line before it. Values that are not finite are counted.

    Raises:
        SetupError: A file is no log of a run, or they hold no numbers.
    """
    records: list[tuple[int, bool, dict]] = []
    for file in files:
        here = None
        for record in read_records(file):
            training = 'lr' in record or 'loss' in record
            if training:
                if here is None:
                    records = [old for old in records if old[0] < record['step']]
                here = record['step']
            records.append((here or 0, training, record))
    run = Run()
    for step, training, record in records:
        for key, value in record.items():
            if key in BOOKKEEPING or not isinstance(value, (int, float)):
                continue
            if not abs(value) <= sys.float_info.max:
                run.not_finite[key] += 1
                continue
            run.curves[key].append((step, value))
            if not training:
                run.validated.add(key)
    if not run.curves:
        raise SetupError(f'{", ".join(map(str, files))}: there are no finite numbers to plot')
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
        return list(dict.fromkeys(wanted))
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
        first = Path(args.runs[0])
        beside = first if first.is_dir() else first.parent
        out = beside / 'curves.png' if args.out is None else Path(args.out)
        if out.suffix != '.png':
            raise SetupError(f'--out {out}: it must end in .png')
        check_writable('--out', out)
        names = [Path(run).resolve().name for run in args.runs]
        if len(set(names)) < len(names):
            names = args.runs
        runs = {name: read_run(scalar_files(run)) for name, run in zip(names, args.runs, strict=True)}
        keys = choose_keys(list(runs.values()), args.keys)
        for name, run in runs.items():
            for key, count in run.not_finite.items():
                print(f'{name}: {count} values of {key} are NaN or infinite, so they are left out')
        figure = draw(runs, keys)
        if len(runs) == 1:
            figure.suptitle(names[0])
        buffer = io.BytesIO()
        figure.savefig(buffer, format='png', dpi=150)
        write_whole(out, buffer.getvalue())
    print(out)


if __name__ == '__main__':
    main()
