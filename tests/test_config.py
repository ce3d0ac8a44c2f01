"""Presets, overrides and the round trip to plain data."""

import ast
import dataclasses
from pathlib import Path

import pytest

from nitro_e_lite import config as module
from nitro_e_lite.config import PRESETS, TrainConfig, from_dict, override, preset, to_dict

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
        ("ema_decay=1.0", "ema_decay"),
        ("data.scenes=4", "data.scenes=4"),
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


def test_round_trip_refuses_unknown_fields():
    with pytest.raises(ValueError, match="colour"):
        from_dict(TrainConfig, {"colour": 1})


def test_every_field_is_read_somewhere():
    """A hyper-parameter that no code reads is a lie; model fields go to the constructor by name."""
    read = set()
    for path in PACKAGE.glob("*.py"):
        if path.name == "config.py":
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Attribute):
                read.add(node.attr)
    described = {"stage", "preset"}  # say which run this is; stored with it
    for cls in (module.TrainConfig, module.DataConfig, module.OptimizerConfig):
        unread = {field.name for field in dataclasses.fields(cls)} - read - described
        assert not unread, f"{cls.__name__}: nothing reads {unread}"
