"""An exported detector beside mmdet's own predictions, on pictures."""

from collections.abc import Callable, Sequence
from itertools import cycle, islice

import cv2
import numpy as np
import torch
from mmdet.structures import DetDataSample
from mmengine.config import Config
from torch import Tensor, nn

from mmvig.datasets.scene import draw_scene
from mmvig.deploy.comparison import Detections, compare
from mmvig.engine.images import ImageReader
from mmvig.engine.preflight import SetupError

Shape = tuple[int, int]  # height and width


def check_detector(
    model: nn.Module, run: Callable, sizes: Sequence[Shape], pictures: list[np.ndarray]
) -> None:
    """Compare an exported detector with mmdet's own predictions, and print by how much they differ.

    Each picture is resized to one of the sizes. The first one is also compared in its own pixels.

    Args:
        model: mmdet's detector.
        run: takes ``images`` and maybe ``size`` and gives what was exported.
        sizes: each of them is checked at least once.
        pictures: ``[H, W]`` or ``[H, W, C]``, as a pipeline loads them.

    Raises:
        SetupError: They differ.
    """
    number, total = max(len(pictures), len(sizes)), 0
    cases = [(*each, False) for each in islice(zip(cycle(pictures), cycle(sizes), strict=False), number)]
    for picture, size, own in [*cases, (*cases[0][:2], True)]:
        images, expected = predict(model, picture, size, own)
        inputs = {'size': torch.tensor(picture.shape[:2])} if own else {}
        try:
            difference = compare(Detections(*run(images, **inputs)), expected)
        except ValueError as error:
            raise SetupError(
                f'at {list(size)} the exported model differs: {error}: nothing was written'
            ) from error
        print(f'1 x {size[0]} x {size[1]}{", in own pixels" if own else ""}: {difference}')
        total += difference.count
    if not total:
        print('No detection has a score above 0.05, so none was compared: name other --pictures.')


def predict(model: nn.Module, picture: np.ndarray, size: Shape, own: bool) -> tuple[Tensor, Detections]:
    """What a detector takes of a picture at a size, ``[1, C, H, W]``, and what mmdet predicts.

    Detections are in pixels of the resized picture, or of its ``own``.
    """
    height, width = size
    shape = picture.shape[:2] if own else size
    meta = dict(img_shape=size, ori_shape=shape, scale_factor=(width / shape[1], height / shape[0]))
    resized = np.atleast_3d(cv2.resize(picture, (width, height)))
    inputs = torch.from_numpy(np.ascontiguousarray(resized.transpose(2, 0, 1)))
    data = model.data_preprocessor(
        {'inputs': [inputs], 'data_samples': [DetDataSample(metainfo=meta)]}, False
    )
    with torch.no_grad():
        found = model.predict(data['inputs'], data['data_samples'], rescale=True)[0].pred_instances
    detections = Detections(found.bboxes, found.labels, found.scores, found.get('masks'))
    return data['inputs'][..., :height, :width].contiguous(), detections


def read_pictures(cfg: Config, files: list[str] | None) -> list[np.ndarray]:
    """Image files as the test pipeline loads them, or without any three of the generated `shapes`."""
    if files:
        return [ImageReader(cfg).load(file) for file in files]
    return [draw_scene(np.random.default_rng(seed))[0] for seed in range(3)]
