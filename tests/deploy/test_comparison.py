"""Which lists of detections count as the same."""

import pytest
import torch

from mmvig.deploy.comparison import Detections, Difference, compare


def detections():
    """Five squares in a row, their scores 0.9, 0.8, ..., 0.5, with masks that fill them."""
    left = torch.arange(5.0) * 20
    boxes = torch.stack([left, left * 0, left + 15, left * 0 + 15], 1)
    masks = torch.zeros(5, 20, 100, dtype=torch.bool)
    for i in range(5):
        masks[i, :15, 20 * i : 20 * i + 15] = True
    return Detections(boxes, torch.arange(5) % 2, 0.9 - 0.1 * torch.arange(5), masks)


def taken(found, places):
    return Detections(*(x[places] for x in found))


def test_order_and_little_differences_do_not_matter():
    found = taken(detections(), [1, 0, 2, 4, 3])
    found.boxes[1, 2] += 0.005
    found.scores[2] -= 0.0005
    found.masks[4, 0, :3] ^= True  # 3 of 225 pixels
    difference = compare(found, detections())
    assert difference.count == 5 and difference == pytest.approx(
        Difference(5, 0.005, 0.0005, 3 / 225), rel=1e-2
    )


def test_scores_around_the_least_do_not_matter():
    found, expected = detections(), detections()
    expected.scores[4], found.scores[4], found.labels[4] = 0.0505, 0.0499, 5
    assert compare(found, expected).count == 4
    expected.scores[3] = 0.02
    found = taken(found, [0, 1, 2, 4])
    assert compare(found, expected).count == 3


def test_nothing_is_the_same_as_nothing():
    assert compare(taken(detections(), []), taken(detections(), [])).count == 0


@pytest.mark.parametrize('swapped', [False, True])
@pytest.mark.parametrize(
    ('wrong', 'message'),
    [
        ('box', 'class 1, score 0.600'),
        ('score', 'class 1'),
        ('label', 'class'),
        ('one less', 'class 1, score 0.600'),
        ('twice', 'one detection stands for two'),
        ('mask', 'a mask differs in 9 pixels'),
        ('size', 'masks are'),
    ],
)
def test_what_is_not_the_same(wrong, message, swapped):
    found = detections()
    if wrong == 'box':
        found.boxes[3, 2] += 0.02
    elif wrong == 'score':
        found.scores[3] -= 0.002
    elif wrong == 'label':
        found.labels[3] = 0
    elif wrong == 'one less':
        found = taken(found, [0, 1, 2, 4])
    elif wrong == 'twice':
        found = taken(found, [0, 1, 2, 3, 3, 4])
    elif wrong == 'mask':
        found.masks[3, 0, :9] ^= True
    else:
        found = found._replace(masks=found.masks[:, :-1])
    pair = (detections(), found) if swapped else (found, detections())
    with pytest.raises(ValueError, match=message):
        compare(*pair)
