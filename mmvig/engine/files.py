"""Files that are there whole or not at all."""

import errno
import os
from pathlib import Path

from mmvig.engine.preflight import SetupError


def write_whole(path: str | Path, data: bytes | memoryview) -> None:
    """Write a file, so that no reader and no crash ever sees a part of it; its folders are made.

    Raises:
        SetupError: It cannot be written.
    """
    path = Path(path)
    part = path.with_name(f'.{path.name}.{os.getpid()}')
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            part.unlink(missing_ok=True)  # of a process that was killed, or a link that someone planted
            with part.open('xb') as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            part.replace(path)
            _sync_folder(path.parent)
        finally:
            part.unlink(missing_ok=True)
    except OSError as error:
        raise SetupError(f'{path} cannot be written: {error}') from error


def check_output(out: str, source: str | None = None) -> None:
    """Check that a path names a file to write, which is not the one that is read.

    Raises:
        SetupError: It names a folder, or is the source.
    """
    if out.endswith('/') or os.path.isdir(out):
        raise SetupError(f'{out} is a folder: give the name of a file in it')
    if (
        source is not None
        and os.path.exists(out)
        and os.path.exists(source)
        and os.path.samefile(out, source)
    ):
        raise SetupError(f'{out} is the input itself: give another name for the output')


def _sync_folder(path: Path) -> None:
    """Write a folder's list of names to its disk."""
    folder = os.open(path, os.O_RDONLY)
    try:
        os.fsync(folder)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # on file systems that keep none
            raise
    finally:
        os.close(folder)
