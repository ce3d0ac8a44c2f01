"""Training of the lite autoencoder: a small DC-AE on synthetic scenes.

At full scale the autoencoder comes ready-made and stays frozen. At lite scale the same library class is trained here,
in minutes, and then frozen too.

What a diffusion model wants from latents is not only that they decode well, but that they are easy to predict. Three
terms ask for it: the picture itself (absolute, squared and gradient error); gaussian noise of up to `latent_noise`
standard deviations on the latents, so that the decoder forgives small errors of the diffusion model; and on every
`half_resolution_every`-th step *scale equivariance*: latents averaged 2x2 must decode to the picture averaged 2x2,
which removes high frequencies from the latents. Source: arXiv 2502.14831 (diffusability), 2502.09509.

"""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderDC
from pydantic import Field
from torch import Tensor

from nitro_e_lite.config import NonNegative, NonNegativeNumber, Positive, PositiveNumber, RunConfig, settings
from nitro_e_lite.errors import InvalidValue
from nitro_e_lite.inference.encoders import LatentStats, images_to_tensor
from nitro_e_lite.runtime import generator
from nitro_e_lite.scenes.grammar import sample_scene
from nitro_e_lite.scenes.render import render
from nitro_e_lite.training.engine import Engine, Placement, Stage, Trainable
from nitro_e_lite.training.optimizers import adamw, cosine_scale

Widths = Annotated[tuple[Positive, ...], Field(min_length=1)]
Layers = Annotated[tuple[NonNegative, ...], Field(min_length=1)]


@settings
class AutoencoderConfig(RunConfig):
    """The lite autoencoder: f8, so that a 128 px picture becomes a 16x16 grid of latents."""

    steps: Positive = 3600
    batch_size: Positive = 16
    learning_rate: NonNegativeNumber = 2e-3
    warmup_steps: NonNegative = 100  # linear; then the rate falls to zero along a cosine
    max_grad_norm: PositiveNumber = 1.0  # the global gradient norm is clipped there
    image_size: Positive = 128  # pixels a side
    window: Positive = 64  # pixels a side of the part of a picture that a step looks at
    latent_channels: Positive = 8
    encoder_widths: Widths = (16, 16, 32, 128)  # first unused: no layer at 128x128
    encoder_layers: Layers = (0, 1, 1, 1)
    decoder_widths: Widths = (16, 16, 64, 128)
    decoder_layers: Layers = (0, 1, 1, 3)
    latent_noise: NonNegativeNumber = 0.1  # largest noise on the latents, in standard deviations of a channel
    half_resolution_every: NonNegative = 6  # 0 switches scale equivariance off
    squared_weight: NonNegativeNumber = 2.0
    gradient_weight: NonNegativeNumber = 1.0
    statistics_scenes: Positive = 2048  # whose latents say mean and spread of each channel

    def __post_init__(self):
        stages = len(self.encoder_widths)
        for name in ("encoder_layers", "decoder_widths", "decoder_layers"):
            if len(getattr(self, name)) != stages:
                raise InvalidValue(f"{name}={getattr(self, name)}: must be {stages} numbers, as encoder_widths are")
        halves = 2 if self.half_resolution_every else 1
        latent = halves * 2 ** (stages - 1)  # pixels a side
        for name in ("window", "image_size"):
            if getattr(self, name) % latent:
                raise InvalidValue(f"{name}={getattr(self, name)}: must be a multiple of {latent}")


def build_autoencoder(config: AutoencoderConfig) -> AutoencoderDC:
    """A small `AutoencoderDC` of residual blocks, no attention, drawn from `config.seed`."""
    torch.manual_seed(config.seed)
    stages = len(config.encoder_widths)
    return AutoencoderDC(
        latent_channels=config.latent_channels,
        encoder_block_out_channels=config.encoder_widths,
        decoder_block_out_channels=config.decoder_widths,
        encoder_layers_per_block=config.encoder_layers,
        decoder_layers_per_block=config.decoder_layers,
        encoder_qkv_multiscales=((),) * stages,
        decoder_qkv_multiscales=((),) * stages,
        decoder_conv_act_fn="silu",
    ).to(memory_format=torch.channels_last)


def scene_images(seed: int, indices: range, size: int, split: str = "train") -> Tensor:
    """Renders scenes as float images (B, 3, size, size) in [-1, 1]."""
    return images_to_tensor(np.stack([render(sample_scene(seed, i, split), size) for i in indices]))


def scene_windows(config: AutoencoderConfig, indices: Sequence[int], draws: Tensor) -> Tensor:
    """One square window (B, 3, window, window) of each scene, around one of its objects.

    Most of a scene is soft background, which is learned at once; windows around objects are a quarter of the work and
    hold most of the edges. The network is convolutional: what it learns in windows holds for whole pictures.

    Args:
        config: sizes and the data set's seed.
        indices: numbers of the scenes.
        draws: (B, 3) in [0, 1): which object, and how far the window is off its centre.
    """
    size, window = config.image_size, config.window
    windows = []
    for index, (which, *jitter) in zip(indices, draws.tolist(), strict=True):
        scene = sample_scene(config.seed, index)
        centre = scene.objects[int(which * len(scene.objects))]
        corner = (centre.y * size - window * jitter[0], centre.x * size - window * jitter[1])
        top, left = (min(max(round(c), 0), size - window) for c in corner)
        windows.append(render(scene, size)[top : top + window, left : left + window])
    return images_to_tensor(np.stack(windows))


def picture_error(decoded: Tensor, target: Tensor, config: AutoencoderConfig) -> Tensor:
    """Absolute + squared + gradient error of images (B, 3, H, W)."""
    error = decoded - target
    slopes = error.diff(dim=2).abs().mean() + error.diff(dim=3).abs().mean()
    plain = error.abs().mean() + config.squared_weight * error.square().mean()
    return plain + config.gradient_weight * slopes


class Autoencoder(Stage):
    """The lite autoencoder in training; `export` leaves `vae` with its `latent_stats.json`."""

    def __init__(self, config: AutoencoderConfig, placement: Placement):
        self.config, self.placement = config, placement
        self.vae = build_autoencoder(config)
        schedule = partial(cosine_scale, steps=config.steps, warmup_steps=config.warmup_steps)
        self.modules = {"vae": Trainable(self.vae, self._optimizers, schedule, config.max_grad_norm)}

    def _optimizers(self, masters: dict[str, Tensor]) -> dict[str, torch.optim.Optimizer]:
        rate = self.config.learning_rate
        return {"adamw": adamw(masters.values(), lr=rate, betas=(0.9, 0.95), weight_decay=0.0)}

    def losses(self, step: int, part: int) -> dict[str, dict[str, Tensor]]:
        """Loss of one step and the PSNR of its (noisy, possibly half-size) reconstruction in dB."""
        config, rows = self.config, self.placement.microbatches[part]
        stream = partial(generator, config.seed, step)
        draws = torch.rand(config.batch_size, 4, generator=stream("window"))[rows.start : rows.stop]  # (B, 4)
        images = scene_windows(config, [step * config.batch_size + row for row in rows], draws[:, :3])
        images = images.to(self.placement.device, memory_format=torch.channels_last)
        latents = self.vae.encode(images.to(self.placement.dtype)).latent  # (B, C, H/8, W/8)
        spread = latents.std(dim=(0, 2, 3), keepdim=True)  # with gradient: growing latents gain nothing
        noise = torch.stack([torch.randn(latents.shape[1:], generator=stream("noise", row)) for row in rows])
        every = config.half_resolution_every
        if every and step % every == every - 1:
            latents, images, noise = (F.avg_pool2d(x, 2) for x in (latents, images, 2 * noise))  # variance stays 1
        level = config.latent_noise * draws[:, 3].view(-1, 1, 1, 1)
        decoded = self.vae.decode(latents + (level * noise).to(latents) * spread).sample.float()
        psnr = -10 * torch.log10((decoded.detach() - images).square().mean() / 4)
        return {"vae": {"loss": picture_error(decoded, images, config), "psnr": psnr}}

    def export(self, weights: dict[str, dict[str, Tensor]], folder: Path) -> None:
        """`vae`: an `AutoencoderDC` folder with the statistics of its latents."""
        self.vae.save_pretrained(folder / "vae")
        stats = measure_latents(self.vae, self.config.statistics_scenes, self.config.image_size, self.config.seed)
        (folder / "vae" / "latent_stats.json").write_text(stats.to_json(), encoding="utf-8")


def train_autoencoder(
    config: AutoencoderConfig, run_dir: str | Path, resume: bool = False, device: str | None = None
) -> Path:
    """Trains the lite autoencoder and measures its latents; see `Engine`. Returns the folder `run_dir/final/vae`."""
    return Engine(config, Autoencoder, run_dir, resume, device).fit() / "vae"


@torch.no_grad()
def measure_latents(vae: AutoencoderDC, scenes: int, size: int, seed: int, batch: int = 32) -> LatentStats:
    """Mean and standard deviation of every latent channel over `scenes` training scenes."""
    count, total, squares = 0, 0.0, 0.0
    for first in range(0, scenes, batch):
        images = scene_images(seed, range(first, min(first + batch, scenes)), size)
        images = images.to(vae.device, vae.dtype, memory_format=torch.channels_last)
        latents = vae.encode(images).latent.double()
        count += latents.numel() // latents.shape[1]
        total = total + latents.sum(dim=(0, 2, 3))
        squares = squares + latents.square().sum(dim=(0, 2, 3))
    mean = total / count
    return LatentStats(tuple(mean.tolist()), tuple((squares / count - mean**2).sqrt().tolist()))
