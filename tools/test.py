"""Evaluate a checkpoint with its config: detection, segmentation or classification."""

import argparse
import logging
import math
import os
import sys
from pathlib import Path

from mmengine.config import Config, ConfigDict

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # this checkout, installed or not

from mmvig.engine import cli, errors, preflight

logger = logging.getLogger('mmvig.test')


def parse_args() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('config', help='config file')
    parser.add_argument('checkpoint', help='checkpoint file')
    parser.add_argument(
        '--out',
        help='save the predictions: a .pkl file, or for segmentation a folder of label PNGs',
    )
    parser.add_argument('--show', action='store_true', help='show each prediction in a window')
    parser.add_argument('--show-dir', help='save a picture of each prediction in this folder')
    parser.add_argument(
        '--wait-time', type=float, default=2, help='seconds that --show shows each; default: 2'
    )
    parser.add_argument(
        '--tta', action='store_true', help="test-time augmentation by the config's tta_model"
    )
    cli.add_shared_arguments(parser)
    return parser.parse_args()


def check_arguments(args: argparse.Namespace) -> None:
    """Check what needs no config: a test may take hours before it writes or shows anything.

    Raises:
        SetupError: There is nothing to show on, a time is none, or a folder cannot be written to.
    """
    if args.show and sys.platform == 'linux' and not {'DISPLAY', 'WAYLAND_DISPLAY'} & os.environ.keys():
        raise preflight.SetupError(
            '--show needs a display, and DISPLAY is not set; --show-dir saves pictures'
        )
    if not 0 <= args.wait_time < math.inf:
        raise preflight.SetupError(f'--wait-time must be seconds from 0 on, got {args.wait_time}')
    if args.show_dir:
        preflight.check_writable('--show-dir', args.show_dir, folder=True)


def evaluators(cfg: Config) -> list[ConfigDict]:
    """The test evaluators; a config may have one or a list."""
    several = isinstance(cfg.test_evaluator, (list, tuple))
    return list(cfg.test_evaluator) if several else [cfg.test_evaluator]


def use_visualization(cfg: Config, args: argparse.Namespace) -> None:
    """Have the config's visualisation hook show or save the predictions, library by library."""
    hook = cfg.get('default_hooks', {}).get('visualization')
    if hook is None:
        raise preflight.SetupError(
            f'--show and --show-dir need default_hooks.visualization, which {cfg.filename} lacks'
        )
    folder = str(Path(args.show_dir).absolute()) if args.show_dir else None
    if args.show:
        hook.update(show=True, wait_time=args.wait_time)
    if cfg.default_scope == 'mmpretrain':
        hook.update(enable=True, interval=1, out_dir=folder)
    elif cfg.default_scope == 'mmdet':
        hook.update(draw=True, test_out_dir=folder)
    else:
        hook.update(draw=True, interval=1)  # upstream's mmseg would draw each 50th image only
        if folder:
            cfg.visualizer.save_dir = folder


def use_tta(cfg: Config) -> None:
    """Wrap the model and the test pipeline into the config's test-time augmentation."""
    for key in ('tta_model', 'tta_pipeline'):
        if cfg.get(key) is None:
            raise preflight.SetupError(f'--tta needs a {key}, which {cfg.filename} lacks')
    if cfg.model.get('roi_head', {}).get('mask_head'):
        logger.warning('--tta: mmdet merges boxes, not masks, so boxes alone are evaluated.')
        for metric in evaluators(cfg):
            if 'segm' in metric.get('metric', ()):
                metric.metric = 'bbox'
    cfg.model = ConfigDict(**cfg.tta_model, module=cfg.model)
    dataset = cfg.test_dataloader.dataset
    while 'dataset' in dataset:
        dataset = dataset.dataset
    dataset.pipeline = cfg.tta_pipeline


def use_out(cfg: Config, out: str) -> None:
    """Have the predictions saved beside the evaluation, as the task's library saves them."""
    if cfg.default_scope == 'mmseg':
        preflight.check_writable('--out', out, folder=True)
        for metric in evaluators(cfg):
            metric.output_dir = out
    elif not out.endswith(('.pkl', '.pickle')):
        raise preflight.SetupError(f'--out {out}: predictions are saved as a .pkl file')
    else:
        preflight.check_writable('--out', out)
        kind = 'DumpDetResults' if cfg.default_scope == 'mmdet' else 'DumpResults'
        cfg.test_evaluator = [*evaluators(cfg), dict(type=kind, out_file_path=out)]


def main() -> None:
    """Read the config, check its files and test."""
    with preflight.one_line_errors():
        args = parse_args()
        check_arguments(args)
        cfg = cli.load_config(args)
        cli.use_expandable_segments()
        preflight.check_writable('--work-dir', cfg.work_dir, folder=True)
        cfg.load_from = args.checkpoint
    with errors.said_in_one_line(cfg):
        preflight.check_testing(cfg)
        if args.show or args.show_dir:
            use_visualization(cfg, args)
        if args.tta:
            use_tta(cfg)
        if args.out is not None:
            use_out(cfg, args.out)
        cfg.load_from = None  # mmengine only warns of what does not match, and would then evaluate it
        runner = cli.build_runner(cfg)
        model = cli.load_strictly(runner.model, args.checkpoint)
        if args.tta and hasattr(model, 'roi_head'):
            model.roi_head.mask_head = None  # after loading: the checkpoint has one
        runner.test()
    for what, where in (('Predictions', args.out), ('Pictures', args.show_dir)):
        if where:
            logger.info('%s: %s', what, where)


if __name__ == '__main__':
    main()
