# Mask R-CNN on COCO, 12 epochs at batch 16 (8 GPUs x 2 images).
train_cfg = dict(type='EpochBasedTrainLoop', max_epochs=12, val_interval=1)
val_cfg = dict(type='ValLoop')
test_cfg = dict(type='TestLoop')

param_scheduler = [
    dict(type='LinearLR', start_factor=0.001, by_epoch=False, begin=0, end=1000),
    dict(type='MultiStepLR', by_epoch=True, begin=0, end=12, milestones=[8, 11], gamma=0.1),
]
optim_wrapper = dict(
    type='OptimWrapper',
    optimizer=dict(type='AdamW', lr=1e-4, betas=(0.9, 0.999), weight_decay=0.05, fused=True),
    constructor='mmvig.OptimWrapperConstructor',  # few groups, one launch each
    paramwise_cfg=dict(flat_decay_mult=0.0),  # no decay on biases and norm weights, RMSNorm's too
)
auto_scale_lr = dict(enable=False, base_batch_size=16)
