"""Train a model from its config: detection, segmentation or classification."""

import argparse
import itertools
import logging
import sys
from pathlib import Path

from mmengine.config import Config

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # this checkout, installed or not

from mmvig.engine import cli, errors, preflight, work_dir
from mmvig.engine.amp import use_amp

logger = logging.getLogger('mmvig.train')


def parse_args() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('config', help='config file')
    parser.add_argument(
        '--resume',
        nargs='?',
        const='auto',
        metavar='CHECKPOINT',
        help='resume from this checkpoint, or, without a value or with `auto`, from the latest in '
        'the work dir (from the beginning where there is none)',
    )
    parser.add_argument(
        '--amp',
        nargs='?',
        const='auto',
        choices=['auto', 'bf16', 'fp16'],
        help='mixed precision; without a value bfloat16 where the GPU computes in it, and on a CPU, else '
        'float16 with a loss scaler',
    )
    parser.add_argument(
        '--auto-scale-lr',
        action='store_true',
        help='scale the learning rate by the batch size over auto_scale_lr.base_batch_size',
    )
    cli.add_shared_arguments(parser)
    args = parser.parse_args(_with_value_of_amp(sys.argv[1:]))
    if args.resume == '':
        parser.error('--resume is empty: name a checkpoint, or give --resume alone for the latest')
    return args


def _with_value_of_amp(arguments: list[str]) -> list[str]:
    """Say --amp=auto where a config follows, which argparse would take for the value of --amp."""
    return [
        '--amp=auto' if each == '--amp' and Path(following).suffix in cli.CONFIG_SUFFIXES else each
        for each, following in itertools.pairwise([*arguments, ''])
    ]


def use_auto_scale_lr(cfg: Config) -> None:
    """Switch on the scaling of the learning rate."""
    if 'base_batch_size' not in cfg.get('auto_scale_lr', {}):
        raise preflight.SetupError(
            f'--auto-scale-lr: {cfg.filename} has no auto_scale_lr; add '
            'auto_scale_lr = dict(base_batch_size=BATCH_SIZE_OF_ITS_LEARNING_RATE)'
        )
    cfg.auto_scale_lr.enable = True


def use_resume(cfg: Config, checkpoint: str) -> None:
    """Resume from a checkpoint; 'auto' is the work dir's latest, if there is one."""
    if checkpoint == 'auto':
        checkpoint = work_dir.latest_checkpoint(cfg)
        if checkpoint is None:
            logger.info('--resume: nothing in %s yet, so this is a new run.', cfg.work_dir)
    cfg.resume = checkpoint is not None
    cfg.load_from = checkpoint or cfg.get('load_from')


def main() -> None:
    """Read the config, check its files and train."""
    with preflight.one_line_errors():
        args = parse_args()
        cfg = cli.load_config(args)
        cli.use_expandable_segments()
        if args.amp:
            use_amp(cfg, args.amp)
        if args.auto_scale_lr:
            use_auto_scale_lr(cfg)
        auto = args.resume == 'auto' or (cfg.get('resume') and not (args.resume or cfg.get('load_from')))
        if args.resume and not auto:
            use_resume(cfg, args.resume)
    with errors.said_in_one_line(cfg):
        preflight.check_training(cfg)
    with errors.said_in_one_line(cfg), work_dir.taken(cfg):
        if auto:
            use_resume(cfg, 'auto')
        elif cfg.get('resume'):
            work_dir.check_whole(cfg.load_from)
        else:
            work_dir.warn_of_earlier_run(cfg)
        cli.build_runner(cfg).train()


if __name__ == '__main__':
    main()
