_base_ = ['./default_runtime.py']

default_scope = 'mmseg'
env_cfg = dict(cudnn_benchmark=True)  # training crops have one size
default_hooks = dict(
    logger=dict(type='LoggerHook', interval=50, log_metric_by_epoch=False),
    checkpoint=dict(
        type='CheckpointHook', by_epoch=False, interval=16000, max_keep_ckpts=2, save_best='mIoU'
    ),
    visualization=dict(type='SegVisualizationHook'),
)
visualizer = dict(type='SegLocalVisualizer', vis_backends={{_base_.vis_backends}}, name='visualizer')
log_processor = dict(type='LogProcessor', window_size=50, by_epoch=False)
tta_model = dict(type='SegTTAModel')
