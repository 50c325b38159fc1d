"""Programs of this project run as a user runs them: each in a process of its own, from another folder."""

import gc
import multiprocessing
import os
import runpy
import socket
import subprocess
import sys
import tempfile
import threading
from multiprocessing import forkserver
from pathlib import Path
from subprocess import CompletedProcess
from unittest import mock

TESTS = str(Path(__file__).parent)
TOOLS = Path(__file__).resolve().parents[1] / 'tools'
SETTINGS = {'CUDA_VISIBLE_DEVICES': '', 'OMP_NUM_THREADS': '1', 'PYTHON': sys.executable}
# Before any test, since tools that run within one change it; and kernels are interpreted in tests alone.
_ENVIRONMENT = {key: value for key, value in os.environ.items() if key != 'TRITON_INTERPRET'} | SETTINGS
# Python programs are forked from a process that has imported what takes longest, and nothing of any test.
_SERVER = multiprocessing.get_context('forkserver')
_ONE_AT_A_TIME = threading.Lock()
_SERVER.set_forkserver_preload(['mmvig.compat', 'mmdet.apis', 'mmseg.apis', 'mmpretrain.apis'])


def run_tool(
    script: str, *arguments, cwd: Path, timeout: float | None = None, **settings: str
) -> CompletedProcess:
    """Run a program, in tools/ or by its full path: its exit status (-9: too late), and what it wrote.

    ``settings`` go into its environment.
    """
    words = [str(word) for word in (TOOLS / script, *arguments)]
    environment = _ENVIRONMENT | settings
    if script.endswith('.sh'):
        with socket.socket() as free:
            free.bind(('127.0.0.1', 0))
            port = str(free.getsockname()[1])
        env = {**environment, 'PORT': port}
        return subprocess.run(
            ['bash', *words], cwd=cwd, env=env, capture_output=True, text=True, check=False, timeout=timeout
        )
    with tempfile.TemporaryDirectory() as folder:
        outputs = [Path(folder, name) for name in ('stdout', 'stderr')]
        arguments = words, str(cwd), [str(path) for path in outputs], environment
        _start_server()
        process = _SERVER.Process(target=_main, args=arguments)
        process.start()
        process.join(timeout)
        process.kill()
        process.join()
        return CompletedProcess(words, process.exitcode, *map(_written, outputs))


def run_well(script: str, *arguments, cwd: Path, **settings: str) -> str:
    """The same of a program that must succeed; what it wrote to standard output."""
    result = run_tool(script, *arguments, cwd=cwd, **settings)
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-4000:]
    return result.stdout


def _start_server() -> None:
    """Where it is not there yet; with the environment that its programs have, which Triton reads once."""
    with _ONE_AT_A_TIME, mock.patch.dict(os.environ, _ENVIRONMENT, clear=True):
        forkserver.ensure_running()


def _written(path: Path) -> str:
    return path.read_text(errors='replace') if path.exists() else ''


def _main(words: list[str], cwd: str, outputs: list[str], environment: dict[str, str]) -> None:
    for number, path in enumerate(outputs, start=1):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT), number)
    os.chdir(cwd)
    multiprocessing.set_start_method(None, force=True)  # as in a process that nothing has forked
    gc.freeze()  # what the server has imported is not to be collected, which mmengine asks for often
    os.environ.clear()
    os.environ.update(environment)
    # The config's layout, in the log and in each checkpoint, takes most of so small a run's time.
    mock.patch('yapf.yapflib.yapf_api.FormatCode', lambda text, **_: (text, False)).start()
    sys.argv = words
    # As a new interpreter has it, and not pytest.
    sys.path[:] = [str(Path(words[0]).parent), *(path for path in sys.path if path != TESTS)]
    runpy.run_path(words[0], run_name='__main__')
