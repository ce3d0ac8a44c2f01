"""Checkpoints that survive a kill: written aside, checked by sha256, renamed into place.

A checkpoint is a folder ``step-00001000`` with safetensors files and ``state.json``; the latter lists the sha256 of
every file and is written last. The folder gets its name by one atomic rename after everything is on disk, so a run
killed at any moment leaves either the whole checkpoint or none of it. A checkpoint that does not match its own list is
skipped and the one before it is used.
"""

from __future__ import annotations

import json
import os
import shutil
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from nitro_e_lite.common import sha256_file

STATE = "state.json"


def _fsync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def save_checkpoint(
    folder: Path, step: int, tensors: Mapping[str, Mapping[str, Tensor]], state: dict[str, Any], keep: int
) -> Path:
    """Writes one checkpoint and removes old ones.

    Args:
        folder: where checkpoints live.
        step: finished optimiser steps.
        tensors: file stem -> named tensors, e.g. ``{"weights": {...}, "ema": {...}, "optimizer": {...}}``.
        state: JSON-able rest.
        keep: how many checkpoints to keep, the newest ones.

    Returns:
        The checkpoint's folder.
    """
    final = folder / f"step-{step:08d}"
    partial = folder / f".partial-{step:08d}"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    sums = {}
    for stem, named in tensors.items():
        path = partial / f"{stem}.safetensors"
        save_file({name: tensor.detach().contiguous() for name, tensor in named.items()}, path)
        _fsync(path)
        sums[path.name] = sha256_file(path)
    path = partial / STATE
    path.write_text(json.dumps({"step": step, "sha256": sums, **state}, indent=1) + "\n", encoding="utf-8")
    _fsync(path)
    if final.exists():  # a resumed run came back to the same step
        shutil.rmtree(final)
    os.replace(partial, final)
    _fsync(folder)
    for old in list_checkpoints(folder)[:-keep]:
        shutil.rmtree(old)
    return final


def list_checkpoints(folder: Path) -> list[Path]:
    """Checkpoint folders, oldest first."""
    return sorted(p for p in folder.glob("step-*") if (p / STATE).is_file())


def load_checkpoint(path: Path) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
    """Reads one checkpoint.

    Returns:
        The tensors by file stem, and the state.

    Raises:
        ValueError: when a file is missing or differs from its sha256.
    """
    state = json.loads((path / STATE).read_text(encoding="utf-8"))
    for name, digest in state["sha256"].items():
        if not (path / name).is_file() or sha256_file(path / name) != digest:
            raise ValueError(f"{path / name}: missing or damaged (its sha256 is not the one in {STATE})")
    return {Path(name).stem: load_file(path / name) for name in state["sha256"]}, state


def load_latest(folder: Path) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]] | None:
    """The newest undamaged checkpoint, or None when there is none; damaged ones are named in a warning."""
    for path in reversed(list_checkpoints(folder)):
        try:
            return load_checkpoint(path)
        except (ValueError, json.JSONDecodeError) as error:
            warnings.warn(f"checkpoint skipped: {error}", stacklevel=2)
    return None


def optimizer_tensors(optimizer: torch.optim.Optimizer, names: Mapping[Tensor, str]) -> dict[str, Tensor]:
    """An optimiser's state as named tensors, ``parameter name/entry``."""
    return {
        f"{names[parameter]}/{entry}": value
        for parameter, entries in optimizer.state.items()
        for entry, value in entries.items()
    }


def restore_optimizer(
    optimizer: torch.optim.Optimizer, named: Mapping[str, Tensor], parameters: Mapping[str, Tensor]
) -> None:
    """The inverse of ``optimizer_tensors``: fills the state of the parameters this optimiser owns."""
    owned = {p for group in optimizer.param_groups for p in group["params"]}
    for key, value in named.items():
        name, entry = key.rsplit("/", 1)
        if parameters[name] in owned:
            optimizer.state[parameters[name]][entry] = value.clone()
