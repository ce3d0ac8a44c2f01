"""Watching a run that learns from rewards, so that hacking is seen while there is still something to save.

A policy finds what a reward pays for, whether or not anyone meant it. What it is paid rises either way; the difference
shows beside it: in what an independent judge says, in how alike the pictures of a group become, in statistics of the
pixels that nobody pays for. `reward_figure` draws all of it from a run's metrics; `EarlyStop` of
`stages/gates.py` ends the run.

    edge density          share of pixels at an edge: falls when things vanish, rises with texture and noise
    colour entropy        bits, of 4 x 4 x 4 colours: falls when a picture turns into one colour
    background variance   of the outermost pixels, where no object lies: rises when a background gets a pattern
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from nitro_e_lite.errors import InvalidValue
from nitro_e_lite.viz import COLORS

STATISTICS = ("edge_density", "color_entropy", "background_variance")
EDGE = 24.0  # of 255, from one pixel to the next
MARKERS = "os^vDxP*<>phd+12"  # of lines, for who reads them in grey
BORDER = 4  # pixels at the rim where no object lies, of 128


def picture_statistics(pictures: np.ndarray) -> np.ndarray:
    """The `STATISTICS` of pictures, uint8 (B, H, W, 3): float64 (B, 3)."""
    pixels = np.asarray(pictures, np.float32)
    across, down = (np.abs(np.diff(pixels, axis=axis)).max(-1) for axis in (2, 1))  # (B, H, W-1), (B, H-1, W)
    edges = ((across > EDGE).mean((1, 2)) + (down > EDGE).mean((1, 2))) / 2
    bins = (np.asarray(pictures) // 64 @ np.array([16, 4, 1])).reshape(len(pictures), -1)  # (B, H*W)
    shares = np.stack([np.bincount(row, minlength=64) for row in bins]) / bins.shape[1]  # (B, 64)
    entropy = -(shares * np.log2(np.where(shares > 0, shares, 1))).sum(1)
    rim = np.ones(pixels.shape[1:3], bool)
    width = max(1, BORDER * len(rim) // 128)
    rim[width:-width, width:-width] = False
    return np.stack([edges, entropy, pixels[:, rim].var(1).mean(1)], 1)


PANELS: dict[str, tuple[str, ...]] = {
    "what is paid, what is seen": ("reward", "reward_*", "reader", "held_out_*", "geneval"),
    "groups that teach nothing, clipped ratios": ("flat_groups", "clip_share"),
    "distance from ratio 1, from the start": ("ratio_off", "kl", "reference_distance", "old_distance"),
    "distance inside groups": ("group_distance",),
    "pictures, the first being 1": STATISTICS,
    "gradient norm": ("gradient_norm",),
}
RELATIVE, LOGARITHMIC = "pictures, the first being 1", "distance from ratio 1, from the start"


def reward_figure(rows: Iterable[dict[str, Any]], title: str = "") -> Figure:
    """The one figure of a run: reward and parts, judges, flat groups, ratio, KL, diversity, statistics.

    Args:
        rows: of its `metrics.jsonl`.
        title: above it.

    Raises:
        ValueError: something that is drawn is no number.
    """
    rows = list(rows)
    figure = Figure(figsize=(10.5, 5.8), layout="constrained")
    axes = figure.subplots(2, 3).flatten()
    for axis, (name, wanted) in zip(axes, PANELS.items(), strict=True):
        names = [known for one in wanted for known in _known(rows, one)]
        for color, marker, key in zip((*COLORS, *COLORS), MARKERS, names, strict=False):
            points = [(_number(row, "step"), _number(row, key)) for row in rows if key in row]
            steps, values = np.array(points, float).T
            values = values / (values[0] or 1) if name == RELATIVE else values
            look = {"color": color, "marker": marker, "markersize": 6, "fillstyle": "none"}
            axis.plot(steps, values, label=key.replace("_", " "), markevery=max(1, len(points) // 8), **look)
            bounds = [[_number(row, f"{key}_{end}") for end in ("low", "high")] for row in rows if f"{key}_low" in row]
            if bounds:
                low, high = np.array(bounds).T
                axis.fill_between(steps, low, high, color=color, alpha=0.15, linewidth=0)
        axis.set_title(name, fontsize=9)
        if name == LOGARITHMIC and names:
            axis.set_yscale("symlog", linthresh=1e-6)
            axis.set_ylim(bottom=0)  # distances
        if names:
            below = {"loc": "upper center", "bbox_to_anchor": (0.5, -0.12), "ncols": 3}  # lines may be anywhere above
            axis.legend(frameon=False, fontsize=7, **below)
        else:
            axis.text(0.5, 0.5, "not recorded", ha="center", va="center", fontsize=9)
            axis.set(xticks=[], yticks=[])
    figure.suptitle(title, fontsize=10)
    figure.supxlabel("updates", fontsize=9)
    return figure


def _number(row: dict[str, Any], key: str) -> float:
    value = row.get(key, "missing")
    if isinstance(value, bool) or not isinstance(value, int | float | None):
        raise InvalidValue(f"metrics.jsonl: {key}={value!r:.80}: must be a number")
    return float("nan") if value is None else float(value)


def _known(rows: list[dict[str, Any]], name: str) -> list[str]:
    found = {key for row in rows for key in row}
    return sorted(key for key in found if key.startswith(name[:-1])) if name.endswith("*") else [name] * (name in found)
