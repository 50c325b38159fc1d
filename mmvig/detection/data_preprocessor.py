"""Batches of images put together on the GPU."""

from collections.abc import Mapping, Sequence

import torch
from mmdet.models.data_preprocessors import DetDataPreprocessor as _DetDataPreprocessor
from torch import Tensor


class DetDataPreprocessor(_DetDataPreprocessor):
    """mmdet's DetDataPreprocessor, which puts images where they belong in a batch. Arguments are mmdet's.

    mmdet's own swaps channels by an index, which is copied to the GPU with a wait, and computes sizes with
    tensors on the CPU, which wakes all of PyTorch's threads for a few numbers.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self._swaps, self._normalizes = self._channel_conversion, self._enable_normalize

    def cast_data(self, data):
        """Move a batch to the device; the usual images are normalised, padded and stacked there."""
        data = super().cast_data(data)
        usual = isinstance(data, Mapping) and self._are_usual(data.get('inputs'))
        # mmdet's forward(), which calls this, does what is left to do.
        self._channel_conversion = self._swaps and not usual
        self._enable_normalize = self._normalizes and not usual
        return {**data, 'inputs': self._stacked(data['inputs'])} if usual else data

    def _are_usual(self, images: object) -> bool:
        """Whether they are several images [C, H, W] of as many channels as normalisation is for."""
        if not isinstance(images, (list, tuple)) or not images:
            return False
        if not all(isinstance(x, Tensor) and x.ndim == 3 and not x.requires_grad for x in images):
            return False
        channels = len(images[0])
        normalizes = not self._normalizes or (
            len(self.mean) in (1, channels) and self.mean.dtype == torch.float32
        )
        return normalizes and all(len(x) == channels for x in images) and (not self._swaps or channels == 3)

    def _stacked(self, images: Sequence[Tensor]) -> Tensor:
        sides = [max(image.shape[axis] for image in images) for axis in (1, 2)]
        height, width = (-(-side // self.pad_size_divisor) * self.pad_size_divisor for side in sides)
        shape = len(images), len(images[0]), height, width
        batch = torch.full(shape, self.pad_value, dtype=torch.float32, device=images[0].device)
        for place, image in zip(batch, images, strict=True):
            image = (image.flip(0) if self._swaps else image).float()
            if self._normalizes:
                image = (image - self.mean) / self.std
            place[:, : image.shape[1], : image.shape[2]] = image
        return batch
