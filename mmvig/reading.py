"""Reading checkpoint files: from any address, whole, and without running code from them."""

import logging
import os
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from hashlib import sha256
from http.client import HTTPException
from pathlib import Path
from pickle import UnpicklingError
from unittest import mock
from urllib.parse import unquote, urlparse
from urllib.request import Request, urlopen
from uuid import uuid4

import numpy as np
import torch
from mmengine.config import ConfigDict
from mmengine.dist import barrier, is_distributed
from mmengine.logging import HistoryBuffer
from mmengine.optim import OneCycleParamScheduler
from mmengine.runner import checkpoint as mmengine_checkpoint

from mmvig import hub
from mmvig.engine.preflight import local_rank

logger = logging.getLogger(__name__)

# With it in the environment every torch.load of a process is one with weights_only=True, whoever calls it.
FORCE = 'TORCH_FORCE_WEIGHTS_ONLY_LOAD'
TRUST_FLAG = '--trust-checkpoint'
# What may stand for any NumPy array of numbers or text, object arrays apart.
_DTYPES = ('bool', 'int8', 'int16', 'int32', 'int64', 'uint8', 'uint16', 'uint32', 'uint64', 'float16')
_DTYPES = (*_DTYPES, 'float32', 'float64', 'complex64', 'complex128', 'str', 'bytes')
# Whose methods mmengine's checkpoints name: a log buffer's statistics, a schedule's curve.
_WITH_METHODS = (HistoryBuffer, OneCycleParamScheduler)

_trusted = False
_lock = threading.RLock()  # what torch.load heeds is of the whole process


def trust() -> None:
    """Let this process read files that may run code: what ``--trust-checkpoint`` asks for."""
    global _trusted
    _trusted = True


def load(address: str | Path, map_location: str | torch.device | Callable = 'cpu') -> object:
    """What a checkpoint file holds, read without running code from it (``weights_only=True``).

    Args:
        address: a path, an http(s) URL (see :func:`download`), an address on the Hugging Face hub (see
            :func:`mmvig.hub.fetch`), or whatever else mmengine's CheckpointLoader knows, such as ``s3://``,
            ``torchvision://`` or a user's own scheme.
        map_location: of ``torch.load``. Default: 'cpu'.

    Raises:
        FileNotFoundError: the file does not exist.
        RuntimeError: it cannot be downloaded or read, or holds more than tensors and plain values.
    """
    address = str(address)
    scheme = _scheme_loader(address)
    if scheme is not None:
        with weights_only():
            try:
                return scheme(address, map_location=map_location)
            except Exception as error:  # of many types, by scheme and by what is wrong
                kind = type(error).__name__
                raise RuntimeError(f'{address} cannot be read: {kind}: {_reason(error)}') from error
    if address.startswith(('http://', 'https://')):
        return _load_file(download(address), map_location)
    if address.startswith(hub.PREFIX):
        return _load_file(hub.fetch(address), map_location)
    path = Path(address.removeprefix('local://')).expanduser()
    if not path.is_file():
        why = 'is a folder' if path.is_dir() else f'does not exist (looked in {Path.cwd()})'
        if '://' in str(address):
            why = 'is no file, and mmengine has no loader of that scheme'
        raise FileNotFoundError(f'checkpoint {address} {why}')
    return _load_file(path, map_location)


@contextmanager
def weights_only() -> Iterator[None]:
    """Have every ``torch.load`` read tensors and plain values alone, whatever its caller wants."""
    with _lock, mock.patch.dict(os.environ):
        previous = torch.serialization.get_safe_globals()
        torch.serialization.add_safe_globals(safe_globals())
        _force()
        try:
            yield
        finally:
            torch.serialization.clear_safe_globals()
            torch.serialization.add_safe_globals(previous)


def download(url: str) -> Path:
    """The local copy of a file from the web, downloaded once a node, into torch's hub folder.

    It is kept under the whole URL, once its length and the hash that its name may end in are right
    (``name-HASH.pth``, as torch.hub has it) and it can be read. A file that torch.hub has downloaded is
    taken where its name has a hash that is right.

    Raises:
        RuntimeError: it cannot be downloaded, or is not what its length, name or suffix says.
    """
    name = Path(unquote(urlparse(url).path)).name or 'checkpoint'
    folder = Path(torch.hub.get_dir(), 'checkpoints')
    match = torch.hub.HASH_REGEX.search(name)
    digits = match[1] if match else ''
    hubs = folder / name
    path = folder / 'mmvig' / sha256(url.encode()).hexdigest()[:16] / name
    try:
        # Not mmengine's get_local_rank, which asks for a group that nothing of mmengine sets up.
        if not (is_distributed() and local_rank()) and not path.is_file():
            path.parent.mkdir(parents=True, exist_ok=True)
            if digits and hubs.is_file() and _sha256(hubs).startswith(digits):
                path = hubs
            else:
                _fetch(url, path, digits)
    except (OSError, HTTPException) as error:
        raise RuntimeError(f'{url} cannot be downloaded: {_reason(error)}') from error
    finally:
        barrier()  # also where it failed: the others would wait for ever
    if not path.is_file() and not (path := hubs).is_file():
        raise RuntimeError(f"{url} cannot be downloaded: see the error of this node's first process")
    return path


def _fetch(url: str, path: Path, digits: str) -> None:
    part = path.with_name(f'.{uuid4().hex}')
    logger.info('Downloading %s to %s', url, path)
    try:
        request = Request(url, headers={'User-Agent': 'torch.hub'})  # some servers refuse Python's own
        with urlopen(request, timeout=60) as source, part.open('xb') as file:
            length = source.headers.get('Content-Length')
            while piece := source.read(2**20):
                file.write(piece)
            file.flush()
            os.fsync(file.fileno())
        if length is not None and part.stat().st_size != int(length):
            raise RuntimeError(f'{url}: the connection ended after {part.stat().st_size} of {length} bytes')
        found = _sha256(part)
        if not found.startswith(digits):
            raise RuntimeError(f'{url}: its name has hash {digits}, its content {found[: len(digits)]}')
        _load_file(part, 'cpu', url)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def _sha256(path: Path) -> str:
    digest = sha256()
    with path.open('rb') as file:
        while piece := file.read(2**20):
            digest.update(piece)
    return digest.hexdigest()


def _scheme_loader(address: str) -> Callable | None:
    """The loader registered for an address, None where mmengine would read a file or a URL itself."""
    loader = mmengine_checkpoint.CheckpointLoader._get_checkpoint_loader(address)
    plain = (load_from_local, load_from_http, load_from_hub)
    plain = (*plain, mmengine_checkpoint.load_from_local, _MMENGINES_HTTP)
    return None if loader in plain else loader


def _load_file(path: Path, map_location: str | torch.device | Callable, name: str = '') -> object:
    with weights_only():
        try:
            return torch.load(path, map_location=map_location, weights_only=not _trusted)
        except Exception as error:  # of many types, by what is wrong with the file
            reason = _reason(error)
            if not reason.startswith('it asks for'):
                reason = (
                    f'it is cut off, or no such file ({reason})' if path.stat().st_size else 'it is empty'
                )
            raise RuntimeError(
                f'{name or path} cannot be read as a checkpoint of tensors: {reason}'
            ) from error


def _reason(error: Exception) -> str:
    """What is wrong, in a line; of torch's long texts, what it would not read."""
    text = str(error)
    if found := re.search(r'GLOBAL (\S+) (?:was not|whose)', text):
        return (
            f'it asks for {found[1]}, which could run code; if you trust its maker, train.py, test.py and '
            f'demo.py read it with {TRUST_FLAG}'
        )
    text = text.partition('WeightsUnpickler error:')[2] or text
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return (lines[0] if lines else type(error).__name__).partition('. ')[0]


def load_from_local(filename: str, map_location=None) -> object:
    """A loader for mmengine's CheckpointLoader (it logs a loader's name from the tenth letter on)."""
    return without_code(load(filename, map_location))


def load_from_http(filename: str, map_location=None, **_) -> object:
    """The same for a URL, called in place of mmengine's function of this name."""
    return without_code(load(filename, map_location))


def load_from_hub(filename: str, map_location=None) -> object:
    """The same for a file on the Hugging Face hub."""
    return without_code(load(filename, map_location))


# Every program that has imported mmvig's models can start from one: mmengine has no such loader.
if hub.PREFIX not in mmengine_checkpoint.CheckpointLoader._schemes:
    mmengine_checkpoint.CheckpointLoader.register_scheme(hub.PREFIX, load_from_hub)


def without_code(content: object) -> object:
    """A checkpoint without ``meta.config``, a program text that mmengine's runners run to resume."""
    if isinstance(content, dict) and isinstance(content.get('meta'), dict):
        content['meta'].pop('config', None)
    return content


_MMENGINES_HTTP = mmengine_checkpoint.load_from_http


def guard_mmengine() -> None:
    """Make what mmengine and its libraries read in this process safe: for programs, not for imports.

    Its loaders of files and URLs become ours, those that users register find ``torch.load`` safe, unless
    the user trusts the files (:func:`trust`), and no ``meta.config`` reaches a runner.
    """
    loader = mmengine_checkpoint.CheckpointLoader
    for prefix, function in list(loader._schemes.items()):
        if function is mmengine_checkpoint.load_from_local:
            loader.register_scheme(prefix, load_from_local, force=True)
        elif function is _MMENGINES_HTTP:
            loader.register_scheme(prefix, load_from_http, force=True)
    # torchvision://, openmmlab:// and mmcls:// end in this function of the module.
    mmengine_checkpoint.load_from_http = load_from_http
    if hasattr(
        mmengine_checkpoint, 'get_torch_safe_globals'
    ):  # the onedl line, whose own allow any getattr
        mmengine_checkpoint.get_torch_safe_globals = safe_globals
    torch.serialization.add_safe_globals(safe_globals())
    _force()


def _force() -> None:
    if _trusted:
        os.environ.pop(FORCE, None)
    else:
        os.environ.pop('TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD', None)  # torch refuses both together
        os.environ[FORCE] = '1'


def safe_globals() -> list:
    """What checkpoints of mmengine's hold beside tensors and plain values, for torch's safe globals."""
    core = np.core if np.__version__.startswith('1.') else np._core  # NumPy 1.26's _core is a hollow one
    dtypes = {type(np.dtype(name)) for name in _DTYPES}
    functions = [core.multiarray._reconstruct, core.multiarray.scalar]
    # NumPy 2 moved these: either name, so that either version's files can be read.
    functions = [_as_of(package, each) for package in ('numpy.core', 'numpy._core') for each in functions]
    classes = [*_WITH_METHODS, ConfigDict, slice, np.ndarray, np.dtype, *dtypes]
    return [_get_method, *functions, *classes]


def _as_of(package: str, function: Callable) -> Callable:
    # torch knows a safe global by the names that it bears.
    def renamed(*args):
        return function(*args)

    renamed.__module__ = f'{package}.multiarray'
    renamed.__qualname__ = renamed.__name__ = function.__name__
    return renamed


def _get_method(owner: type, name: str):
    # Both pickle their methods by getattr, which would be too much to allow of anything else.
    if owner not in _WITH_METHODS or name.startswith('__'):
        raise UnpicklingError(f'a checkpoint may not ask for {name!r} of {owner!r}')
    return getattr(owner, name)


_get_method.__module__, _get_method.__qualname__, _get_method.__name__ = 'builtins', 'getattr', 'getattr'
