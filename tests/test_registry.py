"""Registry resolution in fresh interpreters: from mmdet's scope, mmseg's scope and none."""

import subprocess
import sys

import pytest

BUILD = """
import torch
{setup}
for name, module in (('ViGH', 'vig_h'), ('ViG', 'vig')):
    with torch.device('meta'):  # initialising takes seconds
        model = MODELS.build(dict(type={prefix!r} + name, arch='tiny', out_indices=(0, 1, 2, 3)))
    assert type(model).__module__ == 'mmvig.backbones.' + module, type(model)
    print('built', type(model).__name__)
"""
ROOT = 'from mmengine.registry import MODELS'
CASES = {
    'no scope': (ROOT, 'mmvig.'),
    "mmdet's scope": (
        'import mmvig.compat\nfrom mmengine.registry import init_default_scope\n'
        "init_default_scope('mmdet')\nfrom mmdet.registry import MODELS",
        'mmvig.',
    ),
    "mmseg's scope": (
        'import mmvig.compat\nfrom mmengine.registry import init_default_scope\n'
        "init_default_scope('mmseg')\nfrom mmseg.registry import MODELS",
        'mmvig.',
    ),
    "mmpretrain's scope": (
        'import mmvig.compat\nfrom mmengine.registry import init_default_scope\n'
        "init_default_scope('mmpretrain')\nfrom mmpretrain.registry import MODELS",
        'mmvig.',
    ),
    'custom_imports after mmvig was imported': (
        'import mmvig\nimport mmvig.compat\n' + ROOT + '\nfrom mmengine.config import Config\n'
        "cfg = Config.fromstring(\"custom_imports = dict(imports=['mmvig'])\", '.py')",
        '',
    ),
    'custom_imports and no prefix': (
        ROOT + '\nfrom mmengine.config import Config\n'
        "cfg = Config.fromstring(\"custom_imports = dict(imports=['mmvig'])\", '.py')",
        '',
    ),
}


@pytest.mark.parametrize('case', CASES)
def test_resolution(case):
    setup, prefix = CASES[case]
    code = BUILD.format(setup=setup, prefix=prefix)
    result = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, timeout=300)
    assert result.stdout.strip().endswith('built ViGH\nbuilt ViG'), result.stdout + result.stderr
