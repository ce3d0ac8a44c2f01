"""Stage 3 by the forward process: learn from rewards with a loss that looks like the flow loss.

Flow-GRPO needs probabilities of steps, hence noise in the sampler and stored trajectories. The forward process needs
neither: noise is added to a *finished* picture, as in pre-training, and the velocity is moved towards the pictures that
were better than their group and away from those that were worse. With the advantage A as an optimality in [0, 1],

    r = clip(A / 5, -1, 1) / 2 + 1/2

and an old policy that drew the pictures, two implicit policies lie on either side of it,

    v+ = beta v + (1 - beta) v_old,        v- = (1 + beta) v_old - beta v.

If v moves towards a picture, v- moves away from it. Both are held against the picture's x0 by their own predictions
`x_t - t v`, the first with weight r, the second with 1 - r:

    loss = 5 / beta * [ r w+ |x0+ - x0|^2 + (1 - r) w- |x0- - x0|^2 ] + 1e-4 |v - v_ref|^2,   w = 1 / mean|x0_hat - x0|

Two facts pin it down (both are tests). With beta = 1, r = 1, weights 1 / t^2 and no factor 5 it *is* the flow loss.
And at v = v_old its gradient is `10 t (2 r - 1) d / (mean|d| C H W)` with d = v - v_target, whatever beta is: an
average picture, r = 1/2, moves nothing.

The old policy follows the new one after each iteration, `old <- d old + (1 - d) new`; d depends on the number i of
updates so far: `min(0.001 i, 0.5)` ("fast") or 0 for 75 updates, then `0.0075 (i - 75)` up to 0.999 ("careful"). Those
are made for thousands of updates; here i is scaled to the length of the run.

`method="positive"` is the control arm: the same without the second half, for pictures above their group alone, in
proportion to A. That is fine-tuning towards the best of each group.

Source: DiffusionNFT arXiv 2509.16117 and its code. Differs: the schedule is scaled; flat groups can be left out; noise
levels are drawn from the grid of the roll-out, each by itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from nitro_e_lite.config import RewardConfig
from nitro_e_lite.model import flow
from nitro_e_lite.runtime import generator
from nitro_e_lite.stages.rollouts import Rewards
from nitro_e_lite.training.engine import Placement

SMALLEST_ERROR = 1e-5  # below which a weight does not grow any more
FACTOR = 5.0  # of the loss: the clip of the advantage, which then leaves the gradient's size alone


def optimality(advantages: Tensor, clip: float = 5.0) -> Tensor:
    """`clip(A / clip, -1, 1) / 2 + 1/2`: (B,) in [0, 1]."""
    return (advantages / clip).clamp(-1, 1) / 2 + 0.5


def forward_loss(
    velocity: Tensor,
    old: Tensor,
    x_t: Tensor,
    x0: Tensor,
    t: Tensor,
    better: Tensor,
    worse: Tensor,
    beta: float = 1.0,
    factor: float = FACTOR,
    weight: Tensor | None = None,
) -> Tensor:
    """The loss of each sample, without the term of the reference.

    Args:
        velocity: of the policy, (B, C, h, w).
        old: of the old policy, likewise, without gradient.
        x_t: noised latents.
        x0: clean latents.
        t: noise levels (B,).
        better: r, (B,).
        worse: 1 - r, (B,); zeros leave the implicit negative out.
        beta: how far the implicit policies lie from the old one.
        factor: of all.
        weight: (B,) in place of 1 / mean|x0_hat - x0|.

    Returns:
        (B,), float32.
    """
    sides = (beta * velocity + (1 - beta) * old, (1 + beta) * old - beta * velocity)
    loss = torch.zeros_like(t)
    for side, share in zip(sides, (better, worse), strict=True):
        error = (flow.to_data(x_t, side, t) - x0).flatten(1)  # (B, C*h*w)
        w = 1 / error.detach().abs().mean(1).clamp(min=SMALLEST_ERROR) if weight is None else weight
        loss = loss + share * w * error.square().mean(1)
    return factor / beta * loss


def old_decay(update: int, schedule: str = "fast", length: int = 0, steps: int = 0) -> float:
    """d, what the old policy keeps of itself.

    Args:
        update: i, optimiser updates so far.
        schedule: "fast" or "careful".
        length: updates that the schedule was made for; it is then scaled to `steps`. 0: it is taken as it is.
        steps: of the run.
    """
    i = update * length / steps if length else update
    if schedule == "fast":
        return min(0.001 * i, 0.5)
    return 0.0 if i < 75 else min(0.0075 * (i - 75), 0.999)


class ForwardRewards(Rewards):
    """Rewards by the forward process, and its control arm.

    Attributes:
        old: the adapter of the old policy by name, float32.
        old_step: the step at which it last followed. A roll-out that failed begins again, and it must not follow twice.
    """

    def __init__(self, config: RewardConfig, placement: Placement):
        super().__init__(config, placement)
        self.old_step = 0
        self.old = {name: p.detach().to(placement.device, torch.float32, copy=True) for name, p in self.adapter.items()}

    @torch.no_grad()
    def before_rollout(self, step: int) -> None:
        """The old policy follows the new one."""
        if step == self.old_step:
            return  # before the first update they are the same
        config = self.config.forward
        decay = old_decay(step, config.old_schedule, config.old_length, self.config.steps)
        for name, value in self.old.items():
            value.lerp_(self.adapter[name].detach().float(), 1 - decay)
        self.old_step = step

    def roll_out(self, step: int, places: Sequence[int], features: Tensor) -> dict[str, Tensor]:
        """Pictures of the old policy along the ODE."""
        with self.policy(self.old):
            return {"x0": self.walk(self.noise(step, "start", places), features, 0, len(self.sigmas) - 1)}

    def losses(self, step: int, part: int) -> dict[str, dict[str, Tensor]]:
        """The loss of each picture that teaches, at each of its noise levels (n * times,)."""
        config = self.config
        rows, features, places = self.batch(step, part, taught=True)
        times, device = config.forward.times, self.placement.device
        x0 = rows["x0"].repeat_interleave(times, 0)  # (B * times, C, h, w)
        features = features.repeat_interleave(times, 0)  # (B * times, L, Dc)
        advantage, weight = (rows[name].repeat_interleave(times) for name in ("advantage", "weight"))  # (B * times,)
        named = [place * times + k for place in places for k in range(times)]
        noise = self.noise(step, "forward", named)
        levels = [
            torch.randint(len(self.sigmas) - 1, (), generator=generator(config.seed, step, "t", k)) for k in named
        ]
        t = torch.tensor(self.sigmas)[torch.stack(levels)].to(device)  # (B * times,)
        x_t = flow.interpolate(x0, noise, t)
        if config.method == "positive":
            better = (advantage / config.advantage_clip).clamp(min=0)
            worse = torch.zeros_like(better)
        else:
            better = optimality(advantage, config.advantage_clip)
            worse = 1 - better
        with torch.no_grad():
            with self.policy(self.old):
                old = self.velocity(x_t, features, t)
            reference = None
            if config.forward.reference_weight:
                with self.policy(self.reference()):
                    reference = self.velocity(x_t, features, t)
        velocity = self.velocity(x_t, features, t)
        loss = weight * forward_loss(
            velocity, old, x_t, x0, t, better, worse, config.forward.beta, config.advantage_clip
        )
        found = self.reported() | {"old_distance": (velocity.detach() - old).square().mean()}
        if reference is not None:
            distance = (velocity - reference).square().flatten(1).mean(1)  # (B * times,)
            loss = loss + config.forward.reference_weight * distance
            found["reference_distance"] = distance.detach()
        return {"transformer": {"loss": loss, **found}}

    def state(self) -> dict[str, Any]:
        """Also the old policy."""
        return (
            super().state() | {"old_step": self.old_step} | {f"old.{name}": value for name, value in self.old.items()}
        )

    def load_state(self, state: dict[str, Any]) -> None:
        """Also the old policy."""
        super().load_state(state)
        self.old_step = state.get("old_step", self.rollout_step)  # older checkpoints do not have it
        for name, value in self.old.items():
            value.copy_(state[f"old.{name}"])
