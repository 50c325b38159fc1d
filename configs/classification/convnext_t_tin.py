# The peer of vigh_t_tin.py: the same but for the backbone.
_base_ = ['./vigh_t_tin.py']

model = dict(
    backbone=dict(_delete_=True, type='ConvNeXt', arch='tiny', drop_path_rate=0.1),
    neck=None,  # this backbone takes the average itself, before its last norm
)
