# ViG-H-T with a linear classifier; its last norm is the classification model's own.
_base_ = './classifier.py'

model = dict(
    backbone=dict(type='mmvig.ViGH', arch='tiny', out_indices=(3,), drop_path_rate=0.2),
    head=dict(in_channels=768, init_cfg=dict(type='TruncNormal', layer='Linear', std=0.02)),
)
