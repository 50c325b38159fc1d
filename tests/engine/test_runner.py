"""Runs that start from a checkpoint file or resume one: with all that was saved, and without its code."""

import os
from pathlib import Path

import pytest
import torch
from mmengine.dataset import BaseDataset
from mmengine.model import BaseModel
from torch import nn

from mmvig.engine.preflight import SetupError
from mmvig.engine.runner import Runner


class Data(BaseDataset):
    """Four numbers."""

    def load_data_list(self):
        return [dict(x=float(number)) for number in range(4)]


class Model(BaseModel):
    def __init__(self, width=2):
        super().__init__()
        self.line = nn.Linear(1, width)

    def forward(self, x, sample_idx=None, mode='tensor'):
        return dict(loss=self.line(x.float()[:, None]).square().mean())


class Code:
    """What leaves a mark where it is unpickled."""

    def __reduce__(self):
        return os.mkdir, ('mark',)


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Build a run of `max_epochs` in an empty folder; at the end, no code of a file may have run."""
    monkeypatch.chdir(tmp_path)

    def build(max_epochs=1, width=2, **start):
        return Runner(
            Model(width),
            work_dir='run',
            train_dataloader=dict(
                batch_size=2,
                num_workers=0,
                dataset=Data(lazy_init=False),
                sampler=dict(type='DefaultSampler', shuffle=False),
                collate_fn=dict(type='default_collate'),
            ),
            train_cfg=dict(by_epoch=True, max_epochs=max_epochs),
            optim_wrapper=dict(type='OptimWrapper', optimizer=dict(type='AdamW', lr=0.1)),
            param_scheduler=dict(type='OneCycleLR', eta_max=0.1, total_steps=8, by_epoch=False),
            custom_hooks=[dict(type='EMAHook')],
            default_scope='mmengine',
            log_level='ERROR',
            experiment_name=f'run{id(start)}',
            **start,
        )

    yield build
    assert not Path('mark').exists()


def begun(runner):
    """What `train` does before the first step, as far as checkpoints go."""
    runner.call_hook('before_run')
    runner.load_or_resume()


TRAINED = {}


def saved(run, **changes):
    """A checkpoint file of a run of this module, with changes."""
    if not TRAINED:
        run().train()
        TRAINED.update(torch.load('run/epoch_1.pth', weights_only=False))
    torch.save({**TRAINED, **changes}, 'changed.pth')
    return 'changed.pth'


def test_a_resumed_run_has_all_that_was_saved_and_runs_no_program_of_the_file(run):
    first = run()
    first.train()
    content = torch.load('run/epoch_1.pth', weights_only=False)
    program = 'import os\nos.mkdir("mark")\ngpu_ids = [0]\n'
    content['meta'].update(config=program, cfg=program)
    torch.save(content, 'changed.pth')
    second = run(max_epochs=2, load_from='changed.pth', resume=True)
    begun(second)
    assert (second.epoch, second.iter) == (1, 2)
    assert torch.equal(second.model.line.weight, first.model.line.weight)
    state = second.optim_wrapper.state_dict()['state']
    assert state[0]['step'] == 2
    assert torch.equal(state[0]['exp_avg'], first.optim_wrapper.state_dict()['state'][0]['exp_avg'])
    assert second.param_schedulers[0].last_step == first.param_schedulers[0].last_step
    averages = [next(hook for hook in each.hooks if hasattr(hook, 'ema_model')) for each in (first, second)]
    assert torch.equal(*(each.ema_model.module.line.weight for each in averages))
    second.train()
    assert second.epoch == 2


@pytest.mark.parametrize('part', ['state_dict', 'optimizer', 'message_hub', 'param_schedulers', 'meta'])
@pytest.mark.parametrize('resume', [False, True])
def test_code_in_any_part_of_a_file_is_refused(run, part, resume):
    file = saved(run, **{part: Code()})
    with pytest.raises(SetupError, match=r'it asks for posix\.mkdir, .* --trust-checkpoint'):
        run(load_from=file, resume=resume).load_or_resume()


def test_what_cannot_be_resumed(run):
    file = saved(run, optimizer=None)
    with pytest.raises(SetupError, match='no checkpoint of a run to resume: no optimizer'):
        run(load_from=file, resume=True).load_or_resume()
    begun(run(load_from=file))  # its weights are whole
    with pytest.raises(SetupError, match=r'changed\.pth cannot be loaded: .*size mismatch'):
        begun(run(width=3, load_from=saved(run), resume=True))
    nan = {'line.weight': torch.full((2, 1), torch.nan), 'line.bias': torch.zeros(2)}
    for resume in (False, True):
        with pytest.raises(SetupError, match=r"NaN or infinite values in 'line\.weight'"):
            run(load_from=saved(run, state_dict=nan), resume=resume).load_or_resume()


def test_a_run_that_starts_from_weights_averages_them(run):
    file = saved(run)
    runner = run(load_from=file)
    begun(runner)
    weights = torch.load(file, weights_only=False)['state_dict']['line.weight']
    average = next(hook for hook in runner.hooks if hasattr(hook, 'ema_model'))
    assert torch.equal(runner.model.line.weight, weights)
    assert torch.equal(average.ema_model.module.line.weight, weights)
