_base_ = ['./maskrcnn_vigh_t.py']

model = dict(
    backbone=dict(arch='base', drop_path_rate=0.6),
    neck=dict(in_channels=[128, 256, 512, 1024]),
)
