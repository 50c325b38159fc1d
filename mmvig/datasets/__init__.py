"""Data sets of mmvig: the generated `shapes`, for detection (mmdet) and segmentation (mmseg)."""
