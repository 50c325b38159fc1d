"""Time the job itself: iterations of mmengine's Runner on real pictures, as ``tools/train.py`` runs them.

    python tools/benchmark/training.py configs/detection/maskrcnn_vigh_s.py --data-root data/coco/
    python tools/benchmark/training.py CONFIG --peers swin convnext --inference
    python tools/benchmark/training.py CONFIG OTHER_CONFIG --peers
    torchrun --nproc-per-node 2 tools/benchmark/training.py CONFIG --launcher pytorch

Each model has a process of its own. After a warm-up side by side they take turns: one runs ``--turn``
iterations while the others wait, so that all meet the same moods of the host. A turn's first ``--skip``
iterations are not timed, since its data were loaded while the process waited.

Peers are those of the first config. Each runs twice: ``(own loop)`` trains as mmdet's and mmseg's configs
do (AdamW in one group a parameter, float16 with a loss scaler, bitmaps as masks, two workers), the other
with everything that this project's configs do. Models start from random weights;
stochastic depth and data are the config's.

Columns, in ms: an iteration's mean, median and 90th percentile; what of the mean is waiting for data, and
host time in preprocessing, backbone, neck, heads, backward pass, optimiser step and the rest (hooks,
logging). A part that waits for the GPU includes its waiting. ``gpu`` is how long the GPU is busy in an
iteration, from PyTorch's profiler, in iterations that are not timed. Memory is PyTorch's peak over all.
``first`` is the seconds from the process's start to the end of the first iteration, ``Mpixel`` the mean
size of a batch's images, ``replayed`` the share of the backbone's timed passes that were CUDA graphs.

Writes training.json, which has the parts' medians too, and training.png, also of what has been timed when
it is interrupted (Ctrl-C, SIGTERM).
"""

import argparse
import copy
import math
import multiprocessing
import os
import signal
import statistics
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np
import torch
from mmengine.config import Config
from mmengine.hooks import Hook
from mmengine.model import is_model_wrapper
from mmengine.optim import OptimWrapper
from mmengine.runner import Runner
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # this checkout, installed or not

from common import machine, megabytes, save
from detector import let_boxes_pass, peer_backbone, stages_of

from mmvig.engine import cli
from mmvig.engine.amp import use_amp
from mmvig.engine.preflight import SetupError, check_training, check_writable, one_line_errors

OWN_LOOP = ' (own loop)'
PEERS = ('swin', 'convnext', 'resnet50')
PARTS = ('data', 'preprocessing', 'backbone', 'neck', 'heads', 'backward', 'step', 'rest')
PROFILED = 12  # iterations of the profiler's turn
# Parts of mmdet that have a faster form here.
WRAPPED = (
    'AnchorGenerator',
    'Conv2d',
    'DeltaXYWHBBoxCoder',
    'DetDataPreprocessor',
    'FCNMaskHead',
    'LoadAnnotations',
    'MaxIoUAssigner',
    'RandomSampler',
    'RPNHead',
    'SingleRoIExtractor',
    'StandardRoIHead',
)


class Done(Exception):
    """No more turns: leaves mmengine's loop."""


def with_peer(cfg: Config, peer: str) -> Config:
    """The config with a peer's backbone of the same size.

    Raises:
        SetupError: There is none of this size.
    """
    cfg = copy.deepcopy(cfg)
    if peer == 'resnet50':
        stages = stages_of(cfg.model.backbone)
        backbone = dict(
            type='ResNet' if cfg.default_scope == 'mmdet' else 'ResNetV1c',
            depth=50,
            out_indices=stages,
            frozen_stages=1,
            norm_eval=True,
            style='pytorch',
        )
        channels = [256, 512, 1024, 2048]
        if 'neck' in cfg.model:
            cfg.model.neck.in_channels = [channels[i] for i in stages]
        else:
            cfg.model.decode_head.in_channels = channels
            cfg.model.auxiliary_head.in_channels = channels[2]
    else:
        backbone = peer_backbone(peer, cfg.model.backbone)
        if backbone is None:
            raise SetupError(f'{cfg.filename}: there is no {peer} of the size of its backbone')
    cfg.model.backbone = backbone
    return cfg


def with_own_loop(cfg: Config) -> Config:
    """The config with the loop that mmdet's and mmseg's own configs have."""
    cfg = copy.deepcopy(cfg)
    optimizer = {key: value for key, value in cfg.optim_wrapper.optimizer.items() if key != 'fused'}
    amp = dict(type='AmpOptimWrapper', loss_scale='dynamic') if torch.cuda.is_available() else {}
    cfg.optim_wrapper = dict(
        **amp,
        optimizer=optimizer,
        paramwise_cfg=dict(
            custom_keys={
                name: dict(decay_mult=0.0)
                for name in ('absolute_pos_embed', 'relative_position_bias_table', 'norm')
            }
        ),
    )
    import mmvig.compat  # noqa: F401  it stands in where mmcv is not compiled

    own_operators = 'mmvig.compat.mmcv_ext' not in sys.modules
    _without_ours(cfg.model, own_operators)
    cfg.model.data_preprocessor.pop('non_blocking', None)
    cfg.custom_hooks = [each for each in cfg.get('custom_hooks', []) if not _is_ours(each)]
    cfg.default_hooks = {
        key: each for key, each in cfg.default_hooks.items() if not each or not _is_ours(each)
    }
    for loader in (cfg.train_dataloader, cfg.val_dataloader):
        loader.num_workers = 2
        loader.pop('pin_memory', None)
        _without_ours(loader.dataset, own_operators)
    cfg.runner_type = 'Runner'
    return cfg


def _is_ours(node: dict) -> bool:
    return str(node.get('type', '')).startswith('mmvig.')


def _without_ours(node, own_operators: bool) -> None:
    """The packages' own types for :data:`WRAPPED`, and mmcv's RoIAlign where it is compiled."""
    for key, value in node.items() if isinstance(node, dict) else enumerate(node):
        if isinstance(value, (dict, list, tuple)):
            _without_ours(value, own_operators)
        elif key == 'type' and str(value).removeprefix('mmvig.') in WRAPPED:
            node[key] = value.removeprefix('mmvig.')
        elif key == 'use_torchvision' and own_operators:
            node[key] = False


class Timeline(Hook):
    """Times each iteration's parts, and waits between turns.

    Args:
        next_turn: called between turns with the rows since the last; returns how many iterations come next,
            or raises :class:`Done`.
    """

    priority = 'LOWEST'

    def __init__(self, next_turn: Callable[[list[dict]], int]):
        self.next_turn = next_turn
        self.rows: list[dict] = []
        self.left = 1  # the first iteration is a turn
        self.times: dict[str, float] = {}
        self.size: tuple[int, int] | None = None

    def watch(self, runner: Runner) -> None:
        """Put clocks around the parts of an iteration, which are what mmengine calls."""
        model = runner.model.module if is_model_wrapper(runner.model) else runner.model
        for name, module in (
            ('preprocessing', model.data_preprocessor),
            ('backbone', model.backbone),
            ('neck', getattr(model, 'neck', None)),
        ):
            if module is not None:
                module.register_forward_pre_hook(lambda *_, name=name: self._begin(name))
                module.register_forward_hook(lambda *_, name=name: self._end(name))
        model.backbone.register_forward_pre_hook(self._see)
        self._time(runner.model, 'train_step', 'model')
        self._time(runner.model, 'val_step', 'model')
        if isinstance(runner.optim_wrapper, OptimWrapper):
            self._time(runner.optim_wrapper, 'backward')
            self._time(runner.optim_wrapper, 'step')
        self.last = time.perf_counter()

    def _time(self, owner: object, name: str, part: str | None = None) -> None:
        call = getattr(owner, name)

        def timed(*args, **kwargs):
            self._begin(part or name)
            result = call(*args, **kwargs)
            self._end(part or name)
            return result

        setattr(owner, name, timed)

    def _begin(self, name: str) -> None:
        self.times[name] = self.times.get(name, 0.0) - time.perf_counter()

    def _end(self, name: str) -> None:
        self.times[name] += time.perf_counter()

    def _see(self, module: nn.Module, inputs: tuple) -> None:
        self.size = tuple(inputs[0].shape[-2:])

    def _before(self) -> None:
        self.times = {'data': time.perf_counter() - self.last}

    def _after(self) -> None:
        now = time.perf_counter()
        whole, parts = now - self.last, self.times
        model = parts.pop('model')
        rest = whole - model - parts['data']
        heads = model + parts['data'] - sum(parts.values())
        memory = {}
        if torch.cuda.is_available():  # mmengine's logger resets the peaks
            memory['allocated'] = torch.cuda.max_memory_allocated()
            memory['reserved'] = torch.cuda.max_memory_reserved()
        row = {'whole': whole, **parts, 'heads': heads, 'rest': rest, 'size': self.size, **memory}
        self.rows.append(row)
        self.last = now
        self.left -= 1
        if not self.left:
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            self.left = self.next_turn(self.rows)
            self.rows = []
            self.last = time.perf_counter()

    def before_train_iter(self, runner, batch_idx, data_batch=None) -> None:
        """Note how long the loop has waited for data."""
        self._before()

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None) -> None:
        """Close a row."""
        self._after()

    def before_val_iter(self, runner, batch_idx, data_batch=None) -> None:
        """The same in inference."""
        self._before()

    def after_val_iter(self, runner, batch_idx, data_batch=None, outputs=None) -> None:
        """The same in inference."""
        self._after()


def build(cfg: Config, inference: bool) -> Runner:
    """The Runner that ``tools/train.py`` builds, for longer than asked, without checkpoints and metrics."""
    length = 'max_epochs' if 'max_epochs' in cfg.train_cfg else 'max_iters'
    cfg.train_cfg.val_interval = cfg.train_cfg[length] = 10**6
    cfg.default_hooks.checkpoint = None  # mmengine's default, if it is not named
    cfg.default_hooks.pop('visualization', None)
    cfg.log_level = 'WARNING'
    if cfg.get('val_cfg'):
        cfg.val_cfg.fp16 = inference and torch.cuda.is_available()  # slow on CPUs
        cfg.val_evaluator = cfg.test_evaluator = []
    return cli.build_runner(cfg)


class Turns:
    """What a model's process does between turns: hands over what it found, and asks how to go on.

    Args:
        started: ``time.time()`` at the process's start.
        exchange: takes the facts of a turn, returns the next turn's iterations: 0 to end, -1 for
            :data:`PROFILED` ones under the profiler.
    """

    def __init__(self, started: float, exchange: Callable[[dict], int]):
        self.started = started
        self.exchange = exchange
        self.facts: dict = {}
        self.backbone: nn.Module | None = None
        self.profiler: torch.profiler.profile | None = None

    def __call__(self, rows: list[dict]) -> int:
        """The number of iterations that come next.

        Raises:
            Done: None.
        """
        facts = self.facts
        facts['rows'] = rows
        facts.setdefault('first', time.time() - self.started)
        if self.profiler is not None:
            self.profiler.stop()
            facts['gpu'] = busy_seconds(self.profiler) / len(rows)
            self.profiler = None
        for name in ('allocated', 'reserved'):
            facts[name] = max([facts.get(name, 0), *(row.pop(name, 0) for row in rows)])
        graphs = getattr(self.backbone, 'graphs', None)
        facts['passes'] = graphs and graphs.outcomes()
        turn = self.exchange(facts)
        if turn == 0:
            raise Done
        if turn > 0 or not torch.cuda.is_available():
            return abs(turn)
        self.profiler = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA])
        self.profiler.start()
        return PROFILED


def busy_seconds(profiler: torch.profiler.profile) -> float:
    """How long at least one kernel or copy ran on the GPU."""
    spans = sorted(
        (event.time_range.start, event.time_range.end)
        for event in profiler.events()
        if event.device_type == torch.autograd.DeviceType.CUDA
    )
    busy, until = 0.0, 0.0
    for start, end in spans:
        busy += max(end - max(start, until), 0.0)
        until = max(until, end)
    return busy / 1e6


def run(cfg: Config, inference: bool, turns: Turns) -> None:
    """Train, or predict the validation pictures, in turns."""
    timeline = Timeline(turns)
    runner = build(cfg, inference)
    model = runner.model.module if is_model_wrapper(runner.model) else runner.model
    turns.backbone = model.backbone
    runner.register_hook(timeline)
    try:
        if not inference:
            runner.register_hook(Watch(timeline))
            runner.train()
        loop = runner.val_loop
        model.init_weights()
        runner.call_hook('before_run')
        if hasattr(model, 'roi_head'):
            model.eval()
            batch = next(iter(loop.dataloader))
            with torch.no_grad(), torch.autocast(model.data_preprocessor.device.type, enabled=loop.fp16):
                let_boxes_pass(model, lambda: model.val_step(batch))
        timeline.watch(runner)
        while True:
            loop.run()
    except Done:
        return


class Watch(Hook):
    """Starts a timeline once the optimiser is there."""

    def __init__(self, timeline: Timeline):
        self.timeline = timeline

    def before_train(self, runner: Runner) -> None:
        """Start."""
        self.timeline.watch(runner)


def serve(cfg: Config, inference: bool, own_loop: bool, started: float, pipe: Connection) -> None:
    """The body of a model's process."""
    signal.signal(
        signal.SIGINT, signal.SIG_IGN
    )  # a terminal's Ctrl-C goes to all: the first process ends us
    if not own_loop:
        cli.use_expandable_segments()
    import mmvig.compat  # noqa: F401  before what imports mmcv.ops

    def exchange(facts: dict) -> int:
        pipe.send(facts)
        return pipe.recv()

    try:
        run(cfg, inference, Turns(started, exchange))
    except (EOFError, BrokenPipeError):  # nobody asks any more
        return
    except Exception as error:  # the others' figures are still worth having; the exit status tells of it
        traceback.print_exc()
        pipe.send({'failed': f'{type(error).__name__}: {error}'[:500]})


class Model:
    """A model's process, and what it has found so far."""

    def __init__(self, name: str, cfg: Config, inference: bool):
        self.name = name
        context = multiprocessing.get_context('spawn')
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(
            target=serve, args=(cfg, inference, name.endswith(OWN_LOOP), time.time(), theirs)
        )
        self.process.start()
        theirs.close()
        self.rows: list[dict] = []
        self.sizes: Counter = Counter()
        self.facts: dict = {}
        self.passes = None

    def receive(self) -> list[dict]:
        """The rows of the turn that ends; none if the model has failed."""
        if 'failed' in self.facts:
            return []
        try:
            facts = self.pipe.recv()
        except EOFError:
            facts = {'failed': 'the process ended'}
        self.facts |= facts
        return facts.get('rows', [])

    def start(self, iterations: int) -> None:
        """Begin a turn, which :meth:`receive` ends."""
        if 'failed' not in self.facts:
            self.pipe.send(iterations)

    def turn(self, iterations: int) -> list[dict]:
        """Run a turn; its rows."""
        self.start(iterations)
        return self.receive()

    def finish_warm_up(self) -> None:
        """Wait for the end of what is not timed, and note where counters stand."""
        self.receive()
        self.passes = self.facts.get('passes')

    def measure(self, iterations: int, skip: int) -> None:
        """Run a turn that is timed."""
        rows = self.turn(iterations + skip)
        self.sizes.update(row['size'] for row in rows)
        self.rows += rows[skip:]

    def end(self) -> None:
        """Let the process end."""
        if 'failed' not in self.facts:
            self.pipe.send(0)
        self.process.join()

    def kill(self) -> None:
        """End the process where it is."""
        self.process.kill()
        self.process.join()

    def summary(self) -> dict:
        """The model's row of the report; seconds and bytes."""
        if 'failed' in self.facts or not self.rows:
            return {'name': self.name, 'status': 'failed', 'reason': self.facts.get('failed', 'no rows')}
        found = summarise(self.rows, self.facts, self.passes, self.sizes)
        return {'name': self.name, 'status': 'ok', **found}


def summarise(rows: list[dict], facts: dict, passes: Counter | None, sizes: Counter) -> dict:
    """Means of the parts, and what else a report says of a model."""
    whole = [row['whole'] for row in rows]
    working = [row['whole'] - row['data'] for row in rows]
    replayed = None
    if passes is not None and (new := facts['passes'] - passes):  # none on a CPU
        replayed = new['replay'] / new.total()
    return {
        'iterations': len(rows),
        'mean': statistics.mean(whole),
        'median': statistics.median(whole),
        'p90': statistics.quantiles(whole, n=10)[-1],
        'without_data': {'mean': statistics.mean(working), 'median': statistics.median(working)},
        'parts': {part: statistics.mean(row.get(part, 0.0) for row in rows) for part in PARTS},
        'parts_median': {part: statistics.median(row.get(part, 0.0) for row in rows) for part in PARTS},
        'gpu': facts.get('gpu'),
        'allocated': facts.get('allocated'),
        'reserved': facts.get('reserved'),
        'first': facts['first'],
        'pixels': sum(math.prod(size) * n for size, n in sizes.items()) / max(sizes.total(), 1),
        'sizes': {f'{height}x{width}': count for (height, width), count in sizes.most_common()},
        'replayed': replayed,
    }


def show(rows: list[dict]) -> None:
    """Print the table, and how many times as fast as each peer ours is."""
    names = ('mean', 'median', 'p90', *PARTS, 'gpu')
    width = max(len(row['name']) for row in rows)
    heads = ' '.join(f'{name[:8]:>8}' for name in names)
    print(' ' * width, heads, '   allocated    reserved  first sizes Mpixel replayed')
    for row in rows:
        if row['status'] != 'ok':
            print(f'{row["name"]:{width}} {row["status"]}: {row["reason"]}')
            continue
        values = [row['mean'], row['median'], row['p90'], *row['parts'].values(), row['gpu']]
        cells = [f'{value * 1e3:8.1f}' if value is not None else f'{"-":>8}' for value in values]
        for memory in (row['allocated'], row['reserved']):
            cells.append(megabytes(memory) if memory else f'{"-":>10}')
        replayed = '-' if row['replayed'] is None else f'{row["replayed"]:.0%}'
        cells += [f'{row["first"]:6.1f}', f'{len(row["sizes"]):5}', f'{row["pixels"] / 1e6:6.2f}', replayed]
        print(f'{row["name"]:{width}}', *cells)
    ours = rows[0]
    for row in rows[1:]:
        if ours['status'] == row['status'] == 'ok':
            ratio = row['mean'] / ours['mean']
            more = row['without_data']['mean'] / ours['without_data']['mean']
            print(f'{ours["name"]} is {ratio:.2f} times as fast as {row["name"]}; without data {more:.2f}')
    sys.stdout.flush()


def draw(rows: list[dict], path: Path) -> None:
    """Stacked bars of where an iteration goes, with a mark where the GPU's own time ends."""
    import matplotlib

    matplotlib.use('Agg')
    from matplotlib import pyplot

    rows = [row for row in rows if row['status'] == 'ok'][::-1]
    figure, axes = pyplot.subplots(figsize=(9, 1.2 + 0.5 * len(rows)), layout='constrained')
    lefts = np.zeros(len(rows))
    for part, colour in zip(PARTS, pyplot.colormaps['tab10'].colors, strict=False):
        values = np.array([row['parts'][part] for row in rows]) * 1e3
        axes.barh(range(len(rows)), values, left=lefts, color=colour, label=part)
        lefts += values
    for place, row in enumerate(rows):
        if row['gpu']:
            label = 'GPU busy' if place == 0 else None
            axes.plot([row['gpu'] * 1e3] * 2, [place - 0.4, place + 0.4], color='black', lw=2, label=label)
    axes.set_yticks(range(len(rows)), [row['name'] for row in rows])
    axes.set_xlabel('ms an iteration')
    axes.legend(ncols=5, loc='lower center', bbox_to_anchor=(0.5, 1.0), frameon=False)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def parse_args() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        'configs', nargs='+', metavar='CONFIG', help='config file of a detector or segmentor with a ViG-H'
    )
    parser.add_argument('--peers', nargs='*', choices=PEERS, default=['swin', 'convnext'])
    parser.add_argument('--loops', choices=['both', 'own', 'ours'], default='both', help="peers' loops")
    parser.add_argument('--data-root', help="the data set's folder; default: the config's")
    parser.add_argument('--inference', action='store_true', help='predict validation pictures instead')
    parser.add_argument('--iterations', type=int, default=300, help='timed ones; default: 300')
    parser.add_argument('--warm-up', type=int, default=100, help='iterations before; default: 100')
    parser.add_argument('--turn', type=int, default=50, help='timed iterations in a turn; default: 50')
    parser.add_argument('--skip', type=int, default=10, help='untimed ones before each; default: 10')
    parser.add_argument(
        '--amp', choices=['auto', 'bf16', 'fp16', 'none'], default='auto', help="train.py's; default: auto"
    )
    parser.add_argument(
        '--out', type=Path, default=Path('work_dirs/benchmark'), help='folder of training.json and .png'
    )
    cli.add_shared_arguments(parser)
    return parser.parse_args()


def read_models(args: argparse.Namespace, folder: str) -> list[tuple[str, Config]]:
    """Names and configs, ours first; runs log into a folder.

    Raises:
        SetupError: An argument or the config does not fit, or data is missing.
    """
    if min(args.iterations, args.turn, args.warm_up) < 1 or args.skip < 0:
        raise SetupError('--iterations, --turn and --warm-up must be at least 1, --skip at least 0')
    if args.launcher != 'none' and len(args.configs) > 1:
        raise SetupError('with --launcher, one config runs, alone: name one')
    check_writable('--out', args.out, folder=True)
    if args.data_root:
        args.cfg_options = {'data_root': args.data_root.rstrip('/') + '/', **args.cfg_options}
    models = []
    for path in args.configs:
        args.config = path
        cfg = cli.load_config(args)
        if cfg.get('default_scope') not in ('mmdet', 'mmseg'):
            raise SetupError(f'{path} is no config of a detector (mmdet) or segmentor (mmseg)')
        check_training(cfg)
        models.append((Path(path).stem, cfg))
    cfg = models[0][1]
    for peer in args.peers:
        other = with_peer(cfg, peer)
        if args.loops != 'ours':
            models.append((f'{peer}{OWN_LOOP}', with_own_loop(other)))
        if args.loops != 'own':
            models.append((peer, other))
    for name, cfg in models:
        if not name.endswith(OWN_LOOP) and args.amp != 'none':
            use_amp(cfg, args.amp)
        cfg.work_dir = tempfile.mkdtemp(dir=folder)
    return models


def main() -> None:
    """Run the models in turns, print, write."""
    args = parse_args()
    with tempfile.TemporaryDirectory(prefix='mmvig-benchmark-', ignore_cleanup_errors=True) as folder:
        with one_line_errors():
            models = read_models(args, folder)
        if args.launcher != 'none':
            run_ranks(models, args)
            return
        processes: list[Model] = []
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        try:
            run_models(models, processes, args)
        except KeyboardInterrupt:
            for model in processes:
                model.kill()
            report([model.summary() for model in processes if model.rows], args)
            sys.exit('interrupted: these are the figures until then')
        report([model.summary() for model in processes], args)


def run_models(models: list[tuple[str, Config]], processes: list[Model], args: argparse.Namespace) -> None:
    """Start the models' processes, which are put into ``processes``, run their turns, and end them."""
    for name, cfg in models:  # one after the other, so that each one's first iteration is its own
        processes.append(Model(name, cfg, args.inference))
        processes[-1].receive()
    for model in processes:  # side by side
        model.start(args.warm_up)
    for model in processes:
        model.finish_warm_up()
    for _ in range(-(-args.iterations // args.turn)):
        for model in processes:
            model.measure(args.turn, args.skip)
        write([model.summary() for model in processes], args)  # kept if the run is killed
    for model in processes:
        model.turn(-1)
        model.end()


def run_ranks(models: list[tuple[str, Config]], args: argparse.Namespace) -> None:
    """Run ours alone, in the processes that a launcher has started."""
    cli.use_expandable_segments()
    timed = ('timed', args.turn + args.skip)
    turns = [('warm-up', args.warm_up), *[timed] * -(-args.iterations // args.turn), ('profiled', -1)]
    ends = iter(['first', *[kind for kind, _ in turns]])
    asked = iter([*[count for _, count in turns], 0])
    (name, cfg), rows, sizes, last, passes = models[0], [], Counter(), {}, None

    def exchange(facts: dict) -> int:
        nonlocal passes
        kind = next(ends)
        if kind == 'warm-up':
            passes = copy.copy(facts['passes'])
        elif kind == 'timed':
            rows.extend(facts['rows'][args.skip :])
            sizes.update(row['size'] for row in facts['rows'])
        last.update(facts)
        return next(asked)

    run(cfg, args.inference, Turns(time.time(), exchange))
    if int(os.environ.get('RANK', 0)) == 0:
        report([{'name': name, 'status': 'ok', **summarise(rows, last, passes, sizes)}], args)
    torch.distributed.destroy_process_group()


def write(rows: list[dict], args: argparse.Namespace) -> None:
    """Write training.json."""
    packages = ('mmengine', 'mmcv', 'mmdet', 'mmseg')
    content = machine('cuda' if torch.cuda.is_available() else 'cpu', packages)
    save({**content, 'command': sys.argv[1:], 'rows': rows}, args.out / 'training.json')


def report(rows: list[dict], args: argparse.Namespace) -> None:
    """Print and write what was found; exit with status 1 if a model failed, or there is nothing."""
    if not rows:
        sys.exit('interrupted before anything was timed')
    show(rows)
    write(rows, args)
    draw(rows, args.out / 'training.png')
    print(args.out / 'training.json')
    if any(row['status'] != 'ok' for row in rows):
        sys.exit('some models failed: their times are not reported')


if __name__ == '__main__':
    main()
