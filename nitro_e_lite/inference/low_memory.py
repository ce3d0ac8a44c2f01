"""Drawing where memory is short: each part is there while it works, and one picture is drawn at a time.

Of the full model the language model weighs most, and it has done its work before the first step; the autoencoder needs
most *on the way*, when it decodes. So captions are read first, all of them, and the language model is let go; pictures
are drawn one after the other; and large ones are decoded in overlapping tiles, whose blended seams differ by a shade
from a whole decode. On an accelerator the parts lie in the computer's memory and visit the device in turn, which is
diffusers' `enable_model_cpu_offload`.

Peak memory of drawing at the size of the full model in bf16, in GB without the libraries' 0.6. The language model
weighs 2.5, the transformer and the autoencoder 0.6 each. On a CPU all three are loaded before anything is drawn, which
is then the peak; an accelerator holds one at a time.

| pictures | as usual | in little memory | how it was found |
|---|---|---|---|
| 2 of 512 px, on a CPU | 4.7 | 3.7 | measured |
| decoding 1 of 1024 px, on a CPU | 2.0 | 0.7 | measured: resident memory over one `vae.decode` |
| decoding 4 of 512 px | 1.8 | 0.5 | counted on fake tensors |
| decoding 4 of 1024 px | 7.1 | 0.5 | counted on fake tensors |

`tests/gpu` measures it on an accelerator.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from PIL.Image import Image

from nitro_e_lite.inference.pipeline import NitroEPipeline


def save_memory(pipeline: NitroEPipeline, device: torch.device) -> None:
    """Sets a pipeline that still lies in the computer's memory up to draw on `device` in little of it."""
    pipeline.vae.enable_tiling()
    if device.type != "cpu":
        pipeline.enable_model_cpu_offload(device=device)


def draw_one_by_one(
    pipeline: NitroEPipeline,
    prompts: Sequence[str],
    generators: Sequence[torch.Generator],
    negative_prompt: str | None = None,
    **settings: Any,
) -> Iterator[Image]:
    """Yields a picture for each caption. The pipeline has no text encoder afterwards.

    Args:
        pipeline: `load_pipeline(..., low_memory=True)`.
        prompts: captions.
        generators: one for each.
        negative_prompt: what to steer away from.
        **settings: further arguments of a call of the pipeline.
    """
    with torch.no_grad():
        features, _ = pipeline.encode_prompt([negative_prompt or "", *prompts], do_classifier_free_guidance=False)
    pipeline.register_modules(text_encoder=None, tokenizer=None)
    for number, generator in enumerate(generators, start=1):
        yield pipeline(
            prompt_embeds=features[number : number + 1],
            negative_prompt_embeds=features[:1],  # (1 + B, L, D)
            generator=generator,
            **settings,
        ).images[0]
