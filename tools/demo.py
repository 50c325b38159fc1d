"""Draw a model's predictions: boxes and masks, or the label map over the image."""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

import cv2
import torch
from mmengine.config import Config
from numpy import ndarray

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # this checkout, installed or not

from mmvig.engine import cli, preflight

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
        '--score-thr', type=float, default=0.3, help='draw boxes from this score on; default: 0.3'
    )
    parser.add_argument(
        '--palette',
        choices=['coco', 'voc', 'citys', 'random'],
        help="detection: colours of the classes; default: the checkpoint's data set's",
    )
    return parser.parse_args()


def find_images(paths: list[str], out_dir: Path) -> dict[Path, Path]:
    """Expand folders to the images in them, by name, and give each its output path.

    Raises:
        SetupError: A path is missing, no image or a folder without, or an output is not free.
    """
    outputs = {}
    for path in map(Path, paths):
        found = [path]
        if path.is_dir():
            found = sorted(p for p in path.iterdir() if p.suffix.lower() in IMAGE_SUFFIXES)
            if not found:
                raise preflight.SetupError(f'folder {path} holds no images')
        for image in found:
            preflight.check_file(str(image), 'image', 'give the path of an image or a folder')
            if not cv2.haveImageReader(str(image)):
                raise preflight.SetupError(f'{image} is no image that OpenCV can read')
            output = out_dir / image.name
            if output in outputs.values() or output.resolve() == image.resolve():
                raise preflight.SetupError(f'{output} would be overwritten: choose other --out-dir')
            outputs[image] = output
    return outputs


def detection_painter(cfg: Config, args: argparse.Namespace) -> Callable[[ndarray, Path], None]:
    """A function that finds objects in an image (BGR) and saves it with boxes and masks."""
    from mmdet.apis import inference_detector, init_detector
    from mmdet.registry import VISUALIZERS

    model = init_detector(cfg, args.checkpoint, args.palette or 'none', args.device)
    cli.load_strictly(model, args.checkpoint)  # mmdet only warns of what does not match
    visualizer = VISUALIZERS.build({**cfg.visualizer, 'vis_backends': None})
    visualizer.dataset_meta = model.dataset_meta

    def paint(image: ndarray, output: Path) -> None:
        visualizer.add_datasample(
            output.name,
            image[..., ::-1],
            inference_detector(model, image),
            draw_gt=False,
            pred_score_thr=args.score_thr,
            out_file=str(output),
        )

    return paint


def segmentation_painter(cfg: Config, args: argparse.Namespace) -> Callable[[ndarray, Path], None]:
    """A function that labels an image (BGR) and saves it with the label map blended in."""
    from mmseg.apis import inference_model, init_model, show_result_pyplot

    model = init_model(cfg, args.checkpoint, args.device)
    cli.load_strictly(model, args.checkpoint)  # mmseg only warns of what does not match

    def paint(image: ndarray, output: Path) -> None:
        show_result_pyplot(
            model,
            image[..., ::-1],
            inference_model(model, image),
            draw_gt=False,
            show=False,
            out_file=str(output),
        )

    return paint


PAINTERS = {'mmdet': detection_painter, 'mmseg': segmentation_painter}


def main() -> None:
    """Check the files, save each image with its predictions and print where."""
    with preflight.one_line_errors():
        args = parse_args()
        cli.log_own_messages()  # before the config, whose custom_imports may have something to say
        cfg = cli.read_config_file(args.config)
        if cfg.get('default_scope') not in PAINTERS:
            raise preflight.SetupError(f'{args.config} is no detection or segmentation config')
        preflight.check_checkpoint(args.checkpoint, args.config)
        outputs = find_images(args.images, Path(args.out_dir))

        import mmvig.compat  # noqa: F401  before what imports mmcv.ops

        args.device = args.device or ('cuda:0' if torch.cuda.is_available() else 'cpu')
        paint = PAINTERS[cfg.default_scope](cfg, args)
        for path, output in outputs.items():
            paint(cv2.imread(str(path)), output)
            print(output)


if __name__ == '__main__':
    main()
