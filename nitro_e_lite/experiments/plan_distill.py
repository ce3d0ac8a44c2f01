"""What a distillation will cost before it is started: the drawing of the teacher's pictures, and the training on them.

With F the FLOPs of one forward pass of one sample, K steps of the student, and a share r of later inputs from its own
steps (`distill.py`), on average

    a picture of the teacher     steps * (2 with guidance, else 1) * F, and the caption once
    phase 1, a sample            3 F
    phase 2, roll-outs           r (K - 1) / 2 * F, in both turns
    phase 2, the student's turn  3 F + 2 F for the discriminator's features, forward and back to their input
    phase 2, the heads' turn     F + 2 F for the features of both pictures, + F with misaligned pairs

The heads themselves are small and left out, and so are validation and its pictures. Peak and utilisation are those of
`plan.py`, with the same word of caution: the utilisation is the published *training* run's.
"""

from __future__ import annotations

from dataclasses import dataclass

from nitro_e_lite.config import DistillConfig, TrainConfig
from nitro_e_lite.experiments.plan import check_pictures, forward_flops, frozen_encoders, speed_of
from nitro_e_lite.model.flops import PUBLISHED_HARDWARE, TRAINING_PASSES

TEACHER = {"lite": (8, 0.0)}  # steps and guidance: `lite-grpo` needs no more; others 20, as they were trained
PICTURES = {"smoke": 100, "lite": 6000, "full": 1_000_000}  # of the full run nothing is published


@dataclass(frozen=True)
class DistillPlan:
    """What drawing and distilling need. Bytes, FLOPs and seconds without prefixes.

    Attributes:
        pictures: that the teacher draws.
        picture_flops: of one of them.
        sample_flops: of one training sample, by phase.
        hours: of all devices together: "draw", "phase 1", "phase 2".
        disk: bytes of the drawn set, by column.
        peak: FLOP/s of one device.
        mfu: assumed utilisation.
    """

    pictures: int
    picture_flops: float
    sample_flops: dict[str, float]
    hours: dict[str, float]
    disk: dict[str, float]
    peak: float
    mfu: float


def plan_distill(
    config: DistillConfig,
    teacher: TrainConfig,
    hardware: str = PUBLISHED_HARDWARE,
    devices: int = 1,
    mfu: float | None = None,
    peak_tflops: float | None = None,
    pictures: int | None = None,
    text: bool = False,
) -> DistillPlan:
    """Plans a distillation.

    Args:
        config: of the stage.
        teacher: how the teacher was trained: its shape, guidance and encoders.
        hardware: a name in `flops.HARDWARE`.
        devices: how many of them, one process each.
        mfu: utilisation in (0, 1]; that of the published run when None.
        peak_tflops: of one device; the data sheet's when None, measured here for "cpu".
        pictures: that the teacher draws; `PICTURES` of the preset when None.
        text: whether text features are stored too.

    Raises:
        ValueError: unknown hardware, or a number outside of its range.
    """
    peak, mfu = speed_of(hardware, devices, mfu, peak_tflops)
    count = PICTURES[config.preset] if pictures is None else pictures
    check_pictures(count)
    encoders, speed = frozen_encoders(teacher), devices * peak * mfu
    one, caption = forward_flops(teacher), encoders["text"].flops
    steps, guidance = TEACHER.get(config.preset, (20, teacher.guidance))
    picture = steps * (2 if guidance > 1 else 1) * one + caption
    samples = _sample_flops(config, one)
    phases = {"phase 1": config.regression_steps, "phase 2": config.steps - config.regression_steps}
    read = {"phase 1": 1.0, "phase 2": 1.5 if config.adversarial_weight and config.misaligned else 1.0}  # captions
    cost = {name: samples[name] + (0 if text else read[name] * caption) for name in phases}  # of a sample
    hours = {"draw": count * picture / speed / 3600}
    hours |= {name: steps * config.batch_size * cost[name] / speed / 3600 for name, steps in phases.items()}
    latents = count * encoders["latents"].stored
    disk = {"latents": latents, "states": (config.sampler_steps - 1) * latents}
    disk |= {"text": count * encoders["text"].stored} if text else {}
    return DistillPlan(count, picture, samples, hours, disk, peak, mfu)


def _sample_flops(config: DistillConfig, one: float) -> dict[str, float]:
    """FLOPs of one training sample in each phase, the mean over both turns in the second."""
    rollout = 0 if config.jumps else config.own_rollouts * (config.sampler_steps - 1) / 2
    student = TRAINING_PASSES + rollout
    if config.adversarial_weight:
        heads = 1 + rollout + 2 + (config.misaligned > 0)
        return {"phase 1": TRAINING_PASSES * one, "phase 2": (student + 2 + heads) / 2 * one}
    return {"phase 1": TRAINING_PASSES * one, "phase 2": student * one}
