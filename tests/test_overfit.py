"""One batch by heart: passes with settings that learn, fails with settings that do not."""

import json

import pytest
from typer.testing import CliRunner

from nitro_e_lite.cli.app import app
from nitro_e_lite.config import override
from nitro_e_lite.experiments.overfit import LIMIT, overfit
from nitro_e_lite.presets import preset

SMOKE = preset("base", "smoke")
STEPS = 40  # enough for the rates of the recipe; 30 are not


def test_settings_that_learn_pass_and_repeat_bit_for_bit():
    config = override(SMOKE, ["repa.weight=0"])
    assert overfit(config, steps=10) == overfit(config, steps=10)
    first = overfit(config, steps=STEPS)
    assert first["ok"] and first["left"][-1] < LIMIT < 1 < first["left"][0]
    assert len(first["left"]) == STEPS + 1 and first["skipped"] == 0
    assert 0.8 < first["spread"] < 1.3


def test_repa_does_not_count_as_what_is_left():
    """Before the first step both have the same weights, whatever the second loss weighs."""
    left = [overfit(override(SMOKE, [f"repa.weight={weight}"]), steps=10)["left"][0] for weight in (0.1, 0.5)]
    assert left[0] == pytest.approx(left[1], rel=1e-6)


@pytest.mark.parametrize("rates", [(1e-5, 1e-6), (3.0, 1.0)], ids=["too low", "too high"])
def test_wrong_rates_fail(rates):
    config = override(SMOKE, ["repa.weight=0", f"optimizer.muon_lr={rates[0]}", f"optimizer.lr={rates[1]}"])
    assert not overfit(config, steps=STEPS)["ok"]


def test_steps_that_were_skipped_are_counted_and_fail():
    """More of them than a run would bear: the answer is still a result, not an error."""
    found = overfit(override(SMOKE, ["repa.weight=0", "optimizer.muon_lr=1e30", "optimizer.lr=1e30"]))
    assert found["skipped"] > SMOKE.max_skipped and found["left"][-1] is None and not found["ok"]
    json.dumps(found, allow_nan=False)


def test_a_trained_model_must_get_better_than_it_begins():
    """With rates near zero the shipped weights stay at a low share; that is no learning."""
    config = override(preset("finetune", "lite"), ["start_from=lite", "optimizer.muon_lr=1e-9", "optimizer.lr=1e-12"])
    found = overfit(config, steps=10)
    assert found["left"][-1] < LIMIT and not found["ok"]


def test_a_few_steps_are_no_rehearsal():
    with pytest.raises(ValueError, match="steps=9"):
        overfit(SMOKE, steps=9)


def test_command_tells_and_fails_by_its_exit_code():
    words = [
        "overfit",
        "--preset",
        "smoke",
        "--set",
        "repa.weight=0",
        "--set",
        "optimizer.muon_lr=1e-5",
        "--steps",
        "10",
    ]
    told = CliRunner().invoke(app, words)
    assert told.exit_code == 1 and "Failed: must be below 50% after 10 steps" in told.stdout
    assert "of the variance left" in told.stdout
    machine = CliRunner().invoke(app, [*words, "--json"])
    assert machine.exit_code == 1 and len(json.loads(machine.stdout)["left"]) == 11
