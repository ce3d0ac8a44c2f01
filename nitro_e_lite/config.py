"""Every hyper-parameter, once: frozen dataclasses, presets, and overrides that refuse what they do not know.

A run is described by one ``TrainConfig``. ``preset("base", "lite")`` is the recipe of the lite model; what trained the
shipped weights is written beside them, in ``weights/lite/transformer/training.json``. Stage "base" learns from
everything, stage "finetune" continues on the better part of the data with a lower learning rate and a longer average.
The full presets are the paper's: 100,000 and 50,000 steps of 2048 pictures.
``override(config, ["optimizer.lr=1e-3", "model.block_groups=[1, 4, 1]"])`` changes some fields. Unknown names and wrong
types are errors, so a misspelt option never trains the wrong model for two hours.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, TypeVar

import yaml

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Arguments of ``EMMDiTTransformer2DModel``; see there for their meaning. Defaults: the lite model."""

    sample_size: int = 16
    in_channels: int = 8
    num_attention_heads: int = 6
    attention_head_dim: int = 32
    caption_channels: int = 256
    block_groups: tuple[int, ...] = (1, 8, 1)
    mlp_ratio: float = 3.0
    attention_pattern: tuple[tuple[int, int], ...] = ((1, 1), (4, 1), (1, 1), (4, 4))
    modulation: str = "adaln_affine"
    compression: bool = True
    position_reinforcement: bool = True


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """What a run trains on: cached latents of synthetic scenes, made on first use, or a folder of shards.

    ``quality="readable"`` is the lite counterpart of the paper's high-quality subset: only scenes whose stored latents,
    decoded again, are read by the verifier as exactly the objects of the scene, each in its place. It removes what the
    autoencoder blurs beyond recognition. At full scale the subset is a shorter list of folders: the paper leaves SA1B
    out.
    """

    folders: tuple[str, ...] = ()  # shards of ``nitro-e data encode``; then the fields about scenes count for nothing
    validation_folders: tuple[str, ...] = ()  # shards to validate on
    quality: str = "all"  # of scenes: "all" or "readable"
    pairs: tuple[str, ...] = ()  # train on minimal pairs that differ in these facts, see ``minimal_pairs.FACTS``
    pairs_every: int = 1  # with pairs: every how-manieth step is on pairs; the other steps are on plain scenes
    colorless: float = 0.0  # share of draws that take a caption without colours, where the scene has one
    scenes: int = 40_000  # distinct training scenes
    captions: int = 8  # paraphrases cached with each scene
    validation_scenes: int = 512  # the same ones for every seed
    seed: int = 0  # names the endless data set of scenes.sample_scene
    encoders: str = "lite"  # "lite", a pipeline folder or "full" (hub ids): autoencoder and language model


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """Optimiser and learning-rate schedule: warm-up, constant, then (if ``decay_steps``) linear to zero at the end."""

    name: str = "muon"  # "muon": Muon on the matrices inside the blocks, AdamW on the rest; or "adamw"
    lr: float = 2e-3  # AdamW
    muon_lr: float = 0.02
    momentum: float = 0.95  # Muon
    betas: tuple[float, float] = (0.9, 0.98)
    eps: float = 1e-10
    weight_decay: float = 0.01
    clip: float = 1.0  # of the global gradient norm
    warmup_steps: int = 100
    decay_steps: int = 1500  # half of the run at most
    white_text: bool = False  # the layer that takes the text features learns as if they were white


@dataclass(frozen=True, kw_only=True)
class RepaConfig:
    """Alignment with a vision model, see ``repa.py``."""

    weight: float = 0.0  # of the alignment loss; 0 switches it off
    vision: str = "lite"  # folder of a Dinov2Model or "facebook/dinov2-base"; not loaded when shards hold features
    hidden: int = 2048  # inner width of the projector


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """What every training run has, whatever it trains."""

    seed: int = 0
    steps: int = 1000
    batch_size: int = 16
    accumulate: int = 1
    precision: str = "fp32"
    log_every: int = 20
    validate_every: int = 1000
    sample_every: int = 1000
    checkpoint_every: int = 200
    keep_checkpoints: int = 1
    max_skipped: int = 0
    ema_decay: float = 0.0
    compile: str = ""
    tracker: str = "none"
    peak_tflops: float = 0.0

    def __post_init__(self):
        for name in ("steps", "batch_size", "log_every", "checkpoint_every"):
            _require(getattr(self, name) >= 1, name, getattr(self, name), ">= 1")


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """One training run of the transformer."""

    stage: str = "base"
    preset: str = "lite"
    seed: int = 0
    start_from: str = ""  # weights to start from: "lite", a pipeline folder or a transformer folder
    steps: int = 6000
    batch_size: int = 32  # global: over all processes and accumulated parts
    accumulate: int = 1  # parts in which each process works its share off, to save memory
    precision: str = "fp32"  # of the computation ("fp32" or "bf16"); master weights are float32 either way
    caption_dropout: float = 0.1  # replaced by the embedding of ""
    timestep_mean: float = 0.0  # logit-normal density of t, as published; a larger mean prefers noise
    timestep_std: float = 1.0
    ema_decay: float = 0.998
    log_every: int = 20
    validate_every: int = 250
    sample_every: int = 500
    checkpoint_every: int = 100
    keep_checkpoints: int = 2
    max_skipped: int = 20  # non-finite steps before the run stops
    guidance: float = 3.0  # of the sample grids
    shift: float = 1.0  # of their noise levels, see flow.shift_sigmas
    gradient_checkpointing: bool = False  # computes activations again instead of keeping them
    compile: str = ""  # back end of torch.compile, such as "inductor"; "" computes as written
    tracker: str = "auto"  # "tensorboard", "wandb", ... or "none"; "auto" is tensorboard when it is installed
    peak_tflops: float = 0.0  # of one device in bf16, for the utilisation; 0 looks it up in ``hardware.py``
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    repa: RepaConfig = field(default_factory=RepaConfig)

    def __post_init__(self):
        _require(self.steps >= 1, "steps", self.steps, ">= 1")
        _require(self.batch_size >= 1, "batch_size", self.batch_size, ">= 1")
        _require(self.precision in ("fp32", "bf16"), "precision", self.precision, "'fp32' or 'bf16'")
        _require(0 <= self.caption_dropout <= 1, "caption_dropout", self.caption_dropout, "in [0, 1]")
        _require(0 <= self.ema_decay < 1, "ema_decay", self.ema_decay, "in [0, 1)")
        _require(self.optimizer.name in ("muon", "adamw"), "optimizer.name", self.optimizer.name, "'muon' or 'adamw'")
        for name in ("lr", "muon_lr", "weight_decay", "warmup_steps", "decay_steps"):  # below 0 it would climb
            value = getattr(self.optimizer, name)
            _require(value >= 0, f"optimizer.{name}", value, ">= 0")
        _require(self.optimizer.clip > 0, "optimizer.clip", self.optimizer.clip, "> 0")
        _require(self.data.quality in ("all", "readable"), "data.quality", self.data.quality, "'all' or 'readable'")
        if self.data.pairs:
            _require(not self.data.folders, "data.folders", self.data.folders, "empty with data.pairs")
            _require(self.batch_size % 2 == 0, "batch_size", self.batch_size, "even with data.pairs")
            _require(self.data.scenes % 2 == 0, "data.scenes", self.data.scenes, "even with data.pairs")
        _require(self.data.pairs_every >= 1, "data.pairs_every", self.data.pairs_every, ">= 1")
        _require(0 <= self.data.colorless <= 1, "data.colorless", self.data.colorless, "in [0, 1]")
        if not self.data.folders:
            _require(self.data.scenes >= self.batch_size, "data.scenes", self.data.scenes, "at least one batch")
        _require(self.shift >= 1, "shift", self.shift, ">= 1")
        _require(self.repa.weight >= 0, "repa.weight", self.repa.weight, ">= 0")
        _require(self.peak_tflops >= 0, "peak_tflops", self.peak_tflops, ">= 0")
        _require(self.accumulate >= 1, "accumulate", self.accumulate, ">= 1")
        for name in ("log_every", "validate_every", "sample_every", "checkpoint_every", "keep_checkpoints"):
            _require(getattr(self, name) >= 1, name, getattr(self, name), ">= 1")


def _require(holds: bool, name: str, value, rule: str) -> None:
    if not holds:
        raise ValueError(f"{name}={value!r}: must be {rule}")


# The published projector, 2048 wide, would cost more than the whole lite model.
_NARROW = RepaConfig(hidden=256)

_SMOKE = TrainConfig(
    preset="smoke",
    repa=_NARROW,
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

# Lite latents say little twice: where an object lies and what it is are decided above t = 0.75. The published density
# draws 14 % of its t there, this one about half; with it the same samples teach far more. Sampling takes half of its
# steps there too. Single precision: on a Xeon without AMX forward and backward take 1.9 times as long in bf16
# (`nitro-e benchmark --transformer lite --batch 32`, with and without `--dtype bfloat16`).
_LITE = TrainConfig(timestep_mean=1.2, timestep_std=1.2, shift=3.0, repa=_NARROW)

_FULL = TrainConfig(  # stage 1 of the paper, 8 x 256 pictures a step
    preset="full",
    steps=100_000,
    batch_size=2048,
    precision="bf16",
    ema_decay=0.0,  # averaging begins with stage 2
    log_every=50,
    validate_every=2000,
    sample_every=5000,
    checkpoint_every=1000,
    keep_checkpoints=3,
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
    """Stage 2 of ``base``: the better part of its data, a third of its learning rate, without REPA."""
    return dataclasses.replace(
        base,
        stage="finetune",
        data=dataclasses.replace(base.data, **data),
        optimizer=dataclasses.replace(base.optimizer, **optimizer),
        repa=RepaConfig(),
        **changes,
    )


_THIRD = {"lr": 7e-4, "muon_lr": 7e-3}

# Two objects and counts are what lite models fail at. Half of the steps teach which words tell one scene from another,
# and captions without colours come often enough to learn that "a star and a heart" are not two of one kind.
_TWO_OBJECTS = {"pairs": ("partner", "number", "places", "colors"), "pairs_every": 2, "colorless": 0.5}
PRESETS: dict[tuple[str, str], TrainConfig] = {
    ("base", "smoke"): _SMOKE,
    ("base", "lite"): _LITE,
    ("base", "full"): _FULL,
    ("finetune", "smoke"): _finetune(_SMOKE, _THIRD, {"quality": "readable"}),
    ("finetune", "lite"): _finetune(
        _LITE,
        {"lr": 6e-4, "muon_lr": 6e-3, "warmup_steps": 50, "decay_steps": 1000, "white_text": True},
        {"quality": "readable", **_TWO_OBJECTS},
        start_from="lite",
        steps=3000,
        ema_decay=0.999,
    ),
    ("finetune", "full"): _finetune(
        _FULL, {"lr": 1e-4, "clip": 1.0}, {"folders": ("data/journeydb", "data/fluxdb")}, steps=50_000, ema_decay=0.9999
    ),
}


def preset(stage: str, name: str) -> TrainConfig:
    """The configuration called ``name`` of a training stage.

    Raises:
        ValueError: when there is none; the message lists those there are.
    """
    if (stage, name) not in PRESETS:
        known = ", ".join(f"{s}/{n}" for s, n in PRESETS)
        raise ValueError(f"preset={stage}/{name}: unknown; there are {known}")
    return PRESETS[stage, name]


def override(config: T, assignments: list[str]) -> T:
    """A copy of ``config`` with dotted fields changed.

    Args:
        config: any of the dataclasses above.
        assignments: ``"optimizer.lr=1e-3"``-like strings; the value is read as YAML.

    Raises:
        ValueError: for a string without "=", an unknown field or a value of the wrong type.
    """
    for assignment in assignments:
        path, sign, text = assignment.partition("=")
        if not sign:
            raise ValueError(f"{assignment!r}: must read field=value")
        config = _replace(config, path.strip().split("."), yaml.safe_load(text), path)
    return config


def assignments(config: TrainConfig) -> list[str]:
    """The ``override`` strings that make ``config`` out of its preset."""
    return list(_differences(preset(config.stage, config.preset), config))


def _differences(before, now, path: str = "") -> Iterator[str]:
    for item in dataclasses.fields(now):
        one, other, name = getattr(before, item.name), getattr(now, item.name), f"{path}{item.name}"
        if dataclasses.is_dataclass(other):
            yield from _differences(one, other, f"{name}.")
        elif one != other:
            yield f"{name}={json.dumps(other)}"


def _replace(config, names: list[str], value, path: str):
    known = {f.name: getattr(config, f.name) for f in dataclasses.fields(config)}
    if names[0] not in known:
        raise ValueError(f"{path}: unknown field {names[0]!r}; there are {', '.join(known)}")
    current = known[names[0]]
    if len(names) > 1:
        if not dataclasses.is_dataclass(current):
            raise ValueError(f"{path}: {names[0]!r} has no fields")
        value = _replace(current, names[1:], value, path)
    else:
        value = _coerce(value, current, path)
    return dataclasses.replace(config, **{names[0]: value})


def _coerce(value: Any, current: Any, path: str) -> Any:
    """``value`` in the type of ``current``; lists become tuples, whole numbers and "1e-3" floats, nothing ""."""
    if isinstance(current, float) and not isinstance(value, bool):
        try:
            return float(value)
        except (TypeError, ValueError):
            pass
    elif isinstance(current, tuple) and isinstance(value, list):
        return tuple(tuple(v) if isinstance(v, list) else v for v in value)
    elif type(value) is type(current):
        return value
    elif value is None and isinstance(current, str):
        return ""
    kind = "list" if isinstance(current, tuple) else type(current).__name__
    example = ["a", "b"] if current == () else current
    raise ValueError(f"{path}={value!r}: must be of type {kind}, like {json.dumps(example)}")


def to_dict(config) -> dict[str, Any]:
    """A configuration as plain JSON-able data."""
    return dataclasses.asdict(config)


def from_dict(cls: type[T], data: dict[str, Any]) -> T:
    """The inverse of ``to_dict``.

    Raises:
        ValueError: for unknown fields.
    """
    defaults = cls()
    values = {}
    for name, value in data.items():
        current = getattr(defaults, name, dataclasses.MISSING)
        if current is dataclasses.MISSING:
            raise ValueError(f"{cls.__name__}.{name}: unknown field")
        values[name] = (
            from_dict(type(current), value) if dataclasses.is_dataclass(current) else _coerce(value, current, name)
        )
    return cls(**values)
