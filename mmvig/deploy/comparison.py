"""Whether two lists of detections are the same, as far as anybody would notice."""

from typing import NamedTuple

import torch
from torch import Tensor

LEAST_SCORE = 0.05
BOXES, SCORES = 1e-2, 1e-3  # pixels; of 1
MASKS, PIXELS = 1e-2, 2  # share of a box's pixels in which a mask may differ, besides so many


class Detections(NamedTuple):
    """N detections of a picture."""

    boxes: Tensor  # [N, 4]
    labels: Tensor  # [N]
    scores: Tensor  # [N]
    masks: Tensor | None = None  # [N, H, W], bool


class Difference(NamedTuple):
    """By how much detections differ at most."""

    count: int  # how many were compared
    boxes: float  # pixels
    scores: float
    masks: float | None = None  # share of a box's pixels

    def __str__(self) -> str:
        masks = '' if self.masks is None else f', masks by {self.masks:.1e} of their boxes'
        return (
            f'{self.count} detections, boxes differ by {self.boxes:.1e} pixels, '
            f'scores by {self.scores:.1e}{masks}'
        )


def compare(found: Detections, expected: Detections) -> Difference:
    """Compare the detections above a score of 0.05, whatever their order.

    Raises:
        ValueError: One of them has no partner in the other list: the same label, a box within 1e-2 pixels,
            a score within 1e-3; or the partners' masks differ.
    """
    pairs = _partners(expected, found, 'PyTorch', 'ONNX')
    pairs |= {(i, j) for j, i in _partners(found, expected, 'ONNX', 'PyTorch')}
    if not pairs:
        return Difference(0, 0.0, 0.0)
    mine, theirs = torch.tensor(sorted(pairs)).unbind(1)
    if len(mine.unique()) < len(pairs) or len(theirs.unique()) < len(pairs):
        raise ValueError('one detection stands for two')
    boxes = (expected.boxes[mine] - found.boxes[theirs]).abs().max().item()
    scores = (expected.scores[mine] - found.scores[theirs]).abs().max().item()
    masks = None
    if expected.masks is not None:
        masks = _compare_masks(expected.masks[mine], found.masks[theirs], expected.boxes[mine])
    return Difference(len(pairs), boxes, scores, masks)


def _partners(one: Detections, other: Detections, name: str, other_name: str) -> set[tuple[int, int]]:
    """Of each detection above the least score, its place and that of its partner in the other list."""
    pairs = set()
    # Within the tolerance of the least score, one list may have what the other has not.
    for i in (one.scores > LEAST_SCORE + SCORES).nonzero().flatten().tolist():
        apart = (other.boxes - one.boxes[i]).abs().amax(1)
        fits = (
            (apart <= BOXES)
            & ((other.scores - one.scores[i]).abs() <= SCORES)
            & (other.labels == one.labels[i])
        )
        if not fits.any():
            box = ', '.join(f'{side:.2f}' for side in one.boxes[i].tolist())
            raise ValueError(
                f'{name} has a detection of class {one.labels[i]}, score {one.scores[i]:.3f}, at [{box}], '
                f'which {other_name} has not'
            )
        pairs.add((i, torch.where(fits, apart, torch.inf).argmin().item()))
    return pairs


def _compare_masks(expected: Tensor, found: Tensor, boxes: Tensor) -> float:
    """In which share of its box's pixels a mask differs at most, of masks ``[N, H, W]``."""
    if expected.shape != found.shape:
        raise ValueError(f'masks are {list(found.shape)}, not {list(expected.shape)}')
    pixels, areas = (expected != found).flatten(1).sum(1), (boxes[:, 2:] - boxes[:, :2]).prod(1)
    if (pixels > MASKS * areas + PIXELS).any():
        raise ValueError(f'a mask differs in {pixels.max()} pixels')
    return (pixels / areas.clamp(min=1)).max().item()
