"""A few samples by heart: what a run must be able to do before it may take days.

The engine of the run trains the stage on the samples of its first step alone, always with the same captions, noise
levels and noise. Nothing is new from step to step, so a model that learns at all learns these by heart and its loss
goes towards zero. Where it does not, the learning rate, the number type, the kernels or the data are wrong, and a
million samples will not mend that. What cannot be seen this way is what generalising takes, like captions that do not
fit.

Source: the practice of overfitting one batch first; Karpathy, "A Recipe for Training Neural Networks", 2019.
"""

from __future__ import annotations

import dataclasses
import math
import tempfile
from typing import Any

from torch import Tensor
from tqdm.auto import trange

from nitro_e_lite.config import TrainConfig
from nitro_e_lite.errors import InvalidValue
from nitro_e_lite.model import flow
from nitro_e_lite.stages.pretrain import Pretrain
from nitro_e_lite.training.engine import Engine

LIMIT = 0.5  # of what the model begins with, or of what no model at all leaves


class _FirstBatch(Pretrain):
    """The stage with the samples of its first step, again and again."""

    def losses(self, step: int, part: int) -> dict[str, dict[str, Tensor]]:
        return super().losses(0, part)


def overfit(
    config: TrainConfig,
    samples: int = 8,
    steps: int = 60,
    device: str | None = None,
) -> dict[str, Any]:
    """Trains the model of `config` from its start on one small batch, in this process.

    Args:
        config: of the run; its data, encoders, model, optimiser and number type are used as they are. The rate is
            reached after a tenth of the steps and stays; of synthetic scenes only a few are made.
        samples: in the batch.
        steps: to train. 60 are enough for a model as wide as the lite one; a narrower one with AdamW takes more.
        device: to train on.

    Returns:
        `left`: after 0, 1, 2, ... steps the flow loss divided by the mean square of the velocities; 1 is what a model
        has that predicts nothing, and None a loss that is not finite. `spread`: standard deviation of the latents,
        near 1 when their scaling is right. `skipped` steps. `goal`: `LIMIT`, or `LIMIT` times the first share
        where a trained model begins with less than 1. `ok`: less than that is left at the end, no step skipped.

    Raises:
        ValueError: fewer than 10 steps.
    """
    if steps < 10:
        raise InvalidValue(f"steps={steps}: must be at least 10")
    optimizer = dataclasses.replace(config.optimizer, warmup_steps=max(1, steps // 10), decay_steps=0)
    data = config.data
    if not data.folders:  # scenes have to be encoded first; a few will do
        few = {"scenes": min(data.scenes, 16 * samples), "validation_scenes": min(data.validation_scenes, samples)}
        data = dataclasses.replace(data, **few)
    changes = {"batch_size": samples, "accumulate": 1, "steps": steps + 1, "max_skipped": steps + 1, "tracker": "none"}
    config = dataclasses.replace(config, **changes, data=data, optimizer=optimizer)
    with tempfile.TemporaryDirectory() as folder:
        engine = Engine(config, _FirstBatch, folder, device=device)
        batch = engine.stage.batches.local(0)
        variance = flow.velocity_target(batch.latents, batch.noise).square().mean().item()
        left = []
        for _ in trange(steps + 1, desc="overfit", disable=None):
            row = engine.step()
            loss = float(row.get("flow_loss", row["loss"]))
            left.append(loss / variance if math.isfinite(loss) else None)
        goal = LIMIT * min(1.0, left[0] or 1.0)
        ok = left[-1] is not None and left[-1] < goal and not engine.health.skipped
        spread = batch.latents.std().item()
        return {"left": left, "goal": goal, "spread": spread, "skipped": engine.health.skipped, "ok": ok}
