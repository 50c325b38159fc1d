# What all our detectors share: images of COCO as ImageNet's are normalised, put together on the GPU.
model = dict(
    data_preprocessor=dict(
        type='mmvig.DetDataPreprocessor',
        mean=[123.675, 116.28, 103.53],
        std=[58.395, 57.12, 57.375],
        bgr_to_rgb=True,
        non_blocking=True,  # copies to the GPU do not wait for what it still computes
    )
)
