"""The folder that a training run works in: one run at a time, and where an earlier one can be resumed."""

import errno
import fcntl
import logging
import os
import re
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mmengine.config import Config

from mmvig.engine.preflight import SetupError

logger = logging.getLogger(__name__)

# Where each launcher says which process of all nodes this is.
_RANKS = {'pytorch': 'RANK', 'slurm': 'SLURM_PROCID', 'mpi': 'OMPI_COMM_WORLD_RANK'}

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@contextmanager
def taken(cfg: Config) -> Iterator[None]:
    """Make a run's work dir and keep other runs out of it; what killed writers left there is removed.

    The kernel ends the lock with the process. One process of a distributed run takes it.

    Raises:
        SetupError: Another run is at work there, or it cannot be written to, or its disk is full by and by.
    """
    if int(os.environ.get(_RANKS.get(cfg.launcher, ''), 0)):
        yield
        return
    folder = Path(cfg.work_dir).absolute()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = (folder / '.lock').open('a')
    except OSError as error:
        raise SetupError(
            f'work dir {folder} cannot be written to ({error.strerror}): name another with --work-dir'
        ) from error
    with lock:
        try:
            # Unlike flock's, these locks are not inherited by data workers, and NFS knows them.
            fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError) as error:
            raise SetupError(
                f'another run is at work in {folder}: wait for its end, or name another with --work-dir'
            ) from error
        except OSError as error:
            logger.warning('%s: %s; nothing would stop a second run there.', lock.name, error.strerror)
        else:
            _remove_parts(_folder(cfg), folder)
        try:
            yield
        except (OSError, SetupError) as error:
            known = isinstance(error, SetupError)  # of write_whole, which names the file
            cause = error.__cause__ if known else error
            if getattr(cause, 'errno', None) not in _FULL:
                raise
            what = error if known else f'{error.filename or folder} cannot be written: {error.strerror}'
            raise SetupError(
                f'{what}; the checkpoints in {folder} are whole: make room, then continue with --resume'
            ) from error


def warn_of_earlier_run(cfg: Config) -> None:
    """Say that a new run replaces the checkpoints of an earlier one."""
    names = [path.name for path in _checkpoints(cfg)]
    if names:
        logger.warning(
            '%s has checkpoints of an earlier run (%s is its latest): this one starts anew and replaces '
            'those of the same names; --resume would continue it, --work-dir keeps the two apart.',
            cfg.work_dir,
            names[0],
        )


def latest_checkpoint(cfg: Config) -> str | None:
    """The checkpoint that a run in its work dir continues from.

    It is the one that ``last_checkpoint`` names, looked for in the work dir if that was moved, or one
    saved after it. Where that is missing or broken, it is the newest that is whole; the log says so.

    Returns:
        A path, or an address where the run saves remotely; None where there is no checkpoint.

    Raises:
        SetupError: No checkpoint of those there, or that are named there, is whole.
    """
    pointer = Path(cfg.work_dir, 'last_checkpoint')
    named = pointer.read_text(errors='replace').strip() if pointer.is_file() else ''
    named = named if named.isprintable() else ''  # zeros, after a power failure
    if '://' in named:
        return named
    found = _checkpoints(cfg)
    wanted = _wanted(named, cfg) if named else None
    if wanted in found:  # those saved after it, before a kill let the run name them
        newer = [path for path in found if _step(path) > _step(wanted) and _age(path) >= _age(pointer)]
        found = [*newer, wanted, *(path for path in found if path != wanted and path not in newer)]
    elif wanted is not None:
        found = [wanted, *found]
    faults = []
    for path in found:
        fault = _why_not_whole(path)
        if fault is None:
            if faults:
                logger.warning(
                    '--resume: %s; %s is the newest whole checkpoint.', '; '.join(faults), path.name
                )
            elif wanted is None:
                logger.warning('--resume: last_checkpoint names none; %s is the newest.', path.name)
            return str(path)
        faults.append(f'{path} {fault}')
    if faults:
        raise SetupError(
            f'--resume: {"; ".join(faults)}; name another checkpoint with --resume FILE, '
            'or train without --resume to begin anew'
        )
    return None


def check_whole(checkpoint: str) -> None:
    """Check that a file to resume from is whole, unless it is remote.

    Raises:
        SetupError: It is not.
    """
    fault = None if '://' in checkpoint else _why_not_whole(Path(checkpoint).expanduser())
    if fault is not None:
        raise SetupError(f'--resume: {checkpoint} {fault}; name another with --resume FILE')


def _why_not_whole(path: Path) -> str | None:
    """What a checkpoint file lacks, after its size, its table of contents and each part's checksum."""
    if os.path.isdir(path):  # as deepspeed saves
        return None
    try:
        with zipfile.ZipFile(path) as file:
            broken = file.testzip()
    except FileNotFoundError:
        return 'is missing'
    except (OSError, zipfile.BadZipFile) as error:
        return f'is no whole checkpoint ({error})'
    return f'is no whole checkpoint ({broken} is damaged)' if broken else None


def _wanted(named: str, cfg: Config) -> Path:
    """Where the checkpoint is that ``last_checkpoint`` names: there, or in a folder moved since."""
    here = _folder(cfg) / Path(named).name
    return here if os.path.exists(here) or not os.path.exists(named) else Path(named)


def _folder(cfg: Config) -> Path:
    """Where a run saves its checkpoints, as mmengine's CheckpointHook says."""
    out_dir = _hook(cfg).get('out_dir')
    work_dir = Path(cfg.work_dir).absolute()
    return Path(out_dir, work_dir.name) if out_dir else work_dir


def _checkpoints(cfg: Config) -> list[Path]:
    """The checkpoints that a run can be resumed from, newest first."""
    names = _hook(cfg).get('filename_tmpl') or '(epoch|iter)_{}.pth'
    pattern = re.compile(names.replace('.', r'\.').replace('{}', r'\d+'))
    folder = _folder(cfg)
    paths = [path for path in folder.iterdir() if pattern.fullmatch(path.name)] if folder.is_dir() else []
    return sorted(paths, key=lambda path: (_age(path), _step(path)), reverse=True)


def _hook(cfg: Config) -> dict:
    return (cfg.get('default_hooks') or {}).get('checkpoint') or {}


def _age(path: Path) -> int:
    return path.stat().st_mtime_ns


def _step(path: Path) -> int:
    return int(re.findall(r'\d+', path.name)[-1])


def _remove_parts(*folders: Path) -> None:
    """Remove files that write_whole had not renamed when its process was killed."""
    for folder in folders:
        for path in folder.glob('.*.*'):
            if re.fullmatch(r'\.(.+\.pth|last_checkpoint)\.\d+', path.name):
                path.unlink()
