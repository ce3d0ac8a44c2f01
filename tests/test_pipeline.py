"""The pipeline: its sampler against a loop written out here, its promises, and everything it refuses."""

import json
import re
from functools import partial

import numpy as np
import pytest
import torch
from diffusers import SCMScheduler
from PIL import Image
from tiny import build_tiny_pipeline

import nitro_e_lite
from nitro_e_lite.inference.arguments import as_grid, seeded_generators
from nitro_e_lite.inference.encoders import LatentStats, decode_latents
from nitro_e_lite.inference.hub import EncoderUnavailable
from nitro_e_lite.inference.loading import load_pipeline
from nitro_e_lite.inference.pipeline import NitroEPipeline, Sampler
from nitro_e_lite.model.emmdit import EMMDiTTransformer2DModel
from nitro_e_lite.model.official_weights import save_official

PROMPTS = ["a red star", "two blue squares", "a green cross above a white heart"]
NAN = float("nan")


def seeded(*seeds: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def latents_of(pipeline, *arguments, **options) -> torch.Tensor:
    return pipeline(*arguments, output_type="latent", **options).images


@pytest.fixture
def calls(tiny_pipeline):
    """(batch, timestep) of every call of the transformer."""
    seen = []

    def record(module, arguments):
        seen.append((len(arguments[0]), float(arguments[2])))

    handle = tiny_pipeline.transformer.register_forward_pre_hook(record)
    yield seen
    handle.remove()


# The sampler


@torch.no_grad()
def test_sampler_equals_the_loop_written_out(tiny_pipeline):
    noise = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(5))
    conditional = tiny_pipeline.encode_captions(PROMPTS[:1])
    unconditional = tiny_pipeline.encode_captions([""])
    x, steps, guidance = noise, 4, 2.5
    for k in range(steps):
        t, t_next = 1 - k / steps, 1 - (k + 1) / steps
        v_conditional = tiny_pipeline.transformer(x, conditional, 1000 * t).sample
        v_unconditional = tiny_pipeline.transformer(x, unconditional, 1000 * t).sample
        x = x + (t_next - t) * (v_unconditional + guidance * (v_conditional - v_unconditional))
    drawn = latents_of(
        tiny_pipeline, PROMPTS[0], num_inference_steps=steps, guidance_scale=guidance, generator=seeded(5)
    )
    torch.testing.assert_close(drawn, x, rtol=1e-4, atol=1e-5)


def test_guidance_costs_one_doubled_batch_a_step_and_nothing_when_off(tiny_pipeline, calls):
    tiny_pipeline(PROMPTS[:2], num_inference_steps=2, guidance_scale=3.0)
    assert calls == [(4, 1000.0), (4, 500.0)]
    for off in (0, 1.0):
        calls.clear()
        tiny_pipeline(PROMPTS[:2], num_inference_steps=2, guidance_scale=off)
        assert calls == [(2, 1000.0), (2, 500.0)]


def test_defaults_come_from_the_configuration(tiny_pipeline, calls):
    tiny_pipeline(PROMPTS[0])
    assert [batch for batch, _ in calls] == [2] * 3


def test_the_sampler_is_resolved_in_one_place(tiny_pipeline, calls):
    assert tiny_pipeline.sampler() == Sampler(3, 3.0, 1.0)
    asked = tiny_pipeline.sampler(2, 0, 3)
    assert asked == Sampler(2, 0.0, 3.0)
    tiny_pipeline(PROMPTS[0], **asked.arguments())
    assert [t for _, t in calls] == pytest.approx([1000, 750])
    for settings, message in (
        ((0,), "num_inference_steps: 0"),
        ((1, -1), "guidance_scale: -1"),
        ((1, 1e308), "guidance_scale: 1e.308 is not a finite number"),  # of float32
        ((1, 10**400), "guidance_scale: 1000+ is not a finite number"),
        ((1, 1, 0.5), "shift: 0.5"),
    ):
        with pytest.raises(ValueError, match=message):
            tiny_pipeline.sampler(*settings)


def test_sigmas_replace_the_grid(tiny_pipeline, calls):
    tiny_pipeline(PROMPTS[0], sigmas=[1.0, 0.8, 0.1])
    assert [t for _, t in calls] == pytest.approx([1000, 800, 100])
    calls.clear()
    tiny_pipeline(PROMPTS[0], sigmas=np.array([0.5, 0.25]), num_inference_steps=2)
    assert [t for _, t in calls] == pytest.approx([500, 250])


def test_shift_leans_the_grid_towards_noise(tiny_pipeline, calls, tmp_path):
    tiny_pipeline(PROMPTS[0], num_inference_steps=2, guidance_scale=0, shift=3.0)
    assert [t for _, t in calls] == pytest.approx([1000, 750])
    calls.clear()
    leaning = type(tiny_pipeline)(**tiny_pipeline.components, **(tiny_pipeline.parameters | {"default_shift": 2.0}))
    leaning.save_pretrained(tmp_path)
    assert type(tiny_pipeline).from_pretrained(tmp_path).shift == leaning.shift == 2.0
    leaning(PROMPTS[0], num_inference_steps=2, guidance_scale=0)
    leaning(PROMPTS[0], num_inference_steps=2, guidance_scale=0, shift=1)
    leaning(PROMPTS[0], guidance_scale=0, sigmas=[0.5, 0.25])  # given levels are taken as they are
    assert [t for _, t in calls] == pytest.approx([1000, 2000 / 3, 1000, 500, 500, 250])


def test_official_grid_is_the_schedulers_own(tiny_pipeline, calls):
    parts, settings = tiny_pipeline.components, tiny_pipeline.parameters
    official = type(tiny_pipeline)(**parts, **(settings | {"sigma_grid": "scheduler"}))
    official.set_progress_bar_config(disable=True)
    official(PROMPTS[0], num_inference_steps=4, guidance_scale=0)
    assert [t for _, t in calls] == pytest.approx([1000, 667, 334, 1], abs=0.5)
    with pytest.raises(ValueError, match="shift: 3 differs from the 1 of the scheduler"):
        official(PROMPTS[0], shift=3)
    assert official.sampler().shift == official.sampler(shift=1).shift == 1


# Batches and seeds


def test_picture_is_the_same_alone_and_in_a_batch_of_eight(tiny_pipeline):
    many = latents_of(tiny_pipeline, PROMPTS[0], num_images_per_prompt=8, generator=seeded(*range(8)))
    for seed in (0, 3, 7):
        alone = latents_of(tiny_pipeline, PROMPTS[0], generator=seeded(seed))
        torch.testing.assert_close(alone[0], many[seed], rtol=1e-4, atol=1e-5)
    assert not torch.allclose(many[0], many[1])


def test_one_generator_gives_eight_pictures_at_once_or_one_by_one(tiny_pipeline):
    together = latents_of(tiny_pipeline, PROMPTS[0], num_images_per_prompt=4, generator=seeded(9)[0])
    generator = seeded(9)[0]
    for row in together:
        alone = latents_of(tiny_pipeline, PROMPTS[0], generator=generator)
        torch.testing.assert_close(alone[0], row, rtol=1e-4, atol=1e-5)


def test_one_generator_or_a_list_of_one_is_the_same_picture(tiny_pipeline):
    one = latents_of(tiny_pipeline, PROMPTS[0], generator=seeded(4)[0])
    assert torch.equal(one, latents_of(tiny_pipeline, PROMPTS[0], generator=seeded(4)))


def test_without_a_generator_the_global_seed_decides(tiny_pipeline):
    torch.manual_seed(1)
    first = latents_of(tiny_pipeline, PROMPTS[0])
    second = latents_of(tiny_pipeline, PROMPTS[0])
    torch.manual_seed(1)
    assert torch.equal(latents_of(tiny_pipeline, PROMPTS[0]), first)
    assert not torch.allclose(first, second)


def test_seeds_are_what_torch_takes():
    assert [g.initial_seed() for g in seeded_generators([0, np.int64(7), 2**64 - 1, -(2**63)])] == [
        0, 7, 2**64 - 1, 2**63
    ]  # fmt: skip
    for seed, message in ((2**64, f"{2**64} is above {2**64 - 1}"), (-(2**63) - 1, f"is below {-(2**63)}")):
        with pytest.raises(ValueError, match=f"seed: .*{message}"):
            seeded_generators([0, seed])
    with pytest.raises(TypeError, match="seed: expected an integer, got 1.5"):
        seeded_generators([1.5])


def test_pictures_come_in_the_order_of_the_prompts(tiny_pipeline):
    pair = latents_of(tiny_pipeline, PROMPTS[:2], num_images_per_prompt=2, generator=seeded(0, 1, 0, 1))
    for index, (prompt, seed) in enumerate([(p, s) for p in PROMPTS[:2] for s in (0, 1)]):
        alone = latents_of(tiny_pipeline, prompt, generator=seeded(seed))
        torch.testing.assert_close(alone[0], pair[index], rtol=1e-4, atol=1e-5)


def test_given_latents_replace_the_noise(tiny_pipeline):
    noise = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(3))
    given = latents_of(tiny_pipeline, PROMPTS[0], latents=noise)
    assert torch.equal(given, latents_of(tiny_pipeline, PROMPTS[0], generator=seeded(3)))


# Text


def test_embeddings_equal_text(tiny_pipeline):
    features = tiny_pipeline.encode_captions(PROMPTS[:2])
    assert features.shape == (2, 16, 32)
    by_text = latents_of(tiny_pipeline, PROMPTS[:2], negative_prompt="a star", generator=seeded(0, 1))
    by_features = latents_of(
        tiny_pipeline,
        prompt_embeds=features,
        negative_prompt_embeds=tiny_pipeline.encode_captions(["a star"] * 2),
        generator=seeded(0, 1),
    )
    torch.testing.assert_close(by_text, by_features)


def test_negative_prompt_steers_and_defaults_to_the_empty_text(tiny_pipeline):
    plain = latents_of(tiny_pipeline, PROMPTS[0], generator=seeded(0))
    assert torch.equal(plain, latents_of(tiny_pipeline, PROMPTS[0], negative_prompt="", generator=seeded(0)))
    steered = latents_of(tiny_pipeline, PROMPTS[0], negative_prompt=["a circle"], generator=seeded(0))
    assert not torch.allclose(plain, steered)


def test_without_a_text_encoder_embeddings_are_needed(tiny_pipeline):
    features = tiny_pipeline.encode_captions(PROMPTS[:1])
    parts = tiny_pipeline.components | {"text_encoder": None, "tokenizer": None}
    bare = type(tiny_pipeline)(**parts, **tiny_pipeline.parameters)
    bare.set_progress_bar_config(disable=True)
    with pytest.raises(ValueError, match="prompt: this pipeline has no text encoder"):
        bare(PROMPTS[0])
    with pytest.raises(ValueError, match="no text encoder.*negative_prompt_embeds"):
        bare(prompt_embeds=features)
    assert torch.equal(
        latents_of(bare, prompt_embeds=features, guidance_scale=0, generator=seeded(0)),
        latents_of(tiny_pipeline, PROMPTS[0], guidance_scale=0, generator=seeded(0)),
    )


# Output


def test_output_types_show_the_same_picture(tiny_pipeline):
    def draw(kind):
        return tiny_pipeline(PROMPTS[:2], generator=seeded(0, 1), output_type=kind).images

    array, tensor, pictures, latents = draw("np"), draw("pt"), draw("pil"), draw("latent")
    assert array.shape == (2, 64, 64, 3) and tensor.shape == (2, 3, 64, 64) and latents.shape == (2, 4, 16, 16)
    assert 0 <= array.min() and array.max() <= 1
    np.testing.assert_allclose(array, tensor.permute(0, 2, 3, 1).numpy(), atol=1e-6)
    assert isinstance(pictures[0], Image.Image)
    np.testing.assert_array_equal(np.asarray(pictures[0]), (array[0] * 255).round().astype(np.uint8))
    stats = LatentStats(tiny_pipeline.config.latents_mean, tiny_pipeline.config.latents_std)
    decoded = decode_latents(tiny_pipeline.vae, latents, stats)
    torch.testing.assert_close(tensor, (decoded + 1) / 2)


def test_other_sizes_that_fit(tiny_pipeline):
    image = tiny_pipeline(PROMPTS[0], height=128, width=64, num_inference_steps=1).images[0]
    assert image.size == (64, 128)


@pytest.mark.parametrize("scheduler", [None, SCMScheduler()], ids=["flow", "consistency"])
def test_compiled_steps_draw_the_same_picture(tiny_pipeline, scheduler):
    """By inductor, in one graph that serves every step: guidance is inside of it, or told to it."""
    size = {"in_channels": 4, "num_attention_heads": 2, "attention_head_dim": 16, "caption_channels": 32}
    told = {"guidance_embedding": True} if scheduler else {}
    one_block = EMMDiTTransformer2DModel(**size, **told, block_groups=(1,), compression=False).eval()
    parts = {"transformer": one_block} | ({"scheduler": scheduler} if scheduler else {})
    pipeline = NitroEPipeline(**tiny_pipeline.components | parts, max_text_length=16)
    pipeline.set_progress_bar_config(disable=True)
    draw = partial(latents_of, pipeline, PROMPTS[:2], num_inference_steps=3, guidance_scale=2.5)
    expected = draw(generator=seeded(0, 1))
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    pipeline.compile(fullgraph=True)
    torch.testing.assert_close(draw(generator=seeded(0, 1)), expected, rtol=1e-4, atol=1e-5)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


def test_strengths_of_guidance_share_one_compiled_step(tiny_pipeline):
    """Each was compiled by itself, and after eight of them nothing was any more, in this process and without a word."""
    graphs = []
    pipeline = NitroEPipeline(**tiny_pipeline.components)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.compile(backend=lambda graph, inputs: graphs.append(graph) or graph.forward)
    for guidance in (2.0, 3.0, 4.5):
        drawn = latents_of(pipeline, PROMPTS[0], num_inference_steps=2, guidance_scale=guidance, generator=seeded(0))
        plain = {"num_inference_steps": 2, "guidance_scale": guidance, "generator": seeded(0)}
        torch.testing.assert_close(drawn, latents_of(tiny_pipeline, PROMPTS[0], **plain), rtol=1e-5, atol=1e-5)
    one = len(graphs)
    latents_of(pipeline, PROMPTS[0], num_inference_steps=2, guidance_scale=6.0, generator=seeded(0))
    assert len(graphs) == one


def test_callback_sees_every_step_and_may_change_the_latents(tiny_pipeline):
    seen = []

    def watch(pipeline, step, timestep, values):
        seen.append((step, round(float(timestep)), tuple(values["latents"].shape)))
        return {"latents": torch.zeros_like(values["latents"])} if step == 1 else None

    drawn = latents_of(tiny_pipeline, PROMPTS[0], num_inference_steps=2, callback_on_step_end=watch)
    assert seen == [(0, 1000, (1, 4, 16, 16)), (1, 500, (1, 4, 16, 16))]
    assert not drawn.any()
    options = {"callback_on_step_end": watch, "callback_on_step_end_tensor_inputs": None}
    assert not latents_of(tiny_pipeline, PROMPTS[0], num_inference_steps=2, **options).any()


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda latents: latents * NAN, ValueError, "holds NaN or infinity"),
        (lambda latents: latents[:, :2], ValueError, "shape (1, 2, 16, 16) does not fit; expected (1, 4, 16, 16)"),
        (lambda latents: None, TypeError, "expected a floating-point tensor, got NoneType"),
    ],
)
def test_latents_of_a_callback_are_checked(tiny_pipeline, change, error, message):
    def spoil(pipeline, step, timestep, values):
        return {"latents": change(values["latents"])}

    with pytest.raises(error, match=re.escape(f"callback_on_step_end: latents: {message}")):
        tiny_pipeline(PROMPTS[0], callback_on_step_end=spoil)


def test_progress_bar_counts_the_steps(tiny_pipeline, capfd):
    tiny_pipeline.set_progress_bar_config(disable=False)
    try:
        tiny_pipeline(PROMPTS[0], num_inference_steps=2)
    finally:
        tiny_pipeline.set_progress_bar_config(disable=True)
    assert "2/2" in capfd.readouterr().err


def test_bfloat16_draws_nearly_the_same(tiny_folder):
    exact, half = load_pipeline(tiny_folder, "cpu"), load_pipeline(tiny_folder, "cpu", "bfloat16")
    assert {half.transformer.dtype, half.vae.dtype, half.text_encoder.dtype} == {torch.bfloat16}
    one, two = (latents_of(p, PROMPTS[0], generator=seeded(0)) for p in (exact, half))
    assert two.dtype is torch.float32  # the sampler adds up in float32 whatever the model computes in
    assert (one - two).norm() / one.norm() < 0.05


# Saving and loading


def test_saved_and_loaded_draws_the_same_picture(tiny_pipeline, tiny_folder, tmp_path):
    expected = tiny_pipeline(PROMPTS, generator=seeded(0, 1, 2), output_type="np").images
    loaded = load_pipeline(tiny_folder, device="cpu")
    loaded.save_pretrained(tmp_path / "again")
    again = type(tiny_pipeline).from_pretrained(tmp_path / "again")
    for pipeline in (loaded, again):
        np.testing.assert_array_equal(pipeline(PROMPTS, generator=seeded(0, 1, 2), output_type="np").images, expected)
    for file in (tmp_path / "again").rglob("*.json"):
        assert str(tiny_folder) not in file.read_text(), f"{file.name} names the folder it was loaded from"


def test_shipped_weights_are_checked(shipped):
    assert nitro_e_lite.load_pipeline(device="cpu").config.max_text_length == 16
    index = shipped / "model_index.json"
    index.write_text(index.read_text().replace("16", "17"))
    with pytest.raises(ValueError, match="model_index.json: contents differ"):
        nitro_e_lite.load_pipeline("lite")


@pytest.mark.parametrize("inner", ["", "final", "transformer"])
def test_a_transformer_alone_takes_the_other_parts_from_lite(shipped, tmp_path, inner):
    other = build_tiny_pipeline().transformer
    torch.nn.init.zeros_(other.proj_out.weight)
    other.save_pretrained(tmp_path / "run" / inner)
    if inner:
        (tmp_path / "run" / "config.json").write_text("{}")  # a training run describes itself in such a file
    loaded = load_pipeline(tmp_path / "run", device="cpu")
    assert not loaded.transformer.proj_out.weight.any()
    assert loaded(PROMPTS[0], output_type="np").images.shape == (1, 64, 64, 3)


def test_a_transformer_that_does_not_fit_lite_is_refused(shipped, tmp_path):
    build_tiny_pipeline(width=48).transformer.save_pretrained(tmp_path / "wide")
    with pytest.raises(ValueError, match="text_encoder: features of width 32, but the transformer takes 48"):
        load_pipeline(tmp_path / "wide", device="cpu")


def test_official_file_with_encoders_from_folders(tiny_pipeline, tiny_folder, tmp_path):
    file = tmp_path / "Tiny-dist.safetensors"
    blocks = {"block_groups": (4, 16, 4)}  # what official files have
    save_official(type(tiny_pipeline.transformer).from_config(tiny_pipeline.transformer.config, **blocks), file)
    config = {
        "in_channels": 4, "out_channels": 4, "num_attention_heads": 2, "attention_head_dim": 16,
        "caption_channels": 32, "caption_projection_dim": 32,
    }  # fmt: skip
    loaded = load_pipeline(file, "cpu", text_encoder=tiny_folder, vae=tiny_folder / "vae", **config)
    assert loaded.config.sigma_grid == "scheduler" and loaded.config.max_text_length == 128
    assert loaded.config.default_steps == 4 and loaded.config.default_guidance == 0
    image = loaded(PROMPTS[0], output_type="np").images
    assert image.shape == (1, 64, 64, 3)
    with pytest.raises((EncoderUnavailable, ValueError), match="--text-encoder PATH"):
        load_pipeline(file, "cpu", **config)
    with pytest.raises(TypeError, match="sample_size: only official"):
        load_pipeline(tiny_folder, "cpu", sample_size=32)
    plain = load_pipeline(file, "cpu", text_encoder=tiny_folder, vae=tiny_folder / "vae", variant="512px", **config)
    assert plain.config.default_steps == 20 and plain.config.default_guidance == 4.5  # said, whatever its name
    with pytest.raises(
        ValueError, match="variant: '256px' for Tiny-dist.safetensors; must be one of 512px, 512px-dist"
    ):
        load_pipeline(file, "cpu", variant="256px")
    with pytest.raises(ValueError, match="variant: '512px' for tiny; .* an official .safetensors file"):
        load_pipeline(tiny_folder, "cpu", variant="512px")
    with (
        pytest.warns(UserWarning, match="taken for the variant 512px-dist because of its name"),
        pytest.raises(ValueError),
    ):
        load_pipeline(file, "cpu")  # the shapes are not the published ones


def test_unknown_model_names_what_there_is(shipped):
    with pytest.raises(ValueError, match=r"model: 'heavy' .*\(lite\)"):
        load_pipeline("heavy")


@pytest.mark.parametrize("compression", [False, True])
@pytest.mark.parametrize("pattern", [[(1, 1)], [(4, 1), (4, 4)], [(3, 1), (4, 1)], [(2, 3), (5, 1)]])
def test_sizes_that_are_taken_are_those_that_attention_can_split(compression, pattern):
    """Only the largest number of groups was once looked at, which another need not divide."""
    config = {"patch_size": 1, "compression": compression, "pos_embed_max_size": 96, "sample_size": 16}
    config["attention_pattern"] = pattern
    for rows, columns in ((4, 4), (8, 8), (8, 12), (12, 12), (16, 16), (20, 12), (60, 60)):
        counts = [rows * columns, *([rows * columns // 4 + rows * columns // 16] if compression else [])]
        fits = not any(count % (ratio * chunk) for count in counts for ratio, chunk in pattern)
        if fits:
            assert as_grid(8 * rows, 8 * columns, config, 8) == (rows, columns)
            continue
        with pytest.raises(ValueError, match="which attention cannot split in .* try multiples of") as caught:
            as_grid(8 * rows, 8 * columns, config, 8)
        side = int(re.search(r"multiples of (\d+) px", str(caught.value))[1])
        if side <= 8 * 96:
            assert as_grid(side, side, config, 8) == (side // 8, side // 8)


# Parts that do not fit together


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"latents_mean": [0.0], "latents_std": [1.0]},
            "latents_mean: 1 latent channels, but the transformer has 4",
        ),
        ({"latents_mean": None}, "give both or neither"),
        ({"sigma_grid": "cosine"}, "sigma_grid: 'cosine'"),
        ({"max_text_length": 0}, "max_text_length: 0"),
        ({"default_steps": 0}, "default_steps: 0"),
        ({"default_guidance": -1.0}, "default_guidance: -1"),
        ({"default_shift": 0.5}, "default_shift: 0.5"),
        ({"default_shift": 1001}, "default_shift: 1001 is above 1000"),
    ],
)
def test_constructor_refuses(tiny_pipeline, settings, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        type(tiny_pipeline)(**tiny_pipeline.components, **(tiny_pipeline.parameters | settings))


# Bad input: every error names the field

FEATURES = torch.zeros(1, 16, 32)
BAD = [
    ({"prompt": None}, ValueError, "prompt, prompt_embeds"),
    ({"prompt": 7}, TypeError, "prompt: expected a string"),
    ({"prompt": []}, ValueError, "prompt: the list is empty"),
    ({"prompt": ["a star", None]}, TypeError, "prompt[1]"),
    ({"prompt_embeds": FEATURES}, ValueError, "prompt, prompt_embeds"),
    ({"prompt": None, "prompt_embeds": [1.0]}, TypeError, "prompt_embeds: expected a floating-point tensor"),
    ({"prompt": None, "prompt_embeds": FEATURES.long()}, TypeError, "prompt_embeds"),
    ({"prompt": None, "prompt_embeds": FEATURES[0]}, ValueError, "prompt_embeds: shape (16, 32)"),
    ({"prompt": None, "prompt_embeds": FEATURES[:, :8]}, ValueError, "expected (any, 16, 32)"),
    ({"prompt": None, "prompt_embeds": FEATURES[:0]}, ValueError, "prompt_embeds: shape (0, 16, 32)"),
    ({"prompt": None, "prompt_embeds": FEATURES * NAN}, ValueError, "prompt_embeds: holds NaN"),
    ({"negative_prompt": ["a", "b"]}, ValueError, "negative_prompt: 2 strings for 1 prompts"),
    ({"negative_prompt": 3}, TypeError, "negative_prompt: expected a string"),
    ({"negative_prompt": "a", "negative_prompt_embeds": FEATURES}, ValueError, "negative_prompt_embeds"),
    ({"negative_prompt_embeds": FEATURES.repeat(2, 1, 1)}, ValueError, "negative_prompt_embeds: shape"),
    ({"num_inference_steps": 0}, ValueError, "num_inference_steps: 0 is below 1"),
    ({"num_inference_steps": 2.5}, TypeError, "num_inference_steps: expected an integer"),
    ({"num_inference_steps": True}, TypeError, "num_inference_steps"),
    ({"guidance_scale": -0.5}, ValueError, "guidance_scale: -0.5"),
    ({"guidance_scale": NAN}, ValueError, "guidance_scale: nan"),
    ({"guidance_scale": "strong"}, TypeError, "guidance_scale: expected a number"),
    ({"sigmas": []}, ValueError, "sigmas: empty"),
    ({"sigmas": 0.5}, TypeError, "sigmas: expected a list"),
    ({"sigmas": [0.5, "a"]}, TypeError, "sigmas[1]"),
    ({"sigmas": [0.5, 0.5]}, ValueError, "must fall strictly"),
    ({"sigmas": [1.5, 0.5]}, ValueError, "must fall strictly"),
    ({"sigmas": [1.0, 0.0]}, ValueError, "must fall strictly"),
    ({"sigmas": [1.0, 0.5], "num_inference_steps": 3}, ValueError, "3 steps for 2 sigmas"),
    ({"sigmas": [1.0, 0.5], "shift": 1.0}, ValueError, "shift, sigmas: give one of the two"),
    ({"shift": 0.9}, ValueError, "shift: 0.9 is not a finite number of at least 1"),
    ({"shift": 1e30}, ValueError, "shift: 1e+30 is above 1000"),
    ({"shift": "3"}, TypeError, "shift: expected a number"),
    ({"num_images_per_prompt": 0}, ValueError, "num_images_per_prompt: 0"),
    ({"generator": 3}, TypeError, "generator: expected a torch.Generator"),
    ({"generator": [3]}, TypeError, "generator: expected a torch.Generator"),
    ({"generator": seeded(0, 1)}, ValueError, "generator: 2 generators for 1 pictures"),
    ({"generator": []}, ValueError, "generator: 0 generators"),
    ({"latents": torch.zeros(2, 4, 16, 16)}, ValueError, "latents: shape (2, 4, 16, 16)"),
    ({"latents": torch.full((1, 4, 16, 16), NAN)}, ValueError, "latents: holds NaN"),
    ({"latents": np.zeros((1, 4, 16, 16))}, TypeError, "latents: expected a floating-point tensor"),
    ({"height": 72}, ValueError, "height: 72 px does not fit; expected a multiple of 16"),
    ({"width": 0}, ValueError, "width: 0"),
    ({"width": 64.0}, TypeError, "width: expected an integer"),
    ({"height": 16 * 1000}, ValueError, "height: 16000 px does not fit"),
    ({"height": 16, "width": 16}, ValueError, "height, width: 16 x 16 px"),
    ({"output_type": "jpg"}, ValueError, "output_type: 'jpg'"),
    ({"callback_on_step_end": 1}, TypeError, "callback_on_step_end"),
    (
        {"callback_on_step_end_tensor_inputs": ["noise"]},
        ValueError,
        "callback_on_step_end_tensor_inputs: ['noise']",
    ),
    (
        {"callback_on_step_end_tensor_inputs": "latents"},
        TypeError,
        "callback_on_step_end_tensor_inputs: expected a list of names, got 'latents' (str)",
    ),
    (
        {"callback_on_step_end_tensor_inputs": 3},
        TypeError,
        "callback_on_step_end_tensor_inputs: expected a list of names, got 3 (int)",
    ),
]


@pytest.mark.parametrize(("arguments", "error", "message"), BAD, ids=[message for _, _, message in BAD])
def test_bad_input_is_refused_before_any_work(tiny_pipeline, calls, arguments, error, message):
    with pytest.raises(error, match=re.escape(message)):
        tiny_pipeline(**({"prompt": "a red star"} | arguments))
    assert not calls


@pytest.mark.parametrize("part", ["text_encoder", "transformer", "vae"])
def test_a_part_that_breaks_is_named(part):
    pipeline = build_tiny_pipeline()
    with torch.no_grad():
        next(p for p in reversed(list(getattr(pipeline, part).parameters())) if p.ndim == 1).fill_(NAN)
    with pytest.raises(FloatingPointError, match=f"{part}: gave NaN"):
        pipeline("a red star")


def test_configuration_is_plain_json(tiny_folder):
    config = json.loads((tiny_folder / "model_index.json").read_text())
    assert config["latents_std"] == [1.0, 2.0, 0.5, 1.5] and config["sigma_grid"] == "linear"


# Step by step


def test_steps_are_what_a_call_does(tiny_pipeline):
    options = {"num_inference_steps": 4, "guidance_scale": 2.5}
    drawn = latents_of(tiny_pipeline, PROMPTS[0], generator=seeded(5), **options)
    steps = list(tiny_pipeline.steps(PROMPTS[0], generator=seeded(5), **options))
    assert torch.equal(steps[-1].latents, drawn)
    assert [step.index for step in steps] == [0, 1, 2, 3] and {step.total for step in steps} == {4}
    assert [step.sigma for step in steps] == pytest.approx([1, 0.75, 0.5, 0.25])
    assert [float(step.timestep) for step in steps] == pytest.approx([1000, 750, 500, 250])
    assert all(step.seconds > 0 for step in steps)


def test_belief_is_the_straight_line_to_the_end(tiny_pipeline):
    noise = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(5))
    before = noise
    for step in tiny_pipeline.steps(PROMPTS[0], num_inference_steps=3, latents=noise):
        reached = step.sigma - 1 / 3
        torch.testing.assert_close(step.latents, before + (step.x0 - before) * (step.sigma - reached) / step.sigma)
        before = step.latents
    torch.testing.assert_close(step.x0, step.latents)  # nothing is left to believe


def test_walks_take_turns_without_disturbing_each_other(tiny_pipeline):
    counts = (4, 3, 1)
    alone = [latents_of(tiny_pipeline, PROMPTS[0], count, generator=seeded(7)) for count in counts]
    walks = [tiny_pipeline.steps(PROMPTS[0], count, generator=seeded(7)) for count in counts]
    last = [None] * len(walks)
    for _ in range(max(counts)):
        for lane, walk in enumerate(walks):
            last[lane] = next(walk, None) or last[lane]
    assert all(torch.equal(step.latents, latents) for step, latents in zip(last, alone, strict=True))
    assert not last[0].latents.requires_grad


def test_steps_are_refused_before_the_first_is_asked_for(tiny_pipeline, calls):
    with pytest.raises(ValueError, match="num_inference_steps: 0 is below 1"):
        tiny_pipeline.steps(PROMPTS[0], 0)
    tiny_pipeline.steps(PROMPTS[0], 3)
    assert calls == []
