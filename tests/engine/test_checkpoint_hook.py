"""Runs that end at a write, in a validation, at SIGTERM or on a full disk, and their resuming."""

import errno
import os
import shutil
import signal
import stat
import zipfile
from pathlib import Path

import pytest
import torch
from mmengine.config import Config
from mmengine.dataset import BaseDataset
from mmengine.evaluator import BaseMetric
from mmengine.logging import MessageHub, MMLogger
from mmengine.model import BaseModel
from mmengine.visualization import Visualizer

from mmvig.engine import checkpoint_hook, files, work_dir
from mmvig.engine.preflight import SetupError
from mmvig.engine.runner import Runner

EPOCHS = dict(by_epoch=True, max_epochs=3, val_interval=1)
ITERATIONS = dict(by_epoch=False, max_iters=6, val_interval=2)


class Killed(BaseException):
    """Stands for SIGKILL."""


class Data(BaseDataset):
    """Eight numbers."""

    def load_data_list(self):
        return [dict(x=float(number)) for number in range(8)]


class Model(BaseModel):
    """One weight; its loss shows the order of the data, and the state of the optimiser."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(1))

    def forward(self, x, sample_idx=None, mode='tensor'):
        error = (self.weight * x.float() - 2 * x).square().mean()
        return dict(loss=error) if mode == 'loss' else [error.item()]


class Score(BaseMetric):
    """The weight's way to 2, except that the second validation is a bad one."""

    fails = False

    def process(self, data_batch, data_samples):
        if Score.fails:
            raise Killed
        self.results += data_samples

    def compute_metrics(self, results):
        return dict(score=-sum(results), other=sum(results))


def build(folder: Path, loop: dict = EPOCHS, **save) -> Runner:
    """A run in a work dir, resumed if there is a checkpoint: as tools/train.py builds it."""
    by_epoch = loop['by_epoch']
    save = dict(type='CheckpointHook', by_epoch=by_epoch, max_keep_ckpts=1, **save)
    save = {'interval': 1 if by_epoch else 2, 'save_best': 'score', 'rule': 'greater', **save}
    loader = dict(batch_size=2, num_workers=0, collate_fn=dict(type='default_collate'))
    cfg = Config(
        dict(
            work_dir=str(folder),
            launcher='none',
            default_hooks=dict(checkpoint=save, logger=dict(type='LoggerHook', interval=1)),
        )
    )
    latest = work_dir.latest_checkpoint(cfg)
    shuffled = dict(type='DefaultSampler', shuffle=True)
    in_order = dict(type='DefaultSampler', shuffle=False)
    for kind in (MMLogger, MessageHub, Visualizer):  # mmengine keeps those of each name
        kind._instance_dict.clear()
    return Runner(
        Model(),
        cfg.work_dir,
        dict(dataset=Data(pipeline=[], serialize_data=False), sampler=shuffled, **loader),
        dict(dataset=Data(pipeline=[], serialize_data=False), sampler=in_order, **loader),
        train_cfg=loop,
        val_cfg=dict(),
        val_evaluator=dict(type=Score),
        optim_wrapper=dict(optimizer=dict(type='SGD', lr=0.0003, momentum=0.5)),
        default_hooks=cfg.default_hooks,
        load_from=latest,
        resume=latest is not None,
        randomness=dict(seed=0),
        cfg=cfg,
        experiment_name='run',
    )


def content(folder: Path) -> dict[str, object]:
    """The weight in each file of a work dir, and what last_checkpoint names."""
    found = {path.name: torch.load(path, weights_only=False) for path in folder.glob('*.pth')}
    weights = {name: each['state_dict']['weight'].item() for name, each in found.items()}
    return weights | {'last': Path((folder / 'last_checkpoint').read_text()).name}


@pytest.fixture
def reference(tmp_path):
    """Run a loop undisturbed: what it leaves."""

    def run(loop):
        build(tmp_path / 'undisturbed', loop).train()
        return content(tmp_path / 'undisturbed')

    return run


def test_a_kill_before_a_rename_loses_nothing(tmp_path, monkeypatch, reference):
    """Each epoch renames itself, the pointer, the best file, itself again, and the pointer."""
    loop = {**EPOCHS, 'max_epochs': 2}
    wanted = reference(loop)
    replace, left = Path.replace, 0

    def dying(path, target):
        nonlocal left
        left -= 1
        if left == 0:
            raise Killed
        replace(path, target)

    for renames in (2, 6, 7, 8, 10):
        left, folder = renames, tmp_path / str(renames)
        with monkeypatch.context() as patch, pytest.raises(Killed):
            patch.setattr(Path, 'replace', dying)
            build(folder, loop).train()
        assert all(zipfile.ZipFile(path).testzip() is None for path in folder.glob('*.pth'))
        assert [*folder.glob('epoch_*.pth')]
        build(folder, loop).train()
        assert content(folder) == wanted


@pytest.mark.parametrize('loop', [EPOCHS, ITERATIONS], ids=['epochs', 'iterations'])
def test_a_run_killed_in_its_last_validation_does_it_when_resumed(tmp_path, monkeypatch, reference, loop):
    wanted = reference(loop)
    shorter = {**loop, 'max_epochs' if loop['by_epoch'] else 'max_iters': 2}
    build(tmp_path / 'run', shorter).train()
    monkeypatch.setattr(Score, 'fails', True)
    with pytest.raises(Killed):
        build(tmp_path / 'run', loop).train()
    monkeypatch.setattr(Score, 'fails', False)
    build(tmp_path / 'run', loop).train()
    assert content(tmp_path / 'run') == wanted
    monkeypatch.setattr(Score, 'fails', True)  # it is done: not once more
    build(tmp_path / 'run', loop).train()


def test_a_copied_work_dir_leaves_the_first_alone(tmp_path):
    build(tmp_path / 'one', {**EPOCHS, 'max_epochs': 2}).train()
    before = content(tmp_path / 'one')
    shutil.copytree(tmp_path / 'one', tmp_path / 'two')
    build(tmp_path / 'two').train()
    assert content(tmp_path / 'one') == before
    assert len([*(tmp_path / 'two').glob('best_*')]) == 1


def test_two_best_files(tmp_path):
    runner = build(tmp_path, save_best=['score', 'other'], rule='greater')
    runner.train()
    assert sorted(path.name for path in tmp_path.glob('best_*')) == [
        'best_other_epoch_1.pth',
        'best_score_epoch_3.pth',
    ]


@pytest.mark.parametrize(
    ('loop', 'at', 'left'),
    [
        (ITERATIONS, 3, 'iter_3.pth'),
        (EPOCHS, 6, 'epoch_1.pth'),
        (EPOCHS, 8, 'epoch_2.pth'),
        (EPOCHS, 2, None),
    ],
)
def test_sigterm_ends_a_run_where_it_can_be_resumed(tmp_path, monkeypatch, reference, loop, at, left):
    wanted = reference(loop)
    step, steps = Model.train_step, 0

    def asked(model, *args, **kwargs):
        nonlocal steps
        steps += 1
        if steps == at:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(model, *args, **kwargs)

    def meet():  # all processes, before the first of them ends
        saved[:] = [path.name for path in (tmp_path / 'run').glob('[ei]*_*.pth')]

    saved = ['not called']
    monkeypatch.setattr(checkpoint_hook, 'barrier', meet)
    monkeypatch.setattr(Model, 'train_step', asked)
    with pytest.raises(SystemExit, match='143'):
        build(tmp_path / 'run', loop).train()
    assert signal.signal(signal.SIGTERM, signal.SIG_DFL) == signal.SIG_IGN  # torchrun repeats it
    assert (
        [path.name for path in (tmp_path / 'run').glob('[ei]*_*.pth')] == saved == ([left] if left else [])
    )
    build(tmp_path / 'run', loop).train()
    assert content(tmp_path / 'run') == wanted


def test_a_full_disk_leaves_earlier_checkpoints_whole(tmp_path, monkeypatch):
    sync, count = os.fsync, 0

    def full(descriptor):
        nonlocal count
        count += stat.S_ISREG(os.fstat(descriptor).st_mode)
        if count == 6:  # the second checkpoint
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        sync(descriptor)

    monkeypatch.setattr(files.os, 'fsync', full)
    with pytest.raises(SetupError, match=r'pth cannot be written: .*No space left'):
        build(tmp_path).train()
    assert {'epoch_1.pth', 'best_score_epoch_1.pth'} <= content(tmp_path).keys()
    assert not [path for path in tmp_path.iterdir() if path.name.startswith('.')]


def test_a_log_that_cannot_be_written_ends_the_run(tmp_path):
    logger = build(tmp_path).logger
    (handler,) = (each for each in logger.handlers if hasattr(each, 'baseFilename'))
    handler.stream = open('/dev/full', 'w')  # noqa: SIM115  closed by the handler
    with pytest.raises(OSError, match='No space left'):
        logger.info('something')
