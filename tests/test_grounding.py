"""What a caption has said of places, token by token, and the linear layer that is asked for it."""

import math

import pytest
import torch

from nitro_e_lite.scenes.grammar import COLORS, RELATIONS, SHAPES, Background, Scene, SceneObject
from nitro_e_lite.stages.grounding import PlaceReader, Said, said_places

LEFT, RIGHT, TOP, BOTTOM, UNSAID = range(5)


def scene(first: tuple[str, str], relation: str | None, second: tuple[str, str]) -> Scene:
    """Two objects of (shape, colour); the places drawn are not looked at."""
    objects = tuple(SceneObject(s, c, "small", 0.5, 0.5, 0.1, 0.0, COLORS[c]) for s, c in (first, second))
    return Scene("pair", objects, Background((0, 0, 0), (0, 0, 0), 0.0, (0, 0, 1, 0)), relation)


def said(text: str, of: Scene) -> list[tuple[int, dict[int, tuple[str, str | None]]]]:
    """For each word, and at last for padding: side of the last object, and (shape, colour) by side."""
    ends = torch.tensor(
        [[*(len(text[:k].rstrip()) for k in range(1, len(text) + 1) if text[k : k + 1] in ("", " ")), 0]]
    )
    found = said_places([text], [of], ends)
    shapes, colors = (*SHAPES, None), (*COLORS, None)
    layouts = [
        {side: (shapes[s], colors[c]) for side, (s, c) in enumerate(zip(*one, strict=True)) if s < len(SHAPES)}
        for one in zip(found.shapes[0].tolist(), found.colors[0].tolist(), strict=True)
    ]
    return list(zip(found.own[0].tolist(), layouts, strict=True))


CIRCLE_LEFT = scene(("circle", "red"), "left of", ("square", "blue"))
CIRCLE, SQUARE = ("circle", "red"), ("square", "blue")


def test_a_place_is_known_from_the_word_that_says_it():
    words = said("a red circle to the left of a blue square", CIRCLE_LEFT)
    assert words[:5] == [(UNSAID, {})] * 5  # up to "the"
    assert words[5:9] == [(LEFT, {LEFT: CIRCLE})] * 4  # "left of a blue"
    assert words[9:] == [(RIGHT, {LEFT: CIRCLE, RIGHT: SQUARE})] * 2  # "square" and padding


@pytest.mark.parametrize(
    ("text", "last"),
    [
        ("a blue square that is right of a red circle", LEFT),
        ("a red circle on the left and a blue square on the right", RIGHT),
        ("a red circle and a blue square, with the first on the left side of the second on a soft background", RIGHT),
    ],
)
def test_every_way_to_say_it_ends_in_the_same_layout(text, last):
    assert said(text, CIRCLE_LEFT)[-1] == (last, {LEFT: CIRCLE, RIGHT: SQUARE})


def test_equal_shapes_are_told_apart_by_colour_and_colours_may_be_unsaid():
    crosses = scene(("cross", "red"), "below", ("cross", "white"))
    assert said("a white cross over a red cross", crosses)[-1] == (
        BOTTOM,
        {TOP: ("cross", "white"), BOTTOM: ("cross", "red")},
    )
    hearts = scene(("heart", "pink"), "above", ("star", "red"))
    assert said("a star underneath a heart", hearts)[-1] == (TOP, {TOP: ("heart", None), BOTTOM: ("star", None)})


def test_captions_without_places_say_none():
    assert set(map(str, said("a red circle next to a blue square", CIRCLE_LEFT))) == {str((UNSAID, {}))}
    three = scene(("circle", "red"), None, ("square", "blue"))
    assert said("three circles on a plain background", three)[-1] == (UNSAID, {})


def test_loss_of_a_reader_that_knows_nothing_is_the_entropy_of_guessing():
    reader = PlaceReader(8)
    words = said_places(["a circle above a square"], [scene(("circle", "red"), "above", ("square", "blue"))],
                        torch.tensor([[1, 8, 14, 16, 23, 0]]))  # fmt: skip
    guess = math.log(5) + 0.3 * 4 * (math.log(7) + math.log(11))
    torch.testing.assert_close(reader.loss(torch.zeros(1, 6, 8), words).item(), 1.3 * guess)
    nothing = Said(torch.full((1, 6), 4), torch.full((1, 6, 4), 6), torch.full((1, 6, 4), 10))
    torch.testing.assert_close(reader.loss(torch.zeros(1, 6, 8), nothing).item(), 0.3 * guess)


def test_larger_weights_do_not_stand_in_for_loud_features():
    reader, states = PlaceReader(8), torch.randn(2, 3, 8)
    before = reader(states)
    reader.weight.data *= 7
    for one, other in zip(before, reader(states), strict=True):
        torch.testing.assert_close(one, other)
    assert [one.shape for one in before] == [(2, 3, 5), (2, 3, 4, 7), (2, 3, 4, 11)]


def test_sides_follow_the_relations():
    assert RELATIONS == ("left of", "right of", "above", "below")  # side k ^ 1 lies opposite side k
