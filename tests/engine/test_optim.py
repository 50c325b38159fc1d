"""Parameters that are treated alike share a group; all else, and resuming, is as mmengine has it."""

import copy
import json

import pytest
import torch
from mmengine.config import Config
from mmengine.model import BaseModel
from mmengine.optim import build_optim_wrapper
from mmengine.registry import DATASETS, MODELS, DefaultScope
from torch import nn
from torch.utils.data import Dataset

from mmvig.engine.runner import Runner

LR, DECAY = 1e-2, 0.05
THEIRS, OURS = 'DefaultOptimWrapperConstructor', 'mmvig.OptimWrapperConstructor'
ADAMW = {'type': 'AdamW', 'lr': LR, 'weight_decay': DECAY}
KEYS = {'custom_keys': {'head': {'lr_mult': 10.0, 'decay_mult': 1.0}}, 'flat_decay_mult': 0.0}


@MODELS.register_module('LinearOfTest', force=True)  # by name: upstream dumps no classes
class Model(BaseModel):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Linear(4, 4))
        self.head = nn.Linear(4, 3)

    def forward(self, inputs, mode='tensor'):
        inputs = torch.stack(inputs) if isinstance(inputs, list) else inputs
        return {'loss': self.head(self.body(inputs)).square().mean()}


def build(model, constructor=OURS, optimizer=ADAMW, paramwise=KEYS, **more):
    cfg = {'optimizer': optimizer, 'paramwise_cfg': paramwise, 'constructor': constructor, **more}
    return build_optim_wrapper(model, copy.deepcopy(cfg))


def settings(model, wrapper, keys=('lr', 'weight_decay', 'betas')):
    names = {parameter: name for name, parameter in model.named_parameters()}
    found = [
        (names[p], [group[key] for key in keys])
        for group in wrapper.optimizer.param_groups
        for p in group['params']
    ]
    assert len(found) == len(dict(found)) == sum(p.requires_grad for p in names)
    return dict(found)


def steps(model, wrapper, number):
    generator = torch.Generator().manual_seed(number)
    for _ in range(number):
        wrapper.update_params(model(torch.randn(5, 3, generator=generator))['loss'])


@pytest.mark.parametrize(
    ('paramwise', 'groups'),
    [
        (None, 1),
        ({'flat_decay_mult': 0.0}, 2),
        ({'norm_decay_mult': 0.0, 'bias_lr_mult': 2.0}, 3),
        ({'flat_decay_mult': 1.0}, 1),  # said, and the same as what is not said
        (KEYS, 3),
    ],
)
def test_settings_are_mmengines_in_fewer_groups(paramwise, groups):
    model = Model()
    ours, theirs = build(model, paramwise=paramwise), build(model, THEIRS, paramwise=paramwise)
    assert settings(model, ours) == settings(model, theirs)
    assert len(ours.optimizer.param_groups) == groups
    assert ours.get_lr()['lr'][0] == theirs.get_lr()['lr'][0]
    if groups > 1:
        assert ours.get_lr()['base_lr'] == theirs.get_lr()['base_lr'] == [LR]
    order = [id(parameter) for parameter in model.parameters()]
    firsts = [order.index(id(group['params'][0])) for group in ours.optimizer.param_groups]
    assert firsts == sorted(firsts)
    assert {type(group) for group in ours.optimizer.param_groups} == {dict}  # ConfigDict is slow to read


def test_frozen_parameters_are_left_out_and_shared_ones_need_a_word():
    model = Model()
    model.body[0].requires_grad_(False)
    settings(model, build(model))
    model.body[2].weight = model.head.weight = nn.Parameter(torch.zeros(4, 4))
    with pytest.raises(ValueError, match='bypass_duplicate=True'):
        build(model)
    settings(model, build(model, paramwise={**KEYS, 'bypass_duplicate': True}))


@pytest.mark.parametrize('scope', ['mmengine', 'mmdet', 'mmseg', 'mmpretrain'])
def test_every_scope_finds_the_constructor(scope):
    with DefaultScope.overwrite_default_scope(scope):
        assert len(build(Model()).optimizer.param_groups) == 3


@pytest.mark.parametrize('saved_by', [THEIRS, OURS])
@pytest.mark.parametrize(
    'optimizer', [ADAMW, {'type': 'SGD', 'lr': LR, 'momentum': 0.9, 'weight_decay': DECAY}]
)
def test_a_state_of_either_kind_goes_on_alike(saved_by, optimizer):
    torch.manual_seed(0)
    model = Model()
    wrapper = build(model, saved_by, optimizer)
    steps(model, wrapper, 3)
    resumed = copy.deepcopy(model)
    again = build(resumed, OURS, {**optimizer, 'fused': True})
    again.load_state_dict(copy.deepcopy(wrapper.state_dict()))
    assert all(group['fused'] for group in again.optimizer.param_groups)  # the config's choice
    steps(model, wrapper, 2)
    before = [parameter.clone() for parameter in resumed.parameters()]
    steps(resumed, again, 2)
    for name, parameter in resumed.named_parameters():
        torch.testing.assert_close(parameter, model.get_parameter(name), rtol=1e-6, atol=1e-7, msg=name)
    assert all(not torch.equal(a, b) for a, b in zip(before, resumed.parameters(), strict=True))


def test_states_that_do_not_fit_are_refused():
    model = Model()
    wrapper = build(model, THEIRS)
    steps(model, wrapper, 1)
    state = wrapper.optimizer.state_dict()

    frozen = Model()
    frozen.head.requires_grad_(False)
    with pytest.raises(ValueError, match=r'of 8 parameters in 8 groups, not 6 in 2: resume with'):
        build(frozen).optimizer.load_state_dict(state)
    with pytest.raises(ValueError, match='several values of weight_decay where the config has one'):
        build(model, paramwise={'custom_keys': {'body.0': {'lr_mult': 0.5}}}).optimizer.load_state_dict(
            state
        )
    other = build(model, paramwise={'custom_keys': {'body.1': {'lr_mult': 2.0}}})
    steps(model, other, 1)
    ours = build(model, paramwise={'custom_keys': {'body.2': {'lr_mult': 2.0}}})  # of as many parameters
    with pytest.raises(ValueError, match='has other parameters in its groups'):
        ours.optimizer.load_state_dict(other.optimizer.state_dict())


@DATASETS.register_module('NoiseOfTest', force=True)
class Noise(Dataset):
    def __len__(self):
        return 8

    def __getitem__(self, i):
        return {'inputs': torch.randn(3, generator=torch.Generator().manual_seed(i))}


SCHEDULES = {
    'cosine': [
        {'type': 'LinearLR', 'start_factor': 0.1, 'by_epoch': False, 'end': 3},
        {'type': 'CosineAnnealingLR', 'eta_min_ratio': 0.01, 'by_epoch': False, 'begin': 3, 'end': 8},
    ],
    'steps': [{'type': 'MultiStepLR', 'milestones': [2, 5], 'by_epoch': False, 'end': 8}],
}


def run(folder, constructor, iterations, schedule, resume=None):
    """Train some iterations of eight; return the runner and each iteration's logged learning rates."""
    cfg = Config({
        'model': {'type': 'LinearOfTest'},
        'work_dir': str(folder),
        'randomness': {'seed': 0},
        'train_dataloader': {
            'batch_size': 4,
            'dataset': {'type': 'NoiseOfTest'},
            'sampler': {'type': 'InfiniteSampler', 'shuffle': False},
        },
        'train_cfg': {'type': 'IterBasedTrainLoop', 'max_iters': iterations},
        'optim_wrapper': {'optimizer': ADAMW, 'paramwise_cfg': KEYS, 'constructor': constructor},
        'param_scheduler': SCHEDULES[schedule],
        'default_hooks': {
            'logger': {'type': 'LoggerHook', 'interval': 1},
            'checkpoint': {'type': 'CheckpointHook', 'interval': 4, 'by_epoch': False},
        },
        'log_processor': {'by_epoch': False, 'window_size': 1},
        'experiment_name': f'{folder}_{iterations}',
        'load_from': resume and str(resume),
        'resume': resume is not None,
        'auto_scale_lr': {'enable': True, 'base_batch_size': 2},
    })  # fmt: skip
    runner = Runner.from_cfg(cfg)
    runner.train()
    lines = max(folder.glob('*/vis_data/scalars.json')).read_text().splitlines()
    return runner, [(record['lr'], record['base_lr']) for record in map(json.loads, lines)]


@pytest.mark.parametrize('schedule', SCHEDULES)
def test_a_run_of_one_group_a_parameter_is_resumed(tmp_path, schedule):
    expected, rates = run(tmp_path / 'whole', THEIRS, 8, schedule)
    run(tmp_path / 'cut', THEIRS, 4, schedule)
    resumed, later = run(tmp_path / 'on', OURS, 8, schedule, tmp_path / 'cut/iter_4.pth')
    assert len(rates) == 8
    torch.testing.assert_close(torch.tensor(later), torch.tensor(rates[4:]), rtol=1e-6, atol=0)
    own = settings(resumed.model, resumed.optim_wrapper, ['lr'])
    for name, (value,) in settings(expected.model, expected.optim_wrapper, ['lr']).items():
        assert own[name] == [pytest.approx(value, rel=1e-9)]
    for name, parameter in resumed.model.named_parameters():
        torch.testing.assert_close(parameter, expected.model.get_parameter(name), rtol=1e-5, atol=1e-6)


def test_logged_rates_are_those_of_one_group_a_parameter(tmp_path):
    logged = [run(tmp_path / each, each, 8, 'cosine')[1] for each in (THEIRS, OURS)]
    assert logged[0] == logged[1]
    assert max(logged[0]) == pytest.approx((2 * LR, LR))  # auto_scale_lr is for the groups
