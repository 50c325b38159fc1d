"""What `tools/export_onnx.py` exports of mmdet's detectors, and how it compares their detections."""

import mmvig.compat  # noqa: F401  before mmdet, which imports mmcv.ops
