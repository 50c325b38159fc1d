"""Class names, annotation files and heads that do not agree are said before a run starts."""

import json
import re
from pathlib import Path

import pytest
from mmengine.config import Config

from mmvig.engine import classes, coco, preflight
from mmvig.engine.preflight import SetupError

CATEGORIES = [dict(id=3, name='cat'), dict(id=7, name='dog'), dict(id=9, name='ox')]


def annotations():
    images = [dict(id=i, file_name=f'{i}.png', height=4, width=4) for i in range(50)]
    box = dict(category_id=3, bbox=[0, 0, 2, 2], area=4)
    return dict(
        images=images, annotations=[dict(id=i, image_id=i, **box) for i in range(50)], categories=CATEGORIES
    )


@pytest.fixture
def data(tmp_path, monkeypatch):
    """A data set of 50 pictures, in the current folder."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'images').mkdir()
    for i in range(50):
        (tmp_path / f'images/{i}.png').touch()
    write(annotations())
    return tmp_path


def write(content, name='it.json'):
    Path(name).write_text(content if isinstance(content, str) else json.dumps(content))


def detection(names=('cat', 'dog', 'ox'), number=3, **model):
    dataset = dict(
        type='CocoDataset', data_root='.', ann_file='it.json', data_prefix=dict(img='images'), pipeline=[]
    )
    if names is not None:
        dataset['metainfo'] = dict(classes=names)
    head = dict(type='RetinaHead', num_classes=number)
    return Config(
        dict(
            default_scope='mmdet',
            model=dict(type='RetinaNet', bbox_head=head, **model),
            train_dataloader=dict(dataset=dict(type='RepeatDataset', times=2, dataset=dataset)),
            test_dataloader=dict(dataset=dataset),
            test_evaluator=dict(type='CocoMetric', ann_file='it.json'),
        )
    )


def error_of(cfg, split='train'):
    with pytest.raises(SetupError) as error:
        classes.check(cfg, split)
    assert '\n' not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize('split', ['train', 'test'])
def test_what_agrees_passes(data, split):
    classes.check(detection(), split)
    classes.check(detection(['dog', 'ox'], 2), split)  # a part of the file's
    classes.check(detection(rpn_head=dict(num_classes=1)), split)
    prompted = detection(number=256, language_model=dict(type='BertModel'))
    classes.check(prompted, split)


@pytest.mark.parametrize('split', ['train', 'test'])
def test_names_that_the_file_lacks(data, split):
    line = error_of(detection(['cat', 'cow', 'ox']), split)
    assert (
        'it.json' in line and 'has no cow' in line and 'cat, dog, ox' in line and 'metainfo.classes' in line
    )
    assert 'has no person, bicycle' in error_of(detection(None, 80), split)  # COCO's own
    assert 'in the order cat, dog, ox' in error_of(detection(['dog', 'cat', 'ox']), split)


def test_the_evaluators_own_file(data):
    write({**annotations(), 'categories': CATEGORIES[:2]}, 'val.json')
    cfg = detection()
    cfg.test_evaluator.ann_file = 'val.json'
    assert 'val.json of test_evaluator has no ox' in error_of(cfg, 'test')


@pytest.mark.parametrize('number', [2, 80])
def test_heads_of_another_number(data, number):
    line = error_of(detection(number=number))
    assert f'model.bbox_head.num_classes is {number}' in line and '3 classes (cat, dog, ox)' in line
    boxes = [
        dict(type='Shared2FCBBoxHead', num_classes=3),
        dict(type='Shared2FCBBoxHead', num_classes=number),
    ]
    assert 'model.roi_head.bbox_head.1.num_classes' in error_of(detection(roi_head=dict(bbox_head=boxes)))


def test_heads_that_count_things(data):
    """As Mask2Former's do, where there is no stuff."""
    cfg = detection(panoptic_head=dict(num_things_classes=80, num_stuff_classes=0))
    assert 'model.panoptic_head.num_things_classes=3' in error_of(cfg)
    cfg.model.panoptic_head.num_things_classes = 3
    classes.check(cfg, 'train')
    cfg.model.panoptic_head.update(num_things_classes=2, num_stuff_classes=1)
    classes.check(cfg, 'train')


def test_heads_of_segmentors_and_classifiers(tmp_path):
    def cfg(scope, kind, **model):
        loader = dict(dataset=dict(type=kind, data_root=str(tmp_path)))
        return Config(dict(default_scope=scope, model=model, train_dataloader=loader))

    head = dict(num_classes=150)
    classes.check(
        cfg('mmseg', 'ADE20KDataset', decode_head=head, auxiliary_head=dict(num_classes=2)), 'train'
    )
    line = error_of(cfg('mmseg', 'CityscapesDataset', decode_head=[head]))
    assert 'model.decode_head.0.num_classes is 150' in line and '19 classes (road' in line
    line = error_of(cfg('mmpretrain', 'CIFAR10', head=head))
    assert 'model.head.num_classes is 150' in line and 'has 10 classes' in line
    classes.check(cfg('mmpretrain', 'CustomDataset', head=head), 'train')  # folders say the classes


@pytest.mark.parametrize(
    ('names', 'said'), [('cat', "('cat',)"), (['cat', 'cat', 'ox'], 'cat more than once')]
)
def test_names_that_are_none(data, names, said):
    assert said in error_of(detection(names))


@pytest.mark.parametrize(
    ('content', 'said'),
    [
        ('', 'Expecting value'),
        ('<html>', 'Expecting value'),
        ('[' * 10**5, 'recursion'),
        ('[1]', 'it holds a list'),
        ('{"images": []}', 'it has no list of images'),
        ({**annotations(), 'categories': {}}, 'no list of categories'),
        ({**annotations(), 'categories': [dict(id=1)]}, 'categories[0] has no name'),
        (
            {**annotations(), 'annotations': [dict(id=1, image_id=1, category_id=3, bbox=[1] * 4)]},
            'no area',
        ),
        ({**annotations(), 'images': [3]}, 'images[0] has no id'),
    ],
)
def test_files_that_are_no_coco(data, content, said):
    write(content)
    line = error_of(detection())
    assert 'it.json of train_dataloader.dataset.dataset is no COCO annotation file' in line and said in line


def test_pictures_that_are_missing(data):
    for i in (3, 49):
        Path(f'images/{i}.png').unlink()
    line = error_of(detection())
    assert (
        '2 of 40 pictures looked for' in line
        and str(data / 'images/3.png') in line
        and 'data_prefix' in line
    )


@pytest.mark.parametrize('last', [True, False])
def test_large_files_are_read_in_parts(data, monkeypatch, last):
    content = annotations()
    if not last:
        content = dict(categories=content.pop('categories'), **content)
    write(content)
    monkeypatch.setattr(coco, '_READ_WHOLE', 0)
    monkeypatch.setattr(coco, '_read_whole', None)
    classes.check(detection(), 'train')
    assert 'has no cow' in error_of(detection(['cat', 'cow', 'ox']))
    Path('images/3.png').unlink()
    assert '1 of 20 pictures' in error_of(detection())
    write('{"images": [{"file_name": "a')
    assert 'is no COCO' in error_of(detection())


def test_training_and_testing_look_at_classes(data):
    cfg = detection(number=2)
    Path('it.pth').touch()
    for check in (preflight.check_training, preflight.check_testing):
        cfg.load_from = 'it.pth'
        with pytest.raises(SetupError, match=re.escape('bbox_head.num_classes is 2')):
            check(cfg)
