"""The presets: every hyper-parameter of every stage and scale, once; what one does not name keeps its default.

`preset("base", "lite")` is the recipe of the lite model; what trained the shipped weights is written beside them, in
`weights/lite/transformer/training.json`. Stage "base" learns from everything, stage "finetune" continues on the better
part of the data with a lower learning rate and a longer average; stage "1024px" goes on from there with pictures of
twice the side; stage "rewards" moves a model towards what rewards like. The full presets are the paper's: 100,000 and
50,000 steps of 2048 pictures, 2,000 roll-outs; of "1024px" the shape alone is published. What a field means, what it
may hold and its default are in `config.py`.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from nitro_e_lite.config import (
    AdapterConfig,
    DataConfig,
    DistillConfig,
    DrawnConfig,
    ForwardConfig,
    GrpoConfig,
    ModelConfig,
    OptimizerConfig,
    RepaConfig,
    RewardConfig,
    RunConfig,
    SprintConfig,
    TrainConfig,
    differences,
)
from nitro_e_lite.errors import InvalidValue

# The published projector, 2048 wide, would cost more than the whole lite model.
_NARROW = 256

_SMOKE = TrainConfig(
    preset="smoke",
    repa=RepaConfig(hidden=_NARROW),
    steps=10,
    batch_size=8,
    precision="fp32",
    log_every=1,
    validate_every=5,
    sample_every=10,
    checkpoint_every=5,
    tracker="none",
    model=ModelConfig(num_attention_heads=2, attention_head_dim=16, block_groups=(1, 1, 1)),
    data=DataConfig(scenes=32, captions=2, validation_scenes=8),
    optimizer=OptimizerConfig(warmup_steps=2, decay_steps=4),
)

# Where an object lies and what it is are decided above t = 0.75. The published density draws 14 % of its t there, this
# one half, as sampling does of its steps: a run that drew 31 % of them there in both stages gave both of two objects
# the shape of one in two pictures of three, see the model's card. The rate does not fall in stage 1: stage 2 begins
# with a third of it and lets that fall to zero.
_LITE = TrainConfig(
    steps=9500,
    precision="auto",
    timestep_mean=1.1,
    timestep_std=1.2,
    shift=3.0,
    # Two objects and counts are what lite models fail at. Half of the steps teach which words tell one scene from
    # another; captions without colours come often enough to learn that "a star and a heart" are not two of one kind.
    data=DataConfig(
        scenes=32_000, pairs=("partner", "number", "places", "colors", "shapes"), pairs_every=2, colorless=0.5
    ),
    optimizer=OptimizerConfig(decay_steps=0, whiten_text_input=True),
    repa=RepaConfig(weight=2.0, hidden=_NARROW),
)

_FULL = TrainConfig(  # stage 1 of the paper, 8 x 256 pictures a step
    preset="full",
    steps=100_000,
    batch_size=2048,
    precision="bf16",
    ema_decay=0.0,  # averaging begins with stage 2
    log_every=20,  # on an accelerator a request to stop is heard then too
    validate_every=2000,
    validation_share=0.02,
    sample_every=5000,
    checkpoint_every=1000,
    checkpoint_minutes=10.0,
    keep_checkpoints=3,
    snapshot_every=10_000,
    milestones=(5000, 20_000, 50_000, 100_000),
    spike_factor=2.0,
    guidance=4.5,
    model=ModelConfig(
        in_channels=32,
        num_attention_heads=24,
        caption_channels=2048,
        block_groups=(4, 16, 4),
        attention_pattern=((1, 1), (4, 1), (4, 4)),
    ),
    data=DataConfig(
        folders=("data/sa1b", "data/journeydb", "data/fluxdb"), validation_folders=("data/validation",), encoders="full"
    ),
    optimizer=OptimizerConfig(
        name="adamw",
        lr=3e-4,
        betas=(0.9, 0.999),  # not published: torch's own
        weight_decay=0.03,
        clip=0.5,
        warmup_steps=500,
        decay_steps=0,
    ),
    repa=RepaConfig(weight=0.5, vision="facebook/dinov2-base"),
)


def _finetune(base: TrainConfig, optimizer: dict[str, Any], data: dict[str, Any], **changes: Any) -> TrainConfig:
    """Stage 2 of `base`: the better part of its data, a third of its learning rate, without REPA."""
    return dataclasses.replace(
        base,
        stage="finetune",
        data=dataclasses.replace(base.data, **data),
        optimizer=dataclasses.replace(base.optimizer, **optimizer),
        repa=RepaConfig(),
        **changes,
    )


_THIRD = {"lr": 7e-4, "muon_lr": 7e-3}

# Learning from rewards, as a probe on two cores found it to work: 16 prompts x 12 pictures a roll-out, 10 steps without
# guidance, advantages divided by the group's own deviation. What it lacked is added: its gradients grew tenfold after
# thirty roll-outs at a constant rate, so they are clipped near their usual norm, and the rate falls to zero over the
# last two fifths.
_REWARDS = RewardConfig(
    steps=280,
    accumulate=4,
    precision="auto",
    deviation="group",
    validation_prompts=20,
    snapshot_every=20,
    optimizer=dataclasses.replace(RewardConfig().optimizer, clip=0.1, decay_steps=120),
)

_REWARDS_SMOKE = dataclasses.replace(
    _REWARDS,
    preset="smoke",
    steps=4,
    batch_size=8,
    accumulate=1,
    precision="fp32",
    optimizer=RewardConfig().optimizer,
    group=4,
    log_every=1,
    validate_every=4,
    sample_every=4,
    rollout_steps=4,
    validation_prompts=1,
    snapshot_every=0,
    stop_drop=0.0,  # a few steps on a few pictures: nothing to judge
    stop_diversity=0.0,
    adapter=AdapterConfig(rank=4, alpha=8.0),
    grpo=GrpoConfig(window=2, window_range=3),
)

# The paper's third stage is 2,000 iterations with GenEval and HPSv2.1; group sizes, rate and regulariser are those of
# Flow-GRPO and DiffusionNFT, since the paper gives none. `method=grpo` with `grpo.kl=0.04` is the paper's way.
_REWARDS_FULL = RewardConfig(
    preset="full",
    steps=4000,  # two updates an iteration
    batch_size=576,
    precision="bf16",
    group=24,
    log_every=2,  # each roll-out: on an accelerator a request to stop is heard then too
    validate_every=200,  # all of them, whatever they take: the watch on hacking reads them; `watch` adds judges
    sample_every=200,
    snapshot_every=200,  # the best of them is what that watch names
    checkpoint_every=20,
    checkpoint_minutes=10.0,
    keep_checkpoints=3,
    tracker="auto",
    start_from="runs/finetune-full",
    prompts="data/geneval_train.jsonl",
    validation_prompts=50,  # of each kind: of ten a score says little
    shift=1.0,
    rewards=(("http://localhost:8901", 0.5), ("http://localhost:8902", 0.5)),  # GenEval, HPSv2.1
    normalize_rewards=True,
    drop_flat_groups=True,
    adapter=AdapterConfig(targets="attention"),
    optimizer=dataclasses.replace(RewardConfig().optimizer, lr=3e-4),
    forward=ForwardConfig(times=1),
    grpo=GrpoConfig(clip=1e-5),
)

_FINETUNE_SMOKE = _finetune(_SMOKE, _THIRD, {"quality": "readable"})
_FINETUNE_FULL = _finetune(
    _FULL, {"lr": 1e-4, "clip": 1.0}, {"folders": ("data/journeydb", "data/fluxdb")}, steps=50_000, ema_decay=0.9999
)


def _larger(stage: TrainConfig, *names: str, **changes: Any) -> TrainConfig:
    """Stage 2 once more at twice the side, on the folders of these names; the shape is the published one."""
    folders = [f"data/1024px/{name}" for name in names]
    data = dataclasses.replace(stage.data, folders=tuple(folders), validation_folders=("data/1024px/validation",))
    model = dataclasses.replace(stage.model, sample_size=32, attention_pattern=((1, 1),))
    return dataclasses.replace(stage, stage="1024px", data=data, model=model, **changes)


_STUDENT_SMOKE = {
    "preset": "smoke",
    "steps": 8,
    "batch_size": 4,
    "head_width": 8,
    "log_every": 1,
    "validate_every": 4,
    "sample_every": 8,
    "checkpoint_every": 4,
    "tracker": "none",
    "gate_pictures": 0,
    "gate_prompts": 0,
    "gate_distance": 1000.0,  # a few steps on a few pictures: nothing to judge
    "data": DrawnConfig(validation_rows=2),
}

# What "lite-4step" and "lite-sprint" are. Their teacher is "lite" after rewards, in few steps and without guidance:
# `nitro-e data draw data/drawn --model lite-grpo --steps 8 --guidance 0 --count 6000`; the second had 14,000 more, of
# seed 1.
_STUDENT_LITE = {
    "teacher": "lite-grpo",
    "precision": "auto",
    "log_every": 20,
    "validate_every": 200,
    "data": DrawnConfig(verified=True),
}
_DISTILL = DistillConfig(
    **_STUDENT_LITE,
    steps=800,
    ema_decay=0.99,
    jumps=True,
    regression_share=1.0,
    adversarial_weight=0.0,
    gate_prompts=20,
    optimizer=dataclasses.replace(DistillConfig().optimizer, lr=2e-4, warmup_steps=50, decay_steps=400),
)
_SPRINT = SprintConfig(
    **_STUDENT_LITE,
    start_from="lite-4step",
    steps=1700,
    batch_size=32,
    guidance=1.0,
    guidances=(1.0,),
    guidance_embedding=False,
    road_share=0.62,
    consistency_weight=0.1,  # its gradient is ten times that of the others
    tangent_warmup=0.0,  # what has learned jumps is nearly consistent
    judged_mean=-2.0,  # at little noise heads see what is blurred
    judged_std=0.7,
    gate_low=0.5,  # the first of their turns count too, and they begin knowing nothing
    optimizer=dataclasses.replace(SprintConfig().optimizer, decay_steps=600),
)

# Of the published distillation the number of steps and of devices is known, and the rate of its predecessor; of
# SANA-Sprint everything but the length on this model. GenEval-lite is about the lite scenes. Neither has been run.
_STUDENT_FULL = {
    "preset": "full",
    "steps": 20_000,
    "batch_size": 512,
    "precision": "bf16",
    "log_every": 50,
    "validate_every": 1000,
    "validation_share": 0.02,
    "sample_every": 2000,
    "checkpoint_every": 500,
    "checkpoint_minutes": 10.0,
    "keep_checkpoints": 3,
    "teacher": "weights/Nitro-E-512px.safetensors",
    "head_width": 256,
    "gate_low": 0.0,  # heads that know nothing yet are right by chance for long at this rate
    "gate_pictures": 0,
    "gate_prompts": 0,
    "data": DrawnConfig(folders=("data/drawn-full",), encoders="full", validation_rows=512),
}

_SLOW = OptimizerConfig(name="adamw", lr=1e-6, betas=(0.9, 0.999), warmup_steps=0, decay_steps=0)

PRESETS: dict[tuple[str, str], RunConfig] = {
    ("distill", "smoke"): DistillConfig(**_STUDENT_SMOKE, regression_share=0.5),
    ("distill", "lite"): _DISTILL,
    ("distill", "full"): DistillConfig(
        **_STUDENT_FULL,
        regression_share=0.0,  # as published: adversary and regression from the start
        ema_decay=0.0,
        shift=1.0,
        sigma_grid="scheduler",
        adversarial_weight=1.0,
        optimizer=_SLOW,
        heads=_SLOW,
    ),
    ("sprint", "smoke"): SprintConfig(
        **_STUDENT_SMOKE, embedding_steps=50, finetune_share=0.375, road_share=0.0, gate_finetune=1000.0
    ),
    ("sprint", "lite"): _SPRINT,
    ("sprint", "full"): SprintConfig(
        **_STUDENT_FULL,
        ema_decay=0.999,
        shift=1.0,
        sigma_grid="scheduler",
        finetune_share=0.25,
        road_weight=0.0,
        tangent_warmup=0.3,
        guidances=(4.0, 4.5, 5.0),
        guidance=4.5,
        optimizer=dataclasses.replace(_SLOW, lr=2e-6, clip=0.1),
        heads=dataclasses.replace(_SLOW, lr=2e-6, clip=0.1),
    ),
    ("base", "smoke"): _SMOKE,
    ("base", "lite"): _LITE,
    ("base", "full"): _FULL,
    ("finetune", "smoke"): _FINETUNE_SMOKE,
    ("finetune", "lite"): _finetune(
        _LITE,
        {**_THIRD, "warmup_steps": 50, "decay_steps": 2250},
        {"quality": "readable"},
        start_from="lite",
        steps=4500,
        ema_decay=0.999,
    ),
    ("finetune", "full"): _FINETUNE_FULL,
    ("1024px", "smoke"): _larger(_FINETUNE_SMOKE, "scenes"),
    # A quarter of the pictures a step are as many tokens; steps, batch and rate are ours.
    ("1024px", "full"): _larger(_FINETUNE_FULL, "journeydb", "fluxdb", batch_size=512, start_from="runs/finetune-full"),
    ("rewards", "smoke"): _REWARDS_SMOKE,
    ("rewards", "lite"): _REWARDS,
    ("rewards", "full"): _REWARDS_FULL,
}


def preset(stage: str, name: str) -> RunConfig:
    """The configuration called `name` of a training stage.

    Raises:
        ValueError: when there is none; the message lists those there are.
    """
    if (stage, name) not in PRESETS:
        known = ", ".join(f"{s}/{n}" for s, n in PRESETS)
        raise InvalidValue(f"preset={stage}/{name}: unknown; there are {known}")
    return PRESETS[stage, name]


def assignments(config: RunConfig) -> list[str]:
    """The `override` strings that make `config` out of its preset."""
    return differences(preset(config.stage, config.preset), config)
