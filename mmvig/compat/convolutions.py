"""Convolutions of ``mmvig.compat.mmcv_ext``, under the names and with the arguments of mmcv's extension.

- ``deform_conv_*`` and ``modulated_deform_conv_*``, because GA-RPN, NAS-FCOS, DyHead, DDOD, TOOD, VFNet and
  RepPoints need them: torchvision's kernels, which derive from the same sources.
- ``carafe_*`` and ``masked_*``, because FPN_CARAFE and guided anchoring need them: the sums, in PyTorch.

Half-precision input is computed in float32, and results are rounded once.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
import torchvision  # noqa: F401  registers torch.ops.torchvision
from torch import Tensor

# What torchvision takes, in its order, by the names of mmcv's two versions.
_VERSION_1 = ('dH', 'dW', 'padH', 'padW', 'dilationH', 'dilationW', 'group', 'deformable_group')
_VERSION_2 = (
    *('stride_h', 'stride_w', 'pad_h', 'pad_w', 'dilation_h', 'dilation_w'),
    *('group', 'deformable_group'),
)


def deform_conv_forward(
    input: Tensor, weight: Tensor, offset: Tensor, output: Tensor, *buffers: Tensor, **numbers: int
) -> None:
    """Write a deformable convolution (version 1) into ``output``.

    Args:
        input: [B, C, H, W].
        weight: [O, C / group, kH, kW].
        offset: [B, deformable_group * kH * kW * 2, H', W'], y before x.
        output: [B, O, H', W'], overwritten.
        *buffers: Unused.
        **numbers: Stride ``dH``, ``dW``; ``padH``, ``padW``; ``dilationH``, ``dilationW``; ``group`` and
            ``deformable_group``, the groups of channels with kernels and with offsets of their own; and
            unused ones.
    """
    output.copy_(_deform_conv(input, weight, offset, None, None, [numbers[key] for key in _VERSION_1]))


def deform_conv_backward_input(
    input: Tensor,
    offset: Tensor,
    grad_output: Tensor,
    grad_input: Tensor,
    grad_offset: Tensor,
    weight: Tensor,
    *buffers: Tensor,
    **numbers: int,
) -> None:
    """Write the gradients of :func:`deform_conv_forward` at its input and offsets.

    Args:
        input: As in the forward pass, and so ``offset``, ``weight``, ``buffers`` and ``numbers``.
        offset: See above.
        grad_output: [B, O, H', W'], gradient at the result.
        grad_input: Shaped as ``input``, overwritten.
        grad_offset: Shaped as ``offset``, overwritten.
        weight: See above.
        *buffers: See above.
        **numbers: See above.
    """
    numbers = [numbers[key] for key in _VERSION_1]
    grads = _deform_conv_gradients(grad_output, input, weight, offset, None, None, numbers)
    grad_input.copy_(grads[0])
    grad_offset.copy_(grads[2])


def deform_conv_backward_parameters(
    input: Tensor,
    offset: Tensor,
    grad_output: Tensor,
    grad_weight: Tensor,
    *buffers: Tensor,
    scale: float,
    **numbers: int,
) -> None:
    """Add ``scale`` times the gradient of :func:`deform_conv_forward` at its weight to ``grad_weight``.

    Args:
        input: As in the forward pass, and so ``offset``, ``buffers`` and ``numbers``.
        offset: See above.
        grad_output: [B, O, H', W'], gradient at the result.
        grad_weight: [O, C / group, kH, kW], added to.
        *buffers: See above.
        scale: Factor of the gradient.
        **numbers: See above.
    """
    numbers = [numbers[key] for key in _VERSION_1]
    # A convolution's gradient at its weight depends on the weight's shape alone.
    grads = _deform_conv_gradients(grad_output, input, grad_weight, offset, None, None, numbers)
    grad_weight.add_(grads[1].to(grad_weight.dtype), alpha=scale)


def modulated_deform_conv_forward(
    input: Tensor,
    weight: Tensor,
    bias: Tensor,
    ones: Tensor,
    offset: Tensor,
    mask: Tensor,
    output: Tensor,
    columns: Tensor,
    *,
    with_bias: bool,
    **numbers: int,
) -> None:
    """Write a modulated deformable convolution (version 2) into ``output``.

    Args:
        input: [B, C, H, W].
        weight: [O, C / group, kernel_h, kernel_w].
        bias: [O], unused without ``with_bias``.
        ones: Unused, a buffer; ``columns`` too.
        offset: [B, deformable_group * kernel_h * kernel_w * 2, H', W'], y before x. Of a larger map, as
            DyHead has them, the first values in memory count, as with mmcv's own kernel.
        mask: [B, deformable_group * kernel_h * kernel_w, H', W'], a factor of each sample; likewise.
        output: [B, O, H', W'], overwritten.
        columns: See above.
        with_bias: Whether there is a bias.
        **numbers: As in :func:`deform_conv_forward`, by the names ``stride_h``, ``stride_w``, ``pad_h``,
            ``pad_w``, ``dilation_h``, ``dilation_w``, ``group`` and ``deformable_group``.
    """
    numbers = [numbers[key] for key in _VERSION_2]
    offset, mask = (_read_as_map(x, output.shape[2:]) for x in (offset, mask))
    output.copy_(_deform_conv(input, weight, offset, mask, bias if with_bias else None, numbers))


def modulated_deform_conv_backward(
    input: Tensor,
    weight: Tensor,
    bias: Tensor,
    ones: Tensor,
    offset: Tensor,
    mask: Tensor,
    columns: Tensor,
    grad_input: Tensor,
    grad_weight: Tensor,
    grad_bias: Tensor,
    grad_offset: Tensor,
    grad_mask: Tensor,
    grad_output: Tensor,
    *,
    with_bias: bool,
    **numbers: int,
) -> None:
    """Write the gradients of :func:`modulated_deform_conv_forward`, each shaped as what it belongs to."""
    numbers = [numbers[key] for key in _VERSION_2]
    offset, mask = (_read_as_map(x, grad_output.shape[2:]) for x in (offset, mask))
    bias = bias if with_bias else None
    grads = _deform_conv_gradients(grad_output, input, weight, offset, mask, bias, numbers)
    grad_input.copy_(grads[0])
    grad_weight.copy_(grads[1])
    for buffer, grad in zip((grad_offset, grad_mask), grads[2:4], strict=True):
        unread = buffer[0].numel() - grad[0].numel()
        buffer.copy_(F.pad(grad.flatten(1), (0, unread)).view_as(buffer))
    if with_bias:
        grad_bias.copy_(grads[4])


def _read_as_map(values: Tensor, size: Sequence[int]) -> Tensor:
    """Each image's first values, [B, K, ...] read as [B, K, *size]."""
    count = values.shape[1] * size[0] * size[1]
    return values.flatten(1)[:, :count].reshape(*values.shape[:2], *size)


def _deform_conv(
    input: Tensor,
    weight: Tensor,
    offset: Tensor,
    mask: Tensor | None,
    bias: Tensor | None,
    numbers: Sequence[int],
) -> Tensor:
    tensors = _for_torchvision(input, weight, offset, mask, bias)
    return torch.ops.torchvision.deform_conv2d(*tensors, *numbers, mask is not None)


def _deform_conv_gradients(
    grad_output: Tensor,
    input: Tensor,
    weight: Tensor,
    offset: Tensor,
    mask: Tensor | None,
    bias: Tensor | None,
    numbers: Sequence[int],
) -> tuple[Tensor, ...]:
    """Gradients at input, weight, offset, mask and bias."""
    (grad_output,) = _in_full_precision(grad_output)
    tensors = _for_torchvision(input, weight, offset, mask, bias)
    return torch.ops.torchvision._deform_conv2d_backward(grad_output, *tensors, *numbers, mask is not None)


def _for_torchvision(
    input: Tensor, weight: Tensor, offset: Tensor, mask: Tensor | None, bias: Tensor | None
) -> list[Tensor]:
    """The tensors as torchvision takes them: a mask that it is told to ignore, a bias of zeros."""
    mask = offset.new_zeros(offset.shape[0], 1) if mask is None else mask
    bias = weight.new_zeros(weight.shape[0]) if bias is None else bias
    return _in_full_precision(input, weight, offset, mask, bias)


def _in_full_precision(*tensors: Tensor) -> list[Tensor]:
    return [x.to(torch.promote_types(x.dtype, torch.float32)).contiguous() for x in tensors]


def carafe_naive_forward(
    features: Tensor, masks: Tensor, output: Tensor, kernel_size: int, group_size: int, scale_factor: int
) -> None:
    """Write features, upsampled with a kernel of its own at each new pixel, into ``output``.

    Args:
        features: [B, C, H, W].
        masks: [B, group_size * kernel_size**2, scale_factor * H, scale_factor * W], the kernels.
        output: [B, C, scale_factor * H, scale_factor * W], overwritten.
        kernel_size: Side of the window of old pixels, odd.
        group_size: Groups of channels with kernels of their own.
        scale_factor: New pixels to a side of an old one.
    """
    arguments = _in_full_precision(features, masks)
    output.copy_(_carafe(*arguments, kernel_size, group_size, scale_factor))


def carafe_naive_backward(
    grad_output: Tensor,
    features: Tensor,
    masks: Tensor,
    grad_input: Tensor,
    grad_masks: Tensor,
    kernel_size: int,
    group_size: int,
    scale_factor: int,
) -> None:
    """Write the gradients of :func:`carafe_naive_forward` at features and masks."""
    arguments = [x.detach().requires_grad_() for x in _in_full_precision(features, masks)]
    with torch.enable_grad():
        output = _carafe(*arguments, kernel_size, group_size, scale_factor)
    grads = torch.autograd.grad(output, arguments, grad_output.to(output.dtype))
    for buffer, grad in zip((grad_input, grad_masks), grads, strict=True):
        buffer.copy_(grad)


def carafe_forward(
    features: Tensor,
    masks: Tensor,
    rfeatures: Tensor,
    routput: Tensor,
    rmasks: Tensor,
    output: Tensor,
    kernel_size: int,
    group_size: int,
    scale_factor: int,
) -> None:
    """:func:`carafe_naive_forward`, which also keeps the features in ``rfeatures`` for the gradients."""
    sizes = {'kernel_size': kernel_size, 'group_size': group_size, 'scale_factor': scale_factor}
    carafe_naive_forward(features, masks, output, **sizes)
    rfeatures.copy_(features)


def carafe_backward(
    grad_output: Tensor,
    rfeatures: Tensor,
    masks: Tensor,
    rgrad_output: Tensor,
    rgrad_input_hs: Tensor,
    rgrad_input: Tensor,
    rgrad_masks: Tensor,
    grad_input: Tensor,
    grad_masks: Tensor,
    kernel_size: int,
    group_size: int,
    scale_factor: int,
) -> None:
    """Write the gradients of :func:`carafe_forward` at features and masks."""
    sizes = {'kernel_size': kernel_size, 'group_size': group_size, 'scale_factor': scale_factor}
    carafe_naive_backward(grad_output, rfeatures, masks, grad_input, grad_masks, **sizes)


def _carafe(features: Tensor, masks: Tensor, kernel_size: int, group_size: int, scale: int) -> Tensor:
    height, width = features.shape[2:]
    border = kernel_size // 2
    # [B, groups, C / groups, H, 1, W, 1] under [B, groups, kernel_size**2, 1, H, scale, W, scale]
    padded = F.pad(features, (border,) * 4).unflatten(1, (group_size, -1))
    kernels = masks.reshape(len(masks), group_size, kernel_size**2, 1, height, scale, width, scale)
    total = 0
    for point in range(kernel_size**2):  # one at a time: all windows at once are large
        row, column = divmod(point, kernel_size)
        window = padded[..., row : row + height, column : column + width]
        total = total + window[..., :, None, :, None] * kernels[:, :, point]
    return total.flatten(5, 6).flatten(3, 4).flatten(1, 2)


def masked_im2col_forward(
    im: Tensor,
    mask_h_idx: Tensor,
    mask_w_idx: Tensor,
    col: Tensor,
    kernel_h: int,
    kernel_w: int,
    pad_h: int,
    pad_w: int,
) -> None:
    """Write the windows around some pixels, as a convolution sees them, into ``col``.

    Args:
        im: [1, C, H, W].
        mask_h_idx: [N] rows of the pixels.
        mask_w_idx: [N] columns of the pixels.
        col: [C * kernel_h * kernel_w, N], overwritten.
        kernel_h: Height of a window.
        kernel_w: Width of a window.
        pad_h: Zeros above and below.
        pad_w: Zeros at the sides.
    """
    padded = F.pad(im[0], (pad_w, pad_w, pad_h, pad_h))
    windows = padded.unfold(1, kernel_h, 1).unfold(2, kernel_w, 1)  # [C, H', W', kernel_h, kernel_w]
    col.copy_(windows[:, mask_h_idx, mask_w_idx].permute(0, 2, 3, 1).flatten(0, 2))


def masked_col2im_forward(
    col: Tensor,
    mask_h_idx: Tensor,
    mask_w_idx: Tensor,
    im: Tensor,
    height: int,
    width: int,
    channels: int,
) -> None:
    """Write values to some pixels of an image.

    Args:
        col: [channels, N].
        mask_h_idx: [N] rows of the pixels.
        mask_w_idx: [N] columns of the pixels.
        im: [1, channels, height, width].
        height: Known from ``im``, and so the others.
        width: See above.
        channels: See above.
    """
    im[0, :, mask_h_idx, mask_w_idx] = col
