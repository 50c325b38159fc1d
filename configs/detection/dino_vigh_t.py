_base_ = [
    '../_base_/models/dino_vigh.py',
    '../_base_/datasets/coco_detection_ms_crop.py',
    '../_base_/schedules/dino_12e.py',
    '../_base_/detection_runtime.py',
]

custom_hooks = [dict(type='mmvig.CudaGraphsHook', modules=['neck'])]  # there is no RoI head
