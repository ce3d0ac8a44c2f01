"""Every hyper-parameter, once: frozen dataclasses, presets, and overrides that refuse what they do not know.

A run is described by one ``TrainConfig``. ``preset("base", "lite")`` is the recipe of the lite model; what trained the
shipped weights is written beside them, in ``weights/lite/transformer/training.json``.
``override(config, ["optimizer.lr=1e-3", "model.block_groups=[1, 4, 1]"])`` changes some fields. Unknown names and wrong
types are errors, so a misspelt option never trains the wrong model for two hours.
"""

from __future__ import annotations

import dataclasses
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
    """What a run trains on: cached latents of synthetic scenes, made on first use."""

    scenes: int = 40_000  # distinct training scenes
    captions: int = 8  # paraphrases cached with each scene
    validation_scenes: int = 512
    seed: int = 0  # names the endless data set of scenes.sample_scene
    encoders: str = "lite"  # "lite" or a pipeline folder: gives the autoencoder and the language model


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
    decay_steps: int = 1500


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """One training run of the transformer."""

    stage: str = "base"
    preset: str = "lite"
    seed: int = 0
    start_from: str = ""  # weights to start from: "lite", a pipeline folder or a transformer folder
    steps: int = 6000
    batch_size: int = 32  # global: over all processes
    precision: str = "fp32"  # of the computation ("fp32" or "bf16"); master weights are float32 either way
    caption_dropout: float = 0.1  # replaced by the embedding of ""
    timestep_mean: float = 0.0  # logit-normal
    timestep_std: float = 1.0
    ema_decay: float = 0.998
    log_every: int = 20
    validate_every: int = 250
    sample_every: int = 500
    checkpoint_every: int = 100
    keep_checkpoints: int = 2
    max_skipped: int = 20  # non-finite steps before the run stops
    guidance: float = 3.0  # of the sample grids
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)

    def __post_init__(self):
        _require(self.steps >= 1, "steps", self.steps, ">= 1")
        _require(self.batch_size >= 1, "batch_size", self.batch_size, ">= 1")
        _require(self.precision in ("fp32", "bf16"), "precision", self.precision, "'fp32' or 'bf16'")
        _require(0 <= self.caption_dropout <= 1, "caption_dropout", self.caption_dropout, "in [0, 1]")
        _require(0 <= self.ema_decay < 1, "ema_decay", self.ema_decay, "in [0, 1)")
        _require(self.optimizer.name in ("muon", "adamw"), "optimizer.name", self.optimizer.name, "'muon' or 'adamw'")
        _require(self.data.scenes >= self.batch_size, "data.scenes", self.data.scenes, "at least one batch")
        for name in ("log_every", "validate_every", "sample_every", "checkpoint_every", "keep_checkpoints"):
            _require(getattr(self, name) >= 1, name, getattr(self, name), ">= 1")


def _require(holds: bool, name: str, value, rule: str) -> None:
    if not holds:
        raise ValueError(f"{name}={value!r}: must be {rule}")


_SMOKE = TrainConfig(
    preset="smoke",
    steps=10,
    batch_size=8,
    precision="fp32",
    log_every=1,
    validate_every=5,
    sample_every=10,
    checkpoint_every=5,
    model=ModelConfig(num_attention_heads=2, attention_head_dim=16, block_groups=(1, 1, 1)),
    data=DataConfig(scenes=32, captions=2, validation_scenes=8),
    optimizer=OptimizerConfig(warmup_steps=2, decay_steps=4),
)

PRESETS: dict[tuple[str, str], TrainConfig] = {
    ("base", "smoke"): _SMOKE,
    ("base", "lite"): TrainConfig(),
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
    """``value`` in the type of ``current``; lists become tuples, whole numbers and "1e-3" become floats."""
    if isinstance(current, float) and not isinstance(value, bool):
        try:
            return float(value)
        except (TypeError, ValueError):
            pass
    elif isinstance(current, tuple) and isinstance(value, list):
        return tuple(tuple(v) if isinstance(v, list) else v for v in value)
    elif type(value) is type(current):
        return value
    raise ValueError(f"{path}={value!r}: must be of type {type(current).__name__}, like {current!r}")


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
