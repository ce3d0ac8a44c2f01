"""The models of Table 2: their sizes recomputed, and their transformers timed side by side.

Each file of `peers/` holds one row: the configuration of the network with its source and date, what it is called with
for one 512 px picture, and what the paper says of it. The library's own classes are built on the meta device and
counted as E-MMDiT is (`model/flops.py`): a multiply-add is two FLOPs, products inside attention are counted apart.
What the library has no class for is not counted, and says so. With random weights the same rows are timed, one after
the other on one machine, batch and number type: ratios, where the paper has figures of its own machine.

An input is given by its shape; `B` is the batch, `{"ones": shape}` a mask.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from diffusers.models.embeddings import get_2d_rotary_pos_embed
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from nitro_e_lite import runtime
from nitro_e_lite.errors import InvalidValue
from nitro_e_lite.evaluation.benchmark import measured_peak, median_seconds
from nitro_e_lite.files import read_json
from nitro_e_lite.inference.arguments import as_integer
from nitro_e_lite.model import fp8
from nitro_e_lite.model.emmdit import EMMDiTTransformer2DModel
from nitro_e_lite.model.flops import find_peak

FOLDER = Path(__file__).with_suffix("")
_IN_ATTENTION = ("bmm", "attention")  # operations without weights
FEW = ("e_mmdit", "e_mmdit_4step")  # what is compared with it
REFERENCE = "sana_600m"  # whose throughput the paper's 3.07 is relative to
IN_FP8 = ("sd35_large", "e_mmdit")  # the size that the claims are about first


@dataclass(frozen=True)
class Peer:
    """One row of Table 2, or a text encoder beside it.

    Attributes:
        key: name of its file.
        name: as the paper calls it.
        cls: class of the network, None when the library has none.
        config: its constructor arguments.
        inputs: argument of its `forward` -> shape.
        source, date: where the configuration stands and when it was read.
        note: why a count differs from the paper's, or that there is none.
        paper: column of the table -> figure, None for what the paper leaves out or for what is no row of it.
        call: method that is counted and timed.
        draws: what a picture takes besides: keys of its `text` encoder and `decoder`, `steps`, whether it is `guided`.
    """

    key: str
    name: str
    cls: str | None
    config: dict[str, Any]
    inputs: dict[str, Any]
    source: str
    date: str
    note: str
    paper: dict[str, float | None] | None
    call: str = "forward"
    draws: dict[str, Any] | None = None


@dataclass(frozen=True)
class Counts:
    """Size and arithmetic of one forward pass for one picture.

    Attributes:
        parameters: of the network.
        weights: FLOPs of products with weights.
        attention: FLOPs of all other products.
    """

    parameters: int
    weights: int
    attention: int

    @property
    def tflops(self) -> float:
        """Both together, as the paper counts."""
        return (self.weights + self.attention) / 1e12


def load_peers() -> dict[str, Peer]:
    """All peers by key, in the order of the table."""
    found = {path.stem: read_json(path) for path in FOLDER.glob("*.json")}
    rows = sorted(found.items(), key=lambda item: item[1]["row"])
    return {key: Peer(key, cls=row.pop("class"), **{k: v for k, v in row.items() if k != "row"}) for key, row in rows}


def table_rows() -> dict[str, Peer]:
    """Those of them that are rows of Table 2."""
    return {key: peer for key, peer in load_peers().items() if peer.paper is not None}


def build(peer: Peer, device: str | torch.device = "meta", dtype: torch.dtype = torch.float32) -> nn.Module:
    """The network of a peer, with random weights.

    Raises:
        ValueError: the library has no class for it.
    """
    if peer.cls is None:
        raise InvalidValue(f"{peer.name}: {peer.note}")
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)  # so that the weights are never there in 32 bit as well
    try:
        with torch.device(device):
            if peer.cls == "EMMDiTTransformer2DModel":
                model = EMMDiTTransformer2DModel(**peer.config)
            elif hasattr(diffusers, peer.cls):
                model = getattr(diffusers, peer.cls)(**peer.config)
            else:
                cls = getattr(transformers, peer.cls)
                model = cls(cls.config_class(**peer.config))
    finally:
        torch.set_default_dtype(before)
    return nn.Module.to(model, dtype).eval().requires_grad_(False)  # buffers too


def make_inputs(
    peer: Peer, batch: int = 1, device: str | torch.device = "meta", dtype: torch.dtype = torch.float32
) -> dict[str, Any]:
    """What a peer is called with for `batch` pictures: noise, in the shapes of its file."""

    def tensor(name: str, shape: Any) -> Any:
        if isinstance(shape, dict):
            if "ones" in shape:
                return torch.ones([batch if n == "B" else n for n in shape["ones"]], dtype=torch.long, device=device)
            return {inner: tensor(inner, value) for inner, value in shape.items()}
        if shape is None:
            return None
        sizes = [batch if n == "B" else n for n in shape]
        if name == "input_ids":
            return torch.zeros(sizes, dtype=torch.long, device=device)
        if name == "timestep":
            return torch.full(sizes, 500.0, device=device)
        return torch.randn(sizes, device=device, dtype=dtype)

    inputs = {name: tensor(name, shape) for name, shape in peer.inputs.items()}
    if peer.cls == "HunyuanDiT2DModel":  # the pipeline makes these angles, one for each patch
        side = peer.inputs["hidden_states"][-1] // peer.config["patch_size"]
        angles = get_2d_rotary_pos_embed(
            peer.config["attention_head_dim"], ((0, 0), (side, side)), (side, side), output_type="pt"
        )
        inputs["image_rotary_emb"] = tuple(one.to(device, dtype) for one in angles)
    return inputs


@cache
def _count(network: str) -> Counts:
    """Of the class, configuration, inputs and call of a peer, as JSON: rows that share a network share its count."""
    cls, config, inputs, call = json.loads(network)
    peer = Peer("", "", cls, config, inputs, "", "", "", None, call)
    model = build(peer)
    if cls == "Lumina2Transformer2DModel":
        _embed_on_cpu(model)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        getattr(model, call)(**make_inputs(peer))
    by_kind: Counter[str] = Counter()
    for operation, flops in counter.get_flop_counts()["Global"].items():
        by_kind["attention" if any(word in str(operation) for word in _IN_ATTENTION) else "weights"] += flops
    return Counts(sum(p.numel() for p in model.parameters()), by_kind["weights"], by_kind["attention"])


def _embed_on_cpu(model: nn.Module) -> None:
    """Lumina's rotary embedding asks its mask how long each text is, and on the meta device a mask holds nothing."""
    old = model.rope_embedder
    model.rope_embedder = type(old)(old.theta, old.axes_dim, old.axes_lens, old.patch_size)
    model.rope_embedder.register_forward_pre_hook(
        lambda _, args: (torch.zeros(args[0].shape), torch.ones(args[1].shape, dtype=torch.long))
    )
    model.rope_embedder.register_forward_hook(
        lambda _, args, out: tuple(one.to("meta") if isinstance(one, torch.Tensor) else one for one in out)
    )


def count(peer: Peer) -> Counts | None:
    """Parameters and FLOPs of a peer, one picture of 512 px; None when the library has no class for it."""
    return None if peer.cls is None else _count(json.dumps([peer.cls, peer.config, peer.inputs, peer.call]))


@torch.no_grad()
def time_peers(
    peers: Mapping[str, Peer],
    batch: int = 1,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
    repeats: int = 3,
    compiled: bool = False,
) -> Iterator[dict[str, Any]]:
    """Times the parts of every peer that `draws`, one after the other, at random weights.

    Args:
        peers: all of them, see `load_peers`: text encoders and decoders are looked up among them.
        batch: pictures at once.
        device, dtype: where and in which number type; the accelerator and its 16-bit type when not given.
        repeats: runs of which the median counts.
        compiled: `torch.compile` of each transformer, with CUDA graphs where there are any.

    Yields:
        One row a peer: `name`, `steps`, seconds of the `text`, of one `pass` of the transformer (guided: both
        halves), of the `decoder` and of the batch `in_all`, `images_per_second`, and `peak_share`, the transformer's
        share of the device's peak: of the data sheet, or what one large product reaches where there is none.
    """
    batch, device = as_integer("batch", batch, 1), runtime.pick_device(device)
    as_integer("repeats", repeats, 1)  # before models of gigabytes are made
    runtime.check_memory(f"batch={batch}", 4 * 3 * 512**2 * batch)  # the pictures alone
    dtype = runtime.pick_dtype(dtype, device)
    peak = find_peak(runtime.device_name(device)) or measured_peak(device=device, dtype=dtype)
    seconds: dict[tuple[str, int], float] = {}

    def clock(peer: Peer, pictures: int) -> float:
        if (peer.key, pictures) not in seconds:
            model = build(peer, device, dtype)
            seconds[peer.key, pictures] = _time(model, peer, pictures, repeats, compiled and bool(peer.draws))
        return seconds[peer.key, pictures]

    for peer in peers.values():
        if (draws := peer.draws) is None:
            continue
        rows = batch * (2 if draws["guided"] else 1)
        parts = {"text": clock(peers[draws["text"]], rows), "pass": clock(peer, rows)}
        parts["decoder"] = clock(peers[draws["decoder"]], batch)
        in_all = parts["text"] + draws["steps"] * parts["pass"] + parts["decoder"]
        flops = count(peer)
        share = rows * flops.tflops * 1e12 / parts["pass"] / peak if flops else None
        yield {
            "key": peer.key,
            "name": peer.name,
            "batch": batch,
            "dtype": str(dtype).removeprefix("torch."),
            "steps": draws["steps"],
            "guided": draws["guided"],
            **parts,
            "in_all": in_all,
            "images_per_second": batch / in_all,
            "peak_share": share,
        }


def time_fp8(
    peers: Mapping[str, Peer],
    batch: int = 1,
    device: str | torch.device | None = None,
    repeats: int = 3,
    compiled: bool = False,
    keys: Sequence[str] | None = None,
) -> Iterator[dict[str, Any]]:
    """Times the transformers of `keys` in bfloat16 and in FP8, as far as the device can, at random weights.

    Args:
        peers, batch, device, repeats, compiled: see `time_peers`.
        keys: those of `IN_FP8` when not given.

    Yields:
        One row each: `name`, seconds of one `pass` in bfloat16 and one `pass_fp8`, their `ratio`, the `rung` of the
        ladder with its `reasons`, `bytes`, those of FP8's weights in relation to bfloat16's, and `memory`, the same of
        the most that tensors took on the accelerator (on a CPU: of the process, which says little).
    """
    as_integer("batch", batch, 1), as_integer("repeats", repeats, 1)
    device = runtime.pick_device(device)
    for key in IN_FP8 if keys is None else keys:
        peer, model = peers[key], build(peers[key], device, torch.bfloat16)
        forget(device)
        exact, memory = _time(model, peer, batch, repeats, compiled), runtime.memory_used(device, reserved=False)
        report = fp8.quantize_model(model)
        forget(device)
        fast = _time(model, peer, batch, repeats, compiled)
        about = {"rung": report.rung, "reasons": report.reasons, "bytes": report.bytes.ratio}
        about["memory"] = runtime.memory_used(device, reserved=False) / memory
        if report.rung == "dynamic":  # products in FP8: only these can be faster
            about["ratio_dynamic"] = exact / fast
        del model
        yield {"key": key, "name": peer.name, "batch": batch, "compiled": compiled} | {
            "pass": exact, "pass_fp8": fast, "ratio": exact / fast, **about
        }  # fmt: skip


def forget(device: torch.device) -> None:
    """Lets memory be counted anew; compiled graphs go first, which have pools of their own."""
    torch._dynamo.reset()
    runtime.forget_memory(device)


@torch.no_grad()
def _time(model: nn.Module, peer: Peer, batch: int, repeats: int, compiled: bool) -> float:
    """Median seconds of one call of a peer."""
    first = next(model.parameters())
    call, inputs = getattr(model, peer.call), make_inputs(peer, batch, first.device, first.dtype)
    if compiled:
        torch._dynamo.reset()
        mode = "reduce-overhead" if first.device.type == "cuda" else None
        call = torch.compile(call, mode=mode, dynamic=False)
    return median_seconds(
        lambda: call(**inputs), repeats, warmup=1 if first.device.type == "cpu" and not compiled else 3
    )


def ratios(rows: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Speed of each row in relation to `REFERENCE`: `end_to_end`, and `transformer` alone (all passes of a picture).

    Raises:
        ValueError: the reference is not among them.
    """
    base = next((row for row in rows if row["key"] == REFERENCE), None)
    if base is None:
        raise InvalidValue(f"rows: {REFERENCE} is not among them, which all others are compared with")
    return {
        row["key"]: {
            "end_to_end": base["in_all"] / row["in_all"],
            "transformer": base["steps"] * base["pass"] / (row["steps"] * row["pass"]),
        }
        for row in rows
    }
