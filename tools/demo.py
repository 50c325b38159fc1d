"""Draw a model's predictions on pictures and videos: boxes and masks, a label map, or a class."""

import argparse
import logging
import sys
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import cv2
import mmcv
import torch
from mmengine.config import Config
from mmengine.model import revert_sync_batchnorm
from mmengine.registry import init_default_scope
from mmengine.structures import BaseDataElement
from numpy import ascontiguousarray, ndarray
from rich.console import Console
from rich.progress import track
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # this checkout, installed or not

from mmvig.engine import classes, cli, preflight
from mmvig.engine.errors import reason, said_in_one_line
from mmvig.engine.images import ImageReader, as_picture, input_channels
from mmvig.engine.preflight import SetupError

logger = logging.getLogger('mmvig.demo')

Painter = Callable[[ndarray, BaseDataElement], ndarray]  # [H, W, 3] in RGB, result -> drawn, likewise
Predictor = Callable[[Path], ndarray]  # an image file -> drawn, [H, W, 3] in BGR
IMAGE_SUFFIXES = {'.bmp', '.jpeg', '.jpg', '.pgm', '.png', '.ppm', '.tif', '.tiff', '.webp'}
VIDEO_SUFFIXES = {'.avi', '.m4v', '.mkv', '.mov', '.mp4', '.mpeg', '.mpg', '.webm', '.wmv'}


def parse_args() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('config', help='config file of a detection, segmentation or classification model')
    parser.add_argument('checkpoint', help='checkpoint file')
    parser.add_argument('inputs', nargs='+', help='pictures, videos, or folders of them')
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


def is_video(path: Path) -> bool:
    """Whether a file is to be read as a video: its name says so."""
    return path.suffix.lower() in VIDEO_SUFFIXES


def find_inputs(paths: list[str], out_dir: Path) -> dict[Path, Path]:
    """Expand folders to the pictures and videos in them, by name, and give each its output path.

    Raises:
        SetupError: A path is missing, a folder has neither, or an output is not free.
    """
    outputs: dict[Path, Path] = {}
    for path in map(Path, paths):
        if path.is_dir():
            found = sorted(p for p in path.iterdir() if p.suffix.lower() in IMAGE_SUFFIXES | VIDEO_SUFFIXES)
            if not found:
                raise SetupError(f'folder {path} holds no images or videos')
        else:
            found = [path]
            preflight.check_file(str(path), 'image or video', 'give the path of one, or of a folder')
        for source in found:
            written = source.suffix == '.mp4' if is_video(source) else cv2.haveImageWriter(source.name)
            suffix = '' if written else '.mp4' if is_video(source) else '.png'
            output = out_dir / f'{source.name}{suffix}'
            if output in outputs.values() or output.resolve() == source.resolve():
                raise SetupError(f'{output} would be overwritten: choose other --out-dir')
            preflight.check_writable('--out-dir: result', output)
            outputs[source] = output
    return outputs


def open_video(path: Path) -> mmcv.VideoReader:
    """A video, of which at least one frame can be read.

    Raises:
        SetupError: None can.
    """
    video = mmcv.VideoReader(str(path)) if path.is_file() else None
    if video is None or not video.opened or not video.fps > 0 or video.read() is None:
        raise SetupError(f'{path} cannot be read as a video: OpenCV finds no frames in it')
    return mmcv.VideoReader(str(path))  # from its start


def check_readable(inputs: Iterable[Path], reader: ImageReader) -> None:
    """Read until something can be read, as a model is not worth building for nothing.

    Raises:
        SetupError: Nothing can be read.
    """
    errors = []
    for path in inputs:
        try:
            open_video(path) if is_video(path) else reader.load(str(path))
        except SetupError as error:
            errors.append(str(error))
        else:
            return
    for error in errors[:-1]:
        print(f'error: {error}', file=sys.stderr)
    raise SetupError(errors[-1])


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
    """A function that draws boxes and masks."""
    from mmdet.registry import VISUALIZERS

    visualizer = VISUALIZERS.build(
        {'type': 'DetLocalVisualizer', **cfg.get('visualizer', {}), 'vis_backends': None}
    )
    threshold = 0.3 if args.score_thr is None else args.score_thr
    palette = args.palette or model.dataset_meta.get('palette') or 'random'
    visualizer.dataset_meta = {**model.dataset_meta, 'palette': palette}

    def paint(image: ndarray, result: BaseDataElement) -> ndarray:
        visualizer.add_datasample('', image, result, draw_gt=False, pred_score_thr=threshold)
        return visualizer.get_image()

    return paint


def segmentation_painter(model: nn.Module, *_) -> Painter:
    """A function that blends the label map in."""
    from mmseg.apis import show_result_pyplot

    return partial(show_result_pyplot, model, draw_gt=False, show=False)


def classification_painter(model: nn.Module, cfg: Config, _) -> Painter:
    """A function that writes the likeliest class and its score."""
    from mmpretrain.registry import VISUALIZERS

    visualizer = VISUALIZERS.build(
        {'type': 'UniversalVisualizer', **cfg.get('visualizer', {}), 'vis_backends': None}
    )
    return partial(visualizer.visualize_cls, classes=model.dataset_meta['classes'], draw_gt=False)


PAINTERS = {'mmdet': detection_painter, 'mmseg': segmentation_painter, 'mmpretrain': classification_painter}


def predict(path: Path, model: nn.Module, reader: ImageReader, paint: Painter) -> ndarray:
    """One image with its predictions, [H, W, 3] in BGR.

    Raises:
        SetupError: The image cannot be read, or the model does not take it.
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
    return ascontiguousarray(paint(as_picture(image)[..., ::-1], result)[..., ::-1])


def save(image: ndarray, output: Path) -> None:
    """Write an image [H, W, 3] in BGR.

    Raises:
        SetupError: It cannot be written.
    """
    try:
        mmcv.imwrite(image, str(output))
    except OSError as error:
        raise SetupError(f'{output} cannot be written: {error}') from error


def draw_image(path: Path, output: Path, predictor: Predictor) -> None:
    """Save one image with its predictions.

    Raises:
        SetupError: As :func:`predict` and :func:`save`.
    """
    save(predictor(path), output)


def draw_video(path: Path, output: Path, predictor: Predictor) -> None:
    """Save a video with the predictions of each frame, at the same rate, as MPEG-4 without sound.

    Raises:
        SetupError: As :func:`predict` and :func:`save`, it has no frame, or the video cannot be written.
    """
    video, writer, count = open_video(path), cv2.VideoWriter(), 0
    output.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory() as folder:  # each frame as a file, which the test pipeline reads as any other
        still = Path(folder, 'frame.bmp')
        try:
            frames = (frame for frame in video)  # whose len() is below 0 where the file does not say it
            for frame in track(frames, path.name, max(0, video.frame_cnt), console=Console(stderr=True)):
                save(frame, still)
                drawn = predictor(still)
                start = str(output), cv2.VideoWriter_fourcc(*'mp4v'), video.fps, drawn.shape[1::-1]
                if not count and not writer.open(*start):
                    raise SetupError(f'{output} cannot be written: OpenCV opens no MPEG-4 file there')
                writer.write(drawn)
                count += 1
        except SetupError as error:
            raise SetupError(str(error).replace(str(still), f'{path}, frame {count + 1},')) from error
        finally:
            writer.release()
    written = mmcv.VideoReader(str(output)).frame_cnt if output.is_file() else 0
    if written != count:  # OpenCV does not say when it cannot write
        raise SetupError(f'{output} cannot be written: it has {written} of {count} frames')
    if count < video.frame_cnt:
        logger.warning('%s: %d of %d frames could be read.', path, count, video.frame_cnt)


def main() -> None:
    """Check the files, save each picture or video with its predictions and print where."""
    with preflight.one_line_errors():
        args = parse_args()
        cli.log_own_messages()  # before the config, whose custom_imports may have something to say
        check_arguments(args)
        cli.trust_checkpoints(args)
        cfg = cli.read_config_file(args.config)
        if cfg.get('default_scope') not in PAINTERS:
            raise SetupError(f'{args.config} is no detection, segmentation or classification config')
        if cfg.default_scope != 'mmdet' and (args.palette or args.score_thr is not None):
            raise SetupError(
                f'--palette and --score-thr are for detection, {args.config} is for another task'
            )
        if 'model' not in cfg:
            raise SetupError(f'{args.config} has no model')
        preflight.check_checkpoint(args.checkpoint, args.config)
        outputs = find_inputs(args.inputs, Path(args.out_dir))

        import mmvig.compat  # noqa: F401  before what imports mmcv.ops

        with said_in_one_line(cfg):
            reader = ImageReader(cfg)
            check_readable(outputs, reader)
            model = build_model(cfg, args)
            paint = PAINTERS[cfg.default_scope](model, cfg, args)
            predictor = partial(predict, model=model, reader=reader, paint=paint)
        failed = 0
        for path, output in outputs.items():
            try:
                (draw_video if is_video(path) else draw_image)(path, output, predictor)
            except SetupError as error:  # the others are still drawn
                print(f'error: {error}', file=sys.stderr)
                failed += 1
            else:
                print(output)
        if failed:
            raise SetupError(f'{failed} of {len(outputs)} inputs were not drawn, see above')


if __name__ == '__main__':
    main()
