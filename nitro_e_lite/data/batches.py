"""What one process reads in one step: its rows of the batch and all that is drawn at random for them.

Everything of step k is a function of (seed, k): the rows, the caption among a picture's paraphrases, the captions that
are dropped, the timesteps, the noise. Each purpose has a stream of its own (`runtime.generator`), numbers that are
cheap are drawn for the whole batch and then cut, noise is drawn row by row: two processes see together exactly what one
process would see. Both scenes of a minimal pair (`minimal_pairs.py`) get the same draws; a run can
alternate between steps on pairs and steps on plain scenes. The next `AHEAD` batches are prepared in a thread while the
current one is computed, for an accelerator in memory from which it copies without waiting. At full scale a batch of 256
rows with text and vision features is 240 MB, so a process holds 1 GB of them.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, Generic, Self, TypeVar

import numpy as np
import torch
from torch import Tensor

from nitro_e_lite.config import FACTS, DataConfig, TrainConfig
from nitro_e_lite.data.scene_latents import cached_scenes, readable_rows, scene_row
from nitro_e_lite.data.shards import CARD, LatentBatch, LatentDataset
from nitro_e_lite.errors import InvalidValue, MissingFile
from nitro_e_lite.inference.encoders import Encoders
from nitro_e_lite.model import flow
from nitro_e_lite.runtime import generator
from nitro_e_lite.scenes.captions import words
from nitro_e_lite.scenes.grammar import COLORS
from nitro_e_lite.scenes.minimal_pairs import minimal_pair
from nitro_e_lite.scenes.render import render
from nitro_e_lite.scenes.verifier import VERSION

AHEAD = 3  # batches prepared before they are asked for


Batch = TypeVar("Batch")


class Ahead(Generic[Batch]):
    """What the next steps read, prepared in a thread while the current one is computed.

    Args:
        read: what a step needs in the host's memory; a function of the step alone.
        steps: of the run; nothing is prepared beyond them.
    """

    def __init__(self, read: Callable[[int], Batch], steps: int):
        self._read, self._steps = read, steps
        self._thread = ThreadPoolExecutor(1, "next batches")
        self._ready: dict[int, Future[Batch]] = {}  # by step: the current one and the next ones

    def __call__(self, step: int) -> Batch:
        """What step `step` reads; the steps after it are then prepared."""
        wanted = range(step, max(step + 1, min(step + 1 + AHEAD, self._steps)))
        self._ready = {one: self._ready.get(one) or self._thread.submit(self._read, one) for one in wanted}
        return self._ready[step].result()


class Rows:
    """A frozen dataclass of tensors and lists, each with one row a picture; fields may be None."""

    def pinned(self) -> Self:
        """The same in pinned memory; what lies there already stays."""
        return replace(self, **{n: x.pin_memory() for n, x in vars(self).items() if isinstance(x, Tensor)})

    def to(self, device: torch.device) -> Self:
        """The same on `device`; pinned memory is copied while others compute."""
        ahead = device.type != "mps"  # see `runtime.send`
        moved = {n: x.to(device, non_blocking=ahead) for n, x in vars(self).items() if isinstance(x, Tensor)}
        return replace(self, **moved)

    def microbatches(self, count: int) -> list[Self]:
        """The same in `count` equal parts."""
        values: dict[str, Any] = vars(self)
        size = len(next(iter(values.values()))) // count
        cuts = [slice(k * size, (k + 1) * size) for k in range(count)]
        return [type(self)(**{name: v if v is None else v[cut] for name, v in values.items()}) for cut in cuts]


@dataclass(frozen=True)
class LocalBatch(Rows):
    """What one process works on.

    Attributes:
        latents: clean (B, C, H, W); float16 as stored where an accelerator converts them.
        captions: one a picture; "" where the caption was dropped.
        t: noise levels (B,).
        noise: (B, C, H, W).
        text: stored text features (B, L, Dc), of captions that were not dropped; None when they are not stored.
        vision: stored vision features (B, N, Cv), or None.
        images: the pictures uint8 (B, H, W, 3), only when a vision model has to look at them; or None.
    """

    latents: Tensor
    captions: list[str]
    t: Tensor
    noise: Tensor
    text: Tensor | None = None
    vision: Tensor | None = None
    images: Tensor | None = None

    def to(self, device: torch.device) -> LocalBatch:
        """The same on `device`, where latents are made float32."""
        moved = super().to(device)
        return replace(moved, latents=moved.latents.float())


@dataclass(frozen=True)
class _Source:
    """Rows to train on: `rows` (N, group) of `data`; the rows of a group get the same draws."""

    config: DataConfig
    data: LatentDataset
    rows: np.ndarray

    @classmethod
    def open(cls, config: DataConfig, encoders: Encoders) -> _Source:
        """The rows that `config.quality` and `config.pairs` leave: a minimal pair stays only as a whole."""
        data = _open(config, encoders, "train")
        groups = np.arange(len(data)).reshape(-1, 2 if config.pairs else 1)
        if config.pairs and set(config.pairs) != set(FACTS):
            groups = groups[[minimal_pair(config.seed, index).fact in config.pairs for index in range(len(groups))]]
        if config.quality == "readable" and not config.folders:
            store = data.folders[0] / f"readable-by-verifier-{VERSION}.json"
            readable = readable_rows(encoders, data, partial(scene_row, config), store)
            groups = groups[np.isin(groups, readable).all(1)]
        return cls(config, data, groups)


class Batches:
    """The training and validation data of a run.

    Args:
        config: of the run.
        encoders: make the latents, or must match those that are stored.
        rows: of the global batch, those that this process works on; None: all.
        device: where they will be needed; None: here.

    Attributes:
        needs_images: whether a vision model has to look at the pictures.

    Raises:
        FileNotFoundError: a folder holds no data.
        ValueError: fewer rows than one batch are left, or stored latents are of another encoder.
    """

    def __init__(
        self,
        config: TrainConfig,
        encoders: Encoders,
        rows: range | None = None,
        device: torch.device | None = None,
    ):
        self.config, self.rows = config, range(config.batch_size) if rows is None else rows
        self.sources = [_Source.open(config.data, encoders)]
        if config.data.pairs and config.data.pairs_every > 1:
            self.sources.append(_Source.open(replace(config.data, pairs=()), encoders))
        self.training = self.sources[0].data
        self.validation = _open(config.data, encoders, "validation")
        if not config.repa.weight:
            for data in (*(source.data for source in self.sources), self.validation):
                data.leave_out("vision")  # nobody looks at it, and it is most of a row
        for source in self.sources:
            if source.rows.size < config.batch_size:
                raise InvalidValue(
                    f"batch_size={config.batch_size}: only {source.rows.size} of {len(source.data)} rows are left by "
                    f"data.quality={config.data.quality!r}"
                )
        self.needs_images, self._pin = False, device is not None and device.type == "cuda"
        self.local = Ahead(self._draw, config.steps)  # by step: what this process reads

    @property
    def counts(self) -> list[int]:
        """Rows to train on, by source; with the seed they fix the order of training."""
        return [source.rows.size for source in self.sources]

    def compare(self, before: list[int]) -> None:
        """Warns when a checkpoint was written with other numbers of rows."""
        if before != self.counts:
            warnings.warn(
                f"data: {before} rows when the checkpoint was written, {self.counts} now; "
                "from here on the samples come in another order",
                stacklevel=2,
            )

    @property
    def digest(self) -> str:
        """Names what there is to read, here; processes of one run must have the same."""
        return " ".join([*(source.data.digest for source in self.sources), self.validation.digest])

    def microbatch(self, step: int, part: int, count: int) -> LocalBatch:
        """Part `part` of `count` equal ones of `local(step)`."""
        return self.local(step).microbatches(count)[part]

    def _source(self, step: int) -> tuple[_Source, int]:
        """What step `step` reads, and how many steps have read of it before."""
        pairs, every = (step + 1) // self.config.data.pairs_every, self.config.data.pairs_every
        if len(self.sources) == 1:
            return self.sources[0], step
        return (self.sources[0], pairs - 1) if (step + 1) % every == 0 else (self.sources[1], step - pairs)

    def _draw(self, step: int) -> LocalBatch:
        config, mine = self.config, slice(self.rows.start, self.rows.stop)
        source, before = self._source(step)
        alike = source.rows.shape[1]
        count = config.batch_size // alike
        rows = source.rows[batch_indices(config.seed, len(source.rows), count, before)].flatten()[mine]
        stored = self.needs_images and source.data.has_pictures
        batch = source.data.batch(rows, images=stored, pin=self._pin)
        stream = partial(generator, config.seed, step)

        def uniform(purpose: str) -> Tensor:
            return torch.rand(count, generator=stream(purpose)).repeat_interleave(alike)[mine]  # (B,)

        which, dropped = uniform("caption").tolist(), uniform("dropout") < config.caption_dropout
        t = flow.sample_timesteps(count, stream("timestep"), config.timestep_mean, config.timestep_std)
        t = t.repeat_interleave(alike)[mine]
        drawn = {
            n: torch.randn(batch.latents.shape[1:], generator=stream("noise", n))
            for n in dict.fromkeys(row // alike for row in self.rows)
        }
        noise = torch.stack([drawn[row // alike] for row in self.rows])  # (B, C, H, W)
        ways = batch.captions
        if config.data.colorless:
            plain = uniform("colorless") < config.data.colorless
            ways = [_colorless(w) or w if only else w for w, only in zip(ways, plain.tolist(), strict=True)]
        captions = [
            "" if drop else some[int(u * len(some))]
            for some, u, drop in zip(ways, which, dropped.tolist(), strict=True)
        ]
        images = batch.images if stored or not self.needs_images else self._pictures(source, rows)
        local = LocalBatch(batch.latents, captions, t, noise, batch.text, batch.vision, images)
        return local.pinned() if self._pin else local

    def _pictures(self, source: _Source, rows: np.ndarray) -> Tensor:
        """The scenes of `rows`, drawn again; only right while each row's latents are its own."""
        if source.data.has_bad_rows:
            folder = source.data.folders[0]
            raise InvalidValue(f"{folder}: holds bad rows, so latents and pictures differ; delete it to encode it anew")
        scenes = [scene_row(source.config, int(row)) for row in rows]
        return torch.stack([torch.from_numpy(render(scene)) for scene in scenes])  # (B, H, W, 3)

    def validation_rows(self, rank: int = 0, world: int = 1, size: int = 64) -> list[range]:
        """The rows that process `rank` of `world` validates on, in batches of `size`."""
        count = min(len(self.validation), self.config.data.validation_rows)
        return [range(first, min(first + size, count)) for first in range(rank * size, count, world * size)]

    def validation_batches(self, rank: int = 0, world: int = 1) -> Iterator[LocalBatch]:
        """Yields the batches of `validation_rows`: first captions, t over [0, 1]; the same in all runs."""
        mine, everyone = self.validation_rows(rank, world), self.validation_rows()
        count, fixed = everyone[-1].stop, torch.Generator().manual_seed(2**31)
        t = (torch.randperm(count, generator=fixed) + 0.5) / count
        for rows in everyone:
            noise = torch.randn(len(rows), *self.validation.shape, generator=fixed)  # of other processes' rows too
            if rows in mine:
                batch = self.validation.batch(rows)
                yield LocalBatch(batch.latents, first_captions(batch), t[rows.start : rows.stop], noise, batch.text)

    def validation_captions(self, count: int) -> list[str]:
        """The first captions of the first `count` validation pictures."""
        return first_captions(self.validation.batch(range(min(count, len(self.validation)))))


def check_folders(data: DataConfig) -> None:
    """Looks for the shards of a run before anything is loaded.

    Raises:
        FileNotFoundError: folders hold none; all of them are named.
        ValueError: there are folders to train on and none to validate on.
    """
    if data.folders and not data.validation_folders:
        raise InvalidValue("data.validation_folders=(): name shards to validate on, along with data.folders")
    missing = [one for one in (*data.folders, *data.validation_folders) if not (Path(one) / CARD).is_file()]
    if missing:
        hold = "holds" if len(missing) == 1 else "each holds"
        raise MissingFile(f"{', '.join(missing)}: {hold} no shards ({CARD} is missing); nitro-e data encode makes them")


def first_captions(batch: LatentBatch) -> list[str]:
    """One caption a picture."""
    return [ways[0] for ways in batch.captions]


def _colorless(captions: list[str]) -> list[str]:
    """Those captions that name no colour."""
    return [text for text in captions if not COLORS.keys() & words(text)]


def _open(config: DataConfig, encoders: Encoders, split: str) -> LatentDataset:
    if not config.folders:
        return cached_scenes(encoders, config, split)
    folders = config.folders if split == "train" else config.validation_folders
    return LatentDataset(folders, encoders.image_fingerprint, encoders.fingerprint)


def batch_indices(seed: int, length: int, batch_size: int, step: int) -> np.ndarray:
    """Which rows step `step` (counted from 0) reads: a fresh permutation each epoch, the incomplete rest left out.

    Args:
        seed: of the order.
        length: rows in the data set.
        batch_size: rows a step, over all processes.
        step: global step.

    Returns:
        int64 (batch_size,).

    Raises:
        ValueError: when a batch is larger than the data set.
    """
    if batch_size > length:
        raise InvalidValue(f"batch_size={batch_size}: larger than the data set ({length} rows)")
    epoch, position = divmod(step, length // batch_size)
    return _permutation(seed, epoch, length)[position * batch_size : (position + 1) * batch_size]


@lru_cache(maxsize=2)
def _permutation(seed: int, epoch: int, length: int) -> np.ndarray:
    """The order of one epoch; remembered, because every step of the epoch asks for it."""
    return torch.randperm(length, generator=generator(seed, epoch, "order")).numpy()
