"""What one process reads in one step: its share of the batch and all that is drawn at random for it.

Everything of step k is a function of (seed, k): the rows, the caption among a picture's paraphrases, the captions that
are dropped, the timesteps, the noise. It is drawn for the whole batch and then cut, so that two processes see together
exactly what one process would see. Both scenes of a minimal pair (``minimal_pairs.py``) get the same draws. The next
batch is prepared in a thread while the current one is computed.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from nitro_e_lite import flow
from nitro_e_lite.config import DataConfig, TrainConfig
from nitro_e_lite.encoder_set import Encoders
from nitro_e_lite.minimal_pairs import FACTS, minimal_pair
from nitro_e_lite.quality import readable_rows
from nitro_e_lite.scenes import render
from nitro_e_lite.shards import CARD, LatentBatch, LatentDataset, batch_indices
from nitro_e_lite.training_data import cached_scenes, scene_row


@dataclass(frozen=True)
class Share:
    """What one process works on.

    Attributes:
        latents: clean (B, C, H, W).
        captions: one a picture; "" where the caption was dropped.
        t: noise levels (B,).
        noise: (B, C, H, W).
        text: stored text features (B, L, Dc), of captions that were not dropped; None when they are not stored.
        vision: stored vision features (B, N, Cv), or None.
        images: the pictures uint8 (B, H, W, 3), drawn only when a vision model has to look at them; or None.
    """

    latents: Tensor
    captions: list[str]
    t: Tensor
    noise: Tensor
    text: Tensor | None = None
    vision: Tensor | None = None
    images: Tensor | None = None

    def parts(self, count: int) -> list[Share]:
        """The share in ``count`` equal parts."""
        size = len(self.captions) // count
        cuts = [slice(k * size, (k + 1) * size) for k in range(count)]
        return [Share(**{name: v if v is None else v[cut] for name, v in vars(self).items()}) for cut in cuts]


class Batches:
    """The training and validation data of a run.

    Args:
        config: of the run.
        encoders: make the latents, or must match those that are stored.
        rank: of this process.
        world: number of processes.

    Raises:
        FileNotFoundError: a folder holds no data.
        ValueError: fewer rows than one batch are left, or stored latents are of another encoder.
    """

    def __init__(self, config: TrainConfig, encoders: Encoders, rank: int = 0, world: int = 1):
        self.config = config
        self.mine = slice(rank * config.batch_size // world, (rank + 1) * config.batch_size // world)
        self.training = _open(config, encoders, "train")
        self.validation = _open(config, encoders, "validation")
        self.group = 2 if config.data.pairs else 1
        self.rows = self._chosen_rows(encoders)  # (N, group)
        if self.rows.size < config.batch_size:
            raise ValueError(
                f"batch_size={config.batch_size}: only {self.rows.size} of {len(self.training)} rows are left by "
                f"data.quality={config.data.quality!r}"
            )
        self.needs_images = False
        self._thread = ThreadPoolExecutor(1, "next batch")
        self._ahead: tuple[int, Future[Share]] | None = None

    def _chosen_rows(self, encoders: Encoders) -> np.ndarray:
        """Rows to train on, (N, group): a minimal pair stays only as a whole."""
        data, groups = self.config.data, np.arange(len(self.training)).reshape(-1, self.group)
        if unknown := set(data.pairs) - set(FACTS):
            raise ValueError(f"data.pairs={', '.join(sorted(unknown))}: must be of {', '.join(FACTS)}")
        if data.pairs and set(data.pairs) != set(FACTS):
            groups = groups[[minimal_pair(data.seed, index).fact in data.pairs for index in range(len(groups))]]
        if data.quality == "readable" and not data.folders:
            store = self.training.folders[0] / "readable.json"
            readable = readable_rows(encoders, self.training, partial(scene_row, data), store)
            return groups[np.isin(groups, readable).all(1)]
        return groups

    def share(self, step: int) -> Share:
        """This process's share of step ``step``."""
        if self._ahead is None or self._ahead[0] != step:
            self._ahead = (step, self._thread.submit(self._draw, step))
        share = self._ahead[1].result()
        if step + 1 < self.config.steps:
            self._ahead = (step + 1, self._thread.submit(self._draw, step + 1))
        return share

    def _draw(self, step: int) -> Share:
        config, mine = self.config, self.mine
        count, alike = config.batch_size // self.group, self.group  # rows of a group get the same draws
        rows = self.rows[batch_indices(config.seed, len(self.rows), count, step)].flatten()[mine]
        batch = self.training.batch(rows)
        generator = torch.Generator().manual_seed(config.seed * 1_000_003 + step)
        which = torch.rand(count, generator=generator).repeat_interleave(alike)[mine].tolist()
        dropped = torch.rand(count, generator=generator).repeat_interleave(alike)[mine] < config.caption_dropout
        captions = [
            "" if drop else ways[int(u * len(ways))]
            for ways, u, drop in zip(batch.captions, which, dropped.tolist(), strict=True)
        ]
        t = flow.sample_timesteps(count, generator, config.timestep_mean, config.timestep_std)
        t = t.repeat_interleave(alike)[mine]
        noise = torch.randn(count, *batch.latents.shape[1:], generator=generator).repeat_interleave(alike, 0)[mine]
        images = self._pictures(rows) if self.needs_images else None
        return Share(batch.latents, captions, t, noise, batch.text, batch.vision, images)

    def _pictures(self, rows: np.ndarray) -> Tensor:
        """The scenes of ``rows``, drawn again; only right while each row's latents are its own."""
        if self.training.has_bad_rows:
            folder = self.training.folders[0]
            raise ValueError(f"{folder}: holds bad rows, so latents and pictures differ; delete it to encode it anew")
        scenes = [scene_row(self.config.data, int(row)) for row in rows]
        return torch.stack([torch.from_numpy(render(scene)) for scene in scenes])  # (B, H, W, 3)

    def validation_shares(self, size: int = 64) -> Iterator[Share]:
        """Yields the validation set in shares of ``size``: first captions, fixed noise, t spread over [0, 1]."""
        count = len(self.validation)
        generator = torch.Generator().manual_seed(2**31 + self.config.seed)
        t = (torch.randperm(count, generator=generator) + 0.5) / count
        for first in range(0, count, size):
            batch = self.validation.batch(range(first, min(first + size, count)))
            noise = torch.randn(batch.latents.shape, generator=generator)
            yield Share(batch.latents, first_captions(batch), t[first : first + size], noise, batch.text)

    def validation_captions(self, count: int) -> list[str]:
        """The first captions of the first ``count`` validation pictures."""
        return first_captions(self.validation.batch(range(min(count, len(self.validation)))))


def check_folders(data: DataConfig) -> None:
    """Looks for the shards of a run before anything is loaded.

    Raises:
        FileNotFoundError: a folder holds none.
        ValueError: there are folders to train on and none to validate on.
    """
    if data.folders and not data.validation_folders:
        raise ValueError("data.validation_folders=(): name shards to validate on, along with data.folders")
    for folder in (*data.folders, *data.validation_folders):
        if not (Path(folder) / CARD).is_file():
            raise FileNotFoundError(f"{folder}: holds no shards ({CARD} is missing); nitro-e data encode makes them")


def first_captions(batch: LatentBatch) -> list[str]:
    """One caption a picture."""
    return [ways[0] for ways in batch.captions]


def _open(config: TrainConfig, encoders: Encoders, split: str) -> LatentDataset:
    if not config.data.folders:
        return cached_scenes(encoders, config.data, split)
    folders = config.data.folders if split == "train" else config.data.validation_folders
    return LatentDataset(folders, encoders.image_fingerprint)
