"""What docs/swap_in.md says, run as it stands there: each config block, the commands, the inferencers."""

import json
import os
import pickle
import re
import runpy
import subprocess
import sys
from pathlib import Path

from mmvig.compat.__main__ import find_script

import cv2
import numpy as np
import pytest
import torch
from mmdet.testing import demo_mm_inputs
from mmengine.config import Config
from mmengine.logging import MessageHub
from mmengine.model import revert_sync_batchnorm
from mmengine.optim import build_optim_wrapper
from mmengine.registry import MODELS, init_default_scope
from mmengine.runner import load_checkpoint
from mmengine.structures import PixelData
from mmengine.utils.dl_utils import is_norm
from mmpretrain.structures import DataSample
from mmseg.structures import SegDataSample
from programs import run_tool, run_well
from torch import nn

from mmvig import hub
from mmvig.backbones import ViG, ViGH
from mmvig.datasets.shapes import ensure_shapes

ROOT = Path(__file__).resolve().parents[1]
PAGE = (ROOT / 'docs/swap_in.md').read_text()
PAGE = re.sub(
    r'^## Other packages\n.*?(?=^## )', '', PAGE, flags=re.MULTILINE | re.DOTALL
)  # a test of their own
BLOCKS = re.findall(r'^```python\n(.*?)^```', PAGE, re.MULTILINE | re.DOTALL)
# Config blocks by the file name of their base.
CONFIGS = {re.search(r"([\w.-]+)\.py'", block)[1]: block for block in BLOCKS if '_base_' in block}
# And those of the page's table, which take the lines of a block that it names.
for path, model in re.findall(r'^\| `(\w+/\S+\.py)` \| (.+) \|$', PAGE, re.MULTILINE):
    start = model.lower().replace(' r-', '-r') + '_'
    (block,) = (CONFIGS[name] for name in CONFIGS if name.startswith(start))
    CONFIGS[Path(path).stem] = re.sub(r"'mmdet::.*'", f"'mmdet::{path}'", block)
DETECTION = [name for name, block in CONFIGS.items() if 'mmdet::' in block]
CLASSIFICATION = [name for name, block in CONFIGS.items() if 'mmpretrain::' in block]
SEGMENTATION = [name for name in CONFIGS if name not in DETECTION + CLASSIFICATION]
OPTIMIZER = next(block for block in BLOCKS if block.startswith('optim_wrapper'))
INFERENCE = {
    re.match(r'from (\w+)', block)[1]: block
    for block in BLOCKS
    if 'Inferencer(' in block and 'received.pth' not in block
}
(SAFE_INFERENCE,) = (block for block in BLOCKS if 'received.pth' in block)
COMMANDS = re.search(r'^```sh\n(.*?)^```', PAGE, re.MULTILINE | re.DOTALL)[1].splitlines()
SIZE = (32, 64)

# Heads made small: fewer proposals, queries, layers and channels. What meets the backbone stays.
TWO_STAGE = {
    'model.train_cfg.rpn_proposal.max_per_img': 20,
    'model.test_cfg.rpn.max_per_img': 20,
    'model.test_cfg.rcnn.score_thr': 0.0,  # an untrained model is sure of nothing
    'model.test_cfg.rcnn.max_per_img': 10,
}
ONE_STAGE = {'model.bbox_head.stacked_convs': 1, 'model.test_cfg.score_thr': 0.0}
DETR = {
    'model.num_queries': 20,
    'model.encoder.num_layers': 1,
    'model.decoder.num_layers': 2,
    'model.test_cfg.max_per_img': 10,
}
MASK_2_FORMER = {
    'num_queries': 10,
    'pixel_decoder.encoder.num_layers': 1,
    'transformer_decoder.num_layers': 1,
}
SMALL = {
    'faster-rcnn': TWO_STAGE,
    'mask-rcnn': TWO_STAGE,
    'cascade': TWO_STAGE,
    'retinanet': ONE_STAGE,
    'fcos': ONE_STAGE,
    'atss_r50_fpn_1x': ONE_STAGE,
    'atss_r50_fpn_dyhead': {'model.neck.1.num_blocks': 1, 'model.test_cfg.score_thr': 0.0},
    'ddod': ONE_STAGE,
    'tood': {**ONE_STAGE, 'model.bbox_head.stacked_convs': 2},
    'reppoints': ONE_STAGE,
    'nas-fcos': {'model.test_cfg.score_thr': 0.0},
    'ga-retinanet': ONE_STAGE,
    'ga-faster-rcnn': TWO_STAGE,
    'vfnet': ONE_STAGE,
    'rtmdet': {**ONE_STAGE, 'model.test_cfg.max_per_img': 50},
    'deformable-detr': DETR,
    'dino': {**DETR, 'model.dn_cfg.group_cfg.num_dn_queries': 4},
    'mask2former_r50_8xb2-lsj': {
        **{f'model.panoptic_head.{key}': value for key, value in MASK_2_FORMER.items()},
        'model.data_preprocessor.batch_augments.0.size': SIZE,
        'model.train_cfg.num_points': 64,
        'model.test_cfg.max_per_image': 10,
    },
    'mask2former_r50_8xb2-160k': {
        **{f'model.decode_head.{key}': value for key, value in MASK_2_FORMER.items()},
        'model.decode_head.train_cfg.num_points': 64,
    },
    **{
        name: {'model.decode_head.channels': 32}
        for name in ('pspnet', 'deeplabv3plus', 'encnet', 'upernet')
    },
    'vit_vit': {'model.decode_head.channels': 32},
}
# The widths of 'tiny' with a block a stage.
SHALLOW = {'embed_dims': 96, 'depths': [1, 1, 1, 1], 'num_heads': [3, 6, 12, 24]}
# Strides of the maps that reach a head which does not say itself what it expects.
PYRAMID = [4, 8, 16, 32]
STRIDES = {
    'deformable-detr': [8, 16, 32, 64],
    'dino': [8, 16, 32, 64],
    'pspnet': [16, 32],
    'deeplabv3plus': [4, 16, 32],
    'encnet': [16, 32],
    'bisenetv1': [8, 8, 16],  # of its own backbone, around ours
    'upernet': PYRAMID,
    'segformer': PYRAMID,
    'setr': [16, 16, 16, 16],
    'segmenter': [16],
    'vit_vit': PYRAMID,
}


def of(table, name, default=None):
    """The entry of a table whose key begins a config's name."""
    (found,) = [value for key, value in table.items() if name.startswith(key)] or [default]
    return found


def load(text, folder):
    path = folder / 'pasted.py'
    path.write_text(text)
    cfg = Config.fromfile(path)
    init_default_scope(cfg.default_scope)
    return cfg


def small_config(name, folder):
    cfg = load(CONFIGS[name], folder)
    cfg.merge_from_dict(of(SMALL, name, {}))
    if cfg.default_scope == 'mmdet' and 'roi_head' in cfg.model:
        heads = cfg.model.roi_head.bbox_head
        for head in heads if isinstance(heads, list) else [heads]:
            head.fc_out_channels = 32
    elif cfg.default_scope == 'mmseg':
        cfg.model.data_preprocessor.size = SIZE
    elif cfg.default_scope == 'mmpretrain':
        cfg.model.data_preprocessor = cfg.data_preprocessor  # as mmengine's Runner does
    return cfg


def backbone_of(model):
    """Ours, which BiSeNetV1 has within its own."""
    (backbone,) = (each for each in model.modules() if isinstance(each, (ViG, ViGH)))
    return backbone


def build(cfg):
    """The model as mmengine's Runner makes it for one process."""
    torch.manual_seed(0)
    model = revert_sync_batchnorm(MODELS.build(cfg.model))
    backbone = backbone_of(model)
    before = {key: value.clone() for key, value in backbone.state_dict().items()}
    model.init_weights()
    for key, value in backbone.state_dict().items():
        assert torch.equal(value, before[key]), f'the config initialises backbone.{key} anew'
    return model


def has_masks(cfg):
    return 'panoptic_head' in cfg.model or 'mask_head' in cfg.model.get('roi_head', {})


def batch_for(cfg):
    """Two random images with ground truth, as the data loader gives them."""
    if cfg.default_scope == 'mmdet':
        shapes = [(3, *SIZE)] * 2
        return demo_mm_inputs(2, shapes, num_items=[4, 4], num_classes=80, with_mask=has_masks(cfg))
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randint(0, 256, (2, 3, *SIZE), generator=generator, dtype=torch.uint8)
    if cfg.default_scope == 'mmpretrain':
        return {'inputs': inputs, 'data_samples': [DataSample().set_gt_label(i) for i in (3, 700)]}
    samples = []
    for _ in range(2):
        sample = SegDataSample(metainfo={'img_shape': SIZE, 'ori_shape': SIZE, 'pad_shape': SIZE})
        classes = cfg.model.decode_head.num_classes
        sample.gt_sem_seg = PixelData(data=torch.randint(0, classes, (1, *SIZE), generator=generator))
        samples.append(sample)
    return {'inputs': list(inputs), 'data_samples': samples}


def declared_strides(model):
    """The strides that the model's parts were configured for, by part."""
    declared = {}
    for key, module in model.named_modules():
        generators = [getattr(module, f'{kind}_generator', None) for kind in ('prior', 'square_anchor')]
        for holder in (module, *generators):
            for attribute in ('strides', 'featmap_strides', 'feature_strides'):
                strides = getattr(holder, attribute, None)
                if isinstance(strides, (list, tuple)):
                    declared[key] = [s[0] if isinstance(s, tuple) else s for s in strides]
    return declared


def check_maps(name, cfg, model):
    """Whoever receives the backbone's maps is built for their channels and strides."""
    model.eval()  # batch norms take no single value
    with torch.no_grad():
        maps = model.backbone(torch.rand(1, 3, *SIZE))
        channels = [x.shape[1] for x in maps]
        reached = model.neck(maps) if model.with_neck else maps
    if 'in_channels' in (cfg.model.get('neck') or {}):
        assert list(cfg.model.neck.in_channels) == channels
    if cfg.default_scope == 'mmpretrain':
        assert cfg.model.head.in_channels == channels[-1]
        return
    sizes = [tuple(x.shape[2:]) for x in reached]
    expected = declared_strides(model) or {'the maps': of(STRIDES, name)}
    for part, strides in expected.items():
        assert sizes[: len(strides)] == [tuple(-(-side // s) for side in SIZE) for s in strides], part
    assert max(map(len, expected.values())) == len(sizes)


def check_gradients(cfg, model):
    parts = {'backbone': model.backbone, 'neck': model.neck if model.with_neck else nn.Identity()}
    unused = []
    for part, module in parts.items():
        for key, parameter in module.named_parameters():
            if parameter.grad is None:
                unused.append(f'{part}.{key}')
            else:
                assert parameter.grad.isfinite().all(), f'{part}.{key}'
    assert bool(unused) == cfg.get('find_unused_parameters', False), f'{unused} stop distributed training'
    assert all(p.grad.any() for p in backbone_of(model).stem.parameters() if p.ndim > 1)


def check_detection(cfg, prediction):
    found = prediction.pred_instances
    assert len(found) > 0
    (height, width), boxes = SIZE, found.bboxes
    assert boxes.shape == (len(found), 4) and boxes.isfinite().all()
    assert (boxes[:, :2] <= boxes[:, 2:]).all()
    if cfg.model.type != 'TOOD':  # which does not clip them
        assert boxes.min() >= 0 and boxes[:, 2].max() <= width and boxes[:, 3].max() <= height
    assert ((found.scores >= 0) & (found.scores <= 1)).all()
    assert ((found.labels >= 0) & (found.labels < 80)).all()
    assert ('masks' in found) == has_masks(cfg)
    if has_masks(cfg):
        assert found.masks.shape == (len(found), *SIZE) and found.masks.dtype == torch.bool


def check_segmentation(cfg, prediction):
    logits, classes = prediction.seg_logits.data, prediction.pred_sem_seg.data
    assert logits.shape == (cfg.model.decode_head.num_classes, *SIZE) and logits.isfinite().all()
    assert torch.equal(classes, logits.argmax(0, keepdim=True))
    assert (logits.amax((1, 2)) > logits.amin((1, 2))).any(), 'the same everywhere'


def check_classification(prediction):
    assert prediction.pred_score.shape == (1000,)
    assert prediction.pred_score.sum().item() == pytest.approx(1, abs=1e-4)
    assert prediction.pred_label.item() == prediction.pred_score.argmax().item()


def test_the_page_covers_each_package():
    assert len(DETECTION) >= 18 and len(SEGMENTATION) >= 11 and len(CLASSIFICATION) >= 2
    plain = [name for name, block in CONFIGS.items() if "'mmvig.ViG'" in block]
    assert len(plain) >= 4
    assert all("'mmvig.ViGH'" in block for name, block in CONFIGS.items() if name not in plain)


@pytest.mark.parametrize('name', CONFIGS)
def test_model_trains_a_step_and_predicts(name, tmp_path):
    cfg = small_config(name, tmp_path)
    backbone = cfg.model.backbone.get('backbone_cfg', cfg.model.backbone)
    if (backbone.type, backbone.arch) == ('mmvig.ViGH', 'tiny'):
        backbone.arch = SHALLOW
    model = build(cfg)
    check_maps(name, cfg, model)

    model.train()
    MessageHub.get_current_instance().update_info('epoch', 0)  # as mmengine's Runner does
    losses = model(**model.data_preprocessor(batch_for(cfg), True), mode='loss')
    loss, _ = model.parse_losses(losses)
    assert torch.isfinite(loss) and loss > 0
    loss.backward()
    check_gradients(cfg, model)

    model.eval()
    batch = batch_for(cfg)
    batches = [batch]
    if name.startswith('ga-'):  # it predicts one picture at a time
        batches = [{key: values[i : i + 1] for key, values in batch.items()} for i in range(2)]
    with torch.no_grad():
        predictions = [prediction for part in batches for prediction in model.test_step(part)]
    assert len(predictions) == 2
    for prediction in predictions:
        if name in DETECTION:
            check_detection(cfg, prediction)
        elif name in SEGMENTATION:
            check_segmentation(cfg, prediction)
        else:
            check_classification(prediction)


def test_the_optimiser_block_can_be_added_and_spares_norms_and_biases(tmp_path):
    cfg = load(CONFIGS['faster-rcnn_r50_fpn_1x_coco'] + OPTIMIZER, tmp_path)
    cfg.model.backbone.arch = {'embed_dims': 32, 'depths': [1, 1, 1, 1], 'num_heads': [1, 2, 4, 8]}
    backbone = MODELS.build(cfg.model.backbone)
    optimizer = build_optim_wrapper(backbone, cfg.optim_wrapper).optimizer
    assert isinstance(optimizer, torch.optim.AdamW)
    for group in optimizer.param_groups:
        assert group['lr'] == 1e-4
        for parameter in group['params']:
            assert group['weight_decay'] == (0.05 if parameter.ndim > 1 else 0)


def test_pretrained_weights_are_added_to_a_block_as_the_page_says(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    init_cfg = re.search(r'`(init_cfg=dict\(.*?\))`', PAGE)[1]
    block = CONFIGS['retinanet_r50_fpn_1x_coco'].replace("arch='tiny'", f"arch='tiny', {init_cfg}")
    torch.manual_seed(1)
    trained = MODELS.build({'type': 'mmvig.ViGH', 'arch': 'tiny', 'out_indices': (3,)})
    torch.save(trained.state_dict(), 'vig_h_t.pth')
    fetched = []
    monkeypatch.setattr(hub, 'fetch', lambda address: fetched.append(address) or Path('vig_h_t.pth'))
    model = MODELS.build(load(block, tmp_path).model)
    model.init_weights()
    loaded = model.backbone.state_dict()
    assert all(torch.equal(loaded[key], value) for key, value in trained.state_dict().items())
    assert fetched == ['hf://hustvl/ViG/vig_h_t_82p8acc.pth']


def command(package):
    """The script and the config of the page's training command."""
    (line,) = [line for line in COMMANDS if f'{package}/' in line]
    python, *module, tool, config = line.split()
    assert [python, *module] == ['python', '-m', 'mmvig.compat']
    return tool, config


def run(words, cwd):
    """A program's output, in a process of its own."""
    env = {**os.environ, 'CUDA_VISIBLE_DEVICES': '', 'OMP_NUM_THREADS': '1'}
    result = subprocess.run(words, cwd=cwd, env=env, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-4000:]
    return result.stdout


def loader_options(**dataset):
    """--cfg-options that give every split this data, two images at a time, without processes."""
    options = {'num_workers': 0, 'persistent_workers': False, 'batch_size': 2}
    options |= {f'dataset.{key}': value for key, value in dataset.items()}
    return [
        f'{split}_dataloader.{key}={value}'
        for split in ('train', 'val', 'test')
        for key, value in options.items()
    ]


def logged_losses(work_dir):
    (log,) = work_dir.glob('*/vis_data/scalars.json')
    return [record['loss'] for record in map(json.loads, log.read_text().splitlines()) if 'loss' in record]


@pytest.fixture
def image(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (60, 80, 3), dtype=np.uint8)
    cv2.imwrite(str(tmp_path / 'image.jpg'), pixels)
    return tmp_path / 'image.jpg'


# In a process of its own: the package's training tool, then its inferencer.
PROGRAM = """
{first}
import pickle, runpy, sys
import yapf.yapflib.yapf_api
yapf.yapflib.yapf_api.FormatCode = lambda text, **_: (text, False)  # its layout takes long
sys.argv = {arguments!r}
{start}
import os
os.rename('run/iter_2.pth', {checkpoint!r})
{inference}
with open('prediction.pkl', 'wb') as file:
    pickle.dump(prediction, file)
"""


PLAINLY = "runpy.run_path(sys.argv[0], run_name='__main__')"
BY_THE_PAGE = "runpy.run_module('mmvig.compat', run_name='__main__')"


def train_and_predict(package, folder, checkpoint, first='', plainly=False, options=()):
    """Two iterations of the page's command and its inferencer on image.jpg: (dumped config, prediction).

    Plainly: the script as `python SCRIPT` runs it, told of mmvig by the config alone.
    """
    ensure_shapes(folder / 'shapes', num_train=4, num_val=2)
    tool, config = command(package)
    words = [str(find_script(tool))] if plainly else ['-m', tool]
    options = [
        *loader_options(data_root=folder / 'shapes'),
        *(
            'train_cfg.max_iters=2',
            'train_cfg.val_interval=2',
            'default_hooks.logger.interval=1',
            'default_hooks.checkpoint.interval=2',
            'default_hooks.checkpoint.save_best=None',
            'default_hooks.checkpoint.save_optimizer=False',
        ),
        *options,
    ]
    program = PROGRAM.format(
        first=first,
        arguments=[*words, str(ROOT / config), '--work-dir', 'run', '--cfg-options', *options],
        start=PLAINLY if plainly else BY_THE_PAGE,
        checkpoint=checkpoint,
        inference=INFERENCE[package],
    )
    (folder / 'program.py').write_text(program)
    if plainly:
        run([sys.executable, 'program.py'], folder)
    else:  # a new interpreter is in tests/test_compat_tools.py
        run_well(str(folder / 'program.py'), cwd=folder)
    losses = logged_losses(folder / 'run')
    assert len(losses) == 2 and np.isfinite(losses).all()
    (config,) = (folder / 'run').glob('*.py')
    return str(config), pickle.loads((folder / 'prediction.pkl').read_bytes())


def test_mmdet_trains_our_config_and_rebuilds_it_by_itself(tmp_path, image):
    from mmdet.apis import inference_detector, init_detector

    annotations = tmp_path / 'shapes/annotations/instances_val.json'
    config, prediction = train_and_predict(
        'mmdet',
        tmp_path,
        'detector.pth',
        plainly=True,
        first='import mmdet.apis',  # before the config: mmdet then misses mmcv's operators
        options=[
            f'val_evaluator.ann_file={annotations}',
            'train_dataloader.dataset.pipeline.2.scale=(80,60)',
            *(f'{key}={value}' for key, value in TWO_STAGE.items()),
        ],
    )
    model = init_detector(config, str(tmp_path / 'detector.pth'), device='cpu')
    expected = inference_detector(model, str(image)).pred_instances
    assert len(expected) > 0 and len(prediction['masks']) == len(expected)
    assert prediction['labels'] == expected.labels.tolist()
    np.testing.assert_allclose(prediction['bboxes'], expected.bboxes, atol=1e-3)
    np.testing.assert_allclose(prediction['scores'], expected.scores, atol=1e-5)


def test_mmseg_trains_our_config_and_rebuilds_it_by_itself(tmp_path, image):
    from mmseg.apis import inference_model, init_model

    sizes = [
        'train_dataloader.dataset.pipeline.3.crop_size=(64,64)',
        'model.data_preprocessor.size=(64,64)',
    ]
    config, prediction = train_and_predict('mmseg', tmp_path, 'segmentor.pth', options=sizes)
    model = init_model(config, str(tmp_path / 'segmentor.pth'), device='cpu')
    expected = inference_model(model, str(image)).pred_sem_seg.data[0].numpy()
    assert prediction.shape == (60, 80) and (prediction == expected).mean() > 0.999


def test_mmpretrain_trains_a_block_and_rebuilds_it_by_itself(tmp_path, image, monkeypatch):
    """In this process, to save time: mmpretrain needs no stand-in for mmcv's operators."""
    tool, config = command('mmpretrain')
    script = str(find_script(tool))
    monkeypatch.chdir(tmp_path)
    Path(config).write_text(CONFIGS['swin-tiny_16xb64_in1k'])
    Path('list.txt').write_text('image.jpg 3\nimage.jpg 700\n')
    options = [
        *loader_options(data_root=tmp_path, ann_file='list.txt', split=''),
        *('train_cfg.max_epochs=1', 'param_scheduler.0.end=1', 'param_scheduler.1.begin=0'),
        'default_hooks.logger.interval=1',
    ]
    arguments = [script, config, '--work-dir', 'run', '--cfg-options', *options]
    with monkeypatch.context() as patch:
        patch.setattr(sys, 'argv', arguments)
        patch.setattr('yapf.yapflib.yapf_api.FormatCode', lambda text, **_: (text, False))
        runpy.run_path(script, run_name='__main__')
    losses = logged_losses(tmp_path / 'run')
    assert len(losses) == 1 and np.isfinite(losses).all()
    Path('run/epoch_1.pth').rename('classifier.pth')

    names = {}
    exec(INFERENCE['mmpretrain'], names)
    prediction = names['prediction']
    model = MODELS.build(small_config('swin-tiny_16xb64_in1k', tmp_path).model).eval()
    load_checkpoint(model, 'classifier.pth', 'cpu', strict=True)
    data = names['inferencer'].pipeline({'img': cv2.imread(str(image))})
    with torch.no_grad():
        scores = model.test_step({'inputs': data['inputs'][None], 'data_samples': [data['data_samples']]})
    np.testing.assert_allclose(prediction['pred_scores'], scores[0].pred_score, atol=1e-5)
    assert prediction['pred_label'] == scores[0].pred_label.item()
    assert isinstance(prediction['pred_class'], str)


@pytest.mark.parametrize('kind, layer', [('ViGH', 'norm3'), ('ViG', 'norm11')])
def test_the_target_layers_of_cam_scripts_give_maps(kind, layer):
    assert f'`backbone.{layer}`' in PAGE
    backbone = MODELS.build(dict(type=f'mmvig.{kind}', arch='tiny')).eval()
    norms = [module for module in backbone.modules() if is_norm(module)]
    if kind == 'ViGH':  # mmpretrain/vis_cam takes the last by itself
        assert norms[-1] is backbone.get_submodule(layer)
    seen = []
    backbone.get_submodule(layer).register_forward_hook(lambda module, inputs, output: seen.append(output))
    with torch.no_grad():
        maps = backbone(torch.rand(1, 3, *SIZE))
    assert torch.equal(seen[0], maps[-1])


class Hostile:
    """Leaves a file behind when it is unpickled."""

    def __reduce__(self):
        return Path.touch, (Path('it_ran'),)


# Says of each text whether the inferencer was made, and whether code of the file ran.
ATTEMPTS = """
import json, sys
from pathlib import Path
for file, text in json.loads(Path('attempts.json').read_text()):
    Path(file).replace('received.pth')
    try:
        exec(text, {})
        made = True
    except Exception as error:
        made = type(error).__name__
    print(json.dumps([made, Path('it_ran').exists()]))
    Path('it_ran').unlink(missing_ok=True)
"""


def test_the_safe_way_to_predict_runs_no_code_of_a_file(tmp_path):
    cfg = small_config('faster-rcnn_r50_fpn_1x_coco', tmp_path)
    cfg.model.backbone.arch = {'embed_dims': 32, 'depths': [1, 1, 1, 1], 'num_heads': [1, 2, 4, 8]}
    cfg.model.neck.in_channels = [32, 64, 128, 256]
    cfg.dump(tmp_path / 'my_detector.py')
    meta = {'cfg': "__import__('pathlib').Path('it_ran').touch()", 'dataset_meta': {'classes': ('cat',)}}
    harmless = {'state_dict': MODELS.build(cfg.model).state_dict(), 'meta': meta}
    for name, content in (('1', Hostile()), ('2', Hostile()), ('3', None)):
        torch.save({**harmless, 'other': content}, tmp_path / name)
    guard = re.search(r'^reading\.guard_mmengine\(\).*\n', SAFE_INFERENCE, re.MULTILINE)[0]
    unsafe = SAFE_INFERENCE.replace(guard, '')
    attempts = [('1', unsafe), ('2', SAFE_INFERENCE), ('3', SAFE_INFERENCE)]
    (tmp_path / 'attempts.json').write_text(json.dumps(attempts))
    (tmp_path / 'attempts.py').write_text(ATTEMPTS)
    result = run_tool(str(tmp_path / 'attempts.py'), cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    (_, ran), (refused, not_run), loaded = map(json.loads, re.findall(r'^\[.*\]$', result.stdout, re.M))
    assert ran, 'without the guard it is safe too: the page can be shorter'
    assert refused is not True and not not_run
    assert loaded == [True, False]
