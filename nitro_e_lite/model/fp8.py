"""The transformer in FP8: converted, counted, saved and loaded.

The transformer holds nearly all weights and does nearly all arithmetic. With its weights in eight bits instead of
sixteen, half the bytes are stored and read, and hardware that multiplies FP8 numbers does so twice as often a second.
Text encoder and autoencoder stay in 16 bit, and so do the few layers of the transformer where rounding shows
(`fp8_policy.py`). What the hardware cannot do is done one rung lower (`fp8_ladder.py`). The codes are the same on
every rung and every machine (`fp8_codes.py`); torchao's `Float8Tensor` holds and multiplies them.

Source: "FP8 SD3.5" article (transformer in FP8, encoders in 16 bit, fall back where the hardware lacks FP8). Differs:
it names E5M2 for activations; after a norm its range is not needed and its precision is missed, so E4M3 is the default.
Differs from torchao's own `quantize_`: layers that do not fit are counted and named instead of skipped silently, rows
of zeros do not become NaN (neither in a weight nor among the activations), and files hold fn codes everywhere.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from nitro_e_lite.errors import FileThere, InvalidValue
from nitro_e_lite.model.fp8_codes import FILE, FN, FNUZ, SCALE, quantize, read_file, to_fn, write_file
from nitro_e_lite.model.fp8_ladder import Choice, choose_rung, wrap
from nitro_e_lite.model.fp8_policy import Policy, policy_for

MULTIPLE = 16  # FP8 products need sides that are multiples of it
FORMAT = 1


@dataclass(frozen=True)
class Bytes:
    """What weights take; buffers (the position table) are apart.

    Attributes:
        codes, scales: of the FP8 layers.
        rest: everything that is not in FP8.
        bf16: what all of it would take in bf16.
        buffers: not in the sum.
    """

    codes: int
    scales: int
    rest: int
    bf16: int
    buffers: int

    @property
    def total(self) -> int:
        """All weights."""
        return self.codes + self.scales + self.rest

    @property
    def ratio(self) -> float:
        """All weights in relation to bf16."""
        return self.total / self.bf16


@dataclass
class Report:
    """What became of a transformer.

    Attributes:
        rung, reasons: of the ladder.
        converted: layers in FP8; "weight" among them keep 16-bit activations on every rung.
        kept: layer -> why the policy leaves it in 16 bit.
        skipped: layer -> why it could not be converted although the policy wants it.
        bytes: what the weights take in memory.
        policy: by which it was done.
    """

    rung: str
    reasons: tuple[str, ...]
    converted: dict[str, str] = field(default_factory=dict)
    kept: dict[str, str] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)
    bytes: Bytes | None = None
    policy: Policy = field(default_factory=Policy)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return asdict(self) | {"ratio": self.bytes.ratio if self.bytes else None}

    def summary(self) -> str:
        """In one line."""
        parts = [f"FP8 {self.rung}: {len(self.converted)} layers in FP8, {len(self.kept)} kept in 16 bit"]
        parts.append(f"{len(self.skipped)} skipped" + "".join(f" ({n}: {w})" for n, w in [*self.skipped.items()][:3]))
        if self.bytes:
            parts.append(f"{self.bytes.ratio:.3f} of bf16's bytes")
        return ", ".join(parts) + "".join(f"; {reason}" for reason in self.reasons)


def is_fp8(weight: Tensor) -> bool:
    """Is this a weight as codes and scales?"""
    return getattr(getattr(weight, "qdata", None), "dtype", None) in (FN, FNUZ)  # int8 of torchao has codes too


def is_quantized(model: nn.Module) -> bool:
    """Does a model hold weights as codes and scales?"""
    return any(is_fp8(parameter) for parameter in model.parameters())


def _codes(weight: Tensor) -> tuple[Tensor, Tensor]:
    """fn codes and scales of a layer's weight, whatever the hardware's dialect."""
    return to_fn(weight.qdata, weight.scale) if weight.qdata.dtype == FNUZ else (weight.qdata, weight.scale)


def _cannot(layer: nn.Linear) -> str | None:
    if hasattr(layer, "parametrizations"):
        return "its weight is computed from another (a parametrisation)"
    if any(side % MULTIPLE for side in layer.weight.shape):
        return f"{tuple(layer.weight.shape)} are not multiples of {MULTIPLE}"
    return None


def quantize_model(model: nn.Module, policy: Policy | None = None, choice: Choice | None = None) -> Report:
    """Puts a transformer's weights into FP8, in place; what a pipeline holds beside it is not touched.

    Args:
        model: in its final 16-bit (or float32) weights, on any device, LoRA merged.
        policy: which layers; that of the model's class when not given.
        choice: the rung; chosen for the model's device and number type when not given.

    Returns:
        What became of every Linear layer, and the bytes; also kept as `model.fp8_report`.

    Raises:
        ValueError: no policy for this class; LoRA layers that are not merged; a model that is in FP8 already.
        FloatingPointError: a weight that is not finite; the model is unchanged then.
    """
    policy = policy or policy_for(model)
    check_unquantized(model)
    first = next(model.parameters())
    dtype = first.dtype
    choice = choice or choose_rung(first.device, dtype)
    report, found = Report(choice.rung, choice.reasons, policy=policy), {}
    for name, layer in model.named_modules():
        if not isinstance(layer, nn.Linear):
            continue
        rule = policy.of(name)
        if rule.precision == "16":
            report.kept[name] = rule.why
        elif problem := _cannot(layer):
            report.skipped[name] = problem
        elif choice.rung != "bf16":
            codes = quantize(layer.weight, policy.granularity)
            found[name] = wrap(*codes, dtype, policy, choice, rule.precision == "fp8")
            report.converted[name] = rule.precision
    for name, weight in found.items():  # all or none
        model.get_submodule(name).weight = weight
    report.bytes = count_bytes(model)
    model.fp8_report = report
    return report


def check_unquantized(model: nn.Module) -> None:
    """Raises `ValueError` for a model that is in FP8 already, or has LoRA layers that are not merged."""
    if is_quantized(model):
        raise InvalidValue("model: is in FP8 already; use set_rung to move it to another rung")
    if adapters := [name for name, module in model.named_modules() if hasattr(module, "lora_A")]:
        rule = "rounding the base alone would not be what the two were trained as; merge them first"
        raise InvalidValue(f"model: has {len(adapters)} LoRA layers ({adapters[0]}, ...); {rule}")


def set_rung(model: nn.Module, choice: Choice, policy: Policy | None = None) -> Report:
    """Moves a model whose weights are in FP8 to a rung, in place: the same codes, or multiplied out for "bf16"."""
    policy = policy or _policy_of(model)
    report = Report(choice.rung, choice.reasons, policy=policy)
    for name, layer in model.named_modules():
        if isinstance(layer, nn.Linear):
            rule = policy.of(name)
            if is_fp8(layer.weight):
                codes, dtype = _codes(layer.weight), layer.weight.dtype
                layer.weight = wrap(*codes, dtype, policy, choice, rule.precision == "fp8")
                report.converted[name] = rule.precision
            elif rule.precision == "16":
                report.kept[name] = rule.why
            else:
                report.skipped[name] = _cannot(layer) or "it was saved in 16 bit"
    if choice.rung == "bf16":
        report.converted = {}
    report.bytes = count_bytes(model)
    model.fp8_report = report
    return report


def _policy_of(model: nn.Module) -> Policy:
    """The policy that a model was quantised by."""
    report = getattr(model, "fp8_report", None)
    return policy_for(model) if report is None else report.policy


def plain_tensors(model: nn.Module) -> dict[str, Tensor]:
    """The state dict with fn codes (`layer.weight`) and scales (`layer.weight_scale`) as tensors of their own."""
    tensors = {}
    for name, value in model.state_dict().items():
        if is_fp8(value):
            tensors[name], tensors[name + SCALE] = _codes(value)
        else:
            tensors[name] = value
    return tensors


def sixteen_bit(model: nn.Module) -> dict[str, int]:
    """Weight -> bytes, of everything that is not in FP8, largest first; buffers are not weights."""
    sizes = {n: p.numel() * p.element_size() for n, p in model.named_parameters() if not is_fp8(p)}
    return dict(sorted(sizes.items(), key=lambda item: -item[1]))


def count_bytes(model: nn.Module) -> Bytes:
    """What a model's weights take in memory; also on the meta device."""
    codes = scales = values = 0
    for parameter in model.parameters():
        values += parameter.numel()
        if is_fp8(parameter):
            codes += parameter.qdata.nbytes
            scales += parameter.scale.nbytes
    buffers = sum(buffer.nbytes for buffer in model.buffers())
    return Bytes(codes, scales, sum(sixteen_bit(model).values()), 2 * values, buffers)


def file_bytes(path: str | Path, buffers: Sequence[str] = ("positions", "pos_embed.pos_embed")) -> Bytes:
    """What the weights in a file of `save` take; the file's header counts as `rest`."""
    tensors, _ = read_file(Path(path))
    scales = {name for name in tensors if name.removesuffix(SCALE) in tensors and name.endswith(SCALE)}
    sizes = {"codes": 0, "scales": 0, "buffers": 0}
    values = 0
    for name, tensor in tensors.items():
        kind = "scales" if name in scales else "buffers" if name in buffers else "codes" if tensor.dtype == FN else None
        values += tensor.numel() if kind in ("codes", None) else 0
        if kind:
            sizes[kind] += tensor.nbytes
    return Bytes(**sizes, rest=Path(path).stat().st_size - sum(sizes.values()), bf16=2 * values)


def holds_fp8(folder: str | Path) -> bool:
    """Does a folder hold a file of `save`, and no 16-bit weights beside it?"""
    return [path.name for path in Path(folder).glob("diffusion_pytorch_model*.safetensors")] == [FILE]


def save(model: nn.Module, folder: str | Path) -> Path:
    """Writes a model in FP8: fn codes, scales and the rest as one safetensors file beside its `config.json`.

    Raises:
        ValueError: the model is not in FP8.
        FileExistsError: the folder holds 16-bit weights, which a reader would take instead.
    """
    folder = Path(folder)
    if not is_quantized(model):
        raise InvalidValue("model: holds no FP8 weights; save_pretrained writes it")
    if others := [path.name for path in folder.glob("diffusion_pytorch_model*.safetensors") if path.name != FILE]:
        raise FileThere(f"{folder}: holds {others[0]}, which would be read instead; name another folder")
    folder.mkdir(parents=True, exist_ok=True)
    dtype = str(next(p.dtype for p in model.parameters() if not is_fp8(p))).removeprefix("torch.")
    about = {"format": FORMAT, "dtype": dtype, "policy": _policy_of(model).to_dict()}
    if hasattr(model, "save_config"):
        model.save_config(folder)
    write_file(folder / FILE, plain_tensors(model), about)
    return folder / FILE


def load(model: nn.Module, folder: str | Path, dtype: torch.dtype | None = None) -> Report:
    """Fills a model from a file of `save`; the rung is then weight-only.

    Args:
        model: of the file's configuration; on the meta device if all its buffers are in the file, as E-MMDiT's are.
        folder: holds the file.
        dtype: number type of the computation and of what is not in FP8; that of the file when not given.

    Returns:
        What is in FP8, and the policy it was quantised by.

    Raises:
        ValueError: a damaged file, one of a later format, or one that does not fit the model.
    """
    path = Path(folder) / FILE
    tensors, about = read_file(path)
    if about.get("format") != FORMAT:
        raise InvalidValue(f"{path}: format {about.get('format')}; this version reads {FORMAT}")
    try:
        policy, dtype = Policy.from_dict(about["policy"]), dtype or getattr(torch, about["dtype"])
    except (KeyError, TypeError, AttributeError) as error:
        raise InvalidValue(f"{path}: its metadata cannot be read ({type(error).__name__}: {error})") from None
    expected = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    scales = {name + SCALE for name, tensor in tensors.items() if tensor.dtype == FN}
    found = {name: tuple(tensor.shape) for name, tensor in tensors.items() if name not in scales}
    if found != expected:
        wrong = sorted(dict(set(found.items()) ^ set(expected.items())))
        raise InvalidValue(f"{path}: does not fit the model, see {', '.join(wrong[:5])}")
    rest = {n: t.to(dtype) for n, t in tensors.items() if n not in scales and t.dtype != FN}
    for name in scales:
        weight = name.removesuffix(SCALE)
        layer = model.get_submodule(weight.rpartition(".")[0])
        layer.weight = wrap(tensors[weight], tensors[name], dtype, policy, Choice("weight_only"), dynamic=False)
    model.load_state_dict(rest, strict=False, assign=True)
    return set_rung(model, Choice("weight_only"), policy)
