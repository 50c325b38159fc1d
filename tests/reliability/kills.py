"""Training runs killed by SIGKILL, at random moments and within writes, then resumed: is anything lost?

    python tests/reliability/kills.py --random 50 --aimed 30 --broken 10 --stopped 10

Each run is `tools/train.py` on a tiny model with a data worker, a best file and one kept checkpoint: a
segmenter in an iteration-based loop, or a classifier in an epoch-based one. It is killed, and some are
killed again once resumed; then `--resume auto` must end with status 0, continue from the newest checkpoint
that is whole, log the very losses and metrics of an undisturbed run, and leave that run's files with their
very tensors. `--broken` cuts, empties or moves what a killed run left, first. Exits with 1 on any failure.
"""

import argparse
import gc
import io
import json
import os
import random
import re
import runpy
import signal
import sys
import tempfile
import time
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn
from unittest import mock

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from programs import _SERVER, SETTINGS, TOOLS

ROOT = TOOLS.parent
KINDS = ('checkpoint', 'best', 'pointer')
PLACES = ('within its bytes', 'before the rename', 'after the rename', 'after it all')
BROKEN = ('newest cut', 'pointer empty', 'pointer garbage', 'no pointer', 'folder moved')
NOT_COMPARED = ('time', 'data_time', 'memory', 'eta')

# Nothing random but the order of the data, which a resumed run continues.
SEGMENTER = """
_base_ = [{root!r} + '/configs/segmentation/upernet_vigh_t_shapes.py']
data_root = {data!r}
image, labels = dict(type='LoadImageFromFile'), dict(type='LoadAnnotations')
resize, pack = dict(type='Resize', scale=(64, 64), keep_ratio=False), dict(type='PackSegInputs')
data = dict(data_root=data_root, pipeline=[image, labels, resize, pack])
train_dataloader = dict(batch_size=2, num_workers=1, dataset=data)
data = dict(data_root=data_root, pipeline=[image, resize, labels, pack])
val_dataloader = dict(batch_size=2, num_workers=1, dataset=data)
test_dataloader = val_dataloader
train_cfg = dict(max_iters=5, val_interval=1)
save = dict(interval=1, save_best='mIoU', max_keep_ckpts={keep})
default_hooks = dict(logger=dict(interval=1), checkpoint=save)
arch = dict(_delete_=True, embed_dims=16, depths=[1, 1, 1, 1], num_heads=[1, 1, 2, 2])
channels = [16, 32, 64, 128]
head = dict(channels=16, dropout_ratio=0.0)
model = dict(
    backbone=dict(arch=arch, drop_path_rate=0.0),
    decode_head=dict(in_channels=channels, norm_cfg=dict(type='BN'), **head),
    auxiliary_head=dict(in_channels=channels[2], norm_cfg=dict(type='BN'), **head),
)
randomness = dict(seed=1)
"""
CLASSIFIER = """
default_scope = 'mmpretrain'
arch = dict(embed_dims=16, depths=[1, 1, 1, 1], num_heads=[1, 1, 2, 2])
model = dict(
    type='ImageClassifier',
    backbone=dict(type='mmvig.ViGH', arch=arch, drop_path_rate=0.0, out_indices=(3,)),
    neck=dict(type='GlobalAveragePooling'),
    head=dict(type='LinearClsHead', num_classes=2, in_channels=128),
)
data = dict(
    batch_size=2,
    num_workers=1,
    dataset=dict(
        type='CustomDataset',
        data_root={data!r} + '/classes',
        pipeline=[dict(type='LoadImageFromFile'), dict(type='PackInputs')],
    ),
)
train_dataloader = dict(sampler=dict(type='DefaultSampler', shuffle=True), **data)
val_dataloader = dict(sampler=dict(type='DefaultSampler', shuffle=False), **data)
val_evaluator = dict(type='Accuracy', topk=1)
train_cfg = dict(by_epoch=True, max_epochs=4, val_interval=1)
val_cfg = dict()
optim_wrapper = dict(optimizer=dict(type='AdamW', lr=3e-3))
param_scheduler = dict(type='CosineAnnealingLR', T_max=4, by_epoch=True)
save = dict(type='CheckpointHook', interval=1, save_best='auto', max_keep_ckpts={keep})
default_hooks = dict(logger=dict(type='LoggerHook', interval=1), checkpoint=save)
randomness = dict(seed=1)
"""
CONFIGS = {'segmenter': SEGMENTER, 'classifier': CLASSIFIER}


class Failed(Exception):
    """Something was lost."""


@dataclass
class Ended:
    """A run of train.py that has ended."""

    status: int
    said: str
    errors: str
    survivors: list[int]  # of its workers
    seconds: float  # from its first log on


@dataclass
class Aim:
    """Where a run kills itself: within its ``number``th writing of a kind of file."""

    kind: str
    place: str
    number: int
    share: float  # of the bytes that are written by then

    def take(self) -> None:
        """Let this process kill itself there."""
        _take_aim(self)


def write_data(folder: Path) -> None:
    """Make the shapes, and a folder of two classes of small noisy images."""
    import cv2

    from mmvig.datasets.shapes import ensure_shapes

    ensure_shapes(folder / 'shapes', num_train=8, num_val=2)
    numbers = np.random.default_rng(0)
    for number in range(8):
        path = folder / f'shapes/classes/{number // 4}/{number}.png'
        path.parent.mkdir(parents=True, exist_ok=True)
        cv2.imwrite(str(path), numbers.integers(0, 128 + 8 * number, (32, 32, 3), np.uint8))


def write_config(name: str, folder: Path, keep: int) -> Path:
    """Write a config that keeps some checkpoints."""
    path = folder / f'{name}_{keep}.py'
    path.write_text(CONFIGS[name].format(root=str(ROOT), data=str(folder / 'shapes'), keep=keep))
    return path


def train(
    config: Path,
    run: Path,
    *options: str,
    aim: Aim | None = None,
    after: float | None = None,
    by: signal.Signals = signal.SIGKILL,
) -> Ended:
    """Train, and kill the run by its aim, or some seconds after its first iteration was logged."""
    with tempfile.TemporaryDirectory() as folder:
        outputs = [Path(folder, name) for name in ('stdout', 'stderr')]
        words = [str(TOOLS / 'train.py'), str(config), '--work-dir', str(run), *options]
        process = _SERVER.Process(
            target=_train, args=(words, str(config.parent), list(map(str, outputs)), aim)
        )
        process.start()
        workers: set[int] = set()
        starts = len([*run.glob('*/vis_data/scalars.json')])
        first = None
        while process.exitcode is None:
            process.join(0.02)
            workers |= _children(process.pid)
            if first is None and len([*run.glob('*/vis_data/scalars.json')]) > starts:
                first = time.monotonic()
            if after is not None and first is not None and time.monotonic() - first >= after:
                os.kill(process.pid, by)
                after = None
        seconds = time.monotonic() - first if first else 0.0
        deadline = time.monotonic() + 5
        while (survivors := [pid for pid in workers if _is_alive(pid)]) and time.monotonic() < deadline:
            time.sleep(0.05)
        said, errors = (path.read_text(errors='replace') for path in outputs)
        return Ended(process.exitcode, said, errors, survivors, seconds)


def _train(words: list[str], cwd: str, outputs: list[str], aim: Aim | None) -> None:
    """Be tools/train.py."""
    for number, path in enumerate(outputs, start=1):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT), number)
    os.chdir(cwd)
    os.environ.update(SETTINGS)
    torch.set_num_threads(1)
    gc.freeze()
    # What takes most of so small a run's time: the config's layout, and compilers asked for their versions.
    mock.patch('yapf.yapflib.yapf_api.FormatCode', lambda text, **_: (text, False)).start()
    mock.patch('mmengine.runner.runner.collect_env', dict).start()
    if aim is not None:
        aim.take()
    sys.argv = words
    sys.path.insert(0, str(Path(words[0]).parent))
    runpy.run_path(words[0], run_name='__main__')


class _DyingFile(io.FileIO):
    """Writes a share of the bytes that it gets."""

    def __init__(self, path: Path, share: float) -> None:
        super().__init__(path, 'x')
        self.share = share

    def write(self, data) -> int:
        super().write(memoryview(data)[: int(len(data) * self.share)])
        _die()


def _die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _take_aim(aim: Aim) -> None:
    """Let this process kill itself in the calls of mmvig.engine.files.write_whole."""
    from mmvig.engine import files

    open_, replace, sync = Path.open, Path.replace, files._sync_folder
    seen, hit = 0, False

    def dying_open(path: Path, mode: str = 'r', *arguments, **options):
        nonlocal seen, hit
        if mode == 'xb':
            seen += _kind(path.name) == aim.kind
            hit = _kind(path.name) == aim.kind and seen == aim.number
            if hit and aim.place == PLACES[0]:
                return _DyingFile(path, aim.share)
        return open_(path, mode, *arguments, **options)

    def dying_replace(path: Path, target: Path) -> Path:
        if hit and aim.place == PLACES[1]:
            _die()
        path = replace(path, target)
        if hit and aim.place == PLACES[2]:
            _die()
        return path

    def dying_sync(path: Path) -> None:
        sync(path)
        if hit and aim.place == PLACES[3]:
            _die()

    Path.open, Path.replace, files._sync_folder = dying_open, dying_replace, dying_sync


def _kind(name: str) -> str:
    name = name.removeprefix('.')
    return 'pointer' if name.startswith('last') else 'best' if name.startswith('best') else 'checkpoint'


def _children(pid: int) -> set[int]:
    """The processes that a process started."""
    try:
        return set(map(int, Path(f'/proc/{pid}/task/{pid}/children').read_text().split()))
    except OSError:
        return set()


def _is_alive(pid: int) -> bool:
    try:
        return Path(f'/proc/{pid}/stat').read_text().rpartition(')')[2].split()[0] != 'Z'
    except OSError:
        return False


def is_whole(path: Path) -> bool:
    """Whether all parts of a checkpoint are there."""
    try:
        with zipfile.ZipFile(path) as file:
            return file.testzip() is None
    except zipfile.BadZipFile:
        return False


def read(path: Path) -> dict:
    """A checkpoint of ours."""
    return torch.load(path, map_location='cpu', weights_only=False)


def checkpoints(run: Path) -> list[Path]:
    """What a run can be resumed from, oldest first."""
    return sorted(run.glob('[ei]*_*.pth'), key=lambda path: int(path.stem.rpartition('_')[2]))


def records(run: Path) -> list[dict[tuple[str, int], dict]]:
    """What each start of a run logged, by (train or val, step)."""
    starts = []
    for path in sorted(run.glob('*/vis_data/scalars.json')):
        lines = path.read_text().splitlines()
        if lines and not lines[-1].endswith('}'):  # cut by the kill
            lines.pop()
        logged = {}
        for line in map(json.loads, lines):
            kept = {key: value for key, value in line.items() if key not in NOT_COMPARED}
            logged['train' if 'loss' in line else 'val', line['step']] = kept
        starts.append(logged)
    return starts


def same(one: object, other: object) -> bool:
    """Whether two parts of checkpoints hold the same values."""
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(value, other[key]) for key, value in one.items())
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(same, one, other))
    return one == other


def check_left(run: Path, ended: Ended) -> int:
    """Check what a killed run left; return the iteration of its last whole checkpoint."""
    if ended.survivors:
        raise Failed(f'workers {ended.survivors} live on')
    files = [*run.glob('*.pth')]
    broken = [path.name for path in files if not is_whole(path)]
    if broken:
        raise Failed(f'{broken} are broken')
    found = checkpoints(run)
    return read(found[-1])['meta']['iter'] if found else 0


def check_resumed(run: Path, ended: Ended, iteration: int, reference: Path) -> None:
    """Check that a resumed run lost nothing and is now what the undisturbed one is."""
    if ended.status != 0:
        raise Failed(f'status {ended.status}: {ended.errors[-1500:]}')
    match = re.search(r'resumed epoch: \d+, iter: (\d+)', ended.said)
    if (int(match[1]) if match else 0) != iteration:
        raise Failed(
            f'resumed at {match and match[0]}, the last whole checkpoint was of iteration {iteration}'
        )
    (wanted,) = records(reference)
    logged: dict[tuple[str, int], dict] = {}
    for start in records(run):
        for key, value in start.items():
            if value != wanted[key]:
                raise Failed(f'off the curve at {key}: {value}, undisturbed {wanted[key]}')
        logged |= start
    if logged.keys() != wanted.keys():
        raise Failed(f'{sorted(wanted.keys() - logged.keys())} are not in the logs')
    names, wanted_names = (
        {path.name for path in each.iterdir() if path.is_file()} for each in (run, reference)
    )
    if names != wanted_names:
        raise Failed(f'left {sorted(names)}, undisturbed {sorted(wanted_names)}')
    for path in run.glob('*.pth'):
        here, there = read(path), read(reference / path.name)
        for part in ('state_dict', 'optimizer', 'param_schedulers'):
            if not same(here.get(part), there.get(part)):
                raise Failed(f'{part} of {path.name} differs from the undisturbed')
    named = Path((run / 'last_checkpoint').read_text())
    if named != run / checkpoints(reference)[-1].name:
        raise Failed(f'last_checkpoint names {named}')


def break_something(run: Path, how: str, numbers: random.Random) -> Path:
    """Damage what a killed run left; return where it is now."""
    pointer, newest = run / 'last_checkpoint', checkpoints(run)[-1]
    if how == 'newest cut':
        os.truncate(newest, numbers.randrange(newest.stat().st_size))
    elif how == 'pointer empty':
        pointer.write_text('')
    elif how == 'pointer garbage':
        pointer.write_bytes(numbers.randbytes(200))
    elif how == 'no pointer':
        pointer.unlink()
    else:
        run = run.rename(run.with_name(f'{run.name}_moved'))
    return run


def newest_whole(run: Path) -> int:
    """The iteration of the newest checkpoint that is whole."""
    whole = [path for path in checkpoints(run) if is_whole(path)]
    return read(whole[-1])['meta']['iter'] if whole else 0


class Harness:
    """Tiny models, their undisturbed runs, and what became of the disturbed ones."""

    def __init__(self, folder: Path, names: list[str], seed: int) -> None:
        self.folder, self.names, self.numbers = folder, names, random.Random(seed)
        self.rows: list[tuple[str, str, str]] = []  # kind of kill, what happened, failure or ''
        self.undisturbed: dict[Path, Ended] = {}
        write_data(folder)

    def config(self, number: int, keep: int) -> tuple[Path, Path]:
        """A config and its undisturbed run, by turns."""
        config = write_config(self.names[number % len(self.names)], self.folder, keep)
        run = self.folder / f'{config.stem}_undisturbed'
        if config not in self.undisturbed:
            self.undisturbed[config] = train(config, run)
            if self.undisturbed[config].status != 0:
                raise RuntimeError(self.undisturbed[config].errors)
        return config, run

    def moment(self, config: Path) -> float:
        """A random time after the first log of a run."""
        return self.numbers.uniform(0, self.undisturbed[config].seconds)

    def killed_at_random(self, number: int) -> str:
        """Kill a run, every third one again when it is resumed, and let it end."""
        config, reference = self.config(number, keep=1)
        run = self.folder / f'random_{number}'
        steps = []
        for _ in range(2 if number % 3 == 0 else 1):
            resume = ['--resume', 'auto'] if steps else []
            ended = train(config, run, *resume, after=self.moment(config))
            steps.append(check_left(run, ended))
            if ended.status != -signal.SIGKILL:
                steps.append(f'status {ended.status}')
        left = check_left(run, ended)
        check_resumed(run, train(config, run, '--resume', 'auto'), left, reference)
        return f'{config.stem}, continued from {steps}'

    def stopped_by_sigterm(self, number: int) -> str:
        """Ask a run to end."""
        config, reference = self.config(number, keep=1)
        run = self.folder / f'stopped_{number}'
        ended = train(config, run, after=self.moment(config), by=signal.SIGTERM)
        if ended.status not in (128 + signal.SIGTERM, 0):
            raise Failed(f'status {ended.status}: {ended.errors[-1500:]}')
        if ended.status and 'SIGTERM ended this run' not in ended.said:
            raise Failed('nothing said')
        left = check_left(run, ended)
        check_resumed(run, train(config, run, '--resume', 'auto'), left, reference)
        return f'{config.stem}, status {ended.status}, continued from {left}'

    def killed_in_writing(self, number: int) -> str:
        """Kill a run within the writing of each kind of file by turns."""
        config, reference = self.config(number // len(KINDS), keep=1)
        run = self.folder / f'aimed_{number}'
        kind = KINDS[number % len(KINDS)]
        best, saved = (self.undisturbed[config].said.count(line) for line in ('The best ch', 'Saving ch'))
        count = best if kind == 'best' else saved + best  # a checkpoint is saved again with a better score
        place, share = PLACES[self.numbers.randrange(len(PLACES))], self.numbers.random()
        aim = Aim(kind, place, self.numbers.randint(1, count), share)
        ended = train(config, run, aim=aim)
        how = f'{config.stem}, {aim.kind} {aim.number} {aim.place}'
        if ended.status != -signal.SIGKILL:
            raise Failed(f'{how}: the run ended with status {ended.status}')
        left = check_left(run, ended)
        check_resumed(run, train(config, run, '--resume', 'auto'), left, reference)
        return f'{how}, continued from {left}'

    def killed_and_broken(self, number: int) -> str:
        """Damage what a killed run left, where it keeps two checkpoints."""
        config, reference = self.config(number // len(BROKEN), keep=2)
        run, how = self.folder / f'broken_{number}', BROKEN[number % len(BROKEN)]
        check_left(run, train(config, run, aim=Aim('checkpoint', PLACES[3], 3, 0)))
        run = break_something(run, how, self.numbers)
        left = newest_whole(run)
        check_resumed(run, train(config, run, '--resume', 'auto'), left, reference)
        return f'{config.stem}, {how}, continued from {left}'

    def many(self, kind: str, count: int) -> None:
        """Do so many of one kind, and note each."""
        for number in range(count):
            try:
                self.rows.append((kind, getattr(self, kind)(number), ''))
            except Failed as failed:
                self.rows.append((kind, f'number {number}', str(failed)))
            print(*self.rows[-1], sep=' | ', flush=True)

    def report(self) -> NoReturn:
        """Print how many of each kind lost nothing; exit with 1 if any lost something."""
        print('| kind | runs | lost nothing |\n|---|---|---|')
        for kind in dict.fromkeys(row[0] for row in self.rows):
            failures = [row[2] for row in self.rows if row[0] == kind]
            print(f'| {kind.replace("_", " ")} | {len(failures)} | {failures.count("")} |')
        sys.exit(any(row[2] for row in self.rows))


def main() -> None:
    """Run as many as the command line asks for; print a table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('--random', type=int, default=50, help='runs killed at a random moment')
    parser.add_argument('--aimed', type=int, default=30, help='runs killed within a write')
    parser.add_argument('--broken', type=int, default=10, help='killed runs whose files are damaged')
    parser.add_argument('--stopped', type=int, default=10, help='runs that get SIGTERM at a random moment')
    parser.add_argument('--models', nargs='+', choices=CONFIGS, default=list(CONFIGS))
    parser.add_argument('--seed', type=int, default=0)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        harness = Harness(Path(folder), args.models, args.seed)
        counts = {'killed_in_writing': args.aimed, 'killed_at_random': args.random}
        counts |= {'killed_and_broken': args.broken, 'stopped_by_sigterm': args.stopped}
        for kind, count in counts.items():
            harness.many(kind, count)
    harness.report()


if __name__ == '__main__':
    main()
