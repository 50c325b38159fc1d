"""What is installed, what importing it costs, and that there is one version number."""

import json
import shutil
import subprocess
import sys
import zipfile
from importlib.metadata import PathDistribution
from pathlib import Path

import pytest
from mmengine.config import Config

import mmvig

ROOT = Path(__file__).parents[1]
CONFIGS = sorted(path.relative_to(ROOT).as_posix() for path in ROOT.glob('configs/*/*.py'))


def loaded_after(statement):
    """Run a statement in a fresh interpreter and return its seconds and the modules it loaded."""
    script = (
        'import json, sys, time\n'
        f'before = set(sys.modules); start = time.perf_counter()\n{statement}\n'
        'seconds = time.perf_counter() - start\n'
        'print(json.dumps([seconds, sorted(set(sys.modules) - before)]))'
    )
    run = subprocess.run(
        [sys.executable, '-c', script], cwd=ROOT, check=True, capture_output=True, text=True
    )
    seconds, modules = json.loads(run.stdout)
    return seconds, {module.partition('.')[0] for module in modules}


def test_importing_the_package_is_light():
    seconds, packages = loaded_after('import mmvig')
    assert 'mmvig' in packages
    assert not packages & {'torch', 'triton', 'mmengine', 'mmcv', 'mmdet', 'mmseg'}
    assert seconds < 1


def test_operators_need_no_openmmlab():
    _, packages = loaded_after(
        'import mmvig.ops, torch\nassert not torch.cuda.is_initialized(), "CUDA was initialised"'
    )
    assert 'torch' in packages
    assert not packages & {'mmengine', 'mmcv', 'mmdet', 'mmseg', 'mmpretrain'}


@pytest.fixture(scope='module')
def wheel(tmp_path_factory):
    """A wheel built from a copy of the tree, because a build writes next to the sources."""
    folder = tmp_path_factory.mktemp('wheel')
    ignored = ['.*', '__pycache__', '*.egg-info', 'build', 'dist', 'data', 'work_dirs']
    shutil.copytree(ROOT, folder / 'tree', ignore=shutil.ignore_patterns(*ignored))
    pip = [sys.executable, '-m', 'pip', '--disable-pip-version-check', 'wheel', '-q']
    options = ['--no-deps', '--no-build-isolation', '--no-index', '-w', folder]
    subprocess.run([*pip, *options, folder / 'tree'], check=True)
    (path,) = folder.glob('*.whl')
    return zipfile.ZipFile(path)


def test_wheel_holds_the_package_and_nothing_else(wheel):
    names = {name for name in wheel.namelist() if '.dist-info/' not in name}
    sources = {path.relative_to(ROOT).as_posix() for path in ROOT.glob('mmvig/**/*.py')}
    assert names == sources | {'mmvig/py.typed'}


def test_metadata_has_the_version_of_the_package_and_only_torch_as_requirement(wheel):
    metadata = PathDistribution(zipfile.Path(wheel, f'mmvig-{mmvig.__version__}.dist-info/'))
    assert metadata.version == mmvig.__version__
    required = [line for line in metadata.requires if 'extra ==' not in line]
    assert required == ['torch>=2.4']
    assert metadata.metadata['Requires-Python'] == '>=3.10'


@pytest.mark.parametrize('path', CONFIGS)
def test_config_parses_and_survives_a_dump(path, tmp_path):
    config = Config.fromfile(ROOT / path)
    dumped = tmp_path / 'dumped.py'
    config.dump(dumped)
    assert Config.fromfile(dumped).to_dict() == config.to_dict()
