"""What `tools/export_onnx.py` and `export_aoti.py` export, and how detections are compared."""

import mmvig.compat  # noqa: F401  before mmdet, which imports mmcv.ops


def open_session(model: bytes | str):
    """An ONNX model, or the file that has one, in onnxruntime on the CPU."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # it warns of optional inputs
    return onnxruntime.InferenceSession(model, options, providers=['CPUExecutionProvider'])
