"""Minimal pairs: two scenes that differ in one fact, and captions that differ in the words for it.

"A red circle to the left of a blue square" and "a red circle to the right of a blue square" are nearly the same text,
and their pictures are nearly the same pixels. What a model gains from reading such a caption rightly is a small part of
its loss, lost among everything else that noise hides from it. `minimal_pair(seed, index)` puts both scenes into one
training batch, where they get the same noise and the same `t` (see `data/batches.py`). Whatever the two pictures share
then pulls equally on both captions, and in what tells the captions apart it cancels; what is left is the one fact. The
expected gradient is that of the same scenes drawn apart. Captions that leave the fact unsaid ("a circle and a star",
where colours differ) never occur here, so a run alternates them with plain scenes, or ends on those.

Minimal pairs are what linguists test grammar with; Winoground (arXiv 2204.03162) tests vision-language models so.
Training on them with common noise is this project's own.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from nitro_e_lite.config import Fact
from nitro_e_lite.scenes.captions import caption_stream, describe, is_reserved, words
from nitro_e_lite.scenes.grammar import (
    COLORS,
    EXTENT,
    MARGIN,
    SHAPES,
    Scene,
    SceneObject,
    Stream,
    is_held_out,
    relation_between,
    sample_scene,
)

REDRAW = 2**44  # added to an index to draw another scene: beyond those of training and of validation
_CHANGES = 2**33  # names the streams that choose a change


@dataclass(frozen=True)
class MinimalPair:
    """Two scenes that differ in one of `config.FACTS`.

    They are: exchanged places, colours or shapes of two objects, the shape of one of them ("partner"), the number of
    equal objects, and shape or colour of one or of all equal objects.
    """

    scenes: tuple[Scene, Scene]
    fact: Fact

    def captions(self, variant: int) -> tuple[str, str]:
        """One caption for each scene: the same template, different words; never a reserved string.

        Args:
            variant: which paraphrase, any integer.
        """
        for attempt in range(1000):
            first, second = (describe(s, caption_stream(self.scenes[0], variant, attempt)) for s in self.scenes)
            if first != second and not is_reserved(first) and not is_reserved(second) and self._says(first):
                return first, second
        raise RuntimeError("no caption tells the two scenes apart")  # probability below 1e-30

    def _says(self, text: str) -> bool:
        """Whether a caption names the fact: without colours "a star and a heart" is "a heart and a star"."""
        return self.fact != "shapes" or not COLORS.keys().isdisjoint(words(text))


def minimal_pair(seed: int, index: int) -> MinimalPair:
    """Draws pair `index` of the endless data set `seed`: a training scene and the same with one fact changed.

    Of two or more different objects the first two exchange their shapes or their places, or the second gets another
    shape, or they exchange their colours. Of three or four equal objects the last is taken away. Else shape or colour
    is another.

    Raises:
        ValueError: for a negative index.
    """
    for attempt in range(1000):
        scene = sample_scene(seed, index + attempt * REDRAW)
        stream = Stream(seed, index, attempt, _CHANGES)
        for fact, other in _changes(scene, stream):
            if not is_held_out(other.objects):
                return MinimalPair((scene, other) if stream.random() < 0.5 else (other, scene), fact)
    raise RuntimeError(f"no minimal pair for seed={seed}, index={index}")  # probability below 1e-30


def _changes(scene: Scene, stream: Stream) -> Iterator[tuple[Fact, Scene]]:
    """Facts and the scene with that one changed, the preferred one first."""
    if scene.kind in ("pair", "mixed"):
        first, second = scene.objects[:2]
        mixed = {(first.shape, second.color), (second.shape, first.color)}  # what the first two are after an exchange
        differ = mixed.isdisjoint((one.shape, one.color) for one in scene.objects)
        if differ and stream.random() < 0.5:
            yield "shapes", _with(scene, _exchange(first, second, "shape"))
        two = _exchange(first, second, "x", "y")
        if scene.relation and stream.random() < 0.5 and all(map(_fits, two)):
            yield "places", _with(scene, two)
        shapes = {one.shape for one in scene.objects}
        if stream.random() < 0.5 and len(shapes) == len(scene.objects):  # of equal shapes captions name the colours
            partner = replace(second, shape=stream.choice([s for s in SHAPES if s not in shapes]))
            yield "partner", _with(scene, (first, partner))
        if differ:
            yield "colors", _with(scene, _exchange(first, second, "color", "tint"))
    elif len(scene.objects) > 2 and stream.random() < 0.7:
        yield "number", replace(scene, objects=scene.objects[:-1])
    else:
        fact = stream.choice(("shape", "color"))
        yield fact, replace(scene, objects=(_other_shape if fact == "shape" else _other_color)(scene, stream))


def _exchange(first: SceneObject, second: SceneObject, *fields: str) -> tuple[SceneObject, SceneObject]:
    """The two objects with `fields` exchanged."""
    return (
        replace(first, **{name: getattr(second, name) for name in fields}),
        replace(second, **{name: getattr(first, name) for name in fields}),
    )


def _with(scene: Scene, two: tuple[SceneObject, SceneObject]) -> Scene:
    """The scene with its first two objects replaced; their relation is read anew."""
    relation = relation_between(*two) if scene.relation else None
    return replace(scene, objects=two + scene.objects[2:], relation=relation)


def _fits(one: SceneObject) -> bool:
    """Whether an object is as far from the border as objects must be."""
    free = one.radius * EXTENT + MARGIN
    return free <= min(one.x, one.y) and max(one.x, one.y) <= 1 - free


def _other_shape(scene: Scene, stream: Stream) -> tuple[SceneObject, ...]:
    shape = stream.choice([s for s in SHAPES if s != scene.objects[0].shape])
    return tuple(replace(one, shape=shape) for one in scene.objects)


def _other_color(scene: Scene, stream: Stream) -> tuple[SceneObject, ...]:
    color = stream.choice([c for c in COLORS if c != scene.objects[0].color])
    return tuple(replace(one, color=color, tint=COLORS[color]) for one in scene.objects)
