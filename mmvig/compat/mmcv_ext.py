"""Stands in for ``mmcv._ext``, mmcv's extension module, where mmcv came without compiled operators.

It has the operators under the names and with the arguments that ``mmcv/ops/nms.py`` and
``mmcv/ops/roi_align.py`` call, computed by torchvision's kernels, which derive from the same
sources. Half-precision input is computed in float32: torchvision's kernels know float16 only in
part and bfloat16 not at all.
"""

import torch
import torchvision  # registers the operators called below as torch.ops.torchvision.*
from torch import Tensor

_AVERAGE = 1  # mmcv's code for pool_mode='avg'; 0 is 'max'


def nms(bboxes: Tensor, scores: Tensor, iou_threshold: float, offset: int) -> Tensor:
    """Indices of the boxes that non-maximum suppression keeps, by descending score.

    Args:
        bboxes: [N, 4] corners x1, y1, x2, y2; N may be 0.
        scores: [N].
        iou_threshold: A box goes when its IoU with a better one is above this.
        offset: Added to each box's width and height: 0, or 1 for corners that are pixel indices.

    Returns:
        int64 indices, [number kept].
    """
    dtype = torch.promote_types(torch.promote_types(bboxes.dtype, scores.dtype), torch.float32)
    bboxes = bboxes.to(dtype, copy=offset != 0)
    if offset:
        bboxes[:, 2:] += offset
    return torchvision.ops.nms(bboxes, scores.to(dtype), iou_threshold)


def roi_align_forward(
    input: Tensor,
    rois: Tensor,
    output: Tensor,
    argmax_y: Tensor,
    argmax_x: Tensor,
    aligned_height: int,
    aligned_width: int,
    spatial_scale: float,
    sampling_ratio: int,
    pool_mode: int,
    aligned: bool,
) -> None:
    """Average-pool each RoI's bilinear samples into ``output``.

    Args:
        input: [B, C, H, W] feature map.
        rois: [R, 5] image index, x1, y1, x2, y2 in image coordinates; R may be 0.
        output: [R, C, aligned_height, aligned_width], overwritten.
        argmax_y: Unused; max pooling's buffer.
        argmax_x: Unused; max pooling's buffer.
        aligned_height: Bins per RoI, vertically.
        aligned_width: Bins per RoI, horizontally.
        spatial_scale: Feature map size over image size.
        sampling_ratio: Samples per bin and axis; 0 or less takes one a feature pixel.
        pool_mode: 1, average. (0, max, has no torchvision operator.)
        aligned: Whether pixel centres lie at half integers (mmcv's default).

    Raises:
        NotImplementedError: pool_mode is max.
    """
    _check_pool_mode(pool_mode)
    dtype = torch.promote_types(input.dtype, torch.float32)
    pooled = torch.ops.torchvision.roi_align(
        input.to(dtype),
        rois.to(dtype),
        spatial_scale,
        aligned_height,
        aligned_width,
        sampling_ratio,
        aligned,
    )
    output.copy_(pooled)


def roi_align_backward(
    grad_output: Tensor,
    rois: Tensor,
    argmax_y: Tensor,
    argmax_x: Tensor,
    grad_input: Tensor,
    aligned_height: int,
    aligned_width: int,
    spatial_scale: float,
    sampling_ratio: int,
    pool_mode: int,
    aligned: bool,
) -> None:
    """Write the gradient of :func:`roi_align_forward` at ``input`` into ``grad_input``.

    Args:
        grad_output: [R, C, aligned_height, aligned_width], gradient at the pooled features.
        rois: As in the forward pass.
        argmax_y: Unused; max pooling's buffer.
        argmax_x: Unused; max pooling's buffer.
        grad_input: [B, C, H, W], overwritten.
        aligned_height: As in the forward pass, and so the others.
        aligned_width: See above.
        spatial_scale: See above.
        sampling_ratio: See above.
        pool_mode: See above.
        aligned: See above.

    Raises:
        NotImplementedError: pool_mode is max.
    """
    _check_pool_mode(pool_mode)
    dtype = torch.promote_types(grad_output.dtype, torch.float32)
    grad = torch.ops.torchvision._roi_align_backward(
        grad_output.to(dtype),
        rois.to(dtype),
        spatial_scale,
        aligned_height,
        aligned_width,
        *grad_input.shape,
        sampling_ratio,
        aligned,
    )
    grad_input.copy_(grad)


def _check_pool_mode(pool_mode: int) -> None:
    if pool_mode != _AVERAGE:
        raise NotImplementedError(
            "RoIAlign with pool_mode='max' needs mmcv with compiled operators: install it with "
            "them, or use pool_mode='avg'."
        )


def __getattr__(name: str):
    """Any other operator: there, as importing ``mmcv.ops`` demands, but failing when called."""
    if name.startswith('__'):
        raise AttributeError(f'module {__name__!r} has no attribute {name!r}')

    def missing(*args, **kwargs):
        raise NotImplementedError(
            f'mmcv is installed without compiled operators, and {name!r} has no stand-in in '
            'mmvig.compat: install mmcv with compiled operators, or use a model (head) without it.'
        )

    return missing
