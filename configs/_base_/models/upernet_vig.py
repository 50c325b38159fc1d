# UperNet on plain ViG-T: maps of four blocks, all of stride 16, become a pyramid in the neck, as BEiT's do.
# Start from ImageNet weights, whose position embedding is resized to the crop's, with
#   --cfg-options model.backbone.init_cfg.type=Pretrained model.backbone.init_cfg.checkpoint=FILE
_base_ = ['./upernet_vigh.py']

model = dict(
    backbone=dict(
        _delete_=True,
        type='mmvig.ViG',
        arch='tiny',
        img_size=512,
        out_indices=(2, 5, 8, 11),
        drop_path_rate=0.1,
    ),
    neck=dict(type='Feature2Pyramid', embed_dim=192, rescales=[4, 2, 1, 0.5]),
    decode_head=dict(in_channels=[192, 192, 192, 192]),
    auxiliary_head=dict(in_channels=192),
)
