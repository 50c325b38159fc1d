"""The generated data set `shapes`: overlapping textured shapes on cluttered backgrounds.

Real data needs a download and a licence; this one is drawn in seconds wherever mmvig runs, so that
the configs `*_shapes*.py` train, evaluate and show pictures on a machine that has nothing else.
`ensure_shapes` makes it at first use:

    data/shapes/
        meta.json                               parameters of the set
        images/{train,val}/000000.png           240 x 320 (height x width)
        annotations/instances_{train,val}.json  COCO instances, their visible parts as RLE
        masks/{train,val}/000000.png            label maps: 0 = background, else the COCO category

Background is a class of the label maps, so a model must find the shapes, not only name them;
`reduce_zero_label=True` reads the same files in ADE's way, with 0 ignored.

Every image draws from its own generator, seeded by (seed, split, index): the same parameters give
the same pixels. Made by hand: `python -m mmvig.datasets.shapes --root data/shapes`.
"""

import argparse
import fcntl
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import cv2
import numpy as np
from tqdm import tqdm

from mmvig.datasets.scene import CLASSES, HEIGHT, WIDTH, draw_scene

_DEFAULTS = {'num_train': 400, 'num_val': 100, 'seed': 0}
_FORMAT = 2  # raise it with every change of the pictures or files, so that old sets are recognised
_SPLITS = ('train', 'val')


def _run_lengths(mask: np.ndarray) -> dict:
    """Return COCO's uncompressed RLE of a mask [H, W]: column by column, zeros first."""
    pixels = np.concatenate([[False], mask.ravel(order='F'), [False]])
    changes = np.flatnonzero(pixels[1:] != pixels[:-1])
    counts = np.diff(np.concatenate([[0], changes, [mask.size]]))
    return {'size': list(mask.shape), 'counts': counts.tolist()}


def _annotations(instances: np.ndarray, labels: list[int], image_id: int, first_id: int) -> list:
    """Return the COCO annotations of one image, numbered from `first_id`."""
    annotations = []
    for index, label in enumerate(labels):
        mask = instances == index + 1
        rows, columns = np.nonzero(mask)
        box = columns.min(), rows.min(), np.ptp(columns) + 1, np.ptp(rows) + 1
        annotations.append(
            {
                'id': first_id + index,
                'image_id': image_id,
                'category_id': label + 1,
                'segmentation': _run_lengths(mask),
                'area': len(rows),
                'bbox': [int(value) for value in box],
                'iscrowd': 0,
            }
        )
    return annotations


def _annotation_file(root: Path, split: str) -> Path:
    return root / 'annotations' / f'instances_{split}.json'


def _image_files(root: Path, split: str, index: int) -> list[Path]:
    """Return the paths of an image and its label map."""
    return [root / kind / split / f'{index:06d}.png' for kind in ('images', 'masks')]


def _write_png(path: Path, image: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if not cv2.imwrite(str(path), image):
        raise OSError(f'could not write {path}')


def _write_split(root: Path, split: str, count: int, seed: int, progress: tqdm) -> None:
    images, annotations = [], []
    for index in range(count):
        rng = np.random.default_rng([seed, _SPLITS.index(split), index])
        image, instances, labels = draw_scene(rng)
        image_file, mask_file = _image_files(root, split, index)
        _write_png(image_file, image)
        categories = np.array([0, *(label + 1 for label in labels)], np.uint8)
        _write_png(mask_file, categories[instances])
        size = {'height': HEIGHT, 'width': WIDTH}
        images.append({'id': index, 'file_name': image_file.name, **size})
        annotations += _annotations(instances, labels, index, first_id=len(annotations) + 1)
        progress.update()
    categories = [
        {'id': number, 'name': name, 'supercategory': 'shape'}
        for number, name in enumerate(CLASSES, start=1)
    ]
    coco = {
        'info': {'description': f'shapes, {split}'},
        'licenses': [],
        'images': images,
        'annotations': annotations,
        'categories': categories,
    }
    path = _annotation_file(root, split)
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(coco, separators=(',', ':')))


def _is_made(root: Path, wanted: dict[str, int]) -> bool:
    """Return whether `root` holds the wanted set: False if nothing is there, an error if else."""
    if not root.exists() or (root.is_dir() and not any(root.iterdir())):
        return False
    advice = 'remove it, or name another folder'
    try:
        meta = json.loads((root / 'meta.json').read_text())
        counts = {split: int(meta[f'num_{split}']) for split in _SPLITS}
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise FileExistsError(f'{root} is not a shapes data set ({error}): {advice}') from None
    for name, value in {'name': 'shapes', 'format': _FORMAT, **wanted}.items():
        if meta.get(name) != value:
            raise FileExistsError(f'{root} has {name}={meta.get(name)}, not {value}: {advice}')
    for split in _SPLITS:
        files = [_annotation_file(root, split)]
        for index in range(counts[split]):
            files += _image_files(root, split, index)
        for file in files:
            if not file.is_file():
                raise FileExistsError(f'{file} is missing: remove {root}, it is made anew')
    return True


@contextmanager
def _only_one_process(lock: Path) -> Iterator[None]:
    """Hold a lock file; the kernel frees it when its process ends, in whatever way."""
    with lock.open('w') as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def ensure_shapes(
    root: str | os.PathLike = 'data/shapes',
    num_train: int | None = None,
    num_val: int | None = None,
    seed: int | None = None,
) -> Path:
    """Make the data set in `root` unless it is there.

    The set is made in a folder beside `root`, renamed when it is whole, by one process while others
    (the ranks of a distributed run) wait: `root` never holds half a set.

    Args:
        root: folder of the set.
        num_train: training images, 400 by default; with a set in place, None takes what it has.
        num_val: validation images, likewise, 100 by default.
        seed: seed of all pictures, likewise, 0 by default.

    Returns:
        `root` as an absolute path.

    Raises:
        TypeError: if `root` is no path, or another argument no int.
        ValueError: if a number of images is below 1 or the seed is negative.
        FileExistsError: if `root` holds other things, an incomplete set, or one made with other
            parameters than those given.
        OSError: if it cannot be written.
    """
    if not isinstance(root, (str, os.PathLike)) or '\0' in os.fspath(root):
        raise TypeError(f'root must be the path of a folder, got {root!r}')
    root = Path(root).absolute()
    given = {'num_train': num_train, 'num_val': num_val, 'seed': seed}
    wanted = {name: value for name, value in given.items() if value is not None}
    for name, value in wanted.items():
        if type(value) is not int:
            raise TypeError(f'{name} must be an int, got {value!r}')
        least = 0 if name == 'seed' else 1
        if value < least:
            raise ValueError(f'{name} is {value}, expected at least {least}')
    try:
        if not _is_made(root, wanted):
            root.parent.mkdir(parents=True, exist_ok=True)
            with _only_one_process(root.with_name(f'.{root.name}.lock')):
                if not _is_made(root, wanted):  # another process may have made it meanwhile
                    _make(root, {**_DEFAULTS, **wanted})
    except OSError as error:
        if error.errno is None:  # one of those above, which say it all
            raise
        reason = f'{error.strerror}: {error.filename}' if error.filename else error.strerror
        raise type(error)(f'{root} cannot be made ({reason}): name another, writable folder') from error
    return root


def _make(root: Path, parameters: dict[str, int]) -> None:
    partial = root.with_name(f'.{root.name}.partial')
    if partial.exists():  # a maker was killed: the lock says that it runs no more
        shutil.rmtree(partial)
    partial.mkdir()
    try:
        total = parameters['num_train'] + parameters['num_val']
        with tqdm(total=total, desc=f'making {root}', unit='image') as progress:
            for split in _SPLITS:
                count = parameters[f'num_{split}']
                _write_split(partial, split, count, parameters['seed'], progress)
        meta = {'name': 'shapes', 'format': _FORMAT, **parameters, 'classes': CLASSES}
        (partial / 'meta.json').write_text(json.dumps(meta, indent=2) + '\n')
        partial.rename(root)
    except BaseException:
        shutil.rmtree(partial)
        raise


def main() -> None:
    """Make the data set from the command line."""
    parser = argparse.ArgumentParser(description='Make the generated data set "shapes".')
    parser.add_argument('--root', default='data/shapes', help='folder to make, %(default)s by default')
    for name, default in _DEFAULTS.items():
        option = f'--{name.replace("_", "-")}'
        parser.add_argument(option, type=int, help=f'{default} by default')
    args = parser.parse_args()
    try:
        print(f'shapes: {ensure_shapes(**vars(args))}')
    except (OSError, ValueError) as error:
        parser.exit(2, f'error: {error}\n')


if __name__ == '__main__':
    main()
