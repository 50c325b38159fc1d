# Mask2Former for classes of pixels on ViG-H-T. Start from ImageNet weights with
#   --cfg-options model.backbone.init_cfg.type=Pretrained model.backbone.init_cfg.checkpoint=FILE
_base_ = ['./mask2former_head.py', './upernet_vigh.py']

num_classes = 150
data_preprocessor = dict(test_cfg=dict(size_divisor=32))
model = dict(
    data_preprocessor=data_preprocessor,
    backbone=dict(drop_path_rate=0.3),
    decode_head=dict(
        _delete_=True,
        **_base_.mask2former_head,
        num_classes=num_classes,
        align_corners=False,
        loss_cls=dict(**_base_.mask2former_loss_cls, class_weight=[1.0] * num_classes + [0.1]),
        train_cfg=_base_.mask2former_train_cfg,
    ),
    auxiliary_head=None,
)
