"""Count the parameters and multiply-adds of a config's model: in all, and of its backbone, neck and heads.

Counted are convolutions, matrix products and BiGLA; norms, activations, gates and resizing are not. BiGLA
is counted by its definition, whichever backend would run: per token and head, 2 directions * 2 * K * V, for
the update of the state by k v^T and for its reading by q; the decay of the state is not counted. That is
the convention of the published figures: by it ViG-H-T/S/B have 4.49 / 8.75 / 15.56 G at 224 x 224, and
ViG-T/S/B 1.17 / 4.48 / 17.55 G.

A detector is counted as mmdet counts Mask R-CNN: every proposal (1000 with our configs at 800 x 1280)
passes the box head, the first 100 the mask head; in a cascade each of its heads. A segmentor's auxiliary
head, for training alone, counts nothing. Of deformable attention the projections count, the sampling does
not.
"""

import argparse
import inspect
import sys
from pathlib import Path
from unittest import mock

import torch
from mmengine.config import Config
from mmengine.model import BaseModel, revert_sync_batchnorm
from mmengine.registry import init_default_scope
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # this checkout, installed or not

from mmvig.backbones.layers import use_any_device
from mmvig.engine import cli
from mmvig.engine.errors import said_in_one_line
from mmvig.engine.images import check_shape, input_channels
from mmvig.engine.preflight import SetupError, one_line_errors

# Image sizes of published figures, by a config's default scope.
SHAPES = {'mmdet': (800, 1280), 'mmseg': (512, 2048)}
DEFAULT_SHAPE = (224, 224)


def parse_args() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('config', help='config file')
    parser.add_argument(
        '--shape',
        nargs=2,
        type=int,
        metavar=('H', 'W'),
        help='image size; default: 800 1280 for detectors, 512 2048 for segmentors, else 224 224',
    )
    return parser.parse_args()


def no_bigla(qkv: Tensor, gates: Tensor, num_heads: int) -> Tensor:
    """[B, N, H * (2 K + V)] and [B, N, 2 * H * K] -> zeros [B, N, H * V]."""
    return qkv.new_zeros(*qkv.shape[:2], qkv.shape[2] - gates.shape[2])


# Stands for BiGLA while counting: one operator with the right shapes, which computes nothing. Registered
# once a process, however often this file is imported: after a second time, the first's calls do not count.
if not hasattr(torch.ops.mmvig_get_flops, 'bigla'):
    torch.library.custom_op('mmvig_get_flops::bigla', no_bigla, mutates_args=())


def bigla_flops(qkv: torch.Size, gates: torch.Size, num_heads: int, out_shape: torch.Size) -> int:
    """Twice the multiply-adds, as torch counts: 2 directions * 2 * K * V of them per token and head."""
    batch, tokens, values = out_shape
    return 2 * batch * tokens * 4 * (gates[2] // 2 // num_heads) * values


def count(model: nn.Module, *inputs, **options) -> dict[str, dict[str, int]]:
    """Count ``model(*inputs, **options)``.

    Returns:
        ``params`` and ``macs`` (multiply-adds) of each direct submodule with parameters, and of 'total'.
    """

    def stand_in(qkv: Tensor, gates: Tensor, num_heads: int, backend: str) -> Tensor:
        return torch.ops.mmvig_get_flops.bigla(qkv, gates, num_heads)

    formulas = {torch.ops.mmvig_get_flops.bigla: bigla_flops}
    with (
        torch.no_grad(),
        mock.patch('mmvig.backbones.mixer.bigla_packed', stand_in),
        FlopCounterMode(display=False, custom_mapping=formulas) as counter,
    ):
        model(*inputs, **options)
    counts = {name: sum(by_operator.values()) for name, by_operator in counter.flop_counts.items()}
    rows = {}
    for name, module in [*model.named_children(), ('total', model)]:
        path = 'Global' if module is model else f'{type(model).__name__}.{name}'
        params = sum(parameter.numel() for parameter in module.parameters())
        if params:
            rows[name] = {'params': params, 'macs': _within(module, path, counts) // 2}
    return rows


def _within(module: nn.Module, path: str, counts: dict[str, int]) -> int:
    """Count of a module: of its calls, or of its parts' calls where only its ``forward`` is called."""
    parts = [_within(child, f'{path}.{name}', counts) for name, child in module.named_children()]
    return max(counts.get(path, 0), sum(parts))


def count_config(path: str, shape: tuple[int, int] | None = None) -> tuple[dict, tuple[int, int]]:
    """Build a config's model and count it on one image.

    Returns:
        What :func:`count` returns, and the image's height and width.

    Raises:
        SetupError: The config is missing or has no model, or the shape is no image.
    """
    cfg = cli.read_config_file(path)
    if 'model' not in cfg:
        raise SetupError(f'{path} has no model to count')
    scope = cfg.get('default_scope')
    check_shape(shape)
    shape = tuple(shape or SHAPES.get(scope, DEFAULT_SHAPE))
    with said_in_one_line(cfg):
        return _count_model(cfg, shape), shape


def _count_model(cfg: Config, shape: tuple[int, int]) -> dict:
    import mmvig.compat  # noqa: F401  before what imports mmcv.ops

    scope = cfg.get('default_scope')
    if scope:
        init_default_scope(scope)
    model = revert_sync_batchnorm(cli.build_model(cfg)).eval()
    use_any_device(model)
    if hasattr(model, 'roi_head'):
        _use_usual_regions(model)
    options = {'mode': 'tensor'} if isinstance(model, BaseModel) else {}
    if scope == 'mmseg' and 'batch_data_samples' in inspect.signature(model.decode_head.forward).parameters:
        options['mode'] = 'predict'  # a head of mmdet's, which mmseg calls with samples in this mode alone
    if scope == 'mmdet':
        from mmdet.structures import DetDataSample

        meta = {name: shape for name in ('img_shape', 'ori_shape', 'pad_shape', 'batch_input_shape')}
        options['data_samples'] = [DetDataSample(metainfo={**meta, 'scale_factor': (1.0, 1.0)})]
    return count(model, torch.zeros(1, input_channels(model), *shape), **options)


def _use_usual_regions(model: nn.Module) -> None:
    """As many proposals as may be, whatever untrained weights make of them, and masks of the first 100."""
    if getattr(model.rpn_head, 'test_cfg', None):
        model.rpn_head.test_cfg.nms.iou_threshold = 1.0  # none gives way to another
        model.rpn_head.test_cfg.min_bbox_size = -1  # nor to the border
    head = model.roi_head
    if not isinstance(getattr(head, 'mask_head', None), nn.ModuleList):
        return  # not a cascade: mmdet takes 100 by itself
    mask_forward = head._mask_forward

    def of_the_first(stage: int, x: tuple[Tensor, ...], rois: Tensor) -> dict:
        results = mask_forward(stage, x, rois[:100])
        masks = results['mask_preds']
        return {**results, 'mask_preds': masks.new_zeros(len(rois), *masks.shape[1:])}

    head._mask_forward = of_the_first


def main() -> None:
    """Count and print a table."""
    with one_line_errors():
        args = parse_args()
        rows, (height, width) = count_config(args.config, args.shape)
    print(f'{args.config}, one image of {height} x {width}')
    print(f'{"":20}{"parameters":>14}{"multiply-adds":>16}')
    for name, row in rows.items():
        print(f'{name:20}{row["params"] / 1e6:12.2f} M{row["macs"] / 1e9:14.2f} G')


if __name__ == '__main__':
    main()
