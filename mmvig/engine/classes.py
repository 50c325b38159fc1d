"""Classes as the data set names them, as annotations have them and as heads count them: all must agree.

mmdet drops the annotations of classes whose names the file lacks, numbers the others in the file's order,
and fails at the first validation. A head with too few classes fails in a kernel, one with too many says
nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from mmvig import reading
from mmvig.engine import coco
from mmvig.engine.preflight import SetupError, leaf_datasets, type_name

if TYPE_CHECKING:
    from mmengine.config import Config, ConfigDict

# Heads of other classes than the data set's: of proposals, of stuff in HTC, of identities.
_OTHER_CLASSES = ('rpn_head', 'semantic_head', 'reid')
_HEADS = {'mmseg': ('decode_head',), 'mmpretrain': ('head',)}


def check(cfg: Config, split: str) -> None:
    """Check the classes of a split's data sets, and that the pictures are where annotations say.

    Args:
        cfg: a config whose files are all there.
        split: 'train', 'val' or 'test'.

    Raises:
        SetupError: Names, annotations and heads differ, a file is no COCO JSON, or pictures lack.
    """
    names = None
    for key, dataset in leaf_datasets(cfg[f'{split}_dataloader'].dataset, f'{split}_dataloader.dataset'):
        kind = _class_of(cfg, dataset)
        names = _names(kind, dataset, key)
        if names is None:
            continue
        check_heads(cfg, names, key)
        ann_file = Path(dataset.get('data_root') or '', dataset.get('ann_file') or '')
        if _reads_coco(kind) and ann_file.is_file() and not dataset.get('backend_args'):
            folder = Path(
                dataset.get('data_root') or '', (dataset.get('data_prefix') or {}).get('img') or ''
            )
            coco.check(ann_file, key, names, folder, labelled=split == 'train')
    evaluators = cfg.get(f'{split}_evaluator') or [] if split != 'train' else []
    for evaluator in evaluators if isinstance(evaluators, (list, tuple)) else [evaluators]:
        ann_file = evaluator.get('ann_file') or ''
        if names and type_name(evaluator) == 'CocoMetric' and Path(ann_file).is_file():
            coco.check(Path(ann_file), f'{split}_evaluator', names)


def check_heads(cfg: Config, names: Sequence[str], whose: str) -> None:
    """Check that the heads of a config's model have as many classes as there are names.

    Raises:
        SetupError: One has more or fewer.
    """
    if 'language_model' in cfg.model:  # whose classes are words of a prompt
        return
    for key, number in _heads(cfg.model, 'model', _HEADS.get(cfg.get('default_scope'))):
        if number != len(names):
            raise SetupError(
                f'{key} is {number}, {whose} has {len(names)} classes ({coco.listed(names)}): '
                f'make them the same, as with --cfg-options {key}={len(names)}'
            )


def shown(cfg: Config, checkpoint: str) -> dict:
    """What the packages' visualisers call ``dataset_meta``: the names of classes, and their colours.

    Args:
        cfg: a config, whose test data set says it where the checkpoint does not.
        checkpoint: as training saves it, with the data set's, or another.

    Raises:
        SetupError: Neither has names.
    """
    content = reading.load(checkpoint)
    meta = content.get('meta') if isinstance(content, dict) else None
    saved = meta.get('dataset_meta') if isinstance(meta, dict) else None
    saved = {str(key).lower(): value for key, value in saved.items()} if isinstance(saved, dict) else {}
    if isinstance(saved.get('classes'), (list, tuple)) and saved['classes']:
        return saved
    if cfg.get('test_dataloader'):
        key, dataset = next(leaf_datasets(cfg.test_dataloader.dataset, 'test_dataloader.dataset'))
        kind = _class_of(cfg, dataset)
        if _names(kind, dataset, key):
            settings = {name: value for name, value in dataset.items() if name != 'type'}
            return kind(**{**settings, 'lazy_init': True, 'pipeline': []}).metainfo
    raise SetupError(f'neither {checkpoint} nor the test data set of {cfg.filename} names the classes')


def _class_of(cfg: Config, dataset: ConfigDict) -> type | None:
    """A data set's class; None where the registries do not know it, which building it will say."""
    import mmvig.compat  # noqa: F401, I001  before what imports mmcv.ops
    from mmengine.registry import DATASETS

    if isinstance(dataset.get('type'), type):
        return dataset.type
    with DATASETS.switch_scope_and_registry(cfg.get('default_scope')) as registry:
        return registry.get(dataset.get('type') or '')


def _names(kind: type | None, dataset: ConfigDict, key: str) -> list[str] | None:
    """The names that a data set gives its classes; None where only its files say them."""
    from mmengine.dataset import BaseDataset

    if not (isinstance(kind, type) and issubclass(kind, BaseDataset)):
        return None
    metainfo = dict(dataset.get('metainfo') or {})
    if dataset.get('classes') is not None:  # mmpretrain's argument
        metainfo.setdefault('classes', dataset.classes)
    try:
        names = kind._load_metainfo(metainfo).get('classes')
    except OSError as error:
        raise SetupError(f'{key}.metainfo cannot be read: {error}') from error
    if names is None:
        return None
    if isinstance(names, str) or not all(isinstance(name, str) for name in names):
        raise SetupError(
            f'{key}.metainfo.classes must be a list of names, got {names!r}; for a single one, ({names!r},)'
        )
    twice = sorted({name for name in names if list(names).count(name) > 1})
    if twice and 'classes' in metainfo:  # ImageNet's own name two kinds of crane alike
        raise SetupError(f'{key}.metainfo.classes names {coco.listed(twice)} more than once')
    return list(names)


def _heads(node: ConfigDict, key: str, wanted: Sequence[str] | None) -> Iterator[tuple[str, int]]:
    """The key and value of every head's number of classes.

    Args:
        node: a part of the model's config.
        key: its own.
        wanted: names of heads to look at. Default: None, all but those of other classes.
    """
    items = node.items() if isinstance(node, dict) else enumerate(node)
    for name, value in items:
        if not isinstance(value, (dict, list, tuple)) or name in _OTHER_CLASSES:
            continue
        part = next(each for each in reversed(f'{key}.{name}'.split('.')) if not each.isdigit())
        is_head = part in wanted if wanted else part.endswith('head')
        if is_head and isinstance(value, dict):
            # Mask2Former's and MaskFormer's: with stuff, the data set's classes are of both kinds.
            option = 'num_things_classes' if value.get('num_stuff_classes') == 0 else 'num_classes'
            if type(value.get(option)) is int:
                yield f'{key}.{name}.{option}', value[option]
        yield from _heads(value, f'{key}.{name}', wanted)


def _reads_coco(kind: type) -> bool:
    """Whether a class reads its annotations as mmdet's CocoDataset does."""
    return any(
        base.__module__ == 'mmdet.datasets.coco' and kind.load_data_list is base.load_data_list
        for base in kind.__mro__
        if base.__name__ == 'CocoDataset'
    )
