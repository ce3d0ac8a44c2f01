"""Finding the things in a picture: what stands out of a smooth background and hangs together.

1. **Background.** Scenes have smooth backgrounds, so a cubic polynomial in x and y is fitted to a coarse grid of
   pixels. Objects are outliers: the fit is repeated with Geman-McClure weights `1 / (1 + (r/s)^2)^2`, which silence
   pixels with a large residual `r`, while the scale `s` shrinks with the median residual.
2. **Foreground.** A pixel belongs to an object when its residual exceeds a floor and 40 % of the largest residual
   nearby. The second rule puts the outline near half coverage for pale and strong objects alike.
3. **Components.** Connected pixels are one segment, so objects that touch are one; specks are dropped.
4. **Outline.** With background `b` and the segment's colour `c`, coverage is `a = (p - b).(c - b) / |c - b|^2`.
   Moved to its centre of mass and scaled to unit area, it no longer depends on place, size and colour.

No names of shapes or colours are known here. `verifier.py` gives them; `stages/vision.py` learns without them.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache, cached_property

import numpy as np
from scipy import ndimage

RESIDUAL_FLOOR = 20.0  # RGB distance from the background; in the scenes the palest object is over 45 away
NEARBY = 0.4  # fraction of the largest residual nearby
MIN_AREA = 0.003  # fraction of the image; the smallest object in the scenes, a small star, covers 0.014
OUTLINE_CELLS = 48  # side of an outline
_SHARPEN = 4.0  # contrast around half coverage: outlines stay comparable at every resolution
_NEIGHBOURS = np.ones((3, 3), bool)  # a pixel and the eight around it
_HALF_WIDTH = 1.1  # half the width of an outline, in units of the square root of the segment's area


@dataclass(frozen=True)
class Segment:
    """A connected part of the foreground, cut out with a few pixels of what is around it.

    Attributes:
        pixels: float32 (h, w, 3) in 0..255.
        difference: the same minus the background.
        mask: bool (h, w), which pixels belong to it.
        offset: x and y of the cut in the picture, in pixels.
    """

    pixels: np.ndarray
    difference: np.ndarray
    mask: np.ndarray
    offset: np.ndarray

    @cached_property
    def core(self) -> np.ndarray:
        """The mask without its rim (the picture's border is no rim), bool (h, w); a small mask is all core."""
        core = ndimage.binary_erosion(self.mask, _NEIGHBOURS, border_value=1)
        return core if core.sum() >= 8 else self.mask

    @cached_property
    def contrast(self) -> np.ndarray:
        """How far the core's median colour is from the background, (3,)."""
        return np.median(self.difference[self.core], 0)

    @cached_property
    def coverage(self) -> np.ndarray:
        """How much of each pixel it covers, float32 (h, w) in 0..1."""
        contrast = self.contrast
        grown = ndimage.binary_dilation(self.mask, _NEIGHBOURS)
        return np.clip(self.difference @ contrast / (contrast @ contrast), 0, 1) * grown


def find_segments(image: np.ndarray) -> tuple[list[Segment], np.ndarray]:
    """Cuts a picture into segments and background.

    Args:
        image: (H, W, 3), RGB in 0..255, both sides >= 64.

    Returns:
        The segments above the minimal size, and for every pixel the number of its segment in that list, or -1: (H, W).
    """
    pixels = image.astype(np.float32)
    difference = pixels - estimate_background(pixels)  # (H, W, 3)
    labels, boxes = components(foreground(difference))
    found, owner, pad = [], np.full(labels.shape, -1), 3
    for label, (top, bottom, left, right) in enumerate(boxes, start=1):
        rows, columns = slice(max(0, top - pad), bottom + pad), slice(max(0, left - pad), right + pad)
        mask = labels[rows, columns] == label
        if mask.sum() < MIN_AREA * labels.size:
            continue
        owner[rows, columns][mask] = len(found)
        offset = np.array([columns.start, rows.start], np.float32)
        found.append(Segment(pixels[rows, columns], difference[rows, columns], mask, offset))
    return found, owner


@cache
def _monomials(height: int, width: int, degree: int) -> np.ndarray:
    """The monomials of x and y up to `degree` at each pixel, x and y in [-1, 1]: (height, width, terms)."""
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
    nearby = ndimage.maximum_filter(residual, 2 * reach + 1, mode="nearest")
    return residual > np.maximum(RESIDUAL_FLOOR, NEARBY * nearby)


def components(mask: np.ndarray) -> tuple[np.ndarray, list[tuple[int, int, int, int]]]:
    """Labels the 4-connected components of a mask, in the order of their first pixels, row by row.

    Args:
        mask: bool (H, W).

    Returns:
        labels int32 (H, W), 0 outside and 1.. inside, and for each label its box (top, bottom, left, right)
        with exclusive ends.
    """
    labels, _ = ndimage.label(mask)
    boxes = ndimage.find_objects(labels)
    return labels, [(rows.start, rows.stop, columns.start, columns.stop) for rows, columns in boxes]


def centre_and_area(coverage: np.ndarray) -> tuple[np.ndarray, float]:
    """Centre of mass (x, y) in pixels and area of a coverage mask (h, w)."""
    area = float(coverage.sum())
    x = float(coverage.sum(0) @ np.arange(coverage.shape[1])) / area
    y = float(coverage.sum(1) @ np.arange(coverage.shape[0])) / area
    return np.array([x, y]), area


def outline(coverage: np.ndarray, centre: np.ndarray, area: float) -> np.ndarray:
    """The mask sampled bilinearly on a `OUTLINE_CELLS` grid around its centre, at unit area: (cells * cells,)."""
    steps = ((np.arange(OUTLINE_CELLS) + 0.5) / OUTLINE_CELLS * 2 - 1) * _HALF_WIDTH * np.sqrt(area)
    places = np.meshgrid(centre[1] + steps, centre[0] + steps, indexing="ij")  # y and x, (cells, cells) each
    sampled = ndimage.map_coordinates(coverage, places, np.float64, order=1, mode="grid-constant")  # empty outside
    return np.clip((sampled - 0.5) * _SHARPEN + 0.5, 0, 1).ravel().astype(np.float32)
