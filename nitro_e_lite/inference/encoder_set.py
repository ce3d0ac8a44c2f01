"""The frozen encoders of a training run as one thing: an autoencoder, a language model, statistics and a fingerprint.

Training needs both encoders before any transformer exists, so it cannot start from a pipeline. ``load_encoders`` takes
the same folder as ``load_pipeline`` and leaves the transformer out.
"""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from diffusers import AutoencoderDC
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from nitro_e_lite.inference import encoders
from nitro_e_lite.inference.encoders import LatentStats
from nitro_e_lite.runtime import weights_dir

LITE_TEXT_LENGTH, FULL_TEXT_LENGTH = 32, 128  # tokens a caption is padded to


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
        return encoders.fingerprint(self.vae, None, self.stats, 0)

    @cached_property
    def fingerprint(self) -> str:
        """Names both encoders and their settings; kept with a run."""
        return encoders.fingerprint(self.vae, self.text_encoder, self.stats, self.max_text_length)

    def encode_images(self, images: Tensor) -> Tensor:
        """Images (see ``encoders.encode_images``) to normalised latents (B, C, h, w)."""
        return encoders.encode_images(self.vae, images, self.stats)

    def encode_text(self, captions: list[str]) -> Tensor:
        """Captions to features (B, L, Dc)."""
        return encoders.encode_text(self.tokenizer, self.text_encoder, captions, self.max_text_length)

    def parts(self) -> dict:
        """The same as keyword arguments of ``NitroEPipeline``, which then draws with these encoders."""
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
    """Loads ``vae`` (with ``latent_stats.json``), ``text_encoder`` and ``tokenizer`` of one folder.

    Args:
        source: a name of shipped weights, a folder, or "full": DC-AE f32c32 and Llama-3.2-1B from the hub.
        device: where to put the models.
        dtype: of the language model and the autoencoder.

    Raises:
        EncoderUnavailable: when the folder holds no such models.
        ValueError: when a file differs from its checksum.
    """
    if source == "full":
        tokenizer, text_encoder = encoders.load_text_encoder(encoders.FULL_TEXT_ENCODER, device=device, dtype=dtype)
        vae = encoders.load_autoencoder(encoders.FULL_AUTOENCODER, device=device, dtype=dtype)
        stats = LatentStats.from_scaling_factor(vae.config.scaling_factor, vae.config.latent_channels)
        return Encoders(vae, tokenizer, text_encoder, stats, FULL_TEXT_LENGTH)
    shipped = weights_dir() / source
    folder = shipped if shipped.is_dir() else Path(source)
    if not (folder / "vae" / "latent_stats.json").is_file():
        raise encoders.EncoderUnavailable(f"{source}: no vae/latent_stats.json below this folder")
    tokenizer, text_encoder = encoders.load_text_encoder(folder, device=device, dtype=dtype)
    vae = encoders.load_autoencoder(folder / "vae", device=device, dtype=dtype)
    return Encoders(vae, tokenizer, text_encoder, LatentStats.load(folder / "vae"))
