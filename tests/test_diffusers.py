"""At home in diffusers: what people do with other pipelines works here, or is refused by name.

diffusers' own mixins (`tests/` of its repository at 58eb52c, August 2026) are run by hand on model, pipeline and LoRA,
on a CPU and with their gates for accelerators lifted. What fails there, and why it stays:

    pipeline  cpu_offload_forward_pass_twice,      diffusers wants an accelerator to off-load from
              lora_loading_model_cpu_offload
              sequential_*                         accelerate fails on "cpu:0", with a bare Linear too; "cpu" is below
              save_load_float16                    Llama's rotary frequencies: `.half()` rounds them, loading does not
              low_cpu_mem_usage_with_loading,      they read a pickled .bin, which is refused here
              *_denoiser_lora_save_load
              multi_vae                            asks for `block_out_channels`, which AutoencoderDC has not
              first_block_cache_inference          no `CacheMixin`: it skips blocks of one width, and here tokens are
                                                   compressed between them; the model's cache tests are skipped
    model     cpu_offload, disk_offload_*          `device_map="auto"`: diffusers warms up an accelerator's memory
              correct_lora_configs_with_...        looks for a module `to_k`, which is a part of `qkv` here
              load_ip_adapter                      the mixin leaves it to models that have IP adapters
"""

import contextlib
import copy
import pickle
import shutil
import threading

import accelerate
import diffusers
import numpy as np
import pytest
import torch
from diffusers.callbacks import SD3CFGCutoffCallback, SDCFGCutoffCallback
from diffusers.hooks import group_offloading
from peft import LoraConfig
from safetensors.torch import load_file, save_file
from tiny import build_tiny_pipeline
from torchao.quantization import Int8WeightOnlyConfig

from nitro_e_lite.inference.encoders import execution_device
from nitro_e_lite.inference.img2img import NitroEImg2ImgPipeline
from nitro_e_lite.inference.loading import load_pipeline
from nitro_e_lite.inference.pipeline import NitroEPipeline
from nitro_e_lite.inference.schedules import draws_noise
from nitro_e_lite.model import adapters, flow, fp8
from nitro_e_lite.model.adapters import own_targets
from nitro_e_lite.model.emmdit import EMMDiTOutput
from nitro_e_lite.model.official_weights import merge_lora

STAR = "a red star"
NAMES = ["to_q", "to_k", "to_v", "to_out.0"]


def draw(pipeline, prompt=STAR, **options):
    """Latents of two guided steps."""
    options = {
        "num_inference_steps": 2,
        "output_type": "latent",
        "generator": torch.Generator().manual_seed(0),
    } | options
    return pipeline(prompt, **options).images


@pytest.fixture(scope="module")
def expected(tiny_pipeline):
    return draw(tiny_pipeline)


@pytest.fixture
def pipeline(tiny_pipeline):
    """A copy to change."""
    return copy.deepcopy(tiny_pipeline)


# Off-loading


@contextlib.contextmanager
def poisoned(monkeypatch):
    """Group off-loading without an accelerator: what is off-loaded is NaN until it is brought in."""
    kept = {}

    def tensors(group):
        modules = [tensor for module in group.modules for tensor in (*module.parameters(), *module.buffers())]
        return [tensor for tensor in (*modules, *group.parameters, *group.buffers) if tensor.is_floating_point()]

    def offload(group):
        for tensor in tensors(group):
            if id(tensor) not in kept:
                kept[id(tensor)] = tensor, tensor.data
                tensor.data = torch.full_like(tensor, float("nan"))

    def onload(group):
        for tensor in tensors(group):
            if id(tensor) in kept:
                tensor.data = kept.pop(id(tensor))[1]

    monkeypatch.setattr(group_offloading.ModuleGroup, "_offload_to_memory", offload)
    monkeypatch.setattr(group_offloading.ModuleGroup, "_onload_from_memory", onload)
    yield


@pytest.mark.parametrize("kind", ["leaf_level", "block_level"])
def test_group_offloading_brings_in_every_weight_that_is_read(pipeline, tiny_pipeline, monkeypatch, kind):
    blocks = {"num_blocks_per_group": 1} if kind == "block_level" else {}
    with poisoned(monkeypatch):
        for part in (pipeline.transformer, pipeline.vae):
            part.enable_group_offload(torch.device("cpu"), torch.device("cpu"), kind, **blocks)
        assert pipeline.transformer.groups[0][0].image.norm1.weight.isnan().all()
        pictures = draw(pipeline, output_type="pt")
    torch.testing.assert_close(pictures, draw(tiny_pipeline, output_type="pt"))


@pytest.mark.parametrize("rest", ["memory", "disk"])
def test_sequential_offloading_computes_on_the_execution_device(pipeline, tiny_pipeline, tmp_path, rest):
    for part in (pipeline.text_encoder, pipeline.transformer, pipeline.vae):
        if rest == "memory":
            accelerate.cpu_offload(part, torch.device("cpu"))  # weights rest on "meta"
        else:
            accelerate.disk_offload(part, tmp_path / type(part).__name__, torch.device("cpu"))
        assert part.device.type == "meta" and execution_device(part).type == "cpu"
    torch.testing.assert_close(draw(pipeline, output_type="pt"), draw(tiny_pipeline, output_type="pt"))


def test_model_offloading_decodes_on_the_execution_device(pipeline, monkeypatch):
    accelerate.cpu_offload_with_hook(pipeline.vae, "meta")  # "meta" stands for an accelerator
    seen = []
    monkeypatch.setattr(pipeline.vae, "_decode", lambda z: seen.append(z.device.type) or torch.zeros(1, 3, 64, 64))
    pipeline.decode(torch.zeros(1, 4, 16, 16), "pt")
    assert seen == ["meta"]


# LoRA


@pytest.fixture(scope="module")
def peft_folder(tiny_pipeline, tmp_path_factory):
    """Random adapters by the names of the published code, of unequal ranks and scale 2, as PEFT writes them."""
    import json

    generator, weights = torch.Generator().manual_seed(3), {}
    parts = {"attn.to_q": 2, "attn.to_k": 2, "attn.to_v": 3, "attn.to_out.0": 2, "attn.add_q_proj": 2, "ff.net.2": 2}
    for name, rank in parts.items():
        inner = 96 if name == "ff.net.2" else 32
        sides = {"A": (rank, inner), "B": (32, rank)}
        for side, shape in sides.items():
            key = f"base_model.model.block_groups.1.0.{name}.lora_{side}.weight"
            weights[key] = 0.5 * torch.randn(shape, generator=generator)
    folder = tmp_path_factory.mktemp("lora")
    facts = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": list(parts)}
    patterns = {"rank_pattern": {"to_v": 3}, "alpha_pattern": {"to_v": 6}}
    (folder / "adapter_config.json").write_text(json.dumps(facts | patterns))
    save_file(weights, folder / "adapter_model.safetensors")
    return folder


def test_adapters_outside_of_blocks_come_back_and_names_of_nothing_are_refused(pipeline, expected, tmp_path):
    """Without a prefix only those within blocks were taken for this model's: the others vanished."""
    other = copy.deepcopy(pipeline)
    torch.manual_seed(5)
    names = ["proj_out", "text_embed", "groups.0.0.attention.qkv"]
    pipeline.transformer.add_adapter(LoraConfig(r=2, lora_alpha=4, target_modules=names, init_lora_weights=False))
    pipeline.transformer.save_lora_adapter(tmp_path)
    drawn = draw(pipeline)
    assert (drawn - expected).abs().max() > 0.1
    other.load_lora_weights(tmp_path)
    torch.testing.assert_close(draw(other), drawn, rtol=0, atol=1e-6)
    weights = load_file(next(tmp_path.glob("*.safetensors")))
    wrong = weights | {f"block_groups.9.0.attn.to_out.0.lora_{side}.weight": torch.ones(2, 2) for side in "AB"}
    with pytest.raises(ValueError, match="it changes groups.9.0.attention.out, which is not here"):
        copy.deepcopy(other).load_lora_weights(wrong)
    with pytest.raises(ValueError, match="proj_out.alpha: strengths in tensors of their own are not read"):
        copy.deepcopy(other).transformer.load_lora_adapter(weights | {"proj_out.alpha": torch.tensor(8.0)})


def test_adapters_on_three_matrices_are_one_on_the_fused_matrix(
    pipeline, tiny_pipeline, peft_folder, expected, tmp_path
):
    merged = copy.deepcopy(tiny_pipeline.transformer)
    merge_lora(merged, peft_folder)  # compared with PEFT's own merge in test_checkpoint.py
    drawn = draw(tiny_pipeline.from_pipe(tiny_pipeline, transformer=merged))
    assert (drawn - expected).abs().max() > 0.01
    pipeline.load_lora_weights(peft_folder, adapter_name="one")
    fused = pipeline.transformer.groups[1][0].attention.qkv
    assert fused.r["one"] == 7 and pipeline.get_active_adapters() == ["one"]
    torch.testing.assert_close(draw(pipeline), drawn, rtol=0, atol=1e-6)
    # what diffusers does with it
    torch.testing.assert_close(draw(pipeline, attention_kwargs={"scale": 0.0}), expected, rtol=0, atol=1e-6)
    half = draw(pipeline, attention_kwargs={"scale": 0.5})
    pipeline.set_adapters("one", 0.5)
    torch.testing.assert_close(draw(pipeline), half)
    draw(pipeline, attention_kwargs={"scale": 0.0})
    assert torch.equal(draw(pipeline), half)  # and not at full strength from now on
    pipeline.set_adapters("one", 1.0)
    pipeline.fuse_lora()
    torch.testing.assert_close(draw(pipeline), drawn, rtol=0, atol=1e-5)
    pipeline.unfuse_lora()
    # saved and loaded again, kept apart and merged
    from peft.utils import get_peft_model_state_dict

    layers = get_peft_model_state_dict(pipeline.transformer, adapter_name="one")
    pipeline.save_lora_weights(tmp_path / "pipeline", transformer_lora_layers=layers)
    pipeline.transformer.save_lora_adapter(tmp_path / "model", adapter_name="one")
    for source in ("pipeline", "model"):
        pipeline.unload_lora_weights()
        torch.testing.assert_close(draw(pipeline), expected, rtol=0, atol=1e-5)  # fused and unfused before
        pipeline.load_lora_weights(tmp_path / source)
        torch.testing.assert_close(draw(pipeline), drawn, rtol=0, atol=1e-5)
        again = copy.deepcopy(tiny_pipeline.transformer)
        torch.testing.assert_close(
            merge_lora(again, tmp_path / source).state_dict(), merged.state_dict(), rtol=0, atol=1e-6
        )


def test_new_adapters_take_the_names_of_diffusers_scripts(pipeline):
    pipeline.transformer.add_adapter(LoraConfig(r=2, lora_alpha=4, target_modules=NAMES, init_lora_weights=False))
    attention = pipeline.transformer.groups[0][0].attention
    assert attention.qkv.r["default"] == 6 and attention.out.r["default"] == 2
    assert attention.qkv.scaling["default"] == attention.out.scaling["default"] == 2
    assert not hasattr(attention.qkv_context, "lora_A")
    with pytest.raises(ValueError, match=r"\['to_q', 'to_v'\] without the others; .* name all three"):
        own_targets(LoraConfig(target_modules=["to_q", "to_v"]))


def test_adapters_that_do_not_fit_are_refused(pipeline, tmp_path, monkeypatch):
    strange = {
        "unet.down.0.to_q.lora_A.weight": torch.zeros(2, 32),
        "unet.down.0.to_q.lora_B.weight": torch.zeros(32, 2),
    }
    half = {"transformer.block_groups.0.0.attn.to_q.lora_A.weight": torch.zeros(2, 32)}
    dora = {"transformer.block_groups.0.0.attn.to_q.lora_magnitude_vector": torch.zeros(32)}
    for weights, message in [(strange, "made for another model"), (half, "only one of"), (dora, "only a plain LoRA")]:
        with pytest.raises(ValueError, match=message):
            pipeline.load_lora_weights(weights)
    with pytest.raises(FileNotFoundError, match="holds neither"):
        merge_lora(pipeline.transformer, tmp_path)
    alone = {f"base_model.model.block_groups.0.0.attn.to_q.lora_{side}.weight": torch.zeros(2, 2) for side in "AB"}
    save_file(alone, tmp_path / "adapter_model.safetensors")
    with pytest.raises(FileNotFoundError, match="nobody knows the scale"):
        merge_lora(pipeline.transformer, tmp_path)
    (tmp_path / "adapter_model.safetensors").unlink()
    torch.save(half, tmp_path / "pytorch_lora_weights.bin")  # diffusers by itself would read it
    with pytest.raises(OSError, match="no file named pytorch_lora_weights.safetensors"):
        pipeline.load_lora_weights(tmp_path)
    pickled = {"weight_name": "pytorch_lora_weights.bin"}
    for source, options in [(tmp_path, pickled), (tmp_path / pickled["weight_name"], {})]:
        with pytest.raises(ValueError, match="pytorch_lora_weights.bin: is no .safetensors file"):
            pipeline.load_lora_weights(source, **options)
    (tmp_path / "cut.safetensors").write_bytes(b"cut")
    with pytest.raises(ValueError, match="cut.safetensors: is damaged"):
        pipeline.load_lora_weights(tmp_path / "cut.safetensors")
    with pytest.raises(ValueError, match="revision=None: someone/adapter has no pinned commit; pass revision="):
        pipeline.load_lora_weights("someone/adapter")
    with pytest.raises(FileNotFoundError, match="no folder, no file, and no hub id"):
        pipeline.load_lora_weights(tmp_path / "nowhere" / "at" / "all")
    asked = []
    monkeypatch.setattr(
        adapters.SanaLoraLoaderMixin, "lora_state_dict", lambda source, **said: asked.append(said) or (strange, None)
    )
    with pytest.raises(ValueError, match="made for another model"):
        pipeline.load_lora_weights("someone/adapter", revision="1" * 40)
    assert asked[0]["revision"] == "1" * 40 and asked[0]["use_safetensors"]
    with pytest.raises(ValueError, match=r"attention_kwargs: \['mask'\] unknown"):
        draw(pipeline, attention_kwargs={"mask": 1})
    fp8.quantize_model(pipeline.transformer)
    with pytest.raises(ValueError, match="is in FP8"):
        pipeline.load_lora_weights(half)


# Prompts


def test_encode_prompt_is_that_of_other_pipelines_and_works_alone(tiny_pipeline):
    alone = NitroEPipeline(None, None, tiny_pipeline.text_encoder, tiny_pipeline.tokenizer, None, max_text_length=16)
    positive, negative = alone.encode_prompt(STAR, num_images_per_prompt=2, negative_prompt="blur")
    assert torch.equal(positive, tiny_pipeline.encode_captions([STAR, STAR])) and positive.shape == (2, 16, 32)
    assert torch.equal(negative, tiny_pipeline.encode_captions(["blur"] * 2))
    assert alone.encode_prompt([STAR], do_classifier_free_guidance=False)[1] is None
    again, _ = alone.encode_prompt(prompt_embeds=positive, device=torch.device("cpu"), num_images_per_prompt=None)
    assert torch.equal(again, positive)
    with pytest.raises(ValueError, match="max_sequence_length: 300, but the model was trained with 16"):
        alone.encode_prompt(STAR, max_sequence_length=300)
    drawing = NitroEPipeline(
        tiny_pipeline.transformer, tiny_pipeline.vae, None, None, tiny_pipeline.scheduler, **tiny_pipeline.parameters
    )
    text = {"prompt_embeds": positive[:1], "negative_prompt_embeds": negative[:1], "num_images_per_prompt": None}
    told = draw(drawing, None, **text)
    torch.testing.assert_close(told, draw(tiny_pipeline, negative_prompt="blur"))


# Callbacks


def test_the_official_callback_switches_guidance_off(tiny_pipeline, expected):
    rows = []
    handle = tiny_pipeline.transformer.register_forward_pre_hook(lambda _, given: rows.append(len(given[0])))
    cut = draw(tiny_pipeline, callback_on_step_end=SDCFGCutoffCallback(cutoff_step_ratio=0.0))
    handle.remove()
    assert rows == [2, 1] and not torch.equal(cut, expected)
    assert (tiny_pipeline.guidance_scale, tiny_pipeline.num_timesteps) == (0.0, 2)
    assert not tiny_pipeline.do_classifier_free_guidance
    with pytest.raises(ValueError, match="pooled_prompt_embeds.* not among"):
        draw(tiny_pipeline, callback_on_step_end=SD3CFGCutoffCallback(cutoff_step_ratio=0.4))
    with pytest.raises(ValueError, match="prompt_embeds: 1 rows for 2 pictures"):
        draw(tiny_pipeline, [STAR] * 2, callback_on_step_end=SDCFGCutoffCallback(cutoff_step_ratio=0.0))


def test_a_callback_can_stop_steer_and_see_the_features(tiny_pipeline, expected):
    seen = []

    def stop(pipeline, step, timestep, given):
        seen.append((step, float(timestep), tuple(given["prompt_embeds"].shape), pipeline.guidance_scale))
        pipeline._interrupt = True
        return given

    names = ["latents", "prompt_embeds"]
    draw(tiny_pipeline, callback_on_step_end=stop, callback_on_step_end_tensor_inputs=names)
    assert seen == [(0, 1000.0, (2, 16, 32), 3.0)] and tiny_pipeline.interrupt
    assert torch.equal(draw(tiny_pipeline), expected) and not tiny_pipeline.interrupt


# Schedulers

FLOW = {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}


@pytest.mark.parametrize(
    "scheduler, steps",
    [
        (diffusers.FlowMatchHeunDiscreteScheduler(), 19),
        (diffusers.DPMSolverMultistepScheduler(**FLOW), 10),
        (diffusers.UniPCMultistepScheduler(**FLOW), 10),
    ],
    ids=["heun", "dpm", "unipc"],
)
def test_other_flow_schedulers_solve_the_same_flow(pipeline, monkeypatch, scheduler, steps):
    """Of data with deviation 0.5 around zero the flow is known: noise ends at half of itself."""

    def velocity(x, text, timestep):
        t, variance = timestep / 1000, 0.25
        return EMMDiTOutput(x * (t - (1 - t) * variance) / ((1 - t) ** 2 * variance + t**2))

    monkeypatch.setattr(pipeline.transformer, "forward", velocity)
    noise, found = torch.randn(1, 4, 16, 16), []
    for one in (pipeline.scheduler, scheduler):
        pipeline.scheduler = one
        found.append(draw(pipeline, num_inference_steps=10, guidance_scale=1.0, latents=noise))
    euler, other = ((latents - noise / 2).norm() for latents in found)
    assert pipeline.num_timesteps == steps
    assert other < 0.5 * euler


@pytest.mark.parametrize("by", ["scheduler", "default_shift", "both", "call", "heun"])
def test_shift_is_applied_once(pipeline, by):
    pipeline.register_to_config(default_shift=1.0 if by in ("scheduler", "call") else 3.0)
    if by in ("scheduler", "both"):
        pipeline.scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    if by == "heun":
        pipeline.scheduler = diffusers.FlowMatchHeunDiscreteScheduler()
    steps = list(pipeline.steps(STAR, 2, 1.0, shift=3.0 if by == "call" else None))
    middle = 0.75 if by != "heun" else flow.shift_sigmas([0.001], 3.0)[0]  # its own grid ends there
    assert steps[1].sigma == pytest.approx(middle, rel=1e-3)
    assert by == "call" or pipeline.shift == 3.0
    if by != "heun":
        assert [step.sigma for step in pipeline.steps(STAR, guidance_scale=1.0, sigmas=[1.0, 0.5])] == [1.0, 0.5]


def test_schedulers_that_do_not_fit_are_refused(pipeline):
    for scheduler, options, message in [
        (diffusers.DDIMScheduler(), {}, "DDIMScheduler has use_flow_sigmas=None"),
        (diffusers.UniPCMultistepScheduler(use_flow_sigmas=True), {}, "prediction_type='epsilon'"),
        (diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True), {}, "use_dynamic_shifting"),
        (diffusers.FlowMatchHeunDiscreteScheduler(), {"sigmas": [1.0, 0.5]}, "sigmas: .*Heun.* takes none"),
    ]:
        pipeline.scheduler = scheduler
        with pytest.raises(ValueError, match=message):
            draw(pipeline, **({"num_inference_steps": None} | options))


def test_schedulers_that_draw_noise_draw_it_from_the_callers_generator(pipeline):
    sde = {"use_flow_sigmas": True, "prediction_type": "flow_prediction", "algorithm_type": "sde-dpmsolver++"}
    for scheduler in (diffusers.FlowMatchLCMScheduler(), diffusers.DPMSolverMultistepScheduler(**sde)):
        pipeline.scheduler = scheduler
        assert draws_noise(scheduler)
        one, same, other = (draw(pipeline, generator=torch.Generator().manual_seed(seed)) for seed in (0, 0, 1))
        assert torch.equal(one, same) and not torch.equal(one, other)
    plain = sde | {"algorithm_type": "dpmsolver++"}
    assert not draws_noise(diffusers.DPMSolverMultistepScheduler(**plain))
    assert not draws_noise(diffusers.FlowMatchEulerDiscreteScheduler())
    assert draws_noise(diffusers.FlowMatchEulerDiscreteScheduler(stochastic_sampling=True))


# Parts and folders


def test_parts_keep_the_settings_they_were_drawn_with(tiny_pipeline, expected):
    again = type(tiny_pipeline)(**tiny_pipeline.components)
    assert again.parameters == tiny_pipeline.parameters and again.stats == tiny_pipeline.stats
    again.set_progress_bar_config(disable=True)
    assert torch.equal(draw(again), expected)
    another = type(tiny_pipeline.vae).from_config(tiny_pipeline.vae.config)
    with pytest.warns(UserWarning, match="vae: another one than .*; latents_mean, latents_std are kept"):
        other = type(tiny_pipeline)(**(tiny_pipeline.components | {"vae": another}))
    assert other.parameters == tiny_pipeline.parameters and other.stats == tiny_pipeline.stats
    type(tiny_pipeline)(**tiny_pipeline.components, **tiny_pipeline.parameters)
    again.register_to_config(default_steps=3)  # as `load_pipeline` does for what learned from rewards
    assert NitroEImg2ImgPipeline(**again.components).config.default_steps == 3
    again.register_to_config(default_steps=tiny_pipeline.config.default_steps)
    assert pickle.dumps(tiny_pipeline.transformer)


def test_settings_are_kept_one_by_one_by_copies_and_by_what_is_put_in_place(pipeline):
    """One setting that was given, no autoencoder, a copy or a compiled model lost all others, without a word."""
    wanted = pipeline.parameters
    assert NitroEPipeline(**pipeline.components, default_steps=8).parameters == wanted | {"default_steps": 8}
    back = NitroEPipeline(**pipeline.components, default_steps=wanted["default_steps"])
    assert back.parameters == wanted
    assert NitroEPipeline(**(pipeline.components | {"vae": None})).parameters == wanted
    assert NitroEPipeline(**pipeline.components).parameters == wanted  # and the one before has left nothing
    assert NitroEPipeline(**copy.deepcopy(pipeline).components).parameters == wanted
    pipeline.transformer = build_tiny_pipeline().transformer
    assert NitroEPipeline(**pipeline.components).parameters == wanted
    pipeline.transformer = torch.compile(pipeline.transformer, backend="eager")
    assert NitroEPipeline(**pipeline.components).parameters == wanted
    own = NitroEPipeline(**pipeline.components, sigma_grid="scheduler", default_shift=1.0)
    assert NitroEPipeline(**own.components, sigma_grid="linear").config.sigma_grid == "linear"


@pytest.mark.parametrize("part", ["transformer", "vae", "text_encoder"])
def test_a_folder_that_lacks_weights_is_refused(tiny_folder, tmp_path, part):
    """Its text encoder was filled with noise, the others ended in a traceback."""
    shutil.copytree(tiny_folder, tmp_path / "tiny")
    (file,) = (tmp_path / "tiny" / part).glob("*.safetensors")
    weights = load_file(file)
    name = sorted(weights)[0]
    save_file({key: value for key, value in weights.items() if key != name}, file, {"format": "pt"})
    with pytest.raises(ValueError, match=f"tiny cannot be loaded .1 weights of {part} are missing: "):
        load_pipeline(tmp_path / "tiny", "cpu")


def test_a_model_with_adapters_in_it_is_not_saved(pipeline, peft_folder, tmp_path):
    pipeline.load_lora_weights(peft_folder)
    with pytest.raises(ValueError, match="LoRA adapters are loaded; save them by save_lora_adapter, or merge them"):
        pipeline.save_pretrained(tmp_path / "whole")
    pipeline.fuse_lora()
    drawn = draw(pipeline)
    pipeline.unload_lora_weights()
    pipeline.save_pretrained(tmp_path / "whole")
    torch.testing.assert_close(draw(load_pipeline(tmp_path / "whole", "cpu")), drawn, rtol=0, atol=1e-5)


def test_folders_load_by_diffusers_own_classes_and_in_half_precision(tiny_pipeline, tiny_folder, expected, tmp_path):
    loaded = diffusers.DiffusionPipeline.from_pretrained(tiny_folder)
    assert type(loaded) is NitroEPipeline and torch.equal(draw(loaded), expected)
    model = diffusers.AutoModel.from_pretrained(str(tiny_folder), subfolder="transformer")
    assert torch.equal(model.proj_out.weight, tiny_pipeline.transformer.proj_out.weight)
    for places in ("balanced", "cpu"):
        assert torch.equal(draw(NitroEPipeline.from_pretrained(tiny_folder, device_map=places)), expected)
    on_disk = {"device_map": {"": "disk"}, "offload_folder": tmp_path / "off"}
    model = type(model).from_pretrained(tiny_folder / "transformer", **on_disk)
    assert model.device.type == "meta"
    again = NitroEPipeline(**(tiny_pipeline.components | {"transformer": model}), **tiny_pipeline.parameters)
    assert torch.equal(draw(again), expected)
    tiny_pipeline.save_pretrained(tmp_path, variant="fp16")
    assert torch.equal(draw(load_pipeline(tmp_path, "cpu")), expected)
    int8 = {"transformer": diffusers.TorchAoConfig(Int8WeightOnlyConfig())}
    loaded = NitroEPipeline.from_pretrained(
        tiny_folder, quantization_config=diffusers.PipelineQuantizationConfig(quant_mapping=int8)
    )
    assert type(loaded.transformer.proj_out.weight).__name__ == "Int8Tensor"
    assert not fp8.is_quantized(loaded.transformer)  # its codes are of another type
    NitroEImg2ImgPipeline(**tiny_pipeline.components).save_pretrained(tmp_path / "other")
    assert type(diffusers.DiffusionPipeline.from_pretrained(tmp_path / "other")) is NitroEImg2ImgPipeline
    torch.testing.assert_close(draw(loaded), expected, rtol=0, atol=0.05)  # of values of 3: eight bits


def test_another_thread_interrupts_what_is_drawn(pipeline):
    """The button of a page has a thread of its own; what it set was lost."""
    seen = []

    def step(pipe, index, timestep, values):
        seen.append(index)
        if index == 1:
            button = threading.Thread(target=lambda: setattr(pipe, "_interrupt", True))
            button.start()
            button.join()
        return {}

    draw(pipeline, num_inference_steps=6, callback_on_step_end=step)
    assert seen == [0, 1] and pipeline.interrupt
    draw(pipeline, num_inference_steps=2)
    assert not pipeline.interrupt
    pipeline._interrupt = True  # nothing is drawn: nothing to stop
    seen.clear()
    draw(pipeline, num_inference_steps=2, callback_on_step_end=lambda *given: seen.append(given[1]) or {})
    assert seen == [0, 1]


def test_a_model_in_fp8_keeps_its_number_type(pipeline):
    """Half of it was made float32, and the next picture failed; `from_pipe` does that unasked."""
    torch.nn.Module.to(pipeline.transformer, torch.bfloat16)
    fp8.quantize_model(pipeline.transformer)
    before = draw(pipeline)
    with pytest.warns(UserWarning, match="FP8: the transformer stays in torch.bfloat16"):
        other = NitroEImg2ImgPipeline.from_pipe(pipeline)
    assert other.transformer.dtype == torch.bfloat16 and torch.equal(draw(pipeline), before)


def test_threads_draw_with_one_pipeline(tiny_pipeline):
    prompts = [STAR, "two blue squares"] * 2
    alone, together = [draw(tiny_pipeline, prompt, num_inference_steps=4) for prompt in prompts], {}

    def run(place):
        together[place] = draw(tiny_pipeline, prompts[place], num_inference_steps=4), tiny_pipeline.num_timesteps

    threads = [threading.Thread(target=run, args=[place]) for place in range(len(prompts))]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    for place, latents in enumerate(alone):
        torch.testing.assert_close(together[place][0], latents)
        assert together[place][1] == 4


# Names


def test_attention_backends_have_diffusers_names(pipeline, expected):
    for backend in ("native", "_native_math"):
        pipeline.transformer.set_attention_backend(backend)
        torch.testing.assert_close(draw(pipeline), expected, rtol=1e-4, atol=1e-5)
        assert pipeline.transformer.groups[0][0].attention.backend.value == backend
    pipeline.transformer.reset_attention_backend()
    diffusers.models.attention_dispatch._AttentionBackendRegistry.set_active_backend(
        diffusers.models.attention_dispatch.AttentionBackendName.NATIVE
    )
    with pytest.raises(ValueError, match="must be one of"):
        pipeline.transformer.set_attention_backend("auto")


def test_names_that_work_or_are_refused(pipeline, expected, tmp_path, monkeypatch):
    compiled = []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda module, **_: compiled.append(type(module).__name__))
    pipeline.transformer.compile_repeated_blocks()
    assert compiled == ["JointBlock"] * 4
    pipeline.enable_vae_tiling()
    assert pipeline.vae.use_tiling
    pipeline.disable_vae_tiling()
    with pytest.raises(ValueError, match="from_single_file: .*load_pipeline"):
        NitroEPipeline.from_single_file("model.safetensors")
    uploaded = []
    monkeypatch.setattr(
        "diffusers.utils.hub_utils.create_repo", lambda name, **_: type("Repo", (), {"repo_id": name})()
    )
    monkeypatch.setattr(
        "diffusers.utils.hub_utils.upload_folder",
        lambda repo_id, folder_path, **_: uploaded.extend(_files(folder_path)),
    )
    pipeline.push_to_hub("someone/tiny")
    assert {"README.md", "model_index.json", "transformer/diffusion_pytorch_model.safetensors"} <= set(uploaded)
    fp8.quantize_model(pipeline.transformer)
    pipeline.transformer.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="quantization_config: .* is in FP8 already"):
        type(pipeline.transformer).from_pretrained(tmp_path, quantization_config=object())
    with pytest.raises(ValueError, match="push_to_hub: a model in FP8"):
        pipeline.transformer.save_pretrained(tmp_path / "again", push_to_hub=True)


def _files(folder):
    from pathlib import Path

    return [path.relative_to(folder).as_posix() for path in Path(folder).rglob("*") if path.is_file()]


# Image to image


def test_image_to_image_begins_in_the_middle_of_the_grid(tiny_pipeline, expected):
    again = NitroEImg2ImgPipeline(**tiny_pipeline.components)
    again.set_progress_bar_config(disable=True)
    picture = tiny_pipeline(STAR, num_inference_steps=2, generator=torch.Generator().manual_seed(1)).images[0]
    clean = again.image_processor.preprocess(picture)
    from nitro_e_lite.inference.encoders import encode_images

    latents = encode_images(again.vae, clean, again.stats)
    gaps = []
    for strength in (0.1, 0.5, 1.0):
        options = {"image": picture, "strength": strength, "num_inference_steps": 10, "guidance_scale": 1.0}
        gaps.append((draw(again, **options) - latents).norm().item())
        assert again.num_timesteps == round(10 * strength)
    assert gaps == sorted(gaps)
    assert torch.equal(draw(again, image=picture, strength=1.0), expected)  # nothing of the picture is left
    clear = picture.convert("RGBA")
    assert torch.equal(draw(again, image=clear, strength=0.5), draw(again, image=picture, strength=0.5))
    numbers = np.asarray(picture)[None]  # (1, H, W, 3)
    for same in (numbers, numbers / np.float32(255), torch.tensor(numbers).permute(0, 3, 1, 2), [numbers[0]]):
        torch.testing.assert_close(draw(again, image=same, strength=0.5), draw(again, image=picture, strength=0.5))
    draw(again, image=picture, strength=0.58, num_inference_steps=50)
    assert again.num_timesteps == 29  # 50 x 0.58 is a little less in floating point
    pictures = again([STAR] * 2, [picture] * 2, num_inference_steps=2, num_images_per_prompt=2, output_type="pt").images
    assert pictures.shape == (4, 3, 64, 64)
    for options, message in [
        ({"image": picture, "strength": 0.0}, "strength: 0.0 is not above 0"),
        ({"image": [picture] * 3}, "image: 3 pictures for 1 prompts"),
        ({}, "image: expected a picture"),
        ({"image": numbers.astype(np.float32)}, "image: numbers from .* to 2.*; expected bytes"),
    ]:
        with pytest.raises((ValueError, TypeError), match=message):
            draw(again, **options)


def test_the_tiny_pipeline_is_as_it_was(tiny_pipeline, expected):
    """The tests above share its parts."""
    assert torch.equal(draw(build_tiny_pipeline()), expected) and torch.equal(draw(tiny_pipeline), expected)
