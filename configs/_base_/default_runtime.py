# What all tasks share; {detection,segmentation,classification}_runtime.py build on it.
custom_imports = dict(imports=['mmvig.compat'])  # for mmdet's and mmseg's own tools, without compiled mmcv
env_cfg = dict(
    cudnn_benchmark=False,
    mp_cfg=dict(mp_start_method='fork', opencv_num_threads=0),
    dist_cfg=dict(backend='nccl'),
)
default_hooks = dict(
    runtime_info=dict(type='mmvig.RuntimeInfoHook'),
    gc=dict(type='mmvig.GCFreezeHook'),
    timer=dict(type='IterTimerHook'),
    param_scheduler=dict(type='ParamSchedulerHook'),
    sampler_seed=dict(type='DistSamplerSeedHook'),
)
vis_backends = [dict(type='LocalVisBackend')]
log_level = 'INFO'
load_from = None
resume = False
