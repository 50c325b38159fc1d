_base_ = ['./vigh_s_in1k.py']

model = dict(backbone=dict(arch='base', drop_path_rate=0.6), head=dict(in_channels=1024))
