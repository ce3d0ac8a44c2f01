"""Training of the lite vision model: what DINOv2 is to photographs, for scenes.

REPA needs a vision model that learned what is in a picture without labels. Here a small ``Dinov2Model`` learns it by
filling gaps. More than half of a picture is hidden, in squares of 2x2 patches, and for every hidden patch the model
predicts two things:

* its **pixels** (absolute error): this alone keeps features from collapsing, since a constant predicts no pixels;
* the **features** that a teacher has there, who sees the whole picture (one minus cosine): the teacher is the moving
  average of the student, its features are standardised over the batch. To say what the teacher thinks of a hidden patch
  the student must work out which shape it belongs to.

The teacher is what is kept. Whether it learned anything is asked by a **linear probe**: ridge regression from single
patch features to the shape and the colour of the object that covers the patch, on scenes never trained on, beside the
same probe on raw pixels and on an untrained model.

Source: masked prediction as in iBOT (arXiv 2111.07832) and SimMIM (2111.09886). Differs: DINOv2 also compares crops of
a picture by class tokens; REPA reads patch features alone.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import Dinov2Config, Dinov2Model

from nitro_e_lite.autoencoder_training import scene_images
from nitro_e_lite.fitting import FitConfig, fit, step_generator
from nitro_e_lite.repa import GRID, patch_features, prepare_pixels
from nitro_e_lite.scenes import COLORS, SHAPES, sample_scene

HELD_OUT_SEED = 20_000  # scenes of this seed are for the probe
CORE = 0.6  # a patch belongs to an object whose centre is nearer than this, in radii


@dataclass(frozen=True, kw_only=True)
class VisionConfig(FitConfig):
    """The lite vision model: 128 px in patches of 8, so that it has a feature for each latent."""

    steps: int = 1500
    batch_size: int = 32
    learning_rate: float = 1.5e-3
    warmup_steps: int = 100
    width: int = 128
    layers: int = 4
    heads: int = 4
    patch_size: int = 8
    masked: float = 0.6  # share of the picture that is hidden
    feature_weight: float = 0.5  # of the teacher's features beside the pixels
    teacher_decay: float = 0.996
    probe_scenes: int = 512  # half to fit the probe, half to judge it

    def __post_init__(self):
        super().__post_init__()
        if self.width % self.heads:
            raise ValueError(f"width={self.width}: must be a multiple of heads={self.heads}")
        if not 0 < self.masked < 1:
            raise ValueError(f"masked={self.masked}: must be between 0 and 1")


class MaskedLearner(nn.Module):
    """Student, teacher and the student's two heads."""

    def __init__(self, config: VisionConfig):
        super().__init__()
        self.config = config
        torch.manual_seed(config.seed)
        self.student, self.teacher = build_vision(config), build_vision(config)
        self.teacher.load_state_dict(self.student.state_dict())
        self.teacher.requires_grad_(False)
        self.pixels = nn.Linear(config.width, 3 * config.patch_size**2)
        self.features = nn.Sequential(
            nn.Linear(config.width, 2 * config.width), nn.GELU(), nn.Linear(2 * config.width, config.width)
        )

    @torch.no_grad()
    def follow(self, step: int) -> None:
        """Moves the teacher towards the student; faster in the first steps."""
        weight = 1 - min(self.config.teacher_decay, step / (step + 10))
        torch._foreach_lerp_(list(self.teacher.parameters()), list(self.student.parameters()), weight)

    def losses(self, step: int) -> dict[str, Tensor]:
        """The losses of step ``step``, which draws its pictures and gaps from (seed, step) alone."""
        config = self.config
        self.follow(step)
        generator = step_generator(config.seed, step)
        first = step * config.batch_size
        images = scene_images(config.seed, range(first, first + config.batch_size), GRID * config.patch_size)
        pixels = prepare_pixels(images, GRID * config.patch_size)  # (B, 3, H, W)
        mask = draw_mask(config.batch_size, config.masked, generator)  # (B, N)
        hidden = self.student(pixels, bool_masked_pos=mask).last_hidden_state[:, 1:][mask]  # (hidden patches, D)
        with torch.no_grad():
            seen = patch_features(self.teacher, pixels)  # (B, N, D)
            target = (seen - seen.mean((0, 1))) / (seen.std((0, 1)) + 1e-4)
        pixel_loss = (self.pixels(hidden) - cut_patches(pixels, config.patch_size)[mask]).abs().mean()
        feature_loss = 1 - F.cosine_similarity(self.features(hidden), target[mask], dim=-1).mean()
        loss = pixel_loss + config.feature_weight * feature_loss
        return {"loss": loss, "pixel_loss": pixel_loss, "feature_loss": feature_loss, "spread": seen.std((0, 1)).mean()}


def build_vision(config: VisionConfig) -> Dinov2Model:
    """The model with random weights."""
    return Dinov2Model(
        Dinov2Config(
            hidden_size=config.width,
            num_hidden_layers=config.layers,
            num_attention_heads=config.heads,
            patch_size=config.patch_size,
            image_size=GRID * config.patch_size,
            use_mask_token=True,
        )
    )


def draw_mask(batch: int, share: float, generator: torch.Generator) -> Tensor:
    """Which patches are hidden: bool (B, 256), the same number in each picture, in squares of 2x2."""
    cells = (GRID // 2) ** 2
    order = torch.rand(batch, cells, generator=generator).argsort(1).argsort(1)
    mask = (order < round(share * cells)).view(batch, GRID // 2, GRID // 2)
    return mask.repeat_interleave(2, 1).repeat_interleave(2, 2).flatten(1)


def cut_patches(pixels: Tensor, size: int) -> Tensor:
    """Pixels (B, 3, H, W) as patches (B, N, 3 * size * size), row by row."""
    return F.unfold(pixels, size, stride=size).mT


def train_vision(
    config: VisionConfig, run_dir: str | Path, resume: bool = False, stop_at: int | None = None
) -> Path | None:
    """Trains the lite vision model and probes it.

    Args:
        config: everything the result depends on.
        run_dir: gets ``metrics.jsonl``, ``state.pt`` and, at the end, ``final``.
        resume: continue a run that is already there.
        stop_at: ends early after this step, without a result.

    Returns:
        ``run_dir/final``: a ``Dinov2Model`` folder with ``probe.json``; None when stopped early.
    """
    run_dir = Path(run_dir)
    learner = MaskedLearner(config)
    trained = [p for p in learner.parameters() if p.requires_grad]
    adam = torch.optim.AdamW(trained, lr=config.learning_rate, betas=(0.9, 0.95), weight_decay=0.05)
    fit(config, learner, [adam], learner.losses, run_dir, resume, "vision model", stop_at)
    if stop_at is not None and stop_at < config.steps:
        return None
    folder = run_dir / "final"
    learner.teacher.eval().save_pretrained(folder)
    result = {"trained": probe(learner.teacher, config.probe_scenes)} | baselines(config)
    (folder / "probe.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return folder


# -- the linear probe


def baselines(config: VisionConfig) -> dict[str, dict[str, float]]:
    """The probe on raw pixels of a patch and on an untrained model."""
    torch.manual_seed(config.seed + 1)
    raw = partial(cut_patches, size=config.patch_size)
    return {
        "pixels": probe_features(raw, GRID * config.patch_size, config.probe_scenes),
        "untrained": probe(build_vision(config).eval(), config.probe_scenes),
    }


def probe(model: Dinov2Model, scenes: int = 512) -> dict[str, float]:
    """How well single patch features tell the shape and the colour of the object they show, see ``probe_features``."""
    return probe_features(partial(patch_features, model), GRID * model.config.patch_size, scenes)


@torch.no_grad()
def probe_features(features, size: int, scenes: int = 512) -> dict[str, float]:
    """Fits a ridge regression on half of the scenes and judges it on the other half.

    Args:
        features: function from pixels (B, 3, H, W), normalised, to features (B, 256, D).
        size: side of the pictures in pixels.
        scenes: held-out scenes to use.

    Returns:
        Share of patches named rightly: ``shape`` (chance 1/6), ``color`` (chance 1/10); ``patches`` judged.
    """
    rows, shapes, colors, halves = [], [], [], []
    for first in range(0, scenes, 32):
        numbers = range(first, min(first + 32, scenes))
        found = features(prepare_pixels(scene_images(HELD_OUT_SEED, numbers, size), size))
        for number, one in zip(numbers, found, strict=True):
            for patch, item in patches_of_objects(number):
                rows.append(one[patch])
                shapes.append(SHAPES.index(item.shape))
                colors.append(list(COLORS).index(item.color))
                halves.append(number % 2)
    data, half = torch.stack(rows).double(), torch.tensor(halves, dtype=torch.bool)
    data = (data - data[~half].mean(0)) / (data[~half].std(0) + 1e-6)
    data = torch.cat([data, torch.ones(len(data), 1)], 1)
    result = {"patches": int(half.sum())}
    for name, labels, count in (("shape", shapes, len(SHAPES)), ("color", colors, len(COLORS))):
        labels = torch.tensor(labels)
        known = F.one_hot(labels[~half], count).double()
        gram = data[~half].T @ data[~half] + torch.eye(data.shape[1], dtype=torch.double)
        guess = (data[half] @ torch.linalg.solve(gram, data[~half].T @ known)).argmax(1)
        result[name] = (guess == labels[half]).double().mean().item()
    return result


def patches_of_objects(number: int):
    """Yields (patch, object) for each patch whose centre lies well inside an object of a held-out scene."""
    for item in sample_scene(HELD_OUT_SEED, number).objects:
        for patch in range(GRID**2):
            x, y = (patch % GRID + 0.5) / GRID, (patch // GRID + 0.5) / GRID
            if (x - item.x) ** 2 + (y - item.y) ** 2 < (CORE * item.radius) ** 2:
                yield patch, item
