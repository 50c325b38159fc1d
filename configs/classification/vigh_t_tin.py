# From scratch on 40 classes of Tiny-ImageNet, to compare backbones: docs/results.md.
_base_ = [
    '../_base_/models/vigh_classifier.py',
    '../_base_/datasets/tiny_imagenet40.py',
    '../_base_/schedules/adamw_16e.py',
    '../_base_/classification_runtime.py',
]

data_preprocessor = dict(num_classes=40)
model = dict(
    backbone=dict(drop_path_rate=0.1),
    head=dict(num_classes=40),
    train_cfg=None,  # too short for Mixup and CutMix
)
default_hooks = dict(
    logger=dict(interval=20),
    checkpoint=dict(interval={{_base_.max_epochs}}, save_best=None),
)
log_processor = dict(window_size=20)
