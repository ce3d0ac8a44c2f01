"""The renderer of scenes: anti-aliasing by geometry.

Every shape is a signed distance `d(p)` in pixels; its coverage of a pixel is `clip(1/2 - d, 0, 1)`. Coordinates are
fractions of the image, so any size works.
"""

from __future__ import annotations

import math
from functools import cache

import numpy as np

from nitro_e_lite.errors import InvalidValue
from nitro_e_lite.scenes.grammar import Background, Scene


def _polygon(points: np.ndarray, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Signed distance to a closed polygon, negative inside. `points` (P, 2); `x`, `y` (H, W)."""
    nearest = np.full(x.shape, np.inf, np.float32)
    inside = np.zeros(x.shape, bool)
    for (ax, ay), (bx, by) in zip(points, np.roll(points, -1, 0), strict=True):
        ex, ey = bx - ax, by - ay
        px, py = x - ax, y - ay
        along = np.clip((px * ex + py * ey) / (ex * ex + ey * ey), 0, 1)
        np.minimum(nearest, (px - along * ex) ** 2 + (py - along * ey) ** 2, out=nearest)
        if ay != by:
            inside ^= ((ay <= y) != (by <= y)) & (px < (y - ay) * (ex / ey))
    distance = np.sqrt(nearest)
    return np.where(inside, -distance, distance)


@cache
def _corners(shape: str) -> np.ndarray:
    """Corner points (P, 2) of a polygonal shape of nominal radius one, y down."""
    if shape == "square":
        corners = [(-0.86, -0.86), (0.86, -0.86), (0.86, 0.86), (-0.86, 0.86)]
    elif shape == "triangle":
        corners = [(0, -1.0), (1.0, 0.8), (-1.0, 0.8)]
    elif shape == "star":
        turn = [(-0.5 + k / 5) * math.pi for k in range(10)]
        corners = [((1.16, 0.5)[k % 2] * math.cos(a), (1.16, 0.5)[k % 2] * math.sin(a)) for k, a in enumerate(turn)]
    else:  # cross
        w, r = 0.36, 1.02
        corners = [(-w, -r), (w, -r), (w, -w), (r, -w), (r, w), (w, w), (w, r), (-w, r), (-w, w), (-r, w), (-r, -w)]
        corners.append((-w, -w))
    return np.array(corners, np.float32)


def _heart(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Signed distance to a heart of nominal radius one: a turned square with a half disc on each upper side."""
    scale = 1.85
    px, py = np.abs(x) / scale, (0.97 - y) / scale  # tip at the origin, lobes upwards
    lobe = np.hypot(px - 0.25, py - 0.75) - math.sqrt(2) / 4
    fold = 0.5 * np.maximum(px + py, 0)
    edge = np.sqrt(np.minimum(px**2 + (py - 1) ** 2, (px - fold) ** 2 + (py - fold) ** 2)) * np.sign(px - py)
    return np.where(px + py > 1, lobe, edge) * scale


def signed_distance(shape: str, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Signed distance to `shape` of nominal radius one, negative inside; `x`, `y` (H, W) with y down."""
    if shape == "circle":
        return np.hypot(x, y) - 0.98
    if shape == "heart":
        return _heart(x, y)
    return _polygon(_corners(shape), x, y)


@cache
def _grid(size: int) -> tuple[np.ndarray, np.ndarray]:
    centres = (np.arange(size, dtype=np.float32) + 0.5) / size
    return centres[None, :], centres[:, None]


def render_background(background: Background, size: int) -> np.ndarray:
    """The background as float32 (size, size, 3) in 0..255."""
    x, y = _grid(size)
    ramp = 0.5 + (x - 0.5) * np.float32(math.cos(background.angle)) + (y - 0.5) * np.float32(math.sin(background.angle))
    start, end = np.array(background.start, np.float32), np.array(background.end, np.float32)
    canvas = start + np.clip(ramp, 0, 1)[..., None] * (end - start)  # (H, W, 3)
    gx, gy, radius, strength = background.glow
    falloff = np.exp(-((x - gx) ** 2) / radius**2) * np.exp(-((y - gy) ** 2) / radius**2)
    return canvas + np.float32(strength) * falloff[..., None]


def render(scene: Scene, size: int = 128) -> np.ndarray:
    """Draws a scene.

    Args:
        scene: what to draw.
        size: height and width in pixels, >= 16.

    Returns:
        uint8 (size, size, 3), RGB.

    Raises:
        ValueError: for a size below 16.
    """
    if size < 16:
        raise InvalidValue(f"size={size}: must be >= 16 pixels")
    canvas = render_background(scene.background, size)
    grid_x, grid_y = _grid(size)
    for o in scene.objects:
        reach = o.radius * 1.25
        left, right = max(0, int((o.x - reach) * size)), min(size, int((o.x + reach) * size) + 2)
        top, bottom = max(0, int((o.y - reach) * size)), min(size, int((o.y + reach) * size) + 2)
        dx, dy = (grid_x[:, left:right] - o.x) / o.radius, (grid_y[top:bottom] - o.y) / o.radius
        c, s = np.float32(math.cos(o.angle)), np.float32(math.sin(o.angle))
        distance = signed_distance(o.shape, c * dx + s * dy, c * dy - s * dx) * (o.radius * size)  # pixels
        cover = np.clip(0.5 - distance, 0, 1)[..., None].astype(np.float32)
        window = canvas[top:bottom, left:right]
        window += cover * (np.array(o.tint, np.float32) - window)
    return np.clip(canvas + 0.5, 0, 255).astype(np.uint8)
