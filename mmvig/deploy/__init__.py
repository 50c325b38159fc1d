"""What `tools/export_onnx.py` exports of detectors and segmentors, and how it compares detections."""

import mmvig.compat  # noqa: F401  before mmdet, which imports mmcv.ops
