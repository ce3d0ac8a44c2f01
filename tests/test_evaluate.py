"""The evaluation: its card, its seeds, and a score that does not depend on the batch size."""

import dataclasses
import json

import numpy as np
import pytest
import torch
from tiny import build_tiny_pipeline

from nitro_e_lite.evaluation import appearance, cards, geneval_lite
from nitro_e_lite.evaluation.official_geneval import read_metadata
from nitro_e_lite.files import weights_dir
from nitro_e_lite.inference import hub
from nitro_e_lite.scenes.geneval import Verdict, load_prompts
from nitro_e_lite.viz import LEDGER, figures_dir

PROMPTS = load_prompts()[::60]  # a few, of several categories


@pytest.fixture(scope="module")
def result(tiny_pipeline):
    return geneval_lite.evaluate(
        tiny_pipeline,
        PROMPTS,
        seeds=(0, 3),
        steps=1,
        guidance=0,
        shift=3,
        batch_size=4,
        keep_images=True,
        progress=False,
    )


def test_card_holds_the_score_and_its_whole_recipe(result, tmp_path):
    card = json.loads(result.save(tmp_path / "cards" / "tiny.json").read_text())
    for field, value in dataclasses.asdict(result.score).items():
        assert card[field] == value
    assert card["images"] == card["images_expected"] == 2 * len(PROMPTS) == len(result.images)
    assert card["seeds"] == [0, 3] and card["steps"] == 1 and card["guidance"] == 0 and card["shift"] == 3
    assert card["dtype"] == "float32" and card["sigma_grid"] == "linear" and card["seconds"] > 0
    assert len(card["weights_sha256"]) == 64 and card["environment"]["packages"]["torch"] == torch.__version__


def test_grid_shows_the_first_pictures_of_every_category(result):
    wide, narrow = result.grid(each=2), result.grid(each=1)
    assert wide.width > 1.8 * narrow.width and abs(wide.height - narrow.height) < 0.2 * narrow.height
    with pytest.raises(ValueError, match="keep_images"):
        dataclasses.replace(result, images=[]).grid()


def test_pictures_to_look_at_and_what_eyes_say(result, tmp_path):
    right = dataclasses.replace(result, verdicts=[Verdict(k < 3) for k in range(len(result.verdicts))])
    sheet = right.review(tmp_path / "look", count=4)
    rows = [json.loads(line) for line in sheet.read_text().splitlines()]
    assert [row["verifier"] for row in rows].count(True) == 2 and len(list(sheet.parent.glob("*.png"))) == 4
    with pytest.raises(FileExistsError, match="is there already"):
        right.review(tmp_path / "look")
    assert len(right.review(tmp_path / "all", count=99).read_text().splitlines()) == len(result.images)
    with pytest.raises(ValueError, match="000.png: eyes must be true or false"):
        geneval_lite.agreement(sheet)
    for row in rows:
        row["eyes"] = row["verifier"]
    for change, message in [
        ({"tag": "nope"}, "001.png: tag='nope': must be one of"),
        ({"why": None}, "why=None: must be as it was written"),
        ({"verifier": "yes"}, "verifier='yes'"),
        ({"steps": "4"}, "steps='4'"),
    ]:
        with pytest.raises(ValueError, match=message):
            geneval_lite.tally([rows[0], rows[1] | change], sheet)
    with pytest.raises(ValueError, match="holds no pictures"):
        geneval_lite.tally([], sheet)
    with open(sheet, "a") as file:
        file.write('{"path": "0')
    with pytest.raises(ValueError, match="line 5: no JSON"):  # a hand has cut it, not a kill
        geneval_lite.agreement(sheet)
    rows[1]["eyes"] = not rows[1]["verifier"]
    sheet.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(ValueError, match="001.png: eyes and verifier disagree; say why"):
        geneval_lite.agreement(sheet)
    rows[1]["why"] = "a good green square, read strictly"
    sheet.write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = geneval_lite.agreement(sheet)
    assert (found["looked"], found["agree"], found["disagree"]) == (4, 3, [rows[1]]) and found["low"] < 0.75


def test_batch_size_changes_nothing(result, tiny_pipeline):
    again = geneval_lite.evaluate(
        tiny_pipeline,
        PROMPTS,
        seeds=(0, 3),
        steps=1,
        guidance=0,
        shift=3,
        batch_size=1,
        keep_images=True,
        progress=False,
    )
    assert again.verdicts == result.verdicts
    for one, two in zip(again.images, result.images, strict=True):
        assert np.abs(one.astype(int) - two).max() <= 1  # rounding to 8 bits


def test_any_picture_can_be_drawn_again_from_its_seed(result, tiny_pipeline):
    place = 2
    generator = torch.Generator().manual_seed(geneval_lite.picture_seed(3, place))
    image = tiny_pipeline(
        PROMPTS[place].text, num_inference_steps=1, guidance_scale=0, generator=generator, output_type="np"
    ).images[0]
    difference = (image * 255).round() - result.images[len(PROMPTS) + place]
    assert np.abs(difference).max() <= 1


def test_progress_bar_settings_are_left_alone(result, tiny_pipeline):
    assert tiny_pipeline._progress_bar_config == {"disable": True}


def test_weights_hash_follows_the_weights(tiny_pipeline):
    other = build_tiny_pipeline().transformer
    assert hub.weights_hash({"": other}) == hub.weights_hash({"": tiny_pipeline.transformer})
    with torch.no_grad():
        other.proj_out.bias[0] += 1
    assert hub.weights_hash({"": other}) != hub.weights_hash({"": tiny_pipeline.transformer})


@pytest.mark.parametrize(
    ("arguments", "field"),
    [
        ({"prompts": []}, "prompts"),
        ({"seeds": []}, "seeds"),
        ({"seeds": [1, 1]}, "seeds"),
        ({"seeds": [-1]}, "seeds"),
        ({"seeds": [0.5]}, "seeds"),
        ({"batch_size": 0}, "batch_size"),
        ({"steps": 0}, "num_inference_steps"),
    ],
)
def test_evaluate_refuses(tiny_pipeline, arguments, field):
    with pytest.raises((TypeError, ValueError), match=field):
        geneval_lite.evaluate(tiny_pipeline, **({"prompts": PROMPTS, "progress": False} | arguments))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "no prompts"),
        ("{", "line 1: no JSON"),
        ('{"prompt": "a cat"}', "line 1: must be an"),
        ('\n{"tag": "colors", "include": [], "prompt": null}', "line 2: must be an object with .*prompt .a string"),
        ('{"tag": "colors", "include": {}, "prompt": "a cat"}', "line 1: must be an object with .*include .a list"),
    ],
)
def test_a_bad_prompt_file_is_named(text, message, tmp_path):
    (tmp_path / "prompts.jsonl").write_text(text)
    with pytest.raises(ValueError, match=message):
        read_metadata(tmp_path / "prompts.jsonl")


def test_a_prompt_file_may_have_a_byte_order_mark_and_blank_lines(tmp_path):
    entry = {"tag": "single_object", "include": [], "prompt": "a cat\u2028on a mat"}
    (tmp_path / "prompts.jsonl").write_text(json.dumps(entry, ensure_ascii=False) + "\n\n", encoding="utf-8-sig")
    assert read_metadata(tmp_path / "prompts.jsonl") == [entry]


def test_the_ledger_says_how_the_uncurated_grid_was_drawn():
    """With the sampler settings that are shipped: the grid is drawn again when they change."""
    drawn = json.loads((figures_dir() / LEDGER).read_text(encoding="utf-8"))["lite_uncurated.png"]["params"]
    shipped = json.loads((weights_dir() / "lite" / "model_index.json").read_text(encoding="utf-8"))
    names = ("steps", "guidance", "shift")
    assert [drawn[name] for name in names] == [shipped[f"default_{name}"] for name in names]


def test_kid_is_zero_on_average_for_one_source_and_grows_with_the_distance():
    draw = np.random.default_rng(0).normal
    pairs = [(torch.tensor(draw(size=(20, 4))), torch.tensor(draw(size=(30, 4)))) for _ in range(200)]
    same = np.array([appearance.kid(*pair) for pair in pairs])
    assert abs(same.mean()) < 3 * same.std() / len(same) ** 0.5  # unbiased: of either sign
    far = [np.mean([appearance.kid(x + shift, y) for x, y in pairs]) for shift in (0.0, 0.5, 1.0)]
    assert far[0] < far[1] < far[2]
    x, y = pairs[0]
    k = [[[(float(a @ b) / 4 + 1) ** 3 for b in q] for a in p] for p, q in ((x, x), (y, y), (x, y))]
    inside = [sum(map(sum, m)) - sum(m[i][i] for i in range(len(m))) for m in k[:2]]
    by_hand = inside[0] / (20 * 19) + inside[1] / (30 * 29) - 2 * sum(map(sum, k[2])) / (20 * 30)
    assert appearance.kid(x, y) == pytest.approx(by_hand, rel=1e-10)
    with pytest.raises(ValueError, match="at least two"):
        appearance.kid(x[:1], y)


def test_diversity_counts_right_pictures_of_one_caption():
    features = torch.tensor([[0.0, 0.0], [9.0, 9.0], [3.0, 4.0], [9.0, 9.0], [50.0, 0.0], [0.0, 0.0]])
    groups, right = [0, 1, 0, 1, 0, 2], [True, True, True, True, False, True]
    assert appearance.diversity(features, groups, right) == [pytest.approx(5 / 2**0.5), 0.0, None]
    first, second = ({"diversity_by_prompt": row} for row in ([1.0, None, 2.0], [2.0, 7.0, 4.0]))
    assert appearance.kept_diversity(first, second) == 0.5 and appearance.kept_diversity(second, first) == 2
    assert appearance.kept_diversity(first, {"diversity_by_prompt": [None] * 3}) is None


def test_how_pictures_look_and_a_paired_difference_are_in_the_card(tiny_pipeline, monkeypatch):
    sampler = {"steps": 1, "guidance": 0, "shift": 3, "batch_size": 4, "progress": False}
    monkeypatch.setattr(geneval_lite, "verify", lambda picture, prompt: Verdict(len(prompt.text) % 2 == 0))
    found = geneval_lite.evaluate(tiny_pipeline, PROMPTS, seeds=(0, 3), appearance=True, **sampler)
    seen = found.card["appearance"]
    kept = [one is not None for one in seen["diversity_by_prompt"]]
    assert kept == [len(prompt.text) % 2 == 0 for prompt in PROMPTS] and 0 <= seen["reader"] <= 1
    assert seen["kid"][0] > 10 * abs(seen["kid_floor"][0])  # noise is far from true scenes
    card = found.card | {"prompt_list": "held_out_prompts", "model": "tiny"}
    again = json.loads(json.dumps(card))
    told = cards.difference(card, again | {"verdicts": "0" * len(found.verdicts)})
    assert told["score"][0] == pytest.approx(np.mean([v.correct for v in found.verdicts]))
    assert told["diversity"] == 1 and told["model"] == "tiny"
