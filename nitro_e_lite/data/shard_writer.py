"""Writing shards: a killed writer loses the shard it was writing and no other.

The JSON file of a shard is written last, by one atomic rename; what a shard is stands in `shards.py`.
"""

from __future__ import annotations

import io
import json
import os
import shutil
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterable
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from nitro_e_lite.data.shards import ARRAYS, CARD, SHARD_ROWS, SHARDS, LatentBatch, read_card, release
from nitro_e_lite.errors import InvalidValue
from nitro_e_lite.files import sha256_file, write_atomically

STALE = 86_400.0  # seconds after which what a process left unfinished is taken for abandoned
WRITE_BYTES = 2**27  # rows are gathered up to this size: few large pieces are quick to open and to search


# -----------------------------------------------------------------------------------------------------------
# Writing
# -----------------------------------------------------------------------------------------------------------


class ShardWriter:
    """Writes one shard of a data set.

    Args:
        folder: of the data set.
        name: of the shard; rows are read in the order of the names.
        shapes: of one row of each column of numbers, as `array_shapes` gives them.
        pictures: whether the rows have pictures too.
    """

    def __init__(self, folder: str | Path, name: str, shapes: dict[str, tuple[int, ...]], pictures: bool = False):
        import datasets  # takes most of a second, and every training would wait for it
        from datasets.arrow_writer import ArrowWriter

        self._path = Path(folder) / SHARDS / f"{name}.arrow"
        self._partial = self._path.with_suffix(f".{os.getpid()}.partial")  # two processes never share a file
        self._path.parent.mkdir(parents=True, exist_ok=True)
        strings = datasets.Value("string")
        features = {n: datasets.List(datasets.Value("float16"), length=prod(s)) for n, s in shapes.items()}
        features |= {"captions": datasets.List(strings), "source": strings, "key": strings}
        features |= {"picture": datasets.Value("binary")} if pictures else {}
        self._texts = [name for name in features if name not in shapes]
        self._shapes, self._writer = shapes, ArrowWriter(path=str(self._partial), features=datasets.Features(features))
        self.rows, self._sources, self._waiting, self._bytes = 0, Counter(), [], 0

    def add(self, batch: LatentBatch) -> None:
        """Appends rows; numbers are stored as float16."""
        count = len(batch.captions)
        columns = {n: getattr(batch, n).to(torch.float16).flatten(1).cpu().numpy() for n in self._shapes}
        columns |= {"captions": batch.captions, "source": batch.sources or [""] * count}
        columns |= {"key": batch.keys or [""] * count, "picture": batch.pictures}
        self._waiting.append(columns)
        self.rows += count
        self._sources.update(columns["source"])
        self._bytes += sum(columns[n].nbytes for n in self._shapes) + sum(map(len, batch.pictures or ()))
        if self._bytes > WRITE_BYTES:
            self._write()

    def _write(self) -> None:
        if self._waiting:
            joined = {n: np.concatenate([c[n] for c in self._waiting]) for n in self._shapes}
            joined |= {n: sum((c[n] for c in self._waiting), []) for n in self._texts}
            self._writer.write_batch(joined)
            self._waiting, self._bytes = [], 0

    def finish(self, **about: Any) -> None:
        """Closes the shard; from now on it counts. `about` goes into its JSON file."""
        state = {"rows": self.rows, "bytes": 0, "sha256": "", "sources": dict(self._sources), "end": True, **about}
        if self.rows:
            self._write()
            self._writer.finalize()
            self._writer.close()
            with open(self._partial, "rb+") as file:
                os.fsync(file.fileno())
            state |= {"bytes": self._partial.stat().st_size, "sha256": sha256_file(self._partial)}
            os.replace(self._partial, self._path)
        else:
            self._writer.close()
            self._partial.unlink(missing_ok=True)
        write_atomically(self._path.with_suffix(".json"), json.dumps(state, ensure_ascii=False) + "\n")
        release(self._path.parent.parent, self._path.stem)


def remove_leftovers(folder: Path, mine: Callable[[str], bool]) -> None:
    """Removes what killed writers left of shards whose names are `mine`; for who holds the lock on these."""
    for leftover in (folder / SHARDS).glob("*.partial"):
        if mine(leftover.name.rsplit(".", 2)[0]):
            leftover.unlink(missing_ok=True)


def keep_card(folder: Path, card: dict[str, Any]) -> None:
    """Writes the card of a data set that is begun, or compares it with the one of the run that is continued.

    Only parts may be added to what is there.

    Raises:
        ValueError: the folder holds something else.
    """
    if (folder / CARD).is_file():
        before = read_card(folder)
        for name, value in card.items():
            if name != "parts" and before.get(name) != value:
                raise InvalidValue(
                    f"{folder}: {name} was {before.get(name)!r} and is {value!r} now; continue with what it was, "
                    "or name another folder"
                )
        if before == card:
            return
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / CARD, json.dumps(card, indent=1) + "\n")


def write_latents(
    folder: str | Path,
    batches: Iterable[LatentBatch],
    fingerprint: str,
    about: dict[str, Any] | None = None,
    shard_rows: int = SHARD_ROWS,
) -> None:
    """Writes a data set, whole or not at all.

    Several processes may write the same folder at once: each writes its own copy, and the first to finish gives it.

    Args:
        folder: where to; must not exist.
        batches: latents, captions and, if wanted, features, in order.
        fingerprint: of the encoder.
        about: anything JSON-able to keep in the card.
        shard_rows: rows after which the next shard begins.

    Raises:
        ValueError: when there is nothing to write.
    """
    folder = Path(folder)
    for old in folder.parent.glob(f"{folder.name}.*.partial"):  # of processes that were killed
        if time.time() - old.stat().st_mtime > STALE:
            shutil.rmtree(old, ignore_errors=True)
    partial = folder.with_name(f"{folder.name}.{uuid.uuid4().hex[:8]}.partial")
    shapes, writer, shard, pictures = {}, None, 0, {}
    for batch in batches:
        shapes = shapes or {n: list(x.shape[1:]) for n in ARRAYS if (x := getattr(batch, n)) is not None}
        if batch.pictures and not pictures:
            pictures = {"pictures": Image.open(io.BytesIO(batch.pictures[0])).width}
        writer = writer or ShardWriter(partial, f"{shard:06d}", shapes, bool(pictures))
        writer.add(batch)
        if writer.rows >= shard_rows:
            writer.finish()
            writer, shard = None, shard + 1
    if writer is not None:
        writer.finish()
    if not shapes:
        raise InvalidValue(f"{folder}: no data to write")
    card = {"fingerprint": fingerprint, "shape": shapes.pop("latents"), "arrays": shapes, **pictures, **(about or {})}
    write_atomically(partial / CARD, json.dumps(card, indent=1) + "\n")
    try:
        os.replace(partial, folder)
    except OSError:
        shutil.rmtree(partial, ignore_errors=True)
        if not (folder / CARD).is_file():  # else another process was first
            raise
