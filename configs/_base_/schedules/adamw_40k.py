# Semantic FPN on ADE20K, 40k iterations at batch 32 (8 GPUs x 4 images): mmseg's schedule for PoolFormer.
_base_ = ['./adamw_160k.py']

train_cfg = dict(max_iters=40000, val_interval=4000)
param_scheduler = [dict(type='PolyLR', power=0.9, eta_min=0.0, by_epoch=False, begin=0, end=40000)]
optim_wrapper = dict(optimizer=dict(lr=2e-4, weight_decay=1e-4))
auto_scale_lr = dict(base_batch_size=32)
