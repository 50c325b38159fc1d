_base_ = [
    '../_base_/models/maskrcnn_vigh.py',
    '../_base_/datasets/coco_instance.py',
    '../_base_/schedules/adamw_1x.py',
    '../_base_/detection_runtime.py',
]
