"""Training of the two learned judges: what pictures people like, and what is in them.

The *preference model* sees a clean scene and the same scene with a fault (`scenes/degrade.py`), both sent through the
autoencoder: otherwise it would learn to tell the autoencoder's marks from clean pixels, which every drawn picture
bears. The *reader* sees scenes whose objects have been given colours anew, half of them blurred or noisy as drawn
pictures may be, and no verdict of the verifier. Both say on held-out scenes how often they are right.

Networks and losses are in `evaluation/learned_judges.py`.
"""

from __future__ import annotations

import dataclasses
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from scipy.ndimage import gaussian_filter
from torch import Tensor

from nitro_e_lite.config import Name, NonNegativeNumber, Positive, RunConfig, settings
from nitro_e_lite.evaluation.learned_judges import GRID, SIZE, PreferenceModel, SceneReader, preference_loss
from nitro_e_lite.inference.encoders import decode_latents, images_to_tensor, load_encoders
from nitro_e_lite.scenes.degrade import FAULTS, degrade
from nitro_e_lite.scenes.grammar import COLORS, SHAPES, Scene, sample_scene
from nitro_e_lite.scenes.render import render
from nitro_e_lite.training.engine import Engine, Placement, Stage, Trainable
from nitro_e_lite.training.optimizers import adamw, cosine_scale

HELD_OUT_SEED = 20_001  # scenes of this seed are never trained on
KINDS = {"preference": PreferenceModel, "reader": SceneReader}


@settings
class JudgeConfig(RunConfig):
    """A learned judge: `preference` on pairs of pictures, `reader` on scenes."""

    judge: Literal["preference", "reader"] = "preference"
    steps: Positive = 250
    batch_size: Positive = 8  # pairs, or scenes
    log_every: Positive = 10
    validate_every: Positive = 250
    learning_rate: NonNegativeNumber = 2e-3
    warmup_steps: Positive = 20  # linear; then the rate falls to zero along a cosine
    encoders: Name = "lite"  # whose autoencoder the pairs go through
    validation_scenes: Positive = 64


RECIPES = {"preference": JudgeConfig(), "reader": JudgeConfig(judge="reader", steps=300, batch_size=24)}


class Judges(Stage):
    """A learned judge in training."""

    def __init__(self, config: JudgeConfig, placement: Placement):
        self.config, self.placement = config, placement
        torch.manual_seed(config.seed)
        self.model = KINDS[config.judge]()
        if config.judge == "preference":
            self.encoders = load_encoders(config.encoders, placement.device)
        schedule = partial(cosine_scale, steps=config.steps, warmup_steps=config.warmup_steps)
        self.modules = {config.judge: Trainable(self.model, self._optimizers, schedule)}

    def _optimizers(self, masters: dict[str, Tensor]) -> dict[str, torch.optim.Optimizer]:
        return {"adamw": adamw(masters.values(), lr=self.config.learning_rate, weight_decay=1e-4)}

    def losses(self, step: int, part: int) -> dict[str, dict[str, Tensor]]:
        """Of the pairs, or scenes, of this part."""
        numbers = [step * self.config.batch_size + row for row in self.placement.microbatches[part]]
        make = self.pair_losses if self.config.judge == "preference" else self.reading_losses
        return {self.config.judge: make(self.config.seed, numbers)}

    # -- preference

    @torch.no_grad()
    def pairs(self, seed: int, numbers: list[int]) -> tuple[Tensor, Tensor]:
        """Clean pictures and the same ones with a fault, both through the autoencoder, (B, 3, H, W) each."""
        pictures = []
        for number in numbers:
            scene, own = sample_scene(seed, number), np.random.default_rng((seed, number))
            pictures.append((render(scene, SIZE), degrade(scene, FAULTS[number % len(FAULTS)], own, SIZE)))
        pixels = images_to_tensor(np.stack([one for side in zip(*pictures, strict=True) for one in side]))
        latents = self.encoders.encode_images(pixels.to(self.placement.device))
        decoded = decode_latents(self.encoders.vae, latents, self.encoders.stats).float().clamp(-1, 1)
        return decoded[: len(numbers)], decoded[len(numbers) :]

    def pair_losses(self, seed: int, numbers: list[int]) -> dict[str, Tensor]:
        """Loss of each pair, and whether the better side scored more, (B,) each."""
        better, worse = self.pairs(seed, numbers)
        scores = self.model(torch.cat([better, worse]).to(self.placement.dtype)).float()
        good, bad = scores.chunk(2)
        return {"loss": preference_loss(good, bad), "right": (good > bad).float()}

    # -- the reader

    def reading_losses(self, seed: int, numbers: list[int]) -> dict[str, Tensor]:
        """Loss of each scene, and the share of its objects whose shape and colour are named rightly, (B,) each."""
        scenes = [recolored(sample_scene(seed, number), seed, number) for number in numbers]
        pictures = np.stack([_worn(render(s, SIZE), seed, n) for s, n in zip(scenes, numbers, strict=True)])
        pixels = images_to_tensor(pictures).to(self.placement.device, self.placement.dtype)
        centre, shape, color = (x.float() for x in self.model(pixels))
        told = targets(scenes).to(self.placement.device)  # (B, 3, 16, 16)
        there = told[:, 0] > 0
        weight = there.float() * 7 + 1  # centres are rare
        loss = (weight * F.binary_cross_entropy_with_logits(centre, told[:, 0].float(), reduction="none")).mean((1, 2))
        right = there.float()
        for logits, names in ((shape, told[:, 1]), (color, told[:, 2])):
            wrong = F.cross_entropy(logits, names, reduction="none") * there  # (B, 16, 16)
            loss = loss + wrong.sum((1, 2)) / there.sum((1, 2))
            right = right * (logits.argmax(1) == names)
        return {"loss": loss, "right": right.sum((1, 2)) / there.sum((1, 2))}

    # -- looking and keeping

    def validate(self) -> dict[str, float]:
        """Right on held-out scenes; of pairs also by fault."""
        make = self.pair_losses if self.config.judge == "preference" else self.reading_losses
        right = torch.cat(
            [
                make(HELD_OUT_SEED, list(range(first, min(first + 16, self.config.validation_scenes))))["right"]
                for first in range(0, self.config.validation_scenes, 16)
            ]
        )
        found = {"held_out_right": right.mean().item()}
        if self.config.judge == "preference":
            found |= {f"held_out_{name}": right[k :: len(FAULTS)].mean().item() for k, name in enumerate(FAULTS)}
        return found

    def export(self, weights: dict[str, dict[str, Tensor]], folder: Path) -> None:
        """One file of weights, named for the judge."""
        buffers = {name: value.detach() for name, value in self.model.named_buffers()}
        learned = buffers | weights[self.config.judge]  # those in float32, whatever was computed in
        state = {name: learned[name].float().contiguous() for name in self.model.state_dict()}
        save_file(state, folder / f"{self.config.judge}.safetensors", {"format": "pt"})


def recolored(scene: Scene, seed: int, number: int) -> Scene:
    """The scene in other colours, so that the reader knows pairs of shape and colour that no model was trained on."""
    own = np.random.default_rng((seed, number, 1))
    colors = [list(COLORS)[int(k)] for k in own.integers(len(COLORS), size=len(scene.objects))]
    objects = []
    for one, color in zip(scene.objects, colors, strict=True):
        tint = np.clip(np.array(COLORS[color]) + own.integers(-12, 13, 3), 0, 255)
        objects.append(dataclasses.replace(one, color=color, tint=tuple(tint.tolist())))
    return dataclasses.replace(scene, objects=tuple(objects))


def _worn(picture: np.ndarray, seed: int, number: int) -> np.ndarray:
    """Every second picture a little blurred and noisy."""
    if number % 2:
        return picture
    own = np.random.default_rng((seed, number, 2))
    soft = gaussian_filter(picture.astype(np.float64), (own.uniform(0, 1.5), own.uniform(0, 1.5), 0))
    return np.clip(soft + own.normal(0, own.uniform(0, 8), soft.shape) + 0.5, 0, 255).astype(np.uint8)


def targets(scenes: list[Scene]) -> Tensor:
    """Centre (0 or 1), number of the shape and of the colour in each cell: int64 (B, 3, 16, 16)."""
    told = torch.zeros(len(scenes), 3, GRID, GRID, dtype=torch.long)
    for b, scene in enumerate(scenes):
        for one in scene.objects:
            facts = 1, SHAPES.index(one.shape), list(COLORS).index(one.color)
            told[b, :, int(one.y * GRID), int(one.x * GRID)] = torch.tensor(facts)
    return told


def train_judge(config: JudgeConfig, run_dir: str | Path, resume: bool = False, device: str | None = None) -> Path:
    """Trains a judge; see `Engine`. Returns `run_dir/final`."""
    return Engine(config, Judges, run_dir, resume, device).fit()
