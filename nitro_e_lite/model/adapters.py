"""LoRA adapters, by whatever names they come: those of the published code, of diffusers' scripts, or our own.

Elsewhere queries, keys and values are three matrices, here they are one. Three adapters become one on the fused matrix,
which computes the same:

    A = [A_q; A_k; A_v]  (3r, D),    B = blockdiag(B_q, B_k, B_v)  (3D, 3r)

Their scale `alpha / r` is multiplied into `B`, so that it does not depend on whose configuration comes along. A *new*
adapter for `to_q to_k to_v` is one of rank `3r` for the same reason, and its scale is the one asked for.
"""

import copy
import math
import re
from collections.abc import Callable, Mapping
from functools import wraps
from pathlib import Path
from typing import Any

import torch
from diffusers.loaders import PeftAdapterMixin
from diffusers.loaders.lora_base import LORA_ADAPTER_METADATA_KEY
from diffusers.loaders.lora_pipeline import SanaLoraLoaderMixin
from huggingface_hub import hf_hub_download
from peft import LoraConfig
from peft.tuners.lora import LoraLayer
from peft.utils.other import get_pattern_key
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from nitro_e_lite.errors import InvalidValue, MissingFile
from nitro_e_lite.files import explain_json, read_json, read_json_line
from nitro_e_lite.model import fp8
from nitro_e_lite.model.official_names import official_names

Config = dict[str, Any]  # fields of a `peft.LoraConfig`

PEFT_FILES = ("adapter_config.json", "adapter_model.safetensors")
_DIFFUSERS_FILE = "pytorch_lora_weights.safetensors"
_HUB = ("cache_dir", "force_download", "local_files_only", "token", "revision", "subfolder")
_FETCH = (*_HUB, "proxies", "weight_name", "use_safetensors")
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_PREFIX = re.compile(r"^(base_model\.model\.)?(transformer\.)?")
_KEY = re.compile(r"(.+)\.lora_([AB])(?:\.default)?\.weight")
_TENSOR = re.compile(r"\.(lora_.*|alpha)$")
_BLOCK = re.compile(r"(?:block_)?groups\.(\d+)\.(\d+)\.(.+)")
_MATRICES = [f"attention.{name}" for name in ("qkv", "qkv_context", "out", "out_context")]
_MATRICES += [f"{stream}.mlp.{name}" for stream in ("image", "text") for name in ("up", "down")]


def _parts() -> dict[str, tuple[str, int, int]]:
    """By the published name of a matrix within its block: ours, and which of how many parts of it."""
    found = {}
    for own in _MATRICES:
        names = official_names(f"groups.0.0.{own}.weight")
        for k, name in enumerate(names):
            found[name.removeprefix("block_groups.0.0.").removesuffix(".weight")] = (own, k, len(names))
    return found


_PARTS = _parts()


def place(module: str) -> tuple[str, int, int]:
    """Our matrix that a module's name means, and which of how many parts of it; a name of our own means itself."""
    match = _BLOCK.fullmatch(module)
    part = match and _PARTS.get(match[3].replace("attention.", "attn."))
    if not part:
        return module, 0, 1
    own, k, count = part
    return f"groups.{match[1]}.{match[2]}.{own}", k, count


def parse_key(key: str) -> tuple[str, str] | None:
    """The module and the side, "A" or "B", of an adapter's tensor; None for another kind of tensor."""
    match = _KEY.fullmatch(_PREFIX.sub("", key))
    return match and match.groups()


def scale_of(config: Config | None, module: str) -> float:
    """What `B A` is multiplied with: `alpha / r` or `alpha / sqrt(r)`; 1 without a configuration, as in diffusers."""
    if config is None:
        return 1.0
    rank, alpha = rank_of(config, module), _named(config, "lora_alpha", "alpha_pattern", module)
    return alpha / (rank**0.5 if config.get("use_rslora") else rank)


def rank_of(config: Config, module: str) -> float:
    """The rank that a configuration names for a module."""
    return _named(config, "r", "rank_pattern", module)


def _named(config: Config, field: str, patterns: str, module: str) -> float:
    others = config.get(patterns) or {}
    return others.get(get_pattern_key(others.keys(), module), config[field])


def _check_positive(field: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
        raise InvalidValue(f"adapter_config.json: {field}={value!r}: must be a number above 0")


def check_plain(config: Config | None) -> None:
    """Raises `ValueError` for what is not a plain LoRA, or has no rank or strength."""
    for field in ("r", "lora_alpha") if config is not None else ():
        _check_positive(field, config.get(field))
    for field in ("rank_pattern", "alpha_pattern") if config else ():
        patterns = config.get(field) or {}
        if not isinstance(patterns, dict):
            raise InvalidValue(f"adapter_config.json: {field}={patterns!r}: must be an object")
        for pattern, value in patterns.items():
            _check_positive(f"{field}.{pattern}", value)
            try:
                re.compile(pattern)
            except re.error as error:
                raise InvalidValue(f"adapter_config.json: {field}: {pattern!r} is no pattern ({error})") from None
    plain = {"use_dora": False, "fan_in_fan_out": False, "bias": "none", "modules_to_save": None, "lora_bias": False}
    for field, value in plain.items():
        if config and config.get(field) and config[field] != value:
            raise InvalidValue(
                f"adapter_config.json: only a plain LoRA can be merged or renamed, got {field}={config[field]!r}"
            )


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file.

    Raises:
        ValueError: The file is damaged.
    """
    try:
        return load_file(path)
    except SafetensorError as error:
        raise InvalidValue(f"{path} is damaged or no safetensors file: {error}") from None


def read_adapter(source: str | Path) -> tuple[dict[str, Tensor], Config | None]:
    """Tensors and configuration of an adapter on this disk.

    Args:
        source: A folder that PEFT, `save_lora_adapter` or `save_lora_weights` wrote, the safetensors file in it, or a
            run that trained an adapter.

    Raises:
        FileNotFoundError, ValueError: There is none, or it is damaged.
    """
    source = Path(source)
    names = (PEFT_FILES[1], _DIFFUSERS_FILE)
    files = [source] if source.is_file() else [at / name for at in (source, source / "final") for name in names]
    path = next((one for one in files if one.is_file()), None)
    if path is None:
        hint = "" if source.exists() else "; it is not on this disk: download it from the hub first"
        raise MissingFile(f"lora: {source} holds neither {PEFT_FILES[1]} nor {_DIFFUSERS_FILE}{hint}")
    weights, beside = read_safetensors(path), path.with_name(PEFT_FILES[0])
    if path.name == PEFT_FILES[1] and beside.is_file():
        return weights, read_json(beside)
    with safe_open(path, "pt") as file:
        text = (file.metadata() or {}).get(LORA_ADAPTER_METADATA_KEY, "")
    try:
        config = _own_config(read_json_line(text.encode()))
    except ValueError as error:
        raise InvalidValue(f"{path}: {LORA_ADAPTER_METADATA_KEY} in its header: {explain_json(error)}") from None
    if config is None and any(key.startswith("base_model.model.") for key in weights):
        raise MissingFile(f"{beside}: is not there, and without it nobody knows the scale of a PEFT adapter")
    return weights, config


def _own_config(config: Config | None) -> Config | None:
    """A configuration without the pipeline's prefix, with which `save_lora_weights` writes it."""
    return config and {name.removeprefix("transformer."): value for name, value in config.items()}


def fetch(source: str | Path | dict, options: dict[str, Any]) -> tuple[dict[str, Tensor], Config | None]:
    """Tensors and configuration from wherever diffusers reads adapters; takes what concerns that out of `options`.

    Files of other kinds than safetensors, which diffusers would turn to when there are none, are not read.

    Raises:
        FileNotFoundError, ValueError: Nothing is there, a hub id without a `revision`, or it is damaged.
    """
    where = {name: options.pop(name) for name in _FETCH if name in options} | {"use_safetensors": True}
    config = options.pop("metadata", None)
    if isinstance(source, dict):
        return source, config
    if not Path(source).exists():
        if not _HUB_ID.fullmatch(str(source)):
            raise MissingFile(f"lora: {source} is no folder, no file, and no hub id like owner/name")
        if not where.get("revision"):
            pin = "pass revision='<40-digit commit>', or download it once and name its folder"
            raise InvalidValue(f"revision=None: {source} has no pinned commit; {pin}")
    for name in filter(None, (where.get("weight_name"), source if Path(source).is_file() else None)):
        if not str(name).endswith(".safetensors"):
            raise InvalidValue(f"lora: {name}: is no .safetensors file; adapters of other kinds are not read")
    try:
        weights, found = SanaLoraLoaderMixin.lora_state_dict(source, return_lora_metadata=True, **where)
    except SafetensorError as error:
        raise InvalidValue(f"lora: {source}: is damaged or no safetensors file: {error}") from None
    if config is None and found is None and any(key.startswith("base_model.model.") for key in weights):
        folder = Path(source).parent if Path(source).is_file() else Path(source, where.get("subfolder") or "")
        path = folder / PEFT_FILES[0]
        if not folder.exists():
            path = Path(hf_hub_download(str(source), PEFT_FILES[0], **{k: where[k] for k in _HUB if k in where}))
        if not path.is_file():
            raise MissingFile(f"{path}: is not there, and without it nobody knows the scale of a PEFT adapter")
        known = LoraConfig.__dataclass_fields__
        return weights, {k: value for k, value in read_json(path).items() if k in known and value is not None}
    return weights, config or found


def to_own_names(weights: dict[str, Tensor], config: Config | None) -> tuple[dict[str, Tensor], Config | None]:
    """An adapter by our names without prefix; one by other names is plain, and comes without configuration (scale 1).

    Args:
        weights: Tensors by any of the names above. A name that means nothing here is left as it is.
        config: Its configuration, if any.

    Raises:
        ValueError: Something else than a plain LoRA by names that are not ours, half a pair, or a wrong shape.
    """
    weights, config = {_PREFIX.sub("", key): value for key, value in weights.items()}, _own_config(config)
    found: dict[str, dict[int, dict[str, Tensor]]] = {}
    foreign = {key for key in weights if place(key.split(".lora")[0])[0] != key.split(".lora")[0]}
    if not foreign:
        targets, known = (config or {}).get("target_modules"), LoraConfig.__dataclass_fields__
        listed = isinstance(targets, (list, set, tuple)) and set(config) <= set(known)  # else diffusers has its say
        if listed and any(_own_target(one)[0] != one for one in targets):
            config = own_targets(LoraConfig(**config)).to_dict()
        return weights, config
    check_plain(config)
    own = {}
    for key, tensor in weights.items():
        if (parsed := parse_key(key)) is None:
            if key in foreign:
                raise InvalidValue(f"{key}: only a plain LoRA can be renamed, whose tensors are lora_A and lora_B")
            own[key] = tensor
            continue
        module, side = parsed
        name, k, count = place(module)
        pair = found.setdefault((name, count), {}).setdefault(k, {"scale": scale_of(config, module)})
        pair[side] = tensor
    for (name, count), pairs in found.items():
        if halves := [k for k, pair in pairs.items() if len(pair) < 3]:
            raise InvalidValue(f"{name}: only one of lora_A and lora_B for part {halves[0]} of {count}")
        own[f"{name}.lora_A.weight"], own[f"{name}.lora_B.weight"] = _fuse(pairs, count)
    return own, None


def _fuse(pairs: dict[int, dict], count: int) -> tuple[Tensor, Tensor]:
    """`A` `(r, in)` and block-diagonal `B` `(out, r)` of the adapters on the parts of one matrix."""
    order = sorted(pairs)
    scaled = [pairs[k]["B"] if pairs[k]["scale"] == 1 else pairs[k]["B"].float() * pairs[k]["scale"] for k in order]
    if count == 1:
        return pairs[0]["A"], scaled[0]
    rows, ranks = len(scaled[0]), [tensor.shape[1] for tensor in scaled]
    fused = scaled[0].new_zeros(count * rows, sum(ranks))
    for k, part, columns in zip(order, scaled, fused.split(ranks, dim=1), strict=True):
        columns[k * rows : (k + 1) * rows] = part
    return torch.cat([pairs[k]["A"] for k in order]), fused


def _own_target(target: str) -> tuple[str, int, int]:
    """As `place`, of a full name or the end of one."""
    found = place(target)
    ends = [part for name, part in _PARTS.items() if target in (name, name.removeprefix("attn."))]
    return ends[0] if ends and found[0] == target else found


def own_targets(config: LoraConfig) -> LoraConfig:
    """A configuration whose `target_modules` are matrices that are here: `to_q to_k to_v` are one, `to_out.0` another.

    Raises:
        ValueError: Not all three of queries, keys and values.
    """
    if isinstance(config.target_modules, str) or not config.target_modules:
        return config
    found: dict[tuple[str, int], set[str]] = {}
    kept = set()
    for target in config.target_modules:
        own, _, count = _own_target(target)
        if own == target:
            kept.add(target)
        else:
            found.setdefault((own, count), set()).add(target)
    if not found:
        return config
    config = copy.deepcopy(config)
    config.target_modules = kept | {own for own, _ in found}
    patterns, facts = (config.rank_pattern, config.alpha_pattern), vars(config).copy()
    config.rank_pattern, config.alpha_pattern = dict(patterns[0]), dict(patterns[1])
    for (own, count), targets in found.items():
        if len(targets) != count:
            rule = "queries, keys and values are one matrix here: name all three"
            raise InvalidValue(f"target_modules: {sorted(targets)} without the others; {rule}")
        scale = scale_of(facts, min(targets))
        rank = sum(patterns[0].get(target, config.r) for target in targets)
        if count > 1 or any(target in pattern for pattern in patterns for target in targets):
            config.rank_pattern[own] = rank
            config.alpha_pattern[own] = scale * (rank**0.5 if config.use_rslora else rank)
    return config


class AdapterMixin(PeftAdapterMixin):
    """diffusers' adapters of a model, which take the names of the published code and of diffusers' scripts too."""

    def add_adapter(self, adapter_config: LoraConfig, adapter_name: str = "default") -> None:
        """As in diffusers; `target_modules` may be `to_q to_k to_v to_out.0 add_q_proj ...`, see the module's essay."""
        super().add_adapter(own_targets(adapter_config), adapter_name)

    def load_lora_adapter(
        self, source: str | Path | dict, prefix: str | None = "transformer", hotswap: bool = False, **options: Any
    ) -> None:
        """As in diffusers; also PEFT folders, and adapters by the names of the published code."""
        if fp8.is_quantized(self):
            raise InvalidValue("lora: this model is in FP8; load_pipeline(lora=, quantization='fp8') merges it first")
        weights, config = fetch(source, options)
        here = dict(self.named_modules())
        mine = {key: value for key, value in weights.items() if _is_mine(key, prefix, here)}
        if not mine and any(parse_key(key) for key in weights):
            raise InvalidValue(f"lora: made for another model: nothing here is called {min(weights)!r}")
        if not mine:  # diffusers says so in its own words
            return super().load_lora_adapter(weights, prefix=prefix, hotswap=hotswap, metadata=config, **options)
        for key in mine:
            if key.endswith(".alpha"):
                raise InvalidValue(f"lora: {key}: strengths in tensors of their own are not read; convert it to PEFT's")
        mine, config = to_own_names(mine, config)
        for module in (parsed[0] for parsed in map(parse_key, mine) if parsed):
            if module not in here:
                raise InvalidValue(f"lora: made for another model: it changes {module}, which is not here")
        super().load_lora_adapter(mine, prefix=None, hotswap=hotswap, metadata=config, **options)


def _is_mine(key: str, prefix: str | None, here: Mapping[str, Any]) -> bool:
    """Whether a tensor is of this model, with `here` its modules, and not of a text encoder in the same file."""
    bare = _PREFIX.sub("", key)
    named = _BLOCK.match(bare) is not None or place(_TENSOR.sub("", bare))[0] in here
    return prefix is None or key.startswith(f"{prefix}.") or named


def with_lora_scale(forward: Callable) -> Callable:
    """A model's `forward` with adapters as strong as `attention_kwargs["scale"]` says, and afterwards as before.

    diffusers' own divides by the scale again, and by 0 it cannot: later calls then had adapters at full strength.
    """

    @wraps(forward)
    def scaled(self: nn.Module, *arguments: Any, attention_kwargs: dict[str, Any] | None = None, **options: Any) -> Any:
        others = dict(attention_kwargs or {})
        scale, kept = others.pop("scale", 1.0), []
        if scale != 1.0:
            layers = [module for module in self.modules() if isinstance(module, LoraLayer)]
            kept = [(layer, dict(layer.scaling)) for layer in layers]
        try:
            for layer, _ in kept:
                layer.scale_layer(scale)
            return forward(self, *arguments, attention_kwargs=others, **options)
        finally:
            for layer, scaling in kept:
                layer.scaling.update(scaling)

    return scaled
