"""Numbers in eight bits: weights as codes and scales, the two dialects of E4M3, and files of them.

E4M3 has four bits of exponent and three of mantissa: eight steps between one power of two and the next, so that a
rounded number is off by 1/16 at most, about 2.5 % on average (root mean square), whatever its size. It reaches from
2^-9 to 448. A *scale* for each row of a weight brings the largest number of the row to 448: `weight = code * scale`.

There are two dialects. Most hardware reads `float8_e4m3fn`. AMD's MI300X reads `float8_e4m3fnuz`, whose exponent is
shifted by one: **the same byte means half the value**, it reaches to 240 only, and 0x80, the negative zero of the one,
is the only NaN of the other. Here every weight is quantised to fn, in every file stand fn codes and scales, and
where the hardware wants fnuz the bytes are carried over with twice the scale. That loses nothing: fn codes up to 448
become fnuz codes up to 224. The way back exists for exactly those codes; the one at 240 has no counterpart.

What torch and torchao do at the edges is not relied on. A cast to fn turns what is too large into 448, to fnuz into
NaN: numbers are clamped first. torchao divides a row of zeros by a scale of zero, which gives NaN: here its scale is 1.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from nitro_e_lite.errors import InvalidValue, NotFinite
from nitro_e_lite.files import read_json_line

FN, FNUZ, E5M2 = torch.float8_e4m3fn, torch.float8_e4m3fnuz, torch.float8_e5m2
GRANULARITIES = ("row", "tensor")
FILE = "diffusion_pytorch_model.fp8.safetensors"  # diffusers' name of the variant "fp8"
SCALE = "_scale"  # `layer.weight` holds codes, `layer.weight_scale` what they are multiplied with
_MAGNITUDE = 0x7F
_FN_NAN = (0x7F, 0xFF)
_FNUZ_LOST = (0x7F, 0x80, 0xFF)  # 240, NaN, -240


def quantize(weight: Tensor, granularity: str = "row", dtype: torch.dtype = FN) -> tuple[Tensor, Tensor]:
    """A matrix as codes and scales, `weight ~ codes * scale`.

    Args:
        weight: `(O, I)`, finite.
        granularity: "row", a scale for each row; or "tensor", one for all.
        dtype: `FN`, or `E5M2` to compare with; weights for fnuz hardware go by `to_fnuz`.

    Returns:
        Codes `(O, I)` in `dtype`; scales `(O, 1)` or `(1, 1)`, float32.

    Raises:
        ValueError: another granularity or number type.
        FloatingPointError: NaN or infinity in the weight.
    """
    if granularity not in GRANULARITIES:
        raise InvalidValue(f"granularity: {granularity!r} is not one of {', '.join(GRANULARITIES)}")
    if dtype not in (FN, E5M2):
        raise InvalidValue(f"dtype: weights are quantised to {FN} (or {E5M2}), not to {dtype}; see to_fnuz")
    weight = weight.detach().float()
    largest = weight.abs().amax(dim=1, keepdim=True)  # (O, 1)
    if granularity == "tensor":
        largest = largest.amax(dim=0, keepdim=True)  # (1, 1)
    if weight.device.type != "meta" and not largest.isfinite().all():
        raise NotFinite("weight: holds NaN or infinity, which no scale brings into FP8")
    limit = torch.finfo(dtype).max
    scale = (largest / limit).clamp(min=torch.finfo(torch.float32).tiny)
    scale = torch.where(largest == 0, 1.0, scale)
    return (weight / scale).clamp(-limit, limit).to(dtype), scale


def dequantize(codes: Tensor, scale: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Codes `(O, I)` and their scales to the weight `(O, I)` they stand for."""
    return (codes.float() * scale).to(dtype)


def to_fnuz(codes: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """fn codes to the fnuz codes of the same values: the same bytes, twice the scale, and 0x80 (-0) becomes 0.

    Raises:
        ValueError: the codes are not fn, or one of them is NaN (0x7f, 0xff).
    """
    _expect(codes, FN)
    bytes_ = codes.view(torch.uint8)
    _refuse(bytes_, _FN_NAN, "NaN in float8_e4m3fn")
    return bytes_.masked_fill(bytes_ == 0x80, 0).view(FNUZ), scale * 2


def to_fn(codes: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """fnuz codes to the fn codes of the same values: the inverse of `to_fnuz`.

    Raises:
        ValueError: the codes are not fnuz, or have no counterpart: 240, -240 (0x7f, 0xff) or NaN (0x80). Such codes
            come from elsewhere; multiply them out and quantise again.
    """
    _expect(codes, FNUZ)
    bytes_ = codes.view(torch.uint8)
    _refuse(bytes_, _FNUZ_LOST, "240 or NaN in float8_e4m3fnuz, which float8_e4m3fn cannot say with these bytes")
    return bytes_.view(FN), scale / 2


def _expect(codes: Tensor, dtype: torch.dtype) -> None:
    if codes.dtype != dtype:
        raise InvalidValue(f"codes: expected {dtype}, got {codes.dtype}")


def _refuse(bytes_: Tensor, values: tuple[int, ...], meaning: str) -> None:
    if bytes_.device.type == "meta":
        return
    found = torch.isin(bytes_, torch.tensor(values, dtype=torch.uint8, device=bytes_.device))
    if found.any():
        raise InvalidValue(f"codes: {int(found.sum())} of them are {meaning}; dequantise and quantise again")


def write_file(path: Path, tensors: dict[str, Tensor], about: dict) -> None:
    """Writes codes, scales and what stays in 16 bit as one safetensors file, whole or not at all.

    Args:
        path: the file.
        tensors: by name; codes must be `FN`.
        about: JSON-ready facts, kept in the file's metadata.

    Raises:
        ValueError: codes of another FP8 type, whose bytes would be read as other values.
    """
    for name, tensor in tensors.items():
        if tensor.dtype.itemsize == 1 and tensor.is_floating_point() and tensor.dtype != FN:
            raise InvalidValue(f"{name}: {tensor.dtype} does not go into a file; see to_fn")
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    save_file(tensors, temporary, metadata={"format": "pt", "fp8": json.dumps(about)})
    os.replace(temporary, path)


def read_file(path: Path) -> tuple[dict[str, Tensor], dict]:
    """Tensors and facts of a file that `write_file` wrote.

    Raises:
        ValueError: a damaged file, one without these facts, FP8 of another type than `FN`, codes without a scale of
            their shape, a scale that is not a positive number, or a NaN among the codes.
    """
    try:
        with safe_open(path, "pt") as file:
            text = (file.metadata() or {}).get("fp8", "")
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
        about = read_json_line(text.encode())
    except SafetensorError as error:
        raise InvalidValue(f"{path}: is damaged or no safetensors file ({error})") from None
    except ValueError:
        about = None
    if about is None:
        raise InvalidValue(f"{path}: does not say what its codes mean; was it written by fp8.save?")
    for name, tensor in tensors.items():
        if tensor.dtype.itemsize > 1 or not tensor.is_floating_point():
            continue
        scale = tensors.get(name + SCALE)
        if tensor.dtype != FN:
            raise InvalidValue(f"{path}: {name} is {tensor.dtype}; files hold {FN}")
        if scale is None or tensor.ndim != 2 or scale.shape not in ((len(tensor), 1), (1, 1)):
            found = "no scale" if scale is None else f"scales {tuple(scale.shape)}"
            raise InvalidValue(f"{path}: {name} {tuple(tensor.shape)} has {found}; expected one a row, or one")
        if not (scale.isfinite() & (scale > 0)).all():
            raise InvalidValue(f"{path}: {name + SCALE} holds a scale that is not a positive number")
        if (tensor.view(torch.uint8) & _MAGNITUDE == _MAGNITUDE).any():
            raise InvalidValue(f"{path}: {name} holds NaN")
    return tensors, about
