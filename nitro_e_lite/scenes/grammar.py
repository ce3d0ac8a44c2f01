"""Synthetic captioned scenes: the course's counterpart of the paper's 25 million images.

A scene is one to four coloured shapes on a soft background. It is small enough to be learned on a laptop and rich
enough to ask what a text-to-image model is asked: which object, which colour, how many, where.

`sample_scene(seed, index)` draws shapes, colours, sizes, places and a relation from a counter-based integer stream, so
scene (seed, index) is the same on every machine and needs no file. Some compositions (shape-colour pairs and shape
pairs) are *held out*: they are never drawn in training. `render.py` draws a scene, `captions.py` describes it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from nitro_e_lite.errors import InvalidValue

SHAPES = ("circle", "square", "triangle", "star", "heart", "cross")

COLORS: dict[str, tuple[int, int, int]] = {
    "red": (220, 38, 38),
    "orange": (247, 140, 28),
    "yellow": (250, 221, 50),
    "green": (46, 164, 72),
    "blue": (40, 88, 222),
    "purple": (136, 58, 186),
    "pink": (252, 138, 190),
    "brown": (122, 72, 38),
    "black": (26, 26, 30),
    "white": (250, 250, 250),
}

SIZES: dict[str, float] = {"small": 0.098, "medium": 0.135, "large": 0.182}  # radius as a fraction of the image
RELATIONS = ("left of", "right of", "above", "below")
COUNT_WORDS = {1: "one", 2: "two", 3: "three", 4: "four"}
KINDS = {"single": 0.14, "pair": 0.50, "count": 0.24, "mixed": 0.12}  # share of each kind in the training split

HELD_OUT_OBJECTS = frozenset(
    {
        ("circle", "purple"),
        ("square", "yellow"),
        ("triangle", "blue"),
        ("star", "green"),
        ("heart", "orange"),
        ("cross", "brown"),
    }
)

HELD_OUT_SHAPE_PAIRS = frozenset({frozenset({"triangle", "heart"}), frozenset({"star", "cross"})})
MARGIN = 0.04  # free border, fraction of the image
GAP = 0.05  # free space between objects
RELATION_MARGIN = 0.12  # distance between the centres of two objects whose relation is stated, fraction of the image
EXTENT = 1.16  # bounding radius of the widest shape over the nominal radius
_MASK = (1 << 64) - 1


class Stream:
    """A counter-based random stream (SplitMix64) that depends on integers alone.

    NumPy promises no fixed sequence for its distributions across versions; sixty-four bit integer arithmetic does.

    Args:
        *keys: integers that name the stream, e.g. `(seed, index)`.
    """

    def __init__(self, *keys: int):
        state = 0x9E3779B97F4A7C15
        for key in keys:
            state = self._mix((state ^ (key & _MASK)) + 0x9E3779B97F4A7C15 & _MASK)
        self._state = state

    @staticmethod
    def _mix(z: int) -> int:
        z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 & _MASK
        z = (z ^ (z >> 27)) * 0x94D049BB133111EB & _MASK
        return z ^ (z >> 31)

    def random(self) -> float:
        """A float in [0, 1)."""
        self._state = (self._state + 0x9E3779B97F4A7C15) & _MASK
        return (self._mix(self._state) >> 11) * 2.0**-53

    def uniform(self, low: float, high: float) -> float:
        """A float in [low, high)."""
        return low + (high - low) * self.random()

    def choice(self, options):
        """One element of a sequence."""
        return options[int(self.random() * len(options))]

    def weighted(self, options: dict):
        """One key of a mapping from key to weight (the weights sum to one)."""
        remaining = self.random()
        for key, weight in options.items():
            remaining -= weight
            if remaining < 0:
                return key
        return key


@dataclass(frozen=True)
class SceneObject:
    """One shape. `x`, `y` and `radius` are fractions of the image, `angle` is in radians, y points down."""

    shape: str
    color: str
    size: str
    x: float
    y: float
    radius: float
    angle: float
    tint: tuple[int, int, int]  # the colour as drawn: the palette colour with a little jitter


@dataclass(frozen=True)
class Background:
    """A soft two-colour gradient along `angle` with one faint glow."""

    start: tuple[float, float, float]
    end: tuple[float, float, float]
    angle: float
    glow: tuple[float, float, float, float]  # x, y, radius, strength


@dataclass(frozen=True)
class Scene:
    """Objects on a background. `relation` reads "objects[0] is RELATION objects[1]"; None when none is claimed."""

    kind: str
    objects: tuple[SceneObject, ...]
    background: Background
    relation: str | None = None


def is_held_out(objects) -> bool:
    """Whether a list of objects (anything with `.shape` and `.color`) is a composition kept out of training."""
    shapes = {o.shape for o in objects}
    return any((o.shape, o.color) in HELD_OUT_OBJECTS for o in objects) or any(
        pair <= shapes for pair in HELD_OUT_SHAPE_PAIRS
    )


def sample_scene(seed: int, index: int, split: str = "train") -> Scene:
    """Draws scene `index` of the endless data set `seed`.

    Args:
        seed: names the data set.
        index: position in it, >= 0.
        split: `"train"` (no held-out composition), `"held_out"` (only held-out compositions) or `"all"`.

    Returns:
        The scene; the same for the same arguments on every machine.

    Raises:
        ValueError: for an unknown split or a negative index.
    """
    if split not in ("train", "held_out", "all"):
        raise InvalidValue(f"split={split!r}: must be 'train', 'held_out' or 'all'")
    if index < 0:
        raise InvalidValue(f"index={index}: must be >= 0")
    for attempt in range(1000):
        kind = Stream(seed, index).weighted(KINDS)  # drawn once, so that rejection does not change the shares
        stream = Stream(seed, index, attempt)
        names = _draw_names(kind, stream)
        sizes = _draw_sizes(kind, len(names), stream)
        relation = stream.choice(RELATIONS) if kind == "pair" and stream.random() < 0.7 else None
        objects = place([(*n, s) for n, s in zip(names, sizes, strict=True)], stream, relation)
        if objects is None or (split != "all" and is_held_out(objects) != (split == "held_out")):
            continue
        return Scene(kind, objects, draw_background(stream), relation)
    raise RuntimeError(f"no scene for seed={seed}, index={index}, split={split!r}")  # probability below 1e-30


def _draw_names(kind: str, stream: Stream) -> list[tuple[str, str]]:
    """Shape and colour of each object: alike in a count, pairwise different otherwise."""
    if kind == "count":
        return [(stream.choice(SHAPES), stream.choice(tuple(COLORS)))] * stream.choice((2, 3, 4))
    names: list[tuple[str, str]] = []
    total = {"single": 1, "pair": 2}.get(kind) or stream.choice((3, 3, 4))
    while len(names) < total:
        name = (stream.choice(SHAPES), stream.choice(tuple(COLORS)))
        if name not in names:
            names.append(name)
    return names


def _draw_sizes(kind: str, total: int, stream: Stream) -> list[str]:
    """Crowded scenes get smaller objects, so that there is room for a gap between any two."""
    options = ("small", "medium", "large") if total <= 2 else ("small", "medium")
    if kind == "count":
        return [stream.choice(options)] * total
    return [stream.choice(options) for _ in range(total)]


def place(specs, stream: Stream, relation: str | None = None) -> tuple[SceneObject, ...] | None:
    """Gives each `(shape, color, size)` a place so that no two objects touch.

    Args:
        specs: list of (shape, color, size) names.
        stream: random stream.
        relation: when given, the first object stands clearly in this relation to the second.

    Returns:
        The objects, or None when no free place was found in 60 tries.
    """
    placed: list[SceneObject] = []
    tries = 0
    while len(placed) < len(specs):
        tries += 1
        if tries > 60:
            return None
        shape, color, size = specs[len(placed)]
        radius = SIZES[size] * stream.uniform(0.94, 1.06)
        reach = radius * EXTENT + MARGIN
        x, y = stream.uniform(reach, 1 - reach), stream.uniform(reach, 1 - reach)
        tint = tuple(min(255, max(0, round(c + stream.uniform(-7, 7)))) for c in COLORS[color])
        new = SceneObject(shape, color, size, x, y, radius, stream.uniform(-0.12, 0.12), tint)
        if any(math.hypot(x - o.x, y - o.y) < (radius + o.radius) * EXTENT + GAP for o in placed):
            continue
        placed.append(new)
        if relation is not None and len(placed) == 2 and relation_between(*placed) != relation:
            placed.clear()
    return tuple(placed)


def relation_between(first, second) -> str | None:
    """The one relation that clearly holds between two objects with `.x` and `.y`, or None.

    Clear means: the distance along the axis is over `RELATION_MARGIN` and exceeds that along the other axis by a third,
    so that "left of" never reads as "above".
    """
    dx, dy = second.x - first.x, second.y - first.y
    if abs(dx) > RELATION_MARGIN and abs(dx) > 4 / 3 * abs(dy):
        return "left of" if dx > 0 else "right of"
    if abs(dy) > RELATION_MARGIN and abs(dy) > 4 / 3 * abs(dx):
        return "above" if dy > 0 else "below"
    return None


def draw_background(stream: Stream) -> Background:
    """A gradient between two desaturated tints of middle to high lightness: no palette colour is near it."""

    def tint() -> tuple[float, float, float]:
        hue, chroma, light = stream.uniform(0, 2 * math.pi), stream.uniform(0, 22), stream.uniform(150, 204)
        return tuple(light + chroma * math.cos(hue - k * 2 * math.pi / 3) for k in range(3))

    glow = (stream.random(), stream.random(), stream.uniform(0.3, 0.7), stream.uniform(-10, 10))
    return Background(tint(), tint(), stream.uniform(0, 2 * math.pi), glow)
