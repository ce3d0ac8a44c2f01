"""Loading models that stay frozen, from a folder or the hub, and the one hash of what they hold.

Every hub id has a pinned commit, every folder that lies beside a list of checksums must agree with it, and whatever
goes wrong (no network, a licence not accepted, a damaged file) is one readable error that says what to do.
"""

import hashlib
import json
import logging
import re
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import diffusers
import huggingface_hub
import torch
import transformers
from diffusers import AutoencoderDC
from torch import nn
from transformers import AutoModel, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from nitro_e_lite.errors import InvalidValue, UserError
from nitro_e_lite.files import check_weights, sha256_file
from nitro_e_lite.model.cpu_kernels import speed_up
from nitro_e_lite.model.fp8 import plain_tensors

FULL_AUTOENCODER = "mit-han-lab/dc-ae-f32c32-sana-1.0-diffusers"
FULL_TEXT_ENCODER = "meta-llama/Llama-3.2-1B"
OFFICIAL = "amd/Nitro-E"  # the published transformers, one file each

HUB_REVISIONS = {
    OFFICIAL: "88f83c800d9ee98a07a40c03a05d2d80a674a85c",
    FULL_AUTOENCODER: "ca69e17e97609e64ce055115a6515215109b1f50",
    FULL_TEXT_ENCODER: "4e20de362430cd3b72f300e6b0f18e50e7166e08",
}

"""Hub id -> commit that is loaded when none is asked for. Other ids need a revision."""

OFFICIAL_SUMS = {
    "512px": "362a1b86870987318c1a49535878b4d62c430b7e36afb51798676475f7ef4550",
    "512px-dist": "06398fb646dbe2d9830902fab7086da3c66fe267211a36a7bc26ee4fd12d88d4",
    "1024px": "f8cf35b97112431cf4f889a7d314503e0df8f7dc7ade0bab0cdd0c7eb403ccf8",
}
"""Variant -> sha256 of its file in the pinned commit of `OFFICIAL`."""


class EncoderUnavailable(UserError, RuntimeError):
    """An encoder cannot be loaded: no such folder, no network, or a licence not accepted."""


# -----------------------------------------------------------------------------------------------------------
# Loading
# -----------------------------------------------------------------------------------------------------------


def load_autoencoder(
    source: str | Path,
    *,
    revision: str | None = None,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
) -> AutoencoderDC:
    """Loads an autoencoder, frozen and in evaluation mode.

    Args:
        source: local folder, or hub id such as `FULL_AUTOENCODER`.
        revision: commit of a hub id; the pinned one of `HUB_REVISIONS` when None.
        device: where to put it.
        dtype: number type of the weights.

    Raises:
        EncoderUnavailable: when nothing can be loaded from `source`.
        ValueError: for a hub id without a revision, or a file that differs from its checksum.
    """
    place = _resolve(source, revision, "--vae PATH")
    load = AutoencoderDC.from_pretrained
    vae = attempt_model(source, "--vae PATH", load, torch_dtype=dtype, use_safetensors=True, **place)
    return vae.to(device=device, memory_format=torch.channels_last).eval().requires_grad_(False)


def load_text_encoder(
    source: str | Path,
    *,
    revision: str | None = None,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    token: str | None = None,
) -> tuple[PreTrainedTokenizerBase, PreTrainedModel]:
    """Loads a tokenizer and its language model, frozen and in evaluation mode.

    Args:
        source: hub id, a folder that holds both, or a folder with `tokenizer` and `text_encoder` inside.
        revision: commit of a hub id; the pinned one of `HUB_REVISIONS` when None.
        device: where to put the model.
        dtype: number type of the weights.
        token: access token for a gated hub id; the one of `hf auth login` when None.

    Returns:
        Tokenizer (pads on the right with the end token) and model (no language-model head).

    Raises:
        EncoderUnavailable: when nothing can be loaded from `source`; names the licence page.
        ValueError: for a hub id without a revision, or a file that differs from its checksum.
    """
    option = "--text-encoder PATH"
    place = _resolve(source, revision, option)
    if (Path(source) / "text_encoder").is_dir():
        parts = (Path(source) / "tokenizer", Path(source) / "text_encoder")
        folders = [{"pretrained_model_name_or_path": str(part)} for part in parts]
    else:
        folders = [place, place]
    if not Path(source).is_dir():
        folders = [{**f, "token": token} for f in folders]
    no_code = {"trust_remote_code": False}  # when nothing is said, transformers asks whoever sits at the terminal
    tokenizer = attempt(source, option, AutoTokenizer.from_pretrained, **no_code, **folders[0])
    load = AutoModel.from_pretrained
    model = attempt_model(source, option, load, dtype=dtype, use_safetensors=True, **no_code, **folders[1])
    if tokenizer.eos_token is None:
        raise EncoderUnavailable(f"{source}: the tokenizer has no end token, which captions are padded with")
    tokenizer.pad_token, tokenizer.padding_side = tokenizer.eos_token, "right"
    speed_up(model)
    return tokenizer, model.to(device).eval().requires_grad_(False)


def _resolve(source: str | Path, revision: str | None, option: str) -> dict[str, str]:
    """Folder or (hub id, commit) as arguments of `from_pretrained`."""
    if Path(source).is_dir():
        return {"pretrained_model_name_or_path": str(source)}
    if isinstance(source, Path) or not re.fullmatch(r"[\w.-]+/[\w.-]+", source):
        raise EncoderUnavailable(f"{source}: no such folder, and not a hub id like owner/name ({option})")
    revision = revision or HUB_REVISIONS.get(source)
    if revision is None:
        raise InvalidValue(
            f"revision=None: {source} has no pinned commit; pass revision='<40-digit commit>' so that the "
            f"run can be repeated, or download it once and pass its folder ({option})"
        )
    return {"pretrained_model_name_or_path": source, "revision": revision}


_QUIET, _LOCK = {"loads": 0, "level": logging.NOTSET}, threading.Lock()  # several threads may load at once


def _hush(loads: int) -> None:
    """Counts loads that began or ended; the first silences the hub's warnings, the last lets them be heard again."""
    hub = logging.getLogger("huggingface_hub")  # warns of every request that failed, before it tries again
    with _LOCK:
        if not _QUIET["loads"]:
            _QUIET["level"] = hub.level
        _QUIET["loads"] += loads
        hub.setLevel(logging.ERROR if _QUIET["loads"] else _QUIET["level"])


@contextmanager
def quiet_loading(source: str | Path) -> Iterator[None]:
    """Without the hub's warnings, and without progress bars when `source` is a folder; a download shows its own."""
    logs = [diffusers.utils.logging, transformers.utils.logging] if Path(source).is_dir() else []
    shown = [log for log in logs if log.is_progress_bar_enabled()]
    _hush(1)  # nothing may fail between this and `try`
    for log in shown:
        log.disable_progress_bar()
    try:
        yield
    finally:
        _hush(-1)
        for log in shown:
            log.enable_progress_bar()


def fetch_official(variant: str) -> Path:
    """The published file of a variant, downloaded once; its contents are compared with the pinned sha256.

    Raises:
        EncoderUnavailable: it cannot be downloaded.
        ValueError: the pinned commit has no such file, or the file differs.
    """
    name = f"Nitro-E-{variant}.safetensors"
    if variant not in OFFICIAL_SUMS:
        raise InvalidValue(
            f"variant={variant}: {OFFICIAL} has {', '.join(OFFICIAL_SUMS)} at the pinned commit; download {name} and "
            "name the file"
        )
    place = {"repo_id": OFFICIAL, "filename": name, "revision": HUB_REVISIONS[OFFICIAL]}
    path = Path(_readable(OFFICIAL, "--model FILE", huggingface_hub.hf_hub_download, **place))
    if sha256_file(path) != OFFICIAL_SUMS[variant]:
        raise InvalidValue(f"{path}: contents differ from what {OFFICIAL} published; delete the file and try again")
    return path


@contextmanager
def one_line(source: str | Path, name: str = "model") -> Iterator[None]:
    """Whatever libraries raise on a folder that is damaged, or is none of ours, as one error; its cause is kept."""
    try:
        yield
    except (UserError, torch.OutOfMemoryError, MemoryError):
        raise
    except Exception as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise InvalidValue(f"{name}: {source} cannot be loaded ({type(error).__name__}: {reason})") from error


def attempt(source: str | Path, option: str, load, **arguments):
    """Calls a `from_pretrained`; whatever the hub answers, or a damaged file, ends in one readable error.

    A folder that lies beside a list of checksums, as shipped weights do, must agree with it.
    """
    check_weights(Path(arguments["pretrained_model_name_or_path"]))
    return _readable(source, option, load, **arguments)


def attempt_model(source: str | Path, option: str, load, **arguments) -> nn.Module:
    """As `attempt`; a folder that lacks some of the weights is refused: libraries fill them with noise or nothing."""
    model, found = attempt(source, option, load, output_loading_info=True, **arguments)
    if missing := sorted(found["missing_keys"]):
        raise EncoderUnavailable(f"{source}: cannot be loaded ({len(missing)} weights are missing: {missing[0]}, ...)")
    return model


def _readable(source: str | Path, option: str, load, **arguments):
    try:
        with quiet_loading(source):
            return load(**arguments)
    except (torch.OutOfMemoryError, MemoryError):
        raise
    except Exception as error:  # libraries raise many kinds on settings that make no sense
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    if Path(source).is_dir():
        message = f"{source}: cannot be loaded ({reason})"
    else:
        message = (
            f"{source}: cannot be downloaded ({reason}). If it asks for a licence, accept it at "
            f"https://huggingface.co/{source} and run `hf auth login`; without network, download it "
            f"elsewhere and name its folder: {option}"
        )
    raise EncoderUnavailable(message)  # outside the except block: no chain of causes to dig through


def weights_hash(
    modules: Mapping[str, nn.Module | None], *, rounded_to: torch.dtype | None = None, **facts: Any
) -> str:
    """SHA-256 over the names, types and values of all weights, whatever file they came from.

    Args:
        modules: part -> module; parts that are None count as absent. FP8 weights count as fn codes and scales.
        rounded_to: number type that floating-point weights are rounded to before they count, so that a model loaded in
            float32 and in bfloat16 is the same; None: as they are.
        **facts: anything else that the name should depend on (JSON types).

    Returns:
        64 hexadecimal digits.
    """
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode())
    for part, module in modules.items():
        for name, value in sorted(plain_tensors(module).items()) if module is not None else ():
            value = value.detach().cpu()
            value = value.to(rounded_to) if rounded_to is not None and value.is_floating_point() else value
            digest.update(f"{part}.{name} {value.dtype} {tuple(value.shape)}".encode())
            digest.update(value.contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
