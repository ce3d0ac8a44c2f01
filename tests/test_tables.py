"""README's table and figure are what the cards give; cards with a wrong count are refused."""

import json
import shutil
from pathlib import Path

import pytest

from nitro_e_lite.evaluation import cards, tables
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
    with pytest.raises(ValueError, match="there is no card or field 'noted'"):
        tables.results_table({name: card for name, card in found.items() if name != "noted"})


def test_the_figure_was_drawn_from_these_cards(found, monkeypatch, tmp_path):
    shown = {"counts": found["counts"], **tables.lite_cards(found)}
    entry = json.loads((ROOT / "figures" / LEDGER).read_text(encoding="utf-8"))[f"{tables.FIGURE}.png"]
    assert entry["params"] == {"cards": cards.fingerprint(shown)} and entry["source"] == "nitro-e tables"
    monkeypatch.setenv("NITRO_E_FIGURES", str(tmp_path))
    assert tables.save_figure(found).stat().st_size > 10_000


def test_table_2_says_paper_and_here_apart(found):
    lines = tables.table2(found).splitlines()
    assert len(lines) == 18 and "| E-MMDiT | 304 | 302.4 | 0.08 | 0.08 |" in lines[15]
    assert "| MicroDiT | 1,160 | not counted | 1.13 | not counted |" in lines[5]
    assert "at 1024 px" in next(line for line in lines if "Hunyuan" in line)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"images": 95}, "lite_compositions: made from 95 pictures, 96 asked for; geneval_lite has 96"),
        ({"images": 95, "images_expected": 95}, "geneval_lite has 96"),
        ({"weights_sha256": ""}, "lacks weights_sha256"),
        ({"verifier": 0}, "judged by version 0 of the verifier"),
        ({"low": 0.9}, "no interval around"),
        ({"low": float("nan")}, "no interval around"),
        ({"low": "x"}, "low='x' is of another type"),
        ({"seeds": 3}, "seeds=3 is of another type"),
        ({"verdicts": 101}, "verdicts=101 is of another type"),
        ({"verdicts": "10"}, "verdicts must be a 0 or 1 for each of 96 pictures"),
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
    mean, low, high = cards.compare(card, card | {"verdicts": "11010000"})
    assert mean == 0.125 and low <= mean <= high
    with pytest.raises(ValueError, match="seeds differs"):
        cards.compare(card, card | {"seeds": [1]})
    with pytest.raises(ValueError, match="no verdicts"):
        cards.compare(card, card | {"verdicts": ""})


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


def test_the_command_of_a_card_names_no_place_of_a_machine():
    words = ["evaluate", "--seeds", "2", "--out", "/x/card.json", "--json", "--fp8"]
    assert cards.command_line(words) == "nitro-e evaluate --seeds 2 --fp8"
