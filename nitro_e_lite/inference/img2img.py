"""From a picture and a caption to another picture.

A picture is taken part of the way to noise and walked back with a caption: `strength` 1 is a new picture, 0.1 hardly
another one. The walk is that of `NitroEPipeline`, begun in the middle of its grid.
"""

import math
from typing import Any

import diffusers
import numpy as np
import torch
from diffusers.image_processor import PipelineImageInput
from diffusers.pipelines.pipeline_utils import ImagePipelineOutput

from nitro_e_lite.errors import InvalidType, InvalidValue
from nitro_e_lite.inference import schedules
from nitro_e_lite.inference.arguments import as_generators, as_integer, as_number, as_tensor, draw_noise
from nitro_e_lite.inference.encoders import encode_images
from nitro_e_lite.inference.pipeline import NitroEPipeline
from nitro_e_lite.model import flow


class NitroEImg2ImgPipeline(NitroEPipeline):
    """Image to image with E-MMDiT: `NitroEImg2ImgPipeline(**pipeline.components)` shares the parts of another."""

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | list[str] | None = None,
        image: PipelineImageInput | None = None,
        strength: float = 0.6,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        *,
        height: int | None = None,
        width: int | None = None,
        shift: float | None = None,
        num_images_per_prompt: int | None = 1,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: torch.Tensor | None = None,
        prompt_embeds: torch.Tensor | None = None,
        **options: Any,
    ) -> ImagePipelineOutput | tuple:
        """Draws pictures that begin as others.

        Args:
            prompt: as in `NitroEPipeline.__call__`, like everything that is not named here.
            image: a picture or one for each prompt, in any form that diffusers takes, as numbers bytes or in [0, 1];
                it is resized to `height` x `width`, or the size of training.
            strength: how far it goes to noise, in (0, 1]; that share of the steps is done.
            latents: the noise `(B, C, h, w)` to mix with, in place of drawing it.
            **options: as there, except `sigmas`.

        Raises:
            TypeError, ValueError: as there; also a scheduler that takes no noise levels.
        """
        if image is None:
            raise InvalidType("image: expected a picture or a list of pictures, got None")
        if not 0 < as_number("strength", strength, 0.0) <= 1:
            raise InvalidValue(f"strength: {strength} is not above 0 and up to 1")
        sampler = self.sampler(num_inference_steps, guidance_scale, shift)
        side = self.transformer.config.sample_size * self.vae_scale_factor
        size = {"height": side if height is None else height, "width": side if width is None else width}
        image = [_as_share(one) for one in image] if isinstance(image, list) else _as_share(image)
        pixels = self.image_processor.preprocess(image, **size)  # (1 or prompts, 3, H, W) in [-1, 1]
        clean = encode_images(self.vae, pixels, self.stats).float()
        told = prompt_embeds if prompt is None else [prompt] if isinstance(prompt, str) else prompt
        count = 1 if told is None else len(told)
        if len(clean) not in (1, count):
            raise InvalidValue(f"image: {len(clean)} pictures for {count} prompts; expected one or {count}")
        repeats = 1 if num_images_per_prompt is None else as_integer("num_images_per_prompt", num_images_per_prompt, 1)
        clean = clean.expand(count, *clean.shape[1:]).repeat_interleave(repeats, dim=0)  # (B, C, h, w)
        if latents is None:
            latents = draw_noise(as_generators(generator, len(clean)), clean.shape[1:])
        noise = as_tensor("latents", latents, tuple(clean.shape)).to(clean)
        grid = schedules.grid(self.scheduler, self.config.sigma_grid, sampler)
        grid = grid[len(grid) - max(1, math.floor(len(grid) * strength + 1e-6)) :]  # 50 x 0.58 is 29
        start = flow.interpolate(clean, noise, torch.full((len(clean),), grid[0], device=clean.device))
        return super().__call__(
            prompt,
            guidance_scale=sampler.guidance,
            sigmas=grid,
            latents=start,
            generator=generator,
            num_images_per_prompt=repeats,
            prompt_embeds=prompt_embeds,
            **size,
            **options,
        )


def _as_share(image: Any) -> Any:
    """Bytes as shares of 255; pictures as they are.

    Raises:
        ValueError: numbers outside of [0, 1], or of the [-1, 1] that tensors of pictures may have.
    """
    if not isinstance(image, np.ndarray | torch.Tensor):
        return image
    if image.dtype in (np.uint8, torch.uint8):
        return image / 255
    low, high = float(image.min()), float(image.max())
    if not -1 <= low <= high <= 1:
        raise InvalidValue(f"image: numbers from {low:g} to {high:g}; expected bytes, or [0, 1]")
    return image


diffusers.NitroEImg2ImgPipeline = NitroEImg2ImgPipeline  # there `DiffusionPipeline.from_pretrained` looks
