"""Registry resolution in fresh interpreters: models from each scope and none, optimisers."""

import subprocess
import sys

import pytest

BUILD = """
{setup}
for name, module in (('ViGH', 'vig_h'), ('ViG', 'vig')):
    with torch.device('meta'):  # initialising takes seconds
        model = MODELS.build(dict(type={prefix!r} + name, arch='tiny', out_indices=(0, 1, 2, 3)))
    assert type(model).__module__ == 'mmvig.backbones.' + module, type(model)
"""
ROOT = 'from mmengine.registry import MODELS'
IN_SCOPE = """
import mmvig.compat
from mmengine.registry import init_default_scope
init_default_scope({library!r})
from {library}.registry import MODELS
"""
CUSTOM_IMPORTS = """
from mmengine.registry import MODELS
from mmengine.config import Config
cfg = Config.fromstring("custom_imports = dict(imports=['mmvig'])", '.py')
"""
CASES = {
    'no scope': (ROOT, 'mmvig.'),
    "mmdet's scope": (IN_SCOPE.format(library='mmdet'), 'mmvig.'),
    "mmseg's scope": (IN_SCOPE.format(library='mmseg'), 'mmvig.'),
    "mmpretrain's scope": (IN_SCOPE.format(library='mmpretrain'), 'mmvig.'),
    'custom_imports after mmvig was imported': ('import mmvig\nimport mmvig.compat' + CUSTOM_IMPORTS, ''),
    'custom_imports and no prefix': (CUSTOM_IMPORTS, ''),
}
LAYER_DECAY = """
from mmengine.optim import build_optim_wrapper
from torch import nn

class Backbone(nn.Linear):
    def get_layer_depth(self, name, prefix=''):
        return 0, 3

constructor = 'mmvig.LayerDecayOptimWrapperConstructor'
cfg = dict(optimizer=dict(type='SGD', lr=1.0), constructor=constructor, paramwise_cfg=dict(decay_rate=0.5))
rates = [group['lr'] for group in build_optim_wrapper(Backbone(2, 2), cfg).optimizer.param_groups]
assert rates[0] == 0.25, rates
"""
GROUPS = """
from mmengine.optim import build_optim_wrapper
from torch import nn

optimizer, constructor = dict(type='AdamW', lr=0.01), 'mmvig.OptimWrapperConstructor'
cfg = dict(optimizer=optimizer, constructor=constructor, paramwise_cfg=dict(bias_lr_mult=2.0))
rates = [group['lr'] for group in build_optim_wrapper(nn.Linear(2, 2), cfg).optimizer.param_groups]
assert rates == [0.01, 0.02], rates
"""
OPTIMIZERS = {'the constructor of layer decay': LAYER_DECAY, 'the constructor of few groups': GROUPS}
# One interpreter loads what takes long and knows nothing of mmvig, and each case runs in a fork of it.
FORKS = """
import os, sys, traceback
import mmengine, torch, torchvision
assert not any(name.startswith(('mmvig', 'mmcv', 'mmdet', 'mmseg', 'mmpretrain')) for name in sys.modules)
for name, code in {cases!r}.items():
    sys.stdout.flush()
    if child := os.fork():
        print(name, 'ends with', os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
        continue
    try:
        exec(code, {{'torch': torch}})
    except BaseException:
        traceback.print_exc()
        os._exit(1)
    os._exit(0)
"""


@pytest.fixture(scope='module')
def said():
    cases = {name: BUILD.format(setup=setup, prefix=prefix) for name, (setup, prefix) in CASES.items()}
    cases |= OPTIMIZERS
    command = [sys.executable, '-c', FORKS.format(cases=cases)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    return done.stdout + done.stderr


@pytest.mark.parametrize('case', [*CASES, *OPTIMIZERS])
def test_resolution(said, case):
    assert f'{case} ends with 0' in said.splitlines(), said
