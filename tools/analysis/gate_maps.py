"""Draw what the decay gates of ViG-H or ViG do on an image: how much is kept, and for how long.

    python tools/analysis/gate_maps.py CONFIG CHECKPOINT image.jpg --out gates.png
    python tools/analysis/gate_maps.py CONFIG none image.jpg --blocks 0.1 2.4 --heads 0 --out gates.png

For each block and direction, over the image: the mean decay a = exp(logsigmoid(g) / 16), the factor on what
the state holds when the token arrives, and the memory length -1 / mean(log a): after so many such tokens
1/e of it is left. The means are over all heads and key channels, or over those chosen.

Forward runs row by row from the top left, so its state holds what is above; backward from the bottom right.
"""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib

matplotlib.use('Agg')  # a picture file, so no display is needed

import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.colors import LogNorm, Normalize
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # this checkout, installed or not

import inputs

from mmvig.backbones.base import Backbone
from mmvig.backbones.mixer import GatedTokenMixer
from mmvig.engine import cli
from mmvig.engine.errors import said_in_one_line
from mmvig.engine.images import ImageReader, as_picture, preprocess
from mmvig.engine.preflight import SetupError, one_line_errors
from mmvig.ops.bigla import GATE_NORMALIZER
from mmvig.ops.bigla.gates import log_gate

DIRECTIONS = ('forward', 'backward')
# Of the colours for decay: without it the gates of random weights, all alike, would seem to differ.
SMALLEST_SPAN = 0.01


@dataclass
class GateMaps:
    """One block on one image; both are [2, h, w], forward and backward."""

    decay: np.ndarray
    memory: np.ndarray


def parse_args() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('config', help='config file of a model with a ViGH or ViG backbone')
    parser.add_argument('checkpoint', help="checkpoint file, or 'none'")
    parser.add_argument('image', help="image file, read as the config's test pipeline does")
    parser.add_argument(
        '--blocks',
        nargs='+',
        help='ViGH: STAGE.BLOCK such as 2.4, ViG: BLOCK; default: the last of each stage or quarter',
    )
    parser.add_argument('--heads', nargs='+', type=int, help='average over these heads; default: all')
    parser.add_argument(
        '--channels', nargs='+', type=int, help='average over these key channels of a head; default: all'
    )
    inputs.add_shared_arguments(parser, "the image's own size")
    return parser.parse_args()


def mixers_of(backbone: Backbone) -> dict[str, GatedTokenMixer]:
    """The token mixers by the numbers in their names: '2.4' for stage 2, block 4, or '5' in plain ViG."""
    return {
        '.'.join(part for part in name.split('.') if part.isdigit()): module
        for name, module in backbone.named_modules()
        if isinstance(module, GatedTokenMixer)
    }


def choose_blocks(backbone: Backbone, wanted: Sequence[str] | None) -> dict[str, GatedTokenMixer]:
    """The mixers of the wanted blocks; by default of the last in each stage, or in each quarter.

    Raises:
        SetupError: A block is unknown.
    """
    mixers = mixers_of(backbone)
    names = list(mixers)
    unknown = [name for name in wanted or [] if name not in mixers]
    if unknown:
        raise SetupError(
            f'--blocks: {type(backbone).__name__} has no {", ".join(unknown)}; there is {", ".join(names)}'
        )
    if not wanted and backbone.units == 'stages':
        wanted = {name.partition('.')[0]: name for name in names}.values()
    elif not wanted:
        wanted = dict.fromkeys(names[-(-len(names) * quarter // 4) - 1] for quarter in (1, 2, 3, 4))
    return {name: mixers[name] for name in wanted}


def check_selection(
    mixers: dict[str, GatedTokenMixer], heads: Sequence[int] | None, channels: Sequence[int] | None
) -> None:
    """Check that every block has the heads and key channels.

    Raises:
        SetupError: One has not.
    """
    for name, mixer in mixers.items():
        keys = mixer.decay_up.out_features // (2 * mixer.num_heads)
        for option, wanted, number in (('heads', heads, mixer.num_heads), ('channels', channels, keys)):
            absent = [str(i) for i in wanted or [] if not 0 <= i < number]
            if absent:
                raise SetupError(
                    f'--{option} {" ".join(absent)}: block {name} has 0 to {number - 1}; choose others, '
                    'or other --blocks'
                )


def gate_maps(
    backbone: Backbone,
    image: Tensor,
    mixers: dict[str, GatedTokenMixer],
    heads: Sequence[int] | None = None,
    channels: Sequence[int] | None = None,
) -> dict[str, GateMaps]:
    """Mean decay and memory length of blocks, see above.

    Args:
        backbone: a ViGH or ViG.
        image: ``[1, C, H, W]``, normalised.
        mixers: of the blocks, by name.
        heads: to average over. Default: None, all.
        channels: key channels of each head to average over. Default: None, all.

    Returns:
        The maps by the names of ``mixers``.
    """
    grids: dict[str, torch.Size] = {}
    logits: dict[str, Tensor] = {}

    def keep(name: str, mixer: GatedTokenMixer) -> list:
        def grid(_: nn.Module, arguments: tuple[Tensor]) -> None:
            grids[name] = arguments[0].shape[1:3]

        def gates(_: nn.Module, __: tuple[Tensor], output: Tensor) -> None:
            logits[name] = output

        return [mixer.register_forward_pre_hook(grid), mixer.decay_up.register_forward_hook(gates)]

    hooks = [hook for name, mixer in mixers.items() for hook in keep(name, mixer)]
    try:
        with torch.no_grad():
            backbone(image)
    finally:
        for hook in hooks:
            hook.remove()
    return {
        name: _maps(logits[name], grids[name], mixer.num_heads, heads, channels)
        for name, mixer in mixers.items()
    }


def _maps(
    logits: Tensor,
    grid: Sequence[int],
    num_heads: int,
    heads: Sequence[int] | None,
    channels: Sequence[int] | None,
) -> GateMaps:
    """Of the packed logits [1, N, 2 * H * K] on a grid of N tokens."""
    # [N, direction, head, key channel]; in float64, as decays lie close to 1.
    logits = logits[0].cpu().double().unflatten(-1, (2, num_heads, -1))
    if heads is not None:
        logits = logits[:, :, list(heads)]
    if channels is not None:
        logits = logits[..., list(channels)]
    log_decay = (log_gate(logits) / GATE_NORMALIZER).flatten(2)  # [N, 2, chosen]
    # Of gates so open that the logarithm is zero, of either sign, the memory is infinite.
    decay, memory = log_decay.exp().mean(-1), 1 / log_decay.mean(-1).abs()
    return GateMaps(*(x.T.unflatten(-1, tuple(grid)).numpy() for x in (decay, memory)))


def draw(image: np.ndarray, maps: dict[str, GateMaps]) -> plt.Figure:
    """Draw a row a block: the image (RGB), decay forward and backward, memory forward and backward."""
    figure, axes = inputs.figure_of(len(maps), 5, image.shape[0] / image.shape[1])
    for row, (name, block) in zip(axes, maps.items(), strict=True):
        height, width = block.decay.shape[1:]
        over_image = {'extent': (0, image.shape[1], image.shape[0], 0)}
        row[0].imshow(image)
        row[0].set_ylabel(f'block {name}')
        row[0].set_xlabel(f'{height} x {width} tokens')
        middle = (block.decay.min() + block.decay.max()) / 2
        reach = max(np.ptp(block.decay), SMALLEST_SPAN) / 2
        # From one token to all: memory beyond the last token makes no difference.
        memory_scale = LogNorm(1, max(height * width, 2), clip=True)
        decay_scale = Normalize(middle - reach, middle + reach)
        for axis, decay, direction in zip(row[1:3], block.decay, DIRECTIONS, strict=True):
            drawn = axis.imshow(decay, norm=decay_scale, cmap='cividis', **over_image)
            axis.set_title(f'mean decay, {direction}', fontsize=9)
        figure.colorbar(drawn, ax=row[1:3], shrink=0.8, format='%.3f')
        for axis, memory, direction in zip(row[3:], block.memory, DIRECTIONS, strict=True):
            drawn = axis.imshow(memory, norm=memory_scale, cmap='magma', **over_image)
            axis.set_title(f'memory in tokens, {direction}', fontsize=9)
        bar = figure.colorbar(drawn, ax=row[3:], shrink=0.8)
        bar.ax.axhline(width, color='white', linewidth=1.5)  # one row of tokens
    return figure


def main() -> None:
    """Read the gates on the image, draw them, print the medians."""
    with one_line_errors():
        args = parse_args()
        inputs.check_shared_arguments(args)
        cfg = cli.read_config_file(args.config)
        inputs.check_file(args.image, 'image', 'give the path of an image')
        checkpoint = None if args.checkpoint == 'none' else args.checkpoint
        with said_in_one_line(cfg):
            backbone = inputs.load_backbone(cfg, checkpoint)
            if not isinstance(backbone, Backbone):
                raise SetupError(
                    f'{args.config} has a {type(backbone).__name__} for a backbone, without decay gates: '
                    'give a config with mmvig.ViGH or mmvig.ViG'
                )
            mixers = choose_blocks(backbone, args.blocks)
            check_selection(mixers, args.heads, args.channels)
            image = inputs.read_image(ImageReader(cfg), args.image, args.shape)
            inputs.check_image(backbone, image.shape, args.image)
            pixels = preprocess(cfg, image).to(args.device)
            maps = gate_maps(backbone.to(args.device), pixels, mixers, args.heads, args.channels)
        print(f'{"block":8}{"tokens":12}{"direction":12}{"median decay":>14}{"median memory, tokens":>24}')
        for name, block in maps.items():
            tokens = '{} x {}'.format(*block.decay.shape[1:])
            for direction, decay, memory in zip(DIRECTIONS, block.decay, block.memory, strict=True):
                print(f'{name:8}{tokens:12}{direction:12}{np.median(decay):14.4f}{np.median(memory):24.1f}')
        figure = draw(as_picture(image)[..., ::-1], maps)
        figure.suptitle(inputs.title(args.config, checkpoint).replace('\n', ', '))
        inputs.save(figure, args.out)
    print(args.out)


if __name__ == '__main__':
    main()
