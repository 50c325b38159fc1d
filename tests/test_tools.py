import importlib.util
import json
import logging
import os
import pickle
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from mmengine.config import Config
from programs import TOOLS, run_tool, run_well
from small_configs import MASK_RCNN, UPERNET, write_small

from mmvig.engine import cli, preflight

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope='module')
def work(tmp_path_factory):
    """A folder with a tiny shapes set and two small configs."""
    folder = tmp_path_factory.mktemp('work')
    write_small(folder, train=4, val=2, iterations=2)
    return folder


def load(script):
    """Import a tool as a module."""
    spec = importlib.util.spec_from_file_location(Path(script).stem, TOOLS / script)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def tool(monkeypatch, capsys, tmp_path):
    """Run a tool within this process, in an empty folder: for errors that come before any work."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv('LOCAL_RANK', raising=False)
    monkeypatch.setattr(sys, 'path', list(sys.path))
    own_log = logging.getLogger('mmvig')
    monkeypatch.setattr(own_log, 'handlers', [])

    def run(script, *arguments):
        module = load(script)
        monkeypatch.setattr(sys, 'argv', [script, *map(str, arguments)])
        with pytest.raises(SystemExit) as exit_:
            module.main()
        lines = capsys.readouterr().err.splitlines()
        assert exit_.value.code == 2
        assert len(lines) == 1, lines
        return lines[0]

    return run


def log_of(work_dir, pattern='*/*.json'):
    """The metrics that the latest test wrote."""
    return json.loads(max(work_dir.glob(pattern)).read_text())


def logged_iterations(work_dir):
    """The training iterations of each start, in order."""
    files = sorted(work_dir.glob('*/vis_data/scalars.json'))
    records = [map(json.loads, file.read_text().splitlines()) for file in files]
    return [[record['iter'] for record in each if 'iter' in record] for each in records]


def pictures(folder):
    found = sorted(folder.rglob('*.png'))
    assert all(cv2.imread(str(path)) is not None for path in found)
    return found


@pytest.fixture
def quick_start(monkeypatch, capsys, tmp_path):
    """Run tools/quickstart.py in this process; each of its steps in a fork, which has its imports."""

    def in_fork(command):
        python, script, *arguments = command
        assert Path(python).samefile(sys.executable)
        result = run_tool(os.path.abspath(script), *arguments, cwd=tmp_path)
        print(result.stderr, file=sys.stderr)
        return result

    def run(*arguments):
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, 'argv', ['quickstart.py', *map(str, arguments)])
        with monkeypatch.context() as patch:
            patch.setattr(subprocess, 'run', in_fork)
            load('quickstart.py').main()
        return capsys.readouterr().out

    return run


def test_detection_from_quick_start_to_resumed_and_tested(work, quick_start, tmp_path):
    config, run = work / 'detector.py', tmp_path / 'run'
    said = quick_start('--config', config, '--work-dir', run)
    for step in ('train.py', 'test.py', 'demo.py', 'plot_curves.py'):
        assert len([line for line in said.splitlines() if line.startswith('$') and step in line]) == 1
    metrics = log_of(run / 'test')
    assert f'box AP      {metrics["coco/bbox_mAP"]:.3f}' in said
    assert f'mask AP     {metrics["coco/segm_mAP"]:.3f}' in said
    assert len(pictures(run / 'pictures')) == 2
    assert cv2.imread(str(run / 'curves.png')) is not None

    longer = ['--cfg-options', 'train_cfg.max_iters=3', 'auto_scale_lr.base_batch_size=8']
    flags = ['--resume', 'auto', '--work-dir', run, '--auto-scale-lr', '--amp']
    said = run_well('dist_train.sh', config, 2, *flags, *longer, cwd=tmp_path)
    assert 'resumed epoch: 0, iter: 2' in said
    assert said.count('bfloat16') == 1
    assert 'Scaling the original LR by 0.5' in said
    assert logged_iterations(run) == [[1, 2], [3]]

    flags = ['--tta', '--out', 'predictions.pkl', '--show-dir', 'shown', '--work-dir', 'tested']
    said = run_well('test.py', config, run / 'iter_3.pth', *flags, cwd=tmp_path)
    assert 'merges boxes, not masks' in said
    assert 'coco/bbox_mAP' in log_of(tmp_path / 'tested')
    assert 'coco/segm_mAP' not in log_of(tmp_path / 'tested')
    predictions = pickle.loads((tmp_path / 'predictions.pkl').read_bytes())
    assert len(predictions) == 2
    assert {'bboxes', 'scores', 'labels'} <= predictions[0]['pred_instances'].keys()
    assert len(pictures(tmp_path / 'shown')) == 2


def test_test_time_augmentation_is_refused_where_boxes_come_from_masks():
    """Only boxes of several views can be merged, and Mask2Former has no mask head to leave out."""
    cfg = Config.fromfile(ROOT / 'configs/detection/mask2former_vigh_s.py')
    with pytest.raises(preflight.SetupError, match='--tta needs a tta_model'):
        load('test.py').use_tta(cfg)


def test_segmentation_from_training_to_pictures(work, tmp_path):
    config = work / 'segmentor.py'
    run_well('train.py', config, cwd=tmp_path)
    run = tmp_path / 'work_dirs/segmentor'
    assert logged_iterations(run) == [[1, 2]]

    out = ['--out', 'labels', '--show-dir', 'shown', '--tta', '--work-dir', 'tested']
    run_well('test.py', config, run / 'iter_2.pth', *out, cwd=tmp_path)
    assert 'mIoU' in log_of(tmp_path / 'tested')
    labels = [cv2.imread(str(path), cv2.IMREAD_UNCHANGED) for path in pictures(tmp_path / 'labels')]
    assert len(labels) == 2
    assert all(label.ndim == 2 and label.max() < 7 for label in labels)
    assert len(pictures(tmp_path / 'shown')) == 2

    images = work / 'shapes/images/val'
    said = run_well('demo.py', config, run / 'iter_2.pth', images, '--out-dir', 'drawn', cwd=tmp_path)
    assert said.splitlines()[-2:] == ['drawn/000000.png', 'drawn/000001.png']
    for picture in pictures(tmp_path / 'drawn'):
        assert (cv2.imread(str(picture)) != cv2.imread(str(images / picture.name))).any()


def test_missing_data_ends_a_run_with_one_line(tmp_path):
    """Of a new interpreter too: see tests/test_packaging.py."""
    result = run_tool('train.py', ROOT / 'configs/detection/maskrcnn_vigh_t.py', cwd=tmp_path)
    assert result.returncode == 2
    (line,) = result.stderr.splitlines()
    assert str(tmp_path / 'data/coco') in line
    assert 'https://cocodataset.org' in line
    assert '--cfg-options data_root=' in line
    assert list(tmp_path.iterdir()) == []


def coco_folder(root, *missing):
    """A data/coco with everything that a run looks for before it starts, less what is named."""
    for folder in ('train2017', 'val2017', 'annotations'):
        (root / folder).mkdir(parents=True)
    for split in ('train', 'val'):
        (root / f'annotations/instances_{split}2017.json').touch()
    for path in missing:
        (root / path).unlink() if (root / path).is_file() else (root / path).rmdir()


@pytest.mark.parametrize('split', ['train', 'val'])
@pytest.mark.parametrize('part', ['{}2017', 'annotations/instances_{}2017.json'])
def test_the_missing_part_of_a_data_set_is_named(tool, tmp_path, part, split):
    missing = part.format(split)
    coco_folder(tmp_path / 'elsewhere', missing)
    options = ['--cfg-options', f'data_root={tmp_path}/elsewhere']
    line = tool('train.py', ROOT / 'configs/detection/maskrcnn_vigh_s.py', *options)
    assert str(tmp_path / 'elsewhere' / missing) in line


def test_validation_annotations_may_lie_elsewhere_and_are_looked_for_there(tool, tmp_path):
    coco_folder(tmp_path / 'data/coco')
    options = ['--cfg-options', 'val_evaluator.ann_file=/nowhere/val.json']
    line = tool('train.py', ROOT / 'configs/detection/maskrcnn_vigh_s.py', *options)
    assert 'annotation file of val_evaluator' in line
    assert '/nowhere/val.json' in line


def test_ade20k_is_asked_for_by_its_name(tool, tmp_path):
    (tmp_path / 'it.pth').touch()
    config = ROOT / 'configs/segmentation/upernet_vigh_b.py'
    line = tool('test.py', config, 'it.pth')
    assert str(tmp_path / 'data/ade/ADEChallengeData2016') in line
    assert 'ADEChallengeData2016.zip' in line


def test_data_sets_within_wrappers_are_looked_at(tool, tmp_path):
    inner = dict(type='mmdet.CocoDataset', data_root='one', ann_file='', data_prefix=dict(img=''))
    (tmp_path / 'one').mkdir()
    both = dict(type='ConcatDataset', datasets=[inner, {**inner, 'data_root': 'two'}])
    wrapped = dict(_delete_=True, type='RepeatDataset', times=2, dataset=both)
    config = tmp_path / 'wrapped.py'
    config.write_text(f'_base_ = [{str(MASK_RCNN)!r}]\ntrain_dataloader = dict(dataset={wrapped})\n')
    line = tool('train.py', config)
    assert 'train_dataloader.dataset.dataset.datasets.1' in line
    assert str(tmp_path / 'two') in line


@pytest.mark.parametrize(
    ('option', 'what'),
    [
        ('load_from=no.pth', 'checkpoint to start from'),
        ('model.backbone.init_cfg.checkpoint=no.pth', 'pretrained checkpoint'),
    ],
)
def test_missing_weights_to_start_from(tool, tmp_path, option, what):
    pretrained = 'model.backbone.init_cfg.type=Pretrained'
    line = tool('train.py', MASK_RCNN, '--cfg-options', pretrained, option)
    assert what in line
    assert str(tmp_path / 'no.pth') in line
    assert '--cfg-options' in line


def test_missing_checkpoints_to_resume_test_or_show(tool, tmp_path):
    expected = str(tmp_path / 'no.pth')
    line = tool('train.py', MASK_RCNN, '--resume', 'no.pth')
    assert 'checkpoint to resume from' in line
    assert expected in line
    for script, more in (('test.py', []), ('demo.py', [tmp_path])):
        line = tool(script, MASK_RCNN, 'no.pth', *more)
        assert expected in line
        assert 'tools/train.py' in line


def test_checkpoints_of_another_model_are_neither_tested_nor_shown(tool, work, tmp_path):
    torch.save({'state_dict': {'decode_head.conv_seg.bias': torch.zeros(7)}, 'meta': {}}, 'it.pth')
    images = work / 'shapes/images/val'
    for script, *more in (['test.py', '--work-dir', 'run'], ['demo.py', images]):
        line = tool(script, work / 'detector.py', 'it.pth', *more)
        assert 'it.pth cannot be loaded' in line
        assert 'Missing key(s) in state_dict' in line


def test_latest_checkpoint_that_was_removed_since(tool, tmp_path):
    (tmp_path / 'run').mkdir()
    (tmp_path / 'run/last_checkpoint').write_text(str(tmp_path / 'run/iter_9.pth'))
    line = tool('train.py', MASK_RCNN, '--resume', '--work-dir', 'run')
    assert str(tmp_path / 'run/iter_9.pth') in line


def test_missing_config_or_base_of_a_config(tool, tmp_path):
    for script, *more in (['train.py'], ['test.py', 'it.pth'], ['demo.py', 'it.pth', 'it.png']):
        line = tool(script, 'no.py', *more)
        assert str(tmp_path / 'no.py') in line
    (tmp_path / 'child.py').write_text("_base_ = ['no_base.py']\n")
    assert 'no_base.py' in tool('train.py', 'child.py')
    (tmp_path / 'it.txt').touch()
    assert '.yaml' in tool('train.py', 'it.txt')


def test_missing_images(tool, tmp_path):
    (tmp_path / 'it.pth').touch()
    (tmp_path / 'empty').mkdir()
    assert str(tmp_path / 'no.png') in tool('demo.py', MASK_RCNN, 'it.pth', 'no.png')
    assert 'no images' in tool('demo.py', MASK_RCNN, 'it.pth', 'empty')
    cv2.imwrite('a.png', np.zeros((4, 4, 3)))
    line = tool('demo.py', MASK_RCNN, 'it.pth', 'a.png', '--out-dir', '.')
    assert 'would be overwritten' in line


@pytest.mark.parametrize(
    ('option', 'reason'),
    [
        ('modle.backbone.with_cp=True', "did you mean 'model'"),
        ('train_pipeline.9.type=Resize', 'train_pipeline.9.type'),
        ('model.type.name=MaskRCNN', 'model.type.name'),
        ('train_cfg', 'KEY=VALUE'),
    ],
)
def test_options_that_do_not_fit_the_config(tool, option, reason):
    assert reason in tool('train.py', MASK_RCNN, '--cfg-options', option)


@pytest.mark.parametrize(
    ('arguments', 'value'),
    [
        ('it.py --amp', 'auto'),
        ('--amp it.py', 'auto'),
        ('--amp --resume auto it.py', 'auto'),
        ('it.py --amp --work-dir here', 'auto'),
        ('--amp fp16 it.py', 'fp16'),
        ('it.py --amp bf16', 'bf16'),
        ('it.py --amp=fp16', 'fp16'),
        ('it.py --cfg-options a=1 --amp', 'auto'),
        ('it.py', None),
    ],
)
def test_a_config_is_no_value_of_amp(monkeypatch, arguments, value):
    monkeypatch.setattr(sys, 'argv', ['train.py', *arguments.split()])
    args = load('train.py').parse_args()
    assert (args.config, args.amp) == ('it.py', value)


def test_no_argument_is_refused_by_name(monkeypatch, capsys):
    monkeypatch.setattr(sys, 'argv', ['train.py'])
    with pytest.raises(SystemExit):
        load('train.py').parse_args()
    assert 'required: config' in capsys.readouterr().err


def test_other_values_of_amp_are_refused_by_name(monkeypatch, capsys):
    monkeypatch.setattr(sys, 'argv', ['train.py', '--amp', 'fp32', 'it.py'])
    with pytest.raises(SystemExit):
        load('train.py').parse_args()
    assert "invalid choice: 'fp32'" in capsys.readouterr().err


def test_flags_that_the_config_cannot_serve(tool, tmp_path):
    (tmp_path / 'it.pth').touch()
    bare = tmp_path / 'bare.py'
    cfg = Config.fromfile(MASK_RCNN)
    for key in ('auto_scale_lr', 'tta_model', 'default_hooks'):
        cfg.pop(key)
    cfg.optim_wrapper.type = 'ApexOptimWrapper'
    cfg.dump(bare)
    assert 'auto_scale_lr' in tool('train.py', bare, '--auto-scale-lr')
    assert 'ApexOptimWrapper' in tool('train.py', bare, '--amp')
    assert 'tta_model' in tool('test.py', bare, 'it.pth', '--tta')
    assert 'default_hooks.visualization' in tool('test.py', bare, 'it.pth', '--show-dir', 'out')
    assert '.pkl' in tool('test.py', bare, 'it.pth', '--out', 'folder')


@pytest.mark.parametrize(
    ('options', 'reason'),
    [
        (['--show'], '--show needs a display'),
        (['--wait-time', 'nan'], '--wait-time must be seconds'),
        (['--show-dir', 'it.pth'], 'must be a folder'),
        (['--out', 'it.pth/a.pkl'], 'it.pth is a file'),
        (['--work-dir', 'it.pth/a'], 'it.pth is a file'),
        (['--launcher', 'pytorch'], 'with RANK in their environment'),
    ],
)
def test_what_a_test_could_not_show_or_write_is_said_before_it(
    work, tool, tmp_path, monkeypatch, options, reason
):
    for name in ('DISPLAY', 'WAYLAND_DISPLAY', 'RANK'):
        monkeypatch.delenv(name, raising=False)
    (tmp_path / 'it.pth').touch()
    assert reason in tool('test.py', work / 'detector.py', 'it.pth', *options)


@pytest.mark.parametrize(
    ('text', 'reason'),
    [
        ('model = dict(', 'SyntaxError: '),
        ('a = 1\nmodel = dict(type=nothing)', 'line 2: NameError'),
        ('model = 3', 'has no model to run'),
        ("model = dict(type='A')\ntrain_cfg = dict()", 'no train_dataloader and no optim_wrapper'),
        ("model = dict(type='A')\ntrain_cfg = dict(max_iters=-1)", 'train_dataloader'),
    ],
)
def test_configs_that_cannot_be_run(tool, tmp_path, text, reason):
    (tmp_path / 'it.py').write_text(text)
    assert reason in tool('train.py', 'it.py')


def test_a_step_that_fails_ends_the_quick_start(monkeypatch, tmp_path):
    commands = []
    failed = subprocess.CompletedProcess([], 3)
    monkeypatch.setattr(subprocess, 'run', lambda command: commands.append(command) or failed)
    monkeypatch.setattr(sys, 'argv', ['quickstart.py', '--work-dir', str(tmp_path / 'run')])
    with pytest.raises(SystemExit, match=r'^3$'):
        load('quickstart.py').main()
    ((python, script, *_),) = commands
    assert Path(python).samefile(sys.executable) and script.endswith('train.py')


def test_what_a_quick_start_cannot_use_is_said_before_it_trains(tool, tmp_path):
    (tmp_path / 'file').touch()
    assert 'config is missing' in tool('quickstart.py', '--config', 'no.py')
    assert 'no detection config' in tool('quickstart.py', '--config', UPERNET)
    assert 'is a file' in tool('quickstart.py', '--work-dir', 'file')
    (tmp_path / 'voc.py').write_text(
        f"_base_ = [{str(MASK_RCNN)!r}]\ntest_evaluator = dict(_delete_=True, type='VOCMetric')\n"
    )
    assert 'CocoMetric' in tool('quickstart.py', '--config', 'voc.py')


def test_curves_replace_what_a_resumed_run_did_again(tmp_path):
    first = [dict(loss=1.0, lr=0.1, step=step) for step in (1, 2, 3, 4)]
    again = [dict(loss=2.0, lr=0.1, step=step) for step in (3, 4, 5)]
    validated = [{'coco/bbox_mAP': 0.5, 'coco/bbox_mAP_50': 0.7, 'step': 0}]
    for name, records in (('1', first), ('2', again + validated)):
        folder = tmp_path / name / 'vis_data'
        folder.mkdir(parents=True)
        (folder / 'scalars.json').write_text('\n'.join(map(json.dumps, records)))
    plot = load('analysis/plot_curves.py')
    run = plot.read_run(plot.scalar_files(tmp_path))
    assert run.curves['loss'] == [(1, 1.0), (2, 1.0), (3, 2.0), (4, 2.0), (5, 2.0)]
    assert run.curves['coco/bbox_mAP'] == [(5, 0.5)]
    assert plot.choose_keys([run], None) == ['loss', 'lr', 'coco/bbox_mAP']
    assert plot.choose_keys([run], ['coco/bbox_mAP_50']) == ['coco/bbox_mAP_50']


@pytest.mark.parametrize(
    ('content', 'options', 'said'),
    [
        (None, [], 'no scalars'),
        (b'', [], 'no finite numbers'),
        (b'\x00\xff\xfe', [], 'cannot be read as a log'),
        (b'{"loss": 1, "step": 1}\nnothing\n', [], 'line 2 is no JSON'),
        (b'[' * 100000, [], 'line 1 is no JSON'),
        (b'[1]\n', [], 'line 1 is no record'),
        (b'{"loss": 1}\n', [], 'line 1 has no step'),
        (b'{"loss": NaN, "step": 1}\n', [], 'no finite numbers'),
        (b'{"loss": 1, "step": "x"}\n', [], 'line 1 is no record'),
        (b'{"loss": 1, "step": 1}\n', ['--keys', 'los'], 'no los in the runs'),
        (b'{"loss": 1, "step": 1}\n', ['--out', 'log.json'], 'must end in .png'),
        (b'{"loss": 1, "step": 1}\n', ['--out', ''], 'must end in .png'),
        (b'{"loss": 1, "step": 1}\n', ['--out', 'folder.png'], 'is a folder'),
        (b'{"loss": 1, "step": 1}\n', ['--out', 'log.json/a.png'], 'is a file'),
    ],
)
def test_curves_of_nothing(tool, tmp_path, content, options, said):
    (tmp_path / 'folder.png').mkdir()
    if content is not None:
        (tmp_path / 'log.json').write_bytes(content)
    assert said in tool('analysis/plot_curves.py', tmp_path if content is None else 'log.json', *options)
    assert content is None or (tmp_path / 'log.json').read_bytes() == content


def test_curves_of_a_run_that_diverged_and_was_killed(monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    records = [
        dict(loss=x, lr=0.1, step=i) for i, x in enumerate((1.0, float('inf'), 2.0, float('nan'), 1e300), 1)
    ]
    (tmp_path / 'log.json').write_text('\n'.join(map(json.dumps, records)) + '\n{"loss": 3, "st')
    monkeypatch.setattr(sys, 'argv', ['plot_curves.py', 'log.json', '--out', 'deep/it.png'])
    load('analysis/plot_curves.py').main()
    cut, left_out, path = capsys.readouterr().out.splitlines()
    assert cut == 'log.json: the last line is cut off, so it is left out'
    assert left_out == 'log.json: 2 values of loss are NaN or infinite, so they are left out'
    assert cv2.imread(path) is not None


@pytest.mark.parametrize(
    ('script', 'arguments', 'expected'),
    [
        (
            'dist_train.sh',
            ['cfg.py', '2', '--amp'],
            '-m torch.distributed.run --nnodes 3 --node-rank 1 --nproc-per-node 2 '
            '--master-addr host --master-port 29511 {tools}/train.py '
            'cfg.py --launcher pytorch --amp',
        ),
        (
            'dist_test.sh',
            ['cfg.py', 'it.pth', '2', '--tta'],
            '-m torch.distributed.run --nnodes 3 --node-rank 1 --nproc-per-node 2 '
            '--master-addr host --master-port 29511 {tools}/test.py '
            'cfg.py it.pth --launcher pytorch --tta',
        ),
        (
            'slurm_train.sh',
            ['part', 'job', 'cfg.py', 'wd', '--amp'],
            '--partition part --job-name job --ntasks 4 --ntasks-per-node 4 --gres gpu:4 '
            '--cpus-per-task 5 --kill-on-bad-exit=1 --time 10 python-to-use -u {tools}/train.py '
            'cfg.py --work-dir wd --launcher slurm --amp',
        ),
        (
            'slurm_test.sh',
            ['part', 'job', 'cfg.py', 'it.pth'],
            '--partition part --job-name job --ntasks 4 --ntasks-per-node 4 --gres gpu:4 '
            '--cpus-per-task 5 --kill-on-bad-exit=1 --time 10 python-to-use -u {tools}/test.py '
            'cfg.py it.pth --launcher slurm',
        ),
    ],
)
def test_launchers_start_what_they_say(tmp_path, script, arguments, expected):
    """Against stand-ins for python and srun that print their arguments."""
    for name in ('python-to-use', 'srun'):
        (tmp_path / name).write_text('#!/bin/sh\necho "$@"\n')
        (tmp_path / name).chmod(0o755)
    settings = dict(NNODES='3', NODE_RANK='1', MASTER_ADDR='host', PORT='29511', GPUS='4')
    settings |= dict(SRUN_ARGS='--time 10', PYTHON='python-to-use')
    settings['PATH'] = f'{tmp_path}:{os.environ["PATH"]}'
    command = ['bash', str(TOOLS / script)]
    done = subprocess.run([*command, *arguments], env=settings, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == expected.format(tools=TOOLS)
    done = subprocess.run(command, env=settings, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith('usage:')


def test_gloo_processes_train_without_sync_bn():
    """Torch's SyncBN runs on GPUs only."""
    cfg = Config.fromfile(UPERNET)
    assert cli._without_sync_bn(cfg.model)
    assert cfg.model.decode_head.norm_cfg.type == cfg.model.auxiliary_head.norm_cfg.type == 'BN'
    assert not cli._without_sync_bn(cfg.model)
