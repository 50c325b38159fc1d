# Published with fp16 mixed precision: train with --amp.
_base_ = [
    '../_base_/models/vigh_classifier.py',
    '../_base_/datasets/imagenet.py',
    '../_base_/schedules/adamw_300e.py',
    '../_base_/classification_runtime.py',
]

model = dict(backbone=dict(arch='small', drop_path_rate=0.3))
