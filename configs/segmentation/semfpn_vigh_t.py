_base_ = [
    '../_base_/models/semfpn_vigh.py',
    '../_base_/datasets/ade20k.py',
    '../_base_/schedules/adamw_40k.py',
    '../_base_/segmentation_runtime.py',
]

train_dataloader = dict(batch_size=4)
default_hooks = dict(checkpoint=dict(interval=4000))
custom_hooks = [dict(type='mmvig.CudaGraphsHook', modules=['neck'])]
