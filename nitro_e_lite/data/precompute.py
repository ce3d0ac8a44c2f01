"""Pictures to shards: every frozen encoder runs once, before training, instead of once an epoch.

`Encoding` takes a source apart into its parts, gives every process its own ones, and writes each part as a row of
shards. Two properties make it safe to leave alone for days:

* **Restartable.** A shard counts when its JSON file is there, and that file says where in the part the shard ended. A
  killed run is started again with the same command and loses at most the shard that each process was writing.
  A tar file that was cut short is taken up again where it ended, once it has changed. What cannot be read just now,
  a disk that is away or captions that are not unpacked yet, stops the run and costs nothing.
* **The same whatever the number of processes.** Parts, shards and batches are cut at fixed places, so one process and
  eight write the same data set, and a run may be resumed with another number.

What gives no row (a broken picture, a missing caption, features that are not finite) is kept with its reason in the
JSON file of the shard it would have gone into.
"""

from __future__ import annotations

import inspect
import sys
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline
from tqdm.auto import tqdm

from nitro_e_lite.data.shard_writer import ShardWriter, keep_card, remove_leftovers
from nitro_e_lite.data.shards import (
    SHARD_ROWS,
    SHARDS,
    LatentBatch,
    array_shapes,
    bad_rows,
    read_quarantine,
    sidecars,
)
from nitro_e_lite.data.sources import (
    FLUX,
    NO_CAPTION,
    NO_PICTURE,
    SA1B,
    Folder,
    JourneyDB,
    Problem,
    Prompts,
    Record,
    Source,
    read_prompts,
    square,
    to_jpeg,
)
from nitro_e_lite.errors import InvalidValue, Unusable
from nitro_e_lite.files import share_lock
from nitro_e_lite.inference.encoders import Encoders
from nitro_e_lite.inference.hub import EncoderUnavailable
from nitro_e_lite.inference.vision import GRID
from nitro_e_lite.runtime import in_order

LARGEST = 65_536  # pixels a side of a picture
ALL_MISSING = 100  # items of a part of which not one has picture and caption: that is no data set with gaps
GENERATOR = "black-forest-labs/FLUX.1-dev"
GENERATOR_REVISIONS = {GENERATOR: "3de623fc3c33e44ffbe2bad470d0f45bccf2eb21"}
SOURCES = {source.kind: source for source in (SA1B, JourneyDB, Folder)}


@dataclass(frozen=True)
class Decoded:
    """An item with its pixels uint8 (size, size, 3) and, if it is to be stored, a smaller JPEG of them."""

    record: Record
    pixels: np.ndarray
    jpeg: bytes | None


class Encoding:
    """The pre-computation of one data set, or this process's share of it.

    Args:
        source: raw pictures and captions.
        encoders: make the latents and, if wanted, the text features.
        out: folder of the data set; an unfinished one is continued.
        size: side in pixels to which pictures are cut; by default what gives 16x16 latents.
        text: store text features too: those of the first caption, the only one that is then kept.
        vision: stores vision features too: a `VisionEncoder` of `inference/vision.py` or anything with its
            `encode`, `width`, `fingerprint`.
        pictures: side in pixels of pictures to store, as JPEG, for a vision model that looks at them in training;
            DINOv2 looks at 224. None stores none.
        batch: pictures encoded at once.
        shard_rows: rows after which the next shard begins; the end of a part ends one, too.
        threads: for reading and decoding pictures.
        rank: number of this process.
        world: number of processes.

    Raises:
        ValueError: `out` holds another data set, or a size or count makes no sense.
    """

    def __init__(
        self,
        source: Source,
        encoders: Encoders,
        out: str | Path,
        *,
        size: int | None = None,
        text: bool = False,
        vision: Any = None,
        pictures: int | None = None,
        batch: int = 32,
        shard_rows: int = SHARD_ROWS,
        threads: int = 4,
        rank: int = 0,
        world: int = 1,
    ):
        for name, value in (("batch", batch), ("shard_rows", shard_rows), ("threads", threads), ("world", world)):
            if value < 1:
                raise InvalidValue(f"{name}={value}: must be at least 1")
        ratio = encoders.vae.spatial_compression_ratio
        self.size = GRID * ratio if size is None else size
        if not ratio <= self.size <= LARGEST or self.size % ratio:
            rule = f"must be a multiple of {ratio}, the autoencoder's compression, up to {LARGEST}"
            raise InvalidValue(f"size={size}: {rule}")
        if pictures is not None and not 1 <= pictures <= self.size:
            raise InvalidValue(f"pictures={pictures}: must be 1 to size={self.size}")
        self.source, self.encoders, self.out, self.text, self.vision = source, encoders, Path(out), text, vision
        self.pictures, self._share = pictures, (rank, world)
        self.batch, self.shard_rows, self.threads = batch, shard_rows, threads
        parts = source.parts()
        self.parts = source.share(rank, world)
        card = self._card(parts)
        self.shapes = array_shapes(card)
        keep_card(self.out, card)
        self.rows, self.skipped, self.seconds = 0, 0, 0.0
        self._writing, self._write = ThreadPoolExecutor(1, "shard"), Future()  # a batch, while the next is encoded
        self._write.set_result(None)
        self._bar = tqdm(
            desc="encoding", unit=" pictures", disable=rank > 0, mininterval=1 if sys.stderr.isatty() else 30
        )

    def _card(self, parts: list[str]) -> dict[str, Any]:
        side = self.size // self.encoders.vae.spatial_compression_ratio
        arrays, made_by = {}, {"text": None, "vision": None}
        if self.text:
            arrays["text"] = [self.encoders.max_text_length, self.encoders.width]
            made_by["text"] = self.encoders.fingerprint
        if self.vision is not None:
            arrays["vision"] = [GRID * GRID, self.vision.width]
            made_by["vision"] = self.vision.fingerprint
        return {
            "fingerprint": self.encoders.image_fingerprint,
            "shape": [self.encoders.latent_channels, side, side],
            "arrays": arrays,
            "features": made_by,
            "pictures": self.pictures,
            "image_size": self.size,
            "shard_rows": self.shard_rows,
            **self.source.describe(),
            "parts": len(parts),
        }

    def run(self) -> dict[str, Any]:
        """Encodes this process's parts; returns what it did: rows, skipped items, seconds, rows a second.

        Raises:
            RuntimeError: somebody else is encoding the same parts into this folder, or the source cannot be read now.
        """
        started = time.perf_counter()
        with self._bar, share_lock(self.out, *self._share):
            mine = set(self.parts)
            remove_leftovers(self.out, lambda shard: _part_of(shard) in mine)
            states = sidecars(self.out, keep=lambda shard: _part_of(shard) in mine)  # once, of thousands
            broken = {line["shard"] for line in read_quarantine(self.out) if line["row"] is None}
            for part in self.parts:
                number, start, ended = self._finished(part, states, broken)
                if not ended:
                    self._encode_part(part, number, start)
        self.seconds = time.perf_counter() - started
        speed = self.rows / self.seconds
        return {
            "rows": self.rows,
            "skipped": self.skipped,
            "seconds": round(self.seconds, 3),
            "rows_per_second": round(speed, 2),
        }

    def _finished(self, part: str, states: dict[str, Any], broken: set[str]) -> tuple[int, int, bool]:
        """Shards of a part that are done, the item after them, and whether they are all."""
        number, start = 0, 0
        while (state := states.get(name := f"{part}-{number:05d}")) and name not in broken:
            path = self.out / SHARDS / f"{part}-{number:05d}.arrow"
            if state["rows"] and not (path.is_file() and path.stat().st_size == state["bytes"]):
                break
            number, start = number + 1, state["next"]
            if state["end"] or (state.get("cut_at") is not None and state["cut_at"] == self.source.stamp(part)):
                return number, start, True
        return number, start, False

    def _encode_part(self, part: str, number: int, start: int) -> None:
        """Encodes a part from shard `number` and item `start` on."""
        items, ended = self._decoded(self.source.items(part, start)), False
        while not ended:
            writer = ShardWriter(self.out, f"{part}-{number:05d}", self.shapes, self.pictures is not None)
            skipped, notes, pending, position, ended, cut_at = Counter(), Counter(), [], start, True, None
            rows = 0
            for item in items:
                cut_at = item.cut_at if isinstance(item, Problem) else None
                position += cut_at is None
                if isinstance(item, Problem):
                    skipped[item.key, item.reason] += 1
                else:
                    pending.append(item)
                if len(pending) == self.batch:
                    rows += self._encode(pending, writer, skipped, notes)
                if rows + len(pending) >= self.shard_rows:
                    ended = False
                    break
            rows += self._encode(pending, writer, skipped, notes)
            self._write.result()
            self._check_not_all_missing(part, rows, skipped)
            left_out = [[key, reason, count] for (key, reason), count in skipped.items()]
            about = {"part": part, "start": start, "next": position, "end": ended and cut_at is None}
            about |= {} if cut_at is None else {"cut_at": cut_at}
            writer.finish(**about, skipped=left_out, notes=dict(notes))
            self.rows, self.skipped = self.rows + rows, self.skipped + skipped.total()
            number, start = number + 1, position

    def _check_not_all_missing(self, part: str, rows: int, skipped: Counter) -> None:
        missing = sum(count for (_, reason), count in skipped.items() if reason in (NO_CAPTION, NO_PICTURE))
        if not rows and missing >= ALL_MISSING and missing == skipped.total():
            places = " and ".join(map(str, self.source.folders))
            raise Unusable(
                f"{part}: not one of {missing} items has its picture and its caption; is all there in {places}? "
                "Nothing of this part is written: the same command looks again"
            )

    def _decoded(self, items: Iterable[Record | Problem]) -> Iterator[Decoded | Problem]:
        """The items in their order, decoded by several threads: a whole batch while the one before is encoded."""
        return in_order(self._decode, items, self.threads, ahead=self.batch)

    def _decode(self, item: Record | Problem) -> Decoded | Problem:
        if isinstance(item, Problem):
            if item.reason == NO_CAPTION:
                self.source.check_there()
            return item
        try:
            pixels = square(item.image, self.size)
        except ValueError as error:
            if str(error) == NO_PICTURE:
                self.source.check_there()
            return Problem(item.key, str(error))
        return Decoded(item, pixels, None if self.pictures is None else to_jpeg(pixels, self.pictures))

    def _encode(self, pending: list[Decoded], writer: ShardWriter, skipped, notes) -> int:
        """Encodes what is pending, gives it to be written and empties the list; returns the rows."""
        if not pending:
            return 0
        records, pictures = [one.record for one in pending], np.stack([one.pixels for one in pending])
        captions = [record.captions for record in records]
        features = {"latents": self.encoders.encode_images(pictures)}
        if self.text:
            notes["further caption left out"] += sum(len(texts) - 1 for texts in captions)
            captions = [texts[:1] for texts in captions]
            cut: list[int] = []
            features["text"] = self.encoders.encode_text([texts[0] for texts in captions], cut)
            notes[f"caption cut to {self.encoders.max_text_length} tokens"] += len(cut)
        if self.vision is not None:
            features["vision"] = self.vision.encode(pictures)
        features = {name: x.to(torch.float16).cpu() for name, x in features.items()}
        bad = np.logical_or.reduce([bad_rows(x.flatten(1).numpy()) for x in features.values()])
        for k in np.flatnonzero(bad):
            skipped[records[k].key, "encoded to numbers that are not finite"] += 1
        good = [int(k) for k in np.flatnonzero(~bad)]
        if good:
            keys, names = [records[k].key for k in good], [self.source.kind] * len(good)
            features = {name: x[good] for name, x in features.items()}
            stored = None if self.pictures is None else [pending[k].jpeg for k in good]
            texts = [captions[k] for k in good]
            batch = LatentBatch(captions=texts, pictures=stored, sources=names, keys=keys, **features)
            self._write.result()  # of the batch before
            self._write = self._writing.submit(writer.add, batch)
        self._bar.update(len(pending))
        pending.clear()
        return len(good)


def _part_of(shard: str) -> str:
    """The part that a shard is of: its name without the number."""
    return shard.rpartition("-")[0]


def open_source(kind: str, path: str | Path, captions: str | Path | None = None) -> Source:
    """A raw data set of `SOURCES`; for prompts see `drawn_source`.

    Raises:
        ValueError: an unknown kind, or captions for a kind that has its own.
    """
    if kind not in SOURCES:
        raise InvalidValue(f"kind={kind!r}: there are {', '.join([*SOURCES, Prompts.kind])}")
    if captions is not None and kind != SA1B.kind:
        raise InvalidValue(f"captions={str(captions)!r}: only {SA1B.kind!r} keeps them in a folder of their own")
    return SA1B(path, captions) if kind == SA1B.kind else SOURCES[kind](path)


def drawn_source(
    path: str | Path,
    generator: str | Path = GENERATOR,
    revision: str | None = None,
    settings: dict[str, Any] | None = None,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    batch: int = 8,
    size: int | None = None,
) -> Prompts:
    """A list of prompts, drawn by a diffusers pipeline as it is read.

    Args:
        path: the prompts, see `sources.Prompts`.
        generator: folder or hub id of a text-to-image pipeline.
        revision: commit of a hub id; the pinned one of `GENERATOR_REVISIONS` when None.
        settings: changes to `sources.FLUX`, of which the pipeline is given what it knows.
        device: where to draw.
        dtype: number type of the weights.
        batch: prompts drawn at once.
        size: pixels a side that will be encoded: the pictures are drawn so large, not enlarged; None: as in `FLUX`.

    Raises:
        EncoderUnavailable: the pipeline cannot be loaded; the message says what to do.
        ValueError: a setting that the pipeline does not know or cannot draw with, or an unreadable list.
    """
    import nitro_e_lite.inference.pipeline  # noqa: F401  now diffusers knows folders of this project, too

    prompts = read_prompts(path)  # first: a wrong line is found out before gigabytes are loaded
    place = {} if Path(generator).is_dir() else {"revision": revision or GENERATOR_REVISIONS.get(str(generator))}
    try:
        pipeline = DiffusionPipeline.from_pretrained(generator, dtype=dtype, use_safetensors=True, **place).to(device)
    except Exception as error:  # diffusers and the hub raise many kinds on what is no pipeline
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise EncoderUnavailable(
            f"{generator}: cannot be loaded ({reason}). FLUX.1-dev is gated: accept its licence at "
            f"https://huggingface.co/{GENERATOR} and run `hf auth login`, or name a folder with --generator"
        ) from None
    pipeline.set_progress_bar_config(disable=True)
    known = inspect.signature(pipeline.__call__).parameters
    unknown = [name for name in settings or {} if name not in known]
    if unknown:
        raise InvalidValue(f"settings: {type(pipeline).__name__} does not know {', '.join(unknown)}")
    wanted = FLUX | ({"height": size, "width": size} if size else {})
    chosen = {name: value for name, value in wanted.items() if name in known} | (settings or {})
    name = "@".join([str(generator), str(place["revision"])]) if place else Path(generator).name
    source = Prompts(prompts, pipeline, chosen, batch=batch, generator=name)
    source.try_settings()
    return source
