"""The assembled transformer: size, switches, derivatives, saving, compiling, and what it refuses."""

import pytest
import torch

from nitro_e_lite.model import cpu_kernels
from nitro_e_lite.model.emmdit import EMMDiTTransformer2DModel
from nitro_e_lite.model.tokens import crop_positions


def tiny(**config):
    torch.manual_seed(0)
    config = {
        "num_attention_heads": 2, "attention_head_dim": 16, "in_channels": 4, "caption_channels": 8,
        "block_groups": (1, 2, 1), "pos_embed_max_size": 16,
    } | config  # fmt: skip
    return EMMDiTTransformer2DModel(**config)


def inputs(batch=2, height=16, width=16, text=16, dtype=torch.float32):
    generator = torch.Generator().manual_seed(1)
    latents = torch.randn(batch, 4, height, width, generator=generator, dtype=dtype)
    features = torch.randn(batch, text, 8, generator=generator, dtype=dtype)
    return latents, features, torch.linspace(10, 990, batch)


def test_full_size_has_the_published_parameters():
    with torch.device("meta"):
        model = EMMDiTTransformer2DModel()
        projector = EMMDiTTransformer2DModel(repa_channels=768).projector
    assert sum(p.numel() for p in model.parameters()) == 302_449_952
    assert [layer.weight.shape for layer in projector[::2]] == [(2048, 768), (2048, 2048), (768, 2048)]


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"modulation": "adaln"},
        {"modulation": "adaln_single"},
        {"attention_pattern": ((1, 1),)},
        {"compression": False, "block_groups": (1, 1)},
        {"compression": False, "block_groups": (2,), "repa_channels": 5},
        {"position_reinforcement": False},
        {"mlp_ratio": 2.0, "repa_channels": 5, "repa_hidden": 12},
    ],
)
@pytest.mark.parametrize("training", [False, True])
def test_every_switch_gives_one_kind_of_output(config, training):
    model = tiny(**config).train(training)
    output = model(*inputs())
    assert output.sample.shape == (2, 4, 16, 16) and output.sample.isfinite().all()
    assert (output.features is None) == ("repa_channels" not in config)
    if output.features is not None:
        assert output.features.shape == (2, 256, 5)
    torch.testing.assert_close(model(*inputs(), return_dict=False)[0], output.sample)
    loss = output.sample.square().mean() + (0 if output.features is None else output.features.square().mean())
    loss.backward()
    assert not [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]


def test_switches_do_what_they_say():
    plain = tiny(position_reinforcement=False)
    reinforced = tiny()  # same seed, same weights
    seen = []
    for model in (plain, reinforced):
        model.groups[2][0].register_forward_pre_hook(lambda _, args: seen.append(args[0]))
        model(*inputs())
    torch.testing.assert_close(seen[1] - seen[0], crop_positions(plain.positions, 16, 16).expand(2, -1, -1))

    lengths = []
    for model in (tiny(), tiny(compression=False)):
        model.groups[1][0].register_forward_pre_hook(lambda _, args: lengths.append(args[0].shape[1]))
        model(*inputs())
    assert lengths == [80, 256]

    model = tiny(block_groups=(1, 3, 1), attention_pattern=((1, 1), (4, 4)))
    assert [block.attention.pattern for group in model.groups for block in group] == [(1, 1), (4, 4)] * 2 + [(1, 1)]
    assert [block.context_pre_only for group in model.groups for block in group] == [False] * 4 + [True]


def test_latents_need_not_be_square_and_patches_not_be_one():
    model = tiny(pos_embed_max_size=32)
    assert model(*inputs(height=16, width=32)).sample.shape == (2, 4, 16, 32)
    assert tiny(patch_size=2, sample_size=32)(*inputs(height=32, width=32)).sample.shape == (2, 4, 32, 32)


def test_samples_do_not_see_each_other():
    model, (latents, text, timestep) = tiny(), inputs(batch=3)
    together = model(latents, text, timestep).sample
    torch.testing.assert_close(model(latents[1:2], text[1:2], timestep[1:2]).sample, together[1:2])
    alone = model(latents, text, 500.0).sample
    torch.testing.assert_close(model(latents, text, torch.full((3,), 500)).sample, alone)
    assert not torch.allclose(alone, together)


def gradients(model, *arguments):
    model.zero_grad()
    model(*arguments).sample.square().sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def test_gradient_checkpointing_changes_nothing():
    model = tiny()
    expected = gradients(model, *inputs())
    calls = []
    model.groups[1][0].register_forward_pre_hook(lambda *_: calls.append(1))
    model.enable_gradient_checkpointing()
    torch.testing.assert_close(gradients(model, *inputs()), expected, rtol=0, atol=0)
    assert len(calls) == 2  # once forward, once again in the backward


@pytest.mark.parametrize("backend", ["sdpa", "math"])
def test_backends_have_the_same_gradients(backend):
    model = tiny().double()
    arguments = inputs(dtype=torch.double)
    expected = gradients(model, *arguments)
    model.set_attention_kernel(backend)
    with cpu_kernels.plain_operations():
        torch.testing.assert_close(gradients(model, *arguments), expected, rtol=1e-7, atol=1e-9)


def test_forward_mode_equals_finite_differences():
    model, (latents, text, timestep) = tiny(block_groups=(1, 1, 1)).double(), inputs(batch=1, dtype=torch.double)
    direction, step = torch.randn_like(latents), 1e-6
    velocity, slope = torch.func.jvp(lambda x: model(x, text, timestep).sample, (latents,), (direction,))
    ahead, behind = (model(latents + s * step * direction, text, timestep).sample for s in (1, -1))
    torch.testing.assert_close(velocity, model(latents, text, timestep).sample)
    torch.testing.assert_close(slope, (ahead - behind) / (2 * step), rtol=1e-5, atol=1e-6)


def test_forward_mode_in_bfloat16_where_statistics_are_in_float32():
    """As on an accelerator, and on the meta device; there the first consistency step of Sprint once failed."""
    with torch.device("meta"), torch.no_grad():
        model, (latents, text, timestep) = tiny().to("meta", torch.bfloat16), inputs()
        point = latents.to("meta", torch.bfloat16), timestep.to("meta", torch.float32)
        text = text.to("meta", torch.bfloat16)
        ways = tuple(map(torch.ones_like, point))
        velocity, slope = torch.func.jvp(lambda x, t: model(x, text, t).sample, point, ways)
    assert velocity.dtype == slope.dtype == torch.bfloat16


def test_bfloat16_is_close_to_float32():
    model, arguments = tiny(), inputs()
    exact, exact_gradients = model(*arguments).sample, gradients(model, *arguments)
    half = tiny().to(torch.bfloat16)
    rounded = half(*(x.bfloat16() for x in arguments[:2]), arguments[2]).sample
    assert rounded.dtype == torch.bfloat16
    assert (rounded.float() - exact).norm() < 0.03 * exact.norm()
    half_gradients = gradients(half, *(x.bfloat16() for x in arguments[:2]), arguments[2])
    for name in ("groups.0.0.attention.qkv.weight", "groups.1.1.text.mlp.up.weight", "patch_embed.weight"):
        error = half_gradients[name].float() - exact_gradients[name]
        assert error.norm() < 0.1 * exact_gradients[name].norm()


def test_save_pretrained_and_back(tmp_path):
    model = tiny(repa_channels=5, repa_hidden=12, attention_pattern=((4, 1),))
    model.save_pretrained(tmp_path)
    again = EMMDiTTransformer2DModel.from_pretrained(tmp_path)
    assert torch.equal(again(*inputs()).sample, model(*inputs()).sample)
    assert again.groups[0][0].attention.pattern == (4, 1)
    half = EMMDiTTransformer2DModel.from_pretrained(tmp_path, torch_dtype=torch.bfloat16)
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}


def test_lora_adapters_attach_and_train():
    from peft import LoraConfig

    model = tiny()
    expected = model(*inputs()).sample
    model.add_adapter(LoraConfig(r=2, target_modules=["qkv", "qkv_context", "out", "out_context"]))
    torch.testing.assert_close(model(*inputs()).sample, expected)
    assert all("lora_" in name for name in gradients(model, *inputs()))


def test_whole_model_is_one_graph_for_the_compiler():
    model = tiny(block_groups=(1, 1, 1))
    expected, velocity = gradients(model, *inputs()), model(*inputs()).sample.detach()
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, dynamic=False, backend="aot_eager")  # no code generation: quick
    model.zero_grad()
    output = compiled(*inputs()).sample
    output.square().sum().backward()
    torch.testing.assert_close(output, velocity, rtol=1e-4, atol=1e-5)
    mine = {name: p.grad for name, p in model.named_parameters()}
    torch.testing.assert_close(mine, expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    "config, message",
    [
        ({"attention_head_dim": 15}, "multiple of 16, got 30"),
        ({"modulation": "adaln_zero"}, "modulation must be one of"),
        ({"block_groups": (1, 1)}, "block_groups must have 3 entries"),
        ({"block_groups": (1, 0, 1)}, "block_groups must be positive"),
        ({"attention_pattern": ((4, 0),)}, "attention_pattern must be pairs"),
    ],
)
def test_bad_configuration_is_refused(config, message):
    with pytest.raises(ValueError, match=message):
        tiny(**config)


@pytest.mark.parametrize(
    "change, message",
    [
        ((torch.zeros(2, 3, 16, 16), None), r"hidden_states must be \(B, 4, H, W\)"),
        ((torch.zeros(4, 16, 16), None), r"hidden_states must be \(B, 4, H, W\)"),
        ((torch.zeros(2, 4, 16, 18), None), "multiples of 4"),
        ((torch.zeros(2, 4, 20, 20), None), "pos_embed_max_size is 16"),
        ((None, torch.zeros(2, 16, 9)), r"encoder_hidden_states must be \(B, L, 8\)"),
        ((None, torch.zeros(2, 18, 8)), "18 tokens cannot be split"),
    ],
)
def test_bad_inputs_are_refused(change, message):
    arguments = [new if new is not None else old for new, old in zip(change, inputs(), strict=False)]
    with pytest.raises(ValueError, match=message):
        tiny()(*arguments, 10.0)
    with pytest.raises(ValueError, match="kernel must be one of"):
        tiny().set_attention_kernel("flash")
