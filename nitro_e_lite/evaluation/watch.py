"""Watching a run that learns from rewards, so that hacking is seen while there is still something to save.

A policy finds what a reward pays for, whether or not anyone meant it. What it is paid rises either way; the difference
shows beside it: in what an independent judge says, in how alike the pictures of a group become, in statistics of the
pixels that nobody pays for. `reward_figure` draws all of it from a run's metrics; `EarlyStop` ends the run.

    edge density          share of pixels at an edge: falls when things vanish, rises with texture and noise
    colour entropy        bits, of 4 x 4 x 4 colours: falls when a picture turns into one colour
    background variance   of the outermost pixels, where no object lies: rises when a background gets a pattern
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from nitro_e_lite.errors import GateFailed
from nitro_e_lite.viz import COLORS

STATISTICS = ("edge_density", "color_entropy", "background_variance")
EDGE = 24.0  # of 255, from one pixel to the next
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


class EarlyStop:
    """Ends a run whose held-out score falls, or whose groups collapse.

    Args:
        drop: how far the held-out score may fall below its best; 0: any distance.
        diversity: the share of its first value that the distance inside groups must keep; 0: none.

    Attributes:
        best: highest held-out score, and its step.
        first, now: distance inside groups, at first and as a running mean.
    """

    def __init__(self, drop: float, diversity: float):
        self.drop, self.diversity = drop, diversity
        self.best: tuple[float, int] = (-np.inf, 0)
        self.first: float | None = None
        self.now = 0.0

    def rolled_out(self, step: int, distance: float) -> None:
        """Looks at a roll-out.

        Raises:
            GateFailed: the pictures of a group have become alike.
        """
        if self.first is None:
            self.first = self.now = distance
        self.now += 0.3 * (distance - self.now)
        if self.now < self.diversity * self.first:
            raise GateFailed(
                f"gate diversity: at step {step} the distance inside groups is {self.now:.3f}, "
                f"{self.now / self.first:.0%} of what it was; must stay above {self.diversity:.0%}. {self._advice()}"
            )

    def held_out(self, step: int, score: float) -> None:
        """Looks at a held-out score.

        Raises:
            GateFailed: it has fallen.
        """
        if self.drop and score < self.best[0] - self.drop:
            raise GateFailed(
                f"gate held-out: at step {step} the held-out score is {score:.3f}, more than {self.drop} below its "
                f"best, {self.best[0]:.3f}. {self._advice()}"
            )
        if score > self.best[0]:
            self.best = score, step

    def _advice(self) -> str:
        where = (
            f"the best adapter is that of step {self.best[1]} in snapshots" if self.best[1] else "nothing was better"
        )
        return f"Look at the figure of the run (nitro-e reward plot); {where}"

    def state(self) -> dict[str, Any]:
        """JSON-able."""
        return {"best": list(self.best) if self.best[1] else None, "first": self.first, "now": self.now}

    def load_state(self, state: dict[str, Any]) -> None:
        """The inverse of `state`."""
        self.best = tuple(state["best"]) if state["best"] else self.best
        self.first, self.now = state["first"], state["now"]


PANELS: dict[str, tuple[str, ...]] = {
    "what is paid, what is seen": ("reward", "reward_*", "reader", "held_out_reader", "geneval"),
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
    """
    rows = list(rows)
    figure = Figure(figsize=(10.5, 5.4), layout="constrained")
    axes = figure.subplots(2, 3).flatten()
    for axis, (name, wanted) in zip(axes, PANELS.items(), strict=True):
        names = [known for one in wanted for known in _known(rows, one)]
        for color, key in zip((*COLORS, *COLORS), names, strict=False):
            points = [(row["step"], row[key]) for row in rows if key in row]
            steps, values = np.array(points, float).T
            values = values / (values[0] or 1) if name == RELATIVE else values
            axis.plot(steps, values, color=color, label=key.replace("_", " "), marker="." if len(points) < 12 else "")
            bounds = [(row[f"{key}_low"], row[f"{key}_high"]) for row in rows if f"{key}_low" in row]
            if bounds:
                low, high = np.array(bounds).T
                axis.fill_between(steps, low, high, color=color, alpha=0.15, linewidth=0)
        axis.set_title(name, fontsize=9)
        if name == LOGARITHMIC and names:
            axis.set_yscale("symlog", linthresh=1e-6)
        if names:
            axis.legend(frameon=True, framealpha=0.85, edgecolor="none", fontsize=7)
    for axis in axes[3:]:
        axis.set_xlabel("updates")
    figure.suptitle(title, fontsize=10)
    return figure


def _known(rows: list[dict[str, Any]], name: str) -> list[str]:
    found = {key for row in rows for key in row}
    return sorted(key for key in found if key.startswith(name[:-1])) if name.endswith("*") else [name] * (name in found)
