"""Test helpers are importable by name, and mmcv's operators exist before anything imports them."""

import gc
import importlib
import importlib.util
import os
import sys
from pathlib import Path

import torch

if not torch.cuda.is_available():
    os.environ['TRITON_INTERPRET'] = '1'  # kernels run on the CPU; must precede any import of triton

import mmvig.compat  # noqa: F401  must precede any import of mmcv.ops

sys.path.insert(0, str(Path(__file__).parent))

import mmengine.runner.checkpoint as mmengine_checkpoint
import pytest
from mmengine.fileio.handlers import registry_utils
from mmengine.registry import WEIGHT_INITIALIZERS

from mmvig import reading

TOOLS = Path(__file__).resolve().parents[1] / 'tools'

if not torch.cuda.is_available() and importlib.util.find_spec('triton'):  # PyTorch for CPUs has none
    import interpreter

    interpreter.hurry()


@pytest.fixture(autouse=True, scope='module')
def few_to_collect():
    """Keep what the modules before have left from the collections that mmengine asks for."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def unguarded(monkeypatch):
    """Tools make their process read files safely; a test that runs one in its own puts that back."""
    loader, handlers = mmengine_checkpoint.CheckpointLoader, registry_utils.file_handlers
    monkeypatch.setenv(reading.FORCE, '0')
    monkeypatch.setattr(loader, '_schemes', dict(loader._schemes))
    monkeypatch.setattr(reading, '_trusted', False)
    monkeypatch.setattr(WEIGHT_INITIALIZERS, '_module_dict', dict(WEIGHT_INITIALIZERS._module_dict))
    for name in ('load_from_http', 'get_torch_safe_globals'):
        if hasattr(mmengine_checkpoint, name):
            monkeypatch.setattr(mmengine_checkpoint, name, getattr(mmengine_checkpoint, name))
    for name in ('yaml', 'yml'):
        monkeypatch.setitem(handlers, name, handlers[name])
    allowed = torch.serialization.get_safe_globals()
    yield
    torch.serialization.clear_safe_globals()
    torch.serialization.add_safe_globals(allowed)


@pytest.fixture
def run_main(monkeypatch, capsys):
    """Run a tool's ``main()`` in this process: its exit status, lines of output, lines of errors."""

    def run(tool, *arguments):
        monkeypatch.setattr(sys, 'argv', [Path(tool.__file__).name, *map(str, arguments)])
        status = 0
        try:
            tool.main()
        except SystemExit as exit_:
            status = exit_.code
        said = capsys.readouterr()
        return status, said.out.splitlines(), said.err.splitlines()

    return run


@pytest.fixture
def load(monkeypatch):
    """Import a tool, as its own folder sees it."""
    before = set(sys.modules)

    def load(script):
        monkeypatch.setattr(sys, 'path', [str((TOOLS.parent / script).parent), *sys.path])
        return importlib.import_module(Path(script).stem)

    yield load
    for name in set(sys.modules) - before:
        if str(TOOLS) in str(getattr(sys.modules[name], '__file__', '')):
            del sys.modules[name]
