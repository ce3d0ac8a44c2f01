"""Reading a picture back: which objects, of which colour, stand where.

GenEval judges text-to-image models with an object detector. Our pictures hold a few flat shapes on a soft
background, so the detector can be arithmetic: no network, no randomness, the same answer on every machine.

1. **Background.** Scenes have smooth backgrounds, so a cubic polynomial in x and y is fitted to a coarse grid
   of pixels. Objects are outliers: the fit is repeated with Geman-McClure weights ``1 / (1 + (r/s)^2)^2``,
   which silence pixels with a large residual ``r``, while the scale ``s`` shrinks with the median residual.
2. **Foreground.** A pixel belongs to an object when its residual exceeds a floor and 40 % of the largest
   residual nearby. The second rule puts the outline near half coverage for pale and strong objects alike.
3. **Components.** Connected pixels are one object, so objects that touch are read as one, of unknown shape;
   specks are dropped.
4. **Colour.** The median of the component's core, named by the nearest palette colour in CIE Lab. A core that
   is not of one colour has none.
5. **Shape.** With background ``b`` and object colour ``c``, coverage is ``a = (p - b).(c - b) / |c - b|^2``.
   The coverage mask, moved to its centre of mass and scaled to unit area, is compared with templates of every
   shape at small angles, sharp and softened (autoencoders round the tips of small stars), by
   ``IoU = sum min(a, t) / sum max(a, t)``. The best must be good and clearly better than the second best,
   otherwise the shape is "unknown": a blob between circle and square is neither.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import numpy as np

from nitro_e_lite.scenes import COLORS, SHAPES, signed_distance

UNKNOWN = "unknown"
RESIDUAL_FLOOR = 20.0  # RGB distance from the background; in the scenes the palest object is over 45 away
NEARBY = 0.4  # fraction of the largest residual nearby
MIN_AREA = 0.003  # fraction of the image; the smallest object in the scenes, a small star, covers 0.014
MIN_OVERLAP = 0.85  # IoU with the best template
MIN_LEAD = 0.05  # and how much the next shape must stay behind
MAX_COLOR_DISTANCE = 26.0  # CIE Lab; the closest palette colours, blue and purple, are 28 apart
MAX_MIXED = 0.15  # share of core pixels that may be of another colour
ANGLES = tuple(np.linspace(-0.3, 0.3, 13))  # radians
SOFTNESS = (0.0, 0.1, 0.2)  # blur of the templates, Gaussian sigma over nominal radius
_CELLS = 48  # side of the normalised mask
_SHARPEN = 4.0  # contrast around half coverage: outlines stay comparable at every resolution
_HALF_WIDTH = 1.1  # its half width, in units of the square root of the object's area


@dataclass(frozen=True)
class Detection:
    """One object found.

    Attributes:
        shape: a name from ``scenes.SHAPES`` or ``"unknown"``.
        color: a name from ``scenes.COLORS`` or ``"unknown"``.
        x: centre, as a fraction of the width.
        y: centre, as a fraction of the height, downwards.
        area: fraction of the image.
        overlap: IoU with the best template.
    """

    shape: str
    color: str
    x: float
    y: float
    area: float
    overlap: float

    def __str__(self) -> str:
        return f"{self.color} {self.shape}" if self.color != UNKNOWN else f"{self.shape} of unknown colour"


def detect(image: np.ndarray) -> list[Detection]:
    """Finds the objects in a picture.

    Args:
        image: uint8 (H, W, 3), RGB, both sides >= 64.

    Returns:
        One detection for each component above the minimal size, the largest first.

    Raises:
        TypeError: when the image is not a uint8 array.
        ValueError: when its shape is not (H, W, 3) or a side is below 64.
    """
    if not isinstance(image, np.ndarray) or image.dtype != np.uint8:
        kind = f"{type(image).__name__} {getattr(image, 'dtype', '')}"
        raise TypeError(f"image={kind}: must be a uint8 numpy array")
    if image.ndim != 3 or image.shape[2] != 3 or min(image.shape[:2]) < 64:
        raise ValueError(f"image.shape={image.shape}: must be (H, W, 3) with both sides >= 64")
    pixels = image.astype(np.float32)
    difference = pixels - estimate_background(pixels)  # (H, W, 3)
    labels, boxes = components(foreground(difference))
    found = []
    for label, (top, bottom, left, right) in enumerate(boxes, start=1):
        pad = 3
        rows = slice(max(0, top - pad), bottom + pad)
        columns = slice(max(0, left - pad), right + pad)
        mask = labels[rows, columns] == label
        if mask.sum() < MIN_AREA * labels.size:
            continue
        offset = np.array([columns.start, rows.start], np.float32)
        found.append(_describe(pixels[rows, columns], difference[rows, columns], mask, offset, labels.shape))
    return sorted(found, key=lambda d: -d.area)


def _describe(pixels, difference, mask, offset, size) -> Detection:
    """Colour, shape and place of the component ``mask`` (h, w) of a crop at ``offset`` (x, y)."""
    core = _erode(mask)
    core = core if core.sum() >= 8 else mask
    inside = difference[core]  # (n, 3)
    contrast = np.median(inside, 0)
    other = np.linalg.norm(inside - contrast, axis=1) > max(40.0, 0.4 * float(np.linalg.norm(contrast)))
    if other.mean() > MAX_MIXED:
        centre, area = _centre_and_area(mask)
        color, shape, overlap = UNKNOWN, UNKNOWN, 0.0
    else:
        color = name_color(np.median(pixels[core], 0))
        coverage = np.clip(difference @ contrast / (contrast @ contrast), 0, 1) * _grow(mask)  # (h, w)
        shape, overlap, centre, area = classify(coverage)
    x, y = (centre + offset + 0.5) / (size[1], size[0])
    return Detection(shape, color, float(x), float(y), float(area / (size[0] * size[1])), overlap)


# ------------------------------------------------------------------------------------------------------------
# Background, foreground, components
# ------------------------------------------------------------------------------------------------------------


@cache
def _monomials(height: int, width: int, degree: int) -> np.ndarray:
    """The monomials of x and y up to ``degree`` at each pixel, x and y in [-1, 1]: (height, width, terms)."""
    y, x = np.meshgrid(np.linspace(-1, 1, height), np.linspace(-1, 1, width), indexing="ij")
    terms = [x**i * y**j for i in range(degree + 1) for j in range(degree + 1 - i)]
    return np.stack(terms, -1).astype(np.float32)


def estimate_background(pixels: np.ndarray) -> np.ndarray:
    """A smooth background under the objects.

    Args:
        pixels: float32 (H, W, 3) in 0..255.

    Returns:
        float32 (H, W, 3).
    """
    height, width = pixels.shape[:2]
    rows = np.linspace(0, height - 1, 32).round().astype(int)
    columns = np.linspace(0, width - 1, 32).round().astype(int)
    samples = pixels[np.ix_(rows, columns)].reshape(-1, 3)  # (1024, 3)
    fit = np.median(samples, 0)
    for step in range(10):  # the first fits are planes: a cubic would bend towards the objects
        degree = 1 if step < 4 else 3
        basis = _monomials(height, width, degree)[np.ix_(rows, columns)].reshape(len(samples), -1)
        residual = np.linalg.norm(samples - fit, axis=1)
        scale = max(1.5 * float(np.median(residual)), 5.0)
        weighted = basis / (1 + (residual / scale) ** 2)[:, None] ** 2
        normal = weighted.T @ basis + 1e-3 * np.eye(basis.shape[1], dtype=np.float32)
        coefficients = np.linalg.solve(normal, weighted.T @ samples)  # (terms, 3)
        fit = basis @ coefficients
    return _monomials(height, width, 3) @ coefficients


def foreground(difference: np.ndarray) -> np.ndarray:
    """The pixels that belong to objects, cut at about half coverage.

    Args:
        difference: float32 (H, W, 3), image minus background.

    Returns:
        bool (H, W).
    """
    residual = np.sqrt((difference**2).sum(-1))
    reach = max(1, round(min(residual.shape) / 48))
    nearby = _slide(np.maximum, _slide(np.maximum, residual, reach, 0), reach, 1)
    return residual > np.maximum(RESIDUAL_FLOOR, NEARBY * nearby)


def _slide(function, values: np.ndarray, reach: int, axis: int) -> np.ndarray:
    """A sliding maximum or minimum over ``2 reach + 1`` places along an axis; the border repeats."""
    padded = np.pad(values, [(reach, reach) if a == axis else (0, 0) for a in range(2)], mode="edge")
    length = values.shape[axis]
    result = values
    for shift in range(2 * reach + 1):
        result = function(result, padded.take(range(shift, shift + length), axis))
    return result


def _erode(mask: np.ndarray) -> np.ndarray:
    return _slide(np.minimum, _slide(np.minimum, mask, 1, 0), 1, 1)


def _grow(mask: np.ndarray) -> np.ndarray:
    return _slide(np.maximum, _slide(np.maximum, mask, 1, 0), 1, 1)


def components(mask: np.ndarray) -> tuple[np.ndarray, list[tuple[int, int, int, int]]]:
    """Labels the 4-connected components of a mask by joining the horizontal runs of neighbouring rows.

    Args:
        mask: bool (H, W).

    Returns:
        labels int32 (H, W), 0 outside and 1.. inside, and for each label its box (top, bottom, left, right)
        with exclusive ends.
    """
    height, width = mask.shape
    edges = np.diff(np.pad(mask, ((0, 0), (1, 1))).astype(np.int8), axis=1)
    run_rows, starts = np.nonzero(edges == 1)
    ends = np.nonzero(edges == -1)[1]
    runs = list(zip(run_rows.tolist(), starts.tolist(), ends.tolist(), strict=True))
    parent = list(range(len(runs)))

    def root(i: int) -> int:
        while parent[i] != i:
            parent[i] = parent[parent[i]]
            i = parent[i]
        return i

    above = 0
    for i, (row, start, end) in enumerate(runs):
        while runs[above][0] < row - 1 or (runs[above][0] == row - 1 and runs[above][2] <= start):
            above += 1
        j = above
        while runs[j][0] == row - 1 and runs[j][1] < end:
            parent[root(j)] = root(i)
            j += 1
    names: dict[int, int] = {}
    labels = np.zeros((height, width), np.int32)
    boxes: list[list[int]] = []
    for i, (row, start, end) in enumerate(runs):
        label = names.setdefault(root(i), len(names) + 1)
        labels[row, start:end] = label
        if label > len(boxes):
            boxes.append([row, row + 1, start, end])
        box = boxes[label - 1]
        box[1:] = row + 1, min(box[2], start), max(box[3], end)
    return labels, [tuple(b) for b in boxes]


# ------------------------------------------------------------------------------------------------------------
# Colour and shape
# ------------------------------------------------------------------------------------------------------------


def lab(rgb: np.ndarray) -> np.ndarray:
    """CIE Lab (D65) of sRGB values 0..255, shape (..., 3)."""
    c = np.asarray(rgb, np.float64) / 255
    linear = np.where(c <= 0.04045, c / 12.92, ((c + 0.055) / 1.055) ** 2.4)
    matrix = [[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]]
    t = linear @ np.transpose(matrix) / (0.95047, 1.0, 1.08883)
    f = np.where(t > 216 / 24389, np.cbrt(t), t * 841 / 108 + 4 / 29)
    return np.stack([116 * f[..., 1] - 16, 500 * (f[..., 0] - f[..., 1]), 200 * (f[..., 1] - f[..., 2])], -1)


@cache
def _palette() -> np.ndarray:
    return lab(np.array(list(COLORS.values())))


def name_color(rgb: np.ndarray) -> str:
    """The nearest palette colour of an RGB value (3,) in 0..255, or "unknown" when none is near."""
    distance = np.linalg.norm(_palette() - lab(rgb), axis=1)
    nearest = int(distance.argmin())
    return list(COLORS)[nearest] if distance[nearest] <= MAX_COLOR_DISTANCE else UNKNOWN


def _centre_and_area(coverage: np.ndarray) -> tuple[np.ndarray, float]:
    """Centre of mass (x, y) in pixels and area of a coverage mask (h, w)."""
    area = float(coverage.sum())
    x = float(coverage.sum(0) @ np.arange(coverage.shape[1])) / area
    y = float(coverage.sum(1) @ np.arange(coverage.shape[0])) / area
    return np.array([x, y]), area


def _normalise(coverage: np.ndarray, centre: np.ndarray, area: float) -> np.ndarray:
    """The mask sampled bilinearly on a ``_CELLS`` grid around its centre, at unit area: (cells * cells,)."""
    steps = ((np.arange(_CELLS) + 0.5) / _CELLS * 2 - 1) * _HALF_WIDTH * np.sqrt(area)
    padded = np.pad(coverage, 1)
    x = np.clip(centre[0] + steps + 1, 0, padded.shape[1] - 1.001)
    y = np.clip(centre[1] + steps + 1, 0, padded.shape[0] - 1.001)
    i, j = y.astype(int), x.astype(int)
    v, u = (y - i)[:, None], (x - j)[None, :]
    top = padded[np.ix_(i, j)] * (1 - u) + padded[np.ix_(i, j + 1)] * u
    bottom = padded[np.ix_(i + 1, j)] * (1 - u) + padded[np.ix_(i + 1, j + 1)] * u
    return np.clip((top * (1 - v) + bottom * v - 0.5) * _SHARPEN + 0.5, 0, 1).ravel().astype(np.float32)


def _blur(image: np.ndarray, sigma: float) -> np.ndarray:
    """Gaussian blur of an image (n, n) with an empty border."""
    place = np.arange(len(image))
    kernel = np.exp(-((place[:, None] - place) ** 2) / (2 * max(sigma, 1e-3) ** 2))  # (n, n)
    kernel /= kernel.sum(1, keepdims=True)
    return kernel @ image @ kernel.T


@cache
def _templates() -> tuple[np.ndarray, np.ndarray]:
    """Normalised masks (shapes, poses, cells * cells) and nominal minus mass centre (shapes, poses, 2).

    A pose is an angle and a softness; offsets are in units of the square root of the area.
    """
    size, radius = 112, 32.0
    y, x = (np.mgrid[:size, :size] - (size - 1) / 2).astype(np.float32) / radius
    masks, offsets = [], []
    for shape in SHAPES:
        for angle in ANGLES:
            c, s = np.float32(np.cos(angle)), np.float32(np.sin(angle))
            coverage = np.clip(0.5 - radius * signed_distance(shape, c * x + s * y, c * y - s * x), 0, 1)
            centre, area = _centre_and_area(coverage)
            for softness in SOFTNESS:
                masks.append(_normalise(_blur(coverage, softness * radius), centre, area))
                offsets.append(((size - 1) / 2 - centre) / np.sqrt(area))
    grid = (len(SHAPES), len(ANGLES) * len(SOFTNESS), -1)
    return np.array(masks).reshape(grid), np.array(offsets).reshape(grid)


def classify(coverage: np.ndarray) -> tuple[str, float, np.ndarray, float]:
    """Names the shape of a coverage mask.

    Args:
        coverage: float (h, w) in 0..1, not empty.

    Returns:
        shape name or "unknown", IoU with the best template, nominal centre (x, y) in pixels, area in pixels.
    """
    centre, area = _centre_and_area(coverage)
    mask = _normalise(coverage, centre, area)
    templates, offsets = _templates()
    common = np.minimum(templates, mask).sum(-1)  # (shapes, poses)
    overlap = common / (templates.sum(-1) + mask.sum() - common)
    by_shape = overlap.max(1)
    second, best = np.argsort(by_shape)[-2:]
    if by_shape[best] < MIN_OVERLAP or by_shape[best] - by_shape[second] < MIN_LEAD:
        return UNKNOWN, float(by_shape[best]), centre, area
    centre = centre + offsets[best, overlap[best].argmax()] * np.sqrt(area)
    return SHAPES[best], float(by_shape[best]), centre, area
