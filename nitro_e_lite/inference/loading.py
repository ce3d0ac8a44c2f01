"""Finding a model: shipped weights, a folder, a training run or an official file, by one function.

Everything that draws pictures starts with `load_pipeline`. It never falls back: a name that means nothing, a
file whose checksum differs or an encoder that is not there is an error that says what to do.
"""

import warnings
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler, SCMScheduler
from safetensors import safe_open

from nitro_e_lite import runtime
from nitro_e_lite.errors import InvalidType, InvalidValue
from nitro_e_lite.files import find_weights, read_json, read_run
from nitro_e_lite.inference.encoders import Encoders, LatentStats, load_encoders
from nitro_e_lite.inference.fp8_pipeline import quantize_pipeline
from nitro_e_lite.inference.hub import (
    FULL_AUTOENCODER,
    FULL_TEXT_ENCODER,
    OFFICIAL,
    EncoderUnavailable,
    fetch_official,
    load_autoencoder,
    load_text_encoder,
    one_line,
    quiet_loading,
    weights_hash,
)
from nitro_e_lite.inference.low_memory import save_memory
from nitro_e_lite.inference.pipeline import NitroEPipeline
from nitro_e_lite.model import fp8
from nitro_e_lite.model.emmdit import EMMDiTTransformer2DModel
from nitro_e_lite.model.official_weights import load_official, merge_lora
from nitro_e_lite.model.tokens import text_length

_LARGE, _FEW_STEPS = {"sample_size": 32, "use_sub_attn": False}, {"default_steps": 4, "default_guidance": 0.0}
VARIANTS = {
    "512px": {"network": {}, "sampler": {}},
    "512px-dist": {"network": {}, "sampler": _FEW_STEPS},
    "1024px": {"network": _LARGE, "sampler": {}},
    "1024px-dist": {"network": _LARGE, "sampler": _FEW_STEPS},
}
"""The published files: how the network differs from the 512 px one, and what a call without settings uses."""

ADAPTER = "adapter_model.safetensors"  # what a run of learning from rewards leaves


def load_pipeline(
    source: str | Path = "lite",
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
    *,
    text_encoder: str | Path | None = None,
    vae: str | Path | None = None,
    lora: str | Path | None = None,
    variant: str | None = None,
    quantization: str | None = None,
    low_memory: bool = False,
    **official_config: Any,
) -> NitroEPipeline:
    """A pipeline, ready to draw.

    Args:
        source: "lite" or another name of weights shipped in the package; a pipeline folder; a training run or its
            `final/` (the encoders, guidance and shift are then those of the run, and the steps of a student; an adapter
            of `nitro-e train rewards` is merged into what it was learned on); another folder with a transformer alone
            (the rest is then that of "lite"); an official Nitro-E `.safetensors` file; or "amd/Nitro-E", the same from
            the hub, at a pinned commit.
        device: where to run; the accelerator when there is one.
        dtype: "float32", "bfloat16" or "float16"; float32 on the CPU, bfloat16 on a GPU that has it and with FP8.
        text_encoder: folder or hub id of another text encoder with its tokenizer; official weights use
            Llama-3.2-1B when none is given.
        vae: folder or hub id of another autoencoder; official weights use DC-AE f32c32. Its `latent_stats.json`, if
            it has one, comes with it.
        lora: a LoRA to merge into the transformer: a PEFT folder, what `save_lora_adapter` or `save_lora_weights`
            wrote, or a run that trained one; `pipeline.load_lora_weights` keeps it apart instead.
        variant: which of `VARIANTS` an official file is, since neither its names nor its shapes say so; when not given
            the `config.json` of the transformer beside it decides, or it is guessed from the name of the file, and a
            warning says what was guessed. Of the hub's files it says which; "512px" when not given.
        quantization: "fp8" puts the transformer's weights into FP8 after a LoRA was merged, as far as the device can; a
            warning gives the reason of each step down, `pipeline.transformer.fp8_report` the rest. A folder that was
            saved in FP8 is in FP8 without it.
        low_memory: parts come to the device in turn, large pictures are decoded in tiles; draw with
            `low_memory.draw_one_by_one`.
        **official_config: arguments for `official_weights.load_official`, for files of other shapes.

    Raises:
        TypeError, ValueError: a source that is none of these, a damaged file, parts that do not fit together.
        EncoderUnavailable: an encoder that has to be downloaded first, or those of a run are not there any more; the
            message says what to do.
    """
    if quantization not in (None, "fp8"):
        raise InvalidValue(f"quantization: {quantization!r} is not 'fp8'")
    device = runtime.pick_device(device)
    if (rewarded := _rewarded(source)) is not None:
        adapter, trained = rewarded
        if lora is not None:
            raise InvalidValue(f"lora: {source} is an adapter itself and takes no other; name what it was learned on")
        parts = {"text_encoder": text_encoder, "vae": vae, "variant": variant, **official_config}
        kinds = {"quantization": quantization, "low_memory": low_memory}
        pipeline = load_pipeline(trained["start_from"], device, dtype, lora=adapter, **parts, **kinds)
        drawn = {"steps": "rollout_steps", "guidance": "guidance", "shift": "shift"}  # as in its roll-outs
        pipeline.register_to_config(**{f"default_{name}": trained[field] for name, field in drawn.items()})
        return pipeline
    path = _find(source, variant)
    variant = "512px" if variant is None and source == OFFICIAL else variant
    stored = fp8.holds_fp8(path) or fp8.holds_fp8(path / "transformer")
    if lora is not None and stored:
        raise InvalidValue(
            f"lora: {path} is in FP8; merge it into the 16-bit weights, with quantization='fp8' after it"
        )
    dtype = runtime.pick_dtype("bfloat16" if dtype is None and (quantization or stored) else dtype, device)
    official = path.is_file()
    if variant is not None and (not official or variant not in VARIANTS):
        rule = f"must be one of {', '.join(VARIANTS)}, for an official .safetensors file"
        raise InvalidValue(f"variant: {variant!r} for {path.name}; {rule}")
    if official_config and not official:
        raise InvalidType(f"{', '.join(official_config)}: only official .safetensors files take a configuration")
    parts: dict[str, Any] = {}
    if official:  # first: a wrong file is found out before gigabytes of encoders are fetched
        parts["transformer"] = load_official(path, **_network(path, variant, official_config))
        text_encoder, vae = text_encoder or FULL_TEXT_ENCODER, vae or FULL_AUTOENCODER
    elif lora is not None:
        parts["transformer"] = load_transformer(path)
    if lora is not None:
        merge_lora(parts["transformer"], lora)
    if "transformer" in parts:  # merged in float32, rounded once; diffusers' own warns of layers that are not there
        torch.nn.Module.to(parts["transformer"], dtype)
    if text_encoder is not None:
        parts["tokenizer"], parts["text_encoder"] = load_text_encoder(text_encoder, dtype=dtype)
    if vae is not None:
        parts["vae"] = load_autoencoder(vae, dtype=dtype)
        if (Path(vae) / "latent_stats.json").is_file():
            stats = LatentStats.load(vae)
            parts |= {"latents_mean": list(stats.mean), "latents_std": list(stats.std)}
    with one_line(path), quiet_loading(path.parent):
        if official:
            pipeline = _official_pipeline(parts, variant or _published_as(path))
        elif (path / DiffusionPipeline.config_name).is_file():
            stored_as = _stored_variant(path)
            pipeline = NitroEPipeline.from_pretrained(path, dtype=dtype, use_safetensors=True, **stored_as, **parts)
        else:
            pipeline = _trained_pipeline(path, parts, dtype)
    _check_whole(pipeline, path, parts)
    if quantization or stored:
        quantize_pipeline(pipeline, device)
    if low_memory:
        save_memory(pipeline, device)
        return pipeline
    return pipeline.to(device)


def _check_whole(pipeline: NitroEPipeline, path: Path, given: dict[str, Any]) -> None:
    """Refuses a pipeline folder that lacks some of its weights: libraries fill them with noise, or with nothing.

    Raises:
        ValueError: naming the first.
    """
    for part in {"transformer", "vae", "text_encoder"} - given.keys():
        names: set[str] = set()
        for file in (path / part).glob("*.safetensors"):
            with safe_open(file, "pt") as opened:
                names |= {name.removeprefix("model.") for name in opened.keys()}  # noqa: SIM118 it has no other way
        module = getattr(pipeline, part)
        if names and module is not None and not fp8.holds_fp8(path / part):
            wanted = {name.removeprefix("model.") for name in module.state_dict()}
            if missing := sorted(wanted - names):
                more = f"{len(missing)} weights of {part} are missing: {missing[0]}"
                raise InvalidValue(f"model: {path} cannot be loaded ({more}{', ...' * (len(missing) > 1)})")


def load_transformer(source: str | Path) -> EMMDiTTransformer2DModel:
    """The transformer alone, in float32, from any source that `load_pipeline` takes; the name of an official file says
    which variant it is.

    Raises:
        ValueError: see there; also a folder in FP8, which has lost what training would start from.
    """
    if (rewarded := _rewarded(source)) is not None:
        return merge_lora(load_transformer(rewarded[1]["start_from"]), rewarded[0])
    path = _find(source)
    if path.is_file():
        return load_official(path, **VARIANTS[_published_as(path)]["network"])
    kind = _stored_variant(path)
    if (path / DiffusionPipeline.config_name).is_file():
        path = path / "transformer"
    if fp8.holds_fp8(path):
        raise InvalidValue(f"{path}: is in FP8, rounded for drawing; name the 16-bit weights it was made from")
    with one_line(path):
        return EMMDiTTransformer2DModel.from_pretrained(path, use_safetensors=True, **kind)


def _find(source: str | Path, variant: str | None = None) -> Path:
    """The folder of a pipeline or of a transformer, or the official file, that `source` names."""
    if source == OFFICIAL and not Path(source).is_dir():
        return fetch_official(variant or "512px")
    if Path(source).is_file() and Path(source).suffix == ".safetensors":
        return Path(source)
    weights = "diffusion_pytorch_model*.safetensors"
    try:
        return find_weights(source, DiffusionPipeline.config_name, weights, f"transformer/{weights}")
    except FileNotFoundError as error:
        raise InvalidValue(f"model: {error}, and no official .safetensors file") from None


def _rewarded(source: str | Path) -> tuple[Path, dict[str, Any]] | None:
    """The adapter that `source` names and the settings of its run, if it is one of learning from rewards."""
    try:
        adapter = find_weights(source, ADAPTER)
    except FileNotFoundError:
        return None
    trained = _run_of(adapter).get("config") or {}
    if trained.get("stage") != "rewards":
        return None
    if missing := {"start_from", "rollout_steps", "guidance", "shift"} - trained.keys():
        raise InvalidValue(f"{source}: its run's config.json does not say {', '.join(sorted(missing))}")
    return adapter, trained


def base_hash(pipeline: NitroEPipeline) -> str:
    """Names all weights of a pipeline in the number type that they are in; runs of rewards name their base so."""
    return weights_hash({name: getattr(pipeline, name) for name in ("transformer", "vae", "text_encoder")})


def _run_of(path: Path) -> dict[str, Any]:
    """What a run says of itself that has written the folder `path`; nothing where none has."""
    parents = {"final": path.parent, "snapshots": path.parent.parent}
    file = parents.get(path.name, parents.get(path.parent.name, path)) / "config.json"
    return read_run(file) if file.parent != path else {}


def _stored_variant(path: Path) -> dict[str, str]:
    """The argument for a folder that `save_pretrained(variant="fp16")` wrote, which holds no other weights."""
    names = {file.name for file in (path / "transformer").glob("diffusion_pytorch_model*.safetensors")}
    return {"variant": "fp16"} if names and all(".fp16" in name for name in names) else {}


def _trained_pipeline(path: Path, parts: dict, dtype: torch.dtype) -> NitroEPipeline:
    """A transformer alone, drawn with what it was trained with as far as its run says, else with the rest of "lite"."""
    run = _run_of(path)
    trained = run.get("config") or {"data": {"encoders": "lite"}}
    data, given = trained.get("data"), "vae" in parts or "text_encoder" in parts
    source = data.get("encoders") if isinstance(data, dict) else None
    if not isinstance(source, str):
        raise InvalidValue(f"{path}: its run's config.json does not say data.encoders")
    if "transformer" not in parts:
        parts["transformer"] = EMMDiTTransformer2DModel.from_pretrained(path, dtype=dtype, use_safetensors=True)
    parts |= {f"default_{name}": trained[name] for name in ("guidance", "shift") if name in trained}
    few = {"default_steps": "sampler_steps", "sigma_grid": "sigma_grid"}  # of a student, which has steps of its own
    parts |= {name: trained[field] for name, field in few.items() if field in trained}
    if trained.get("stage") == "sprint":  # a consistency model
        parts = {"scheduler": SCMScheduler(), **parts}
    if trained.get("jumps"):  # fresh noise after every step
        parts = {"scheduler": FlowMatchEulerDiscreteScheduler(1000, stochastic_sampling=True), **parts}
    if "vae" in parts:  # without statistics of its own it has the published scaling factor, not lite's statistics
        parts = {"latents_mean": None, "latents_std": None, **parts}
    if source == "lite":
        pipeline = NitroEPipeline.from_pretrained(_find("lite"), dtype=dtype, use_safetensors=True, **parts)
    else:
        parts = {"max_text_length": text_length(source), **parts}
        if "vae" not in parts or "text_encoder" not in parts:
            parts = {**_encoders_of(path, source, dtype), **parts}
        pipeline = NitroEPipeline(**{"scheduler": FlowMatchEulerDiscreteScheduler(1000, shift=1.0), **parts})
    found = Encoders(
        pipeline.vae, pipeline.tokenizer, pipeline.text_encoder, pipeline.stats, pipeline.config.max_text_length
    )
    if "encoders" in run and run["encoders"] != found.fingerprint:
        message = f"{path}: was trained with other encoders than these; the pictures would be wrong"
        if not given:
            raise InvalidValue(f"{message}. Name those of the run: --text-encoder PATH --vae PATH")
        warnings.warn(message, stacklevel=3)
    return pipeline


def _encoders_of(path: Path, source: str, dtype: torch.dtype) -> dict:
    """The encoders that a run names, as arguments of a pipeline."""
    try:
        return load_encoders(source, dtype=dtype).parts()
    except EncoderUnavailable as error:
        hint = "name them: --text-encoder PATH --vae PATH"
        raise EncoderUnavailable(
            f"{path}: was trained with the encoders {source!r}, not there ({error}); {hint}"
        ) from None


def _published_as(path: Path) -> str:
    """The variant that an official file was published as: by the configuration beside it, else by its name."""
    large = _config_beside(path).get("sample_size", 32 if "1024" in path.name else 16) == 32
    return ("1024px" if large else "512px") + ("-dist" if "dist" in path.name else "")


def _config_beside(path: Path) -> dict[str, Any]:
    """The configuration of the transformer in the folder of an official file; nothing when there is none."""
    file = path.parent / "config.json"
    found = read_json(file) if file.is_file() else {}
    return found if found.get("_class_name") == EMMDiTTransformer2DModel.__name__ else {}


def _network(path: Path, variant: str | None, official_config: dict[str, Any]) -> dict[str, Any]:
    """Arguments for `load_official`; says so when the variant was guessed."""
    if official_config:
        return official_config
    if variant is None:
        variant = _published_as(path)
        if not _config_beside(path):
            message = f"{path.name}: taken for the variant {variant} because of its name; variant= says it for sure"
            warnings.warn(message, stacklevel=3)
    return VARIANTS[variant]["network"]


def _official_pipeline(parts: dict, variant: str) -> NitroEPipeline:
    scheduler = FlowMatchEulerDiscreteScheduler(num_train_timesteps=1000, shift=1.0)
    return NitroEPipeline(**parts, scheduler=scheduler, sigma_grid="scheduler", **VARIANTS[variant]["sampler"])
