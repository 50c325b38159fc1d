# From scratch on nuclei, to compare backbones: docs/results.md.
_base_ = [
    '../_base_/models/maskrcnn_vigh.py',
    '../_base_/datasets/dsb2018.py',
    '../_base_/detection_runtime.py',
    '../_base_/schedules/adamw_scratch.py',
]

model = dict(
    backbone=dict(drop_path_rate=0.1),
    rpn_head=dict(anchor_generator=dict(scales=[4])),  # half of the nuclei are under 36 pixels wide
    roi_head=dict(bbox_head=dict(num_classes=1), mask_head=dict(num_classes=1)),
    test_cfg=dict(rcnn=dict(max_per_img=400)),
)
default_hooks = dict(logger=dict(log_metric_by_epoch=False), checkpoint=dict(by_epoch=False, interval=500))
log_processor = dict(by_epoch=False)
