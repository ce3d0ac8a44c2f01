"""The training data of the lite model: scenes, encoded once and cached."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from tqdm.auto import tqdm

from nitro_e_lite.common import cache_dir
from nitro_e_lite.config import DataConfig, to_dict
from nitro_e_lite.encoder_set import Encoders
from nitro_e_lite.scenes import caption, render, sample_scene
from nitro_e_lite.shards import LatentBatch, LatentDataset, write_latents

VALIDATION_START = 2**40  # scenes from this index on are for validation


def encode_scenes(
    encoders: Encoders, data: DataConfig, start: int, count: int, batch: int = 64
) -> Iterator[LatentBatch]:
    """Yields ``LatentBatch`` after ``LatentBatch`` for scenes ``start .. start + count`` of the data set."""
    for first in tqdm(range(0, count, batch), desc="encoding scenes", mininterval=5, leave=False):
        scenes = [sample_scene(data.seed, start + i) for i in range(first, min(first + batch, count))]
        images = torch.stack([torch.from_numpy(render(scene)) for scene in scenes])  # (B, H, W, 3)
        captions = [[caption(scene, variant) for variant in range(data.captions)] for scene in scenes]
        keys = [f"seed {data.seed}, scene {start + first + k}" for k in range(len(scenes))]
        sources = ["synthetic_scenes"] * len(scenes)
        yield LatentBatch(encoders.encode_images(images).float(), captions, sources=sources, keys=keys)


def cached_scenes(encoders: Encoders, data: DataConfig, split: str) -> LatentDataset:
    """The latents of the training or validation scenes, encoded on first use and then read from the cache folder."""
    start, count = (0, data.scenes) if split == "train" else (VALIDATION_START, data.validation_scenes)
    name = f"scenes-{encoders.image_fingerprint[:12]}-seed{data.seed}-{start}-{count}x{data.captions}"
    folder = cache_dir() / "latents" / name
    if not folder.exists():
        about = {"data": to_dict(data), "split": split}
        write_latents(folder, encode_scenes(encoders, data, start, count), encoders.image_fingerprint, about)
    return LatentDataset(folder, encoders.image_fingerprint)
