# Mosaics and mixtures of images at 640x640, as for RTMDet; plain images in the last epochs, see
# schedules/rtmdet_100e.py. Every image has the same size.
_base_ = ['./coco_detection.py']

size = (640, 640)
grey = (114, 114, 114)
load = [dict(type='LoadImageFromFile'), dict(type='LoadAnnotations', with_bbox=True)]
after_crop = [
    dict(type='RandomCrop', crop_size=size),
    dict(type='YOLOXHSVRandomAug'),
    dict(type='RandomFlip', prob=0.5),
    dict(type='Pad', size=size, pad_val=dict(img=grey)),
]
train_pipeline = [
    *load,
    dict(type='CachedMosaic', img_scale=size, pad_val=114.0),
    dict(type='RandomResize', scale=(1280, 1280), ratio_range=(0.1, 2.0), keep_ratio=True),
    *after_crop,
    dict(
        type='CachedMixUp',
        img_scale=size,
        ratio_range=(1.0, 1.0),
        max_cached_images=20,
        pad_val=grey,
    ),
    dict(type='PackDetInputs'),
]
last_train_pipeline = [
    *load,
    dict(type='RandomResize', scale=size, ratio_range=(0.1, 2.0), keep_ratio=True),
    *after_crop,
    dict(type='PackDetInputs'),
]
test_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='Resize', scale=size, keep_ratio=True),
    dict(type='Pad', size=size, pad_val=dict(img=grey)),
    dict(type='LoadAnnotations', with_bbox=True),
    _base_.test_pipeline[-1],
]
tta_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(
        type='TestTimeAug',
        transforms=[
            [dict(type='Resize', scale=(side, side), keep_ratio=True) for side in (320, 640, 960)],
            # Before Pad: boxes are flipped back by the size without padding.
            [dict(type='RandomFlip', prob=0.0), dict(type='RandomFlip', prob=1.0)],
            [dict(type='Pad', size=(960, 960), pad_val=dict(img=grey))],
            _base_.tta_pipeline[-1].transforms[-1],
        ],
    ),
]
train_dataloader = dict(
    batch_size=32,
    num_workers=10,  # a mosaic is four images
    batch_sampler=None,
    dataset=dict(pipeline=train_pipeline),
)
val_dataloader = dict(batch_size=5, num_workers=10, dataset=dict(pipeline=test_pipeline))
test_dataloader = val_dataloader
val_evaluator = dict(proposal_nums=(100, 1, 10))
test_evaluator = val_evaluator
