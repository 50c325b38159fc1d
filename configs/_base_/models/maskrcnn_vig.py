# ViTDet: Mask R-CNN on plain ViG-T, whose last map becomes a pyramid in the neck; norms over channels in
# the neck and the heads. Start from ImageNet weights, whose position embedding is resized, with
#   --cfg-options model.backbone.init_cfg.type=Pretrained model.backbone.init_cfg.checkpoint=FILE
_base_ = ['./maskrcnn_vigh.py']

norm_cfg = dict(type='mmvig.LN2d', eps=1e-6)
model = dict(
    data_preprocessor=dict(
        batch_augments=[dict(type='BatchFixedSizePad', size=(1024, 1024), pad_mask=True)]
    ),
    backbone=dict(_delete_=True, type='mmvig.ViG', arch='tiny', img_size=1024, drop_path_rate=0.1),
    neck=dict(_delete_=True, type='mmvig.SimpleFPN', in_channels=192, out_channels=256),
    rpn_head=dict(num_convs=2),
    roi_head=dict(
        bbox_head=dict(type='Shared4Conv1FCBBoxHead', conv_out_channels=256, norm_cfg=norm_cfg),
        mask_head=dict(norm_cfg=norm_cfg),
    ),
)
