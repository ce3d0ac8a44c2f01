"""Synthetic captioned scenes: the course's counterpart of the paper's 25 million images.

A scene is one to four coloured shapes on a soft background. It is small enough to be learned on a laptop and rich
enough to ask what a text-to-image model is asked: which object, which colour, how many, where.

Three things make a scene useful as data:

* **A grammar.** ``sample_scene(seed, index)`` draws shapes, colours, sizes, places and a relation from a counter-based
  integer stream, so scene (seed, index) is the same on every machine and needs no file.
* **A renderer.** Every shape is a signed distance ``d(p)`` in pixels; its coverage of a pixel is
  ``clip(1/2 - d, 0, 1)``, which is anti-aliasing by geometry. Coordinates are fractions of the image: any size works.
* **Captions.** ``caption(scene, variant)`` says the same scene in many English ways. Some strings are *reserved*: they
  are never training captions, so that the evaluation prompts of ``geneval.py`` are new to the model. Some compositions
  (shape-colour pairs and shape pairs) are *held out*: they are never drawn in training.
"""

from __future__ import annotations

import hashlib
import math
import re
from dataclasses import dataclass
from functools import cache

import numpy as np

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
RESERVED_FRACTION = 4  # one caption string in four is kept for evaluation

MARGIN = 0.04  # free border, fraction of the image
GAP = 0.05  # free space between objects
EXTENT = 1.16  # bounding radius of the widest shape over the nominal radius

_MASK = (1 << 64) - 1


class Stream:
    """A counter-based random stream (SplitMix64) that depends on integers alone.

    NumPy promises no fixed sequence for its distributions across versions; sixty-four bit integer arithmetic does.

    Args:
        *keys: integers that name the stream, e.g. ``(seed, index)``.
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
    """One shape. ``x``, ``y`` and ``radius`` are fractions of the image, ``angle`` is in radians, y points down."""

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
    """A soft two-colour gradient along ``angle`` with one faint glow."""

    start: tuple[float, float, float]
    end: tuple[float, float, float]
    angle: float
    glow: tuple[float, float, float, float]  # x, y, radius, strength


@dataclass(frozen=True)
class Scene:
    """Objects on a background. ``relation`` reads "objects[0] is RELATION objects[1]"; None when it is unclear."""

    kind: str
    objects: tuple[SceneObject, ...]
    background: Background
    relation: str | None = None


# ---------------------------------------------------------------------------------------------------------------------
# The grammar
# ---------------------------------------------------------------------------------------------------------------------


def is_held_out(objects) -> bool:
    """Whether a list of objects (anything with ``.shape`` and ``.color``) is a composition kept out of training."""
    shapes = {o.shape for o in objects}
    return any((o.shape, o.color) in HELD_OUT_OBJECTS for o in objects) or any(
        pair <= shapes for pair in HELD_OUT_SHAPE_PAIRS
    )


def sample_scene(seed: int, index: int, split: str = "train") -> Scene:
    """Draws scene ``index`` of the endless data set ``seed``.

    Args:
        seed: names the data set.
        index: position in it, >= 0.
        split: ``"train"`` (no held-out composition), ``"held_out"`` (only held-out compositions) or ``"all"``.

    Returns:
        The scene; the same for the same arguments on every machine.

    Raises:
        ValueError: for an unknown split or a negative index.
    """
    if split not in ("train", "held_out", "all"):
        raise ValueError(f"split={split!r}: must be 'train', 'held_out' or 'all'")
    if index < 0:
        raise ValueError(f"index={index}: must be >= 0")
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
    """Gives each ``(shape, color, size)`` a place so that no two objects touch.

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


def relation_between(first, second, margin: float = 0.12) -> str | None:
    """The one relation that clearly holds between two objects with ``.x`` and ``.y``, or None.

    Clear means: the distance along the axis is at least ``margin`` of the image and exceeds that along the other axis
    by a third, so that "left of" never reads as "above".
    """
    dx, dy = second.x - first.x, second.y - first.y
    if abs(dx) > margin and abs(dx) > 4 / 3 * abs(dy):
        return "left of" if dx > 0 else "right of"
    if abs(dy) > margin and abs(dy) > 4 / 3 * abs(dx):
        return "above" if dy > 0 else "below"
    return None


def draw_background(stream: Stream) -> Background:
    """A gradient between two desaturated tints of middle to high lightness: no palette colour is near it."""

    def tint() -> tuple[float, float, float]:
        hue, chroma, light = stream.uniform(0, 2 * math.pi), stream.uniform(0, 22), stream.uniform(150, 204)
        return tuple(light + chroma * math.cos(hue - k * 2 * math.pi / 3) for k in range(3))

    glow = (stream.random(), stream.random(), stream.uniform(0.3, 0.7), stream.uniform(-10, 10))
    return Background(tint(), tint(), stream.uniform(0, 2 * math.pi), glow)


# ---------------------------------------------------------------------------------------------------------------------
# The renderer
# ---------------------------------------------------------------------------------------------------------------------


def _polygon(points: np.ndarray, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Signed distance to a closed polygon, negative inside. ``points`` (P, 2); ``x``, ``y`` (H, W)."""
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
def _outline(shape: str) -> np.ndarray:
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
    """Signed distance to ``shape`` of nominal radius one, negative inside; ``x``, ``y`` (H, W) with y down."""
    if shape == "circle":
        return np.hypot(x, y) - 0.98
    if shape == "heart":
        return _heart(x, y)
    return _polygon(_outline(shape), x, y)


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
        raise ValueError(f"size={size}: must be >= 16 pixels")
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


# ---------------------------------------------------------------------------------------------------------------------
# Captions
# ---------------------------------------------------------------------------------------------------------------------

LEADS = (
    "", "", "", "a photo of ", "a picture of ", "an image of ", "a drawing of ", "there is ", "this is ",
    "an illustration of ", "a simple drawing of ", "here is ",
)  # fmt: skip
TAILS = ("", "", "", "", " on a soft background", " on a plain background", " in the picture")
_TOWARDS = {
    "left of": ("to the left of", "left of", "on the left of", "on the left side of"),
    "right of": ("to the right of", "right of", "on the right of", "on the right side of"),
    "above": ("above", "over", "placed above", "higher than"),
    "below": ("below", "under", "underneath", "lower than"),
}
_OPPOSITE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
_SIDE = {"left of": "on the left", "right of": "on the right", "above": "at the top", "below": "at the bottom"}


def is_reserved(text: str) -> bool:
    """Whether a caption string is kept for evaluation and never used in training."""
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") % RESERVED_FRACTION == 0


def noun_phrase(shape: str, color: str | None = None, size: str | None = None) -> str:
    """``"an orange star"``: article, optional size and colour, shape."""
    words = " ".join(w for w in (size, color, shape) if w)
    return ("an " if words[0] in "aeiou" else "a ") + words


def plural(shape: str) -> str:
    """The plural of a shape name."""
    return shape + ("es" if shape == "cross" else "s")


def phrase_count(count: int, shape: str, color: str | None, size: str | None, stream: Stream) -> str:
    """A way to say ``count`` equal objects."""
    words = " ".join(w for w in (size, color, plural(shape)) if w)
    ways = ("{number}", "{number}", "exactly {number}", "a group of {number}", "{count}", "a set of {number}")
    return f"{stream.choice(ways).format(number=COUNT_WORDS[count], count=count)} {words}"


def phrase_relation(first: str, relation: str, second: str, stream: Stream) -> str:
    """A way to say that ``first`` stands in ``relation`` to ``second``."""
    if stream.random() < 0.5:
        first, relation, second = second, _OPPOSITE[relation], first
    towards = stream.choice(_TOWARDS[relation])
    form = stream.choice(("plain", "plain", "verb", "sides", "comma"))
    if form == "verb":
        return f"{first} that is {towards} {second}"
    if form == "sides":
        return f"{first} {_SIDE[relation]} and {second} {_SIDE[_OPPOSITE[relation]]}"
    if form == "comma":
        return f"{first} and {second}, with the first {towards} the second"
    return f"{first} {towards} {second}"


def phrase_list(phrases: list[str], stream: Stream) -> str:
    """A way to say several things in one breath; the order is drawn anew."""
    order = sorted(phrases, key=lambda _: stream.random())
    if len(order) == 1:
        return order[0]
    if len(order) == 2:
        return stream.choice((" and ", " and ", " with ", " next to ", " together with ")).join(order)
    return ", ".join(order[:-1]) + " and " + order[-1]


def describe(scene: Scene, stream: Stream) -> str:
    """One caption for a scene, drawn from the templates."""
    ambiguous = scene.kind != "count" and len({o.shape for o in scene.objects}) < len(scene.objects)
    with_color = stream.random() < 0.8 or ambiguous  # never "a cross and a cross"
    with_size = stream.random() < 0.25
    named = [(o.shape, o.color if with_color else None, o.size if with_size else None) for o in scene.objects]
    if scene.kind == "count":
        body = phrase_count(len(named), *named[0], stream)
    elif scene.kind == "pair" and scene.relation and stream.random() < 0.75:
        body = phrase_relation(noun_phrase(*named[0]), scene.relation, noun_phrase(*named[1]), stream)
    else:
        body = phrase_list([noun_phrase(*n) for n in named], stream)
    lead = stream.choice(LEADS)
    if scene.kind == "count":
        lead = {"there is ": "there are ", "here is ": "here are ", "this is ": "these are "}.get(lead, lead)
    return lead + body + stream.choice(TAILS)


def caption_stream(scene: Scene, variant: int, attempt: int) -> Stream:
    """The random stream of one caption of a scene."""
    seed = int.from_bytes(hashlib.blake2b(repr(scene).encode(), digest_size=8).digest(), "big")
    return Stream(seed, variant, attempt)


def caption(scene: Scene, variant: int) -> str:
    """One of the many captions of a scene; never a reserved string.

    Args:
        scene: what to describe.
        variant: which paraphrase, any integer; equal arguments give equal captions.
    """
    for attempt in range(1000):
        text = describe(scene, caption_stream(scene, variant, attempt))
        if not is_reserved(text):
            return text
    raise RuntimeError("every caption of the scene is reserved")  # probability below 1e-100


def words(text: str) -> list[str]:
    """The lower-case words and numbers of a text."""
    return re.findall(r"[a-z]+|[0-9]+", text.lower())


@cache
def vocabulary() -> frozenset[str]:
    """Every word the captions can contain."""
    text = [*SHAPES, *map(plural, SHAPES), *COLORS, *SIZES, *COUNT_WORDS.values(), *map(str, COUNT_WORDS)]
    text += [*LEADS, *TAILS, *_SIDE.values(), *(t for ways in _TOWARDS.values() for t in ways)]
    text += ["a an and exactly group set of there here these are that is with the first second next to together"]
    return frozenset(words(" ".join(text)))


def unknown_words(text: str) -> list[str]:
    """The words of ``text``, in any script, that no caption contains, in order of appearance."""
    return [w for w in dict.fromkeys(re.findall(r"[^\W\d_]+|\d+", text.lower())) if w not in vocabulary()]
