"""The pictures that were looked at: the file says what the verifier says today, and other eyes can look again."""

import json
from collections import Counter

import pytest
from typer.testing import CliRunner

from nitro_e_lite import load_pipeline
from nitro_e_lite.cli.app import app
from nitro_e_lite.evaluation import eyes
from nitro_e_lite.evaluation.geneval_lite import agreement, describe, picture_seed
from nitro_e_lite.scenes.geneval import load_prompts


@pytest.fixture(scope="module")
def sheet():
    return eyes.load()


def test_the_sheet_holds_200_different_pictures_over_both_verdicts_and_all_categories(sheet):
    pictures, texts = sheet["pictures"], [prompt.text for prompt in load_prompts()]
    assert len({(row["prompt"], row["steps"]) for row in pictures}) == len(pictures) == 200
    assert all(row["seed"] == picture_seed(0, texts.index(row["prompt"])) for row in pictures)
    assert 100 <= sum(row["verifier"] for row in pictures) <= 120  # drawn when half of them were right by version 1
    assert min(Counter((row["tag"], row["verifier"]) for row in pictures).values()) >= 4
    assert "one reader" in sheet["about"]


def test_table_counts_every_picture_once(sheet):
    *groups, everything = eyes.table(sheet["pictures"])
    for part in (groups[:6], groups[6:]):  # by category, by steps
        columns = list(zip(*part, strict=True))[1:-1]
        assert [sum(map(int, column)) for column in columns] == list(map(int, everything[1:-1]))
    looked, *cells = map(int, everything[1:-1])
    assert looked == 200 == sum(cells)


def test_a_sheet_of_another_verifier_or_without_reasons_is_refused(sheet, tmp_path):
    other = tmp_path / "eyes.json"
    other.write_text(json.dumps(sheet | {"verifier": 0}))
    with pytest.raises(ValueError, match="judged by version 0 of the verifier"):
        eyes.load(other)
    row = sheet["pictures"][0]
    other.write_text(json.dumps(sheet | {"pictures": [row | {"eyes": not row["verifier"], "why": ""}]}))
    with pytest.raises(ValueError, match="say why"):
        eyes.load(other)


def test_pictures_drawn_again_get_the_verdicts_of_the_file(sheet, tmp_path):
    """One of each kind, four steps: eyes and verifier agree on two and differ both ways."""
    few = {(row["eyes"], row["verifier"]): row for row in sheet["pictures"] if row["steps"] == 4}
    few = [row for (said, _), row in few.items() if said != "unsure"]
    pipeline = load_pipeline(sheet["model"])
    assert describe(pipeline)["weights_sha256"] == sheet["weights_sha256"]
    written = eyes.redraw(pipeline, sheet | {"pictures": few}, tmp_path)
    rows = [json.loads(line) for line in written.read_text().splitlines()]
    keys = ("prompt", "tag", "verifier", "reason")
    assert [[row[key] for key in keys] for row in rows] == [[row[key] for key in keys] for row in few]
    assert len(few) == 4 == len(list(tmp_path.glob("*.png"))) == len(few)
    with pytest.raises(FileExistsError, match="is there already"):
        eyes.redraw(None, sheet, tmp_path)
    written.write_text(
        "".join(json.dumps(a | {key: b[key] for key in ("eyes", "why")}) + "\n" for a, b in zip(rows, few, strict=True))
    )
    assert agreement(written)["agree"] == 2
    shown = CliRunner().invoke(app, ["eyes", str(written)])
    assert shown.exit_code == 0 and shown.stdout.count("eyes say") == 2


def test_the_command_prints_the_table_and_every_disagreement(sheet, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    shown = CliRunner().invoke(app, ["eyes"])
    assert shown.exit_code == 0, shown.output
    assert eyes.table(sheet["pictures"])[-1][-1] in shown.stdout
    assert "Of 81 pictures of lite-grpo and lite-4step in one step that version 2" in shown.stdout
    assert "eyes accept 68, refuse 5 and are unsure of 8" in shown.stdout
    assert shown.stdout.count("eyes say") == sum(
        row["eyes"] not in (row["verifier"], "unsure") for row in sheet["pictures"]
    )
