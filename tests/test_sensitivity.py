"""How much the loss rises with a wrong fact: zero for a model that cannot read, and the plain formula."""

import numpy as np
import pytest
import torch
from tiny import build_tiny_pipeline

from nitro_e_lite import load_pipeline
from nitro_e_lite.config import FACTS
from nitro_e_lite.evaluation.sensitivity import caption_sensitivity, pairs_of
from nitro_e_lite.scenes.grammar import COLORS
from nitro_e_lite.scenes.render import render


def test_pairs_differ_in_the_fact_asked_for():
    for fact in FACTS:
        pairs = pairs_of(fact, 3)
        assert [pair.fact for pair in pairs] == [fact] * 3 and pairs == pairs_of(fact, 5)[:3]


def test_a_model_that_does_not_look_at_the_text_rises_by_nothing():
    pipeline = build_tiny_pipeline()
    pipeline.encode_captions = lambda texts: torch.zeros(len(texts), 16, pipeline.transformer.config.caption_channels)
    for reading in caption_sensitivity(pipeline, 3, times=(0.5, 0.9), batch_size=4):
        assert reading.rise == reading.margin == reading.right == 0 and reading.loss > 0


def test_it_is_the_loss_with_one_caption_minus_that_with_the_other():
    tiny_pipeline = build_tiny_pipeline()
    for weight in tiny_pipeline.transformer.groups.parameters():
        weight.data *= 4  # else the text hardly matters, and the rise is near the rounding of the losses
    (reading,) = caption_sensitivity(tiny_pipeline, 2, times=(0.7,), facts=("colors",), batch_size=3)
    generator, rises, gains = torch.Generator().manual_seed(0), [], []
    pairs = pairs_of("colors", 2)
    size = tiny_pipeline.transformer.config.sample_size * tiny_pipeline.vae_scale_factor
    shape = (tiny_pipeline.transformer.config.in_channels, *[tiny_pipeline.transformer.config.sample_size] * 2)
    noise = torch.randn(2, *shape, generator=generator)
    for pair, eps in zip(pairs, noise, strict=True):
        captions, both = pair.captions(0), []
        for k, scene in enumerate(pair.scenes):
            picture = torch.from_numpy(render(scene, size)).permute(2, 0, 1)[None].float() / 127.5 - 1
            with torch.no_grad():
                x0 = tiny_pipeline.vae.encode(picture).latent
                mean, std = (
                    torch.tensor(v).view(1, -1, 1, 1) for v in (tiny_pipeline.stats.mean, tiny_pipeline.stats.std)
                )
                x0 = (x0 - mean) / std
                x_t, target, losses = 0.3 * x0 + 0.7 * eps, eps - x0, []
                for text in (captions[k], captions[1 - k]):
                    features = tiny_pipeline.encode_captions([text])
                    v = tiny_pipeline.transformer(x_t, features, torch.tensor([700.0])).sample
                    losses.append((v - target).square().mean().item())
            both.append(losses[1] - losses[0])
        rises.append(np.mean(both))
        gains += both
    assert reading.rise == pytest.approx(np.mean(rises), rel=1e-3)
    assert reading.right == np.mean(np.array(gains) > 0)
    assert reading.margin == pytest.approx(12.706 * np.std(rises, ddof=1) / 2**0.5, rel=1e-3)


def test_the_shipped_model_reads_colours():
    (reading,) = caption_sensitivity(load_pipeline("lite", "cpu"), 10, times=(0.82,), facts=("color",))
    assert reading.rise > reading.margin > 0


def test_the_shipped_model_reads_places():
    (reading,) = caption_sensitivity(load_pipeline("lite", "cpu"), 10, times=(0.9,), facts=("places",))
    assert reading.rise > reading.margin > 0


def test_the_change_of_the_text_is_a_share_of_its_length():
    pipeline = build_tiny_pipeline()
    features = torch.ones(16, pipeline.transformer.config.caption_channels)

    def length(text):  # a number for each colour
        return 1 + next(k for k, color in enumerate(COLORS) if color in text.split())

    pipeline.encode_captions = lambda texts: torch.stack([length(text) * features for text in texts])
    pairs = [[length(text) for text in pair.captions(0)] for pair in pairs_of("color", 3)]
    (reading,) = caption_sensitivity(pipeline, 3, times=(0.5,), facts=("color",))
    assert reading.text == pytest.approx(np.median([abs(one - other) / one for one, other in pairs]))


@pytest.mark.parametrize(
    "options, message", [({"pairs": 1}, "pairs=1"), ({"facts": ("size",)}, "size"), ({"times": (0.0,)}, "t=0.0")]
)
def test_mistakes_are_named(tiny_pipeline, options, message):
    with pytest.raises(ValueError, match=message):
        caption_sensitivity(tiny_pipeline, **options)
