"""mmseg's segmentors as modules that can be exported."""

import torch.nn.functional as F
from mmseg.models.decode_heads.decode_head import BaseDecodeHead
from torch import Tensor, nn

from mmvig.engine.preflight import SetupError
from mmvig.ops.plain import has_methods_of


class Segmentor(nn.Module):
    """A segmentor of mmseg without what is for training alone: images to logits of their size.

    Args:
        model: the segmentor.
        labels: whether to give the label map too.

    Raises:
        SetupError: Its head does not predict as mmseg's BaseDecodeHead does.
    """

    def __init__(self, model: nn.Module, labels: bool):
        super().__init__()
        if not has_methods_of(model.decode_head, BaseDecodeHead, 'predict', 'predict_by_feat'):
            kind = type(model.decode_head).__name__
            raise SetupError(f'decode_head is a {kind}, which cannot be exported')
        self.model = model
        self.output_names = ['logits', 'labels'] if labels else ['logits']

    def forward(self, images: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        """[B, C, H, W] -> [B, classes, H, W], and int64 [B, H, W]."""
        head = self.model.decode_head
        logits = head(self.model.extract_feat(images))
        logits = F.interpolate(logits, images.shape[2:], mode='bilinear', align_corners=head.align_corners)
        if 'labels' not in self.output_names:
            return logits
        if logits.shape[1] == 1:
            return logits, (logits.sigmoid() > head.threshold).squeeze(1).long()
        return logits, logits.argmax(1)
