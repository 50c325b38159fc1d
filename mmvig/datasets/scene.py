"""How an image of the data set `shapes` is drawn (`mmvig.datasets.shapes` keeps them on disk).

From back to front: an uneven surface with clutter, then textured, shaded shapes of six classes that
cast shadows and hide each other in part.
"""

import colorsys
from typing import NamedTuple

import cv2
import numpy as np

CLASSES = ('ring', 'square', 'triangle', 'star', 'cross', 'heart')
# RGB, for overlays: the hue around which a class is coloured (see `_texture`)
PALETTE = [
    (57, 181, 74),
    (0, 114, 220),
    (255, 143, 31),
    (250, 217, 33),
    (148, 74, 219),
    (230, 46, 77),
]

HEIGHT, WIDTH = 240, 320
_PIXELS = np.mgrid[:HEIGHT, :WIDTH]  # rows and columns of the pixels, [2, H, W]
_SHIFT = 4  # fractional bits of OpenCV's fixed-point coordinates
_LEAST_VISIBLE = 0.45  # part of a shape that image borders and other shapes leave visible at least


def _regular(sides: int, *radii: float) -> np.ndarray:
    """Return a closed polygon [sides, 2] that starts at the top and cycles through `radii`."""
    angle = 2 * np.pi * np.arange(sides) / sides
    radius = np.resize(radii, sides)
    return np.stack([radius * np.sin(angle), -radius * np.cos(angle)], axis=1)


def _heart() -> np.ndarray:
    t = np.linspace(0, 2 * np.pi, 64, endpoint=False)
    x = 16 * np.sin(t) ** 3
    y = 13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t)
    return np.stack([x, -y - 2.5], axis=1) / 16  # centred, y down


def _outlines() -> dict[str, list[np.ndarray]]:
    """Return each class's outlines within the unit circle; the second one of a ring is its hole."""
    arm = 0.34
    cross = [(arm, -0.95), (arm, -arm), (0.95, -arm)]
    quarter_turn = np.array([[0, 1], [-1, 0]])  # (x, y) -> (-y, x), for row vectors
    arms = [np.array(cross) @ np.linalg.matrix_power(quarter_turn, turn) for turn in range(4)]
    return {
        'ring': [_regular(64, 1.0), _regular(64, 0.5)],
        'square': [np.array([(-0.8, -0.8), (0.8, -0.8), (0.8, 0.8), (-0.8, 0.8)])],
        'triangle': [np.add(_regular(3, 1.0), (0, 0.2))],
        'star': [_regular(10, 1.0, 0.45)],
        'cross': [np.concatenate(arms)],
        'heart': [_heart()],
    }


_OUTLINES = _outlines()


def _bgr(hue: float, saturation: float, value: float) -> np.ndarray:
    """Return a BGR colour, 0 to 255; the hue wraps around at 1."""
    return 255 * np.array(colorsys.hsv_to_rgb(hue % 1, saturation, value)[::-1])


def _muted(rng: np.random.Generator) -> np.ndarray:
    """Return a greyish BGR colour for backgrounds and clutter."""
    return _bgr(rng.uniform(), rng.uniform(0.05, 0.4), rng.uniform(0.3, 0.9))


def _background(rng: np.random.Generator) -> np.ndarray:
    """Return an uneven surface with scribbles, blobs and specks, [H, W, 3] float BGR."""
    size = (WIDTH, HEIGHT)
    corners = np.stack([_muted(rng) for _ in range(4)]).reshape(2, 2, 3)
    canvas = cv2.resize(corners, size, interpolation=cv2.INTER_LINEAR)
    for cells, strength in ((4, 16.0), (16, 10.0), (80, 5.0)):
        noise = rng.normal(0, strength, (cells * 3 // 4, cells))
        canvas += cv2.resize(noise, size, interpolation=cv2.INTER_CUBIC)[..., None]
    surface = np.clip(canvas, 0, 255).astype(np.uint8)
    clutter = surface.copy()
    for _ in range(rng.integers(10, 24)):
        colour = _muted(rng).tolist()
        x, y = (int(value) for value in rng.integers(0, size))
        kind = rng.integers(3)
        if kind == 0:  # a scribble
            steps = rng.normal(0, 30, (rng.integers(2, 6), 2))
            points = np.add((x, y), np.cumsum(steps, axis=0)).astype(np.int32)
            thickness = int(rng.integers(1, 5))
            cv2.polylines(clutter, [points], False, colour, thickness, cv2.LINE_AA)
        elif kind == 1:  # a blob
            axes = tuple(int(value) for value in rng.integers(3, 22, 2))
            cv2.ellipse(clutter, (x, y), axes, rng.uniform(0, 180), 0, 360, colour, -1, cv2.LINE_AA)
        else:  # specks
            for dx, dy in rng.normal(0, 18, (12, 2)).astype(int):
                cv2.circle(clutter, (x + int(dx), y + int(dy)), 1, colour, -1, cv2.LINE_AA)
    return cv2.addWeighted(surface, 0.35, clutter, 0.65, 0).astype(np.float64)


_PATTERNS = (  # of turned coordinates u, v in radians: how much of the second colour shows
    lambda u, v: np.zeros_like(u),  # plain
    lambda u, v: np.sin(u) > 0.2,  # stripes
    lambda u, v: np.sin(u) * np.sin(v) > 0,  # checks
    lambda u, v: np.sin(u) + np.sin(v) > 1,  # dots
    lambda u, v: np.sin(np.hypot(u, v)) > 0.2,  # circles
    lambda u, v: 0.5 + 0.5 * np.sin(u),  # soft waves
)


def _texture(
    rng: np.random.Generator, label: int, radius: float, x: np.ndarray, y: np.ndarray
) -> np.ndarray:
    """Return a two-coloured, shaded surface [h, w, 3] at the pixels x, y [h, w] around the centre.

    Colour hints at the class but does not give it away: one shape in four has any hue at all.
    """
    typical = colorsys.rgb_to_hsv(*(channel / 255 for channel in PALETTE[label]))[0]
    hue = rng.uniform() if rng.uniform() < 0.25 else typical + rng.normal(0, 0.03)
    bright = _bgr(hue, rng.uniform(0.6, 0.95), rng.uniform(0.8, 1.0))
    second = _bgr(hue + rng.normal(0, 0.05), rng.uniform(0.2, 0.9), rng.uniform(0.4, 0.85))
    angle, period = rng.uniform(0, np.pi), max(4.0, radius * rng.uniform(0.25, 0.5))
    cosine, sine = 2 * np.pi / period * np.array([np.cos(angle), np.sin(angle)])
    pattern = _PATTERNS[rng.integers(len(_PATTERNS))](x * cosine + y * sine, y * cosine - x * sine)
    weight = cv2.GaussianBlur(pattern.astype(np.float64), (3, 3), 0.6)[..., None]
    light = 1.05 - 0.15 * (x + y) / radius + rng.normal(0, 0.02, x.shape)  # from the top left
    return ((1 - weight) * bright + weight * second) * light[..., None]


def _outline_points(rng: np.random.Generator, label: int, radius: float) -> list[np.ndarray]:
    """Return the class's outlines, stretched, turned and scaled, in pixels around the centre."""
    stretch = np.diag(rng.uniform(0.85, 1.15, 2))
    angle = rng.uniform(-0.6, 0.6)
    turn = np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]])
    return [radius * points @ stretch @ turn for points in _OUTLINES[CLASSES[label]]]


def _coverage(outlines: list[np.ndarray], centre: np.ndarray) -> np.ndarray:
    """Return how far each pixel lies inside the outlines, [H, W] uint8, 255 = wholly."""
    coverage = np.zeros((HEIGHT, WIDTH), np.uint8)
    polygons = [np.rint((points + centre) * 2**_SHIFT).astype(np.int32) for points in outlines]
    cv2.fillPoly(coverage, polygons, 255, cv2.LINE_AA, _SHIFT)
    return coverage


class _Placed(NamedTuple):
    label: int  # class index
    radius: float  # of the circle around the unstretched outline, pixels
    centre: np.ndarray  # x, y in pixels
    coverage: np.ndarray  # [H, W] uint8, how far each pixel lies inside, 255 = wholly


def _place(rng: np.random.Generator) -> list[_Placed]:
    """Choose the shapes of an image from back to front.

    A place where the newcomer would leave a shape less than `_LEAST_VISIBLE` visible is refused.
    """
    placed, visible, least_areas = [], [], []
    radii = np.exp(rng.uniform(np.log(10), np.log(100), rng.integers(4, 10)))
    for radius in sorted(radii * rng.uniform(0.8, 1.25, len(radii)), reverse=True):
        label = int(rng.integers(len(CLASSES)))
        outlines = _outline_points(rng, label, radius)
        outer, *hole = (cv2.contourArea(points.astype(np.float32)) for points in outlines)
        limits = [*least_areas, _LEAST_VISIBLE * (outer - sum(hole))]
        for _ in range(20):
            centre = rng.uniform((0.06, 0.06), (0.94, 0.94)) * (WIDTH, HEIGHT)
            coverage = _coverage(outlines, centre)
            mask = coverage >= 128
            left = [old & ~mask for old in visible] + [mask]
            if all(part.sum() >= limit for part, limit in zip(left, limits, strict=True)):
                placed.append(_Placed(label, radius, centre, coverage))
                visible, least_areas = left, limits
                break
    return placed


def _paint(rng: np.random.Generator, canvas: np.ndarray, shape: _Placed) -> None:
    """Paint a shape with its drop shadow and dark rim onto the canvas [H, W, 3], in place."""
    # work in the window that the shape and its shadow reach
    reach, (column, row) = int(1.6 * shape.radius) + 8, shape.centre.astype(int)
    window = tuple(slice(max(middle - reach, 0), middle + reach) for middle in (row, column))
    coverage, target = shape.coverage[window], canvas[window]
    y, x = (axis[window] - middle for axis, middle in zip(_PIXELS, shape.centre[::-1], strict=True))

    drop = max(1.5, 0.06 * shape.radius)
    shift = np.float64([[1, 0, drop], [0, 1, drop]])
    shadow = cv2.warpAffine(coverage, shift, coverage.shape[::-1])
    target *= 1 - 0.45 / 255 * cv2.GaussianBlur(shadow, (0, 0), drop)[..., None]

    rim = coverage - cv2.erode(coverage, np.ones((3, 3), np.uint8))
    surface = _texture(rng, shape.label, shape.radius, x, y) * (1 - 0.4 / 255 * rim[..., None])
    target += coverage[..., None] / 255 * (surface - target)


def draw_scene(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray, list[int]]:
    """Draw one image.

    Args:
        rng: source of everything random in the image.

    Returns:
        The image [H, W, 3] uint8 in BGR, the map of visible instances [H, W] uint8 (0 = background,
        i + 1 = instance i), and the class index of every instance.
    """
    canvas, instances = _background(rng), np.zeros((HEIGHT, WIDTH), np.uint8)
    shapes = _place(rng)
    for number, shape in enumerate(shapes, start=1):
        instances[shape.coverage >= 128] = number
        _paint(rng, canvas, shape)
    image = np.clip(np.rint(canvas), 0, 255).astype(np.uint8)
    return image, instances, [shape.label for shape in shapes]
