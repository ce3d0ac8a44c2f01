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
from safetensors.torch import save_file
from torch import Tensor

from nitro_e_lite.errors import InvalidValue
from nitro_e_lite.model.adapters import check_plain, parse_key, place, rank_of, read_adapter, read_safetensors, scale_of
from nitro_e_lite.model.emmdit import EMMDiTTransformer2DModel
from nitro_e_lite.model.official_names import official_names

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

_ADAPTED = re.compile(r"groups\.\d+\.\d+\.(attention\.(qkv|out)(_context)?|(image|text)\.mlp\.(up|down))")


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
    weights = read_safetensors(path)
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
        "qk_norm": True,
    }
    for field, value in fixed.items():
        if model.config[field] != value:
            raise InvalidValue(f"{field} must be {value!r} in the official layout, got {model.config[field]!r}")
    weights = {}
    for name, tensor in model.state_dict().items():
        parts = _to_official(name, tensor, model.config.patch_size)
        weights.update(zip(official_names(name), parts, strict=True))
    save_file(weights, path, metadata={"format": "pt"})


@torch.no_grad()
def merge_lora(model: EMMDiTTransformer2DModel, source: str | Path) -> EMMDiTTransformer2DModel:
    """Merge a LoRA into the weights, in place.

    Args:
        model: The base model.
        source: What `adapters.read_adapter` reads: a PEFT folder, or a file of `save_lora_adapter` or
            `save_lora_weights`, by the names of the published code (`to_q ... to_out.0 add_q_proj ... to_add_out` under
            `block_groups.G.I.attn`, and `ff`, `ff_context`) or by ours.

    Returns:
        The same model.

    Raises:
        FileNotFoundError: Nothing is there.
        ValueError: A damaged file, no adapters, keys that fit nowhere, half a pair, a wrong shape, or a kind of LoRA
            other than the plain one. The model is unchanged then.
    """
    weights, config = read_adapter(source)
    check_plain(config)
    parameters, pairs, unknown = dict(model.named_parameters()), {}, []
    for key, tensor in weights.items():
        module, side = parse_key(key) or (key, "")
        name, k, count = place(module)
        matrix = parameters.get(f"{name}.weight")
        if not side or matrix is None or matrix.ndim != 2:
            unknown.append(key)
            continue
        start = {"rows": matrix.chunk(count)[k], "scale": scale_of(config, module)}
        pairs.setdefault(module, start)[side] = tensor
    halves = sorted(name for name, pair in pairs.items() if len(pair) < 4)
    misfits = sorted(
        name
        for name, pair in pairs.items()
        if len(pair) == 4 and not _fits(pair["B"].shape, pair["A"].shape, pair["rows"].shape)
    )
    if not (halves or misfits) and config is not None:  # another rank than the file's would be another strength
        misfits = sorted(
            f"{name}: r={r}" for name, pair in pairs.items() if (r := rank_of(config, name)) != len(pair["A"])
        )
    if unknown or halves or misfits or not pairs:
        raise InvalidValue(
            f"{source} cannot be merged: {len(pairs)} adapters found; keys that fit nowhere {unknown}; "
            f"only one of A and B {halves}; wrong shape {misfits}"
        )
    for pair in pairs.values():
        pair["rows"].copy_(pair["rows"].float() + pair["scale"] * (pair["B"].float() @ pair["A"].float()))
    return model


def _fits(b: torch.Size, a: torch.Size, rows: torch.Size) -> bool:
    """Whether `B A` is a matrix of the shape of `rows`."""
    return len(b) == len(a) == 2 and (b[0], a[1]) == tuple(rows) and b[1] == a[0]


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
