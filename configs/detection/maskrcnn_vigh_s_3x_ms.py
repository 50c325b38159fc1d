_base_ = ['./maskrcnn_vigh_t_3x_ms.py']

model = dict(backbone=dict(arch='small', drop_path_rate=0.3))
