"""Checkpoint files on the Hugging Face hub: ``hf://OWNER/NAME/FILE``."""

import re
from hashlib import sha1, sha256
from pathlib import Path

PREFIX = 'hf://'
_ADDRESS = re.compile(r'hf://(?P<repository>[\w.-]+/[\w.-]+)(?:@(?P<revision>[^/]+))?/(?P<file>.+)')


def fetch(address: str) -> Path:
    """The local copy of a file of the hub, in huggingface_hub's cache.

    The hub names a file by the SHA-256 of its content (small ones by git's SHA-1), and so does the cache;
    the content is compared with it at each call.

    Args:
        address: ``hf://OWNER/NAME/FILE``, or ``hf://OWNER/NAME@REVISION/FILE`` with a branch, tag or
            commit. Default: the main branch's newest.

    Raises:
        ValueError: it is no such address.
        RuntimeError: huggingface_hub is missing, the file cannot be downloaded, or its copy is damaged.
    """
    match = _ADDRESS.fullmatch(address)
    if match is None:
        raise ValueError(f'{address} must be hf://OWNER/NAME/FILE or hf://OWNER/NAME@REVISION/FILE')
    try:
        import huggingface_hub
    except ImportError as error:
        raise RuntimeError(f"{address} needs huggingface_hub: pip install 'mmvig[hub]'") from error
    repository, revision, file = match.group('repository', 'revision', 'file')
    try:
        path = Path(huggingface_hub.hf_hub_download(repository, file, revision=revision))
    except Exception as error:  # of many types, by version and by what is wrong
        why = _reason(error, repository, revision)
        raise RuntimeError(f'{address} cannot be downloaded: {why}') from error
    copy = path.resolve()
    if not _is_whole(copy):
        raise RuntimeError(f'{copy} is damaged; delete it, and {address} is downloaded again')
    return path


def _is_whole(path: Path) -> bool:
    """Whether a file of the cache has the content that its name stands for, if it has such a name."""
    if not re.fullmatch(r'[0-9a-f]{40}|[0-9a-f]{64}', path.name):
        return True  # a file system without links
    digest = sha256() if len(path.name) == 64 else sha1(f'blob {path.stat().st_size}\0'.encode())
    with path.open('rb') as file:
        while piece := file.read(2**20):
            digest.update(piece)
    return digest.hexdigest() == path.name


def _reason(error: Exception, repository: str, revision: str | None) -> str:
    """What is wrong, in a line; of a missing file, which ones there are."""
    import huggingface_hub
    from huggingface_hub.utils import EntryNotFoundError, LocalEntryNotFoundError

    if isinstance(error, LocalEntryNotFoundError):
        return 'the hub cannot be reached, and there is no copy in the cache'
    if isinstance(error, EntryNotFoundError):
        try:
            names = huggingface_hub.list_repo_files(repository, revision=revision)
        except Exception:  # the list is only help: what is wrong has been found
            return f'{repository} has no such file'
        return f'{repository} has no such file, but ' + ', '.join(name for name in names if '.pt' in name)
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f'{type(error).__name__}: {lines[0] if lines else ""}'
