"""README's table and figure are what the cards give; cards with a wrong count are refused."""

import copy
import json
import shutil
from pathlib import Path

import pytest

from nitro_e_lite.evaluation import cards, claims, tables
from nitro_e_lite.files import weights_dir
from nitro_e_lite.scenes.geneval import Prompt, Verdict, score
from nitro_e_lite.viz import LEDGER

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def found():
    return cards.load()


def test_readme_holds_the_table_that_the_cards_give(found):
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert tables.rebuild(text, found) == text
    with pytest.raises(ValueError, match="README.md: lacks <!-- written"):
        tables.rebuild("# a readme", found)
    with pytest.raises(ValueError, match="there is no card or field 'reading'"):
        tables.results_table({name: card for name, card in found.items() if name != "reading"})


def test_the_figure_was_drawn_from_these_cards(found, monkeypatch, tmp_path):
    entry = json.loads((ROOT / "figures" / LEDGER).read_text(encoding="utf-8"))[f"{tables.FIGURE}.png"]
    assert (
        entry["params"] == {"cards": cards.fingerprint(tables.shown_cards(found))}
        and entry["source"] == "nitro-e tables"
    )
    monkeypatch.setenv("NITRO_E_FIGURES", str(tmp_path))
    assert tables.save_figure(found).stat().st_size > 10_000


@pytest.fixture(scope="module")
def coming(found, tmp_path_factory):
    """Made-up cards of models that are still in training, of FP8 and of peers, as the commands write them."""
    folder = tmp_path_factory.mktemp("cards")
    base, fp8 = found["lite-grpo"], {"fp8": "weight_only", "dtype": "bfloat16", "transformer_bytes": 9_020_000}
    fp8 |= {"psnr": {"pictures": 60, "median": 50.0, "low": 43.5, "high": 56.0}}
    few = {"model": "lite-sprint", "sampler": "SCMScheduler", "guidance": 3.0}
    made = {f"lite-sprint_{steps}": few | {"steps": steps} for steps in (1, 2, 4)}
    made |= {"lite-4step": {"model": "lite-4step", "steps": 4}}
    made |= {f"{name}_fp8": made.get(name, {}) | fp8 for name in ("lite-grpo", "lite-4step")}
    for name, change in made.items():
        card = dict(base) | change
        if "fp8" in name:  # one right picture is lost
            first = base["verdicts"].index("1")
            card["verdicts"] = base["verdicts"][:first] + "0" + base["verdicts"][first + 1 :]
            card["against"] = cards.difference(card, dict(base) | {"model": card["model"], "dtype": "bfloat16"})
        cards.write(folder / f"{name}.json", "geneval_lite", card, card["command"])
    for name, card in found.items():
        if card["kind"] == "geneval_lite" and name not in (
            "lite",
            "lite_10_unguided",
            "lite_compositions",
            "lite-grpo",
        ):
            continue  # a card of today in place of the made-up one, or of a model that the list below does not have
        (folder / f"{name}.json").write_text(json.dumps(card))
    keys = ("model", "steps", "guidance", "dtype", "fp8")
    rows = [{k: card[k] for k in keys if k in card} for card in tables.compared_cards(cards.load(folder))]
    rows = [row | {"batch": 25, "seconds": 0.5 * row["steps"], "ratio": [1.0] * 3} for row in rows]
    cards.write(folder / "speed_again.json", "speed", {"rows": rows}, "nitro-e benchmark --beside lite-sprint@1")
    ratio = {key: {"end_to_end": 3.25, "transformer": 4.5} for key in ("sana_600m", "e_mmdit", "e_mmdit_4step")}
    one = {"key": "sana_600m", "dtype": "bfloat16", "in_all": 2.0, "decoder": 1.0}
    values = {"rows": [one] * 5, "ratios": {"1": ratio}}
    cards.write(folder / "peers.json", "peers", values, "nitro-e benchmark --peers")
    row = {"samples_per_second_per_core": 20_000.4, "samples_per_second_cold": 9_000}
    reading = {"rows": [row] * 4, "decoding": {"pictures_per_second_per_core": 100}}
    cards.write(folder / "reading.json", "reading", reading, "nitro-e data benchmark")
    row = {"minutes": 180.4, "overall": 0.81, "low": 0.79, "high": 0.83}
    chain = {"preset": "lite", "machines": "2 x a processor"}
    chain["rows"] = [row | {"name": "stages 1 and 2"}, row | {"name": "rewards", "minutes": 250.0}]
    cards.write(folder / "chain.json", "chain", chain, "nitro-e reproduce --processes 2")
    return cards.load(folder)


def test_cards_of_coming_models_need_no_more_code(coming, found, monkeypatch, tmp_path):
    base, lines = found["lite-grpo"], tables.lite_models(coming).splitlines()
    names = [line.split("](")[0].replace("<br>", " ").replace("&nbsp;", " ") for line in lines[2:]]
    assert len(lines) == 2 + 9 and names == [
        "| [lite, 10 steps", "| [lite, 20 steps", "| [lite-4step, 4 steps", "| [lite-4step FP8, 4 steps",
        "| [lite-grpo, 10 steps", "| [lite-grpo FP8, 10 steps",
        "| [lite-sprint, 1 step", "| [lite-sprint, 2 steps", "| [lite-sprint, 4 steps",
    ]  # fmt: skip
    assert "](nitro_e_lite/evaluation/cards/lite-sprint" in lines[-3]
    half = max(base["overall"] - base["low"], base["high"] - base["overall"])
    right, gap = f"{base['overall']:.3f}&nbsp;±&nbsp;{half:.3f}", cards.compare(base, found["lite"])[0]
    assert f".json) | {tables.weights_bytes(base) / 1e6:.1f} | 1 | 20 | {right} | " in lines[-3]
    assert (
        "| [lite-4step&nbsp;FP8,<br>4&nbsp;steps](nitro_e_lite/evaluation/cards/lite-4step_fp8.json) | 9.0 | 4 | 80 |"
        in lines[5]
    )
    kid, half = (1000 * value for value in base["appearance"]["kid"])
    assert lines[6].endswith(f" | {kid:.1f} ± {half:.1f} |")
    differences = tables.by_category(coming).splitlines()
    assert len(differences) == 2 + 9 and f"| lite-sprint, 1 step | {gap:+.3f} (" in differences[-3]
    text = tables.results_table(coming)
    assert "| 3.07 end to end (bar) | 3.25; 4.50; 3.25; 4.50 | `nitro-e benchmark --peers` |" in text
    assert "| warm 20,000; 20,000; 20,000; cold 9,000; 9,000; 9,000 | `nitro-e data benchmark` |" in text
    assert "| a lite model from nothing, 2 x a processor: minutes, and GenEval-lite then" in text
    assert "stages 1 and 2 180, 0.810 (0.790 to 0.830); rewards 250, 0.810" in text
    assert "`lite-grpo`, 10 steps, -0.0004 (-0.00" in text
    assert "to +0.0000), lost 0.04 %, won 0.00 %, 50.0 dB (43.5 to 56.0; 60 pictures)" in text
    monkeypatch.setenv("NITRO_E_FIGURES", str(tmp_path))
    axes = tables.speed_and_quality(coming).axes
    assert [text.get_text() for text in axes[1].get_legend().get_texts()] == [
        "lite", "lite-4step", "lite-4step FP8", "lite-grpo", "lite-grpo FP8", "lite-sprint",
    ]  # fmt: skip
    assert axes[1].get_xlabel().startswith("pictures a second")


def test_quality_by_steps_takes_the_card_of_more_pictures(found):
    card = next(card for card in found.values() if card.get("model") == "lite-4step" and card["dtype"] == "float32")
    few = {"images": 600, "overall": 0.2, "low": 0.15, "high": 0.25}
    cards_of_one = {"whole": card, "again": card | few, "two": card | few | {"steps": 2}}
    (axis,) = tables.steps_and_quality(cards_of_one).axes
    (line,) = axis.containers
    assert line[0].get_xydata().tolist() == [[2, 0.2], [card["steps"], card["overall"]]]


def test_the_ledger_reads_cards(coming, found):
    """As soon as a card is there, its numbers stand in the ledger, and they decide the verdict."""

    def read(claim, some):
        return next(one for one in claims.load_claims(cards=some) if one.claim.startswith(claim))

    later = ("lite-sprint", "lite-4step_fp8", "peers")
    found = {name: card for name, card in found.items() if not name.startswith(later)}  # as before these were there
    loss, claim = copy.deepcopy(coming), "no visible loss"
    loss["lite-4step_fp8"]["against"]["score"][1] = -0.02
    assert read(claim, found).verdict == "not run" and read(claim, loss).verdict == "does not hold"
    assert read(claim, coming).verdict == "holds"
    assert "+0.0000) of 2,400 pictures" in read(claim, coming).here
    assert "PSNR of 60 of the first 50.0 dB" in read(claim, coming).here
    ratio = read("3.07 times", coming)  # of another machine: told, and no verdict on the claim
    assert ratio.verdict == "not run" and "3.25 times end to end" in ratio.here
    assert f"{found['lite-grpo']['overall']:.3f} in 1 step" in read("no training is needed", coming).here
    assert "in 1 step" not in read("no training is needed", found).here
    with pytest.raises(ValueError, match="counts.rows.e_mmdit.parameters: there is no card or field 'counts'"):
        claims.load_claims(cards={})


def test_table_2_says_paper_and_here_apart(found):
    lines = tables.table2(found).splitlines()
    assert len(lines) == 18 and "| E-MMDiT | 304 | 302.4 | 0.08 | 0.08 |" in lines[15]
    assert "| 18.83 | 398 | 0.66 | 0.97 | 29.82 | 81.60 |" in lines[15]
    assert "| MicroDiT | 1,160 | not counted | 1.13 | not counted |" in lines[5]
    assert "at 1024 px" in next(line for line in lines if "Hunyuan" in line)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"images": 95}, r"lite_compositions: made from 95 pictures, \d+ asked for; geneval_lite has \d+"),
        ({"images": 95, "images_expected": 95}, r"geneval_lite has \d+"),
        ({"weights_sha256": ""}, "lacks weights_sha256"),
        ({"verifier": 0}, "judged by version 0 of the verifier"),
        ({"low": 0.9}, "no interval around"),
        ({"low": float("nan")}, "no interval around"),
        ({"low": "x"}, "low='x' is of another type"),
        ({"seeds": 3}, "seeds=3 is of another type"),
        ({"verdicts": 101}, "verdicts=101 is of another type"),
        ({"verdicts": "10"}, r"verdicts must be a 0 or 1 for each of \d+ pictures"),
        ({"verdicts": "x" * 96}, "verdicts must be a 0 or 1"),
        ({"appearance": {"reader": 1}}, "appearance: preference=None: must be a number"),
        ({"kind": "guess"}, "kind 'guess' is not one of"),
        ({"kind": ["guess"]}, "is not one of"),
    ],
)
def test_a_card_that_cannot_be_believed_is_refused(change, message, found, tmp_path):
    shutil.copytree(cards.FOLDER, tmp_path / "cards")
    card = dict(found["lite_compositions"]) | change
    (tmp_path / "cards" / "lite_compositions.json").write_text(json.dumps(card))
    with pytest.raises(ValueError, match=message):
        cards.load(tmp_path / "cards")


def test_two_cards_are_compared_picture_by_picture(found):
    card = dict(found["lite_compositions"]) | {"prompts": 4, "verdicts": "11110000"}
    other = card | {"verdicts": "11010000"}
    mean, low, high = cards.compare(card, other)
    assert mean == 0.125 and low <= mean <= high
    told = cards.difference(card, other | {"verdicts": "11010010"})
    assert (told["score"][0], told["won"], told["lost"]) == (0, 0.125, 0.125)
    with pytest.raises(ValueError, match="seeds differs"):
        cards.compare(card, card | {"seeds": [1]})
    few, more = card | {"seeds": [0], "verdicts": "1011"}, card | {"seeds": [0, 1]}  # the pictures of both count
    assert cards.compare(few, more)[0] == -0.25 and cards.difference(more, few)["won"] == 0.25
    with pytest.raises(ValueError, match="no verdicts"):
        cards.compare(card, card | {"verdicts": ""})
    one, two = (card | {"prompts_sha256": name} for name in "ab")
    with pytest.raises(ValueError, match="but the prompts in it differ"):
        cards.compare(one, two)
    cards.compare(card, two)  # a card of before that was kept


def test_the_difference_of_a_list_of_ones_own_is_that_of_its_scores(found):
    prompts = [Prompt("a circle", "single_object", (("circle", None),))]
    prompts += [Prompt(f"a {c} circle", "colors", (("circle", c),)) for c in ("red", "blue", "green")]
    own = cards.own_list(prompts)
    assert own["tags"] == ["single_object", "colors", "colors", "colors"] and len(own["prompts_sha256"]) == 64
    first, second = (dict(found["lite_compositions"]) | own | {"prompts": 4, "verdicts": v} for v in ("1000", "0111"))
    scores = [score(prompts, [Verdict(mark == "1") for mark in card["verdicts"]]).overall for card in (first, second)]
    assert cards.compare(first, second)[0] == scores[0] - scores[1] == 0.0  # over pictures it would be -0.5
    with pytest.raises(ValueError, match="tags must be one for each of 96 prompts"):
        cards.check(dict(found["lite_compositions"]) | {"tags": ["colors"]})


def test_fp8_is_held_against_16_bit_alone(coming):
    name = "lite-grpo_fp8"
    card = dict(coming[name])
    assert f"`{card['model']}`" in tables._against_16_bit({name: card})[0]
    for change in ({"fp8": "dynamic"}, {"steps": card["steps"] + 1}, {"model": "lite"}):
        assert tables._against_16_bit({name: card | {"against": card["against"] | change}}) == []


def test_looks_of_other_prompts_are_refused_and_no_diversity_is_no_share(found):
    looks = dict(found["lite"]["appearance"])
    for change, message in [
        ({"diversity_by_prompt": [1.0]}, "diversity_by_prompt has 1 for 300 prompts"),
        ({"diversity_by_prompt": ["x"] * 300}, "diversity_by_prompt=.*must be numbers"),
        ({"kid": 3.0}, "kid=3.0: must be numbers"),
    ]:
        with pytest.raises(ValueError, match=message):
            cards.check(dict(found["lite"]) | {"appearance": looks | change})
    assert cards.kept_diversity(looks, looks | {"diversity_by_prompt": [0.0] * 300}) is None
    alone = dict(found["lite"]) | {"appearance": looks | {"diversity": None, "diversity_by_prompt": [None] * 300}}
    assert " | - | " in tables.lite_models({"lite": alone}).splitlines()[2].partition("±")[2][12:]


def test_the_card_of_lite_grpo_says_what_the_result_cards_say(found):
    text = (weights_dir() / "lite-grpo" / "README.md").read_text(encoding="utf-8")
    before, after, guided = (found[name] for name in ("lite_10_unguided", "lite-grpo", "lite"))
    rows = [
        ("{:.3f}", lambda card: card["overall"]),
        ("{:.3f}", lambda card: card["categories"]["two_object"]),
        ("{:.3f}", lambda card: card["appearance"]["reader"]),
        ("{:.2f}", lambda card: card["appearance"]["preference"]),
        ("{:.1f}", lambda card: 1000 * card["appearance"]["kid"][0]),
    ]
    for form, value in rows:
        assert " | ".join(form.format(value(card)) for card in (before, after, guided)) + " |" in text
    for other, form in ((before, "{:+.3f} ({:+.3f} to {:+.3f}) right"), (guided, "{:+.3f} ({:+.3f} to {:+.3f})")):
        told = cards.difference(after, other)
        assert form.format(*told["score"]) in text and f"{told['diversity']:.3f}" in text
        assert told["diversity"] > 0.8  # less would be a collapse
    rare = found["lite-grpo_compositions"]
    assert f"{rare['overall']:.3f} ({rare['low']:.3f} to {rare['high']:.3f})" in text


def test_the_command_of_a_card_names_no_place_of_a_machine():
    words = ["evaluate", "--seeds", "2", "--out", "/x/a.json", "--grid", "/x/a.png", "--review=/x", "--json", "--fp8"]
    assert cards.command_line(words) == "nitro-e evaluate --seeds 2 --fp8"
