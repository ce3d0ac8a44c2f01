"""`precision="auto"`: measured once, recorded, kept; a type that is named is never measured."""

import json

import pytest
import torch

from nitro_e_lite.config import override
from nitro_e_lite.presets import preset
from nitro_e_lite.stages.pretrain import Pretrain
from nitro_e_lite.training import precision
from nitro_e_lite.training.engine import Engine
from nitro_e_lite.training.optimizers import orthogonalize

SMOKE = override(preset("base", "smoke"), ["steps=2", "precision=auto", "data.validation_scenes=4"])


@pytest.mark.parametrize(("seconds", "faster"), [((1.0, 0.5), "bf16"), ((1.0, 0.9), "fp32"), ((1.0, 2.0), "fp32")])
def test_bfloat16_has_to_be_clearly_faster(seconds, faster, monkeypatch):
    times = dict(zip((torch.float32, torch.bfloat16), seconds, strict=True))
    monkeypatch.setattr(precision, "_product_seconds", lambda device, dtype, _: times[dtype])
    assert precision.faster_precision(torch.device("cpu")) == faster


def test_the_choice_is_recorded_and_a_resumed_run_keeps_it(tmp_path, monkeypatch):
    answers = iter(["bf16"])  # a second measurement would have no answer
    monkeypatch.setattr(precision, "faster_precision", lambda device: next(answers))
    run = Engine(override(SMOKE, ["checkpoint_every=1", "steps=1"]), Pretrain, tmp_path, device="cpu")
    run.fit()
    assert json.loads((tmp_path / "config.json").read_text())["config"]["precision"] == "bf16"
    assert next(run.stage.model.parameters()).dtype == torch.bfloat16
    again = Engine(SMOKE, Pretrain, tmp_path, resume=True, device="cpu")
    assert again.config.precision == "bf16" and again.global_step == 1


def test_a_named_type_is_not_measured(tmp_path, monkeypatch):
    monkeypatch.setattr(precision, "faster_precision", lambda device: pytest.fail("measured"))
    run = Engine(override(SMOKE, ["precision=fp32"]), Pretrain, tmp_path, device="cpu")
    assert next(run.stage.model.parameters()).dtype == torch.float32


def test_directions_in_bfloat16_are_those_in_float32():
    matrices = torch.randn(2, 48, 32, generator=torch.Generator().manual_seed(0))
    exact, rounded = orthogonalize(matrices), orthogonalize(matrices, dtype=torch.bfloat16)
    assert rounded.dtype == torch.bfloat16
    assert (rounded.float() - exact).norm() < 0.05 * exact.norm()
