_base_ = [
    '../_base_/models/cascade_maskrcnn_vigh.py',
    '../_base_/datasets/coco_instance_ms_crop.py',
    '../_base_/schedules/adamw_3x.py',
    '../_base_/detection_runtime.py',
]

model = dict(backbone=dict(arch='small', drop_path_rate=0.3))
custom_hooks = [
    dict(
        type='mmvig.CudaGraphsHook',
        modules=['neck', *(f'roi_head.mask_head.{stage}' for stage in range(_base_.num_stages))],
    )
]
