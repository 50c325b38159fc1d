# UperNet on ADE20K, 160k iterations at batch 16 (8 GPUs x 2 images).
train_cfg = dict(type='IterBasedTrainLoop', max_iters=160000, val_interval=16000)
val_cfg = dict(type='ValLoop')
test_cfg = dict(type='TestLoop')

param_scheduler = [
    dict(type='LinearLR', start_factor=1e-6, by_epoch=False, begin=0, end=1500),
    dict(type='PolyLR', power=1.0, eta_min=0.0, by_epoch=False, begin=1500, end=160000),
]
optim_wrapper = dict(
    type='OptimWrapper',
    optimizer=dict(type='AdamW', lr=6e-5, betas=(0.9, 0.999), weight_decay=0.01, fused=True),
    constructor='mmvig.OptimWrapperConstructor',  # few groups, one launch each
    paramwise_cfg=dict(flat_decay_mult=0.0),  # no decay on biases and norm weights, RMSNorm's too
)
auto_scale_lr = dict(enable=False, base_batch_size=16)
