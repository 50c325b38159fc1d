"""Every script that mmdet, mmseg and mmpretrain ship, run on tiny models of ours and of a peer (Swin).

    python tests/reliability/package_tools.py [--only SUBSTRING] [--keep FOLDER]

Each runs as `python -m mmvig.compat PACKAGE/SCRIPT ARGUMENTS`. It prints a table: the script, what became
of it with ViG-H, and the last line of what went wrong. What fails is run with Swin too: it fails through
itself where it fails again. The exit status is the number of scripts that fail with ViG-H alone.

Left out: scripts about other models, data sets or services (converters of foreign weights, LoRA, tracking,
grounding, downloads, TorchServe's handlers), and the `.sh` files, which launch train.py and test.py.
"""

import argparse
import re
import shlex
import sys
import tempfile
from pathlib import Path

import cv2

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / 'tests'))
from programs import run_tool  # noqa: E402

from mmvig.datasets.shapes import ensure_shapes  # noqa: E402

# Scripts and arguments, in an order in which each finds the files of those before it; LOG is train's.
SCRIPTS = {
    'mmdet': """
        train config.py --work-dir run
        test config.py run/iter_2.pth --out results.pkl --cfg-options test_evaluator.outfile_prefix=results
        analysis_tools/analyze_logs plot_curve LOG --keys loss --out curve.png --style ggplot
        analysis_tools/analyze_results config.py results.pkl painted --topk 1
        analysis_tools/benchmark config.py --task dataloader --max-iter 4 --num-warmup 1 --log-interval 1
        analysis_tools/browse_dataset config.py --output-dir browsed --not-show
        analysis_tools/coco_error_analysis results.bbox.json errors --ann val.json
        analysis_tools/coco_occluded_separated_recall results.pkl --ann val.json
        analysis_tools/confusion_matrix config.py results.pkl confusion
        analysis_tools/eval_metric config.py results.pkl
        analysis_tools/fuse_results results.bbox.json results.bbox.json \
--annotation val.json
        analysis_tools/get_flops config.py --num-images 1
        analysis_tools/optimize_anchors config.py --algorithm k-means --device cpu --iters 2 \
--input-shape 160 120 --output-dir anchors
        analysis_tools/test_robustness config.py run/iter_2.pth --out robust.pkl --corruptions brightness \
--severities 0
        analysis_tools/robustness_eval robust_results.pkl --dataset coco --metric AP
        misc/get_image_metas config.py --out metas.pkl --nproc 1
        misc/print_config config.py
        misc/split_coco --data-root split --out-dir split/out --labeled-percent 50 --fold 1
        dataset_converters/images2coco shapes/images/val classes.txt images.json
        dataset_converters/coco2odvg val.json -d coco -o odvg.json
        deployment/mmdet2torchserve config.py run/iter_2.pth --output-folder served --model-name it
        model_converters/publish_model run/iter_2.pth published.pth
        model_converters/upgrade_model_version run/iter_2.pth upgraded.pth
    """,
    'mmseg': """
        train config.py --work-dir run
        test config.py run/iter_2.pth --out results
        analysis_tools/analyze_logs LOG --keys loss --out curve.png --style whitegrid
        analysis_tools/benchmark config.py run/iter_2.pth --log-interval 1
        analysis_tools/browse_dataset config.py --output-dir browsed --not-show
        analysis_tools/confusion_matrix config.py results confusion
        analysis_tools/get_flops config.py --shape 64 64
        analysis_tools/visualization_cam image.png config.py run/iter_2.pth --target-layers backbone.norm3 \
--category-index 1 --device cpu
        deployment/pytorch2torchscript config.py --checkpoint run/iter_2.pth --shape 64 64
        misc/browse_dataset config.py --output-dir browsed2 --not-show
        misc/print_config config.py
        misc/publish_model run/iter_2.pth published.pth
        torchserve/mmseg2torchserve config.py run/iter_2.pth --output-folder served --model-name it
    """,
    'mmpretrain': """
        train config.py --work-dir run
        test config.py run/epoch_1.pth --out results.pkl
        kfold-cross-valid config.py --num-splits 2 --fold 0 --work-dir folds
        analysis_tools/analyze_logs plot_curve LOG --keys loss --out curve.png --style whitegrid
        analysis_tools/analyze_results config.py results.pkl --out-dir analysed --topk 1
        analysis_tools/confusion_matrix config.py results.pkl --out confusion.pkl
        analysis_tools/eval_metric results.pkl --metric type=Accuracy
        analysis_tools/get_flops config.py --shape 112 112
        misc/print_config config.py
        misc/verify_dataset config.py --out-path broken.log
        model_converters/publish_model run/epoch_1.pth published.pth
        model_converters/reparameterize_model config.py run/epoch_1.pth reparameterized.pth
        torchserve/mmpretrain2torchserve config.py run/epoch_1.pth --output-folder served --model-name it
        visualization/browse_dataset config.py --output-dir browsed --not-show
        visualization/vis_cam image.png config.py run/epoch_1.pth --save-path cam.png
        visualization/vis_cam image.png config.py run/epoch_1.pth --save-path cam.png \
--target-layers backbone.norm3
        visualization/vis_scheduler config.py --not-show --save-path schedule.png --dataset-size 8
        visualization/vis_tsne ./config.py --checkpoint run/epoch_1.pth --device cpu --max-num-class 4 \
--perplexity 2 --n-iter 250
    """,
}
BACKBONES = {
    'ViG-H': "type='mmvig.ViGH', arch=dict(embed_dims=32, depths=[1, 1, 1, 1], num_heads=[1, 2, 4, 8])",
    'Swin': "type='SwinTransformer', embed_dims=32, depths=(1, 1, 1, 1), num_heads=(1, 2, 4, 8)",
}
SWIN_CLASSIFIER = (
    "type='SwinTransformer', img_size=112, "
    'arch=dict(embed_dims=32, depths=[1, 1, 1, 1], num_heads=[1, 2, 4, 8])'
)
CONFIGS = {
    'mmdet': """
_base_ = '{root}/configs/detection/maskrcnn_vigh_t_shapes_cpu.py'
model = dict(
    backbone=dict(_delete_=True, {backbone}),
    neck=dict(in_channels=[32, 64, 128, 256]),
    test_cfg=dict(rcnn=dict(score_thr=0.0)),
)
val_dataloader = dict(num_workers=0, persistent_workers=False, dataset=dict(data_root='shapes/'))
test_dataloader = val_dataloader
train_dataloader = dict(num_workers=0, persistent_workers=False, dataset=dict(data_root='shapes/'))
val_evaluator = dict(ann_file='shapes/annotations/instances_val.json')
test_evaluator = val_evaluator
train_cfg = dict(max_iters=2, val_interval=2)
default_hooks = dict(logger=dict(interval=1), checkpoint=dict(interval=2, save_best=None))
""",
    'mmseg': """
_base_ = '{root}/configs/segmentation/upernet_vigh_t_shapes.py'
model = dict(
    backbone=dict(_delete_=True, {backbone}),
    decode_head=dict(in_channels=[32, 64, 128, 256], channels=32, norm_cfg=dict(type='BN')),
    auxiliary_head=dict(in_channels=128, channels=32, norm_cfg=dict(type='BN')),
)
val_dataloader = dict(num_workers=0, persistent_workers=False, dataset=dict(data_root='shapes'))
test_dataloader = val_dataloader
train_dataloader = dict(
    batch_size=2, num_workers=0, persistent_workers=False, dataset=dict(data_root='shapes')
)
train_cfg = dict(max_iters=2, val_interval=2)
default_hooks = dict(logger=dict(interval=1), checkpoint=dict(interval=2, save_best=None))
""",
    'mmpretrain': """
_base_ = '{root}/configs/classification/vigh_t_tin.py'
model = dict(
    backbone=dict(_delete_=True, out_indices=(3,), {backbone}),
    head=dict(in_channels=256, num_classes=4),
)
data_preprocessor = dict(num_classes=4)
loader = dict(
    batch_size=4, num_workers=0, persistent_workers=False, dataset=dict(data_root='tin', data_prefix='')
)
train_dataloader = loader
val_dataloader = loader
test_dataloader = loader
train_cfg = dict(max_epochs=1)
param_scheduler = [dict(type='LinearLR', start_factor=0.1, by_epoch=True, begin=0, end=1)]
val_evaluator = dict(topk=(1,))
test_evaluator = val_evaluator
default_hooks = dict(logger=dict(interval=1), checkpoint=dict(interval=1))
""",
}


def prepare(folder: Path, package: str, backbone: str) -> None:
    """Put the config, the data and a picture into an empty folder."""
    folder.mkdir(parents=True)
    shapes = ensure_shapes(folder / 'shapes', num_train=4, num_val=2)
    picture = shapes / 'images/val/000000.png'
    text = BACKBONES[backbone]
    if (package, backbone) == ('mmpretrain', 'Swin'):
        text = SWIN_CLASSIFIER
    (folder / 'config.py').write_text(CONFIGS[package].format(root=ROOT, backbone=text).lstrip())
    (folder / 'image.png').write_bytes(picture.read_bytes())
    (folder / 'val.json').symlink_to('shapes/annotations/instances_val.json')
    (folder / 'classes.txt').write_text('ring\nsquare\n')
    split = folder / 'split/annotations'  # where split_coco looks for COCO's training set
    split.mkdir(parents=True)
    annotations = (shapes / 'annotations/instances_train.json').read_bytes()
    (split / 'instances_train2017.json').write_bytes(annotations)
    for label in range(4):
        target = folder / f'tin/class{label}'
        target.mkdir(parents=True)
        for path in sorted((shapes / 'images').glob('*/*.png')):
            cv2.imwrite(
                str(target / f'{path.parent.name}{path.name}'), cv2.imread(str(path)) // (label + 1)
            )


def last_words(result) -> str:
    """The last line of a traceback or of what was written."""
    lines = [line.strip() for line in result.stderr.splitlines() if line.strip()]
    errors = [line for line in lines if re.match(r'[\w.]*(Error|Exception|Exit)\b', line)]
    return (errors or lines or ['nothing'])[-1][:140]


class Work:
    """The folder of one package with one backbone, made when the first script runs there."""

    def __init__(self, folder: Path, package: str, backbone: str):
        self.folder, self.package, self.backbone = folder / backbone / package, package, backbone

    def run(self, line: str) -> str:
        """Run a line of SCRIPTS after those that it needs: what went wrong, or nothing."""
        if not self.folder.exists():
            prepare(self.folder, self.package, self.backbone)
            train, test = lines_of(self.package)[:2]
            if line not in (train, test):
                self.run(train)
                self.run(test)
        name, *arguments = shlex.split(line)
        logs = sorted((self.folder / 'run').glob('*/vis_data/scalars.json'))
        arguments = [word.replace('LOG', str(logs[0]) if logs else 'no-log') for word in arguments]
        program = str(ROOT / 'mmvig/compat/__main__.py')  # what -m runs
        result = run_tool(program, f'{self.package}/{name}', *arguments, cwd=self.folder)
        return '' if result.returncode == 0 else last_words(result)


def lines_of(package: str) -> list[str]:
    """The lines of SCRIPTS for a package."""
    return [line.strip() for line in SCRIPTS[package].splitlines() if line.strip()]


def survey(folder: Path, only: str) -> dict[str, tuple[str, str]]:
    """Run all with ViG-H, and what fails with Swin too: what went wrong with each, by its line."""
    found = {}
    for package in SCRIPTS:
        ours, peer = (Work(folder, package, backbone) for backbone in BACKBONES)
        for line in lines_of(package):
            name = f'{package}/{line.split()[0]}'
            if only in name:
                trouble = ours.run(line)
                peers = trouble and peer.run(line)
                found[f'{package}/{line}'] = trouble, peers  # a script can have two lines
                verdict = 'runs' if not trouble else 'fails through itself' if peers else 'FAILS'
                other = peers if peers != trouble else ''
                print(f'| {name} | {verdict} | {trouble} | {other} |', flush=True)
    return found


def main() -> None:
    """Print the table, and exit with the number of scripts that fail through us."""
    parser = argparse.ArgumentParser(description=__doc__.partition('\n')[0])
    parser.add_argument('--only', default='', help='run the scripts whose names have this')
    parser.add_argument('--keep', help='a new folder for all that is written, kept')
    args = parser.parse_args()
    print('| script | with ViG-H | what went wrong | with Swin, if other |\n|---|---|---|---|')
    with tempfile.TemporaryDirectory() as scratch:
        found = survey(Path(args.keep or scratch).absolute(), args.only)
    through_us = [name for name, (ours, peer) in found.items() if ours and not peer]
    ran = sum(not ours for ours, _ in found.values())
    print(
        f'\n{len(found)} scripts: {ran} run, {len(found) - ran - len(through_us)} fail through themselves, '
        f'{len(through_us)} through us {" ".join(through_us)}'
    )
    sys.exit(len(through_us))


if __name__ == '__main__':
    main()
