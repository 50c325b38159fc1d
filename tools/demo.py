"""Draw a model's predictions: boxes and masks, or the label map over the image."""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

import cv2
import torch
from mmengine.config import Config
from mmengine.model import revert_sync_batchnorm
from mmengine.registry import init_default_scope
from mmengine.structures import BaseDataElement
from numpy import ndarray
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # this checkout, installed or not

from mmvig.engine import classes, cli, preflight
from mmvig.engine.errors import reason, said_in_one_line
from mmvig.engine.images import ImageReader, as_picture, input_channels
from mmvig.engine.preflight import SetupError

Painter = Callable[[ndarray, BaseDataElement, Path], None]  # image [H, W, 3] in RGB, result, where to
IMAGE_SUFFIXES = {'.bmp', '.jpeg', '.jpg', '.png', '.ppm', '.tif', '.tiff', '.webp'}


def parse_args() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('config', help='config file of a detection or segmentation model')
    parser.add_argument('checkpoint', help='checkpoint file')
    parser.add_argument('images', nargs='+', help='image files, or folders of images')
    parser.add_argument('--out-dir', default='work_dirs/demo', help='default: %(default)s')
    parser.add_argument('--device', help='default: cuda:0 if there is one, else cpu')
    parser.add_argument(
        '--score-thr', type=float, help='detection: draw boxes from this score on; default: 0.3'
    )
    parser.add_argument(
        '--palette',
        choices=['coco', 'voc', 'citys', 'random'],
        help="detection: colours of the classes; default: the checkpoint's data set's",
    )
    cli.add_trust_argument(parser)
    return parser.parse_args()


def check_arguments(args: argparse.Namespace) -> None:
    """Check what needs neither the config nor a model, and choose the device where none is named.

    Raises:
        SetupError: A score is none, the device is not there, or the folder cannot be written to.
    """
    if args.score_thr is not None and not 0 <= args.score_thr <= 1:
        raise SetupError(f'--score-thr must be from 0 to 1, got {args.score_thr}')
    preflight.check_writable('--out-dir', args.out_dir, folder=True)
    args.device = preflight.check_device(args.device)


def find_images(paths: list[str], out_dir: Path) -> dict[Path, Path]:
    """Expand folders to the images in them, by name, and give each its output path.

    Raises:
        SetupError: A path is missing, no image is in a folder, or an output is not free.
    """
    outputs: dict[Path, Path] = {}
    for path in map(Path, paths):
        found = [path]
        if path.is_dir():
            found = sorted(p for p in path.iterdir() if p.suffix.lower() in IMAGE_SUFFIXES)
            if not found:
                raise SetupError(f'folder {path} holds no images')
        for image in found:
            preflight.check_file(str(image), 'image', 'give the path of an image or a folder')
            written = cv2.haveImageWriter(image.name)
            output = out_dir / (image.name if written else f'{image.name}.png')
            if output in outputs.values() or output.resolve() == image.resolve():
                raise SetupError(f'{output} would be overwritten: choose other --out-dir')
            preflight.check_writable('--out-dir: picture', output)
            outputs[image] = output
    return outputs


def build_model(cfg: Config, args: argparse.Namespace) -> nn.Module:
    """The config's model with the checkpoint's weights, and the names and colours of its classes.

    Raises:
        SetupError: The checkpoint does not fit, or the names are others than the model's classes.
    """
    init_default_scope(cfg.default_scope)
    model = revert_sync_batchnorm(cli.build_model(cfg))
    cli.load_strictly(model, args.checkpoint)
    model.dataset_meta = classes.shown(cfg, args.checkpoint)
    classes.check_heads(cfg, model.dataset_meta['classes'], 'the names of classes')
    return model.to(args.device).eval()


def detection_painter(model: nn.Module, cfg: Config, args: argparse.Namespace) -> Painter:
    """A function that saves an image with boxes and masks."""
    from mmdet.registry import VISUALIZERS

    visualizer = VISUALIZERS.build(
        {'type': 'DetLocalVisualizer', **cfg.get('visualizer', {}), 'vis_backends': None}
    )
    threshold = 0.3 if args.score_thr is None else args.score_thr
    palette = args.palette or model.dataset_meta.get('palette') or 'random'
    visualizer.dataset_meta = {**model.dataset_meta, 'palette': palette}

    def paint(image: ndarray, result: BaseDataElement, output: Path) -> None:
        visualizer.add_datasample(
            output.name, image, result, draw_gt=False, pred_score_thr=threshold, out_file=str(output)
        )

    return paint


def segmentation_painter(model: nn.Module, *_) -> Painter:
    """A function that saves an image with the label map blended in."""
    from mmseg.apis import show_result_pyplot

    def paint(image: ndarray, result: BaseDataElement, output: Path) -> None:
        show_result_pyplot(model, image, result, draw_gt=False, show=False, out_file=str(output))

    return paint


PAINTERS = {'mmdet': detection_painter, 'mmseg': segmentation_painter}


def draw(path: Path, output: Path, model: nn.Module, reader: ImageReader, paint: Painter) -> None:
    """Save one image with its predictions.

    Raises:
        SetupError: The image cannot be read, the model does not take it, or it cannot be written.
    """
    image, batch = reader.prepare(str(path))
    found, taken = batch['inputs'][0].shape[0], input_channels(model)
    if found != taken:
        raise SetupError(
            f'{path} has {found} channels as the test pipeline loads it, the model takes {taken}'
        )
    try:
        with torch.no_grad():
            (result,) = model.test_step(batch)
    except (ValueError, torch.cuda.OutOfMemoryError) as error:  # as our backbones refuse too small images
        raise SetupError(f'{path} is not taken by the model: {reason(error)}') from error
    try:
        paint(as_picture(image)[..., ::-1], result, output)
    except OSError as error:
        raise SetupError(f'{output} cannot be written: {error}') from error


def main() -> None:
    """Check the files, save each image with its predictions and print where."""
    with preflight.one_line_errors():
        args = parse_args()
        cli.log_own_messages()  # before the config, whose custom_imports may have something to say
        check_arguments(args)
        cli.trust_checkpoints(args)
        cfg = cli.read_config_file(args.config)
        if cfg.get('default_scope') not in PAINTERS:
            raise SetupError(f'{args.config} is no detection or segmentation config')
        if cfg.default_scope == 'mmseg' and (args.palette or args.score_thr is not None):
            raise SetupError(
                f'--palette and --score-thr are for detection, {args.config} is for segmentation'
            )
        if 'model' not in cfg:
            raise SetupError(f'{args.config} has no model')
        preflight.check_checkpoint(args.checkpoint, args.config)
        outputs = find_images(args.images, Path(args.out_dir))

        import mmvig.compat  # noqa: F401  before what imports mmcv.ops

        with said_in_one_line(cfg):
            reader = ImageReader(cfg)
            model = build_model(cfg, args)
            paint = PAINTERS[cfg.default_scope](model, cfg, args)
        failed = 0
        for path, output in outputs.items():
            try:
                draw(path, output, model, reader, paint)
            except SetupError as error:  # the other images are still drawn
                print(f'error: {error}', file=sys.stderr)
                failed += 1
            else:
                print(output)
        if failed:
            raise SetupError(f'{failed} of {len(outputs)} images were not drawn, see above')


if __name__ == '__main__':
    main()
