"""The joint block and its modulation against diffusers' own modules and written-out formulae."""

import pytest
import torch
import torch.nn.functional as F
from diffusers.models.attention_processor import Attention, JointAttnProcessor2_0
from diffusers.models.normalization import AdaLayerNormSingle

from nitro_e_lite.config import MODULATIONS
from nitro_e_lite.model import cpu_kernels
from nitro_e_lite.model.blocks import FeedForward, JointBlock, Modulation, TimeEmbedding


def streams(image=32, text=16, dim=16, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(2, n, dim, generator=generator) for n in (image, text))


def test_time_embedding_equals_adaln_single():
    torch.manual_seed(0)
    mine, theirs = TimeEmbedding(32, "adaln_affine"), AdaLayerNormSingle(32)
    theirs.emb.timestep_embedder.load_state_dict(mine.embed.state_dict())
    theirs.linear.load_state_dict(mine.project.state_dict())
    timestep = torch.tensor([0.0, 3.7, 999.0, 1000.0])
    six, embedded = theirs(timestep, hidden_dtype=torch.float32)
    torch.testing.assert_close(mine(timestep), six.view(4, 6, 32))
    single = TimeEmbedding(32, "adaln")
    single.embed.load_state_dict(mine.embed.state_dict())
    torch.testing.assert_close(single(timestep), F.silu(embedded))


def test_modulation_formulae():
    torch.manual_seed(0)
    six, embedded = torch.randn(3, 6, 8), torch.randn(3, 8)
    affine, single, plain = (Modulation(8, kind) for kind in ("adaln_affine", "adaln_single", "adaln"))
    torch.testing.assert_close(affine(six), affine.bias + six * (1 + affine.scale))
    torch.testing.assert_close(single(six), single.bias + six)
    torch.testing.assert_close(plain(embedded), plain.linear(embedded).view(3, 6, 8))
    sizes = [sum(p.numel() for p in module.parameters()) for module in (affine, single, plain)]
    assert sizes == [12 * 8, 6 * 8, 6 * 8 * 8 + 6 * 8]


def test_feed_forward_uses_the_tanh_gelu():
    module, x = FeedForward(16, 48), torch.randn(2, 5, 16)
    torch.testing.assert_close(module(x), module.down(F.gelu(module.up(x), approximate="tanh")))


def library_attention(block):
    """diffusers' joint attention with the weights of a block."""
    mine, dim = block.attention, block.attention.out.in_features
    theirs = Attention(
        query_dim=dim, added_kv_proj_dim=dim, dim_head=mine.heads[1], heads=mine.heads[0], out_dim=dim, bias=True,
        processor=JointAttnProcessor2_0(), qk_norm="rms_norm", eps=1e-6, context_pre_only=block.context_pre_only,
    )  # fmt: skip
    projections = {
        mine.qkv: (theirs.to_q, theirs.to_k, theirs.to_v),
        mine.qkv_context: (theirs.add_q_proj, theirs.add_k_proj, theirs.add_v_proj),
    }
    for joined, parts in projections.items():
        for i, part in enumerate(parts):
            part.weight.data, part.bias.data = joined.weight.data.chunk(3)[i], joined.bias.data.chunk(3)[i]
    pairs = {"norm_q": "norm_q", "norm_k": "norm_k", "norm_added_q": "norm_q_context", "norm_added_k": "norm_k_context"}
    for name, own in pairs.items():
        getattr(theirs, name).weight.data = getattr(mine, own).weight.data
    theirs.to_out[0].load_state_dict(mine.out.state_dict())
    if mine.out_context is not None:
        theirs.to_add_out.load_state_dict(mine.out_context.state_dict())
    return theirs


@pytest.mark.parametrize("context_pre_only", [False, True])
def test_block_equals_the_written_out_formula(context_pre_only):
    torch.manual_seed(0)
    block = JointBlock(2, 8, context_pre_only=context_pre_only)
    for name, parameter in block.named_parameters():
        if "norm" in name:
            torch.nn.init.normal_(parameter, mean=1.0, std=0.3)
    (image, text), time = streams(), torch.randn(2, 6, 16)

    def normed(stream, x, six, first):
        norm = stream.norm1 if first else stream.norm2
        shift, scale = (six[:, i : i + 1] for i in ((0, 1) if first else (3, 4)))
        return norm(x) * (1 + scale) + shift

    def step(stream, x, mixed, six):
        x = x + six[:, 2:3] * mixed
        return x + six[:, 5:6] * stream.mlp(normed(stream, x, six, False))

    six = block.image.modulation(time)
    six_text = None if context_pre_only else block.text.modulation(time)
    normed_text = block.text(text) if context_pre_only else normed(block.text, text, six_text, True)
    mixed, mixed_text = library_attention(block)(normed(block.image, image, six, True), normed_text)
    mine_image, mine_text = block(image, text, time)
    torch.testing.assert_close(mine_image, step(block.image, image, mixed, six))
    expected = text if context_pre_only else step(block.text, text, mixed_text, six_text)
    torch.testing.assert_close(mine_text, expected)


@pytest.mark.parametrize("modulation", MODULATIONS)
def test_fused_block_has_the_gradients_of_the_plain_one(modulation):
    torch.manual_seed(0)
    block = JointBlock(2, 8, pattern=(4, 1), modulation=modulation).double()
    image, text = (x.double().requires_grad_() for x in streams())
    time = torch.randn(2, 16) if modulation == "adaln" else torch.randn(2, 6, 16)

    def run():
        output = sum(x.square().sum() for x in block(image, text, time.double()))
        return torch.autograd.grad(output, [image, text, *block.parameters()])

    mine = run()
    with cpu_kernels.plain_operations():
        torch.testing.assert_close(mine, run(), rtol=1e-8, atol=1e-8)
