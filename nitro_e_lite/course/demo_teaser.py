"""The picture that the README opens with: the same captions in twenty steps, in four and in one, with times.

Drawn by `nitro-e demo --teaser` and never by hand; nothing is picked, the captions and the first seed are fixed. Times
are a lane's own steps on one thread, by `lessons.race`: what else runs on the machine does not count.
"""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from PIL import Image

from nitro_e_lite import viz
from nitro_e_lite.course import lessons
from nitro_e_lite.course.demo_protocol import Lane, Order, build, default_lanes
from nitro_e_lite.course.demo_worker import Artist, LaneResult, draw

SCENES = (
    (1, "red", "circle", "left of", "blue", "square"),
    (1, "yellow", "star", "above", "purple", "heart"),
    (2, "orange", "triangle", None, "red", "circle"),
    (1, "white", "cross", "and", "green", "square"),
    (3, "pink", "heart", None, "red", "circle"),
    (1, "black", "star", "below", "orange", "circle"),
)
WIDTH = 1280  # pixels
RIGHT, WRONG = "#12703a", "#b3261e"


def times(artist: Artist, rounds: int = 5) -> list[float]:
    """Seconds of each lane's steps, the fastest of several rounds: a busy machine only adds."""

    order = Order(build(*SCENES[0])[0])

    def run(lane: Lane) -> Callable[[], object]:
        pipeline = artist.pipelines[lane.model]
        told, untold = pipeline.encode_captions([order.caption]), pipeline.encode_captions([""])
        text = {"prompt_embeds": told, "negative_prompt_embeds": untold}
        return lambda: list(pipeline.steps(None, lane.steps, order.guidance_of(lane), **text))

    runners = {str(index): run(lane) for index, lane in enumerate(artist.lanes)}
    return [min(seconds) for seconds in lessons.race(runners, rounds).values()]


def races(artist: Artist, seed: int = 0) -> list[list[LaneResult]]:
    """Every scene of the list, drawn by every lane; scene number `k` with seed `seed + k`."""
    guidance = artist.facts()["guidance"]
    drawn = []
    for number, scene in enumerate(SCENES):
        caption, prompt = build(*scene)
        steps = tuple(lane.steps for lane in artist.lanes)
        drawn.append(draw(artist, Order(caption, seed + number, guidance, steps, True, prompt)))
    return drawn


def grid(drawn: Sequence[Sequence[LaneResult]], seconds: Sequence[float]) -> Image.Image:
    """Lanes in rows, captions in columns.

    Args:
        drawn: for each caption, the finished lanes.
        seconds: of each lane.
    """
    rows, columns, cell, margin = len(drawn[0]), len(drawn), 1.62, 1.06
    figure, axes = plt.subplots(rows, columns, figsize=(margin + cell * columns, cell * rows + 0.46), squeeze=False)
    width, height = figure.get_size_inches()
    figure.subplots_adjust(margin / width, 0.03 / height, 1 - 0.03 / width, 1 - 0.46 / height, 0.05, 0.05)
    for column, results in enumerate(drawn):
        caption = textwrap.fill(results[0].facts["prompt"], 24)
        axes[0, column].set_title(caption, fontsize=8, pad=5, linespacing=1.15)
        for row, result in enumerate(results):
            axis = axes[row, column]
            axis.imshow(viz.as_uint8(result.image), interpolation="lanczos")
            axis.set(xticks=[], yticks=[])
            axis.grid(False)
            axis.spines[:].set_visible(False)
            mark, color = ("right", RIGHT) if result.correct else ("wrong", WRONG)
            style = {"boxstyle": "round,pad=.3", "facecolor": "white", "edgecolor": "none", "alpha": 0.85}
            axis.text(0.04, 0.05, mark, transform=axis.transAxes, fontsize=7, color=color, weight="bold", bbox=style)
    for row, lane in enumerate(drawn[0]):
        center = axes[row, 0].get_position()
        x, y = (margin - 0.12) / width, (center.y0 + center.y1) / 2
        right = f"{sum(results[row].correct for results in drawn)} of {columns} right"
        pace = [] if row == 0 else [f"{seconds[0] / seconds[row]:.1f}× as fast"]
        time = "\n".join([f"{seconds[row]:.2f} s", *pace, right])
        figure.text(x, y + 0.02, lane.name, ha="right", va="bottom", fontsize=12, weight="bold")
        figure.text(x, y + 0.005, time, ha="right", va="top", fontsize=8.5, color="#555960", linespacing=1.4)
    picture = viz.as_picture(figure)
    return picture.resize((WIDTH, round(picture.height * WIDTH / picture.width)), Image.Resampling.LANCZOS)


def save(seed: int = 0) -> Path:
    """Draws, writes `figures/teaser.png` with its ledger entry, and returns its path.

    Raises:
        ValueError: a seed that the scenes cannot count up from.
    """
    for last in (seed, seed + len(SCENES) - 1):  # before anything is loaded
        Order("a star", last)
    torch.set_num_threads(1)
    artist = Artist(default_lanes())
    drawn, seconds = races(artist, seed), times(artist)
    facts = drawn[0][0].facts
    right = {results[0].name: sum(row.correct for row in results) for results in zip(*drawn, strict=True)}
    return viz.save_figure(
        grid(drawn, seconds),
        "teaser",
        source="nitro-e demo --teaser",
        params={
            "lanes": [f"{result.model}@{result.total}" for result in drawn[0]],
            "guidance": facts["guidance"],
            "shift": facts["shift"],
            "threads": 1,
            "seconds": [round(value, 3) for value in seconds],
            "right": right,
        },
        seed=seed,
        alt="The same six captions in three rows: twenty steps draw clean shapes, four too, one leaves faults.",
    )
