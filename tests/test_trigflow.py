"""TrigFlow against closed forms, diffusers' own sampler and finite differences."""

import math

import pytest
import torch
from diffusers import SCMScheduler
from torch import nn

from nitro_e_lite.model import flow, trigflow
from nitro_e_lite.model.emmdit import EMMDiTTransformer2DModel

EXACT = {"rtol": 0, "atol": 1e-10}


def drawn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.fixture(scope="module")
def points():
    """Data, noise and times, the ends of the path among them; float64."""
    t = torch.cat([torch.linspace(1e-9, math.pi / 2 - 1e-9, 61, dtype=torch.float64), torch.tensor([0, math.pi / 2])])
    return drawn(len(t), 4, 3, 3), drawn(len(t), 4, 3, 3, seed=1), t


def test_circle_and_line_are_one_network(points):
    """A flow model that knows x0 and eps, asked through `predictor`, answers with the TrigFlow target."""
    x0, noise, t = points
    s = trigflow.to_flow_time(t)
    x_t = trigflow.interpolate(x0, noise, t)
    torch.testing.assert_close(trigflow.to_flow_state(x_t, t), flow.interpolate(x0, noise, s), **EXACT)
    asked = []

    class Known(nn.Module):
        def forward(self, x_s, text, timestep):
            asked.append(timestep)
            self.sample = flow.velocity_target(x0, noise)
            return self

    answer = trigflow.predictor(Known(), drawn(1))(x_t, t)
    torch.testing.assert_close(asked[0], 1000 * s, **EXACT)
    torch.testing.assert_close(answer, trigflow.velocity_target(x0, noise, t), **EXACT)
    torch.testing.assert_close(trigflow.to_data(x_t, answer, t), trigflow.SIGMA_DATA * x0, **EXACT)


def test_changes_of_coordinates_have_inverses(points):
    x0, noise, t = points
    s = trigflow.to_flow_time(t)
    torch.testing.assert_close(trigflow.to_trig_time(s), t, **EXACT)
    x_t = trigflow.interpolate(x0, noise, t)
    torch.testing.assert_close(trigflow.from_flow_state(trigflow.to_flow_state(x_t, t), s), x_t, **EXACT)
    there = trigflow.to_trig_velocity(x0, noise, s)
    torch.testing.assert_close(trigflow.to_flow_velocity(x0, there, s), noise, **EXACT)


def test_the_target_is_the_derivative_of_the_path():
    x0, noise = drawn(8, 2, 2, 2), drawn(8, 2, 2, 2, seed=1)
    t = torch.linspace(0.1, 1.4, 8, dtype=torch.float64)
    _, slope = torch.func.jvp(lambda t: trigflow.interpolate(x0, noise, t), (t,), (torch.ones_like(t),))
    torch.testing.assert_close(slope, trigflow.SIGMA_DATA * trigflow.velocity_target(x0, noise, t), **EXACT)


@pytest.mark.parametrize("mean, std", trigflow.DENSITIES.values(), ids=trigflow.DENSITIES)
def test_densities(mean, std):
    """log(s_d tan t) is normal: its mean, spread and the share below one standard deviation."""
    t = trigflow.sample_times(20_000, torch.Generator().manual_seed(0), mean, std)
    assert t.min() > 0 and t.max() < math.pi / 2 + 1e-6
    normal = (torch.log(trigflow.SIGMA_DATA * torch.tan(t.double())) - mean) / std
    assert abs(normal.mean()) < 0.03 and abs(normal.std() - 1) < 0.03
    assert abs((normal < 1).double().mean() - 0.8413) < 0.01


def test_max_time_weighting_moves_its_share():
    t = torch.full((20_000,), 0.3)
    moved = trigflow.to_last(t, torch.Generator().manual_seed(0), 0.5)
    assert set(moved.unique().tolist()) == {t[0].item(), torch.tensor(math.pi / 2).item()}
    assert abs((moved > 1).float().mean() - 0.5) < 0.015
    assert torch.equal(trigflow.to_last(t, torch.Generator(), 0.0), t)


@pytest.mark.parametrize("steps", [1, 2, 3, 4])
def test_sampler_agrees_with_diffusers(steps):
    def predict(x_t, t):
        return torch.tanh(x_t.flip(-1) + flow.expand_like(t, x_t))

    levels = trigflow.times(steps)
    assert len(levels) == steps + 1
    scheduler = SCMScheduler()
    scheduler.set_timesteps(steps, timesteps=levels, max_timesteps=None, intermediate_timesteps=None)
    generator = torch.Generator().manual_seed(3)
    x_t = trigflow.SIGMA_DATA * torch.randn(2, 4, 8, 8, generator=generator)
    for t in scheduler.timesteps[:-1]:
        output = scheduler.step(
            trigflow.SIGMA_DATA * predict(x_t, t.expand(2)), t, x_t, generator=generator, return_dict=False
        )
        x_t = output[0]
    generator = torch.Generator().manual_seed(3)
    noises = [torch.randn(2, 4, 8, 8, generator=generator) for _ in range(steps)]
    mine = trigflow.sample(predict, noises, levels)
    torch.testing.assert_close(mine, x_t / trigflow.SIGMA_DATA, rtol=1e-4, atol=1e-5)


def test_even_times_are_those_of_diffusers():
    scheduler = SCMScheduler()
    scheduler.set_timesteps(3, intermediate_timesteps=None)  # without that argument any number but 2 is refused
    torch.testing.assert_close(torch.tensor(trigflow.times(3)), scheduler.timesteps, rtol=1e-5, atol=1e-5)


def test_times_can_be_the_noise_levels_of_a_flow_sampler():
    levels = torch.tensor([*flow.shift_sigmas(flow.linear_sigmas(4), 3.0), 0.0], dtype=torch.float64)
    assert levels.tolist() == pytest.approx([1, 0.9, 0.75, 0.5, 0])
    back = trigflow.to_flow_time(torch.tensor(trigflow.times(4, shift=3.0), dtype=torch.float64))
    torch.testing.assert_close(back, levels, **EXACT)
    assert trigflow.times(4) == [1.5683, 1.3, 1.1, 0.6, 0.0]  # the published
    with pytest.raises(ValueError, match="shift=0.5"):
        trigflow.times(2, shift=0.5)


def test_a_perfect_model_needs_one_step():
    x0, noise = drawn(3, 4, 8, 8), drawn(3, 4, 8, 8, seed=1)

    def predict(x_t, t):  # knows x0, and reads the noise off the point
        t = flow.expand_like(t, x_t)
        eps = (x_t / trigflow.SIGMA_DATA - torch.cos(t) * x0) / torch.sin(t)
        return torch.cos(t) * eps - torch.sin(t) * x0

    for steps in (1, 2, 4):
        noises = [noise, *(drawn(3, 4, 8, 8, seed=k) for k in range(2, 1 + steps))]
        torch.testing.assert_close(trigflow.sample(predict, noises, trigflow.times(steps)), x0, **EXACT)


@pytest.mark.parametrize("steps, words", [([1.0, 0.5], "end with 0"), ([1.0, 1.2, 0.0], "must fall"), ([0.0], "fall")])
def test_bad_times_are_refused(steps, words):
    with pytest.raises(ValueError, match=words):
        trigflow.sample(lambda x, t: x, [drawn(1, 1, 2, 2)] * 2, steps)
    with pytest.raises(ValueError, match="noises: 1 for 2 steps"):
        trigflow.sample(lambda x, t: x, [drawn(1, 1, 2, 2)], [1.0, 0.5, 0.0])
    with pytest.raises(ValueError, match="steps=0"):
        trigflow.times(0)


class Waves(nn.Module):
    """The library's sinusoid, in float64: its own rounds 1000 s to float32, too coarse for a difference quotient."""

    def forward(self, timestep):
        frequencies = torch.exp(-math.log(10_000) * torch.arange(128, dtype=torch.float64) / 128)
        angles = timestep[:, None] * frequencies
        return torch.cat([torch.cos(angles), torch.sin(angles)], dim=1)


@pytest.mark.parametrize("backend", ["auto", "math"])
def test_tangent_agrees_with_finite_differences(backend):
    """Forward mode through the whole transformer, compression and subregion attention included."""
    torch.manual_seed(0)
    model = EMMDiTTransformer2DModel(
        sample_size=8,
        in_channels=2,
        num_attention_heads=2,
        attention_head_dim=8,
        caption_channels=8,
        block_groups=(1, 2, 1),
        attention_pattern=((1, 1), (4, 1), (4, 1), (1, 1)),
    ).double()
    model.set_attention_kernel(backend)
    timestep = torch.tensor([3.0, 500.0])
    library, model.time_embed.sinusoid = model.time_embed.sinusoid, Waves()
    torch.testing.assert_close(library(timestep).double(), Waves()(timestep.double()), rtol=0, atol=1e-4)
    t = torch.tensor([0.2, 0.8, 1.3], dtype=torch.float64)
    x_t, dxdt, text = drawn(3, 2, 8, 8), drawn(3, 2, 8, 8, seed=1), drawn(3, 12, 8, seed=2)
    predict = trigflow.predictor(model, text)
    answer, slope = trigflow.tangent(predict, x_t, t, dxdt)
    assert not answer.requires_grad and not slope.requires_grad
    weight = torch.cos(t) * torch.sin(t)
    with torch.no_grad():
        torch.testing.assert_close(answer, predict(x_t, t), rtol=1e-9, atol=1e-9)
        h = 1e-6
        ahead = predict(x_t + h * flow.expand_like(weight, x_t) * dxdt, t + h * weight)
        behind = predict(x_t - h * flow.expand_like(weight, x_t) * dxdt, t - h * weight)
    difference = (ahead - behind) / (2 * h)
    assert difference.norm() > 0.1
    torch.testing.assert_close(slope, difference, rtol=1e-4, atol=1e-4 * difference.abs().max().item())
