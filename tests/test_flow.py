"""The flow convention: conversions invert each other, the sampler solves a problem with a known answer."""

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler

from nitro_e_lite.model import flow


@pytest.fixture
def point():
    generator = torch.Generator().manual_seed(0)
    x0, noise = (torch.randn(4, 3, 8, 8, generator=generator, dtype=torch.float64) for _ in range(2))
    t = torch.rand(4, generator=generator, dtype=torch.float64)
    return x0, noise, t


def test_ends_of_the_line(point):
    x0, noise, _ = point
    assert torch.equal(flow.interpolate(x0, noise, torch.zeros(4, dtype=torch.float64)), x0)
    assert torch.equal(flow.interpolate(x0, noise, torch.ones(4, dtype=torch.float64)), noise)


def test_conversions_recover_data_and_noise(point):
    x0, noise, t = point
    x_t, v = flow.interpolate(x0, noise, t), flow.velocity_target(x0, noise)
    torch.testing.assert_close(flow.to_data(x_t, v, t), x0)
    torch.testing.assert_close(flow.to_noise(x_t, v, t), noise)


def test_velocity_is_the_derivative_of_the_line(point):
    x0, noise, t = point
    _, slope = torch.func.jvp(lambda s: flow.interpolate(x0, noise, s), (t,), (torch.ones_like(t),))
    torch.testing.assert_close(slope, flow.velocity_target(x0, noise))


def test_euler_on_one_known_image_is_exact_in_any_number_of_steps(point):
    """With a single data point the true velocity is (x_t - x0) / t, and straight paths make Euler exact."""
    x0, noise, _ = point
    for steps in (1, 3, 20):
        x, sigmas = noise, [*flow.linear_sigmas(steps), 0.0]
        for now, then in zip(sigmas, sigmas[1:], strict=False):
            x = flow.euler_step(x, (x - x0) / now, now, then)
        torch.testing.assert_close(x, x0)


def test_linear_sigmas():
    assert flow.linear_sigmas(4) == [1.0, 0.75, 0.5, 0.25]
    with pytest.raises(ValueError, match="steps=0"):
        flow.linear_sigmas(0)


def test_shifted_sigmas_are_those_of_diffusers():
    even = flow.linear_sigmas(5)
    assert flow.shift_sigmas(even, 1.0) == even
    scheduler = FlowMatchEulerDiscreteScheduler(1000, shift=3.0)
    scheduler.set_timesteps(sigmas=even)
    assert flow.shift_sigmas(even, 3.0) == pytest.approx(scheduler.sigmas[:-1].tolist())
    for shift in (0.5, 1e300):
        with pytest.raises(ValueError, match="shift=.*: must be >= 1 and at most 1000"):
            flow.shift_sigmas(even, shift)


def test_logit_normal_moments():
    t = flow.sample_timesteps(200_000, torch.Generator().manual_seed(0), mean=0.5, std=0.8)
    logit = torch.logit(t.double())
    assert abs(logit.mean() - 0.5) < 0.01 and abs(logit.std() - 0.8) < 0.01  # 5 standard errors
    assert 0 < t.min() and t.max() < 1


def test_guidance():
    c, u = torch.tensor([2.0]), torch.tensor([1.0])
    assert flow.guide(c, u, 1.0) == 2.0 and flow.guide(c, u, 0.0) == 1.0 and flow.guide(c, u, 3.0) == 4.0
