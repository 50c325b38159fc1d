_base_ = ['./maskrcnn_vigh_t.py']

model = dict(backbone=dict(arch='small', drop_path_rate=0.3))
