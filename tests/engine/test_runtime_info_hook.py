"""Losses reach the message hub one iteration later, and before anybody reads them."""

import pytest
import torch
from mmengine.config import Config
from mmengine.hooks import Hook
from mmengine.model import BaseModel
from mmengine.runner import Runner
from torch import nn
from torch.utils.data import Dataset

DEVICES = ['cpu', pytest.param('cuda', marks=pytest.mark.gpu)]
LATE, EARLY = 'mmvig.RuntimeInfoHook', 'RuntimeInfoHook'


class Numbers(Dataset):
    def __len__(self):
        return 7

    def __getitem__(self, i):
        return torch.tensor([float(i)])


class Model(BaseModel):
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))

    def forward(self, x, mode='tensor'):
        return {'loss_a': (self.scale * x).mean() / 7, 'note': torch.tensor(3.0)}


class Logs(Hook):
    """How many losses had been written after each iteration."""

    priority = 'LOWEST'

    def __init__(self):
        self.counts = []

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        scalars = runner.message_hub.log_scalars
        self.counts.append(len(scalars['train/loss'].data[0]) if 'train/loss' in scalars else 0)


def train(hook, folder, device, by_epoch, wrong=False):
    torch.manual_seed(0)
    loop = {'by_epoch': True, 'max_epochs': 2} if by_epoch else {'by_epoch': False, 'max_iters': 14}
    logs, model = Logs(), Model().to(device)
    if wrong:
        model.train_step = lambda data, optim_wrapper: {'loss': torch.zeros(2)}
    runner = Runner(
        model,
        str(folder),
        train_dataloader=dict(dataset=Numbers(), sampler=dict(type='DefaultSampler'), batch_size=1),
        randomness=dict(seed=0),
        train_cfg=loop,
        optim_wrapper=dict(optimizer=dict(type='SGD', lr=0.1)),
        default_hooks=dict(
            runtime_info=dict(type=hook),
            logger=dict(type='LoggerHook', interval=3),
            checkpoint=dict(type='CheckpointHook', interval=1 if by_epoch else 5, by_epoch=by_epoch),
        ),
        custom_hooks=[logs],
        log_processor=dict(window_size=3, by_epoch=by_epoch),
        experiment_name=folder.name,
        cfg=Config(),
    )
    runner.train()
    hub = runner.message_hub.state_dict()['log_scalars']
    scalars = {name: [each.tolist() for each in buffer.data] for name, buffer in hub.items()}
    return logs, {name: values for name, values in scalars.items() if 'time' not in name}


@pytest.mark.parametrize('device', DEVICES)
@pytest.mark.parametrize('by_epoch', [True, False])
def test_all_losses_are_written(tmp_path, device, by_epoch):
    late, actual = train(LATE, tmp_path / f'late{by_epoch}', device, by_epoch)
    early, expected = train(EARLY, tmp_path / f'early{by_epoch}', device, by_epoch)
    assert actual == expected and len(expected['train/loss_a'][0]) == 14
    assert early.counts == list(range(1, 15))
    assert all(count >= i for i, count in enumerate(late.counts))
    # Where the logger writes, an epoch ends, or a checkpoint is saved.
    on_time = {3, 6, 7, 10, 13, 14} if by_epoch else {3, 5, 6, 7, 9, 10, 12, 14}
    assert {i for i, count in enumerate(late.counts, start=1) if count == i} == on_time


def test_a_checkpoint_has_them_all(tmp_path):
    lengths = {}
    for hook in (LATE, EARLY):
        train(hook, tmp_path / hook, 'cpu', by_epoch=False)
        states = [torch.load(tmp_path / hook / f'iter_{i}.pth', weights_only=False) for i in (5, 10)]
        lengths[hook] = [len(state['message_hub']['log_scalars']['train/loss'].data[0]) for state in states]
    assert lengths[LATE] == lengths[EARLY] == [5, 10]


def test_what_mmengine_refuses_is_refused(tmp_path):
    with pytest.raises(AssertionError) as expected:
        train(EARLY, tmp_path / EARLY, 'cpu', by_epoch=True, wrong=True)
    with pytest.raises(AssertionError) as actual:
        train(LATE, tmp_path / LATE, 'cpu', by_epoch=True, wrong=True)
    assert str(actual.value) == str(expected.value)
