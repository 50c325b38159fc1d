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

ROOT = Path(__file__).resolve().parents[1]
PICTURES = 8


def parse_args() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        '--work-dir', default='work_dirs/quickstart', help='folder of results; default: %(default)s'
    )
    parser.add_argument(
        '--cfg-options', nargs='+', default=[], metavar='KEY=VALUE', help='as for tools/train.py'
    )
    return parser.parse_args()


def run(script: str, *arguments: str) -> None:
    """Print and run one step; if it fails, end with its exit status."""
    python = Path(sys.executable)
    shown = python.relative_to(ROOT) if python.is_relative_to(ROOT) else python
    print(f'\n$ {shlex.join([str(shown), script, *arguments])}', flush=True)
    status = subprocess.run([python, script, *arguments], cwd=ROOT).returncode
    if status:
        print(f'error: {script} failed (status {status}), so the rest is left out', file=sys.stderr)
        sys.exit(status)


def main() -> None:
    """Run the steps and say what came out."""
    start = time.monotonic()
    args = parse_args()
    os.chdir(ROOT)
    gpu = torch.cuda.is_available()
    config = f'configs/detection/maskrcnn_vigh_t_shapes{"" if gpu else "_cpu"}.py'
    options = ['--cfg-options', *args.cfg_options] if args.cfg_options else []
    if not gpu:
        print('There is no GPU, so this takes smaller images, slimmer heads and fewer iterations.')

    work_dir = Path(args.work_dir)
    run('tools/train.py', config, '--work-dir', str(work_dir), *options)
    cfg = Config.fromfile(work_dir / Path(config).name)  # as it was trained, options and all
    checkpoint = str(work_dir / Path((work_dir / 'last_checkpoint').read_text()).name)
    test_dir = work_dir / 'test'
    run('tools/test.py', config, checkpoint, '--work-dir', str(test_dir), *options)
    data = cfg.test_dataloader.dataset
    images = sorted(Path(data.data_root, data.data_prefix.img).iterdir())[:PICTURES]
    pictures = work_dir / 'pictures'
    run('tools/demo.py', config, checkpoint, *map(str, images), '--out-dir', str(pictures))
    run('tools/analysis/plot_curves.py', str(work_dir))

    metrics = json.loads(max(test_dir.glob('*/*.json')).read_text())
    minutes = (time.monotonic() - start) / 60
    device = 'a GPU' if gpu else f'{os.cpu_count()} CPU cores'
    print(
        '\nMask R-CNN with ViG-H-T on the shapes, from scratch: '
        f'{cfg.train_cfg.max_iters} iterations, {minutes:.1f} minutes on {device}\n'
        f'  box AP      {metrics["coco/bbox_mAP"]:.3f}\n'
        f'  mask AP     {metrics["coco/segm_mAP"]:.3f}\n'
        f'  checkpoint  {checkpoint}\n'
        f'  pictures    {pictures}/\n'
        f'  curves      {work_dir / "curves.png"}'
    )


if __name__ == '__main__':
    main()
