"""Rectified flow in pure functions: the one place where the flow convention is stated.

A clean latent `x0` and Gaussian noise `eps` are joined by a straight line, and the model learns its direction:

    x_t = (1 - t) x0 + t eps,        v = dx_t / dt = eps - x0,        t in [0, 1], t = 1 is noise.

The line makes three facts cheap: any of x0, eps, v follows from x_t and one other; the training target does not depend
on t; and sampling is the ordinary differential equation dx = v dt, walked from t = 1 to t = 0. `sigma` and `t` name
the same number (the share of noise). The network itself is told `1000 t`, the range the official weights expect.

Source: rectified flow (Liu et al., 2022); logit-normal timesteps (Esser et al., 2024), used by Nitro-E with mean 0 and
standard deviation 1.
"""

from __future__ import annotations

import torch
from torch import Tensor

from nitro_e_lite.config import MAX_SHIFT
from nitro_e_lite.errors import InvalidValue

TIMESTEP_SCALE = 1000.0  # the model's timestep argument is TIMESTEP_SCALE * t


def expand_like(t: Tensor, x: Tensor) -> Tensor:
    """Appends axes of length one to `t` (B,) so that it multiplies `x` (B, ...)."""
    return t.reshape(-1, *[1] * (x.ndim - 1))


def sample_timesteps(count: int, generator: torch.Generator, mean: float = 0.0, std: float = 1.0) -> Tensor:
    """Logit-normal timesteps: `sigmoid(mean + std n)`, n standard normal.

    Args:
        count: how many.
        generator: source of randomness, on the CPU.
        mean: of the logit; positive values favour noisy samples.
        std: of the logit.

    Returns:
        float32 (count,) in (0, 1).
    """
    return torch.sigmoid(mean + std * torch.randn(count, generator=generator))


def interpolate(x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
    """`x_t = (1 - t) x0 + t eps`; `x0` and `noise` (B, ...), `t` (B,)."""
    return torch.lerp(x0, noise, expand_like(t, x0))


def velocity_target(x0: Tensor, noise: Tensor) -> Tensor:
    """`v = eps - x0`."""
    return noise - x0


def to_data(x_t: Tensor, velocity: Tensor, t: Tensor) -> Tensor:
    """`x0 = x_t - t v`; `t` (B,)."""
    return x_t - expand_like(t, x_t) * velocity


def to_noise(x_t: Tensor, velocity: Tensor, t: Tensor) -> Tensor:
    """`eps = x_t + (1 - t) v`; `t` (B,)."""
    return x_t + (1 - expand_like(t, x_t)) * velocity


def euler_step(x_t: Tensor, velocity: Tensor, t: float, t_next: float) -> Tensor:
    """One step of the sampler: `x + (t_next - t) v`."""
    return x_t + (t_next - t) * velocity


def guide(conditional: Tensor, unconditional: Tensor, scale: float) -> Tensor:
    """Classifier-free guidance: `v_u + scale (v_c - v_u)`; scale 1 is the conditional model."""
    return torch.lerp(unconditional, conditional, scale)


def linear_sigmas(steps: int) -> list[float]:
    """The sampling grid `1, (n-1)/n, ..., 1/n` (the final 0 is implied): `steps` equal, useful steps.

    Differs: diffusers' own grid for shift 1 ends `..., 0.001, 0`, which spends one of the steps on nothing.

    Raises:
        ValueError: for fewer than one step.
    """
    if steps < 1:
        raise InvalidValue(f"steps={steps}: must be >= 1")
    return [1 - k / steps for k in range(steps)]


def shift_sigmas(sigmas: list[float], shift: float) -> list[float]:
    """`s u / (1 + (s - 1) u)`: as many steps, more of them where there is much noise; shift 1 changes nothing.

    Source: Stable Diffusion 3 (arXiv 2403.03206).

    Raises:
        ValueError: for a shift below 1, or above `config.MAX_SHIFT`.
    """
    if not 1 <= shift <= MAX_SHIFT:
        raise InvalidValue(f"shift={shift}: must be >= 1 and at most {MAX_SHIFT:g}")
    return [shift * sigma / (1 + (shift - 1) * sigma) for sigma in sigmas]
