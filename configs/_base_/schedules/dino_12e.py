# DINO, 12 epochs at batch 16 (8 GPUs x 2 images).
_base_ = ['./adamw_1x.py']

param_scheduler = [dict(type='MultiStepLR', by_epoch=True, begin=0, end=12, milestones=[11], gamma=0.1)]
optim_wrapper = dict(
    optimizer=dict(weight_decay=1e-4),
    # The backbone learns more slowly, and all of it decays, so little that norms need no exception.
    paramwise_cfg=dict(_delete_=True, custom_keys=dict(backbone=dict(lr_mult=0.1))),
    clip_grad=dict(max_norm=0.1),
)
