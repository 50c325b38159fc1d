# From scratch on the generated shapes, minutes on a GPU.
_base_ = [
    '../_base_/models/upernet_vigh.py',
    '../_base_/datasets/shapes_semantic.py',
    '../_base_/segmentation_runtime.py',
    '../_base_/schedules/adamw_shapes.py',
]

data_preprocessor = dict(size=(224, 224))
model = dict(
    data_preprocessor=data_preprocessor,
    backbone=dict(drop_path_rate=0.0),
    decode_head=dict(channels=128, num_classes=7),
    auxiliary_head=dict(channels=64, num_classes=7),
)
max_iters = 400
train_cfg = dict(max_iters=max_iters, val_interval=max_iters)
param_scheduler = [
    dict(type='LinearLR', start_factor=0.01, by_epoch=False, begin=0, end=50),
    dict(type='PolyLR', power=1.0, eta_min=0.0, by_epoch=False, begin=50, end=max_iters),
]
default_hooks = dict(logger=dict(interval=20), checkpoint=dict(interval=max_iters))
log_processor = dict(window_size=20)
