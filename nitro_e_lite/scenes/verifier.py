"""Reading a picture back: which objects, of which colour, stand where.

GenEval judges text-to-image models with an object detector. Our pictures hold a few flat shapes on a soft
background, so the detector can be arithmetic: no network, no randomness, the same answer on every machine.

1. **Segments.** Background, foreground and connected components, see `segments.py`. Objects that touch are read
   as one, of unknown shape.
2. **Colour.** The median of the component's core, named by the nearest palette colour in CIE Lab. A core that
   is not of one colour has none; its outline still has a shape.
3. **Shape.** The outline is compared with templates of every shape at small angles, sharp and softened (autoencoders
   round the tips of small stars), by `IoU = sum min(a, t) / sum max(a, t)`. The best must be good and clearly better
   than the second best, otherwise the shape is "unknown": a blob between circle and square is neither.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache, partial

import numpy as np
from scipy.ndimage import gaussian_filter

from nitro_e_lite.errors import InvalidType, InvalidValue
from nitro_e_lite.scenes.grammar import COLORS, SHAPES
from nitro_e_lite.scenes.render import signed_distance
from nitro_e_lite.scenes.segments import Segment, centre_and_area, find_segments, outline

VERSION = 2  # of the verdicts: raised when a picture may be read otherwise; cards of two versions are not compared
UNKNOWN = "unknown"
MIN_OVERLAP = 0.84  # IoU with the best template
MIN_LEAD = 0.03  # and how much the next shape must stay behind
MAX_COLOR_DISTANCE = 26.0  # CIE Lab; the closest palette colours, blue and purple, are 28 apart
MAX_MIXED = 0.15  # share of core pixels that may be of another colour
ANGLES = tuple(np.linspace(-0.3, 0.3, 13))  # radians
SOFTNESS = (0.0, 0.1, 0.2)  # blur of the templates, Gaussian sigma over nominal radius


@dataclass(frozen=True)
class Detection:
    """One object found.

    Attributes:
        shape: a name from `grammar.SHAPES` or `"unknown"`.
        color: a name from `grammar.COLORS` or `"unknown"`.
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
        raise InvalidType(f"image={kind}: must be a uint8 numpy array")
    if image.ndim != 3 or image.shape[2] != 3 or min(image.shape[:2]) < 64:
        raise InvalidValue(f"image.shape={image.shape}: must be (H, W, 3) with both sides >= 64")
    segments, owner = find_segments(image)
    return sorted((_describe(segment, owner.shape) for segment in segments), key=lambda d: -d.area)


def _describe(segment: Segment, size: tuple[int, int]) -> Detection:
    """Colour, shape and place of a segment of a picture with `size` (H, W)."""
    core, contrast = segment.core, segment.contrast
    limit = max(40.0, 0.4 * float(np.linalg.norm(contrast)))
    other = np.linalg.norm(segment.difference[core] - contrast, axis=1) > limit
    shape, overlap, centre, area = classify(segment.coverage)
    color = UNKNOWN if other.mean() > MAX_MIXED else name_color(np.median(segment.pixels[core], 0))
    x, y = (centre + segment.offset + 0.5) / (size[1], size[0])
    return Detection(shape, color, float(x), float(y), float(area / (size[0] * size[1])), overlap)


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
            centre, area = centre_and_area(coverage)
            for softness in SOFTNESS:
                blur = partial(gaussian_filter, sigma=softness * radius, output=np.float64, mode="constant", truncate=8)
                soft = blur(coverage) / blur(np.ones_like(coverage))  # the mean of the pixels that are there
                masks.append(outline(soft, centre, area))
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
    centre, area = centre_and_area(coverage)
    mask = outline(coverage, centre, area)
    templates, offsets = _templates()
    common = np.minimum(templates, mask).sum(-1)  # (shapes, poses)
    overlap = common / (templates.sum(-1) + mask.sum() - common)
    by_shape = overlap.max(1)
    second, best = np.argsort(by_shape)[-2:]
    if by_shape[best] < MIN_OVERLAP or by_shape[best] - by_shape[second] < MIN_LEAD:
        return UNKNOWN, float(by_shape[best]), centre, area
    centre = centre + offsets[best, overlap[best].argmax()] * np.sqrt(area)
    return SHAPES[best], float(by_shape[best]), centre, area
