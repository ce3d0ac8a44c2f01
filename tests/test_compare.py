"""Comparisons: variants that do not differ give the same numbers, and a stopped comparison goes on."""

import json
from collections import Counter

import pytest

from nitro_e_lite import config, files, presets
from nitro_e_lite.errors import NotFinite, NotFiniteScores
from nitro_e_lite.experiments import compare
from nitro_e_lite.scenes import geneval
from nitro_e_lite.training.engine import Engine

SMOKE = config.override(presets.preset("base", "smoke"), ["data.encoders=lite", "batch_size=4"])


def measured(result):
    """Rows without the clock."""
    return [
        {k: v for k, v in row.items() if k not in ("seconds", "variant", "trained_steps")} for row in result["runs"]
    ]


def test_same_variants_are_equal_and_a_stopped_comparison_goes_on(tmp_path):
    prompts = compare.spread_prompts(geneval.load_prompts(), 1)[:2]
    same = {"one": ["optimizer.lr=1e-3"], "Two!": ["optimizer.lr=1e-3"]}
    result = compare.compare(SMOKE, same, [3], [1, 2], tmp_path / "whole", prompts, "cpu", pairs=2)
    rows = measured(result)
    assert len(rows) == 4 and rows[:2] == rows[2:]
    assert [row["step"] for row in rows] == [1, 2, 1, 2] and all(set(row["categories"]) for row in rows)
    assert rows[0]["validation_loss"] != rows[1]["validation_loss"]
    shown = compare.summary(result)
    assert [row[:3] for row in shown] == [("one", 1, 1), ("one", 2, 1), ("Two!", 1, 1), ("Two!", 2, 1)]
    assert float(shown[1][4]) == pytest.approx(rows[1]["validation_loss"], abs=1e-4)
    assert rows[1]["told"].keys() == set(config.FACTS) and float(shown[1][5]) == rows[1]["told"]["shapes"]

    part = {"one": same["one"]}
    compare.compare(SMOKE, part, [3], [1, 2], tmp_path / "part", prompts, "cpu", pairs=2)
    file = tmp_path / "part" / "one-seed3" / "rows.jsonl"
    first, last = file.read_text(encoding="utf-8").splitlines()
    file.write_text(first + "\n", encoding="utf-8")
    again = compare.compare(SMOKE, part, [3], [1, 2], tmp_path / "part", prompts, "cpu", pairs=2)
    assert measured(again) == rows[:2]
    assert json.loads((tmp_path / "part" / "comparison.json").read_text(encoding="utf-8")) == again
    with file.open("a", encoding="utf-8") as stream:
        stream.write('{"step": 3, "va')  # a kill while writing
    assert measured(compare.compare(SMOKE, part, [3], [1, 2], tmp_path / "part", prompts, "cpu", pairs=2)) == rows[:2]
    file.write_text(last + "\n", encoding="utf-8")  # as if point 1 were new: its weights are gone
    with pytest.raises(ValueError, match="points: .* trained to step 2; only later points can be added"):
        compare.compare(SMOKE, part, [3], [1, 2], tmp_path / "part", prompts, "cpu", pairs=2)
    with pytest.raises(ValueError, match="holds a run with other settings"):
        compare.compare(SMOKE, {"one": ["optimizer.lr=2e-3"]}, [3], [1, 2], tmp_path / "part", prompts, "cpu", pairs=2)


def test_killed_between_points_it_goes_on_from_a_checkpoint(tmp_path, monkeypatch):
    settings = config.override(SMOKE, ["checkpoint_every=2"])
    whole = compare.compare(settings, {"one": []}, [0], [5], tmp_path / "whole", device="cpu")
    plain_step, taken = Engine.step, []

    def step(trainer):
        if len(taken) == 3:
            raise KeyboardInterrupt
        taken.append(trainer.global_step)
        return plain_step(trainer)

    with monkeypatch.context() as patch:
        patch.setattr(Engine, "step", step)
        with pytest.raises(KeyboardInterrupt):
            compare.compare(settings, {"one": []}, [0], [5], tmp_path / "part", device="cpu")
    again = compare.compare(settings, {"one": []}, [0], [5], tmp_path / "part", device="cpu")
    assert measured(again) == measured(whole)
    assert taken == [0, 1, 2] and again["runs"][0]["trained_steps"] == 3  # 2, 3, 4: step 2 was lost, 0 and 1 were not


def test_a_variant_that_comes_to_nothing_does_not_stop_the_others(tmp_path, monkeypatch):
    plain_step = Engine.step

    def step(trainer):
        if trainer.config.optimizer.lr > 1:
            raise NotFinite("21 steps were not finite")
        return plain_step(trainer)

    monkeypatch.setattr(Engine, "step", step)
    prompts, ways = compare.spread_prompts(geneval.load_prompts(), 1)[:1], {"wild": ["optimizer.lr=9"], "tame": []}
    with pytest.warns(UserWarning, match="wild-seed0: 21 steps were not finite"):
        result = compare.compare(SMOKE, ways, [0], [1, 2], tmp_path, prompts, "cpu")
    rows = {(row["variant"], row["step"]): row.get("validation_loss") for row in result["runs"]}
    assert rows["wild", 1] is rows["wild", 2] is None and rows["tame", 2] > 0
    shown = {row[:2]: row[4] for row in compare.summary(result)}
    assert shown["wild", 2] == "" and float(shown["tame", 2]) > 0
    assert measured(compare.compare(SMOKE, ways, [0], [1, 2], tmp_path, prompts, "cpu")) == measured(result)


def test_a_judge_that_fails_is_no_result_of_a_variant(tmp_path, monkeypatch):
    """Its NaN was written down as the end of the variant, which the same command then never went on with."""

    def step(trainer):
        raise NotFiniteScores("reward far: 2 of 2 scores are NaN")

    monkeypatch.setattr(Engine, "step", step)
    with pytest.raises(NotFiniteScores, match="reward far"):
        compare.compare(SMOKE, {"one": []}, [0], [1], tmp_path, device="cpu")
    assert not list(tmp_path.rglob("rows.jsonl"))


def test_refuses_what_is_no_comparison(tmp_path):
    with pytest.raises(ValueError, match=r"points=\[2, 1\]"):
        compare.compare(SMOKE, {"a": []}, [0], [2, 1], tmp_path)
    with pytest.raises(ValueError, match="unknown field"):
        compare.compare(SMOKE, {"a": ["repa.wait=1"]}, [0], [1], tmp_path)
    with pytest.raises(ValueError, match="validation_folders"):
        compare.compare(SMOKE, {"a": ["data.folders=[nowhere]"]}, [0], [1], tmp_path)
    assert not list(tmp_path.rglob("recipe.json"))  # it would refuse the same name with the mistake mended
    with pytest.raises(ValueError, match="must read 'name:"):
        compare.read_variant("repa.weight=0")


def test_ways_of_learning_from_rewards_are_compared(tmp_path):
    """After as many pictures of the same captions, in the held-out score; nothing ends a run early."""
    changes = ["rewards=[[redness, 1.0]]", "batch_size=4", "group=4", "updates=1", "rollout_steps=3"]
    changes += ["grpo.window_range=2", "stop_drop=0.5"]
    settings = config.override(presets.preset("rewards", "smoke"), changes)
    ways = {"forward": [], "Flow-GRPO": ["method=grpo"], "forward again": []}
    result = compare.compare(settings, ways, [1], [1, 2], tmp_path, device="cpu")
    rows = measured(result)
    assert [row["step"] for row in rows] == [1, 2] * 3 and all(0 <= row["geneval"] <= 1 for row in rows)
    assert rows[2:4] == rows[4:6] and rows[:2] != rows[2:4]  # by folder: flow-grpo, forward, forward-again
    assert all(row["group_distance"] > 0 for row in rows)
    assert result["config"]["stop_drop"] == 0
    minutes = [float(row[3]) for row in compare.summary(result)]
    assert minutes[0] <= minutes[1]
    with pytest.raises(ValueError, match="its own held-out prompts alone"):
        compare.compare(settings, ways, [1], [1], tmp_path, geneval.load_prompts()[:1])


def test_prompts_are_spread_over_every_category():
    prompts = geneval.load_prompts()
    assert Counter(p.tag for p in compare.spread_prompts(prompts, 7)) == dict.fromkeys(geneval.CATEGORIES, 7)
    assert compare.spread_prompts(prompts, 50) == prompts
    assert compare.read_variant("with REPA: repa.weight=0.5 a=[1,2]") == (
        "with REPA",
        ["repa.weight=0.5", "a=[1,2]"],
    )


def test_lite_trains_with_the_optimizer_that_learned_most():
    """In the stored comparison, every run of the preset's optimiser is below every run of the other."""
    found = json.loads((files.weights_dir() / "lite" / "transformer" / "optimizers.json").read_text(encoding="utf-8"))
    losses = {}
    for run in found["runs"]:
        if run["step"] == found["points"][-1]:
            optimizer = config.override(presets.preset("base", "lite"), found["variants"][run["variant"]]).optimizer
            losses.setdefault(optimizer.name, []).append(run["validation_loss"])
    chosen = losses.pop(presets.preset("base", "lite").optimizer.name)
    assert len(chosen) >= 3 and losses and max(chosen) < min(min(others) for others in losses.values())


def test_the_recipes_of_the_card_are_those_of_its_file():
    folder = files.weights_dir() / "lite" / "transformer"
    runs = json.loads((folder / "recipes.json").read_text(encoding="utf-8"))["runs"]
    card = (folder / "README.md").read_text(encoding="utf-8")
    for row in (row for row in runs if row["step"] == 1500):
        found = [f"{row[key]:.3f}" for key in ("validation_loss", "validation_loss_0.8_1.0")]
        found += [f"{row['told'][fact]:.2f}" for fact in ("shapes", "places", "colors", "shape")]
        assert f" | {' | '.join(found)} |" in card, row["variant"]
