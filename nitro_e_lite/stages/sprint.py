"""SANA-Sprint: one student that draws in 1, 2 or 4 steps, by consistency and an adversary.

`distill.py` makes a student of *four* steps. A consistency model jumps from any point of a road straight to its end, so
one model draws in any small number of steps. On the circle of `trigflow.py`, with `F` the network's answer, that is

    s_d x0 = cos(t) x_t - sin(t) s_d F(x_t, t)          the same for all t of one road.

Its derivative along the road is zero. Three things follow one another in a run:

**1. A dense time embedding.** That derivative contains the network's own by t. Told `1000 s`, its sinusoid turns a
thousand times faster than needed, and the tangent is mostly that. So the student, which starts as the teacher, is told
s in [0, 1]. Before the first step its new embedding alone learns to say what the old one said, which takes no pass of
the transformer. Then, where a share of the run is left for it, the student learns to answer as before, and is from
there on the teacher of phase 2 too, frozen.

**2. Continuous-time consistency (sCM).** With the road's direction `dxdt = s_d F_teacher` (guided), F- the student's
answer and F' = cos(t) sin(t) dF/dt, both without gradient, from one pass of forward differentiation,

    g = -cos^2(t) (s_d F- - dxdt) - r (cos(t) sin(t) x_t + s_d F'),       g <- g / (|g| + c),
    loss = mean of (F - F- - g)^2 / (s_d tan(t)) / exp(u(t)) + u(t).

r rises from 0 to 1: without it the student only follows the teacher's velocity, with it jumps agree. Normalised, one
wild tangent cannot throw the weights away. `u` learns how hard each t is; it begins at -log(s_d tan(t)), near which it
ends, so that the longest jumps count in a short run too. The student is told the guidance w, so that a step costs one
pass.

**3. An adversary (LADD), in turn.** Consistency of long jumps is learned from short ones and blurs on the way. The
heads of `discriminator.py` look at `x0` from a t of their own, half of the time from pure noise, where one-step drawing
begins:

    student: -D(x0),       heads: relu(1 - D(teacher's)) + relu(1 + D(student's)).

**4. Ends of roads.** The drawn set knows more than pictures: the noise of each and states on its way. A jump from there
should end at that picture: `road = |x0 - end|^2`. Such jumps are learned alone at first, which is cheap and gives the
longest jump a target long before short ones have told it anything; later they are what the heads are shown.

Source: SANA-Sprint arXiv 2503.09641; sCM arXiv 2410.11081; LADD arXiv 2403.12015. Differs: 4 is ours; the embedding
is learned from the teacher's own answers, not from data; real pictures are the teacher's; the warm-up of r is a share
of the run (published: 4,000 steps); u does not begin at 0; the discriminator's features are those of the teacher before
the new embedding.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, SCMScheduler
from torch import Tensor, nn

from nitro_e_lite.config import SprintConfig
from nitro_e_lite.inference.pipeline import NitroEPipeline
from nitro_e_lite.model import flow, trigflow
from nitro_e_lite.model.blocks import TimeEmbedding
from nitro_e_lite.model.cpu_kernels import speed_up
from nitro_e_lite.model.emmdit import EMMDiTTransformer2DModel
from nitro_e_lite.model.flow import expand_like
from nitro_e_lite.model.trigflow import SIGMA_DATA
from nitro_e_lite.runtime import generator
from nitro_e_lite.stages.discriminator import hinge_loss, raised, verdict
from nitro_e_lite.stages.gates import check_fine_tuned
from nitro_e_lite.stages.students import Student, StudentBatch, resting, words_of
from nitro_e_lite.training.distributed import mean_over_processes
from nitro_e_lite.training.engine import Engine, Placement
from nitro_e_lite.training.optimizers import hidden_matrices

NO_GUIDANCE = 1.0  # what a guided embedding is told where there is none
UNCAPTIONED = 0.2  # share of phase 1 without a caption: guidance needs that answer too
LEVELS = (0.1, 0.3, 0.5, 0.7, 0.9)  # flow times at which the fine-tuned teacher is compared


def tangent_target(
    answer: Tensor, slope: Tensor, x_t: Tensor, dxdt: Tensor, t: Tensor, r: float, constant: float | None
) -> tuple[Tensor, Tensor]:
    """g, and its norm before it was normalised.

    Args:
        answer: F- of the student (B, C, H, W).
        slope: `cos(t) sin(t) dF/dt` along the road (B, C, H, W).
        x_t: where (B, C, H, W).
        dxdt: direction of the road, `s_d F` of the teacher (B, C, H, W).
        t: (B,).
        r: how much of the tangent is let in, 0 to 1.
        constant: c; None does not normalise.

    Returns:
        g (B, C, H, W) and the root of its mean square (B,).
    """
    cos, sin = expand_like(torch.cos(t), x_t), expand_like(torch.sin(t), x_t)
    g = -cos.square() * (SIGMA_DATA * answer - dxdt) - r * (cos * sin * x_t + SIGMA_DATA * slope)
    norm = g.square().flatten(1).mean(1).sqrt()  # (B,); a mean, so that c does not depend on the size of pictures
    return (g if constant is None else g / expand_like(norm + constant, g)), norm


def consistency_loss(answer: Tensor, before: Tensor, g: Tensor, t: Tensor, uncertainty: Tensor) -> Tensor:
    """Squared error to `F- + g`, weighted by 1 / sigma and by what is learned of its size: (B,)."""
    error = (answer - before - g).square().flatten(1).mean(1)
    return error / (SIGMA_DATA * torch.tan(t)) / torch.exp(uncertainty) + uncertainty


class Sprinter(nn.Module):
    """What learns: the student, and how uncertain it is at each t.

    Args:
        transformer: the student.
    """

    def __init__(self, transformer: EMMDiTTransformer2DModel):
        super().__init__()
        self.transformer = transformer
        self.uncertain = nn.Linear(256, 1)
        nn.init.zeros_(self.uncertain.weight)
        nn.init.zeros_(self.uncertain.bias)

    def uncertainty(self, t: Tensor) -> Tensor:
        """u(t), (B,)."""
        waves = self.transformer.time_embed.sinusoid(trigflow.to_flow_time(t))
        learned = self.uncertain(waves.to(self.uncertain.weight.dtype)).squeeze(1).float()
        return learned - torch.log(SIGMA_DATA * torch.tan(t))


def fit_embedding(new: TimeEmbedding, old: TimeEmbedding, steps: int, seed: int) -> float:
    """Teaches an embedding to say at each noise level what another says.

    Args:
        new: learns, in place, but for what it says of guidance; on the CPU.
        old: of the same width.
        steps: of Adam, on 256 noise levels each; its rate falls to 0.
        seed: of the levels.

    Returns:
        Root of the mean squared difference over that of the old one's answers.
    """
    made, rate = generator(seed, 0, "embedding"), 3e-3
    learns = [weight for name, weight in new.named_parameters() if not name.startswith("guide.")]
    optimizer = torch.optim.Adam(learns, rate, betas=(0.9, 0.99))
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = rate * (1 - step / steps) ** 1.5
        t = flow.TIMESTEP_SCALE * torch.rand(256, generator=made)
        with torch.no_grad():
            said = old(t)
        with torch.enable_grad():
            loss = (_unguided(new, t) - said).square().mean()
            optimizer.zero_grad()
            loss.backward()
        optimizer.step()
    new.zero_grad()
    with torch.no_grad():
        t = torch.linspace(0, flow.TIMESTEP_SCALE, 1001)
        return ((_unguided(new, t) - old(t)).square().mean() / old(t).square().mean()).sqrt().item()


def _unguided(embedding: TimeEmbedding, t: Tensor) -> Tensor:
    return embedding(t, guidance=None if embedding.guide is None else torch.full_like(t, NO_GUIDANCE))


@dataclass(frozen=True)
class SprintBatch(StudentBatch):
    """Also where the student is asked.

    Attributes:
        start: noise that the student's points are made with (B, C, H, W).
        time: t of the consistency loss (B,).
        judged: t from which pictures are drawn for the discriminator (B,).
        level: number of the state on a picture's own road that they are drawn from instead (B,).
        guidance: (B,).
        uncaptioned: rows of phase 1 without a caption (B,).
    """

    start: Tensor
    time: Tensor
    judged: Tensor
    level: Tensor
    guidance: Tensor
    uncaptioned: Tensor


class Sprint(Student):
    """A student of any small number of steps.

    Args:
        config: what to train.
        placement: where.

    Attributes:
        student: learns.
        model: the student and its uncertainty.
        guide: the teacher of phase 2; the teacher itself until phase 1 is done.
    """

    config: SprintConfig

    def __init__(self, config: SprintConfig, placement: Placement):
        super().__init__(config, placement)
        self.student = self._like_student()
        start = self.start("dense_time", "guidance_embedding")
        self.student.load_state_dict(start.state_dict(), strict=False)  # but for what says how it is guided
        if config.dense_time and not start.config.dense_time and config.embedding_steps:
            fit_embedding(self.student.time_embed, start.time_embed, config.embedding_steps, config.seed)
        if config.gradient_checkpointing:
            self.student.enable_gradient_checkpointing()
        self.model = Sprinter(self.student)
        matrices = {f"transformer.{name}" for name in hidden_matrices(self.student)}
        self.modules["student"] = self.trained(self.model, config.optimizer, matrices)
        self.guide = self.teacher
        levels = torch.tensor(self.drawn.card["levels"], device=placement.device)
        self._road = trigflow.to_trig_time(levels)  # t of the states that were kept, from pi/2 on
        self._strengths = config.guidances if config.guidance_embedding else (max(config.guidance, NO_GUIDANCE),)
        self._no_text = self.encoders.encode_text([""]).to(placement.device, placement.dtype)  # (1, L, Dc)

    def _like_student(self) -> EMMDiTTransformer2DModel:
        torch.manual_seed(self.config.seed)
        named = {"dense_time": self.config.dense_time, "guidance_embedding": self.config.guidance_embedding}
        return EMMDiTTransformer2DModel.like(self.teacher, **named)

    # -- what a step reads

    def judged_at(self, step: int) -> Tensor:
        """Log-normal, as the times from which pictures are drawn."""
        return trigflow.to_flow_time(self._times(step, "renoise t", "judged"))

    def _times(self, step: int, purpose: str, kind: str) -> Tensor:
        mean, std = (getattr(self.config, f"{kind}_{name}") for name in ("mean", "std"))
        return trigflow.sample_times(self.config.batch_size, self.stream(step, purpose), mean, std)

    def read(self, step: int) -> SprintBatch:
        """Also where the student is asked, and for how strong a guidance."""
        config, count = self.config, self.config.batch_size
        strengths = torch.tensor(self._strengths)
        chosen = torch.randint(len(strengths), (count,), generator=self.stream(step, "guidance"))
        judged = trigflow.to_last(self._times(step, "judged", "judged"), self.stream(step, "max time"), config.max_time)
        later = torch.randint(1, len(self._road), (count,), generator=self.stream(step, "level"))
        begins = torch.rand(count, generator=self.stream(step, "from the noise")) < config.max_time
        rows = {
            "level": torch.where(begins, 0, later),
            "time": self._times(step, "time", "consistency"),
            "judged": judged,
            "guidance": strengths[chosen],
            "uncaptioned": torch.rand(count, generator=self.stream(step, "uncaptioned")) < UNCAPTIONED,
        }
        rows = {name: value[self.mine] for name, value in rows.items()}
        return self._pinned(SprintBatch(**vars(super().read(step)), start=self.noise(step, "start"), **rows))

    # -- one step

    def losses(self, step: int, part: int) -> dict[str, dict[str, Tensor]]:
        """Phase 1: the new embedding. Phase 2: in turn the heads and the student."""
        self.step = step
        if part == 0:
            self.check_balance(step)
        batch = self.batch(step, part)
        if step < self.config.finetune_steps:
            return {"student": {"loss": self._embedding_loss(batch)}}
        if step == self.config.finetune_steps and part == 0 and self.config.dense_time and not self.config.start_from:
            error = torch.tensor(self.embedding_error(), device=self.placement.device)
            check_fine_tuned(mean_over_processes(error).item(), self.config)
            if step:
                self._promote(self.student.state_dict())
        if self.judges(step):
            with torch.no_grad():
                guess = self._guess(batch)
            return {"heads": self.heads_loss(guess, batch, part, hinge_loss, verdict)}
        return {"student": self._student_loss(batch)}

    @property
    def joining(self) -> int:
        """Where consistency and adversary join."""
        return self.config.joining_step

    @property
    def phases(self) -> tuple[int, ...]:
        """Phase 2, and where consistency and adversary join."""
        return self.config.finetune_steps, self.config.joining_step

    def _velocity(self, model: nn.Module, x_s: Tensor, text: Tensor, s: Tensor, guidance: Tensor | float) -> Tensor:
        told = {"guidance": guidance} if model.config.guidance_embedding else {}
        return model(x_s.to(self.placement.dtype), text, flow.TIMESTEP_SCALE * s, **told).sample.float()

    def _embedding_loss(self, batch: SprintBatch) -> Tensor:
        """Squared distance of the student's velocity from the teacher's (B,)."""
        s = trigflow.to_flow_time(batch.time)
        x_s = flow.interpolate(batch.states[:, -1], batch.start, s)
        text = torch.where(batch.uncaptioned[:, None, None], self._no_text, batch.text)
        with torch.no_grad():
            target = self._velocity(self.teacher, x_s, text, s, NO_GUIDANCE)
        return (self._velocity(self.student, x_s, text, s, NO_GUIDANCE) - target).square().flatten(1).mean(1)

    @torch.no_grad()
    def embedding_error(self) -> float:
        """How far the velocities with the new embedding are from the teacher's, over their own squared error."""
        moved, own = [], []
        batch = self.drawn.batch(range(self.rows, min(self.rows + 64, len(self.drawn))))
        latents, text = batch.states[:, -1].to(self.placement.device), self.text(words_of(batch))
        noise = batch.states[:, 0].to(self.placement.device)
        for level in LEVELS:
            s = torch.full((len(latents),), level, device=latents.device)
            x_s = flow.interpolate(latents, noise.roll(1, 0), s)  # not the noise that the picture was drawn from
            before = self._velocity(self.teacher, x_s, text, s, NO_GUIDANCE)
            moved.append((self._velocity(self.student, x_s, text, s, NO_GUIDANCE) - before).square().mean().item())
            own.append((before - flow.velocity_target(latents, noise.roll(1, 0))).square().mean().item())
        return sum(moved) / sum(own)

    def _promote(self, weights: dict[str, Tensor]) -> None:
        """Makes the fine-tuned student the teacher of phase 2."""
        self.guide = self._like_student().requires_grad_(False).eval()
        self.guide.load_state_dict(weights)
        speed_up(self.guide)
        nn.Module.to(self.guide, self.placement.device, self.placement.dtype)

    @torch.no_grad()
    def direction(self, x_t: Tensor, text: Tensor, t: Tensor, guidance: Tensor) -> Tensor:
        """`dxdt = s_d F` of the guided teacher (B, C, H, W); where nothing is guided, of the teacher asked once."""
        s, x_s = trigflow.to_flow_time(t), trigflow.to_flow_state(x_t, t)
        if all(strength == NO_GUIDANCE for strength in self._strengths):
            velocity = self._velocity(self.guide, x_s, text, s, NO_GUIDANCE)
        else:
            both = torch.cat([self._no_text.expand_as(text), text])
            velocity = self._velocity(self.guide, torch.cat([x_s, x_s]), both, torch.cat([s, s]), NO_GUIDANCE)
            unconditional, conditional = velocity.chunk(2)
            velocity = unconditional + expand_like(guidance, x_s) * (conditional - unconditional)
        return SIGMA_DATA * trigflow.to_trig_velocity(x_s, velocity, s)

    def predict(self, text: Tensor, guidance: Tensor | float) -> trigflow.Predict:
        """The student as a function of a point of the circle, told a caption and how strong a guidance."""
        told = {"guidance": guidance} if self.config.guidance_embedding else {}
        return trigflow.predictor(self.student, text, **told)

    def _consistency(self, batch: SprintBatch) -> dict[str, Tensor]:
        config, t = self.config, batch.time
        x_t = trigflow.interpolate(batch.states[:, -1], batch.start, t)
        predict = self.predict(batch.text, batch.guidance)
        dxdt = self.direction(x_t, batch.text, t, batch.guidance)
        before, slope = trigflow.tangent(predict, x_t, t, dxdt)
        r = min(1.0, (self.step - config.joining_step) / config.warmup_steps)
        constant = config.tangent_constant if config.normalize_tangent else None
        g, norm = tangent_target(before, slope, x_t, dxdt, t, r, constant)
        loss = consistency_loss(predict(x_t, t), before, g, t, self.model.uncertainty(t))
        return {"consistency": loss, "tangent_norm": norm}

    def _guess(self, batch: SprintBatch) -> Tensor:
        """The student's pictures from one jump (B, C, H, W); with `road_weight` from points of their own roads."""
        t = self._road[batch.level] if self.config.road_weight else batch.judged
        if self.config.road_weight:
            there = batch.states[torch.arange(len(t), device=t.device), batch.level]
            x_t = trigflow.from_flow_state(there, trigflow.to_flow_time(t))
        else:
            x_t = trigflow.interpolate(batch.states[:, -1], batch.start, t)
        answer = self.predict(batch.text, batch.guidance)(x_t, t)
        return trigflow.to_data(x_t, answer, t) / SIGMA_DATA

    def _student_loss(self, batch: SprintBatch) -> dict[str, Tensor]:
        config, found, total = self.config, {}, 0.0
        joined = self.step >= config.joining_step
        if config.consistency_weight and joined:
            found |= self._consistency(batch)
            total = total + config.consistency_weight * found["consistency"]
        if config.road_weight or self.heads is not None:
            guess = self._guess(batch)
        if config.road_weight:
            found["road"] = (guess - batch.states[:, -1]).square().flatten(1).mean(1)
            total = total + config.road_weight * found["road"]
        if self.heads is not None and joined:
            with resting(self.heads):
                found["adversarial"] = raised(self.look(guess, batch.text, batch))
            total = total + config.adversarial_weight * found["adversarial"]
        return {"loss": total, **found}

    # -- looking at the run, and keeping it

    def ends(self, noise: Tensor, text: Tensor, teacher: bool) -> Tensor:
        """One jump from the noise: more of them would add noise of their own."""
        if teacher:
            s = torch.ones(len(noise), device=noise.device)
            return flow.to_data(noise, self._velocity(self.teacher, noise, text, s, NO_GUIDANCE), s)
        predict = self.predict(text, self.config.guidance)
        return trigflow.sample(predict, [noise], trigflow.times(1))

    def pipeline(self) -> NitroEPipeline:
        """Draws with the student by diffusers' sampler of consistency models."""
        config = self.config
        sampler = {"default_guidance": config.guidance, "default_shift": config.shift, "sigma_grid": config.sigma_grid}
        return self._pipeline(self.student, SCMScheduler(), **sampler)

    def reference(self) -> NitroEPipeline:
        """The teacher in as many Euler steps without guidance, at the levels that it draws with."""
        own = self.drawn.card["sampler"]
        sampler = {"default_guidance": 0.0, "default_shift": own["shift"], "sigma_grid": own["sigma_grid"]}
        return self._pipeline(self.teacher, FlowMatchEulerDiscreteScheduler(1000), **sampler)

    def _pipeline(self, model: EMMDiTTransformer2DModel, scheduler: Any, **sampler: Any) -> NitroEPipeline:
        steps = self.config.sampler_steps
        pipeline = NitroEPipeline(model, scheduler=scheduler, default_steps=steps, **sampler, **self.encoders.parts())
        pipeline.set_progress_bar_config(disable=True)
        return pipeline

    def state(self) -> dict[str, Any]:
        """Also the teacher of phase 2."""
        if self.guide is self.teacher:
            return super().state()
        return super().state() | {f"guide.{name}": value for name, value in self.guide.state_dict().items()}

    def load_state(self, state: dict[str, Any]) -> None:
        """Also the teacher of phase 2."""
        super().load_state(state)
        own = {name.removeprefix("guide."): value for name, value in state.items() if name.startswith("guide.")}
        if own:
            self._promote(own)

    def export(self, weights: dict[str, dict[str, Tensor]], folder: Path) -> None:
        """The student in `save_pretrained` layout."""
        name = "transformer."
        own = {key.removeprefix(name): v for key, v in weights["student"].items() if key.startswith(name)}
        self.save_student(own, folder)


def sprint(config: SprintConfig, run_dir: str | Path, resume: bool = False, device: str | None = None) -> Path:
    """Runs the stage; see `Engine` and `Sprint`. Returns the folder with the student's weights."""
    return Engine(config, Sprint, run_dir, resume, device).fit()
