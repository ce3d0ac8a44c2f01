"""Settings that cannot be wrong: frozen dataclasses in which every field says what it may hold.

A run is described by one `RunConfig`: `TrainConfig` for the stages of the transformer and `RewardConfig` for learning
from rewards, whose values stand in `presets.py`, and one beside each stage that trains an encoder. Each field declares
its bounds in its type, such as `NonNegativeNumber`, or says that it has none (`AnyNumber`, `AnyText`), and pydantic
holds every new object against them, so that a bad value ends in one line before any work: `lr=-1.0: must be >= 0`.
Nothing is converted on the way: `True` is no number, `"3"` is not 3, and what is not finite is refused. Only a whole
number may stand for a fraction.

`override(config, ["optimizer.lr=1e-3", "model.block_groups=[1, 4, 1]"])` changes some fields. Unknown names and wrong
types are errors, so a misspelt option never trains the wrong model for two hours.

The words that settings choose from (stages, precisions, facts of minimal pairs, ...) stand here too, once as a type and
once as a tuple. Importing this module imports no torch.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import re
from collections.abc import Iterator
from typing import Annotated, Any, Literal, TypeVar, dataclass_transform, get_args

import yaml
from pydantic import ConfigDict, Field, ValidationError
from pydantic.dataclasses import dataclass

from nitro_e_lite.errors import InvalidValue

T = TypeVar("T")

# -- the words that settings choose from

StageName = Literal["base", "finetune", "1024px"]  # of the transformer
RewardStageName = Literal["rewards"]  # of an adapter on it
DistillStageName = Literal["distill"]  # of a student of few steps
SprintStageName = Literal["sprint"]  # of one for any small number of steps
Scale = Literal["smoke", "lite", "full"]
Precision = Literal["fp32", "bf16", "auto"]  # of the computation
Reduction = Literal["fp32", "bf16"]  # of gradients on their way
Quality = Literal["all", "readable"]  # of training scenes
OptimizerName = Literal["muon", "adamw"]
Fact = Literal["places", "colors", "partner", "number", "shape", "color", "shapes"]  # what a minimal pair can differ in
Modulation = Literal["adaln_affine", "adaln_single", "adaln"]
SigmaGrid = Literal["linear", "scheduler"]  # how the sampler spaces its noise levels
RewardMethod = Literal["forward", "positive", "grpo"]  # how a policy learns from rewards; "positive": the control arm
NoiseRule = Literal["sde", "cps"]  # how a step of a roll-out adds noise, see `stages/rewards_grpo.py`
OldSchedule = Literal["fast", "careful"]  # how soon the old policy follows, see `stages/rewards_forward.py`
Deviation = Literal["batch", "group"]  # whose spread an advantage is divided by
AdapterTargets = Literal["attention", "attention_mlp"]  # matrices that a LoRA sits on

STAGES: tuple[str, ...] = get_args(StageName)
REWARD_STAGES: tuple[str, ...] = get_args(RewardStageName)
DISTILL_STAGES: tuple[str, ...] = get_args(DistillStageName)
SPRINT_STAGES: tuple[str, ...] = get_args(SprintStageName)
SCALES: tuple[str, ...] = get_args(Scale)
PRECISIONS: tuple[str, ...] = get_args(Precision)
REDUCTIONS: tuple[str, ...] = get_args(Reduction)
QUALITIES: tuple[str, ...] = get_args(Quality)
OPTIMIZERS: tuple[str, ...] = get_args(OptimizerName)
FACTS: tuple[str, ...] = get_args(Fact)
MODULATIONS: tuple[str, ...] = get_args(Modulation)
SIGMA_GRIDS: tuple[str, ...] = get_args(SigmaGrid)
REWARD_METHODS: tuple[str, ...] = get_args(RewardMethod)
NOISE_RULES: tuple[str, ...] = get_args(NoiseRule)
OLD_SCHEDULES: tuple[str, ...] = get_args(OldSchedule)
DEVIATIONS: tuple[str, ...] = get_args(Deviation)
ADAPTER_TARGETS: tuple[str, ...] = get_args(AdapterTargets)

# -- what a field may hold

FREE = "every value of the type is allowed"  # in an Annotated: says so on purpose
LARGEST = 2**63 - 1
Positive = Annotated[int, Field(ge=1, le=LARGEST)]
NonNegative = Annotated[int, Field(ge=0, le=LARGEST)]
Seed = Annotated[int, Field(ge=0, lt=2**32)]  # what every library's generator takes
PositiveNumber = Annotated[float, Field(gt=0)]
NonNegativeNumber = Annotated[float, Field(ge=0)]
MAX_SHIFT = 1000.0  # there even the last of twenty steps begins at 98 % noise
Shift = Annotated[float, Field(ge=1, le=MAX_SHIFT)]
Share = Annotated[float, Field(ge=0, le=1)]
Decay = Annotated[float, Field(ge=0, lt=1)]  # of a running average: what is kept at each step
AnyNumber = Annotated[float, FREE]  # finite
AnyText = Annotated[str, FREE]
Name = Annotated[str, Field(min_length=1)]


@dataclass_transform(frozen_default=True, kw_only_default=True)
def settings(cls: type[T]) -> type[T]:
    """Makes `cls` a frozen dataclass with keywords only, whose values are held against their declarations.

    Raises:
        ValueError: when an object is made with a value that its field does not allow, or with an unknown field. The
            message is one line, `field=value: must be ...`.
    """
    rules = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False, validate_default=True)
    made = dataclass(cls, frozen=True, kw_only=True, config=rules)
    checked = made.__init__

    @functools.wraps(checked)
    def __init__(self, **values):
        try:
            checked(self, **values)
        except ValidationError as error:
            raise InvalidValue(_explain(error, self)) from None

    made.__init__ = __init__
    return made


_RULES = {
    "greater_than_equal": ">= {ge}",
    "greater_than": "> {gt}",
    "less_than_equal": "<= {le}",
    "less_than": "< {lt}",
    "finite_number": "a finite number",
    "string_too_short": "at least {min_length} character long",
    "too_short": "at least {min_length} long",
    "too_long": "at most {max_length} long",
    "dataclass_exact_type": "of type {class_name}",
}


def _explain(error: ValidationError, config: Any) -> str:
    """The first thing that pydantic found wrong, in one line: `betas[1]=1.2: must be < 1`."""
    first = error.errors(include_url=False)[0]
    kind, context = first["type"], first.get("ctx", {})
    if kind == "value_error":  # of a __post_init__, which says it all
        return str(context["error"])
    name = "".join(f"[{part}]" if isinstance(part, int) else part for part in first["loc"])
    if kind == "unexpected_keyword_argument":
        return f"{name}: unknown field; there are {', '.join(field.name for field in dataclasses.fields(config))}"
    if kind == "missing":  # an element of a pair
        return f"{name}: is missing"
    if kind == "literal_error":
        rule = "one of " + ", ".join(re.findall("'([^']*)'", context["expected"]))
    elif kind.endswith("_type") and kind not in _RULES:
        rule = f"of type {kind.removesuffix('_type').replace('string', 'str')}"
    else:
        rule = _RULES.get(kind, f"valid ({first['msg']})").format(**{k: _number(v) for k, v in context.items()})
    return f"{name}={first['input']!r}: must be {rule}"


def _number(value: Any) -> Any:
    return int(value) if isinstance(value, float) and value.is_integer() else value


# -- the settings


@settings
class RunConfig:
    """What every training run has, whatever it trains."""

    seed: Seed = 0
    steps: Positive = 1000
    batch_size: Positive = 16  # global: over all processes and accumulated parts
    accumulate: Positive = 1  # parts in which each process works its rows off, to save memory
    precision: Precision = "fp32"  # of the computation, "auto" measures; masters are float32
    reduction: Reduction = "fp32"  # in which gradients travel between processes
    ema_decay: Decay = 0.0  # of the average of the weights, per step; 0: the average is the weights
    log_every: Positive = 20  # steps, like the next three
    validate_every: Positive = 1000
    sample_every: Positive = 1000
    checkpoint_every: Positive = 200
    keep_checkpoints: Positive = 1
    checkpoint_minutes: NonNegativeNumber = 0.0  # a checkpoint is due after this long too; 0: by steps alone
    snapshot_every: NonNegative = 0  # steps between copies of the average, in bf16, that stay; 0: none
    milestones: tuple[Positive, ...] = ()  # steps at which the average is judged, see `training/milestones.py`
    validation_share: Share = 1.0  # of the run's time that validation may take; what would take more is left out
    max_skipped: NonNegative = 0  # steps left out in a row before the run saves and gives up
    spike_factor: NonNegativeNumber = 0.0  # a loss this many times its running mean is left out; 0: none is
    patience: PositiveNumber = 10.0  # minutes that processes wait for one another once training has begun
    compile: AnyText = ""  # back end of torch.compile, such as "inductor"; "" computes as written
    tracker: Name = "none"  # "tensorboard", "wandb", ... or "none"; "auto" is tensorboard when it is installed
    peak_tflops: NonNegativeNumber = 0.0  # of one device in bf16, for the utilisation of stages 1 and 2; 0: `flops.py`


@settings
class ModelConfig:
    """Arguments of `EMMDiTTransformer2DModel`; see there for their meaning. Defaults: the lite model."""

    sample_size: Positive = 16
    in_channels: Positive = 8
    num_attention_heads: Positive = 6
    attention_head_dim: Positive = 32
    caption_channels: Positive = 256
    block_groups: Annotated[tuple[Positive, ...], Field(min_length=1)] = (1, 8, 1)
    mlp_ratio: PositiveNumber = 3.0
    attention_pattern: Annotated[tuple[tuple[Positive, Positive], ...], Field(min_length=1)] = (
        (1, 1),
        (4, 1),
        (1, 1),
        (4, 4),
    )
    modulation: Modulation = "adaln_affine"
    compression: bool = True
    position_reinforcement: bool = True
    qk_norm: bool = True


@settings
class DataConfig:
    """What a run trains on: cached latents of synthetic scenes, made on first use, or a folder of shards.

    `quality="readable"` is the lite counterpart of the paper's high-quality subset: only scenes whose stored latents,
    decoded again, are read by the verifier as exactly the objects of the scene, each in its place. It removes what the
    autoencoder blurs beyond recognition. At full scale the subset is a shorter list of folders: the paper leaves SA1B
    out.
    """

    folders: tuple[Name, ...] = ()  # shards of `nitro-e data encode`; then the fields about scenes count for nothing
    validation_folders: tuple[Name, ...] = ()  # shards to validate on
    quality: Quality = "all"  # of scenes
    pairs: tuple[Fact, ...] = ()  # train on minimal pairs that differ in these facts, see `minimal_pairs.py`
    pairs_every: Positive = 1  # with pairs: one step in this many is on pairs; the other steps are on plain scenes
    colorless: Share = 0.0  # share of draws that take a caption without colours, where the scene has one
    scenes: Positive = 40_000  # distinct training scenes
    captions: Positive = 8  # paraphrases cached with each scene
    validation_scenes: Positive = 512  # the same ones for every seed
    validation_rows: Positive = 8192  # the first ones that are validated on, of scenes and of folders
    seed: Seed = 0  # names the endless data set of `sample_scene`
    encoders: Name = "lite"  # "lite", a pipeline folder or "full" (hub ids): autoencoder and language model


@settings
class OptimizerConfig:
    """Optimiser and learning-rate schedule: warm-up, constant, then (if `decay_steps`) linear to zero at the end."""

    name: OptimizerName = "muon"  # "muon": Muon on the matrices inside the blocks, AdamW on the rest; or "adamw"
    lr: NonNegativeNumber = 2e-3  # AdamW; below 0 it would climb
    muon_lr: NonNegativeNumber = 0.02
    momentum: Decay = 0.95  # Muon
    betas: tuple[Decay, Decay] = (0.9, 0.98)
    eps: NonNegativeNumber = 1e-10
    weight_decay: NonNegativeNumber = 0.01
    clip: PositiveNumber = 1.0  # of the global gradient norm
    warmup_steps: NonNegative = 100
    decay_steps: NonNegative = 1500  # half of the run at most
    whiten_text_input: bool = False  # the layer that takes the text features learns as if they were white


@settings
class RepaConfig:
    """Alignment with a vision model, see `inference/vision.py`."""

    weight: NonNegativeNumber = 0.0  # of the alignment loss; 0 switches it off
    vision: Name = "lite"  # folder of a Dinov2Model or "facebook/dinov2-base"; not loaded when shards hold features
    hidden: Positive = 2048  # inner width of the projector


@settings
class LoraConfig:
    """A LoRA to train in place of the whole model: `W + alpha / rank * B A`."""

    rank: NonNegative = 0  # 0: the whole model
    alpha: PositiveNumber = 16.0
    targets: AdapterTargets = "attention"


@settings
class TrainConfig(RunConfig):
    """One training run of the transformer."""

    stage: StageName = "base"
    preset: Scale = "lite"  # where the recipe began
    steps: Positive = 6000
    batch_size: Positive = 32
    ema_decay: Decay = 0.998
    validate_every: Positive = 250
    sample_every: Positive = 500
    checkpoint_every: Positive = 100
    keep_checkpoints: Positive = 2
    max_skipped: NonNegative = 20
    tracker: Name = "auto"
    start_from: AnyText = ""  # weights to start from: "lite", a pipeline folder or a transformer folder
    caption_dropout: Share = 0.1  # replaced by the embedding of ""
    timestep_mean: AnyNumber = 0.0  # logit-normal density of t, as published; a larger mean prefers noise
    timestep_std: PositiveNumber = 1.0
    guidance: NonNegativeNumber = 3.0  # of the sample grids; up to 1 there is none
    shift: Shift = 1.0  # of their noise levels, see `flow.shift_sigmas`
    gradient_checkpointing: bool = False  # computes activations again instead of keeping them
    model: ModelConfig = dataclasses.field(default_factory=ModelConfig)
    data: DataConfig = dataclasses.field(default_factory=DataConfig)
    optimizer: OptimizerConfig = dataclasses.field(default_factory=OptimizerConfig)
    repa: RepaConfig = dataclasses.field(default_factory=RepaConfig)
    lora: LoraConfig = dataclasses.field(default_factory=LoraConfig)

    def __post_init__(self):
        if self.data.pairs:
            hint = "empty with data.pairs, which are of scenes (--set data.pairs=[] to train on folders)"
            _require(not self.data.folders, "data.folders", self.data.folders, hint)
            _require(self.batch_size % 2 == 0, "batch_size", self.batch_size, "even with data.pairs")
            _require(self.data.scenes % 2 == 0, "data.scenes", self.data.scenes, "even with data.pairs")
        if not self.data.folders:
            _require(self.data.scenes >= self.batch_size, "data.scenes", self.data.scenes, "at least one batch")


@settings
class AdapterConfig:
    """A LoRA: `W + alpha / rank * B A`, the only thing that learning from rewards changes."""

    rank: Positive = 32
    alpha: PositiveNumber = 64.0
    targets: AdapterTargets = "attention_mlp"  # published: "attention"


@settings
class ForwardConfig:
    """Forward-process RL, see `stages/rewards_forward.py`."""

    beta: PositiveNumber = 1.0  # how far the two implicit policies lie from the old one
    times: Positive = 2  # noise levels at which an update looks at a picture
    reference_weight: NonNegativeNumber = 1e-4  # of the distance from the model without adapter
    old_schedule: OldSchedule = "fast"
    old_length: NonNegative = 1000  # updates that the schedule was made for; it is scaled to `steps`; 0: as published


@settings
class GrpoConfig:
    """Flow-GRPO, see `stages/rewards_grpo.py`."""

    rule: NoiseRule = "cps"
    noise: Annotated[float, Field(ge=0, le=1)] = (
        0.8  # a; 0.7 with "sde"; 0 is the ODE, which has no density to learn by
    )
    window: Positive = 3  # steps with noise, one after the other; the others are of the ODE
    window_range: Positive = 5  # the window lies somewhere in the first steps, this many
    branch: bool = False  # a group shares its noise and its way to the window: what differs is the window's noise
    clip: PositiveNumber = 1e-4  # of the ratio; made for log-probabilities that are a mean over numbers
    kl: NonNegativeNumber = 0.0  # beta of the distance from the model without adapter; 0 does not measure it


@settings
class RewardConfig(RunConfig):
    """One run in which a text-to-image model learns from rewards.

    A roll-out draws `updates * batch_size` pictures, `group` for each prompt; the next `updates` steps learn from them,
    `batch_size` pictures each.
    """

    stage: RewardStageName = "rewards"
    preset: Scale = "lite"
    method: RewardMethod = "forward"
    steps: Positive = 80
    batch_size: Positive = 96
    ema_decay: Decay = 0.9  # what is evaluated and shipped
    log_every: Positive = 2
    validate_every: Positive = 20
    sample_every: Positive = 20
    checkpoint_every: Positive = 2
    max_skipped: NonNegative = 2
    start_from: Name = "lite"  # any source of `load_pipeline`, with its encoders
    updates: Positive = 2  # steps that learn from one roll-out
    group: Annotated[int, Field(ge=2)] = 12  # pictures of one prompt
    prompts: AnyText = ""  # JSON lines in GenEval's schema; "": new ones from the caption grammar
    prompt_floor: PositiveNumber = 0.05  # kinds of prompt are drawn in proportion to p (1 - p) + this
    pass_memory: Decay = 0.8  # of the running pass rate p of a kind, per roll-out
    rollout_steps: Positive = 10
    guidance: NonNegativeNumber = 0.0  # in roll-outs and updates; up to 1 there is none
    shift: Shift = 3.0
    rewards: Annotated[tuple[tuple[Name, PositiveNumber], ...], Field(min_length=1)] = (
        ("geneval", 0.7),  # name and weight; a name may be the address of a server, http://HOST:PORT
        ("partial", 0.3),
    )
    watch: tuple[Name, ...] = ()  # judges by name or address that see held-out pictures and never pay
    normalize_rewards: bool = False  # each to unit spread before they are added
    advantage_clip: PositiveNumber = 5.0
    deviation: Deviation = "batch"
    drop_flat_groups: bool = True  # groups without spread teach nothing; False keeps them
    reward_timeout: PositiveNumber = 60.0  # seconds that a reward server has for a batch
    reward_retries: NonNegative = 3
    reward_batch: Positive = 16  # pictures in one request
    validation_prompts: Positive = 10  # held-out prompts of each category
    stop_drop: NonNegativeNumber = 0.1  # the run ends when its held-out score is surely so far below its best; 0: never
    stop_diversity: Share = 0.7  # and when less than this share of the distance inside groups is left
    adapter: AdapterConfig = dataclasses.field(default_factory=AdapterConfig)
    optimizer: OptimizerConfig = dataclasses.field(
        default_factory=lambda: OptimizerConfig(
            name="adamw", lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=1e-4, warmup_steps=0, decay_steps=0
        )
    )
    forward: ForwardConfig = dataclasses.field(default_factory=ForwardConfig)
    grpo: GrpoConfig = dataclasses.field(default_factory=GrpoConfig)

    def __post_init__(self):
        pictures, grpo = self.updates * self.batch_size, self.grpo
        _require(pictures % self.group == 0, "group", self.group, f"a divisor of updates * batch_size = {pictures}")
        names = [name for name, _ in self.rewards]
        _require(len(set(names)) == len(names), "rewards", self.rewards, "each there once")
        both = [name for name in self.watch if name in names or self.watch.count(name) > 1]
        _require(not both, "watch", self.watch, "judges that are no rewards, each there once")
        _require(not self.optimizer.whiten_text_input, "optimizer.whiten_text_input", True, "false for an adapter")
        if self.method == "grpo":
            rule = "0 with method='grpo', whose loss lies around zero"
            _require(self.spike_factor == 0, "spike_factor", self.spike_factor, rule)
            _require(grpo.noise > 0, "grpo.noise", grpo.noise, "> 0 to learn by: the ODE has no density")
            _require(grpo.window <= grpo.window_range, "grpo.window", grpo.window, "at most grpo.window_range")
            last = f"below rollout_steps={self.rollout_steps}: the last step adds no noise"
            _require(grpo.window_range < self.rollout_steps, "grpo.window_range", grpo.window_range, last)


@settings
class DrawnConfig:
    """What a student learns from: folders of `nitro-e data draw`."""

    folders: Annotated[tuple[Name, ...], Field(min_length=1)] = ("data/drawn",)
    encoders: Name = "lite"  # those of the teacher: "lite", a pipeline folder or "full"
    validation_rows: Positive = 64  # the last pictures of the set are never trained on
    verified: bool = False  # pictures that the verifier finds wrong are left out; it reads lite scenes


_HEADS = {"name": "adamw", "lr": 1e-3, "betas": (0.0, 0.99), "weight_decay": 0.0, "warmup_steps": 0, "decay_steps": 0}


@settings
class StudentConfig(RunConfig):
    """What every student of few steps has: a teacher, its pictures, a discriminator and gates. Defaults: lite."""

    preset: Scale = "lite"  # where the recipe began
    steps: Positive = 2000
    batch_size: Positive = 32
    ema_decay: Decay = 0.995
    validate_every: Positive = 250
    sample_every: Positive = 500
    checkpoint_every: Positive = 100
    keep_checkpoints: Positive = 2
    max_skipped: NonNegative = 20
    tracker: Name = "auto"
    teacher: Name = "lite"  # what drew the pictures: its features are the discriminator's
    adversarial_weight: NonNegativeNumber = 0.05  # 0: there is no discriminator
    misaligned: Share = 0.5  # share that pictures with another's caption have in what counts as fake
    depths: Annotated[tuple[Share, ...], Field(min_length=1)] = (0.1, 0.4, 0.7, 0.95)  # where heads look
    head_width: Positive = 64
    gate_low: Share = 0.55  # the discriminator is right on a share of pictures between these,
    gate_high: Share = 0.95
    gate_window: Positive = 200  # in the mean over so many of its steps
    gate_pictures: NonNegative = 300  # of the drawn set are scored before the first step; 0: none
    gate_card: Share = 0.84  # the teacher's own GenEval-lite: what is drawn may not score below
    gate_prompts: NonNegative = 10  # GenEval-lite prompts of each category at each validation; 0: only distances
    gate_margin: Share = 0.05  # by which the student's score may be below its teacher's: so few prompts have an error
    gate_distance: PositiveNumber = 1.0  # where no score decides: how much farther away it may be, times the teacher's
    gradient_checkpointing: bool = False  # computes activations again instead of keeping them
    data: DrawnConfig = dataclasses.field(default_factory=DrawnConfig)
    optimizer: OptimizerConfig = dataclasses.field(
        default_factory=lambda: OptimizerConfig(name="adamw", lr=2e-4, warmup_steps=50, decay_steps=400)
    )
    heads: OptimizerConfig = dataclasses.field(default_factory=lambda: OptimizerConfig(**_HEADS))

    def __post_init__(self):
        _require(self.gate_low < self.gate_high, "gate_low", self.gate_low, f"below gate_high={self.gate_high}")
        _require(self.heads.name == "adamw", "heads.name", self.heads.name, "adamw: heads have no matrices for Muon")
        for name in ("optimizer", "heads"):
            white = getattr(self, name).whiten_text_input
            _require(not white, f"{name}.whiten_text_input", white, "false for a student: it starts with its teacher's")


@settings
class DistillConfig(StudentConfig):
    """One distillation, see `stages/distill.py`. The defaults are meant for about an hour of two quiet cores."""

    stage: DistillStageName = "distill"
    start_from: AnyText = ""  # other weights that the student starts with; "": the teacher's
    sampler_steps: Annotated[int, Field(ge=2)] = 4  # of the student
    guidance: NonNegativeNumber = 0.0  # of the finished student's sampler; it is trained without
    shift: Shift = 3.0  # of its noise levels
    sigma_grid: SigmaGrid = "linear"  # of its noise levels; "scheduler" is the official weights' own
    jumps: bool = False  # every step aims at the picture, and the sampler puts fresh noise back; else at its next level
    regression_share: Share = 0.75  # of the steps that are phase 1; the rest are phase 2
    regression_weight: NonNegativeNumber = 1.0
    own_rollouts: Share = 0.5  # share of the later inputs of phase 2 that come from the student's own steps
    renoise_mean: AnyNumber = 0.0  # logit-normal density of the noise level at which pictures are judged
    renoise_std: PositiveNumber = 1.0

    def __post_init__(self):
        super().__post_init__()
        _check_grid(self)
        learns = self.adversarial_weight > 0 or self.regression_weight > 0 or self.regression_share == 1
        rule = "> 0 with adversarial_weight=0, else nothing is learned"
        _require(learns, "regression_weight", self.regression_weight, rule)

    @property
    def regression_steps(self) -> int:
        """Steps of phase 1."""
        return round(self.regression_share * self.steps)


@settings
class SprintConfig(StudentConfig):
    """One SANA-Sprint, see `stages/sprint.py`. The defaults are meant for a few hours of two quiet cores."""

    stage: SprintStageName = "sprint"
    start_from: AnyText = ""  # other weights that the student starts with; "": the teacher's
    steps: Positive = 8000
    batch_size: Positive = 24
    shift: Shift = 1.6  # of the noise levels at which its sampler stops
    sigma_grid: SigmaGrid = "linear"  # of those; "scheduler": the published times
    sampler_steps: Positive = 2  # of a call that names none; the student can draw in any small number
    guidance: NonNegativeNumber = 3.0  # what a call without it tells the student
    guidances: Annotated[tuple[PositiveNumber, ...], Field(min_length=1)] = (2.0, 3.0, 4.0)  # that it learns
    guidance_embedding: bool = True  # the student is told which; False: it learns `guidance` alone
    dense_time: bool = True  # the network is told the noise level in [0, 1], not in [0, 1000]
    embedding_steps: NonNegative = 1500  # before the first: the new embedding alone learns to say what the old one said
    finetune_share: Share = 0.0  # of the steps: phase 1, the whole student learns to be told so; published: 5,000 steps
    consistency_weight: NonNegativeNumber = 1.0
    road_weight: NonNegativeNumber = 1.0  # of jumps from a picture's own road to that picture; published: none
    road_share: Share = 0.4  # of the steps after phase 1: such jumps alone, before consistency and adversary join
    adversarial_weight: NonNegativeNumber = 0.5
    tangent_warmup: Share = 0.15  # of the steps from there on: the tangent comes in; published: 4,000 steps
    tangent_constant: NonNegativeNumber = 0.1  # c of g / (|g| + c)
    normalize_tangent: bool = True
    consistency_mean: AnyNumber = 0.2  # of log sigma, where consistency is asked for
    consistency_std: PositiveNumber = 1.6
    judged_mean: AnyNumber = -0.6  # of log sigma, where the student draws for the discriminator, which looks there too
    judged_std: PositiveNumber = 1.0
    max_time: Share = 0.5  # share of what is drawn for the discriminator that begins at pure noise
    gate_finetune: PositiveNumber = 0.1  # the fine-tuned teacher may be so far from before, of its own error
    optimizer: OptimizerConfig = dataclasses.field(
        default_factory=lambda: OptimizerConfig(name="adamw", lr=2e-4, clip=0.1, warmup_steps=100, decay_steps=1500)
    )

    def __post_init__(self):
        super().__post_init__()
        _check_grid(self)
        _require(not self.compile, "compile", self.compile, "empty: the tangent of this student is not compiled")
        alone = not (self.start_from and self.finetune_share)
        _require(alone, "finetune_share", self.finetune_share, "0 with start_from: such a student answers otherwise")
        losses = self.consistency_weight + self.road_weight + self.adversarial_weight
        _require(losses > 0, "consistency_weight", self.consistency_weight, "> 0 with all others at 0")

    @property
    def finetune_steps(self) -> int:
        """Steps of phase 1; without a new embedding there is nothing to do before phase 2."""
        return round(self.finetune_share * self.steps) if self.dense_time else 0

    @property
    def joining_step(self) -> int:
        """From here on consistency and adversary are asked for."""
        share = self.road_share if self.road_weight else 0.0
        return self.finetune_steps + round(share * (self.steps - self.finetune_steps))

    @property
    def warmup_steps(self) -> int:
        """Steps in which the tangent is let in."""
        return max(1, round(self.tangent_warmup * (self.steps - self.joining_step)))


def _check_grid(config: DistillConfig | SprintConfig) -> None:
    even = config.sigma_grid == "linear" or config.shift == 1
    _require(even, "shift", config.shift, "1 with sigma_grid='scheduler'")


def _require(holds: bool, name: str, value, rule: str) -> None:
    if not holds:
        raise InvalidValue(f"{name}={value!r}: must be {rule}")


# -- changing them, and plain data


def override(config: T, assignments: list[str]) -> T:
    """A copy of `config` with dotted fields changed.

    Args:
        config: any of the dataclasses above, or another frozen dataclass; of such only the types are checked.
        assignments: `"optimizer.lr=1e-3"`-like strings; the value is read as YAML. A list becomes a tuple, a whole
            number or a text like "1e-3" a fraction where one stands now, and nothing the empty text.

    Raises:
        ValueError: for a string without "=", an unknown field or a value that the field does not allow.
    """
    changes: dict[str, Any] = {}  # by field, and for a field that has fields itself a dict of those
    for assignment in assignments:
        path, sign, text = assignment.partition("=")
        if not sign:
            raise InvalidValue(f"{assignment!r}: must read field=value")
        _note(changes, config, path.strip().split("."), read_value(path.strip(), text), path.strip())
    return _change(config, changes, "")


def read_value(name: str, text: str) -> Any:
    """What a person wrote behind "name=", as YAML.

    Raises:
        ValueError: it is no YAML, or asks for an object of Python.
    """
    try:
        return yaml.safe_load(text)
    except (yaml.YAMLError, RecursionError) as error:
        reason = getattr(error, "problem", None) or "brackets within brackets, too deep to read"
        raise InvalidValue(f"{name}={text[:60]}: cannot be read ({reason}); put a text in quotes") from None


def differences(before: T, now: T) -> list[str]:
    """The `override` strings that make `now` out of `before`."""
    return list(_differences(before, now))


def _differences(before, now, path: str = "") -> Iterator[str]:
    for item in dataclasses.fields(now):
        one, other, name = getattr(before, item.name), getattr(now, item.name), f"{path}{item.name}"
        if dataclasses.is_dataclass(other):
            yield from _differences(one, other, f"{name}.")
        elif one != other:
            yield f"{name}={json.dumps(other)}"


def _note(changes: dict[str, Any], config, names: list[str], value, path: str) -> None:
    """Puts one assignment into `changes`; `path` is where the field lies, from the top."""
    name, *deeper = names
    known = [field.name for field in dataclasses.fields(config)]
    if name not in known:
        raise InvalidValue(f"{path}: unknown field {name!r}; there are {', '.join(known)}")
    current = getattr(config, name)
    if not deeper:
        changes[name] = _coerce(value, current, path)
    elif dataclasses.is_dataclass(current):
        _note(changes.setdefault(name, {}), current, deeper, value, path)
    else:
        raise InvalidValue(f"{path}: {name!r} has no fields")


def _change(config: T, changes: dict[str, Any], above: str) -> T:
    """`config` with all changes at once, since fields may fit together only then; `above` leads here from the top."""
    fields = {name: getattr(config, name) for name in changes}
    values = {
        name: _change(fields[name], value, f"{above}{name}.") if dataclasses.is_dataclass(fields[name]) else value
        for name, value in changes.items()
    }
    return _make(functools.partial(dataclasses.replace, config), values, above)


def _make(make, values: dict[str, Any], path: str):
    """`make(**values)`; a message about one of the values gets the path to it."""
    try:
        return make(**values)
    except ValueError as error:
        raise InvalidValue(f"{path}{error}") from None


def _coerce(value: Any, current: Any, path: str) -> Any:
    """`value` in the type of `current`; lists become tuples, whole numbers and "1e-3" floats, nothing ""."""
    found = "" if value is None and isinstance(current, str) else _read(value, current)
    if type(found) is type(current):
        return found
    kind = "list" if isinstance(current, tuple) else type(current).__name__
    example = to_dict(current) if dataclasses.is_dataclass(current) else ["a", "b"] if current == () else current
    raise InvalidValue(f"{path}={value!r}: must be of type {kind}, like {json.dumps(example)}")


def _read(value: Any, like: Any) -> Any:
    """What YAML or JSON write differently: a list for a tuple, 1 or "1e-3" for a fraction."""
    if isinstance(value, list) and (like is None or isinstance(like, tuple)):
        return tuple(_read(one, like[0] if like else None) for one in value)
    if isinstance(like, float) and isinstance(value, (int, str)) and not isinstance(value, bool):
        try:
            return float(value) if math.isfinite(float(value)) else value
        except (OverflowError, ValueError):
            pass
    return value


def to_dict(config) -> dict[str, Any]:
    """A configuration as plain JSON-able data."""
    return dataclasses.asdict(config)


def from_dict(cls: type[T], data: dict[str, Any]) -> T:
    """The inverse of `to_dict`.

    Raises:
        ValueError: for unknown fields, and values that a field does not allow.
    """
    return _from_dict(cls, data, "")


def _from_dict(cls: type[T], data: dict[str, Any], path: str) -> T:
    defaults, values = cls(), {}
    known = {field.name for field in dataclasses.fields(cls)}
    for name, value in data.items():
        if name not in known:
            raise InvalidValue(f"{cls.__name__}.{name}: unknown field")
        current = getattr(defaults, name)
        if dataclasses.is_dataclass(current) and isinstance(value, dict):
            values[name] = _from_dict(type(current), value, f"{path}{name}.")
        else:
            values[name] = _coerce(value, current, f"{path}{name}")
    return _make(cls, values, path)
