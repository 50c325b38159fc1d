_base_ = [
    '../_base_/models/maskrcnn_vig.py',
    '../_base_/datasets/coco_instance_lsj.py',
    '../_base_/schedules/vitdet_100e.py',
    '../_base_/detection_iterations.py',
]

test_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='Resize', scale=_base_.image_size, keep_ratio=True),  # as large as the crops of training
    *_base_.test_pipeline[2:],
]
train_dataloader = dict(batch_size=4, num_workers=8)
val_dataloader = dict(dataset=dict(pipeline=test_pipeline))
test_dataloader = val_dataloader
custom_hooks = [dict(type='mmvig.CudaGraphsHook', modules=['neck'])]  # each batch of masks has another size
