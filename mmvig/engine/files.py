"""Files that are there whole or not at all."""

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
            with part.open('wb') as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            part.replace(path)
        finally:
            part.unlink(missing_ok=True)
    except OSError as error:
        raise SetupError(f'{path} cannot be written: {error}') from error
