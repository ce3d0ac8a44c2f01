"""Where a caption says that things are, token by token: what the lite language model is taught besides words.

"A red circle to the left of a blue square" says that the square is on the right, but nothing in predicting the next
word asks any state to say so, and a model that draws needs it said *at the square*: its image tokens look up "what is
on my side?", which is one attention step when the token of the square carries the answer, and a problem of word order
when it does not. So a linear layer, dropped after training, reads two things off every final state:

* **own**: on which side of the picture the object mentioned last stands;
* **layout**: shape and colour of what stands on each of the four sides.

Only what the caption has said up to that token counts; the rest is "unsaid", and at padding tokens all is said. The
rows of the layer have length one, so the features themselves must be loud: larger weights cannot stand in for them. The
lite transformer read left and right at chance until its captions were encoded this way.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nitro_e_lite.scenes.captions import plural
from nitro_e_lite.scenes.grammar import COLORS, RELATIONS, SHAPES, Scene

PLACE_WORDS = frozenset("left right above over higher below under underneath lower top bottom".split())
_NOUNS = {name: shape for shape in SHAPES for name in (shape, plural(shape))}
_COLORS = tuple(COLORS)
_SIDES = len(RELATIONS)  # side k is where an object stands that is RELATIONS[k] of another; k ^ 1 lies opposite
_ANSWERS = (len(SHAPES) + 1, len(_COLORS) + 1)  # the last answer: unsaid


@dataclass(frozen=True)
class Said:
    """What captions have said of places up to each token.

    Attributes:
        own: (B, L) side of the object mentioned last; 4 when unsaid.
        shapes: (B, L, 4) shape on each side; 6 when unsaid.
        colors: (B, L, 4) colour on each side; 10 when unsaid.
    """

    own: Tensor
    shapes: Tensor
    colors: Tensor

    def to(self, device: torch.device) -> Said:
        """The same on another device."""
        return Said(self.own.to(device), self.shapes.to(device), self.colors.to(device))


def said_places(captions: list[str], scenes: list[Scene], ends: Tensor) -> Said:
    """What each caption of a scene has said of places up to each of its tokens.

    Args:
        captions: cleaned captions.
        scenes: what they describe.
        ends: (B, L) position in the text after each token; 0 for padding, which has seen it all.
    """
    own = np.full(ends.shape, _SIDES)
    layout = [np.full((*ends.shape, _SIDES), answers - 1) for answers in _ANSWERS]
    for row, (text, scene) in enumerate(zip(captions, scenes, strict=True)):
        known_from, mentions = _mentions(text, scene)
        for at, end in enumerate(ends[row].tolist()):
            end = end or len(text)
            for finished, side, names in mentions:
                if finished <= end and known_from <= end:
                    own[row, at] = side
                    for answers, name in zip(layout, names, strict=True):
                        answers[row, at, side] = name
    return Said(*map(torch.from_numpy, (own, *layout)))


def _mentions(text: str, scene: Scene) -> tuple[int, list[tuple[int, int, tuple[int, int]]]]:
    """Where the first word of place ends, and for each object mentioned: where that ends, its side, shape and colour.

    No objects when the caption says no places.
    """
    found = [(m.group(), m.end()) for m in re.finditer("[a-z]+", text)]
    places = [end for word, end in found if word in PLACE_WORDS]
    nouns = []
    for (before, _), (word, end) in zip([("", 0), *found], found, strict=False):
        if word in _NOUNS:
            nouns.append((_NOUNS[word], before if before in COLORS else None, end))
    if scene.relation is None or not places or len(nouns) != 2:
        return 0, []
    first, second = scene.objects[:2]
    name = "shape" if first.shape != second.shape else "color"
    in_order = nouns[0][name == "color"] == getattr(first, name)
    side = RELATIONS.index(scene.relation) ^ (not in_order)
    return places[0], [
        (end, side ^ k, (SHAPES.index(shape), _COLORS.index(color) if color else len(_COLORS)))
        for k, (shape, color, end) in enumerate(nouns)
    ]


class PlaceReader(nn.Module):
    """A linear layer that reads `Said` off features of `width`; its loss is what teaches the language model."""

    def __init__(self, width: int, scale: float = 2.0):
        super().__init__()
        self.scale = scale
        self.weight = nn.Parameter(torch.randn(_SIDES + 1 + _SIDES * sum(_ANSWERS), width))
        self.bias = nn.Parameter(torch.zeros(len(self.weight)))

    def forward(self, states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Features (B, L, D) -> logits of own (B, L, 5), shapes (B, L, 4, 7) and colours (B, L, 4, 11)."""
        logits = F.linear(states, self.scale * F.normalize(self.weight, dim=1), self.bias)
        own, layout = logits.split((_SIDES + 1, _SIDES * sum(_ANSWERS)), dim=-1)
        return own, *layout.unflatten(-1, (_SIDES, sum(_ANSWERS))).split(_ANSWERS, dim=-1)

    def loss(self, states: Tensor, said: Said, silent_weight: float = 0.3, layout_weight: float = 0.3) -> Tensor:
        """Cross-entropy of own + `layout_weight` times that of the layout (summed over its eight answers).

        It is averaged over the tokens that know a place, and with `silent_weight` over those that know none.
        """
        own, shapes, colors = self(states)
        knows = said.own != _SIDES
        weight = knows / knows.sum().clamp(min=1) + silent_weight * ~knows / (~knows).sum().clamp(min=1)  # (B, L)
        layout = _cross_entropy(shapes, said.shapes).sum(-1) + _cross_entropy(colors, said.colors).sum(-1)
        return (weight * (_cross_entropy(own, said.own) + layout_weight * layout)).sum()


def _cross_entropy(logits: Tensor, answers: Tensor) -> Tensor:
    """Of `logits` (..., A) against `answers` (...), one by one."""
    return F.cross_entropy(logits.flatten(0, -2), answers.flatten(), reduction="none").view(answers.shape)
