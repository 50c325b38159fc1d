"""The demo draws what testing finds, on whatever the config's pipeline loads, and loses no picture."""

import importlib.util
import json
import logging
import sys
from pathlib import Path
from types import SimpleNamespace

import cv2
import mmcv
import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.dataset import pseudo_collate
from mmengine.model import revert_sync_batchnorm
from mmengine.registry import DATASETS, MODELS, init_default_scope
from PIL import Image

from mmvig.engine import images

ROOT = Path(__file__).resolve().parents[1]
CLASSES = ('circle', 'square', 'triangle')
DETECTOR = f"""
_base_ = [{str(ROOT / 'configs/detection/maskrcnn_vigh_t_shapes_cpu.py')!r}]
arch = dict(_delete_=True, embed_dims=32, depths=[1, 1, 1, 1], num_heads=[1, 2, 4, 8])
model = dict(
    data_preprocessor=dict(_delete_=True, type='DetDataPreprocessor', pad_size_divisor=32),
    backbone=dict(arch=arch, in_channels={{channels}}),
    neck=dict(in_channels=[32, 64, 128, 256]),
    roi_head=dict(bbox_head=dict(num_classes=3), mask_head=dict(num_classes=3)),
    test_cfg=dict(rcnn=dict(score_thr=0.0, max_per_img=5)),
)
test_dataloader = dict(
    dataset=dict(
        _delete_=True,
        type='CocoDataset',
        data_root='.',
        data_prefix=dict(img=''),
        ann_file='{{ann_file}}',
        metainfo=dict(classes={CLASSES}, palette=[(255, 0, 0)] * 3),
        test_mode=True,
        pipeline=[
            {{loader}},
            dict(type='Resize', scale=(64, 48), keep_ratio=True),
            dict(type='LoadAnnotations', with_bbox=True, with_mask=True),
            dict(type='PackDetInputs', meta_keys=('img_path', 'ori_shape', 'img_shape', 'scale_factor')),
        ],
    ),
)
"""
SEGMENTOR = f"""
_base_ = [{str(ROOT / 'configs/segmentation/upernet_vigh_t_shapes.py')!r}]
arch = dict(_delete_=True, embed_dims=32, depths=[1, 1, 1, 1], num_heads=[1, 2, 4, 8])
model = dict(
    data_preprocessor=dict(mean=None, std=None),
    backbone=dict(arch=arch, in_channels={{channels}}),
    decode_head=dict(in_channels=[32, 64, 128, 256], channels=16),
    auxiliary_head=dict(in_channels=128, channels=16),
)
steps = [{{loader}}, dict(type='LoadAnnotations'), dict(type='PackSegInputs')]
test_dataloader = dict(dataset=dict(pipeline=steps))
"""
CLASSIFIER = f"""
_base_ = [{str(ROOT / 'configs/classification/vigh_t_tin.py')!r}]
arch = dict(_delete_=True, embed_dims=32, depths=[1, 1, 1, 1], num_heads=[1, 2, 4, 8])
model = dict(backbone=dict(arch=arch), head=dict(in_channels=256))
"""


@pytest.fixture(scope='module')
def demo():
    spec = importlib.util.spec_from_file_location('demo', ROOT / 'tools/demo.py')
    module = importlib.util.module_from_spec(spec)
    path = list(sys.path)
    spec.loader.exec_module(module)
    sys.path[:] = path
    return module


@pytest.fixture
def tool(demo, run_main, monkeypatch, tmp_path):
    """Run the tool in an empty folder: (exit status, output, errors)."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(logging.getLogger('mmvig'), 'handlers', [])

    def run(*arguments):
        status, said, errors = run_main(demo, *arguments, '--device', 'cpu')
        # OpenCV's decoders may say something of their own.
        return status, said, [line for line in errors if line.startswith('error: ')]

    return run


@pytest.fixture
def results(demo, monkeypatch):
    """What the demo draws: (image, result) of each picture."""
    seen = []

    def watched(make):
        def painter(*arguments):
            paint = make(*arguments)
            return lambda image, result: seen.append((image, result)) or paint(image, result)

        return painter

    monkeypatch.setattr(demo, 'PAINTERS', {scope: watched(make) for scope, make in demo.PAINTERS.items()})
    return seen


def write(text, name='cfg.py', ann_file='it.json', loader="dict(type='LoadImageFromFile')", channels=3):
    Path(name).write_text(text.format(ann_file=ann_file, loader=loader, channels=channels))
    return Config.fromfile(name)


def save_weights(cfg, meta=None):
    """A model with weights that find something, and a checkpoint of it."""
    init_default_scope(cfg.default_scope)
    torch.manual_seed(1)
    model = revert_sync_batchnorm(MODELS.build(cfg.model)).eval()
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1 and 'backbone' not in name:
            torch.nn.init.normal_(parameter, std=0.05)
    torch.save({'state_dict': model.state_dict(), 'meta': meta or {}}, 'it.pth')
    return model


def found_by_testing(cfg, model, name):
    """What testing finds on a picture, through the data set and its own pipeline."""
    annotation = dict(id=1, image_id=7, category_id=1, bbox=[1, 1, 9, 9], area=81, iscrowd=0)
    content = dict(
        images=[dict(id=7, file_name=name, height=60, width=80)],
        annotations=[annotation | dict(segmentation=[[1, 1, 9, 1, 9, 9]])],
        categories=[dict(id=i, name=name) for i, name in enumerate(CLASSES, start=1)],
    )
    Path('it.json').write_text(json.dumps(content))
    data = DATASETS.build(cfg.test_dataloader.dataset)
    with torch.no_grad():
        return model.test_step(pseudo_collate([data[0]]))[0]


def picture(channels=3, dtype=np.uint8, seed=0):
    rng = np.random.default_rng(seed)
    coarse = rng.random((6, 8, channels)) * (60000 if dtype == np.uint16 else 255)
    return cv2.resize(coarse, (80, 60)).reshape(60, 80, channels).astype(dtype)


def save_rotated(name):
    """A JPEG that is to be shown turned by a quarter."""
    image = Image.fromarray(picture())
    exif = image.getexif()
    exif[0x0112] = 6
    image.save(name, exif=exif, quality=95)


SOURCES = {
    'rotated.jpg': save_rotated,
    'colour.png': lambda name: cv2.imwrite(name, picture()),
    'alpha.png': lambda name: cv2.imwrite(name, picture(4)),
    'deep.png': lambda name: cv2.imwrite(name, picture(1, np.uint16)),
    'two.npy': lambda name: np.save(name, picture(2, np.float32) / 255),
    'five.npy': lambda name: np.save(name, picture(5, np.uint16)),
    'float.npy': lambda name: np.save(name, picture(1, np.float64)[..., 0] / 255),
}


@pytest.mark.parametrize(
    ('name', 'loader', 'channels', 'size'),
    [
        ('rotated.jpg', "dict(type='LoadImageFromFile')", 3, (80, 60)),
        (
            'rotated.jpg',
            "dict(type='LoadImageFromFile', color_type='color_ignore_orientation')",
            3,
            (60, 80),
        ),
        ('rotated.jpg', "dict(type='LoadImageFromFile', imdecode_backend='pillow')", 3, (80, 60)),
        ('colour.png', "dict(type='LoadImageFromFile', color_type='grayscale')", 1, (60, 80)),
        ('colour.png', "dict(type='LoadImageFromFile', to_float32=True)", 3, (60, 80)),
        ('alpha.png', "dict(type='LoadImageFromFile', color_type='unchanged')", 4, (60, 80)),
        ('deep.png', "dict(type='LoadImageFromFile', color_type='unchanged')", 1, (60, 80)),
        ('five.npy', "dict(type='mmseg.LoadImageFromNpyFile')", 5, (60, 80)),
        ('two.npy', "dict(type='mmseg.LoadImageFromNpyFile')", 2, (60, 80)),
    ],
)
def test_demo_finds_what_testing_finds(tool, results, name, loader, channels, size):
    SOURCES[name](name)
    cfg = write(DETECTOR, loader=loader, channels=channels)
    expected = found_by_testing(cfg, save_weights(cfg), name).pred_instances
    status, said, errors = tool('cfg.py', 'it.pth', name, '--out-dir', 'drawn', '--score-thr', 0)
    assert (status, errors) == (0, [])
    assert cv2.imread(said[-1]).shape[:2] == size
    ((image, result),) = results
    assert image.dtype == np.uint8 and image.shape == (*size, 3) and np.ptp(image) > 100
    assert len(expected.bboxes) == 5
    for key in ('bboxes', 'scores', 'labels', 'masks'):
        assert torch.equal(torch.as_tensor(result.pred_instances[key]), torch.as_tensor(expected[key])), key


def test_label_maps_of_pictures_with_four_channels_or_floats(tool, results):
    for name, loader, channels in (
        ('alpha.png', "dict(type='LoadImageFromFile', color_type='unchanged')", 4),
        ('float.npy', "dict(type='LoadImageFromNpyFile')", 1),
    ):
        SOURCES[name](name)
        cfg = write(SEGMENTOR, loader=loader, channels=channels)
        model = save_weights(cfg)
        status, _, errors = tool('cfg.py', 'it.pth', name, '--out-dir', 'drawn')
        assert (status, errors) == (0, [])
        raw = np.load(name)[..., None] if name.endswith('npy') else cv2.imread(name, cv2.IMREAD_UNCHANGED)
        with torch.no_grad():
            pixels = torch.from_numpy(raw.transpose(2, 0, 1)[None].astype(np.float32))
            (expected,) = model.encode_decode(pixels, [dict(ori_shape=(60, 80), img_shape=(60, 80))])
        torch.testing.assert_close(results[-1][1].seg_logits.data, expected)
    assert [path.name for path in sorted(Path('drawn').iterdir())] == ['alpha.png', 'float.npy.png']


def test_a_picture_that_cannot_be_read_does_not_stop_the_others(tool):
    write(DETECTOR)
    save_weights(Config.fromfile('cfg.py'))
    for name, suffix, keep in (
        ('cut.jpg', '.jpg', 700),
        ('cut.png', '.png', 60),
        ('half.png', '.png', 0.5),
    ):
        data = cv2.imencode(suffix, picture())[1].tobytes()
        Path(name).write_bytes(data[: int(keep * len(data)) if keep < 1 else keep])
    Path('empty.png').touch()
    Path('text.png').write_text('no picture')
    cv2.imwrite('grey.png', picture(1))
    cv2.imwrite('thin.png', np.zeros((1, 300, 3), np.uint8))  # of no rows once it is resized
    cv2.imwrite('good.png', picture())
    bad = ['cut.jpg', 'cut.png', 'half.png', 'empty.png', 'text.png', 'thin.png']
    status, said, errors = tool('cfg.py', 'it.pth', *bad, 'grey.png', 'good.png', '--out-dir', 'drawn')
    assert status == 2
    assert said[-2:] == ['drawn/grey.png', 'drawn/good.png']
    assert len(errors) == len(bad) + 1
    for name, line in zip(bad, errors, strict=False):
        assert line.startswith(f'error: {name} cannot be read by ')
    assert errors[-1] == 'error: 6 of 8 inputs were not drawn, see above'
    assert sorted(path.name for path in Path('drawn').iterdir()) == ['good.png', 'grey.png']


def test_other_channels_than_the_models_are_named(tool):
    cfg = write(DETECTOR, channels=4)
    save_weights(cfg)
    cv2.imwrite('a.png', picture())
    status, _, errors = tool('cfg.py', 'it.pth', 'a.png')
    assert status == 2 and len(errors) == 2
    assert 'a.png has 3 channels as the test pipeline loads it, the model takes 4' in errors[0]


def test_names_of_classes_come_from_the_checkpoint_or_the_data_set(demo, tool, monkeypatch):
    cfg = write(DETECTOR)
    cv2.imwrite('a.png', picture())
    models, build = [], demo.build_model
    monkeypatch.setattr(demo, 'build_model', lambda *args: models.append(build(*args)) or models[-1])
    save_weights(cfg, dict(dataset_meta=dict(CLASSES=('x', 'y', 'z'), palette=[(1, 2, 3)] * 3)))
    assert tool('cfg.py', 'it.pth', 'a.png')[0] == 0
    assert models[-1].dataset_meta == dict(classes=('x', 'y', 'z'), palette=[(1, 2, 3)] * 3)
    save_weights(cfg)
    assert tool('cfg.py', 'it.pth', 'a.png', '--palette', 'coco')[0] == 0
    assert models[-1].dataset_meta['classes'] == CLASSES
    save_weights(cfg, dict(dataset_meta=dict(classes=('x', 'y'))))
    status, _, (line,) = tool('cfg.py', 'it.pth', 'a.png')
    assert status == 2 and 'bbox_head.num_classes is 3' in line and '2 classes (x, y)' in line


def save_video(name, code='mp4v', frames=3, size=(81, 61)):
    writer = cv2.VideoWriter(name, cv2.VideoWriter_fourcc(*code), 4, size)
    for i in range(frames):
        writer.write(cv2.resize(picture(seed=i), size))
    writer.release()


def test_a_folder_of_pictures_and_videos(tool, results):
    save_weights(write(DETECTOR))
    folder = Path('seen')
    folder.mkdir()
    cv2.imwrite('seen/a.png', picture())
    save_video('seen/b.avi', 'MJPG')
    save_video('seen/c.mp4')
    Path('seen/lost.png').symlink_to('nowhere')
    for name in ('notes.txt', 'text.jpg', 'text.mp4'):
        Path('seen', name).write_text('no picture')
    status, said, errors = tool('cfg.py', 'it.pth', folder, '--out-dir', 'drawn')
    assert status == 2
    assert said[-3:] == ['drawn/a.png', 'drawn/b.avi.mp4', 'drawn/c.mp4']
    assert [error.split(' cannot be read ')[0] for error in errors] == [
        'error: seen/lost.png',
        'error: seen/text.jpg',
        'error: seen/text.mp4',
        'error: 3 of 6 inputs were not drawn, see above',
    ]
    shown = [image[..., ::-1] for image, _ in results[1:]]
    for name, frames in (('b.avi', shown[:3]), ('c.mp4', shown[3:])):
        sent = list(mmcv.VideoReader(f'seen/{name}'))
        assert len(sent) == len(frames) == 3 and all(map(np.array_equal, sent, frames))
        drawn = mmcv.VideoReader(said[-2 if name == 'b.avi' else -1])
        # MPEG-4 of OpenCV has even sides.
        assert (drawn.fps, len(list(drawn)), drawn.resolution) == (4, 3, (80, 60))


def test_frames_are_read_as_the_config_reads_pictures(tool, results):
    save_weights(
        write(DETECTOR, loader="dict(type='LoadImageFromFile', color_type='grayscale')", channels=1)
    )
    save_video('a.mp4', frames=2)
    assert tool('cfg.py', 'it.pth', 'a.mp4', '--out-dir', 'drawn')[0] == 0
    for (image, _), frame in zip(results, mmcv.VideoReader('a.mp4'), strict=True):
        np.testing.assert_allclose(image[..., 0], cv2.cvtColor(frame, cv2.COLOR_BGR2GRAY), atol=1)


def test_videos_that_are_cut_or_cannot_be_written(demo, tool, monkeypatch):
    save_weights(write(DETECTOR))
    save_video('whole.mkv', frames=60)
    whole = Path('whole.mkv').read_bytes()
    Path('cut.mkv').write_bytes(whole[: len(whole) // 12])
    status, said, errors = tool('cfg.py', 'it.pth', 'cut.mkv', '--out-dir', 'drawn')
    frames = mmcv.VideoReader('drawn/cut.mkv.mp4').frame_cnt
    assert (status, said[-1], errors) == (0, 'drawn/cut.mkv.mp4', []) and 0 < frames < 10
    assert f'cut.mkv: {frames} of 60 frames could be read.' in said[-2]

    save_video('stream.webm', 'VP80', frames=2)
    stream = Path('stream.webm').read_bytes()
    Path('stream.webm').write_bytes(stream.replace(b'\x44\x89\x88', b'\xec\x89\x88'))  # no duration
    assert mmcv.VideoReader('stream.webm').frame_cnt < 0
    assert tool('cfg.py', 'it.pth', 'stream.webm', '--out-dir', 'drawn')[::2] == (0, [])
    assert mmcv.VideoReader('drawn/stream.webm.mp4').frame_cnt == 2

    save_video('two.mp4', frames=2)
    Path('drawn/two.mp4').symlink_to('/dev/full')
    status, _, errors = tool('cfg.py', 'it.pth', 'two.mp4', '--out-dir', 'drawn')
    assert status == 2 and errors[0].startswith('error: drawn/two.mp4 cannot be written: OpenCV opens no')

    # As on a full disk: nothing is written, and no error is said.
    writer = SimpleNamespace(open=lambda *_: True, write=lambda frame: None, release=lambda: None)
    monkeypatch.setattr(cv2, 'VideoWriter', lambda: writer)
    status, _, errors = tool('cfg.py', 'it.pth', 'two.mp4', '--out-dir', 'other')
    assert status == 2 and 'other/two.mp4 cannot be written: it has 0 of 2 frames' in errors[0]


@pytest.mark.parametrize(
    ('arguments', 'said'),
    [
        (['empty'], ['folder empty holds no images or videos']),
        (['notes.txt'], ['notes.txt cannot be read by LoadImageFromFile']),
        (['text.mp4'], ['text.mp4 cannot be read as a video: OpenCV finds no frames in it']),
        (['text.mp4', 'notes.txt'], ['text.mp4 cannot be read as', 'notes.txt cannot be read by']),
        (['folder.mp4'], ['folder folder.mp4 holds no images']),
    ],
)
def test_no_model_is_built_where_nothing_can_be_read(demo, tool, monkeypatch, arguments, said):
    monkeypatch.setattr(demo, 'build_model', None)
    write(DETECTOR)
    for name in ('notes.txt', 'text.mp4', 'it.pth'):
        Path(name).write_text('no picture')
    Path('empty').mkdir()
    Path('folder.mp4').mkdir()
    status, _, errors = tool('cfg.py', 'it.pth', *arguments)
    assert status == 2 and len(errors) == len(said)
    assert all(part in line for part, line in zip(said, errors, strict=True))


def test_the_packages_inferencers_predict_the_same(tool, results):
    from mmdet.apis import DetInferencer
    from mmpretrain import ImageClassificationInferencer
    from mmseg.apis import MMSegInferencer

    cv2.imwrite('a.png', picture())
    meta = dict(dataset_meta=dict(classes=CLASSES, palette=[(9, 99, 199)] * 3))
    save_weights(write(DETECTOR), meta)
    assert tool('cfg.py', 'it.pth', 'a.png', '--out-dir', 'detected')[0] == 0
    inferencer = DetInferencer('cfg.py', 'it.pth', device='cpu', show_progress=False)
    (expected,) = inferencer('a.png', return_datasamples=True)['predictions']
    found = results[-1][1].pred_instances
    assert len(found.bboxes) == 5
    for key in ('bboxes', 'scores', 'labels', 'masks'):
        assert torch.equal(torch.as_tensor(found[key]), torch.as_tensor(expected.pred_instances[key])), key

    cfg = write(SEGMENTOR)
    names = [f'class {i}' for i in range(cfg.model.decode_head.num_classes)]
    save_weights(
        cfg, dict(dataset_meta=dict(classes=names, palette=[[i, 0, 9] for i in range(len(names))]))
    )
    assert tool('cfg.py', 'it.pth', 'a.png', '--out-dir', 'segmented')[0] == 0
    expected = MMSegInferencer('cfg.py', 'it.pth', device='cpu')('a.png')['predictions']
    assert np.array_equal(results[-1][1].pred_sem_seg.data[0], expected)

    cfg = write(CLASSIFIER)
    save_weights(cfg, dict(dataset_meta=dict(classes=[f'class {i}' for i in range(40)])))
    save_video('b.mp4', frames=2)
    status, said, errors = tool('cfg.py', 'it.pth', 'a.png', 'b.mp4', '--out-dir', 'classified')
    assert (status, errors, said[-2:]) == (0, [], ['classified/a.png', 'classified/b.mp4'])
    (expected,) = ImageClassificationInferencer('cfg.py', 'it.pth', device='cpu')('a.png')
    assert np.array_equal(results[-3][1].pred_score, expected['pred_scores'])
    assert not np.array_equal(cv2.imread('classified/a.png'), picture())  # the class is written on it


@pytest.mark.parametrize(
    ('arguments', 'said'),
    [
        ('--score-thr nan', '--score-thr must be from 0 to 1, got nan'),
        ('--score-thr 1.5', '--score-thr must be from 0 to 1'),
        ('--score-thr=-inf', '--score-thr must be from 0 to 1'),
        ('--device abc', '--device abc cannot be used'),
        ('--device cpu:7', '--device cpu:7 cannot be used'),
        ('--device meta', '--device meta cannot be used'),
        ('--device cuda:7', '--device cuda:7 cannot be used'),
        ('--out-dir a.png', '--out-dir a.png must be a folder, and is a file'),
        ('--out-dir a.png/b/c', 'a.png is a file, not a folder'),
        ('--out-dir=', '--out-dir is empty'),
        ('--out-dir /proc/a', 'cannot be written'),
        ('--out-dir ' + 300 * 'x', 'File name too long'),
        ('--out-dir .', 'would be overwritten'),
        ('no.png', 'image or video is missing'),
    ],
)
def test_options_are_checked_before_the_model_is_built(
    demo, monkeypatch, capsys, tmp_path, arguments, said
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(demo, 'build_model', None)
    monkeypatch.setattr(logging.getLogger('mmvig'), 'handlers', [])
    write(DETECTOR)
    Path('it.pth').touch()
    cv2.imwrite('a.png', picture())
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: False)
    monkeypatch.setattr(sys, 'argv', ['demo.py', 'cfg.py', 'it.pth', 'a.png', *arguments.split()])
    with pytest.raises(SystemExit, match=r'^2$'):
        demo.main()
    (line,) = capsys.readouterr().err.splitlines()
    assert said in line


def test_pictures_of_other_numbers_than_bytes():
    grey = np.array([[0, 1000], [500, 2000]], np.uint16)
    assert images.as_picture(grey)[..., 1].tolist() == [[0, 128], [64, 255]]
    bytes_ = np.array([[[0, 7, 255, 9]]], np.float32)
    assert images.as_picture(bytes_).tolist() == [[[0, 7, 255]]]
    assert images.as_picture(np.full((2, 2, 2), 0.3)).tolist() == np.zeros((2, 2, 3)).tolist()
    assert images.as_picture(np.array([[False, True]])).max() == 255
    assert images.as_picture(np.array([[-5, 5]], np.int64)).tolist() == [[[0] * 3, [255] * 3]]
