"""Stage 4: a student that draws in four steps, without guidance, what its teacher draws in twenty with it.

Four steps of the teacher's own sampler are bad pictures: the road from noise to picture bends, and long straight steps
leave it. The student starts with the teacher's weights and learns the long steps. It learns from the teacher's pictures
alone (`data/drawn.py`): the same noise has to end at the same picture, so guidance, which costs every step twice, is
learned along with the steps. Two phases:

**1. Regress the segments.** At the noise levels `l_0 = 1 > l_1 > ... > l_K = 0` that the student's sampler visits, the
teacher's states are known. One step of the student has to do what several of the teacher did:

    loss = |x_k + (l_{k+1} - l_k) v(x_k, text, l_k) - x_{k+1}|^2 / (l_{k+1} - l_k)^2,

a velocity error like that of `pretrain.py`. It needs no second network, and after it the student draws.

**2. Adversary and regression.** A mean of many roads is a blurred road; regression cannot tell. Now the student's guess
of the picture, `x0 = x_t - t v`, is compared with the teacher's, and a discriminator (`discriminator.py`) says whether
it looks like one:

    student: adversarial_weight softplus(-D(x0)) + regression_weight smooth-L1(x0, teacher's x0)
    heads:   softplus(-D(teacher's)) + (1 - m) softplus(D(student's)) + m softplus(D(teacher's, another's caption))

The two take turns, each with its own optimiser, and what is not its turn has no gradients. `x_t` is made of the
picture's own noise, `(1 - t) x0 + t eps`: that pair is the one the teacher joined. But in use, later steps begin where
the student's earlier ones ended, faults and all; so half of the later inputs come from its own roll-out.

**Gates.** An adversarial run that fails costs hours before anyone looks. Two gates watch it, name themselves, and stop
it with what to look at: `discriminator-balance` (right too often: nothing to learn from; too rarely: it says nothing)
and `student-below-teacher` (from a quarter of the run on, the student has to be no worse than its teacher without
guidance at the same number of steps: in the distance to the teacher's pictures and, where asked, in GenEval-lite).

Source: Nitro-1 (misaligned pairs, smooth-L1, logistic loss) and LADD (arXiv 2403.12015). Differs: phase 1 is ours, it
makes an hour of two cores enough; the published learning rate, 1e-6, moves nothing in an hour; roll-outs are the
student's own, as in DMD2 (arXiv 2405.14867), without a gradient through earlier steps.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import FlowMatchEulerDiscreteScheduler
from PIL.Image import Image
from pydantic import Field
from torch import Tensor, nn

from nitro_e_lite.config import (
    AnyNumber,
    AnyText,
    Name,
    NonNegative,
    NonNegativeNumber,
    OptimizerConfig,
    Positive,
    PositiveNumber,
    RunConfig,
    Scale,
    Share,
    SigmaGrid,
    settings,
)
from nitro_e_lite.data.batches import batch_indices
from nitro_e_lite.data.drawn import DrawnSet, sampler_levels, teacher_hash
from nitro_e_lite.errors import GateFailed, InvalidValue
from nitro_e_lite.evaluation.geneval_lite import evaluate
from nitro_e_lite.inference.encoders import load_encoders
from nitro_e_lite.inference.loading import load_transformer
from nitro_e_lite.inference.pipeline import NitroEPipeline
from nitro_e_lite.model import flow
from nitro_e_lite.model.cpu_kernels import speed_up
from nitro_e_lite.model.emmdit import EMMDiTTransformer2DModel
from nitro_e_lite.model.official_weights import save_official
from nitro_e_lite.runtime import generator
from nitro_e_lite.scenes.geneval import CATEGORIES, load_prompts
from nitro_e_lite.stages.discriminator import FrozenFeatures, Heads, logistic_loss, verdict
from nitro_e_lite.training.engine import Engine, Placement, Stage, Trainable
from nitro_e_lite.training.optimizers import build_optimizers, hidden_matrices, learning_rate_scale
from nitro_e_lite.viz import image_grid

SHORTEST = 0.05  # a segment counts as at least so long: the official grid ends with one of 0.001, all rounding
OFFICIAL = "nitro-e-{size}px-dist.safetensors"  # the student in the published layout, where it has that shape


@settings
class DrawnConfig:
    """What a student learns from: folders of `nitro-e data draw`."""

    folders: Annotated[tuple[Name, ...], Field(min_length=1)] = ("data/drawn",)
    encoders: Name = "lite"  # those of the teacher: "lite", a pipeline folder or "full"
    validation_rows: Positive = 64  # the last pictures of the set are never trained on


@settings
class DistillConfig(RunConfig):
    """One distillation. The defaults are the lite recipe, meant for about an hour of two quiet cores."""

    preset: Scale = "lite"  # where the recipe began
    steps: Positive = 2000
    batch_size: Positive = 32
    ema_decay: Annotated[float, Field(ge=0, lt=1)] = 0.995
    validate_every: Positive = 250
    sample_every: Positive = 500
    checkpoint_every: Positive = 100
    keep_checkpoints: Positive = 2
    max_skipped: NonNegative = 20
    tracker: Name = "auto"
    teacher: Name = "lite"  # what drew the pictures: its features are the discriminator's
    start_from: AnyText = ""  # other weights that the student starts with; "": the teacher's
    sampler_steps: Annotated[int, Field(ge=2)] = 4  # of the student
    guidance: NonNegativeNumber = 0.0  # of the finished student's sampler; it is trained without
    shift: Annotated[float, Field(ge=1)] = 3.0  # of its noise levels
    sigma_grid: SigmaGrid = "linear"  # of its noise levels; "scheduler" is the official weights' own
    regression_share: Share = 0.75  # of the steps that are phase 1; the rest are phase 2
    adversarial_weight: NonNegativeNumber = 0.05  # 0: there is no discriminator
    regression_weight: NonNegativeNumber = 1.0
    own_rollouts: Share = 0.5  # share of the later inputs of phase 2 that come from the student's own steps
    misaligned: Share = 0.5  # share that pictures with another's caption have in what counts as fake
    depths: Annotated[tuple[Share, ...], Field(min_length=1)] = (0.1, 0.4, 0.7, 0.95)  # where heads look
    head_width: Positive = 64
    renoise_mean: AnyNumber = 0.0  # logit-normal density of the noise level at which pictures are judged
    renoise_std: PositiveNumber = 1.0
    gate_low: Share = 0.55  # the discriminator is right on a share of pictures between these,
    gate_high: Share = 0.95
    gate_window: Positive = 200  # in the mean over so many of its steps
    gate_prompts: NonNegative = 10  # GenEval-lite prompts of each category at each validation; 0: only distances
    gate_distance: PositiveNumber = 1.0  # times the teacher's own distance: the student may not be farther away
    gate_margin: Share = 0.05  # by which the student's score may be below: so few prompts have an error
    gradient_checkpointing: bool = False  # computes activations again instead of keeping them
    data: DrawnConfig = dataclasses.field(default_factory=DrawnConfig)
    optimizer: OptimizerConfig = dataclasses.field(
        default_factory=lambda: OptimizerConfig(name="adamw", lr=2e-4, warmup_steps=50, decay_steps=400)
    )
    heads: OptimizerConfig = dataclasses.field(
        default_factory=lambda: OptimizerConfig(
            name="adamw", lr=1e-3, betas=(0.0, 0.99), weight_decay=0.0, warmup_steps=0, decay_steps=0
        )
    )

    def __post_init__(self):
        rules = {
            "gate_low": (self.gate_low < self.gate_high, f"below gate_high={self.gate_high}"),
            "shift": (self.sigma_grid == "linear" or self.shift == 1, "1 with sigma_grid='scheduler'"),
        }
        for name, (holds, rule) in rules.items():
            if not holds:
                raise InvalidValue(f"{name}={getattr(self, name)!r}: must be {rule}")
        if self.adversarial_weight == 0 == self.regression_weight and self.regression_share < 1:
            raise InvalidValue("regression_weight=0.0: must be > 0 with adversarial_weight=0, else nothing is learned")

    @property
    def regression_steps(self) -> int:
        """Steps of phase 1."""
        return round(self.regression_share * self.steps)


PRESETS = {
    "smoke": DistillConfig(
        preset="smoke",
        steps=8,
        regression_share=0.5,
        batch_size=4,
        head_width=8,
        log_every=1,
        validate_every=4,
        sample_every=8,
        checkpoint_every=4,
        tracker="none",
        gate_prompts=0,
        gate_distance=1000.0,  # a few steps on a few pictures: nothing to judge
        data=DrawnConfig(validation_rows=2),
    ),
    "lite": DistillConfig(),
    "full": DistillConfig(  # 20,000 iterations on 8 devices; what else is published of stage 4 is its learning rate
        preset="full",
        steps=20_000,
        regression_share=0.0,  # as published: adversary and regression from the start
        batch_size=512,
        precision="bf16",
        ema_decay=0.0,
        log_every=50,
        validate_every=1000,
        sample_every=2000,
        checkpoint_every=500,
        keep_checkpoints=3,
        teacher="weights/Nitro-E-512px.safetensors",
        shift=1.0,
        sigma_grid="scheduler",
        adversarial_weight=1.0,
        head_width=256,
        gate_prompts=0,  # GenEval-lite is about the lite scenes
        data=DrawnConfig(encoders="full", validation_rows=512),
        optimizer=OptimizerConfig(name="adamw", lr=1e-6, betas=(0.9, 0.999), warmup_steps=0, decay_steps=0),
        heads=OptimizerConfig(name="adamw", lr=1e-6, betas=(0.9, 0.999), warmup_steps=0, decay_steps=0),
    ),
}
"""The recipes by scale. `full` has not been run."""


@dataclass(frozen=True)
class _Batch:
    """What one process works on: pictures of the teacher and all that is drawn at random for them.

    Attributes:
        states: (B, K + 1, C, H, W), from the noise to the picture.
        text: features (B, L, Dc).
        level: number of the noise level that the student is asked at (B,).
        own: whether it is reached by the student's own steps (B,).
        t, noise: at which pictures are judged, (B,) and (B, C, H, W).
        wrong: features of another picture's caption (B, L, Dc).
        differs: whether that caption is another (B,).
    """

    states: Tensor
    text: Tensor
    level: Tensor
    own: Tensor
    t: Tensor
    noise: Tensor
    wrong: Tensor
    differs: Tensor

    def microbatches(self, count: int) -> list[_Batch]:
        """The same in `count` equal parts."""
        size = len(self.text) // count
        cuts = [slice(k * size, (k + 1) * size) for k in range(count)]
        return [_Batch(**{name: value[cut] for name, value in vars(self).items()}) for cut in cuts]


class Distill(Stage):
    """A student of few steps, its teacher, and who tells their pictures apart.

    Args:
        config: what to train.
        placement: where.

    Attributes:
        student: learns.
        teacher: frozen.
        levels: the student's noise levels, and 0.
        heads: the discriminator's; None without one.

    Raises:
        FileNotFoundError: a folder of `config.data` holds no drawn pictures.
        ValueError: teacher, encoders, pictures and noise levels do not belong together.
    """

    def __init__(self, config: DistillConfig, placement: Placement):
        self.config, self.placement = config, placement
        self.encoders = load_encoders(config.data.encoders, device=placement.device, dtype=placement.dtype)
        self.drawn = DrawnSet(config.data.folders, self.encoders)
        self.rows = len(self.drawn) - config.data.validation_rows
        self.levels = [*sampler_levels(config.sampler_steps, config.shift, config.sigma_grid), 0.0]
        teacher = load_transformer(config.teacher)
        self._teacher_hash = teacher_hash(teacher)
        self._check(teacher)
        torch.manual_seed(config.seed)
        self.student = load_transformer(config.start_from) if config.start_from else load_transformer(config.teacher)
        if config.gradient_checkpointing:
            self.student.enable_gradient_checkpointing()
        self.modules = {"student": self._trained(self.student, config.optimizer, hidden_matrices(self.student))}
        self.features = FrozenFeatures(teacher, config.depths)
        self.heads = None
        if config.adversarial_weight:
            self.heads = Heads(self.features, config.head_width)
            self.modules["heads"] = self._trained(self.heads, config.heads, set())
        speed_up(teacher)
        self.teacher = nn.Module.to(teacher, placement.device, placement.dtype)
        self._levels = torch.tensor(self.levels, device=placement.device)
        self._right = torch.zeros(config.gate_window)  # share of pictures the discriminator was right on, by turn
        self._turns, self._step = 0, 0
        self._reference: dict[str, float] = {}  # what the teacher reaches without guidance
        self._ahead: tuple[int, list[_Batch]] = (-1, [])

    def _trained(self, module: nn.Module, config: OptimizerConfig, matrices: set[str]) -> Trainable:
        optimizers = partial(build_optimizers, matrices=matrices, config=config)
        return Trainable(
            module, optimizers, partial(learning_rate_scale, steps=self.config.steps, config=config), config.clip
        )

    def _check(self, teacher: EMMDiTTransformer2DModel) -> None:
        config, card, folder = self.config, self.drawn.card, self.drawn.data.folders[0]
        size = teacher.config
        for name, there in (("in_channels", self.encoders.latent_channels), ("caption_channels", self.encoders.width)):
            if size[name] != there:
                raise InvalidValue(
                    f"data.encoders={config.data.encoders!r}: give {there}, the teacher's {name} is {size[name]}"
                )
        if card["teacher"] != self._teacher_hash:
            raise InvalidValue(
                f"teacher={config.teacher!r}: {folder} was drawn by other weights; name those, or draw again"
            )
        drawn, mine = card["levels"], self.levels[:-1]
        if len(drawn) != len(mine) or not np.allclose(drawn, mine, atol=1e-6):
            raise InvalidValue(
                f"sampler_steps={config.sampler_steps}: with this shift and grid they visit {mine}, "
                f"{folder} holds states at {drawn}; draw it again for these steps"
            )
        if self.rows < config.batch_size:
            raise InvalidValue(
                f"batch_size={config.batch_size}: only {max(self.rows, 0)} of {len(self.drawn)} pictures are left "
                f"beside data.validation_rows={config.data.validation_rows}"
            )

    # -- what a step reads

    def _batch(self, step: int, part: int) -> _Batch:
        if self._ahead[0] != step:
            self._ahead = (step, self._draw(step).microbatches(len(self.placement.microbatches)))
        return self._ahead[1][part]

    def _draw(self, step: int) -> _Batch:
        """This process's rows of step `step`: a function of seed, step and row, for any number of processes."""
        config, device = self.config, self.placement.device
        mine = slice(self.placement.rows.start, self.placement.rows.stop)
        rows = batch_indices(config.seed, self.rows, config.batch_size, step)
        found, others = self.drawn.batch(rows[mine]), self.drawn.batch(np.roll(rows, -1)[mine])
        stream = partial(generator, config.seed, step)
        level = torch.randint(config.sampler_steps, (config.batch_size,), generator=stream("level"))[mine]
        own = (torch.rand(config.batch_size, generator=stream("roll-out")) < config.own_rollouts)[mine]
        t = flow.sample_timesteps(config.batch_size, stream("renoise t"), config.renoise_mean, config.renoise_std)[mine]
        shape = found.states.shape[2:]
        noise = torch.stack([torch.randn(shape, generator=stream("renoise", row)) for row in self.placement.rows])
        differs = torch.tensor([a != b for a, b in zip(found.captions, others.captions, strict=True)])
        values = (found.states, self._text(found), level, own, t, noise, self._text(others), differs)
        return _Batch(*(value.to(device) for value in values))

    def _text(self, batch) -> Tensor:
        """Text features (B, L, Dc) in the number type of the computation."""
        cut: list[int] = []  # the teacher lost the same ends and said so when it drew
        text = self.encoders.encode_text(batch.captions, cut) if batch.text is None else batch.text
        return text.to(self.placement.device, self.placement.dtype)

    # -- one step

    def losses(self, step: int, part: int) -> dict[str, dict[str, Tensor]]:
        """Phase 1: the student's segments. Phase 2: in turn the heads and the student."""
        self._step = step
        if part == 0:
            self._check_balance()
        batch = self._batch(step, part)
        if step < self.config.regression_steps:
            return {"student": self._segment_loss(batch)}
        if self.heads is not None and (step - self.config.regression_steps) % 2 == 0:
            return {"heads": self._heads_loss(batch, part)}
        return {"student": self._student_loss(batch)}

    def _velocity(self, model: nn.Module, x_t: Tensor, text: Tensor, t: Tensor) -> Tensor:
        return model(x_t.to(self.placement.dtype), text, flow.TIMESTEP_SCALE * t).sample.float()

    def _segment_loss(self, batch: _Batch) -> dict[str, Tensor]:
        """From each state of the teacher to its next, in one step; squared velocity error (B,)."""
        which, level = torch.arange(len(batch.level), device=batch.level.device), batch.level
        here, there = batch.states[which, level], batch.states[which, level + 1]  # (B, C, H, W)
        t, t_next = self._levels[level], self._levels[level + 1]
        velocity = self._velocity(self.student, here, batch.text, t)
        missed = here + flow.expand_like(t_next - t, here) * velocity - there
        return {"loss": missed.square().flatten(1).mean(1) / (t - t_next).clamp(min=SHORTEST).square()}

    @torch.no_grad()
    def walk(self, model: nn.Module, noise: Tensor, text: Tensor, until: Tensor) -> Tensor:
        """Euler steps without guidance.

        Args:
            model: student or teacher.
            noise: (B, C, H, W).
            text: features (B, L, Dc).
            until: number of the noise level to stop at, for each row (B,); K is the picture.

        Returns:
            (B, C, H, W).
        """
        x_t = noise.clone()
        for k in range(int(until.max())):
            going = (until > k).nonzero().flatten()
            velocity = self._velocity(model, x_t[going], text[going], self._levels[k].expand(len(going)))
            x_t[going] = flow.euler_step(x_t[going], velocity, self.levels[k], self.levels[k + 1])
        return x_t

    def _guess(self, batch: _Batch) -> Tensor:
        """The student's guess of the picture (B, C, H, W), at the noise levels that its sampler visits."""
        noise, latents, t = batch.states[:, 0], batch.states[:, -1], self._levels[batch.level]
        x_t = flow.interpolate(latents, noise, t)
        own = (batch.own & (batch.level > 0)).nonzero().flatten()
        if len(own):
            x_t[own] = self.walk(self.student, noise[own], batch.text[own], batch.level[own])
        return flow.to_data(x_t, self._velocity(self.student, x_t, batch.text, t), t)

    def _look(self, latents: Tensor, text: Tensor, batch: _Batch) -> list[Tensor]:
        """What the heads say of latents (B, C, H, W), noisy again; logits (B, N) of each depth."""
        noisy = flow.interpolate(latents, batch.noise, batch.t).to(self.placement.dtype)
        return self.heads(self.features(noisy, text, flow.TIMESTEP_SCALE * batch.t))

    def _student_loss(self, batch: _Batch) -> dict[str, Tensor]:
        config, guess = self.config, self._guess(batch)
        regression = F.smooth_l1_loss(guess, batch.states[:, -1], reduction="none").flatten(1).mean(1)
        if self.heads is None:
            return {"loss": config.regression_weight * regression, "regression": regression}
        with _resting(self.heads):
            adversarial = logistic_loss(self._look(guess, batch.text, batch), real=True)
        total = config.adversarial_weight * adversarial + config.regression_weight * regression
        return {"loss": total, "adversarial": adversarial, "regression": regression}

    def _heads_loss(self, batch: _Batch, part: int) -> dict[str, Tensor]:
        latents, share = batch.states[:, -1], self.config.misaligned
        with torch.no_grad():
            guess = self._guess(batch)
        with self.heads.once():
            real, fake = self._judge(latents, batch.text, batch), self._judge(guess, batch.text, batch)
            loss, told = logistic_loss(real, real=True), logistic_loss(fake, real=False)
            found = {}
            if share:
                wrong = self._judge(latents, batch.wrong, batch)
                found["right_misaligned"] = (verdict(wrong) < 0).float()
                told = torch.lerp(told, torch.where(batch.differs, logistic_loss(wrong, real=False), told), share)
        right = ((verdict(real) > 0).float() + (verdict(fake) < 0).float()) / 2  # (B,)
        self._note(right.mean().item(), part)
        return {"loss": loss + told, "right": right, **found}

    def _judge(self, latents: Tensor, text: Tensor, batch: _Batch) -> list[Tensor]:
        """As `_look`, for the heads to learn from: no gradient beyond them."""
        with torch.no_grad():
            noisy = flow.interpolate(latents, batch.noise, batch.t).to(self.placement.dtype)
            heard = self.features(noisy, text, flow.TIMESTEP_SCALE * batch.t)
        return self.heads(heard)

    # -- the gates

    def _note(self, right: float, part: int) -> None:
        """Remembers how often the discriminator was right in this turn."""
        place, parts = self._turns % len(self._right), len(self.placement.microbatches)
        self._right[place] = (0.0 if part == 0 else self._right[place]) + right / parts
        self._turns += part == parts - 1

    def _check_balance(self) -> None:
        config = self.config
        if self._turns < config.gate_window:
            return
        right = self._right.mean().item()
        if config.gate_low <= right <= config.gate_high:
            return
        if right > config.gate_high:
            advice = "it is too strong and teaches nothing: lower heads.lr or head_width, raise renoise_mean, or make "
            advice += "phase 1 longer (regression_share), so that the student's pictures are nearer to begin with"
        else:
            advice = "it is too weak and says nothing: raise heads.lr or head_width, or lower adversarial_weight"
        raise GateFailed(
            f"gate discriminator-balance, step {self._step}: right on {right:.3f} of pictures over its last "
            f"{config.gate_window} steps, must be {config.gate_low} to {config.gate_high}; {advice}"
        )

    def _check_student(self, found: dict[str, float]) -> None:
        if 4 * (self._step + 1) < self.config.steps:
            return
        problems = []
        if found["distance"] > self.config.gate_distance * found["teacher_distance"]:
            problems.append("distance to the teacher's pictures {distance:.4f}, above its own {teacher_distance:.4f}")
        if "geneval" in found and found["geneval"] < found["teacher_geneval"] - self.config.gate_margin:
            problems.append("GenEval-lite {geneval:.3f}, below its {teacher_geneval:.3f}")
        if problems:
            raise GateFailed(
                f"gate student-below-teacher, step {self._step + 1}: at {self.config.sampler_steps} steps without "
                f"guidance the student is worse than its teacher: {' and '.join(problems).format(**found)}. Look at "
                "the pictures in samples/, at student_loss (still falling? train longer, raise optimizer.lr) and at "
                "student_adversarial (rising? lower adversarial_weight)"
            )

    # -- looking at the run

    def validate(self) -> dict[str, float]:
        """Student and teacher at the same few steps without guidance; stops the run where the student is worse."""
        if not self._reference:
            self._reference = {f"teacher_{name}": value for name, value in self._measure(self.teacher).items()}
        found = self._measure(self.student) | self._reference
        self._check_student(found)
        return found

    @torch.no_grad()
    def _measure(self, model: EMMDiTTransformer2DModel) -> dict[str, float]:
        """Squared distance to the teacher's pictures never trained on and, where asked, the GenEval-lite score."""
        distances = []
        for first in range(self.rows, len(self.drawn), 32):
            batch = self.drawn.batch(range(first, min(first + 32, len(self.drawn))))
            states = batch.states.to(self.placement.device)
            until = torch.full((len(states),), self.config.sampler_steps, device=states.device)
            ends = self.walk(model, states[:, 0], self._text(batch), until)
            distances.append((ends - states[:, -1]).square().flatten(1).mean(1).cpu())
        found = {"distance": torch.cat(distances).mean().item()}
        if self.config.gate_prompts:
            prompts, each = load_prompts(), self.config.gate_prompts
            chosen = [one for tag in CATEGORIES for one in [p for p in prompts if p.tag == tag][:each]]
            found["geneval"] = evaluate(self.pipeline(model), chosen, seeds=(0,), progress=False).score.overall
        return found

    def pipeline(self, model: EMMDiTTransformer2DModel | None = None) -> NitroEPipeline:
        """Draws in few steps without guidance, with the student as it stands or another model."""
        config = self.config
        pipeline = NitroEPipeline(
            self.student if model is None else model,
            scheduler=FlowMatchEulerDiscreteScheduler(1000),
            sigma_grid=config.sigma_grid,
            default_steps=config.sampler_steps,
            default_guidance=config.guidance,
            default_shift=config.shift,
            **self.encoders.parts(),
        )
        pipeline.set_progress_bar_config(disable=True)
        return pipeline

    def picture(self) -> Image:
        """The captions of up to eight pictures never trained on."""
        rows = range(self.rows, min(self.rows + 8, len(self.drawn)))
        captions, seeds = self.drawn.batch(rows).captions, torch.Generator().manual_seed(self.config.seed)
        return image_grid(self.pipeline()(captions, generator=seeds).images, columns=4, labels=captions)

    # -- keeping the run

    def state(self) -> dict[str, Any]:
        """What was drawn by whom, the gates' memory, and what spectral norms remember."""
        facts = {"encoders": self.encoders.fingerprint, "teacher": self._teacher_hash, "rows": self.rows}
        facts |= {"turns": self._turns, "reference": self._reference, "right": self._right}
        return facts | (self.heads.kept() if self.heads is not None else {})

    def load_state(self, state: dict[str, Any]) -> None:
        """Compares pictures and encoders with those of the checkpoint, and remembers what it remembered."""
        for name, now in (
            ("encoders", self.encoders.fingerprint),
            ("teacher", self._teacher_hash),
            ("rows", self.rows),
        ):
            if state[name] != now:
                raise InvalidValue(f"{name}={now!r}: the run was started with {state[name]!r}; name another folder")
        self._turns, self._reference = state["turns"], state["reference"]
        if len(state["right"]) == len(self._right):
            self._right.copy_(state["right"])
        else:  # another window: the gate begins anew
            self._turns = 0
        if self.heads is not None:
            self.heads.restore(state)

    def data_digest(self) -> str:
        """Names the shards, their rows and which can be read."""
        return self.drawn.data.digest

    def describe(self) -> dict[str, Any]:
        """The encoders' fingerprint, by which a loader knows whether it has the right ones; who drew, and how."""
        drawn = {name: self.drawn.card[name] for name in ("teacher", "sampler", "levels", "prompts", "seed")}
        return {"encoders": self.encoders.fingerprint, "drawn": drawn | {"pictures": len(self.drawn)}}

    def export(self, weights: dict[str, dict[str, Tensor]], folder: Path) -> None:
        """The student in `save_pretrained` layout, and on the official grid in the official layout too."""
        model = EMMDiTTransformer2DModel.from_config(self.student.config)
        averaged = {name: value.cpu() for name, value in weights["student"].items()}
        model.load_state_dict({**model.state_dict(), **averaged})
        model.save_pretrained(folder)
        if self.config.sigma_grid == "scheduler":
            save_official(model, folder / OFFICIAL.format(size=32 * model.config.sample_size))


@contextmanager
def _resting(module: nn.Module) -> Iterator[None]:
    """What is computed within has no gradient for the module's own parameters, and leaves its buffers as they are."""
    module.eval().requires_grad_(False)
    try:
        yield
    finally:
        module.train().requires_grad_(True)


def distill_preset(name: str) -> DistillConfig:
    """The recipe of a scale.

    Raises:
        ValueError: there is none of that name.
    """
    if name not in PRESETS:
        raise InvalidValue(
            f"preset=distill/{name}: unknown; there are {', '.join(f'distill/{one}' for one in PRESETS)}"
        )
    return PRESETS[name]


def distill(config: DistillConfig, run_dir: str | Path, resume: bool = False, device: str | None = None) -> Path:
    """Runs the stage; see `Engine` and `Distill`. Returns the folder with the student's weights."""
    return Engine(config, Distill, run_dir, resume, device).fit()
