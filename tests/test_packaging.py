"""What is installed, what importing it costs, and that there is one version number."""

import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from importlib.metadata import PathDistribution
from pathlib import Path

import pytest
from mmengine.config import Config
from packaging.requirements import Requirement

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


def files_under(*patterns):
    """Files of the checkout, less what is made while it is used."""
    paths = (path for pattern in patterns for path in ROOT.glob(pattern) if path.is_file())
    return {path.relative_to(ROOT).as_posix() for path in paths if '__pycache__' not in path.parts}


def test_wheel_holds_the_package_and_what_mim_expects_and_nothing_else(wheel):
    names = {name for name in wheel.namelist() if '.dist-info/' not in name}
    for_mim = files_under('configs/**/*', 'tools/**/*', 'model-index.yml')
    assert len(for_mim) > 50
    expected = files_under('mmvig/**/*.py') | {f'mmvig/.mim/{name}' for name in for_mim}
    assert names == expected | {'mmvig/py.typed'}


def test_tools_and_configs_of_an_installed_wheel_run(wheel, tmp_path):
    """As mim calls them: from the package's own folder, the checkout out of sight."""
    wheel.extractall(tmp_path / 'site')
    mim = tmp_path / 'site/mmvig/.mim'
    settings = {**os.environ, 'PYTHONPATH': str(tmp_path / 'site'), 'CUDA_VISIBLE_DEVICES': ''}
    command = [sys.executable, mim / 'tools/train.py', mim / 'configs/classification/vigh_b_in1k.py']
    run = subprocess.run(command, cwd=tmp_path, env=settings, capture_output=True, text=True, check=False)
    assert run.returncode == 2
    (line,) = run.stderr.splitlines()
    assert line.startswith('error: data root of train_dataloader.dataset is missing')


def test_a_source_distribution_builds_the_same_wheel(wheel, tmp_path):
    ignored = ['.*', '__pycache__', '*.egg-info', 'build', 'dist', 'data', 'work_dirs']
    shutil.copytree(ROOT, tmp_path / 'tree', ignore=shutil.ignore_patterns(*ignored))
    build = 'from setuptools.build_meta import build_{0}; build_{0}({1!r})'
    script = build.format('sdist', str(tmp_path))
    subprocess.run([sys.executable, '-c', script], cwd=tmp_path / 'tree', check=True, capture_output=True)
    (archive,) = tmp_path.glob('*.tar.gz')
    shutil.unpack_archive(archive, tmp_path / 'unpacked')
    (tree,) = (tmp_path / 'unpacked').iterdir()
    script = build.format('wheel', str(tmp_path))
    subprocess.run([sys.executable, '-c', script], cwd=tree, check=True, capture_output=True)
    (path,) = tmp_path.glob('*.whl')
    with zipfile.ZipFile(path) as again:
        assert sorted(again.namelist()) == sorted(wheel.namelist())


def test_the_version_is_written_in_one_place():
    version = mmvig.__version__
    assert re.fullmatch(r'\d+\.\d+\.\d+', version)
    elsewhere = files_under('mmvig/**/*.py', 'tools/**/*.py', 'configs/**/*', '*.toml', '*.py', '*.yml')
    found = {
        name
        for name in elsewhere
        if re.search(rf'["\']v?{re.escape(version)}["\']', (ROOT / name).read_text())
    }
    assert found == {'mmvig/__init__.py'}


def test_extras_have_tested_versions(wheel):
    """Each requirement of an extra has its version in constraints.txt, within its range."""
    metadata = PathDistribution(zipfile.Path(wheel, f'mmvig-{mmvig.__version__}.dist-info/'))
    pinned = {}
    for line in (ROOT / 'constraints.txt').read_text().splitlines():
        if line.partition('#')[0].strip():
            requirement = Requirement(line)
            pinned.setdefault(requirement.name, []).extend(each.version for each in requirement.specifier)
    required = [Requirement(line) for line in metadata.requires if 'extra ==' in line]
    required = [each for each in required if each.name != 'mmvig']
    assert {'onnx', 'onnxruntime', 'onnxscript'} <= {each.name for each in required}
    wrong = [str(each) for each in required for v in pinned.get(each.name, ['']) if v not in each.specifier]
    assert wrong == []


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
