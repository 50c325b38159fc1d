# ViTDet, 100 epochs of COCO in iterations at batch 64; the earlier a block, the more slowly it learns.
max_iters, interval = 184375, 5000
train_cfg = dict(
    type='IterBasedTrainLoop',
    max_iters=max_iters,
    val_interval=interval,
    dynamic_intervals=[(max_iters // interval * interval + 1, max_iters)],  # and after the last
)
val_cfg = dict(type='ValLoop')
test_cfg = dict(type='TestLoop')

param_scheduler = [
    dict(type='LinearLR', start_factor=0.001, by_epoch=False, begin=0, end=250),
    dict(
        type='MultiStepLR', by_epoch=False, begin=0, end=max_iters, milestones=[163889, 177546], gamma=0.1
    ),
]
optim_wrapper = dict(
    type='OptimWrapper',
    optimizer=dict(type='AdamW', lr=1e-4, betas=(0.9, 0.999), weight_decay=0.1, fused=True),
    constructor='mmvig.LayerDecayOptimWrapperConstructor',  # no decay on norms, biases, position embedding
    paramwise_cfg=dict(decay_rate=0.7),
)
auto_scale_lr = dict(enable=False, base_batch_size=64)
