"""Time whole detectors and segmentors, and their backbone's share, on random data of the config's size.

    python tools/benchmark/detector.py                   # Mask R-CNN, ViG-H-T and -S, each next to Swin
    python tools/benchmark/detector.py CONFIG... --peers none
    python tools/benchmark/detector.py configs/segmentation/upernet_vigh_s.py --peers swin convnext
    python tools/benchmark/detector.py configs/detection/maskrcnn_vig_t.py --peers vit --shape 2048 2048

For each config whose backbone is a ViG-H of a named size, the same config with the SwinTransformer of mmdet
(or mmseg), or the ConvNeXt of mmpretrain, of that size is timed too; for a plain ViG, mmpretrain's ViT with
DeiT's sizes, whose attention is fused. A training iteration is mmengine's: preprocessing, forward pass and
losses, backward pass, optimiser step, in AMP; data loading is not timed.
The learning rate is 0, so that all iterations do the same work. Inference is one image from preprocessing
to masks; with random weights no box would pass a detector's score threshold, so it is set to what the best
1000 pairs of box and class pass.

The backbone's share is the time between marks (CUDA events) in the same iteration: around its forward call,
and from the moment at which the backward pass enters it to the end of the backward pass: autograd runs the
last operators first, so by then nothing but the backbone is left. Times are medians with the 10th and 90th
percentile.

Writes detector.json after each model, and ends with status 1 if one failed.
"""

import argparse
import copy
import math
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from mmengine.config import Config
from mmengine.logging import MMLogger
from mmengine.model import revert_sync_batchnorm
from mmengine.optim import OptimWrapper, build_optim_wrapper
from mmengine.registry import init_default_scope
from mmengine.structures import InstanceData, PixelData
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # this checkout, installed or not

from common import Clock, autocast, machine, megabytes, milliseconds, release, save, spread, version

from mmvig.engine import cli
from mmvig.engine.preflight import SetupError, check_writable, one_line_errors

CONFIGS = Path(__file__).resolve().parents[2] / 'configs'
DEFAULT_CONFIGS = [str(CONFIGS / f'detection/maskrcnn_vigh_{size}.py') for size in 'ts']
OBJECTS = 10  # an image; COCO has 7
PASSING_PAIRS = 1000
WITH = ' with '  # between a config's name and its peer's
# The peers' fields that differ between sizes.
SWIN = {
    'tiny': {'embed_dims': 96, 'depths': (2, 2, 6, 2), 'num_heads': (3, 6, 12, 24)},
    'small': {'embed_dims': 96, 'depths': (2, 2, 18, 2), 'num_heads': (3, 6, 12, 24)},
    'base': {'embed_dims': 128, 'depths': (2, 2, 18, 2), 'num_heads': (4, 8, 16, 32)},
}
PEERS = {'swin': 'ViGH', 'convnext': 'ViGH', 'vit': 'ViG'}  # of which backbone
PRECISIONS = {'fp16': 'float16', 'bf16': 'bfloat16', 'fp32': None}


def peer_backbone(peer: str, backbone: dict) -> dict | None:
    """A peer of a backbone's size, with its stochastic depth; None where there is none."""
    arch = backbone.get('arch', 'tiny')
    if backbone.get('type', '').removeprefix('mmvig.') != PEERS[peer] or arch not in tuple(SWIN):
        return None
    drop_path_rate = backbone.get('drop_path_rate') or 0.0
    if peer == 'vit':
        return {
            'type': 'mmpretrain.VisionTransformer',
            'arch': f'deit-{arch}',
            'img_size': backbone.get('img_size', 224),
            'out_indices': backbone.get('out_indices', -1),
            'out_type': 'featmap',
            'with_cls_token': False,
            'drop_path_rate': drop_path_rate,
        }
    shared = {'out_indices': stages_of(backbone), 'drop_path_rate': drop_path_rate}
    if peer == 'swin':
        return {'type': 'SwinTransformer', **SWIN[arch], **shared}
    return {'type': 'mmpretrain.ConvNeXt', 'arch': arch, 'gap_before_final_norm': False, **shared}


def stages_of(backbone: dict) -> tuple[int, ...]:
    """The stages, of four, whose maps a ViG-H returns."""
    wanted = backbone.get('out_indices', (0, 1, 2, 3))
    return tuple(i % 4 for i in ([wanted] if isinstance(wanted, int) else wanted))


def image_shape(cfg: Config, wanted: list[int] | None) -> tuple[int, int]:
    """Height and width of training images: what was asked for, or the config's largest.

    Raises:
        SetupError: The config does not say, or a side is no positive number.
    """
    if wanted:
        if min(wanted) < 1:
            raise SetupError(f'--shape must be two sizes of at least 1, got {wanted[0]} {wanted[1]}')
        return tuple(wanted)
    if cfg.default_scope == 'mmseg':
        sizes = [cfg.model.get('data_preprocessor', {}).get('size')]
    else:
        # Resizing that keeps the ratio takes a long and a short side, in any order: here of a wide image.
        pipeline = cfg.get('train_dataloader', {}).get('dataset', {}).get('pipeline', [])
        sizes = [tuple(sorted(scale)) for scale in _scales(pipeline)]
    if not sizes or not sizes[0]:
        raise SetupError(f'{cfg.filename} does not say how large its images are: give --shape H W')
    return tuple(max(sizes, key=math.prod))


def _scales(node) -> Iterator[tuple[int, int]]:
    """Every ``scale`` and ``scales`` of a pipeline."""
    for key, value in node.items() if isinstance(node, dict) else enumerate(node):
        if key == 'scale' and isinstance(value, (list, tuple)):
            yield tuple(value)
        elif key == 'scales':
            yield from (tuple(each) for each in value)
        elif isinstance(value, (dict, list, tuple)):
            yield from _scales(value)


def set_image_size(model: dict, shape: tuple[int, int]) -> None:
    """Make what a model's config says of image sizes say this one: position embeddings, padding."""
    if 'img_size' in model.backbone:
        model.backbone.img_size = max(shape)
    if 'size' in model.get('data_preprocessor', {}):  # to which a segmentor pads
        model.data_preprocessor.size = shape
    for each in model.get('data_preprocessor', {}).get('batch_augments') or []:
        if each.type == 'BatchFixedSizePad':
            each.size = shape


def number_of_classes(cfg: Config) -> int:
    """Classes of the config's head."""
    if cfg.default_scope == 'mmseg':
        head = cfg.model.decode_head
    elif 'panoptic_head' in cfg.model:
        return cfg.model.panoptic_head.num_things_classes
    else:
        head = cfg.model.roi_head.bbox_head if 'roi_head' in cfg.model else cfg.model.bbox_head
    return (head[0] if isinstance(head, list) else head).num_classes


def random_batch(cfg: Config, batch: int, shape: tuple[int, int]) -> dict:
    """Images and annotations as a data loader hands them over, with fixed random content.

    Args:
        cfg: of a detector (boxes, and masks where it has a head for them) or a segmentor (a label a pixel).
        batch: number of images.
        shape: their height and width.
    """
    random = np.random.default_rng(0)
    images = random.integers(0, 256, (batch, 3, *shape), dtype=np.uint8)
    classes, model = number_of_classes(cfg), cfg.model
    if cfg.default_scope == 'mmdet':
        with_masks = 'panoptic_head' in model or 'mask_head' in model.get('roi_head', {})
        samples = [_detection_sample(random, shape, classes, with_masks) for _ in range(batch)]
    else:
        samples = [_segmentation_sample(random, shape, classes) for _ in range(batch)]
    for each in samples:
        each.set_metainfo({'img_shape': shape, 'ori_shape': shape, 'pad_shape': shape, 'img_id': 0})
    return {'inputs': [torch.from_numpy(each) for each in images], 'data_samples': samples}


def _detection_sample(random: np.random.Generator, shape: tuple[int, int], classes: int, with_masks: bool):
    from mmdet.structures import DetDataSample
    from mmdet.structures.mask import BitmapMasks

    size = np.array(shape[::-1])
    corners = random.random((OBJECTS, 2)) * 0.6 * size
    sides = (0.1 + 0.3 * random.random((OBJECTS, 2))) * size
    boxes = np.concatenate([corners, corners + sides], axis=1)
    labels = torch.from_numpy(random.integers(0, classes, OBJECTS))
    boxes = torch.from_numpy(boxes.astype(np.float32))
    instances = InstanceData(bboxes=boxes, labels=labels)
    if with_masks:
        masks = np.zeros((OBJECTS, *shape), dtype=np.uint8)
        for mask, (left, top, right, bottom) in zip(masks, boxes.int().tolist(), strict=True):
            mask[top:bottom, left:right] = 1
        instances.masks = BitmapMasks(masks, *shape)
    none = InstanceData(bboxes=torch.zeros(0, 4), labels=torch.zeros(0, dtype=torch.long))
    sample = DetDataSample(gt_instances=instances, ignored_instances=none)
    sample.set_metainfo({'scale_factor': (1.0, 1.0)})
    return sample


def _segmentation_sample(random: np.random.Generator, shape: tuple[int, int], classes: int):
    from mmseg.structures import SegDataSample

    labels = torch.from_numpy(random.integers(0, classes, (1, *shape)))
    return SegDataSample(gt_sem_seg=PixelData(data=labels))


def optim_wrapper(cfg: Config, model: nn.Module, device: str, precision: str) -> OptimWrapper:
    """The config's optimiser at learning rate 0, in a precision."""
    options = copy.deepcopy(cfg.optim_wrapper)
    options.optimizer.lr = 0.0
    options.pop('loss_scale', None)
    options.pop('dtype', None)
    if precision == 'fp32':
        options.type = 'OptimWrapper'
    elif device == 'cuda':
        options.type = 'AmpOptimWrapper'
        options.dtype = PRECISIONS[precision]
        options.loss_scale = 'dynamic' if precision == 'fp16' else dict(enabled=False)
    else:
        options.type = 'mmvig.engine.amp.CpuAmpOptimWrapper'
    return build_optim_wrapper(model, options)


class BackboneMarks:
    """Marks the backbone's part of each iteration on the device's time line."""

    def __init__(self, backbone: nn.Module, clock: Clock):
        self.clock = clock
        self.marks: dict = {}
        self.handles = [
            backbone.register_forward_pre_hook(self._begin),
            backbone.register_forward_hook(self._end),
        ]

    def _begin(self, module: nn.Module, inputs: tuple) -> None:
        self.marks['forward begin'] = self.clock.mark()

    def _end(self, module: nn.Module, inputs: tuple, maps: tuple[Tensor, ...]) -> None:
        self.marks['forward end'] = self.clock.mark()
        trainable = [each for each in maps if each.requires_grad]
        if trainable and torch.is_grad_enabled():
            # A hook runs when its map's turn comes, so of all maps' the first one counts.
            torch.autograd.graph.register_multi_grad_hook(trainable, self._begin_backward, mode='any')

    def _begin_backward(self, gradient: Tensor) -> None:
        self.marks['backward begin'] = self.clock.mark()

    def end_backward(self) -> None:
        """To be called when the backward pass is over."""
        self.marks['backward end'] = self.clock.mark()

    def take(self) -> dict:
        """The marks since the last call."""
        marks, self.marks = self.marks, {}
        return marks

    def remove(self) -> None:
        """Take the hooks off the backbone."""
        for handle in self.handles:
            handle.remove()


def timed(step, marks: BackboneMarks, parts: list[str], repeats: int, warm_up: int) -> dict:
    """Time a step and the backbone's ``parts`` of it, after some calls that are not timed.

    Returns:
        Seconds of the whole, ``backbone_<part>``, the backbone's ``backbone_share`` of the whole,
        and ``memory``, the peak of allocated bytes from the first call on, as those of a CUDA graph
        count only while it is captured (None on a CPU).
    """
    clock = marks.clock
    if clock.cuda:
        torch.cuda.reset_peak_memory_stats()
    for _ in range(warm_up):
        step()
    clock.wait()
    marks.take()
    rows = []
    for _ in range(repeats):
        begin = clock.mark()
        step()
        rows.append((begin, clock.mark(), marks.take()))
    clock.wait()
    whole = [clock.seconds(begin, end) for begin, end, _ in rows]
    result = spread(whole)
    shares = [0.0] * repeats
    for part in parts:
        times = [clock.seconds(own[f'{part} begin'], own[f'{part} end']) for *_, own in rows]
        result[f'backbone_{part}'] = spread(times)['median']
        shares = [share + each / total for share, each, total in zip(shares, times, whole, strict=True)]
    result['backbone_share'] = spread(shares)['median']
    result['memory'] = torch.cuda.max_memory_allocated() if clock.cuda else None
    return result


def time_training(model: nn.Module, cfg: Config, data: dict, args: argparse.Namespace) -> dict:
    """Training iterations of a batch.

    Raises:
        ValueError: The loss is not finite.
    """
    marks = BackboneMarks(model.backbone, Clock(args.device))
    wrapper = optim_wrapper(cfg, model, args.device, args.precision)
    backward = wrapper.backward

    def marked_backward(loss: Tensor, **options) -> None:
        backward(loss, **options)
        marks.end_backward()

    wrapper.backward = marked_backward
    logs = {}

    def iteration() -> None:
        logs.update(model.train_step(data, wrapper))

    model.train()
    result = timed(iteration, marks, ['forward', 'backward'], args.repeats, args.warm_up)
    marks.remove()
    model.zero_grad(set_to_none=True)
    if not bool(logs['loss'].isfinite()):
        raise ValueError(f'the loss is not finite: {logs}')
    return {**result, 'loss': logs['loss'].item()}


def time_inference(model: nn.Module, data: dict, args: argparse.Namespace) -> dict:
    """Inference of one image; ``detections`` is what a detector found."""
    marks = BackboneMarks(model.backbone, Clock(args.device))
    found = []

    def inference() -> None:
        with torch.no_grad(), autocast(args.device, args.precision):
            found[:] = model.test_step(data)

    model.eval()
    if hasattr(model, 'roi_head'):
        let_boxes_pass(model, inference)
    result = timed(inference, marks, ['forward'], args.repeats, args.warm_up)
    marks.remove()
    if 'pred_instances' in found[0]:
        result['detections'] = len(found[0].pred_instances)
    return result


def let_boxes_pass(model: nn.Module, inference) -> None:
    """Set the score threshold to what the best 1000 pairs of box and class pass."""
    head = model.roi_head.bbox_head
    heads = list(head) if isinstance(head, nn.ModuleList) else [head]
    thresholds = []

    def see(module: nn.Module, inputs: tuple, outputs: tuple) -> None:
        scores = outputs[0].float().softmax(-1)[:, :-1].flatten()
        thresholds[:] = [scores.topk(min(PASSING_PAIRS, scores.numel())).values[-1].item()]

    handle = heads[-1].register_forward_hook(see)
    inference()
    handle.remove()
    model.roi_head.test_cfg.score_thr = thresholds[0]


def time_model(cfg: Config, name: str, shape: tuple[int, int], args: argparse.Namespace) -> dict:
    """A row: both steps of one model."""
    init_default_scope(cfg.default_scope)
    torch.backends.cudnn.benchmark = cfg.get('env_cfg', {}).get('cudnn_benchmark', False)
    torch.manual_seed(0)
    np.random.seed(0)  # mmdet samples boxes with it
    batch = args.batch or cfg.get('train_dataloader', {}).get('batch_size', 2)
    model = cli.build_model(cfg)
    model.init_weights()
    model = revert_sync_batchnorm(model).to(args.device)
    make = model.data_preprocessor.cast_data  # on the device before the time starts
    row = {'name': name, 'batch': batch, 'shape': shape, 'precision': args.precision}
    training = make(random_batch(cfg, batch, shape))
    row['training'] = time_training(model, cfg, training, args)
    del training
    release(args.device)
    single = make(random_batch(cfg, 1, shape))
    row['inference'] = time_inference(model, single, args)
    return {**row, 'status': 'ok'}


def ratios(row: dict, rows: list[dict]) -> dict[str, float]:
    """How many times as fast as with this peer the config itself was, in this run, by step."""
    for ours in rows:
        if row['name'].startswith(ours['name'] + WITH) and row['status'] == ours['status'] == 'ok':
            return {step: row[step]['median'] / ours[step]['median'] for step in ('training', 'inference')}
    return {}


def show(row: dict) -> None:
    """Print a row."""
    print(f'{row["name"]}: ', end='')
    if row['status'] != 'ok':
        print(': '.join([row['status'], *filter(None, [row.get('reason')])]), flush=True)
        return
    height, width = row['shape']
    print(f'{height}x{width}, {row["precision"]}')
    for step, images in (('training', row['batch']), ('inference', 1)):
        own = row[step]
        parts = [f'forward{milliseconds(own["backbone_forward"])}']
        if 'backbone_backward' in own:
            parts.append(f'backward{milliseconds(own["backbone_backward"])}')
        tail = [megabytes(own['memory'])] if own['memory'] is not None else []
        tail += [f'{own["detections"]} detections'] if 'detections' in own else []
        print(
            f'  {step:10} batch {images:<3}{milliseconds(own["median"])} ms'
            f' ({own["p10"] * 1e3:.3f} to {own["p90"] * 1e3:.3f}),'
            f' backbone {own["backbone_share"]:.1%} ({", ".join(parts)})' + ''.join(f', {x}' for x in tail),
            flush=True,
        )
    for step, ratio in row['ratios'].items():
        print(f'  {step:10} ours is {ratio:.2f} x as fast', flush=True)


def parse_args() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        'configs', nargs='*', metavar='CONFIG', help='default: Mask R-CNN with ViG-H-T and with ViG-H-S'
    )
    parser.add_argument('--peers', nargs='+', choices=[*PEERS, 'none'], default=['swin'])
    parser.add_argument(
        '--shape', nargs=2, type=int, metavar=('H', 'W'), help="default: the config's largest"
    )
    parser.add_argument('--batch', type=int, help="of training; default: the config's")
    parser.add_argument('--precision', choices=PRECISIONS, help='default: fp16, on a CPU fp32')
    parser.add_argument('--repeats', type=int, default=30, help='timed calls; default: 30')
    parser.add_argument('--warm-up', type=int, default=8, help='calls before them; default: 8')
    parser.add_argument('--device', default='cuda', choices=['cuda', 'cpu'])
    parser.add_argument(
        '--out', type=Path, default=Path('work_dirs/benchmark'), help='folder of detector.json'
    )
    return parser.parse_args()


def check_args(args: argparse.Namespace) -> None:
    """Check options and set their defaults.

    Raises:
        SetupError: An option is out of its range, or there is no GPU.
    """
    if args.device == 'cuda' and not torch.cuda.is_available():
        raise SetupError('no CUDA device: run this on a machine with one, or give --device cpu')
    if args.device == 'cpu' and args.precision == 'fp16':
        raise SetupError('--precision fp16 needs a CUDA device: on a CPU take bf16 or fp32')
    if args.repeats < 2 or args.warm_up < 1 or (args.batch is not None and args.batch < 1):
        raise SetupError('--repeats must be at least 2, --warm-up and --batch at least 1')
    check_writable('--out', args.out, folder=True)
    args.precision = args.precision or ('fp16' if args.device == 'cuda' else 'fp32')


def choose_models(args: argparse.Namespace) -> list[tuple[str, Config | None, tuple[int, int]]]:
    """Name, config and image size of each model, peers after ours; no config where a peer is absent.

    Raises:
        SetupError: A config is missing, has no model, or is no detector or segmentor.
    """
    models = []
    for path in args.configs or DEFAULT_CONFIGS:
        cfg = cli.read_config_file(path)
        if 'model' not in cfg or cfg.get('default_scope') not in ('mmdet', 'mmseg'):
            raise SetupError(f'{path} is no config of a detector (mmdet) or segmentor (mmseg)')
        if version(cfg.default_scope) is None:
            raise SetupError(f'{path} needs {cfg.default_scope}, which is not installed')
        shape = image_shape(cfg, args.shape)
        set_image_size(cfg.model, shape)
        name = Path(path).stem
        models.append((name, cfg, shape))
        for peer in args.peers:
            backbone = None if peer == 'none' else peer_backbone(peer, cfg.model.backbone)
            if backbone is None:
                if peer != 'none':
                    print(f'{path}: there is no {peer} of the size of its backbone', flush=True)
                continue
            other = None
            if peer == 'swin' or version('mmpretrain') is not None:
                other = copy.deepcopy(cfg)
                other.model.backbone = backbone
            models.append((f'{name}{WITH}{peer}', other, shape))
    return models


def main() -> None:
    """Build, time, print, write."""
    args = parse_args()
    with one_line_errors():
        check_args(args)
        import mmvig.compat  # noqa: F401  before what imports mmcv.ops

        models = choose_models(args)
    MMLogger.get_current_instance().setLevel('WARNING')  # it lists the weight decay of every parameter
    rows: list[dict] = []
    packages = ('mmengine', 'mmcv', 'mmdet', 'mmseg')
    report = {**machine(args.device, packages), 'complete': False, 'rows': rows}
    path = args.out / 'detector.json'
    print(', '.join(f'{k} {v}' for k, v in report.items() if not isinstance(v, list)), flush=True)
    for name, cfg, shape in models:
        if cfg is None:
            row = {'name': name, 'status': 'absent', 'reason': 'mmpretrain is not installed'}
        else:
            try:
                row = time_model(cfg, name, shape, args)
            except torch.cuda.OutOfMemoryError:
                row = {'name': name, 'status': 'out of memory'}
            except Exception as error:  # later rows are still worth having; the exit status tells of it
                traceback.print_exc()
                reason = f'{type(error).__name__}: {error}'[:500]
                row = {'name': name, 'status': 'failed', 'reason': reason}
        release(args.device)
        row['ratios'] = ratios(row, rows)
        rows.append(row)
        show(row)
        save(report, path)
    report['complete'] = True
    save(report, path)
    print(path)
    if any(row['status'] == 'failed' for row in rows):
        sys.exit('some models failed: their times are not reported')


if __name__ == '__main__':
    main()
