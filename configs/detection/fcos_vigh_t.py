_base_ = [
    '../_base_/models/fcos_vigh.py',
    '../_base_/datasets/coco_detection.py',
    '../_base_/schedules/adamw_1x.py',
    '../_base_/detection_runtime.py',
]

custom_hooks = [dict(type='mmvig.CudaGraphsHook', modules=['neck'])]  # there is no RoI head
