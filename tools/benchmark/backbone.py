"""Time whole backbones, ours and their peers in the same run, after checking what they compute.

    python tools/benchmark/backbone.py --list                              # models and shapes
    python tools/benchmark/backbone.py                                     # all of them, on the GPU
    python tools/benchmark/backbone.py --models 'ViG-H-[TS]' --shapes '800x1216 b2' --compile default
    python tools/benchmark/backbone.py --best --shapes '1024x1024 b8'      # peers compiled and graphed
    python tools/benchmark/backbone.py --models ViG-H-T --profile          # which kernels the time goes to
    python tools/benchmark/backbone.py --sweep                             # 224 to 4096: time a pixel
    python tools/benchmark/backbone.py --device cpu --quick                # does it run at all

A training step is a forward pass in training mode and a backward pass from given random gradients at the
maps, as a head hands them down; there is no loss and no optimiser. bf16 and fp16 are autocast over float32
weights. Ours are checked, maps and gradients, against the chunked backend in float64: their error must be
at most twice that of the chunked backend in the same precision. All must have maps of the right shapes, and
finite maps and gradients. Otherwise no time is reported. `models.py` says what a model is here.

Times are medians, with the 10th and 90th percentile, of calls one after the other; "latency" waits for each
call, "host" is the part of it until the call returns. "1.20 x Swin-T" is 1.20 times as fast as Swin-T.
Ours are as they come, so with CUDA graphs from the second call on; "eager" is without (cuda_graphs=0).
With --best, peers are timed eagerly, as a CUDA graph, and through torch.compile as a CUDA graph
("captured"),
and ratios are to the fastest of the three. At the end stand the models that are as accurate as one of ours
and faster, and accuracy over time is drawn.

Writes backbone.json after each row, and backbone.png (with --sweep, backbone_sweep.*; with --best also
backbone_accuracy.png). The exit status is 1 if a row failed or was wrong; a row that ran out of memory, and
an absent peer, only say so.
"""

import argparse
import math
import re
import statistics
import sys
import traceback
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # this checkout, installed or not

from common import DTYPES, machine, measure, megabytes, milliseconds, peak_memory, release, save
from models import MODELS, SIDE_MULTIPLE, Absent, Entry, build, choose
from steps import Wrong, capture, check_ours, check_step, kernels, make_step

from mmvig.cuda_graphs import CALLS, CudaGraphs
from mmvig.engine.preflight import SetupError, check_writable, one_line_errors
from mmvig.ops.bigla import BACKENDS

# HxW and batch: of pretraining, of a detector's two images a GPU, of dense prediction, and a single image.
HIERARCHICAL_SHAPES = ['224x224 b128', '800x1216 b2', '1024x1024 b8', '800x1216 b1']
PLAIN_SHAPES = ['224x224 b128', '1024x1024 b32', '2048x2048 b8']
QUICK = {'models': ['Swin-T', 'ConvNeXt-T', 'ViG-H-T', 'DeiT-T', 'ViG-T'], 'shapes': ['64x64 b1']}
QUICK_SWEEP_SIDES = (32, 64)
SWEEP_SIDES = (224, 512, 1024, 1536, 2048, 3072, 4096)
SWEEP_PIXELS = 2 * 2048**2  # in a batch, so that small images fill the device as well
STEPS = ('inference', 'training')
COMPILED = {'compiled': 'default', 'comp+graph': 'reduce-overhead'}  # a row's mode, torch.compile's
BEST = ('default', 'graph', 'captured')  # modes of peers with --best; the last is compiled, then a graph
PROFILE_LINES = 14
KEPT_KERNELS = 60


@dataclass(frozen=True)
class Shape:
    """A batch of images."""

    batch: int
    height: int
    width: int

    def __str__(self) -> str:
        return f'{self.height}x{self.width} b{self.batch}'

    @property
    def pixels(self) -> int:
        """Pixels of the batch."""
        return self.batch * self.height * self.width


def parse_shape(text: str) -> Shape:
    """``HxW bN``.

    Raises:
        SetupError: It is no shape, or one that not every model halves evenly.
    """
    match = re.fullmatch(r'(\d+)x(\d+) b(\d+)', text)
    height, width, batch = map(int, match.groups()) if match else (0, 0, 0)
    if not (height and width and batch) or height % SIDE_MULTIPLE or width % SIDE_MULTIPLE:
        raise SetupError(
            f"--shapes: expected 'HxW bN' with sides that are multiples of {SIDE_MULTIPLE}, got {text!r}"
        )
    return Shape(batch, height, width)


class Benchmark:
    """Rows of one run, each measured, shown and saved before the next."""

    def __init__(self, args: argparse.Namespace, path: Path):
        self.args, self.path, self.device = args, path, args.device
        self.rows: list[dict] = []
        self.checks: dict[tuple[str, str], dict | str] = {}  # errors, or what is wrong
        packages = ('timm', 'torchvision')
        self.report = {
            **machine(args.device, packages),
            'backend': args.backend,
            'complete': False,
            'rows': self.rows,
        }

    def save(self, **more) -> None:
        """Write the report as it is now."""
        self.report |= more
        save(self.report, self.path)

    def run(self, entry: Entry, shape: Shape, dtype: str, steps: list[str]) -> None:
        """All rows of a model at a shape and a precision."""
        jobs = [(kind, mode) for kind in steps for mode in self.modes(entry, kind, shape)]
        state: dict = {}
        for kind, mode in jobs:
            row = {
                'model': entry.name,
                'source': 'mmvig' if entry.ours else self.args.peers_from,
                'shape': str(shape),
                'batch': shape.batch,
                'pixels': shape.pixels,
                'dtype': dtype,
                'step': kind,
                'mode': mode,
            }
            try:
                if not state:
                    state['model'], state['x'] = self.prepare(entry, shape, dtype)
                row |= self.time(entry, shape, dtype, kind, mode, **state)
            except Absent as error:
                row |= {'status': 'absent', 'reason': str(error)}
            except torch.cuda.OutOfMemoryError:
                row |= {'status': 'out of memory'}
            except Wrong as error:
                row |= {'status': 'wrong', 'reason': str(error)}
            except Exception as error:  # later rows are still worth having; the exit status tells of it
                traceback.print_exc()
                row |= {'status': 'failed', 'reason': f'{type(error).__name__}: {error}'[:500]}
            if 'model' in state:
                state['model'].zero_grad(set_to_none=True)
                if entry.ours:
                    state['model'].graphs = CudaGraphs('auto')
            release(self.device)
            self.rows.append(row)
            row['ratios'] = self.ratios(entry, row)
            self.show(row)
            self.save()
        state.clear()
        release(self.device)

    def modes(self, entry: Entry, kind: str, shape: Shape) -> list[str]:
        """How a step is run: 'default', 'eager', one of COMPILED's, 'graph', 'captured'."""
        if self.args.best and not entry.ours:
            return list(BEST)
        graph = self.args.graph and kind == 'inference' and shape.batch == 1
        eager = self.args.eager and entry.ours
        compiled = [mode for mode, of_torch in COMPILED.items() if of_torch in self.args.compile]
        return ['default'] + ['eager'] * eager + compiled + ['graph'] * graph

    def prepare(self, entry: Entry, shape: Shape, dtype: str) -> tuple[nn.Module, Tensor]:
        """The model and its images, on the device; ours checked, once a precision."""
        if entry.ours:
            key = entry.name, dtype
            if key not in self.checks:
                try:
                    self.checks[key] = check_ours(entry, dtype, self.device, self.args.backend)
                except Wrong as error:
                    self.checks[key] = str(error)
                release(self.device)
            if isinstance(self.checks[key], str):
                raise Wrong(self.checks[key])
        torch.manual_seed(0)
        model = build(entry, shape.height, shape.width, self.args.peers_from, self.args.backend).to(
            self.device
        )
        x = torch.randn(shape.batch, 3, shape.height, shape.width, device=self.device)
        return model, x.to(memory_format=entry.memory_format)

    def time(
        self, entry: Entry, shape: Shape, dtype: str, kind: str, mode: str, model: nn.Module, x: Tensor
    ) -> dict:
        """Check and measure one step."""
        module = model
        if mode in COMPILED or mode == 'captured':
            torch.compiler.reset()  # shapes of other rows would make this one's dynamic
            module = torch.compile(model, mode=COMPILED.get(mode))
        elif mode == 'eager':
            model.graphs = CudaGraphs(0)
        step = make_step(model, module, x, dtype, kind)
        check_step(step, model, entry.shapes(model, shape.batch, shape.height, shape.width))

        def first_steps() -> None:
            for _ in range(CALLS if entry.ours and mode == 'default' else 1):
                step()  # captured at the last call

        # With the capture: what a graph has set aside no longer counts as allocated.
        memory = peak_memory(first_steps, self.device)
        if mode in ('graph', 'captured'):
            step = capture(step)
        result = {'status': 'ok', **measure(step, self.device, self.args.seconds)}
        result['images_per_second'] = shape.batch / result['median']
        result['memory'] = memory
        if entry.ours:
            result['errors'] = self.checks[entry.name, dtype]
        if self.args.profile and mode == 'default':
            result['kernels'] = kernels(step, self.device)[:KEPT_KERNELS]
        return result

    def ratios(self, entry: Entry, row: dict) -> dict[str, float]:
        """How many times as fast as its peers of the same size a model of ours is, in this run."""
        if not entry.ours or row['status'] != 'ok':
            return {}
        place = f'{row["shape"]} {row["dtype"]}', row['step']
        # Of peers, the default is eager.
        modes = BEST if self.args.best else (row['mode'].replace('eager', 'default'),)
        times = best_times([other for other in self.rows if other['mode'] in modes]).get(place, {})
        peers = [MODELS[name] for name in times]
        return {
            peer.name: times[peer.name] * row['batch'] / row['median']
            for peer in peers
            if not peer.ours and peer.plain == entry.plain and peer.size == entry.size
        }

    def show(self, row: dict) -> None:
        """Print a row."""
        head = f'  {row["model"]:16}{row["step"]:10}{row["mode"]:11}{row["dtype"]:5}'
        if row['status'] != 'ok':
            print(f'{head}{": ".join([row["status"], *filter(None, [row.get("reason")])])}', flush=True)
            return
        parts = [
            f'{milliseconds(row["median"])} ms ({row["p10"] * 1e3:.3f} to {row["p90"] * 1e3:.3f})',
            f'{row["images_per_second"]:9.1f} images/s',
            *(f'{ratio:.2f} x {name}' for name, ratio in row['ratios'].items()),
        ]
        if self.device == 'cuda':
            waits = f'latency{milliseconds(row["latency"])}, host{milliseconds(row["host"])}'
            parts[1:1] = [waits, megabytes(row['memory'])]
        print(head + ', '.join(parts), flush=True)
        for each in row.get('kernels', [])[:PROFILE_LINES]:
            print(
                f'      {each["share"]:6.1%}{milliseconds(each["seconds"])} ms {each["count"]:7.1f} x '
                f'{each["name"][:90]}',
                flush=True,
            )


def growth(rows: list[dict]) -> dict[str, dict]:
    """How the time of an image grows with its pixels, by model and step.

    Returns:
        ``exponent`` of a power law through all sizes (1: linear), and ``ratio``, the time a pixel at
        the largest size over that at the smallest.
    """
    lines: dict[str, list[dict]] = {}
    for row in rows:
        if row['status'] == 'ok' and row['mode'] == 'default':
            lines.setdefault(f'{row["model"]} {row["step"]} {row["dtype"]}', []).append(row)
    result = {}
    for name, line in lines.items():
        if len({row['pixels'] / row['batch'] for row in line}) < 2:
            continue
        pixels = [math.log(row['pixels'] / row['batch']) for row in line]
        times = [math.log(row['median'] / row['batch']) for row in line]
        slope, _ = statistics.linear_regression(pixels, times)
        first, *_, last = sorted(line, key=lambda row: row['pixels'] / row['batch'])
        ratio = last['median'] / last['pixels'] / (first['median'] / first['pixels'])
        result[name] = {'exponent': slope, 'ratio': ratio}
    return result


def best_times(rows: list[dict]) -> dict[tuple[str, str], dict[str, float]]:
    """Seconds an image of each model in its fastest mode, by shape with precision and by step.

    A model of which a mode is missing is left out: that may be its fastest.
    """
    found: dict[tuple[str, str], dict[str, list[dict]]] = {}
    for row in rows:
        place = f'{row["shape"]} {row["dtype"]}', row['step']
        found.setdefault(place, {}).setdefault(row['model'], []).append(row)
    return {
        place: {
            name: min(row['median'] / row['batch'] for row in own)
            for name, own in models.items()
            if all(row['status'] == 'ok' for row in own)
        }
        for place, models in found.items()
    }


def ahead(rows: list[dict]) -> dict[str, list[str]]:
    """By model of ours, shape and step: the models that are as accurate and faster, each at its best."""
    result = {}
    for (shape, step), times in best_times(rows).items():
        for name in filter(lambda name: MODELS[name].ours, times):
            result[f'{name} {shape} {step}'] = [
                other
                for other, seconds in times.items()
                if MODELS[other].plain == MODELS[name].plain
                and MODELS[other].top1 >= MODELS[name].top1
                and seconds < times[name]
            ]
    return result


def plot_accuracy(rows: list[dict], path: Path) -> None:
    """Accuracy over the time of an image, each model at its best; higher and further left is better."""
    import matplotlib

    matplotlib.use('Agg')  # a picture file, so no display is needed
    from matplotlib import pyplot

    panels = best_times(rows)
    if not panels:
        return
    figure, axes = pyplot.subplots(
        len(panels), squeeze=False, figsize=(9, 5 * len(panels)), layout='constrained'
    )
    for (axis,), ((shape, step), times) in zip(axes, panels.items(), strict=True):
        for family in dict.fromkeys(MODELS[name].family for name in times):
            names = [name for name in times if MODELS[name].family == family]
            x, y = [times[name] * 1e3 for name in names], [MODELS[name].top1 for name in names]
            is_ours = MODELS[names[0]].ours
            axis.plot(x, y, 'o-' if is_ours else 's--', lw=2.5 if is_ours else 1, label=family)
            for name, *place in zip(names, x, y, strict=True):
                axis.annotate(
                    name.rpartition('-')[2], place, xytext=(4, 4), textcoords='offset points', fontsize=8
                )
        axis.set(title=f'{step}, {shape}', xlabel='ms an image', ylabel='top-1 on ImageNet-1k, %')
        axis.grid(alpha=0.2)
        axis.legend(fontsize=8, ncols=2)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def plot(rows: list[dict], path: Path, sweep: bool) -> None:
    """Pixels a second at each shape as bars; for a sweep, time and memory a pixel over the size."""
    import matplotlib

    matplotlib.use('Agg')  # a picture file, so no display is needed
    from matplotlib import pyplot

    rows = [row for row in rows if row['status'] == 'ok' and row['mode'] in ('default', 'eager')]
    steps = [step for step in STEPS if any(row['step'] == step for row in rows)]
    if not steps:
        return
    models = [name for name in MODELS if any(row['model'] == name for row in rows)]
    figure, axes = pyplot.subplots(
        len(steps), 1 + sweep, squeeze=False, figsize=(11, 4.2 * len(steps)), layout='constrained'
    )
    for (axis, *others), step in zip(axes, steps, strict=True):
        here = [row for row in rows if row['step'] == step]
        places = list(dict.fromkeys(f'{row["shape"]} {row["dtype"]}' for row in here))
        for i, name in enumerate(models):
            style = {'color': f'C{i % 10}', 'alpha': 1.0 if MODELS[name].ours else 0.5, 'label': name}
            own = [row for row in here if row['model'] == name and row['mode'] == 'default']
            eager = [row for row in here if row['model'] == name and row['mode'] == 'eager']
            if sweep:
                sides = [(row['pixels'] / row['batch']) ** 0.5 for row in own]
                line = 'o-' if MODELS[name].ours else 's--'
                axis.semilogx(sides, [row['median'] / row['pixels'] * 1e9 for row in own], line, **style)
                if all(row['memory'] for row in own):  # on a GPU
                    others[0].semilogx(sides, [row['memory'] / row['pixels'] for row in own], line, **style)
                continue
            outline = {'fill': False, 'hatch': '//', 'edgecolor': 'black'}  # inside a bar of its colour
            width = 0.8 / len(models)
            for some, look in ((own, style), (eager, {**outline, 'label': f'{name}, cuda_graphs=0'})):
                at = [places.index(f'{row["shape"]} {row["dtype"]}') + width * i for row in some]
                rates = [row['pixels'] / row['median'] / 1e6 for row in some]
                if some:
                    axis.bar(at, rates, width, align='edge', **look)
        if sweep:
            sides = sorted({round((row['pixels'] / row['batch']) ** 0.5) for row in here})
            for each, label in ((axis, 'ns a pixel'), (others[0], 'bytes a pixel, peak')):
                each.set(xlabel='side of the image', ylabel=label, ylim=(0, None))
                each.set_xticks(sides, sides)
                each.minorticks_off()
        else:
            axis.set(ylabel='megapixels a second')
            axis.set_xticks([i + 0.4 for i in range(len(places))], places)
        for each in (axis, *others):
            each.set_title(step)
            each.grid(True, which='both', axis='y', alpha=0.2)
            if each.has_data():
                each.legend(fontsize=8, ncols=2)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def parse_args() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('--list', action='store_true', help='list models and shapes, and end')
    parser.add_argument('--models', nargs='+', help="names or patterns such as 'ViG-H-*'; default: all")
    parser.add_argument('--shapes', nargs='+', help="such as '800x1216 b2'; default: see --list")
    parser.add_argument(
        '--dtypes', nargs='+', choices=DTYPES, help='default: bf16, at batch 1 fp16, on a CPU fp32'
    )
    parser.add_argument(
        '--steps', nargs='+', choices=STEPS, help='default: both, at batch 1 inference alone'
    )
    parser.add_argument(
        '--backend', default='auto', choices=['auto', *BACKENDS], help="of ours; 'triton' fuses all of it"
    )
    parser.add_argument('--peers-from', choices=['timm', 'torchvision'], default='timm')
    parser.add_argument(
        '--sweep', action='store_true', help=f'square images of sides {SWEEP_SIDES} instead'
    )
    parser.add_argument(
        '--compile',
        nargs='+',
        choices=COMPILED.values(),
        default=[],
        help="also with torch.compile in these modes; 'reduce-overhead' makes CUDA graphs",
    )
    parser.add_argument(
        '--best', action='store_true', help='peers also as a CUDA graph, and compiled as a CUDA graph'
    )
    parser.add_argument('--graph', action='store_true', help='at batch 1 also as a CUDA graph')
    parser.add_argument('--eager', action='store_true', help='ours also without CUDA graphs')
    parser.add_argument('--profile', action='store_true', help='list the kernels by their total time')
    parser.add_argument('--seconds', type=float, default=1.0, help='of each measurement; default: 1')
    parser.add_argument('--device', default='cuda', choices=['cuda', 'cpu'])
    parser.add_argument('--quick', action='store_true', help='tiny models, small images, few repeats')
    parser.add_argument(
        '--out', type=Path, default=Path('work_dirs/benchmark'), help='folder of the JSON and the plot'
    )
    return parser.parse_args()


def choose_jobs(args: argparse.Namespace) -> list[tuple[Entry, Shape, str, list[str]]]:
    """What to run: model, shape, precision and steps; models of the same shape together.

    Raises:
        SetupError: An option is out of its range, or does not fit another.
    """
    if not 0 < args.seconds < math.inf:
        raise SetupError(f'--seconds must be a number above 0, got {args.seconds}')
    check_writable('--out', args.out, folder=True)
    if args.sweep and args.shapes:
        raise SetupError('--sweep has shapes of its own: leave out --shapes')
    if args.device == 'cuda' and not torch.cuda.is_available():
        raise SetupError('no CUDA device: run this on a machine with one, or give --device cpu --quick')
    if args.best and (args.sweep or args.compile or args.graph):
        raise SetupError(
            '--best has modes and a picture of its own: leave out --sweep, --compile and --graph'
        )
    for option in ('best', 'graph', 'eager'):
        if getattr(args, option) and args.device != 'cuda':
            raise SetupError(f'--{option} needs a CUDA device')
    entries = choose(args.models or (QUICK['models'] if args.quick else ['*']))
    defaults = {False: HIERARCHICAL_SHAPES, True: PLAIN_SHAPES}  # by Entry.plain
    if args.sweep:
        sides = QUICK_SWEEP_SIDES if args.quick else SWEEP_SIDES
        pixels = min(SWEEP_PIXELS, sides[-1] ** 2)
        texts = [f'{side}x{side} b{max(1, pixels // side**2)}' for side in sides]
        defaults = dict.fromkeys(defaults, texts)
    elif args.shapes or args.quick:
        defaults = dict.fromkeys(defaults, args.shapes or QUICK['shapes'])
    texts = {plain: [parse_shape(text) for text in shapes] for plain, shapes in defaults.items()}
    jobs = []
    for plain, shapes in texts.items():
        for shape in shapes:
            single = shape.batch == 1 and not args.sweep and not args.quick
            usual = 'fp32' if args.device == 'cpu' else 'fp16' if single else 'bf16'
            steps = args.steps or (['inference'] if single else list(STEPS))
            for dtype in args.dtypes or [usual]:
                jobs += [(entry, shape, dtype, steps) for entry in entries if entry.plain == plain]
    return jobs


def main() -> None:
    """Check, time, print, write."""
    args = parse_args()
    if args.list:
        print('models:', ', '.join(MODELS))
        print('shapes:', ', '.join(HIERARCHICAL_SHAPES))
        print('shapes of ViG and DeiT:', ', '.join(PLAIN_SHAPES))
        return
    with one_line_errors():
        jobs = choose_jobs(args)
    if args.quick:
        args.seconds = min(args.seconds, 0.05)
    torch.backends.cudnn.benchmark = True  # images of a row have one size
    path = args.out / ('backbone_sweep.json' if args.sweep else 'backbone.json')
    benchmark = Benchmark(args, path)
    print(', '.join(f'{k} {v}' for k, v in benchmark.report.items() if not isinstance(v, list)), flush=True)
    place = None
    for entry, shape, dtype, steps in jobs:
        if place != (shape, dtype):
            place = shape, dtype
            print(f'\n{shape}, {dtype}', flush=True)
        benchmark.run(entry, shape, dtype, steps)
    if args.sweep:
        benchmark.report['growth'] = growth(benchmark.rows)
        print()
        for name, each in benchmark.report['growth'].items():
            print(f'{name}: time grows as pixels ^ {each["exponent"]:.2f}; a pixel {each["ratio"]:.2f} x')
    if args.best:
        benchmark.report['ahead'] = ahead(benchmark.rows)
        print()
        for name, others in benchmark.report['ahead'].items():
            print(f'{name}: as accurate and faster: {", ".join(others) or "none"}')
        plot_accuracy(benchmark.rows, path.with_name('backbone_accuracy.png'))
    benchmark.save(complete=True)
    plot(benchmark.rows, path.with_suffix('.png'), args.sweep)
    print(f'\n{path}\n{path.with_suffix(".png")}')
    bad = [row for row in benchmark.rows if row['status'] in ('wrong', 'failed')]
    if bad:
        sys.exit(f'{len(bad)} rows are wrong or failed: their times are not reported')


if __name__ == '__main__':
    main()
