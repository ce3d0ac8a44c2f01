"""FP8: codes, policy, ladder, conversion, files, sensitivity; everything on the CPU."""

import copy
import dataclasses
import json

import pytest
import torch

from nitro_e_lite.cli.app import app
from nitro_e_lite.inference import loading
from nitro_e_lite.inference.fp8_pipeline import FP8Note, PromptSwitch, needs_16_bit, quantize_pipeline, read_rules
from nitro_e_lite.inference.hub import weights_hash
from nitro_e_lite.inference.loading import load_pipeline, load_transformer
from nitro_e_lite.model import fp8, fp8_codes, fp8_ladder, fp8_policy, fp8_sensitivity
from nitro_e_lite.model.emmdit import EMMDiTTransformer2DModel
from nitro_e_lite.model.flops import build_on_meta, model_config
from nitro_e_lite.model.fp8_codes import FN, FNUZ
from nitro_e_lite.model.fp8_ladder import Choice, Facts, choose_rung

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


# Codes


def test_a_row_is_scaled_to_its_largest_number_and_off_by_a_sixteenth_at_most():
    weight = torch.randn(64, 128, generator=torch.Generator().manual_seed(0)) * torch.logspace(-8, 8, 64)[:, None]
    codes, scale = fp8_codes.quantize(weight)
    assert codes.dtype == FN and scale.shape == (64, 1) and scale.dtype == torch.float32
    assert (codes.float().abs().amax(1) == 448).all()
    off = (fp8_codes.dequantize(codes, scale) - weight).abs()
    assert (off <= (weight.abs() / 16).maximum(scale * 2**-10) * 1.0001).all()  # half a step, or half the smallest
    assert fp8_codes.quantize(weight, "tensor")[1].shape == (1, 1)
    assert difference(fp8_codes.dequantize(*fp8_codes.quantize(weight, dtype=fp8_codes.E5M2)), weight) > 1.5 * (
        difference(fp8_codes.dequantize(codes, scale), weight)
    )


def test_rows_of_zeros_and_of_tiny_numbers_stay_what_they_are():
    """torchao divides by a scale of zero there, which gives NaN."""
    from torchao.quantization import Float8WeightOnlyConfig, quantize_

    weight = torch.randn(32, 32)
    weight[3], weight[4] = 0, 1e-39
    found = fp8_codes.dequantize(*fp8_codes.quantize(weight))
    assert found.isfinite().all() and (found[3] == 0).all() and (found[4].abs() < 1e-37).all()
    layer = torch.nn.Linear(32, 32)
    layer.weight.data = weight
    quantize_(layer, Float8WeightOnlyConfig())
    assert layer.weight.dequantize().isnan()[3].all()  # when this fails, torchao is mended


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_is_refused(value):
    weight = torch.ones(16, 16)
    weight[2, 3] = value
    with pytest.raises(FloatingPointError, match="NaN or infinity"):
        fp8_codes.quantize(weight)


def test_other_number_types_and_granularities_are_refused():
    with pytest.raises(ValueError, match="not to torch.float8_e4m3fnuz; see to_fnuz"):
        fp8_codes.quantize(torch.ones(16, 16), dtype=FNUZ)
    with pytest.raises(ValueError, match="granularity: 'column' is not one of row, tensor"):
        fp8_codes.quantize(torch.ones(16, 16), "column")


def test_every_fn_code_becomes_the_fnuz_code_of_the_same_value_and_back():
    every = torch.arange(256, dtype=torch.uint8).view(16, 16)
    scale = torch.rand(16, 1) + 0.5
    finite = every.masked_fill((every & 0x7F) == 0x7F, 0).view(FN)
    codes, doubled = fp8_codes.to_fnuz(finite, scale)
    assert codes.dtype == FNUZ and not (codes.view(torch.uint8) == 0x80).any()
    torch.testing.assert_close(
        fp8_codes.dequantize(codes, doubled), fp8_codes.dequantize(finite, scale), rtol=0, atol=0
    )
    back, halved = fp8_codes.to_fn(codes, doubled)
    assert torch.equal(halved, scale) and torch.equal(back.float(), finite.float())
    same_bytes = finite.view(torch.uint8).masked_fill(finite.view(torch.uint8) == 0x80, 0).view(FNUZ)
    assert torch.equal(same_bytes.float() * 2, finite.float())  # what goes wrong when bytes are passed on as they are


@pytest.mark.parametrize("code", [0x7F, 0x80, 0xFF])
def test_codes_without_a_counterpart_are_refused(code):
    codes, scale = torch.full((1, 16), code, dtype=torch.uint8), torch.ones(1, 1)
    with pytest.raises(ValueError, match="240 or NaN"):
        fp8_codes.to_fn(codes.view(FNUZ), scale)
    if code != 0x80:
        with pytest.raises(ValueError, match="NaN in float8_e4m3fn"):
            fp8_codes.to_fnuz(codes.view(FN), scale)
    with pytest.raises(ValueError, match="expected torch.float8_e4m3fn, got"):
        fp8_codes.to_fnuz(codes.view(FNUZ), scale)


def damage(tensors, name):
    codes, scale = torch.zeros(16, 16).to(FN), torch.ones(16, 1)
    if name == "fnuz":
        tensors["a"] = codes.to(FNUZ)
    elif name == "no scale":
        del tensors["a_scale"]
    elif name == "shape":
        tensors["a_scale"] = scale[:3]
    elif name == "negative":
        tensors["a_scale"] = -scale
    elif name == "nan":
        tensors["a"] = torch.full((16, 16), 0x7F, dtype=torch.uint8).view(FN)


@pytest.mark.parametrize(
    ("name", "message"),
    {
        "fnuz": "files hold torch.float8_e4m3fn",
        "no scale": "has no scale",
        "shape": r"has scales \(3, 1\)",
        "negative": "not a positive number",
        "nan": "a holds NaN",
        "facts": "does not say what its codes mean",
        "bytes": "damaged or no safetensors file",
    }.items(),
)
def test_a_file_that_does_not_say_what_it_holds_is_refused(tmp_path, name, message):
    from safetensors.torch import save_file

    tensors = {"a": torch.zeros(16, 16).to(FN), "a_scale": torch.ones(16, 1)}
    damage(tensors, name)
    path = tmp_path / "x.safetensors"
    save_file(tensors, path, metadata={} if name == "facts" else {"fp8": "{}"})
    if name == "bytes":
        path.write_bytes(path.read_bytes()[:50])
    with pytest.raises(ValueError, match=message):
        fp8_codes.read_file(path)


def test_fnuz_codes_never_go_into_a_file(tmp_path):
    with pytest.raises(ValueError, match="does not go into a file"):
        fp8_codes.write_file(tmp_path / "x.safetensors", {"a": torch.zeros(16, 16).to(FNUZ)}, {})
    assert list(tmp_path.iterdir()) == []


# Policy


def linears(model):
    return {name: layer for name, layer in model.named_modules() if isinstance(layer, torch.nn.Linear)}


def test_every_rule_of_a_policy_fits_a_layer(sd3):
    ours, names = (
        fp8_policy.POLICIES["EMMDiTTransformer2DModel"],
        {**linears(build()), **linears(build(modulation="adaln"))},
    )
    for policy, layers in ((ours, names), (fp8_policy.POLICIES["SD3Transformer2DModel"], linears(sd3.transformer))):
        used = {policy.of(name) for name in layers}
        assert used >= set(policy.rules)
        assert all(rule.why for rule in used)


def test_policies_are_data():
    policy = fp8_policy.POLICIES["EMMDiTTransformer2DModel"]
    assert fp8_policy.Policy.from_dict(json.loads(json.dumps(policy.to_dict()))) == policy
    with pytest.raises(ValueError, match="precision: '8' is not one of fp8, weight, 16"):
        fp8_policy.Rule("x", "8", "")
    with pytest.raises(ValueError, match="activations: 'e3m4'"):
        fp8_policy.Policy(activations="e3m4")
    with pytest.raises(ValueError, match="no FP8 policy for Linear .*; give policy="):
        fp8_policy.policy_for(torch.nn.Linear(2, 2))


# Ladder

H100, A100 = Facts("cuda", "H100", capability=(9, 0)), Facts("cuda", "A100", capability=(8, 0))
ADA, MPS = Facts("cuda", "RTX 4090", capability=(8, 9)), Facts("mps", "mps")
MI300, MI350, MI250 = (Facts("cuda", f"MI{n}", arch=a) for n, a in ((300, "gfx942"), (355, "gfx950"), (250, "gfx90a")))


def works(*_):
    return None


@pytest.mark.parametrize(
    ("facts", "rung", "reason"),
    [
        (H100, "dynamic", None),
        (ADA, "dynamic", None),
        (MI300, "dynamic", None),
        (MI350, "dynamic", None),
        (Facts("xpu", "xpu"), "dynamic", None),
        (A100, "weight_only", "A100 has compute capability 8.0; FP8 products need 8.9"),
        (MI250, "weight_only", "MI250 is a gfx90a; FP8 products need gfx942"),
        (MPS, "weight_only", "no FP8 products for mps"),
        (Facts("cpu", "cpu"), "weight_only", "hundreds of times slower"),
    ],
)
def test_the_first_rung_that_the_hardware_can_do(facts, rung, reason):
    choice = choose_rung("cpu", facts=facts, try_out=works)
    assert choice.rung == rung and choice.fnuz == (facts is MI300)
    assert choice.reasons == () if reason is None else reason in choice.reasons[0]


@pytest.mark.parametrize("kind", ["cuda", "xpu"])
def test_products_of_intels_gpus_add_up_in_full(kind):
    tried = []
    facts = Facts(kind, kind, capability=(9, 0) if kind == "cuda" else None)
    choose_rung("cpu", facts=facts, try_out=lambda device, choice, dtype: tried.append(choice))
    assert [choice.rung for choice in tried] == ["dynamic"] and tried[0].fast_accum == (kind == "cuda")
    codes, scale = fp8.quantize(torch.eye(16))
    weight = fp8_ladder.wrap(codes, scale, torch.bfloat16, fp8.Policy(), tried[0], dynamic=True)
    assert weight.mm_config.use_fast_accum == (kind == "cuda")


def test_each_step_down_has_its_reason():
    def fails(device, choice, dtype):
        return f"no {choice.rung} kernel"

    choice = choose_rung("cpu", facts=H100, try_out=fails)
    assert choice == Choice("bf16", ("not dynamic: no dynamic kernel", "not weight_only: no weight_only kernel"))
    half = choose_rung("cpu", torch.float32, facts=H100, try_out=works)
    assert half.rung == "weight_only" and "torch.float32 was asked for" in half.reasons[0]


def test_a_small_product_decides(monkeypatch):
    cpu = torch.device("cpu")
    for rung in ("dynamic", "weight_only"):  # torch can multiply FP8 on a CPU; it is only slow
        assert fp8_ladder.try_product(cpu, Choice(rung), torch.bfloat16) is None
    right = fp8_ladder.wrap
    monkeypatch.setattr(fp8_ladder, "wrap", lambda codes, scale, *rest, **more: right(codes, scale * 2, *rest, **more))
    assert "came out wrong by 100%" in fp8_ladder.try_product(cpu, Choice("weight_only"), torch.bfloat16)

    def broken(*_, **__):
        raise RuntimeError("no kernel\nfor this device")

    monkeypatch.setattr(fp8_ladder, "wrap", broken)
    assert fp8_ladder.try_product(cpu, Choice("dynamic"), torch.bfloat16) == "RuntimeError: no kernel for this device"
    assert choose_rung("cpu").rung == "bf16"


# Conversion


def test_every_linear_layer_is_converted_kept_or_skipped_and_counted():
    model = build()
    with torch.no_grad():
        expected = model(*inputs()).sample
    report = fp8.quantize_model(model)
    assert report.rung == "weight_only" and report is model.fp8_report
    groups = [set(report.converted), set(report.kept), set(report.skipped)]
    assert set.union(*groups) == set(linears(model)) and sum(map(len, groups)) == len(linears(model))
    assert set(report.skipped) == {"reconstructor.paths.1.0"}  # 64 / 16 = 4 inputs
    assert "(64, 4) are not multiples of 16" in report.skipped["reconstructor.paths.1.0"]
    assert "1 skipped (reconstructor.paths.1.0" in report.summary() and "not dynamic" in report.summary()
    assert {name for name, layer in linears(model).items() if fp8.is_fp8(layer.weight)} == set(report.converted)
    assert {"patch_embed", "proj_out", "reconstructor.merge.0"} < set(report.kept)
    with torch.no_grad():
        found = model(*inputs()).sample
    assert found.dtype == torch.bfloat16 and 0 < difference(found, expected) < 0.05
    assert model.dtype == torch.bfloat16
    json.dumps(report.to_dict())


def test_a_student_that_is_told_guidance_goes_into_fp8():
    model, strength = build(guidance_embedding=True, dense_time=True), {"guidance": 3.0}
    with torch.no_grad():
        expected = model(*inputs(), **strength).sample
        report = fp8.quantize_model(model)
        found = model(*inputs(), **strength).sample
    assert 0 < difference(found, expected) < 0.05
    told = {name for name in linears(model) if ".guide" in name}
    assert told and all(name in report.kept or report.converted[name] == "weight" for name in told)


def test_weights_multiply_as_codes_times_scales():
    model = build(torch.float32)
    before = copy.deepcopy(model)
    fp8.quantize_model(model)
    for name, layer in linears(before).items():
        if name in model.fp8_report.converted:
            layer.weight.data = fp8_codes.dequantize(*fp8_codes.quantize(layer.weight))
    with torch.no_grad():
        torch.testing.assert_close(model(*inputs(torch.float32)).sample, before(*inputs(torch.float32)).sample)


def test_dynamic_rounds_activations_too_except_where_the_policy_says_weights_only():
    """On a CPU torch multiplies FP8 numbers slowly, but rightly."""
    weight_only, dynamic = build(), build()
    fp8.quantize_model(weight_only, choice=Choice("weight_only"))
    report = fp8.quantize_model(dynamic, choice=Choice("dynamic"))
    rounds = {n for n, layer in linears(dynamic).items() if getattr(layer.weight, "act_quant_kwargs", None) is not None}
    assert rounds == {name for name, precision in report.converted.items() if precision == "fp8"}
    assert "time_embed.project" in report.converted and "time_embed.project" not in rounds
    with torch.no_grad():
        exact, found = weight_only(*inputs()).sample, dynamic(*inputs()).sample
        assert 0 < difference(found, exact) < 0.1
        layer, rows = dynamic.groups[0][0].image.mlp.up, torch.randn(5, 64).bfloat16()
        weight = layer.weight.dequantize(torch.float32)
        by_hand = fp8_codes.dequantize(*fp8_codes.quantize(rows)) @ weight.T + layer.bias.float()
        assert difference(layer(rows), by_hand) < 0.012  # torchao divides by the scale in bfloat16
        assert difference(by_hand, rows.float() @ weight.T + layer.bias.float()) > 0.02


def test_e5m2_activations_are_less_precise():
    model, rows = build(), torch.randn(64, 64).bfloat16()
    layer = model.groups[0][0].image.mlp.up
    fp8.quantize_model(model)
    with torch.no_grad():
        expected, errors = layer(rows), []
        for activations in ("e4m3", "e5m2"):
            policy = dataclasses.replace(fp8_policy.policy_for(model), activations=activations)
            fp8.set_rung(model, Choice("dynamic"), policy)
            errors.append(difference(layer(rows), expected))
    assert errors[1] > 1.5 * errors[0]


def test_tokens_of_zeros_stay_zeros_in_dynamic_fp8():
    """torchao's own configuration divides by their scale of zero; padding and empty text features are such tokens."""
    model = build()
    fp8.quantize_model(model, choice=Choice("dynamic"))
    layer, rows = model.text_embed, torch.zeros(4, 32).bfloat16()
    with torch.no_grad():
        assert torch.equal(layer(rows), layer.bias.expand(4, -1))


@pytest.mark.parametrize("rung", ["weight_only", "dynamic"])
def test_fnuz_hardware_multiplies_by_the_same_numbers(rung):
    model, fnuz = build(), build()
    fp8.quantize_model(model, choice=Choice("weight_only"))
    fp8.quantize_model(fnuz, choice=Choice(rung, fnuz=True))
    for name, weight in fp8.plain_tensors(model).items():
        assert torch.equal(weight.float(), fp8.plain_tensors(fnuz)[name].float()), name
    weight = fnuz.text_embed.weight
    assert weight.qdata.dtype == FNUZ and torch.equal(weight.dequantize(), model.text_embed.weight.dequantize())
    if rung == "dynamic":
        assert weight.act_quant_kwargs.float8_dtype == FNUZ
    else:
        with torch.no_grad():
            assert torch.equal(model(*inputs()).sample, fnuz(*inputs()).sample)


def test_bf16_is_the_model_as_it_was():
    model = build()
    before = copy.deepcopy(model.state_dict())
    report = fp8.quantize_model(model, choice=Choice("bf16", ("not dynamic: x", "not weight_only: y")))
    assert report.converted == {} and report.reasons == ("not dynamic: x", "not weight_only: y")
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert report.bytes.ratio == 1


def test_a_model_moves_between_rungs_with_the_same_codes():
    model = build()
    fp8.quantize_model(model, choice=Choice("dynamic"))
    codes = fp8.plain_tensors(model)
    for choice in (Choice("weight_only"), Choice("dynamic", fnuz=True), Choice("weight_only")):
        fp8.set_rung(model, choice)
        assert all(torch.equal(v.float(), codes[n].float()) for n, v in fp8.plain_tensors(model).items())
    report = fp8.set_rung(model, Choice("bf16"))
    assert not fp8.is_quantized(model) and report.converted == {} and report.bytes.ratio == 1


def test_what_is_in_fp8_is_refused():
    model = build()
    fp8.quantize_model(model)
    with pytest.raises(ValueError, match="in FP8 already"):
        fp8.quantize_model(model)


def test_a_weight_that_is_not_finite_leaves_the_model_as_it_was():
    model = build()
    model.groups[2][0].image.mlp.down.weight.data[0, 0] = float("nan")
    with pytest.raises(FloatingPointError):
        fp8.quantize_model(model)
    assert not fp8.is_quantized(model)


def test_lora_is_merged_first_or_refused():
    from peft import LoraConfig, get_peft_model

    model = build()
    wrapped = get_peft_model(model, LoraConfig(r=2, target_modules=["qkv", "out"], init_lora_weights=False))
    with pytest.raises(ValueError, match=r"LoRA layers .*merge them first"):
        fp8.quantize_model(wrapped.base_model.model)
    merged = wrapped.merge_and_unload()
    exact = copy.deepcopy(merged)
    fp8.quantize_model(merged)
    with torch.no_grad():
        expected, base = exact(*inputs()).sample, build()(*inputs()).sample
        assert difference(merged(*inputs()).sample, expected) < 0.3 * difference(base, expected)


def test_parametrised_layers_are_skipped_by_name():
    model = build()
    torch.nn.utils.parametrizations.weight_norm(model.text_embed)
    assert "parametrisation" in fp8.quantize_model(model).skipped["text_embed"]


# Bytes and files


@pytest.mark.parametrize("size", ["lite", "full"])
def test_half_the_bytes(size):
    """The bar: at most 0.53 of bf16's bytes, the position table apart; on the meta device."""
    model = build_on_meta(model_config(size)).to(torch.bfloat16)
    report = fp8.quantize_model(model, choice=Choice("weight_only"))
    count = report.bytes
    print(f"{size}: {count.ratio:.4f} of bf16 in memory; {count}; {report.summary()}")
    assert count.ratio <= 0.53
    assert count.bf16 == 2 * sum(p.numel() for p in model.parameters()) and count.buffers == model.positions.nbytes
    rest = fp8.sixteen_bit(model)
    assert sum(rest.values()) == count.rest and {f"{name}.weight" for name in report.kept} < set(rest)


def test_the_lite_file_holds_half_the_bytes(tmp_path):
    model = load_transformer("lite").to(torch.bfloat16)
    report = fp8.quantize_model(model)
    count = fp8.file_bytes(fp8.save(model, tmp_path))
    print(f"file: {count.ratio:.4f} of bf16; {count}")
    assert count.ratio <= 0.53
    assert dataclasses.replace(count, rest=0) == dataclasses.replace(report.bytes, rest=0)  # the rest has a header
    assert (tmp_path / fp8.FILE).stat().st_size == count.codes + count.scales + count.rest + count.buffers


@pytest.mark.parametrize("fnuz", [False, True])
def test_saved_and_loaded_again(tmp_path, fnuz):
    model = build()
    fp8.quantize_model(model, choice=Choice("weight_only", fnuz=fnuz))
    model.save_pretrained(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", fp8.FILE]
    tensors, about = fp8_codes.read_file(tmp_path / fp8.FILE)
    assert {t.dtype for t in tensors.values()} == {FN, torch.float32, torch.bfloat16} and about["dtype"] == "bfloat16"
    again = EMMDiTTransformer2DModel.from_pretrained(tmp_path)
    assert not again.training and again.fp8_report.policy == model.fp8_report.policy
    assert again.fp8_report.converted == model.fp8_report.converted and again.positions.dtype == torch.bfloat16
    with torch.no_grad():
        assert torch.equal(again(*inputs()).sample, model(*inputs()).sample)
    whole = EMMDiTTransformer2DModel.from_pretrained(tmp_path, dtype=torch.float32)
    with torch.no_grad():
        assert difference(whole(*inputs(torch.float32)).sample, again(*inputs()).sample) < 0.02


def test_official_files_go_into_fp8(tmp_path):
    """Names and shapes of the official layout come in by `load_official`; the codes are those of the same model."""
    from nitro_e_lite.model.official_weights import load_official, save_official

    model = build()
    save_official(model, tmp_path / "official.safetensors")
    config = {"in_channels": 4, "out_channels": 4, "num_attention_heads": 2, "attention_head_dim": 32, "num_layers": 4}
    config |= {"caption_channels": 32, "caption_projection_dim": 64}
    official = load_official(tmp_path / "official.safetensors", **config)
    fp8.quantize_model(official)
    fp8.quantize_model(model)
    assert official.fp8_report.converted == model.fp8_report.converted
    with torch.no_grad():
        found, expected = official(*inputs()).sample, build()(*inputs()).sample
    assert 0 < difference(found, expected) < 0.05
    codes = fp8.plain_tensors(model)
    assert all(torch.equal(v.float(), codes[n].float()) for n, v in fp8.plain_tensors(official).items())


def test_a_folder_holds_one_kind_of_weights(tmp_path):
    model = build()
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="holds no FP8 weights"):
        fp8.save(model, tmp_path / "other")
    fp8.quantize_model(model)
    with pytest.raises(FileExistsError, match="would be read instead"):
        model.save_pretrained(tmp_path)


def test_a_file_for_another_model_or_format_is_refused(tmp_path, monkeypatch):
    model = build()
    fp8.quantize_model(model)
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="does not fit the model, see groups"):
        fp8.load(build(mlp_ratio=2.0), tmp_path)
    tensors, about = fp8_codes.read_file(tmp_path / fp8.FILE)
    fp8_codes.write_file(tmp_path / fp8.FILE, tensors, {**about, "policy": {}})
    with pytest.raises(ValueError, match="metadata cannot be read"):
        fp8.load(build(), tmp_path)
    monkeypatch.setattr(fp8, "FORMAT", 2)
    with pytest.raises(ValueError, match="format 1; this version reads 2"):
        EMMDiTTransformer2DModel.from_pretrained(tmp_path)


# Sensitivity


def test_one_layer_at_a_time_and_everything_as_before():
    model = build(torch.float32)
    with torch.no_grad():
        codes, scale = fp8_codes.quantize(model.text_embed.weight)
        model.text_embed.weight.copy_(fp8_codes.dequantize(codes, 2 ** scale.log2().round()))  # needs no rounding
    before = copy.deepcopy(model.state_dict())
    with fp8_sensitivity.recorded_calls(model) as calls, torch.no_grad():
        model(*inputs(torch.float32))
    found = {one.name: one for one in fp8_sensitivity.sensitivity(model, calls)}
    assert list(found) == list(linears(model)) and len(calls) == 1 and not model._forward_pre_hooks
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert found["text_embed"].weight < 1e-3 < found["patch_embed"].weight and found["text_embed"].activation > 1e-4
    assert sum(one.share for one in found.values()) == pytest.approx(
        sum(layer.weight.numel() for layer in linears(model).values()) / sum(p.numel() for p in model.parameters())
    )
    roles = fp8_sensitivity.sensitivity(model, calls, lambda n: n.split(".")[0] if n.startswith("groups") else None)
    assert [(one.name, one.layers) for one in roles] == [("groups", 29)]
    with pytest.raises(ValueError, match="record some with recorded_calls"):
        fp8_sensitivity.sensitivity(model, [])


def test_e5m2_activations_move_the_output_further():
    model = build(torch.float32)
    with fp8_sensitivity.recorded_calls(model) as calls, torch.no_grad():
        model(*inputs(torch.float32))
    e4m3, e5m2 = (
        fp8_sensitivity.sensitivity(model, calls, lambda _: "all", fp8_policy.Policy(activations=kind))[0]
        for kind in ("e4m3", "e5m2")
    )
    assert e5m2.activation > 1.5 * e4m3.activation and e5m2.weight == e4m3.weight


# Pipelines


def draw(pipeline, prompts="two red stars", seeds=(0,), **options):
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    return pipeline(prompts, num_inference_steps=2, generator=generators, output_type="pt", **options).images


def frozen(pipeline, *parts):
    return {part: {n: v.clone() for n, v in getattr(pipeline, part).state_dict().items()} for part in parts}


def same(pipeline, before):
    for part, values in before.items():
        now = getattr(pipeline, part).state_dict()
        assert list(now) == list(values)
        assert all(torch.equal(now[n], v) and now[n].dtype == v.dtype for n, v in values.items()), part


def test_load_pipeline_in_fp8_says_why_and_touches_the_transformer_alone(tiny_folder, tmp_path):
    exact = load_pipeline(tiny_folder, "cpu", "bfloat16")
    with pytest.warns(FP8Note) as notes:
        pipeline = load_pipeline(tiny_folder, "cpu", quantization="fp8")
    assert [str(note.message).split(",")[1].strip() for note in notes] == [
        "not dynamic: a CPU multiplies FP8 numbers hundreds of times slower than 16-bit ones",
        "layers that stay in 16 bit although the policy wants them in FP8: 2",
    ]
    assert pipeline.transformer.dtype == pipeline.vae.dtype == torch.bfloat16
    same(pipeline, frozen(exact, "vae", "text_encoder"))
    assert 0 < difference(draw(pipeline), draw(exact)) < 0.05
    pipeline.save_pretrained(tmp_path / "saved")
    with pytest.warns(FP8Note):
        again = load_pipeline(tmp_path / "saved", "cpu")
    assert torch.equal(draw(again), draw(pipeline))
    names = [weights_hash({"transformer": one.transformer}) for one in (again, pipeline, exact)]
    assert names[0] == names[1] != names[2]
    with pytest.raises(ValueError, match="is in FP8, rounded for drawing"):
        load_transformer(tmp_path / "saved")
    with pytest.raises(ValueError, match="lora: .* is in FP8; merge it into the 16-bit weights"):
        load_pipeline(tmp_path / "saved", "cpu", lora=tmp_path)
    with pytest.raises(ValueError, match="quantization: 'int4' is not 'fp8'"):
        load_pipeline(tiny_folder, "cpu", quantization="int4")


def test_a_lora_is_merged_before_the_weights_are_rounded(tiny_folder, monkeypatch):
    order = []
    monkeypatch.setattr(loading, "merge_lora", lambda model, folder: order.append(fp8.is_quantized(model)))
    with pytest.warns(FP8Note):
        pipeline = load_pipeline(tiny_folder, "cpu", quantization="fp8", lora="somewhere")
    assert order == [False] and fp8.is_quantized(pipeline.transformer)


def test_layerwise_casting_in_a_pipeline(tiny_folder):
    pipeline = load_pipeline(tiny_folder, "cpu")
    expected = draw(pipeline)
    pipeline.transformer.enable_layerwise_casting(storage_dtype=FN, compute_dtype=torch.float32)
    assert 0 < difference(draw(pipeline), expected) < 0.05


@pytest.fixture(scope="module")
def sd3_parts(tiny_pipeline):
    from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection

    torch.manual_seed(0)
    tokenizer = copy.deepcopy(tiny_pipeline.tokenizer)
    tokenizer.model_max_length = 16
    text = CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=16, projection_dim=32, bos_token_id=1, eos_token_id=0, pad_token_id=0,
    )  # fmt: skip
    return {
        "transformer": SD3Transformer2DModel(
            sample_size=8,
            patch_size=1,
            in_channels=4,
            num_layers=2,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=64,
            caption_projection_dim=32,
            pooled_projection_dim=64,
            out_channels=4,
        ),  # fmt: skip
        "vae": AutoencoderKL(
            sample_size=16,
            block_out_channels=(8,),
            layers_per_block=1,
            latent_channels=4,
            norm_num_groups=1,
            use_quant_conv=False,
            use_post_quant_conv=False,
            shift_factor=0.06,
            scaling_factor=1.5,
        ),  # fmt: skip
        "text_encoder": CLIPTextModelWithProjection(text).eval(),
        "text_encoder_2": CLIPTextModelWithProjection(text).eval(),
        "text_encoder_3": None,
        "tokenizer": tokenizer,
        "tokenizer_2": tokenizer,
        "tokenizer_3": None,
        "scheduler": FlowMatchEulerDiscreteScheduler(),
    }


@pytest.fixture
def sd3(sd3_parts):
    from diffusers import StableDiffusion3Pipeline

    pipeline = StableDiffusion3Pipeline(**copy.deepcopy(sd3_parts)).to(torch.bfloat16)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


SIZE = {"height": 8, "width": 8, "guidance_scale": 4.0}


def test_the_same_policy_in_diffusers_own_sd3_pipeline(sd3):
    expected = draw(sd3, "a red star", **SIZE)
    before = frozen(sd3, "vae", "text_encoder", "text_encoder_2")
    with pytest.warns(FP8Note, match="not dynamic"):
        report = quantize_pipeline(sd3)
    same(sd3, before)
    assert report.rung == "weight_only" and report.skipped == {}
    assert report.converted["transformer_blocks.0.norm1.linear"] == "weight"
    assert report.converted["transformer_blocks.0.ff.net.2"] == "fp8"
    assert {"proj_out", "norm_out.linear", "context_embedder"} < set(report.kept)
    assert 0 < difference(draw(sd3, "a red star", **SIZE), expected) < 0.05
    fp8.set_rung(sd3.transformer, Choice("dynamic"))  # the missing third text encoder gives tokens of zeros
    assert difference(draw(sd3, "a red star", **SIZE), expected) < 0.1


def test_sd3_is_saved_and_loaded_again(sd3, tmp_path):
    converted = fp8.quantize_model(sd3.transformer).converted
    expected = draw(sd3, "a red star", **SIZE)
    fp8.save(sd3.transformer, tmp_path)
    again = type(sd3.transformer).from_config(sd3.transformer.load_config(tmp_path))
    report = fp8.load(again, tmp_path)
    sd3.transformer = again.eval()
    assert report.policy == fp8_policy.policy_for(again) and report.converted == converted
    assert torch.equal(draw(sd3, "a red star", **SIZE), expected)


def test_sd3_falls_back_with_the_same_reasons(sd3, monkeypatch):
    monkeypatch.setattr(fp8_ladder, "try_product", lambda *_: "no kernel")
    expected = draw(sd3, "a red star", **SIZE)
    with pytest.warns(FP8Note) as notes:
        report = quantize_pipeline(sd3)
    assert report.rung == "bf16" and [str(note.message) for note in notes] == [f"FP8, {r}" for r in report.reasons]
    assert torch.equal(draw(sd3, "a red star", **SIZE), expected)


def test_pipelines_without_a_transformer_are_refused():
    class Unet:
        pass

    with pytest.raises(ValueError, match="Unet has no transformer; FP8 is for diffusion transformers"):
        quantize_pipeline(Unet())


# The switch


@pytest.mark.parametrize(
    ("prompt", "rule"),
    [
        ("Portrait of a fox", "portrait"),
        ("portraits", "portrait"),
        ("a sign that says hello", "text"),
        ("TEXT on a wall", "text"),
        ("a rough texture", None),
        ("a surface", None),
        ("a red circle above a blue square", None),
        ("the logo of a bakery", "logo"),
    ],
)
def test_rules_of_the_switch(prompt, rule):
    assert needs_16_bit(prompt, read_rules()) == rule


@pytest.mark.parametrize("text", ["{", "{}", '{"rules": {}}', '{"rules": {"a": []}}', '{"rules": {"a": ["*"]}}'])
def test_rules_of_another_form_are_refused(tmp_path, text):
    (tmp_path / "rules.json").write_text(text)
    with pytest.raises(ValueError, match="rules.json"):
        read_rules(tmp_path / "rules.json")


def test_captions_of_some_kinds_are_drawn_in_16_bit(sd3):
    exact = copy.deepcopy(sd3)
    captions, seeds = ["a red star", "portrait of a star", "two circles", "a logo"], (0, 1, 2, 3)
    expected = draw(exact, captions, seeds, **SIZE)
    with pytest.warns(FP8Note):
        switch = PromptSwitch(sd3)
    found = draw(switch, captions, seeds, **SIZE)
    assert switch.drawn == [None, "portrait", None, "logo"] and sd3.transformer is switch.fast
    close = [difference(a, b) for a, b in zip(found, expected, strict=True)]
    assert max(close[1], close[3]) < 0.02 and min(close[0], close[2]) > 0
    alone = draw(switch, captions[1], (1,), **SIZE)
    assert torch.equal(alone, draw(exact, captions[1], (1,), **SIZE)) and sd3.transformer is switch.fast
    twice = [0, 0, 1, 1, 2, 2, 3, 3]
    many = draw(switch, captions, twice, num_images_per_prompt=2, negative_prompt=["blue"] * 4, **SIZE)
    assert len(many) == 8 and torch.allclose(many[2].float(), many[3].float(), atol=0.05)
    with pytest.raises(ValueError, match="generator: .*give a list, one each"):
        switch(captions, generator=torch.Generator())
    with pytest.raises(ValueError, match="prompt: the switch reads captions"):
        switch(None)
    with pytest.raises(ValueError, match="in FP8 already; the switch needs"):
        PromptSwitch(sd3)


# Commands


def command(capfd, *words):
    from typer.testing import CliRunner

    found = CliRunner().invoke(app, [*words, "--json"])
    return found.exit_code, json.loads(found.stdout) if found.exit_code == 0 else found.output


def test_sample_in_fp8(shipped, tmp_path, capfd):
    code, result = command(capfd, "sample", "two red stars", "--fp8", "--steps", "1", "--out", str(tmp_path / "a.png"))
    assert code == 0 and result["fp8"] == "weight_only" and result["dtype"] == "bfloat16"
    from PIL import Image

    assert Image.open(tmp_path / "a.png").text["fp8"] == "weight_only"
    words = [
        "sample",
        "a red star",
        "portrait of a star",
        "--steps",
        "1",
        "--out",
        str(tmp_path / "b"),
        "--prompt-switch",
    ]
    code, result = command(capfd, *words, "--fp8")
    assert code == 0 and result["exact"] == [None, "portrait"]
    texts = [Image.open(row["path"]).text for row in result["images"]]
    assert [text.get("16 bit") for text in texts] == [None, "portrait"]
    code, output = command(capfd, *words)
    assert code == 2 and "give --fp8 as well" in output


def test_a_score_of_a_model_in_fp8_says_so(shipped, tmp_path, capfd):
    from nitro_e_lite.scenes.geneval import load_prompts

    (tmp_path / "one.jsonl").write_text(json.dumps(load_prompts()[0].metadata()) + "\n")
    words = ["evaluate", "--prompts", str(tmp_path / "one.jsonl"), "--steps", "1", "--seeds", "1", "--fp8"]
    code, card = command(capfd, *words)
    assert code == 0 and card["fp8"] == "weight_only" and card["dtype"] == "bfloat16" and card["verdicts"] in ("0", "1")
    assert card["psnr"]["pictures"] == 1 and 20 < card["psnr"]["median"] < 99  # near 16 bit, and not the same
    exact = load_transformer("lite").to(torch.bfloat16)
    assert 0.5 < card["transformer_bytes"] / fp8.count_bytes(exact).total < 0.9


def test_doctor_finds_a_torch_that_cannot_see_the_amd_gpu(monkeypatch, tmp_path):
    from nitro_e_lite.cli import doctor

    monkeypatch.setattr(doctor, "AMD_DRIVER", tmp_path)
    for build, problems in ((None, 1), ("7.2", 0)):
        monkeypatch.setattr(torch.version, "hip", build)
        found = doctor.diagnose()
        assert sum("not built for ROCm" in one for one in found["problems"]) == problems == (not found["ok"])


def test_doctor_names_the_rung_and_why(capfd):
    from nitro_e_lite.cli.doctor import diagnose

    found = diagnose()["fp8"]
    if torch.accelerator.is_available():
        assert found["rung"] in fp8_ladder.RUNGS
    else:
        assert found["rung"] == "weight_only" and "hundreds of times slower" in found["reasons"][0]
