"""Which scenes are good enough to fine-tune on.

The second stage of training looks at fewer, better pictures. Among scenes drawn by a program there are no bad
photographs, but there are bad *latents*: small or crowded objects that the autoencoder blurs until nobody could name
them. A scene is kept when the verifier reads its stored latents, decoded again, as exactly the objects it was drawn
from, each in its place. What the verifier cannot read the transformer would only be taught to blur.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from tqdm.auto import tqdm

from nitro_e_lite.data.shards import LatentDataset
from nitro_e_lite.inference.encoder_set import Encoders
from nitro_e_lite.inference.encoders import decode_latents
from nitro_e_lite.scenes.grammar import Scene
from nitro_e_lite.scenes.verifier import Detection, detect

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
    rows = []
    for first in tqdm(range(0, len(data), 32), desc="reading scenes back", mininterval=5, leave=False):
        numbers = range(first, min(first + 32, len(data)))
        latents = data.batch(numbers).latents.to(encoders.vae.device)
        images = decode_latents(encoders.vae, latents, encoders.stats)  # (B, 3, H, W)
        pixels = ((images.float().cpu().permute(0, 2, 3, 1) + 1) * 127.5).round().byte().numpy()  # (B, H, W, 3)
        for number, picture in zip(numbers, pixels, strict=True):
            if is_read_back(scene(number), detect(picture)):
                rows.append(number)
    if store is not None:
        temporary = store.with_suffix(".tmp")
        temporary.write_text(json.dumps(rows), encoding="utf-8")
        os.replace(temporary, store)
    return np.array(rows, np.int64)
