# The quick start: from scratch on the generated shapes, minutes on a GPU.
_base_ = [
    '../_base_/models/maskrcnn_vigh.py',
    '../_base_/datasets/shapes_instance.py',
    '../_base_/detection_runtime.py',
    '../_base_/schedules/adamw_shapes.py',
]

model = dict(
    backbone=dict(drop_path_rate=0.0),
    rpn_head=dict(anchor_generator=dict(scales=[4])),  # small images, small shapes
    roi_head=dict(bbox_head=dict(num_classes=6), mask_head=dict(num_classes=6)),
)
default_hooks = dict(
    logger=dict(interval=20, log_metric_by_epoch=False),
    checkpoint=dict(by_epoch=False, interval={{_base_.max_iters}}),
)
log_processor = dict(by_epoch=False, window_size=20)
