"""Training of the lite vision model: what DINOv2 is to photographs, for scenes.

REPA needs a vision model that learned what is in a picture without labels. Here a small `Dinov2Model` learns it from
two questions asked about every patch:

* its **pixels** (absolute error);
* which **kind of outline** the thing has that it belongs to. Things are segments: what stands out of the background
  and hangs together (`segments.py`). Kinds are clusters of their outlines, found once by k-means; nobody names them.
  No patch holds an outline, so its feature must gather the thing from the patches around.

Filling hidden gaps, as in iBOT or masked autoencoders, did not do here: flat shapes can be continued from the borders
of a gap, and features carried colour but no shape.

Whether it learned anything is asked by a **linear probe**: ridge regression from single patch features to the shape and
the colour of the object that covers the patch, on scenes never trained on, beside the same probe on raw pixels and on
an untrained model.

Source: clusters as targets, DeepCluster (arXiv 1807.05520); segments found without labels as the units to learn from,
DetCon (arXiv 2103.10957). Differs: both cluster or contrast the features that they learn, here outlines are clustered.
"""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn
from transformers import Dinov2Config, Dinov2Model

from nitro_e_lite.config import NonNegative, NonNegativeNumber, Positive, PositiveNumber, RunConfig, settings
from nitro_e_lite.errors import InvalidValue
from nitro_e_lite.inference.vision import GRID, patch_features, prepare_pixels
from nitro_e_lite.runtime import generator
from nitro_e_lite.scenes.grammar import COLORS, SHAPES, sample_scene
from nitro_e_lite.scenes.segments import OUTLINE_CELLS, centre_and_area, find_segments, outline
from nitro_e_lite.stages.autoencoder import scene_images
from nitro_e_lite.training.engine import Engine, Placement, Stage, Trainable
from nitro_e_lite.training.optimizers import adamw, cosine_scale

HELD_OUT_SEED = 20_000  # scenes of this seed are for the probe
CORE = 0.6  # a patch belongs to an object whose centre is nearer than this, in radii


AtLeastTwo = Annotated[int, Field(ge=2)]


@settings
class VisionConfig(RunConfig):
    """The lite vision model: 128 px in patches of 8, so that it has a feature for each latent."""

    steps: Positive = 1000
    batch_size: Positive = 32
    learning_rate: NonNegativeNumber = 0.02  # of Muon, on the hidden matrices
    adam_learning_rate: NonNegativeNumber = 1.5e-3
    max_grad_norm: PositiveNumber = 1.0  # the global gradient norm is clipped there
    warmup_steps: NonNegative = 40  # linear; then the rates fall to zero along a cosine
    width: Positive = 128
    layers: Positive = 4
    heads: Positive = 4
    patch_size: Positive = 8
    kinds: AtLeastTwo = 12  # clusters of outlines
    kinds_scenes: Positive = 768  # scenes they are found in
    pixel_weight: NonNegativeNumber = 0.5
    probe_scenes: AtLeastTwo = 512  # half to fit the probe, half to judge it

    def __post_init__(self):
        if self.width % self.heads:
            raise InvalidValue(f"width={self.width}: must be a multiple of heads={self.heads}")


class OutlineLearner(nn.Module):
    """The vision model, its two heads and the kinds of outlines."""

    def __init__(self, config: VisionConfig):
        super().__init__()
        self.config = config
        torch.manual_seed(config.seed)
        self.vision = build_vision(config)
        self.pixels = nn.Linear(config.width, 3 * config.patch_size**2)
        self.kind = nn.Linear(config.width, config.kinds)
        self.register_buffer("kinds", find_kinds(config))  # (K, 256)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """The losses of pictures (B, 3, H, W) in [-1, 1]."""
        config = self.config
        device = self.kinds.device
        pixels = prepare_pixels(images.to(device), GRID * config.patch_size)  # (B, 3, H, W)
        outlines, owner = (x.to(device) for x in patch_outlines(images, config.patch_size))  # (S, 256), (B, N)
        features = patch_features(self.vision, pixels)  # (B, N, D)
        known = torch.cdist(outlines, self.kinds.float()).argmin(1)[owner[owner >= 0]]  # (patches of segments,)
        guess = self.kind(features[owner >= 0])
        kind_loss = F.cross_entropy(guess, known)
        pixel_loss = (self.pixels(features) - cut_patches(pixels, config.patch_size)).abs().mean()
        right = (guess.argmax(1) == known).float().mean()
        loss = kind_loss + config.pixel_weight * pixel_loss
        return {"loss": loss, "kind_loss": kind_loss, "pixel_loss": pixel_loss, "kind_right": right}


def patch_outlines(images: Tensor, patch_size: int) -> tuple[Tensor, Tensor]:
    """The segments of pictures and which patch belongs to which.

    Args:
        images: (B, 3, H, W) in [-1, 1].
        patch_size: in pixels.

    Returns:
        Outlines (S, 256), 16 x 16 each, of all segments of all pictures; and for each patch the row of the segment at
        its centre, or -1: (B, N).
    """
    outlines, owners = [], []
    for image in ((images + 1) * 127.5).permute(0, 2, 3, 1).numpy():
        segments, owner = find_segments(image)
        centres = owner[patch_size // 2 :: patch_size, patch_size // 2 :: patch_size].flatten()  # (N,)
        owners.append(np.where(centres >= 0, centres + len(outlines), -1))
        outlines += [outline(one.coverage, *centre_and_area(one.coverage)) for one in segments]
    masks = torch.from_numpy(np.stack(outlines)).unflatten(1, (1, OUTLINE_CELLS, -1))  # (S, 1, 48, 48)
    return F.avg_pool2d(masks, OUTLINE_CELLS // 16).flatten(1), torch.from_numpy(np.stack(owners))


def find_kinds(config: VisionConfig, restarts: int = 5, rounds: int = 40) -> Tensor:
    """Clusters the outlines of `config.kinds_scenes` scenes by k-means, the best of several starts: (K, 256)."""
    images = (scene_images(config.seed, range(n, n + 1), 128) for n in range(config.kinds_scenes))
    outlines = torch.cat([patch_outlines(image, config.patch_size)[0] for image in images])
    if len(outlines) < config.kinds:
        raise InvalidValue(f"kinds_scenes={config.kinds_scenes}: hold fewer outlines than kinds={config.kinds}")
    stream, found = generator(config.seed, 0, "kinds"), []
    for _ in range(restarts):
        centres = outlines[torch.randperm(len(outlines), generator=stream)[: config.kinds]]
        for _ in range(rounds):
            member = F.one_hot(torch.cdist(outlines, centres).argmin(1), config.kinds).float()  # (S, K)
            size = member.sum(0)[:, None]
            centres = torch.where(size > 0, member.T @ outlines / size.clamp_min(1), centres)
        error = torch.cdist(outlines, centres).amin(1).square().mean().item()
        found.append((error, centres))
    return min(found, key=lambda one: one[0])[1]


def build_vision(config: VisionConfig) -> Dinov2Model:
    """The model with random weights."""
    return Dinov2Model(
        Dinov2Config(
            hidden_size=config.width,
            num_hidden_layers=config.layers,
            num_attention_heads=config.heads,
            patch_size=config.patch_size,
            image_size=GRID * config.patch_size,
            use_mask_token=False,
        )
    )


def cut_patches(pixels: Tensor, size: int) -> Tensor:
    """Pixels (B, 3, H, W) as patches (B, N, 3 * size * size), row by row."""
    return F.unfold(pixels, size, stride=size).mT


class Vision(Stage):
    """The lite vision model in training; `export` leaves a `Dinov2Model` with its `probe.json`."""

    def __init__(self, config: VisionConfig, placement: Placement):
        self.config, self.placement = config, placement
        self.learner = OutlineLearner(config)
        schedule = partial(cosine_scale, steps=config.steps, warmup_steps=config.warmup_steps)
        self.modules = {"learner": Trainable(self.learner, self._optimizers, schedule, config.max_grad_norm)}

    def _optimizers(self, masters: dict[str, Tensor]) -> dict[str, torch.optim.Optimizer]:
        matrices = [p for name, p in masters.items() if p.ndim == 2 and ".layer." in name]
        others = [p for name, p in masters.items() if p.ndim != 2 or ".layer." not in name]
        rate = self.config.adam_learning_rate
        return {
            "muon": torch.optim.Muon(matrices, lr=self.config.learning_rate, weight_decay=0.0),
            "adamw": adamw(others, lr=rate, betas=(0.9, 0.95), weight_decay=0.05),
        }

    def losses(self, step: int, part: int) -> dict[str, dict[str, Tensor]]:
        """The losses of the scenes of this part, see `OutlineLearner`."""
        rows, first = self.placement.microbatches[part], step * self.config.batch_size
        scenes = range(first + rows.start, first + rows.stop)
        return {"learner": self.learner(scene_images(self.config.seed, scenes, GRID * self.config.patch_size))}

    def state(self) -> dict[str, Any]:
        """The kinds of outlines, which are found once."""
        return {"kinds": self.learner.kinds}

    def load_state(self, state: dict[str, Any]) -> None:
        """The kinds of the checkpoint."""
        self.learner.kinds.copy_(state["kinds"])

    def export(self, weights: dict[str, dict[str, Tensor]], folder: Path) -> None:
        """The vision model and how well a linear probe reads it."""
        vision = self.learner.vision
        vision.save_pretrained(folder)
        result = {"trained": probe(vision, self.config.probe_scenes)} | baselines(self.config)
        (folder / "probe.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


def train_vision(config: VisionConfig, run_dir: str | Path, resume: bool = False, device: str | None = None) -> Path:
    """Trains the lite vision model and probes it; see `Engine`. Returns `run_dir/final`."""
    return Engine(config, Vision, run_dir, resume, device).fit()


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
    """How well single patch features tell the shape and the colour of the object they show, see `probe_features`."""
    return probe_features(partial(patch_features, model), GRID * model.config.patch_size, scenes)


@torch.no_grad()
def probe_features(features, size: int, scenes: int = 512) -> dict[str, float]:
    """Fits a ridge regression on half of the scenes and judges it on the other half.

    Args:
        features: function from pixels (B, 3, H, W), normalised, to features (B, 256, D).
        size: side of the pictures in pixels.
        scenes: held-out scenes to use.

    Returns:
        Share of patches named rightly: `shape` (chance 1/6), `color` (chance 1/10); `patches` judged.
    """
    rows, shapes, colors, halves = [], [], [], []
    for first in range(0, scenes, 32):
        numbers = range(first, min(first + 32, scenes))
        found = features(prepare_pixels(scene_images(HELD_OUT_SEED, numbers, size), size)).float().cpu()
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
