"""Presets, overrides and the round trip to plain data."""

import inspect
from pathlib import Path

import pytest

from nitro_e_lite import config as module
from nitro_e_lite.config import PRESETS, TrainConfig, assignments, from_dict, override, preset, to_dict
from nitro_e_lite.model.emmdit import EMMDiTTransformer2DModel

PACKAGE = Path(module.__file__).parent


def test_override_reads_yaml_and_keeps_types():
    config = override(
        preset("base", "smoke"), ["optimizer.lr=1e-3", "model.block_groups=[1, 2, 1]", "steps=7", "precision=bf16"]
    )
    assert config.optimizer.lr == 1e-3
    assert config.model.block_groups == (1, 2, 1)
    assert (config.steps, config.precision) == (7, "bf16")
    assert preset("base", "smoke").steps != 7  # the preset itself is untouched


@pytest.mark.parametrize(
    ("assignment", "words"),
    [
        ("steps", "field=value"),
        ("stepz=3", "stepz"),
        ("model.width=3", "width"),
        ("steps.more=3", "no fields"),
        ("steps=many", "steps='many'"),
        ("steps=true", "type int"),
        ("steps=0", "steps=0"),
        ("precision=fp8", "precision='fp8'"),
        ("optimizer.name=sgd", "sgd"),
        ("optimizer.decay_steps=-5", "optimizer.decay_steps=-5: must be >= 0"),
        ("optimizer.warmup_steps=-1", "optimizer.warmup_steps=-1"),
        ("optimizer.lr=-1e-3", "optimizer.lr=-0.001"),
        ("optimizer.muon_lr=-0.02", "optimizer.muon_lr=-0.02"),
        ("optimizer.weight_decay=-0.1", "optimizer.weight_decay=-0.1"),
        ("optimizer.clip=0", "optimizer.clip=0"),
        ("ema_decay=1.0", "ema_decay"),
        ("data.scenes=4", "data.scenes=4"),
        ("data.quality=best", "data.quality='best'"),
        ("accumulate=0", "accumulate=0"),
        ("repa.weight=-1", "repa.weight=-1"),
        ("data.pairs=true", "data.pairs=True: must be of type list, like"),
    ],
)
def test_bad_overrides_name_field_and_value(assignment, words):
    with pytest.raises(ValueError, match=words):
        override(preset("base", "smoke"), [assignment])


def test_unknown_preset_lists_the_known():
    with pytest.raises(ValueError, match="base/lite"):
        preset("base", "huge")


@pytest.mark.parametrize("config", PRESETS.values(), ids=["-".join(key) for key in PRESETS])
def test_round_trip(config):
    assert from_dict(TrainConfig, to_dict(config)) == config


def test_assignments_are_what_makes_a_config_of_its_preset():
    changes = ["optimizer.lr=1e-3", "model.block_groups=[1, 2, 1]", "data.validation_folders=[v]", "precision=bf16"]
    changes += ["data.folders=[a, b]", "compile=eager", "gradient_checkpointing=true", "start_from=a b"]
    config = override(preset("finetune", "smoke"), changes)
    assert override(preset("finetune", "smoke"), assignments(config)) == config
    assert len(assignments(config)) == len(changes) and assignments(preset("base", "lite")) == []


@pytest.mark.parametrize("nothing", ["compile=", "compile=null", "compile=''"])
def test_a_text_can_be_set_to_nothing(nothing):
    config = override(preset("base", "lite"), ["compile=inductor"])
    assert override(config, [nothing]) == preset("base", "lite")


def test_full_presets_are_the_papers():
    base, finetune = preset("base", "full"), preset("finetune", "full")
    assert (base.steps, finetune.steps, base.batch_size, finetune.batch_size) == (100_000, 50_000, 2048, 2048)
    assert (base.optimizer.lr, finetune.optimizer.lr) == (3e-4, 1e-4)
    assert (base.optimizer.clip, finetune.optimizer.clip) == (0.5, 1.0)
    assert (base.repa.weight, finetune.repa.weight) == (0.5, 0.0)
    assert (base.ema_decay, finetune.ema_decay) == (0.0, 0.9999)
    for config in (base, finetune):
        adam = config.optimizer
        assert (adam.name, adam.weight_decay, adam.eps) == ("adamw", 0.03, 1e-10)
        assert (adam.warmup_steps, adam.decay_steps) == (500, 0)
        assert (config.precision, config.caption_dropout) == ("bf16", 0.1)
        assert (config.timestep_mean, config.timestep_std) == (0.0, 1.0)
    assert set(base.data.folders) - set(finetune.data.folders) == {"data/sa1b"}
    published = inspect.signature(EMMDiTTransformer2DModel.__init__).parameters
    for name, value in to_dict(base.model).items():
        assert value == published[name].default, name


def test_a_run_that_began_before_a_field_existed_keeps_its_recipe():
    config = TrainConfig()
    assert (config.accumulate, config.gradient_checkpointing, config.compile) == (1, False, "")
    assert config.repa.weight == 0 and config.data.folders == () and config.data.quality == "all"


def test_round_trip_refuses_unknown_fields():
    with pytest.raises(ValueError, match="colour"):
        from_dict(TrainConfig, {"colour": 1})
