# Cascade Mask R-CNN on ViG-H-T, with Swin's box heads: four convolutions with norms and a linear layer, and
# the GIoU of decoded boxes. SyncBN takes its statistics over all processes; where there is one, mmengine's
# Runner makes it a plain BatchNorm, which runs on a CPU too.
_base_ = ['./maskrcnn_vigh.py']

num_stages = 3
box_head = dict(
    type='ConvFCBBoxHead',
    num_shared_convs=4,
    num_shared_fcs=1,
    in_channels=256,
    conv_out_channels=256,
    fc_out_channels=1024,
    roi_feat_size=7,
    num_classes=80,
    reg_class_agnostic=False,
    reg_decoded_bbox=True,
    norm_cfg=dict(type='SyncBN', requires_grad=True),
    loss_cls=dict(type='CrossEntropyLoss', use_sigmoid=False, loss_weight=1.0),
    loss_bbox=dict(type='GIoULoss', loss_weight=10.0),
)
stds = [[0.1, 0.1, 0.2, 0.2], [0.05, 0.05, 0.1, 0.1], [0.033, 0.033, 0.067, 0.067]]
assigner = dict(type='mmvig.MaxIoUAssigner', match_low_quality=False, ignore_iof_thr=-1)
model = dict(
    type='CascadeRCNN',
    rpn_head=dict(loss_bbox=dict(_delete_=True, type='SmoothL1Loss', beta=1.0 / 9.0, loss_weight=1.0)),
    roi_head=dict(
        type='CascadeRoIHead',
        num_stages=num_stages,
        stage_loss_weights=[1, 0.5, 0.25],
        bbox_head=[
            dict(
                **box_head,
                bbox_coder=dict(type='mmvig.DeltaXYWHBBoxCoder', target_means=[0.0] * 4, target_stds=each),
            )
            for each in stds
        ],
    ),
    train_cfg=dict(
        rpn_proposal=dict(max_per_img=2000),
        rcnn=[
            dict(
                assigner=dict(**assigner, pos_iou_thr=iou, neg_iou_thr=iou, min_pos_iou=iou),
                sampler=_base_.model.train_cfg.rcnn.sampler,
                mask_size=28,
                pos_weight=-1,
                debug=False,
            )
            for iou in (0.5, 0.6, 0.7)
        ],
    ),
)
