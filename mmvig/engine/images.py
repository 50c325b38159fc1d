"""Image files read as a config's test pipeline reads them, for tools that are given files."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from mmengine.config import Config, ConfigDict
from mmengine.registry import MODELS, TRANSFORMS, init_default_scope
from torch import Tensor, nn

from mmvig.engine.errors import reason
from mmvig.engine.preflight import SetupError, leaf_datasets

MAX_SIDE = 16384


class ImageReader:
    """The test pipeline of a config, less what loads annotations.

    Raises:
        SetupError: The config has no test pipeline.
    """

    def __init__(self, cfg: Config):
        if cfg.get('default_scope'):
            init_default_scope(cfg.default_scope)
        steps = [TRANSFORMS.build(step) for step in _test_pipeline(cfg)]
        self.transforms = [step for step in steps if not _is_about_annotations(step)]

    def load(self, path: str) -> np.ndarray:
        """The image [H, W] or [H, W, C] as the pipeline loads it, before any other change.

        Raises:
            SetupError: The file cannot be read, or its values are not finite.
        """
        return self._run(path)[0]

    def prepare(self, path: str) -> tuple[np.ndarray, dict]:
        """The loaded image, and the batch of one that a model's ``test_step`` takes.

        Raises:
            SetupError: As :meth:`load`, or a later transform cannot take the image.
        """
        image, results = self._run(path, to_the_end=True)
        return image, {key: [results[key]] for key in ('inputs', 'data_samples')}

    def _run(self, path: str, to_the_end: bool = False) -> tuple[np.ndarray, dict]:
        results, image = {'img_path': str(path), 'img_id': 0}, None
        for step in self.transforms:
            try:
                results = step(results)
            except Exception as error:  # of as many types as there are decoders
                raise SetupError(
                    f'{path} cannot be read by {type(step).__name__}: {reason(error)}'
                ) from error
            if results is None:
                raise SetupError(
                    f'{path} cannot be read by {type(step).__name__}, which gives nothing for it'
                )
            if image is None and 'img' in results:
                image = _checked(results['img'], path)
                if not to_the_end:
                    break
        if image is None:
            raise SetupError(
                f'{path} cannot be read: the test pipeline has no transform that loads an image'
            )
        return image, results


def _test_pipeline(cfg: Config) -> list[ConfigDict]:
    """The pipeline of the first data set that is tested, or else validated, on."""
    for split in ('test', 'val'):
        loader = cfg.get(f'{split}_dataloader')
        if loader:
            _, dataset = next(leaf_datasets(loader.dataset, ''))
            if dataset.get('pipeline'):
                return dataset.pipeline
    if cfg.get('test_pipeline'):
        return cfg.test_pipeline
    raise SetupError(
        f'{cfg.filename} has no test pipeline to read images with: add a test_dataloader or a test_pipeline'
    )


def _is_about_annotations(step: object) -> bool:
    return any('Annotation' in kind.__name__ for kind in type(step).__mro__)


def _checked(image: object, path: str) -> np.ndarray:
    """A copy, as later transforms may write into the image."""
    if not isinstance(image, np.ndarray) or image.ndim not in (2, 3) or 0 in image.shape:
        what = f'of shape {list(image.shape)}' if hasattr(image, 'shape') else f'a {type(image).__name__}'
        raise SetupError(f'{path} is {what}, no image [H, W] or [H, W, channels]')
    if image.dtype.kind not in 'buif':
        raise SetupError(f'{path} holds values of type {image.dtype}, an image has numbers')
    if not np.isfinite(image).all():
        raise SetupError(f'{path} has pixels that are NaN or infinite')
    return image.copy()


def check_shape(shape: Sequence[int] | None, least: int = 1) -> None:
    """Check that a ``--shape``, if there is one, is that of an image.

    Raises:
        SetupError: It is not.
    """
    if shape and not all(least <= side <= MAX_SIDE for side in shape):
        raise SetupError(
            f'--shape must be two sizes of at least {least} and up to {MAX_SIDE}, got {shape[0]} {shape[1]}'
        )


def input_channels(model: nn.Module) -> int:
    """Channels of the images that a model takes: those of its first convolution, or 3 where it has none."""
    first = (module.in_channels for module in model.modules() if isinstance(module, nn.Conv2d))
    return next(first, 3)


def preprocess(cfg: Config, image: np.ndarray) -> Tensor:
    """A loaded image as the config's data preprocessor hands it to the model, [1, C, H, W], not padded.

    Raises:
        SetupError: The config has no data preprocessor.
    """
    settings = cfg.model.get('data_preprocessor') or cfg.get('data_preprocessor')
    if not settings:
        raise SetupError(
            f'{cfg.filename} has no data_preprocessor to normalise an image with: add one to its model'
        )
    if cfg.get('default_scope'):
        init_default_scope(cfg.default_scope)
    # mmpretrain's classifiers add the type where it is not named.
    preprocessor = MODELS.build({'type': 'mmpretrain.ClsDataPreprocessor', **settings})
    pixels = np.ascontiguousarray(np.atleast_3d(image).transpose(2, 0, 1))
    batch = preprocessor({'inputs': [torch.from_numpy(pixels)]}, False)['inputs']
    return batch[..., : image.shape[0], : image.shape[1]].contiguous()


def as_picture(image: np.ndarray) -> np.ndarray:
    """A loaded image to draw on: uint8 [H, W, 3], BGR as OpenCV and the pipelines have it.

    Other numbers than bytes are stretched from the least to the largest, but for floats that hold bytes.
    Of one or two channels the first is shown in grey, of more than three the first three.
    """
    channels = np.atleast_3d(image)
    channels = channels[..., :3] if channels.shape[2] >= 3 else channels[..., :1].repeat(3, axis=2)
    if channels.dtype != np.uint8:
        least, largest = float(channels.min()), float(channels.max())
        holds_bytes = channels.dtype.kind == 'f' and least >= 0 and 1 < largest <= 255
        if not holds_bytes:
            channels = (channels - least) * (255 / max(largest - least, 1e-12))
        channels = channels.round().astype(np.uint8)
    return np.ascontiguousarray(channels)
