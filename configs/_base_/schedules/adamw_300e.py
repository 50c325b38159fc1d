# ImageNet-1k from scratch, 300 epochs at batch 1024 (8 GPUs x 128 images). Learning rates are published for
# batch 512: here they are twice that, from 1e-6 in the warm-up to 1e-5 at the end.
train_cfg = dict(type='EpochBasedTrainLoop', max_epochs=300, val_interval=1)
val_cfg = dict(type='ValLoop')
test_cfg = dict(type='TestLoop')

param_scheduler = [
    dict(type='LinearLR', start_factor=1e-3, by_epoch=True, begin=0, end=20, convert_to_iter_based=True),
    dict(
        type='CosineAnnealingLR',
        eta_min=1e-5,
        by_epoch=True,
        begin=20,
        end=300,
        convert_to_iter_based=True,
    ),
]
optim_wrapper = dict(
    type='OptimWrapper',
    optimizer=dict(type='AdamW', lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.05, fused=True),
    constructor='mmvig.OptimWrapperConstructor',  # few groups, one launch each
    # No decay on biases and norm weights, RMSNorm's too. ViG's position embedding has it, as published.
    paramwise_cfg=dict(flat_decay_mult=0.0),
    clip_grad=dict(max_norm=5.0),
)
auto_scale_lr = dict(enable=False, base_batch_size=1024)
# Decay 0.9999. Validated, tested and saved as `state_dict` is the average.
custom_hooks = [dict(type='EMAHook', momentum=1e-4, priority='ABOVE_NORMAL')]
