"""FP8 in any diffusers pipeline with a transformer, and the switch that draws delicate captions in 16 bit.

Only `pipeline.transformer` is touched: `NitroEPipeline` and diffusers' own `StableDiffusion3Pipeline` alike keep their
text encoders and autoencoder as they are.

The switch: faces, letters and emblems show small errors that a landscape hides, so a caption that asks for one is drawn
by the 16-bit weights. That costs what FP8 was to save: both sets of weights are in memory, 1.5 times bf16's. Hence it
is an option, its rules are a file (`prompt_switch.json`), and whether it is worth it is a question to measure.

Source: "FP8 SD3.5" article. Differs: captions of one call are drawn in two groups, so that a picture does not depend on
which other captions stand beside it.
"""

from __future__ import annotations

import copy
import json
import re
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline
from torch import Tensor, nn

from nitro_e_lite.errors import InvalidValue
from nitro_e_lite.model import fp8
from nitro_e_lite.model.fp8_ladder import choose_rung
from nitro_e_lite.model.fp8_policy import Policy

FOR_CAPTIONS = ("prompt_2", "prompt_3", "negative_prompt", "negative_prompt_2", "negative_prompt_3")
FOR_CAPTIONS += ("negative_prompt_embeds", "negative_pooled_prompt_embeds")
FOR_PICTURES = ("generator", "latents")
RULES = Path(__file__).with_suffix("").parent / "prompt_switch.json"


class FP8Note(UserWarning):
    """A step down the ladder, or layers that stay in 16 bit because of their size."""


def quantize_pipeline(
    pipeline: DiffusionPipeline, device: str | torch.device | None = None, policy: Policy | None = None
) -> fp8.Report:
    """Puts a pipeline's transformer into FP8, on the first rung that the device can do; each step down is a warning.

    Args:
        pipeline: LoRA merged (`fuse_lora` and `unload_lora_weights` in diffusers' pipelines). One that is in FP8
            already is moved to the rung of the device.
        device: where it is going to run; where it is when not given.
        policy: which layers; that of the transformer's class when not given.

    Returns:
        What became of the transformer, also kept as `pipeline.transformer.fp8_report`.

    Raises:
        ValueError: a pipeline without a transformer, or see `fp8.quantize_model`.
    """
    transformer = getattr(pipeline, "transformer", None)
    if not isinstance(transformer, nn.Module):
        raise InvalidValue(f"pipeline: {type(pipeline).__name__} has no transformer; FP8 is for diffusion transformers")
    choice = choose_rung(device or transformer.device, transformer.dtype)
    if fp8.is_quantized(transformer):
        report = fp8.set_rung(transformer, choice, policy)
    else:
        report = fp8.quantize_model(transformer, policy, choice)
    for reason in report.reasons:
        warnings.warn(f"FP8, {reason}", FP8Note, stacklevel=2)
    if report.skipped:
        name, why = next(iter(report.skipped.items()))
        rest = f"layers that stay in 16 bit although the policy wants them in FP8: {len(report.skipped)}"
        warnings.warn(f"FP8, {rest}, {name} ({why})" + ", ..." * (len(report.skipped) > 1), FP8Note, stacklevel=2)
    return report


def read_rules(path: str | Path = RULES) -> dict[str, list[str]]:
    """Rule -> words, of a file in the form of `prompt_switch.json`.

    Raises:
        ValueError: another form.
    """
    try:
        rules = json.loads(Path(path).read_text(encoding="utf-8"))["rules"]
        sound = all(
            words and all(isinstance(word, str) and word.strip("* ") for word in words) for words in rules.values()
        )
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InvalidValue(f"{path}: cannot be read ({type(error).__name__}: {error})") from None
    if not rules or not sound:
        raise InvalidValue(f"{path}: rules must be lists of words by the name of a rule")
    return rules


def needs_16_bit(prompt: str, rules: dict[str, list[str]]) -> str | None:
    """The rule that sends a caption to the 16-bit weights, None when there is none."""
    for rule, words in rules.items():
        for word in words:
            end = "" if word.endswith("*") else r"\b"
            if re.search(rf"\b{re.escape(word.rstrip('*'))}{end}", prompt, flags=re.IGNORECASE):
                return rule
    return None


class PromptSwitch:
    """A pipeline in FP8 that draws captions of some kinds with its 16-bit weights.

    Args:
        pipeline: in 16 bit, LoRA merged; its transformer is put into FP8, a copy keeps the 16-bit weights.
        device: where it is going to run; where it is when not given.
        policy: which layers go into FP8.
        rules: file of rules.

    Attributes:
        report: what became of the transformer.
        drawn: for each caption of the last call the rule that sent it to 16 bit, or None.
    """

    def __init__(
        self,
        pipeline: DiffusionPipeline,
        device: str | torch.device | None = None,
        policy: Policy | None = None,
        rules: str | Path = RULES,
    ):
        self.rules, self.pipeline, self.drawn = read_rules(rules), pipeline, []
        exact = getattr(pipeline, "transformer", None)
        if isinstance(exact, nn.Module) and fp8.is_quantized(exact):
            raise InvalidValue("pipeline: is in FP8 already; the switch needs its 16-bit weights")
        exact = copy.deepcopy(exact)
        self.report = quantize_pipeline(pipeline, device, policy)
        self.exact, self.fast = exact, pipeline.transformer

    def __call__(self, prompt: str | list[str], **options: Any) -> Any:
        """Draws as the pipeline does; captions that a rule fits with the 16-bit weights.

        Args:
            prompt: one caption or a list.
            **options: the pipeline's own; those of `FOR_CAPTIONS` and `FOR_PICTURES` are divided with the captions.

        Returns:
            The pipeline's output, pictures in the order of the captions.

        Raises:
            ValueError: one generator for captions of both kinds, which would be drawn in another order than asked for.
        """
        if not prompt or not isinstance(prompt, (str, list, tuple)):
            raise InvalidValue("prompt: the switch reads captions; give one or a list (embeddings have no words)")
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        self.drawn = [needs_16_bit(one, self.rules) for one in prompts]
        groups = [[i for i, rule in enumerate(self.drawn) if (rule is None) == fast] for fast in (True, False)]
        if not all(groups):
            return self._draw(self.fast if groups[0] else self.exact, prompt, options)
        if isinstance(options.get("generator"), torch.Generator):
            raise InvalidValue(
                "generator: captions are drawn in two groups, in FP8 and in 16 bit; give a list, one each"
            )
        each = options.get("num_images_per_prompt") or 1
        places, images, output = [], [], None
        for model, rows in zip((self.fast, self.exact), groups, strict=True):
            pictures = [i * each + k for i in rows for k in range(each)]
            own = {name: _part(name, value, rows, pictures) for name, value in options.items()}
            output = self._draw(model, [prompts[i] for i in rows], own)
            images.append(output[0])
            places += pictures
        joined = _in_order(images, places)
        if isinstance(output, tuple):
            return (joined, *output[1:])
        output.images = joined
        return output

    def _draw(self, transformer: nn.Module, prompt: Any, options: dict[str, Any]) -> Any:
        self.pipeline.transformer = transformer.to(self.fast.device)
        try:
            return self.pipeline(prompt, **options)
        finally:
            self.pipeline.transformer = self.fast


def _part(name: str, value: Any, rows: list[int], pictures: list[int]) -> Any:
    """The entries of an option that belong to some of the captions."""
    if name not in FOR_CAPTIONS + FOR_PICTURES or not isinstance(value, (list, tuple, Tensor)):
        return value
    own = rows if name in FOR_CAPTIONS else pictures
    return value[own] if isinstance(value, Tensor) else [value[i] for i in own]


def _in_order(images: list[Any], places: list[int]) -> Any:
    order = sorted(range(len(places)), key=places.__getitem__)
    if isinstance(images[0], Tensor):
        return torch.cat(images)[order]
    if isinstance(images[0], np.ndarray):
        return np.concatenate(images)[order]
    joined = [image for group in images for image in group]
    return [joined[i] for i in order]
