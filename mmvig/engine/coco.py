"""COCO annotation files, checked before mmdet reads them: what they hold, their classes, their pictures."""

from __future__ import annotations

import json
import mmap
import re
from collections.abc import Sequence
from itertools import islice
from pathlib import Path

from mmvig.engine.preflight import SetupError, is_remote

# Annotation files up to this size are read as a whole, in a few seconds; of larger ones, parts.
_READ_WHOLE = 2**25
_SAMPLE = 20
_NEEDED = {
    'images': ('id', 'file_name', 'height', 'width'),
    'annotations': ('id', 'image_id', 'category_id', 'bbox', 'area'),
    'categories': ('id', 'name'),
}
_FILE_NAME = re.compile(rb'"file_name"\s*:\s*("(?:[^"\\]|\\.)*")')


def check(
    path: Path, key: str, names: Sequence[str], folder: Path | None = None, labelled: bool = False
) -> None:
    """Check a COCO annotation file.

    Args:
        path: of the file.
        key: of what reads it, for errors.
        names: of the classes.
        folder: of the pictures, of which some are looked for. Default: None, none.
        labelled: whether the file must have annotations. Default: False.

    Raises:
        SetupError: It is none, names other classes, or pictures lack.
    """
    where = f'annotation file {path} of {key}'
    try:
        read = _read_whole if path.stat().st_size <= _READ_WHOLE else _read_parts
        categories, files = read(path, labelled)
    except (OSError, ValueError, RecursionError) as error:
        raise SetupError(f'{where} is no COCO annotation file: {error}') from error
    found = [category for category in categories if category in names]
    absent = [name for name in names if name not in found]
    if absent:
        raise SetupError(
            f'{where} has no {listed(absent)}, of the classes that the data set names; it has '
            f'{listed(categories)}: set metainfo.classes of the data set to names in it'
        )
    if found != list(names):
        raise SetupError(
            f"{where} has the classes in the order {listed(found)}, which is the labels', and the data "
            f'set names them {listed(names)}: set metainfo.classes in the order of the file'
        )
    gone = [file for file in files if folder is not None and not Path(folder, file).is_file()]
    if gone and not is_remote(str(folder)):
        raise SetupError(
            f'{len(gone)} of {len(files)} pictures looked for that the {where} names are missing, such as '
            f'{Path(folder, gone[0]).absolute()}: get them, or set data_root and data_prefix.img'
        )


def _read_whole(path: Path, labelled: bool) -> tuple[list[str], list[str]]:
    """The names of categories, and of the first and last pictures."""
    content = json.loads(path.read_bytes())
    if not isinstance(content, dict):
        raise ValueError(
            f'it holds a {type(content).__name__}, expected an object with {", ".join(_NEEDED)}'
        )
    for part, needed in _NEEDED.items():
        if part == 'annotations' and not labelled and not content.get(part):
            continue
        entries = content.get(part)
        if not isinstance(entries, list) or not entries:
            raise ValueError(f'it has no list of {part}')
        for i, entry in enumerate(entries):
            lacking = [name for name in needed if not isinstance(entry, dict) or name not in entry]
            if lacking:
                raise ValueError(f'{part}[{i}] has no {", ".join(lacking)}')
    files = [str(image['file_name']) for image in content['images']]
    sample = files if len(files) <= 2 * _SAMPLE else files[:_SAMPLE] + files[-_SAMPLE:]
    return [category['name'] for category in content['categories']], sample


def _read_parts(path: Path, _: bool) -> tuple[list[str], list[str]]:
    """The same of a large file, of which the first pictures alone are taken."""
    with path.open('rb') as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        start = data.rfind(b'"categories"')  # last in COCO's own files
        start = data.find(b'[', start) if start >= 0 else -1
        if start < 0 or data.find(b'"images"') < 0:
            raise ValueError('it has no lists of images and categories')
        length, categories = 2**16, None
        while categories is None:
            text = data[start : start + length].decode(errors='ignore')
            try:
                categories, _ = json.JSONDecoder().raw_decode(text)
            except ValueError:
                if start + length >= len(data):
                    raise
                length *= 4
        sample = [json.loads(found[1]) for found in islice(_FILE_NAME.finditer(data), _SAMPLE)]
    return [category['name'] for category in categories], sample


def listed(names: Sequence[str]) -> str:
    """The first few of many names."""
    return ', '.join(map(str, names[:6])) + (f' and {len(names) - 6} more' if len(names) > 6 else '')
