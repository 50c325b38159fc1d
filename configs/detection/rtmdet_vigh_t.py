_base_ = [
    '../_base_/models/rtmdet_vigh.py',
    '../_base_/datasets/coco_detection_mosaic.py',
    '../_base_/schedules/rtmdet_100e.py',
    '../_base_/detection_runtime.py',
]

env_cfg = dict(cudnn_benchmark=True)  # all images have one size
tta_model = dict(tta_cfg=dict(nms=dict(iou_threshold=0.6)))
custom_hooks = [
    # Validated, tested and saved as `state_dict` is the average.
    dict(type='EMAHook', ema_type='ExpMomentumEMA', momentum=0.0002, update_buffers=True, priority=49),
    dict(
        type='PipelineSwitchHook',
        switch_epoch=_base_.max_epochs - _base_.plain_epochs,
        switch_pipeline=_base_.last_train_pipeline,
    ),
    dict(type='mmvig.CudaGraphsHook', modules=['neck']),
]
