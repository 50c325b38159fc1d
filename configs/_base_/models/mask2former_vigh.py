# Mask2Former for instances on ViG-H-T. Start from ImageNet weights with
#   --cfg-options model.backbone.init_cfg.type=Pretrained model.backbone.init_cfg.checkpoint=FILE
_base_ = ['./detector.py', './mask2former_head.py']

num_classes = 80
model = dict(
    type='Mask2Former',
    data_preprocessor=dict(
        pad_size_divisor=32,
        pad_mask=True,
        batch_augments=[dict(type='BatchFixedSizePad', size=(1024, 1024), pad_mask=True)],
    ),
    backbone=dict(type='mmvig.ViGH', arch='tiny', drop_path_rate=0.3),
    panoptic_head=dict(
        **_base_.mask2former_head,
        num_things_classes=num_classes,
        num_stuff_classes=0,
        loss_cls=dict(**_base_.mask2former_loss_cls, class_weight=[1.0] * num_classes + [0.1]),
    ),
    panoptic_fusion_head=dict(
        type='MaskFormerFusionHead',
        num_things_classes=num_classes,
        num_stuff_classes=0,
        loss_panoptic=None,
        init_cfg=None,
    ),
    train_cfg=_base_.mask2former_train_cfg,
    test_cfg=dict(
        panoptic_on=False,
        semantic_on=False,
        instance_on=True,
        max_per_image=100,
        iou_thr=0.8,
        filter_low_score=True,
    ),
)
