"""Official Nitro-E weight files <-> this project's model.

The official layout keeps queries, keys and values in separate matrices and the 1x1 convolutions as convolutions;
ours fuses the former and writes the latter as matrix products. Both directions only rename, stack, split and
permute: no bit of a weight changes, and saving what was loaded gives the tensors of the first file back.

LoRA folders in PEFT's format that name the official modules (the published GRPO weights are one) are merged into
the fused matrices: `W += alpha / r * B @ A` on the rows that belong to the named projection. `save_lora` writes such a
folder. Differs: the published adapter sits on attention alone; ours may sit on the MLPs too.
"""

import json
import re
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from nitro_e_lite.errors import InvalidValue
from nitro_e_lite.model.emmdit import EMMDiTTransformer2DModel

REFERENCE_CONFIG = {
    "sample_size": 16,
    "patch_size": 1,
    "in_channels": 32,
    "num_layers": 24,
    "attention_head_dim": 32,
    "num_attention_heads": 24,
    "caption_channels": 2048,
    "caption_projection_dim": 768,
    "out_channels": 32,
    "interpolation_scale": None,
    "pos_embed_max_size": 96,
    "use_sub_attn": True,
    "qk_norm": "rms_norm",
    "repa_depth": None,
    "projector_dim": 2048,
    "z_dims": None,
}
"""Constructor arguments of the published code and their defaults. `interpolation_scale` and `repa_depth` change
nothing, there or here; `num_layers` is the number of blocks in the file, which the published code fixes at 24."""

# Our name (regular expression) -> official names (one, or three for a fused matrix).
_BLOCK = r"groups\.(\d+)\.(\d+)\."
_OFFICIAL_BLOCK = r"block_groups.\1.\2."
_RULES = [
    (r"positions", ["pos_embed.pos_embed"]),
    (r"patch_embed\.(\w+)", [r"pos_embed.proj.\1"]),
    (r"text_embed\.(\w+)", [r"context_embedder.\1"]),
    (r"time_embed\.embed\.(.+)", [r"adaln_single.emb.timestep_embedder.\1"]),
    (r"time_embed\.project\.(\w+)", [r"adaln_single.linear.\1"]),
    (_BLOCK + r"attention\.qkv\.(\w+)", [_OFFICIAL_BLOCK + rf"attn.to_{x}.\3" for x in "qkv"]),
    (_BLOCK + r"attention\.qkv_context\.(\w+)", [_OFFICIAL_BLOCK + rf"attn.add_{x}_proj.\3" for x in "qkv"]),
    (_BLOCK + r"attention\.norm_([qk])\.weight", [_OFFICIAL_BLOCK + r"attn.norm_\3.weight"]),
    (_BLOCK + r"attention\.norm_([qk])_context\.weight", [_OFFICIAL_BLOCK + r"attn.norm_added_\3.weight"]),
    (_BLOCK + r"attention\.out\.(\w+)", [_OFFICIAL_BLOCK + r"attn.to_out.0.\3"]),
    (_BLOCK + r"attention\.out_context\.(\w+)", [_OFFICIAL_BLOCK + r"attn.to_add_out.\3"]),
    (_BLOCK + r"image\.norm1\.(\w+)", [_OFFICIAL_BLOCK + r"norm1.\3"]),
    (_BLOCK + r"text\.(?:norm1\.)?(weight|bias)", [_OFFICIAL_BLOCK + r"norm1_context.\3"]),
    (_BLOCK + r"image\.modulation\.(\w+)", [_OFFICIAL_BLOCK + r"scale_shift_\3"]),
    (_BLOCK + r"text\.modulation\.(\w+)", [_OFFICIAL_BLOCK + r"scale_shift_\3_c"]),
    (_BLOCK + r"image\.mlp\.up\.(\w+)", [_OFFICIAL_BLOCK + r"ff.net.0.proj.\3"]),
    (_BLOCK + r"image\.mlp\.down\.(\w+)", [_OFFICIAL_BLOCK + r"ff.net.2.\3"]),
    (_BLOCK + r"text\.mlp\.up\.(\w+)", [_OFFICIAL_BLOCK + r"ff_context.net.0.proj.\3"]),
    (_BLOCK + r"text\.mlp\.down\.(\w+)", [_OFFICIAL_BLOCK + r"ff_context.net.2.\3"]),
    (r"(compressor|reconstructor)\.paths\.0\.0\.(\w+)", [r"token\1.0.0.body2x.1.\2"]),
    (r"(compressor|reconstructor)\.paths\.0\.2\.(\w+)", [r"token\1.0.0.body2x.3.\2"]),
    (r"(compressor|reconstructor)\.paths\.1\.0\.(\w+)", [r"token\1.0.0.body4x.1.\2"]),
    (r"(compressor|reconstructor)\.paths\.1\.2\.(\w+)", [r"token\1.0.0.body4x.3.\2"]),
    (r"reconstructor\.merge\.(.+)", [r"tokenreconstructor.0.0.mergers.\1"]),
    (r"projector\.(.+)", [r"projectors.0.\1"]),
    (r"proj_out\.(\w+)", [r"proj_out.\1"]),
]

_ADAPTED = re.compile(r"groups\.\d+\.\d+\.(attention\.(qkv|out)(_context)?|(image|text)\.mlp\.(up|down))")
_LORA_KEY = re.compile(r"(?:base_model\.model\.)?(block_groups\.\d+\.\d+\..+)\.lora_([AB])\.weight")


def official_names(name: str) -> list[str]:
    """The official names of one entry of our state dict: one, or three for a fused matrix.

    Raises:
        ValueError: The official layout has no place for it.
    """
    for pattern, templates in _RULES:
        if match := re.fullmatch(pattern, name):
            return [match.expand(template) for template in templates]
    raise InvalidValue(f"the official layout has no place for {name!r}")


def _from_official(name: str, parts: list[Tensor]) -> Tensor:
    """Official tensors of one entry to ours."""
    tensor = torch.cat(parts) if len(parts) > 1 else parts[0]
    if match := re.fullmatch(r"compressor\.paths\.(\d)\.0\.weight", name):
        ratio = (2, 4)[int(match[1])]
        tensor = tensor[:, :, 0, 0].unflatten(1, (-1, ratio, ratio)).permute(0, 2, 3, 1)  # (D, C, r, r) -> (D, r, r, C)
    return tensor.flatten(1).contiguous() if name.endswith("weight") and tensor.ndim == 4 else tensor


def _to_official(name: str, tensor: Tensor, patch_size: int) -> list[Tensor]:
    """Our entry to its official tensors; the inverse of `_from_official`."""
    if re.fullmatch(r"groups\..*\.qkv(_context)?\.\w+", name):
        return [part.contiguous() for part in tensor.chunk(3)]
    if match := re.fullmatch(r"compressor\.paths\.(\d)\.0\.weight", name):
        ratio = (2, 4)[int(match[1])]
        tensor = tensor.unflatten(1, (ratio, ratio, -1)).permute(0, 3, 1, 2).flatten(1)  # (D, C*r*r)
    if re.fullmatch(r"(compressor|reconstructor)\.paths\.\d\.\d\.weight", name):
        return [tensor[:, :, None, None].contiguous()]
    if name == "patch_embed.weight":
        return [tensor.unflatten(1, (-1, patch_size, patch_size)).contiguous()]
    return [tensor.contiguous()]


def _block_groups(weights: dict[str, Tensor], num_layers: int) -> tuple[int, ...]:
    """Blocks in each group of a file; the published (4, 16, 4), so that the rest is missed, if they are too few."""
    blocks = {match[0] for name in weights if (match := re.match(r"block_groups\.\d+\.\d+\.", name))}
    groups = [int(block.split(".")[1]) for block in blocks]
    return tuple(map(groups.count, sorted(set(groups)))) if len(groups) == num_layers else (4, 16, 4)


def _model_config(config: dict, weights: dict[str, Tensor]) -> dict:
    """Our constructor arguments from the reference's."""
    if unknown := sorted(set(config) - set(REFERENCE_CONFIG)):
        raise InvalidValue(
            f"unknown configuration {unknown}; the reference constructor takes {sorted(REFERENCE_CONFIG)}"
        )
    config = REFERENCE_CONFIG | config
    width = config["num_attention_heads"] * config["attention_head_dim"]
    fixed = {"out_channels": config["in_channels"], "caption_projection_dim": width, "qk_norm": "rms_norm"}
    for field, value in fixed.items():
        if config[field] != value:
            raise InvalidValue(f"{field} must be {value!r} with these other arguments, got {config[field]!r}")
    channels = list(config["z_dims"] or [])
    if len(channels) > 1:
        raise InvalidValue(f"z_dims must name one REPA projector at most, got {channels}")
    return {
        **{k: config[k] for k in ("sample_size", "patch_size", "in_channels", "num_attention_heads",
                                  "attention_head_dim", "caption_channels", "pos_embed_max_size")},
        "block_groups": _block_groups(weights, config["num_layers"]),
        "attention_pattern": ((1, 1), (4, 1), (4, 4)) if config["use_sub_attn"] else ((1, 1),),
        "repa_channels": channels[0] if channels else None,
        "repa_hidden": config["projector_dim"],
    }  # fmt: skip


def _read(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file."""
    try:
        return load_file(path)
    except SafetensorError as error:
        raise InvalidValue(f"{path} is damaged or no safetensors file: {error}") from None


def load_official(path: str | Path, **config) -> EMMDiTTransformer2DModel:
    """Read an official Nitro-E safetensors file.

    Args:
        path: The file.
        **config: Constructor arguments by their reference names, see `REFERENCE_CONFIG`; what is not given has the
            reference's default, which is the 512 px model (`sample_size=32, use_sub_attn=False` is the 1024 px one).

    Returns:
        The model in evaluation mode, in the file's dtype.

    Raises:
        ValueError: An argument the reference does not know, a damaged file, or one whose names or shapes do not fit
            the model; the message lists every name missing or left over.
    """
    weights = _read(path)
    with torch.device("meta"):
        model = EMMDiTTransformer2DModel(**_model_config(config, weights))
    state, missing, misfits = {}, [], []
    for name, expected in model.state_dict().items():
        names = official_names(name)
        if absent := [n for n in names if n not in weights]:
            missing += absent
            continue
        state[name] = _from_official(name, [weights.pop(n) for n in names])
        if state[name].shape != expected.shape:
            misfits.append(f"{names[0]} gives {tuple(state[name].shape)}, the model needs {tuple(expected.shape)}")
    if missing or weights or misfits:
        raise InvalidValue(
            f"{path} does not fit the configuration: missing {missing}; left over {sorted(weights)}; shapes {misfits}"
        )
    model.load_state_dict(state, assign=True)
    return model.eval()


def save_official(model: EMMDiTTransformer2DModel, path: str | Path) -> None:
    """Write a model as an official Nitro-E safetensors file.

    Args:
        model: An AdaLN-affine model with compression, the only kind the official code can read.
        path: The file to write.

    Raises:
        ValueError: The official layout cannot hold this model.
    """
    fixed = {
        "modulation": "adaln_affine",
        "compression": True,
        "position_reinforcement": True,
        "mlp_ratio": 3.0,
        "dense_time": False,
        "guidance_embedding": False,
    }
    for field, value in fixed.items():
        if model.config[field] != value:
            raise InvalidValue(f"{field} must be {value!r} in the official layout, got {model.config[field]!r}")
    weights = {}
    for name, tensor in model.state_dict().items():
        parts = _to_official(name, tensor, model.config.patch_size)
        weights.update(zip(official_names(name), parts, strict=True))
    save_file(weights, path, metadata={"format": "pt"})


def _lora_scale(config: dict) -> float:
    """`alpha / r` (or `alpha / sqrt(r)`), refusing what is not a plain LoRA."""
    plain = {"use_dora": False, "fan_in_fan_out": False, "bias": "none", "modules_to_save": None,
             "rank_pattern": {}, "alpha_pattern": {}, "lora_bias": False}  # fmt: skip
    for field, value in plain.items():
        if config.get(field) and config[field] != value:
            raise InvalidValue(f"adapter_config.json: only plain LoRA can be merged, got {field}={config[field]!r}")
    rank = config["r"] ** 0.5 if config.get("use_rslora") else config["r"]
    return config["lora_alpha"] / rank


def _lora_targets(parameters: dict[str, Tensor]) -> dict[str, Tensor]:
    """By official module name: the rows of our matrix that an adapter there belongs to."""
    targets = {}
    for name, weight in parameters.items():
        if name.endswith(".weight") and _ADAPTED.fullmatch(name.removesuffix(".weight")):
            names = official_names(name)
            rows = weight.chunk(len(names))
            targets |= {n.removesuffix(".weight"): part for n, part in zip(names, rows, strict=True)}
    return targets


@torch.no_grad()
def merge_lora(model: EMMDiTTransformer2DModel, folder: str | Path) -> EMMDiTTransformer2DModel:
    """Merge a PEFT LoRA folder in the official naming into the weights, in place.

    Args:
        model: The base model.
        folder: Holds `adapter_config.json` and `adapter_model.safetensors`; adapters sit on `to_q to_k to_v to_out.0
            add_q_proj add_k_proj add_v_proj to_add_out` under `block_groups.G.I.attn`, and on `ff` and `ff_context`.

    Returns:
        The same model.

    Raises:
        ValueError: A damaged file, no adapters, keys that fit nowhere, half a pair, a wrong shape, or a kind of LoRA
            other than the plain one. The model is unchanged then.
    """
    scale = _lora_scale(json.loads((Path(folder) / "adapter_config.json").read_text(encoding="utf-8")))
    targets, pairs, unknown = _lora_targets(dict(model.named_parameters())), {}, []
    for key, tensor in _read(Path(folder) / "adapter_model.safetensors").items():
        if (match := _LORA_KEY.fullmatch(key)) is None or match[1] not in targets:
            unknown.append(key)
        else:
            pairs.setdefault(match[1], {"rows": targets[match[1]]})[match[2]] = tensor
    halves = sorted(name for name, pair in pairs.items() if len(pair) < 3)
    misfits = sorted(
        name
        for name, pair in pairs.items()
        if len(pair) == 3 and (len(pair["B"]), pair["A"].shape[1]) != tuple(pair["rows"].shape)
    )
    if unknown or halves or misfits or not pairs:
        raise InvalidValue(
            f"{folder} cannot be merged: {len(pairs)} adapters found; keys that fit nowhere {unknown}; "
            f"only one of A and B {halves}; wrong shape {misfits}"
        )
    for pair in pairs.values():
        pair["rows"].copy_(pair["rows"].float() + scale * (pair["B"].float() @ pair["A"].float()))
    return model


def lora_targets(model: EMMDiTTransformer2DModel, mlp: bool = True) -> list[str]:
    """Names of our matrices that an adapter in the official layout can sit on; `mlp`: also those of the MLPs."""
    names = [name for name, _ in model.named_modules() if _ADAPTED.fullmatch(name)]
    return [
        name
        for name in names
        if isinstance(model.get_submodule(name), torch.nn.Linear) and (mlp or ".mlp." not in name)
    ]


def save_lora(values: dict[str, Tensor], folder: str | Path, config: dict) -> None:
    """Write a LoRA on our matrices as a PEFT folder in the official naming; `merge_lora` reads it.

    A fused matrix has one adapter `B A`. Its queries, keys and values get one each: the same `A`, a third of `B`.

    Args:
        values: `NAME.lora_A...weight` `(r, in)` and `NAME.lora_B...weight` `(out, r)` by the names of our matrices.
        folder: The files go there.
        config: Fields of `adapter_config.json` beside the modules' names: `r`, `lora_alpha`, ...
    """
    weights, modules = {}, set()
    for key, value in values.items():
        owner, side = re.fullmatch(r"(.+)\.lora_([AB])\b.*", key).groups()
        names = [name.removesuffix(".weight") for name in official_names(f"{owner}.weight")]
        parts = [value] * len(names) if side == "A" else value.chunk(len(names))
        for name, part in zip(names, parts, strict=True):
            weights[f"base_model.model.{name}.lora_{side}.weight"] = part.detach().float().cpu().clone()
            modules.add(re.sub(r"block_groups\.\d+\.\d+\.", "", name))
    plain = {"peft_type": "LORA", "bias": "none", "fan_in_fan_out": False, "use_dora": False, "use_rslora": False}
    text = json.dumps({**plain, "inference_mode": True, "target_modules": sorted(modules), **config}, indent=2)
    (Path(folder) / "adapter_config.json").write_text(text + "\n", encoding="utf-8")
    save_file(weights, Path(folder) / "adapter_model.safetensors", metadata={"format": "pt"})
