# Crops of images whose short side is one of 16, from 256 to 1024.
_base_ = ['./ade20k.py']

resize = dict(
    type='RandomChoiceResize',
    scales=[int(51.2 * tenths) for tenths in range(5, 21)],
    resize_type='ResizeShortestEdge',
    max_size=2048,
)
train_pipeline = [*_base_.train_pipeline[:2], resize, *_base_.train_pipeline[3:]]
train_dataloader = dict(dataset=dict(pipeline=train_pipeline))
