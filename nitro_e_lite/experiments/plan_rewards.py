"""What learning from rewards will cost before it is started: roll-outs, rewards, updates.

With F the FLOPs of one forward pass of one sample, K steps of a roll-out, g = 2 with guidance and 1 without, an
iteration of N = `updates * batch_size` pictures in groups of G costs

    roll-outs           N (K g F + decoder), N / G captions
    updates, forward    N times ((1 + g) F + g old + g reference), see `rewards_forward.py`
    updates, grpo       N window ((1 + g) F + g reference with kl), see `rewards_grpo.py`

A step learns an adapter: the way back passes through the frozen matrices to their inputs alone, so it costs one forward
pass and not two. A guided update has its part without text in the forward direction only. The adapter's own products
are small and left out. Lite rewards cost next to nothing. GenEval and HPSv2.1 run in environments and on devices of
their own: what is planned for them is how many pictures a second they must judge to take a tenth of the time.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from nitro_e_lite.config import RewardConfig, TrainConfig
from nitro_e_lite.experiments.plan import decoder_flops, forward_flops, frozen_encoders, speed_of
from nitro_e_lite.model.flops import PUBLISHED_HARDWARE

JUDGING = 0.1  # of the time of everything else, that rewards may take


@dataclass(frozen=True)
class RewardPlan:
    """What learning from rewards needs.

    Attributes:
        iterations: roll-outs.
        pictures: drawn in all.
        flops: of an iteration, by part: "roll-outs", "updates".
        hours: of all devices together, by part, without rewards.
        judged_per_second: pictures that every reward must judge a second to take a tenth of that time.
        peak: FLOP/s of one device.
        mfu: assumed utilisation.
    """

    iterations: int
    pictures: int
    flops: dict[str, float]
    hours: dict[str, float]
    judged_per_second: float
    peak: float
    mfu: float


def plan_rewards(
    config: RewardConfig,
    model: TrainConfig,
    hardware: str = PUBLISHED_HARDWARE,
    devices: int = 1,
    mfu: float | None = None,
    peak_tflops: float | None = None,
) -> RewardPlan:
    """Plans a run that learns from rewards.

    Args:
        config: of the stage.
        model: how the model it starts from was trained: its shape and encoders.
        hardware: a name in `flops.HARDWARE`.
        devices: how many of them, one process each.
        mfu: utilisation in (0, 1]; that of the published run when None.
        peak_tflops: of one device; the data sheet's when None, measured here for "cpu".

    Raises:
        ValueError: unknown hardware, or a number outside of its range.
    """
    peak, mfu = speed_of(hardware, devices, mfu, peak_tflops)
    model = dataclasses.replace(model, repa=dataclasses.replace(model.repa, weight=0.0))
    one, pictures = forward_flops(model), config.updates * config.batch_size
    guided = 2 if config.guidance > 1 else 1
    captions = pictures / config.group * frozen_encoders(model)["text"].flops
    looks = config.grpo.window if config.method == "grpo" else config.forward.times
    reference = config.grpo.kl if config.method == "grpo" else config.forward.reference_weight
    others = guided * ((config.method != "grpo") + (reference > 0))  # the old policy's passes, the reference's
    flops = {
        "roll-outs": pictures * (config.rollout_steps * guided * one + decoder_flops(model)) + captions,
        "updates": pictures * looks * (1 + guided + others) * one,
    }
    iterations = -(-config.steps // config.updates)
    hours = {name: iterations * value / (devices * peak * mfu) / 3600 for name, value in flops.items()}
    judged = iterations * pictures / (JUDGING * 3600 * sum(hours.values()))
    return RewardPlan(iterations, iterations * pictures, flops, hours, judged, peak, mfu)
