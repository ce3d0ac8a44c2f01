"""FP8: codes, policy, ladder, conversion, files, sensitivity; everything on the CPU."""

import pytest
import torch

from nitro_e_lite.model.emmdit import EMMDiTTransformer2DModel

SMALL = {
    "in_channels": 4,
    "num_attention_heads": 2,
    "attention_head_dim": 32,
    "caption_channels": 32,
    "block_groups": (1, 2, 1),
}


def build(dtype=torch.bfloat16, **config):
    torch.manual_seed(0)
    return EMMDiTTransformer2DModel(**SMALL | config).to(dtype).eval()


def inputs(dtype=torch.bfloat16):
    generator = torch.Generator().manual_seed(1)
    latents = torch.randn(2, 4, 16, 16, generator=generator)
    text = torch.randn(2, 16, 32, generator=generator)
    return latents.to(dtype), text.to(dtype), torch.tensor([500.0, 20.0])


def difference(found, expected):
    return ((found.float() - expected.float()).norm() / expected.float().norm()).item()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("modulation", ["adaln_affine", "adaln"])
def test_diffusers_layerwise_casting_works_on_our_transformer(dtype, modulation):
    model = build(dtype, modulation=modulation)
    with torch.no_grad():
        expected = model(*inputs(dtype)).sample
        model.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=dtype)
        found = model(*inputs(dtype)).sample
    assert model.time_embed.embed.linear_1.weight.dtype == torch.float8_e4m3fn
    assert found.dtype == dtype and 0 < difference(found, expected) < 0.1
