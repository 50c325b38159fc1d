"""Two configs of the generated shapes, made small: a few seconds of work a step."""

from pathlib import Path

from mmvig.datasets.shapes import ensure_shapes

CONFIGS = Path(__file__).resolve().parents[1] / 'configs'
MASK_RCNN = CONFIGS / 'detection/maskrcnn_vigh_t_shapes_cpu.py'
UPERNET = CONFIGS / 'segmentation/upernet_vigh_t_shapes.py'
_BOTH = """
_base_ = [{base!r}]
data_root = {data!r}
data = dict(dataset=dict(data_root=data_root))
data.update(batch_size={batch_size}, num_workers=0, persistent_workers=False)
train_dataloader = data
val_dataloader = data
test_dataloader = data
train_cfg = dict(max_iters={iterations}, val_interval={val_interval})
default_hooks = dict(logger=dict(interval=1), checkpoint=dict(interval={iterations}))
arch = dict(_delete_=True, embed_dims=32, depths=[1, 1, 1, 1], num_heads=[1, 2, 4, 8])
channels = [32, 64, 128, 256]
"""
_DETECTOR = """
narrow, few = dict(in_channels=16), dict(max_per_img=30)
model = dict(
    backbone=dict(arch=arch),
    neck=dict(in_channels=channels, out_channels=16),
    rpn_head=dict(feat_channels=16, **narrow),
    roi_head=dict(
        bbox_roi_extractor=dict(out_channels=16),
        bbox_head=dict(fc_out_channels=32, **narrow),
        mask_roi_extractor=dict(out_channels=16),
        mask_head=dict(num_convs=1, conv_out_channels=16, **narrow),
    ),
    train_cfg=dict(rpn_proposal=few, rcnn=dict(sampler=dict(num=32))),
    test_cfg=dict(rpn=few, rcnn=dict(max_per_img=10)),
)
val_evaluator = dict(ann_file=data_root + '/annotations/instances_val.json')
test_evaluator = val_evaluator
"""
_SEGMENTOR = """
head = dict(channels=16)
model = dict(
    backbone=dict(arch=arch),
    decode_head=dict(in_channels=channels, **head),
    auxiliary_head=dict(in_channels=channels[2], **head),
)
"""


def write_small(
    folder: Path,
    train: int,
    val: int,
    iterations: int,
    batch_size: int = 2,
    val_interval: int | None = None,
) -> tuple[Path, Path]:
    """Write `shapes` of so many pictures, and a detector's and a segmentor's config; return the two.

    Both runs save after their last iteration, and validate there unless ``val_interval`` says otherwise.
    """
    data = str(ensure_shapes(folder / 'shapes', num_train=train, num_val=val))
    paths = folder / 'detector.py', folder / 'segmentor.py'
    for path, base, more in zip(paths, (MASK_RCNN, UPERNET), (_DETECTOR, _SEGMENTOR), strict=True):
        text = _BOTH.format(
            base=str(base),
            data=data,
            batch_size=batch_size,
            iterations=iterations,
            val_interval=val_interval or iterations,
        )
        path.write_text(text + more)
    return paths
