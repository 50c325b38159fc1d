# The peer of maskrcnn_vigh_t_dsb2018.py: the same but for the backbone.
_base_ = ['./maskrcnn_vigh_t_dsb2018.py']

model = dict(backbone=dict(_delete_=True, type='SwinTransformer', drop_path_rate=0.1))
