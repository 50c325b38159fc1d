"""Says which file is missing before a run starts, where it is expected and how to get it.

mmengine notices a missing file only when it builds the object that reads it, minutes into a run and
with a long traceback. Everything here reads the config alone and imports no model library.
"""

from __future__ import annotations

import os
import sys
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryFile
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # imported for types alone: a tool should say what is missing at once
    from mmengine.config import Config, ConfigDict

# Made or downloaded by the data set itself on first use, so never missing.
_MADE_ON_FIRST_USE = ('Shapes', 'CIFAR', 'MNIST', 'FashionMNIST')

_WHERE_TO_GET = {
    'data/coco': 'COCO 2017 (train2017, val2017, annotations) from https://cocodataset.org/#download',
    'data/ade': 'ADE20K from http://data.csail.mit.edu/places/ADEchallenge/ADEChallengeData2016.zip',
    'data/imagenet': 'ImageNet-1k from https://www.image-net.org/download.php',
}
# mmdet's and mmseg's: they know a few backbones by name, and raise an error without words for others.
_LAYER_DECAY_OF_OTHERS = ('LearningRateDecayOptimizerConstructor', 'LayerDecayOptimizerConstructor')


class SetupError(Exception):
    """Something that the user must put right before a run can start, said in one line."""


@contextmanager
def one_line_errors() -> Iterator[None]:
    """Turn a SetupError, or the system's refusal of a path, into one line on stderr and exit status 2."""
    try:
        yield
    except (SetupError, OSError) as error:
        message = str(error)
        if isinstance(error, OSError):
            if not error.filename:
                raise
            message = f'{str(error.filename)[:200]}: {error.strerror}'
        if local_rank() == 0:
            print(f'error: {message}', file=sys.stderr)
        sys.exit(2)


def local_rank() -> int:
    """This process's number on its node, under any launcher; 0 without one."""
    launchers = ('LOCAL_RANK', 'SLURM_LOCALID', 'OMPI_COMM_WORLD_LOCAL_RANK')
    return max(int(os.environ.get(name, 0)) for name in launchers)


def check_training(cfg: Config) -> None:
    """Check the files that ``Runner.train`` will read.

    Those are the data of the training and validation loaders, the validation evaluators'
    annotations, ``init_cfg`` checkpoints, and what the run loads or resumes from.

    Raises:
        SetupError: One of them is missing.
    """
    if not cfg.get('train_dataloader'):
        raise SetupError(f'{cfg.filename} has no train_dataloader, so there is nothing to train on')
    _check_layer_decay(cfg)
    _check_loader(cfg, 'train')
    if cfg.get('val_dataloader'):
        _check_loader(cfg, 'val')
    for key, path in _pretrained(cfg.model, 'model'):
        check_file(
            path,
            'pretrained checkpoint',
            f'download it, or set another path with --cfg-options {key}.checkpoint=FILE, '
            f'or train from scratch with --cfg-options {key}=None',
        )
    if cfg.get('load_from'):
        what = 'checkpoint to resume from' if cfg.get('resume') else 'checkpoint to start from'
        option = '--resume FILE' if cfg.get('resume') else '--cfg-options load_from=FILE'
        check_file(cfg.load_from, what, f'name another with {option}, or begin without one')
    _check_classes(cfg, 'train', 'val')


def _check_layer_decay(cfg: Config) -> None:
    """Check that the decay of learning rates by layer is one that knows our backbones' layers."""
    constructor = str((cfg.get('optim_wrapper') or {}).get('constructor', ''))
    backbone = str((cfg.model.get('backbone') or {}).get('type', ''))
    if constructor.split('.')[-1] in _LAYER_DECAY_OF_OTHERS and backbone.split('.')[-1] in ('ViG', 'ViGH'):
        raise SetupError(
            f'optim_wrapper.constructor={constructor!r} does not know the layers of {backbone}: take '
            "'mmvig.LayerDecayOptimWrapperConstructor' with paramwise_cfg=dict(decay_rate=0.8)"
        )


def check_testing(cfg: Config) -> None:
    """Check the files that ``Runner.test`` will read: data, annotations and the checkpoint.

    Raises:
        SetupError: One of them is missing.
    """
    if not (cfg.get('test_dataloader') and cfg.get('test_evaluator')):
        raise SetupError(f'{cfg.filename} has no test_dataloader and test_evaluator to test with')
    check_checkpoint(cfg.load_from, cfg.filename)
    _check_loader(cfg, 'test')
    _check_classes(cfg, 'test')


def check_checkpoint(path: str, config: str) -> None:
    """Check that the checkpoint of a model to be tested or shown is there.

    Raises:
        SetupError: It is missing.
    """
    hint = f'train one with `python tools/train.py {config}`, or give the path of another'
    check_file(path, 'checkpoint', hint)


def check_file(path: str, what: str, how_to_get: str) -> None:
    """Check that a file is there, unless it is remote.

    Raises:
        SetupError: It is missing.
    """
    if not is_remote(path) and not Path(path).expanduser().is_file():
        raise _missing(what, path, how_to_get)


def check_device(name: str | None) -> str:
    """Check that tensors can live on a device; None stands for a GPU where there is one, else the CPU.

    Raises:
        SetupError: They cannot.
    """
    import torch

    if name is None:
        return 'cuda:0' if torch.cuda.is_available() else 'cpu'
    if name.startswith('cpu:') and name != 'cpu:0':  # which torch takes, whatever the number
        raise SetupError(f'--device {name} cannot be used, the only CPU is cpu')
    try:
        torch.zeros(1, device=name).item()
    except (AssertionError, ImportError, RuntimeError) as error:  # as torch's backends have it
        why = textwrap.shorten(str(error), 200, placeholder=' ...')
        raise SetupError(f'--device {name} cannot be used, cpu or cuda:0 may be: {why}') from error
    return name


def check_writable(option: str, path: str | Path, folder: bool = False) -> None:
    """Check before any work that a file, or a folder and files in it, can be written; nothing stays.

    Raises:
        SetupError: It is of the other kind, a file stands where a folder must be, or it is read-only.
    """
    if path == '':
        raise SetupError(f'{option} is empty, expected a path')
    path = Path(path)
    try:
        if path.exists() and path.is_dir() != folder:
            kinds = ('folder', 'file') if folder else ('file', 'folder')
            raise SetupError(f'{option} {path} must be a {kinds[0]}, and is a {kinds[1]}')
        first = next(parent for parent in (path, *path.absolute().parents) if parent.exists())
    except OSError as error:  # such as a name that is too long
        raise SetupError(f'{option} {path} cannot be written: {error.strerror}') from error
    if first != path and not first.is_dir():
        raise SetupError(f'{option} {path} cannot be written: {first} is a file, not a folder')
    place = first if first.is_dir() else first.absolute().parent
    try:
        with TemporaryFile(dir=place):  # to try is the only way to know
            pass
    except OSError as error:
        raise SetupError(f'{option} {path} cannot be written: {place}: {error.strerror}') from error


def _check_loader(cfg: Config, split: str) -> None:
    """Check the data sets of one loader, and the annotations that its evaluators read."""
    loader = f'{split}_dataloader'
    generated = False
    for key, dataset in leaf_datasets(cfg[loader].dataset, f'{loader}.dataset'):
        if type_name(dataset).startswith(_MADE_ON_FIRST_USE):
            generated = True
        elif not dataset.get('backend_args'):  # which would mean remote storage
            _check_dataset(cfg, key, dataset)
    evaluators = [] if generated else cfg.get(f'{split}_evaluator') or []
    for evaluator in evaluators if isinstance(evaluators, (list, tuple)) else [evaluators]:
        ann_file = evaluator.get('ann_file')
        if isinstance(ann_file, str):
            how = _how(cfg, ann_file, f'{split}_evaluator.ann_file=FILE')
            check_file(ann_file, f'annotation file of {split}_evaluator', how)


def _check_classes(cfg: Config, *splits: str) -> None:
    """Check classes last, as this imports the data sets' package, which takes seconds."""
    from mmvig.engine import classes

    for split in splits:
        if cfg.get(f'{split}_dataloader'):
            classes.check(cfg, split)


def _check_dataset(cfg: Config, key: str, dataset: ConfigDict) -> None:
    """Check one data set's root, annotation file and folders, joined as mmengine joins them."""
    root = dataset.get('data_root') or ''
    if is_remote(root):
        return
    how = _how(cfg, root, f'{key}.data_root=DIR')
    prefix = dataset.get('data_prefix') or {}
    if not prefix and type_name(dataset) == 'ImageNet':
        prefix = dataset.get('split') or {}
    folders = prefix.values() if isinstance(prefix, dict) else [prefix]
    for what, folder in [('data root', ''), *(('image or label folder', f) for f in folders)]:
        path = Path(root, folder or '')
        if not is_remote(folder or '') and not path.is_dir():
            raise _missing(f'{what} of {key}', path, how)
    ann_file = dataset.get('ann_file')
    if ann_file and isinstance(ann_file, str) and not is_remote(ann_file):
        check_file(str(Path(root, ann_file)), f'annotation file of {key}', how)


def leaf_datasets(dataset: ConfigDict, key: str) -> Iterator[tuple[str, ConfigDict]]:
    """Go through wrappers (repeat, concatenate, ...) to the data sets that read files."""
    inner = [name for name in ('dataset', 'datasets') if name in dataset]
    if not inner:
        yield key, dataset
    for name in inner:
        if isinstance(dataset[name], (list, tuple)):
            for i, each in enumerate(dataset[name]):
                yield from leaf_datasets(each, f'{key}.{name}.{i}')
        else:
            yield from leaf_datasets(dataset[name], f'{key}.{name}')


def _pretrained(node, key: str) -> Iterator[tuple[str, str]]:
    """Find every ``init_cfg`` that names a checkpoint: its config key and the path."""
    items = node.items() if isinstance(node, dict) else enumerate(node)
    for name, value in items:
        if isinstance(value, (dict, list, tuple)):
            yield from _pretrained(value, f'{key}.{name}')
            if isinstance(value, dict) and isinstance(value.get('checkpoint'), str):
                yield f'{key}.{name}', value['checkpoint']


def type_name(dataset: ConfigDict) -> str:
    """The name of a data set's or evaluator's class, without scope or package."""
    kind = dataset.get('type', '')
    return (kind if isinstance(kind, str) else kind.__name__).rpartition('.')[2]


def is_remote(path: str) -> bool:
    """Whether a path is an address."""
    return '://' in path


def _how(cfg: Config, path: str, option: str) -> str:
    """How to get a data set, if it is one we know, and how to say that it lies elsewhere."""
    elsewhere = f'name its place with --cfg-options {"data_root=DIR" if "data_root" in cfg else option}'
    for folder, where in _WHERE_TO_GET.items():
        if Path(path).is_relative_to(folder):
            return f'get {where} and unpack it to {folder}, or {elsewhere}'
    return elsewhere


def _missing(what: str, path: str | Path, how_to_get: str) -> SetupError:
    return SetupError(f'{what} is missing: expected at {Path(path).absolute()}; {how_to_get}')
