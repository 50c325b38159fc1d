# The same for the DETR family, which has no masks, does not limit the long side before the crop, and learns
# from images without objects too.
_base_ = ['./coco_detection.py', './ms_crop.py']

before_crop = dict(
    type='RandomChoiceResize', scales=[(400, 4200), (500, 4200), (600, 4200)], keep_ratio=True
)
train_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='LoadAnnotations', with_bbox=True),
    dict(type='RandomFlip', prob=0.5),
    dict(
        type='RandomChoice',
        transforms=[[_base_.multi_scale], [before_crop, _base_.crop, _base_.multi_scale]],
    ),
    dict(type='PackDetInputs'),
]
train_dataloader = dict(dataset=dict(filter_cfg=dict(filter_empty_gt=False), pipeline=train_pipeline))
