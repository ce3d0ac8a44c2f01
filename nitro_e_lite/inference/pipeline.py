"""From a caption to a picture: text encoder, transformer, sampler and autoencoder in one object.

The sampler walks the straight line of rectified flow from noise (sigma = 1) to a picture (sigma = 0) in K
Euler steps; at each the transformer is asked for the velocity at `1000 sigma`. Classifier-free guidance asks
twice, in one batch, with and without the caption, and goes further in the direction in which the two differ.

The class is a diffusers pipeline: `from_pretrained`, `save_pretrained`, progress bar, callbacks, LoRA, schedulers and
off-loading are the library's (`conventions.py`, `schedules.py`). Ours are the checks (`arguments.py`), the noise (one
generator a picture) and the grid of noise levels. For the models of this project that grid is `linspace(1, 1/K, K)`,
shifted towards noise where a model draws better so (`flow.shift_sigmas`). Differs: the official weights use the
scheduler's own grid, whose last step goes from 0.001 to 0 and does nothing; `sigma_grid="scheduler"` keeps it.

With diffusers' `SCMScheduler` the same pipeline draws with a consistency model (`trigflow.py`): each step jumps to a
picture and, but for the last, puts fresh noise back. With `sigma_grid="linear"` it stops at the noise levels of a flow
sampler, with "scheduler" at the published times. There is no guidance then; a model that has learned several strengths
is told which.

After `import nitro_e_lite.inference.pipeline`, `diffusers.DiffusionPipeline.from_pretrained(folder)` and
`diffusers.AutoModel` know the classes of this project.
"""

import time
import uuid
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import wraps
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import AutoencoderDC, DiffusionPipeline, FlowMatchEulerDiscreteScheduler, SchedulerMixin, SCMScheduler
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from diffusers.image_processor import VaeImageProcessor
from diffusers.pipelines.pipeline_utils import ImagePipelineOutput
from PIL import Image
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from nitro_e_lite.config import MAX_SHIFT, SIGMA_GRIDS
from nitro_e_lite.errors import InvalidType, InvalidValue, NotFinite
from nitro_e_lite.inference import schedules
from nitro_e_lite.inference.arguments import (
    MAX_STEPS,
    OUTPUT_TYPES,
    as_generators,
    as_grid,
    as_integer,
    as_number,
    as_prompts,
    as_sigmas,
    as_tensor,
    draw_noise,
)
from nitro_e_lite.inference.conventions import Call, Conventions
from nitro_e_lite.inference.encoders import LatentStats, decode_latents, encode_text
from nitro_e_lite.inference.schedules import Sampler, draws_noise, started
from nitro_e_lite.model import flow, trigflow
from nitro_e_lite.model.emmdit import EMMDiTTransformer2DModel
from nitro_e_lite.model.tokens import FULL_TEXT_LENGTH
from nitro_e_lite.runtime import send

SETTINGS = {
    "latents_mean": None,
    "latents_std": None,
    "max_text_length": FULL_TEXT_LENGTH,
    "sigma_grid": "linear",
    "default_steps": 20,
    "default_guidance": 4.5,
    "default_shift": 1.0,
}
"""Of a pipeline whose parts have not drawn before."""

# Attributes of modules, which copies of them and `torch.compile` hand on: a transformer's holds the settings it was
# drawn with and the name of the autoencoder that they are about; an autoencoder's its name.
_DRAWN_WITH, _NAME = "_nitro_e_drawn_with", "_nitro_e_name"


def _name_of(vae: nn.Module) -> str:
    if not hasattr(vae, _NAME):
        setattr(vae, _NAME, uuid.uuid4().hex)
    return getattr(vae, _NAME)


@dataclass
class SamplerStep:
    """One step of the sampler, just done; `NitroEPipeline.steps` yields them.

    Attributes:
        index: 0 for the first.
        total: how many there will be.
        timestep: what the transformer was told, `1000 sigma`.
        sigma: the noise level the step began at, 1 is noise.
        latents: `(B, C, h, w)`, float32, after the step. Assign others to go on from those.
        x0: `(B, C, h, w)`, the finished latents the model believes in: `x - sigma v`. After the last step, `latents`.
        seconds: wall-clock time of the step alone, without what the caller did since the one before.
    """

    index: int
    total: int
    timestep: float
    sigma: float
    latents: Tensor
    x0: Tensor
    seconds: float


def guided_velocity(
    transformer: nn.Module,
    latents: Tensor,
    features: Tensor,
    timestep: Tensor,
    guidance: float | Tensor,
    options: dict[str, Any],
) -> Tensor:
    """Where to from `latents` `(B, C, h, w)`, float32; features `(2B, L, D)` are guided, negative first."""
    guided = len(features) > len(latents)
    batch = latents.repeat(1 + guided, 1, 1, 1).to(features.dtype)  # (B or 2B, C, h, w)
    velocity = transformer(batch, features, timestep, **options).sample.float()
    if not guided:
        return velocity
    unconditional, conditional = velocity.chunk(2)  # (B, C, h, w) each
    return flow.guide(conditional, unconditional, guidance)


class NitroEPipeline(Conventions, DiffusionPipeline):
    """Text to image with E-MMDiT.

    Args:
        transformer: predicts the velocity.
        vae: turns latents into pictures.
        text_encoder, tokenizer: turn captions into features; None when only `prompt_embeds` are used.
        scheduler: the Euler sampler, shift 1, another flow scheduler of diffusers (`schedules.py`), or the sampler of
            consistency models.
        latents_mean, latents_std: statistics that latents were normalised with, one number a channel; by default
            the autoencoder's scaling factor.
        max_text_length: tokens a caption is padded to.
        sigma_grid: "linear" or "scheduler", see the module's essay.
        default_steps, default_guidance, default_shift: what a call without `num_inference_steps`, `guidance_scale`,
            `shift` uses.

    Parts can be None for a pipeline that only encodes captions, or only draws. A setting that is None is that of the
    pipeline which the transformer drew with before (`NitroEPipeline(**pipeline.components)`), else that of `SETTINGS`.
    Beside another autoencoder a warning then names the statistics of latents, which belong to both.

    Raises:
        ValueError: when the parts do not fit together.
    """

    model_cpu_offload_seq = "text_encoder->transformer->vae"
    _optional_components = ["text_encoder", "tokenizer"]
    _callback_tensor_inputs = ["latents", "prompt_embeds"]

    def __init__(
        self,
        transformer: EMMDiTTransformer2DModel,
        vae: AutoencoderDC,
        text_encoder: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        scheduler: FlowMatchEulerDiscreteScheduler | SCMScheduler,
        latents_mean: list[float] | None = None,
        latents_std: list[float] | None = None,
        max_text_length: int | None = None,
        sigma_grid: str | None = None,
        default_steps: int | None = None,
        default_guidance: float | None = None,
        default_shift: float | None = None,
    ):
        super().__init__()
        settings = {
            "latents_mean": latents_mean,
            "latents_std": latents_std,
            "max_text_length": max_text_length,
            "sigma_grid": sigma_grid,
            "default_steps": default_steps,
            "default_guidance": default_guidance,
            "default_shift": default_shift,
        }
        settings = self._settled(transformer, vae, settings)
        settings |= {
            "max_text_length": as_integer("max_text_length", settings["max_text_length"], 1),
            "default_steps": as_integer("default_steps", settings["default_steps"], 1, MAX_STEPS),
            "default_guidance": as_number("default_guidance", settings["default_guidance"], 0.0),
            "default_shift": as_number("default_shift", settings["default_shift"], 1.0, MAX_SHIFT),
        }
        self._check_parts(transformer, vae, text_encoder, settings)
        self.register_modules(
            transformer=transformer, vae=vae, text_encoder=text_encoder, tokenizer=tokenizer, scheduler=scheduler
        )
        self.register_to_config(**settings)
        self.stats, self.vae_scale_factor = None, 32
        if settings["latents_mean"] is not None:
            self.stats = LatentStats(tuple(settings["latents_mean"]), tuple(settings["latents_std"]))
        if vae is not None:
            if self.stats is None:
                self.stats = LatentStats.from_scaling_factor(vae.config.scaling_factor, vae.config.latent_channels)
            self.vae_scale_factor = vae.spatial_compression_ratio
            vae._group_offload_block_modules = ["encoder", "decoder"]  # they are called, the whole never is
        self.image_processor = VaeImageProcessor(vae_scale_factor=self.vae_scale_factor, do_convert_rgb=True)
        self._guided_velocity = guided_velocity  # `compile` puts another in its place
        self._remember()

    @staticmethod
    def _settled(transformer: nn.Module | None, vae: nn.Module | None, given: dict[str, Any]) -> dict[str, Any]:
        """What is given; for the rest, see the class."""
        vae_of, kept = getattr(transformer, _DRAWN_WITH, ("", {}))
        found = {name: kept.get(name, SETTINGS[name]) if value is None else value for name, value in given.items()}
        if given["latents_mean"] is not None or given["latents_std"] is not None:  # they are one setting
            return found | {name: given[name] for name in ("latents_mean", "latents_std")}
        if vae is not None and found["latents_mean"] is not None and _name_of(vae) != vae_of:
            message = "vae: another one than this transformer drew with; latents_mean, latents_std are kept: give "
            warnings.warn(f"{message}both where its latents have others", stacklevel=3)
        return found

    def _remember(self) -> None:
        """Leaves the settings with the transformer, for later pipelines of it."""
        transformer, vae = vars(self).get("transformer"), vars(self).get("vae")
        if transformer is not None and vae is not None and SETTINGS.keys() <= self.config.keys():
            setattr(transformer, _DRAWN_WITH, (_name_of(vae), {name: self.config[name] for name in SETTINGS}))

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        if name == "transformer":
            self._remember()

    def register_to_config(self, **changed: Any) -> None:
        """As diffusers'; a later pipeline of the same transformer is made with the settings of this one as they are."""
        super().register_to_config(**changed)
        self._remember()

    @staticmethod
    def _check_parts(transformer, vae, text_encoder, settings: dict) -> None:
        if settings["sigma_grid"] not in SIGMA_GRIDS:
            raise InvalidValue(f"sigma_grid: {settings['sigma_grid']!r} is not one of {', '.join(SIGMA_GRIDS)}")
        mean, std = settings["latents_mean"], settings["latents_std"]
        if (mean is None) != (std is None):
            raise InvalidValue("latents_mean, latents_std: give both or neither")
        if transformer is None:
            return
        channels, width = transformer.config.in_channels, transformer.config.caption_channels
        sizes = {} if vae is None else {"vae": vae.config.latent_channels}
        if mean is not None:
            sizes |= {"latents_mean": len(mean), "latents_std": len(std)}
        for name, size in sizes.items():
            if size != channels:
                raise InvalidValue(f"{name}: {size} latent channels, but the transformer has {channels}")
        if text_encoder is not None and text_encoder.config.hidden_size != width:
            size = text_encoder.config.hidden_size
            raise InvalidValue(f"text_encoder: features of width {size}, but the transformer takes {width}")

    @wraps(DiffusionPipeline.save_pretrained, assigned=())
    def save_pretrained(self, save_directory: str | Path, **options: Any) -> None:
        """As in diffusers, without the path this pipeline was loaded from, which belongs to one machine."""
        for part in (self, self.transformer, self.vae):
            if part is not None:
                part.register_to_config(_name_or_path="")
        super().save_pretrained(save_directory, **options)

    @property
    def shift(self) -> float:
        """How far the noise levels of a call that names no shift lean towards noise.

        It is the scheduler's, where that was built with one or makes the grid, else `default_shift`.
        """
        own = schedules.own_shift(self.scheduler)
        return own if self.config.sigma_grid == "scheduler" or own != 1 else self.config.default_shift

    def sampler(self, steps: int | None = None, guidance: float | None = None, shift: float | None = None) -> Sampler:
        """The sampler of a call with these settings; what is not given is the pipeline's own.

        Raises:
            TypeError, ValueError: a setting of the wrong type or value, named as the argument of a call.
        """
        settings = Sampler(
            as_integer("num_inference_steps", self.config.default_steps if steps is None else steps, 1, MAX_STEPS),
            as_number("guidance_scale", self.config.default_guidance if guidance is None else guidance, 0.0),
            as_number("shift", self.shift if shift is None else shift, 1.0, MAX_SHIFT),
        )
        if self.config.sigma_grid == "scheduler" and settings.shift != self.shift:
            own = f"the {self.shift:g} of the scheduler, whose grid is used"
            raise InvalidValue(f"shift: {settings.shift:g} differs from {own}")
        return settings

    @property
    def _consistency(self) -> bool:
        return isinstance(self.scheduler, SCMScheduler)

    def encode_captions(self, captions: list[str]) -> Tensor:
        """Text features `(B, L, D)` of captions; equal captions are encoded once.

        Raises:
            ValueError: when the pipeline has no text encoder.
        """
        if self.text_encoder is None or self.tokenizer is None:
            raise InvalidValue(
                "prompt: this pipeline has no text encoder; pass prompt_embeds (and negative_prompt_embeds)"
            )
        unique = list(dict.fromkeys(captions))
        features = encode_text(self.tokenizer, self.text_encoder, unique, self.config.max_text_length)
        self._check_finite("text_encoder", features)
        return features[[unique.index(caption) for caption in captions]]  # (B, L, D)

    @torch.no_grad()
    def encode_prompt(
        self,
        prompt: str | list[str] | None = None,
        device: torch.device | None = None,
        num_images_per_prompt: int | None = 1,
        do_classifier_free_guidance: bool = True,
        negative_prompt: str | list[str] | None = None,
        prompt_embeds: Tensor | None = None,
        negative_prompt_embeds: Tensor | None = None,
        max_sequence_length: int | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Text features of prompts and of what to steer away from, as in other diffusers pipelines.

        Args:
            device: where to put them; where the pipeline runs when not given.
            do_classifier_free_guidance: False leaves the negative ones out.
            **: else as in `__call__`.

        Returns:
            `(B, L, D)` each, `B` being prompts times `num_images_per_prompt`; None for the second without guidance.
        """
        self._check_length(max_sequence_length)
        repeats = 1 if num_images_per_prompt is None else as_integer("num_images_per_prompt", num_images_per_prompt, 1)
        given = (prompt, prompt_embeds, negative_prompt, negative_prompt_embeds)
        texts = self._check_texts(*given, guided=do_classifier_free_guidance)
        *negative, positive = (self._features(text, repeats, device) for text in texts)
        prompt_embeds, negative_prompt_embeds = positive, negative[0] if negative else None
        return prompt_embeds, negative_prompt_embeds

    def decode(self, latents: Tensor, output_type: str = "pil") -> Any:
        """Normalised latents `(B, C, h, w)` to pictures: PIL images, or an array or tensor in [0, 1]."""
        if self.vae is None:
            raise InvalidValue("vae: this pipeline has none, so it can only draw latents (output_type='latent')")
        images = decode_latents(self.vae, latents, self.stats)  # (B, 3, H, W)
        self._check_finite("vae", images)
        if output_type != "pil":
            return self.image_processor.postprocess(images.float(), output_type=output_type)
        pixels = (self.image_processor.denormalize(images.float()) * 255).round().to(torch.uint8)
        pixels = pixels.permute(0, 2, 3, 1).contiguous()  # (B, H, W, 3): a quarter of the bytes leaves the device
        return [Image.fromarray(one) for one in pixels.cpu().numpy()]

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | list[str] | None = None,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        *,
        negative_prompt: str | list[str] | None = None,
        height: int | None = None,
        width: int | None = None,
        shift: float | None = None,
        sigmas: list[float] | None = None,
        num_images_per_prompt: int | None = 1,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: Tensor | None = None,
        prompt_embeds: Tensor | None = None,
        negative_prompt_embeds: Tensor | None = None,
        max_sequence_length: int | None = None,
        attention_kwargs: dict[str, Any] | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable[..., dict | None] | None = None,
        callback_on_step_end_tensor_inputs: Iterable[str] | None = None,
    ) -> ImagePipelineOutput | tuple:
        """Draws pictures.

        Args:
            prompt: one caption or a list; or give `prompt_embeds`.
            num_inference_steps: sampler steps K, >= 1.
            guidance_scale: strength of classifier-free guidance, >= 0; up to 1 it is off and a step costs
                half.
            negative_prompt: what to steer away from, one string or one a prompt; "" when not given. Not used
                without guidance.
            height, width: pixels; the size of training when not given.
            shift: how far the grid of noise levels leans towards noise, >= 1; 1 is the even grid.
            sigmas: noise levels of the steps, falling from at most 1 to above 0, in place of the usual grid.
            num_images_per_prompt: pictures for each prompt; they come in the order of the prompts.
            generator: one generator for all pictures or a list with one each, see `arguments.as_generators`.
            latents: starting noise `(B, C, h, w)` in place of drawing it.
            prompt_embeds, negative_prompt_embeds: text features `(prompts, L, D)` in place of text.
            max_sequence_length: the tokens the model was trained with, or None; there is no other choice.
            attention_kwargs: `{"scale": s}` multiplies what LoRA adapters add by `s`.
            output_type: "pil", "np" `(B, H, W, 3)` or "pt" `(B, 3, H, W)` in [0, 1], or "latent"
                (normalised).
            return_dict: False gives a tuple.
            callback_on_step_end: called as `f(pipeline, step, timestep, {"latents": ...})` after each step;
                may return a dict with new `latents` or `prompt_embeds`. It may set `pipeline._interrupt = True`, which
                ends the walk, and `pipeline._guidance_scale`.
            callback_on_step_end_tensor_inputs: as in other diffusers pipelines; "latents", given when None, and
                "prompt_embeds": with guidance `(2B, L, D)`, negative first.

        Returns:
            `ImagePipelineOutput` with `.images`.

        Raises:
            TypeError, ValueError: an argument of the wrong type or value; the message names field, value
                and rule.
            FloatingPointError: a part of the model gave NaN or infinity; the message names the part.
        """
        if output_type not in OUTPUT_TYPES:
            raise InvalidValue(f"output_type: {output_type!r} is not one of {', '.join(OUTPUT_TYPES)}")
        if isinstance(callback_on_step_end, (PipelineCallback, MultiPipelineCallbacks)):
            callback_on_step_end_tensor_inputs = callback_on_step_end.tensor_inputs
        self._check_callback(callback_on_step_end, callback_on_step_end_tensor_inputs)
        latents, call, scheduler = self._start(
            prompt,
            num_inference_steps,
            guidance_scale,
            negative_prompt=negative_prompt,
            height=height,
            width=width,
            shift=shift,
            sigmas=sigmas,
            num_images_per_prompt=num_images_per_prompt,
            generator=generator,
            latents=latents,
            prompt_embeds=prompt_embeds,
            negative_prompt_embeds=negative_prompt_embeds,
            max_sequence_length=max_sequence_length,
            attention_kwargs=attention_kwargs,
        )
        with self._begin(call), self.progress_bar(total=call.total) as bar:
            for step in self._walk(latents, call, scheduler):
                if callback_on_step_end is not None:
                    self._ask(callback_on_step_end, callback_on_step_end_tensor_inputs, step, call)
                bar.update()
        latents = step.latents
        images = latents if output_type == "latent" else self.decode(latents, output_type)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    def steps(self, *arguments: Any, **options: Any) -> Iterator[SamplerStep]:
        """Draws step by step: `__call__` without the decoder, at the pace of whoever asks for the next step.

        Arguments are checked, the caption is read and the noise is drawn at once; the transformer runs when a step is
        asked for. Walks do not share anything that changes, so several may take turns on one pipeline.

        Args:
            *: `prompt`, `num_inference_steps` and `guidance_scale`, as in `__call__`.
            **: as there, without callbacks and what concerns the output.

        Yields:
            A `SamplerStep` after each step; `decode(step.x0)` shows what the model believes in.

        Raises:
            TypeError, ValueError, FloatingPointError: as in `__call__`.
        """
        return self._walk(*self._start(*arguments, **options))

    def _start(
        self,
        prompt: str | list[str] | None = None,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        *,
        negative_prompt: str | list[str] | None = None,
        height: int | None = None,
        width: int | None = None,
        shift: float | None = None,
        sigmas: list[float] | None = None,
        num_images_per_prompt: int | None = 1,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: Tensor | None = None,
        prompt_embeds: Tensor | None = None,
        negative_prompt_embeds: Tensor | None = None,
        max_sequence_length: int | None = None,
        attention_kwargs: dict[str, Any] | None = None,
    ) -> tuple[Tensor, Call, SchedulerMixin]:
        """Checks the arguments of a call and makes what `_walk` goes on with."""
        sampler = self.sampler(num_inference_steps, guidance_scale, shift)
        if sigmas is not None and shift is not None:
            raise InvalidValue("shift, sigmas: give one of the two")
        sigmas = None if sigmas is None else as_sigmas(sigmas, num_inference_steps)
        scheduler = started(self.scheduler, self.config.sigma_grid, sampler, sigmas, self._execution_device)
        self._check_length(max_sequence_length)
        repeats = 1 if num_images_per_prompt is None else as_integer("num_images_per_prompt", num_images_per_prompt, 1)
        grid = as_grid(height, width, self.transformer.config, self.vae_scale_factor)
        given = (prompt, prompt_embeds, negative_prompt, negative_prompt_embeds)
        texts = self._check_texts(*given, guided=sampler.guidance > 1 and not self._consistency)
        count = len(texts[0]) * repeats
        shape = (self.transformer.config.in_channels, *grid)
        fresh = draws_noise(scheduler)
        generators = as_generators(generator, count) if latents is None or fresh else []
        if latents is None:
            latents = draw_noise(generators, shape)
        latents = as_tensor("latents", latents, (count, *shape)).to(self._execution_device, torch.float32)
        with torch.no_grad():
            features = torch.cat([self._features(text, repeats) for text in texts])  # (B or 2B, L, D)
        total = len(scheduler.timesteps) - self._consistency  # its last time is where the pictures are
        call = Call(sampler.guidance, features, total, attention_kwargs, generators=generators if fresh else [])
        return latents, call, scheduler

    def _ask(self, callback: Callable, names: Iterable[str] | None, step: SamplerStep, call: Call) -> None:
        """Lets a callback look at a step, and takes over what it changed."""
        offer = {"latents": step.latents, "prompt_embeds": call.features}
        given = {name: offer[name] for name in (["latents"] if names is None else names)}
        changed = callback(self, step.index, step.timestep, given) or {}
        latents = changed.get("latents", step.latents)
        latents = as_tensor("callback_on_step_end: latents", latents, step.latents.shape)
        step.latents = latents.to(step.latents)
        features, count = changed.get("prompt_embeds", call.features), len(step.latents)
        name = "callback_on_step_end: prompt_embeds"
        features = as_tensor(name, features, (None, *call.features.shape[1:]))
        if len(features) not in (count, 2 * count):
            rule = f"expected {count}, or {2 * count} with guidance"
            raise InvalidValue(f"{name}: {len(features)} rows for {count} pictures; {rule}")
        call.features = features.to(call.features)

    def _check_callback(self, callback: object, names: object) -> None:
        if callback is not None and not callable(callback):
            raise InvalidType(f"callback_on_step_end: expected a function, got {type(callback).__name__}")
        field, offer = "callback_on_step_end_tensor_inputs", self._callback_tensor_inputs
        if isinstance(names, str) or not isinstance(names, Iterable | None):
            raise InvalidType(f"{field}: expected a list of names, got {names!r} ({type(names).__name__})")
        if unknown := set(names or ()) - set(offer):
            raise InvalidValue(f"{field}: {sorted(unknown)} not among {offer}")

    def _check_texts(self, prompt, prompt_embeds, negative, negative_embeds, guided: bool) -> list[list[str] | Tensor]:
        """What a step is told, as strings or features: `[negative, positive]`, or `[positive]` unguided."""
        if (prompt is None) == (prompt_embeds is None):
            raise InvalidValue("prompt, prompt_embeds: give exactly one of the two")
        if negative is not None and negative_embeds is not None:
            raise InvalidValue("negative_prompt, negative_prompt_embeds: give one of the two")
        width = self.transformer.config.caption_channels if self.transformer else self.text_encoder.config.hidden_size
        shape = (self.config.max_text_length, width)
        if prompt is not None:
            positive = as_prompts("prompt", prompt)
        else:
            positive = as_tensor("prompt_embeds", prompt_embeds, (None, *shape))
        if negative_embeds is not None:
            negative = as_tensor("negative_prompt_embeds", negative_embeds, (len(positive), *shape))
        else:
            negative = as_prompts("negative_prompt", "" if negative is None else negative, len(positive))
        return [negative, positive] if guided else [positive]

    def _check_length(self, tokens: object) -> None:
        own = self.config.max_text_length
        if tokens is not None and as_integer("max_sequence_length", tokens, 1) != own:
            raise InvalidValue(f"max_sequence_length: {tokens}, but the model was trained with {own} tokens a caption")

    def _features(self, text: list[str] | Tensor, repeats: int, device: torch.device | None = None) -> Tensor:
        """Text or features to features in the transformer's number type, each repeated for its pictures."""
        features = text if isinstance(text, Tensor) else self.encode_captions(text)
        dtype = features.dtype if self.transformer is None else self.transformer.dtype
        return features.to(device or self._execution_device, dtype).repeat_interleave(repeats, dim=0)

    @torch.no_grad()
    def _walk(self, latents: Tensor, call: Call, scheduler: SchedulerMixin) -> Iterator[SamplerStep]:
        """Walks `latents` `(B, C, h, w)`, float32, down the scheduler's grid."""
        if self._consistency:
            yield from self._jump(latents, call, scheduler)
            return
        count, options = len(latents), {}
        if call.attention_kwargs:
            options["attention_kwargs"] = call.attention_kwargs
        for index, (timestep, sigma) in enumerate(zip(scheduler.timesteps, scheduler.sigmas.tolist(), strict=False)):
            if call.interrupted:
                return
            start, call.timestep = time.perf_counter(), timestep
            exact = timestep  # DPM-Solver and UniPC round it
            if not timestep.is_floating_point():
                exact = torch.full_like(timestep, flow.TIMESTEP_SCALE * sigma, dtype=torch.float32)
            guided = call.guidance > 1 and len(call.features) > count
            features = call.features if guided else call.features[-count:]  # (B or 2B, L, D)
            velocity = self._guided_velocity(self.transformer, latents, features, exact, call.guidance, options)
            self._check_finite("transformer", velocity)  # also waits for the accelerator, so that the seconds are true
            x0 = flow.euler_step(latents, velocity, sigma, 0.0)  # one step all the way down
            noise = {"generator": call.generators} if call.generators else {}
            latents = scheduler.step(velocity, timestep, latents, **noise, return_dict=False)[0]
            step = SamplerStep(index, call.total, timestep, sigma, latents, x0, time.perf_counter() - start)
            yield step
            latents = step.latents

    def compile(self, **options: Any) -> None:
        """Compiles what a step asks of the transformer, guidance included; on a GPU it becomes one CUDA graph.

        A step of a small model on a GPU is hundreds of launches and little arithmetic; a graph is launched once. Each
        new batch size and picture size, with guidance and without, is compiled when it is first drawn, which takes a
        minute or more.

        Args:
            **options: of `torch.compile`, in place of these: static shapes, up to 64 of them, CUDA graphs on CUDA.
        """
        mode = "reduce-overhead" if self._execution_device.type == "cuda" else None
        options = {"dynamic": False, "mode": mode, "recompile_limit": 64, "isolate_recompiles": True} | options
        if self._consistency:
            self.transformer.compile(**options)
            return
        compiled = torch.compile(guided_velocity, **options)

        def velocity(
            transformer: nn.Module, latents: Tensor, features: Tensor, timestep: Tensor, guidance: float, more: dict
        ) -> Tensor:
            strength = send(torch.tensor(guidance), latents.device)  # a number would be compiled for each value
            return compiled(transformer, latents, features, timestep, strength, more).clone()  # a graph has one place

        self._guided_velocity = velocity

    @torch.no_grad()
    def _jump(self, latents: Tensor, call: Call, scheduler: SCMScheduler) -> Iterator[SamplerStep]:
        """Jumps from `latents` `(B, C, h, w)`, float32, to pictures, from one time of the scheduler after the other."""
        told: dict[str, Any] = {"guidance": call.guidance} if self.transformer.config.guidance_embedding else {}
        if call.attention_kwargs:
            told["attention_kwargs"] = call.attention_kwargs
        x_t = trigflow.SIGMA_DATA * latents
        for index, t in enumerate(scheduler.timesteps[:-1]):
            if call.interrupted:
                return
            start, s = time.perf_counter(), trigflow.to_flow_time(t).item()
            call.timestep = flow.TIMESTEP_SCALE * s
            predict = trigflow.predictor(self.transformer, call.features[-len(x_t) :], **told)
            velocity = trigflow.SIGMA_DATA * predict(x_t, t.expand(len(x_t)))
            self._check_finite("transformer", velocity)
            x_t, x0 = scheduler.step(velocity, t, x_t, generator=call.generators, return_dict=False)
            states = (x / trigflow.SIGMA_DATA for x in (x_t, x0))
            step = SamplerStep(index, call.total, call.timestep, s, *states, time.perf_counter() - start)
            yield step
            x_t = trigflow.SIGMA_DATA * step.latents

    @staticmethod
    def _check_finite(part: str, values: Tensor) -> None:
        if not values.isfinite().all():
            raise NotFinite(f"{part}: gave NaN or infinity; if it runs in half precision, load it with dtype='float32'")


for _class in (
    NitroEPipeline,
    EMMDiTTransformer2DModel,
):  # there `DiffusionPipeline.from_pretrained` and `AutoModel` look
    setattr(diffusers, _class.__name__, _class)
