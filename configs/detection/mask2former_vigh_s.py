_base_ = [
    '../_base_/models/mask2former_vigh.py',
    '../_base_/datasets/coco_instance_lsj.py',
    '../_base_/schedules/mask2former_50e.py',
    '../_base_/detection_iterations.py',
]

model = dict(backbone=dict(arch='small'))
load_image, _, *augment, _, pack = _base_.train_pipeline
train_pipeline = [
    load_image,
    # Bitmaps, because the loss reads whole masks: on one core of a CPU, drawing polygons takes the training
    # process 35 ms an image; bitmaps take a data worker 75 ms and the training process 16.
    dict(type='LoadAnnotations', with_bbox=True, with_mask=True),
    *augment,
    dict(type='FilterAnnotations', min_gt_bbox_wh=(1e-5, 1e-5), by_mask=True),
    pack,
]
train_dataloader = dict(dataset=dict(pipeline=train_pipeline))
custom_hooks = []  # the backbone has CUDA graphs of its own; the head copies from the host: none for it
tta_model = None  # mmdet merges the boxes of several views, not the masks that they come from
