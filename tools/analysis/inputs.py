"""What the tools that look into a backbone share: arguments, a config's backbone, images, the picture."""

import io
import logging
import sys
from argparse import ArgumentParser
from collections.abc import Sequence
from pathlib import Path

import cv2
import matplotlib.pyplot as plt
import numpy as np
import torch
from mmengine.config import Config
from mmengine.logging import MMLogger
from mmengine.model import revert_sync_batchnorm
from mmengine.registry import MODELS
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # this checkout, installed or not

from mmvig.backbones.base import Backbone
from mmvig.engine import cli
from mmvig.engine.files import write_whole
from mmvig.engine.images import ImageReader, check_shape, input_channels
from mmvig.engine.preflight import SetupError, check_checkpoint, check_device, check_file, check_writable

PICTURES = ('.png', '.pdf', '.svg')


def add_shared_arguments(parser: ArgumentParser, default_shape: str) -> None:
    """Add ``--shape``, ``--device`` and ``--out``."""
    parser.add_argument(
        '--shape',
        nargs=2,
        type=int,
        metavar=('H', 'W'),
        help=f'size that images are scaled to cover and cropped to; default: {default_shape}',
    )
    parser.add_argument('--device', help='default: cuda:0 if there is one, else cpu')
    parser.add_argument('--out', required=True, help=f'picture to write: {", ".join(PICTURES)}')


def check_shared_arguments(args) -> None:
    """Check what :func:`add_shared_arguments` added, and choose the device where none is named.

    Raises:
        SetupError: The shape is no image, the picture has another suffix, or the device is not there.
    """
    check_shape(args.shape)
    if Path(args.out).suffix not in PICTURES:
        raise SetupError(f'--out {args.out}: it must end in {" or ".join(PICTURES)}')
    check_writable('--out', args.out)
    args.device = check_device(args.device)


def load_backbone(cfg: Config, checkpoint: str | None) -> nn.Module:
    """The backbone of a config's model, or the model itself where it is one of ours; without gradients.

    Args:
        cfg: config of a detector, segmentor, classifier or backbone.
        checkpoint: of the whole model or of its backbone, ours or official; None for the config's own
            initialisation, of which what is random is the same at each call.

    Raises:
        SetupError: There is no backbone, or weights are missing or do not fit it.
    """
    import mmvig.compat  # noqa: F401  before what imports mmcv.ops

    if 'model' not in cfg:
        raise SetupError(f'{cfg.filename} has no model, so no backbone to look into')
    if checkpoint is not None:
        check_checkpoint(checkpoint, cfg.filename)
    settings = dict(cfg.model.get('backbone', cfg.model))
    if cfg.get('default_scope'):
        settings['_scope_'] = cfg.default_scope
    torch.manual_seed(0)
    backbone = revert_sync_batchnorm(MODELS.build(settings))
    if 'backbone' not in cfg.model and not isinstance(backbone, Backbone):
        raise SetupError(f'the model of {cfg.filename}, a {type(backbone).__name__}, has no backbone')
    if checkpoint is not None:
        cli.load_strictly(backbone, checkpoint, prefix=None)
    else:
        MMLogger.get_instance('mmvig.analysis').setLevel(logging.WARNING)  # a line a parameter otherwise
        try:
            backbone.init_weights()
        except (OSError, RuntimeError) as error:
            raise SetupError(
                f'the weights that {cfg.filename} starts from cannot be loaded: {error}; give a checkpoint'
            ) from error
    backbone.train(False)  # returns None in mmdet's Swin
    return backbone.requires_grad_(False)


def check_image(backbone: nn.Module, shape: tuple[int, ...], path: str) -> None:
    """Check that a backbone takes an image: its channels, and for a backbone of ours its size.

    Args:
        backbone: any.
        shape: ``[H, W]`` or ``[H, W, C]``; the channels of the former are not looked at.
        path: of what has this shape.

    Raises:
        SetupError: It does not.
    """
    name = type(backbone).__name__
    if isinstance(backbone, Backbone) and min(shape[:2]) < backbone.min_side:
        raise SetupError(
            f'{path}: {name} takes image sides from {backbone.min_side} on, got {shape[0]} x {shape[1]}; '
            'give a larger --shape'
        )
    if tuple(shape[2:]) not in ((), (input_channels(backbone),)):
        raise SetupError(
            f'{path} has {shape[2]} channels as the test pipeline loads it, and {name} takes '
            f'{input_channels(backbone)}: set another color_type in the pipeline, or in_channels'
        )


def read_image(reader: ImageReader, path: str, shape: Sequence[int] | None) -> np.ndarray:
    """An image [H, W, C] as the test pipeline loads it; with a shape, scaled to cover it and cropped.

    Raises:
        SetupError: It is missing, or cannot be read.
    """
    check_file(path, 'image', 'give the path of an image')
    image = np.atleast_3d(reader.load(path))
    if shape is None:
        return image
    if image.dtype not in (np.uint8, np.uint16, np.float32, np.float64):  # all that OpenCV resizes
        image = image.astype(np.float32)
    scale = max(new / old for new, old in zip(shape, image.shape[:2], strict=True))
    height, width = (max(new, round(old * scale)) for new, old in zip(shape, image.shape[:2], strict=True))
    # Averages pixels on the way down, where interpolating would skip some.
    method = cv2.INTER_AREA if scale < 1 else cv2.INTER_LINEAR
    # One by one, as OpenCV averages four channels at most.
    channels = [cv2.resize(channel, (width, height), interpolation=method) for channel in cv2.split(image)]
    image = np.stack(channels, axis=-1)
    top, left = (height - shape[0]) // 2, (width - shape[1]) // 2
    return image[top : top + shape[0], left : left + shape[1]]


def title(config: str, checkpoint: str | None) -> str:
    """What a picture calls a model."""
    return f'{Path(config).stem}\n{Path(checkpoint).name if checkpoint else "no checkpoint"}'


def figure_of(rows: int, columns: int, aspect: float) -> tuple[plt.Figure, np.ndarray]:
    """A figure and its [rows, columns] axes for pictures of this height by width, without ticks."""
    width = 3.2
    figure, axes = plt.subplots(
        rows,
        columns,
        squeeze=False,
        layout='constrained',
        figsize=(width * columns, (width * min(max(aspect, 1 / 3), 3) + 0.6) * rows),
    )
    for axis in axes.flat:
        axis.set_xticks([])
        axis.set_yticks([])
    return figure, axes


def save(figure: plt.Figure, out: str) -> None:
    """Write the picture, whole or not at all.

    Raises:
        SetupError: It cannot be written.
    """
    buffer = io.BytesIO()
    figure.savefig(buffer, format=Path(out).suffix[1:], dpi=150)
    plt.close(figure)
    write_whole(out, buffer.getvalue())
