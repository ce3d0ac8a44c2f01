"""Which facts of a caption a model reads, without drawing a picture.

Take a minimal pair (`minimal_pairs.py`): two scenes and two captions that differ in one fact. Noise the first scene,
let the model predict the velocity once with the right caption and once with the other's. If the loss is the same, the
model does not read the fact; by how much it rises says how much it does, and at which noise levels. It costs a few
forward passes, needs no sampler and no judge, and it moves long before GenEval-lite does: a model that scores zero on
"a red circle and a blue square" may already have begun to tell which is red.

Beside it stands how much the text encoder's features depend on the fact: by what share of their length they move from
one caption to the other. A fact that hardly moves them is hard to learn.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import count, islice

import torch
from torch import Tensor

from nitro_e_lite.config import FACTS
from nitro_e_lite.errors import InvalidValue
from nitro_e_lite.inference.encoders import encode_images
from nitro_e_lite.inference.pipeline import NitroEPipeline
from nitro_e_lite.model import flow
from nitro_e_lite.runtime import check_memory
from nitro_e_lite.scenes.minimal_pairs import MinimalPair, minimal_pair
from nitro_e_lite.scenes.render import render
from nitro_e_lite.stats import interval

HELD_OUT_SEED = 30_000  # pairs of this seed are for measuring
TIMES = (0.82, 0.90, 0.95)


@dataclass(frozen=True)
class Reading:
    """How much the loss at noise level `t` rises when one fact of the caption is wrong.

    Attributes:
        fact: one of `config.FACTS`.
        t: noise level.
        loss: mean squared velocity error with the right caption.
        rise: of the loss with the other caption, and `margin`, half its 95 % interval over the pairs.
        right: share of the pictures that the right caption fits better than the other; 0.5 is chance.
        text: change of the text features from one caption to the other, as a share of their length; median.
    """

    fact: str
    t: float
    loss: float
    rise: float
    margin: float
    right: float
    text: float


def pairs_of(fact: str, number: int, seed: int = HELD_OUT_SEED) -> list[MinimalPair]:
    """The first `number` minimal pairs that differ in `fact`."""
    return list(islice((pair for pair in (minimal_pair(seed, i) for i in count()) if pair.fact == fact), number))


@torch.no_grad()
def caption_sensitivity(
    pipeline: NitroEPipeline,
    pairs: int = 32,
    times: Sequence[float] = TIMES,
    facts: Sequence[str] = FACTS,
    batch_size: int = 32,
) -> list[Reading]:
    """Measures a pipeline on held-out minimal pairs; the noise is the same for every model of the same size.

    Args:
        pipeline: what to measure.
        pairs: of each fact, at least 2.
        times: noise levels in (0, 1].
        facts: which.
        batch_size: pictures at once.

    Raises:
        ValueError: fewer than two pairs or more than fit into memory, an unknown fact or a noise level out of range.
    """
    if pairs < 2:
        raise InvalidValue(f"pairs={pairs}: must be >= 2, an interval needs repeats")
    for fact in facts:
        if fact not in FACTS:
            raise InvalidValue(f"fact={fact!r}: must be one of {', '.join(FACTS)}")
    for t in times:
        if not 0 < t <= 1:
            raise InvalidValue(f"t={t}: must be above 0 and at most 1")
    config = pipeline.transformer.config
    pixels = 3 * (config.sample_size * pipeline.vae_scale_factor) ** 2  # a byte each
    numbers = pipeline.config.max_text_length * config.caption_channels
    check_memory(f"pairs={pairs}", 2 * pairs * (pixels + 4 * numbers))
    readings = []
    for fact in facts:
        chosen = pairs_of(fact, pairs)
        text = [pipeline.encode_captions([pair.captions(0)[k] for pair in chosen]).float().flatten(1) for k in (0, 1)]
        change = ((text[0] - text[1]).norm(dim=1) / text[0].norm(dim=1)).median().item()
        right, other = _losses(pipeline, chosen, times, batch_size)
        for k, t in enumerate(times):
            rise, margin = interval((other[k] - right[k]).view(-1, 2).mean(1).tolist())  # a pair is one observation
            told = (right[k] < other[k]).float().mean().item()
            readings.append(Reading(fact, t, right[k].mean().item(), rise, margin, told, change))
    return readings


def _losses(
    pipeline: NitroEPipeline, pairs: list[MinimalPair], times: Sequence[float], batch_size: int
) -> tuple[Tensor, Tensor]:
    """Losses (T, 2 * pairs) with the right captions and with those of the other scene of the pair."""
    size = pipeline.transformer.config.sample_size * pipeline.vae_scale_factor
    images = torch.stack([torch.from_numpy(render(scene, size)) for pair in pairs for scene in pair.scenes])
    x0 = torch.cat([encode_images(pipeline.vae, some, pipeline.stats) for some in images.split(batch_size)]).cpu()
    noise = torch.randn(len(pairs), *x0.shape[1:], generator=torch.Generator().manual_seed(0)).repeat_interleave(2, 0)
    captions = [pair.captions(0) for pair in pairs]
    results = []
    for texts in ([c for pair in captions for c in pair], [c for pair in captions for c in reversed(pair)]):
        text = pipeline.encode_captions(texts)
        levels = [_velocity_losses(pipeline.transformer, x0.float(), noise, text, t, batch_size) for t in times]
        results.append(torch.stack(levels))
    return results[0], results[1]


def _velocity_losses(transformer, x0: Tensor, noise: Tensor, text: Tensor, t: float, batch_size: int) -> Tensor:
    """Squared velocity error (B,) at `t`; `x0` and `noise` (B, C, h, w), `text` (B, L, Dc)."""
    device, dtype, losses = transformer.device, transformer.dtype, []
    for some in torch.arange(len(x0)).split(batch_size):
        level = torch.full((len(some),), t)
        x_t = flow.interpolate(x0[some], noise[some], level).to(device, dtype)
        timestep = (flow.TIMESTEP_SCALE * level).to(device)
        velocity = transformer(x_t, text[some].to(device, dtype), timestep).sample.float().cpu()
        losses.append((velocity - flow.velocity_target(x0[some], noise[some])).square().flatten(1).mean(1))
    return torch.cat(losses)
