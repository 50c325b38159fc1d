# RTMDet on a pretrained backbone, 100 epochs at batch 128 (4 GPUs x 32 images): mmdet's schedule for Swin.
# In the last ten epochs images are plain, and each epoch is validated.
max_epochs, plain_epochs = 100, 10
train_cfg = dict(
    type='EpochBasedTrainLoop',
    max_epochs=max_epochs,
    val_interval=10,
    dynamic_intervals=[(max_epochs - plain_epochs, 1)],
)
val_cfg = dict(type='ValLoop')
test_cfg = dict(type='TestLoop')

param_scheduler = [
    dict(type='LinearLR', start_factor=1e-5, by_epoch=False, begin=0, end=1000),
    dict(
        type='CosineAnnealingLR',
        eta_min=5e-5,
        begin=max_epochs // 2,
        end=max_epochs,
        T_max=max_epochs // 2,
        by_epoch=True,
        convert_to_iter_based=True,
    ),
]
optim_wrapper = dict(
    type='OptimWrapper',
    optimizer=dict(type='AdamW', lr=1e-3, weight_decay=0.05, fused=True),
    constructor='mmvig.OptimWrapperConstructor',  # few groups, one launch each
    paramwise_cfg=dict(
        flat_decay_mult=0.0,  # no decay on biases and norm weights, RMSNorm's too
        bypass_duplicate=True,  # the head's convolutions are shared by all levels
    ),
)
auto_scale_lr = dict(enable=False, base_batch_size=128)
