_base_ = [
    '../_base_/models/mask2former_semantic_vigh.py',
    '../_base_/datasets/ade20k_ms.py',
    '../_base_/schedules/mask2former_160k.py',
    '../_base_/segmentation_runtime.py',
]

custom_imports = dict(imports=['mmvig.compat', 'mmdet.models'])  # the head is mmdet's
model = dict(backbone=dict(arch='small'))
default_hooks = dict(checkpoint=dict(interval=5000))
