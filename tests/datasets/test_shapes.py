"""The generated data set: what is in it, and how it comes to be on disk."""

import importlib
import importlib.util
import json
from concurrent.futures import ThreadPoolExecutor

import cv2
import numpy as np
import pytest
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO

import mmvig.datasets.registered
from mmvig.datasets import shapes
from mmvig.datasets.scene import CLASSES
from mmvig.datasets.shapes import ensure_shapes
from mmvig.registry import DATASETS

COUNTS = {'train': 10, 'val': 3}


@pytest.fixture(scope='module')
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp('data') / 'shapes'
    return ensure_shapes(folder, num_train=COUNTS['train'], num_val=COUNTS['val'])


@pytest.fixture
def tiny(tmp_path):
    """A set of one image per split, to be broken."""
    return ensure_shapes(tmp_path / 'shapes', num_train=1, num_val=1)


def contents(folder):
    files = (path for path in folder.rglob('*') if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def test_same_seed_same_bytes(root, tmp_path):
    again = ensure_shapes(tmp_path / 'again', num_train=COUNTS['train'], num_val=COUNTS['val'])
    assert contents(again) == contents(root)


def test_an_image_depends_on_seed_and_place_only(root, tmp_path):
    fewer = contents(ensure_shapes(tmp_path / 'fewer', num_train=2, num_val=1))
    other = contents(ensure_shapes(tmp_path / 'other', num_train=2, num_val=1, seed=1))
    pictures = [name for name in fewer if name.endswith('.png')]
    assert len(pictures) == 6
    assert all(fewer[name] == contents(root)[name] for name in pictures)
    assert all(fewer[name] != other[name] for name in pictures)
    assert fewer['images/train/000000.png'] != fewer['images/val/000000.png']


@pytest.mark.parametrize('split', COUNTS)
def test_coco_annotations(root, split):
    coco = COCO(root / 'annotations' / f'instances_{split}.json')
    assert {'info', 'licenses'} < set(coco.dataset)  # what mmdet's split_coco.py wants beside the rest
    assert len(coco.imgs) == COUNTS[split]
    assert [category['name'] for category in coco.loadCats(coco.getCatIds())] == list(CLASSES)
    assert coco.getCatIds(supNms=['shape']) == coco.getCatIds()  # mmdet's coco_error_analysis.py reads them
    assert {ann['category_id'] for ann in coco.anns.values()} == set(coco.getCatIds())
    for annotation in coco.anns.values():
        rle = coco.annToRLE(annotation)
        assert annotation['area'] == coco_mask.area(rle) > 0
        assert annotation['bbox'] == coco_mask.toBbox(rle).tolist()
        image = coco.imgs[annotation['image_id']]
        x, y, width, height = annotation['bbox']
        assert x >= 0 and y >= 0
        assert x + width <= image['width'] and y + height <= image['height']
        assert annotation['iscrowd'] == 0


def test_shapes_are_small_medium_and_large_by_coco(root):
    coco = COCO(root / 'annotations' / 'instances_train.json')
    areas = np.array([annotation['area'] for annotation in coco.anns.values()])
    assert np.histogram(areas, bins=[0, 32**2, 96**2, np.inf])[0].min() > 0


@pytest.mark.parametrize('split', COUNTS)
def test_label_maps_agree_with_instances(root, split):
    coco = COCO(root / 'annotations' / f'instances_{split}.json')
    for image in coco.imgs.values():
        picture = cv2.imread(str(root / 'images' / split / image['file_name']))
        label_map = cv2.imread(str(root / 'masks' / split / image['file_name']), cv2.IMREAD_UNCHANGED)
        assert picture.shape == (image['height'], image['width'], 3)
        assert label_map.shape == picture.shape[:2] and label_map.dtype == np.uint8
        expected = np.zeros(label_map.shape, int)
        for annotation in coco.imgToAnns[image['id']]:
            expected += annotation['category_id'] * coco.annToMask(annotation)  # visible: disjoint
        assert (label_map == expected).all()


def test_shapes_hide_each_other(root):
    coco = COCO(root / 'annotations' / 'instances_train.json')
    boxes = [coco_mask.toBbox(coco.annToRLE(ann)) for ann in coco.imgToAnns[3]]
    overlaps = coco_mask.iou(np.array(boxes), np.array(boxes), [0] * len(boxes))
    assert (overlaps[~np.eye(len(boxes), dtype=bool)] > 0).any()


def test_an_interrupted_run_leaves_nothing(tmp_path, monkeypatch):
    write_split = shapes._write_split

    def interrupt(root, split, *args):
        write_split(root, split, *args)
        raise KeyboardInterrupt

    monkeypatch.setattr(shapes, '_write_split', interrupt)
    with pytest.raises(KeyboardInterrupt):
        ensure_shapes(tmp_path / 'shapes', num_train=1, num_val=1)
    assert [path.name for path in tmp_path.iterdir()] == ['.shapes.lock']


def test_the_rest_of_a_killed_run_is_removed(tmp_path):
    rest = tmp_path / '.shapes.partial'
    rest.mkdir()
    (rest / 'half.png').touch()
    root = ensure_shapes(tmp_path / 'shapes', num_train=1, num_val=1)
    assert not rest.exists() and not (root / 'half.png').exists()
    assert ensure_shapes(root) == root


def test_an_incomplete_set_is_refused(tiny):
    (tiny / 'masks' / 'val' / '000000.png').unlink()
    with pytest.raises(FileExistsError, match=r'000000\.png is missing: remove .*shapes'):
        ensure_shapes(tiny)


def test_a_folder_of_something_else_is_refused(tmp_path):
    (tmp_path / 'notes.txt').touch()
    with pytest.raises(FileExistsError, match='is not a shapes data set'):
        ensure_shapes(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ['notes.txt']


@pytest.mark.parametrize('root', ['file', 'file/shapes', '/proc/shapes'])
def test_a_place_where_nothing_can_be_made(tmp_path, monkeypatch, capsys, root):
    (tmp_path / 'file').write_text('{}')
    monkeypatch.setattr('sys.argv', ['shapes', '--root', str(tmp_path / root)])
    with pytest.raises(SystemExit, match='2'):
        shapes.main()
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f'error: {tmp_path / root} ')


@pytest.mark.parametrize('meta', ['[]', '{"name": "shapes"}', 'no json'])
def test_a_description_of_something_else_is_refused(tiny, meta):
    (tiny / 'meta.json').write_text(meta)
    with pytest.raises(FileExistsError, match='is not a shapes data set'):
        ensure_shapes(tiny)


def test_an_empty_folder_is_filled(tmp_path):
    (tmp_path / 'shapes').mkdir()
    assert (ensure_shapes(tmp_path / 'shapes', num_train=1, num_val=1) / 'meta.json').is_file()


def test_other_parameters_are_recognised(tiny):
    before = contents(tiny)
    with pytest.raises(FileExistsError, match='has num_train=1, not 2'):
        ensure_shapes(tiny, num_train=2)
    with pytest.raises(FileExistsError, match='has seed=0, not 7'):
        ensure_shapes(tiny, seed=7)
    ensure_shapes(tiny, num_train=1, num_val=1, seed=0)
    assert contents(tiny) == before


def test_a_set_of_an_older_format_is_refused(tiny):
    meta = json.loads((tiny / 'meta.json').read_text())
    (tiny / 'meta.json').write_text(json.dumps({**meta, 'format': 0}))
    with pytest.raises(FileExistsError, match='has format=0'):
        ensure_shapes(tiny)


@pytest.mark.parametrize('bad', [{'num_train': 0}, {'num_val': -3}, {'seed': -1}])
def test_bad_numbers(tmp_path, bad):
    with pytest.raises(ValueError, match=f'{next(iter(bad))} is .*, expected at least'):
        ensure_shapes(tmp_path / 'shapes', **bad)


def test_one_of_several_makers_makes_the_set(tmp_path, monkeypatch):
    made = []
    make = shapes._make
    monkeypatch.setattr(shapes, '_make', lambda *args: (made.append(args), make(*args)))
    with ThreadPoolExecutor(4) as pool:  # the lock is per open file: threads stand for processes
        results = [pool.submit(ensure_shapes, tmp_path / 'shapes', 3, 1) for _ in range(4)]
    assert {result.result() for result in results} == {tmp_path / 'shapes'}
    assert len(made) == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ['.shapes.lock', 'shapes']


def test_command_line(tmp_path, monkeypatch, capsys):
    options = ['--root', str(tmp_path / 'shapes'), '--num-train', '1', '--num-val', '1']
    monkeypatch.setattr('sys.argv', ['shapes', *options, '--seed', '5'])
    shapes.main()
    assert str(tmp_path / 'shapes') in capsys.readouterr().out
    assert json.loads((tmp_path / 'shapes' / 'meta.json').read_text())['seed'] == 5


def test_a_missing_library_is_named_when_its_data_set_is_asked_for(monkeypatch):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, 'find_spec', lambda name: None if name == 'mmseg' else find_spec(name)
    )
    monkeypatch.setattr(DATASETS, '_module_dict', {})
    importlib.reload(mmvig.datasets.registered)
    assert set(DATASETS.module_dict) == {'ShapesSegDataset'}
    with pytest.raises(ImportError, match='ShapesSegDataset needs mmseg'):
        DATASETS.build({'type': 'mmvig.ShapesSegDataset', 'data_root': 'data/shapes'})
