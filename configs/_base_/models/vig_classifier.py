# Plain ViG-T with a linear classifier.
_base_ = './classifier.py'

model = dict(
    backbone=dict(type='mmvig.ViG', arch='tiny', img_size=224, drop_path_rate=0.0),
    head=dict(in_channels=192, init_cfg=dict(type='Normal', layer='Linear', std=0.02)),
)
