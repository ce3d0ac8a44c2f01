"""How fast: whole pictures and their parts, the transformer alone, its matrix products.

Speed is the median of several runs after a warm-up, with the device idle before the clock is read.
"""

import math
import statistics
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from nitro_e_lite import runtime
from nitro_e_lite.inference.arguments import as_integer
from nitro_e_lite.inference.pipeline import NitroEPipeline, Sampler
from nitro_e_lite.model import cpu_kernels
from nitro_e_lite.model.emmdit import EMMDiTTransformer2DModel
from nitro_e_lite.model.tokens import FULL_TEXT_LENGTH
from nitro_e_lite.stats import interval
from nitro_e_lite.viz import png_bytes

CAPTION = "a red circle to the left of a blue square"


def median_seconds(function: Callable[[], Any], repeats: int = 5, warmup: int = 1) -> float:
    """Median wall-clock seconds of `function()`; the accelerator, if there is one, is waited for."""
    as_integer("repeats", repeats, 1)
    times = []
    for run in range(warmup + repeats):
        start = time.perf_counter()
        function()
        if torch.accelerator.is_available():
            torch.accelerator.synchronize()
        if run >= warmup:
            times.append(time.perf_counter() - start)
    return statistics.median(times)


def measured_peak(device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32) -> float:
    """FLOP/s of a product of two large square matrices: the practical peak of a device."""
    side = 1024 if torch.device(device).type == "cpu" else 8192
    matrix = torch.ones(side, side, device=device, dtype=dtype)
    return 2 * side**3 / median_seconds(lambda: matrix @ matrix)


def time_pipeline(
    pipeline: NitroEPipeline, sampler: Sampler | None = None, batch_sizes: Sequence[int] = (1, 8), repeats: int = 3
) -> list[dict[str, float]]:
    """Times whole pictures, caption to pixels, and the three parts of the work.

    Args:
        pipeline: what draws.
        sampler: to draw with; the pipeline's own when not given.
        batch_sizes: pictures at once, each timed by itself.
        repeats: runs of which the median counts.

    Returns:
        One row a batch size: `batch`, `seconds` (the batch), `images_per_second`, and the medians
        `text_seconds`, `sampling_seconds`, `decoding_seconds`; and `memory_bytes`, the most there was meanwhile.
    """
    rows, sampler = [], sampler or pipeline.sampler()
    for batch in batch_sizes:
        check_room(pipeline, batch)
    for batch in batch_sizes:
        runtime.forget_memory(pipeline.device)
        prompts = [CAPTION] * batch
        features = pipeline.encode_captions(prompts)
        negative = pipeline.encode_captions([""] * batch)
        draw = partial(pipeline, **sampler.arguments())
        sample = partial(draw, prompt_embeds=features, negative_prompt_embeds=negative, output_type="latent")
        latents = sample().images
        seconds = median_seconds(partial(draw, prompts), repeats)
        rows.append(
            {
                "batch": batch,
                "seconds": seconds,
                "images_per_second": batch / seconds,
                "text_seconds": median_seconds(partial(pipeline.encode_captions, [CAPTION, ""]), repeats),
                "sampling_seconds": median_seconds(sample, repeats),
                "decoding_seconds": median_seconds(partial(pipeline.decode, latents), repeats),
                "memory_bytes": runtime.memory_used(pipeline.device),
            }
        )
    return rows


def check_room(pipeline: NitroEPipeline, batch: int) -> None:
    """Refuses a batch whose pictures and texts alone do not fit into memory.

    Raises:
        TypeError, ValueError: it does not, or is no number above 0.
    """
    config = pipeline.transformer.config
    pixels = 3 * (config.sample_size * pipeline.vae_scale_factor) ** 2
    numbers = pixels + 2 * pipeline.config.max_text_length * config.caption_channels  # a picture, both texts
    runtime.check_memory(f"batch={batch}", 4 * numbers * as_integer("batch", batch, 1))


def time_side_by_side(
    models: Sequence[tuple[NitroEPipeline, Sampler]], batch: int = 25, repeats: int = 5
) -> list[dict[str, Any]]:
    """Times models from captions to PNG files in memory, taking turns, so that a busy moment meets all of them.

    Args:
        models: pipelines and how they draw; the first is what the others are compared with.
        batch: pictures at once.
        repeats: rounds after a warm-up.

    Returns:
        A row a model: `seconds` (median of the batch), `images_per_second`, `ratio` (how many times as fast as the
        first: geometric mean over rounds, low, high of its 95 % interval).
    """
    as_integer("batch", batch, 1), as_integer("repeats", repeats, 2)

    def draw(pipeline: NitroEPipeline, sampler: Sampler) -> float:
        start = time.perf_counter()
        images = pipeline([CAPTION] * batch, **sampler.arguments(), output_type="pil").images
        for image in images:
            png_bytes(image, {})
        return time.perf_counter() - start

    rounds = [[draw(*model) for model in models] for _ in range(repeats + 1)][1:]
    rows = []
    for number in range(len(models)):
        seconds = [one[number] for one in rounds]
        mean, half = interval([math.log(one[0] / one[number]) for one in rounds])
        ratio = [math.exp(mean), math.exp(mean - half), math.exp(mean + half)]
        median = statistics.median(seconds)
        rows.append({"batch": batch, "seconds": median, "images_per_second": batch / median, "ratio": ratio})
    return rows


def time_transformer(
    config: Mapping[str, Any],
    batch: int = 4,
    text_tokens: int = FULL_TEXT_LENGTH,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
    repeats: int = 3,
) -> dict[str, float]:
    """Times one batch through random weights.

    Returns:
        Medians `forward_seconds` and `forward_backward_seconds`, and `products_seconds`: the matrix products
        of the forward pass's Linear layers alone, with weights that lie in the cache. The forward cannot be faster than
        that, nor forward and backward faster than three times that. `torch_products_seconds` are the same products by
        `torch.nn.functional.linear`, see `model/cpu_kernels.py`.
    """
    numbers = config["in_channels"] * config["sample_size"] ** 2 + text_tokens * config["caption_channels"]
    runtime.check_memory(f"batch={batch}", 4 * numbers * as_integer("batch", batch, 1))
    device = runtime.pick_device(device)
    dtype = runtime.pick_dtype(dtype, device)
    model = EMMDiTTransformer2DModel(**config).to(device)
    if dtype != model.dtype:  # diffusers warns of every conversion, of those that change nothing too
        model.to(dtype)
    size = model.config
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(batch, size.in_channels, size.sample_size, size.sample_size, generator=generator)
    features = torch.randn(batch, text_tokens, size.caption_channels, generator=generator)
    inputs = (
        latents.to(device, dtype),
        features.to(device, dtype),
        torch.full((batch,), 500.0, device=device),
    )

    def step() -> None:
        model.zero_grad()
        model(*inputs).sample.float().square().mean().backward()

    with torch.no_grad():
        by_library = [time_products(model, inputs, multiply, repeats) for multiply in (cpu_kernels.linear, F.linear)]
        forward = median_seconds(lambda: model(*inputs), repeats)
    return {
        "products_seconds": by_library[0],
        "torch_products_seconds": by_library[1],
        "forward_seconds": forward,
        "forward_backward_seconds": median_seconds(step, repeats),
    }


@torch.no_grad()
def time_products(model: nn.Module, inputs: Sequence[torch.Tensor], multiply: Callable, repeats: int = 3) -> float:
    """Seconds of the products in the Linear layers of `model(*inputs)` by `multiply`, each shape timed by itself."""
    seconds = 0.0
    for (rows, width, out), count in product_shapes(model, inputs).items():
        tokens, weight = inputs[0].new_ones(rows, width), inputs[0].new_ones(out, width)
        seconds += count * median_seconds(partial(multiply, tokens, weight), max(5, repeats))
    return seconds


@torch.no_grad()
def product_shapes(model: nn.Module, inputs: Sequence[torch.Tensor]) -> Counter[tuple[int, int, int]]:
    """(rows, inputs, outputs) -> how many Linear layers of `model(*inputs)` multiply so."""
    shapes: Counter[tuple[int, int, int]] = Counter()

    def record(layer: nn.Linear, arguments: tuple[torch.Tensor, ...]) -> None:
        shapes[arguments[0].numel() // layer.in_features, layer.in_features, layer.out_features] += 1

    handles = [m.register_forward_pre_hook(record) for m in model.modules() if isinstance(m, nn.Linear)]
    model(*inputs)
    for handle in handles:
        handle.remove()
    return shapes
