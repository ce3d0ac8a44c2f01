"""The number type that a run computes in: named in its settings, or measured once when it starts.

bf16 moves half the bytes, and a processor with instructions for it (avx512_bf16, AMX, any recent accelerator)
multiplies about twice as fast. Others take it apart in software and need twice the time of float32. So
`precision="auto"` times the products of a transformer both ways; the main process decides for all, the choice is
written into the run's `config.json`, and a run that is resumed keeps it, wherever it goes on. Masters are float32
either way.
"""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list

from nitro_e_lite.config import RunConfig
from nitro_e_lite.files import read_json

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16}
_WORTH_IT = 1.2  # times as fast, or float32 stays: casts and rounding cost something too


def settle_precision(config: RunConfig, run_dir: Path, resume: bool, accelerator: Accelerator) -> RunConfig:
    """`config` with "auto" replaced by the number type of the run.

    Args:
        config: of the run; a named type is left as it is.
        run_dir: its folder; a run that is resumed computes in the type that is recorded there.
        resume: whether the run goes on from a checkpoint.
        accelerator: the processes; all of them get the choice of the first.
    """
    if config.precision != "auto":
        return config
    chosen = [_recorded(run_dir) if resume else None]
    if accelerator.is_main_process and chosen[0] is None:
        chosen = [faster_precision(accelerator.device)]
    return dataclasses.replace(config, precision=broadcast_object_list(chosen)[0])


def _recorded(run_dir: Path) -> str | None:
    """What an earlier part of the run computed in, if there was one."""
    file = run_dir / "config.json"
    if not file.is_file() or not (run_dir / "checkpoints").is_dir():
        return None
    config = read_json(file).get("config")
    name = config.get("precision") if isinstance(config, dict) else None
    return next((known for known in PRECISIONS if known == name), None)


def faster_precision(device: torch.device, seconds: float = 0.3) -> str:
    """ "bf16" where it multiplies clearly faster than float32 does, else "fp32".

    Args:
        device: where the products are timed.
        seconds: for each type.
    """
    times = {name: _product_seconds(device, dtype, seconds) for name, dtype in PRECISIONS.items()}
    return "bf16" if times["fp32"] > _WORTH_IT * times["bf16"] else "fp32"


def _product_seconds(device: torch.device, dtype: torch.dtype, seconds: float) -> float:
    """The shortest time of a product as large as those of a lite model: (4096, 192) by (192, 576)."""
    left, right = (torch.ones(shape, device=device, dtype=dtype) for shape in ((4096, 192), (192, 576)))
    best, end = float("inf"), time.perf_counter() + seconds
    while time.perf_counter() < end:
        begin = time.perf_counter()
        product = left @ right
        product[0, 0].item()  # waits for an accelerator
        best = min(best, time.perf_counter() - begin)
    return best
