"""Minimal pairs: one fact changed, in the picture and in the words, and equal draws in training."""

import dataclasses
from collections import Counter

import pytest
import torch

from nitro_e_lite.config import FACTS, override
from nitro_e_lite.data.batches import Batches
from nitro_e_lite.data.scene_latents import VALIDATION_START
from nitro_e_lite.inference.encoders import load_encoders
from nitro_e_lite.presets import preset
from nitro_e_lite.scenes.captions import is_reserved, words
from nitro_e_lite.scenes.grammar import MARGIN, is_held_out, relation_between, sample_scene
from nitro_e_lite.scenes.minimal_pairs import minimal_pair
from nitro_e_lite.scenes.render import render
from nitro_e_lite.scenes.verifier import detect

PAIRS = [minimal_pair(11, index) for index in range(600)]
OPPOSITE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}


def facts(scene):
    return sorted((o.shape, o.color, o.x, o.y) for o in scene.objects)


def test_same_pair_everywhere():
    pair = minimal_pair(0, 0)
    assert pair == minimal_pair(0, 0) != minimal_pair(1, 0)
    assert pair.fact == "shapes"
    assert pair.captions(0) == (
        "a photo of a yellow star underneath a pink heart on a plain background",
        "a photo of a yellow heart underneath a pink star on a plain background",
    )
    with pytest.raises(ValueError, match="index=-1"):
        minimal_pair(0, -1)


def test_the_scenes_differ_in_one_fact_and_share_the_rest():
    for pair in PAIRS:
        first, second = pair.scenes
        assert first.background == second.background and facts(first) != facts(second)
        assert not is_held_out(first.objects) and not is_held_out(second.objects)
        places = [{(o.x, o.y, o.radius) for o in scene.objects} for scene in (first, second)]
        names = [sorted((o.shape, o.color) for o in scene.objects) for scene in (first, second)]
        one, other = first.objects[0], second.objects[0]
        if pair.fact == "number":
            assert abs(len(first.objects) - len(second.objects)) == 1 and first.kind == "count"
            assert places[0] < places[1] or places[1] < places[0]
        elif pair.fact == "places":
            assert names[0] == names[1] and second.relation == OPPOSITE[first.relation]
        elif pair.fact == "partner":
            pairs = list(zip(first.objects, second.objects, strict=True))
            assert [a == b for a, b in pairs] == [number != 1 for number in range(len(pairs))]
            assert dataclasses.replace(first.objects[1], shape=second.objects[1].shape) == second.objects[1]
            assert len({o.shape for o in second.objects}) == len(pairs)
        else:
            assert places[0] == places[1]
            about = {"shape": "shape", "shapes": "shape", "color": "color", "colors": "color"}[pair.fact]
            assert (one.shape != other.shape, one.color != other.color) == (about == "shape", about == "color")
            if pair.fact in ("shapes", "colors"):
                assert sorted(getattr(o, about) for o in first.objects) == sorted(
                    getattr(o, about) for o in second.objects
                )
                assert all(len(set(scene)) == len(scene) for scene in names), "two objects became the same"


def test_every_scene_is_a_training_scene():
    """What `sample_scene` promises of places holds after the exchange too, and the relation is the drawn one."""
    for scene in (scene for pair in PAIRS for scene in pair.scenes):
        for o in scene.objects:
            assert min(o.x, o.y, 1 - o.x, 1 - o.y) >= o.radius * 1.16 + MARGIN - 1e-9
        if scene.relation:
            assert relation_between(*scene.objects) == scene.relation


def test_every_fact_is_common():
    shares = Counter(pair.fact for pair in PAIRS)
    assert set(shares) == set(FACTS) and min(shares.values()) > 0.05 * len(PAIRS), shares


def test_captions_tell_the_scenes_apart_and_share_the_template():
    for pair in PAIRS:
        for variant in range(2):
            first, second = pair.captions(variant)
            assert first != second and not is_reserved(first) and not is_reserved(second)
            assert abs(len(words(first)) - len(words(second))) <= 3  # "left of", "on the left side of"


def test_exchanged_shapes_are_told_by_their_colours():
    """Without colours "a star and a heart" and "a heart and a star" are two strings that say the same."""
    chosen = [pair for pair in PAIRS if pair.fact == "shapes"]
    for pair in chosen:
        for variant in range(8):
            said = [words(caption) for caption in pair.captions(variant)]
            for scene, text in zip(pair.scenes, said, strict=True):
                for o in scene.objects[:2]:
                    assert (o.color, o.shape) in zip(text, text[1:], strict=False), (o.color, o.shape, text)
            shapes = {o.shape for o in pair.scenes[0].objects}
            assert [w for w in said[0] if w not in shapes | {"a", "an"}] == [
                w for w in said[1] if w not in shapes | {"a", "an"}
            ]


def test_the_verifier_sees_the_change():
    for pair in PAIRS[:60]:
        for scene in pair.scenes:
            found = detect(render(scene))
            assert sorted((o.shape, o.color) for o in found) == sorted((o.shape, o.color) for o in scene.objects)


def test_no_pair_holds_a_validation_scene():
    validation = [sample_scene(11, VALIDATION_START + index) for index in range(600)]
    assert not {repr(s.objects) for pair in PAIRS for s in pair.scenes} & {repr(s.objects) for s in validation}


# -- in training


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    return override(preset("base", "smoke"), [f"data.pairs={list(FACTS)}", "steps=4"])


@pytest.fixture(scope="module")
def encoders():
    return load_encoders("lite")


@pytest.fixture(autouse=True)
def own_cache(monkeypatch, tmp_path_factory):
    monkeypatch.setenv("NITRO_E_CACHE", str(tmp_path_factory.getbasetemp() / "pairs"))


def test_neighbours_are_a_pair_and_get_the_same_draws(config, encoders):
    share = Batches(config, encoders).local(0)
    assert torch.equal(share.noise[::2], share.noise[1::2]) and torch.equal(share.t[::2], share.t[1::2])
    assert len(set(share.t.tolist())) == config.batch_size // 2
    captions = {
        minimal_pair(config.data.seed, index).captions(variant)
        for index in range(config.data.scenes // 2)
        for variant in range(config.data.captions)
    }
    for first, second in zip(share.captions[::2], share.captions[1::2], strict=True):
        assert (first, second) in captions or first == second == ""


def test_runs_on_other_scenes_validate_on_the_same_ones(config, encoders):
    """Losses were compared that came from other pictures and other noise: 0.27 and 0.29 for the same weights."""
    plain = override(config, ["data.pairs=[]"])
    one, other = (Batches(override(plain, [f"data.seed={n}", f"seed={n}"]), encoders) for n in (0, 5))
    assert one.validation_captions(8) == other.validation_captions(8)
    for a, b in zip(one.validation_batches(), other.validation_batches(), strict=True):
        assert torch.equal(a.latents, b.latents) and torch.equal(a.noise, b.noise) and torch.equal(a.t, b.t)
    assert one.local(0).captions != other.local(0).captions


def test_pairs_cached_before_a_fact_was_added_are_not_taken(config, encoders, monkeypatch):
    """A fact more changes which pair has which number: old latents would meet new facts."""
    before = Batches(config, encoders).training.folders[0]
    monkeypatch.setattr("nitro_e_lite.data.scene_latents.FACTS", (*FACTS, "sizes"))
    assert Batches(config, encoders).training.folders[0] != before


def test_only_the_facts_asked_for(config, encoders):
    shapes = dataclasses.replace(config, batch_size=2, data=dataclasses.replace(config.data, pairs=("shapes",)))
    chosen = Batches(shapes, encoders).sources[0].rows
    facts = [minimal_pair(config.data.seed, index).fact for index in range(config.data.scenes // 2)]
    assert chosen.tolist() == [[2 * k, 2 * k + 1] for k, fact in enumerate(facts) if fact == "shapes"] != []


def test_an_unknown_fact_is_refused_before_anything_is_encoded(config, encoders, monkeypatch):
    monkeypatch.setattr("nitro_e_lite.data.batches.cached_scenes", None)
    with pytest.raises(ValueError, match=r"data.pairs\[0\]='size': must be one of places, colors"):
        override(config, ["data.pairs=[size]"])


def test_two_processes_see_what_one_sees(config, encoders):
    whole = Batches(config, encoders).local(3)
    halves = [Batches(config, encoders, half).local(3) for half in (range(4), range(4, 8))]
    assert sum((h.captions for h in halves), []) == whole.captions
    for name in ("latents", "t", "noise"):
        assert torch.equal(torch.cat([getattr(h, name) for h in halves]), getattr(whole, name))


def test_a_pair_stays_whole_or_goes(config, encoders, monkeypatch):
    readable = dataclasses.replace(config, batch_size=2, data=dataclasses.replace(config.data, quality="readable"))
    monkeypatch.setattr("nitro_e_lite.data.batches.readable_rows", lambda *_: torch.tensor([0, 1, 2, 5, 6, 7]).numpy())
    assert Batches(readable, encoders).sources[0].rows.tolist() == [[0, 1], [6, 7]]


def test_pairs_and_plain_scenes_alternate_and_each_goes_on_where_it_was(config, encoders):
    steps = {"steps": 9, "caption_dropout": 0.0}
    plain = dataclasses.replace(config, **steps, data=dataclasses.replace(config.data, pairs=()))
    paired = dataclasses.replace(config, **steps)
    mixed = dataclasses.replace(config, **steps, data=dataclasses.replace(config.data, pairs_every=3))
    plain, paired, mixed = (Batches(one, encoders) for one in (plain, paired, mixed))
    for step, (source, before) in enumerate([(plain, 0), (plain, 1), (paired, 0), (plain, 2), (plain, 3), (paired, 1)]):
        assert torch.equal(mixed.local(step).latents, source.local(before).latents), step


def test_captions_without_colours_can_be_preferred(encoders):
    config = override(preset("base", "smoke"), ["caption_dropout=0", "data.captions=8", "data.scenes=128"])
    config = dataclasses.replace(config, batch_size=128)
    colors = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white")
    share, before = {}, Batches(config, encoders).local(0)
    for wish in (0.0, 0.5, 1.0):
        data = dataclasses.replace(config.data, colorless=wish)
        captions = Batches(dataclasses.replace(config, data=data), encoders).local(0).captions
        share[wish] = sum(not set(colors) & set(words(text)) for text in captions) / 128
        assert wish or captions == before.captions
    assert share[0.0] < 0.3 < 0.35 < share[0.5] < 0.6 < 0.65 < share[1.0] < 0.9  # in some scenes all name colours


@pytest.mark.parametrize(
    "word", ["data.pairs_every=0", "data.colorless=1.5", "batch_size=7", "data.scenes=33", 'data.folders=["somewhere"]']
)
def test_what_pairs_cannot_be_is_refused(config, word):
    with pytest.raises(ValueError, match=word.partition("=")[0]):
        override(config, [word])
