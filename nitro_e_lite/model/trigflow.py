"""TrigFlow in pure functions: a flow model read as a consistency model, without training.

Flow matching mixes data and noise along a straight line, TrigFlow along a quarter of a circle:

    x_t = s_d (cos(t) x0 + sin(t) eps),        F = dx_t/dt / s_d = cos(t) eps - sin(t) x0,        t in [0, pi/2],

where `s_d` = 0.5 is the spread that data and noise are scaled to. The variance of `x_t` stays what it is, and the
derivative of the path is bounded at both ends: continuous-time consistency training divides by neither.

**The same network.** A point of the circle lies on the line too, after division by its length:

    s = sin t / (sin t + cos t),     net_in = (x_t / s_d) r = (1 - s) x0 + s eps,     r = sqrt(s^2 + (1 - s)^2),

so a network that predicts the velocity `v = eps - x0` at `(net_in, s)` already predicts

    F = ((1 - 2 s) net_in + (1 - 2 s + 2 s^2) v) / r.

Nothing is learned, and nothing is lost: `to_trig_velocity` is a change of coordinates, exact to rounding.

**Sampling.** From any t one jump reaches the data, `s_d x0 = cos(t) x_t - sin(t) s_d F`; more steps put fresh noise
back and jump again, each from a smaller t.

**The tangent.** Consistency training needs how the student's own answer changes along the path. `tangent` computes that
by forward-mode differentiation, in one pass and without a graph. Fused attention has no forward mode; `attention.py`
takes the product and softmax written out whenever it is differentiated that way.

Source: sCM (arXiv 2410.11081) for TrigFlow; SANA-Sprint (arXiv 2503.09641) for the change of coordinates, the densities
and the times of 1, 2 and 4 steps. Differs: the published sampler draws noise for the last step too and multiplies it
with sin 0; ours leaves it out, which gives the same picture.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from nitro_e_lite.errors import InvalidValue
from nitro_e_lite.model import flow
from nitro_e_lite.model.flow import expand_like

SIGMA_DATA = 0.5
LAST = math.pi / 2  # the t of pure noise
TIMES = {1: (LAST, 0.0), 2: (1.5683, 1.3, 0.0), 4: (1.5683, 1.3, 1.1, 0.6, 0.0)}
"""The published times of a sampler, by its number of steps."""

DENSITIES = {"consistency": (0.2, 1.6), "discriminator": (-0.6, 1.0)}
"""Mean and spread of log sigma, `sigma = s_d tan t`: where each loss looks."""

Predict = Callable[[Tensor, Tensor], Tensor]  # x_t (B, C, H, W) and t (B,) to F (B, C, H, W)


def to_flow_time(t: Tensor) -> Tensor:
    """`s = sin t / (sin t + cos t)`: the share of noise on the line of the same direction."""
    return torch.sin(t) / (torch.sin(t) + torch.cos(t))


def to_trig_time(s: Tensor) -> Tensor:
    """The inverse of `to_flow_time`: `t = atan(s / (1 - s))`, which is pi/2 for s = 1."""
    return torch.atan2(s, 1 - s)


def length(s: Tensor) -> Tensor:
    """`r = sqrt(s^2 + (1 - s)^2)`, the spread of `(1 - s) x0 + s eps` for data and noise of spread 1."""
    return torch.sqrt(s.square() + (1 - s).square())


def interpolate(x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
    """`x_t = s_d (cos(t) x0 + sin(t) eps)`; `x0`, `noise` (B, ...) of spread 1, `t` (B,)."""
    t = expand_like(t, x0)
    return SIGMA_DATA * (torch.cos(t) * x0 + torch.sin(t) * noise)


def velocity_target(x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
    """`F = cos(t) eps - sin(t) x0`; `x0`, `noise` (B, ...) of spread 1, `t` (B,)."""
    t = expand_like(t, x0)
    return torch.cos(t) * noise - torch.sin(t) * x0


def to_flow_state(x_t: Tensor, t: Tensor) -> Tensor:
    """The point of the line: `(1 - s) x0 + s eps`, what a flow network is given; `t` (B,)."""
    return x_t / SIGMA_DATA * expand_like(length(to_flow_time(t)), x_t)


def from_flow_state(x_s: Tensor, s: Tensor) -> Tensor:
    """The inverse of `to_flow_state`: a point of the line to one of the circle; `s` (B,)."""
    return x_s * SIGMA_DATA / expand_like(length(s), x_s)


def to_trig_velocity(x_s: Tensor, velocity: Tensor, s: Tensor) -> Tensor:
    """The network's answer as F.

    Args:
        x_s: what the network was given, `(1 - s) x0 + s eps` (B, ...).
        velocity: its answer `eps - x0` (B, ...).
        s: share of noise (B,).

    Returns:
        `cos(t) eps - sin(t) x0` (B, ...).
    """
    s = expand_like(s, x_s)
    return ((1 - 2 * s) * x_s + (1 - 2 * s + 2 * s.square()) * velocity) / length(s)


def to_flow_velocity(x_s: Tensor, trig_velocity: Tensor, s: Tensor) -> Tensor:
    """The inverse of `to_trig_velocity`; the factor of the velocity is never below 1/2."""
    s = expand_like(s, x_s)
    return (trig_velocity * length(s) - (1 - 2 * s) * x_s) / (1 - 2 * s + 2 * s.square())


def to_data(x_t: Tensor, trig_velocity: Tensor, t: Tensor) -> Tensor:
    """`s_d x0 = cos(t) x_t - sin(t) s_d F`; `t` (B,). Divide by `SIGMA_DATA` for latents."""
    t = expand_like(t, x_t)
    return torch.cos(t) * x_t - torch.sin(t) * SIGMA_DATA * trig_velocity


def predictor(transformer: Callable[..., object], text: Tensor, **options: object) -> Predict:
    """A flow transformer as a function of a point of the circle.

    Args:
        transformer: latents, text features and timestep (1000 s) to something with `.sample`.
        text: features (B, L, Dc).
        **options: for every call of it, such as `guidance`.

    Returns:
        x_t (B, C, H, W) and t (B,) to F (B, C, H, W).
    """

    def predict(x_t: Tensor, t: Tensor) -> Tensor:
        s = to_flow_time(t)
        x_s = to_flow_state(x_t, t)
        velocity = transformer(x_s.to(text.dtype), text, flow.TIMESTEP_SCALE * s, **options).sample
        return to_trig_velocity(x_s, velocity.to(x_s.dtype), s)

    return predict


def tangent(predict: Predict, x_t: Tensor, t: Tensor, dxdt: Tensor) -> tuple[Tensor, Tensor]:
    """The answer at `(x_t, t)`, and `cos(t) sin(t) dF/dt` along the path through it.

    The factor tames the derivative at both ends of the path. It is put on the direction, before the network, where
    numbers stay small.

    Args:
        predict: see `predictor`.
        x_t: point of the circle (B, C, H, W).
        t: (B,).
        dxdt: direction of the path, `s_d F` of the teacher (B, C, H, W).

    Returns:
        F (B, C, H, W) and its tangent (B, C, H, W), neither with a graph.

    Source: sCM, section 4.1 (tangent rearrangement).
    """
    weight = torch.cos(t) * torch.sin(t)  # (B,)
    with torch.no_grad():
        return torch.func.jvp(predict, (x_t, t), (expand_like(weight, x_t) * dxdt, weight))


def sample_times(count: int, generator: torch.Generator, mean: float, std: float) -> Tensor:
    """Times with a log-normal noise level: `t = atan(exp(mean + std n) / s_d)`, n standard normal.

    Args:
        count: how many.
        generator: source of randomness, on the CPU.
        mean: of log sigma; `DENSITIES` has the published ones.
        std: of log sigma.

    Returns:
        float32 (count,) in (0, pi/2).
    """
    return torch.atan(torch.exp(mean + std * torch.randn(count, generator=generator)) / SIGMA_DATA)


def to_last(t: Tensor, generator: torch.Generator, share: float = 0.5) -> Tensor:
    """Max-time weighting: each t (B,) becomes pi/2 with probability `share`, where one-step sampling begins."""
    return torch.where(torch.rand(len(t), generator=generator).to(t.device) < share, LAST, t)


def times(steps: int, shift: float | None = None) -> list[float]:
    """The times of a sampler, from noise to 0.

    Args:
        steps: of the sampler.
        shift: those of a flow sampler's even noise levels with this shift; None: the published ones, or evenly spaced
            where there are none.

    Raises:
        ValueError: for fewer than one step, or a shift below 1.
    """
    if steps < 1:
        raise InvalidValue(f"steps={steps}: must be >= 1")
    if shift is not None:
        levels = flow.shift_sigmas(flow.linear_sigmas(steps), shift)
        return [*to_trig_time(torch.tensor(levels, dtype=torch.float64)).tolist(), 0.0]
    return list(TIMES.get(steps) or [LAST * (1 - k / steps) for k in range(steps)] + [0.0])


def step(x_t: Tensor, trig_velocity: Tensor, t: float, t_next: float, noise: Tensor | None) -> Tensor:
    """One step of the sampler: a jump to the data, and back to `t_next` with new noise.

    Args:
        x_t: (B, C, H, W).
        trig_velocity: F at it.
        t, t_next: times.
        noise: of spread 1, (B, C, H, W); None for the last step, where t_next is 0.
    """
    data = math.cos(t) * x_t - math.sin(t) * SIGMA_DATA * trig_velocity
    return data if noise is None else math.cos(t_next) * data + math.sin(t_next) * SIGMA_DATA * noise


@torch.no_grad()
def sample(predict: Predict, noises: Sequence[Tensor], steps: Sequence[float]) -> Tensor:
    """Walks from noise to latents.

    Args:
        predict: see `predictor`.
        noises: of spread 1, (B, C, H, W) each: the start, and one for every step but the last.
        steps: falling times, the last of them 0, see `times`.

    Returns:
        Latents of spread 1 (B, C, H, W).

    Raises:
        ValueError: times that do not fall to 0, or another number of noises than of steps.
    """
    if len(steps) < 2 or steps[-1] != 0 or any(b >= a for a, b in zip(steps, steps[1:], strict=False)):
        raise InvalidValue(f"steps={list(steps)}: must fall, and end with 0")
    if len(noises) != len(steps) - 1:
        raise InvalidValue(f"noises: {len(noises)} for {len(steps) - 1} steps; expected one for the start of each")
    x_t = SIGMA_DATA * noises[0]
    for k, (t, t_next) in enumerate(zip(steps, steps[1:], strict=False)):
        answer = predict(x_t, x_t.new_full((len(x_t),), t))
        x_t = step(x_t, answer, t, t_next, noises[k + 1] if k + 1 < len(noises) else None)
    return x_t / SIGMA_DATA
