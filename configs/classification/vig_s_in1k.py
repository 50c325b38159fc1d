# Published without mixed precision.
_base_ = [
    '../_base_/models/vig_classifier.py',
    '../_base_/datasets/imagenet.py',
    '../_base_/schedules/adamw_300e.py',
    '../_base_/classification_runtime.py',
]

model = dict(backbone=dict(arch='small', drop_path_rate=0.2), head=dict(in_channels=384))
optim_wrapper = dict(optimizer=dict(weight_decay=0.1))
