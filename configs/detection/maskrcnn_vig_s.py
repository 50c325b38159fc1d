_base_ = ['./maskrcnn_vig_t.py']

model = dict(backbone=dict(arch='small'), neck=dict(in_channels=384))
