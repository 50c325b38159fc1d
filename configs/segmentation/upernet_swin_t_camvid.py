# The peer of upernet_vigh_t_camvid.py: the same but for the backbone.
_base_ = ['./upernet_vigh_t_camvid.py']

model = dict(backbone=dict(_delete_=True, type='SwinTransformer', drop_path_rate=0.1))
