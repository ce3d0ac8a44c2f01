"""Cached latents: what training reads instead of encoding the same images again and again.

A data set is a folder in the Arrow format of Hugging Face ``datasets``, read by memory map. Each row holds one image's
normalised latents and its captions. A ``card.json`` beside it carries the fingerprint of the encoder that made the
latents; opening a folder made by another encoder is an error: a model trained on it would learn nothing of use.

The order of training is a pure function: ``batch_indices(seed, length, batch_size, step)`` says which rows a step
reads. No sampler state exists, so a resumed run continues with the exact next batch.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import datasets
import numpy as np
import torch
from torch import Tensor

CARD = "card.json"


@dataclass(frozen=True)
class LatentBatch:
    """``latents`` float32 (B, C, H, W) and the captions of each image (at least one)."""

    latents: Tensor
    captions: list[list[str]]


class LatentDataset:
    """A folder of cached latents.

    Args:
        folder: what ``write_latents`` made.
        fingerprint: of the encoder in use; None skips the check (for inspection only).

    Raises:
        FileNotFoundError: when the folder holds no data set.
        ValueError: when the latents were made by another encoder.
    """

    def __init__(self, folder: str | Path, fingerprint: str | None):
        path = Path(folder) / CARD
        if not path.is_file():
            raise FileNotFoundError(f"{folder}: no latent data set ({CARD} is missing)")
        self.card = json.loads(path.read_text(encoding="utf-8"))
        if fingerprint is not None and self.card["fingerprint"] != fingerprint:
            raise ValueError(
                f"{folder}: latents were made by encoder {self.card['fingerprint'][:12]}, this run uses "
                f"{fingerprint[:12]}; encode the data again (delete the folder) or name the matching encoder"
            )
        self._rows = datasets.load_from_disk(str(folder)).with_format("numpy")
        self.shape = tuple(self.card["shape"])

    def __len__(self) -> int:
        return len(self._rows)

    def batch(self, indices) -> LatentBatch:
        """The rows ``indices`` as one batch."""
        rows = self._rows[[int(i) for i in indices]]
        latents = np.stack(rows["latents"]).astype(np.float32)
        return LatentBatch(torch.from_numpy(latents).unflatten(1, self.shape), [list(c) for c in rows["captions"]])


def write_latents(
    folder: str | Path, batches: Iterable[LatentBatch], fingerprint: str, about: dict | None = None
) -> None:
    """Writes a data set, whole or not at all.

    Args:
        folder: where to; must not exist.
        batches: latents and captions, in order; latents are stored as float16.
        fingerprint: of the encoder.
        about: anything JSON-able to keep in the card.
    """
    folder, shape = Path(folder), []
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)

    from datasets.arrow_writer import ArrowWriter

    writer = None
    for batch in batches:
        if writer is None:
            shape = list(batch.latents.shape[1:])
            features = datasets.Features(
                {
                    "latents": datasets.List(datasets.Value("float16"), length=int(np.prod(shape))),
                    "captions": datasets.List(datasets.Value("string")),
                }
            )
            writer = ArrowWriter(path=str(partial / "data.arrow"), features=features)
        flat = batch.latents.to(torch.float16).flatten(1).cpu().numpy()
        writer.write_batch({"latents": list(flat), "captions": batch.captions})
    if writer is None:
        raise ValueError(f"{folder}: no data to write")
    writer.finalize()
    writer.close()
    datasets.Dataset.from_file(str(partial / "data.arrow")).save_to_disk(str(partial / "rows"))
    (partial / "data.arrow").unlink()
    for file in (partial / "rows").iterdir():
        os.replace(file, partial / file.name)
    (partial / "rows").rmdir()
    card = {"fingerprint": fingerprint, "shape": shape, **(about or {})}
    (partial / CARD).write_text(json.dumps(card, indent=1) + "\n", encoding="utf-8")
    os.replace(partial, folder)


def batch_indices(seed: int, length: int, batch_size: int, step: int) -> np.ndarray:
    """Which rows step ``step`` (counted from 0) reads: a fresh permutation each epoch, the incomplete rest left out.

    Args:
        seed: of the order.
        length: rows in the data set.
        batch_size: rows a step.
        step: global step.

    Returns:
        int64 (batch_size,).

    Raises:
        ValueError: when a batch is larger than the data set.
    """
    if batch_size > length:
        raise ValueError(f"batch_size={batch_size}: larger than the data set ({length} rows)")
    epoch, position = divmod(step, length // batch_size)
    return _permutation(seed, epoch, length)[position * batch_size : (position + 1) * batch_size]


@lru_cache(maxsize=2)
def _permutation(seed: int, epoch: int, length: int) -> np.ndarray:
    """The order of one epoch; remembered, because every step of the epoch asks for it."""
    generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
    return torch.randperm(length, generator=generator).numpy()
