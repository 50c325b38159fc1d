_base_ = [
    '../_base_/models/maskrcnn_vigh.py',
    '../_base_/datasets/coco_instance_ms_crop.py',
    '../_base_/schedules/adamw_3x.py',
    '../_base_/detection_runtime.py',
]
