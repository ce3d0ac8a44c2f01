"""REPA: align the transformer's early tokens with what a vision model sees in the clean picture.

A diffusion transformer has to find out what is in a picture before it can predict a velocity, and learns that slowly
from the velocity alone. A vision model that was trained without labels knows it already. So the tokens after the first
group of blocks are sent through a small MLP and compared with the vision model's patch features of the *clean* picture:

    loss = flow loss - weight * mean over tokens of cos(projector(tokens), features)

Only directions count, and the vision model is frozen. Both have 256 tokens on the same 16x16 grid, so that token n of
one is compared with token n of the other. At full scale the vision model is DINOv2 ViT-B/14 at 224 px; at lite scale a
small model of the same class trained on scenes (``stages/vision.py``), with patches of 8 at 128 px.

Source: REPA arXiv 2410.06940; Nitro-E stage 1 (weight 0.5, tap after group 1).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import Dinov2Model

from nitro_e_lite.files import weights_dir
from nitro_e_lite.inference.encoders import images_to_tensor
from nitro_e_lite.inference.hub import EncoderUnavailable, attempt, weights_hash
from nitro_e_lite.model.cpu_kernels import speed_up

FULL_VISION = "facebook/dinov2-base"
VISION_REVISIONS = {FULL_VISION: "f9e44c814b77203eaa57a6bdbbd535f21ede1415"}
GRID = 16  # tokens a side, as many as the latents have
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet, what DINOv2 expects


@dataclass(frozen=True)
class VisionEncoder:
    """A frozen ``Dinov2Model`` and the picture size that gives it 16x16 patches."""

    model: Dinov2Model

    @property
    def width(self) -> int:
        """Channels of a feature."""
        return self.model.config.hidden_size

    @property
    def size(self) -> int:
        """Side in pixels of the pictures it looks at."""
        return GRID * self.model.config.patch_size

    @cached_property
    def fingerprint(self) -> str:
        """Names the weights, rounded to bfloat16; travels with stored features."""
        return weights_hash({"vision": self.model}, rounded_to=torch.bfloat16, size=self.size)

    @torch.no_grad()
    def encode(self, images: np.ndarray | Tensor) -> Tensor:
        """Pictures, see ``encoders.images_to_tensor``, to normalised patch features (B, 256, C)."""
        pixels = images_to_tensor(images).to(self.model.device)  # (B, 3, H, W) in [-1, 1]
        return patch_features(self.model, prepare_pixels(pixels, self.size))


def prepare_pixels(pixels: Tensor, size: int) -> Tensor:
    """Pixels (B, 3, H, W) in [-1, 1] at ``size`` a side and normalised as DINOv2 expects; the centre square counts."""
    side = min(pixels.shape[2:])
    top, left = (pixels.shape[2] - side) // 2, (pixels.shape[3] - side) // 2
    pixels = pixels[:, :, top : top + side, left : left + side]
    if side != size:
        pixels = F.interpolate(pixels, (size, size), mode="bicubic", antialias=True)
    mean, std = (torch.tensor(values, device=pixels.device).view(1, 3, 1, 1) for values in (MEAN, STD))
    return (pixels / 2 + 0.5 - mean) / std


def patch_features(model: Dinov2Model, pixels: Tensor) -> Tensor:
    """Features of the patches after the last norm (B, N, C), without the class token."""
    return model(pixels.to(model.dtype)).last_hidden_state[:, 1:]


def load_vision(
    source: str | Path = "lite", device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32
) -> VisionEncoder:
    """Loads the vision model, frozen.

    Args:
        source: a name of shipped weights, a folder that ``nitro-e train vision`` wrote, or ``FULL_VISION``.
        device: where to put it.
        dtype: number type of its weights.

    Raises:
        EncoderUnavailable: nothing can be loaded from there.
        ValueError: a file differs from its checksum.
    """
    places = [weights_dir() / source / "vision", Path(source) / "final", Path(source)]
    folder = next((p for p in places if (p / "config.json").is_file()), None)
    if folder is None and str(source) not in VISION_REVISIONS:
        known = ", ".join(VISION_REVISIONS)
        raise EncoderUnavailable(
            f"vision model {str(source)!r}: no such folder and no known hub id ({known}); train the small one with "
            "nitro-e train vision and name its folder"
        )
    place = {} if folder else {"revision": VISION_REVISIONS[str(source)]}
    place["pretrained_model_name_or_path"] = folder or source
    option, load = "--vision PATH (repa.vision=PATH in training)", Dinov2Model.from_pretrained
    model = attempt(folder or source, option, load, dtype=dtype, use_safetensors=True, **place)
    speed_up(model)
    return VisionEncoder(model.to(device).eval().requires_grad_(False))


def repa_loss(projected: Tensor, features: Tensor) -> Tensor:
    """Negative cosine similarity, averaged over tokens.

    Args:
        projected: the transformer's tap (B, N, C).
        features: of the vision model, (B, N, C).

    Returns:
        (B,), float32, in [-1, 1].

    Raises:
        ValueError: the shapes differ.
    """
    if projected.shape != features.shape:
        raise ValueError(
            f"features={tuple(features.shape)}: must be shaped like the transformer's tap {tuple(projected.shape)}; "
            "the vision model must see as many patches as there are tokens"
        )
    return -F.cosine_similarity(projected.float(), features.float(), dim=-1).mean(1)
