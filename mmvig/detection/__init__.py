"""Parts of mmdet's detectors that wait less for the GPU and keep boxes in float32.

mmdet's own wait for the GPU once for each object and each level, shuffle all 240,000 anchors on the CPU to
draw 256, and make the anchors of a size anew for each batch. In mixed precision they round boxes to the
maps' dtype: in bfloat16 to whole multiples of 4 or 8 pixels from 512 on.
"""

import mmvig.compat  # noqa: F401, I001  before mmdet, which imports mmcv.ops
from mmvig.detection.data_preprocessor import DetDataPreprocessor
from mmvig.detection.roi_heads import FCNMaskHead, SingleRoIExtractor, StandardRoIHead
from mmvig.detection.rpn_head import RPNHead
from mmvig.detection.task_modules import AnchorGenerator, DeltaXYWHBBoxCoder, MaxIoUAssigner, RandomSampler

__all__ = [
    'AnchorGenerator',
    'DeltaXYWHBBoxCoder',
    'DetDataPreprocessor',
    'FCNMaskHead',
    'MaxIoUAssigner',
    'RPNHead',
    'RandomSampler',
    'SingleRoIExtractor',
    'StandardRoIHead',
]
