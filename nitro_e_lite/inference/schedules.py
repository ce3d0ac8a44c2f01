"""Any flow scheduler of diffusers, told the noise levels of one call.

A model of this project is drawn on a grid of its own (`flow.linear_sigmas`, shifted). Schedulers that take noise levels
(Euler, UniPC) are given it; those that take none (Heun, DPM-Solver) make theirs, with the same shift. Whoever does it,
the shift is applied once.
"""

import copy
import inspect
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, SchedulerMixin, SCMScheduler

from nitro_e_lite.errors import InvalidValue
from nitro_e_lite.model import flow, trigflow


@dataclass(frozen=True)
class Sampler:
    """The settings of a sampler, all of them known; `NitroEPipeline.sampler` fills in and checks.

    Attributes:
        steps: number of steps `K`.
        guidance: strength of classifier-free guidance; up to 1 it is off.
        shift: how far the noise levels lean towards noise; 1: even steps.
    """

    steps: int
    guidance: float
    shift: float

    def arguments(self) -> dict[str, Any]:
        """The same as arguments of a call of the pipeline."""
        return {"num_inference_steps": self.steps, "guidance_scale": self.guidance, "shift": self.shift}


def own_shift(scheduler: SchedulerMixin) -> float:
    """The shift a scheduler was built with."""
    if isinstance(getattr(type(scheduler), "shift", None), property):
        return float(scheduler.shift)
    return float(scheduler.config.get("shift", scheduler.config.get("flow_shift", 1.0)))


def draws_noise(scheduler: SchedulerMixin) -> bool:
    """Whether its steps draw noise, so that the noise at the start does not decide the picture."""
    if isinstance(scheduler, FlowMatchEulerDiscreteScheduler):  # takes a generator in any case
        return bool(scheduler.config.get("stochastic_sampling"))
    if str(scheduler.config.get("algorithm_type", "")).startswith("dpmsolver"):  # and not "sde-dpmsolver"
        return False
    return "generator" in inspect.signature(scheduler.step).parameters


def takes_sigmas(scheduler: SchedulerMixin) -> bool:
    """Can a caller name the noise levels?"""
    return "sigmas" in inspect.signature(scheduler.set_timesteps).parameters


def grid(scheduler: SchedulerMixin, sigma_grid: str, sampler: Sampler) -> list[float]:
    """The noise levels that the steps of a call begin at.

    Raises:
        ValueError: the scheduler of a consistency model, which draws from noise alone.
    """
    if isinstance(scheduler, SCMScheduler):
        raise InvalidValue("scheduler: SCMScheduler has no noise levels; a consistency model draws from noise alone")
    if sigma_grid == "linear" and takes_sigmas(scheduler):
        return flow.shift_sigmas(flow.linear_sigmas(sampler.steps), sampler.shift)
    return started(scheduler, sigma_grid, sampler, None, "cpu").sigmas[:-1].tolist()


def started(
    scheduler: SchedulerMixin,
    sigma_grid: str,
    sampler: Sampler,
    sigmas: list[float] | None,
    device: torch.device | str,
) -> SchedulerMixin:
    """A copy of the scheduler at the start of a walk: it counts steps, and several walks share the original.

    Args:
        scheduler: of the pipeline.
        sigma_grid: "linear" or "scheduler", see `pipeline.py`.
        sampler: steps and shift.
        sigmas: noise levels to use as they are, in place of those.
        device: of the walk.

    Raises:
        ValueError: a scheduler that is not for flow models, or that takes no noise levels where some were given.
    """
    scheduler = copy.deepcopy(scheduler)
    if isinstance(scheduler, SCMScheduler):
        if sigmas is not None:
            raise InvalidValue("sigmas: a consistency model takes none; give num_inference_steps, and shift")
        times = trigflow.times(sampler.steps, sampler.shift if sigma_grid == "linear" else None)
        named = {"timesteps": times, "max_timesteps": None, "intermediate_timesteps": None}
        scheduler.set_timesteps(sampler.steps, **named, device=device)
        return scheduler
    _check(scheduler)
    if sigmas is not None and not takes_sigmas(scheduler):
        raise InvalidValue(f"sigmas: {type(scheduler).__name__} takes none; it makes its own from num_inference_steps")
    if sigma_grid == "linear" and sigmas is None and takes_sigmas(scheduler):
        sigmas = grid(scheduler, sigma_grid, sampler)
    if sigmas is not None:
        _set_shift(scheduler, 1.0)
        scheduler.set_timesteps(sigmas=np.array(sigmas), device=device)
        return scheduler
    if sigma_grid == "linear":
        _set_shift(scheduler, sampler.shift)
    scheduler.set_timesteps(sampler.steps, device=device)
    return scheduler


def _set_shift(scheduler: SchedulerMixin, shift: float) -> None:
    if hasattr(scheduler, "set_shift"):
        scheduler.set_shift(shift)
    else:
        scheduler.register_to_config(**{"shift" if "shift" in scheduler.config else "flow_shift": shift})


def _check(scheduler: SchedulerMixin) -> None:
    name, config = type(scheduler).__name__, scheduler.config
    if not name.startswith("FlowMatch"):
        for field, wanted in (("use_flow_sigmas", True), ("prediction_type", "flow_prediction")):
            if config.get(field) != wanted:
                rule = f"this model predicts the velocity of a flow; build it with {field}={wanted!r}"
                raise InvalidValue(f"scheduler: {name} has {field}={config.get(field)!r}; {rule}")
    if config.get("use_dynamic_shifting"):
        raise InvalidValue(f"scheduler: {name} has use_dynamic_shifting=True; build it with a fixed shift")
