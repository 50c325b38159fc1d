"""What fails while a config is built or run: one line that names the place, the traceback in the log."""

import itertools
import re
from pathlib import Path

import pytest
import torch
from mmengine.config import Config
from mmengine.dataset import BaseDataset
from mmengine.model import BaseModel
from mmengine.registry import DATASETS, MODELS
from torch import nn

from mmvig.backbones import ViGH
from mmvig.engine import cli, errors
from mmvig.engine.errors import said_in_one_line

COUNT = itertools.count()  # mmengine keeps loggers by name


@MODELS.register_module()
class TinyModel(BaseModel):
    """A model that can fail in its second layer."""

    def __init__(self, width: int = 4):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(4, 4), nn.Linear(width, 1))

    def forward(self, inputs: list, mode: str = 'loss') -> dict:
        return {'loss': self.layers(torch.stack(inputs)).mean()}


@DATASETS.register_module()
class TinyDataset(BaseDataset):
    """Two samples, or a missing file."""

    def __init__(self, path: str | None = None):
        self.path = path
        super().__init__(serialize_data=False)

    def load_data_list(self) -> list:
        return [{}, {}]

    def __getitem__(self, index: int) -> dict:
        if self.path:
            Path(self.path).read_text()
        return {'inputs': torch.ones(4)}


@pytest.fixture
def ends(tmp_path, capsys):
    """Build and train a config with options: the exit status, the line and the log with the traceback."""
    data = {'type': 'TinyDataset'}
    sampler = {'type': 'DefaultSampler', 'shuffle': False}

    def run(**options) -> tuple[int, str, str]:
        cfg = Config(
            {
                'model': {'type': 'TinyModel'},
                'train_dataloader': {
                    'dataset': data,
                    'sampler': sampler,
                    'batch_size': 2,
                    'num_workers': 0,
                },
                'train_cfg': {'by_epoch': True, 'max_epochs': 1},
                'optim_wrapper': {'optimizer': {'type': 'SGD', 'lr': 0.1}},
                'work_dir': str(tmp_path),
                'launcher': 'none',
                'env_cfg': {},
                'experiment_name': f'run_{next(COUNT)}',
            }
        )
        cli.merge_options(cfg, {key.replace('__', '.'): value for key, value in options.items()})
        with pytest.raises(SystemExit) as end, said_in_one_line(cfg):
            cli.build_runner(cfg).train()
        line = capsys.readouterr().err.strip().splitlines()[-1]
        (log,) = re.findall(r'its traceback is in (\S+\.log)$', line)
        return end.value.code, line, Path(log).read_text()

    return run


@pytest.mark.parametrize(
    ('option', 'value', 'where', 'what'),
    [
        ('model__type', 'Foo', 'model (Foo): ', 'Foo is not in the '),
        ('model__foo', 1, 'model (TinyModel): ', "unexpected keyword argument 'foo'"),
        ('train_dataloader__dataset__foo', 1, 'train_dataloader.dataset (TinyDataset): ', "'foo'"),
        ('train_dataloader__sampler__type', 'Foo', 'train_dataloader.sampler (Foo): ', 'Foo is not in the'),
        ('optim_wrapper__optimizer__lr', 'x', 'optim_wrapper.optimizer (SGD): ', 'TypeError: '),
        ('optim_wrapper__optimizer__type', 'Foo', 'optim_wrapper: ', 'TypeError: '),
        ('train_cfg__foo', 1, 'train_loop: ', "'foo'"),
    ],
)
def test_errors_of_building_name_the_key(ends, option, value, where, what):
    status, line, log = ends(**{option: value})
    assert status == 2
    assert line.startswith(f'error: {where}') and what in line
    assert 'Traceback (most recent call last)' in log


def test_errors_of_the_run_name_the_module_or_file(ends):
    status, line, log = ends(model__width=5)
    assert status == 1
    assert line.startswith('error: model.layers.1 (Linear): RuntimeError: mat1 and mat2')
    assert 'Traceback (most recent call last)' in log
    for workers in (0, 1):
        status, line, log = ends(
            train_dataloader__dataset__path='/no/such.png', train_dataloader__num_workers=workers
        )
        assert status == 1
        assert "No such file or directory: '/no/such.png'" in line
        assert ('data worker' in line) == (workers > 0)
        assert 'read_text' in log


def test_a_bug_of_ours_keeps_its_traceback(ends, monkeypatch):
    monkeypatch.setattr(TinyModel, 'forward', lambda self, **_: ViGH.forward(None, torch.ones(1)))
    with pytest.raises(AttributeError):
        ends()


def test_a_variable_brings_the_traceback_back(ends, monkeypatch):
    monkeypatch.setenv(errors.VARIABLE, '1')
    with pytest.raises(KeyError, match='Foo'):
        ends(model__type='Foo')
