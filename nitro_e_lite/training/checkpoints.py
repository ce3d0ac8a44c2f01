"""Checkpoints that survive a kill: written aside, checked by sha256, renamed into place.

A checkpoint is a folder `step-00001000` with safetensors files and `state.json`; the latter lists the sha256 of
every file and is written last. The folder gets its name by one atomic rename after everything is on disk, so a run
killed at any moment leaves either the whole checkpoint or none of it. A checkpoint that does not match its own list is
skipped and the one before it is used. A checkpoint that cannot be written (a full disk) is an error, and the ones
before it are untouched: old ones are removed only after the new one stands.

A run that is *asked* to stop, by SIGTERM or SIGINT, ends the step in progress and writes a checkpoint first.

`CheckpointWriter` does the writing beside the training: a step waits for the copy of the tensors alone.
"""

from __future__ import annotations

import copy
import json
import os
import shutil
import time
import warnings
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from nitro_e_lite.errors import InvalidValue
from nitro_e_lite.files import _fsync, atomic_folder, read_json, sha256_file

STATE = "state.json"


def save_checkpoint(
    folder: Path, step: int, tensors: Mapping[str, Mapping[str, Tensor]], state: dict[str, Any], keep: int
) -> Path:
    """Writes one checkpoint and removes old ones.

    Args:
        folder: where checkpoints live.
        step: finished optimiser steps.
        tensors: file stem -> named tensors, e.g. `{"weights": {...}, "ema": {...}, "optimizer": {...}}`.
        state: JSON-able rest.
        keep: how many checkpoints to keep, the newest ones.

    Returns:
        The checkpoint's folder.

    Raises:
        OSError: it could not be written, for example because the disk is full; what was there before still is.
    """
    final = folder / f"step-{step:08d}"
    before = list_checkpoints(folder)[-1:]
    with atomic_folder(final, f"{before[0].name} is intact" if before else "there is none before it") as partial:
        _write(partial, step, tensors, state)
    _fsync(folder)
    there = list_checkpoints(folder)
    now = there.index(final)
    for old in there[: max(0, now + 1 - keep)] + there[now + 1 :]:  # later ones were damaged: the run went back
        try:
            shutil.rmtree(old)
        except OSError as error:  # on NFS while somebody reads it; the new one stands, and the next save tries again
            warnings.warn(f"{old}: not removed ({error.strerror or error})", stacklevel=2)
    return final


class CheckpointWriter:
    """Writes checkpoints in a thread, one after the other, from copies of the tensors.

    Args:
        folder: where checkpoints live.
        keep: how many to keep.
    """

    def __init__(self, folder: Path, keep: int):
        self.folder, self.keep = folder, keep
        self._thread = ThreadPoolExecutor(1, "checkpoint")
        self._running: Future[Path] | None = None
        self._copies: dict[str, Tensor] = {}  # kept from one checkpoint to the next: page-locked memory is dear to get
        self._last = time.monotonic()

    @property
    def minutes(self) -> float:
        """Since the last checkpoint was begun, or since the start."""
        return (time.monotonic() - self._last) / 60

    def save(self, step: int, tensors: Mapping[str, Mapping[str, Tensor]], state: dict[str, Any]) -> None:
        """Copies everything and begins to write it; arguments as in `save_checkpoint`. Waits for the one before.

        Raises:
            OSError: the one before could not be written.
        """
        self.wait()
        self._last = time.monotonic()
        copies = {
            stem: {name: self._copy(f"{stem} {name}", tensor.detach()) for name, tensor in named.items()}
            for stem, named in tensors.items()
        }
        if torch.accelerator.is_available():
            torch.accelerator.synchronize()
        arguments = self.folder, step, copies, copy.deepcopy(state), self.keep
        self._running = self._thread.submit(save_checkpoint, *arguments)

    def _copy(self, name: str, tensor: Tensor) -> Tensor:
        there = self._copies.get(name)
        if there is None or there.shape != tensor.shape or there.dtype != tensor.dtype:
            locked = tensor.device.type == "cuda"
            there = self._copies[name] = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=locked)
        return there.copy_(tensor, non_blocking=True)

    def check(self) -> None:
        """Looks whether the writing has failed, without waiting for it.

        Raises:
            OSError: it has.
        """
        if self._running is not None and self._running.done():
            self.wait()

    def wait(self) -> Path | None:
        """Until the checkpoint stands; its folder, or None when none was being written.

        Raises:
            OSError: it could not be written.
        """
        running, self._running = self._running, None
        return None if running is None else running.result()

    def close(self) -> None:
        """Until nothing is being written; what went wrong there has been raised by `wait` or matters less by now."""
        if self._running is not None:
            wait([self._running])


FIXED = (
    "stage",
    "method",
    "model",
    "adapter",
    "lora",
    "dense_time",
    "guidance_embedding",
    "depths",
    "head_width",
    "seed",
    "batch_size",
    "updates",
    "group",
)  # of a run that has them: other values are another run

NOT_LEARNED = (  # what is changed freely, because the model learns the same
    "start_from steps accumulate log_every validate_every sample_every checkpoint_every keep_checkpoints max_skipped "
    "guidance shift gradient_checkpointing compile tracker peak_tflops checkpoint_minutes snapshot_every milestones "
    "validation_share patience"
).split()


def compare_settings(before: dict[str, Any], now: dict[str, Any], step: int, say: bool = True) -> None:
    """Holds the settings of a run that goes on against those it was started with; `say`: warns of changed ones.

    Raises:
        ValueError: a setting that makes it another run, or fewer steps than were trained.
    """
    now = json.loads(json.dumps(now))
    for name in FIXED:
        if name in now and before.get(name, now[name]) != now[name]:
            raise InvalidValue(f"{name}={now[name]}: the run was started with {before[name]}; name another folder")
    optimizers = [one["optimizer"]["name"] for one in (before, now) if isinstance(one.get("optimizer"), dict)]
    if len(set(optimizers)) > 1:
        raise InvalidValue(
            f"optimizer.name={optimizers[1]}: the run was started with {optimizers[0]}, whose state is another; name "
            "another folder"
        )
    if now["steps"] < step:
        raise InvalidValue(f"steps={now['steps']}: the run has been trained to step {step}")
    learned = {"guidance"} if now.get("guidance_embedding") is False else set()  # by SANA-Sprint, that strength alone
    learned |= {"guidance", "shift"} if now.get("stage") == "rewards" else set()  # its roll-outs are drawn with them
    names = now.keys() - NOT_LEARNED | learned
    changed = [text for name in names for text in _changes(name, before.get(name), now[name])]
    if changed and say:
        warnings.warn(f"from step {step} on other settings hold: {', '.join(sorted(changed))}", stacklevel=3)


def _changes(name: str, before: Any, now: Any) -> Iterator[str]:
    if isinstance(before, dict) and isinstance(now, dict):
        for field in before.keys() & now.keys():  # a field of one version only was not changed by anyone
            yield from _changes(f"{name}.{field}", before[field], now[field])
    elif before is not None and before != now:
        yield f"{name} {json.dumps(before)} -> {json.dumps(now)}"


def _write(partial: Path, step: int, tensors: Mapping[str, Mapping[str, Tensor]], state: dict[str, Any]) -> None:
    """Writes all files of a checkpoint, `state.json` last."""
    sums = {}
    for stem, named in tensors.items():
        path = partial / f"{stem}.safetensors"
        save_file({name: tensor.detach().contiguous() for name, tensor in named.items()}, path)
        _fsync(path)
        sums[path.name] = sha256_file(path)
    path = partial / STATE
    path.write_text(json.dumps({"step": step, "sha256": sums, **state}, indent=1) + "\n", encoding="utf-8")
    _fsync(path)


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
    state = read_json(path / STATE)
    if not isinstance(state.get("sha256"), dict):
        raise InvalidValue(f"{path / STATE}: names no files")
    for name, digest in state["sha256"].items():
        if not os.path.isfile(path / name) or sha256_file(path / name) != digest:
            raise InvalidValue(f"{path / name}: missing or damaged (its sha256 is not the one in {STATE})")
    return {Path(name).stem: load_file(path / name) for name in state["sha256"]}, state


def load_latest(folder: Path) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]] | None:
    """The newest undamaged checkpoint, or None in a folder without any; damaged ones are named in a warning.

    Raises:
        ValueError: there are checkpoints and all are damaged. Starting anew would undo the run unasked.
    """
    there = list_checkpoints(folder)
    for path in reversed(there):
        try:
            return load_checkpoint(path)
        except ValueError as error:
            warnings.warn(f"checkpoint skipped: {error}", stacklevel=2)
    if there:
        names = ", ".join(path.name for path in there)
        raise InvalidValue(
            f"{folder}: all checkpoints are damaged ({names}); move them away to start from the beginning"
        )
    return None


def optimizer_tensors(optimizer: torch.optim.Optimizer, names: Mapping[Tensor, str]) -> dict[str, Tensor]:
    """An optimiser's state as named tensors, `parameter name/entry`."""
    return {
        f"{names[parameter]}/{entry}": value
        for parameter, entries in optimizer.state.items()
        for entry, value in entries.items()
    }


def restore_optimizer(
    optimizer: torch.optim.Optimizer, named: Mapping[str, Tensor], parameters: Mapping[str, Tensor]
) -> None:
    """The inverse of `optimizer_tensors`: fills the state of the parameters this optimiser owns, on their device."""
    owned = [p for group in optimizer.param_groups for p in group["params"]]
    number = {parameter: k for k, parameter in enumerate(owned)}  # as the optimiser's state_dict counts them
    state: dict[int, dict[str, Tensor]] = {}
    for key, value in named.items():
        name, entry = key.rsplit("/", 1)
        if parameters[name] in number:
            state.setdefault(number[parameters[name]], {})[entry] = value.clone()
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
