"""Joint attention: subregions, the fused path against the plain one, derivatives of every kind."""

import pytest
import torch
import torch.nn.functional as F

from nitro_e_lite.model import cpu_kernels
from nitro_e_lite.model.attention import (
    JointAttention,
    joint_attention_probabilities,
    scaled_attention,
    subregion_merge,
    subregion_split,
)

PATTERNS = [(1, 1), (4, 1), (4, 4), (2, 3)]


def attention(pattern=(1, 1), context_pre_only=False, seed=0):
    torch.manual_seed(seed)
    module = JointAttention(2, 8, pattern, context_pre_only).double()
    for name, parameter in module.named_parameters():
        if "norm" in name:
            torch.nn.init.normal_(parameter, mean=1.0, std=0.3)
    return module


def inputs(seed=1, batch=3, image=96, text=48):
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(batch, n, 16, generator=generator, dtype=torch.double) for n in (image, text))


@pytest.mark.parametrize("ratio, chunk", PATTERNS)
def test_split_groups_the_documented_tokens(ratio, chunk):
    tokens = torch.arange(2 * 48).view(2, 48, 1)
    groups = subregion_split(tokens, ratio, chunk)
    for b in range(2):
        for s in range(ratio):
            expected = [48 * b + i for i in range(48) if i // chunk % ratio == s]
            assert groups[b * ratio + s, :, 0].tolist() == expected
    assert torch.equal(subregion_merge(groups, ratio, chunk), tokens)


def test_split_refuses_what_does_not_divide():
    with pytest.raises(ValueError, match="30 tokens .* multiple of 16"):
        subregion_split(torch.zeros(1, 30, 8), 4, 4)


@pytest.mark.parametrize("ratio, chunk", PATTERNS)
def test_subregions_equal_masked_full_attention(ratio, chunk):
    module, (image, text) = attention((ratio, chunk)), inputs()
    full = attention((1, 1))
    full.load_state_dict(module.state_dict())
    query, key, value = full.joint_heads(image, text)
    group = torch.cat([torch.arange(n) // chunk % ratio for n in (96, 48)])
    mixed = F.scaled_dot_product_attention(query, key, value, attn_mask=group[:, None] == group)
    mixed = mixed.transpose(1, 2).flatten(2)
    mine_image, mine_text = module(image, text)
    torch.testing.assert_close(mine_image, full.out(mixed[:, :96]))
    torch.testing.assert_close(mine_text, full.out_context(mixed[:, 96:]))


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("context_pre_only", [False, True])
def test_fused_heads_equal_plain_ones(pattern, context_pre_only, monkeypatch):
    monkeypatch.setattr(cpu_kernels, "CACHE_ELEMENTS", 2 * 96 * 48)  # two samples a piece: 2 + 1 of 3
    module = attention(pattern, context_pre_only)
    streams = [x.requires_grad_() for x in inputs()]

    def run():
        output = [x for x in module(*streams) if x is not None]
        wanted = [*streams, *module.parameters()]
        return output + list(torch.autograd.grad(sum(x.square().sum() for x in output), wanted))

    mine = run()
    with cpu_kernels.plain_operations():
        torch.testing.assert_close(mine, run(), rtol=1e-10, atol=1e-10)


def test_plain_heads_are_rms_normalised():
    module, (image, text) = attention(), inputs()
    with cpu_kernels.plain_operations():
        query, _, value = module.joint_heads(image, text)
    raw = F.linear(text, module.qkv_context.weight[:16], module.qkv_context.bias[:16]).unflatten(2, (2, 8))
    expected = raw / (raw.square().mean(-1, keepdim=True) + 1e-6).sqrt() * module.norm_q_context.weight
    torch.testing.assert_close(query[:, :, 96:], expected.transpose(1, 2))
    raw = F.linear(image, module.qkv.weight[32:], module.qkv.bias[32:]).unflatten(2, (2, 8))
    torch.testing.assert_close(value[:, :, :96], raw.transpose(1, 2))


def test_without_qk_norm_heads_are_the_projections():
    module, (image, text) = JointAttention(2, 8, qk_norm=False).double(), inputs()
    assert not [name for name, _ in module.named_parameters() if "norm" in name]
    heads = module.joint_heads(image, text)
    both = torch.cat([module.qkv(image), module.qkv_context(text)], 1).unflatten(2, (3, 2, 8))
    for mine, expected in zip(heads, both.unbind(2), strict=True):
        torch.testing.assert_close(mine, expected.transpose(1, 2))
    query, key, value = heads
    mixed = (joint_attention_probabilities(query, key) @ value).transpose(1, 2).flatten(2)
    torch.testing.assert_close(module(image, text)[0], module.out(mixed[:, :96]))


def test_last_block_has_no_text_output_and_ignores_text_queries():
    module, streams = attention(context_pre_only=True), inputs()
    image, text = module(*streams)
    assert text is None
    module.qkv_context.weight.data[:16] += 1.0
    torch.testing.assert_close(module(*streams)[0], image)
    module.qkv_context.weight.data[16:] += 1.0
    assert not torch.allclose(module(*streams)[0], image)


def test_backends_agree_and_probabilities_are_the_attention():
    query, key, value = attention().joint_heads(*inputs())
    probabilities = joint_attention_probabilities(query, key)
    torch.testing.assert_close(probabilities.sum(-1), torch.ones_like(probabilities[..., 0]))
    for backend in ("auto", "sdpa", "math"):
        torch.testing.assert_close(scaled_attention(query, key, value, backend), probabilities @ value)


def test_forward_mode_equals_finite_differences():
    module, streams = attention((4, 1)), inputs()
    directions = inputs(seed=2)
    output, slope = torch.func.jvp(module, streams, directions)
    torch.testing.assert_close(output, module(*streams))
    step = 1e-6
    ahead, behind = (
        module(*(x + sign * step * d for x, d in zip(streams, directions, strict=True))) for sign in (1, -1)
    )
    for a, b, s in zip(ahead, behind, slope, strict=True):
        torch.testing.assert_close(s, (a - b) / (2 * step), rtol=1e-6, atol=1e-7)


def test_plain_operations_differentiate_twice():
    module = attention()
    module.kernel = "math"
    streams = [x.requires_grad_() for x in inputs(batch=1, image=4, text=4)]
    with cpu_kernels.plain_operations():
        assert torch.autograd.gradgradcheck(lambda *x: module(*x)[0], streams, fast_mode=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        (grad,) = torch.autograd.grad(module(*streams)[0].sum(), streams[0], create_graph=True)
        grad.sum().backward()
