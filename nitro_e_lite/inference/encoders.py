"""The frozen encoders: pictures to latents and back, captions to features.

A latent diffusion model never sees a pixel or a letter. A deep-compression autoencoder (DC-AE) turns a
picture into a 16x16 grid of latents, and a language model turns a caption into one feature vector a token;
both are trained first and then frozen. One loader serves every scale: a local folder or a hub id, the same
library classes, other sizes.

=========  =========================================  ===========================================
scale      autoencoder                                text encoder
=========  =========================================  ===========================================
lite       f8, 8 channels, 128 px -> (8, 16, 16)      Llama, 3 million parameters, 32 tokens
full       f32, 32 channels, 512 px -> (32, 16, 16)   Llama-3.2-1B, 128 tokens
=========  =========================================  ===========================================

Two details matter to whatever is trained on top. Latents are **normalised** with stored statistics, so that
noise of unit variance is the right amount of noise. Captions are padded to a fixed length with the end
token, and the padding is **not** removed: the language model does not attend *to* padding, but each padding
token attends to the caption, so its feature is one more summary of it, which the diffusion model reads like
any other token. Source: the published Nitro-E code; DC-AE arXiv 2410.10733.
"""

import html
import json
import re
import threading
import unicodedata
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderDC
from diffusers.hooks.group_offloading import _get_group_onload_device, _is_group_offload_enabled
from torch import Tensor, nn
from transformers import LlamaModel, PreTrainedModel, PreTrainedTokenizerBase
from transformers.masking_utils import create_causal_mask

from nitro_e_lite.errors import InvalidType, InvalidValue
from nitro_e_lite.files import find_weights, read_json
from nitro_e_lite.inference import hub
from nitro_e_lite.model.tokens import FULL_TEXT_LENGTH, LITE_TEXT_LENGTH
from nitro_e_lite.runtime import send


@dataclass(frozen=True)
class LatentStats:
    """Mean and standard deviation of each latent channel; normalised: `(latents - mean) / std`."""

    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __post_init__(self):
        object.__setattr__(self, "mean", tuple(float(x) for x in self.mean))
        object.__setattr__(self, "std", tuple(float(x) for x in self.std))
        if not self.mean or len(self.mean) != len(self.std):
            raise InvalidValue(f"LatentStats: {len(self.mean)} means and {len(self.std)} stds; need as many")
        if not all(np.isfinite(self.mean)) or not all(np.isfinite(self.std)) or min(self.std) <= 0:
            raise InvalidValue(f"LatentStats: mean={self.mean}, std={self.std}: must be finite, std above 0")

    @classmethod
    def from_scaling_factor(cls, scaling_factor: float, channels: int) -> "LatentStats":
        """The published convention: `latents * scaling_factor` for every channel."""
        return cls((0.0,) * channels, (1 / scaling_factor,) * channels)

    @classmethod
    def load(cls, folder: str | Path) -> "LatentStats":
        """Reads `latent_stats.json` of an autoencoder folder trained by this package."""
        path = Path(folder) / "latent_stats.json"
        values = read_json(path)
        lists = [values.get(name) for name in ("latents_mean", "latents_std")]
        if not all(isinstance(one, list) and all(isinstance(x, int | float) for x in one) and one for one in lists):
            raise InvalidValue(f"{path}: must hold the lists of numbers latents_mean and latents_std")
        return cls(*lists)

    def to_json(self) -> str:
        """The text of `latent_stats.json`, with the names that the pipeline's config uses."""
        return json.dumps({"latents_mean": self.mean, "latents_std": self.std}, indent=2) + "\n"

    def tensors(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and std as (1, C, 1, 1) tensors for `like` (B, C, h, w).

        Raises:
            ValueError: when the channel counts differ.
        """
        if like.shape[1] != len(self.mean):
            raise InvalidValue(f"latents have {like.shape[1]} channels, their statistics {len(self.mean)}")
        return tuple(like.new_tensor(x).view(1, -1, 1, 1) for x in (self.mean, self.std))


def execution_device(model: nn.Module) -> torch.device:
    """Where a model computes; off-loading makes that another place than where its weights rest."""
    for module in model.modules():
        if (device := getattr(getattr(module, "_hf_hook", None), "execution_device", None)) is not None:
            return torch.device(device)
    return _get_group_onload_device(model) if _is_group_offload_enabled(model) else model.device


# -----------------------------------------------------------------------------------------------------------
# Encoding
# -----------------------------------------------------------------------------------------------------------


def images_to_tensor(images: np.ndarray | Tensor) -> Tensor:
    """Turns uint8 (B, H, W, 3) into float32 (B, 3, H, W) in [-1, 1]; passes such floats through.

    Raises:
        TypeError, ValueError: for any other type or shape.
    """
    images = torch.as_tensor(images)
    if images.dtype == torch.uint8 and images.ndim == 4 and images.shape[-1] == 3:
        return images.permute(0, 3, 1, 2).float() / 127.5 - 1  # (B, 3, H, W)
    if images.is_floating_point() and images.ndim == 4 and images.shape[1] == 3:
        return images
    raise InvalidValue(
        f"images: {images.dtype} {tuple(images.shape)}; expected uint8 (B, H, W, 3) or float (B, 3, H, W) in [-1, 1]"
    )


@torch.no_grad()
def encode_images(vae: AutoencoderDC, images: np.ndarray | Tensor, stats: LatentStats) -> Tensor:
    """Images to normalised latents.

    Args:
        vae: the autoencoder.
        images: uint8 (B, H, W, 3), or float (B, 3, H, W) in [-1, 1]; H and W divisible by its compression.
        stats: latent statistics.

    Returns:
        Latents (B, C, h, w) of about zero mean and unit variance.

    Raises:
        ValueError: for images of another type, shape or size.
    """
    images = torch.as_tensor(images).to(execution_device(vae))  # bytes travel, and become numbers there
    images = images_to_tensor(images).to(vae.dtype)
    ratio = vae.spatial_compression_ratio
    if images.shape[2] % ratio or images.shape[3] % ratio:
        raise InvalidValue(f"images: {tuple(images.shape[2:])} pixels; both must be divisible by {ratio}")
    latents = vae.encode(images.contiguous(memory_format=torch.channels_last)).latent  # (B, C, h, w)
    mean, std = stats.tensors(latents)
    return ((latents - mean) / std).contiguous()


@torch.no_grad()
def decode_latents(vae: AutoencoderDC, latents: Tensor, stats: LatentStats) -> Tensor:
    """Normalised latents (B, C, h, w) to images (B, 3, H, W), clamped to [-1, 1].

    Raises:
        ValueError: when the channel count does not fit `stats`.
    """
    latents = latents.to(execution_device(vae), vae.dtype)
    mean, std = stats.tensors(latents)
    latents = (latents * std + mean).contiguous(memory_format=torch.channels_last)
    return vae.decode(latents).sample.clamp(-1, 1).contiguous()


_TOKENIZING = threading.Lock()  # a fast tokenizer keeps padding and truncation of a call for the next


class CaptionCut(UserWarning):
    """A caption is longer than the text encoder takes; its end is lost."""


def clean_caption(text: str) -> str:
    """Lower case, plain unicode, no markup entities, no addresses, single spaces: as in training."""
    text = unicodedata.normalize("NFKC", html.unescape(text))
    text = re.sub(r"(?:https?://|www\.)\S+", " ", text)
    return re.sub(r"\s+", " ", text).strip().lower()


@torch.no_grad()
def encode_text(
    tokenizer: PreTrainedTokenizerBase,
    model: PreTrainedModel,
    captions: Sequence[str],
    max_length: int,
    cut: list[int] | None = None,
) -> Tensor:
    """Captions to features: the last hidden state after the final norm.

    Args:
        tokenizer: pads on the right with the end token.
        model: the language model.
        captions: texts; cleaned here. The empty text is the unconditional caption.
        max_length: tokens a caption is padded or cut to.
        cut: takes the places of captions that are longer, for a caller who counts them; None warns of each.

    Returns:
        Features (B, max_length, D), padding included; each row depends on its own caption alone.

    Raises:
        TypeError: when `captions` is one string, or holds something else than strings.
    """
    if isinstance(captions, str) or not all(isinstance(c, str) for c in captions):
        raise InvalidType(f"captions: expected a list of strings, got {captions!r}")
    texts = [clean_caption(c) for c in captions]
    padding = {"padding": "max_length", "truncation": True, "max_length": max_length}
    with _TOKENIZING:
        counts = [len(tokens) for tokens in tokenizer(texts, verbose=False)["input_ids"]]
        batch = tokenizer(texts, return_tensors="pt", **padding)
    too_long = [place for place, count in enumerate(counts) if count > max_length]
    if cut is not None:
        cut += too_long
    for place in too_long if cut is None else ():
        text = f"caption cut to {max_length} of {counts[place]} tokens: {texts[place]!r}"
        warnings.warn(text, CaptionCut, stacklevel=2)
    device, tokens, mask = execution_device(model), batch["input_ids"], batch["attention_mask"]  # (B, L)
    if device.type != "cpu" and isinstance(model, LlamaModel):  # it would ask the device whether there is padding
        mask = create_causal_mask(model.config, torch.empty(*tokens.shape, 0, dtype=model.dtype), mask, None)
    tokens, mask = send(tokens, device), mask if mask is None else send(mask, device)  # (B, 1, L, L) now; or None
    return model(input_ids=tokens, attention_mask=mask).last_hidden_state  # (B, L, D)


def fingerprint(
    vae: AutoencoderDC | None,
    text_encoder: PreTrainedModel | None,
    stats: LatentStats,
    max_length: int,
    **settings,
) -> str:
    """Names an encoder set: changes when any weight or any setting does. It travels with cached latents.

    Weights count rounded to bfloat16: data encoded in one number type can be trained on in another.

    Args:
        vae: autoencoder, or None.
        text_encoder: language model, or None.
        stats: latent statistics.
        max_length: text tokens.
        **settings: anything else the cached values depend on (JSON types), e.g. `image_size=128`.
    """
    facts = {"stats": [stats.mean, stats.std], "max_length": max_length, **settings}
    return hub.weights_hash({"vae": vae, "text_encoder": text_encoder}, rounded_to=torch.bfloat16, **facts)


@dataclass(frozen=True)
class Encoders:
    """Frozen encoders that belong together."""

    vae: AutoencoderDC
    tokenizer: PreTrainedTokenizerBase
    text_encoder: PreTrainedModel
    stats: LatentStats
    max_text_length: int = LITE_TEXT_LENGTH

    @property
    def latent_channels(self) -> int:
        """`C` of the latents."""
        return len(self.stats.mean)

    @property
    def width(self) -> int:
        """`Dc` of the text features."""
        return self.text_encoder.config.hidden_size

    @cached_property
    def image_fingerprint(self) -> str:
        """Names the autoencoder and its statistics; travels with cached latents."""
        return fingerprint(self.vae, None, self.stats, 0)

    @cached_property
    def fingerprint(self) -> str:
        """Names both encoders and their settings; kept with a run."""
        return fingerprint(self.vae, self.text_encoder, self.stats, self.max_text_length)

    def encode_images(self, images: Tensor) -> Tensor:
        """Images (see `encode_images`) to normalised latents (B, C, h, w)."""
        return encode_images(self.vae, images, self.stats)

    def encode_text(self, captions: list[str], cut: list[int] | None = None) -> Tensor:
        """Captions to features (B, L, Dc); `cut` takes the places of those that are too long, see `encode_text`."""
        return encode_text(self.tokenizer, self.text_encoder, captions, self.max_text_length, cut)

    def parts(self) -> dict:
        """The same as keyword arguments of `NitroEPipeline`, which then draws with these encoders."""
        return {
            "vae": self.vae,
            "tokenizer": self.tokenizer,
            "text_encoder": self.text_encoder,
            "latents_mean": list(self.stats.mean),
            "latents_std": list(self.stats.std),
            "max_text_length": self.max_text_length,
        }


def load_encoders(
    source: str | Path = "lite", device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32
) -> Encoders:
    """Loads `vae` (with `latent_stats.json`), `text_encoder` and `tokenizer` of one folder.

    Args:
        source: what `find_weights` finds, or "full": DC-AE f32c32 and Llama-3.2-1B from the hub.
        device: where to put the models.
        dtype: of the language model and the autoencoder.

    Raises:
        EncoderUnavailable: when the folder holds no such models.
        ValueError: when a file differs from its checksum.
    """
    if source == "full":
        tokenizer, text_encoder = hub.load_text_encoder(hub.FULL_TEXT_ENCODER, device=device, dtype=dtype)
        vae = hub.load_autoencoder(hub.FULL_AUTOENCODER, device=device, dtype=dtype)
        stats = LatentStats.from_scaling_factor(vae.config.scaling_factor, vae.config.latent_channels)
        return Encoders(vae, tokenizer, text_encoder, stats, FULL_TEXT_LENGTH)
    try:
        folder = find_weights(source, "vae/latent_stats.json").parent
    except FileNotFoundError as error:
        raise hub.EncoderUnavailable(f"encoders: {error}") from None
    tokenizer, text_encoder = hub.load_text_encoder(folder, device=device, dtype=dtype)
    vae = hub.load_autoencoder(folder / "vae", device=device, dtype=dtype)
    return Encoders(vae, tokenizer, text_encoder, LatentStats.load(folder / "vae"))
