"""The official layout: round trips bit for bit, nothing skipped in silence; LoRA merges as PEFT merges."""

import json

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from test_golden import FILES, official_file
from torch import nn

from nitro_e_lite.model.emmdit import EMMDiTTransformer2DModel
from nitro_e_lite.model.official_weights import load_official, merge_lora, official_names, save_official

TARGETS = "to_q to_k to_v to_out.0 add_q_proj add_k_proj add_v_proj to_add_out".split()


def tiny(**config):
    torch.manual_seed(0)
    config = {
        "num_attention_heads": 2, "attention_head_dim": 16, "in_channels": 4, "caption_channels": 8,
        "block_groups": (1, 2, 1), "pos_embed_max_size": 16,
    } | config  # fmt: skip
    return EMMDiTTransformer2DModel(**config)


def reference_config(model):
    names = (
        "sample_size patch_size in_channels attention_head_dim num_attention_heads caption_channels pos_embed_max_size"
    )
    config = {name: model.config[name] for name in names.split()}
    width = config["num_attention_heads"] * config["attention_head_dim"]
    return config | {
        "num_layers": sum(model.config.block_groups), "out_channels": config["in_channels"],
        "caption_projection_dim": width,
    }  # fmt: skip


@pytest.mark.parametrize("name", FILES)
def test_round_trip_bit_for_bit(name, tmp_path):
    path, config, _ = official_file(name, tmp_path)
    save_official(load_official(path, **config), tmp_path / "again.safetensors")
    first, again = load_file(path), load_file(tmp_path / "again.safetensors")
    assert first.keys() == again.keys()
    assert all(torch.equal(first[key], again[key]) for key in first)


@pytest.mark.parametrize("patch_size, dtype", [(1, torch.bfloat16), (2, torch.float32)])
def test_our_model_survives_the_official_layout(patch_size, dtype, tmp_path):
    model = tiny(patch_size=patch_size).to(dtype)
    save_official(model, tmp_path / "model.safetensors")
    again = load_official(tmp_path / "model.safetensors", **reference_config(model))
    assert again.config.block_groups == (1, 2, 1)
    ours, theirs = model.state_dict(), again.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) and ours[key].dtype == theirs[key].dtype for key in ours)


def test_missing_left_over_and_misshapen_weights_are_named(tmp_path):
    path, config, _ = official_file(FILES[0], tmp_path)
    weights = load_file(path)
    gone = {key for key in weights if key.startswith("block_groups.0.3.")} | {"proj_out.bias"}
    broken = {key: tensor for key, tensor in weights.items() if key not in gone}
    broken["stranger"] = torch.zeros(1)
    broken["proj_out.weight"] = torch.zeros(3, 3)
    save_file(broken, path)
    with pytest.raises(ValueError) as error:
        load_official(path, **config)
    for key in [*gone, "stranger", "proj_out.weight gives (3, 3), the model needs (8, 32)"]:
        assert key in str(error.value)


@pytest.mark.parametrize("contents", [b"", b"no safetensors file at all"])
def test_damaged_files_are_named(contents, tmp_path):
    path = tmp_path / "adapter_model.safetensors"
    path.write_bytes(contents)
    (tmp_path / "adapter_config.json").write_text('{"r": 2, "lora_alpha": 2}')
    for read in (lambda: load_official(path), lambda: merge_lora(tiny(), tmp_path)):
        with pytest.raises(ValueError, match="adapter_model.safetensors is damaged or no safetensors file: .*header"):
            read()


def test_projector_must_be_announced(tmp_path):
    path, config, _ = official_file(FILES[1], tmp_path)
    with pytest.raises(ValueError, match=r"left over \['projectors\.0\.0\.bias'"):
        load_official(path, **(config | {"z_dims": None}))


@pytest.mark.parametrize(
    "change, message",
    [
        ({"use_sub_attention": False}, "unknown configuration"),
        ({"out_channels": 5}, "out_channels must be 8"),
        ({"qk_norm": None}, "qk_norm must be 'rms_norm'"),
        ({"z_dims": [4, 4]}, "one REPA projector"),
    ],
)
def test_bad_configuration_is_refused(change, message, tmp_path):
    path, config, _ = official_file(FILES[0], tmp_path)
    with pytest.raises(ValueError, match=message):
        load_official(path, **(config | change))


@pytest.mark.parametrize(
    "change", [{"modulation": "adaln"}, {"compression": False}, {"mlp_ratio": 4.0}, {"qk_norm": False}]
)
def test_models_the_layout_cannot_hold_are_refused(change, tmp_path):
    with pytest.raises(ValueError, match=f"{next(iter(change))} must be"):
        save_official(tiny(**change), tmp_path / "model.safetensors")
    assert not list(tmp_path.iterdir())


class OfficialAttention(nn.Module):
    """The eight projections of one block under their official names."""

    def __init__(self, weights, prefix):
        super().__init__()
        for name in TARGETS:
            if f"{prefix}.{name}.weight" in weights:
                layer = nn.Linear(32, 32)
                layer.weight.data = weights[f"{prefix}.{name}.weight"].clone()
                setattr(self, name.split(".")[0], nn.ModuleList([layer]) if "." in name else layer)


def official_module(model):
    weights = {}
    for name, tensor in model.state_dict().items():
        if ".qkv" in name or ".out" in name:
            parts = tensor.chunk(3) if ".qkv" in name else [tensor]
            weights.update(zip(official_names(name), parts, strict=True))
    groups = nn.ModuleList()
    for g, group in enumerate(model.groups):
        groups.append(nn.ModuleList())
        for i in range(len(group)):
            groups[-1].append(nn.ModuleDict({"attn": OfficialAttention(weights, f"block_groups.{g}.{i}.attn")}))
    return nn.ModuleDict({"block_groups": groups})


def lora_folder(model, folder, **settings):
    """A PEFT folder with random adapters on the official modules, and those modules after PEFT's own merge."""
    wrapped = get_peft_model(official_module(model), LoraConfig(target_modules=TARGETS, **settings))
    for name, parameter in wrapped.named_parameters():
        if "lora_" in name:
            nn.init.normal_(parameter, std=0.2)
    wrapped.save_pretrained(folder)
    return wrapped.merge_and_unload()


@pytest.mark.parametrize("settings", [{"r": 4, "lora_alpha": 8}, {"r": 2, "lora_alpha": 3, "use_rslora": True}])
def test_lora_merges_as_peft_does(settings, tmp_path):
    model = tiny()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    expected = lora_folder(model, tmp_path, **settings).state_dict()
    assert merge_lora(model, tmp_path) is model
    changed = 0
    for name, tensor in model.state_dict().items():
        if ".qkv" in name and name.endswith("weight") or ".out" in name and name.endswith("weight"):
            merged = torch.cat([expected[part] for part in official_names(name)])
            torch.testing.assert_close(tensor, merged)
            assert not torch.equal(tensor, before[name])
            changed += 1
        else:
            assert torch.equal(tensor, before[name])
    assert changed == 4 * 4 - 1  # the last block has no text output


def edit_lora(folder, weights=None, **config):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | config))
    if weights is not None:
        save_file(weights, folder / "adapter_model.safetensors")


def test_bad_lora_folders_are_refused_and_change_nothing(tmp_path):
    model = tiny()
    lora_folder(model, tmp_path, r=2)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    good = load_file(tmp_path / "adapter_model.safetensors")
    first = sorted(good)[0]
    stranger = first.replace("block_groups.0.0", "block_groups.0.7")
    cases = [
        ({**good, stranger: good[first].clone()}, "fit nowhere .*block_groups.0.7"),
        ({key: tensor for key, tensor in good.items() if key != first}, "only one of A and B .*block_groups.0.0"),
        ({**good, first: torch.zeros(2, 5)}, "wrong shape .*block_groups.0.0"),
        ({}, "0 adapters"),
    ]
    for weights, message in cases:
        edit_lora(tmp_path, weights)
        with pytest.raises(ValueError, match=message):
            merge_lora(model, tmp_path)
    edit_lora(tmp_path, good, use_dora=True)
    with pytest.raises(ValueError, match="use_dora=True"):
        merge_lora(model, tmp_path)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
