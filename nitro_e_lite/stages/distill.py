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

**Jumps.** A walk along segments never comes back to the road that it has left. With `jumps` every step aims at the
picture itself, from a state that the teacher was in, and the sampler puts fresh noise back before the next: what one
step got wrong, the next sees as noise and may correct. The loss of phase 1 is then that of one step all the way down,

    loss = |x_k - l_k v(x_k, text, l_k) - x_K|^2 / l_k^2,

and phase 2 starts from the same states. diffusers' Euler scheduler draws so with `stochastic_sampling`.

What both phases read, who is judged by whom and the gates that stop a run are in `students.py` and `gates.py`.

Source: Nitro-1 (misaligned pairs, smooth-L1, logistic loss) and LADD (arXiv 2403.12015). Differs: phase 1 is ours, it
makes an hour of two cores enough; the published learning rate, 1e-6, moves nothing in an hour; roll-outs are the
student's own, as in DMD2 (arXiv 2405.14867), without a gradient through earlier steps; jumps with fresh noise are how
consistency models and DMD2 draw.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import FlowMatchEulerDiscreteScheduler
from torch import Tensor, nn

from nitro_e_lite.config import DistillConfig
from nitro_e_lite.data.drawn import sampler_levels
from nitro_e_lite.errors import InvalidValue
from nitro_e_lite.inference.pipeline import NitroEPipeline
from nitro_e_lite.model import flow
from nitro_e_lite.model.emmdit import EMMDiTTransformer2DModel
from nitro_e_lite.model.official_weights import save_official
from nitro_e_lite.runtime import send
from nitro_e_lite.stages.discriminator import logistic_loss, verdict
from nitro_e_lite.stages.students import Student, StudentBatch, resting
from nitro_e_lite.training.engine import Engine, Placement
from nitro_e_lite.training.optimizers import hidden_matrices

SHORTEST = 0.05  # a segment counts as at least so long: the official grid ends with one of 0.001, all rounding
OFFICIAL = "nitro-e-{size}px-dist.safetensors"  # the student in the published layout, where it has that shape


@dataclass(frozen=True)
class DistillBatch(StudentBatch):
    """Also at which noise level the student is asked.

    Attributes:
        level: its number (B,).
        own: whether it is reached by the student's own steps (B,).

    Both stay with the host, which chooses rows by them.
    """

    level: Tensor
    own: Tensor

    def to(self, device: torch.device) -> DistillBatch:
        """The rest on `device`."""
        return replace(super().to(device), level=self.level, own=self.own)


class Distill(Student):
    """A student of a fixed number of steps.

    Args:
        config: what to train.
        placement: where.

    Attributes:
        student: learns.
        levels: the student's noise levels, and 0.

    Raises:
        FileNotFoundError: a folder of `config.data` holds no drawn pictures.
        ValueError: teacher, encoders, pictures and noise levels do not belong together.
    """

    config: DistillConfig

    def __init__(self, config: DistillConfig, placement: Placement):
        super().__init__(config, placement)
        self.levels = [*sampler_levels(config.sampler_steps, config.shift, config.sigma_grid), 0.0]
        self._levels = torch.tensor(self.levels, device=placement.device)
        drawn, mine = self.drawn.levels, self.levels[:-1]
        if len(drawn) != len(mine) or not np.allclose(drawn, mine, atol=1e-6):
            raise InvalidValue(
                f"sampler_steps={config.sampler_steps}: with this shift and grid they visit {mine}, "
                f"{self.drawn.data.folders[0]} holds states at {drawn}; draw it again for these steps, or set "
                "shift and sigma_grid (linear for a model that was trained here) to what drew it"
            )
        self.student = self.start()
        if config.gradient_checkpointing:
            self.student.enable_gradient_checkpointing()
        self.modules["student"] = self.trained(self.student, config.optimizer, hidden_matrices(self.student))

    # -- what a step reads

    def judged_at(self, step: int) -> Tensor:
        """Logit-normal."""
        config = self.config
        stream = self.stream(step, "renoise t")
        return flow.sample_timesteps(config.batch_size, stream, config.renoise_mean, config.renoise_std)

    def read(self, step: int) -> DistillBatch:
        """Also which noise level, and whose way to it."""
        config = self.config
        level = torch.randint(config.sampler_steps, (config.batch_size,), generator=self.stream(step, "level"))
        own = torch.rand(config.batch_size, generator=self.stream(step, "roll-out")) < config.own_rollouts
        return DistillBatch(**vars(super().read(step)), level=level[self.mine], own=own[self.mine])

    # -- one step

    def losses(self, step: int, part: int) -> dict[str, dict[str, Tensor]]:
        """Phase 1: the student's segments. Phase 2: in turn the heads and the student."""
        self.step = step
        if part == 0:
            self.check_balance(step)
        batch = self.batch(step, part)
        if step < self.config.regression_steps:
            return {"student": self.segment_loss(batch)}
        if self.judges(step):
            with torch.no_grad():
                guess = self._guess(batch)
            return {"heads": self.heads_loss(guess, batch, part, logistic_loss, verdict)}
        return {"student": self._student_loss(batch)}

    @property
    def joining(self) -> int:
        """Phase 2."""
        return self.config.regression_steps

    @property
    def phases(self) -> tuple[int, ...]:
        """Phase 2."""
        return (self.config.regression_steps,)

    def _velocity(self, model: nn.Module, x_t: Tensor, text: Tensor, t: Tensor) -> Tensor:
        return model(x_t.to(self.placement.dtype), text, flow.TIMESTEP_SCALE * t).sample.float()

    def segment_loss(self, batch: DistillBatch) -> dict[str, Tensor]:
        """From each state of the teacher to its next, or to the picture, in one step; squared velocity error (B,)."""
        level = send(batch.level, batch.states.device)
        which = torch.arange(len(level), device=level.device)
        aim = torch.full_like(level, len(self._levels) - 1) if self.config.jumps else level + 1
        here, there = batch.states[which, level], batch.states[which, aim]  # (B, C, H, W)
        t, t_next = self._levels[level], self._levels[aim]
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
            until: number of the noise level to stop at, for each row (B,), with the host; K is the picture.

        Returns:
            (B, C, H, W).
        """
        x_t = noise.clone()
        for k in range(int(until.max())):
            going = send((until > k).nonzero().flatten(), noise.device)
            velocity = self._velocity(model, x_t[going], text[going], self._levels[k].expand(len(going)))
            x_t[going] = flow.euler_step(x_t[going], velocity, self.levels[k], self.levels[k + 1])
        return x_t

    def _guess(self, batch: DistillBatch) -> Tensor:
        """The student's guess of the picture (B, C, H, W), at the noise levels that its sampler visits."""
        noise, latents = batch.states[:, 0], batch.states[:, -1]
        level = send(batch.level, noise.device)
        t = self._levels[level]
        if self.config.jumps:
            x_t = batch.states[torch.arange(len(t), device=t.device), level]
        else:
            x_t = flow.interpolate(latents, noise, t)
            chosen = (batch.own & (batch.level > 0)).nonzero().flatten()
            if len(chosen):
                own = send(chosen, noise.device)
                x_t[own] = self.walk(self.student, noise[own], batch.text[own], batch.level[chosen])
        return flow.to_data(x_t, self._velocity(self.student, x_t, batch.text, t), t)

    def _student_loss(self, batch: DistillBatch) -> dict[str, Tensor]:
        config, guess = self.config, self._guess(batch)
        regression = F.smooth_l1_loss(guess, batch.states[:, -1], reduction="none").flatten(1).mean(1)
        if self.heads is None:
            return {"loss": config.regression_weight * regression, "regression": regression}
        with resting(self.heads):
            adversarial = logistic_loss(self.look(guess, batch.text, batch), real=True)
        total = config.adversarial_weight * adversarial + config.regression_weight * regression
        return {"loss": total, "adversarial": adversarial, "regression": regression}

    # -- looking at the run, and keeping it

    def ends(self, noise: Tensor, text: Tensor, teacher: bool) -> Tensor:
        """Euler steps at the student's noise levels; of jumps the first, since later ones add noise of their own."""
        model = self.teacher if teacher else self.student
        if self.config.jumps:
            t = torch.ones(len(noise), device=noise.device)
            return flow.to_data(noise, self._velocity(model, noise, text, t), t)
        until = torch.full((len(noise),), self.config.sampler_steps)
        return self.walk(model, noise, text, until)

    def pipeline(self, model: EMMDiTTransformer2DModel | None = None) -> NitroEPipeline:
        """Draws in few steps without guidance, with the student as it stands or another model."""
        config = self.config
        pipeline = NitroEPipeline(
            self.student if model is None else model,
            scheduler=FlowMatchEulerDiscreteScheduler(1000, stochastic_sampling=config.jumps and model is None),
            sigma_grid=config.sigma_grid,
            default_steps=config.sampler_steps,
            default_guidance=config.guidance,
            default_shift=config.shift,
            **self.encoders.parts(),
        )
        pipeline.set_progress_bar_config(disable=True)
        return pipeline

    def reference(self) -> NitroEPipeline:
        """The teacher in the same steps."""
        return self.pipeline(self.teacher)

    def export(self, weights: dict[str, dict[str, Tensor]], folder: Path) -> None:
        """The student in `save_pretrained` layout, and on the official grid in the official layout too."""
        model = self.save_student(weights["student"], folder)
        if self.config.sigma_grid == "scheduler":
            save_official(model, folder / OFFICIAL.format(size=32 * model.config.sample_size))


def distill(config: DistillConfig, run_dir: str | Path, resume: bool = False, device: str | None = None) -> Path:
    """Runs the stage; see `Engine` and `Distill`. Returns the folder with the student's weights."""
    return Engine(config, Distill, run_dir, resume, device).fit()
