"""Captions of scenes: many English sentences for the same picture.

`caption(scene, variant)` is one of them. Some strings are *reserved*: they are never training captions, so that the
evaluation prompts of `geneval.py` are new to the model.
"""

from __future__ import annotations

import hashlib
import re
from functools import cache

from nitro_e_lite.scenes.grammar import COLORS, COUNT_WORDS, SHAPES, SIZES, Scene, Stream

RESERVED_ONE_IN = 4  # one caption string in four is kept for evaluation

LEADS = (
    "", "", "", "a photo of ", "a picture of ", "an image of ", "a drawing of ", "there is ", "this is ",
    "an illustration of ", "a simple drawing of ", "here is ",
)  # fmt: skip

TAILS = ("", "", "", "", " on a soft background", " on a plain background", " in the picture")

_RELATION_PHRASES = {
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
    return int.from_bytes(digest, "big") % RESERVED_ONE_IN == 0


def noun_phrase(shape: str, color: str | None = None, size: str | None = None) -> str:
    """Article, optional size and colour, shape: `"an orange star"`."""
    words = " ".join(w for w in (size, color, shape) if w)
    return ("an " if words[0] in "aeiou" else "a ") + words


def plural(shape: str) -> str:
    """The plural of a shape name."""
    return shape + ("es" if shape == "cross" else "s")


def phrase_count(count: int, shape: str, color: str | None, size: str | None, stream: Stream) -> str:
    """A way to say `count` equal objects."""
    words = " ".join(w for w in (size, color, plural(shape)) if w)
    ways = ("{number}", "{number}", "exactly {number}", "a group of {number}", "{count}", "a set of {number}")
    return f"{stream.choice(ways).format(number=COUNT_WORDS[count], count=count)} {words}"


def phrase_relation(first: str, relation: str, second: str, stream: Stream) -> str:
    """A way to say that `first` stands in `relation` to `second`."""
    if stream.random() < 0.5:
        first, relation, second = second, _OPPOSITE[relation], first
    towards = stream.choice(_RELATION_PHRASES[relation])
    form = stream.choice(("plain", "plain", "verb", "sides", "comma"))
    if form == "verb":
        return f"{first} that is {towards} {second}"
    if form == "sides":
        return f"{first} {_SIDE[relation]} and {second} {_SIDE[_OPPOSITE[relation]]}"
    if form == "comma":
        return f"{first} and {second}, with the first {towards} the second"
    return f"{first} {towards} {second}"


def phrase_list(phrases: list[str], stream: Stream) -> str:
    """A way to list several things, in random order."""
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
    text += [*LEADS, *TAILS, *_SIDE.values(), *(t for ways in _RELATION_PHRASES.values() for t in ways)]
    text += ["a an and exactly group set of there here these are that is with the first second next to together"]
    return frozenset(words(" ".join(text)))


def unknown_words(text: str) -> list[str]:
    """The words of `text`, in any script, that no caption contains, in order of appearance."""
    return [w for w in dict.fromkeys(re.findall(r"[^\W\d_]+|\d+", text.lower())) if w not in vocabulary()]
