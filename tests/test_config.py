"""Presets, overrides, the round trip to plain data, and bounds that no value gets past."""

import dataclasses
import inspect
import math
import pickle
import re
import subprocess
import sys
from pathlib import Path
from typing import Annotated, Literal, get_args, get_origin, get_type_hints

import pytest
import yaml
from pydantic import Field
from pydantic.fields import FieldInfo

from nitro_e_lite import config as module
from nitro_e_lite.config import (
    ADAPTER_TARGETS,
    DEVIATIONS,
    DISTILL_STAGES,
    FACTS,
    FREE,
    MODULATIONS,
    NOISE_RULES,
    OLD_SCHEDULES,
    OPTIMIZERS,
    PRECISIONS,
    QUALITIES,
    REDUCTIONS,
    REWARD_METHODS,
    REWARD_STAGES,
    SCALES,
    SIGMA_GRIDS,
    SPRINT_STAGES,
    STAGES,
    OptimizerConfig,
    RunConfig,
    TrainConfig,
    from_dict,
    override,
    to_dict,
)
from nitro_e_lite.model.emmdit import EMMDiTTransformer2DModel
from nitro_e_lite.presets import PRESETS, assignments, preset
from nitro_e_lite.stages.autoencoder import AutoencoderConfig
from nitro_e_lite.stages.language_model import LanguageModelConfig
from nitro_e_lite.stages.vision import VisionConfig

PACKAGE = Path(module.__file__).parent


def test_overrides_hold_together_in_any_order():
    """`data.folders` was once refused before the `data.pairs=[]` that stood behind it was read."""
    there = ["data.folders=[a]", "data.pairs=[]", "data.validation_folders=[b]"]
    one, other = (override(preset("finetune", "lite"), list(order)) for order in (there, there[::-1]))
    assert one == other and one.data.folders == ("a",)
    with pytest.raises(ValueError, match="data.folders.*must be empty with data.pairs"):
        override(preset("finetune", "lite"), there[:1])
    assert override(preset("rewards", "lite"), ["group=5", "batch_size=50", "updates=1"]).group == 5
    assert override(preset("base", "smoke"), ["seed=1", "seed=2"]).seed == 2


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
    assert from_dict(type(config), to_dict(config)) == config


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
    for stage in ("base", "finetune", "1024px", "distill", "sprint", "rewards"):
        config = preset(stage, "full")
        share = 1.0 if stage == "rewards" else 0.02  # the watch on hacking needs every validation
        assert (config.checkpoint_minutes, config.validation_share) == (10.0, share), stage
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


# -- what every field may hold

CONFIGS = {"-".join(key): config for key, config in PRESETS.items()}
CONFIGS |= {cls.__name__: cls() for cls in (AutoencoderConfig, LanguageModelConfig, VisionConfig)}


def bad_values(kind, allowed=()):
    """Values that a declared type must not let in: below its bounds, above them, and of another type.

    Raises:
        TypeError: for a type that says neither what its bounds are nor that it has none.
    """
    if get_origin(kind) is Annotated:
        kind, *allowed = get_args(kind)
    rules = [rule for one in allowed if isinstance(one, FieldInfo) for rule in one.metadata]
    bounds = {name: value for rule in rules for name, value in dataclasses.asdict(rule).items()}
    if get_origin(kind) is Literal:
        return ["no such word", 1.5, None]
    if kind is bool:
        return [1, "yes", None]
    if get_origin(kind) is tuple:
        one, *more = get_args(kind)
        others = [(bad,) * (len(more) + 1 if more != [...] else 1) for bad in bad_values(one)]
        sizes = [()] * ("min_length" in bounds or more != [...]) + [(0.5,) * 9] * (more != [...])
        return [*others, *sizes, 7, "text", None]
    if FREE not in allowed and not {"ge", "gt", "min_length"} & set(bounds):
        raise TypeError(f"{kind}: declares no bounds and does not say FREE")
    if kind is str:
        return [7, None, True, *([""] if bounds else [])]
    below = [bounds["ge"] - 1, *([bounds["ge"] - 1e-6] if kind is float else [])] if "ge" in bounds else []
    below += [bounds["gt"], bounds["gt"] - 1] if "gt" in bounds else []
    above = [bounds["le"] + 1e-6, bounds["le"] + 1] if "le" in bounds else []
    above += [bounds["lt"], bounds["lt"] + 1] if "lt" in bounds else []
    numbers = [math.nan, math.inf, -math.inf] if kind is float else [1.5]
    return [*below, *above, *numbers, "text", "1", True, None, (1,)]


def sections(config, path=""):
    """A configuration and those within it, with the path to each."""
    yield path, config
    for field in dataclasses.fields(config):
        if dataclasses.is_dataclass(value := getattr(config, field.name)):
            yield from sections(value, f"{path}{field.name}.")


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_no_field_takes_what_it_does_not_declare(config):
    """Every field, refused when an object is made and, with the path to it, by override and from_dict."""
    tried = 0
    for path, section in sections(config):
        declared = get_type_hints(type(section), include_extras=True)
        for field in dataclasses.fields(section):
            kind, name = declared[field.name], f"{path}{field.name}"
            for value in [{}, 3, "text"] if dataclasses.is_dataclass(kind) else bad_values(kind):
                tried += 1
                with pytest.raises(ValueError, match=rf"^{field.name}[=\[]"):
                    dataclasses.replace(section, **{field.name: value})
                if value is None and isinstance(getattr(section, field.name), str) and FREE in get_args(kind):
                    continue  # override reads nothing as the empty text
                if value == "1" and isinstance(getattr(section, field.name), float):
                    continue  # and "1e-3" as a number
                if value == ("1",) and isinstance(next(iter(getattr(section, field.name)), None), float):
                    continue  # in a list too
                with pytest.raises(ValueError, match=rf"^{re.escape(name)}[=\[]") as caught:
                    override(config, [f"{name}={yaml.safe_dump(value, default_flow_style=True)}"])
                assert "\n" not in str(caught.value)
    assert tried > 100


@pytest.mark.parametrize(
    "kind", [int, float, str, tuple[int, ...], Annotated[int, Field(le=3)], Annotated[str, "text"]]
)
def test_a_field_that_declares_nothing_is_found(kind):
    with pytest.raises(TypeError, match="declares no bounds"):
        bad_values(kind)


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_the_words_of_the_declarations_are_the_vocabularies(config):
    words = {STAGES, SCALES, PRECISIONS, REDUCTIONS, QUALITIES, OPTIMIZERS, FACTS, MODULATIONS, SIGMA_GRIDS}
    words |= {REWARD_STAGES, REWARD_METHODS, NOISE_RULES, OLD_SCHEDULES, DEVIATIONS, ADAPTER_TARGETS}
    words |= {DISTILL_STAGES, SPRINT_STAGES}
    for _, section in sections(config):
        for kind in get_type_hints(type(section), include_extras=True).values():
            for one in (kind, *get_args(kind)):
                assert get_origin(one) is not Literal or get_args(one) in words


@pytest.mark.parametrize(
    ("assignment", "said"),
    [
        ("guidance=-3", "guidance=-3.0: must be >= 0"),
        ("shift=0.9", "shift=0.9: must be >= 1"),
        ("shift=1e300", "shift=1e+300: must be <= 1000"),
        ("data.captions=0", "data.captions=0: must be >= 1"),
        ("data.scenes=0", "data.scenes=0: must be >= 1"),
        ("data.validation_scenes=0", "data.validation_scenes=0: must be >= 1"),
        ("data.pairs=[places, size]", "data.pairs[1]='size': must be one of places, colors, partner, number"),
        ("stage=foo", "stage='foo': must be one of base, finetune"),
        ("preset=huge", "preset='huge': must be one of smoke, lite, full"),
        ("optimizer.betas=[a, b]", "optimizer.betas[0]='a': must be of type float"),
        ("optimizer.betas=[1.2, 0.9]", "optimizer.betas[0]=1.2: must be < 1"),
        ("optimizer.betas=[0.9]", "optimizer.betas[1]: is missing"),
        ("optimizer.betas=[0.9, 0.9, 0.9]", "optimizer.betas=(0.9, 0.9, 0.9): must be at most 2 long"),
        ("optimizer.eps=-1e-8", "optimizer.eps=-1e-08: must be >= 0"),
        ("optimizer.momentum=1", "optimizer.momentum=1.0: must be < 1"),
        ("optimizer.momentum=-0.1", "optimizer.momentum=-0.1: must be >= 0"),
        ("optimizer.lr=-1", "optimizer.lr=-1.0: must be >= 0"),
        ("optimizer.lr=.nan", "optimizer.lr=nan: must be a finite number"),
        ("optimizer.lr=.inf", "optimizer.lr=inf: must be a finite number"),
        ("optimizer=muon", "optimizer='muon': must be of type OptimizerConfig"),
        ("timestep_std=0", "timestep_std=0.0: must be > 0"),
        ("timestep_std=-1", "timestep_std=-1.0: must be > 0"),
        ("model.num_attention_heads=0", "model.num_attention_heads=0: must be >= 1"),
        ("model.attention_head_dim=-32", "model.attention_head_dim=-32: must be >= 1"),
        ("model.mlp_ratio=0", "model.mlp_ratio=0.0: must be > 0"),
        ("model.block_groups=[1, 0, 1]", "model.block_groups[1]=0: must be >= 1"),
        ("model.block_groups=[]", "model.block_groups=(): must be at least 1 long"),
        ("model.attention_pattern=[[4, 0]]", "model.attention_pattern[0][1]=0: must be >= 1"),
        ("model.attention_pattern=[[4]]", "model.attention_pattern[0][1]: is missing"),
        ("model.modulation=film", "model.modulation='film': must be one of adaln_affine, adaln_single, adaln"),
        ("repa.hidden=0", "repa.hidden=0: must be >= 1"),
        ("keep_checkpoints=0", "keep_checkpoints=0: must be >= 1"),
        ("accumulate=0", "accumulate=0: must be >= 1"),
        ("seed=-1", "seed=-1: must be >= 0"),
        ("seed=4294967296", "seed=4294967296: must be < 4294967296"),
        ("data.seed=-1", "data.seed=-1: must be >= 0"),
    ],
)
def test_values_that_once_passed_are_refused_in_one_line(assignment, said):
    with pytest.raises(ValueError) as caught:
        override(preset("base", "smoke"), [assignment])
    assert str(caught.value).startswith(said) and "\n" not in str(caught.value)


def test_a_bad_value_is_refused_wherever_it_comes_from():
    with pytest.raises(ValueError, match=r"^lr=-1\.0: must be >= 0$"):
        OptimizerConfig(lr=-1.0)
    with pytest.raises(ValueError, match="^lrr: unknown field; there are name, lr, "):
        OptimizerConfig(lrr=1.0)
    with pytest.raises(ValueError, match="^stage='foo': must be one of base, finetune, 1024px$"):
        TrainConfig(stage="foo")
    with pytest.raises(ValueError, match=r"^optimizer\.lr=-1\.0: must be >= 0$"):
        from_dict(TrainConfig, {"optimizer": {"lr": -1}})
    with pytest.raises(ValueError, match="^data.scenes=4: must be at least one batch$"):  # over several fields
        from_dict(TrainConfig, {"data": {"scenes": 4}})


def test_numbers_are_read_as_yaml_writes_them():
    config = override(preset("base", "lite"), ["optimizer.betas=[9e-1, 98e-2]", "optimizer.lr=1", "guidance='2'"])
    assert config.optimizer.betas == (0.9, 0.98) and config.guidance == 2.0
    assert type(config.optimizer.lr) is float and type(OptimizerConfig(lr=1).lr) is float


def test_settings_are_dataclasses_that_can_be_keys():
    config = preset("base", "lite")
    again = dataclasses.replace(config)
    assert again == config and again is not config and len({config, again}) == 1
    assert pickle.loads(pickle.dumps(config)) == config and dataclasses.asdict(config) == to_dict(config)
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.steps = 3


def test_every_run_has_the_common_fields_and_encoders_train_as_they_did():
    common = {field.name for field in dataclasses.fields(RunConfig)}
    for config in CONFIGS.values():
        assert isinstance(config, RunConfig) and common <= {field.name for field in dataclasses.fields(config)}
    fits = [AutoencoderConfig(), LanguageModelConfig(), VisionConfig()]
    assert [(c.steps, c.batch_size, c.warmup_steps) for c in fits] == [(3600, 16, 100), (1150, 64, 50), (1000, 32, 40)]
    assert {(c.log_every, c.checkpoint_every, c.keep_checkpoints, c.max_grad_norm) for c in fits} == {(20, 200, 1, 1.0)}
    assert {(c.precision, c.ema_decay, c.max_skipped, c.accumulate) for c in fits} == {("fp32", 0.0, 0, 1)}


@pytest.mark.parametrize(
    ("encoder", "wrong", "said"),
    [
        (AutoencoderConfig, {"window": 72}, "window=72: must be a multiple of 16"),
        (AutoencoderConfig, {"encoder_widths": (16, 32, 64)}, "encoder_layers=.*: must be 3 numbers"),
        (LanguageModelConfig, {"heads": 6}, "width=256: must be a multiple of twice heads=6"),
        (LanguageModelConfig, {"key_value_heads": 3}, "heads=4: must be a multiple of key_value_heads=3"),
    ],
)
def test_encoders_of_shapes_that_do_not_fit_are_refused_before_any_work(encoder, wrong, said):
    with pytest.raises(ValueError, match=said):
        encoder(**wrong)


def test_settings_need_no_torch():
    code = "import sys, nitro_e_lite.presets; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=PACKAGE.parent).returncode == 0


@pytest.mark.parametrize(
    ("assignments", "said"),
    [
        (["gate_low=0.96"], "gate_low=0.96: must be below gate_high=0.95"),
        (["sigma_grid=scheduler"], "shift=3.0: must be 1 with sigma_grid='scheduler'"),
        (["sampler_steps=1"], "sampler_steps=1: must be >= 2"),
        (["depths=[0.1, 1.5]"], "depths[1]=1.5: must be <= 1"),
        (["data.folders=[]"], "data.folders=(): must be at least 1 long"),
        (
            ["adversarial_weight=0", "regression_weight=0", "regression_share=0.5"],
            "regression_weight=0.0: must be > 0 with adversarial_weight=0",
        ),
        (["heads.lr=-1"], "heads.lr=-1.0: must be >= 0"),
    ],
)
def test_distillation_settings_that_make_no_sense(assignments, said):
    with pytest.raises(ValueError) as caught:
        override(preset("distill", "lite"), assignments)
    assert str(caught.value).startswith(said) and "\n" not in str(caught.value)
    with pytest.raises(ValueError, match="distill/smoke, distill/lite, distill/full"):
        preset("distill", "huge")
