"""The training data of the lite model: scenes, encoded once and cached."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm.auto import tqdm

from nitro_e_lite.config import FACTS, DataConfig, to_dict
from nitro_e_lite.data.shard_writer import write_latents
from nitro_e_lite.data.shards import LatentBatch, LatentDataset
from nitro_e_lite.files import cache_dir, write_atomically
from nitro_e_lite.inference.encoders import Encoders, decode_latents
from nitro_e_lite.runtime import in_order
from nitro_e_lite.scenes.captions import caption
from nitro_e_lite.scenes.grammar import Scene, sample_scene
from nitro_e_lite.scenes.minimal_pairs import minimal_pair
from nitro_e_lite.scenes.render import render
from nitro_e_lite.scenes.verifier import Detection, detect

VALIDATION_START, VALIDATION_SEED = 2**40, 0  # the same scenes whatever a run trains on: its losses can be compared


def scene_row(data: DataConfig, row: int) -> Scene:
    """The scene of a row; rows 2k and 2k + 1 are a minimal pair when `data.pairs`."""
    return minimal_pair(data.seed, row // 2).scenes[row % 2] if data.pairs else sample_scene(data.seed, row)


def row_captions(data: DataConfig, row: int, scene: Scene) -> list[str]:
    """The captions kept with a row; those of a minimal pair have the same template, one by one."""
    variants = range(data.captions)
    if data.pairs:
        pair = minimal_pair(data.seed, row // 2)
        return [pair.captions(variant)[row % 2] for variant in variants]
    return [caption(scene, variant) for variant in variants]


def encode_scenes(
    encoders: Encoders, data: DataConfig, start: int, count: int, batch: int = 64
) -> Iterator[LatentBatch]:
    """Yields `LatentBatch` after `LatentBatch` for rows `start .. start + count` of the data set."""

    def encode(first: int) -> LatentBatch:
        rows = range(start + first, start + min(first + batch, count))
        scenes = [scene_row(data, row) for row in rows]
        images = torch.stack([torch.from_numpy(render(scene)) for scene in scenes])  # (B, H, W, 3)
        captions = [row_captions(data, row, scene) for row, scene in zip(rows, scenes, strict=True)]
        keys = [f"seed {data.seed}, {'pair row' if data.pairs else 'scene'} {row}" for row in rows]
        sources = ["synthetic_scenes"] * len(scenes)
        return LatentBatch(encoders.encode_images(images).float(), captions, sources=sources, keys=keys)

    yield from _by_all_cores(encode, range(0, count, batch), encoders, "encoding scenes")


def _by_all_cores(work: Callable[[int], Any], parts: range, encoders: Encoders, title: str) -> Iterator[Any]:
    """What `work` makes of each part, in order; by one thread where the encoders are on an accelerator."""
    made = in_order(work, parts, None if encoders.vae.device.type == "cpu" else 1)
    return iter(tqdm(made, desc=title, total=len(parts), mininterval=5, leave=False))


def cached_scenes(encoders: Encoders, data: DataConfig, split: str) -> LatentDataset:
    """The latents of the training or validation scenes, encoded on first use and then read from the cache folder."""
    start, count = (0, data.scenes) if split == "train" else (VALIDATION_START, data.validation_scenes)
    if split == "validation":
        data = replace(data, pairs=(), seed=VALIDATION_SEED)
    kind = f"minimal-pairs-of-{len(FACTS)}-facts" if data.pairs else "scenes"  # another fact, other pairs
    name = f"{kind}-{encoders.image_fingerprint[:12]}-seed{data.seed}-{start}-{count}x{data.captions}"
    folder = cache_dir() / "latents" / name
    if not folder.exists():
        about = {"data": to_dict(data), "split": split}
        write_latents(folder, encode_scenes(encoders, data, start, count), encoders.image_fingerprint, about)
    return LatentDataset(folder, encoders.image_fingerprint)


REACH = 0.06  # how far from its place an object may be found, as a fraction of the picture


def is_read_back(scene: Scene, found: Sequence[Detection]) -> bool:
    """Whether the objects found are the scene's: each one's shape, colour and place, and nothing else."""
    left = list(found)
    for wanted in scene.objects:
        for one in left:
            near = abs(one.x - wanted.x) <= REACH and abs(one.y - wanted.y) <= REACH
            if near and (one.shape, one.color) == (wanted.shape, wanted.color):
                left.remove(one)
                break
        else:
            return False
    return not left


def readable_rows(
    encoders: Encoders, data: LatentDataset, scene: Callable[[int], Scene], store: Path | None
) -> np.ndarray:
    """Rows of cached scenes that the verifier reads back from their latents.

    Args:
        encoders: those that made the latents.
        data: cached scenes.
        scene: the scene of a row.
        store: file that keeps the answer, made on the first call; None keeps nothing.

    Returns:
        int64, ascending.
    """
    if store is not None and store.is_file():
        return np.array(json.loads(store.read_text(encoding="utf-8")), np.int64)

    def read(first: int) -> list[int]:
        numbers = range(first, min(first + 32, len(data)))
        latents = data.batch(numbers).latents.to(encoders.vae.device)
        images = decode_latents(encoders.vae, latents, encoders.stats)  # (B, 3, H, W)
        pixels = ((images.float().cpu().permute(0, 2, 3, 1) + 1) * 127.5).round().byte().numpy()  # (B, H, W, 3)
        found = zip(numbers, pixels, strict=True)
        return [number for number, picture in found if is_read_back(scene(number), detect(picture))]

    found = _by_all_cores(read, range(0, len(data), 32), encoders, "reading scenes back")
    rows = [row for some in found for row in some]
    if store is not None and not data.has_bad_rows:  # other rows took their turns, and may come back
        with suppress(OSError):  # a cache that cannot be written to keeps none
            write_atomically(store, json.dumps(rows) + "\n")
    return np.array(rows, np.int64)
