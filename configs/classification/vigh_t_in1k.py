# Published with fp16 mixed precision: train with --amp.
_base_ = [
    '../_base_/models/vigh_classifier.py',
    '../_base_/datasets/imagenet.py',
    '../_base_/schedules/adamw_300e.py',
    '../_base_/classification_runtime.py',
]

optim_wrapper = dict(optimizer=dict(lr=1.6e-3))
param_scheduler = _base_.param_scheduler
param_scheduler[0].start_factor = 1e-6 / 1.6e-3
