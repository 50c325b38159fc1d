# From scratch on street scenes, to compare backbones: docs/results.md.
_base_ = [
    '../_base_/models/upernet_vigh.py',
    '../_base_/datasets/camvid.py',
    '../_base_/segmentation_runtime.py',
    '../_base_/schedules/adamw_scratch.py',
]

data_preprocessor = dict(size=(352, 480), seg_pad_val=11)
model = dict(
    data_preprocessor=data_preprocessor,
    backbone=dict(drop_path_rate=0.1),
    decode_head=dict(num_classes=11, ignore_index=11),
    auxiliary_head=dict(num_classes=11, ignore_index=11),
)
default_hooks = dict(checkpoint=dict(interval=500))
