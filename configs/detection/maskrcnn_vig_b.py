_base_ = ['./maskrcnn_vig_t.py']

model = dict(backbone=dict(arch='base'), neck=dict(in_channels=768))
