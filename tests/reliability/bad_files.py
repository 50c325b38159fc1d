"""Bad files for the tools, and good ones to go with them."""

import json
import os
import pickle
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
import torch
from programs import run_well
from small_configs import write_small

CONFIGS = {
    'syntax.py': 'model = dict(',
    'name.py': 'model = dict(type=nothing)',
    'imports.py': 'import no_such_package',
    'raises.py': '1 / 0',
    'base.py': "_base_ = ['no.py']",
    'circle.py': "_base_ = ['circle.py']",
    'empty.py': '',
    'no_model.py': "default_scope = 'mmdet'",
    'model_3.py': 'model = 3',
    'custom.py': "custom_imports = dict(imports=['no_such_package'])\nmodel = dict(type='A')",
    'empty.json': '',
    'garbage.json': '{"model": ',
    'list.json': '[1, 2]',
    'garbage.yaml': 'model: [1, {',
    'code.yaml': "model: !!python/object/apply:os.system ['true']",
    'text.txt': 'model = 3',
}


class Files(NamedTuple):
    """Paths of good files, then lists of bad ones."""

    folder: Path
    detector: Path
    segmentor: Path
    bare: Path  # a config without what flags ask for
    good: Path  # a checkpoint of the detector
    image: Path
    run: Path  # work dir of a training
    file: Path  # where a folder should be
    configs: list
    checkpoints: list
    images: list
    unwritable: list
    scalars: list


class _Code:
    def __reduce__(self) -> tuple:
        return os.system, ('true',)


def prepare(folder: Path) -> Files:
    """Make them all."""
    detector, segmentor = write_small(folder, train=2, val=1, iterations=1)
    bare = [
        "model = dict(type='A')",
        'train_dataloader = train_cfg = dict()',
        "optim_wrapper = dict(type='B')",
    ]
    (folder / 'bare.py').write_text('\n'.join(bare))
    run_well('train.py', detector, '--work-dir', folder / 'run', cwd=folder)
    (folder / 'run/iter_1.pth').rename(folder / 'good.pth')
    file = folder / 'file'
    file.write_text('text')
    for name, text in CONFIGS.items():
        (folder / 'configs').mkdir(exist_ok=True)
        (folder / 'configs' / name).write_text(text)
    configs = [*(folder / 'configs').iterdir(), folder / 'no.py', folder, '', 'a' * 300 + '.py']
    image = folder / 'shapes/images/val/000000.png'
    return Files(
        folder,
        detector,
        segmentor,
        folder / 'bare.py',
        folder / 'good.pth',
        image,
        folder / 'run',
        file,
        configs,
        _checkpoints(folder),
        _images(folder, image),
        [file / 'x', '/proc/no/x', 'a' * 300],
        _scalars(folder) if _annotations(folder) is None else [],
    )


def _checkpoints(folder: Path) -> list:
    """Checkpoint files that are none, or of another model."""
    good = torch.load(folder / 'good.pth', weights_only=False)['state_dict']
    first = next(iter(good))
    contents = {
        'foreign': {'layer1.0.conv1.weight': torch.rand(3, 3)},
        'nothing': {},
        'number': 3,
        'none': None,
        'tensor': torch.rand(3),
        'list': [torch.rand(3)],
        'no_tensors': {'state_dict': dict.fromkeys(good, 1.5)},
        'int_keys': {'state_dict': {3: torch.rand(3)}},
        'state_none': {'state_dict': None},
        'nan': {'state_dict': {**good, first: good[first] * float('nan')}},
        'shape': {'state_dict': {**good, first: torch.rand(1)}},
        'missing': {'state_dict': dict(list(good.items())[1:])},
        'more': {'state_dict': {**good, 'backbone.foo': torch.rand(1)}},
        'code': {'state_dict': good, 'meta': _Code()},
    }
    for name, content in contents.items():
        torch.save(content, folder / f'{name}.pth')
    whole = (folder / 'good.pth').read_bytes()
    raw = {'empty': b'', 'html': b'<html>404</html>', 'cut': whole[: len(whole) // 2], 'zeros': bytes(5000)}
    raw['pickle'] = pickle.dumps(_Code())
    for name, data in raw.items():
        (folder / f'{name}.pth').write_bytes(data)
    paths = [folder / f'{name}.pth' for name in (*contents, *raw)]
    return [*paths, folder / 'no.pth', folder, '', 'http://127.0.0.1:9/a.pth', 'foo://a.pth', 'a' * 300]


def _images(folder: Path, good: Path) -> list:
    """Images that are none, or broken."""
    data = good.read_bytes()
    jpeg = cv2.imencode('.jpg', cv2.imread(str(good)))[1].tobytes()
    raw = {
        'empty.png': b'',
        'text.png': b'text',
        'header.png': data[:40],
        'cut.jpg': jpeg[:100],
        'zeros.png': bytes(999),
    }
    (folder / 'images').mkdir()
    for name, content in raw.items():
        (folder / 'images' / name).write_bytes(content)
    (folder / 'none').mkdir()
    np.save(folder / 'images/array.npy', np.ones((4, 4)))
    paths = [*(folder / 'images' / name for name in (*raw, 'array.npy')), folder / 'images/no.png']
    return [*paths, folder / 'none', folder / 'file', '', 'a' * 300]


def _annotations(folder: Path) -> None:
    """Annotation files that do not fit."""
    whole = json.loads((folder / 'shapes/annotations/instances_train.json').read_text())
    first, *_ = whole['annotations']
    contents = {
        'list': [1, 2],
        'no_categories': {key: value for key, value in whole.items() if key != 'categories'},
        'no_images': {**whole, 'images': []},
        'other_classes': {
            **whole,
            'categories': [{**each, 'name': f'x{each["id"]}'} for each in whole['categories']],
        },
        'missing_pictures': {
            **whole,
            'images': [{**each, 'file_name': 'no.png'} for each in whole['images']],
        },
        'broken_boxes': {**whole, 'annotations': [{**first, 'bbox': 'x'}]},
    }
    for name, content in contents.items():
        (folder / f'{name}.json').write_text(json.dumps(content))
    (folder / 'empty.json').touch()
    (folder / 'garbage.json').write_text('{"images": [')


def _scalars(folder: Path) -> list[Path]:
    """Logs of runs that are none."""
    paths = []
    for name, text in {
        'empty': '',
        'garbage': '{"loss": ',
        'list': '[1]',
        'words': '{"loss": "x", "step": "y"}',
    }.items():
        path = folder / 'logs' / name / 'vis_data/scalars.json'
        path.parent.mkdir(parents=True)
        path.write_text(text)
        paths.append(path.parents[1])
    return paths
