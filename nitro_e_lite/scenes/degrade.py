"""Pictures of a scene that people like less than the clean one, made on purpose.

A model of preference needs pairs of which one side is better beyond doubt. Each fault here is one that image models
have: noise, blur, ragged edges, a shift of all colours, a background that does not belong there.
"""

from __future__ import annotations

import dataclasses
import math

import numpy as np
from scipy.ndimage import gaussian_filter, map_coordinates

from nitro_e_lite.errors import InvalidValue
from nitro_e_lite.scenes.grammar import Background, Scene
from nitro_e_lite.scenes.render import render

FAULTS = ("noise", "blur", "ragged", "colors", "background")


def degrade(scene: Scene, fault: str, generator: np.random.Generator, size: int = 128) -> np.ndarray:
    """Draws a scene with one fault.

    Args:
        scene: what to draw.
        fault: one of `FAULTS`.
        generator: how strong, and where.
        size: height and width in pixels.

    Returns:
        uint8 (size, size, 3), RGB.

    Raises:
        ValueError: another fault.
    """
    strength, pixel = generator.uniform(0.5, 1.0), size / 128
    if fault == "background":
        return render(dataclasses.replace(scene, background=_loud(generator)), size)
    picture = render(scene, size).astype(np.float64)  # (H, W, 3)
    if fault == "noise":
        picture += generator.normal(0, 60 * strength, picture.shape)
    elif fault == "blur":
        picture = gaussian_filter(picture, (4 * strength * pixel, 4 * strength * pixel, 0))
    elif fault == "ragged":
        shifts = [gaussian_filter(generator.normal(size=(size, size)), 1.5 * pixel) for _ in range(2)]
        where = [g + 4 * strength * pixel * s / s.std() for g, s in zip(np.mgrid[:size, :size], shifts, strict=True)]
        picture = np.stack([map_coordinates(picture[..., k], where, order=1, mode="nearest") for k in range(3)], -1)
    elif fault == "colors":
        shift = generator.normal(size=3)
        picture += 70 * strength * (shift - shift.mean()) / np.linalg.norm(shift - shift.mean())
    else:
        raise InvalidValue(f"fault={fault!r}: must be one of {', '.join(FAULTS)}")
    return np.clip(picture + 0.5, 0, 255).astype(np.uint8)


def _loud(generator: np.random.Generator) -> Background:
    """A background between two saturated colours, unlike all of `grammar.draw_background`."""

    def tint() -> tuple[float, float, float]:
        hue = generator.uniform(0, 2 * math.pi)
        return tuple(float(128 + 110 * math.cos(hue - k * 2 * math.pi / 3)) for k in range(3))

    return Background(tint(), tint(), generator.uniform(0, 2 * math.pi), (0.5, 0.5, 0.5, 0.0))
