"""The whole job on the generated shapes, as `make demo` runs it: train, evaluate, draw and plot.

Each step is a command that is printed before it runs, so that it can be repeated or changed.
"""

import argparse
import json
import os
import shlex
import subprocess
import sys
import time
from pathlib import Path

import torch
from mmengine.config import Config

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # this checkout, installed or not

from mmvig.engine import cli
from mmvig.engine.preflight import SetupError, check_writable, one_line_errors, type_name

TOOLS = Path(__file__).resolve().parent
CONFIGS = TOOLS.parent / 'configs/detection'
GPU_CONFIG = 'maskrcnn_vigh_t_shapes.py'
CPU_CONFIG = 'maskrcnn_vigh_t_shapes_cpu.py'
PICTURES = 8


def parse_args() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        '--work-dir', default='work_dirs/quickstart', help='folder of results; default: %(default)s'
    )
    parser.add_argument(
        '--config', help=f'another detection config; default: {GPU_CONFIG}, on a CPU {CPU_CONFIG}'
    )
    return parser.parse_args()


def short(path: str | Path) -> str:
    """A path as one would type it: relative to the current folder where that is shorter."""
    return min(os.path.relpath(path), str(path), key=len)


def run(script: str, *arguments: str) -> None:
    """Print and run one step; if it fails, end with its exit status."""
    command = [short(sys.executable), short(TOOLS / script), *arguments]
    print(f'\n$ {shlex.join(command)}', flush=True)
    status = subprocess.run(command).returncode
    if status:
        print(f'error: {script} failed (status {status}), so the rest is left out', file=sys.stderr)
        sys.exit(status)


def check_config(path: str) -> None:
    """Check before the training that a config has what the later steps ask for.

    Raises:
        SetupError: It cannot be read, or is not of detection on a data set with COCO's measures.
    """
    cfg = cli.read_config_file(path)
    if cfg.get('default_scope') != 'mmdet' or 'test_dataloader' not in cfg:
        raise SetupError(f'{path} is no detection config with a test_dataloader, which a quick start needs')
    data = cfg.test_dataloader.dataset
    if not ('data_root' in data and 'img' in data.get('data_prefix', {})):
        raise SetupError(
            f'{path}: its test data set has no data_root and data_prefix.img to draw images of'
        )
    if type_name(cfg.get('test_evaluator') or {}) != 'CocoMetric':
        raise SetupError(f'{path}: its test_evaluator is no CocoMetric, which measures the box AP')


def main() -> None:
    """Run the steps and say what came out."""
    start = time.monotonic()
    args = parse_args()
    gpu = torch.cuda.is_available()
    config = short(CONFIGS / (GPU_CONFIG if gpu else CPU_CONFIG)) if args.config is None else args.config
    with one_line_errors():
        check_config(config)
        check_writable('--work-dir', args.work_dir, folder=True)
    if args.config is None and not gpu:
        print('There is no GPU, so this takes smaller images, slimmer heads and fewer iterations.')

    work_dir = Path(args.work_dir)
    run('train.py', config, '--work-dir', str(work_dir))
    cfg = Config.fromfile(work_dir / Path(config).name)  # as it was trained
    checkpoint = str(work_dir / Path((work_dir / 'last_checkpoint').read_text()).name)
    test_dir = work_dir / 'test'
    run('test.py', config, checkpoint, '--work-dir', str(test_dir))
    data = cfg.test_dataloader.dataset
    images = sorted(Path(data.data_root, data.data_prefix.img).iterdir())[:PICTURES]
    pictures = work_dir / 'pictures'
    run('demo.py', config, checkpoint, *map(str, images), '--out-dir', str(pictures))
    run('analysis/plot_curves.py', str(work_dir))

    metrics = json.loads(max(test_dir.glob('*/*.json')).read_text())
    minutes = (time.monotonic() - start) / 60
    training = cfg.train_cfg
    length = (
        f'{training.max_iters} iterations' if 'max_iters' in training else f'{training.max_epochs} epochs'
    )
    device = 'a GPU' if gpu else f'{os.cpu_count()} CPU cores'
    print(
        f'\n{config}: {length} from scratch, {minutes:.1f} minutes in all on {device}\n'
        f'  box AP      {metrics["coco/bbox_mAP"]:.3f}\n'
        + (f'  mask AP     {metrics["coco/segm_mAP"]:.3f}\n' if 'coco/segm_mAP' in metrics else '')
        + f'  checkpoint  {checkpoint}\n'
        f'  pictures    {pictures}/\n'
        f'  curves      {work_dir / "curves.png"}'
    )


if __name__ == '__main__':
    main()
