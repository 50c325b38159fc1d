"""Programs of this project run as a user runs them: each in a process of its own, from another folder."""

import gc
import multiprocessing
import os
import runpy
import socket
import subprocess
import sys
import tempfile
from pathlib import Path
from subprocess import CompletedProcess
from unittest import mock

TOOLS = Path(__file__).resolve().parents[1] / 'tools'
SETTINGS = {'CUDA_VISIBLE_DEVICES': '', 'OMP_NUM_THREADS': '1', 'PYTHON': sys.executable}
_ENVIRONMENT = {**os.environ, **SETTINGS}  # before any test; tools that run within one change it
# Python programs are forked from a process that has imported what takes longest, and nothing of any test.
_SERVER = multiprocessing.get_context('forkserver')
_SERVER.set_forkserver_preload(['mmvig.compat', 'mmdet.apis', 'mmseg.apis', 'mmpretrain.apis'])


def run_tool(script: str, *arguments, cwd: Path, timeout: float | None = None) -> CompletedProcess:
    """Run a program in tools/: its exit status (-9 where the time ran out), and what it wrote."""
    words = [str(word) for word in (TOOLS / script, *arguments)]
    if script.endswith('.sh'):
        with socket.socket() as free:
            free.bind(('127.0.0.1', 0))
            port = str(free.getsockname()[1])
        env = {**_ENVIRONMENT, 'PORT': port}
        return subprocess.run(
            ['bash', *words], cwd=cwd, env=env, capture_output=True, text=True, check=False, timeout=timeout
        )
    with tempfile.TemporaryDirectory() as folder:
        outputs = [Path(folder, name) for name in ('stdout', 'stderr')]
        arguments = words, str(cwd), [str(path) for path in outputs], _ENVIRONMENT
        process = _SERVER.Process(target=_main, args=arguments)
        process.start()
        process.join(timeout)
        process.kill()
        process.join()
        return CompletedProcess(words, process.exitcode, *map(_written, outputs))


def run_well(script: str, *arguments, cwd: Path) -> str:
    """The same of a program that must succeed; what it wrote to standard output."""
    result = run_tool(script, *arguments, cwd=cwd)
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-4000:]
    return result.stdout


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
    sys.path.insert(0, str(Path(words[0]).parent))
    runpy.run_path(words[0], run_name='__main__')
