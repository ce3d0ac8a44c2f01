"""Stage 3 by Flow-GRPO: steps of the sampler become decisions, and good decisions likelier.

A sampler that follows the ODE decides nothing: one noise, one picture. Add noise to some of its steps, and take away as
much again by a drift, and each picture still has the right distribution, but a step is now a Gaussian with a density
that can be raised or lowered. On the grid sigma_0 = 1 > ... > sigma_K = 0, with dt = sigma' - sigma < 0:

    std  = a sqrt(sigma / (1 - sigma))             (at sigma = 1: over 1 - sigma_1)
    mean = x (1 + std^2 / (2 sigma) dt) + v (1 + std^2 (1 - sigma) / (2 sigma)) dt
    x'   = mean + std sqrt(-dt) noise,             a = 0 is the ODE
    log p = mean over C, h, w of [ -(x' - mean)^2 / (2 std^2 (-dt)) - log(std sqrt(-dt)) - log sqrt(2 pi) ]

That is "sde". "cps" keeps the coefficients of signal and noise exactly: with `x0 = x - sigma v`, `x1 = x + (1 - sigma)
v`,

    std  = sigma' sin(a pi / 2),   mean = (1 - sigma') x0 + sqrt(sigma'^2 - std^2) x1,   log p = -mean (x' - mean)^2.

The ratio of new to old density weighs the advantage, clipped as in PPO, with a regulariser to the model without
adapter:

    loss = max(-A ratio, -A clip(ratio, 1 - c, 1 + c)) + kl KL,   KL = mean (mean - mean_ref)^2 / (2 std^2), without dt

The log-density is a *mean* over numbers, not a sum: that is why c is 1e-4. (Sum and 0.2 is another algorithm; KL with
dt and its own weight is another setting, ten times apart.) The last step adds no noise and is never learned from.
Noise only in a short *window* of steps costs less and says more clearly which decision was good; with `branch` a group
even shares its way to the window, so that nothing but the window's noise makes its pictures differ.

The density is computed in float32. On its own roll-out the ratio is exactly 1, not nearly: the window's steps are
drawn in the parts in which they are learned from, by the kernels that run when gradients are wanted.

Source: Flow-GRPO arXiv 2505.05470 and its code; coefficients-preserving sampling arXiv 2509.05952; MixGRPO arXiv
2507.21802 and Flow-GRPO-Fast for the window. Differs: samples of flat groups are left out of the mean, not only zeroed.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from nitro_e_lite.config import RewardConfig
from nitro_e_lite.runtime import generator
from nitro_e_lite.stages.rewards_forward import ForwardRewards
from nitro_e_lite.stages.rollouts import Rewards
from nitro_e_lite.training.engine import Engine


@dataclass(frozen=True)
class NoisyStep:
    """A step of the sampler as a Gaussian.

    Attributes:
        mean: of the next latents, (B, C, h, w).
        std: the noise level, that of the KL.
        spread: the deviation of the next latents; 0 where the step is the ODE's.
    """

    mean: Tensor
    std: float
    spread: float


def sde_step(x: Tensor, velocity: Tensor, sigma: float, sigma_next: float, sigma_one: float, noise: float) -> NoisyStep:
    """One step of the stochastic sampler.

    Args:
        x: latents (B, C, h, w), float32.
        velocity: there, float32.
        sigma, sigma_next: noise levels before and after.
        sigma_one: the second level of the grid; stands for sigma in `1 - sigma` at sigma = 1.
        noise: a.
    """
    dt = sigma_next - sigma
    std = noise * math.sqrt(sigma / (1 - (sigma_one if sigma == 1 else sigma)))
    drift = std**2 / (2 * sigma)
    mean = x * (1 + drift * dt) + velocity * ((1 + drift * (1 - sigma)) * dt)
    return NoisyStep(mean, std, std * math.sqrt(-dt))


def cps_step(x: Tensor, velocity: Tensor, sigma: float, sigma_next: float, noise: float) -> NoisyStep:
    """One step of the coefficients-preserving sampler; arguments as in `sde_step`."""
    std = sigma_next * math.sin(noise * math.pi / 2)
    x0, x1 = x - sigma * velocity, x + (1 - sigma) * velocity
    mean = (1 - sigma_next) * x0 + math.sqrt(max(0.0, sigma_next**2 - std**2)) * x1
    return NoisyStep(mean, std, std)


def noisy_step(rule: str, x: Tensor, velocity: Tensor, sigmas: Sequence[float], k: int, noise: float) -> NoisyStep:
    """Step number `k` of the grid `sigmas` by `rule`, "sde" or "cps"."""
    if rule == "sde":
        return sde_step(x, velocity, sigmas[k], sigmas[k + 1], sigmas[1], noise)
    return cps_step(x, velocity, sigmas[k], sigmas[k + 1], noise)


def log_probability(rule: str, x_next: Tensor, step: NoisyStep) -> Tensor:
    """Log-density of `x_next` (B, C, h, w), a mean over its numbers: (B,)."""
    error = (x_next - step.mean).square().flatten(1).mean(1)  # (B,)
    if rule == "cps":
        return -error
    return -error / (2 * step.spread**2) - math.log(step.spread) - 0.5 * math.log(2 * math.pi)


def clipped_loss(ratio: Tensor, advantages: Tensor, clip: float) -> Tensor:
    """`max(-A ratio, -A clip(ratio, 1 - clip, 1 + clip))`, (B,)."""
    return torch.maximum(-advantages * ratio, -advantages * ratio.clamp(1 - clip, 1 + clip))


def kl_to(mean: Tensor, reference: Tensor, std: float) -> Tensor:
    """`mean (mean - mean_ref)^2 / (2 std^2)`, without dt: (B,)."""
    return (mean - reference).square().flatten(1).mean(1) / (2 * std**2)


class GrpoRewards(Rewards):
    """Rewards by Flow-GRPO."""

    def window(self, step: int) -> range:
        """The noisy steps of the roll-out at `step`, the same for all pictures."""
        grpo = self.config.grpo
        starts = grpo.window_range - grpo.window + 1
        first = torch.randint(starts, (), generator=generator(self.config.seed, step, "window")).item()
        return range(first, first + grpo.window)

    def roll_out(self, step: int, places: Sequence[int], features: Tensor) -> dict[str, Tensor]:
        """Pictures, what the window's steps went through (n, window + 1, C, h, w), log-densities (n, window)."""
        config, window = self.config, self.window(step)
        if config.grpo.branch:  # the way to the window is walked once for each group
            groups = [place // config.group for place in places]
            unique = sorted(set(groups))
            first = [groups.index(group) for group in unique]
            x = self.walk(self.noise(step, "start", unique), features[first], 0, window.start)
            x = x[[unique.index(group) for group in groups]]  # (n, C, h, w)
        else:
            x = self.walk(self.noise(step, "start", places), features, 0, window.start)
        path, densities = [x], []
        for k in window:
            with torch.enable_grad():  # the kernels of an update: the ratio is exactly 1 on its own roll-out
                velocity = self.velocity(x, features, self.levels(k, len(x))).detach()
            one = noisy_step(config.grpo.rule, x, velocity, self.sigmas, k, config.grpo.noise)
            x = one.mean + one.spread * self.noise(step, f"step {k}", places)
            path.append(x)
            densities.append(log_probability(config.grpo.rule, x, one))
        x0 = self.walk(x, features, window.stop, len(self.sigmas) - 1)
        return {"x0": x0, "path": torch.stack(path, 1), "density": torch.stack(densities, 1)}

    def losses(self, step: int, part: int) -> dict[str, dict[str, Tensor]]:
        """The loss of each picture (B,), a mean over the window's steps."""
        rows, features, _ = self.batch(step, part)
        config, window = self.config.grpo, self.window(self.rollout_step)
        advantage, weight, steps = rows["advantage"], rows["weight"], []
        for j, k in enumerate(window):
            x, x_next = rows["path"][:, j].contiguous(), rows["path"][:, j + 1]  # (B, C, h, w)
            t, reference = self.levels(k, len(x)), None
            if config.kl:
                with torch.no_grad(), self.policy(self.reference()):
                    velocity = self.velocity(x, features, t)
                reference = noisy_step(config.rule, x, velocity, self.sigmas, k, config.noise).mean
            steps.append((x, x_next, t, k, reference))
        terms: dict[str, list[Tensor]] = {}
        for j, (x, x_next, t, k, reference) in enumerate(steps):  # from here on the adapter's values stay
            one = noisy_step(config.rule, x, self.velocity(x, features, t), self.sigmas, k, config.noise)
            ratio = torch.exp(log_probability(config.rule, x_next, one) - rows["density"][:, j])  # (B,)
            loss = clipped_loss(ratio, advantage, config.clip)
            off = (ratio.detach() - 1).abs()
            found = {"ratio": ratio.detach(), "ratio_off": off, "clip_share": (off > config.clip).float()}
            if reference is not None:
                kl = kl_to(one.mean, reference, one.std)
                loss, found["kl"] = loss + config.kl * kl, kl.detach()
            for name, value in (found | {"loss": weight * loss}).items():
                terms.setdefault(name, []).append(value)
        means = {name: torch.stack(values).mean(0) for name, values in terms.items()}  # (B,) each
        return {"transformer": means | self.reported()}


def train_rewards(config: RewardConfig, run_dir: str | Path, resume: bool = False, device: str | None = None) -> Path:
    """Learns from rewards by the method of `config`; see `Engine`. Returns the folder with the adapter."""
    return Engine(config, learner(config), run_dir, resume, device).fit()


def learner(config: RewardConfig) -> type[Rewards]:
    """The stage that learns by the method of `config`."""
    return GrpoRewards if config.method == "grpo" else ForwardRewards
