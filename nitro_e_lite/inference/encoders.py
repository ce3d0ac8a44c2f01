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

import hashlib
import html
import json
import logging
import re
import unicodedata
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import diffusers
import numpy as np
import torch
import transformers
from diffusers import AutoencoderDC
from huggingface_hub.errors import HTTPError
from safetensors import SafetensorError
from torch import Tensor
from transformers import AutoModel, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from nitro_e_lite.model.products import speed_up
from nitro_e_lite.runtime import MANIFEST, check_manifest

FULL_AUTOENCODER = "mit-han-lab/dc-ae-f32c32-sana-1.0-diffusers"
FULL_TEXT_ENCODER = "meta-llama/Llama-3.2-1B"
HUB_REVISIONS = {
    FULL_AUTOENCODER: "ca69e17e97609e64ce055115a6515215109b1f50",
    FULL_TEXT_ENCODER: "4e20de362430cd3b72f300e6b0f18e50e7166e08",
}
"""Hub id -> commit that is loaded when none is asked for. Other ids need a revision."""


class EncoderUnavailable(RuntimeError):
    """An encoder cannot be loaded: no such folder, no network, or a licence not accepted."""


@dataclass(frozen=True)
class LatentStats:
    """Mean and standard deviation of each latent channel; normalised: ``(latents - mean) / std``."""

    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __post_init__(self):
        object.__setattr__(self, "mean", tuple(float(x) for x in self.mean))
        object.__setattr__(self, "std", tuple(float(x) for x in self.std))
        if not self.mean or len(self.mean) != len(self.std):
            raise ValueError(f"LatentStats: {len(self.mean)} means and {len(self.std)} stds; need as many")
        if not all(np.isfinite(self.mean)) or not all(np.isfinite(self.std)) or min(self.std) <= 0:
            raise ValueError(f"LatentStats: mean={self.mean}, std={self.std}: must be finite, std above 0")

    @classmethod
    def from_scaling_factor(cls, scaling_factor: float, channels: int) -> "LatentStats":
        """The published convention: ``latents * scaling_factor`` for every channel."""
        return cls((0.0,) * channels, (1 / scaling_factor,) * channels)

    @classmethod
    def load(cls, folder: str | Path) -> "LatentStats":
        """Reads ``latent_stats.json`` of an autoencoder folder trained by this package."""
        values = json.loads((Path(folder) / "latent_stats.json").read_text(encoding="utf-8"))
        return cls(values["latents_mean"], values["latents_std"])

    def to_json(self) -> str:
        """The text of ``latent_stats.json``, with the names that the pipeline's config uses."""
        return json.dumps({"latents_mean": self.mean, "latents_std": self.std}, indent=2) + "\n"

    def tensors(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and std as (1, C, 1, 1) tensors for ``like`` (B, C, h, w).

        Raises:
            ValueError: when the channel counts differ.
        """
        if like.shape[1] != len(self.mean):
            raise ValueError(f"latents have {like.shape[1]} channels, their statistics {len(self.mean)}")
        return tuple(like.new_tensor(x).view(1, -1, 1, 1) for x in (self.mean, self.std))


# -----------------------------------------------------------------------------------------------------------
# Loading
# -----------------------------------------------------------------------------------------------------------


def load_autoencoder(
    source: str | Path,
    *,
    revision: str | None = None,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
) -> AutoencoderDC:
    """Loads an autoencoder, frozen and in evaluation mode.

    Args:
        source: local folder, or hub id such as ``FULL_AUTOENCODER``.
        revision: commit of a hub id; the pinned one of ``HUB_REVISIONS`` when None.
        device: where to put it.
        dtype: number type of the weights.

    Raises:
        EncoderUnavailable: when nothing can be loaded from ``source``.
        ValueError: for a hub id without a revision, or a file that differs from its checksum.
    """
    place = _resolve(source, revision, "--vae PATH")
    load = AutoencoderDC.from_pretrained
    vae = attempt(source, "--vae PATH", load, torch_dtype=dtype, use_safetensors=True, **place)
    return vae.to(device=device, memory_format=torch.channels_last).eval().requires_grad_(False)


def load_text_encoder(
    source: str | Path,
    *,
    revision: str | None = None,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    token: str | None = None,
) -> tuple[PreTrainedTokenizerBase, PreTrainedModel]:
    """Loads a tokenizer and its language model, frozen and in evaluation mode.

    Args:
        source: hub id, a folder that holds both, or a folder with ``tokenizer`` and ``text_encoder`` inside.
        revision: commit of a hub id; the pinned one of ``HUB_REVISIONS`` when None.
        device: where to put the model.
        dtype: number type of the weights.
        token: access token for a gated hub id; the one of ``hf auth login`` when None.

    Returns:
        Tokenizer (pads on the right with the end token) and model (no language-model head).

    Raises:
        EncoderUnavailable: when nothing can be loaded from ``source``; names the licence page.
        ValueError: for a hub id without a revision, or a file that differs from its checksum.
    """
    option = "--text-encoder PATH"
    place = _resolve(source, revision, option)
    if (Path(source) / "text_encoder").is_dir():
        parts = (Path(source) / "tokenizer", Path(source) / "text_encoder")
        folders = [{"pretrained_model_name_or_path": str(part)} for part in parts]
    else:
        folders = [place, place]
    if not Path(source).is_dir():
        folders = [{**f, "token": token} for f in folders]
    tokenizer = attempt(source, option, AutoTokenizer.from_pretrained, **folders[0])
    load = AutoModel.from_pretrained
    model = attempt(source, option, load, dtype=dtype, use_safetensors=True, **folders[1])
    if tokenizer.eos_token is None:
        raise EncoderUnavailable(f"{source}: the tokenizer has no end token, which captions are padded with")
    tokenizer.pad_token, tokenizer.padding_side = tokenizer.eos_token, "right"
    speed_up(model)
    return tokenizer, model.to(device).eval().requires_grad_(False)


def _resolve(source: str | Path, revision: str | None, option: str) -> dict[str, str]:
    """Folder or (hub id, commit) as arguments of ``from_pretrained``."""
    if Path(source).is_dir():
        return {"pretrained_model_name_or_path": str(source)}
    if isinstance(source, Path) or not re.fullmatch(r"[\w.-]+/[\w.-]+", source):
        raise EncoderUnavailable(f"{source}: no such folder, and not a hub id like owner/name ({option})")
    revision = revision or HUB_REVISIONS.get(source)
    if revision is None:
        raise ValueError(
            f"revision=None: {source} has no pinned commit; pass revision='<40-digit commit>' so that the "
            f"run can be repeated, or download it once and pass its folder ({option})"
        )
    return {"pretrained_model_name_or_path": source, "revision": revision}


@contextmanager
def quiet_loading(source: str | Path) -> Iterator[None]:
    """Without the hub's warnings, and without progress bars when ``source`` is a folder; a download shows its own."""
    hub = logging.getLogger("huggingface_hub")  # warns of every request that failed, before it tries again
    level = hub.level
    hub.setLevel(logging.ERROR)
    logs = [diffusers.utils.logging, transformers.utils.logging] if Path(source).is_dir() else []
    shown = [log for log in logs if log.is_progress_bar_enabled()]
    for log in shown:
        log.disable_progress_bar()
    try:
        yield
    finally:
        hub.setLevel(level)
        for log in shown:
            log.enable_progress_bar()


def attempt(source: str | Path, option: str, load, **arguments):
    """Calls a ``from_pretrained``; whatever the hub answers, or a damaged file, ends in one readable error.

    A folder that lies beside a list of checksums, as shipped weights do, must agree with it.
    """
    folder = Path(arguments["pretrained_model_name_or_path"])
    if (folder.parent / MANIFEST).is_file():
        check_manifest(folder.parent, folder.name)
    try:
        with quiet_loading(source):
            return load(**arguments)
    except (OSError, ValueError, HTTPError, SafetensorError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    if Path(source).is_dir():
        message = f"{source}: cannot be loaded ({reason})"
    else:
        message = (
            f"{source}: cannot be downloaded ({reason}). If it asks for a licence, accept it at "
            f"https://huggingface.co/{source} and run `hf auth login`; without network, download it "
            f"elsewhere and name its folder: {option}"
        )
    raise EncoderUnavailable(message)  # outside the except block: no chain of causes to dig through


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
    raise ValueError(
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
    images = images_to_tensor(images).to(vae.device, vae.dtype)
    ratio = vae.spatial_compression_ratio
    if images.shape[2] % ratio or images.shape[3] % ratio:
        raise ValueError(f"images: {tuple(images.shape[2:])} pixels; both must be divisible by {ratio}")
    latents = vae.encode(images.contiguous(memory_format=torch.channels_last)).latent  # (B, C, h, w)
    mean, std = stats.tensors(latents)
    return ((latents - mean) / std).contiguous()


@torch.no_grad()
def decode_latents(vae: AutoencoderDC, latents: Tensor, stats: LatentStats) -> Tensor:
    """Normalised latents (B, C, h, w) to images (B, 3, H, W), clamped to [-1, 1].

    Raises:
        ValueError: when the channel count does not fit ``stats``.
    """
    latents = latents.to(vae.device, vae.dtype)
    mean, std = stats.tensors(latents)
    latents = (latents * std + mean).contiguous(memory_format=torch.channels_last)
    return vae.decode(latents).sample.clamp(-1, 1).contiguous()


def clean_caption(text: str) -> str:
    """Lower case, plain unicode, no markup entities, no addresses, single spaces: as in training."""
    text = unicodedata.normalize("NFKC", html.unescape(text))
    text = re.sub(r"(?:https?://|www\.)\S+", " ", text)
    return re.sub(r"\s+", " ", text).strip().lower()


@torch.no_grad()
def encode_text(
    tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel, captions: Sequence[str], max_length: int
) -> Tensor:
    """Captions to features: the last hidden state after the final norm.

    Args:
        tokenizer: pads on the right with the end token.
        model: the language model.
        captions: texts; cleaned here. The empty text is the unconditional caption.
        max_length: tokens a caption is padded or cut to.

    Returns:
        Features (B, max_length, D), padding included; each row depends on its own caption alone.

    Raises:
        TypeError: when ``captions`` is one string, or holds something else than strings.
    """
    if isinstance(captions, str) or not all(isinstance(c, str) for c in captions):
        raise TypeError(f"captions: expected a list of strings, got {captions!r}")
    texts = [clean_caption(c) for c in captions]
    for text, tokens in zip(texts, tokenizer(texts, verbose=False)["input_ids"], strict=True):
        if len(tokens) > max_length:
            warnings.warn(f"caption cut to {max_length} of {len(tokens)} tokens: {text!r}", stacklevel=2)
    padding = {"padding": "max_length", "truncation": True, "max_length": max_length}
    batch = tokenizer(texts, return_tensors="pt", **padding)
    tokens, mask = batch["input_ids"].to(model.device), batch["attention_mask"].to(model.device)  # (B, L)
    return model(input_ids=tokens, attention_mask=mask).last_hidden_state  # (B, L, D)


def fingerprint(
    vae: AutoencoderDC | None,
    text_encoder: PreTrainedModel | None,
    stats: LatentStats,
    max_length: int,
    **settings,
) -> str:
    """Names an encoder set: changes when any weight or any setting does. It travels with cached latents.

    Weights count rounded to bfloat16, so that a set loaded as float32 and as bfloat16 is the same set: data encoded in
    one can be trained on in the other.

    Args:
        vae: autoencoder, or None.
        text_encoder: language model, or None.
        stats: latent statistics.
        max_length: text tokens.
        **settings: anything else the cached values depend on (JSON types), e.g. ``image_size=128``.

    Returns:
        64 hexadecimal digits.
    """
    digest = hashlib.sha256()
    facts = {"stats": [stats.mean, stats.std], "max_length": max_length, **settings}
    digest.update(json.dumps(facts, sort_keys=True).encode())
    for name, module in (("vae", vae), ("text_encoder", text_encoder)):
        for key, value in sorted(module.state_dict().items()) if module is not None else ():
            value = value.detach().cpu()
            value = value.to(torch.bfloat16) if value.is_floating_point() else value
            digest.update(f"{name}.{key} {value.dtype} {tuple(value.shape)}".encode())
            digest.update(value.contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
