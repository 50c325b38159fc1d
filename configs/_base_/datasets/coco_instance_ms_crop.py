# Multi-scale training with crops: half of the images only resized, half cropped in between.
_base_ = ['./coco_instance.py', './ms_crop.py']

before_crop = dict(
    type='RandomChoiceResize', scales=[(400, 1333), (500, 1333), (600, 1333)], keep_ratio=True
)
train_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='mmvig.LoadAnnotations', with_bbox=True, with_mask=True),
    dict(type='RandomFlip', prob=0.5),
    dict(
        type='RandomChoice',
        transforms=[[_base_.multi_scale], [before_crop, _base_.crop, _base_.multi_scale]],
    ),
    dict(type='PackDetInputs'),
]
train_dataloader = dict(dataset=dict(pipeline=train_pipeline))
