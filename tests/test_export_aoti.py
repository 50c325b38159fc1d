"""Packages of AOTInductor: what is checked before and after they are made, and on a GPU one of them."""

import shutil
from pathlib import Path

import pytest
import torch
from mmengine.config import Config
from mmengine.model import revert_sync_batchnorm
from mmengine.registry import MODELS, DefaultScope
from torch import nn

from mmvig.engine.preflight import SetupError

ROOT = Path(__file__).resolve().parents[1]
BACKBONE = """
arch = dict(embed_dims=32, depths=[1], num_heads=[1])
model = dict(type='mmvig.ViGH', arch=arch, out_indices=(0,))
"""
CLASSIFIER = f"""
_base_ = [{str(ROOT / 'configs/classification/vigh_t_in1k.py')!r}]
arch = dict(_delete_=True, embed_dims=32, depths=[1, 1, 1, 1], num_heads=[1, 2, 4, 8])
model = dict(backbone=dict(arch=arch), head=dict(num_classes=10, in_channels=256))
"""


@pytest.fixture
def export(load):
    return load('tools/export_aoti.py')


@pytest.fixture
def tool(export, run_main, monkeypatch, tmp_path):
    """Run the tool in an empty folder with a config's text: (exit status, output, errors)."""
    monkeypatch.chdir(tmp_path)

    def run(config, *arguments):
        Path('cfg.py').write_text(config)
        return run_main(export, 'cfg.py', *arguments)

    return run


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        (['--out', 'a.onnx'], 'must end in .pt2'),
        (['--out', 'nowhere/a.pt2'], 'there is no folder'),
        (['--out', 'folder.pt2'], 'must be a file, and is a folder'),
        (['--out', 'a.pt2', '--shape', '32', '64'], 'at least 33'),
        (['--out', 'a.pt2', '--shape', '64', '4097'], 'sides must be at most 4096'),
        (['--out', 'a.pt2', '--batch', '1'], '--batch must be from 2 to 511, got 1'),
        (['--out', 'a.pt2', '--batch', '512'], '--batch must be from 2 to 511, got 512'),
        (['no.pth', '--out', 'a.pt2'], 'no.pth'),
        (['--out', 'a.pt2'], 'compiled on the GPU that it is for'),
    ],
)
def test_what_cannot_be_packaged(tool, monkeypatch, arguments, message):
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: False)
    Path('folder.pt2').mkdir()
    status, _, (line,) = tool(BACKBONE, *arguments)
    assert status == 2 and message in line
    assert not list(Path().glob('**/a.*'))


def compiler(text):
    """A C++ compiler for Inductor."""
    path = Path('compiler').absolute()
    path.write_text(f'#!/bin/sh\n{text}\n')
    path.chmod(0o755)
    return torch._inductor.config.patch({'cpp.cxx': (None, str(path))})


def test_compilers(export, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    real = shutil.which('g++') or pytest.skip('needs g++')
    with compiler(f'exec {real} "$@"'):
        export.check_compiler()
    with compiler(f'exec {real} -static-libstdc++ "$@"'), pytest.raises(SetupError) as error:
        export.check_compiler()
    assert str(tmp_path / 'compiler') in str(error.value) and 'links the C++ library statically' in str(
        error.value
    )
    told = 'echo first >&2; echo no header >&2; exit 1'
    with (
        compiler(f'[ $1 = --version ] || {{ {told}; }}'),
        pytest.raises(SetupError, match=r'\(no header\)'),
    ):
        export.check_compiler()
    missing = torch._inductor.config.patch({'cpp.cxx': (None, '/no/g++')})
    with missing, pytest.raises(SetupError, match=r'needs a C\+\+ compiler.*/no/g'):
        export.check_compiler()


def test_a_package_that_does_not_run_is_refused_in_a_line(export, monkeypatch):
    images = [torch.zeros(1, 3, 64, 64)]
    with pytest.raises(SetupError, match=r'does not run \(RuntimeError: .*\): nothing was written'):
        export.run_alone(b'no package', images)
    monkeypatch.setattr(export, 'RUN', 'import os; os.kill(os.getpid(), 11)')
    with pytest.raises(SetupError, match=r'does not run \(Segmentation fault\): nothing was written'):
        export.run_alone(b'', images)


@pytest.mark.parametrize('wrong', [False, True])
def test_a_wrong_package_is_not_written(tool, export, monkeypatch, wrong):
    """Beyond the traced size alone: one whose output is off only there."""
    models = []
    monkeypatch.setattr(export, 'DEVICE', 'cpu')
    monkeypatch.setattr(export, 'check_arguments', lambda _: None)
    monkeypatch.setattr(export, 'trace', lambda model, *_: models.append(model))
    monkeypatch.setattr(export, 'package', lambda _: b'package')

    def run_alone(data, images):
        assert data == b'package'
        return [[y + wrong * (x.shape[2] != 64) for y in models[0](x)] for x in images]

    monkeypatch.setattr(export, 'run_alone', run_alone)
    status, said, errors = tool(BACKBONE, '--out', 'b.pt2', '--shape', '64', '48', '--dtype', 'fp32')
    assert '2 x 64 x 48: differs from PyTorch by 0.0e+00' in said
    if wrong:
        assert status == 2 and 'nothing was written' in errors[-1] and not Path('b.pt2').exists()
    else:
        assert status == 0 and said[-1] == 'b.pt2' and Path('b.pt2').read_bytes() == b'package'


@pytest.mark.gpu
def test_classifier(tool, export, tmp_path):
    Path('cfg.py').write_text(CLASSIFIER)
    with DefaultScope.overwrite_default_scope('mmpretrain'):
        model = revert_sync_batchnorm(MODELS.build(Config.fromfile('cfg.py').model)).eval()
    torch.manual_seed(1)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.1 if parameter.ndim > 1 else 0.5)
    torch.save({'meta': {}, 'state_dict': model.state_dict()}, 'it.pth')
    with compiler('exec /usr/bin/g++ "$@"'):  # CXX may name one that links the C++ library statically
        status, said, errors = tool(CLASSIFIER, 'it.pth', '--out', 'c.pt2', '--shape', '64', '96')
    assert (status, said[-1]) == (0, 'c.pt2'), errors
    # Sizes that the tool did not check, one of them with long sequences, one with a single image.
    images = [
        torch.randn(shape, device='cuda') for shape in ((1, 3, 100, 77), (5, 3, 33, 200), (2, 3, 224, 352))
    ]
    model.to('cuda')
    for x, (found,) in zip(images, export.run_alone(Path('c.pt2').read_bytes(), images), strict=True):
        with torch.no_grad(), torch.autocast('cuda', torch.bfloat16):
            expected = model(x)
        torch.testing.assert_close(found, expected, rtol=0, atol=2e-2 * expected.abs().max().item())
