"""Draw which pixels the centre of a feature map depends on: the effective receptive field.

    python tools/analysis/effective_receptive_field.py CONFIG [CHECKPOINT] --out field.png
    python tools/analysis/effective_receptive_field.py A.py a.pth B.py b.pth --images *.jpg --out field.png

The mean absolute gradient of the centre token with respect to each pixel, over images and colours (Luo et
al., "Understanding the Effective Receptive Field in Deep Convolutional Neural Networks", NIPS 2016).
What is differentiated is the sum of the token's channels with random signs, drawn anew for each image: the
plain sum would not do, as the channels that leave a LayerNorm sum to a constant.

Any backbone of feature maps can be compared: mmdet's Swin with ViG-H, trained weights with none.
"""

import argparse
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import matplotlib

matplotlib.use('Agg')  # a picture file, so no display is needed

import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.colors import LogNorm
from mmengine.config import Config
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # this checkout, installed or not

import inputs

from mmvig.engine import cli
from mmvig.engine.errors import said_in_one_line
from mmvig.engine.images import ImageReader, input_channels, preprocess
from mmvig.engine.preflight import SetupError, check_checkpoint, check_file, one_line_errors

DEFAULT_SHAPE = (224, 224)
MAX_NOISE = 100_000
SHARES = (0.2, 0.5, 0.99)
FLOOR = 1e-4  # of the peak: the darkest colour


def parse_args() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        'models',
        nargs='+',
        metavar='CONFIG [CHECKPOINT]',
        help='one or several config files, each with a checkpoint after it or without',
    )
    parser.add_argument('--stage', type=int, help='which output, of out_indices; default: the last')
    parser.add_argument(
        '--images',
        nargs='+',
        help="image files to average over, read as the config's test pipeline does; default: noise",
    )
    parser.add_argument('--noise', type=int, default=16, help='images of noise; default: %(default)s')
    inputs.add_shared_arguments(parser, '{} {}'.format(*DEFAULT_SHAPE))
    return parser.parse_args()


def effective_receptive_field(
    backbone: nn.Module, images: Iterable[Tensor], output: int = -1, seed: int = 0
) -> np.ndarray:
    """Mean absolute gradient of the centre token of one map, see above.

    Args:
        backbone: images to a sequence of maps ``[B, C, h, w]``; the centre is row h // 2, column w // 2.
        images: at least one, each ``[1, C_in, H, W]``, all of one size.
        output: which of the maps. Default: -1, the last.
        seed: of the random signs. Default: 0.

    Returns:
        ``[H, W]``, the mean over images and C_in.

    Raises:
        SetupError: The backbone has no maps, or their gradient is zero or not finite.
    """
    generator = torch.Generator().manual_seed(seed)
    fields = []
    for image in images:
        image = image.detach().requires_grad_(True)
        token = _centre(backbone, image, output)
        signs = torch.randint(2, token.shape, generator=generator) * 2 - 1
        (gradient,) = torch.autograd.grad((token * signs.to(token)).sum(), image)
        fields.append(gradient[0].abs().mean(0).double().cpu())
    field = torch.stack(fields).mean(0).numpy()
    if not (np.isfinite(field).all() and field.max() > 0):
        raise SetupError(f'the gradient of {type(backbone).__name__} is zero or not finite')
    return field


def _centre(backbone: nn.Module, image: Tensor, output: int) -> Tensor:
    """The centre token of a map, [C]."""
    maps = backbone(image)
    chosen = maps[output] if isinstance(maps, (tuple, list)) else None
    if not isinstance(chosen, Tensor) or chosen.ndim != 4:
        raise SetupError(f'{type(backbone).__name__} gives no feature maps [B, C, h, w], so has no centre')
    height, width = chosen.shape[2:]
    return chosen[0, :, height // 2, width // 2]


def area_of(field: np.ndarray, share: float) -> float:
    """The fewest pixels that hold ``share`` of the field, as a part of all; ``share`` if it is even."""
    held = np.cumsum(np.sort(field, axis=None)[::-1])
    return float(np.searchsorted(held, share * held[-1]) + 1) / field.size


def output_of(backbone: nn.Module, stage: int | None, config: str) -> int:
    """Place of a stage in the tuple that a backbone returns; -1 for none named.

    Raises:
        SetupError: It is no output of the backbone.
    """
    if stage is None:
        return -1
    known = getattr(backbone, 'out_indices', None)
    if known is None:
        raise SetupError(f'{config}: {type(backbone).__name__} has no out_indices to choose --stage from')
    if stage not in known:
        raise SetupError(
            f'--stage {stage} is no output of {config}: choose one of {", ".join(map(str, known))}, or add '
            "it to the backbone's out_indices"
        )
    return list(known).index(stage)


def pair_up(models: Sequence[str]) -> list[tuple[str, str | None]]:
    """Configs, each with the checkpoint that follows it; None for 'none' or where there is none.

    Raises:
        SetupError: A checkpoint follows no config.
    """
    pairs: list[tuple[str, str | None]] = []
    free = False  # whether the last config may still get a checkpoint
    for path in models:
        if path.endswith(cli.CONFIG_SUFFIXES):
            pairs.append((path, None))
        elif not free:
            raise SetupError(f'{path} follows no config: give CONFIG [CHECKPOINT], once or several times')
        else:
            pairs[-1] = (pairs[-1][0], None if path == 'none' else path)
        free = path.endswith(cli.CONFIG_SUFFIXES)
    return pairs


def pictures(cfg: Config, backbone: nn.Module, args: argparse.Namespace) -> Iterator[Tensor]:
    """The images, normalised as the config says, or noise; [1, C, H, W].

    Raises:
        SetupError: An image cannot be read, or the backbone takes other channels.
    """
    shape = args.shape or DEFAULT_SHAPE
    reader = ImageReader(cfg) if args.images else None
    generator = torch.Generator().manual_seed(0)
    for path in args.images or []:
        image = inputs.read_image(reader, path, shape)
        inputs.check_image(backbone, image.shape, path)
        yield preprocess(cfg, image).to(args.device)
    for _ in range(0 if args.images else args.noise):
        # Of zero mean and unit variance, as normalised images are.
        noise = torch.randn(1, input_channels(backbone), *shape, generator=generator)
        yield noise.to(args.device)


def draw(fields: dict[str, np.ndarray]) -> plt.Figure:
    """Draw fields side by side, each in parts of its peak, on one logarithmic scale of colours."""
    height, width = next(iter(fields.values())).shape
    figure, axes = inputs.figure_of(1, len(fields), height / width)
    for axis, (name, field) in zip(axes[0], fields.items(), strict=True):
        scaled = np.maximum(field / field.max(), FLOOR)
        drawn = axis.imshow(scaled, norm=LogNorm(FLOOR, 1), cmap='viridis')
        axis.set_title(name, fontsize=8)
        axis.set_xlabel(f'half of it in {area_of(field, 0.5):.1%} of the pixels', fontsize=8)
    figure.colorbar(drawn, ax=axes, label='mean |gradient|, parts of the peak', shrink=0.8)
    return figure


def main() -> None:
    """Differentiate, draw, print how concentrated each field is."""
    with one_line_errors():
        args = parse_args()
        inputs.check_shared_arguments(args)
        if not 1 <= args.noise <= MAX_NOISE:
            raise SetupError(f'--noise must be from 1 to {MAX_NOISE}, got {args.noise}')
        pairs = pair_up(args.models)
        for config, checkpoint in pairs:
            if checkpoint is not None:
                check_checkpoint(checkpoint, config)
        for path in args.images or []:
            check_file(path, 'image', 'give the path of an image')
        fields = {}
        for config, checkpoint in pairs:
            cfg = cli.read_config_file(config)
            with said_in_one_line(cfg):
                backbone = inputs.load_backbone(cfg, checkpoint).to(args.device)
                inputs.check_image(backbone, args.shape or DEFAULT_SHAPE, config)
                output = output_of(backbone, args.stage, config)
                field = effective_receptive_field(backbone, pictures(cfg, backbone, args), output)
            name = inputs.title(config, checkpoint)
            fields[name if name not in fields else f'{name} ({len(fields) + 1})'] = field
        print(f'{"the fewest pixels that hold":50}' + ''.join(f'{share:>8.0%}' for share in SHARES))
        for name, field in fields.items():
            areas = ''.join(f'{area_of(field, share):>8.1%}' for share in SHARES)
            print(f'{", ".join(name.splitlines()):50}{areas}')
        inputs.save(draw(fields), args.out)
    print(args.out)


if __name__ == '__main__':
    main()
