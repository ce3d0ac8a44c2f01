"""What a run will need before it is started: memory, arithmetic, hours and disk.

Nothing here is run at full size. Models are built on torch's *meta* device, where tensors have shapes and no numbers:
their FLOPs are counted, and the tensors that autograd would keep for the backward pass are added up. Then

    samples/s = devices * peak * MFU / FLOPs of a sample,      hours = steps * batch / (samples/s) / 3600

A training sample costs three forward passes of the transformer, and one of each frozen encoder that is not stored. At
full scale the encoders cost more than the model, while their stored features fill disks: the plan shows three ways,
with everything stored, with latents alone stored, and with nothing stored.

MFU is the one free number, and hours at a single one would say more than anybody knows. `outlook` gives a range, from
`stated_mfus`. One is published, in a way: 307 million samples in 1.5 days on 8 MI300X imply 5.6 % if everything was
stored. Feeding that back gives the 1.5 days again and proves nothing; it is the slow end, because what that run stored
is not published, and with text and vision on-line the same days mean the higher MFU that `published_mfu` also gives.
The others are ours: assumptions, measured nowhere.

A run is more than its steps: the encoding pass over all pictures, the drawing of those that a teacher has to make, what
disks must deliver, checkpoints and validation are counted too.

Not modelled: gradient checkpointing, the allocator's fragmentation, work space of libraries.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderDC
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModel, Dinov2Config, Dinov2Model, LlamaConfig

from nitro_e_lite.config import DataConfig, TrainConfig, to_dict
from nitro_e_lite.data.shards import sidecars
from nitro_e_lite.errors import InvalidValue
from nitro_e_lite.evaluation.benchmark import measured_peak
from nitro_e_lite.files import find_weights
from nitro_e_lite.inference.hub import one_line
from nitro_e_lite.inference.vision import FULL_VISION_SIZES, GRID
from nitro_e_lite.model.cpu_kernels import plain_operations
from nitro_e_lite.model.emmdit import EMMDiTTransformer2DModel
from nitro_e_lite.model.flops import (
    HARDWARE,
    PUBLISHED_DAYS,
    PUBLISHED_DEVICES,
    PUBLISHED_HARDWARE,
    TRAINING_PASSES,
    build_on_meta,
    model_flops,
)
from nitro_e_lite.model.official_weights import lora_targets
from nitro_e_lite.model.tokens import text_length
from nitro_e_lite.presets import preset
from nitro_e_lite.stages.vision import VisionConfig, build_vision
from nitro_e_lite.training.distributed import BUCKET
from nitro_e_lite.training.optimizers import hidden_matrices

STORED = {"all stored": ("latents", "text", "vision"), "latents stored": ("latents",), "nothing stored": ()}
SMALL_PICTURE = (
    22_000  # bytes of a JPEG of 224 px, for a vision model that looks in training: data_cards/nitro_e_25m.md
)
MOST_DEVICES, MOST_PICTURES = 10**9, 10**15  # that a plan is made for
DISK = 1e9  # bytes/s that a checkpoint is written with, copied and hashed; ours
DRAWN, DRAWN_PER_SECOND = "fluxdb", 0.56  # FLUX.1-dev on one MI300X, 512 px, batch 32: Table 2 of the Nitro-E report
PICTURES = {"sa1b": 11_100_000, "journeydb": 4_400_000, "fluxdb": 9_500_000}  # in the paper's folders
LLAMA_1B = dict(
    vocab_size=128_256,
    hidden_size=2048,
    intermediate_size=8192,
    num_hidden_layers=16,
    num_attention_heads=32,
    num_key_value_heads=8,
    head_dim=64,
)  # meta-llama/Llama-3.2-1B
_BLOCKS = ("ResBlock",) * 3 + ("EfficientViTBlock",) * 3
DC_AE_F32 = dict(
    encoder_block_types=_BLOCKS,
    decoder_block_types=_BLOCKS,
    downsample_block_type="conv",
    upsample_block_type="interpolate",
)  # mit-han-lab/dc-ae-f32c32-sana-1.0-diffusers; the rest are the defaults of the class


@dataclass(frozen=True)
class Encoder:
    """A frozen encoder: parameters, FLOPs of one sample, bytes of its stored features of one sample."""

    parameters: int
    flops: float
    stored: int


@dataclass(frozen=True)
class Plan:
    """What a run needs. Bytes, FLOPs and seconds without prefixes.

    Attributes:
        parameters: of the transformer in training.
        forward_flops: of the transformer, one sample, attention included.
        encoders: "latents", "text" and "vision" (with REPA only).
        sample_flops: of one training sample, by what is stored (the keys of `STORED`).
        memory: of one device, by what it is for.
        activation: bytes of one sample that the backward pass needs; part of `memory`.
        capacity: memory of one device.
        peak: FLOP/s of one device.
        mfu: assumed utilisation.
        samples_per_second: of all devices, by what is stored.
        hours: of the whole stage, by what is stored.
        disk: bytes of the data set, by column.
    """

    parameters: int
    forward_flops: float
    encoders: dict[str, Encoder]
    sample_flops: dict[str, float]
    memory: dict[str, float]
    activation: float
    capacity: float
    peak: float
    mfu: float
    samples_per_second: dict[str, float]
    hours: dict[str, float]
    disk: dict[str, float]

    @property
    def needed(self) -> float:
        """Bytes on each device, in all."""
        return sum(self.memory.values())


@dataclass(frozen=True)
class Utilisation:
    """A share of the peak that a run may reach, whose number it is, and why this one."""

    share: float
    whose: str
    why: str


def stated_mfus() -> tuple[Utilisation, ...]:
    """The range that plans are made for, slowest first."""
    least = published_mfu()["all stored"]
    return (
        Utilisation(least, "published", "implied by 1.5 days on 8 MI300X if everything was stored: the slow end"),
        Utilisation(0.2, "ours", "assumed: matrices 768 wide keep a large device half busy, and small kernels wait"),
        Utilisation(0.4, "ours", "assumed: what large language models reach in training; the fast end"),
    )


@dataclass(frozen=True)
class Outlook:
    """What a whole stage takes at one utilisation. Hours of all devices together; bytes/s without prefixes.

    Attributes:
        mfu: the utilisation.
        hours: of the steps, by what is stored.
        reading: bytes/s that the disks must deliver meanwhile, by what is stored.
        encoding: hours of one pass of all encoders over all pictures.
        validation: hours of all validation losses of the stage.
    """

    mfu: Utilisation
    hours: dict[str, float]
    reading: dict[str, float]
    encoding: float
    validation: float


def outlook(config: TrainConfig, found: Plan, devices: int, mfus: Sequence[Utilisation] = ()) -> list[Outlook]:
    """What a stage takes, at each of a range of utilisations.

    Args:
        config: of the stage.
        found: its plan.
        devices: as many as there.
        mfus: the range; `stated_mfus` when empty.
    """
    rows = sum(
        state["rows"] for one in config.data.validation_folders for state in sidecars(Path(one)).values() if state
    )
    limit = config.data.validation_rows
    rows = rows or (limit if config.data.validation_folders else config.data.validation_scenes)
    looked_at = min(rows, limit) * config.steps / config.validate_every
    encoded = sum(found.disk.values()) / sum(encoder.stored for encoder in found.encoders.values())
    stored = {way: sum(found.encoders[n].stored for n in names if n in found.encoders) for way, names in STORED.items()}
    stored["latents stored"] += SMALL_PICTURE * ("vision" in found.encoders)
    outlooks = []
    for mfu in mfus or stated_mfus():
        speed = devices * found.peak * mfu.share
        samples = {way: speed / cost for way, cost in found.sample_flops.items()}
        outlooks.append(
            Outlook(
                mfu=mfu,
                hours={way: config.steps * config.batch_size / rate / 3600 for way, rate in samples.items()},
                reading={way: samples[way] * size for way, size in stored.items()},
                encoding=encoded * sum(encoder.flops for encoder in found.encoders.values()) / speed / 3600,
                validation=looked_at * (found.forward_flops + found.encoders["text"].flops) / speed / 3600,
            )
        )
    return outlooks


def pictures_encoded(devices: int = PUBLISHED_DEVICES, peak: float = HARDWARE[PUBLISHED_HARDWARE].peak) -> list[float]:
    """Pictures a second that `devices` take through all full encoders, at each of `stated_mfus`: as many to decode."""
    flops = sum(encoder.flops for encoder in frozen_encoders(preset("base", "full")).values())
    return [devices * peak * mfu.share / flops for mfu in stated_mfus()]


def checkpoint_bytes(config: TrainConfig) -> float:
    """Bytes of one checkpoint: masters, the optimiser's state, and the average where there is one."""
    size = _state_bytes(config, _model_arguments(config), {})
    count = _trained(config, build_on_meta(_model_arguments(config)))
    return 4 * count + size["optimizer"] + size["average of the weights"]


def _trained(config: TrainConfig, model: EMMDiTTransformer2DModel) -> int:
    """Numbers that learn: all of the model's, or those of a LoRA on it."""
    if not config.lora.rank:
        return _parameters(model)
    names = lora_targets(model, mlp=config.lora.targets == "attention_mlp")
    return sum(config.lora.rank * sum(model.get_submodule(name).weight.shape) for name in names)


def snapshot_bytes(config: TrainConfig) -> float:
    """Bytes of one snapshot that stays: the transformer in bf16, without a projector, or the LoRA alone."""
    if config.lora.rank:
        return 2 * _trained(config, build_on_meta(to_dict(config.model)))
    return 2 * sum(value.numel() for value in build_on_meta(to_dict(config.model)).state_dict().values())


def checkpoint_hours(config: TrainConfig, bytes_per_second: float = DISK) -> float:
    """Hours that a stage spends on checkpoints when each is written before the next step."""
    return config.steps / config.checkpoint_every * checkpoint_bytes(config) / bytes_per_second / 3600


def drawing_days(config: TrainConfig, devices: int, peak: float) -> float:
    """Days in which `devices` draw the pictures of FLUXDB, which nobody hands out; 0 where a run does not read it.

    The published speed is that of one MI300X; another device is taken to be as much faster as its peak is.
    """
    if DRAWN not in [Path(folder).name for folder in config.data.folders]:
        return 0.0
    speed = DRAWN_PER_SECOND * peak / HARDWARE[PUBLISHED_HARDWARE].peak
    return PICTURES[DRAWN] / (devices * speed) / 86_400


def count_pictures(data: DataConfig) -> int:
    """Pictures that a run reads: rows of the folders that are here, the paper's number for those named as there.

    Raises:
        ValueError: a folder that is neither here nor one of the paper's.
    """
    if not data.folders:
        return data.scenes * (2 if data.pairs and data.pairs_every > 1 else 1)  # pairs, and the plain ones in between
    count = 0
    for folder in map(Path, data.folders):
        there = [state["rows"] for state in sidecars(folder).values() if state]
        if not there and folder.name not in PICTURES:
            raise InvalidValue(f"data.folders: {folder} is not here; say with --pictures how many there will be in all")
        count += sum(there) or PICTURES[folder.name]
    return count


def plan(
    config: TrainConfig,
    hardware: str = PUBLISHED_HARDWARE,
    devices: int = 1,
    mfu: float | None = None,
    peak_tflops: float | None = None,
    pictures: int | None = None,
) -> Plan:
    """Plans one stage.

    Args:
        config: of the stage.
        hardware: a name in `hardware.HARDWARE`.
        devices: how many of them, one process each.
        mfu: utilisation in (0, 1]; the slow end of `stated_mfus`, that of the published run, when None.
        peak_tflops: of one device; the data sheet's when None, measured here for "cpu".
        pictures: in the data set, for the disk; when None those of the folders, see `count_pictures`.

    Raises:
        ValueError: unknown hardware, a number outside of its range, or a folder of which nothing is known.
    """
    peak, mfu = speed_of(hardware, devices, mfu, peak_tflops)
    if config.batch_size % (devices * config.accumulate):
        raise InvalidValue(
            f"devices={devices}: batch_size={config.batch_size} must be a multiple of devices times "
            f"accumulate={config.accumulate}"
        )
    count = count_pictures(config.data) if pictures is None else pictures
    check_pictures(count)
    model = _model_arguments(config)
    encoders = frozen_encoders(config)
    forward = forward_flops(config)
    flops = sample_flops(forward, encoders)
    speed = {way: devices * peak * mfu / cost for way, cost in flops.items()}
    activation = activation_bytes(model, _text_length(config), config.precision, on_cpu=hardware == "cpu")
    per_device = config.batch_size // (devices * config.accumulate)
    return Plan(
        parameters=sum(p.numel() for p in build_on_meta(model).parameters()),
        forward_flops=forward,
        encoders=encoders,
        sample_flops=flops,
        memory=_state_bytes(config, model, encoders) | {"activations": activation * per_device},
        activation=activation,
        capacity=HARDWARE[hardware].memory,
        peak=peak,
        mfu=mfu,
        samples_per_second=speed,
        hours={way: config.steps * config.batch_size / rate / 3600 for way, rate in speed.items()},
        disk={name: count * encoder.stored for name, encoder in encoders.items()},
    )


def check_pictures(count: int) -> None:
    """A data set has pictures, and no more than can be counted."""
    if not 1 <= count <= MOST_PICTURES:
        raise InvalidValue(f"pictures={count}: must be at least 1, at most {MOST_PICTURES:,}")


def check_peak(peak_tflops: float | None) -> None:
    """The peak that a person names is a number above 0, of this world."""
    if peak_tflops is not None and not 1e-6 <= peak_tflops <= 1e9:
        raise InvalidValue(f"peak_tflops={peak_tflops}: must be a number above 0, from a millionth to a billion")


def speed_of(hardware: str, devices: int, mfu: float | None, peak_tflops: float | None) -> tuple[float, float]:
    """Peak FLOP/s of one device, and the utilisation that is assumed: the published run's when `mfu` is None.

    Raises:
        ValueError: unknown hardware, or a number outside of its range.
    """
    if hardware not in HARDWARE:
        raise InvalidValue(f"hardware={hardware!r}: not one of {', '.join(HARDWARE)}")
    if not 1 <= devices <= MOST_DEVICES:
        raise InvalidValue(f"devices={devices}: must be at least 1, at most {MOST_DEVICES:,}")
    if mfu is not None and not 1e-6 <= mfu <= 1:
        raise InvalidValue(f"mfu={mfu}: must be in (0, 1], a millionth at least")
    check_peak(peak_tflops)
    peak = peak_tflops * 1e12 if peak_tflops else HARDWARE[hardware].peak or measured_peak()
    return peak, published_mfu()["all stored"] if mfu is None else mfu


def sample_flops(forward: float, encoders: dict[str, Encoder]) -> dict[str, float]:
    """FLOPs of one training sample, by what is stored."""
    return {
        way: TRAINING_PASSES * forward + sum(encoder.flops for name, encoder in encoders.items() if name not in stored)
        for way, stored in STORED.items()
    }


@lru_cache
def published_mfu() -> dict[str, float]:
    """Utilisation that the published run implies, by what it may have stored."""
    stages = [preset("base", "full"), preset("finetune", "full")]
    seconds = PUBLISHED_DAYS * 86_400
    peak = HARDWARE[PUBLISHED_HARDWARE].peak * PUBLISHED_DEVICES
    work = dict.fromkeys(STORED, 0.0)
    for stage in stages:
        for way, flops in sample_flops(forward_flops(stage), frozen_encoders(stage)).items():
            work[way] += stage.steps * stage.batch_size * flops
    return {way: flops / (peak * seconds) for way, flops in work.items()}


# -- what is counted on the meta device


def _is_full(config: TrainConfig) -> bool:
    return config.data.encoders == "full"


def _text_length(config: TrainConfig) -> int:
    return text_length(config.data.encoders)


@lru_cache
def _vision(full: bool) -> Dinov2Model:
    """DINOv2 ViT-B, or the model that `nitro-e train vision` makes."""
    with torch.device("meta"):
        return Dinov2Model(Dinov2Config(**FULL_VISION_SIZES)) if full else build_vision(VisionConfig())


def _model_arguments(config: TrainConfig) -> dict[str, Any]:
    arguments = to_dict(config.model)
    if config.repa.weight:
        arguments |= {"repa_channels": _vision(_is_full(config)).config.hidden_size, "repa_hidden": config.repa.hidden}
    return arguments


@lru_cache
def forward_flops(config: TrainConfig) -> float:
    """FLOPs of one forward pass of one sample, with the projector where there is REPA."""
    return model_flops(_model_arguments(config), _text_length(config))


@lru_cache
def frozen_encoders(config: TrainConfig) -> dict[str, Encoder]:
    """The frozen encoders of a run: of pictures, of text, and with REPA the vision model."""
    model, length, vae = config.model, _text_length(config), _autoencoder(config)
    with torch.device("meta"):
        if _is_full(config):
            text = AutoModel.from_config(LlamaConfig(**LLAMA_1B))
        else:
            folder = find_weights(config.data.encoders, "vae/config.json").parent
            text = AutoModel.from_config(AutoConfig.from_pretrained(folder / "text_encoder"))
        side = model.sample_size * vae.spatial_compression_ratio
        picture, tokens = torch.empty(1, 3, side, side), torch.zeros(1, length, dtype=torch.long)
        latent = model.in_channels * model.sample_size**2
        found = {
            "latents": Encoder(_parameters(vae), _flops(vae.encode, picture), 2 * latent),
            "text": Encoder(_parameters(text), _flops(text, tokens), 2 * length * model.caption_channels),
        }
        if config.repa.weight:
            vision = _vision(_is_full(config))
            side = GRID * vision.config.patch_size
            flops = _flops(vision, torch.empty(1, 3, side, side))
            found["vision"] = Encoder(_parameters(vision), flops, 2 * GRID**2 * vision.config.hidden_size)
    return found


@lru_cache
def decoder_flops(config: TrainConfig) -> float:
    """FLOPs of one picture from its latents."""
    model = config.model
    shape = (1, model.in_channels, model.sample_size, model.sample_size)
    return _flops(_autoencoder(config).decode, torch.empty(shape, device="meta"))


def _autoencoder(config: TrainConfig) -> AutoencoderDC:
    encoders, channels = config.data.encoders, config.model.in_channels
    with torch.device("meta"):
        if encoders == "full":
            vae = AutoencoderDC(**DC_AE_F32)
        else:
            folder = find_weights(encoders, "vae/config.json").parent
            with one_line(folder, "data.encoders"):
                vae = AutoencoderDC.from_config(AutoencoderDC.load_config(folder / "vae"))
    if vae.config.latent_channels != channels:
        found = f"the autoencoder of data.encoders={encoders!r} has {vae.config.latent_channels}"
        raise InvalidValue(f"model.in_channels={channels}: {found}; set one of the two")
    return vae


def _parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def _flops(function, *inputs: torch.Tensor) -> float:
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        function(*inputs)
    return float(counter.get_total_flops())


def activation_bytes(arguments: dict[str, Any], text_tokens: int, precision: str, on_cpu: bool = False) -> float:
    """Bytes that autograd keeps for the backward pass of one sample, weights left out.

    Counted on fake tensors, which say that they are on a CPU: there attention is fused, as it is on a GPU, and keeps no
    table of probabilities. The passes of `model/cpu_kernels.py` run on a CPU alone; a GPU keeps what ordinary
    operations keep. In bf16 it is half of what it is in float32.
    """
    with FakeTensorMode(), nullcontext() if on_cpu else plain_operations():
        model = EMMDiTTransformer2DModel(**arguments).train()
        return _kept_bytes(model, text_tokens) / (2 if precision == "bf16" else 1)


def _kept_bytes(model: EMMDiTTransformer2DModel, text_tokens: int) -> float:
    weights = {p.untyped_storage()._cdata for p in (*model.parameters(), *model.buffers())}
    kept: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        kept[storage._cdata] = storage  # held, so that its address is not given to another
        return tensor

    size, totals = model.config, []
    for batch in (1, 2):  # the difference leaves out what does not grow with the batch
        kept.clear()
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            latents = torch.empty(batch, size.in_channels, size.sample_size, size.sample_size)
            output = model(latents, torch.empty(batch, text_tokens, size.caption_channels), torch.empty(batch))
        totals.append(sum(s.nbytes() for address, s in kept.items() if address not in weights))
        del output
    return float(totals[1] - totals[0])


def _state_bytes(config: TrainConfig, arguments: dict[str, Any], encoders: dict[str, Encoder]) -> dict[str, float]:
    """Bytes on each device that do not depend on the batch, by what they are for."""
    model = build_on_meta(arguments)
    count = _parameters(model)
    names = hidden_matrices(model) if config.optimizer.name == "muon" and not config.lora.rank else set()
    frozen, count = (count, _trained(config, model)) if config.lora.rank else (0, count)
    momentum = sum(p.numel() for name, p in model.named_parameters() if name in names)
    half = config.precision == "bf16"
    width = 2 if half else 4
    return {
        "weights and gradients": frozen * width + count * (4 + 4 + (2 + 2 if half else 0)),
        "optimizer": 4 * momentum + 8 * (count - momentum),
        "average of the weights": 4 * count if config.ema_decay else 0,
        "gradient bucket": 4 * min(count, BUCKET),  # averaged in float32
        "frozen encoders": width * sum(e.parameters for e in encoders.values()),  # with stored features not all
    }
