"""The vision model of REPA: what is in a picture, patch by patch.

At full scale it is DINOv2 ViT-B/14 at 224 px; at lite scale a small model of the same class trained on scenes
(`stages/vision.py`), with patches of 8 at 128 px. Both give 256 features on the same 16x16 grid as the latents, so
that feature n belongs to token n. It is frozen; the loss that turns the transformer's tokens towards its features is
in `stages/pretrain.py`.

Source: REPA arXiv 2410.06940; DINOv2 arXiv 2304.07193.
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

from nitro_e_lite.config import ModelConfig
from nitro_e_lite.files import find_weights
from nitro_e_lite.inference.encoders import images_to_tensor
from nitro_e_lite.inference.hub import EncoderUnavailable, attempt_model, weights_hash
from nitro_e_lite.model.cpu_kernels import speed_up
from nitro_e_lite.runtime import send

FULL_VISION = "facebook/dinov2-base"
FULL_VISION_SIZES = {"patch_size": 14, "image_size": 518}  # of it; the rest are the defaults of the class
VISION_REVISIONS = {FULL_VISION: "f9e44c814b77203eaa57a6bdbbd535f21ede1415"}
GRID = ModelConfig().sample_size  # tokens a side, as many as the latents have
VISION_FILES = ("vision/model*.safetensors", "model*.safetensors")  # of a pipeline folder, of the model's own
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet, what DINOv2 expects


@dataclass(frozen=True)
class VisionEncoder:
    """A frozen `Dinov2Model` and the picture size that gives it 16x16 patches."""

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
        """Pictures, see `encoders.images_to_tensor`, to normalised patch features (B, 256, C)."""
        pixels = images_to_tensor(torch.as_tensor(images).to(self.model.device))  # (B, 3, H, W) in [-1, 1]
        return patch_features(self.model, prepare_pixels(pixels, self.size))


def prepare_pixels(pixels: Tensor, size: int) -> Tensor:
    """Pixels (B, 3, H, W) in [-1, 1] at `size` a side and normalised as DINOv2 expects; the centre square counts."""
    side = min(pixels.shape[2:])
    top, left = (pixels.shape[2] - side) // 2, (pixels.shape[3] - side) // 2
    pixels = pixels[:, :, top : top + side, left : left + side]
    if side != size:
        pixels = F.interpolate(pixels, (size, size), mode="bicubic", antialias=True)
    mean, std = (send(torch.tensor(values).view(1, 3, 1, 1), pixels.device) for values in (MEAN, STD))
    return (pixels / 2 + 0.5 - mean) / std


def patch_features(model: Dinov2Model, pixels: Tensor) -> Tensor:
    """Features of the patches after the last norm (B, N, C), without the class token."""
    return model(pixels.to(model.device, model.dtype)).last_hidden_state[:, 1:]


def load_vision(
    source: str | Path = "lite", device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32
) -> VisionEncoder:
    """Loads the vision model, frozen.

    Args:
        source: what `find_weights` finds: shipped weights, a run of `nitro-e train vision`; or `FULL_VISION`.
        device: where to put it.
        dtype: number type of its weights.

    Raises:
        EncoderUnavailable: nothing can be loaded from there.
        ValueError: a file differs from its checksum.
    """
    try:
        folder, place = find_weights(source, *VISION_FILES), {}
    except FileNotFoundError as error:
        if str(source) not in VISION_REVISIONS:
            raise EncoderUnavailable(
                f"vision model: {error}, and no known hub id ({', '.join(VISION_REVISIONS)}); train the small one with "
                "nitro-e train vision and name its folder"
            ) from None
        folder, place = source, {"revision": VISION_REVISIONS[str(source)]}
    place["pretrained_model_name_or_path"] = folder
    option, load = "--vision PATH (repa.vision=PATH in training)", Dinov2Model.from_pretrained
    model = attempt_model(folder, option, load, dtype=dtype, use_safetensors=True, **place)
    speed_up(model)
    return VisionEncoder(model.to(device).eval().requires_grad_(False))
