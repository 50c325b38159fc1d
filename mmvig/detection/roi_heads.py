"""Features of regions and their masks."""

from collections.abc import Sequence

import torch
from mmdet.models.roi_heads.mask_heads import FCNMaskHead as _FCNMaskHead
from mmdet.models.roi_heads.roi_extractors import SingleRoIExtractor as _SingleRoIExtractor
from torch import Tensor

from mmvig.detection.task_modules import is_traced

MASKS = 32  # of whose multiples FCNMaskHead makes its batches


class SingleRoIExtractor(_SingleRoIExtractor):
    """mmdet's SingleRoIExtractor with one wait for the GPU, and RoIs that are not rounded under autocast.

    Arguments are mmdet's. torchvision's RoIAlign computes in float32 under autocast; where the layer is
    mmcv's, RoIs have the maps' dtype, as it asks for.
    """

    def forward(
        self, feats: Sequence[Tensor], rois: Tensor, roi_scale_factor: float | None = None
    ) -> Tensor:
        """Features ``[N, C, h, w]`` of RoIs ``[N, 5]`` (image, left, top, right, bottom).

        Args:
            feats: each level's maps ``[B, C, H, W]``.
            rois: the regions, in pixels of the image.
            roi_scale_factor: scales them around their centres. Default: None, not at all.
        """
        if len(feats) == 1 or len(rois) == 0:
            return super().forward(feats, rois, roi_scale_factor)
        levels = self.map_roi_levels(rois, len(feats))
        if roi_scale_factor is not None:
            rois = self.roi_rescale(rois, roi_scale_factor)
        keeps = torch.is_autocast_enabled(rois.device.type) and all(
            getattr(layer, 'use_torchvision', False) for layer in self.roi_layers
        )
        rois = rois.float() if keeps else rois.type_as(feats[0])
        # mmdet gives zeros for RoIs of no level, whose area is negative or NaN.
        levels = torch.where((levels >= 0) & (levels < len(feats)), levels, len(feats))
        order = levels.argsort(stable=True)
        counts = (levels[:, None] == torch.arange(len(feats) + 1, device=levels.device)).sum(0).tolist()
        found, unused = [], []
        for layer, x, own in zip(self.roi_layers, feats, rois[order].split(counts), strict=False):
            if len(own):
                found.append(layer(x, own))
            else:
                unused.append(x.sum() * 0.0)  # a gradient for each level, as DDP wants it
        like = found[0] if found else feats[0]
        result = like.new_zeros(len(rois), self.out_channels, *self.roi_layers[0].output_size)
        if found:
            result.index_copy_(0, order[: len(rois) - counts[-1]], torch.cat(found))
        return result + sum(unused) if unused else result


class FCNMaskHead(_FCNMaskHead):
    """mmdet's FCNMaskHead, which meets few sizes of batches. Arguments are mmdet's.

    How many RoIs have masks changes in each iteration, and cuDNN plans each convolution anew for each
    number. So they are filled up with zeros to a multiple of :data:`MASKS`, which is left out again.
    """

    def __call__(self, x: Tensor) -> Tensor:
        """Masks ``[N, classes, 2h, 2w]`` from features of RoIs ``[N, C, h, w]``."""
        # A batch norm would count them, and a trace would fix how many there are.
        if self.norm_cfg is not None or is_traced() or len(x) % MASKS == 0:
            return super().__call__(x)
        filled = torch.cat([x, x.new_zeros(-len(x) % MASKS, *x.shape[1:])])
        return super().__call__(filled)[: len(x)]
