# Mask2Former's optimiser at batch 16 (8 GPUs x 2 images): the backbone learns at a tenth of the rate.
val_cfg = dict(type='ValLoop')
test_cfg = dict(type='TestLoop')

embedding = dict(decay_mult=0.0)
backbone_norm = dict(lr_mult=0.1, decay_mult=0.0)
optim_wrapper = dict(
    type='OptimWrapper',
    optimizer=dict(type='AdamW', lr=1e-4, betas=(0.9, 0.999), weight_decay=0.05, fused=True),
    constructor='mmvig.OptimWrapperConstructor',  # few groups, one launch each
    paramwise_cfg=dict(
        norm_decay_mult=0.0,
        # Of several keys in a parameter's name the longest counts: those of ViG-H's norms are longer than
        # 'backbone'.
        custom_keys={
            'backbone': dict(lr_mult=0.1),
            'backbone.norm': backbone_norm,
            **{
                f'{name}.{kind}': backbone_norm
                for name in ('down1.norm', 'down2.norm', 'downsample.norm', 'norm1', 'norm2')
                for kind in ('weight', 'bias')
            },
            'norm_long.weight': backbone_norm,
            'norm_short.weight': backbone_norm,
            'query_embed': embedding,
            'query_feat': embedding,
            'level_embed': embedding,
        },
    ),
    clip_grad=dict(max_norm=0.01),
)
auto_scale_lr = dict(enable=False, base_batch_size=16)
