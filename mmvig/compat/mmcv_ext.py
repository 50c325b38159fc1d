"""Stands in for ``mmcv._ext``, mmcv's extension module, where mmcv came without compiled operators.

It has operators under the names and with the arguments that mmcv's Python code calls them by:

- ``nms`` and ``roi_align_*``, because two-stage detectors and post-processing need them: torchvision's
  kernels, which derive from the same sources.
- ``ms_deform_attn_*``, because Deformable DETR, DINO and Mask2Former call them on GPUs: mmcv's own
  PyTorch definition, which it takes by itself on CPUs only.
- ``sigmoid_focal_loss_*``, because mmdet's FocalLoss calls them on GPUs: the formula, in PyTorch.
- those of :mod:`mmvig.compat.convolutions`.

Half-precision input is computed in float32: torchvision's kernels know float16 only in part and
bfloat16 not at all, and so results are rounded once.
"""

from mmvig.compat.convolutions import (  # noqa: F401
    carafe_backward,
    carafe_forward,
    carafe_naive_backward,
    carafe_naive_forward,
    deform_conv_backward_input,
    deform_conv_backward_parameters,
    deform_conv_forward,
    masked_col2im_forward,
    masked_im2col_forward,
    modulated_deform_conv_backward,
    modulated_deform_conv_forward,
)

import torch
import torch.nn.functional as F
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


def ms_deform_attn_forward(
    value: Tensor,
    value_spatial_shapes: Tensor,
    value_level_start_index: Tensor,
    sampling_locations: Tensor,
    attention_weights: Tensor,
    im2col_step: int,
) -> Tensor:
    """Sum bilinear samples of several feature maps, weighted by attention.

    Args:
        value: [B, N, heads, C], the maps' pixels in row-major order, map after map.
        value_spatial_shapes: [levels, 2] height and width of each map.
        value_level_start_index: Unused; follows from the shapes.
        sampling_locations: [B, queries, heads, levels, points, 2] x and y, 0 to 1 across a map.
        attention_weights: [B, queries, heads, levels, points].
        im2col_step: Unused; images a kernel launch takes.

    Returns:
        [B, queries, heads * C].
    """
    dtype = torch.promote_types(value.dtype, torch.float32)
    arguments = [x.to(dtype) for x in (value, sampling_locations, attention_weights)]
    return _ms_deform_attn(value_spatial_shapes, *arguments).to(value.dtype)


def ms_deform_attn_backward(
    value: Tensor,
    value_spatial_shapes: Tensor,
    value_level_start_index: Tensor,
    sampling_locations: Tensor,
    attention_weights: Tensor,
    grad_output: Tensor,
    grad_value: Tensor,
    grad_sampling_loc: Tensor,
    grad_attn_weight: Tensor,
    im2col_step: int,
) -> None:
    """Write the gradients of :func:`ms_deform_attn_forward`.

    Args:
        value: As in the forward pass, and so the next four.
        value_spatial_shapes: See above.
        value_level_start_index: See above.
        sampling_locations: See above.
        attention_weights: See above.
        grad_output: [B, queries, heads * C], gradient at the result.
        grad_value: Shaped as ``value``, overwritten.
        grad_sampling_loc: Shaped as ``sampling_locations``, overwritten.
        grad_attn_weight: Shaped as ``attention_weights``, overwritten.
        im2col_step: Unused; as in the forward pass.
    """
    dtype = torch.promote_types(value.dtype, torch.float32)
    arguments = [
        x.detach().to(dtype).requires_grad_() for x in (value, sampling_locations, attention_weights)
    ]
    with torch.enable_grad():
        output = _ms_deform_attn(value_spatial_shapes, *arguments)
    grads = torch.autograd.grad(output, arguments, grad_output.to(dtype))
    for buffer, grad in zip((grad_value, grad_sampling_loc, grad_attn_weight), grads, strict=True):
        buffer.copy_(grad)


def _ms_deform_attn(shapes: Tensor, value: Tensor, locations: Tensor, weights: Tensor) -> Tensor:
    # Not above: mmcv.ops imports this module.
    from mmcv.ops.multi_scale_deform_attn import multi_scale_deformable_attn_pytorch

    # As numbers: one copy from the GPU instead of one for each side of each map.
    return multi_scale_deformable_attn_pytorch(value, shapes.tolist(), locations, weights)


def sigmoid_focal_loss_forward(
    input: Tensor, target: Tensor, weight: Tensor, output: Tensor, gamma: float, alpha: float
) -> None:
    """Write -alpha (1 - p)^gamma log p where a class is the target, -(1 - alpha) p^gamma log (1 - p) else.

    Args:
        input: [N, classes] logits, p = sigmoid(input).
        target: [N] classes; the number of classes stands for the background.
        weight: [classes] factors by target, or of no elements: then 1, and backgrounds are allowed.
        output: [N, classes], overwritten.
        gamma: How far easy examples are discounted.
        alpha: Share of the targets.
    """
    dtype = torch.promote_types(input.dtype, torch.float32)
    output.copy_(_sigmoid_focal_loss(input.to(dtype), target, weight, gamma, alpha))


def sigmoid_focal_loss_backward(
    input: Tensor, target: Tensor, weight: Tensor, grad_input: Tensor, gamma: float, alpha: float
) -> None:
    """Write the derivative of each loss of :func:`sigmoid_focal_loss_forward` by its logit.

    Args:
        input: As in the forward pass, and so all but ``grad_input``.
        target: See above.
        weight: See above.
        grad_input: [N, classes], overwritten.
        gamma: See above.
        alpha: See above.
    """
    dtype = torch.promote_types(input.dtype, torch.float32)
    logits = input.detach().to(dtype).requires_grad_()
    with torch.enable_grad():
        loss = _sigmoid_focal_loss(logits, target, weight, gamma, alpha).sum()
    grad_input.copy_(torch.autograd.grad(loss, logits)[0])


def _sigmoid_focal_loss(
    logits: Tensor, target: Tensor, weight: Tensor, gamma: float, alpha: float
) -> Tensor:
    classes = torch.arange(logits.shape[1], device=logits.device)
    loss = torch.where(
        target[:, None] == classes,
        -alpha * torch.sigmoid(-logits) ** gamma * F.logsigmoid(logits),
        -(1 - alpha) * torch.sigmoid(logits) ** gamma * F.logsigmoid(-logits),
    )
    return loss * weight[target, None] if weight.numel() else loss


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
